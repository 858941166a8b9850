"""Pictures for people: sheets, heat maps with a colour bar, PNG and WebP files, videos.

A picture is a uint8 array (H, W, 3); several of one size are (N, H, W, C), C 1 (grey) or 3 (RGB). Gaps and margins
are grey, so that a sheet looks the same on a dark page and on a light one.
"""

import itertools
import math
import shutil
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import atomic_write
from errors import InputError

PANEL = 96                   # grey level of gaps and margins
INK = 244                    # grey level of text: contrast 5.7 to 1 on PANEL
FONT_SIZE = 14               # pixels
SPACE = 8                    # pixels around text and between the parts of a sheet

# Dark to light in equal steps of CIE lightness (L* 7, 24, 42, 59, 77, 94), so that brighter means larger also when
# printed in grey or seen without colour vision.
HEAT_ANCHORS = ((18, 16, 54), (73, 35, 125), (162, 54, 141), (234, 98, 103), (255, 171, 85), (250, 240, 170))
NOT_A_NUMBER = (0, 255, 255)    # a colour outside the map

SUFFIXES = (".gif", ".webp")    # of animations
FPS_LIMIT = 50                  # of animations: browsers show frames shorter than 20 ms at 10 fps
MP4_FPS_LIMIT = 120             # more than a screen shows
KMEANS_PIXELS = 2 ** 17         # k-means refines the palettes of GIF frames up to this size; it takes 0.2 s for each


# ------------------------------------------------------------------------------------- sheets

def opaque(images: np.ndarray) -> np.ndarray:
    """Returns images (..., H, W, C) without transparency: of 4 channels, colours times opacity and opacity, as
    (..., H, W, 3) over white."""
    if images.shape[-1] != 4:
        return images
    return np.minimum(images[..., :3].astype(np.int16) + 255 - images[..., 3:], 255).astype(np.uint8)


def grid(images: Sequence[np.ndarray] | np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Returns the images side by side, row by row: uint8 (N, H, W, 1, 3 or 4) -> (rows of H, columns of W, 3).

    columns: None makes a sheet that is nearly square. gap: pixels between two images. Raises ValueError for another
    type or shape, or no image.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(f"{images.dtype} {images.shape} is invalid: must be uint8 (N, H, W, 1, 3 or 4), N at least 1")
    images = opaque(images)
    count, height, width, _ = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height + gap, width + gap, 3), PANEL, dtype=np.uint8)
    cells[:count, :height, :width] = images                                # grey is repeated for the three channels
    sheet = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return sheet.reshape(rows * (height + gap), -1, 3)[:rows * (height + gap) - gap, :columns * (width + gap) - gap]


def beside(*parts: np.ndarray) -> np.ndarray:
    """Returns pictures of any size from left to right, tops aligned: (H, W, 3) each -> (H', W', 3)."""
    height = max(len(part) for part in parts)
    padded = [_padded(part, height - len(part), SPACE) for part in parts]
    return np.concatenate(padded, axis=1)[:, :-SPACE]


