"""Pictures for people to look at: sheets, heat maps with their colour bar, PNG and WebP files, videos.

A picture is a uint8 array (H, W, 3). Several of one size are (N, H, W, C) with C 1 (grey) or 3 (RGB). What is
around them has one grey, PANEL, dark enough for a dark page and light enough for a light one.
"""

import contextlib
import itertools
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = (96, 96, 96)         # gaps and margins
INK = (244, 244, 244)        # text on PANEL: contrast 5.7 to 1
FONT_SIZE = 14               # pixels
SPACE = 8                    # pixels around text and between the parts of a sheet

# From dark to light in equal steps of CIE lightness (L* 7, 24, 42, 59, 77, 94): the brighter is the larger,
# also printed in grey or seen without colour vision.
HEAT_ANCHORS = ((18, 16, 54), (73, 35, 125), (162, 54, 141), (234, 98, 103), (255, 171, 85), (250, 240, 170))
NOT_A_NUMBER = (0, 255, 255)    # a colour that is not on the map

SUFFIXES = (".gif", ".webp")    # of animations
VIDEO_SUFFIXES = (".mp4", *SUFFIXES)
FPS_LIMIT = 50                  # browsers fall back to 10 frames a second where one is shorter than 20 ms
MP4_FPS_LIMIT = 120             # an mp4 has no such limit; more than a screen shows helps nobody
KMEANS_PIXELS = 2 ** 17         # largest frame whose palette is refined by k-means

# ------------------------------------------------------------------------------------- sheets

