"""The built-in demo set: pure functions, independent factors, a folder that survives interruption."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import demo_images
from demo_images import draw, factors, make

SCRIPT = Path(demo_images.__file__)
BASE = {"sky": "dusk", "sky_hue": 0.0, "land": "hills", "land_hue": 0.4, "horizon": 0.3, "ears": "short",
        "face": "heart", "width": 1.0, "head": 1.0, "eyes": 1.0, "x": 0.0, "lean": 0.0, "tilt": 0.0,
        "left_wing": 0.2, "right_wing": 0.2, "lids": 0.4, "mood": 0.0, "gaze": 0.5, "gaze_reach": 0.6,
        "branch": 0.05, "hue": 0.1, "scheme": "triadic", "value": 0.5, "vivid": 0.5, "pattern": "dots",
        "pattern_size": 1.0, "sun": 0.5, "sun_height": 0.5, "contrast": 0.5}


def pictures_in(folder):
    """{class/name: bytes} of every picture of a set."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.jpg")}


def times_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*.jpg")}


def stop_after(count, monkeypatch, error=RuntimeError):
    """Lets the drawing fail once `count` pictures are drawn; returns the list of numbers drawn."""
    drawn = []

    def draw_or_stop(index, size, seed):
        if len(drawn) == count:
            raise error("stopped by the test")
        drawn.append(index)
        return draw(index, size, seed)

    monkeypatch.setattr(demo_images, "draw", draw_or_stop)
    return drawn


# ---------------------------------------------------------------- pictures


def test_a_picture_depends_on_seed_and_index_alone():
    alone = draw(7, 48, seed=3)
    forwards = [draw(index, 48, seed=3) for index in (6, 7, 8)]
    backwards = [draw(index, 48, seed=3) for index in (8, 7, 6)][::-1]
    assert alone.shape == (48, 48, 3) and alone.dtype == np.uint8
    assert np.array_equal(alone, forwards[1])
    assert all(np.array_equal(one, other) for one, other in zip(forwards, backwards))
    assert not np.array_equal(alone, draw(7, 48, seed=4))


def test_global_random_numbers_neither_matter_nor_move():
    np.random.seed(1)
    first, state = draw(0, 32), np.random.get_state()[1].copy()
    np.random.seed(2)
    assert np.array_equal(first, draw(0, 32))
    np.random.seed(1)
    assert np.array_equal(np.random.get_state()[1], state)


def test_no_two_of_four_hundred_pictures_are_equal_or_nearly():
    pictures = np.stack([draw(index, 24) for index in range(400)]).reshape(400, -1).astype(np.float32)
    products = pictures @ pictures.T
    squares = np.diag(products)
    distance = squares[:, None] + squares - 2 * products + np.eye(400, dtype=np.float32) * 1e12
    assert np.sqrt(distance.min() / pictures.shape[1]) > 5  # grey levels, root mean square


def test_another_size_shows_the_same_picture():
    large = Image.fromarray(draw(11, 128)).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, np.float32) - draw(11, 64)).mean() < 3


def test_pictures_are_bright_colourful_and_full_of_contrast():
    pictures = np.stack([draw(index, 32) for index in range(100)]).astype(np.float32)
    assert 80 < pictures.mean() < 180
    assert pictures.std(axis=(1, 2, 3)).min() > 20
    assert (pictures.max(axis=3) - pictures.min(axis=3)).mean() > 50


# ---------------------------------------------------------------- factors


def test_factors_are_independent_of_each_other():
    count = 3000
    drawn = [factors(index) for index in range(count)]
    owners, columns = [], []
    for name, example in drawn[0].items():
        values = [each[name] for each in drawn]
        for choice in sorted(set(values)) if isinstance(example, str) else [None]:
            owners.append(name)
            columns.append([value == choice for value in values] if choice else values)
    correlation = np.corrcoef(np.array(columns, np.float64))
    other = np.array([[one != two for two in owners] for one in owners])
    # About 900 pairs: the largest of so many normal values stays below five standard deviations.
    assert np.abs(correlation[other]).max() < 5 / np.sqrt(count)


def test_every_choice_is_drawn_about_equally_often():
    drawn = [factors(index) for index in range(1200)]
    choices = {"sky": demo_images.SKIES, "land": demo_images.LANDS, "ears": demo_images.EARS,
               "face": demo_images.FACES, "scheme": demo_images.SCHEMES, "pattern": demo_images.PATTERNS}
    for name, options in choices.items():
        shares = [sum(each[name] == option for each in drawn) / 1200 for option in options]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0.75 / len(options), name


def test_base_of_these_tests_names_every_factor():
    assert set(BASE) == set(factors(0))


@pytest.mark.parametrize("name", BASE)
def test_each_factor_alone_changes_the_picture(name, monkeypatch):
    values = [factors(index)[name] for index in range(60)]
    if isinstance(BASE[name], str):
        other = next(value for value in values if value != BASE[name])
    else:
        other = max(values, key=lambda value: abs(value - BASE[name]))
    monkeypatch.setattr(demo_images, "factors", lambda index, seed: BASE)
    before = draw(0, 64).astype(np.float32)
    monkeypatch.setattr(demo_images, "factors", lambda index, seed: BASE | {name: other})
    assert (np.abs(draw(0, 64) - before).max(axis=2) > 12).sum() >= 8  # pixels that clearly differ


# ---------------------------------------------------------------- the folder


