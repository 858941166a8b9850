import os
import weakref

import numpy as np
import pytest
from PIL import Image

import pictures


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(count, height=24, width=32):
    """Pictures of few, slowly changing colours, each a little brighter than the one before."""
    y, x = np.mgrid[0:height, 0:width]
    return [np.stack([y * 4 + 3 * t, x * 3 + 3 * t, 0 * x + 40 + 5 * t], axis=-1).astype(np.uint8)
            for t in range(count)]


def lightness(colours):
    """CIE L* of sRGB colours in 0..255."""
    c = np.asarray(colours) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def read_animation(file):
    """Frames (T, H, W, 3), their durations in ms, and the file's loop count (None: no loop)."""
    with Image.open(file) as image:
        frames, durations = [], []
        for t in range(image.n_frames):
            image.seek(t)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
        return np.stack(frames), durations, image.info.get("loop")

# ------------------------------------------------------------------------------------- sheets

def test_grid_puts_each_picture_at_its_place_with_the_gap_between():
    images = noise(5, 6, 7, 3)
    sheet = pictures.grid(images, columns=3, gap=2)
    assert sheet.shape == (6 + 2 + 6, 7 + 2 + 7 + 2 + 7, 3) and sheet.dtype == np.uint8
    assert (sheet[8:14, 9:16] == images[4]).all()
    assert (sheet[6:8] == pictures.PANEL).all()           # the gap
    assert (sheet[8:, 18:] == pictures.PANEL).all()       # the empty sixth cell


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (2, (1, 2)), (9, (3, 3)), (10, (3, 4)), (64, (8, 8))])
def test_grid_is_nearly_square_by_default(count, shape):
    assert pictures.grid(noise(count, 4, 4, 3), gap=0).shape == (4 * shape[0], 4 * shape[1], 3)


def test_grid_has_no_more_columns_than_pictures():
    assert pictures.grid(noise(3, 4, 4, 3), columns=8, gap=0).shape == (4, 12, 3)


def test_grid_of_grey_pictures_is_grey_rgb():
    images = noise(1, 5, 5, 1)
    assert (pictures.grid(images) == images[0]).all() and pictures.grid(images).shape == (5, 5, 3)


@pytest.mark.parametrize("images", [noise(2, 4, 4, 3) / 255.0, noise(2, 4, 4, 2), noise(4, 4, 3),
                                    noise(0, 4, 4, 3)], ids=["float", "two channels", "one picture", "none"])
def test_grid_refuses_what_is_no_set_of_pictures(images):
    with pytest.raises(ValueError, match="uint8"):
        pictures.grid(images)


def test_stack_keeps_each_row_whole_under_its_label():
    rows = [noise(8, 120, 3, seed=1), noise(12, 90, 3, seed=2)]
    sheet = pictures.stack(rows, ["real", "alpha"])
    line = pictures.FONT_SIZE + pictures.SPACE
    assert sheet.shape == (8 + 12 + 2 * line, 120, 3)
    assert (sheet[line:line + 8] == rows[0]).all() and (sheet[2 * line + 8:, :90] == rows[1]).all()
    assert (sheet[2 * line + 8:, 90:] == pictures.PANEL).all()


def test_stack_writes_labels_that_can_be_read_and_differ():
    rows = [noise(4, 100, 3)] * 2
    line = pictures.FONT_SIZE + pictures.SPACE
    sheet = pictures.stack(rows, ["real", "alpha"])
    first, second = sheet[:line].astype(int), sheet[line + 4:2 * line + 4].astype(int)
    assert first.max() > 220 and (first != second).any()
    assert (sheet[0] == pictures.PANEL).all()             # text does not touch the edge


def test_stack_widens_for_a_long_label():
    narrow = pictures.stack([noise(4, 4, 3)], ["reconstructed"])
    assert (narrow[:, -2:] == pictures.PANEL).all() and narrow.shape[1] > 60


