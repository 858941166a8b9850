"""clips.py and data.py: folders of frames, animations and videos become clips: found, decoded, cached, split."""

import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from test_data import REPO, cache_folder
from test_fuzz import fuzz
from test_image_files import P3_PROFILE

import clips
import command_line
import data
import image_cache
from errors import InputError
from image_files import Settings

SIZE = 16
RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (100, 100, 100)
KINDS = ["gif", "webp", "mp4", "webm", "mov"]


def load(root, tmp_path, cache="cache", folders="clips", **options):
    options = {"workers": 0, "progress": False, **options}
    return data.load_images(root, SIZE, 3, tmp_path / cache, folders=folders, **options)


def write_frames(folder, levels, names=None, size=(24, 16), suffix="png"):
    """Writes frames of one grey level each; returns the folder."""
    os.makedirs(folder, exist_ok=True)
    for name, level in zip(names or range(len(levels)), levels):
        Image.new("RGB", size, (level,) * 3).save(os.path.join(folder, f"{name}.{suffix}"))
    return str(folder)


def write_video(file, colours, size=(64, 48), rotate=None, **codec):
    """Writes a video or animation with one colour per frame. rotate: the 2 x 2 matrix in the header of an mp4."""
    frames = [np.full((size[1], size[0], 3), colour, np.uint8) for colour in colours]
    os.makedirs(os.path.dirname(file), exist_ok=True)
    if str(file).endswith((".gif", ".webp")):
        first, *others = map(Image.fromarray, frames)
        first.save(file, save_all=True, append_images=others, duration=100, lossless=True)
        return
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        name = "libvpx-vp9" if str(file).endswith(".webm") else "libx264"
        stream = container.add_stream(name, rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for field, value in codec.items():
            setattr(stream.codec_context, field, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if rotate:
        content = Path(file).read_bytes()
        unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
        start = content.index(unit, content.index(b"tkhd"))
        a, b, c, d = (value << 16 for value in rotate)
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        Path(file).write_bytes(content[:start] + matrix + content[start + 36:])


def levels(images, name):
    """The red value in the middle of each frame of a clip."""
    number = images.clip_names.index(name)
    first, end = images.clip_offsets[number:number + 2]
    return images.images[first:end, SIZE // 2, SIZE // 2, 0].tolist()


def assert_as_fresh(images, root, tmp_path, **options):
    """Compares an ImageSet with one from an empty cache."""
    fresh = load(root, tmp_path, cache="fresh", **options)
    assert images.paths == fresh.paths and images.skipped == fresh.skipped and images.clip_names == fresh.clip_names
    assert np.array_equal(images.images, fresh.images) and np.array_equal(images.clip_offsets, fresh.clip_offsets)
    for name in ("train", "held_out", "train_clips", "held_out_clips"):
        assert np.array_equal(getattr(images, name), getattr(fresh, name))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that this process decodes."""
    names = []

    def recording(decode):
        return lambda file, *arguments: names.append(os.path.basename(file)) or decode(file, *arguments)

    monkeypatch.setattr(image_cache, "decode", recording(image_cache.decode))
    monkeypatch.setattr(clips, "decode_video", recording(clips.decode_video))
    return names


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)    # an import raises ImportError


# ------------------------------------------------------------------------------------- what a clip is

def test_folders_are_clips_and_names_are_in_natural_order(tmp_path):
    root = write_frames(tmp_path / "data", (1, 2, 10), names=("1", "2", "10"))
    write_frames(f"{root}/clip10/deep", (30, 39, 31, 40), names=("a9b1", "a10b1", "a9b02", "a10b02"))
    write_frames(f"{root}/clip2", (20, 21, 22), names=("f8", "f09", "f010"))
    write_frames(f"{root}/clip", (50, 51, 52), names=("a", "0", "_"))
    images = load(root, tmp_path)
    assert images.clip_names == [".", "clip", "clip2", "clip10/deep"]
    assert images.clip_offsets.tolist() == [0, 3, 6, 9, 13] and images.clip_offsets.dtype == np.int64
    assert images.paths == ["1.png", "2.png", "10.png", "clip/0.png", "clip/_.png", "clip/a.png",
                            "clip2/f8.png", "clip2/f09.png", "clip2/f010.png",
                            *(f"clip10/deep/a{name}.png" for name in ("9b1", "9b02", "10b1", "10b02"))]
    assert levels(images, ".") == [1, 2, 10] and levels(images, "clip2") == [20, 21, 22]
    assert levels(images, "clip10/deep") == [30, 31, 39, 40]
    assert images.train.tolist() == list(range(13)) and images.train_clips.tolist() == [0, 1, 2, 3]
    assert images.held_out.size == images.held_out_clips.size == 0 and images.skipped == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_a_clip_with_the_colours_of_its_frames(tmp_path, kind):
    root = write_frames(tmp_path / "data", (1, 2, 3))
    write_video(f"{root}/video.{kind.upper()}" if kind == "mov" else f"{root}/video.{kind}", (RED, GREEN, BLUE, GREY))
    images = load(root, tmp_path)
    name = images.clip_names[1]
    assert images.clip_names[0] == "." and images.clip_offsets.tolist() == [0, 3, 7]
    assert images.paths[3:] == [f"{name}#{number:05d}" for number in range(4)]
    assert np.abs(images.images[3:, 8, 8].astype(int) - (RED, GREEN, BLUE, GREY)).max() <= (0 if kind == "webp" else 4)


def test_gif_and_webp_files_with_one_frame_are_frames_of_their_folder(tmp_path):
    root = write_frames(tmp_path / "data", (10, 20), names="02", suffix="gif")
    write_frames(root, (30, 40), names="13", suffix="webp")
    write_video(f"{root}/4.gif", (RED, BLUE))    # two frames: too short, and no frame of the folder
    images = load(root, tmp_path)
    assert images.clip_names == ["."] and len(levels(images, ".")) == 4 and images.paths[1] == "1.webp"
    assert images.skipped == [("4.gif", "2 frames, and a clip needs 3")]


def test_every_stride_th_frame_is_taken(tmp_path):
    root = write_frames(tmp_path / "data", range(0, 70, 10))
    write_frames(f"{root}/short", range(6))    # two of six: too short
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 2, (8, 16, 16, 1), dtype=np.uint8) * np.array(RED, np.uint8)    # each builds on the last
    for kind in ("gif", "webp"):
        first, *others = map(Image.fromarray, frames)
        first.save(f"{root}/v.{kind}", save_all=True, append_images=others, lossless=True)
    write_video(f"{root}/w.mp4", (RED, RED, RED, GREEN, RED, RED, BLUE))
    images = load(root, tmp_path, clip_stride=3)
    assert images.clip_names == [".", "v.gif", "v.webp", "w.mp4"] and images.clip_offsets.tolist() == [0, 3, 6, 9, 12]
    assert images.paths[:6] == ["0.png", "3.png", "6.png", "v.gif#00000", "v.gif#00003", "v.gif#00006"]
    assert levels(images, ".") == [0, 30, 60]
    assert np.array_equal(images.images[3:6], frames[::3]) and np.array_equal(images.images[6:9], frames[::3])
    assert np.abs(images.images[9:, 8, 8].astype(int) - (RED, GREEN, BLUE)).max() <= 4
    assert images.skipped == [("short", "2 frames, and a clip needs 3")]


def test_frames_are_cropped_resized_and_laid_over_the_background_as_images_are(tmp_path, image_folder):
    root = image_folder(3, size=40)
    picture = Image.open(f"{root}/0001.png").resize((50, 40)).convert("RGBA")
    picture.paste((0, 0, 0, 0), (20, 10, 30, 20))
    others = [picture.rotate(90), picture.rotate(180)]
    picture.save(f"{root}/a.webp", save_all=True, append_images=others, lossless=True, icc_profile=P3_PROFILE)
    picture.save(tmp_path / "first.png", icc_profile=P3_PROFILE)
    images = load(root, tmp_path, background=77)
    assert images.clip_names == [".", "a.webp"]
    grey = data.load_images(root, SIZE, 1, tmp_path / "cache", 77, workers=0, folders="clips")
    for row, file in enumerate((f"{root}/0000.png", f"{root}/0001.png", f"{root}/0002.png", tmp_path / "first.png")):
        assert np.array_equal(images.images[row], data.read_photo(file, SIZE, 3, 77))
        assert np.array_equal(grey.images[row], data.read_photo(file, SIZE, 1, 77))


# The matrix (a, b, c, d) maps the point (x, y) of the stored picture to (a x + c y, b x + d y) on the screen, y down.
@pytest.mark.parametrize("matrix, corner", [
    ((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))])
def test_the_rotation_of_a_video_is_applied(tmp_path, matrix, corner):
    stored = np.full((64, 64, 3), BLUE, np.uint8)
    stored[:32, :32] = RED    # the top left corner of the stored picture
    write_video(tmp_path / "data/v.mp4", [stored] * 3, size=(64, 64), rotate=matrix)
    for frame in load(tmp_path / "data", tmp_path).images:
        red = frame[..., 0].astype(int) - frame[..., 2] > 0
        rows, columns = np.split(np.arange(SIZE), 2)[corner[0]], np.split(np.arange(SIZE), 2)[corner[1]]
        assert red.sum() == 64 and red[np.ix_(rows, columns)].all()


def test_frames_that_differ_in_their_orientation_alone_have_one_size(tmp_path):
    root, turned = write_frames(tmp_path / "data", (1, 2), suffix="jpg"), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (16, 24), (3, 3, 3)).save(f"{root}/2.jpg", exif=turned)    # the others are 24 x 16
    assert load(root, tmp_path).clip_names == ["."]


def test_an_hdr_video_becomes_srgb(tmp_path):
    write_video(tmp_path / "data/v.mp4", [(191, 191, 191)] * 3, color_trc=18)    # HLG: 0.75 is the reference white
    assert load(tmp_path / "data", tmp_path).images.min() >= 250


# ------------------------------------------------------------------------------------- clips that cannot be used

def cut(file, share):
    os.truncate(file, int(os.path.getsize(file) * share))


def test_clips_that_cannot_be_used_are_named_counted_and_skipped(tmp_path, capsys):
    root = write_frames(tmp_path / "data" / "whole", (1, 2, 3)) and str(tmp_path / "data")
    write_frames(f"{root}/mixed", (1, 2, 3))
    write_frames(f"{root}/mixed", (4,), names="9", size=(16, 24))
    write_frames(f"{root}/short", (1, 2))
    write_frames(f"{root}/torn", (1, 2, 3, 4))
    Path(root, "torn", "2.png").write_bytes(b"\x89PNG")
    write_frames(f"{root}/linked", (1, 2, 3))
    Path(root, "linked", "1b.png").symlink_to("gone.png")
    write_frames(f"{root}/heic", (1, 2, 3))
    Path(root, "heic", "4.jxl").write_bytes(b"\xff\x0a" + b"\0" * 40)
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for i in range(6)]
    for kind in ("gif", "webp"):
        noise[0].save(f"{root}/cut.{kind}", save_all=True, append_images=noise[1:], lossless=True)
        cut(f"{root}/cut.{kind}", 0.7)
    write_video(f"{root}/cut.mp4", [RED] * 8)
    cut(f"{root}/cut.mp4", 0.9)    # the index at the end of the file
    write_video(f"{root}/still.mov", [RED])
    Path(root, "empty.webm").touch()
    Path(root, "list.mp4").write_text("ffconcat version 1.0\nfile still.mov\n")    # a list of files, for FFmpeg
    write_video(f"{root}/damaged.mp4", [np.asarray(picture.resize((64, 48))) for picture in noise])
    content = bytearray(Path(root, "damaged.mp4").read_bytes())
    content[len(content) // 2:len(content) // 2 + 50] = bytes(50)
    Path(root, "damaged.mp4").write_bytes(content)
    c, _ = command_line.parse_constants(["--image-size", "32", "--runs-dir", str(tmp_path), "--num-workers", "0"])
    c.FOLDERS, c.CLIP_STRIDE = "clips", 1
    images = data.load_images_of_run(root, c)
    assert images.clip_names == ["whole"] and len(images.images) == 3
    skipped = dict(images.skipped)
    for name, reason in (("cut.gif", ".*"), ("cut.webp", ".*"),
                         ("cut.mp4", "Invalid data.*"), ("still.mov", "1 frame, and a clip needs 3"),
                         ("empty.webm", "empty file"), ("list.mp4", "Invalid data.*"),
                         ("damaged.mp4", r"after frame \d: damaged frame"),
                         ("short", "2 frames, and a clip needs 3"), ("torn", "2.png: .*"),
                         ("linked", "1b.png: broken link"), ("heic", "JPEG XL is not supported.*"),
                         ("mixed", "frames of different sizes: 24 x 16, and frame 9.png has 16 x 24")):
        assert re.fullmatch(reason, skipped.pop(name)), (name, dict(images.skipped)[name])
    assert not skipped
    lines = capsys.readouterr().out.splitlines()
    assert "1 clip cannot be used: JPEG XL is not supported: convert the files to PNG or JPEG" in lines
    assert "11 clips cannot be used:" in lines and "  short: 2 frames, and a clip needs 3" in lines
    assert any("only 1 different clip: a model can only copy so few" in line for line in lines)
    again = load(root, tmp_path, cache="again"), load(root, tmp_path, cache="again")    # and from the cache
    assert again[0].skipped == again[1].skipped == images.skipped


@pytest.mark.parametrize("left, top, reason", [
    (16, 0, "frames of different sizes: 64 x 48, and frame 2 has 80 x 48"),
    (5000, 4000, "after frame 1: 5064 x 4048 pixels, above the limit")])
def test_a_frame_that_enlarges_a_gif_is_named(tmp_path, left, top, reason):
    file = tmp_path / "data" / "v.gif"
    write_video(file, (RED, GREEN, BLUE, GREY))
    content = bytearray(file.read_bytes())
    third = [found.start() for found in re.finditer(rb"\x2c....\x40\0\x30\0", content)][2]
    content[third + 1:third + 5] = struct.pack("<HH", left, top)
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load(tmp_path / "data", tmp_path)


def test_without_pyav_videos_are_skipped_with_the_command_that_installs_it(tmp_path, capsys, without_av, monkeypatch):
    root = write_frames(tmp_path / "data", (1, 2, 3))
    Path(root, "a.mp4").write_bytes(b"a video")
    Path(root, "b.MOV").write_bytes(b"another")
    c, _ = command_line.parse_constants(["--image-size", "32", "--runs-dir", str(tmp_path), "--num-workers", "0"])
    c.FOLDERS, c.CLIP_STRIDE = "clips", 1
    assert data.load_images_of_run(root, c).clip_names == ["."]
    needs = "videos (.mp4, .webm, .mov) need the package PyAV: pip install av"
    assert f"2 clips cannot be used: {needs}" in capsys.readouterr().out
    os.remove(f"{root}/0.png")
    with pytest.raises(InputError, match=re.escape(f"none of 3 clips can be used; the first is a.mp4: {needs}. ")):
        load(root, tmp_path)
    monkeypatch.undo()
    pytest.importorskip("av")
    write_video(f"{root}/c.mp4", [RED] * 3)
    assert load(root, tmp_path).clip_names == ["c.mp4"]    # after the installation


@pytest.mark.parametrize("names, fault", [
    ((), "no images in it; looked for .mp4 .webm .mov .jpg .*"),
    (("a/0.png", "a/1.png", "b/0.png"), "none of 2 clips .*the first is a: 2 frames, and a clip needs 3")])
def test_a_folder_without_usable_clips_is_one_line_that_says_what_a_clip_is(tmp_path, names, fault):
    for name in names:
        write_frames(tmp_path / "data" / os.path.dirname(name), (1,), names=name[2])
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=rf"data: {fault}\. A clip is a folder of at least 3 images.*$"):
        load(tmp_path / "data", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_video_gives_frames_or_a_reason(tmp_path, kind):
    file, original = tmp_path / f"v.{kind}", tmp_path / f"original.{kind}"
    write_video(original, (RED, GREEN, BLUE, GREY), size=(32, 32))

    def read(file):
        decoded = clips.decode_video(file, Settings(SIZE, 3), 1, tmp_path / "pixels")
        if decoded.key is None:
            assert decoded.reason and "\n" not in decoded.reason and str(tmp_path) not in decoded.reason
            raise InputError(file.name)
        assert os.path.getsize(tmp_path / "pixels") == decoded.shape[0] * SIZE * SIZE * 3 > 0

    fuzz(file, original.read_bytes(), read)


# ------------------------------------------------------------------------------------- the cache

def test_only_new_and_changed_files_are_decoded_again(tmp_path, decoded):
    root = write_frames(tmp_path / "data" / "b", (1, 2, 3, 4)) and str(tmp_path / "data")
    write_frames(f"{root}/c", (1, 2, 3))
    write_video(f"{root}/v.webp", (RED, GREEN, BLUE))
    write_video(f"{root}/w.webp", (RED, GREEN, BLUE, GREY))
    first = load(root, tmp_path)
    assert len(decoded) == 9
    pixel_file = next(cache_folder(tmp_path).glob("*.u8"))
    decoded.clear()
    os.utime(f"{root}/v.webp", ns=(0, 0))
    os.utime(f"{root}/b/1.png", ns=(0, 0))
    images = load(root, tmp_path)
    assert sorted(decoded) == ["1.png", "v.webp"] and pixel_file.stat().st_size == 14 * SIZE * SIZE * 3
    assert np.array_equal(images.images, first.images)
    decoded.clear()
    write_frames(f"{root}/a", (7, 8, 9))                              # a clip in front of the others,
    write_video(f"{root}/v.webp", (GREY, BLUE, RED, GREEN, RED))      # a video with other frames,
    write_frames(f"{root}/b", (5,), names=["1b"], size=(8, 8))        # a clip that can no longer be used,
    os.remove(f"{root}/c/2.png")                                      # one that is too short now
    images = load(root, tmp_path)
    assert sorted(decoded) == ["0.png", "1.png", "1b.png", "2.png", "v.webp"]
    assert images.clip_names == ["a", "v.webp", "w.webp"]
    assert images.warnings[0].startswith("1 file of the last start not found: c/2.png.")
    decoded.clear()
    pixel_file = next(cache_folder(tmp_path).glob("*.u8"))
    assert_as_fresh(load(root, tmp_path), root, tmp_path)
    assert pixel_file.exists()   # not sorted again: the frames of b, which cannot be used, come last
    assert len(decoded) == 10    # by the empty cache alone
    os.remove(f"{root}/b/1b.png")
    decoded.clear()
    assert load(root, tmp_path).clip_names == ["a", "b", "v.webp", "w.webp"] and decoded == []    # b was kept


def test_a_frame_that_has_another_size_and_the_same_pixels_is_noticed(tmp_path):
    root = write_frames(tmp_path / "data", (1, 2, 3))
    load(root, tmp_path)
    write_frames(root, (2,), names="1", size=(32, 32))
    with pytest.raises(InputError, match=r"frames of different sizes: 24 x 16, and frame 1\.png has 32 x 32"):
        load(root, tmp_path)


def test_the_files_of_a_moved_folder_are_known_from_the_cache(tmp_path):
    root = write_frames(tmp_path / "data" / "a", range(6)) and str(tmp_path / "data")
    write_frames(f"{root}/short", (1, 2))
    write_video(f"{root}/v.webp", (RED, GREEN, BLUE, RED, GREEN))
    c, _ = command_line.parse_constants(["--image-size", "32", "--runs-dir", str(tmp_path), "--num-workers", "0"])
    c.FOLDERS, c.CLIP_STRIDE = "clips", 2
    data.load_images_of_run(root, c)
    os.rename(root, tmp_path / "moved")
    sizes = data.file_sizes(tmp_path / "moved", c)
    assert list(sizes) == ["a/0.png", "a/2.png", "a/4.png", "v.webp"] and data.cached_sizes(root, c) == sizes


def test_each_stride_has_its_own_cache_and_that_of_images_stays(tmp_path, decoded):
    root = write_frames(tmp_path / "data", range(6))
    write_video(f"{root}/v.webp", (RED, GREEN, BLUE))
    images = load(root, tmp_path, folders="ignore")
    assert images.clip_offsets is None and len(images.clip_names) == len(images.train_clips) == 0
    assert len(images.images) == 7    # the first frame of the animation is an image
    before = {file: file.read_bytes() for file in cache_folder(tmp_path).iterdir()}
    load(root, tmp_path)
    load(root, tmp_path, clip_stride=2)
    decoded.clear()
    load(root, tmp_path)
    assert load(root, tmp_path, clip_stride=2).skipped == [("v.webp", "2 frames, and a clip needs 3")]
    load(root, tmp_path, folders="ignore")
    assert decoded == [] and {file: file.read_bytes() for file in before} == before


def test_the_place_of_an_image_cache_is_that_of_earlier_versions(monkeypatch):
    monkeypatch.setattr(features, "get_supported", lambda: ["webp", "jpg"])
    settings = data._cache_settings(Settings(64, 3), "ignore", 1)
    assert image_cache.cache_folder("/data/faces", settings, "c") == os.path.join("c", "faces-64x3-765872283442")


def test_one_frame_of_a_video_is_in_memory_at_a_time(tmp_path):
    levels = np.arange(200, dtype=np.uint8)[:, None].repeat(3, 1)
    write_video(tmp_path / "v.webp", levels, size=(32, 32))
    tracemalloc.start()
    try:
        decoded = clips.decode_video(tmp_path / "v.webp", Settings(64, 3), 1, tmp_path / "pixels")
        assert tracemalloc.get_traced_memory()[1] < 20 * 64 * 64 * 3    # of 200 frames
    finally:
        tracemalloc.stop()
    assert decoded.shape == (200, 32, 32)
    assert np.array_equal(np.fromfile(tmp_path / "pixels", np.uint8).reshape(200, 64, 64, 3)[:, 9, 9], levels)


def test_the_part_of_a_video_is_deleted_when_it_is_in_the_cache(tmp_path, monkeypatch):
    left, append = [], image_cache.Cache.append
    monkeypatch.setattr(image_cache, "SAVE_EVERY", 1)
    monkeypatch.setattr(image_cache.Cache, "append", lambda cache, batch: (
        append(cache, batch), left.append(len(list(cache.folder.glob(image_cache.PARTS))))))
    for name in "abc":
        write_video(tmp_path / f"data/{name}.webp", (RED, GREEN, BLUE))
    assert len(load(tmp_path / "data", tmp_path).images) == 9 and left == [0] * 4


def test_a_full_disk_is_no_fault_of_the_video(tmp_path, monkeypatch):
    write_video(tmp_path / "data/v.webp", (RED, GREEN, BLUE))
    decode_video = clips.decode_video
    monkeypatch.setattr(clips, "decode_video", lambda *arguments: decode_video(*arguments[:3], "/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught:
        load(tmp_path / "data", tmp_path)
    assert caught.value.filename == str(cache_folder(tmp_path))


def test_an_interrupted_scan_keeps_what_it_decoded(tmp_path, decoded, monkeypatch):
    root = write_frames(tmp_path / "data", (1, 2, 3))
    for name in "abc":
        write_video(f"{root}/{name}.webp", (RED, GREEN, BLUE))
    to_pixels, frames = clips.to_pixels, []

    def interrupted(*arguments):
        frames.append(1)
        if len(frames) == 5:    # in the second video
            raise KeyboardInterrupt
        return to_pixels(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clips, "to_pixels", interrupted)
        load(root, tmp_path)
    assert list(cache_folder(tmp_path).glob(image_cache.PARTS)) == []
    decoded.clear()
    images = load(root, tmp_path)
    assert decoded == ["b.webp", "c.webp"]
    assert_as_fresh(images, root, tmp_path)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import data, image_cache
append = image_cache.Cache.append
def append_and_stop(cache, batch):
    append(cache, batch)
    os.kill(os.getpid(), getattr(signal, sys.argv[4]))
image_cache.Cache.append, image_cache.SAVE_EVERY = append_and_stop, 1
data.load_images(sys.argv[2], 16, 3, sys.argv[3], workers=1, progress=False, folders="clips")
"""


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGINT"])
def test_a_scan_that_ends_early_leaves_no_process_and_is_continued(tmp_path, decoded, stop):
    root = str(tmp_path / "data")
    for name in "abc":
        write_frames(f"{root}/{name}", (1, 2, 3))
        write_video(f"{root}/{name}/v.webp", (RED, GREEN, BLUE))
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, tmp_path / "script.py", REPO, root, tmp_path / "cache", stop]
    # Returns when every process that holds stderr has ended: the timeout fails the test if one stays behind.
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, timeout=300)
    assert done.returncode == -getattr(signal, stop)
    kept = (cache_folder(tmp_path) / "index.jsonl").read_text().count("\n") - 1
    (cache_folder(tmp_path) / "7.frames").write_bytes(b"half a video")
    images = load(root, tmp_path)
    assert 1 <= kept < 12 and len(decoded) == 12 - kept
    assert list(cache_folder(tmp_path).glob(image_cache.PARTS)) == []
    assert_as_fresh(images, root, tmp_path)


def test_a_scan_that_ends_early_stops_its_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "POOL_FROM", 1)
    root = write_frames(tmp_path, range(image_cache.CHUNK + 1))
    files = [(f"{root}/{name}", None) for name in sorted(os.listdir(root))]
    results = image_cache._decode_all(files, Settings(SIZE, 3), stride=1, workers=1)
    assert next(results).key is not None
    processes = multiprocessing.active_children()
    results.close()
    assert [process.exitcode for process in processes] == [-signal.SIGTERM]


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "CHUNK", 4)
    root = str(tmp_path / "data")
    for number in range(5):
        write_frames(f"{root}/{number}", range(number, number + 5))
        write_video(f"{root}/{number}/v.webp", (RED, GREEN, BLUE))
    cut(f"{root}/3/v.webp", 0.8)
    assert_as_fresh(load(root, tmp_path, workers=2), root, tmp_path)