def grid(images, columns=None, gap=2):
    """Pictures side by side, row by row: uint8 (N, H, W, C) with C 1 or 3 -> (rows of H, columns of W, 3).

    columns: None makes rows and columns as near to equal as N allows; never more than N.
    gap: pixels between two pictures; cells without a picture have the same grey.
    Raises ValueError for another type or shape, and where there is no picture.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise ValueError(f"{images.dtype} {images.shape}: a grid takes uint8 (N, H, W, 1 or 3), N at least 1")
    count, height, width, _ = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    sheet = _panel(rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top:top + height, left:left + width] = image      # one grey channel spreads over three
    return sheet


def beside(*parts):
    """Pictures of any size from left to right, tops aligned: (H, W, 3) each -> one (H, W, 3)."""
    sheet = _panel(max(p.shape[0] for p in parts), sum(p.shape[1] + SPACE for p in parts) - SPACE)
    left = 0
    for part in parts:
        sheet[:part.shape[0], left:left + part.shape[1]] = part
        left += part.shape[1] + SPACE
    return sheet


def stack(rows, labels=None):
    """Pictures of any size under each other, each with its label above it: (H, W, 3) each -> one (H, W, 3).

    Raises ValueError where rows and labels differ in number.
    """
    rows = list(rows)
    if labels is not None:
        labels = list(labels)
        if len(labels) != len(rows):
            raise ValueError(f"{len(rows)} rows with {len(labels)} labels: give one label a row, or none")
        rows = [part for label, row in zip(labels, rows) for part in (_text_line(label), row)]
    sheet = _panel(sum(p.shape[0] for p in rows) + (0 if labels else SPACE * (len(rows) - 1)),
                   max(p.shape[1] for p in rows))
    top = 0
    for part in rows:
        sheet[top:top + part.shape[0], :part.shape[1]] = part
        top += part.shape[0] + (0 if labels else SPACE)
    return sheet


def pairs(a, b, above=False):
    """Numbered pairs, row by row: uint8 (N, H, W, C) twice -> (H', W', 3), 6 pairs of neighbours a row, or 9 of
    pictures above each other."""
    cells = [grid(np.stack(pair), columns=1 if above else 2) for pair in zip(a, b)]
    cells = [stack([cell], [str(number)]) for number, cell in enumerate(cells, 1)]
    return grid(np.stack(cells), columns=9 if above else 6, gap=SPACE)


def _panel(height, width):
    return np.full((height, width, 3), PANEL, dtype=np.uint8)


def _text_line(text):
    """One line of text with some room around it: (FONT_SIZE + SPACE, W, 3)."""
    font = ImageFont.load_default(size=FONT_SIZE)
    image = Image.new("RGB", (math.ceil(font.getlength(text)) + SPACE, FONT_SIZE + SPACE), PANEL)
    ImageDraw.Draw(image).text((SPACE // 2, image.height // 2), text, font=font, fill=INK, anchor="lm")
    return np.array(image)

# ------------------------------------------------------------------------------------- heat maps

def heat_map(values, low, high, log=False):
    """Values as colours, dark (low and less) to light (high and more): float (N, H, W) -> uint8 (N, H, W, 3).

    log: equal ratios, not equal differences, are equal steps of colour. Where low == high every value has the
    middle colour. NaN is cyan, which is not on the map.
    Raises ValueError for low > high, or log with low <= 0.
    """
    values = np.asarray(values, dtype=np.float64)
    position = _position(values, low, high, log)
    at = np.linspace(0, 1, len(HEAT_ANCHORS))
    channels = [np.interp(position, at, channel) for channel in zip(*HEAT_ANCHORS)]
    colours = np.stack(channels, axis=-1)
    colours[np.isnan(values)] = NOT_A_NUMBER
    return colours.round().astype(np.uint8)


def colour_bar(low, high, height, log=False):
    """The scale of a heat map: (height, W, 3), with high, middle and low written beside it, high at the top.

    With log the middle is the geometric mean. Below three lines of text the middle is left out. Raises
    ValueError as heat_map does.
    """
    middle = math.sqrt(low * high) if log else (low + high) / 2
    fraction = np.linspace(1, 0, height)[:, None]
    values = low * (high / low) ** fraction if log else low + (high - low) * fraction
    bar = np.repeat(heat_map(values[None], low, high, log)[0], 2 * SPACE, axis=1)

    font = ImageFont.load_default(size=FONT_SIZE)
    labels = [(f"{high:.4g}", 0, "lt"), (f"{low:.4g}", height, "lb")]
    if height >= 3 * FONT_SIZE:
        labels.append((f"{middle:.4g}", height // 2, "lm"))
    width = math.ceil(max(font.getlength(text) for text, _, _ in labels))
    scale = Image.new("RGB", (width + SPACE, height), PANEL)
    for text, y, anchor in labels:
        ImageDraw.Draw(scale).text((0, y), text, font=font, fill=INK, anchor=anchor)
    return beside(bar, np.array(scale))


def heat_maps(values, low, high, columns=None, log=False):
    """Values (N, H, W) as a grid of heat maps with its scale beside it."""
    maps = grid(heat_map(values, low, high, log), columns)
    return beside(maps, colour_bar(low, high, maps.shape[0], log))


def _position(values, low, high, log):
    """Where values lie between low and high, in [0, 1]."""
    if not low <= high or (log and low <= 0):
        raise ValueError(f"low {low}, high {high}: low must not exceed high, nor be 0 or less with log")
    if low == high:
        return np.full(values.shape, 0.5)
    values = np.clip(values, low, high)
    if log:
        return np.log(values / low) / math.log(high / low)
    return (values - low) / (high - low)

# ------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def _replacing(file):
    """A binary file object; what is written becomes `file` in one step at the end, or nothing does."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_picture(file, picture):
    """Writes uint8 (H, W, 3), or grey (H, W) or (H, W, 1), as PNG or WebP, by the suffix of `file`; folders on the way
    are made.

    WebP loses a little (quality 95) and takes a third of the room. The file is complete under its name or as it was.
    Raises ValueError for another suffix, type or shape, OSError where it cannot be written.
    """
    picture, suffix = np.asarray(picture), Path(file).suffix.lower()
    if suffix not in (".png", ".webp"):
        raise ValueError(f"{file}: pictures are .png or .webp")
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.dtype != np.uint8 or (picture.ndim != 2 and (picture.ndim != 3 or picture.shape[2] != 3)):
        raise ValueError(f"{file}: {picture.dtype} {picture.shape}, a picture is uint8 (H, W, 3) or (H, W)")
    with _replacing(file) as handle:
        Image.fromarray(picture).save(handle, format=suffix[1:].upper(), quality=95)


def missing_for(file):
    """What keeps save_video from writing `file`: one line, or None."""
    suffix = Path(file).suffix.lower()
    if suffix not in ("", *VIDEO_SUFFIXES):
        return f"{suffix} is no kind of video: give a name that ends with {', '.join(VIDEO_SUFFIXES)}, or a folder's"
    if suffix == ".mp4":
        try:
            import av  # noqa: F401  optional: requirements-extras.txt
        except (ImportError, OSError) as error:          # not installed, or its libraries are not to be had
            return (f"an mp4 needs PyAV, and {str(error).splitlines()[0]}: pip install av, or give a name that ends "
                    "with .webp or .gif")
    if suffix == "" and Path(file).exists():
        return "it exists already, and the frames would mix with what is in it: give another name"
    return None


