"""Images: one pass over a folder finds, decodes and caches them; training then reads one memory map of pixels.

    images = load_images("./images", image_size=128, channels=3, cache_dir="runs/.cache")
    rows = images.train[batch_indices(len(images.train), SEED, position, batch_size)]
    image = to_image(read_batch(images, rows).to(device))    # (B, C, H, W), in [-1, 1]

    videos = load_images("./videos", image_size=64, channels=3, cache_dir="runs/.cache", folders="clips")
    first, end = videos.clip_offsets[i:i + 2]                # clip i: videos.images[first:end], in time order

Flat folders, class folders and nested folders work. Names with a leading dot (macOS writes ._photo.jpg beside
photo.jpg) and files with other extensions are ignored. A file is decoded again only when its size or one of its
times differs. The cache may be deleted at any time.
"""

import atexit
import collections
import functools
import json
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import features

import checkpoints
import clips
import image_cache
from errors import InputError
from image_files import EXTENSIONS, Settings, counted, decode, printable, reason_of

if TYPE_CHECKING:    # scan processes import this file, and without torch they start in 0.3 s instead of 6 s
    import torch

CACHE = ".cache"             # folder of the decoded images in RUNS_DIR
FEW = 16                     # different images: with fewer, a line warns
PLAIN_SAMPLE = 1_000         # images that are checked for a single colour; ...
PLAIN_SHARE = 0.1            # ... above this share of them, a line warns
DARK = 0.25                  # warns if no 16-bit image has a value above this share: 12-bit values look black
SMALL_SET = 3_200            # images; a smaller set ...
SMALL_SET_SHARE = 0.05       # ... holds out this share ...
SMALL_SET_LEAST = 16         # ... or about as many images, to measure something on
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")

PathLike = str | os.PathLike


@dataclass
class ImageSet:
    """The usable images of one folder, sorted by path, or the frames of its usable clips, in natural order.

    images: (N, H, W, C) uint8, a read-only memory map. paths: N paths relative to the folder, with "/"; of frame 12 of
    a video "name.mp4#00012". train, held_out: int64 indices into images. skipped: (relative path, reason) of each file,
    or clip, that cannot be used. warnings: lines about the set: missing files, too few or plain images, dark 16-bit
    images.

    labels: (N,) int64, each image's class; None without classes.
    clip_offsets: (M + 1,) int64; clip i is images[clip_offsets[i]:clip_offsets[i + 1]], in time order. None if the
    folders are no clips; then the others are empty. clip_names: M paths relative to the folder, "." for itself.
    train_clips, held_out_clips: int64 indices of clips; train and held_out are all of their frames.
    """

    images: np.ndarray
    paths: list[str]
    train: np.ndarray
    held_out: np.ndarray
    skipped: list[tuple[str, str]]
    warnings: Sequence[str] = ()
    on_device: "torch.Tensor | None" = None    # a copy of images in the memory of a GPU
    labels: np.ndarray | None = None
    clip_offsets: np.ndarray | None = None
    clip_names: Sequence[str] = ()
    train_clips: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    held_out_clips: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @functools.cached_property
    def rows_of_classes(self) -> list[np.ndarray]:
        """The training images of each class that has any."""
        labels = self.labels[self.train]
        return [self.train[labels == label] for label in np.unique(labels)]


def settings_of(c) -> Settings:
    """Returns how files become pixels in a run with the constants c."""
    return Settings(c.IMAGE_SIZE, c.CHANNELS, c.BACKGROUND, c.FIT)


def read_photo(path: PathLike, *settings) -> np.ndarray:
    """Returns one file as (H, W, C) uint8, decoded as by load_images. settings: those of Settings. Raises InputError.
    """
    decoded = decode(path, Settings(*settings))
    if decoded.pixels is None:
        raise InputError(f"{printable(path)}: {decoded.reason}")
    return decoded.pixels


