import json
import os
import threading

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import checkpoints
import demo_images
import owls
from demo_images import draw, draw_clip, factors, make, make_clips, motion


def images_in(folder):
    """{class/name: bytes} of every image of a set."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.jpg")}


def times_in(folder):
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in folder.glob("*/*.jpg")}


def thumbnail(image):
    """The image in 8 x 8 grey pixels, float."""
    return np.asarray(Image.fromarray(image).convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)


def posed(monkeypatch, size=96, index=55, **changes):
    """The frames of a clip whose owl hangs in the air with its eyes open and its head straight, but for `changes`:
    {name of a state: its value in each frame}."""
    frames = len(next(iter(changes.values())))
    state = motion(index, frames) | {name: np.zeros(frames) for name in ("x", "tilt", "turn", "lids")} | {
        "y": np.full(frames, 0.2), "scale": 0.6} | {name: np.array(values) for name, values in changes.items()}
    with monkeypatch.context() as patch:
        patch.setattr(demo_images, "motion", lambda *arguments: state)
        return np.stack([*draw_clip(index, frames, size)]).astype(np.float32)


def pupils(frame):
    """(rows, columns) of the nearly black pixels above the branch: the pupils of an owl in a day's sky."""
    return np.nonzero(frame[:len(frame) * 3 // 4].max(axis=-1) < 60)


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


# Eight rows of eight grey levels, hexadecimal. Processors round differently, so equality is up to two levels.
@pytest.mark.parametrize("index, expected", [
    (0, "191a21262d3f57352c36434d6182bf4734343d5a968f644a4d564f6e7d785f52"
     "4b49366d90564f523b393a667b3c382d283038435b392a212825273137312d2c"),
    (1, "61c5664d46413e3d68895b636b4c5d5a6a72707a6b65766b7a8b807675597a75"
     "9596506974388593a7a751546f398fa76b7463544b5366633c3d3d433d393434"),
    (8, "89898b909ca3a2989e9f9e8f97c8f3b1b3b68b7f91b4d0bfcdcb7b8e8b85d8d7"
     "cc6a4fabbf548ed491575c9bb06c67ad9796826e81898c7b636063665c646369")])
def test_the_images_of_the_set_are_those_of_format_1(index, expected):
    assert demo_images.FORMAT == 1
    expected = np.frombuffer(bytes.fromhex(expected), np.uint8).reshape(8, 8)
    assert np.abs(thumbnail(draw(index, 64)) - expected).max() <= 2


# ------------------------------------------------------------------------------------- clips

@pytest.fixture(scope="module")
def states():
    """{name: (300, 48) or (300,)}"""
    each = [motion(index, 48) for index in range(300)]
    return {name: np.array([state[name] for state in each]) for name in each[0]}


def test_a_clip_depends_on_seed_and_index_alone():
    clip = np.stack([*draw_clip(7, 6, 48, seed=3)])
    assert clip.shape == (6, 48, 48, 3) and clip.dtype == np.uint8
    other = np.stack([*draw_clip(8, 6, 48, seed=3)])
    assert np.array_equal(np.stack([*draw_clip(7, 6, 48, seed=3)]), clip) and not np.array_equal(clip, other)
    assert not np.array_equal(clip, np.stack([*draw_clip(7, 6, 48, seed=4)]))


def test_in_the_air_the_owl_moves_as_a_ball_does(states):
    x, y, vx, vy = (states[name] for name in ("x", "y", "vx", "vy"))
    flying = ~states["landed"][:, 1:] & (vy[:, :-1] != 0)
    assert flying.mean() > 0.6
    assert np.abs(y[:, 1:] - y[:, :-1] - vy[:, :-1] - 0.01)[flying].max() < 1e-6
    assert np.abs(vy[:, 1:] - vy[:, :-1] - 0.02)[flying].max() < 1e-6
    free = flying & ~states["bounced"][:, 1:]
    assert np.abs(x[:, 1:] - x[:, :-1] - vx[:, :-1])[free].max() < 1e-6 and (vx[:, 1:] == vx[:, :-1])[free].all()


def test_the_sides_turn_the_velocity_around_and_lose_nothing_of_it(states):
    vx, bounced = states["vx"], states["bounced"][:, 1:] & ~states["landed"][:, 1:]
    assert bounced.sum() > 100 and np.array_equal(vx[:, 1:][bounced], -vx[:, :-1][bounced])
    reach = np.abs(states["x"]).max(axis=1)
    assert reach.max() < 0.9 and np.median(reach) > 0.6         # inside the image, and far from its middle


def test_every_hop_ends_where_it_began_and_four_of_five_are_repeated(states):
    perch, repeated = states["y"].max(axis=1), []
    for clip in range(300):
        landings, vy = np.nonzero(states["landed"][clip])[0], states["vy"][clip]
        assert np.abs(states["y"][clip, landings] - perch[clip]).max(initial=0) < 1e-6
        starts = np.nonzero((vy < 0) & (states["y"][clip] > perch[clip] - 1e-6))[0]
        repeated += [one == other for one, other in zip(vy[starts], vy[starts][1:])]
    # One in nine of the new hops is as high as the one before by chance. Three standard deviations are 0.045.
    assert len(repeated) > 700 and abs(np.mean(repeated) - (4 / 5 + 1 / 45)) < 0.05


def test_the_owl_moves_by_two_to_four_percent_of_the_side_per_frame_and_seldom_rests(states):
    moved = np.hypot(np.diff(states["x"]), np.diff(states["y"])) / 2
    assert 0.02 < np.median(moved) < 0.04 and moved.max() < 0.09
    assert 0.05 < (moved == 0).mean() < 0.25


def test_clips_start_at_random_moments(states):
    first = {name: states[name][:, 0] for name in ("x", "vy", "tilt", "lids")}
    assert 0.04 < (first["vy"] == 0).mean() < 0.2 and 0.3 < (first["vy"] < 0).mean() < 0.6
    assert first["x"].std() > 0.25 and first["tilt"].std() > 0.1 and 0.1 < (first["lids"] > 0).mean() < 0.4


def test_blinks_close_and_open_within_five_frames(states):
    for lids in states["lids"]:
        closed = "".join({0: "0", 0.5: "h", 1: "1"}[value] for value in lids.tolist()).strip("h1")
        assert closed.replace("h111h", "").strip("0") == ""
    assert (states["lids"] == 1).mean() > 0.05


def test_the_state_names_the_place_of_the_owl_in_the_image():
    plain = [index for index in range(60) if factors(index)["pattern"] == "plain"][:4]
    for index in plain:
        clip, state = np.stack([*draw_clip(index, 30, 96)]).astype(np.float32), motion(index, 30)
        rows, columns = (((state[name] + 1) * 48).astype(int) for name in ("y", "x"))
        on_breast = clip[range(30), rows, columns]
        assert np.abs(on_breast - on_breast[0]).max() < 12               # the breast has one colour
        assert np.abs(clip[:, rows[0], columns[0]] - on_breast[0]).max() > 40


def test_nothing_but_the_owl_changes_in_a_clip():
    clip, state = np.stack([*draw_clip(5, 20, 64)]), motion(5, 20)
    axis = (np.arange(64) + 0.5) / 32 - 1
    far = (np.abs(axis - state["x"][:, None])[:, None] > 0.75) | (np.abs(axis - state["y"][:, None])[..., None] > 0.9)
    first = np.argmax(far, axis=0)                    # a frame that shows the background at this pixel
    background = np.take_along_axis(clip, first[None, ..., None], 0)
    assert far.mean() > 0.2 and (clip == background)[far].all()


def test_a_frame_does_not_show_the_velocity(monkeypatch):
    frames = posed(monkeypatch, vx=[0.05, -0.05, 0.0], vy=[0.1, -0.1, 0.0])
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])