def stack(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Returns pictures of any size below each other, each below its label: (H, W, 3) each -> (H', W', 3).

    Raises ValueError if rows and labels differ in number.
    """
    parts = [part for label, row in zip(labels, rows, strict=True) for part in (_text_line(label), row)]
    width = max(part.shape[1] for part in parts)
    return np.concatenate([_padded(part, 0, width - part.shape[1]) for part in parts])


def pairs(a: np.ndarray, b: np.ndarray, above: bool = False) -> np.ndarray:
    """Returns numbered pairs, row by row: uint8 (N, H, W, C) twice -> (H', W', 3).

    Each pair is side by side, 6 pairs per row; or, with `above`, one above the other, 9 per row.
    """
    cells = [stack([grid(pair, columns=1 if above else 2)], [str(number)]) for number, pair in enumerate(zip(a, b), 1)]
    return grid(cells, columns=9 if above else 6, gap=SPACE)


def _padded(picture, below, right):
    return np.pad(picture, ((0, below), (0, right), (0, 0)), constant_values=PANEL)


def _text(width, height, words):
    """A panel of this size with words, (text, position, Pillow's anchor) each."""
    image = Image.new("RGB", (math.ceil(width), height), (PANEL,) * 3)
    for text, position, anchor in words:
        ImageDraw.Draw(image).text(position, text, font=_font(), fill=(INK,) * 3, anchor=anchor)
    return np.array(image)


def _text_line(text):
    height = FONT_SIZE + SPACE
    return _text(_font().getlength(text) + SPACE, height, [(text, (SPACE // 2, height // 2), "lm")])


def _font():
    return ImageFont.load_default(size=FONT_SIZE)


# ------------------------------------------------------------------------------------- heat maps

def heat_map(values: np.ndarray, low: float, high: float, log: bool = False) -> np.ndarray:
    """Returns values as colours, dark (low or less) to light (high or more): float (N, H, W) -> uint8 (N, H, W, 3).

    log: equal ratios are equal steps of colour. If low == high, every value has the middle colour. NaN is cyan.
    Raises ValueError for low > high, or low <= 0 with log.
    """
    if not low <= high or (log and low <= 0):
        raise ValueError(f"low {low}, high {high} is invalid: low must be at most high, and above 0 with log")
    values = np.asarray(values, dtype=np.float64)
    clipped = np.clip(values, low, high)
    if low == high:
        position = np.full(values.shape, 0.5)
    elif log:
        position = np.log(clipped / low) / math.log(high / low)
    else:
        position = (clipped - low) / (high - low)
    anchors = np.linspace(0, 1, len(HEAT_ANCHORS))
    colours = np.stack([np.interp(position, anchors, channel) for channel in zip(*HEAT_ANCHORS)], axis=-1)
    colours[np.isnan(values)] = NOT_A_NUMBER
    return colours.round().astype(np.uint8)


def heat_maps(values: np.ndarray, low: float, high: float, columns: int | None = None, log: bool = False) -> np.ndarray:
    """Returns a grid of heat maps and, to its right, their scale, on which high, middle and low are written: float
    (N, H, W) -> (H', W', 3).

    With log the middle is the geometric mean; it is left out below three lines of text. Raises as heat_map.
    """
    maps = grid(heat_map(values, low, high, log), columns)
    height = len(maps)
    fraction = np.linspace(1, 0, height)[:, None]
    scale = low * (high / low) ** fraction if log else low + (high - low) * fraction
    bar = np.repeat(heat_map(scale[None], low, high, log)[0], 2 * SPACE, axis=1)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    words = [(f"{high:.4g}", (0, 0), "lt"), (f"{low:.4g}", (0, height), "lb")]
    if height >= 3 * FONT_SIZE:
        words.append((f"{middle:.4g}", (0, height // 2), "lm"))
    return beside(maps, bar, _text(max(_font().getlength(text) for text, _, _ in words) + SPACE, height, words))


# ------------------------------------------------------------------------------------- files

def save_picture(file: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 (H, W, 3), grey (H, W) or (H, W, 1), or (H, W, 4), colours times opacity and opacity, as PNG or WebP
    (quality 95, a third of the size), by the suffix, atomically.

    Raises ValueError for another suffix, OSError if the file cannot be written.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in (".png", ".webp"):
        raise ValueError(f"{file} is invalid: must be .png or .webp")
    if picture.shape[2:] == (4,):
        opacity = np.maximum(picture[..., 3:], 1) / 255
        picture = np.concatenate([np.rint(np.minimum(picture[..., :3] / opacity, 255)).astype(np.uint8),
                                  picture[..., 3:]], axis=2)
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)
    with atomic_write(file) as handle:
        image.save(handle, suffix[1:], quality=95)


def check_video(file: str | Path, fps: float) -> None:
    """Raises InputError if save_video cannot write `file`: another suffix, an existing folder, no PyAV for an mp4, or
    fps out of range."""
    suffix = Path(file).suffix.lower()
    if suffix not in ("", ".mp4", *SUFFIXES):
        raise InputError(f"{file} is invalid: must end with .mp4, {' or '.join(SUFFIXES)}, or be a new folder")
    if suffix == "" and Path(file).exists():
        raise InputError(f"{file} exists already: must be a new folder")
    if suffix == ".mp4":
        try:
            import av  # noqa: F401  optional: requirements-extras.txt
        except (ImportError, OSError) as error:          # not installed, or one of its libraries is missing
            raise InputError(f"{file} needs PyAV, and {str(error).splitlines()[0]}: pip install av, or use .webp or "
                             ".gif") from None
    limit = FPS_LIMIT if suffix in SUFFIXES else MP4_FPS_LIMIT
    if not 1 <= fps <= limit:
        raise InputError(f"{fps:g} frames per second is invalid for {file}: must be 1 to {limit}")


def save_video(file: str | Path, frames: Iterable[np.ndarray], fps: float, loop: bool = True) -> None:
    """Writes frames as mp4, GIF or WebP, by the suffix, or without a suffix as a new folder of PNG files, atomically.

    frames: uint8 (H, W, 3) of one size, taken one at a time; only a GIF keeps one byte per pixel of every frame in
    memory, and a WebP three. fps: 1 to 50, or 120 for mp4; a GIF keeps it on average, because its durations are
    multiples of 10 ms. loop: False makes a GIF or WebP play once; in an mp4 and a folder the player decides. Raises
    InputError as check_video, and for frames of different sizes; OSError if the file cannot be written.
    """
    check_video(file, fps)
    suffix, images = Path(file).suffix.lower(), _frame_images(file, frames)
    if suffix == "":
        _save_frames(Path(file), images)
    elif suffix == ".mp4":
        _save_mp4(file, images, fps)
    elif suffix == ".gif":
        _save_animation(file, _gif_frames(images, fps), **({"loop": 0} if loop else {}))
    else:
        _save_animation(file, images, loop=0 if loop else 1, duration=1000 / fps, quality=90, method=4)


def _save_animation(file, images, **options):
    first = next(images)
    with atomic_write(file) as handle:
        first.save(handle, Path(file).suffix[1:], save_all=True, append_images=images, **options)


def _save_mp4(file, images, fps):
    """H.264 in yuv420p, which every browser and phone plays; odd sides are padded by repeating the border."""
    import av  # optional: requirements-extras.txt

    first = next(images)
    width, height = (side + side % 2 for side in first.size)
    with atomic_write(file) as handle, av.open(handle, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in itertools.chain([first], images):
            pixels = np.pad(np.array(image), ((0, height - image.height), (0, width - image.width), (0, 0)), "edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _save_frames(folder, images):
    """00000.png, 00001.png, ... in a temporary folder, which is then renamed."""
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


def _frame_images(file, frames):
    """Yields the frames as Pillow images. Raises InputError for no frame, or one of another size than the first."""
    shape = None
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise InputError(f"{file}: frame {number} is {frame.shape}, but the first one is {shape}: must have one "
                             "size")
        yield Image.fromarray(frame)
    if shape is None:
        raise InputError(f"{file}: must have at least one frame")


def _gif_frames(images, fps):
    """Yields frames with a palette of 256 colours each, refined by k-means, without dithering.

    Measured on 24 blended drawings and 24 blended photos of 256 x 256 pixels: root mean square error 2.9 and 1.9
    levels; without k-means 4.1 and 2.4, dithered 5.4 and 3.3, with one palette for all frames 6.3 and 3.4.
    """
    for number, image in enumerate(images):
        kmeans = 1 if image.width * image.height <= KMEANS_PIXELS else 0
        image = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans)          # does not dither without a palette
        image.info["duration"] = 10 * (round(100 * (number + 1) / fps) - round(100 * number / fps))    # ms
        yield image