def read_clip(path: PathLike, c, count: int) -> list[np.ndarray]:
    """Returns the last `count` frames of one clip, or all if it has fewer, (H, W, C) uint8 each, decoded as in a run
    with the constants c. Raises InputError."""
    settings = settings_of(c)
    if os.path.isdir(path):
        names = sorted((name for name in find_files(path)[0] if not os.path.dirname(name)), key=clips.natural_order)
        found = [read_photo(os.path.join(path, name), *settings) for name in names[::-c.CLIP_STRIDE][:count][::-1]]
    elif os.path.exists(path) and not os.fspath(path).lower().endswith(clips.VIDEOS) and not clips.is_animated(path):
        raise InputError(f"{printable(path)}: no clip: must be a folder of frames, an animated .gif or .webp, or a "
                         f"video: {' '.join(clips.VIDEOS)}")
    else:
        found = clips.last_frames(path, settings, c.CLIP_STRIDE, count)
    if not found:
        raise InputError(f"{printable(path)}: contains no frames")
    return found


# ------------------------------------------------------------------------------------- finding files

def find_files(root: PathLike, leave_out: PathLike | None = None, videos: bool = False) -> tuple[dict, list]:
    """Returns {relative path: (size, mtime_ns, ctime_ns)} of the image files, sorted, and [(path, reason)] of others.

    Accepts what torchvision's ImageFolder accepts, and folders without class folders. Reads each folder once. Follows
    links to folders after all real folders, so that an image keeps its real path, but not to root or its parents. Does
    not enter the folder leave_out. videos: finds videos too. Raises InputError if root is not a folder or contains
    nothing like an image.
    """
    if not os.path.isdir(root):
        problem = "is a file, not a folder of images" if os.path.exists(root) else "does not exist: must be a folder"
        if os.path.isfile(root) and os.fspath(root).lower().endswith(ARCHIVES):
            problem = "is an archive: unpack it, and give the folder of its images"
        raise InputError(f"{printable(root)} {problem}")
    real_root, extensions = os.path.realpath(root), clips.EXTENSIONS if videos else EXTENSIONS
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
                elif entry.name.lower().endswith(extensions):
                    status = entry.stat()
                    files[path] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            except OSError as error:
                skipped.append((path, "broken link" if entry.is_symlink() else reason_of(error)))
    if not files and not skipped:
        raise InputError(f"{printable(root)}: no images in it; looked for {' '.join(extensions[:-1])}"
                         + (f". {clips.DEFINITION}" if videos else ""))
    return dict(sorted(files.items())), skipped


def find_classes(root: PathLike, leave_out: PathLike | None = None) -> list[str]:
    """Returns the names of the classes, in natural order: those of the folders in `root` that have images in or below
    them. Does not enter the folder leave_out. Raises InputError for fewer than two classes, or if an image is in none.
    """
    paths = find_files(root, leave_out)[0]
    outside = [path for path in paths if "/" not in path]
    if outside:
        raise InputError(f"{printable(root)}: {counted(len(outside), 'image')} directly in it, such as "
                         f"{printable(outside[0])}; with --folders classes every image must be in a class folder")
    names = sorted({path.partition("/")[0] for path in paths}, key=clips.natural_order)
    if len(names) < 2:
        raise InputError(f"{printable(root)}: contains only the class folder {printable(names[0])}; --folders classes "
                         f"needs two or more: are they in {printable(os.path.join(root, names[0]))}?")
    return names


def set_labels(image_set: ImageSet, c) -> None:
    """Sets the labels of a run with classes. Raises InputError for an image of another class."""
    if c.FOLDERS != "classes":
        return
    number = {name: i for i, name in enumerate(c.CLASSES)}
    names = [path.partition("/")[0] for path in image_set.paths]
    other = next((path for name, path in zip(names, image_set.paths) if name not in number), None)
    if other is not None:
        raise InputError(f"{printable(other)}: in none of the class folders {', '.join(map(printable, c.CLASSES))}: "
                         "give the folder that contains these, and nothing else")
    image_set.labels = labels = np.array([number[name] for name in names], np.int64)
    # A class of a few images may be held out as a whole. It is needed for training.
    alone = np.setdiff1d(labels, labels[image_set.train])
    moved = np.isin(labels[image_set.held_out], alone)
    image_set.train = np.sort(np.concatenate([image_set.train, image_set.held_out[moved]]))
    image_set.held_out = image_set.held_out[~moved]


