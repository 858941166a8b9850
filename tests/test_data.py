"""data.py: every kind of file decodes to the right colours; the scan and its cache survive interruptions; batches."""

import os
import pathlib
import re
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
import zlib
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torchvision.datasets import ImageFolder

import checkpoints
import command_line
import data
import image_cache
from errors import InputError

REPO = str(pathlib.Path(data.__file__).parent)
RED, GREEN, BLUE = (220, 40, 30), (30, 190, 60), (20, 60, 210)


def halves(left=RED, right=BLUE, size=(64, 64)):
    """A picture whose left half and right half are flat."""
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return picture


def grey_halves(left, right, dtype):
    return Image.fromarray(np.repeat(np.array([[left] * 32 + [right] * 32], dtype), 64, 0))


def assert_sides(pixels, left, right, tolerance=8):
    """Compares the colours in the middle of the left and of the right half."""
    height, width = pixels.shape[:2]
    for column, expected in ((width // 4, left), (3 * width // 4, right)):
        seen = pixels[height // 2, column].astype(int)
        assert np.abs(seen - np.array(expected)).max() <= tolerance, (seen, expected)


def load(root, tmp_path, size=16, channels=3, cache="cache", **options):
    options = {"workers": 0, "progress": False, **options}
    return data.load_images(root, size, channels, tmp_path / cache, **options)


def assert_as_fresh(images, root, tmp_path):
    """Compares an ImageSet with one from an empty cache."""
    fresh = load(root, tmp_path, cache="fresh")
    assert images.paths == fresh.paths and images.skipped == fresh.skipped
    assert np.array_equal(images.images, fresh.images)
    assert np.array_equal(images.train, fresh.train) and np.array_equal(images.held_out, fresh.held_out)


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that this process decodes. opened.fail(number, error) makes one Image.open raise."""
    class Names(list):
        number = error = None

        def fail(self, number, error):
            self.number, self.error = number, error

    names, original = Names(), Image.open

    def counting(path, *arguments, **options):
        names.append(os.path.basename(path))
        if len(names) == names.number:
            raise names.error
        return original(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    return names


def test_importing_data_does_not_import_torch():
    code = "import sys, data; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


# ------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.avif", "a.gif"])
def test_each_format_decodes_to_its_colours(tmp_path, name):
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    halves().save(tmp_path / name)
    images = load(tmp_path, tmp_path, size=32)
    assert images.paths == [name]
    assert_sides(images.images[0], RED, BLUE, tolerance=12)


def test_each_mode_keeps_its_colours(tmp_path):
    deep = grey_halves(40 * 257, 200 * 257, np.uint16)
    grey = {"grey.png": grey_halves(40, 200, np.uint8), "deep.png": deep, "deep.tif": deep,
            "float.tif": grey_halves(40 / 255, 200 / 255, np.float32)}
    colours = {"palette.png": halves().quantize(8), "cmyk.jpg": halves().convert("CMYK"),
               "cmyk.tif": halves().convert("CMYK")}
    for name, picture in (grey | colours).items():
        picture.save(tmp_path / name)
        expected = ((40,) * 3, (200,) * 3, 1) if name in grey else (RED, BLUE, 12)
        assert_sides(data.read_photo(tmp_path / name, 32, 3), *expected)
    halves((0, 0, 0), (255, 255, 255)).convert("1").save(tmp_path / "bilevel.png")
    assert_sides(data.read_photo(tmp_path / "bilevel.png", 32, 3), 0, 255, 1)


def test_transparency_shows_the_background(tmp_path):
    clear_right = grey_halves(255, 0, np.uint8)
    rgba, grey, palette = halves(), Image.new("L", (64, 64), 90), halves().quantize(2)
    rgba.putalpha(clear_right)
    rgba.save(tmp_path / "rgba.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    grey.putalpha(clear_right)
    grey.save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((60, 5)))
    palette.save(tmp_path / "p.gif", transparency=palette.getpixel((60, 5)))
    halves().save(tmp_path / "rgb.png", transparency=BLUE)
    for name in ("rgba.png", "rgba.webp", "p.png", "p.gif", "rgb.png"):
        assert_sides(data.read_photo(tmp_path / name, 32, 3, background=128), RED, (128,) * 3)
    assert_sides(data.read_photo(tmp_path / "la.png", 32, 3), (90,) * 3, (255,) * 3)
    Image.new("RGBA", (20, 20), (200, 100, 0, 128)).save(tmp_path / "half.png")
    assert_sides(data.read_photo(tmp_path / "half.png", 16, 3, background=0), (100, 50, 0), (100, 50, 0), 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_one_channel_is_the_luma_of_the_colours(tmp_path, name):
    halves().save(tmp_path / name, quality=95)
    pixels = data.read_photo(tmp_path / name, 32, 1)
    assert pixels.shape == (32, 32, 1)
    assert_sides(pixels, 92, 65, 3)    # 0.299 R + 0.587 G + 0.114 B


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
    assert np.abs(pixels - expected)[8::16, 8::16].max() <= 14


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x7f" * 30)
    assert_sides(data.read_photo(tmp_path / "a.jpg", 32, 3), RED, BLUE, 12)


def test_the_short_side_is_resized_and_the_centre_cut_out(tmp_path):
    wide = np.full((30, 90, 3), RED, np.uint8)
    wide[:, 30:60] = GREEN
    for number, picture in enumerate((wide, wide.transpose(1, 0, 2))):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        assert np.abs(data.read_photo(tmp_path / f"{number}.png", 16, 3)[2:-2, 2:-2].astype(int) - GREEN).max() <= 1


def test_fine_stripes_become_grey_without_moire(tmp_path):
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(data.read_photo(tmp_path / "stripes.png", 48, 1).astype(int) - 127.5).max() < 6


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    noise = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    noise.save(tmp_path / "a.jpg", quality=95)
    sizes, fit = [], ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda picture, *rest: sizes.append(picture.size) or fit(picture, *rest))
    pixels = data.read_photo(tmp_path / "a.jpg", 64, 3).astype(int)
    assert sizes == [(300, 225)]
    expected = np.asarray(fit(noise, (64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - expected).mean() < 1.5


def test_the_first_frame_and_the_content_count_and_not_the_extension(tmp_path):
    halves().save(tmp_path / "a.gif", save_all=True, append_images=[halves(GREEN, GREEN)])
    halves().save(tmp_path / "a.webp", save_all=True, append_images=[halves(GREEN, GREEN)], lossless=True)
    os.rename(tmp_path / "a.webp", tmp_path / "a.jpg")
    for name in ("a.gif", "a.jpg"):
        assert_sides(data.read_photo(tmp_path / name, 32, 3), RED, BLUE)


# ------------------------------------------------------------------------------------- files that cannot be used

def claim_size(path, width, height):
    """Writes a PNG of a few bytes whose header claims a size."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def broken_files(folder):
    """Writes one file of each kind that cannot be used; returns {name: what the reason must say}."""
    claim_size(folder / "huge.png", 30000, 30000)
    claim_size(folder / "large.png", 9000, 9000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    reasons = {"huge.png": "900000000 pixels", "large.png": "9000 x 9000 pixels, above the limit",
               "empty.jpg": "empty file", "text.jpg": "not an image", "pipe.png": "not a regular file",
               "nowhere.png": "broken link"}
    for number, scale in enumerate((1000, -1, np.nan)):
        grey_halves(0.25 * scale, 0.75 * scale, np.float32).save(folder / f"float{number}.tif")
        reasons[f"float{number}.tif"] = "pixel values outside 0 to 1"
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        noise.save(folder / f"cut.{suffix}")
        whole = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[:len(whole) * 2 // 3])
        reasons[f"cut.{suffix}"] = "truncated" if suffix == "jpg" else ""
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("this is no picture")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    return reasons


def test_files_that_cannot_be_used_are_counted_named_and_skipped(tmp_path, image_folder, capsys):
    root = pathlib.Path(image_folder(5))
    reasons = broken_files(root)
    c, _ = command_line.parse_constants(["--image-size", "32", "--runs-dir", str(tmp_path), "--num-workers", "0"])
    images = data.load_images_of_run(str(root), c)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("reading", "warning"))]
    assert lines[0] == "15 files cannot be used:" and lines[-1] == "  and 5 more" and len(lines) == 12
    assert len(images.paths) == 5 and dict(images.skipped).keys() == reasons.keys()
    for name, reason in images.skipped:
        assert reasons[name] in reason
        assert len(reason.splitlines()) == 1 and str(root) not in reason and len(reason) <= 120
    assert load(str(root), tmp_path, size=32, cache=".cache").skipped == images.skipped    # the cache remembers them
    data.write_skipped(images, tmp_path / "skipped.txt")
    written = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(written) == 15 and "empty.jpg: empty file" in written


@pytest.mark.parametrize("name, fault", [("gone.jpg", "no such file"), ("folder", "not a regular file"),
                                         ("huge.png", "pixels"), ("large.png", "pixels")])
def test_read_photo_names_the_file_and_the_fault_without_decoding_it(tmp_path, monkeypatch, name, fault):
    (tmp_path / "folder").mkdir()
    broken_files(tmp_path)
    monkeypatch.setattr(Image.Image, "load", lambda picture: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=f"{name}: .*{fault}"):
        data.read_photo(tmp_path / name, 32, 3)


@pytest.mark.parametrize("name, fault", [
    ("gone", "no such folder"), ("empty", "no images in it"), ("file", "is a file"),
    ("broken", r"none of its 15 images can be used; the first is cut.bmp: ")])
def test_a_folder_without_usable_images_is_one_line(tmp_path, name, fault):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    broken_files(tmp_path / "broken")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=fault) as caught:
        load(str(tmp_path / name), tmp_path)
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error, reason", [
    (PermissionError(13, "Permission denied"), "permission denied"), (MemoryError(), "not enough memory to decode it")])
