"""Clips: which folders and files of a data folder are clips, and how a video file becomes frames.

A clip is a folder with images, its images in natural name order (2 before 10) being the frames; an animated .gif or
.webp; or an .mp4, .webm or .mov, which PyAV decodes. Imports no torch: scan processes import it.
"""

import collections
import os
import re
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import image_files
from errors import InputError
from image_files import (
    Decoded,
    Settings,
    check_file,
    check_size,
    conversion_to_srgb,
    counted,
    open_picture,
    printable,
    to_pixels,
)

if TYPE_CHECKING:
    from image_cache import Cache

VIDEOS = (".mp4", ".webm", ".mov")    # in any case
EXTENSIONS = (*VIDEOS, *image_files.EXTENSIONS)
PYAV_MISSING = "videos (.mp4, .webm, .mov) need the package PyAV: pip install av"
UNSUPPORTED = (*image_files.UNSUPPORTED, PYAV_MISSING)    # reasons that concern all files of a format
MIN_FRAMES = 3               # two frames for a speed, one to predict
HELD_OUT_LEAST = 8           # clips that are held out at least, of at least three times as many different ones
DEFINITION = (f"A clip is a folder of at least {MIN_FRAMES} images of one size, an animated .gif or .webp, or a video: "
              f"{' '.join(VIDEOS)}")
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


# ------------------------------------------------------------------------------------- finding clips

def natural_order(path: str) -> tuple[list[str | int], str]:
    """Returns a key that sorts numbers in names by their value: 2 before 10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", path))], path


def is_animated(path: str | os.PathLike) -> bool:
    """Returns whether a WebP file is marked as animated, or a GIF has several frames; False if it is unreadable."""
    try:
        with open(path, "rb") as file:
            start = file.read(21)
        if start[:3] != b"GIF":
            return start[8:16] == b"WEBPVP8X" and bool(start[20] & 2)
        with open_picture(path) as picture:
            return picture.is_animated
    except Exception:    # a damaged file can make a decoder raise anything
        return False


def find_clips(root: str | os.PathLike, found: dict[str, tuple], skipped: list[tuple[str, str]],
               stride: int) -> tuple[dict[str, list[str]], set[str], dict[str, tuple]]:
    """Returns ({name: its files}, the videos, the files to decode), clips in natural order.

    found, skipped: as of data.find_files. Of the images of a folder every stride-th is taken; their clip has the
    folder's name, "." for root itself. A video or animated file, also called video here, is a clip by itself:
    {its path: [its path]}. Folders with too few images are not decoded.
    """
    folders, videos = collections.defaultdict(list), set()
    for path in [*found, *(path for path, _ in skipped if path.lower().endswith(EXTENSIONS))]:
        kind = path.lower()
        if kind.endswith(VIDEOS) or (kind.endswith((".gif", ".webp")) and is_animated(os.path.join(root, path))):
            videos.add(path)
        else:
            folders[os.path.dirname(path) or "."].append(path)
    of_clip = {folder: sorted(frames, key=natural_order)[::stride] for folder, frames in folders.items()}
    of_clip |= {path: [path] for path in videos}
    of_clip = dict(sorted(of_clip.items(), key=lambda clip: natural_order(clip[0])))
    files = {path: found[path] for name, paths in of_clip.items() if name in videos or len(paths) >= MIN_FRAMES
             for path in paths if path in found}
    return of_clip, videos, files


def usable(of_clip: dict[str, list[str]], videos: Collection[str], cache: "Cache",
           skipped: list[tuple[str, str]]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Returns ({name: its files} of the usable clips, [(name, reason)] of the others).

    cache: holds the decoded files. skipped: (path, reason) of files that it does not hold, and of folders.
    """
    reasons = dict(skipped)
    faults = {name: _fault(paths, name in videos, cache, reasons) for name, paths in of_clip.items()}
    others = [(path, reason) for path, reason in skipped if not path.lower().endswith(EXTENSIONS)]
    return ({name: paths for name, paths in of_clip.items() if not faults[name]},
            others + [(name, fault) for name, fault in faults.items() if fault])


def _fault(paths, is_video, cache, reasons):
    """Returns why a clip cannot be used, or None. One frame that cannot be decoded is enough: without it the frames
    around it would be further apart in time than all others."""
    if not is_video and len(paths) < MIN_FRAMES:
        return _too_short(len(paths))
    for path in paths:
        if reason := reasons.get(path) or cache.reason(path):
            return reason if is_video or reason in UNSUPPORTED else f"{os.path.basename(path)}: {reason}"
    if is_video and cache.frames(*paths) < MIN_FRAMES:
        return _too_short(cache.frames(*paths))
    size = cache.size(paths[0])
    for path in paths:
        if cache.size(path) != size:
            return _sizes_differ(size, f"frame {os.path.basename(path)}", cache.size(path))
    return None


def _too_short(frames):
    return f"{counted(frames, 'frame')}, and a clip needs {MIN_FRAMES}"


def _sizes_differ(size, frame, other):
    return f"frames of different sizes: {size[0]} x {size[1]}, and {frame} has {other[0]} x {other[1]}"


def key_of_frames(keys: list[float]) -> float:
    """Returns the key of a clip, in [0, 1), from the keys of its frames."""
    return image_files.key_of(np.array(keys, "<f8").tobytes())


