"""data.py and image_cache.py: images are found once, decoded once, cached, split and read in batches."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.datasets import ImageFolder

import checkpoints
import command_line
import data
import image_cache
from errors import InputError

REPO = str(Path(data.__file__).parent)
HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def flat(path, colour="red"):
    """Writes an image of one colour."""
    Image.new("RGB", (8, 8), colour).save(path)


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
def faults():
    """{name: error} of the files whose opening fails."""
    return {}


@pytest.fixture
def opened(monkeypatch, faults):
    """The names of the files that this process decodes."""
    names, original = [], Image.open

    def counting(path, *arguments, **options):
        names.append(os.path.basename(path))
        if names[-1] in faults:
            raise faults[names[-1]]
        return original(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    return names


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)    # an import raises ImportError
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


def test_importing_data_imports_neither_torch_nor_the_heic_package():
    code = "import sys, data; sys.exit(bool({'torch', 'torchvision', 'pillow_heif'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


# ------------------------------------------------------------------------------------- finding files

def test_flat_class_and_nested_folders_are_all_found(tmp_path, image_folder):
    root = image_folder(2)
    image_folder(2, name="photos/cats")
    image_folder(1, name="photos/dogs/small/brown")
    paths = list(data.find_files(root)[0])
    assert paths == ["0000.png", "0001.png", "cats/0000.png", "cats/0001.png", "dogs/small/brown/0000.png"]
    listed = [os.path.relpath(path, root) for path, _ in ImageFolder(root).samples]
    assert listed == paths[2:]    # all that ImageFolder finds, in its order


def test_each_folder_is_read_once_and_links_in_a_circle_end(tmp_path, image_folder):
    root = Path(image_folder(2, name="all/photos"))
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
    root = Path(image_folder(1))
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


class Entry(NamedTuple):
    """An os.DirEntry of a file that does not exist."""

    name: str
    number: int

    def is_dir(self):
        return False

    def stat(self):
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, self.number, 0, self.number, 0))


def test_finding_files_takes_less_than_1_kb_per_file(tmp_path, monkeypatch):
    entries = (Entry(f"picture_{number:07d}.jpg", number) for number in range(80_000))
    monkeypatch.setattr(os, "scandir", lambda path: entries)
    tracemalloc.start()
    try:
        assert len(data.find_files(tmp_path)[0]) == 80_000
        assert tracemalloc.get_traced_memory()[1] < 1000 * 80_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name, fault", [
    ("gone", "does not exist"), ("empty", "no images in it"), ("file", "is a file, not a folder of images"),
    ("PHOTOS.ZIP", "is an archive: unpack it"),
    ("broken", "none of 2 images can be used; the first is a.png: empty file")])
def test_a_folder_without_usable_images_is_one_line(tmp_path, name, fault):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    for file in ("file", "PHOTOS.ZIP", "broken/a.png", "broken/b.png"):
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=f"{name}:? {fault}.*$"):
        load(tmp_path / name, tmp_path)


def test_files_that_cannot_be_used_are_counted_named_and_skipped(tmp_path, image_folder, capsys, monkeypatch,
                                                                 without_heif):
    root = Path(image_folder(5))
    for name in ("a.heic", "b.HEIF", "c.jpg"):    # the third was renamed
        (root / name).write_bytes(HEIC_START)
    (root / "d.jxl").write_bytes(b"\xff\x0a" + b"\0" * 40)
    (root / "e.png").symlink_to("gone.png")
    for number in range(11):
        (root / f"f{number:02d}.png").touch()
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "littlecms2" and check(name))
    c, _ = command_line.parse_constants(["--image-size", "32", "--runs-dir", str(tmp_path), "--num-workers", "0"])
    images = data.load_images_of_run(str(root), c)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("reading", "warning"))]
    assert lines == [
        "3 files cannot be used: HEIC files need the package pillow-heif: pip install pillow-heif",
        "1 file cannot be used: JPEG XL is not supported: convert the files to PNG or JPEG",
        "12 files cannot be used:", "  e.png: broken link",
        *(f"  f{number:02d}.png: empty file" for number in range(9)), "  and 2 more",
        "embedded colour profiles are ignored: this Pillow was built without littlecms2"]
    assert len(images.paths) == 5 and len(images.skipped) == 16
    assert load(root, tmp_path, size=32, cache=".cache").skipped == images.skipped    # the cache remembers them


@pytest.mark.parametrize("top, warning", [
    (4095, "1 16-bit or float image is .* is 4,095 of 65,535, .* 12-bit data, multiply all values by 16"),
    (16383, "14-bit data, multiply all values by 4"), (60000, None)])
def test_16_bit_sets_far_below_the_full_range_are_reported(tmp_path, image_folder, top, warning):
    root = image_folder(20)
    Image.fromarray(np.full((16, 16), top, np.uint16)).save(f"{root}/deep.tif")
    for _ in range(2):    # the second time from the cache
        warnings = "".join(load(root, tmp_path).warnings)
        assert re.search(warning, warnings) if warning else warnings == ""
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(f"{root}/bright.tif")
    assert load(root, tmp_path).warnings == []    # the set uses the range


# ------------------------------------------------------------------------------------- the cache

def test_only_new_and_changed_files_are_decoded_again(tmp_path, image_folder, opened):
    root = image_folder(7)
    first = load(root, tmp_path)
    pixels = np.array(first.images)
    opened.clear()
    flat(f"{root}/0002.png")
    flat(f"{root}/00000.png", "blue")
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


def test_content_changed_at_equal_size_and_mtime_is_decoded_again(tmp_path, image_folder, opened):
    root = image_folder(7)
    load(root, tmp_path)
    opened.clear()
    file = Path(root, "0003.png")    # replaced as by rsync -t or unzip -o
    before = file.stat()
    flat(file)
    os.truncate(file, before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    images = load(root, tmp_path)
    assert opened == ["0003.png"]
    assert_as_fresh(images, root, tmp_path)


def test_a_chmod_keeps_every_image_in_its_place_and_on_its_side(tmp_path, image_folder, opened):
    root = image_folder(80)
    options = {"held_out_share": 0.5}
    first = load(root, tmp_path, **options)
    pixel_file = next(cache_folder(tmp_path).glob("*.u8"))
    size = pixel_file.stat().st_size
    for name in os.listdir(root):
        os.chmod(f"{root}/{name}", 0o600)
    opened.clear()
    images = load(root, tmp_path, **options)
    assert len(opened) == 80 and np.array_equal(images.held_out, first.held_out) and len(images.held_out)
    assert pixel_file.stat().st_size == size                        # no image was written a second time
    opened.clear()
    assert load(root, tmp_path, **options).paths == first.paths and opened == []
    flat(f"{root}/0079b.png")                                       # and what is appended later has its own place
    assert_as_fresh(load(root, tmp_path), root, tmp_path)


def test_a_kill_while_the_cache_is_sorted_loses_nothing(tmp_path, image_folder, monkeypatch, opened):
    root = image_folder(4)
    load(root, tmp_path)
    flat(f"{root}/00000.png")
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


def test_each_size_channel_count_background_and_fit_has_its_own_cache(tmp_path, image_folder):
    root = image_folder(2)
    for size, channels, background in ((16, 3, 255), (32, 3, 255), (16, 1, 255), (16, 3, 0)):
        images = load(root, tmp_path, size=size, channels=channels, background=background)
        assert images.images.shape == (2, size, size, channels)
    for fit in ("crop", "pad", "stretch"):                          # the first is that of (16, 3, 255)
        load(root, tmp_path, size=16, channels=3, fit=fit)
    assert len(list((tmp_path / "cache").iterdir())) == 6


@pytest.mark.parametrize("error, reason", [
    (PermissionError(13, "Permission denied"), "permission denied"), (MemoryError(), "not enough memory to decode it")])
def test_a_file_that_cannot_be_read_now_is_tried_again(tmp_path, image_folder, opened, faults, error, reason):
    root = image_folder(3)
    faults["0001.png"] = error
    images = load(root, tmp_path)
    assert images.skipped == [("0001.png", reason)] and images.paths == ["0000.png", "0002.png"]
    opened.clear()
    faults.clear()
    images = load(root, tmp_path)
    assert opened == ["0001.png"]
    assert_as_fresh(images, root, tmp_path)


def test_heic_is_read_after_its_package_was_installed(tmp_path, image_folder, without_heif, monkeypatch):
    root = Path(image_folder(2))
    (root / "broken.heic").write_bytes(HEIC_START)
    assert len(load(root, tmp_path).skipped) == 1
    monkeypatch.delitem(sys.modules, "pillow_heif")
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), (10, 200, 100))).save(root / "whole.heic")
    images = load(root, tmp_path)
    assert images.paths == ["0000.png", "0001.png", "whole.heic"] and "pip install" not in images.skipped[0][1]


def test_an_interrupted_scan_keeps_what_it_decoded(tmp_path, image_folder, opened, faults):
    root = image_folder(6)
    faults["0003.png"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load(root, tmp_path)
    faults.clear()
    images = load(root, tmp_path)
    assert opened == ["0000.png", "0001.png", "0002.png", "0003.png", "0003.png", "0004.png", "0005.png"]
    assert_as_fresh(images, root, tmp_path)


@pytest.mark.parametrize("damage", [
    lambda folder: os.truncate(folder / "pixels-0.u8", 4 * 16 * 16 * 3 - 1),
    lambda folder: (folder / "pixels-0.u8").unlink(),
    *(lambda folder, index=index: (folder / "index.jsonl").write_text(index) for index in (
        "", "0\n[[\n", '0\n["0000.png", 3]\n', '0\n["0000.png", 3, 4, 5, "zz", null, null]\n',
        '0\n["0000.png", 3, 4, 5, 2.0, null, null]\n', '0\n["0000.png", 3, 4, 5, null, null, null]\n'))])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, image_folder, opened, damage, capsys):
    root = image_folder(4)
    load(root, tmp_path)
    damage(cache_folder(tmp_path))
    opened.clear()
    images = load(root, tmp_path)
    assert len(opened) == 4 and "is damaged" in capsys.readouterr().out
    assert_as_fresh(images, root, tmp_path)


def test_too_little_disk_is_said_before_the_scan(tmp_path, image_folder, monkeypatch, opened):
    def load_with(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return load(root, tmp_path)

    usage, root = shutil.disk_usage(tmp_path), image_folder(2)
    load(root, tmp_path)
    image_folder(4)
    opened.clear()
    with pytest.raises(InputError, match=r"need 1,536 bytes, and the disk of .* has 1,535 free"):
        load_with(2 * 768 - 1)
    assert opened == []
    assert len(load_with(2 * 768).paths) == 4
    flat(f"{root}/00000.png")    # now all five images are written again, beside the old four
    with pytest.raises(InputError, match="need 4,608 bytes"):
        load_with(6 * 768 - 1)


def test_a_full_disk_is_named_by_the_folder_of_the_cache(tmp_path, image_folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    load(image_folder(2), tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        load(image_folder(3), tmp_path)
    assert caught.value.filename == str(cache_folder(tmp_path))


def test_a_second_process_waits_for_the_first(tmp_path, image_folder, capsys, monkeypatch):
    root, lock, first = image_folder(2), checkpoints.lock, contextlib.ExitStack()
    load(root, tmp_path)
    first.enter_context(lock(cache_folder(tmp_path), pytest.fail))
    monkeypatch.setattr(checkpoints, "lock", lambda folder, when_busy: lock(
        folder, lambda: (when_busy(), first.close())))    # the first ends when the second has said that it waits
    assert len(load(root, tmp_path).paths) == 2
    assert "waiting for another process" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- scan processes

def test_several_processes_give_what_one_gives(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(image_cache, "POOL_FROM", 1)
    monkeypatch.setattr(image_cache, "CHUNK", 3)
    root = image_folder(40)
    Path(root, "0007.png").write_bytes(b"")
    images = load(root, tmp_path, workers=2)
    assert images.skipped == [("0007.png", "empty file")]
    assert_as_fresh(images, root, tmp_path)


def test_no_more_than_ahead_is_decoded_before_it_is_written(tmp_path, image_folder, monkeypatch, opened):
    def submit(function, *arguments):
        result = function(*arguments)    # a task is decoded when it is submitted
        return SimpleNamespace(result=lambda: result)

    pool, unwritten, append = SimpleNamespace(submit=submit, shutdown=lambda **_: None), [], image_cache.Cache.append
    monkeypatch.setattr(image_cache.Cache, "append", lambda cache, batch: (
        unwritten.append(len(opened) - len(cache.lines)), append(cache, batch)))
    monkeypatch.setattr(image_cache, "ProcessPoolExecutor", lambda *_: pool)
    for name, value in (("POOL_FROM", 1), ("CHUNK", 2), ("AHEAD", 3), ("SAVE_EVERY", 1)):
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
    for _ in range(2):
        images = load(root, tmp_path)
        assert opened == [f"{number:04d}.png" for number in range(decoded, 150)]
    assert_as_fresh(images, root, tmp_path)


# ------------------------------------------------------------------------------------- split and batches

def test_equal_images_stay_on_one_side_and_none_changes_sides(tmp_path, image_folder):
    def held_out():
        images = load(root, tmp_path, held_out_share=0.3)
        return {images.paths[index] for index in images.held_out}

    root = image_folder(60)
    for number in range(20):
        shutil.copy(f"{root}/{number:04d}.png", f"{root}/copy{number:04d}.png")
    held = held_out()
    assert 10 < len(held) < 45
    assert all((f"{number:04d}.png" in held) == (f"copy{number:04d}.png" in held) for number in range(20))
    image_folder(30, name="photos/more", seed=5)
    assert {path for path in held_out() if "more/" not in path} == held


@pytest.mark.parametrize("count, share, expected", [
    (6400, 0.02, 128), (3200, 0.02, 64), (3199, 0.02, 160), (1000, 0.02, 50), (320, 0.02, 16), (100, 0.02, 16),
    (80, 0.02, 16), (79, 0.02, 0), (1000, 0.25, 250), (1000, 0.0, 0), (1000, 1.0, 0)])
def test_the_share_of_held_out_images_depends_on_the_size_of_the_set(count, share, expected):
    train, held_out = data.split([number / count for number in range(count)], share)
    assert held_out.tolist() == list(range(expected)) and train.tolist() == list(range(expected, count))
    assert train.dtype == held_out.dtype == np.int64


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's count of bytes from disks")
def test_a_batch_reads_only_its_own_images_from_the_disk(tmp_path):
    def bytes_read():
        return int(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])

    count, size = 2000, 64 * 64 * 3
    with open(tmp_path / "pixels.u8", "wb") as file:
        file.write(os.urandom(count * size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pixels = np.memmap(tmp_path / "pixels.u8", np.uint8, "r", shape=(count, 64, 64, 3))
    images = data.ImageSet(pixels, [], np.arange(count), np.arange(0), [])
    rows, before = np.arange(5, count, 500), bytes_read()
    data.read_batch(images, rows)
    assert bytes_read() - before <= len(rows) * size


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (8, 20)])
def test_batches_are_one_endless_chain_of_permutations(count, batch_size):
    batches = [data.batch_indices(count, 3, step * batch_size, batch_size) for step in range(5 * count)]
    assert all(batch.dtype == np.int64 and batch.shape == (batch_size,) for batch in batches)
    epochs = np.concatenate(batches).reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
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