def test_a_file_that_cannot_be_read_now_is_tried_again(tmp_path, image_folder, opened, error, reason):
    root = image_folder(3)
    opened.fail(2, error)
    images = load(root, tmp_path)
    assert images.skipped == [("0001.png", reason)] and images.paths == ["0000.png", "0002.png"]
    opened.clear()
    opened.fail(None, None)
    images = load(root, tmp_path)
    assert opened == ["0001.png"]
    assert_as_fresh(images, root, tmp_path)


# ------------------------------------------------------------------------------------- finding files

def test_flat_class_and_nested_folders_are_all_found(tmp_path, image_folder):
    root = image_folder(2)
    image_folder(2, name="photos/cats")
    image_folder(1, name="photos/dogs/small/brown")
    assert load(root, tmp_path).paths == [
        "0000.png", "0001.png", "cats/0000.png", "cats/0001.png", "dogs/small/brown/0000.png"]
    listed = [os.path.relpath(path, root) for path, _ in ImageFolder(root).samples]
    assert listed == load(root, tmp_path).paths[2:]    # all that ImageFolder finds, in its order


def test_each_folder_is_read_once_and_links_in_a_circle_end(tmp_path, image_folder):
    root = pathlib.Path(image_folder(2, name="all/photos"))
    image_folder(2, name="all/photos/z_real")
    image_folder(1, name="elsewhere")
    image_folder(1, name="all/neighbour")
    for link, target in (("self", root), ("up", root.parent), ("a_link", root / "z_real"), ("zz_link", root / "z_real"),
                         ("z_real/back", ".."), ("ring", "ring"), ("out", tmp_path / "elsewhere"),
                         ("link.png", "0000.png")):
        (root / link).symlink_to(target)
    images = load(str(root), tmp_path)
    assert images.paths == ["0000.png", "0001.png", "link.png", "out/0000.png", "z_real/0000.png", "z_real/0001.png"]