def frame_table(of_clip: dict[str, list[str]], videos: Collection[str], cache: "Cache",
                stride: int) -> tuple[list[str], list[float], list[int]]:
    """Returns the paths of all frames, "name.mp4#00012" for those of a video, and each clip's key and length."""
    frames, keys, lengths = [], [], []
    for name, paths in of_clip.items():
        if name in videos:
            names = [f"{name}#{number * stride:05d}" for number in range(cache.frames(name))]
            key = cache.key(name)
        else:
            names, key = paths, key_of_frames([cache.key(path) for path in paths])
        frames += names
        keys.append(key)
        lengths.append(len(names))
    return frames, keys, lengths


def split(keys: list[float], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, held_out), int64 indices of clips: clip i is held out if keys[i], in [0, 1), is below `share`, or
    is one of the HELD_OUT_LEAST smallest keys. Equal clips have one key.

    A set of less than 3 * HELD_OUT_LEAST different clips, or any with share 0, holds out none.
    """
    different = np.unique(keys)
    held_out = np.zeros(len(keys), bool)
    if share and len(different) >= 3 * HELD_OUT_LEAST:
        held_out = np.array(keys) < max(share, different[HELD_OUT_LEAST])
    if held_out.all():
        held_out[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


# ------------------------------------------------------------------------------------- decoding videos

def _animation(path, settings, stride):
    """Yields the pixels and the size of every stride-th frame of a GIF or WebP."""
    file_bytes = check_file(path)
    with open_picture(path) as picture:
        conversion, transpose = conversion_to_srgb(picture, path), image_files.orientation(picture)
        for number in range(0, picture.n_frames, stride):
            picture.seek(number)
            check_size(*picture.size, file_bytes)    # a GIF's frame may enlarge it
            picture.load()
            yield to_pixels(picture, settings, conversion, transpose)[0], picture.size


def _video(path, settings, stride):
    """Yields the pixels and the upright size of every stride-th frame of a video."""
    file_bytes = check_file(path)
    try:
        import av  # optional: requirements-extras.txt
        from av.video.reformatter import VideoReformatter
    except (ImportError, OSError):    # not installed, or one of its libraries is missing
        raise ImportError(PYAV_MISSING) from None
    with open(path, "rb") as file:
        # Named, because FFmpeg also knows formats that are lists of other files and addresses.
        container_format = "matroska" if file.peek(4)[:4] == b"\x1aE\xdf\xa3" else "mov"
        with av.open(file, format=container_format) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("no video in it")
            context, to_rgb = stream.codec_context, VideoReformatter()
            context.thread_count = 1    # there is a scan process per core
            for number, frame in enumerate(container.decode(stream)):
                check_size(frame.width, frame.height, file_bytes)
                if frame.is_corrupt:
                    raise ValueError("damaged frame")
                if number % stride == 0:
                    picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24").to_ndarray())
                    conversion = image_files.by_code_points(context.color_primaries, context.color_trc)
                    turn = TURNS.get(round(frame.rotation / 90) % 4)    # rotation: in degrees, counterclockwise
                    size = picture.size[::-1] if turn in image_files.TURNED else picture.size
                    yield to_pixels(picture, settings, conversion, turn)[0], size


def _frames(path, settings, stride):
    """Yields the pixels and the size of every stride-th frame of a video or animated file."""
    return (_video if os.fspath(path).lower().endswith(VIDEOS) else _animation)(path, settings, stride)


def last_frames(path: str | os.PathLike, settings: Settings, stride: int, count: int) -> list[np.ndarray]:
    """Returns the last `count` of every stride-th frames of a video or animated file, (H, W, C) uint8, the file's last
    one included. Raises InputError."""
    frames = _frames(path, settings, 1)
    last = collections.deque(maxlen=(count - 1) * stride + 1)
    while frame := _next(frames):
        if isinstance(frame, Decoded):
            raise InputError(f"{printable(path)}: {frame.reason}")
        last.append(frame[0])
    return list(last)[::-stride][::-1]


def decode_video(path: str | os.PathLike, settings: Settings, stride: int,
                 pixel_file: str | os.PathLike) -> Decoded:
    """Writes every stride-th frame of a video or animated file to pixel_file, one (H, W, C) uint8 after the other.

    Only one frame is in memory. Returns Decoded without pixels; with a reason if the video cannot be used, because any
    of its frames cannot be decoded, or because they have different sizes. Raises OSError if pixel_file cannot be
    written.
    """
    frames = _frames(path, settings, stride)
    keys, first = [], None
    with warnings.catch_warnings(), open(pixel_file, "wb") as out:
        warnings.simplefilter("ignore")    # Pillow warns about odd metadata
        while frame := _next(frames):
            if isinstance(frame, Decoded):
                return frame._replace(reason=f"after frame {(len(keys) - 1) * stride}: {frame.reason}" if keys else
                                      frame.reason)
            pixels, size = frame
            first = first or size
            if size != first:
                return Decoded(reason=_sizes_differ(first, f"frame {len(keys) * stride}", size))
            keys.append(image_files.key_of(pixels.tobytes()))
            out.write(pixels)
    return Decoded(key=key_of_frames(keys), shape=(len(keys), *first)) if keys else Decoded(reason="no frames in it")


def _next(frames: Iterator):
    """Returns the next frame, None at the end, or Decoded with the reason of an error."""
    try:
        return next(frames, None)
    except Exception as error:    # a damaged file can make a decoder raise anything
        return image_files.failure(error)
