"""image_files.py: one file of any kind becomes upright sRGB pixels of the right size, or a reason."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from test_fuzz import fuzz

import data
import image_files
from errors import InputError

needs_profiles = pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow ignores profiles")

# x and y of red, green and blue; all with the white D65
SRGB = (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)
DISPLAY_P3 = (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)
ADOBE_RGB = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)
BT_2020 = (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)
WHITE = (0.3127, 0.3290)
TO_D50 = np.array([[1.0479298, 0.0229468, -0.0501922], [0.0296278, 0.9904344, -0.0170738],
                   [-0.0092430, 0.0150551, 0.7518743]])    # Bradford
LUMA = np.array([[0.299], [0.587], [0.114]])


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


def nine(values):
    """Nine values, (9,) or (9, 3), as fields of 32 x 32 pixels."""
    return Image.fromarray(values.reshape(3, 3, *values.shape[1:]).repeat(32, 0).repeat(32, 1))


def colours():
    """Nine flat fields as a picture, and their colours, (9, 3) in [0, 1]."""
    values = np.random.default_rng(0).integers(20, 236, (9, 3), dtype=np.uint8)
    values[:3] = np.eye(3) * 235 + 10    # nearly pure colours, which clip or change most
    return nine(values), values / 255


def fields(file, channels=3, background=255):
    """Decodes a picture of nine fields; returns their middles, (9, channels)."""
    return data.read_photo(file, 96, channels, background)[16::32, 16::32].reshape(9, channels).astype(float)


def assert_fields(file, expected, tolerance, channels=3):
    assert np.abs(fields(file, channels) - expected).max() <= tolerance, file.name


def centre(file, channels=3, background=255):
    return data.read_photo(file, 32, channels, background)[16, 16].astype(float)


def save(picture, file, **options):
    """Saves a picture, almost without loss where the options ask for it; skips the test if no codec is installed."""
    feature = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000", ".jpx": "jpg_2000", ".j2k": "jpg_2000"}
    if file.suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif file.suffix in feature and not features.check(feature[file.suffix]):
        pytest.skip(f"this Pillow cannot write {file.suffix}")
    picture.save(file, **options)


BEST = {"quality": 100, "lossless": True, "subsampling": "4:4:4", "chroma": 444}    # each format ignores some


# ------------------------------------------------------------------------------------- formats, modes, geometry

@pytest.mark.parametrize("name", [
    "a.jpg", "a.JPEG", "a.jpe", "a.JFIF", "a.png", "a.webp", "a.bmp", "a.TIFF", "a.avif", "a.gif", "a.ppm", "a.pnm",
    "a.j2k", "a.jp2", "a.jpx", "a.heic"])
def test_each_format_is_found_and_decodes_to_its_colours_and_their_luma(tmp_path, name):
    picture, values = colours()
    save(picture, tmp_path / name, quality=95)
    assert list(data.find_files(tmp_path)[0]) == [name]
    assert_fields(tmp_path / name, 255 * values, 12)
    assert_fields(tmp_path / name, 255 * values @ LUMA, 4, channels=1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "MPO"])
def test_the_first_frame_and_the_content_count_and_not_the_extension(tmp_path, kind):
    picture, values = colours()
    picture.save(tmp_path / "a.png", kind, save_all=True, append_images=[Image.new("RGB", picture.size)], quality=95)
    assert_fields(tmp_path / "a.png", 255 * values, 12)


@needs_profiles
@pytest.mark.parametrize("with_profile", [False, True])
def test_grey_values_of_8_16_and_32_bits_keep_their_levels_or_follow_their_profile(tmp_path, with_profile):
    levels = np.array([0, 5, 30, 70, 110, 150, 190, 230, 255], np.uint8)
    expected = (GREYS if with_profile else np.arange(256))[levels][:, None]
    for name, values in (("grey.png", levels), ("grey.jpg", levels), ("deep.png", levels.astype(np.uint16) * 257),
                         ("deep.tif", levels.astype(np.uint16) * 257), ("float.tif", levels / np.float32(255))):
        nine(values).save(tmp_path / name, icc_profile=GREY_PROFILE if with_profile else None)
        for channels in (1, 3):
            assert_fields(tmp_path / name, expected, 3 if name == "grey.jpg" else 2, channels)


def test_transparent_colours_and_palette_entries_show_the_background(tmp_path):
    picture, values = colours()
    palette, rgba = picture.quantize(9), picture.convert("RGBA")
    rgba.paste((0, 0, 0, 0), (32, 32, 64, 64))    # the middle field
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((48, 48)))
    palette.save(tmp_path / "p.gif", transparency=palette.getpixel((48, 48)))
    picture.save(tmp_path / "rgb.png", transparency=picture.getpixel((48, 48)))
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    expected = 255 * values
    expected[4] = 255
    for name in ("p.png", "p.gif", "rgb.png", "rgba.webp"):
        assert_fields(tmp_path / name, expected, 1)


@needs_profiles
def test_alpha_is_kept_and_the_background_is_not_converted(tmp_path):
    rgba, grey = Image.new("RGBA", (64, 64), (200, 100, 50, 128)), Image.new("LA", (64, 64), (100, 128))
    rgba.save(tmp_path / "rgba.png", icc_profile=P3_PROFILE)
    rgba.convert("RGB").quantize(2).save(tmp_path / "palette.png", icc_profile=P3_PROFILE)
    grey.save(tmp_path / "la.png", icc_profile=GREY_PROFILE)
    colour = expected_levels(srgb_light(np.array([200, 100, 50]) / 255), DISPLAY_P3)
    for name, channels, expected in (("rgba.png", 3, colour), ("la.png", 3, GREYS[100]), ("la.png", 1, GREYS[100])):
        seen = centre(tmp_path / name, channels, background=90)
        assert np.abs(seen - (127 * 90 + 128 * expected) / 255).max() <= 2
    assert np.abs(centre(tmp_path / "palette.png") - colour).max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "heic"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    for orientation in range(1, 9):
        picture, _ = colours()
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(picture, tmp_path / f"a.{suffix}", exif=exif.tobytes(), **BEST)
        picture.getexif()[0x0112] = orientation
        upright = np.asarray(ImageOps.exif_transpose(picture))[16::32, 16::32].reshape(9, 3)
        assert_fields(tmp_path / f"a.{suffix}", upright.astype(float), 8)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    picture, values = colours()
    picture.save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")    # in a JPEG, Pillow itself ignores this
    assert_fields(tmp_path / "a.png", 255 * values, 0)


def test_the_short_side_is_resized_and_the_centre_cut_out(tmp_path):
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = 200
    for picture in (wide, wide.transpose(1, 0, 2)):
        Image.fromarray(picture).save(tmp_path / "a.png")
        assert np.abs(data.read_photo(tmp_path / "a.png", 16, 3)[2:-2, 2:-2].astype(int) - 200).max() <= 1


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_cuts_off_adds_borders_or_changes_the_proportions(tmp_path, size, channels):
    """An image with a black, a grey and a white third along its long side: where these thirds are."""
    tall = size[1] > size[0]
    line = np.repeat(np.array([0, 128, 255], np.uint8), [67, 66, 67])
    pixels = np.broadcast_to(line[:, None] if tall else line[None], size[::-1])
    Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(tmp_path / "a.png")

    def middle(fit):                  # the values along the two middle lines: of the long side, and of the short one
        found = data.read_photo(tmp_path / "a.png", 48, channels, 200, fit)[..., 0].astype(int)
        found = found.T if tall else found
        return found[24], found[:, 24]

    along, across = middle("stretch")
    assert np.abs(along[[2, 24, 45]] - [0, 128, 255]).max() <= 1 and np.ptp(across) <= 1
    along, across = middle("pad")
    assert np.abs(along[[2, 24, 45]] - [0, 128, 255]).max() <= 1
    assert np.abs(across[[0, 11, 13, 34, 36, 47]] - [200, 200, 128, 128, 200, 200]).max() <= 1
    along, across = middle("crop")
    assert np.abs(along[[1, 24, 46]] - [0, 128, 255]).max() <= 1 and np.abs(across - 128).max() <= 1
    assert np.abs(along - middle("stretch")[0]).max() > 50            # a third of the crop is two thirds of its sides


def test_fine_stripes_become_grey_without_moire(tmp_path):
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(data.read_photo(tmp_path / "stripes.png", 48, 1).astype(int) - 127.5).max() < 6


@needs_profiles
@pytest.mark.parametrize("with_profile", [False, True])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path, monkeypatch, with_profile):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    noise = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    noise.save(tmp_path / "a.jpg", quality=95, icc_profile=P3_PROFILE if with_profile else None)
    sizes, fit = [], ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda picture, *rest: sizes.append(picture.size) or fit(picture, *rest))
    pixels = data.read_photo(tmp_path / "a.jpg", 64, 3)
    assert sizes == [(300, 225)]
    light = srgb_light(np.asarray(fit(noise, (64, 64), Image.Resampling.BICUBIC)) / 255)
    assert np.abs(pixels - expected_levels(light, DISPLAY_P3 if with_profile else SRGB)).mean() < 1.5


# ------------------------------------------------------------------------------------- files that cannot be used

def png(width, height, depth, rows):
    """The bytes of an RGB PNG. Pillow writes neither a size that is false nor colours of 16 bits."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


