"""data.py: every kind of file decodes to the right colours, one pass that survives what happens to it, batches."""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import data

REPO = pathlib.Path(data.__file__).parent
RED, GREEN, BLUE = (220, 40, 30), (30, 190, 60), (20, 60, 210)


def halves(left=RED, right=BLUE, size=(64, 64)):
    """A picture whose left half and right half are flat."""
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return picture


def sides(pixels):
    """The colours in the middle of the left and of the right half."""
    height, width = pixels.shape[:2]
    return [pixels[height // 2, width // 4].astype(int), pixels[height // 2, 3 * width // 4].astype(int)]


def assert_sides(pixels, left, right, tolerance=8):
    for seen, expected in zip(sides(pixels), (left, right)):
        assert np.abs(seen - np.array(expected)).max() <= tolerance, (seen, expected)


def load(root, tmp_path, size=16, channels=3, **options):
    options = {"workers": 0, "progress": False, **options}
    return data.load_images(root, size, channels, tmp_path / "cache", **options)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that this process decodes, as they are decoded."""
    names = []
    original = data._decode

    def counting(path, *settings):
        names.append(os.path.basename(path))
        return original(path, *settings)

    monkeypatch.setattr(data, "_decode", counting)
    return names


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.avif", "a.gif"])
def test_each_format_decodes_to_its_colours(tmp_path, name):
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    halves().save(tmp_path / name)
    images = load(tmp_path, tmp_path, size=32)
    assert images.paths == [name]
    assert_sides(images.images[0], RED, BLUE, tolerance=12)


def test_grey_palette_and_bilevel_pictures_keep_their_colours(tmp_path):
    Image.fromarray(np.repeat(np.array([[40] * 32 + [200] * 32], np.uint8), 64, 0)).save(tmp_path / "grey.png")
    halves().quantize(8).save(tmp_path / "palette.png")
    halves((0, 0, 0), (255, 255, 255)).convert("1").save(tmp_path / "bilevel.png")
    assert_sides(data.read_photo(tmp_path / "grey.png", 32, 3), (40,) * 3, (200,) * 3, 1)
    assert_sides(data.read_photo(tmp_path / "palette.png", 32, 3), RED, BLUE)
    assert_sides(data.read_photo(tmp_path / "bilevel.png", 32, 3), (0,) * 3, (255,) * 3, 1)


@pytest.mark.parametrize("name", ["cmyk.jpg", "cmyk.tif"])
def test_cmyk_pictures_keep_their_colours(tmp_path, name):
    halves().convert("CMYK").save(tmp_path / name)
    assert_sides(data.read_photo(tmp_path / name, 32, 3), RED, BLUE, 12)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, name):
    levels = np.repeat(np.array([[40 * 257] * 32 + [200 * 257] * 32], np.uint16), 64, 0)
    Image.fromarray(levels).save(tmp_path / name)
    assert_sides(data.read_photo(tmp_path / name, 32, 3), (40,) * 3, (200,) * 3, 1)
    assert_sides(data.read_photo(tmp_path / name, 32, 1), (40,), (200,), 1)


def test_float_grey_from_0_to_1_is_scaled_and_other_values_are_refused(tmp_path):
    levels = np.repeat(np.array([[0.25] * 32 + [0.75] * 32], np.float32), 64, 0)
    Image.fromarray(levels).save(tmp_path / "good.tif")
    assert_sides(data.read_photo(tmp_path / "good.tif", 32, 3), (64,) * 3, (191,) * 3, 1)
    for number, bad in enumerate((levels * 1000, levels - 1, levels * np.nan)):
        Image.fromarray(bad).save(tmp_path / f"bad{number}.tif")
        with pytest.raises(data.InputError, match="pixel values outside 0 to 1"):
            data.read_photo(tmp_path / f"bad{number}.tif", 32, 3)


def test_transparency_shows_the_background(tmp_path):
    clear_right = Image.fromarray(np.repeat(np.array([[255] * 32 + [0] * 32], np.uint8), 64, 0))
    rgba = halves()
    rgba.putalpha(clear_right)
    rgba.save(tmp_path / "rgba.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    grey = Image.new("L", (64, 64), 90)
    grey.putalpha(clear_right)
    grey.save(tmp_path / "la.png")
    palette = halves().quantize(2)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((60, 5)))
    palette.save(tmp_path / "p.gif", transparency=palette.getpixel((60, 5)))
    halves().save(tmp_path / "rgb.png", transparency=BLUE)
    for name in ("rgba.png", "rgba.webp", "p.png", "p.gif", "rgb.png"):
        assert_sides(data.read_photo(tmp_path / name, 32, 3, background=(10, 200, 30)), RED, (10, 200, 30))
        assert_sides(data.read_photo(tmp_path / name, 32, 3, background=128), RED, (128,) * 3)
    assert_sides(data.read_photo(tmp_path / "la.png", 32, 3, background=255), (90,) * 3, (255,) * 3)


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    Image.new("RGBA", (20, 20), (200, 100, 0, 128)).save(tmp_path / "half.png")
    seen = data.read_photo(tmp_path / "half.png", 16, 3, background=0)[8, 8]
    assert np.abs(seen.astype(int) - (100, 50, 0)).max() <= 1


def test_one_channel_is_the_luma_of_the_colours(tmp_path):
    halves().save(tmp_path / "a.png")
    halves().save(tmp_path / "a.jpg", quality=95)
    for name in ("a.png", "a.jpg"):
        pixels = data.read_photo(tmp_path / name, 32, 1)
        assert pixels.shape == (32, 32, 1)
        luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in (RED, BLUE)]
        assert_sides(pixels, luma[:1], luma[1:], 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    quadrants = Image.new("RGB", (64, 64), RED)
    quadrants.paste(GREEN, (32, 0, 64, 32))
    quadrants.paste(BLUE, (0, 32, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    quadrants.save(tmp_path / f"a.{suffix}", exif=exif)
    pixels = data.read_photo(tmp_path / f"a.{suffix}", 32, 3).astype(int)
    quadrants.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(quadrants).resize((32, 32))).astype(int)
    for row in (8, 24):
        for column in (8, 24):
            assert np.abs(pixels[row, column] - expected[row, column]).max() <= 14


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x7f" * 30)
    assert_sides(data.read_photo(tmp_path / "a.jpg", 32, 3), RED, BLUE, 12)


def test_the_short_side_is_resized_and_the_centre_cut_out(tmp_path):
    wide = Image.new("RGB", (90, 30), GREEN)
    wide.paste(RED, (0, 0, 30, 30))
    wide.paste(BLUE, (60, 0, 90, 30))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        assert np.abs(data.read_photo(tmp_path / name, 16, 3)[2:-2, 2:-2].astype(int) - GREEN).max() <= 1


def test_fine_stripes_become_grey_and_no_moire(tmp_path):
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    pixels = data.read_photo(tmp_path / "stripes.png", 48, 1).astype(int)
    assert np.abs(pixels - 127.5).max() < 6


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1200, 900), 3)
    noise.save(tmp_path / "a.jpg", quality=95)
    sizes = []
    original = data._eight_bit
    monkeypatch.setattr(data, "_eight_bit", lambda picture: sizes.append(picture.size) or original(picture))
    pixels = data.read_photo(tmp_path / "a.jpg", 64, 3).astype(int)
    assert sizes == [(300, 225)]
    expected = np.asarray(ImageOps.fit(noise, (64, 64), 3)).astype(int)
    assert np.abs(pixels - expected).mean() < 1.5


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = halves(), halves(GREEN, GREEN)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    for name in ("a.gif", "a.webp"):
        assert_sides(data.read_photo(tmp_path / name, 32, 3), RED, BLUE)


def test_the_content_counts_and_not_the_extension(tmp_path):
    halves().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    assert_sides(data.read_photo(tmp_path / "a.jpg", 32, 3), RED, BLUE)


# ---------------------------------------------------------------- files that cannot be used

def claim_size(path, width, height):
    """A PNG of a few bytes whose header claims a size."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def broken_files(folder):
    """One file of each kind that cannot be used; {name: what the reason must say}."""
    claim_size(folder / "huge.png", 30000, 30000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    reasons = {"huge.png": "30000 x 30000 pixels, more than the limit", "empty.jpg": "empty file",
               "text.jpg": "not an image", "pipe.png": "not a regular file", "nowhere.png": "broken link"}
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        noise.save(folder / f"cut.{suffix}")
        whole = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[:len(whole) * 2 // 3])
        reasons[f"cut.{suffix}"] = ""
    reasons["cut.jpg"] = "truncated"
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("this is no picture")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    return reasons


def test_files_that_cannot_be_used_are_named_and_the_others_used(tmp_path, image_folder, capfd):
    root = pathlib.Path(image_folder(5))
    reasons = broken_files(root)
    images = load(str(root), tmp_path)
    assert len(images.paths) == 5
    assert dict(images.skipped).keys() == reasons.keys()
    for name, reason in images.skipped:
        assert reasons[name] in reason
        assert len(reason.splitlines()) == 1 and str(root) not in reason and len(reason) <= 110
    assert load(str(root), tmp_path).skipped == images.skipped    # the cache remembers them
    lines = data.summary_lines(images)
    assert len(lines) == 12 and lines[0] == "11 files cannot be used:" and lines[-1] == "  and 1 more"
    data.write_skipped(images, tmp_path / "skipped.txt")
    written = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(written) == 11 and "empty.jpg: empty file" in written
    assert data.summary_lines(load(image_folder(2, name="good"), tmp_path)) == []


def test_a_picture_that_claims_to_be_huge_is_never_decoded(tmp_path, monkeypatch):
    claim_size(tmp_path / "huge.png", 30000, 30000)
    monkeypatch.setattr(data, "_eight_bit", lambda picture: pytest.fail("it was decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda picture: pytest.fail("it was decoded"))
    with pytest.raises(data.InputError, match="30000 x 30000 pixels"):
        data.read_photo(tmp_path / "huge.png", 32, 3)


def test_read_photo_names_the_file_and_the_fault(tmp_path):
    (tmp_path / "empty.jpg").touch()
    for path, fault in ((tmp_path / "gone.jpg", "no such file"), (tmp_path, "not a regular file"),
                        (tmp_path / "empty.jpg", "empty file")):
        with pytest.raises(data.InputError, match=f"{path}: {fault}"):
            data.read_photo(path, 32, 3)


def test_no_usable_image_missing_and_empty_folders_are_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "broken").mkdir()
    broken_files(tmp_path / "broken")
    (tmp_path / "file").touch()
    for name, fault in (("gone", "no such folder"), ("empty", "no images in it"), ("file", "is a file"),
                        ("broken", r"none of its 11 images can be used; the first is cut.bmp: ")):
        with pytest.raises(data.InputError, match=fault) as caught:
            load(str(tmp_path / name), tmp_path)
        assert str(tmp_path / name) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_that_vanishes_or_cannot_be_opened_now_is_tried_again(tmp_path, image_folder, monkeypatch, decoded):
    root = image_folder(3)
    original = data._decode

    def failing(path, *settings):
        if path.endswith("0001.png"):
            raise PermissionError(13, "Permission denied", path)
        return original(path, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", failing)
        images = load(root, tmp_path)
    assert images.skipped == [("0001.png", "permission denied")] and len(images.paths) == 2
    decoded.clear()
    images = load(root, tmp_path)
    assert decoded == ["0001.png"] and images.skipped == []
    assert images.paths == ["0000.png", "0001.png", "0002.png"]


# ---------------------------------------------------------------- finding files

def test_flat_class_and_nested_folders_are_all_found(tmp_path, image_folder):
    root = image_folder(2)
    image_folder(2, name="photos/cats")
    image_folder(1, name="photos/dogs/small/brown")
    assert load(root, tmp_path).paths == [
        "0000.png", "0001.png", "cats/0000.png", "cats/0001.png", "dogs/small/brown/0000.png"]


def test_a_link_to_the_folder_itself_or_around_it_is_no_loop(tmp_path, image_folder):
    root = pathlib.Path(image_folder(2, name="all/photos"))
    image_folder(2, name="all/photos/z_real")
    image_folder(1, name="elsewhere")
    image_folder(1, name="all/neighbour")
    (root / "self").symlink_to(root)
    (root / "up").symlink_to(root.parent)
    (root / "a_link").symlink_to(root / "z_real")
    (root / "zz_link").symlink_to(root / "z_real")
    (root / "z_real" / "back").symlink_to("..")
    (root / "ring").symlink_to("ring")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "link.png").symlink_to("0000.png")
    images = load(str(root), tmp_path)
    assert images.paths == ["0000.png", "0001.png", "link.png", "out/0000.png", "z_real/0000.png", "z_real/0001.png"]


def test_hidden_files_and_other_extensions_are_passed_over(tmp_path, image_folder):
    root = pathlib.Path(image_folder(1))
    (root / "._0000.png").write_bytes(b"\0\5\x16\7")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").touch()
    (root / "labels.csv").touch()
    images = load(str(root), tmp_path)
    assert images.paths == ["0000.png"] and images.skipped == []


def test_names_that_are_no_text_are_read_and_printed_escaped(tmp_path, image_folder):
    root = image_folder(1)
    try:
        shutil.copy(f"{root}/0000.png", os.fsencode(root) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    open(os.fsencode(root) + b"/bad\xff\n.png", "wb").close()
    for _ in range(2):
        images = load(root, tmp_path)
        assert len(images.paths) == 2 and os.path.exists(os.path.join(root, images.paths[1]))
    lines = data.summary_lines(images)
    assert lines == ["1 file cannot be used:", "  bad\\udcff\\n.png: empty file"]
    data.write_skipped(images, tmp_path / "skipped.txt")
    assert (tmp_path / "skipped.txt").read_text() == "bad\\udcff\\n.png: empty file\n"


# ---------------------------------------------------------------- the cache

def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_the_second_load_decodes_nothing_and_gives_the_same(tmp_path, image_folder, decoded):
    root = image_folder(6)
    first = load(root, tmp_path)
    assert len(decoded) == 6
    second = load(root, tmp_path)
    assert len(decoded) == 6
    assert second.paths == first.paths and np.array_equal(second.images, first.images)
    assert not second.images.flags.writeable and second.images.shape == (6, 16, 16, 3)


def test_only_new_and_changed_files_are_decoded_again(tmp_path, image_folder, decoded):
    root = image_folder(6)
    load(root, tmp_path)
    decoded.clear()
    halves().save(f"{root}/0002.png")
    halves(GREEN, GREEN).save(f"{root}/00000.png")
    os.remove(f"{root}/0004.png")
    images = load(root, tmp_path)
    assert decoded == ["00000.png", "0002.png"]
    fresh = data.load_images(root, 16, 3, tmp_path / "other", workers=0, progress=False)
    assert images.paths == fresh.paths == ["0000.png", "00000.png", "0001.png", "0002.png", "0003.png", "0005.png"]
    assert np.array_equal(images.images, fresh.images)
    assert np.array_equal(images.train, fresh.train)
    assert [file.name for file in cache_folder(tmp_path).glob("*.u8")] == ["pixels-1.u8"]
    decoded.clear()
    assert np.array_equal(load(root, tmp_path).images, fresh.images) and decoded == []


def test_a_change_of_time_alone_is_a_change(tmp_path, image_folder, decoded):
    root = image_folder(2)
    load(root, tmp_path)
    os.utime(f"{root}/0001.png", ns=(0, 0))
    decoded.clear()
    load(root, tmp_path)
    assert decoded == ["0001.png"]


def test_each_size_channel_count_and_background_has_its_own_cache(tmp_path, image_folder):
    root = image_folder(2)
    for size, channels, background in ((16, 3, 255), (32, 3, 255), (16, 1, 255), (16, 3, 0)):
        images = load(root, tmp_path, size=size, channels=channels, background=background)
        assert images.images.shape == (2, size, size, channels)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_an_interrupted_scan_keeps_what_it_decoded(tmp_path, image_folder, monkeypatch):
    root = image_folder(6)
    original, names = data._decode, []

    def interrupted(path, *settings):
        names.append(os.path.basename(path))
        if len(names) == 4:
            raise KeyboardInterrupt
        return original(path, *settings)

    monkeypatch.setattr(data, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root, tmp_path)
    images = load(root, tmp_path)
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "0003.png", "0004.png", "0005.png"]
    fresh = data.load_images(root, 16, 3, tmp_path / "other", workers=0, progress=False)
    assert images.paths == fresh.paths and np.array_equal(images.images, fresh.images)


SCAN = """
import sys, time
sys.path.insert(0, {repo!r})
import data
original = data._decode
def slow(*arguments):
    time.sleep(0.05)
    return original(*arguments)
data._decode = slow
data.find_files = data._walk    # the same, without torchvision's import
data.SAVE_SECONDS = 0.1
data.load_images(sys.argv[1], 16, 3, sys.argv[2], workers=0, progress=False)
"""


def test_a_scan_that_was_killed_goes_on_where_it_was(tmp_path, image_folder, decoded):
    root = image_folder(80)
    process = subprocess.Popen([sys.executable, "-c", SCAN.format(repo=str(REPO)), root, str(tmp_path / "cache")])
    deadline = time.monotonic() + 60
    while not any(index.read_bytes().count(b"\n") > 5 for index in tmp_path.glob("cache/*/index.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    folder = cache_folder(tmp_path)
    with open(folder / "index.jsonl", "a") as index:
        index.write('["0079.png", 1')    # a line that the kill cut short
    with open(folder / "pixels-0.u8", "ab") as pixels:
        pixels.write(b"\x7f" * 1000)     # pixels that no line speaks of
    images = load(root, tmp_path)
    assert 40 < len(decoded) < 76
    decoded.clear()
    assert np.array_equal(load(root, tmp_path).images, images.images) and decoded == []
    fresh = data.load_images(root, 16, 3, tmp_path / "other", workers=0, progress=False)
    assert images.paths == fresh.paths and np.array_equal(images.images, fresh.images)


@pytest.mark.parametrize("damage", ["short pixels", "no pixels", "no json", "other json", "no header", "no text",
                                    "no hash", "half a place", "one place twice"])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, image_folder, decoded, damage, capsys):
    root = image_folder(4)
    first = np.array(load(root, tmp_path).images)
    folder = cache_folder(tmp_path)
    index = folder / "index.jsonl"
    lines = index.read_text().splitlines()
    if damage == "short pixels":
        os.truncate(folder / "pixels-0.u8", 4 * 16 * 16 * 3 - 1)
    elif damage == "no pixels":
        (folder / "pixels-0.u8").unlink()
    else:
        path, size, time, _, note = json.loads(lines[2])
        lines[2] = {"no json": "[[", "other json": '["0000.png", 3]',
                    "no hash": json.dumps([path, size, time, 1, "zz"]),
                    "half a place": json.dumps([path, size, time, 1.5, note]),
                    "one place twice": json.dumps([path, size, time, 0, note])}.get(damage, lines[2])
        lines = lines[1:] if damage == "no header" else lines
        index.write_bytes(b"\xff\xfe\0\0" * 50 if damage == "no text" else "\n".join(lines).encode() + b"\n")
    decoded.clear()
    images = load(root, tmp_path)
    assert len(decoded) == 4 and np.array_equal(images.images, first)
    assert damage == "no pixels" or "is damaged" in capsys.readouterr().out


def test_the_index_tells_the_truth_about_the_pixels(tmp_path, image_folder):
    root = image_folder(3)
    images = load(root, tmp_path)
    header, *lines = (cache_folder(tmp_path) / "index.jsonl").read_text().splitlines()
    pixels = np.fromfile(cache_folder(tmp_path) / f"pixels-{json.loads(header)['pixels']}.u8", np.uint8)
    for line in lines:
        path, size, _, slot, _ = json.loads(line)
        assert size == os.path.getsize(f"{root}/{path}")
        assert np.array_equal(pixels.reshape(-1, 16, 16, 3)[slot], data.read_photo(f"{root}/{path}", 16, 3))
        assert images.paths[slot] == path


def test_too_little_disk_is_said_before_the_scan(tmp_path, image_folder, monkeypatch, decoded):
    root = image_folder(4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 768 - 1))
    with pytest.raises(data.InputError, match=r"need 3,072 bytes, and the disk of .* has 3,071 free"):
        load(root, tmp_path)
    assert decoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 768))
    assert len(load(root, tmp_path).paths) == 4


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, image_folder, monkeypatch):
    root = image_folder(2)
    (tmp_path / "cache").touch()
    with pytest.raises(data.InputError, match=r"cache.*: cannot keep decoded images here: "):
        load(root, tmp_path)
    (tmp_path / "cache").unlink()

    def full(cache, decoded):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.Cache, "save", full)
    with pytest.raises(data.InputError, match="no space left on device"):
        load(root, tmp_path)


def test_a_second_process_waits_for_the_first(tmp_path, image_folder, capsys):
    root = image_folder(2)
    load(root, tmp_path)
    hold = f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
import data
with data._locked({str(cache_folder(tmp_path))!r}):
    print("held", flush=True)
    time.sleep(0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert len(load(root, tmp_path).paths) == 2
    assert process.wait() == 0
    assert "waiting for it" in capsys.readouterr().out


def test_several_processes_give_what_one_gives(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(data, "POOL_FROM", 1)
    root = pathlib.Path(image_folder(40))
    reasons = broken_files(root)
    many = load(str(root), tmp_path, workers=2)
    one = data.load_images(str(root), 16, 3, tmp_path / "other", workers=0, progress=False)
    assert many.paths == one.paths and np.array_equal(many.images, one.images)
    assert many.skipped == one.skipped and len(one.skipped) == len(reasons)


def test_scan_processes_load_neither_torch_nor_the_main_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(REPO)!r})
if __name__ != "__main__":
    raise RuntimeError("imported again")
import concurrent.futures, multiprocessing, data
pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), data._start_scan_process)
with data._main_module_hidden():
    future = pool.submit(eval, "sorted({{'torch', 'torchvision', 'data'}} & set(__import__('sys').modules))")
