"""Images: one pass over a folder scans, decodes and caches; training then reads one packed memory map.

    images = load_images("./images", image_size=128, channels=3, cache_dir="runs/.cache")
    rows = images.train[batch_indices(len(images.train), SEED, position, batch_size)]
    image = to_image(read_batch(images, rows).to(device))    # (B, C, H, W), in [-1, 1]

Flat, class and nested folders work; links are followed, and no folder is read twice. Names that begin with a
dot (macOS leaves ._photo.jpg beside photo.jpg) and files with other extensions are passed over in silence. A
file is decoded again only when its size or time of change is another. The cache may be deleted at any time.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import stat
import sys
import threading
import time
import types
import typing
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import filelock  # torch needs it, as torchvision Pillow
import numpy as np
from PIL import Image, ImageOps, features
from tqdm import tqdm

from errors import InputError

# torch and torchvision are imported inside the functions that need them: scan processes import this file and
# need Pillow alone, and so start in 0.3 s instead of 6 s, without the memory that torch's libraries take.
if typing.TYPE_CHECKING:
    import torch

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")    # in any case
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")    # MPO: JPEGs of some cameras
PIXEL_LIMIT = 178_000_000    # larger pictures are refused undecoded (Pillow's own limit is close to it)
CACHE_FORMAT = 1             # raise it when the cache's layout or the decoding changes: all is then read anew
CHUNK = 16                   # files a scan process takes at once
POOL_FROM = 100              # with fewer files than this, starting processes costs more than it saves
HASH = re.compile("[0-9a-f]{32}")    # of an image's pixels
SAVE_SECONDS = 2             # a killed scan loses at most this much work

ORIENTATION = {    # EXIF orientation to the transposition that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """A file that cannot become a training image; the message is the reason, short and without the path."""


@dataclasses.dataclass
class ImageSet:
    """The usable images of one folder, in the order of their paths.

    images: (N, H, W, C) uint8, a read-only memory map. paths: N paths relative to the folder, with "/".
    train, held_out: int64 indices into images. skipped: (relative path, reason) of each unusable file.
    """

    images: np.memmap
    paths: list
    train: np.ndarray
    held_out: np.ndarray
    skipped: list


def printable(path):
    """A path for one line of text: line breaks, control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))


# ---------------------------------------------------------------- one file to one image

def _eight_bit(picture):
    """An opened picture as mode L, RGB or RGBA; 16-bit grey (0..65535) and float grey (0..1) are scaled."""
    if picture.mode.startswith("I") or picture.mode == "F":
        top = 1 if picture.mode == "F" else 65535
        values = np.asarray(picture)
        if not (values.min() >= 0 and values.max() <= top):    # written so that NaN is refused too
            raise Unusable(f"pixel values outside 0 to {top}")
        return Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _orientation(picture):
    """The transposition that the loaded picture's EXIF asks for, or None; damaged EXIF asks for nothing."""
    try:
        return ORIENTATION.get(picture.getexif().get(0x0112))
    except Exception:    # the parser raises what it likes on damaged bytes, while the picture itself is fine
        return None


def _decode(path, image_size, channels, background):
    """One file as (H, W, C) uint8: upright, its short side resized to image_size, the centre cut out.

    Transparent parts show `background`, three levels in 0..255. Raises Unusable or whatever Pillow raises.
    """
    if os.path.getsize(path) == 0:
        raise Unusable("empty file")
    known = [name for name in FORMATS if name in Image.OPEN]
    pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None    # PIXEL_LIMIT stands in for it
    try:
        picture = Image.open(path, formats=known)
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_limit
    with picture:
        width, height = picture.size
        if width * height > PIXEL_LIMIT:
            raise Unusable(f"{width} x {height} pixels, more than the limit of {PIXEL_LIMIT:,}")
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, no smaller than twice what is needed.
        picture.draft("L" if channels == 1 else "RGB", (2 * image_size, 2 * image_size))
        picture.load()    # TIFF files become upright here
        transpose = _orientation(picture)
        small = ImageOps.fit(_eight_bit(picture), (image_size, image_size), Image.Resampling.BICUBIC)
    if small.mode == "RGBA":
        below = Image.new("RGBA", small.size, (*background, 255))
        below.alpha_composite(small)
        small = below
    if transpose is not None:
        small = small.transpose(transpose)
    small = small.convert("L" if channels == 1 else "RGB")
    return np.array(small).reshape(image_size, image_size, channels)


