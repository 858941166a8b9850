"""Images: one pass over a folder finds, decodes and caches them; training then reads one memory map of pixels.

    images = load_images("./images", image_size=128, channels=3, cache_dir="runs/.cache")
    rows = images.train[batch_indices(len(images.train), SEED, position, batch_size)]
    image = to_image(read_batch(images, rows).to(device))    # (B, C, H, W), in [-1, 1]

Flat folders, class folders and nested folders work. Names with a leading dot (macOS writes ._photo.jpg beside
photo.jpg) and files with other extensions are ignored. A file is decoded again only when its size or one of its
times differs. The cache may be deleted at any time.
"""

import atexit
import collections
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import features
from tqdm import tqdm

import checkpoints
from errors import InputError, RunError
from image_files import EXTENSIONS, UNSUPPORTED, decode, reason_of

if TYPE_CHECKING:    # scan processes import this file, and without torch they start in 0.3 s instead of 6 s
    import torch

CACHE_FORMAT = 3             # increased when the cache's layout or the decoding changes: old caches are then deleted
CHUNK = 16                   # files that a scan process decodes per task
AHEAD = 4                    # tasks per scan process that are decoded ahead of the writer; bounds the memory
POOL_FROM = 100              # with fewer files, starting processes costs more than it saves
SAVE_EVERY = 128             # files between two saves: a killed scan loses these and what was decoded ahead
CACHE = ".cache"             # folder of the decoded images in RUNS_DIR
FEW = 16                     # different images: with fewer, a line warns
PLAIN_SAMPLE = 1_000         # images that are checked for a single colour; ...
PLAIN_SHARE = 0.1            # ... above this share of them, a line warns
DARK = 0.25                  # warns if no 16-bit image has a value above this share: 12-bit values look black
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")

PathLike = str | os.PathLike


@dataclass
class ImageSet:
    """The usable images of one folder, sorted by path.

    images: (N, H, W, C) uint8, a read-only memory map. paths: N paths relative to the folder, with "/".
    train, held_out: int64 indices into images. skipped: (relative path, reason) of each file that cannot be used.
    warnings: lines about the set: missing files, too few or plain images, dark 16-bit images.
    """

    images: np.ndarray
    paths: list[str]
    train: np.ndarray
    held_out: np.ndarray
    skipped: list[tuple[str, str]]
    warnings: Sequence[str] = ()


