import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_images
from PIL import Image, ImageSequence

import checkpoints
import generate
import latent_space
import model_definitions
import pictures
import training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on drawn images."""
    folder = tmp_path_factory.mktemp("generate")
    images = draw_images(str(folder / "photos"), 8)
    assert training.main(["--data", images, "--runs-dir", str(folder / "runs"), "--steps", "2", *SMALL]) == 0
    return folder / "runs" / "photos"


def load(run):
    return model_definitions.from_checkpoint(checkpoints.find(run)[1], torch.device("cpu"))


def read(file):
    return np.asarray(Image.open(file)).astype(int)


def test_images_and_a_grid_are_written(trained, tmp_path, capsys):
    assert generate.main([str(trained), "--images", "5", "--seed", "1", "--out", str(tmp_path)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"0000{i}.png" for i in range(5)] + ["grid.png"]
    assert read(tmp_path / "00000.png").shape == (32, 32, 3)
    assert str(tmp_path / "grid.png") in capsys.readouterr().out


def test_one_seed_is_one_picture_at_any_count_and_batch_size(trained, tmp_path):
    for count in (3, 20):
        generate.main([str(trained), "--images", str(count), "--seed", "1", "--out", str(tmp_path / str(count))])
    generate.main([str(trained), "--images", "3", "--seed", "2", "--out", str(tmp_path / "other")])
    for i in range(3):
        name = f"{i:05d}.png"
        assert np.abs(read(tmp_path / "3" / name) - read(tmp_path / "20" / name)).max() <= 1
        assert np.abs(read(tmp_path / "3" / name) - read(tmp_path / "other" / name)).max() > 1
    generator, c = load(trained)
    z = latent_space.draw_z(1, 0, 5, c.LATENT_DIM)
    one, five = (np.stack(list(generate.render(generator, z, size))).astype(int) for size in (1, 5))
    assert np.abs(one - five).max() <= 1


def test_a_single_checkpoint_file_does_too(trained, tmp_path):
    file = next((trained / "checkpoints").iterdir())
    assert generate.main([str(file), "--images", "1", "--out", str(tmp_path)]) == 0


def test_samples_come_from_the_averaged_generator(trained):
    generator, _ = load(trained)
    saved = torch.load(next((trained / "checkpoints").iterdir()), weights_only=True)
    name = "vae.from_z.weight"
    assert torch.equal(generator.state_dict()[name], saved["ema"][name])
    assert not torch.equal(saved["ema"][name], saved["generator"][name])


# ------------------------------------------------------------------------------------- videos

def frames_of(file):
    """All frames of a video as arrays."""
    if file.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(file)) as container:
            return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    if file.is_dir():
        return [read(part) for part in sorted(file.iterdir())]
    with Image.open(file) as video:
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(video)]


@pytest.mark.parametrize("name", ["walk.mp4", "walk.gif", "walk.webp", "walk"])
def test_a_walk_is_the_same_in_every_kind_of_file(trained, tmp_path, name, capsys):
    assert generate.main([str(trained), "--video", str(tmp_path / name), "--seconds", "1", "--fps", "10"]) == 0
    assert "change from frame to frame" in capsys.readouterr().out
    frames = frames_of(tmp_path / name)
    generator, c = load(trained)
    keyframes = latent_space.draw_z(0, 0, 6, c.LATENT_DIM)
    expected = list(generate.render(generator, latent_space.walk(keyframes, 10)))
    assert len(frames) == 10 and all(f.shape == (32, 32, 3) for f in frames)
    lost = 25 if name == "walk.mp4" else 8             # an mp4 halves the resolution of colour, and these are noise
    assert np.abs(np.stack(frames) - np.stack(expected)).mean() < lost


@pytest.mark.parametrize("mode, flags, count", [
    ("keyframes", ["--photos", "{photos}/0000.png", "{photos}/0001.png"], 10),
    ("keyframes", ["--photos", "{photos}"], 10),
    ("feedback", [], 10), ("feedback", ["--no-loop"], 10), ("walk", ["--no-loop"], 10), ("synthetic", [], 16),
    ("progress", [], 2)])
def test_each_mode_writes_its_frames(trained, tmp_path, mode, flags, count):
    flags = [flag.format(photos=trained.parents[1] / "photos") for flag in flags]
    assert generate.main([str(trained), "--video", str(tmp_path / "v"), "--mode", mode, "--seconds", "1", "--fps", "10",
                          *flags]) == 0
    frames = frames_of(tmp_path / "v")
    assert len(frames) == count and any((frames[0] != frame).any() for frame in frames[1:])


def test_keyframes_pass_through_the_photos(trained, tmp_path):
    photos = trained.parents[1] / "photos"
    generate.main([str(trained), "--video", str(tmp_path / "v"), "--mode", "keyframes", "--seconds", "1", "--fps", "8",
                   "--photos", str(photos / "0000.png"), str(photos / "0001.png")])
    generate.main([str(trained), "--reconstruct", str(photos / "0001.png"), "--out", str(tmp_path)])
    made = read(tmp_path / "reconstructed_000_0001.png")
    assert np.abs(frames_of(tmp_path / "v")[4] - made).max() <= 1


def test_feedback_sees_the_pictures_before_and_a_frozen_window_does_not(trained):
    generator, c = load(trained)
    torch.nn.init.normal_(generator.layer.to_s.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    z = latent_space.walk(latent_space.draw_z(0, 0, 3, c.LATENT_DIM), 6)
    seen, alpha = [], generator.layer.alpha
    generator.layer.alpha = lambda x, video: seen.append(video) or alpha(x, video)
    images = [image for image, _ in generate.feedback(generator, z)]
    for frame, window in enumerate(seen):
        parts = window.chunk(c.NUM_FRAMES - 1, dim=1)
        for age, part in enumerate(parts):
            if age < frame:
                torch.testing.assert_close(part, (1 + images[frame - 1 - age]) / 2)
            else:
                torch.testing.assert_close(part, generator.layer.displayed(generator.vae.decode(z[:1])))
    frozen = [image for image, _ in generate.feedback(generator, z, frozen=True)]
    assert torch.equal(frozen[0], images[0]) and not torch.allclose(frozen[-1], images[-1], atol=1e-4)
    assert all(torch.equal(window, seen[0]) for window in seen[6:])


def test_the_layer_in_a_feedback_video_stays_within_its_bounds_for_a_thousand_frames(trained):
    """With random head weights too: alpha can't leave its bounds, and no picture turns grey or black for good."""
    generator, c = load(trained)
    torch.nn.init.normal_(generator.layer.to_s.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    z = latent_space.draw_z(0, 0, 2, c.LATENT_DIM)[[0] * 500 + [1] * 500]
    for image, alpha in generate.feedback(generator, z):
        assert alpha.min() >= 0.999 and alpha.max() <= 9.001 and torch.isfinite(image).all()
    assert image.std() > 0.05


def motion_of(frames, loop):
    motion = generate.Motion()
    assert len(list(motion.watch(frames, loop))) == len(frames)
    return motion


def test_motion_of_known_frames():
    steps = [np.full((4, 4, 3), level, np.uint8) for level in (10, 20, 30, 60)]
    motion = motion_of(steps, loop=False)
    assert motion.changes == [10, 10, 30] and motion.flicker == [0, 10]
    motion = motion_of(steps, loop=True)
    assert motion.changes == [10, 10, 30, 50] and motion.flicker == [0, 10, 40, 30]
    assert "mean 25.00, spread 16.58, largest 50.00 (change 4)" in motion.line()
    assert "no motion" in motion_of(steps[:1], loop=True).line()
    assert motion_of(steps[:2], loop=True).changes == [10]


# ------------------------------------------------------------------------------------- photos, directions, alpha

def test_photos_are_reconstructed_by_the_encoder(trained, tmp_path, capsys):
    photos = trained.parents[1] / "photos"
    assert generate.main([str(trained), "--reconstruct", str(photos / "0002.png"), str(photos), "--format", "webp",
                          "--out", str(tmp_path)]) == 0
    assert "9 photos, mean error" in capsys.readouterr().out
    assert len(list(tmp_path.glob("reconstructed_0*.webp"))) == 9
    assert Image.open(tmp_path / "reconstructed.webp").size == (8 * 34 - 2, 2 * 2 * (32 + 22))


def test_interpolation_begins_and_ends_at_the_photos(trained, tmp_path):
    photos = trained.parents[1] / "photos"
    files = [str(photos / f"000{i}.png") for i in (0, 1)]
    assert generate.main([str(trained), "--interpolate", *files, "--reconstruct", *files, "--out", str(tmp_path)]) == 0
    strip = read(tmp_path / "interpolation.png")[22:]
    assert strip.shape == (32, 2 * (32 + 8) + 9 * 34 - 2, 3)
    for left, name in ((40, "reconstructed_000_0000.png"), (40 + 8 * 34, "reconstructed_001_0001.png")):
        assert np.abs(strip[:, left:left + 32] - read(tmp_path / name)).max() <= 1


def test_a_direction_at_strength_0_is_the_photo_and_at_1_has_moved(trained, tmp_path, capsys):
    photos = trained.parents[1] / "photos"
    a, b = (draw_images(str(tmp_path / name), 4, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    assert generate.main([str(trained), "--direction", a, b, "--photos", str(photos / "0003.png"), "--reconstruct",
                          str(photos / "0003.png"), "--out", str(tmp_path)]) == 0
    sheet, made = read(tmp_path / "direction.png")[-32:], read(tmp_path / "reconstructed_000_0003.png")
    left = pictures.stack([sheet[:, :32]], ["photo"]).shape[1] + pictures.SPACE
    column = {strength: sheet[:, left + 34 * i:][:, :32] for i, strength in enumerate(generate.EDITS)}
    assert np.abs(column[0] - made).max() <= 1 < np.abs(column[1.5] - made).max()
    assert "the direction is" in capsys.readouterr().out


def test_principal_axes_are_shown_at_their_strengths(trained, tmp_path, capsys):
    assert generate.main([str(trained), "--directions", "3", "--out", str(tmp_path)]) == 0
    assert "hold" in capsys.readouterr().out
    sheet = read(tmp_path / "directions.png")
    assert sheet.shape[0] == 3 * (22 + 32) and (sheet[-32:, :32] != sheet[-32:, 6 * 34:][:, :32]).any()
    assert generate.main([str(trained), "--directions", "99", "--out", str(tmp_path)]) == 2
    assert "this run has 8" in capsys.readouterr().err


def test_without_stored_axes_they_are_made_from_the_runs_images(trained, tmp_path, capsys):
    saved = checkpoints.find(trained)[1]
    del saved["axes"]
    checkpoints.save_as(tmp_path / "bare.pt", saved)
    sheets = []
    for run in (trained, tmp_path / "bare.pt"):
        assert generate.main([str(run), "--directions", "2", "--out", str(tmp_path)]) == 0
        sheets.append(read(tmp_path / "directions.png"))
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    saved["constants"]["DATA"] = str(tmp_path / "gone")
    checkpoints.save_as(tmp_path / "bare.pt", saved)
    capsys.readouterr()
    assert generate.main([str(tmp_path / "bare.pt"), "--directions", "2", "--out", str(tmp_path)]) == 2
    assert "gone" in capsys.readouterr().err


def test_alpha_maps_stand_beside_their_pictures(trained, tmp_path, capsys):
    assert generate.main([str(trained), "--alpha-maps", "4", "--images", "4", "--out", str(tmp_path)]) == 0
    grid, sheet = read(tmp_path / "grid.png"), read(tmp_path / "alpha_maps.png")[22:]
    assert np.abs(sheet[:66, :66] - grid).max() <= 1 and sheet.shape[1] > 2 * 66
    assert "alpha: mean" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv,words", [
    (["{run}"], "nothing to do"), (["{run}", "--images", "0"], "--images"), (["{run}", "--video", "a.avi"], ".gif"),
    (["{tmp}/none", "--images", "1"], "no such run"), (["{tmp}", "--images", "1"], "no checkpoint"),
    (["{run}", "--images", "1", "--seed", "-1"], "--seed"), (["{run}", "--video", "a.gif", "--fps", "99"], "--fps"),
    (["{run}", "--images", "1", "--out", "{tmp}/file/out"], "can't be written"),
    (["{run}", "--video", "{tmp}/file/a.gif"], "can't be written"),
    (["{run}", "--video", "{tmp}"], "exists already"),
    (["{run}", "--video", "{tmp}/a.gif", "--mode", "keyframes"], "--photos"),
    (["{run}", "--video", "{tmp}/a.gif", "--mode", "keyframes", "--photos", "{photo}"], "two or more"),
    (["{run}", "--video", "{tmp}/a.gif", "--mode", "dream"], "dream"),
    (["{file}", "--video", "{tmp}/a.gif", "--mode", "progress"], "samples"),
    (["{run}", "--reconstruct", "{tmp}/file"], "file: "),
    (["{run}", "--reconstruct", "{tmp}/none.jpg"], "no such file"),
    (["{run}", "--interpolate", "{photo}"], "--interpolate"),
    (["{run}", "--direction", "{tmp}/none", "{tmp}/none"], "no such folder"),
    (["{run}", "--images", "1", "--format", "bmp"], "--format"),
    (["{run}", "--direction", "{photos}", "{photos}"], "the same mean"),
    (["{run}", "--video", "{tmp}/a.gif", "--keyframes", "1"], "2 or more"),
    (["{run}", "--images", "1", "--photos", "{photo}"], "--photos are for"),
    (["{run}", "--images", "1", "--device", "tpu"], "tpu"), ([], "RUN")])
def test_bad_input_is_one_line_and_status_2(trained, tmp_path, capsys, argv, words):
    (tmp_path / "file").write_text("a file in the way")
    names = {"run": trained, "tmp": tmp_path, "photos": trained.parents[1] / "photos",
             "photo": trained.parents[1] / "photos" / "0000.png", "file": next((trained / "checkpoints").iterdir())}
    assert generate.main([a.format(**names) for a in argv]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("generate.py: ") and words in text, text
    assert [file.name for file in tmp_path.iterdir()] == ["file"]                # nothing half-written is left


def test_without_pyav_an_mp4_is_refused_before_any_work(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)                        # importing it raises ImportError then
    assert generate.main([str(trained), "--video", str(tmp_path / "a.mp4")]) == 2
    assert "pip install av" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the model that comes along

def test_the_pretrained_model_makes_pictures_without_any_training(tmp_path, capsys):
    file = Path(generate.__file__).parent / "pretrained" / "avatars64.pt"
    assert file.stat().st_size <= 8e6
    assert generate.main([str(file), "--images", "16", "--directions", "2", "--out", str(tmp_path)]) == 0
    made = np.stack([read(tmp_path / f"{i:05d}.png") for i in range(16)])
    assert made.shape == (16, 64, 64, 3) and made.std(axis=0).mean() > 30         # 16 pictures that differ
    across, down = (np.abs(np.diff(made, axis=axis)).mean() for axis in (1, 2))
    assert max(across, down) < 0.4 * made.std()                                    # and are no noise
    saved = torch.load(file, weights_only=True)
    assert all(w.dtype == torch.float16 for w in saved["ema"].values() if w.is_floating_point())
    assert "Pablo Stanley" in saved["about"]["text"] and saved["counters"]["step"] > 0
    assert not {"generator", "critic"} & set(saved) and "/" not in saved["constants"]["DATA"]
