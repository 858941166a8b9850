"""The cache of decoded images: one file of pixels per image folder, an index, and the processes that fill it.

Imports no torch: scan processes import this file, and start in 0.3 s instead of 6 s.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import types
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import features
from tqdm import tqdm

import checkpoints
import clips
from errors import InputError, RunError
from image_files import decode, printable

CACHE_FORMAT = 3             # increased when the cache's layout or the decoding changes: older caches are then not used
CHUNK = 16                   # images that a scan process decodes per task; a video is a task of its own
AHEAD = 4                    # tasks per scan process that are decoded ahead of the writer; bounds the memory
POOL_FROM = 100              # with fewer files, starting processes costs more than it saves
SAVE_EVERY = 128             # images or frames between two saves: a killed scan loses these and what was decoded ahead
PARTS = "*.frames"           # decoded videos that are not yet in the pixel file


class Cache:
    """The decoded images of one folder: pixels-NUMBER.u8, one image after the other, and index.jsonl.

    The first line of the index is NUMBER, every other line [path, size, mtime_ns, ctime_ns, key, reason, peak]. The
    k-th line with a key belongs to the k-th image; of several lines with one path the last counts. A line with neither
    key nor reason says that a file has another time and the same pixels. Lines are appended after their pixels are on
    the disk, so the cache is valid whenever the process is killed. In a folder of clips a line with a key ends with
    [frames, width, height]: a video fills as many images of the pixel file as it has frames.

    lines: {path: its line}. row: {path: its first image in the pixel file}, of usable files. rows: images in that file.
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
        except (FileNotFoundError, ValueError, TypeError, LookupError):
            if self.index.exists():
                print(f"{printable(folder)}: the image cache is damaged; decoding all images again", flush=True)
            self._replace(0, [], [])

    def _set(self, number, *lines):
        self.number, self.pixel_file = number, self.folder / f"pixels-{number:d}.u8"
        self.lines, self.row, self.rows = {}, {}, 0
        self._add(lines)

    def _add(self, lines):
        for line in lines:
            path, _size, _mtime_ns, _ctime_ns, key, reason, _peak, *_shape = line
            if key is None and reason is None:
                self.lines[path] = [*line[:4], *self.lines[path][4:]]
                continue
            self.lines[path] = line
            self.row.pop(path, None)
            if key is not None:
                if not 0 <= key <= 1:
                    raise ValueError("not a key")
                self.row[path], self.rows = self.rows, self.rows + self.frames(path)

    def state(self, path: str) -> tuple[int, int, int] | None:
        """Returns (size, mtime_ns, ctime_ns) of the file when it was decoded, or None."""
        return tuple(self.lines[path][1:4]) if path in self.lines else None

    def key(self, path: str) -> float | None:
        """Returns the key of a usable file, or None."""
        return self.lines[path][4] if path in self.row else None

    def reason(self, path: str) -> str | None:
        """Returns the reason why a decoded file cannot be used, or None."""
        return self.lines[path][5] if path in self.lines else None

    def frames(self, path: str) -> int:
        """Returns how many images of the pixel file a usable file fills."""
        return self.lines[path][7][0] if self.lines[path][7:] else 1

    def size(self, path: str) -> list[int]:
        """Returns [width, height] of a usable file in a folder of clips, before the crop."""
        return self.lines[path][7][1:]

    def _rows_of(self, paths):
        """Returns the images of the usable ones among `paths` in the pixel file."""
        return [row for path in paths if path in self.row
                for row in range(self.row[path], self.row[path] + self.frames(path))]

    def in_order(self, paths: list[str]) -> bool:
        """Returns whether the pixel file contains the images of `paths` in this order, and no others."""
        return self._rows_of(paths) == list(range(self.rows))

    def append(self, batch: list[tuple[list, np.ndarray | None]]) -> None:
        """Adds the line and the pixels of some files; pixels are None for a file that adds none."""
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
        rows = self._rows_of(paths)
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


def cache_folder(root: str | os.PathLike, settings: tuple, cache_dir: str | os.PathLike) -> str:
    """Returns the folder for one image folder and one way to decode it: settings (image_size, channels, background),
    then fit unless it is "crop", and for clips also ("clips", stride)."""
    root, (image_size, channels, *_) = os.path.realpath(root), settings
    # A Pillow that supports another format tries the files again that the cache calls unusable.
    codecs = {"avif", "webp", "libtiff", "jpg", "zlib", "jpg_2000", "littlecms2"} & set(features.get_supported())
    key = repr((CACHE_FORMAT, os.fsencode(root), settings, sorted(codecs))).encode()
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