def one_hot(labels: np.ndarray, c) -> "torch.Tensor":
    """Returns labels (N, K) of the classes (N,): 1 at the class, else 0."""
    import torch
    return torch.eye(len(c.CLASSES))[torch.from_numpy(labels)]


def load_images(root: PathLike, image_size: int, channels: int, cache_dir: PathLike, background: int = 255,
                workers: int = -1, held_out_share: float = 0.02, leave_out: PathLike | None = None,
                progress: bool = True, folders: str = "ignore", clip_stride: int = 1, fit: str = "crop") -> ImageSet:
    """Finds, decodes and caches the images below `root`; a later call decodes only new and changed files.

    Each image becomes image_size x image_size with 1, 3 or 4 channels, as Settings say. `workers`
    processes decode (-1: one per core, 0: this process). About held_out_share of the images is held out from training,
    of small sets more (see split). The pixels of an image decide, so equal images are on one side, and no image that
    was trained on is held out later, when files are added. Does not enter the folder leave_out, for example the folder
    of the runs. folders: "clips" reads clips (see clips.py), of which every clip_stride-th frame is taken, and holds
    out whole clips (see clips.split). Raises InputError, RunError if a scan process dies, and OSError if the cache
    cannot be written.
    """
    root, cache_dir = os.path.expanduser(root), os.fspath(cache_dir)
    settings = Settings(image_size, channels, background, fit)
    found, skipped = find_files(root, leave_out, folders == "clips")
    of_clip, videos, files = None, None, found
    if folders == "clips":
        of_clip, videos, files = clips.find_clips(root, found, skipped, clip_stride)
    folder = image_cache.cache_folder(root, _cache_settings(settings, folders, clip_stride), cache_dir)
    try:
        with checkpoints.lock(folder, lambda: print("waiting for another process with the same images", flush=True)):
            cache = image_cache.Cache(folder, image_size * image_size * channels)
            gone = [path for path in cache.row if path not in found]
            todo = [path for path, state in files.items() if cache.state(path) != state]
            if todo:
                image_cache.check_disk(cache, files, todo, cache_dir)
                skipped += image_cache.scan(root, cache, files, todo, settings, workers, progress, videos, clip_stride)
            known = [path for path, state in files.items() if cache.state(path) == state]
            if of_clip is not None:    # the frames of usable clips first, one clip after the other
                of_clip, skipped = clips.usable(of_clip, videos, cache, skipped)
                frames = dict.fromkeys(path for paths in of_clip.values() for path in paths)
                known = [*frames, *(path for path in known if path not in frames)]
            if not cache.in_order(known):
                cache.sort(known)
            paths = [path for path in (known if of_clip is None else frames) if path in cache.row]
            shape = (sum(map(cache.frames, paths)), image_size, image_size, channels)
            images = np.memmap(cache.pixel_file, np.uint8, "r", shape=shape) if paths else None
    except OSError as error:
        error.filename = error.filename or folder    # a full disk does not name the file
        raise
    if of_clip is None:
        skipped += [(path, cache.reason(path)) for path in known if path not in cache.row]
    skipped.sort()
    if not paths:
        path, reason = next((item for item in skipped if item[1] == clips.PYAV_MISSING), skipped[0])
        raise InputError(f"{printable(root)}: none of {counted(len(skipped), 'image' if of_clip is None else 'clip')} "
                         f"can be used; the first is {printable(path)}: {reason}"
                         + (f". {clips.DEFINITION}" if of_clip is not None else ""))
    peaks = [peak for path in paths if (peak := cache.lines[path][6]) is not None]
    if of_clip is None:
        keys = [cache.key(path) for path in paths]
        train, held_out = split(keys, held_out_share)
        return ImageSet(images, paths, train, held_out, skipped, _warnings(images, keys, gone, peaks))
    paths, keys, counts = clips.frame_table(of_clip, videos, cache, clip_stride)
    train_clips, held_out_clips = clips.split(keys, held_out_share)
    is_held_out = np.repeat(np.isin(np.arange(len(keys)), held_out_clips), counts)
    return ImageSet(images, paths, np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), skipped,
                    _warnings(images, keys, gone, peaks, "clip"), clip_offsets=np.cumsum([0, *counts], dtype=np.int64),
                    clip_names=list(of_clip), train_clips=train_clips, held_out_clips=held_out_clips)