@pytest.mark.parametrize("name, reason", [
    ("gone.jpg", "no such file"), ("folder.png", "not a regular file"), ("pipe.png", "not a regular file"),
    ("empty.jpg", "empty file"), ("text.jpg", "not an image in a known format"), ("huge.png", "900000000 pixels"),
    ("large.png", "9000 x 9000 pixels, above the limit"), ("cut.jpg", "truncated"),
    *((f"cut.{suffix}", "") for suffix in ("png", "webp", "gif", "tif", "bmp"))])
def test_a_file_that_cannot_be_used_has_a_reason(tmp_path, monkeypatch, name, reason):
    file = tmp_path / name
    contents = {"empty.jpg": b"", "text.jpg": b"this is no picture", "huge.png": png(30000, 30000, 8, b""),
                "large.png": png(9000, 9000, 8, b"")}
    if name in contents:
        file.write_bytes(contents[name])
        monkeypatch.setattr(Image.Image, "load", lambda picture: pytest.fail("it was decoded"))
    elif name == "folder.png":
        file.mkdir()
    elif name == "pipe.png":
        os.mkfifo(file)
    elif name != "gone.jpg":
        Image.effect_noise((200, 200), 50).convert("RGB").save(file)
        os.truncate(file, file.stat().st_size * 2 // 3)
    seen = image_files.decode(file, image_files.Settings(32, 3)).reason
    assert reason in seen and str(tmp_path) not in seen and "\n" not in seen and 0 < len(seen) <= 120


@pytest.mark.parametrize("top, dtype, advice", [
    (255, np.float32, r"outside 0 to 1 \(0 to 255\): divide them by 255"),
    (4000, np.float32, "divide them by 65535"), (1e6, np.float32, "scale them to 0 to 1"),
    (-1, np.float32, "scale them to 0 to 1"), (np.nan, np.float32, "outside 0 to 1"),
    (1e6, np.int32, "outside 0 to 65535 .*: scale them to 0 to 65535")])
def test_values_outside_the_range_are_named_with_the_remedy(tmp_path, top, dtype, advice):
    nine(np.linspace(0, top, 9).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif: .*{advice}"):
        data.read_photo(tmp_path / "a.tif", 32, 3)


def test_peak_is_the_largest_share_of_the_range_of_16_bit_and_float_images(tmp_path):
    nine(np.arange(9, dtype=np.uint16) * 500).save(tmp_path / "deep.tif")
    nine(np.arange(9, dtype=np.float32) / 32).save(tmp_path / "float.tif")
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, b"\0" + struct.pack(">3H", 0, 10 * 257, 51 * 257)))
    nine(np.arange(9, dtype=np.uint8)).save(tmp_path / "plain.png")
    peaks = {file.name: image_files.decode(file, image_files.Settings(16, 3)).peak for file in tmp_path.iterdir()}
    assert peaks == {"deep.tif": 4000 / 65535, "float.tif": 0.25, "deep.png": 0.2, "plain.png": None}