print(future.result())
""")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['data']"


def test_a_scan_process_that_dies_is_one_line_and_the_work_before_it_is_kept(tmp_path, image_folder, monkeypatch):
    root = image_folder(40)

    class Dead:
        def result(self):
            raise data.BrokenProcessPool

    class Pool:
        def __init__(self, *arguments):
            self.number = 0

        def submit(self, function, *arguments):
            self.number += 1
            if self.number > 1:
                return Dead()
            result = function(*arguments)
            return type("Done", (), {"result": lambda self: result})()

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(data, "POOL_FROM", 1)
    with monkeypatch.context() as patch:
        patch.setattr(data, "ProcessPoolExecutor", Pool)
        with pytest.raises(data.InputError, match=r"a scan process died near 0016\.png.*--num-workers 1"):
            load(root, tmp_path, workers=1)
    names = []
    original = data._decode
    monkeypatch.setattr(data, "_decode", lambda path, *settings: names.append(path) or original(path, *settings))
    load(root, tmp_path)
    assert len(names) == 40 - data.CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_scan_processes_end_with_their_parent(tmp_path, image_folder, stop):
    root = image_folder(600, size=300)
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import data
if __name__ == "__main__":
    data.load_images(sys.argv[1], 64, 3, sys.argv[2], workers=2, progress=False)
""")
    process = subprocess.Popen([sys.executable, script, root, str(tmp_path / "cache")], stderr=subprocess.PIPE)

    def children():
        return subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()

    while len(children()) < 3:    # two scan processes and multiprocessing's resource tracker
        assert process.poll() is None
        time.sleep(0.05)
    started = children()
    time.sleep(0.3)
    process.send_signal(stop)
    errors = process.communicate(timeout=20)[1].decode()
    assert errors.count("KeyboardInterrupt") <= 2    # the parent's own, none from the scan processes
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- split and batches