def _decode_files(files, settings, stride):
    return [clips.decode_video(file, settings, stride, part) if part else decode(file, settings)
            for file, part in files]


def _chunks(files):
    """Returns the files in lists of up to CHUNK images or one video."""
    chunks = []
    for file in files:
        if not chunks or file[1] or chunks[-1][0][1] or len(chunks[-1]) == CHUNK:
            chunks.append([])
        chunks[-1].append(file)
    return chunks


def _decode_all(files, settings, stride, workers):
    """Yields Decoded for each (file, part), in order, decoded by `workers` processes (0: by this one).

    part: None for an image; the file that takes the pixels of every stride-th frame of a video.
    """
    if workers == 0 or (len(files) < POOL_FROM and sum(part is not None for _, part in files) < 2):
        for file in files:
            yield from _decode_files([file], settings, stride)
        return
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, 61)    # Windows cannot wait for more
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_scan_process)
    chunks = _chunks(files)
    ahead, number, complete = AHEAD * workers, 0, False
    try:
        futures = collections.deque(_submit(pool, _decode_files, chunk, settings, stride) for chunk in chunks[:ahead])
        for number in range(len(chunks)):
            yield from futures.popleft().result()
            for chunk in chunks[number + ahead:number + ahead + 1]:
                futures.append(_submit(pool, _decode_files, chunk, settings, stride))
        complete = True
    except BrokenExecutor:
        raise RunError(f"a scan process died near {printable(chunks[number][0][0])}, perhaps for lack of memory; start "
                       "again with --num-workers 1: the images that were decoded are kept") from None
    finally:
        if not complete:    # a scan process would decode its video to the end
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def check_disk(cache, files, todo, cache_dir):
    """Raises InputError if the disk cannot hold the decoded images. A new video counts as one image: how many frames it
    has is not known before it is decoded."""
    known, new = [path for path in files if path in cache.lines], [path for path in todo if path not in cache.row]
    in_order = cache.in_order(known) and list(files)[:len(known)] == known    # if not, all are written again, in order
    need = (len(new) if in_order else len(new) + len(files)) * cache.image_bytes
    free = shutil.disk_usage(cache.folder).free
    if need > free:
        raise InputError(f"the decoded images need {need:,} bytes, and the disk of {printable(cache_dir)} has {free:,} "
                         "free: make room, or choose a smaller --image-size or another --runs-dir")


def scan(root, cache, files, todo, settings, workers, progress, videos=None, stride=1):
    """Decodes `todo` into the cache. Returns [(path, reason)] of the files that the next start tries again.

    videos: which files of a folder of clips are videos, of which every stride-th frame is taken; None: a folder of
    images.
    """
    unit = "images" if videos is None else "files"
    bar = tqdm(total=len(todo), desc=f"reading {unit}", unit=f" {unit}", disable=None if progress else True)
    if progress and bar.disable:    # the output is not a terminal: one plain line
        print(f"reading {len(todo):,} of {len(files):,} {unit} in {printable(root)}", flush=True)
    parts = [str(cache.folder / f"{number}.frames") if videos and path in videos else None
             for number, path in enumerate(todo)]
    retry, batch, waiting = [], [], 0
    results = _decode_all([(os.path.join(root, path), part) for path, part in zip(todo, parts)], settings, stride,
                          workers)
    try:
        for path, part, decoded in zip(todo, parts, results):
            bar.update()
            if decoded.retry:
                retry.append((path, decoded.reason))
                continue
            shape = [list(decoded.shape)] if videos is not None and decoded.shape else []
            if decoded.key is not None and decoded.key == cache.key(path) and shape == cache.lines[path][7:]:
                batch.append(([path, *files[path], None, None, None], None))    # only its time has changed
            else:
                line = [path, *files[path], decoded.key, decoded.reason, decoded.peak, *shape]
                batch.append((line, np.memmap(part, np.uint8, "r") if part and shape else decoded.pixels))
            if part:
                with contextlib.suppress(OSError):    # Windows keeps it while it is mapped
                    os.unlink(part)
            waiting += shape[0][0] if shape else 1
            if waiting >= SAVE_EVERY:
                full, batch, waiting = batch, [], 0
                cache.append(full)
    finally:    # after Ctrl-C too
        bar.close()
        results.close()
        try:
            cache.append(batch)
        finally:
            batch.clear()
            for part in cache.folder.glob(PARTS):    # of videos that were not used, or of a killed scan
                with contextlib.suppress(OSError):
                    part.unlink()
    return retry
