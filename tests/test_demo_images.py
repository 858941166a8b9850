import json
import os
import threading

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import checkpoints
import demo_images
from demo_images import draw, factors, make


def images_in(folder):
    """{class/name: bytes} of every image of a set."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.jpg")}


def times_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*.jpg")}


def stop_after(count, monkeypatch):
    """Makes drawing fail after `count` images; returns the list of the numbers drawn."""
    drawn = []

    def draw_or_stop(index, size, seed):
        if len(drawn) == count:
            raise RuntimeError("stopped by the test")
        drawn.append(index)
        return draw(index, size, seed)

    monkeypatch.setattr(demo_images, "draw", draw_or_stop)
    return drawn


# ------------------------------------------------------------------------------------- images

def test_an_image_depends_on_seed_and_index_alone():
    np.random.seed(1)
    before, images = np.random.get_state()[1].copy(), [draw(index, 48, seed=3) for index in (6, 7, 8)]
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    assert images[1].shape == (48, 48, 3) and images[1].dtype == np.uint8
    assert all(np.array_equal(draw(index, 48, seed=3), image) for index, image in zip((8, 7, 6), images[::-1]))
    assert not np.array_equal(images[1], draw(7, 48, seed=4))


def test_no_two_of_four_hundred_images_are_nearly_equal_and_none_is_plain():
    images = np.stack([draw(index, 24) for index in range(400)]).reshape(400, -1).astype(np.float32)
    products = images @ images.T
    squares = np.diag(products)
    distance = squares[:, None] + squares - 2 * products + np.eye(400, dtype=np.float32) * 1e12
    assert np.sqrt(distance.min() / images.shape[1]) > 5  # grey levels, root mean square
    assert images.std(axis=1).min() > 20


def test_another_size_shows_the_same_image():
    large = Image.fromarray(draw(11, 128)).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, np.float32) - draw(11, 64)).mean() < 3


def test_factors_are_independent_and_every_choice_is_about_equally_frequent():
    drawn = [factors(index) for index in range(3000)]
    owners, columns = [], []
    for name, example in drawn[0].items():
        values = [each[name] for each in drawn]
        choices = sorted(set(values)) if isinstance(example, str) else [None]
        for choice in choices:
            owners.append(name)
            columns.append([value == choice for value in values] if choice else values)
            assert choice is None or np.mean(columns[-1]) > 0.75 / len(choices), name
    correlation = np.corrcoef(np.array(columns, np.float64))
    other = np.array([[one != two for two in owners] for one in owners])
    # About 900 pairs: the largest of so many normal values stays below five standard deviations.
    assert np.abs(correlation[other]).max() < 5 / np.sqrt(3000)


# ------------------------------------------------------------------------------------- the folder

def test_the_set_loads_with_image_folder_and_contains_what_draw_returns(tmp_path):
    loaded = ImageFolder(make(tmp_path / "set", count=40, size=32, seed=5))
    assert len(loaded) == 40 and set(loaded.classes) == set(demo_images.SKIES)
    for path, label in loaded.samples:
        index = int(path[-10:-4])
        assert loaded.classes[label] == factors(index, 5)["sky"]
        assert np.abs(np.asarray(Image.open(path), np.float32) - draw(index, 32, 5)).mean() < 4


def test_a_set_is_drawn_once_also_if_an_older_versions_marker_holds_more(tmp_path, monkeypatch):
    folder = make(tmp_path / "set", count=30, size=16)
    marker = folder / "demo_set.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": True}))
    before = times_in(folder)
    stop_after(0, monkeypatch)
    assert make(folder, count=30, size=16) == folder and times_in(folder) == before


def test_an_interrupted_drawing_continues(tmp_path, monkeypatch):
    stop_after(11, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make(tmp_path / "set", count=30, size=16)
    half = times_in(tmp_path / "set")
    drawn = stop_after(1000, monkeypatch)
    make(tmp_path / "set", count=30, size=16)
    whole = times_in(tmp_path / "set")
    assert len(half) == 11 and drawn == list(range(11, 30)) and len(whole) == 30
    assert all(whole[name] == half[name] for name in half)


def test_a_failed_write_leaves_no_partial_image(tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    folder, replace = make(tmp_path / "set", count=3, size=16), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if str(b).endswith("json") else full_disk(a, b))
    with pytest.raises(OSError, match="No space left"):
        make(folder, count=9, size=16)
    assert images_in(folder) == {}
    monkeypatch.undo()
    assert len(images_in(make(folder, count=9, size=16))) == 9 and not list(tmp_path.rglob("*.part"))


def test_a_second_process_waits_for_the_first(tmp_path, monkeypatch):
    drawn, waiting = stop_after(1000, monkeypatch), threading.Event()
    monkeypatch.setattr(demo_images, "print", lambda line: waiting.set(), raising=False)
    second = threading.Thread(target=make, args=(tmp_path / "set", 3, 16))
    with checkpoints.lock(tmp_path / "set", pytest.fail):
        second.start()
        assert waiting.wait(20) and drawn == []
    second.join()
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("change", [{"count": 12}, {"size": 24}, {"seed": 1}])
def test_other_values_replace_the_set_and_no_hidden_file(tmp_path, change):
    folder, values = tmp_path / "set", {"count": 20, "size": 16, "seed": 0}
    folder.mkdir()
    (folder / ".keep").write_text("")
    make(folder, **values)
    assert images_in(make(folder, **values | change)) == images_in(make(tmp_path / "fresh", **values | change))
    assert (folder / ".keep").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "7", ""])
def test_a_damaged_marker_is_repaired(tmp_path, damage):
    folder = make(tmp_path / "set", count=5, size=16)
    before, marker = images_in(folder), (folder / "demo_set.json").read_text()
    (folder / "demo_set.json").write_text(damage)
    assert images_in(make(folder, count=5, size=16)) == before and (folder / "demo_set.json").read_text() == marker


# ------------------------------------------------------------------------------------- bad input and command line

def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    assert demo_images.main([str(tmp_path), "--count", "2"]) == 2
    assert f"{tmp_path}: contains other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("flags, words", [
    (["set", "--count", "0"], "--count 0 is invalid"), (["set", "--size", "5000"], "16 to 1024"),
    (["set", "--seed", "-1"], "--seed -1 is invalid"), (["file/set"], "file")])
def test_bad_input_is_one_line_and_status_2(tmp_path, flags, words, capsys):
    (tmp_path / "file").write_text("")
    assert demo_images.main([str(tmp_path / flags[0]), *flags[1:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message and not (tmp_path / "set").exists()


def test_the_command_draws_the_set(tmp_path, capsys):
    assert demo_images.main([str(tmp_path / "set"), "--count", "3", "--size", "16"]) == 0
    assert len(images_in(tmp_path / "set")) == 3 and "3 images" in capsys.readouterr().out