def test_a_folder_that_cannot_be_read_is_named_and_skipped(tmp_path, image_folder, monkeypatch):
    root = image_folder(1)
    image_folder(1, name="photos/locked")
    scandir = os.scandir

    def refusing(path):    # the mode of a folder does not keep out root, who may run the tests
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    images = load(root, tmp_path)
    assert images.paths == ["0000.png"] and images.skipped == [("locked", "folder: permission denied")]


def test_hidden_files_other_extensions_and_the_folder_left_out_are_ignored(tmp_path, image_folder):
    root = pathlib.Path(image_folder(1))
    (root / "._0000.png").write_bytes(b"\0\5\x16\7")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").touch()
    (root / "labels.csv").touch()
    image_folder(1, name="photos/runs/samples")
    images = load(str(root), tmp_path, leave_out=root / "runs")
    assert images.paths == ["0000.png"] and images.skipped == []
    assert len(data.find_files(root, leave_out=root)[0]) == 2    # unless it is the folder itself


def test_names_that_are_not_utf_8_are_read_and_printed_escaped(tmp_path, image_folder):
    root = image_folder(1)
    try:
        shutil.copy(f"{root}/0000.png", os.fsencode(root) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    open(os.fsencode(root) + b"/bad\xff\n.png", "wb").close()
    for _ in range(2):
        images = load(root, tmp_path)
        assert len(images.paths) == 2 and os.path.exists(os.path.join(root, images.paths[1]))
    data.write_skipped(images, tmp_path / "skipped.txt")
    assert (tmp_path / "skipped.txt").read_text() == "bad\\udcff\\n.png: empty file\n"


class Entry:
    """An os.DirEntry of a file that does not exist."""

    def __init__(self, number):
        self.name, self.number = f"picture_{number:07d}.jpg", number

    def is_dir(self):
        return False

    def stat(self):
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, self.number, 0, self.number, 0))