def _decode_or_reason(path, image_size, channels, background):
    """(pixels or None, hash or reason, lasting); what does not last is tried again at the next start."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # Pillow warns of odd metadata, which do not matter here
            pixels = _decode(path, image_size, channels, background)
        return pixels, hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest(), True
    except Unusable as error:
        return None, str(error), True
    except Image.UnidentifiedImageError:
        return None, "not an image in a known format", True
    except MemoryError:
        return None, "not enough memory to decode it", False
    except Exception as error:    # a damaged file can make a decoder raise anything; none may end the scan
        if isinstance(error, OSError) and error.errno is not None:
            return None, _short(error), False
        reason = " ".join(str(error).split()) or type(error).__name__
        return None, reason[:100], True


def _short(error):
    """An OSError's reason alone, without number and path."""
    return (error.strerror or "cannot be read").lower()


def _levels(background):
    """A grey level or three levels, in 0..255, as three levels."""
    levels = (background,) * 3 if isinstance(background, int) else tuple(background)
    if len(levels) != 3 or not all(0 <= level <= 255 for level in levels):
        raise InputError(f"background {background} is neither a grey level from 0 to 255 nor three of them")
    return levels


def read_photo(path, image_size, channels, background=255):
    """One photo as (H, W, C) uint8, decoded as load_images does. Raises InputError with one line."""
    if not os.path.isfile(path):
        problem = "not a regular file" if os.path.exists(path) else "no such file"
        raise InputError(f"{printable(path)}: {problem}")
    pixels, note, _ = _decode_or_reason(path, image_size, channels, _levels(background))
    if pixels is None:
        raise InputError(f"{printable(path)}: {note}")
    return pixels


# ---------------------------------------------------------------- finding the files

