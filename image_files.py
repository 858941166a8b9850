"""Image files: which formats are read, and how one file becomes pixels. Imports no torch: scan processes import it.

Colours become sRGB, from an embedded ICC profile, from the gamma of a PNG, or from the code points (ITU-T H.273, CICP)
of an AVIF, HEIC or PNG file. Without any of them the values are used as they are.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".ppm",
              ".pgm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".heic", ".heif", ".hif", ".jxl")    # in any case
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF", "PPM", "JPEG2000", "HEIF")
# MPO: JPEG files of some cameras. HEIF: only with the optional package pillow-heif.
PIXELS_ALWAYS = 2 ** 24      # a file may always claim this many pixels; Pillow's own limit is 178,956,970 ...
PIXELS_PER_BYTE = 1000       # ... and between the two a file must hold at least one byte for so many pixels
HEAD = 2 ** 16               # bytes at the start of a file in which its colour description is searched
PROFILE_MAX = 2 ** 22        # bytes; a larger ICC profile is ignored. CMYK profiles of printers have 0.5 to 3 MB

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
HEIF_MISSING = "HEIC files need the package pillow-heif: pip install pillow-heif"
# Pillow's plugin for JPEG XL decodes a file before its size can be checked.
JXL_UNSUPPORTED = "JPEG XL is not supported: convert the files to PNG or JPEG"
UNSUPPORTED = (HEIF_MISSING, JXL_UNSUPPORTED)    # reasons that concern all files of a format

_T = Image.Transpose
TRANSPOSE = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
             7: _T.TRANSVERSE, 8: _T.ROTATE_90}    # EXIF orientation -> what makes the picture upright
TURNED = tuple(TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))    # width and height change places


class Settings(NamedTuple):
    """How files become pixels. fit, of files that are not square: "crop" resizes the short side to image_size and cuts
    off the ends, "pad" resizes the long side and adds borders, "stretch" changes the proportions. Transparent parts and
    borders have the grey level `background`, with 4 channels they are transparent: red, green and blue are multiplied
    by the fourth channel, opacity, so that what cannot be seen is 0."""

    image_size: int
    channels: int
    background: int = 255
    fit: str = "crop"


class Decoded(NamedTuple):
    """One decoded file: (H, W, C) uint8 and a hash of it as a number in [0, 1), or the reason why there are none.

    peak: the largest value of a 16-bit or float image as a share of the full range, 0 to 1; None for other images.
    shape: frames, width and height of the file before the crop. Of a video, clips.decode_video writes the pixels to a
    file, and the key is that of all its frames.
    """

    pixels: np.ndarray | None = None
    key: float | None = None
    reason: str | None = None
    retry: bool = False    # the reason may pass: the next start tries again
    peak: float | None = None
    shape: tuple[int, int, int] | None = None


# ------------------------------------------------------------------------------------- colours

def _encode(light):
    """Returns linear light as sRGB levels, uint8; 1 is white. IEC 61966-2-1."""
    light = np.clip(light, 0, 1)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype("u1")


LEVELS = np.arange(256) / 255
SRGB_LIGHT = np.where(LEVELS <= 0.04045, LEVELS / 12.92, ((LEVELS + 0.055) / 1.055) ** 2.4)
LINEAR, PQ, HLG = 8, 16, 18    # transfer characteristics of H.273; the others are close to sRGB's
TO_SRGB = {                    # colour primaries of H.273 that are far from sRGB's; linear light, both white D65
    9: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),    # BT.2020
    12: np.array([[1.2249, -0.2249, 0.0], [-0.0420, 1.0420, 0.0], [-0.0197, -0.0786, 1.0983]])}           # Display P3


def _from_code_points(primaries, transfer, picture):
    """Converts by H.273 code points. Highlights above the reference white of HDR images (203 nits, BT.2408) clip."""
    levels = np.asarray(picture.convert("RGB"))
    if transfer == PQ:    # SMPTE ST 2084
        power = LEVELS ** (32 / 2523)
        nits = 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)
        light = (nits / 203)[levels]
    elif transfer == HLG:    # BT.2100 at 1,000 nits, where 203 nits are the level 0.75
        scene = np.where(LEVELS <= 0.5, LEVELS ** 2 / 3, (np.exp((LEVELS - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = scene[levels]
        light = light * (light @ [0.2627, 0.6780, 0.0593])[..., None] ** 0.2 / 0.265 ** 1.2
    else:
        light = (LEVELS if transfer == LINEAR else SRGB_LIGHT)[levels]
    return Image.fromarray(_encode(light @ TO_SRGB[primaries].T if primaries in TO_SRGB else light))


def _from_gamma(gamma, picture):
    """Converts a PNG by its gAMA chunk: value = light ** gamma."""
    picture = picture.convert("L" if picture.mode == "L" else "RGB")
    return picture.point(_encode(LEVELS ** (1 / gamma)).tolist() * len(picture.getbands()))


@functools.lru_cache(maxsize=16)
def _icc_transform(profile, mode):
    """Returns a transform from an ICC profile to sRGB for pictures of a mode: L, RGB or CMYK.

    Returns None if the profile is damaged, is not one for such pictures, or changes no colour by more than one level.
    Relative colorimetric with black point compensation, the default of Photoshop and GIMP. For profiles of screens and
    cameras it makes no difference; without it the black ink of a CMYK image becomes a level of 55.
    """
    if len(profile) > PROFILE_MAX:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if mode == "L" and space == "RGB ":
            mode = "RGB"    # a grey JPEG with the profile of the photo that it was made from
        if space != {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB",
                                            ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                            ImageCms.Flags.BLACKPOINTCOMPENSATION)
        white = transform.apply(Image.new(mode, (1, 1), (0, 0, 0, 0) if mode == "CMYK" else "white"))
        if min(white.getpixel((0, 0))) < 128:
            return None    # damaged: in this intent the white of every profile becomes white
        if mode != "CMYK":
            steps = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
            grid = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
            levels = np.asarray(transform.apply(Image.fromarray(grid))).astype(int)
            if np.abs(levels - grid.reshape(1, len(grid[0]), -1)).max() <= 1:
                return None
        return transform
    except Exception:    # lcms refuses the profile in one of several ways, or this Pillow was built without it
        return None


def _apply_icc(transform, picture):
    mode = transform.input_mode
    return transform.apply(picture.getchannel(0) if mode == "L" else picture.convert(mode))


def by_code_points(primaries: int, transfer: int) -> Callable | None:
    """Returns a function that converts a picture with these code points of H.273 to sRGB; None if it is close to it."""
    if primaries in TO_SRGB or transfer in (LINEAR, PQ, HLG):
        return functools.partial(_from_code_points, primaries, transfer)
    return None


def conversion_to_srgb(picture: Image.Image, path: str | os.PathLike) -> Callable | None:
    """Returns a function that converts a picture of this file to sRGB and drops alpha; None if it is in sRGB."""
    info, head = picture.info, b""
    if picture.format in ("PNG", "AVIF", "JPEG2000") and not info.get("icc_profile"):
        with open(path, "rb") as file:    # Pillow does not read these parts of the file
            head = file.read(HEAD)
    profile = info.get("icc_profile")
    if picture.format == "JPEG2000" and (found := re.search(rb"(....)colr\x02..", head, re.DOTALL)):
        profile = head[found.end():found.start() + int.from_bytes(found[1], "big")]
    if profile:
        grey = picture.mode.startswith("I") or picture.mode in ("1", "L", "LA", "La", "F")
        mode = "L" if grey else "CMYK" if picture.mode == "CMYK" else "RGB"
        transform = _icc_transform(profile, mode) if picture.mode != "LAB" else None    # Pillow converts LAB itself
        return transform and functools.partial(_apply_icc, transform)
    pattern = rb"\0\0\0\x04cICP(.)(.)" if picture.format == "PNG" else rb"colrnclx\0(.)\0(.)"
    nclx = info.get("nclx_profile") or {}    # of pillow-heif
    primaries, transfer = int(nclx.get("color_primaries", 2)), int(nclx.get("transfer_characteristics", 2))
    if found := re.search(pattern, head.partition(b"IDAT")[0] if picture.format == "PNG" else head, re.DOTALL):
        primaries, transfer = found[1][0], found[2][0]
    if conversion := by_code_points(primaries, transfer):
        return conversion
    gamma = info.get("gamma", 0) if picture.format == "PNG" and "srgb" not in info else 0
    if 0.1 < gamma < 10 and abs(2.2 * gamma - 1) > 0.05:    # within 5% of 1 / 2.2 sRGB is meant
        return functools.partial(_from_gamma, gamma)
    return None


# ------------------------------------------------------------------------------------- one file

def check_size(width: int, height: int, file_bytes: int) -> None:
    """Raises ValueError for more pixels than a file of this size may claim."""
    limit = PIXELS_ALWAYS + PIXELS_PER_BYTE * file_bytes
    if width * height > limit:
        raise ValueError(f"{width} x {height} pixels, above the limit of {limit:,} for a file of this size")


def _webp_size(start):
    """Returns (width, height) from the first 30 bytes of a file, (0, 0) if it is not WebP. Pillow allocates a WebP's
    pixels when it opens the file, before it gives its size."""
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(start) < 30:
        return 0, 0
    number = functools.partial(int.from_bytes, byteorder="little")
    if start[12:16] == b"VP8X":
        return 1 + number(start[24:27]), 1 + number(start[27:30])
    if start[12:16] == b"VP8L":
        bits = number(start[21:25])
        return 1 + bits % 2 ** 14, 1 + (bits >> 14) % 2 ** 14
    return number(start[26:28]) % 2 ** 14, number(start[28:30]) % 2 ** 14


def check_file(path: str | os.PathLike) -> int:
    """Returns the size of a file in bytes. Raises ValueError if it is empty or no regular file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")    # opening a pipe would wait for ever
    if status.st_size == 0:
        raise ValueError("empty file")
    return status.st_size


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Opens a file in one of the FORMATS and checks its size. Registers pillow-heif at the first file that needs it.

    Raises ValueError, or whatever Pillow raises.
    """
    file_bytes = check_file(path)
    Image.init()    # registers the formats that this Pillow was built with
    picture = _open(path, file_bytes)
    try:
        check_size(*picture.size, file_bytes)
    except ValueError:
        picture.close()
        raise
    return picture


def _open(path, file_bytes):
    with open(path, "rb") as file:
        start = file.read(30)
    check_size(*_webp_size(start), file_bytes)
    try:
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        if start.startswith(JXL_STARTS):
            raise ValueError(JXL_UNSUPPORTED) from None
        if "HEIF" in Image.OPEN or start[4:8] != b"ftyp" or start[8:12] not in HEIF_BRANDS:
            raise
    try:
        import pillow_heif
        pillow_heif.register_heif_opener()
    except ImportError:
        raise ImportError(HEIF_MISSING) from None
    return Image.open(path, formats=["HEIF"])


def _advice(top, low, high):
    if top == 1 and 0 <= low <= high <= 65535:
        return f"divide them by {255 if high <= 255 else 65535}"
    return f"scale them to 0 to {top}"


def _eight_bit(picture):
    """Returns (picture in mode L, RGB or RGBA, its peak). Scales 16-bit grey (0 to 65535) and float grey (0 to 1)."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values, top = np.asarray(picture), 1 if picture.mode == "F" else 65535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top):    # in this form it also refuses NaN
            raise ValueError(f"pixel values outside 0 to {top} ({low:g} to {high:g}): {_advice(top, low, high)}")
        return Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8)), float(high / top)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return picture.convert("RGBA"), None
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB"), None