def printable(path: PathLike) -> str:
    """Returns the path in one line of text: escapes control characters and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))


def read_photo(path: PathLike, image_size: int, channels: int, background: int = 255) -> np.ndarray:
    """Returns one file as (H, W, C) uint8, decoded as by load_images. Raises InputError."""
    decoded = decode(path, (image_size, channels, background))
    if decoded.pixels is None:
        raise InputError(f"{printable(path)}: {decoded.reason}")
    return decoded.pixels


# ------------------------------------------------------------------------------------- finding files

def find_files(root: PathLike, leave_out: PathLike | None = None) -> tuple[dict, list]:
    """Returns {relative path: (size, mtime_ns, ctime_ns)} of the image files, sorted, and [(path, reason)] of others.

    Accepts what torchvision's ImageFolder accepts, and folders without class folders. Reads each folder once. Follows
    links to folders after all real folders, so that an image keeps its real path, but not to root or its parents. Does
    not enter the folder leave_out. Raises InputError if root is not a folder or contains nothing like an image.
    """
    if not os.path.isdir(root):
        problem = "is a file, not a folder of images" if os.path.exists(root) else "no such folder"
        if os.path.isfile(root) and os.fspath(root).lower().endswith(ARCHIVES):
            problem = "is an archive: unpack it, and give the folder of its images"
        raise InputError(f"{printable(root)}: {problem}")
    real_root = os.path.realpath(root)
    visited = {str(parent) for parent in Path(real_root).parents}
    if leave_out is not None:
        visited |= {os.path.realpath(leave_out)} - {real_root}
    files, skipped = {}, []
    folders, links = [""], collections.deque()
    while folders or links:
        here = folders.pop() if folders else links.popleft()
        real = os.path.realpath(os.path.join(root, here))
        if real in visited:
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append((here or ".", f"folder: {reason_of(error)}"))
            continue
        for entry in entries:
            path = f"{here}/{entry.name}" if here else entry.name
            try:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    status = entry.stat()
                    files[path] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            except OSError as error:
                skipped.append((path, "broken link" if entry.is_symlink() else reason_of(error)))
    if not files and not skipped:
        raise InputError(f"{printable(root)}: no images in it; looked for {' '.join(EXTENSIONS)}")
    return dict(sorted(files.items())), skipped


# ------------------------------------------------------------------------------------- the cache

class Cache:
    """The decoded images of one folder: pixels-NUMBER.u8, one image after the other, and index.jsonl.

    The first line of the index is NUMBER, every other line [path, size, mtime_ns, ctime_ns, key, reason, peak]. The
    k-th line with a key belongs to the k-th image; of several lines with one path the last counts. A line with neither
    key nor reason says that a file has another time and the same pixels. Lines are appended after their pixels are on
    the disk, so the cache is valid whenever the process is killed.

    lines: {path: its line}. row: {path: its image in the pixel file}, of usable files. rows: images in the pixel file.
    """

    def __init__(self, folder: str, image_bytes: int):
        self.folder, self.image_bytes, self.index = Path(folder), image_bytes, Path(folder, "index.jsonl")
        try:
            content = self.index.read_bytes()
            complete = content[:content.rfind(b"\n") + 1]    # without the half line that a killed process wrote
            self._set(*json.loads(b"[%s]" % complete[:-1].replace(b"\n", b",")))
            if self.pixel_file.stat().st_size < self.rows * image_bytes:
                raise ValueError("pixels are missing")
            os.truncate(self.index, len(complete))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            if self.index.exists():
                print(f"{printable(folder)}: the image cache is damaged; decoding all images again", flush=True)
            self._replace(0, [], [])

    def _set(self, number, *lines):
        self.number, self.pixel_file = number, self.folder / f"pixels-{number:d}.u8"
        self.lines, self.row, self.rows = {}, {}, 0
        self._add(lines)

    def _add(self, lines):
        for line in lines:
            path, _size, _mtime_ns, _ctime_ns, key, reason, _peak = line
            if key is None and reason is None:
                self.lines[path] = [*line[:4], *self.lines[path][4:]]
                continue
            self.lines[path] = line
            self.row.pop(path, None)
            if key is not None:
                if not 0 <= key <= 1:
                    raise ValueError("not a key")
                self.row[path], self.rows = self.rows, self.rows + 1

    def state(self, path: str) -> tuple[int, int, int] | None:
        """Returns (size, mtime_ns, ctime_ns) of the file when it was decoded, or None."""
        return tuple(self.lines[path][1:4]) if path in self.lines else None

    def key(self, path: str) -> float | None:
        """Returns the key of a usable file, or None."""
        return self.lines[path][4] if path in self.row else None

    def in_order(self, paths: list[str]) -> bool:
        """Returns whether the pixel file contains the images of `paths` in this order, and no others."""
        return [self.row[path] for path in paths if path in self.row] == list(range(self.rows))

    def append(self, batch: list[tuple[list, np.ndarray | None]]) -> None:
        """Adds the line and the pixels of some files; pixels are None for a file that cannot be used."""
        with open(self.pixel_file, "r+b") as file:
            file.seek(self.rows * self.image_bytes)    # overwrites pixels of a killed process that have no line
            file.writelines(pixels for _, pixels in batch if pixels is not None)
            file.flush()
            os.fsync(file.fileno())
        lines = [line for line, _ in batch]
        with open(self.index, "ab") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        self._add(lines)

    def sort(self, paths: list[str]) -> None:
        """Rewrites the cache so that it contains `paths` in this order and nothing else."""
        rows = [self.row[path] for path in paths if path in self.row]
        images = np.memmap(self.pixel_file, np.uint8, "r", shape=(self.rows, self.image_bytes))
        blocks = (images[rows[start:start + 1024]] for start in range(0, len(rows), 1024))
        self._replace(self.number + 1, [self.lines[path] for path in paths], blocks)

    def _replace(self, number, lines, blocks):
        """Writes another pixel file, then the index that names it. Deletes others: a process may have them mapped."""
        self._set(number, *lines)
        with checkpoints.atomic_write(self.pixel_file) as file:
            file.writelines(blocks)
        with checkpoints.atomic_write(self.index) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in [number, *lines])
        for other in set(self.folder.glob("*.u8")) - {self.pixel_file}:
            with contextlib.suppress(OSError):    # Windows keeps a file that a process has mapped
                other.unlink()


def _cache_folder(root, settings, cache_dir, cache_format):
    """Returns the folder for one image folder, one way to decode it, and one format of the cache."""
    root, (image_size, channels, background) = os.path.realpath(root), settings
    # A Pillow that supports another format tries the files again that the cache calls unusable.
    codecs = {"avif", "webp", "libtiff", "jpg", "zlib"} & set(features.get_supported())
    if cache_format > 2:    # older formats had no others; load_images finds and deletes their folders
        codecs |= {"jpg_2000", "littlecms2"} & set(features.get_supported())
        codecs |= {"heif"} if importlib.util.find_spec("pillow_heif") else set()
    key = repr((cache_format, os.fsencode(root), image_size, channels, (background,) * 3, sorted(codecs))).encode()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.basename(root))[:40]
    digest = hashlib.blake2b(key, digest_size=6).hexdigest()
    return os.path.join(cache_dir, f"{name}-{image_size}x{channels}-{digest}")


# ------------------------------------------------------------------------------------- the scan

def _start_scan_process():
    """Leaves Ctrl-C to the parent, and ends this process when the parent was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _submit(pool, *task):
    """Submits a task without the main script, which a new process would import, and torch with it."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        return pool.submit(*task)
    finally:
        sys.modules["__main__"] = main


def _decode_files(files, settings):
    return [decode(file, settings) for file in files]


def _decode_all(files, settings, workers):
    """Yields Decoded for each file, in order, decoded by `workers` processes (0: by this one)."""
    if workers == 0 or len(files) < POOL_FROM:
        yield from (decode(file, settings) for file in files)
        return
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, 61)    # Windows cannot wait for more
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_scan_process)
    chunks = [files[start:start + CHUNK] for start in range(0, len(files), CHUNK)]
    ahead, number = AHEAD * workers, 0
    try:
        futures = collections.deque(_submit(pool, _decode_files, chunk, settings) for chunk in chunks[:ahead])
        for number in range(len(chunks)):
            yield from futures.popleft().result()
            for chunk in chunks[number + ahead:number + ahead + 1]:
                futures.append(_submit(pool, _decode_files, chunk, settings))
    except BrokenExecutor:
        raise RunError(f"a scan process died near {printable(chunks[number][0])}, perhaps for lack of memory; start "
                       "again with --num-workers 1: the images that were decoded are kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _check_disk(cache, files, todo, cache_dir):
    """Raises InputError if the disk cannot hold the decoded images."""
    known, new = [path for path in files if path in cache.lines], [path for path in todo if path not in cache.row]
    in_order = cache.in_order(known) and list(files)[:len(known)] == known    # if not, all are written again, in order
    need = (len(new) if in_order else len(new) + len(files)) * cache.image_bytes
    free = shutil.disk_usage(cache.folder).free
    if need > free:
        raise InputError(f"the decoded images need {need:,} bytes, and the disk of {printable(cache_dir)} has {free:,} "
                         "free: make room, or choose a smaller --image-size or another --runs-dir")


def _scan(root, cache, files, todo, settings, workers, progress):
    """Decodes `todo` into the cache. Returns [(path, reason)] of the files that the next start tries again."""
    bar = tqdm(total=len(todo), desc="reading images", unit=" images", disable=None if progress else True)
    if progress and bar.disable:    # the output is not a terminal: one plain line
        print(f"reading {len(todo):,} of {len(files):,} images in {printable(root)}", flush=True)
    retry, batch = [], []
    results = _decode_all([os.path.join(root, path) for path in todo], settings, workers)
    try:
        for path, decoded in zip(todo, results):
            bar.update()
            if decoded.retry:
                retry.append((path, decoded.reason))
                continue
            if decoded.key is not None and decoded.key == cache.key(path):    # only its time has changed
                batch.append(([path, *files[path], None, None, None], None))
            else:
                batch.append(([path, *files[path], decoded.key, decoded.reason, decoded.peak], decoded.pixels))
            if len(batch) >= SAVE_EVERY:
                full, batch = batch, []
                cache.append(full)
    finally:    # after Ctrl-C too
        bar.close()
        results.close()
        cache.append(batch)
    return retry


def load_images(root: PathLike, image_size: int, channels: int, cache_dir: PathLike, background: int = 255,
                workers: int = -1, held_out_share: float = 0.02, held_out_min: int = 64,
                leave_out: PathLike | None = None, progress: bool = True) -> ImageSet:
    """Finds, decodes and caches the images below `root`; a later call decodes only new and changed files.

    Each image becomes image_size x image_size with 1 or 3 channels; transparent parts show the grey level
    `background`. `workers` processes decode (-1: one per core, 0: this process). About held_out_share of the images is
    held out from training, or none if that is fewer than held_out_min. The pixels of an image decide, so equal images
    are on one side, and stay there when files are added. Does not enter the folder leave_out, for example the folder
    of the runs. Raises InputError, RunError if a scan process dies, and OSError if the cache cannot be written.
    """
    root, cache_dir, settings = os.path.expanduser(root), os.fspath(cache_dir), (image_size, channels, background)
    files, skipped = find_files(root, leave_out)
    folder = _cache_folder(root, settings, cache_dir, CACHE_FORMAT)
    try:
        with checkpoints.lock(folder, lambda: print("waiting for another process with the same images", flush=True)):
            cache = Cache(folder, image_size * image_size * channels)
            gone = [path for path in cache.row if path not in files]
            todo = [path for path, state in files.items() if cache.state(path) != state]
            if todo:
                _check_disk(cache, files, todo, cache_dir)
                skipped += _scan(root, cache, files, todo, settings, workers, progress)
            known = [path for path, state in files.items() if cache.state(path) == state]
            if not cache.in_order(known):
                cache.sort(known)
            paths = [path for path in known if path in cache.row]
            shape = (len(paths), image_size, image_size, channels)
            images = np.memmap(cache.pixel_file, np.uint8, "r", shape=shape) if paths else None
    except OSError as error:
        error.filename = error.filename or folder    # a full disk does not name the file
        raise
    for old_format in range(1, CACHE_FORMAT):
        shutil.rmtree(_cache_folder(root, settings, cache_dir, old_format), ignore_errors=True)
    skipped = sorted(skipped + [(path, cache.lines[path][5]) for path in known if path not in cache.row])
    if not paths:
        raise InputError(f"{printable(root)}: none of its {len(skipped):,} images can be used; the first is "
                         f"{printable(skipped[0][0])}: {skipped[0][1]}")
    keys = [cache.key(path) for path in paths]
    train, held_out = split(keys, held_out_share, held_out_min)
    peaks = [peak for path in paths if (peak := cache.lines[path][6]) is not None]
    return ImageSet(images, paths, train, held_out, skipped, _warnings(images, keys, gone, peaks))


def _warnings(images, keys, gone, peaks):
    """Returns a line for files that are gone since the last start, for few different images, for plain images, and for
    16-bit or float images whose values, `peaks` as shares of the full range, are all small."""
    lines, different = [], len(set(keys))
    if gone:
        lines.append(f"{len(gone):,} images of the last start are gone: {_first(gone)}. Is a disk not mounted?")
    if different < FEW:
        lines.append(f"only {different} different image{'s' * (different > 1)} in {len(keys):,} usable files: a model "
                     "can only copy so few")
    sample = images[np.linspace(0, len(images) - 1, min(len(images), PLAIN_SAMPLE)).astype(int)]
    plain = int((np.ptp(sample.reshape(len(sample), -1, images.shape[3]), axis=1) == 0).all(axis=1).sum())
    if plain > len(sample) * PLAIN_SHARE:
        lines.append(f"{plain:,} of {len(sample):,} images have a single colour, such as black")
    if peaks and 0 < max(peaks) < DARK:
        bits = math.floor(math.log2(1 / max(peaks)))
        verb = "image is" if len(peaks) == 1 else "images are"
        lines.append(f"{len(peaks):,} 16-bit or float {verb} almost black: the largest value is "
                     f"{round(max(peaks) * 65535):,} of 65,535, the full range. If this is {16 - bits}-bit data, "
                     f"multiply all values by {2 ** bits}")
    return lines


def _first(paths):
    return ", ".join(map(printable, paths[:3])) + (", ..." if len(paths) > 3 else "")


def load_images_of_run(root: PathLike, c, cache_dir: PathLike | None = None) -> ImageSet:
    """Calls load_images with a run's constants; prints the warnings, how many files cannot be used, and the first ten.
    The cache is in RUNS_DIR, unless cache_dir is given."""
    image_set = load_images(root, c.IMAGE_SIZE, c.CHANNELS, cache_dir or os.path.join(c.RUNS_DIR, CACHE), c.BACKGROUND,
                            c.NUM_WORKERS, c.HELD_OUT_SHARE, c.HELD_OUT_MIN, leave_out=c.RUNS_DIR)
    for line in image_set.warnings:
        print(f"warning: {line}")
    for reason in UNSUPPORTED:
        if count := sum(reason == other for _, other in image_set.skipped):
            print(f"{count:,} {'file' if count == 1 else 'files'} cannot be used: {reason}")
    skipped = [(path, reason) for path, reason in image_set.skipped if reason not in UNSUPPORTED]
    count = len(skipped)
    lines = [f"  {printable(path)}: {reason}" for path, reason in skipped[:10]]
    if skipped:
        print(f"{count:,} {'file' if count == 1 else 'files'} cannot be used:", *lines, sep="\n")
    if count > 10:
        print(f"  and {count - 10:,} more")
    if not features.check("littlecms2"):
        print("embedded colour profiles are ignored: this Pillow was built without littlecms2")
    return image_set


def same_images(root: PathLike, old_root: PathLike, c) -> bool:
    """Returns whether the folder root has the images, by relative path and size, that the cache of RUNS_DIR holds of
    old_root, which may be gone. False if there is no such cache."""
    settings = (c.IMAGE_SIZE, c.CHANNELS, c.BACKGROUND)
    folder = _cache_folder(old_root, settings, os.path.join(c.RUNS_DIR, CACHE), CACHE_FORMAT)
    try:
        lines = Path(folder, "index.jsonl").read_bytes().split(b"\n")[1:-1]
        known = {path: size for path, size, *_ in map(json.loads, lines)}
    except (OSError, ValueError):
        return False
    return known == {path: size for path, (size, *_) in find_files(root, c.RUNS_DIR)[0].items()}


def cache_elsewhere(folder: str | None) -> str:
    """Returns the folder for decoded images of a script that does not train: `folder`, or runs/.cache in the working
    directory, or, if that cannot be written, a temporary folder that is deleted at the end."""
    default = os.path.join("runs", CACHE)
    try:
        os.makedirs(folder or default, exist_ok=True)
        if folder or os.access(default, os.W_OK):
            return folder or default
    except OSError:
        if folder:
            raise
    temporary = tempfile.TemporaryDirectory(prefix="images-")
    atexit.register(temporary.cleanup)
    return temporary.name


def write_skipped(image_set: ImageSet, file: PathLike) -> None:
    """Writes one line for every file that cannot be used: its path and the reason."""
    with checkpoints.atomic_write(file) as out:
        out.writelines(f"{printable(path)}: {reason}\n".encode() for path, reason in image_set.skipped)


def split(keys: list[float], share: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, held_out), int64 indices: image i is held out if keys[i], in [0, 1), is below `share`.

    Holds nothing out if that would be fewer than `least` images, or all.
    """
    below = np.array(keys) < share
    if below.sum() < least or below.all():
        below[:] = False
    return np.flatnonzero(~below), np.flatnonzero(below)