# ------------------------------------------------------------------------------------- ICC profiles

D50 = np.rint(np.array([0.9642, 1, 0.8249]) * 65536).astype(int).tolist()


def profile(tags, space=b"RGB ", device=b"mntr", connection=b"XYZ "):
    """An ICC profile, version 4, of some tags."""
    tags = {b"wtpt": struct.pack(">4s4x3I", b"XYZ ", *D50), b"cprt": b"text\0\0\0\0none\0", **tags}
    offset, table, content = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(content), len(value))
        content += value + b"\0" * (-len(value) % 4)
    head = struct.pack(">I4xI4s4s4s", offset + len(content), 0x04200000, device, space, connection)
    head += struct.pack(">12x4s28x", b"acsp")
    return head + struct.pack(">3I", *D50) + b"\0" * 48 + table + content


def curve(*parameters):
    """A power function, or with five parameters the one of sRGB."""
    values = [round(65536 * value) for value in parameters]
    return struct.pack(f">4s4xHxx{len(values)}i", b"para", 0 if len(values) == 1 else 3, *values)


def rgb_profile(primaries, *parameters):
    tags = {}
    for name, column in zip("rgb", (TO_D50 @ to_xyz(primaries)).T):
        tags[f"{name}XYZ".encode()] = struct.pack(">4s4x3i", b"XYZ ", *np.rint(65536 * column).astype(int).tolist())
        tags[f"{name}TRC".encode()] = curve(*parameters)
    return profile(tags)


