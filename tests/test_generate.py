import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_images
from PIL import Image

import checkpoints
import command_line
import data
import generate
import latent_space
import model_definitions
import pictures
import random_keys
from model_definitions import Window

PRETRAINED = Path(generate.__file__).parent / "pretrained" / "avatars64.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with random weights, a random head for alpha, principal axes and two samples."""
    folder = tmp_path_factory.mktemp("generate")
    photos = draw_images(str(folder / "photos"), 8)
    c, _ = command_line.parse_constants(["--data", photos, "--runs-dir", str(folder / "runs"), *SMALL])
    torch.manual_seed(0)
    generator, _ = model_definitions.build(c)
    torch.nn.init.normal_(generator.layer.to_s.weight, std=0.2)
    mu = latent_space.encode_sample(generator.vae, data.load_images_of_run(photos, c))
    weights = generator.state_dict()
    checkpoints.save(folder / "run" / "checkpoints", {
        "constants": vars(c), "counters": {"step": 2, "images_seen": 8}, "ema": weights,
        "axes": latent_space.principal_axes(mu),
        "generator": {name: torch.zeros_like(weight) for name, weight in weights.items()}}, step=2)
    for step in (0, 2):
        sheet = np.full((40, 40, 3), 100 + step, np.uint8)
        pictures.save_picture(folder / "run" / "samples" / f"step_{step:08d}_generated.png", sheet)
    return folder / "run"


@pytest.fixture(scope="module")
def photos(run):
    return run.parent / "photos"


@pytest.fixture
def generator(run):
    return model_definitions.Generator.from_file(run)


@pytest.fixture
def make(run, tmp_path):
    """make(*flags) makes them from the run, or from `source`, in tmp_path."""
    def start(*flags, source=run):
        assert generate.main([str(source), "--out", str(tmp_path), *map(str, flags)]) == 0
    return start


def read(file):
    return np.asarray(Image.open(file)).astype(int)


def frames_of(folder):
    return [read(file) for file in sorted(folder.iterdir())]


# ------------------------------------------------------------------------------------- images

def test_images_and_a_grid_are_written(make, tmp_path, capsys):
    make("--images", 5, "--seed", 1)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"seed1_0000{i}.png" for i in range(5)] + ["seed1_grid.png"]
    assert (read(tmp_path / "seed1_grid.png")[:32, :32] == read(tmp_path / "seed1_00000.png")).all()
    assert str(tmp_path / "seed1_grid.png") in capsys.readouterr().out


def test_one_seed_is_one_image_at_any_count(make, tmp_path):
    for count, seed, name in ((3, 1, "few"), (20, 1, "many"), (3, 2, "many")):
        make("--images", count, "--seed", seed, "--out", tmp_path / name)
    few, many, other = ([read(tmp_path / name / f"seed{seed}_{i:05d}.png") for i in range(3)]
                        for name, seed in (("few", 1), ("many", 1), ("many", 2)))      # one folder, two seeds
    assert np.abs(np.subtract(few, many)).max() <= 1 < np.abs(np.subtract(few, other)).max()


def test_seeds_are_the_first_images_of_these_seeds(make, tmp_path):
    make("--seeds", "1-3,42", "--out", tmp_path / "seeds")
    for seed in (1, 2, 3, 42):
        make("--images", 1, "--seed", seed, "--out", tmp_path / "one")
    names = sorted(f.name for f in (tmp_path / "seeds").iterdir())
    assert names == [*(f"seed{seed}_00000.png" for seed in (1, 2, 3, 42)), "seeds_grid.png"]
    for name in names[:-1]:
        assert np.abs(read(tmp_path / "seeds" / name) - read(tmp_path / "one" / name)).max() <= 1


def test_truncation_is_a_factor_of_the_noise(make, tmp_path):
    make("--images", 2, "--truncation", 0.5, source=PRETRAINED)
    generator, z = model_definitions.Generator.from_file(PRETRAINED), latent_space.draw_z(0, 0, 2, 128)
    with torch.no_grad():
        whole, half = (data.to_arrays(generator(factor * z)).astype(int) for factor in (1, 0.5))
    made = np.stack([read(tmp_path / f"seed0_{i:05d}.png") for i in range(2)])
    assert np.abs(made - half).max() <= 1 < np.abs(whole - half).max()


def test_images_come_from_the_averaged_generator(make, run, tmp_path):
    make("--images", 1, source=next((run / "checkpoints").iterdir()))
    assert read(tmp_path / "seed0_00000.png").std() > 5                      # the weights of "generator" are all zero


def test_a_loaded_generator_is_in_evaluation_mode_without_gradients(generator):
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())


