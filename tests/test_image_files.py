"""image_files.py: colours become sRGB, dark 16-bit sets are reported, and formats that need a package are named."""

import os
import re
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from test_fuzz import MEMORY, fuzz, mutated

import command_line
import data
import image_files
from errors import InputError

needs_profiles = pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow ignores profiles")
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")

# x and y of red, green and blue; all with the white D65
SRGB = (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)
DISPLAY_P3 = (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)
ADOBE_RGB = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)
BT_2020 = (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)
WHITE = (0.3127, 0.3290)
TO_D50 = np.array([[1.0479298, 0.0229468, -0.0501922], [0.0296278, 0.9904344, -0.0170738],
                   [-0.0092430, 0.0150551, 0.7518743]])    # Bradford


def to_xyz(primaries):
    """The matrix from linear RGB to XYZ, from the chromaticities."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (*primaries, WHITE)]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def srgb_light(value):
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_levels(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def expected_levels(light, primaries):
    """The sRGB levels of linear RGB values (..., 3) in the given primaries."""
    return srgb_levels(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)


# ------------------------------------------------------------------------------------- ICC profiles

def profile(tags, space=b"RGB ", device=b"mntr", connection=b"XYZ "):
    """An ICC profile, version 4, of some tags."""
    offset, table, content = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(content), len(value))
        content += value + b"\0" * (-len(value) % 4)
    head = struct.pack(">I4xI4s4s4s", offset + len(content), 0x04200000, device, space, connection)
    head += struct.pack(">12x4s28x", b"acsp")
    return head + struct.pack(">3I", *D50) + b"\0" * 48 + table + content


D50 = np.rint(np.array([0.9642, 1, 0.8249]) * 65536).astype(int).tolist()
WHITE_TAG = b"XYZ \0\0\0\0" + struct.pack(">3I", *D50)


def curve(*parameters):
    """A power function, or with five parameters the one of sRGB."""
    values = [round(65536 * value) for value in parameters]
    return struct.pack(f">4s4xHxx{len(values)}i", b"para", 0 if len(values) == 1 else 3, *values)


def rgb_profile(primaries, *parameters):
    tags = {b"wtpt": WHITE_TAG, b"cprt": b"text\0\0\0\0none\0"}
    for name, column in zip("rgb", (TO_D50 @ to_xyz(primaries)).T):
        tags[f"{name}XYZ".encode()] = struct.pack(">4s4x3i", b"XYZ ", *np.rint(65536 * column).astype(int).tolist())
        tags[f"{name}TRC".encode()] = curve(*parameters)
    return profile(tags)


SRGB_CURVE = 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045
P3_PROFILE = rgb_profile(DISPLAY_P3, *SRGB_CURVE)
ADOBE_PROFILE = rgb_profile(ADOBE_RGB, 563 / 256)
GREY_PROFILE = profile({b"wtpt": WHITE_TAG, b"cprt": b"text\0\0\0\0none\0", b"kTRC": curve(1.8)}, b"GRAY")
SRGB_PROFILE = rgb_profile(SRGB, *SRGB_CURVE)
GREYS = srgb_levels((np.arange(256) / 255) ** 1.8)    # what GREY_PROFILE makes of the 256 levels


def ink_profile():
    """A CMYK profile in which cyan and black ink are red: a table of the 16 corners, in Lab."""
    white, black, red = (255, 128, 128), (0, 128, 128), (138, 209, 198)
    table = bytes(value for corner in range(16) for value in (
        white if corner == 0 else red if corner in (0b1000, 0b0001) else black))    # cyan varies slowest
    matrix = struct.pack(">9i", *[65536, 0, 0, 0, 65536, 0, 0, 0, 65536])
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    tags = {name: lut for name in (b"A2B0", b"A2B1")}
    return profile({b"wtpt": WHITE_TAG, b"cprt": b"text\0\0\0\0none\0", **tags}, b"CMYK", b"prtr", b"Lab ")


def colours(seed=0):
    """Nine flat fields of 32 x 32 pixels as a picture, and their colours, (9, 3) in [0, 1]."""
    values = np.random.default_rng(seed).integers(20, 236, (9, 3), dtype=np.uint8)
    values[:3] = np.eye(3) * 235 + 10    # nearly pure colours, which clip or change most
    return Image.fromarray(values.reshape(3, 3, 3).repeat(32, 0).repeat(32, 1)), values / 255


def fields(file, channels=3):
    """Decodes a picture of colours(); returns the middle of each of the nine fields, (9, channels)."""
    return data.read_photo(file, 96, channels)[16::32, 16::32].reshape(9, channels).astype(float)


def centre(file, channels=3, background=255):
    return data.read_photo(file, 32, channels, background)[16, 16].astype(int).tolist()


@needs_profiles
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_a_profile_with_red_and_green_swapped_makes_red_green(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    swapped = SRGB_PROFILE.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / f"a.{suffix}", icc_profile=swapped, quality=95)
    red, green, blue = centre(tmp_path / f"a.{suffix}")
    assert red <= 6 and green >= 250 and blue <= 6
    assert abs(centre(tmp_path / f"a.{suffix}", channels=1)[0] - 150) <= 2    # the luma of green, not of red


@needs_profiles
@pytest.mark.parametrize("primaries, icc, light", [
    (DISPLAY_P3, P3_PROFILE, srgb_light), (ADOBE_RGB, ADOBE_PROFILE, lambda value: value ** (563 / 256))])
def test_wide_gamut_colours_become_what_the_formula_gives(tmp_path, primaries, icc, light):
    picture, values = colours()
    picture.save(tmp_path / "a.png", icc_profile=icc)
    expected = expected_levels(light(values), primaries)
    assert np.abs(fields(tmp_path / "a.png") - expected).max() <= 2
    assert np.abs(expected - 255 * values).max() > 25    # so the test would notice missing conversion
    picture.save(tmp_path / "a.jpg", icc_profile=icc, quality=100, subsampling=0)
    assert np.abs(fields(tmp_path / "a.jpg") - expected).max() <= 4
    luma = expected @ [0.299, 0.587, 0.114]
    assert np.abs(fields(tmp_path / "a.jpg", channels=1)[:, 0] - luma).max() <= 3


@needs_profiles
def test_an_srgb_profile_leaves_the_pixels_as_they_are(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "without.png")
    plain = data.read_photo(tmp_path / "without.png", 64, 3)
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, icc in (("pillow", pillows), ("own", SRGB_PROFILE)):
        picture.save(tmp_path / f"{name}.png", icc_profile=icc)
        assert np.array_equal(data.read_photo(tmp_path / f"{name}.png", 64, 3), plain)


@needs_profiles
def test_grey_values_are_converted_by_their_profile(tmp_path):
    levels = np.array([0, 5, 30, 70, 110, 150, 190, 230, 255], np.uint8)
    pixels = levels.reshape(3, 3).repeat(32, 0).repeat(32, 1)
    grey, deep = Image.fromarray(pixels), Image.fromarray(pixels.astype(np.uint16) * 257)
    for name, picture in (("grey.png", grey), ("grey.jpg", grey), ("deep.png", deep), ("deep.tif", deep)):
        picture.save(tmp_path / name, icc_profile=GREY_PROFILE)
        for channels in (1, 3):
            seen = fields(tmp_path / name, channels)
            assert np.abs(seen - GREYS[levels][:, None]).max() <= (3 if name == "grey.jpg" else 2), name
    grey.save(tmp_path / "other.jpg", quality=100, icc_profile=rgb_profile(ADOBE_RGB, 1.8))    # as some editors write
    assert np.abs(fields(tmp_path / "other.jpg", 1)[:, 0] - GREYS[levels]).max() <= 3


@needs_profiles
def test_alpha_is_kept_and_the_background_is_not_converted(tmp_path):
    rgba = Image.new("RGBA", (64, 64), (200, 100, 50, 128))
    half_grey = Image.merge("LA", [Image.new("L", (64, 64), 100), Image.new("L", (64, 64), 128)])
    palette = Image.new("RGB", (64, 64), (200, 100, 50)).quantize(2)
    rgba.save(tmp_path / "rgba.png", icc_profile=P3_PROFILE)
    half_grey.save(tmp_path / "la.png", icc_profile=GREY_PROFILE)
    palette.save(tmp_path / "palette.png", icc_profile=P3_PROFILE)
    colour = expected_levels(srgb_light(np.array([200, 100, 50]) / 255), DISPLAY_P3)
    half = (127 * 90 + 128 * colour) / 255
    assert np.abs(centre(tmp_path / "rgba.png", background=90) - half).max() <= 2
    assert np.abs(np.array(centre(tmp_path / "palette.png")) - colour).max() <= 2
    for channels in (1, 3):
        assert abs(centre(tmp_path / "la.png", channels, background=90)[0] - (127 * 90 + 128 * GREYS[100]) / 255) <= 2


@needs_profiles
@pytest.mark.parametrize("suffix", ["jpg", "tif"])    # Pillow writes the inverted values of Adobe's JPEG files
def test_cmyk_is_converted_by_its_profile_and_stays_as_it_is_without_one(tmp_path, suffix):
    inks_of = {"cyan": (255, 0, 0, 0), "black": (0, 0, 0, 255), "paper": (0, 0, 0, 0), "all": (255, 255, 255, 255)}
    for name, inks in inks_of.items():
        picture = Image.new("CMYK", (64, 64), inks)
        picture.save(tmp_path / f"{name}.{suffix}", icc_profile=ink_profile(), quality=95)
        picture.save(tmp_path / f"{name}_plain.{suffix}", quality=95)
        picture.save(tmp_path / f"{name}_other.{suffix}", icc_profile=P3_PROFILE, quality=95)
    seen = [centre(tmp_path / f"{name}.{suffix}") for name in inks_of]
    assert np.abs(np.array(seen) - [(255, 0, 0), (255, 0, 0), (255, 255, 255), (0, 0, 0)]).max() <= 5
    for kind in ("plain", "other"):
        assert np.abs(np.array(centre(tmp_path / f"cyan_{kind}.{suffix}")) - (0, 255, 255)).max() <= 2


@needs_profiles
def test_a_large_jpeg_with_a_profile_is_still_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    Image.new("RGB", (1200, 900), (200, 100, 50)).save(tmp_path / "a.jpg", quality=95, icc_profile=P3_PROFILE)
    sizes, fit = [], ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda picture, *rest: sizes.append(picture.size) or fit(picture, *rest))
    expected = expected_levels(srgb_light(np.array([200, 100, 50]) / 255), DISPLAY_P3)
    assert np.abs(data.read_photo(tmp_path / "a.jpg", 64, 3)[32, 32] - expected).max() <= 3
    assert sizes == [(300, 225)]


FAULTS = ["empty", "text", "cut", "no curve", "black", "long", "grey", "Lab ", "link", "abst", "nmcl"]


@needs_profiles
@pytest.mark.parametrize("fault", FAULTS)
def test_a_profile_that_cannot_be_used_leaves_the_colours_as_they_are(tmp_path, fault):
    black = P3_PROFILE
    for name in (b"rXYZ", b"gXYZ", b"bXYZ"):
        start = struct.unpack(">I", black[black.index(name) + 4:][:4])[0] + 8
        black = black[:start] + b"\0" * 12 + black[start + 12:]
    icc = {"empty": b"", "text": b"no profile at all" * 20, "cut": P3_PROFILE[:300], "black": black,
           "no curve": P3_PROFILE.replace(b"gTRC", b"gABC"), "long": P3_PROFILE + b"\0" * image_files.PROFILE_MAX,
           "grey": GREY_PROFILE, "Lab ": P3_PROFILE.replace(b"RGB ", b"Lab ")}.get(fault)
    if icc is None:    # another class of profile
        icc = P3_PROFILE.replace(b"mntr", fault.encode())
    picture, values = colours()
    picture.save(tmp_path / "a.tif", icc_profile=icc)
    assert np.abs(fields(tmp_path / "a.tif") - 255 * values).max() <= 1


def test_without_littlecms_profiles_are_ignored_and_a_line_says_so(tmp_path, monkeypatch, capsys, image_folder):
    def missing(*_):
        raise ImportError("no _imagingcms")

    check = features.check
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    monkeypatch.setattr(features, "check", lambda name: name != "littlecms2" and check(name))
    root = image_folder(2)
    Image.new("RGB", (64, 64), (200, 100, 50)).save(f"{root}/a.png", icc_profile=P3_PROFILE + b"other")
    assert centre(f"{root}/a.png") == [200, 100, 50]
    assert "colour profiles are ignored" in lines_of_run(root, tmp_path, capsys)


@needs_profiles
@pytest.mark.parametrize("mode, icc", [("RGB", P3_PROFILE), ("L", GREY_PROFILE), ("CMYK", ink_profile())])
def test_a_broken_profile_costs_no_picture(tmp_path, mode, icc):
    rng, peak = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = Image.new(mode, (48, 40), 100 if mode == "L" else (100, 20, 30, 40)[:len(mode)])
    for _ in range(300):
        picture.save(tmp_path / "a.tif", icc_profile=mutated(icc, rng))
        assert image_files.decode(tmp_path / "a.tif", (32, 3, 255)).reason is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY


# ------------------------------------------------------------------------------------- gamma and code points

def chunk(name, content):
    info = PngInfo()
    info.add(name, content)
    return info


@pytest.mark.parametrize("gamma", [1.0, 0.55556, 0.45455, 0.4600, 0.0])
def test_the_gamma_of_a_png_is_applied_where_it_is_not_that_of_srgb(tmp_path, gamma):
    picture, values = colours()
    picture.save(tmp_path / "a.png", pnginfo=chunk(b"gAMA", struct.pack(">I", round(gamma * 100000))))
    expected = srgb_levels(values ** (1 / gamma)) if gamma in (1.0, 0.55556) else 255 * values
    assert np.abs(fields(tmp_path / "a.png") - expected).max() <= 1
    info = chunk(b"gAMA", struct.pack(">I", 100000))
    info.add(b"sRGB", b"\0")
    picture.save(tmp_path / "srgb.png", pnginfo=info)    # the sRGB chunk decides
    assert np.array_equal(fields(tmp_path / "srgb.png"), 255 * values)
    picture.convert("L").save(tmp_path / "grey.png", pnginfo=chunk(b"gAMA", struct.pack(">I", 100000)))
    grey = np.asarray(picture.convert("L"))[16::32, 16::32].ravel()
    assert np.abs(fields(tmp_path / "grey.png", 1)[:, 0] - srgb_levels(grey / 255)).max() <= 1


def save_with_code_points(picture, file, primaries, transfer):
    """Saves an AVIF or PNG whose header names H.273 code points."""
    if file.suffix == ".png":
        picture.save(file, pnginfo=chunk(b"cICP", bytes([primaries, transfer, 0, 1])))
        return
    picture.save(file, quality=100, subsampling="4:4:4")
    content = file.read_bytes()
    start = content.index(b"colrnclx") + 8
    file.write_bytes(content[:start] + struct.pack(">HH", primaries, transfer) + content[start + 4:])


@pytest.mark.parametrize("suffix", ["png", pytest.param("avif", marks=needs_avif)])
def test_code_points_of_wide_and_hdr_colours_are_converted(tmp_path, suffix):
    picture, values = colours()
    file = tmp_path / f"a.{suffix}"
    tolerance = 2 if suffix == "png" else 6
    for primaries, transfer, light in ((12, 13, srgb_light(values)), (9, 14, srgb_light(values)), (1, 8, values)):
        save_with_code_points(picture, file, primaries, transfer)
        expected = expected_levels(light, {12: DISPLAY_P3, 9: BT_2020, 1: SRGB}[primaries])
        assert np.abs(fields(file) - expected).max() <= tolerance, (primaries, transfer)
    save_with_code_points(picture, file, 1, 1)
    assert np.abs(fields(file) - 255 * values).max() <= tolerance


@pytest.mark.parametrize("transfer, share, light", [
    # Signal levels of BT.2408 and BT.2100: HDR reference white (203 nits), and 100 and 26 nits (18% grey) of PQ
    (16, 0.58, 1.0), (16, 0.508, 100 / 203), (16, 0.38, 26 / 203), (16, 1.0, 1.0), (16, 0.0, 0.0),
    (18, 0.75, 1.0), (18, 0.38, 26 / 203), (18, 1.0, 1.0), (18, 0.0, 0.0)])
def test_hdr_levels_become_the_brightness_that_the_standards_name(tmp_path, transfer, share, light):
    save_with_code_points(Image.new("RGB", (64, 64), (round(255 * share),) * 3), tmp_path / "a.png", 9, transfer)
    assert np.abs(np.array(centre(tmp_path / "a.png")) - srgb_levels(light)).max() <= 5


# ------------------------------------------------------------------------------------- 16 bits and floats

def lines_of_run(root, tmp_path, capsys):
    """Everything that load_images_of_run prints."""
    flags = ["--image-size", "32", "--runs-dir", str(tmp_path / "runs"), "--num-workers", "0"]
    c, _ = command_line.parse_constants(flags)
    data.load_images_of_run(str(root), c)
    return capsys.readouterr().out


def ramp(top, dtype, channels=()):
    return np.linspace(0, top, 64 * 64).astype(dtype).reshape(64, 64, *channels)


@pytest.mark.parametrize("kind, top, warning", [
    ("tif", 4095, "1 16-bit or float image is .* is 4,095 of 65,535, .* 12-bit data, multiply all values by 16"),
    ("png", 2048, "is 2,048 of 65,535, .* 12-bit data, multiply all values by 16"),
    ("tif", 16383, "14-bit data, multiply all values by 4"), ("float", 0.06, "multiply all values by 16"),
    ("rgb", 4095, "12-bit data, multiply all values by 16"), ("tif", 60000, None), ("float", 1.0, None)])
def test_16_bit_sets_far_below_the_full_range_are_reported(tmp_path, capsys, image_folder, kind, top, warning):
    root = image_folder(2)
    if kind == "rgb":
        write_png_16(f"{root}/deep.png", np.stack([ramp(top, np.uint16)] * 3, -1))
    elif kind == "float":
        Image.fromarray(ramp(top, np.float32)).save(f"{root}/deep.tif")
    else:
        Image.fromarray(ramp(top, np.uint16)).save(f"{root}/deep.{kind}")
    for _ in range(2):    # the second time from the cache
        printed = lines_of_run(root, tmp_path, capsys)
        found = re.search("warning: .*" + (warning or "almost black"), printed)
        assert (found is not None) == (warning is not None)
    Image.fromarray(ramp(65535, np.uint16)).save(f"{root}/bright.tif")
    assert "almost black" not in lines_of_run(root, tmp_path, capsys)    # the set uses the range


def write_png_16(file, values):
    """Writes (H, W, 3) uint16 as a PNG, which Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    with open(file, "wb") as out:
        out.write(content)