def orientation(picture: Image.Image) -> Image.Transpose | None:
    """Returns what makes the picture upright by its EXIF data, or None."""
    with contextlib.suppress(Exception):    # damaged EXIF data raises many errors, while the picture is fine
        return TRANSPOSE.get(picture.getexif().get(0x0112))


def to_pixels(picture: Image.Image, settings: Settings, conversion: Callable | None = None,
              transpose: Image.Transpose | None = None, deep: bool = False) -> tuple[np.ndarray, float | None]:
    """Returns a loaded picture as (H, W, C) uint8, upright and resized as Settings say, and its peak. deep: the file
    has 16 bits per value, and Pillow kept 8."""
    image_size, channels, background, fit = settings
    if picture.mode == "CMYK" and conversion is not None:
        whole, peak = picture, None    # the profile needs all four channels
    else:
        whole, peak = _eight_bit(picture)
    if deep and peak is None:
        peak = max(high for _, high in whole.convert("RGB").getextrema()) / 255
    resize = {"crop": ImageOps.fit, "pad": ImageOps.contain, "stretch": Image.Image.resize}[fit]
    small = resize(whole, (image_size, image_size), Image.Resampling.BICUBIC)
    alpha = small.getchannel("A") if small.mode == "RGBA" else None
    if conversion is not None:
        small = conversion(small)
    if alpha is not None:
        small = small.convert("RGB")
        small.putalpha(alpha)
    if alpha is not None and channels < 4:
        small = Image.alpha_composite(Image.new("RGBA", small.size, (background, background, background, 255)), small)
    if transpose is not None:
        small = small.transpose(transpose)
    mode, border = {1: ("L", background), 3: ("RGB", (background,) * 3), 4: ("RGBA", (0, 0, 0, 0))}[channels]
    small = ImageOps.pad(small.convert(mode), (image_size, image_size), color=border)
    pixels = np.array(small).reshape(image_size, image_size, channels)
    if channels == 4:
        pixels[..., :3] = np.rint(pixels[..., :3] * (pixels[..., 3:] / 255))
    return pixels, peak