def test_the_pretrained_model_makes_distinct_and_smooth_images(make, tmp_path):
    assert PRETRAINED.stat().st_size <= 8e6
    make("--images", 16, "--directions", 2, source=PRETRAINED)
    made = np.stack([read(tmp_path / f"seed0_{i:05d}.png") for i in range(16)])
    assert made.shape == (16, 64, 64, 3) and made.std(axis=0).mean() > 30
    assert max(np.abs(np.diff(made, axis=axis)).mean() for axis in (1, 2)) < 0.4 * made.std()


def test_the_pretrained_file_holds_half_precision_weights_their_source_and_no_paths():
    saved = torch.load(PRETRAINED, weights_only=True)
    assert all(w.dtype == torch.float16 for w in saved["ema"].values() if w.is_floating_point())
    assert "Pablo Stanley" in saved["about"]["text"] and saved["counters"]["step"] > 0
    assert not {"generator", "critic"} & set(saved) and "/" not in saved["constants"]["DATA"]


# ------------------------------------------------------------------------------------- videos

def test_a_walk_shows_its_points_in_latent_space(make, generator, tmp_path, capsys):
    make("--video", tmp_path / "v", "--seconds", 1, "--fps", 10)
    assert "change from frame to frame" in capsys.readouterr().out
    expected = list(generate.render(generator, latent_space.walk(latent_space.draw_z(0, 0, 6, 16), 10)))
    assert np.abs(np.subtract(frames_of(tmp_path / "v"), expected)).max() <= 1


@pytest.mark.parametrize("mode, flag, count", [("walk", "--no-loop", 10), ("progress", "--loop", 2)])
def test_each_mode_writes_its_frames(make, tmp_path, mode, flag, count):
    make("--video", tmp_path / "v", "--mode", mode, "--seconds", 1, "--fps", 10, flag)
    frames = frames_of(tmp_path / "v")
    assert len(frames) == count and (frames[0] != frames[-1]).any()


def test_keyframes_pass_through_the_photos(make, photos, tmp_path):
    make("--video", tmp_path / "v", "--mode", "keyframes", "--seconds", 2, "--fps", 8, "--photos", photos,
         "--reconstruct", photos)
    frames = frames_of(tmp_path / "v")
    assert len(frames) == 16
    for i in range(8):
        made = read(tmp_path / f"reconstructed_{i:03d}_{i:04d}.png")
        assert np.abs(frames[2 * i] - made).max() <= 1