def test_the_set_loads_with_image_folder_and_holds_what_draw_gives(tmp_path):
    folder = make(tmp_path / "set", count=40, size=32, seed=5, progress=False)
    loaded = ImageFolder(folder)
    assert len(loaded) == 40 and set(loaded.classes) == set(demo_images.SKIES)
    for path, label in loaded.samples:
        index = int(Path(path).stem.split("_")[1])
        picture = np.asarray(Image.open(path), np.float32)
        assert loaded.classes[label] == factors(index, 5)["sky"]
        assert np.abs(picture - draw(index, 32, 5)).mean() < 4


def test_a_set_too_small_for_all_classes_still_loads(tmp_path):
    assert len(ImageFolder(make(tmp_path / "set", count=2, size=16, progress=False))) == 2


def test_a_second_call_draws_nothing_and_is_instant(tmp_path, monkeypatch):
    make(tmp_path / "set", count=30, size=16, progress=False)
    before, drawn = times_in(tmp_path / "set"), stop_after(0, monkeypatch)
    start = time.perf_counter()
    assert make(tmp_path / "set", count=30, size=16, progress=False) == tmp_path / "set"
    assert time.perf_counter() - start < 0.5 and drawn == []
    assert times_in(tmp_path / "set") == before


def test_an_interrupted_drawing_goes_on(tmp_path, monkeypatch):
    stop_after(11, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make(tmp_path / "set", count=30, size=16, progress=False)
    half = times_in(tmp_path / "set")
    assert len(half) == 11 and not json.loads((tmp_path / "set" / "demo_set.json").read_text())["complete"]
    drawn = stop_after(1000, monkeypatch)
    make(tmp_path / "set", count=30, size=16, progress=False)
    whole = times_in(tmp_path / "set")
    assert drawn == list(range(11, 30)) and len(whole) == 30
    assert all(whole[name] == half[name] for name in half)
    assert not list(tmp_path.rglob("*.part"))


def test_a_failed_write_leaves_no_partial_picture(tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    make(tmp_path / "set", count=3, size=16, progress=False)
    monkeypatch.setattr(demo_images.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "set", count=9, size=16, progress=False)
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_process_leaves_whole_pictures_and_goes_on(tmp_path):
    folder = tmp_path / "set"
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "--count", "600", "--size", "96"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(pictures_in(folder)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    half = pictures_in(folder)
    assert 5 <= len(half) < 600
    for path in folder.glob("*/*.jpg"):
        assert np.asarray(Image.open(path)).shape == (96, 96, 3)
    make(folder, count=len(half) + 20, size=96, progress=False)
    assert len(pictures_in(folder)) == len(half) + 20


@pytest.mark.parametrize("change", [{"count": 12}, {"size": 24}, {"seed": 1}])
def test_other_values_replace_the_set(tmp_path, change):
    make(tmp_path / "set", count=20, size=16, progress=False)
    values = {"count": 20, "size": 16, "seed": 0} | change
    replaced = pictures_in(make(tmp_path / "set", **values, progress=False))
    assert replaced == pictures_in(make(tmp_path / "fresh", **values, progress=False))


def test_a_lost_picture_or_a_damaged_marker_is_mended(tmp_path):
    folder = make(tmp_path / "set", count=20, size=16, progress=False)
    before = pictures_in(folder)
    next(folder.glob("*/owl_000003.jpg")).unlink()
    make(folder, count=20, size=16, progress=False)
    assert pictures_in(folder) == before
    for damage in ("{", "[]", "7", ""):
        (folder / "demo_set.json").write_text(damage)
        make(folder, count=20, size=16, progress=False)
        assert pictures_in(folder) == before


# ---------------------------------------------------------------- bad input and the command line


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files"):
        make(tmp_path, count=2, size=16)
    assert demo_images.main([str(tmp_path), "--count", "2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("values", [{"count": 0}, {"size": 8}, {"size": 5000}, {"seed": -1}])
def test_values_that_cannot_be_are_refused_before_anything_is_written(tmp_path, values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} {next(iter(values.values()))}"):
        make(tmp_path / "set", **values)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("below", [[], ["set"]])
def test_a_file_where_the_folder_should_be_is_one_line(tmp_path, below, capsys):
    (tmp_path / "file").write_text("")
    assert demo_images.main([str(tmp_path.joinpath("file", *below))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_flag_is_one_line_and_status_two(capsys):
    with pytest.raises(SystemExit) as stop:
        demo_images.main(["somewhere", "--count", "many"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--count" in message


def test_the_command_draws_the_set_and_a_contact_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    flags = ["--count", "3", "--size", "16", "--contact-sheet", str(sheet)]
    assert demo_images.main([str(tmp_path / "set"), *flags]) == 0
    assert len(pictures_in(tmp_path / "set")) == 3 and "3 pictures" in capsys.readouterr().out
    picture = np.asarray(Image.open(sheet), np.float32)
    assert picture.shape == (8 * 68 + 4, 8 * 68 + 4, 3)
    last = np.asarray(Image.fromarray(draw(63, 128)).resize((64, 64), Image.Resampling.BOX), np.float32)
    assert np.abs(picture[-68:-4, -68:-4] - last).mean() < 5


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    stop_after(2, monkeypatch, KeyboardInterrupt)
    assert demo_images.main([str(tmp_path / "set"), "--count", "5", "--size", "16"]) == 130
    assert "goes on" in capsys.readouterr().err