SRGB_CURVE = 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045
P3_PROFILE = rgb_profile(DISPLAY_P3, *SRGB_CURVE)
GREY_PROFILE = profile({b"kTRC": curve(1.8)}, b"GRAY")
GREYS = srgb_levels((np.arange(256) / 255) ** 1.8)    # what GREY_PROFILE makes of the 256 levels


def ink_profile():
    """A CMYK profile in which cyan and black ink are red: a table of the 16 corners, in Lab. Its black is a grey of
    L* = 20, which black point compensation makes 0."""
    white, black, red = (255, 128, 128), (51, 128, 128), (138, 209, 198)
    table = bytes(value for corner in range(16) for value in (
        white if corner == 0 else red if corner in (0b1000, 0b0001) else black))    # cyan varies slowest
    matrix = struct.pack(">9i", *[65536, 0, 0, 0, 65536, 0, 0, 0, 65536])
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return profile({b"A2B0": lut, b"A2B1": lut}, b"CMYK", b"scnr", b"Lab ")


@needs_profiles
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif", "heic"])
def test_wide_gamut_colours_become_what_the_formula_gives(tmp_path, suffix):
    picture, values = colours()
    save(picture, tmp_path / f"a.{suffix}", icc_profile=P3_PROFILE, **BEST)
    expected = expected_levels(srgb_light(values), DISPLAY_P3)
    assert_fields(tmp_path / f"a.{suffix}", expected, 6)
    assert_fields(tmp_path / f"a.{suffix}", expected @ LUMA, 3, channels=1)
    save(picture, tmp_path / f"a.{suffix}", icc_profile=rgb_profile(ADOBE_RGB, 563 / 256), **BEST)
    assert_fields(tmp_path / f"a.{suffix}", expected_levels(values ** (563 / 256), ADOBE_RGB), 6)