def test_a_video_is_a_task_of_its_own_and_two_are_worth_processes(monkeypatch):
    def started(*_):
        raise RuntimeError("processes")

    files = [(str(number), "part" if number in (3, 4, 40) else None) for number in range(50)]
    chunks = image_cache._chunks(files)
    assert [file for chunk in chunks for file in chunk] == files
    assert [len(chunk) for chunk in chunks] == [3, 1, 1, 16, 16, 3, 1, 9]
    monkeypatch.setattr(image_cache, "ProcessPoolExecutor", started)
    monkeypatch.setattr(image_cache, "_decode_files", lambda *_: ["decoded"])
    assert next(image_cache._decode_all([("a", "part"), ("b", None)], Settings(SIZE, 3), 1, workers=1)) == "decoded"
    with pytest.raises(RuntimeError, match="processes"):
        next(image_cache._decode_all([("a", "part"), ("b", "part")], Settings(SIZE, 3), 1, workers=1))


# ------------------------------------------------------------------------------------- split

@pytest.mark.parametrize("count, share, held", [
    (23, 0.02, 0), (24, 0.02, 8), (100, 0.02, 8), (400, 0.02, 8), (600, 0.02, 12), (100, 0.25, 25), (100, 0.0, 0),
    (100, 1.0, 0)])