def test_a_blink_hides_the_pupils(monkeypatch):
    open_eyes, half, closed = (len(pupils(frame)[0]) for frame in posed(monkeypatch, lids=[0.0, 0.5, 1.0]))
    assert open_eyes > half > closed == 0 and open_eyes > 20


def test_the_head_tilts_clockwise_and_the_face_turns_to_the_right(monkeypatch):
    tilted = posed(monkeypatch, tilt=[0.0, 0.4])
    (rows, columns), middle = pupils(tilted[1]), np.median(pupils(tilted[0])[1])
    assert rows[columns > middle].mean() > rows[columns < middle].mean() + 2
    turned = posed(monkeypatch, turn=[-1.0, 0.0, 1.0])
    assert np.all(np.diff([pupils(frame)[1].mean() for frame in turned]) > 1)


def test_the_wings_open_with_the_height(monkeypatch):
    heights = [0.45, 0.3, 0.0]
    owls = posed(monkeypatch, y=heights)
    for part in ("draw_owl", "draw_tail"):
        monkeypatch.setattr(demo_images, part, lambda scene: None)
    columns = (np.abs(owls - posed(monkeypatch, y=heights)).max(axis=(1, 3)) > 40).sum(axis=1)
    assert np.all(np.diff(columns) > 4)


