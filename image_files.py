"""Image files: which formats are read, and how one file becomes pixels. Imports no torch: scan processes import it."""

import contextlib
import hashlib
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")    # in any case
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")    # MPO: JPEG files of some cameras
PIXELS_ALWAYS = 2 ** 24      # a file may always claim this many pixels; Pillow's own limit is 178,956,970 ...
PIXELS_PER_BYTE = 1000       # ... and between the two a file must hold at least one byte for so many pixels

_T = Image.Transpose
TRANSPOSE = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
             7: _T.TRANSVERSE, 8: _T.ROTATE_90}    # EXIF orientation -> what makes the picture upright


class Decoded(NamedTuple):
    """One decoded file: (H, W, C) uint8 and a hash of it as a number in [0, 1), or the reason why there are none."""

    pixels: np.ndarray | None = None
    key: float | None = None
    reason: str | None = None
    retry: bool = False    # the reason may pass: the next start tries again


def _eight_bit(picture):
    """Returns the picture in mode L, RGB or RGBA; scales 16-bit grey (0 to 65535) and float grey (0 to 1)."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values, top = np.asarray(picture), 1 if picture.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):    # in this form it also refuses NaN
            raise ValueError(f"pixel values outside 0 to {top}")
        return Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _pixels(path, settings):
    """Returns one file as (H, W, C) uint8: upright, short side resized to image_size, centre crop.

    Transparent parts show the grey level `background`. Raises ValueError, or whatever Pillow raises.
    """
    image_size, channels, background = settings
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")    # opening a pipe would wait for ever
    if status.st_size == 0:
        raise ValueError("empty file")
    Image.init()    # registers the formats that this Pillow was built with
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
        width, height = picture.size
        limit = PIXELS_ALWAYS + PIXELS_PER_BYTE * status.st_size
        if width * height > limit:
            raise ValueError(f"{width} x {height} pixels, above the limit of {limit:,} for a file of this size")
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at least at twice the size that is needed.
        picture.draft("L" if channels == 1 else "RGB", (2 * image_size, 2 * image_size))
        picture.load()    # Pillow turns TIFF files upright here
        transpose = None
        with contextlib.suppress(Exception):    # damaged EXIF data raises many errors, while the picture is fine
            transpose = TRANSPOSE.get(picture.getexif().get(0x0112))
        small = ImageOps.fit(_eight_bit(picture), (image_size, image_size), Image.Resampling.BICUBIC)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, (background, background, background, 255)), small)
    if transpose is not None:
        small = small.transpose(transpose)
    small = small.convert("L" if channels == 1 else "RGB")
    return np.array(small).reshape(image_size, image_size, channels)


def decode(path: str | os.PathLike, settings: tuple[int, int, int]) -> Decoded:
    """Returns Decoded for one file, with a short reason without the path if it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # Pillow warns about odd metadata and about large pictures
            pixels = _pixels(path, settings)
    except Image.UnidentifiedImageError:
        return Decoded(reason="not an image in a known format")
    except MemoryError:
        return Decoded(reason="not enough memory to decode it", retry=True)
    except Exception as error:    # a damaged file can make a decoder raise anything; the scan goes on
        if isinstance(error, OSError) and error.errno is not None:
            return Decoded(reason=reason_of(error), retry=True)
        return Decoded(reason=" ".join(str(error).split())[:120] or type(error).__name__)
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
    return Decoded(pixels, int.from_bytes(digest[:8], "big") / 2 ** 64)


def reason_of(error: OSError) -> str:
    """Returns the reason of an OSError in lower case, without number and path."""
    return (error.strerror or "cannot be read").lower()
