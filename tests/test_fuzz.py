"""Thousands of broken files give an image or one of the project's errors, with bounded work and memory.

The work is bounded by what is decoded: no file may claim more pixels than data.py allows for its size.
"""

import io
import resource

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import checkpoints
import data
import update
from errors import InputError

CASES = 300                        # mutations of each kind of file
MEMORY = 3 * 4 * 2 ** 25 // 1024   # KiB added to the peak: three copies in RGBA of the most pixels that are decoded


@pytest.fixture(autouse=True)
def memory_is_returned():
    """Undoes what a training in this process may have set, so that the peak is that of a single file."""
    update.keep_freed_memory(False)


def mutated(content, rng):
    """One of the ways in which files are damaged: bits, bytes, lengths, a hole, a tail cut off, parts swapped."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        part = len(content) if rng.random() < 0.5 else min(len(content), 64)    # half of them in the header
        at, kind = int(rng.integers(part)), int(rng.integers(7))
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
        content = content or bytearray(1)
    return bytes(content)


def fuzz(file, content, read, errors=10):
    """Calls read(file) for CASES mutations of the content. Returns the results; checks that errors are one line, and
    that there are at least `errors`."""
    rng, peak, results = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(CASES):
        file.write_bytes(mutated(content, rng))
        try:
            results.append(read(file))
        except InputError as error:
            assert "\n" not in str(error) and file.name in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY
    assert len(results) <= CASES - errors
    return results


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {}), ("JPEG", {"progressive": True, "exif": Image.Exif()}), ("PNG", {}), ("WEBP", {}), ("BMP", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {}), ("GIF", {"save_all": True}), ("AVIF", {}), ("PPM", {}),
    ("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("HEIF", {})])
def test_a_broken_image_gives_a_picture_or_an_input_error(tmp_path, monkeypatch, kind, options):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    y, x = np.mgrid[:40, :48]
    picture = Image.fromarray(np.stack([x * 5, y * 6, (x + y) * 2], -1).astype(np.uint8))
    frames = {"append_images": [picture.rotate(90)]} if kind == "GIF" else {}
    picture.save(buffer := io.BytesIO(), kind, **options, **frames)
    sizes, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.width * self.height) or load(self))
    for pixels in fuzz(tmp_path / "picture.png", buffer.getvalue(), lambda file: data.read_photo(file, 32, 3)):
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert max(sizes) < 2 ** 25


def test_a_broken_checkpoint_gives_the_same_tensors_or_an_input_error(tmp_path):
    weights = {"w": torch.arange(64.0), "b": torch.arange(8)}
    state = {"ema": weights, "constants": {}, "counters": {"step": 3}}
    file = checkpoints.save(tmp_path, state, 3)
    for saved in fuzz(file, file.read_bytes(), checkpoints.load):
        assert all(torch.equal(saved["ema"][name], weights[name]) for name in weights)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"format": checkpoints.FORMAT, "weights": Trap()}, tmp_path / "step_00000001.pt")
    with pytest.raises(InputError, match=r"step_00000001\.pt"):
        checkpoints.load(tmp_path / "step_00000001.pt")
    assert not (tmp_path / "sprung").exists()