@pytest.mark.parametrize("top, dtype, advice", [
    (255, np.float32, r"outside 0 to 1 \(0 to 255\): divide them by 255"),
    (4000, np.float32, "divide them by 65535"), (1e6, np.float32, "scale them to 0 to 1"),
    (1e6, np.int32, "outside 0 to 65535 .*: scale them to 0 to 65535")])
def test_values_outside_the_range_are_named_with_the_remedy(tmp_path, top, dtype, advice):
    Image.fromarray(ramp(top, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=advice):
        data.read_photo(tmp_path / "a.tif", 32, 3)


# ------------------------------------------------------------------------------------- formats

RED, BLUE = (220, 40, 30), (20, 60, 210)


def halves():
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(BLUE, (32, 0, 64, 64))
    return picture


def assert_halves(root, tmp_path, names, tolerance=12):
    images = data.load_images(root, 32, 3, tmp_path / "cache", workers=0, progress=False)
    assert images.paths == names and images.skipped == []
    sides = images.images[:, 16, [8, 24]].astype(int)
    assert np.abs(sides - [RED, BLUE]).max() <= tolerance


def test_further_endings_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    for name, kind in (("a.JFIF", "JPEG"), ("b.jpe", "JPEG"), ("c.ppm", "PPM"), ("d.pnm", "PPM")):
        halves().save(tmp_path / "in" / name, kind, quality=95)
    assert_halves(tmp_path / "in", tmp_path, ["a.JFIF", "b.jpe", "c.ppm", "d.pnm"])
    Image.new("L", (64, 64), 77).save(tmp_path / "in" / "grey.pgm")
    assert centre(tmp_path / "in" / "grey.pgm") == [77, 77, 77]
    assert "grey.pgm" in data.find_files(tmp_path / "in")[0]


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
@needs_profiles
def test_jpeg_2000_is_read_with_its_profile(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.j2k", "b.jp2", "c.jpx"):
        halves().save(tmp_path / "in" / name, "JPEG2000", no_jp2=name == "a.j2k")
    assert_halves(tmp_path / "in", tmp_path, ["a.j2k", "b.jp2", "c.jpx"])
    picture, values = colours()
    picture.save(tmp_path / "a.jp2")
    content = (tmp_path / "a.jp2").read_bytes()
    at, header = content.index(b"colr") - 4, content.index(b"jp2h") - 4
    length, = struct.unpack(">I", content[at:at + 4])
    box = struct.pack(">I4sBBB", 11 + len(P3_PROFILE), b"colr", 2, 0, 0) + P3_PROFILE
    whole, = struct.unpack(">I", content[header:header + 4])
    content = (content[:header] + struct.pack(">I", whole + len(box) - length) + content[header + 4:at] + box
               + content[at + length:])
    (tmp_path / "a.jp2").write_bytes(content)
    expected = expected_levels(srgb_light(values), DISPLAY_P3)
    assert np.abs(fields(tmp_path / "a.jp2") - expected).max() <= 2


@pytest.mark.parametrize("kind, options", [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("PPM", {})])
def test_a_broken_file_of_the_further_formats_gives_a_picture_or_an_input_error(tmp_path, kind, options):
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    picture, _ = colours()
    picture.save(tmp_path / "whole", kind, **options)
    content = (tmp_path / "whole").read_bytes()
    for pixels in fuzz(tmp_path / "a.png", content, lambda file: data.read_photo(file, 32, 3)):
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)    # an import raises ImportError
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


def test_heic_without_its_package_is_one_line_with_the_count(tmp_path, image_folder, capsys, without_heif):
    root = image_folder(3)
    for name in ("a.heic", "b.HEIF", "c.jpg"):    # the third was renamed
        with open(f"{root}/{name}", "wb") as file:
            file.write(HEIC_START)
    with open(f"{root}/d.jxl", "wb") as file:
        file.write(b"\xff\x0a" + b"\0" * 40)
    printed = lines_of_run(root, tmp_path, capsys).splitlines()
    assert [line for line in printed if "cannot be used" in line] == [
        "3 files cannot be used: HEIC files need the package pillow-heif: pip install pillow-heif",
        "1 file cannot be used: JPEG XL is not supported: convert the files to PNG or JPEG"]


@pytest.mark.parametrize("name, start, reason", [("a.heic", HEIC_START, "pip install pillow-heif"),
                                                 ("a.jxl", b"\xff\x0a" + b"\0" * 40, "JPEG XL is not supported")])
def test_a_folder_of_one_unsupported_format_says_what_to_do(tmp_path, without_heif, name, start, reason):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(start)
    with pytest.raises(InputError, match=f"none of its 1 images can be used; the first is {name}: .*{reason}"):
        data.load_images(tmp_path / "in", 32, 3, tmp_path / "cache", workers=0, progress=False)


def test_heic_is_read_after_its_package_was_installed(tmp_path, image_folder, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    root = image_folder(2)
    halves().save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    heif.from_pillow(turned).save(f"{root}/a.heic", quality=95, exif=exif.tobytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.delitem(Image.OPEN, "HEIF", raising=False)
        images = data.load_images(root, 32, 3, tmp_path / "cache", workers=0, progress=False)
        assert len(images.paths) == 2 and len(images.skipped) == 1
    images = data.load_images(root, 32, 3, tmp_path / "cache", workers=0, progress=False)
    assert images.paths == ["0000.png", "0001.png", "a.heic"] and images.skipped == []
    assert np.abs(images.images[2][16, [8, 24]].astype(int) - [RED, BLUE]).max() <= 12
    picture, values = colours()
    picture.info["icc_profile"] = P3_PROFILE
    heif.from_pillow(picture).save(tmp_path / "p3.heic", quality=100, chroma=444)
    expected = expected_levels(srgb_light(values), DISPLAY_P3)
    assert np.abs(fields(tmp_path / "p3.heic") - expected).max() <= 6
    content = (tmp_path / "p3.heic").read_bytes()
    results = fuzz(tmp_path / "b.heic", content, lambda file: data.read_photo(file, 32, 3))
    assert all(pixels.shape == (32, 32, 3) for pixels in results)


def test_importing_data_does_not_import_the_heic_package():
    repo = os.path.dirname(data.__file__)
    code = "import sys, data; sys.exit('pillow_heif' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz", "PHOTOS.ZIP"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match=f"{name}: is an archive: unpack it"):
        data.load_images(tmp_path / name, 32, 3, tmp_path / "cache")
