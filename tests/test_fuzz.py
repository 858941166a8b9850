"""Broken files of thousands of kinds: only our own errors come out, in bounded time and memory."""

import io
import resource
import time

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data

CASES, SECONDS = 300, 20          # of each kind of file at most, whichever comes first; at least a tenth of CASES
SLOWEST = 5.0                      # seconds for one case
MEMORY = 3 * 4 * data.PIXEL_LIMIT // 1024     # KiB added to the peak: the largest picture allowed, 3 times in RGBA


def mutated(content, rng):
    """One of the ways in which files go bad: bits, bytes, lengths, a hole, a tail cut off, parts swapped."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(len(content))), int(rng.integers(7))
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at] = int(rng.integers(256))
        elif kind == 2:
            content[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"])
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at:at + int(rng.integers(1, 64))]
        elif kind == 5:
            content[at:at] = rng.bytes(int(rng.integers(1, 64)))
        else:
            other = int(rng.integers(len(content)))
            content[at:at + 16], content[other:other + 16] = content[other:other + 16], content[at:at + 16]
        if not content:
            content = bytearray(1)
    return bytes(content)


def fuzz(content, check):
    """check(mutated content) for many mutations; returns how many there were."""
    rng, peak = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + SECONDS
    for case in range(CASES):
        if time.monotonic() > end:
            break
        bad, began = mutated(content, rng), time.monotonic()
        check(bad)
        assert time.monotonic() - began < SLOWEST, f"case {case}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY
    return case


def picture(kind, **options):
    y, x = np.mgrid[:40, :48]
    pixels = np.stack([x * 5, y * 6, (x + y) * 2], -1).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if kind == "GIF":
        image.save(buffer, kind, save_all=True, append_images=[image.rotate(90)])
    else:
        image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {}), ("JPEG", {"progressive": True, "exif": Image.Exif()}), ("PNG", {}), ("WEBP", {}), ("BMP", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {}), ("GIF", {}), ("AVIF", {})])
def test_broken_images_give_a_picture_or_an_error_of_ours(tmp_path, kind, options):
    file, outcomes = tmp_path / "picture.png", {True: 0, False: 0}

    def check(content):
        file.write_bytes(content)
        try:
            pixels = data.read_photo(file, 32, 3)
        except data.InputError as error:
            assert "\n" not in str(error) and "picture.png" in str(error)
            outcomes[False] += 1
        else:
            assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
            outcomes[True] += 1

    assert fuzz(picture(kind, **options), check) >= CASES // 10
    assert outcomes[False] > 10, outcomes


def test_broken_checkpoints_give_the_same_tensors_or_an_error_of_ours(tmp_path):
    weights = {"w": torch.arange(64.0), "b": torch.arange(8)}
    file = checkpoints.save(tmp_path, {"weights": weights, "counters": {"step": 3}}, 3)
    outcomes = {True: 0, False: 0}

    def check(content):
        file.write_bytes(content)
        try:
            saved = checkpoints.load(file)
        except checkpoints.InputError as error:
            assert "\n" not in str(error) and file.name in str(error)
            outcomes[False] += 1
        else:
            assert all(torch.equal(saved["weights"][name], weights[name]) for name in weights)
            outcomes[True] += 1

    assert fuzz(file.read_bytes(), check) >= CASES // 10
    assert outcomes[False] > 10, outcomes


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would write a file when read."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"format": checkpoints.FORMAT, "weights": Trap()}, tmp_path / "step_00000001.pt")
    with pytest.raises(checkpoints.InputError, match=r"step_00000001\.pt"):
        checkpoints.load(tmp_path / "step_00000001.pt")
    assert not (tmp_path / "sprung").exists()