def _cache_settings(settings, folders, clip_stride):
    of_fit = () if settings.fit == "crop" else (settings.fit,)
    return (*settings[:3], *of_fit, *((folders, clip_stride) if folders == "clips" else ()))


def _warnings(images, keys, gone, peaks, noun="image"):
    """Returns a line for files that are gone since the last start, for few different images or clips, for plain images,
    and for 16-bit or float images whose values, `peaks` as shares of the full range, are all small."""
    lines, different = [], len(set(keys))
    if gone:
        names = ", ".join(map(printable, gone[:3])) + (" and others" if len(gone) > 3 else "")
        files = counted(len(gone), "image" if noun == "image" else "file")
        lines.append(f"{files} of the last start not found: {names}. Is a disk not mounted?")
    if different < FEW:
        files = f", in {counted(len(keys), 'file' if noun == 'image' else noun)}" if len(keys) > different else ""
        lines.append(f"only {counted(different, f'different {noun}')}{files}: a model can only copy so few")
    sample = read_images(images, np.linspace(0, len(images) - 1, min(len(images), PLAIN_SAMPLE)).astype(int))
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


def load_images_of_run(root: PathLike, c, cache_dir: PathLike | None = None) -> ImageSet:
    """Calls load_images with a run's constants; prints the warnings, how many files cannot be used, and the first ten.
    The cache is in RUNS_DIR, unless cache_dir is given."""
    image_set = load_images(root, c.IMAGE_SIZE, c.CHANNELS, cache_dir or os.path.join(c.RUNS_DIR, CACHE), c.BACKGROUND,
                            c.NUM_WORKERS, c.HELD_OUT_SHARE, c.RUNS_DIR, folders=c.FOLDERS, clip_stride=c.CLIP_STRIDE,
                            fit=c.FIT)
    noun = "file" if image_set.clip_offsets is None else "clip"
    for line in image_set.warnings:
        print(f"warning: {line}")
    for reason in clips.UNSUPPORTED:
        if count := sum(reason == other for _, other in image_set.skipped):
            print(f"{counted(count, noun)} cannot be used: {reason}")
    skipped = [(path, reason) for path, reason in image_set.skipped if reason not in clips.UNSUPPORTED]
    count = len(skipped)
    lines = [f"  {printable(path)}: {reason}" for path, reason in skipped[:10]]
    if skipped:
        print(f"{counted(count, noun)} cannot be used:", *lines, sep="\n")
    if count > 10:
        print(f"  and {count - 10:,} more")
    if not features.check("littlecms2"):
        print("embedded colour profiles are ignored: this Pillow was built without littlecms2")
    return image_set


def file_sizes(root: PathLike, c) -> dict[str, int]:
    """Returns {relative path: size} of a run's image files. Raises InputError as find_files."""
    found = find_files(root, c.RUNS_DIR, c.FOLDERS == "clips")
    files = clips.find_clips(root, *found, c.CLIP_STRIDE)[2] if c.FOLDERS == "clips" else found[0]
    return {path: size for path, (size, *_) in files.items()}