def test_the_owl_fits_its_window(monkeypatch):
    changes = {"y": [-0.1, 0.45], "tilt": [0.45, -0.45], "turn": [1.0, -1.0]}
    for index in range(6):
        cut = posed(monkeypatch, index=index, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(owls, "OWL_WINDOW", 9)
            assert np.abs(posed(monkeypatch, index=index, **changes) - cut).max() <= 1


# ------------------------------------------------------------------------------------- the folder

def test_the_set_loads_with_image_folder_and_contains_what_draw_returns(tmp_path):
    loaded = ImageFolder(make(tmp_path / "set", count=40, size=32, seed=5))
    assert len(loaded) == 40 and set(loaded.classes) == set(owls.SKIES)
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
    monkeypatch.setattr(demo_images, "print", lambda line, flush=False: waiting.set(), raising=False)
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


def stop_after_frames(count, monkeypatch):
    """Makes drawing of clips fail after `count` frames; returns the list of (clip, frame) drawn."""
    drawn = []

    def draw_or_stop(index, *arguments):
        for number, image in enumerate(draw_clip(index, *arguments)):
            if len(drawn) == count:
                raise RuntimeError("stopped by the test")
            drawn.append((index, number))
            yield image

    monkeypatch.setattr(demo_images, "draw_clip", draw_or_stop)
    return drawn


def test_clips_are_folders_of_numbered_frames_beside_the_states(tmp_path):
    folder = make_clips(tmp_path / "set", count=3, frames=5, size=32, seed=2)
    names = [f"clip_{clip:05d}/frame_{frame:03d}.jpg" for clip in range(3) for frame in range(5)]
    assert sorted(images_in(folder)) == names
    with np.load(folder / "states.npz", allow_pickle=False) as states:
        for clip in range(3):
            for name, expected in motion(clip, 5, 2).items():
                assert np.array_equal(states[name][clip], expected), name
            assert states["sky"][clip] == factors(clip, 2)["sky"] and states["hue"][clip] == factors(clip, 2)["hue"]
            for frame, image in enumerate(draw_clip(clip, 5, 32, 2)):
                saved = Image.open(folder / f"clip_{clip:05d}" / f"frame_{frame:03d}.jpg")
                assert np.abs(np.asarray(saved, np.float32) - image).mean() < 4


def test_clips_are_drawn_once(tmp_path, monkeypatch):
    folder = make_clips(tmp_path / "set", count=2, frames=3, size=16)
    before = times_in(folder), (folder / "states.npz").stat().st_mtime_ns
    stop_after_frames(0, monkeypatch)
    assert make_clips(folder, count=2, frames=3, size=16) == folder
    assert (times_in(folder), (folder / "states.npz").stat().st_mtime_ns) == before


def test_an_interrupted_drawing_of_clips_continues_with_the_unfinished_clip(tmp_path, monkeypatch):
    stop_after_frames(7, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make_clips(tmp_path / "set", count=4, frames=3, size=16)
    half = times_in(tmp_path / "set")
    drawn = stop_after_frames(1000, monkeypatch)
    make_clips(tmp_path / "set", count=4, frames=3, size=16)
    whole = times_in(tmp_path / "set")
    assert len(half) == 7 and len(whole) == 12 and sorted({clip for clip, _ in drawn}) == [2, 3]
    assert all(whole[name] == half[name] for name in half if "clip_00002" not in name)


def test_a_lost_file_of_states_is_written_again_without_drawing(tmp_path, monkeypatch):
    folder = make_clips(tmp_path / "set", count=2, frames=3, size=16)
    before = (folder / "states.npz").read_bytes()
    (folder / "states.npz").unlink()
    stop_after_frames(0, monkeypatch)
    make_clips(folder, count=2, frames=3, size=16)
    assert (folder / "states.npz").read_bytes() == before


@pytest.mark.parametrize("change", [{"count": 2}, {"frames": 3}, {"frames": 5}, {"size": 24}, {"seed": 1}])
def test_other_values_replace_the_clips(tmp_path, change):
    values = {"count": 3, "frames": 4, "size": 16, "seed": 0}
    folder = make_clips(tmp_path / "set", **values)
    make_clips(folder, **values | change)
    fresh = make_clips(tmp_path / "fresh", **values | change)
    assert images_in(folder) == images_in(fresh)
    assert {path.name: path.is_dir() or path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.is_dir() or path.read_bytes() for path in fresh.iterdir()}      # no empty folder, new states


def test_clips_replace_images_and_images_replace_clips(tmp_path):
    folder = make_clips(make(tmp_path / "set", count=5, size=16), count=2, frames=3, size=16)
    assert {path.parent.name for path in folder.glob("*/*")} == {"clip_00000", "clip_00001"}
    make(folder, count=5, size=16)
    assert images_in(folder) == images_in(make(tmp_path / "fresh", count=5, size=16))
    assert not (folder / "states.npz").exists() and not list(folder.glob("clip_*"))


# ------------------------------------------------------------------------------------- bad input and command line

def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    assert demo_images.main([str(tmp_path), "--count", "2"]) == 2
    assert f"{tmp_path}: contains other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("flags, words", [
    (["set", "--count", "0"], "--count 0 is invalid"), (["set", "--size", "5000"], "16 to 1024"),
    (["set", "--seed", "-1"], "--seed -1 is invalid"), (["file/set"], "file"),
    (["set", "--clips", "0"], "--clips 0 is invalid"), (["set", "--clips", "9", "--frames", "2"], "3 to 1000"),
    (["set", "--frames", "9"], "add --clips"), (["set", "--clips", "9", "--count", "9"], "not allowed with")])
def test_bad_input_is_one_line_and_status_2(tmp_path, flags, words, capsys):
    (tmp_path / "file").write_text("")
    assert demo_images.main([str(tmp_path / flags[0]), *flags[1:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message and not (tmp_path / "set").exists()


def test_the_command_draws_the_set(tmp_path, capsys):
    assert demo_images.main([str(tmp_path / "set"), "--count", "3", "--size", "16"]) == 0
    assert len(images_in(tmp_path / "set")) == 3 and "3 images" in capsys.readouterr().out


def test_the_command_draws_clips(tmp_path, capsys):
    assert demo_images.main([str(tmp_path / "set"), "--clips", "2", "--frames", "3", "--size", "16"]) == 0
    out = capsys.readouterr().out
    assert len(images_in(tmp_path / "set")) == 6 and "2 clips of 3 frames of 16 x 16" in out
    assert out.startswith(f"drawing the demo set in {tmp_path / 'set'}\n")