def _decode(path, settings):
    """Returns the pixels of one file, their peak, and (1, width, height) of the upright picture."""
    image_size, channels = settings.image_size, settings.channels
    with open_picture(path) as picture:
        width, height = picture.size
        conversion = conversion_to_srgb(picture, path)
        deep = ";16" in str([tile[3] for tile in picture.tile])    # Pillow keeps 8 of the 16 bits of colour images
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but at least at twice the size that is needed.
        picture.draft("L" if channels == 1 and conversion is None else "RGB", (2 * image_size, 2 * image_size))
        picture.load()    # Pillow turns TIFF files upright here
        transpose = orientation(picture)
        pixels, peak = to_pixels(picture, settings, conversion, transpose, deep)
    return pixels, peak, (1, height, width) if transpose in TURNED else (1, width, height)


def key_of(content: bytes) -> float:
    """Returns a hash of the content as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest()[:8], "big") / 2 ** 64


def failure(error: Exception) -> Decoded:
    """Returns Decoded with a short reason, without the path, for an error of a decoder."""
    if isinstance(error, Image.UnidentifiedImageError):
        return Decoded(reason="not an image in a known format")
    if isinstance(error, ImportError):            # a package may be installed before the next start
        return Decoded(reason=str(error), retry=True)
    if isinstance(error, MemoryError):
        return Decoded(reason="not enough memory to decode it", retry=True)
    if isinstance(error, OSError) and error.errno is not None:
        return Decoded(reason=reason_of(error), retry=True)
    text = getattr(error, "strerror", None) or str(error)    # PyAV's messages name the path, strerror does not
    return Decoded(reason=" ".join(text.split())[:120] or type(error).__name__)


def decode(path: str | os.PathLike, settings: Settings) -> Decoded:
    """Returns Decoded for one file, with a short reason without the path if it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # Pillow warns about odd metadata and about large pictures
            pixels, peak, shape = _decode(path, settings)
    except Exception as error:    # a damaged file can make a decoder raise anything; the scan goes on
        return failure(error)
    return Decoded(pixels, key_of(pixels.tobytes()), peak=peak, shape=shape)


def counted(number: int, noun: str) -> str:
    """(1, "image") -> "1 image", (2000, "image") -> "2,000 images"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def printable(path: str | os.PathLike) -> str:
    """Returns the path in one line of text: escapes control characters and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))


def reason_of(error: OSError) -> str:
    """Returns the reason of an OSError in lower case, without number and path."""
    return (error.strerror or "cannot be read").lower()