@needs_profiles
def test_jpeg_2000_is_converted_by_its_profile(tmp_path):
    picture, values = colours()
    save(picture, tmp_path / "a.jp2")
    content = (tmp_path / "a.jp2").read_bytes()
    start = content.index(b"jp2h") - 4    # a box of 45 bytes, to which the profile is added
    box = struct.pack(">I4sBBB", 11 + len(P3_PROFILE), b"colr", 2, 0, 0) + P3_PROFILE
    head = struct.pack(">I", 45 + len(box)) + content[start + 4:start + 45]
    (tmp_path / "a.jp2").write_bytes(content[:start] + head + box + content[start + 45:])
    assert_fields(tmp_path / "a.jp2", expected_levels(srgb_light(values), DISPLAY_P3), 2)


@needs_profiles
def test_an_srgb_profile_leaves_the_pixels_as_they_are(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (pillows, rgb_profile(SRGB, *SRGB_CURVE)):
        picture.save(tmp_path / "a.png", icc_profile=icc)
        assert np.array_equal(data.read_photo(tmp_path / "a.png", 64, 3), np.asarray(picture))


@needs_profiles
def test_a_grey_jpeg_with_the_profile_of_a_colour_image_is_converted(tmp_path):
    levels = np.arange(20, 200, 20, dtype=np.uint8)
    nine(levels).save(tmp_path / "a.jpg", quality=100, icc_profile=rgb_profile(ADOBE_RGB, 1.8))
    assert_fields(tmp_path / "a.jpg", GREYS[levels][:, None], 3, channels=1)


@needs_profiles
@pytest.mark.parametrize("suffix", ["jpg", "tif"])    # Pillow writes the inverted values of Adobe's JPEG files
def test_cmyk_is_converted_by_its_profile_and_stays_as_it_is_without_one(tmp_path, suffix):
    cyan, black, paper, all_inks = (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 255, 255)
    for inks, icc, expected in (
            (cyan, ink_profile(), (255, 0, 0)), (black, ink_profile(), (255, 0, 0)),
            (paper, ink_profile(), (255, 255, 255)), (all_inks, ink_profile(), (0, 0, 0)),
            (cyan, None, (0, 255, 255)), (cyan, P3_PROFILE, (0, 255, 255))):
        Image.new("CMYK", (64, 64), inks).save(tmp_path / f"a.{suffix}", quality=95, icc_profile=icc)
        assert np.abs(centre(tmp_path / f"a.{suffix}") - expected).max() <= 5


@needs_profiles
@pytest.mark.parametrize("icc", [
    pytest.param(P3_PROFILE[:300], id="cut"),
    pytest.param(P3_PROFILE.replace(b"gTRC", b"gABC"), id="no curve"),
    pytest.param(rgb_profile(DISPLAY_P3, 2.4, 0, 0, 0, 0.04045), id="all colours black"),
    pytest.param(P3_PROFILE + b"\0" * image_files.PROFILE_MAX, id="too long"),
    pytest.param(GREY_PROFILE, id="for grey images"),
    pytest.param(P3_PROFILE.replace(b"RGB ", b"Lab "), id="for Lab"),
    pytest.param(P3_PROFILE.replace(b"mntr", b"link"), id="between two devices")])
def test_a_profile_that_cannot_be_used_leaves_the_colours_as_they_are(tmp_path, icc):
    picture, values = colours()
    picture.save(tmp_path / "a.tif", icc_profile=icc)
    assert_fields(tmp_path / "a.tif", 255 * values, 1)


def test_without_littlecms_profiles_are_ignored(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("no _imagingcms")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    picture, values = colours()
    picture.save(tmp_path / "a.png", icc_profile=P3_PROFILE + b"never seen before")    # so not from the lru_cache
    assert_fields(tmp_path / "a.png", 255 * values, 0)


@needs_profiles
@pytest.mark.parametrize("mode, icc", [("RGB", P3_PROFILE), ("L", GREY_PROFILE), ("CMYK", ink_profile())])
def test_a_broken_profile_costs_no_picture(tmp_path, mode, icc):
    def read(file):
        picture.save(tmp_path / "a.tif", icc_profile=file.read_bytes())
        return data.read_photo(tmp_path / "a.tif", 32, 3)

    picture = Image.new(mode, (48, 40))
    fuzz(tmp_path / "profile.icc", icc, read, errors=0)


# ------------------------------------------------------------------------------------- gamma and code points

def chunks(**contents):
    info = PngInfo()
    for name, content in contents.items():
        info.add(name.encode(), content)
    return info


LINEAR = struct.pack(">I", 100000)    # the content of gAMA for a gamma of 1


def test_the_gamma_of_a_png_is_applied_where_it_is_not_that_of_srgb(tmp_path):
    picture, values = colours()
    for gamma, expected in ((1.0, srgb_levels(values)), (0.55556, srgb_levels(values ** 1.8)),
                            (0.46, 255 * values), (0.0, 255 * values)):
        picture.save(tmp_path / "a.png", pnginfo=chunks(gAMA=struct.pack(">I", round(gamma * 100000))))
        assert_fields(tmp_path / "a.png", expected, 1)
    picture.save(tmp_path / "srgb.png", pnginfo=chunks(gAMA=LINEAR, sRGB=b"\0"))    # the sRGB chunk decides
    assert_fields(tmp_path / "srgb.png", 255 * values, 0)
    grey = np.arange(20, 200, 20, dtype=np.uint8)
    nine(grey).save(tmp_path / "grey.png", pnginfo=chunks(gAMA=LINEAR))
    assert_fields(tmp_path / "grey.png", srgb_levels(grey / 255)[:, None], 1, channels=1)


def save_with_code_points(picture, file, primaries, transfer):
    """Saves an AVIF or PNG whose header names H.273 code points."""
    if file.suffix == ".png":
        picture.save(file, pnginfo=chunks(cICP=bytes([primaries, transfer, 0, 1])))
        return
    save(picture, file, **BEST)
    content = file.read_bytes()
    start = content.index(b"colrnclx") + 8
    file.write_bytes(content[:start] + struct.pack(">HH", primaries, transfer) + content[start + 4:])


@pytest.mark.parametrize("suffix, tolerance", [("png", 2), ("avif", 6)])
def test_code_points_of_wide_and_linear_colours_are_converted(tmp_path, suffix, tolerance):
    picture, values = colours()
    for primaries, transfer, expected in (
            (12, 13, expected_levels(srgb_light(values), DISPLAY_P3)),
            (9, 14, expected_levels(srgb_light(values), BT_2020)),
            (1, 8, srgb_levels(values)), (1, 1, 255 * values)):
        save_with_code_points(picture, tmp_path / f"a.{suffix}", primaries, transfer)
        assert_fields(tmp_path / f"a.{suffix}", expected, tolerance)


@pytest.mark.parametrize("transfer, share, light", [
    # Signal levels of BT.2408 and BT.2100: HDR reference white (203 nits), and 100 and 26 nits (18% grey) of PQ
    (16, 0.58, 1.0), (16, 0.508, 100 / 203), (16, 0.38, 26 / 203), (16, 1.0, 1.0), (16, 0.0, 0.0),
    (18, 0.75, 1.0), (18, 0.38, 26 / 203), (18, 1.0, 1.0), (18, 0.0, 0.0)])
def test_hdr_levels_become_the_brightness_that_the_standards_name(tmp_path, transfer, share, light):
    save_with_code_points(Image.new("RGB", (64, 64), (round(255 * share),) * 3), tmp_path / "a.png", 9, transfer)
    assert np.abs(centre(tmp_path / "a.png") - srgb_levels(light)).max() <= 5