def test_equal_images_stay_on_one_side_and_none_changes_sides(tmp_path, image_folder):
    root = image_folder(60)
    for number in range(20):
        shutil.copy(f"{root}/{number:04d}.png", f"{root}/copy{number:04d}.png")
    few = load(root, tmp_path, held_out_share=0.3, held_out_min=1)
    side = {few.paths[index]: "train" for index in few.train} | {few.paths[index]: "held" for index in few.held_out}
    assert len(side) == 80 and 10 < len(few.held_out) < 45
    assert all(side[f"{number:04d}.png"] == side[f"copy{number:04d}.png"] for number in range(20))
    image_folder(30, name="photos/more", seed=5)
    more = load(root, tmp_path, held_out_share=0.3, held_out_min=1)
    held = {more.paths[index] for index in more.held_out}
    assert held & side.keys() == {path for path in side if side[path] == "held"}


def test_fewer_than_the_least_number_held_out_means_none():
    hashes = [f"{number:02x}" + "0" * 30 for number in range(256)]
    train, held_out = data.split(hashes, 0.25, 64)
    assert held_out.tolist() == list(range(64)) and train.tolist() == list(range(64, 256))
    for share, least in ((0.25, 65), (1.0, 1), (0.0, 0)):
        train, held_out = data.split(hashes, share, least)
        assert held_out.size == 0 and train.tolist() == list(range(256))
        assert train.dtype == held_out.dtype == np.int64


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (3, 8), (1, 5), (64, 16)])
def test_batches_are_one_endless_chain_of_permutations(count, batch_size):
    steps = 6 * count
    chain = np.concatenate([data.batch_indices(count, 3, step * batch_size, batch_size) for step in range(steps)])
    assert chain.dtype == np.int64 and len(chain) == steps * batch_size
    epochs = chain[:len(chain) // count * count].reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count >= 7:
        assert len({tuple(epoch) for epoch in epochs[:10]}) == 10


def test_a_batch_is_a_function_of_its_arguments_alone():
    one = data.batch_indices(50, 3, 120, 16)
    data.batch_indices(50, 9, 0, 16)
    data._permutation.cache_clear()
    assert np.array_equal(data.batch_indices(50, 3, 120, 16), one)
    assert not np.array_equal(data.batch_indices(50, 4, 120, 16), one)
    assert not np.array_equal(data.batch_indices(50, 3, 120, 16, purpose="other"), one)
    assert np.array_equal(data.batch_indices(50, 3, 124, 8), one[4:12])
    one[:] = 0    # the caller's copy
    assert not np.array_equal(data.batch_indices(50, 3, 120, 16), one)


def test_torch_and_numpy_global_generators_are_not_moved(tmp_path, image_folder):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = load(image_folder(4), tmp_path)
    data.read_batch(images, data.batch_indices(4, 0, 0, 8))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_a_batch_holds_the_asked_images_mirrored_where_flips_is_true(tmp_path, image_folder):
    images = load(image_folder(5), tmp_path)
    indices, flips = np.array([4, 0, 0, 2]), np.array([True, False, True, False])
    batch = data.read_batch(images, indices, flips)
    assert batch.shape == (4, 3, 16, 16) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for item, index, flip in zip(batch, indices, flips):
        expected = images.images[index].transpose(2, 0, 1)
        assert np.array_equal(item.numpy(), expected[:, :, ::-1] if flip else expected)
    assert not torch.equal(batch[1], batch[2])
    batch.zero_()    # a copy: the map stays as it is
    assert images.images[4].any()


def test_to_uint8_is_the_exact_inverse_of_to_image():
    levels = torch.arange(256, dtype=torch.uint8)
    image = data.to_image(levels)
    assert image.dtype == torch.float32 and image[0] == -1 and image[255] == 1
    assert torch.equal(data.to_uint8(image), levels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0, 0.001])).tolist() == [0, 255, 128]