def _walk(root, leave_out=None):
    """Returns {relative path: (size, mtime_ns)} of the image files below root, sorted by path, and
    [(relative path, reason)] of what cannot be used.

    Folders are told apart by (device, inode). Links are followed after all real folders, so that an image
    keeps its real path; links to root or to a folder around it lead nowhere. The folder leave_out below root is
    passed over.
    """
    def identity(path):
        status = os.stat(path)
        return status.st_dev, status.st_ino

    around = pathlib.Path(os.path.realpath(root)).parents
    visited = {identity(folder) for folder in around if folder.exists()}
    if leave_out is not None and os.path.exists(leave_out) and not os.path.samefile(leave_out, root):
        visited.add(identity(leave_out))
    files, skipped = {}, []
    folders, links = [""], collections.deque()
    while folders or links:
        here = folders.pop() if folders else links.popleft()
        try:
            if (key := identity(os.path.join(root, here))) in visited:
                continue
            visited.add(key)
            entries = sorted(os.scandir(os.path.join(root, here)), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append((here or ".", f"folder: {_short(error)}"))
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
                    if stat.S_ISREG(status.st_mode):
                        files[path] = (status.st_size, status.st_mtime_ns)
                    else:
                        skipped.append((path, "not a regular file"))
            except OSError as error:
                skipped.append((path, "broken link" if entry.is_symlink() else _short(error)))
    return dict(sorted(files.items())), skipped


def find_files(root, leave_out=None):
    """torchvision's ImageFolder without its demand for class folders: returns what `_walk` does.

    Raises InputError when root is no folder or holds nothing that looks like an image.
    """
    from torchvision.datasets import ImageFolder

    class AnyFolder(ImageFolder):
        def find_classes(self, directory):
            return ["all"], {"all": 0}    # the models are unconditional

        def make_dataset(self, directory, **_):
            self.files, self.skipped = _walk(directory, leave_out)
            return [(os.path.join(directory, path), 0) for path in self.files]

    if not os.path.isdir(root):
        problem = "is a file, not a folder of images" if os.path.exists(root) else "no such folder"
        raise InputError(f"{printable(root)}: {problem}")
    folder = AnyFolder(root)
    if not folder.files and not folder.skipped:
        raise InputError(f"{printable(root)}: no images in it; looked for {' '.join(EXTENSIONS)}")
    return folder.files, folder.skipped


# ---------------------------------------------------------------- the cache

class Record(typing.NamedTuple):
    """One file in the cache. `slot` is its place in the pixel file, or None when the file cannot be used;
    `note` is the hash of its pixels, or the reason."""

    size: int
    mtime_ns: int
    slot: int | None
    note: str


class Cache:
    """The decoded images of one folder: a pixel file, one image after the other, and index.jsonl.

    The index's first line names the pixel file by number; each further line is [path, *Record], and of two
    lines on one path the later one counts. A line is added only once its pixels are on the disk, so the index
    is true at any moment at which the process may be killed.
    """

    def __init__(self, folder, image_bytes):
        self.folder, self.image_bytes = folder, image_bytes
        self.index = os.path.join(folder, "index.jsonl")
        try:
            self._read_index()
        except FileNotFoundError:
            self._start_empty()
        except (ValueError, TypeError, LookupError):
            print(f"{printable(folder)}: the image cache is damaged and is built again", flush=True)
            self._start_empty()

    @property
    def pixel_file(self):
        return os.path.join(self.folder, f"pixels-{self.number}.u8")

    def _read_index(self):
        with open(self.index, encoding="ascii") as file:
            first, *lines, rest = file.read().split("\n")
        self.number, self.records = int(json.loads(first)["pixels"]), {}
        for line in lines:
            path, *fields = json.loads(line)
            self.records[path] = Record(*fields)
        slots = [record.slot for record in self.records.values() if record.slot is not None]
        for record in self.records.values():
            if record.slot is not None and (type(record.slot) is not int or not HASH.fullmatch(record.note)):
                raise ValueError("a line that no scan writes")
        if len(set(slots)) < len(slots):
            raise ValueError("two images in one place")
        self.slots = max(slots, default=-1) + 1
        if os.path.getsize(self.pixel_file) < self.slots * self.image_bytes or min(slots, default=0) < 0:
            raise ValueError("pixels are missing")
        if rest:    # the process was killed while it wrote this line
            self._write_index()

    def _start_empty(self):
        for name in os.listdir(self.folder):
            if name.endswith(".u8"):    # removed, never cut short: another run may have it mapped
                os.remove(os.path.join(self.folder, name))
        self.number, self.records, self.slots = 0, {}, 0
        open(self.pixel_file, "wb").close()
        self._write_index()

    def _write_index(self):
        lines = [json.dumps({"pixels": self.number})]
        lines += [json.dumps([path, *record]) for path, record in self.records.items()]
        with open(self.index + ".tmp", "w", encoding="ascii", newline="\n") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.index + ".tmp", self.index)

    def save(self, decoded):
        """Adds [(path, (size, mtime_ns), pixels or None, note)] to both files; pixels get a new slot."""
        lines = []
        with open(self.pixel_file, "r+b") as file:
            file.seek(self.slots * self.image_bytes)    # over what a killed process wrote and could not note
            for path, state, pixels, note in decoded:
                slot = None
                if pixels is not None:
                    file.write(pixels.tobytes())
                    slot, self.slots = self.slots, self.slots + 1
                self.records[path] = Record(*state, slot, note)
                lines.append(json.dumps([path, *self.records[path]]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with open(self.index, "a", encoding="ascii", newline="\n") as file:
            file.write("".join(lines))

    def settle(self, paths):
        """Forgets files that are gone and brings the images into the order of `paths`, the first scan's."""
        gone = self.records.keys() - set(paths)
        self.records = {path: self.records[path] for path in paths if path in self.records}
        slots = [record.slot for record in self.records.values() if record.slot is not None]
        old = self.pixel_file
        if slots != list(range(self.slots)):
            images = np.memmap(old, np.uint8, "r", shape=(self.slots, self.image_bytes))
            self.number += 1
            with open(self.pixel_file, "wb") as file:
                for start in range(0, len(slots), 1024):
                    file.write(images[slots[start:start + 1024]].tobytes())
                file.flush()
                os.fsync(file.fileno())
            new = itertools.count()
            self.records = {path: record if record.slot is None else record._replace(slot=next(new))
                            for path, record in self.records.items()}
            self.slots = len(slots)
            del images
        if gone or old != self.pixel_file:
            self._write_index()
        if old != self.pixel_file:
            with contextlib.suppress(OSError):    # Windows keeps a file that another run has mapped
                os.remove(old)


def _cache_folder(root, image_size, channels, background, cache_dir):
    """One cache for each image folder and each way to decode it."""
    root = os.path.realpath(root)
    # A Pillow that learns a format gives files that it could not read another chance.
    codecs = sorted({"avif", "webp", "libtiff", "jpg", "zlib"} & set(features.get_supported()))
    key = repr((CACHE_FORMAT, os.fsencode(root), image_size, channels, background, codecs)).encode()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.basename(root))[:40]
    digest = hashlib.blake2b(key, digest_size=6).hexdigest()
    return os.path.join(cache_dir, f"{name}-{image_size}x{channels}-{digest}")


@contextlib.contextmanager
def _locked(folder):
    """One process at a time writes a cache; a second one waits, then finds the work done."""
    os.makedirs(folder, exist_ok=True)
    lock = filelock.FileLock(os.path.join(folder, "lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print("another process is reading the same images; waiting for it", flush=True)
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        # A file system without locks: we go on without one.
        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- the scan

def _decode_chunk(root, paths, *settings):
    """What a scan process does: [(pixels or None, note, lasting)] for some files."""
    return [_decode_or_reason(os.path.join(root, path), *settings) for path in paths]


def _start_scan_process():
    """Ctrl-C is the parent's to handle, and a process whose parent was killed must not stay behind."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _main_module_hidden():
    """A spawned process imports the main script again, torch and all; scan processes need only this file."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _decode_all(root, paths, settings, workers):
    """Yields (path, pixels, note, lasting) for all paths in their order, decoded by `workers` processes."""
    if workers == 0 or len(paths) < POOL_FROM:
        for path in paths:
            yield path, *_decode_chunk(root, [path], *settings)[0]
        return
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, 61)    # Windows waits for no more
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_scan_process)
    chunks = (paths[start:start + CHUNK] for start in range(0, len(paths), CHUNK))
    waiting = collections.deque()
    try:
        while True:
            # No more than this ahead of the writer: memory stays bounded.
            for chunk in itertools.islice(chunks, 4 * workers - len(waiting)):
                with _main_module_hidden():
                    waiting.append((chunk, pool.submit(_decode_chunk, root, chunk, *settings)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            for path, result in zip(chunk, future.result()):
                yield path, *result
    except BrokenProcessPool:
        raise InputError(f"a scan process died near {printable(chunk[0])}, perhaps for lack of memory; start "
                        "again with --num-workers 1, and it goes on from there") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_disk(cache, files, kept, cache_dir):
    """Says before the scan, not in the middle of it, that the decoded images will not fit."""
    new = itertools.count(cache.slots)
    slots = [kept[path] if path in kept else next(new) for path in files]
    slots = [slot for slot in slots if slot is not None]
    images = len(files) - len(kept)
    if slots != list(range(len(slots))):    # the cache will be written anew, in order, beside the old one
        images += len(slots)
    need, free = images * cache.image_bytes, shutil.disk_usage(cache.folder).free
    if need > free:
        raise InputError(f"the decoded images need {need:,} bytes, and the disk of {printable(cache_dir)} has "
                        f"{free:,} free: make room, or choose a smaller --image-size or another --runs-dir")


def _scan(root, cache, files, todo, settings, workers, progress):
    """Decodes `todo` into the cache. Returns [(path, reason)] for faults that the next start tries again."""
    passing, decoded, saved = [], [], time.monotonic()
    bar = tqdm(total=len(todo), desc="reading images", unit=" images", disable=None if progress else True)
    if progress and bar.disable:    # no terminal: one plain line
        print(f"reading {len(todo):,} of {len(files):,} images in {printable(root)}", flush=True)
    results = _decode_all(root, todo, settings, workers)
    try:
        for path, pixels, note, lasting in results:
            if lasting:
                decoded.append((path, files[path], pixels, note))
            else:
                passing.append((path, note))
            bar.update()
            if time.monotonic() - saved > SAVE_SECONDS:
                batch, decoded = decoded, []
                cache.save(batch)
                saved = time.monotonic()
    finally:    # Ctrl-C too keeps what is decoded
        bar.close()
        results.close()
        if decoded:
            cache.save(decoded)
    return passing


def load_images(root, image_size, channels, cache_dir, background=255, workers=-1, held_out_share=0.02,
                held_out_min=64, leave_out=None, progress=True):
    """Scans, decodes and caches the images below `root`; a later call decodes only what is new or changed.

    Each image is image_size x image_size with 1 or 3 channels; transparent parts show `background`, a grey
    level or three levels, 0..255. `workers` processes decode (-1: one a core, 0: this process alone). About
    held_out_share of the images is kept from training, none when that is fewer than held_out_min: an image
    goes where the hash of its pixels sends it, so that equal images stay on one side, and stay there when
    files are added. `leave_out` is a folder that is not looked into, such as the one that runs write their own
    pictures to. Returns an ImageSet. Raises InputError.
    """
    root, background = os.path.expanduser(os.fspath(root)), _levels(background)
    files, skipped = find_files(root, leave_out)
    folder = _cache_folder(root, image_size, channels, background, os.fspath(cache_dir))
    try:
        with _locked(folder):
            cache = Cache(folder, image_size * image_size * channels)
            known = cache.records.items()
            kept = {path: record.slot for path, record in known if files.get(path) == record[:2]}
            todo = [path for path in files if path not in kept]
            if todo:
                _check_disk(cache, files, kept, cache_dir)
                settings = (image_size, channels, background)
                skipped += _scan(root, cache, files, todo, settings, workers, progress)
            passing = {path for path, _ in skipped}
            cache.settle([path for path in files if path not in passing])
            usable = {path: record.note for path, record in cache.records.items() if record.slot is not None}
            skipped += [(path, record.note) for path, record in cache.records.items() if record.slot is None]
            skipped.sort()
            if not usable:
                path, reason = skipped[0]
                raise InputError(f"{printable(root)}: none of its {len(skipped):,} images can be used; the "
                                f"first is {printable(path)}: {reason}")
            shape = (len(usable), image_size, image_size, channels)
            images = np.memmap(cache.pixel_file, np.uint8, "r", shape=shape)
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot keep decoded images here: {_short(error)}") from None
    train, held_out = split(list(usable.values()), held_out_share, held_out_min)
    return ImageSet(images, list(usable), train, held_out, skipped)


def load_images_of_run(root, c):
    """load_images with a run's constants; files that can't be used are counted and named. Raises InputError."""
    image_set = load_images(root, c.IMAGE_SIZE, c.CHANNELS, os.path.join(c.RUNS_DIR, ".cache"), c.BACKGROUND,
                            c.NUM_WORKERS, c.HELD_OUT_SHARE, c.HELD_OUT_MIN, leave_out=c.RUNS_DIR)
    for line in summary_lines(image_set):
        print(line)
    return image_set


def split(hashes, share, least):
    """(train, held_out), int64 indices: i is held out when its hash, as a number in [0, 1), is below share.

    Nothing is held out when that would be fewer than `least` images, or all.
    """
    numbers = np.array([int(value[:16], 16) / 2**64 for value in hashes])
    held_out = np.flatnonzero(numbers < share)
    if len(held_out) < least or len(held_out) == len(hashes):
        held_out = held_out[:0]
    return np.setdiff1d(np.arange(len(hashes)), held_out), held_out


def summary_lines(image_set):
    """Lines that count the files that cannot be used and name the first ten; [] when there is none."""
    skipped = image_set.skipped
    if not skipped:
        return []
    lines = [f"{len(skipped):,} {'file' if len(skipped) == 1 else 'files'} cannot be used:"]
    lines += [f"  {printable(path)}: {reason}" for path, reason in skipped[:10]]
    return lines + ([f"  and {len(skipped) - 10:,} more"] if len(skipped) > 10 else [])


def write_skipped(image_set, file):
    """Writes every file that cannot be used, with its reason, one a line."""
    with open(f"{file}.tmp", "w", encoding="utf-8") as out:
        out.writelines(f"{printable(path)}: {reason}\n" for path, reason in image_set.skipped)
    os.replace(f"{file}.tmp", file)


# ---------------------------------------------------------------- batches

@functools.lru_cache(maxsize=4)
def _permutation(count, seed, purpose, epoch):
    from random_keys import numpy_generator

    return numpy_generator(seed, purpose, epoch).permutation(count)


def batch_indices(count, seed, position, batch_size, purpose="order"):
    """(batch_size,) int64: entries position .. position + batch_size - 1 of an endless chain of permutations.

    Each epoch is a permutation of 0..count-1 of its own, drawn by key (seed, purpose, epoch). A batch at the
    border takes the rest of one epoch and the start of the next, so each batch is full, also when count is
    smaller. A pure function of its arguments: a resumed run has nothing to fast-forward.
    """
    parts = []
    while batch_size > 0:
        epoch, start = divmod(position, count)
        parts.append(_permutation(count, seed, purpose, epoch)[start:start + batch_size])
        position, batch_size = position + len(parts[-1]), batch_size - len(parts[-1])
    return np.concatenate(parts)


def read_batch(image_set, indices, flips=None) -> "torch.Tensor":
    """(B, C, H, W) uint8 in channels_last, a copy: the images at `indices`, mirrored where `flips` (bool) is true."""
    import torch

    batch = image_set.images[indices]    # (B, H, W, C), a copy
    if flips is not None:
        batch[flips] = batch[flips, :, ::-1]
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def to_image(pixels):
    """uint8 to float32 in [-1, 1], on the same device."""
    return pixels.float() / 127.5 - 1


def to_uint8(image):
    """[-1, 1] to uint8, rounded and clamped: the exact inverse of to_image."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_arrays(image):
    """image (N, C, H, W) in [-1, 1] -> uint8 array (N, H, W, C)."""
    return to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