# ------------------------------------------------------------------------------------- batches

@functools.lru_cache(maxsize=4)
def _permutation(count, seed, purpose, epoch):
    from random_keys import numpy_generator  # imports torch
    return numpy_generator(seed, purpose, epoch).permutation(count)


def batch_indices(count: int, seed: int, position: int, batch_size: int, purpose: str = "order") -> np.ndarray:
    """Returns entries position .. position + batch_size - 1 of an endless chain of permutations, (batch_size,) int64.

    Each epoch is a permutation of 0 .. count - 1, keyed by (seed, purpose, epoch). A batch may span several epochs, so
    it is always full. The result depends on the arguments alone: a resumed run has nothing to replay.
    """
    parts = []
    while batch_size > 0:
        epoch, start = divmod(position, count)
        parts.append(_permutation(count, seed, purpose, epoch)[start:start + batch_size])
        position, batch_size = position + len(parts[-1]), batch_size - len(parts[-1])
    return np.concatenate(parts)


def read_batch(image_set: ImageSet, indices: np.ndarray, flips: np.ndarray | None = None) -> "torch.Tensor":
    """Returns a copy of the images at `indices`, mirrored where `flips` is true: (B, C, H, W) uint8, channels_last."""
    import torch

    batch = image_set.images[indices]    # (B, H, W, C), a copy
    if flips is not None:
        batch[flips] = batch[flips, :, ::-1]
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def to_image(pixels: "torch.Tensor") -> "torch.Tensor":
    """Converts uint8 to float32 in [-1, 1], on the same device."""
    return pixels.float() / 127.5 - 1


def to_uint8(image: "torch.Tensor") -> "torch.Tensor":
    """Converts [-1, 1] to uint8, rounded and clamped: the exact inverse of to_image."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_arrays(image: "torch.Tensor") -> np.ndarray:
    """Converts (N, C, H, W) in [-1, 1] to a uint8 array (N, H, W, C)."""
    return to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