def test_stack_without_labels_leaves_space_between_rows_only():
    sheet = pictures.stack([noise(5, 9, 3), noise(6, 9, 3)])
    assert sheet.shape == (5 + pictures.SPACE + 6, 9, 3)


def test_stack_refuses_labels_that_do_not_match():
    with pytest.raises(ValueError, match="2 rows with 1 labels"):
        pictures.stack([noise(4, 4, 3)] * 2, ["real"])


def test_beside_aligns_the_tops():
    left, right = noise(10, 4, 3), noise(6, 5, 3, seed=1)
    sheet = pictures.beside(left, right)
    assert sheet.shape == (10, 4 + pictures.SPACE + 5, 3)
    assert (sheet[:, :4] == left).all() and (sheet[:6, -5:] == right).all()
    assert (sheet[6:, -5:] == pictures.PANEL).all()

# ------------------------------------------------------------------------------------- heat maps

def test_heat_map_rises_evenly_in_lightness():
    colours = pictures.heat_map(np.linspace(0, 1, 61).reshape(1, 1, 61), 0, 1)[0, 0]
    steps = np.diff(lightness(colours))
    assert steps.min() > 0.6 * steps.mean() and steps.max() < 1.5 * steps.mean()
    assert lightness(colours[0]) < 10 and lightness(colours[-1]) > 90


def test_heat_map_clips_at_its_ends():
    ends = pictures.heat_map(np.array([[[-9.0, -np.inf, 20.0, np.inf]]]), 1, 9)[0, 0]
    assert (ends == pictures.heat_map(np.array([[[1.0, 1.0, 9.0, 9.0]]]), 1, 9)[0, 0]).all()
    assert (ends[0] != ends[2]).any()


def test_logarithmic_heat_map_has_the_geometric_mean_in_the_middle():
    log = pictures.heat_map(np.array([[[1.0, 3.0, 9.0]]]), 1, 9, log=True)
    assert (log == pictures.heat_map(np.array([[[1.0, 5.0, 9.0]]]), 1, 9)).all()


def test_heat_map_of_an_empty_range_has_one_colour():
    colours = pictures.heat_map(np.array([[[3.0, 3.0, 4.0]]]), 3, 3, log=True)[0, 0]
    assert (colours == pictures.heat_map(np.array([[[0.5]]]), 0, 1)[0, 0]).all()


@pytest.mark.filterwarnings("error")
def test_heat_map_shows_nan_in_a_colour_that_is_not_on_the_map():
    colours = pictures.heat_map(np.array([[[np.nan, 1.0]]]), 1, 9, log=True)[0, 0]
    assert (colours[0] == pictures.NOT_A_NUMBER).all() and (colours[1] == pictures.HEAT_ANCHORS[0]).all()


@pytest.mark.parametrize("low, high, log", [(2, 1, False), (0, 1, True), (float("nan"), 1, False)])
def test_heat_map_refuses_a_range_that_cannot_be(low, high, log):
    with pytest.raises(ValueError, match="low"):
        pictures.heat_map(np.zeros((1, 1, 1)), low, high, log)


@pytest.mark.parametrize("log", [False, True])
def test_colour_bar_runs_from_high_at_the_top_to_low_at_the_bottom(log):
    bar = pictures.colour_bar(1, 9, 100, log=log)
    assert bar.shape[0] == 100 and bar.shape[2] == 3 and bar.dtype == np.uint8
    expected = pictures.heat_map(np.linspace(1, 0, 100).reshape(1, 100, 1), 0, 1)[0, :, 0]
    assert np.abs(bar[:, 0].astype(int) - expected).max() <= 1


def test_colour_bar_writes_its_ends_and_its_middle():
    def ink(bar):                 # rows that hold text
        return (bar[:, 2 * pictures.SPACE + pictures.SPACE:] != pictures.PANEL).any((1, 2)).nonzero()[0]
    rows = ink(pictures.colour_bar(1, 9, 100, log=True))
    assert rows.min() == 0 and rows.max() == 99 and (np.abs(rows - 50) < 3).any()
    assert len((np.diff(rows) > 1).nonzero()[0]) == 2     # three labels, apart
    assert len((np.diff(ink(pictures.colour_bar(1, 9, 36))) > 1).nonzero()[0]) == 1
    assert (pictures.colour_bar(1, 9, 100, log=True)[:, 24:] != pictures.colour_bar(1, 9, 100)[:, 24:]).any()