def test_the_synthetic_video_is_the_layers_input_and_output(make, generator, tmp_path):
    make("--video", tmp_path / "v", "--mode", "synthetic", "--seed", 3)
    x = generator.vae.decode(latent_space.draw_z(3, 0, 4, 16))
    frames = generator.layer.video(x, generator.layer.video.draw(random_keys.torch_generator(3, "generate", 0)))
    last = frames.clamp(0, 1).chunk(4, dim=1)[-1]
    _, _, _, made = frames_of(tmp_path / "v")
    for image, left in ((2 * last - 1, 0), (generator.layer(last), made.shape[1] // 2)):
        shown = data.to_arrays(image)[0].astype(int)
        found = [np.abs(made[22:54, column:column + 32] - shown).max() for column in range(left, made.shape[1] - 32)]
        assert min(found) <= 1


@pytest.mark.parametrize("mode", ["walk", "roll"])
def test_frames_are_computed_when_they_are_asked_for(make, run, clips_run, monkeypatch, mode):
    """Memory of a long video does not grow with its length."""
    decoded, decode = [], model_definitions.VAE.decode
    monkeypatch.setattr(model_definitions.VAE, "decode", lambda vae, z: decoded.extend(z) or decode(vae, z))
    monkeypatch.setattr(pictures, "save_video", lambda file, frames, fps, loop: next(iter(frames)))
    make("--video", "v", "--mode", mode, "--seconds", 100, source=run if mode == "walk" else clips_run)
    assert 0 < len(decoded) <= 32


# ------------------------------------------------------------------------------------- videos of a model of clips

def rolled(run, window, count):
    """Returns the frames after a window, uint8 (count, B, H, W, C)."""
    generator = model_definitions.Generator.from_file(run)
    with torch.no_grad():
        return [data.to_arrays(image) for image, _ in itertools.islice(generator.roll(window), count)]


def motion_codes(seed, count):
    return torch.stack([torch.randn(6, generator=random_keys.torch_generator(seed, "motion", i)) for i in range(count)])


def test_a_roll_starts_from_noise_and_the_motion_seed_changes_its_course(make, clips_run, tmp_path):
    for name, seeds in (("a", (3, None)), ("b", (3, 3)), ("c", (3, 4))):
        flags = [] if seeds[1] is None else ["--motion-seed", seeds[1]]
        make("--video", tmp_path / name, "--mode", "roll", "--seconds", 1, "--fps", 5, "--seed", seeds[0], *flags,
             source=clips_run)
    one, same, other = (frames_of(tmp_path / name) for name in "abc")
    expected = rolled(clips_run, Window.still(latent_space.draw_z(3, 0, 1, 16), motion_codes(3, 1), 3), 5)
    assert np.abs(np.subtract(one, np.concatenate(expected))).max() <= 1
    assert np.array_equal(one, same) and (np.array(one) != other).any()


def test_a_roll_starts_from_photos_in_a_grid(make, clips_run, photos, tmp_path):
    files = [photos / "0000.png", photos / "0001.png"]
    make("--video", tmp_path / "v", "--mode", "roll", "--seconds", 1, "--fps", 3, "--grid", "3x1", "--photos", *files,
         source=clips_run)
    frames = frames_of(tmp_path / "v")
    assert len(frames) == 3 and frames[0].shape == (32, 3 * 34 - 2, 3)
    generator = model_definitions.Generator.from_file(clips_run)
    z = latent_space.encode(generator.vae, [data.read_photo(str(file), 32, 3) for file in files])[[0, 1, 0]]
    for frame, expected in zip(frames, rolled(clips_run, Window.still(z, motion_codes(0, 3), 3), 3)):
        assert np.abs(frame[:, 34:66] - expected[1].astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["folder", "gif", "mp4"])
def test_a_roll_continues_a_clip(make, clips_run, tmp_path, kind):
    """The last three frames are the window; frames are in natural order, 2 before 10."""
    levels, clip = range(20, 240, 20), tmp_path / "clip"
    if kind == "folder":
        for number, level in enumerate(levels):
            pictures.save_picture(clip / f"{number}.png", np.full((40, 40, 3), level, np.uint8))
    else:
        clip = clip.with_suffix("." + kind)
        if kind == "mp4":
            pytest.importorskip("av")
        pictures.save_video(clip, [np.full((40, 40, 3), level, np.uint8) for level in levels], 10)
    make("--video", tmp_path / "v", "--mode", "roll", "--seconds", 1, "--fps", 2, "--clip", clip, source=clips_run)
    generator = model_definitions.Generator.from_file(clips_run)
    codes = latent_space.encode(generator.vae, [np.full((32, 32, 3), level, np.uint8) for level in levels[-3:][::-1]])
    expected = rolled(clips_run, Window(codes[None], motion_codes(0, 1), codes[-1:]), 2)
    error = np.abs(np.subtract(frames_of(tmp_path / "v"), np.concatenate(expected)))
    assert len(error) == 2 and error.max() <= (1 if kind != "mp4" else 9)


def test_a_short_clip_repeats_its_oldest_frame(clips_run, tmp_path):
    for number in range(2):
        pictures.save_picture(tmp_path / "clip" / f"{number}.png", np.full((32, 32, 3), 50 * number, np.uint8))
    window = []
    generator, c, saved = model_definitions.load_generator(clips_run)
    generator.roll = lambda given: window.append(given) or iter(())
    flags = generate.parse([str(clips_run), "--video", "v", "--mode", "roll", "--clip", str(tmp_path / "clip")])
    flags.learned_motion = model_definitions.learned_motion(saved)
    assert list(generate.rolled_frames(generator, c, flags)[0]) == []
    newest, first, repeated = window[0].codes[0]
    assert torch.equal(first, repeated) and torch.equal(first, window[0].anchor[0]) and not torch.equal(newest, first)


@pytest.mark.parametrize("flags, words", [
    (["--clip", "{tmp}/none"], "no such file"), (["--clip", "{tmp}/none.mp4"], "no such file"),
    (["--clip", "{tmp}/empty"], "no images in it"), (["--clip", "{photo}"], "no clip: must be a folder of frames"),
    (["--clip", "{tmp}/empty", "--photos", "{photo}"], "must be one of them"),
    (["--grid", "1x2", "--photos", "{photo}", "{photo}", "{photo}"], "3 starts for 2 videos"),
    (["--grid", "0x3"], "columns x rows, such as 4x3"), (["--motion-seed", "-1"], "--motion-seed -1 is invalid")])
def test_a_roll_without_a_start_is_one_line(clips_run, photos, tmp_path, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(tmp=tmp_path, photo=photos / "0000.png") for flag in flags]
    assert generate.main([str(clips_run), "--video", str(tmp_path / "v"), "--mode", "roll", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not (tmp_path / "v").exists()


def test_only_a_model_that_has_learned_motion_rolls(run, clips_run, tmp_path, capsys):
    assert generate.main([str(run), "--video", str(tmp_path / "v"), "--mode", "roll"]) == 2
    assert "was trained on still images: must be a run of training.py --folders clips" in capsys.readouterr().err
    saved = checkpoints.load(clips_run / "checkpoints" / "step_00000002.pt")
    checkpoints.save_as(tmp_path / "early.pt", saved | {"counters": {"step": 1, "images_seen": 999}})
    assert generate.main([str(tmp_path / "early.pt"), "--video", str(tmp_path / "v"), "--mode", "roll"]) == 2
    assert "has not learned motion yet, it is in stage 1" in capsys.readouterr().err
    assert generate.main([str(run), "--video", str(tmp_path / "v"), "--clip", "c"]) == 2
    assert "--clip is only for --video with --mode roll" in capsys.readouterr().err


def test_motion_of_known_frames():
    def motion_of(levels, loop):
        motion = generate.Motion()
        frames = [np.full((4, 4, 3), level, np.uint8) for level in levels]
        assert len(list(motion.watch(frames, loop))) == len(frames)
        return motion
    motion = motion_of([10, 20, 30, 60], loop=False)
    assert motion.changes == [10, 10, 30] and motion.flicker == [0, 10]
    motion = motion_of([10, 20, 30, 60], loop=True)
    assert motion.changes == [10, 10, 30, 50] and motion.flicker == [0, 10, 40, 30]
    assert "mean 25.00, spread 16.58, largest 50.00 (change 4)" in motion.line()
    assert "no motion" in motion_of([10], loop=True).line() and motion_of([10, 20], loop=True).changes == [10]


# ------------------------------------------------------------------------------------- photos, directions, alpha

def test_photos_are_reconstructed_by_the_encoder(make, photos, tmp_path, capsys):
    make("--reconstruct", photos / "0002.png", photos, "--format", "webp")
    assert "photos: 9, mean error" in capsys.readouterr().out
    assert len(list(tmp_path.glob("reconstructed_0*.webp"))) == 9
    assert Image.open(tmp_path / "reconstructed.webp").size == (8 * 34 - 2, 2 * 2 * (32 + 22))


def test_interpolation_begins_and_ends_at_the_photos(make, photos, tmp_path):
    files = [photos / f"000{i}.png" for i in (0, 1)]
    make("--interpolate", *files, "--reconstruct", *files)
    strip = read(tmp_path / "interpolation.png")[22:]
    assert strip.shape == (32, 2 * (32 + 8) + 9 * 34 - 2, 3)
    for left, name in ((40, "reconstructed_000_0000.png"), (40 + 8 * 34, "reconstructed_001_0001.png")):
        assert np.abs(strip[:, left:left + 32] - read(tmp_path / name)).max() <= 1


def test_a_direction_at_strength_0_is_the_photo_and_moves_it_otherwise(make, photos, tmp_path, capsys):
    a, b = (draw_images(str(tmp_path / name), 4, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    make("--direction", a, b, "--photos", photos / "0003.png", "--reconstruct", photos / "0003.png")
    sheet, made = read(tmp_path / "direction.png")[-32:], read(tmp_path / "reconstructed_000_0003.png")
    left = pictures.stack([sheet[:, :32]], ["photo"]).shape[1] + pictures.SPACE
    column = {strength: sheet[:, left + 34 * i:][:, :32] for i, strength in enumerate(generate.EDITS)}
    assert np.abs(column[0] - made).max() <= 1 < np.abs(column[1.5] - made).max()
    assert "the direction has length" in capsys.readouterr().out


def without_axes(run, file, **constants):
    """Writes the run's checkpoint without its principal axes, and with other constants."""
    saved = checkpoints.find(run)[1]
    del saved["axes"]
    saved["constants"].update(constants)
    checkpoints.save_as(file, saved)
    return file


def test_principal_axes_are_shown_at_their_strengths_stored_or_computed_again(make, run, tmp_path, capsys):
    sheets = []
    for source in (run, without_axes(run, tmp_path / "bare.pt")):
        make("--directions", 3, source=source)
        sheets.append(read(tmp_path / "directions.png"))
    assert "axes explain" in capsys.readouterr().out
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    assert sheets[0].shape[0] == 3 * (22 + 32) and (sheets[0][-32:, :32] != sheets[0][-32:, 6 * 34:][:, :32]).any()


def test_a_row_of_directions_moves_along_its_axis_only(make, run, monkeypatch):
    axes = checkpoints.find(run)[1]["axes"]
    rendered, blank = [], np.zeros((14, 4, 4, 3), np.uint8)
    monkeypatch.setattr(generate, "render", lambda generator, z: rendered.extend(z) or blank)
    make("--directions", 2)
    second_row = (torch.stack(rendered)[7:] - axes["mean"]) @ axes["axes"].T / axes["deviations"]
    torch.testing.assert_close(second_row[:, 1], torch.tensor(generate.STRENGTHS).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second_row[1:, [0, 2, 3]], second_row[:-1, [0, 2, 3]], atol=1e-4, rtol=1e-4)


def test_without_axes_and_without_images_directions_are_refused(run, tmp_path, capsys):
    bare = without_axes(run, tmp_path / "bare.pt", DATA=str(tmp_path / "gone"))
    assert generate.main([str(bare), "--directions", "2", "--out", str(tmp_path)]) == 2
    assert "gone" in capsys.readouterr().err


def test_alpha_maps_are_beside_their_images(make, tmp_path, capsys):
    make("--alpha-maps", 4, "--images", 4)
    grid, sheet = read(tmp_path / "seed0_grid.png"), read(tmp_path / "seed0_alpha_maps.png")[22:]
    assert np.abs(sheet[:66, :66] - grid).max() <= 1 and sheet.shape[1] > 2 * 66
    assert "alpha: mean" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv,words", [
    (["{run}"], "nothing to do"), (["{run}", "--images", "0"], "--images"), (["{run}", "--video", "a.avi"], ".gif"),
    (["{tmp}/none", "--images", "1"], "no such run"), (["{tmp}", "--images", "1"], "no checkpoint"),
    (["{run}", "--images", "1", "--seeds", "1"], "must be one of them"),
    (["{run}", "--images", "1", "--truncation", "0"], "--truncation"),
    (["{run}", "--seeds", "3-1"], "3-1 is invalid: must be seeds or ranges"),
    (["{run}", "--seeds", "1,-2"], "is invalid: must be seeds or ranges"),
    (["{run}", "--seeds", "0-100000"], "at most 100,000"),
    (["{run}", "--images", "1", "--seed", "-1"], "--seed -1 is invalid: must be 0 or more"),
    (["{run}", "--video", "a.gif", "--fps", "99"], "99 frames per second is invalid for a.gif: must be 1 to 50"),
    (["{run}", "--images", "1", "--out", "{tmp}/file/out"], "{tmp}/file"),
    (["{run}", "--video", "{tmp}/file/a.gif"], "{tmp}/file"),
    (["{run}", "--video", "{tmp}"], "exists already"),
    (["{run}", "--video", "{tmp}/a.gif", "--mode", "keyframes"], "--photos"),
    (["{run}", "--video", "{tmp}/a.gif", "--mode", "keyframes", "--photos", "{photos}/0000.png"], "two or more"),
    (["{checkpoint}", "--video", "{tmp}/a.gif", "--mode", "progress"], "samples"),
    (["{run}", "--reconstruct", "{tmp}/file"], "file: "),
    (["{run}", "--reconstruct", "{tmp}/none.jpg"], "no such file"),
    (["{run}", "--interpolate", "{photos}", "{photos}"], "must be two"),
    (["{run}", "--direction", "{tmp}/none", "{tmp}/none"], "does not exist"),
    (["{run}", "--direction", "{photos}", "{photos}"], "the same mean"),
    (["{run}", "--directions", "99"], "must be at most 8"),
    (["{run}", "--video", "{tmp}/a.gif", "--keyframes", "1"], "2 or more"),
    (["{run}", "--images", "1", "--photos", "{photos}/0000.png"], "--photos is only for"),
    (["{run}", "--images", "1", "--device", "tpu"], "tpu")])
def test_bad_input_is_one_line_and_status_2(run, photos, tmp_path, capsys, argv, words):
    (tmp_path / "file").write_text("a file where a folder or a photo should be")
    names = {"run": run, "tmp": tmp_path, "photos": photos, "checkpoint": next((run / "checkpoints").iterdir())}
    assert generate.main([a.format(**names) for a in argv]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("generate.py: ") and words.format(**names) in text, text
    assert [file.name for file in tmp_path.iterdir()] == ["file"]                # no partial file remains


def test_without_pyav_an_mp4_is_refused_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)                        # importing it raises ImportError then
    assert generate.main([str(run), "--video", str(tmp_path / "a.mp4")]) == 2
    assert "pip install av" in capsys.readouterr().err