def test_the_memory_of_a_scan_is_linear_in_the_number_of_files(tmp_path, monkeypatch):
    def peak(count):
        monkeypatch.setattr(os, "scandir", lambda path: (Entry(number) for number in range(count)))
        tracemalloc.start()
        try:
            files, skipped = data.find_files(str(tmp_path))
            assert len(files) == count and not skipped
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(80_000) < 5 * peak(20_000)
    assert peak(80_000) < 1000 * 80_000    # bytes per file


# ------------------------------------------------------------------------------------- the cache

def test_only_new_and_changed_files_are_decoded_again(tmp_path, image_folder, opened):
    root = image_folder(7)
    first = load(root, tmp_path)
    pixels = np.array(first.images)
    opened.clear()
    halves().save(f"{root}/0002.png")
    halves(GREEN, GREEN).save(f"{root}/00000.png")
    os.remove(f"{root}/0004.png")
    os.utime(f"{root}/0005.png", ns=(0, 0))    # a change of time alone is a change
    open(f"{root}/0001.png", "wb").close()     # can no longer be used
    images = load(root, tmp_path)
    assert opened == ["00000.png", "0002.png", "0005.png"]
    assert images.paths == ["0000.png", "00000.png", "0002.png", "0003.png", "0005.png", "0006.png"]
    assert np.array_equal(first.images, pixels)    # a map that another process holds stays as it is
    assert len(list(cache_folder(tmp_path).glob("*.u8"))) == 1
    opened.clear()
    images = load(root, tmp_path)
    assert opened == [] and not images.images.flags.writeable
    assert_as_fresh(images, root, tmp_path)


def replace_unseen(path, image):
    """Replaces a file by one of equal size and mtime, as rsync -t and unzip -o can."""
    before = os.stat(path)
    image.save(path)
    with open(path, "ab") as file:
        file.write(bytes(max(0, before.st_size - os.path.getsize(path))))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no ctime")