# ------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7), (9, 7, 1)])
def test_png_gives_back_what_was_written(tmp_path, shape):
    picture = noise(*shape)
    pictures.save_picture(tmp_path / "new folder" / "a.png", picture)
    with Image.open(tmp_path / "new folder" / "a.png") as image:
        assert (np.asarray(image) == picture.reshape(np.asarray(image).shape)).all()
    assert os.listdir(tmp_path / "new folder") == ["a.png"]


@pytest.mark.parametrize("picture", [noise(4, 4, 3) / 255.0, noise(4, 4, 2), noise(4)])
def test_png_refuses_what_is_no_picture(tmp_path, picture):
    with pytest.raises(ValueError, match=r"a\.png"):
        pictures.save_picture(tmp_path / "a.png", picture)
    assert not os.listdir(tmp_path)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    pictures.save_picture(tmp_path / "a.png", noise(4, 4, 3))
    before = (tmp_path / "a.png").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        pictures.save_picture(tmp_path / "a.png", noise(4, 4, 3, seed=1))
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_png_in_a_folder_that_is_a_file_says_its_name(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        pictures.save_picture(tmp_path / "taken" / "a.png", noise(4, 4, 3))


@pytest.mark.parametrize("suffix, tolerance", [(".gif", 2), (".webp", 4), (".GIF", 2)])
def test_animation_gives_back_its_frames_in_order(tmp_path, suffix, tolerance):
    frames = smooth(6)
    pictures.save_animation(tmp_path / f"a{suffix}", iter(frames), fps=10)
    read, durations, loop = read_animation(tmp_path / f"a{suffix}")
    assert read.shape == (6, 24, 32, 3) and durations == [100] * 6 and loop == 0
    assert np.abs(read.astype(int) - np.stack(frames)).mean() < tolerance
    assert os.listdir(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("suffix, loop", [(".gif", None), (".webp", 1)])
def test_animation_without_loop_plays_once(tmp_path, suffix, loop):
    pictures.save_animation(tmp_path / f"a{suffix}", smooth(3), fps=10, loop=False)
    assert read_animation(tmp_path / f"a{suffix}")[2] == loop


@pytest.mark.parametrize("fps", [1, 24, 30, 45, 50])
@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_keeps_its_speed_on_average_and_no_frame_below_20_ms(tmp_path, suffix, fps):
    pictures.save_animation(tmp_path / f"a{suffix}", smooth(30, 8, 8), fps)
    _, durations, _ = read_animation(tmp_path / f"a{suffix}")
    assert abs(sum(durations) - 30 * 1000 / fps) <= 5 and min(durations) >= 20


def test_equal_frames_keep_their_time_in_a_gif(tmp_path):
    first, second = smooth(2)
    pictures.save_animation(tmp_path / "a.gif", [first, first, second], fps=10)
    assert sum(read_animation(tmp_path / "a.gif")[1]) == 300


def test_plain_area_of_a_gif_stays_plain(tmp_path):
    """Dithering would strew dots of other colours over it, other ones in each frame."""
    frames = [noise(64, 48, 3, seed=t) for t in range(3)]
    for frame in frames:
        frame[:, 24:] = (133, 90, 201)
    pictures.save_animation(tmp_path / "a.gif", frames, fps=10)
    plain = read_animation(tmp_path / "a.gif")[0][:, :, 24:]
    assert (plain == plain[:, :1, :1]).all() and np.abs(plain.astype(int) - (133, 90, 201)).max() < 12


def test_large_gif_frames_do_without_k_means(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "KMEANS_PIXELS", 0)
    pictures.save_animation(tmp_path / "a.gif", smooth(2), fps=10)
    assert np.abs(read_animation(tmp_path / "a.gif")[0].astype(int) - np.stack(smooth(2))).mean() < 3


@pytest.mark.parametrize("name", ["a.avi", "a", "a.mp4"])
def test_animation_refuses_a_suffix_it_cannot_write_and_names_those_it_can(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: .*\.gif or \.webp") as error:
        pictures.save_animation(tmp_path / name, smooth(2), fps=10)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("fps", [0, -1, 51, float("nan")])
def test_animation_refuses_a_speed_that_no_viewer_keeps(tmp_path, fps):
    with pytest.raises(ValueError, match="1 to 50"):
        pictures.save_animation(tmp_path / "a.gif", smooth(2), fps)


def test_animation_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.gif.*at least one frame"):
        pictures.save_animation(tmp_path / "a.gif", [], fps=10)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frame_of_another_size_is_named_and_the_old_file_stays(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    pictures.save_animation(file, smooth(2), fps=10)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"frame 1 is uint8 \(8, 8, 3\)"):
        pictures.save_animation(file, [noise(9, 8, 3), noise(8, 8, 3)], fps=10)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_animation_takes_frames_one_at_a_time(tmp_path):
    """A GIF of many frames must not need all of them as RGB at once."""
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def frames():
        nonlocal alive, most
        for frame in smooth(8):
            counted = frame.view(Counted)
            alive += 1
            most = max(most, alive)
            yield counted
            del counted

    pictures.save_animation(tmp_path / "a.gif", frames(), fps=10)
    assert most <= 4


# ------------------------------------------------------------------------------------- videos

def ramp(level, height=48, width=64):
    """A picture without sharp edges, of strong colours."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, np.full_like(x, level)], axis=2).round().astype(np.uint8)


def test_an_mp4_keeps_frames_colours_speed_and_an_odd_size(tmp_path):
    av = pytest.importorskip("av")
    frames = [ramp(level, 47, 63) for level in range(0, 250, 10)]
    pictures.save_video(tmp_path / "a.mp4", frames, fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 25 and decoded[0].shape == (48, 64, 3)
    for frame, made in zip(frames, decoded):
        assert np.abs(frame.astype(int) - made[:47, :63]).mean() < 3


def test_an_mp4_takes_its_frames_one_at_a_time(tmp_path):
    pytest.importorskip("av")
    alive = weakref.WeakSet()

    def frames():
        for level in range(100):
            frame = ramp(level).view(Frame)
            alive.add(frame)
            assert len(alive) < 5
            yield frame
    pictures.save_video(tmp_path / "a.mp4", frames(), fps=20)


class Frame(np.ndarray):
    """An array that weak references can point to and that hashes by identity."""
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def test_a_folder_of_frames_is_whole_or_not_there(tmp_path):
    pictures.save_video(tmp_path / "v", [ramp(0), ramp(9)], fps=20)
    assert sorted(f.name for f in (tmp_path / "v").iterdir()) == ["00000.png", "00001.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "v" / "00001.png")), ramp(9))
    for name in ("w", "w.mp4", "w.gif"):
        with pytest.raises(ValueError, match="frame 1"):
            pictures.save_video(tmp_path / name, [ramp(0), ramp(9, 32)], fps=20)
    assert [f.name for f in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("name, words", [("a.avi", "no kind of video"), ("there", "exists already")])
def test_a_video_that_can_not_be_is_refused_in_words(tmp_path, name, words):
    (tmp_path / "there").mkdir()
    assert words in pictures.missing_for(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        pictures.save_video(tmp_path / name, [ramp(0)], fps=20)


def test_a_webp_picture_is_near_and_another_suffix_is_refused(tmp_path):
    pictures.save_picture(tmp_path / "a.webp", ramp(100))
    assert np.abs(np.asarray(Image.open(tmp_path / "a.webp")).astype(int) - ramp(100)).mean() < 3
    with pytest.raises(ValueError, match=r"\.png or \.webp"):
        pictures.save_picture(tmp_path / "a.bmp", ramp(100))