def save_video(file, frames, fps, loop=True):
    """Writes frames as mp4, GIF or WebP, by the suffix of `file`, or without one as a folder of PNG files.

    frames: any iterable of uint8 (H, W, 3), one size; an mp4 and a folder take them one at a time, so that memory does
    not grow with the length. loop as in save_animation: an mp4 and a folder leave it to the player. The file or folder
    is complete under its name or not there. Raises ValueError as missing_for says and as save_animation does.
    """
    problem, suffix = missing_for(file), Path(file).suffix.lower()
    if problem:
        raise ValueError(f"{file}: {problem}")
    if suffix in SUFFIXES:
        save_animation(file, frames, fps, loop)
    elif suffix == ".mp4":
        _save_mp4(file, _frame_images(file, frames), fps)
    else:
        _save_frames(Path(file), _frame_images(file, frames))


def _save_mp4(file, images, fps):
    """H.264 in yuv420p, which every browser and phone plays; a border repeats the last row where a side is odd."""
    import av  # optional: requirements-extras.txt

    if not 1 <= fps <= MP4_FPS_LIMIT:
        raise ValueError(f"{file}: {fps} frames a second, possible are 1 to {MP4_FPS_LIMIT}")
    first = next(images, None)
    if first is None:
        raise ValueError(f"{file}: a video needs at least one frame")
    width, height = (side + side % 2 for side in first.size)
    with _replacing(file) as handle, av.open(handle, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in itertools.chain([first], images):
            pixels = np.pad(np.array(image), ((0, height - image.height), (0, width - image.width), (0, 0)), "edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _save_frames(folder, images):
    """00000.png, 00001.png, ...: written beside and renamed, so that the folder is whole or not there."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for number, image in enumerate(images):
            image.save(temporary / f"{number:05d}.png")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_animation(file, frames, fps, loop=True):
    """Writes frames as an animated GIF or WebP, by the suffix of `file`; folders on the way are made.

    frames: any iterable of uint8 (H, W, 3), one size. A GIF keeps one byte a pixel of each in memory to the
    end, a WebP all three. fps: 1 to 50, kept on average where a GIF's unit of 10 ms does not divide the frame
    time. loop: False plays once. The file is complete under its name or as it was.
    Raises ValueError for another suffix, fps out of range, no frame, or a frame unlike the first; OSError
    where the file cannot be written.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        ending = suffix or "no suffix"
        raise ValueError(f"{file}: {ending} is no kind of animation, use {' or '.join(SUFFIXES)}")
    if not 1 <= fps <= FPS_LIMIT:
        raise ValueError(f"{file}: {fps} frames a second, possible are 1 to {FPS_LIMIT}")
    images = _frame_images(file, frames)
    if suffix == ".gif":
        images = _gif_frames(images, fps)
        options = {"loop": 0} if loop else {}
    else:
        options = {"loop": 0 if loop else 1, "duration": 1000 / fps, "quality": 90, "method": 4}
    first = next(images, None)
    if first is None:
        raise ValueError(f"{file}: an animation needs at least one frame")
    with _replacing(file) as handle:
        first.save(handle, format=suffix[1:].upper(), save_all=True, append_images=images, **options)


def _frame_images(file, frames):
    shape = None
    for number, frame in enumerate(frames):
        frame = np.asarray(frame)
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
            raise ValueError(f"{file}: frame {number} is {frame.dtype} {frame.shape}, "
                             "frames are uint8 (H, W, 3) of one size")
        yield Image.fromarray(frame)


def _gif_frames(images, fps):
    """256 colours of its own for each frame, refined by k-means, without dithering.

    Compared over 24 frames of blended drawings and of blended photographs, 256 x 256: root mean square error
    2.9 and 1.9 levels, and 3.1 and 2.1 for the change from frame to frame, the least of all. Without k-means
    4.1 and 2.4; with one palette for all frames 6.3 and 3.4, and bands in plain areas; dithered 5.4 and 3.3,
    and grain that moves (6.5 and 3.6 for the change). K-means costs 0.2 s a frame: large ones do without.
    """
    for number, image in enumerate(images):
        kmeans = 1 if image.width * image.height <= KMEANS_PIXELS else 0
        image = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans, dither=Image.Dither.NONE)
        image.info["duration"] = 10 * (round(100 * (number + 1) / fps) - round(100 * number / fps))    # ms
        yield image