def cached_sizes(root: PathLike, c) -> dict[str, int] | None:
    """Returns file_sizes as the cache of RUNS_DIR knows them, also if root is gone; None if there is no such cache."""
    settings = _cache_settings(settings_of(c), c.FOLDERS, c.CLIP_STRIDE)
    folder = image_cache.cache_folder(root, settings, os.path.join(c.RUNS_DIR, CACHE))
    try:
        lines = Path(folder, "index.jsonl").read_bytes().split(b"\n")[1:-1]
        return {path: size for path, size, *_ in map(json.loads, lines)}
    except (OSError, ValueError):
        return None


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
    """Writes one line for every file or clip that cannot be used: its path and the reason."""
    with checkpoints.atomic_write(file) as out:
        out.writelines(f"{printable(path)}: {reason}\n".encode() for path, reason in image_set.skipped)


def split(keys: list[float], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, held_out), int64 indices: image i is held out if keys[i], in [0, 1), is below `share`.

    A set of less than SMALL_SET images holds out at least SMALL_SET_SHARE and about SMALL_SET_LEAST images; one of less
    than 5 * SMALL_SET_LEAST, or any with share 0, none.
    """
    if len(keys) < SMALL_SET and share:
        share = max(share, SMALL_SET_SHARE, SMALL_SET_LEAST / len(keys))
    below = np.array(keys) < share
    if len(keys) < 5 * SMALL_SET_LEAST or below.all():
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


def balanced_rows(image_set: ImageSet, seed: int, position: int, batch_size: int) -> np.ndarray:
    """Returns rows of training images position .. position + batch_size - 1 of an endless order in which every class
    comes once, in random order, before one comes again, each time with a random image: (batch_size,) int64."""
    from random_keys import numpy_generator  # imports torch
    order = batch_indices(len(image_set.rows_of_classes), seed, position, batch_size, "order of classes")
    rows = []
    for place, number in enumerate(order, position):
        of_class = image_set.rows_of_classes[number]
        rows.append(of_class[numpy_generator(seed, "image of a class", place).integers(len(of_class))])
    return np.array(rows)


def read_images(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns a copy of the images in `rows`.

    First asks the system to read all of them from the disk at the same time. Otherwise each image of a set that is
    larger than the memory would wait for the one before it, and the system would read up to megabytes around it.
    """
    if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):    # Windows does not have it
        size = images[0].nbytes
        for start in (rows * size).tolist():
            page = start - start % mmap.PAGESIZE
            images.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)
    return images[rows]


def read_batch(image_set: ImageSet, indices: np.ndarray, flips: np.ndarray | None = None) -> "torch.Tensor":
    """Returns a copy of the images at `indices`, mirrored where `flips` is true: (B, C, H, W) uint8, channels_last."""
    import torch

    batch = read_images(image_set.images, indices)    # (B, H, W, C)
    if flips is not None:
        batch[flips] = batch[flips, :, ::-1]
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def keep_on_device(image_set: ImageSet, device: "torch.device", share: float) -> None:
    """Copies all images to a CUDA device, unless they need more than `share` of its free memory."""
    import torch

    images = image_set.images
    if images.nbytes <= share * torch.cuda.mem_get_info(device)[0]:
        image_set.on_device = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(images), 4096):
            image_set.on_device[start:start + 4096] = torch.from_numpy(np.array(images[start:start + 4096]))


def to_image(pixels: "torch.Tensor") -> "torch.Tensor":
    """Converts uint8 to float32 in [-1, 1], on the same device."""
    return pixels.float() / 127.5 - 1


def to_uint8(image: "torch.Tensor") -> "torch.Tensor":
    """Converts [-1, 1] to uint8, rounded and clamped: the exact inverse of to_image."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_arrays(image: "torch.Tensor") -> np.ndarray:
    """Converts (N, C, H, W) in [-1, 1] to a uint8 array (N, H, W, C)."""
    return to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