def test_content_changed_at_equal_size_and_mtime_is_decoded_again(tmp_path, image_folder, opened):
    root = image_folder(7)
    first = load(root, tmp_path)
    opened.clear()
    replace_unseen(f"{root}/0003.png", Image.new("RGB", (8, 8), GREEN))
    images = load(root, tmp_path)
    assert opened == ["0003.png"] and not np.array_equal(images.images[3], first.images[3])
    assert_as_fresh(images, root, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no ctime")
def test_a_chmod_keeps_every_image_in_its_place_and_on_its_side(tmp_path, image_folder, opened):
    root = image_folder(40)
    options = {"held_out_share": 0.5, "held_out_min": 1}
    first = load(root, tmp_path, **options)
    pixel_file = next(cache_folder(tmp_path).glob("*.u8"))
    size = pixel_file.stat().st_size
    for name in os.listdir(root):
        os.chmod(f"{root}/{name}", 0o600)
    opened.clear()
    images = load(root, tmp_path, **options)
    assert len(opened) == 40 and np.array_equal(images.held_out, first.held_out) and len(images.held_out)
    assert pixel_file.stat().st_size == size                        # no image was written a second time
    opened.clear()
    assert load(root, tmp_path, **options).paths == first.paths and opened == []
    halves().save(f"{root}/0039b.png")                              # and what is appended later has its own place
    assert_as_fresh(load(root, tmp_path), root, tmp_path)


def test_a_kill_while_the_cache_is_sorted_loses_nothing(tmp_path, image_folder, monkeypatch, opened):
    root = image_folder(4)
    load(root, tmp_path)
    halves().save(f"{root}/00000.png")
    atomic_write = checkpoints.atomic_write

    def killed(file):
        if file.name == "index.jsonl":
            raise KeyboardInterrupt
        return atomic_write(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "atomic_write", killed)
        load(root, tmp_path)
    opened.clear()
    images = load(root, tmp_path)
    assert opened == []
    assert_as_fresh(images, root, tmp_path)


def test_each_size_channel_count_and_background_has_its_own_cache(tmp_path, image_folder):
    root = image_folder(2)
    for size, channels, background in ((16, 3, 255), (32, 3, 255), (16, 1, 255), (16, 3, 0)):
        images = load(root, tmp_path, size=size, channels=channels, background=background)
        assert images.images.shape == (2, size, size, channels)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_an_interrupted_scan_keeps_what_it_decoded(tmp_path, image_folder, opened):
    root = image_folder(6)
    opened.fail(4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load(root, tmp_path)
    images = load(root, tmp_path)
    assert opened == ["0000.png", "0001.png", "0002.png", "0003.png", "0003.png", "0004.png", "0005.png"]
    assert_as_fresh(images, root, tmp_path)


@pytest.mark.parametrize("damage, index", [
    ("short pixels", None), ("no pixels", None), ("empty", ""), ("no number", '["0000.png", 3, 4, 0.5, null, null]\n'),
    ("no json", "0\n[[\n"), ("other json", '0\n["0000.png", 3]\n'),
    ("no key", '0\n["0000.png", 3, 4, "zz", null, null]\n')])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, image_folder, opened, damage, index, capsys):
    root = image_folder(4)
    load(root, tmp_path)
    pixels = cache_folder(tmp_path) / "pixels-0.u8"
    if damage == "short pixels":
        os.truncate(pixels, 4 * 16 * 16 * 3 - 1)
    elif damage == "no pixels":
        pixels.unlink()
    else:
        (cache_folder(tmp_path) / "index.jsonl").write_text(index)
    opened.clear()
    images = load(root, tmp_path)
    assert len(opened) == 4 and "is damaged" in capsys.readouterr().out
    assert_as_fresh(images, root, tmp_path)


def test_too_little_disk_is_said_before_the_scan(tmp_path, image_folder, monkeypatch, opened):
    root = image_folder(4)
    opened.fail(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load(root, tmp_path)
    opened.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 768 - 1))
    with pytest.raises(InputError, match=r"need 1,536 bytes, and the disk of .* has 1,535 free"):
        load(root, tmp_path)
    assert opened == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 768))
    assert len(load(root, tmp_path).paths) == 4
    halves().save(f"{root}/00000.png")    # now all five images are written again, beside the old four
    with pytest.raises(InputError, match="need 4,608 bytes"):
        load(root, tmp_path)


def test_a_disk_that_is_full_or_not_writable_is_one_line(tmp_path, image_folder, monkeypatch, capsys):
    root = image_folder(2)

    def status_and_line():
        status = command_line.run_script("training.py", lambda argv: load(root, tmp_path) and 0, [])
        (line,) = capsys.readouterr().err.splitlines()
        return status, line

    (tmp_path / "cache").touch()
    status, line = status_and_line()
    assert status == 2 and str(tmp_path / "cache") in line
    (tmp_path / "cache").unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, line = status_and_line()
    assert status == 1 and str(tmp_path / "cache") in line and "No space left on device" in line


def test_a_second_process_waits_for_the_first(tmp_path, image_folder, capsys, monkeypatch):
    root = image_folder(2)
    load(root, tmp_path)
    code = "import sys, checkpoints\n" \
           "with checkpoints.lock(sys.argv[1], None):\n    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, str(cache_folder(tmp_path))], cwd=REPO,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    lock = checkpoints.lock

    def lock_and_release(folder, when_busy):    # the other process ends when this one has said that it waits
        return lock(folder, lambda: (when_busy(), process.stdin.close()))

    monkeypatch.setattr(checkpoints, "lock", lock_and_release)
    assert len(load(root, tmp_path).paths) == 2
    process.stdin.close()
    assert process.wait() == 0 and "waiting for another process" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- scan processes

