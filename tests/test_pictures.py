import os
import weakref

import numpy as np
import pytest
from PIL import Image, ImageSequence

import pictures
from errors import InputError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ramp(level, height=48, width=64):
    """A picture without sharp edges, of strong colours."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, np.full_like(x, level)], axis=2).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def skip_mp4_without_pyav(request):
    if "mp4" in request.node.name:
        pytest.importorskip("av")


# ------------------------------------------------------------------------------------- sheets

def test_grid_puts_each_image_in_its_place_with_gaps_between():
    images = noise(5, 6, 7, 3)
    sheet = pictures.grid(images, columns=3, gap=2)
    assert sheet.shape == (6 + 2 + 6, 7 + 2 + 7 + 2 + 7, 3) and sheet.dtype == np.uint8
    assert (sheet[8:14, 9:16] == images[4]).all()
    assert (sheet[6:8] == pictures.PANEL).all() and (sheet[8:, 18:] == pictures.PANEL).all()   # gap, sixth cell


@pytest.mark.parametrize("count, columns, shape", [(2, None, (1, 2)), (10, None, (3, 4)), (3, 8, (1, 3))])
def test_grid_is_nearly_square_and_has_no_more_columns_than_images_and_grey_becomes_rgb(count, columns, shape):
    images = noise(count, 4, 5, 1)
    sheet = pictures.grid(images, columns, gap=0)
    assert sheet.shape == (4 * shape[0], 5 * shape[1], 3) and (sheet[:4, :5] == images[0]).all()


@pytest.mark.parametrize("images", [noise(2, 4, 4, 3) / 255.0, noise(2, 4, 4, 2), noise(4, 4, 3), noise(0, 4, 4, 3)])
def test_grid_refuses_other_types_and_shapes(images):
    with pytest.raises(ValueError, match="uint8"):
        pictures.grid(images)


def test_stack_puts_each_row_below_its_label():
    rows = [noise(8, 120, 3, seed=1), noise(12, 90, 3, seed=2)]
    sheet = pictures.stack(rows, ["real", "alpha"])
    line = pictures.FONT_SIZE + pictures.SPACE
    assert sheet.shape == (8 + 12 + 2 * line, 120, 3)
    assert (sheet[line:line + 8] == rows[0]).all() and (sheet[2 * line + 8:, :90] == rows[1]).all()
    assert (sheet[2 * line + 8:, 90:] == pictures.PANEL).all()
    first, second = sheet[:line], sheet[line + 8:2 * line + 8]
    assert first.max() > 220 and (first != second).any()
    assert pictures.stack([noise(4, 4, 3)], ["reconstructed"]).shape[1] > 60          # as wide as its label
    with pytest.raises(ValueError):
        pictures.stack(rows, ["real"])


def test_beside_aligns_the_tops():
    left, right = noise(10, 4, 3), noise(6, 5, 3, seed=1)
    sheet = pictures.beside(left, right)
    assert sheet.shape == (10, 4 + pictures.SPACE + 5, 3)
    assert (sheet[:, :4] == left).all() and (sheet[:6, -5:] == right).all() and (sheet[6:, -5:] == pictures.PANEL).all()


@pytest.mark.parametrize("above, place", [(False, np.s_[22:38, 18:34]), (True, np.s_[40:56, :16])])
def test_pairs_are_numbered_and_their_second_image_follows_the_first(above, place):
    a, b = noise(3, 16, 16, 3), noise(3, 16, 16, 3, seed=1)
    sheet = pictures.pairs(a, b, above)
    assert (sheet[22:38, :16] == a[0]).all() and (sheet[place] == b[0]).all()


# ------------------------------------------------------------------------------------- heat maps

def test_heat_map_clips_at_its_ends_and_brightness_rises_between_them():
    colours = pictures.heat_map(np.array([[[-9.0, -np.inf, 1, 3, 5, 7, 9, 20.0, np.inf]]]), 1, 9)[0, 0].astype(int)
    assert (colours[:3] == pictures.HEAT_ANCHORS[0]).all() and (colours[6:] == pictures.HEAT_ANCHORS[-1]).all()
    assert (np.diff(colours[2:7].sum(axis=1)) > 0).all()


def test_logarithmic_heat_map_has_the_geometric_mean_in_the_middle():
    log = pictures.heat_map(np.array([[[1.0, 3.0, 9.0]]]), 1, 9, log=True)
    assert (log == pictures.heat_map(np.array([[[1.0, 5.0, 9.0]]]), 1, 9)).all()


@pytest.mark.filterwarnings("error")
def test_heat_map_of_an_empty_range_is_the_middle_colour_and_nan_is_cyan():
    colours = pictures.heat_map(np.array([[[3.0, 4.0, np.nan]]]), 3, 3, log=True)[0, 0]
    assert (colours[:2] == pictures.heat_map(np.array([[[0.5]]]), 0, 1)[0, 0]).all()
    assert (colours[2] == (0, 255, 255)).all()


@pytest.mark.parametrize("low, high, log", [(2, 1, False), (0, 1, True), (float("nan"), 1, False)])
def test_heat_map_refuses_an_impossible_range(low, high, log):
    with pytest.raises(ValueError, match="low"):
        pictures.heat_map(np.zeros((1, 1, 1)), low, high, log)


@pytest.mark.parametrize("log", [False, True])
def test_the_scale_beside_heat_maps_runs_from_high_to_low_with_three_labels(log):
    sheet = pictures.heat_maps(np.full((1, 100, 100), 9.0), 1, 9, log=log)
    scale = sheet[:, 100 + pictures.SPACE:]
    expected = pictures.heat_map(np.linspace(1, 0, 100).reshape(1, 100, 1), 0, 1)[0, :, 0].astype(int)
    assert np.abs(scale[:, 0] - expected).max() <= 1
    rows_with_text = (scale[:, 24:] != pictures.PANEL).any((1, 2)).nonzero()[0]
    assert rows_with_text.min() == 0 and rows_with_text.max() == 99
    assert len((np.diff(rows_with_text) > 1).nonzero()[0]) == 2


# ------------------------------------------------------------------------------------- picture files

@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7), (9, 7, 1)])
def test_png_gives_back_what_was_written(tmp_path, shape):
    picture = noise(*shape)
    pictures.save_picture(tmp_path / "new folder" / "a.png", picture)
    assert (np.asarray(Image.open(tmp_path / "new folder" / "a.png")) == picture.squeeze()).all()
    assert os.listdir(tmp_path / "new folder") == ["a.png"]


def test_webp_is_close_and_another_suffix_is_refused(tmp_path):
    pictures.save_picture(tmp_path / "a.webp", ramp(100))
    assert np.abs(np.asarray(Image.open(tmp_path / "a.webp")).astype(int) - ramp(100)).mean() < 3
    with pytest.raises(ValueError, match=r"\.png or \.webp"):
        pictures.save_picture(tmp_path / "a.bmp", ramp(100))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a.mp4"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    def write(level):
        if name == "a.png":
            pictures.save_picture(tmp_path / name, ramp(level))
        else:
            pictures.save_video(tmp_path / name, [ramp(level), ramp(level + 1)], fps=10)

    def full(descriptor):
        raise OSError(28, "No space left on device")
    write(0)
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(100)
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]


# ------------------------------------------------------------------------------------- animations and videos

@pytest.mark.parametrize("suffix, loop, stored", [(".gif", True, 0), (".webp", True, 0), (".GIF", False, None),
                                                  (".webp", False, 1)])
def test_animation_gives_back_its_frames_in_order_and_loops_or_plays_once(tmp_path, suffix, loop, stored):
    frames = [ramp(level) for level in range(0, 240, 40)]
    pictures.save_video(tmp_path / f"a{suffix}", iter(frames), fps=10, loop=loop)
    with Image.open(tmp_path / f"a{suffix}") as image:
        read = np.stack([np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)])
        assert image.info.get("loop") == stored
    assert read.shape == (6, 48, 64, 3) and np.abs(read - np.stack(frames)).mean() < 4


@pytest.mark.parametrize("fps", [1, 24, 45, 50])
@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_keeps_its_speed_on_average_and_no_frame_below_20_ms(tmp_path, suffix, fps):
    """Also with equal frames, which Pillow joins to one."""
    pictures.save_video(tmp_path / f"a{suffix}", [ramp(8 * max(t, 3), 8, 8) for t in range(30)], fps)
    with Image.open(tmp_path / f"a{suffix}") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image) if frame.load()]
    assert abs(sum(durations) - 30 * 1000 / fps) <= 5 and min(durations) >= 20


def test_a_plain_area_of_a_gif_stays_plain(tmp_path):
    """Dithering would add dots of other colours, different ones in each frame."""
    frame = noise(64, 48, 3)
    frame[:, 24:] = (133, 90, 201)
    pictures.save_video(tmp_path / "a.gif", [frame], fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert len(np.unique(np.asarray(image)[:, 24:])) == 1


def test_an_mp4_keeps_frames_colours_speed_and_an_odd_size(tmp_path):
    import av
    frames = [ramp(level, 47, 63) for level in range(0, 250, 10)]
    pictures.save_video(tmp_path / "a.mp4", frames, fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == (25, 48, 64, 3)
    assert np.abs(decoded[:, :47, :63] - np.stack(frames).astype(int)).mean((1, 2, 3)).max() < 3


@pytest.mark.parametrize("name", ["a.mp4", "a", "a.gif"])
def test_a_video_takes_its_frames_one_at_a_time(tmp_path, name):
    """Memory of a long mp4 or folder does not grow with its length; a GIF keeps a third of each frame."""
    made = []

    def frames():
        for level in range(40):
            frame = ramp(level)
            made.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in made) < 5
            yield frame
    pictures.save_video(tmp_path / name, frames(), fps=20)


def test_a_folder_of_frames_is_complete_or_absent(tmp_path):
    pictures.save_video(tmp_path / "v", [ramp(0), ramp(9)], fps=20)
    assert sorted(os.listdir(tmp_path / "v")) == ["00000.png", "00001.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "v" / "00001.png")), ramp(9))
    with pytest.raises(InputError, match="exists already"):
        pictures.save_video(tmp_path / "v", [ramp(0)], fps=20)


@pytest.mark.parametrize("name", ["w", "w.mp4", "w.gif", "w.webp"])
@pytest.mark.parametrize("frames, fps, words", [
    ([ramp(0), ramp(9, 32)], 20, "frame 1 is"), ([], 20, "at least one frame"), ([ramp(0)], 0, "must be 1 to"),
    ([ramp(0)], 500, "must be 1 to"), ([ramp(0)], float("nan"), "must be 1 to")])
def test_a_video_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path, name, frames, fps, words):
    with pytest.raises(InputError, match=words):
        pictures.save_video(tmp_path / name, frames, fps)
    assert not os.listdir(tmp_path)


def test_an_unknown_kind_of_video_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.avi is invalid: must end with"):
        pictures.save_video(tmp_path / "a.avi", [ramp(0)], fps=20)