def test_eight_clips_or_the_share_are_held_out(count, share, held):
    train, held_out = clips.split([number / count for number in range(count)], share)
    assert held_out.tolist() == list(range(held)) and train.tolist() == list(range(held, count))
    assert train.dtype == held_out.dtype == np.int64


def test_equal_clips_stay_on_one_side_and_no_clip_changes_from_training_to_held_out(tmp_path):
    def held_out():
        images = load(root, tmp_path)
        offsets, names = images.clip_offsets, images.clip_names
        for rows, sides in ((images.train, images.train_clips), (images.held_out, images.held_out_clips)):
            assert rows.tolist() == [row for clip in sides for row in range(offsets[clip], offsets[clip + 1])]
        assert sorted([*images.train, *images.held_out]) == list(range(len(images.images)))
        return {names[clip] for clip in images.held_out_clips}, names

    root = str(tmp_path / "data")
    for number in range(26):
        write_frames(f"{root}/{number}", (number, 2 * number, 3 * number + 1, 50)[:3 + number % 2])
    write_frames(f"{root}/backwards", (1, 50, 100))    # other clips with the frames of clip 25, except for one
    for number in range(1, 13):
        shutil.copytree(f"{root}/{number}", f"{root}/copy{number}")
        frames = [Image.open(f"{root}/{number}/{frame}.png") for frame in range(3 + number % 2)]
        frames[0].save(f"{root}/{number}.webp", save_all=True, append_images=frames[1:], lossless=True)
    held, names = held_out()
    assert len(names) == 51 and len({name for name in held if name.isdigit() or name == "backwards"}) == 8
    assert 0 < len({f"copy{number}" for number in range(1, 13)} & held) < 12
    for number in range(1, 13):
        assert (f"{number}" in held) == (f"copy{number}" in held) == (f"{number}.webp" in held)
    for number in range(26, 60):
        write_frames(f"{root}/{number}", (number, number + 1, number + 2))
    assert {name for name in held_out()[0] if name in names} <= held