def test_several_processes_give_what_one_gives(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(image_cache, "POOL_FROM", 1)
    monkeypatch.setattr(image_cache, "CHUNK", 3)
    root = pathlib.Path(image_folder(40))
    broken_files(root)
    images = load(str(root), tmp_path, workers=2)
    assert len(images.skipped) == 15
    assert_as_fresh(images, str(root), tmp_path)


def test_no_more_than_ahead_is_decoded_before_it_is_written(tmp_path, image_folder, monkeypatch, opened):
    class Pool:    # decodes a task when it is submitted
        def __init__(self, *_):
            self.shutdown = lambda **_: None

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    unwritten, append = [], image_cache.Cache.append
    monkeypatch.setattr(image_cache.Cache, "append", lambda cache, batch: (
        unwritten.append(len(opened) - len(cache.lines)), append(cache, batch)))
    for name, value in (("ProcessPoolExecutor", Pool), ("POOL_FROM", 1), ("CHUNK", 2), ("AHEAD", 3), ("SAVE_EVERY", 1)):
        monkeypatch.setattr(image_cache, name, value)
    assert len(load(image_folder(40), tmp_path, workers=1).paths) == 40
    assert max(unwritten) == 3 * 2


SCRIPT = """
import multiprocessing, os, signal, sys
if __name__ != "__main__":
    raise RuntimeError("a scan process imported the main script")
sys.path.insert(0, sys.argv[1])
import data, image_cache
append, stop = image_cache.Cache.append, sys.argv[4]
def append_and_stop(cache, batch):
    append(cache, batch)
    image_cache.Cache.append = append
    if stop == "Ctrl-C":
        os.killpg(0, signal.SIGINT)
    child, = multiprocessing.active_children()
    if stop == "child interrupted":
        os.kill(child.pid, signal.SIGINT)
    if stop in ("parent killed", "child killed"):
        os.kill(os.getpid() if stop == "parent killed" else child.pid, signal.SIGKILL)
image_cache.Cache.append, image_cache.CHUNK, image_cache.SAVE_EVERY = append_and_stop, 5, 20
data.load_images(sys.argv[2], 16, 3, sys.argv[3], workers=1, progress=False)
"""


@pytest.mark.parametrize("stop, status, error", [
    ("child interrupted", 0, ""), ("Ctrl-C", -2, "KeyboardInterrupt"), ("parent killed", -9, ""),
    ("child killed", 1, "RunError: a scan process died near .*png, .*--num-workers 1")])
def test_a_scan_that_ends_early_leaves_no_process_and_is_continued(tmp_path, image_folder, opened, stop, status, error):
    root = image_folder(150)
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, tmp_path / "script.py", REPO, root, tmp_path / "cache", stop]
    # Returns when every process that holds stderr has ended: the timeout fails the test if one stays behind.
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, timeout=300)
    assert done.returncode == status
    *_, last = done.stderr.splitlines() or [""]
    assert re.search(error, last) and done.stderr.count("KeyboardInterrupt") == (stop == "Ctrl-C"), done.stderr
    decoded = (cache_folder(tmp_path) / "index.jsonl").read_text().count("\n") - 1
    assert decoded == 150 if status == 0 else 20 <= decoded < 150
    with open(cache_folder(tmp_path) / "index.jsonl", "a") as index:
        index.write('["0149.png", 1')    # a line that a kill cut short
    with open(cache_folder(tmp_path) / "pixels-0.u8", "ab") as pixels:
        pixels.write(b"\x7f" * 1000)     # pixels that no line describes
    load(root, tmp_path)
    assert opened == [f"{number:04d}.png" for number in range(decoded, 150)]
    images = load(root, tmp_path)
    assert len(opened) == 150 - decoded
    assert_as_fresh(images, root, tmp_path)


# ------------------------------------------------------------------------------------- split and batches

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


def test_nothing_is_held_out_if_that_would_be_too_few_or_all():
    keys = [number / 256 for number in range(256)]
    train, held_out = data.split(keys, 0.25, 64)
    assert held_out.tolist() == list(range(64)) and train.tolist() == list(range(64, 256))
    for share, least in ((0.25, 65), (1.0, 1), (0.0, 0)):
        train, held_out = data.split(keys, share, least)
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
    for seed in range(9, 15):    # more than are remembered
        data.batch_indices(50, seed, 0, 16)
    assert np.array_equal(data.batch_indices(50, 3, 120, 16), one)
    assert not np.array_equal(data.batch_indices(50, 4, 120, 16), one)
    assert not np.array_equal(data.batch_indices(50, 3, 120, 16, purpose="other"), one)
    assert np.array_equal(data.batch_indices(50, 3, 124, 8), one[4:12])
    one[:] = 0    # the caller's copy
    assert not np.array_equal(data.batch_indices(50, 3, 120, 16), one)


def test_the_global_generators_of_torch_and_numpy_are_not_moved(tmp_path, image_folder):
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
