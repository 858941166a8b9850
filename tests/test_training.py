"""training.py in this process, for a few steps on a few files: what a run writes, what it refuses, how it starts."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, error_line, lines, poison
from PIL import Image

import checkpoints
import training


def newest(tmp_path, name="photos"):
    """Returns the newest checkpoint of a run."""
    return checkpoints.find(tmp_path / "runs" / name)[1]


# ------------------------------------------------------------------------------------- what a run writes

def test_a_run_writes_config_samples_log_checkpoint_and_page(run, tmp_path, capsys):
    assert run("--steps", "6") == 0
    folder, out = tmp_path / "runs" / "photos", capsys.readouterr().out
    for kind in ("real.png", "generated.png", "reconstructed.png", "alpha.png", "video.gif"):
        for step in (0, 6):
            Image.open(folder / "samples" / f"step_{step:08d}_{kind}").load()
    assert json.loads((folder / "config.json").read_text())["IMAGE_SIZE"] == 32
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert lines(tmp_path)[-1]["images_seen"] == 24
    assert {"critic_loss", "generator_loss", "score_gap", "gradient_norm", "gradient_penalty", "wasserstein",
            "reconstruction", "kl", "posterior_variance", "picture_spread", "alpha_mean", "alpha_min", "alpha_max",
            "alpha_spread", "images_per_second", "seconds", "skipped_updates"} <= lines(tmp_path)[-1].keys()
    for words in ("TRANSFORMER_IN_CHANNELS=12", "12 images to train on", "step 6 of 6"):
        assert words in out
    axes = checkpoints.load(folder / "checkpoints" / "step_00000006.pt")["axes"]       # principal axes of the codes
    assert axes["axes"].shape == (12, 16) and axes["deviations"][0] > axes["deviations"][-2] > 0
    assert (folder / "index.html").exists()


def test_the_page_is_live_until_the_run_ends(run, monkeypatch):
    pages, write = [], training.report.write
    monkeypatch.setattr(training.report, "write", lambda folder, live: pages.append(live) or write(folder, live))
    assert run("--steps", "5", "--sample-every", "2") == 0
    assert pages == [True, True, True, False]                       # steps 0, 2, 4, the end


def test_a_finished_run_says_how_to_continue(run, capsys):
    run("--steps", "1")
    assert run("--steps", "1") == 0
    assert "higher --steps" in capsys.readouterr().out


def test_minutes_ends_a_run_with_a_checkpoint(run, tmp_path, capsys, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))
    assert run("--steps", "1000000", "--minutes", "0.5") == 0
    assert "the same command continues the run" in capsys.readouterr().out
    assert 0 < newest(tmp_path)["counters"]["step"] <= 30


def test_grey_images_of_an_odd_size_train(run):
    assert run("--steps", "1", "--channels", "1", "--image-size", "48", "--patch", "12") == 0


def test_skipped_files_are_printed_and_listed_in_the_run(run, photos, tmp_path, capsys):
    (Path(photos) / "broken.jpg").write_bytes(b"no image")
    assert run("--steps", "1") == 0
    assert "broken.jpg" in capsys.readouterr().out
    assert "broken.jpg" in (tmp_path / "runs" / "photos" / "skipped.txt").read_text()


def test_without_data_the_demo_set_is_drawn_and_trained_on(tmp_path, monkeypatch, capsys):
    make = training.demo_images.make
    monkeypatch.setattr(training.demo_images, "make", lambda folder, size: make(folder, 16, size))
    assert training.main(["--runs-dir", str(tmp_path / "runs"), "--steps", "1", *SMALL]) == 0
    assert "16 images to train on" in capsys.readouterr().out
    assert newest(tmp_path, "demo")["counters"]["step"] == 1


def test_a_runs_own_samples_are_never_training_images(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    for steps in ("1", "2"):
        assert training.main(["--data", ".", "--steps", steps, *SMALL]) == 0
        assert "12 images to train on" in capsys.readouterr().out
    for folder, runs in ((".", "."), ("runs/photos", "runs")):
        assert training.main(["--data", folder, "--runs-dir", runs, "--steps", "1", *SMALL]) == 2
        assert "among the images" in error_line(capsys)


# ------------------------------------------------------------------------------------- invalid input

def test_a_missing_empty_or_unusable_folder_is_refused_and_leaves_no_run(run, tmp_path, capsys):
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no image")
    for name in ("missing", "empty", "broken"):
        assert run("--steps", "1", images=tmp_path / name) == 2
        assert name in error_line(capsys)
        assert not (tmp_path / "runs" / name).exists()


def test_a_runs_folder_that_is_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert run("--steps", "1") == 2
    assert "cannot be written (Not a directory); give another --runs-dir" in error_line(capsys)
    assert training.main(["--runs-dir", str(tmp_path / "runs"), "--steps", "1", *SMALL]) == 2      # the demo set
    assert "give another --runs-dir" in error_line(capsys)


def test_a_run_of_other_sizes_is_refused_with_both_values(run, capsys):
    run("--steps", "1")
    capsys.readouterr()
    assert run("--steps", "2", "--latent-dim", "24") == 2
    line = error_line(capsys)
    assert all(words in line for words in ("LATENT_DIM 16, not 24", "--latent-dim 16", "--run NEWNAME"))
    assert run("--steps", "2", "--alpha-per-channel") == 2
    assert "give --no-alpha-per-channel," in error_line(capsys)


def test_two_folders_of_one_name_do_not_share_a_run_unless_it_is_named(run, photos, image_folder, tmp_path, capsys):
    run("--steps", "1")
    other = image_folder(12, name="elsewhere/photos", seed=1)
    capsys.readouterr()
    assert run("--steps", "2", images=other) == 2
    line = error_line(capsys)
    assert "--run photos continues it" in line and "--run NEWNAME starts a new run" in line
    assert run("--steps", "2", "--run", "photos", images=other) == 0


def test_a_run_continues_with_its_images_in_another_place(run, photos, tmp_path, capsys):
    run("--steps", "1")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(photos, tmp_path / "elsewhere" / "photos")
    assert run("--steps", "2", images=moved) == 0
    assert f"DATA is now {moved}, was {photos}" in capsys.readouterr().out
    (Path(moved) / "0000.png").unlink()                       # the same folder with other images continues as before
    assert run("--steps", "3", images=moved) == 0
    again = shutil.move(moved, photos)
    shutil.rmtree(tmp_path / "runs" / ".cache")               # nothing to compare with
    assert run("--steps", "4", images=again) == 2
    assert "cannot be compared" in error_line(capsys)


def test_a_new_run_names_the_runs_on_the_same_images(run, photos, tmp_path, capsys):
    run("--steps", "1")
    renamed = shutil.move(photos, tmp_path / "renamed")
    capsys.readouterr()
    assert run("--steps", "1", images=renamed) == 0
    assert "photos was trained on the same images: --run photos continues it" in capsys.readouterr().out
    assert run("--steps", "2", images=renamed) == 0                     # not where there is a run to continue
    assert "same images" not in capsys.readouterr().out


def test_a_set_that_a_model_can_only_copy_and_missing_images_are_reported(run, photos, tmp_path, capsys):
    assert run("--steps", "1") == 0
    assert "warning: only 12 different images: a model" in capsys.readouterr().out
    for name in ("0003.png", "0005.png"):
        (Path(photos) / name).unlink()
    assert run("--steps", "2", "--evaluate-every", "1", "--evaluate-count", "16") == 0
    out = capsys.readouterr().out
    assert "warning: 2 images of the last start not found: 0003.png, 0005.png. Is a disk not mounted?" in out
    assert "warning: 10 images are too few, these scores are mostly chance: use 64 or more" in out
    black = tmp_path / "black"
    black.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32)).save(black / f"{number}.png")
    assert run("--steps", "1", images=black) == 0
    out = capsys.readouterr().out
    assert "warning: only 1 different image, in 20 files" in out and "not found" not in out
    assert "warning: 20 of 20 images have a single colour" in out


def test_a_constant_that_may_change_is_applied_and_printed(run, tmp_path, capsys):
    run("--steps", "1")
    assert run("--steps", "2", "--learning-rate", "0.5") == 0
    assert "LEARNING_RATE is now 0.5, was 0.001" in capsys.readouterr().out
    groups = newest(tmp_path)["generator_optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.5, 0.05]


# ------------------------------------------------------------------------------------- weights of another run

def test_a_new_run_starts_from_the_weights_of_another(run, tmp_path, capsys):
    assert run("--steps", "2") == 0
    first, folder = newest(tmp_path), tmp_path / "runs" / "photos"
    for name, source in (("from_run", folder), ("from_file", folder / "checkpoints" / "step_00000002.pt")):
        assert run("--steps", "1", "--init-from", str(source), "--run", name, "--learning-rate", "1e-12",
                   "--critic-learning-rate", "1e-12") == 0
        assert "starting from" in capsys.readouterr().out
        second = newest(tmp_path, name)
        for part, origin in (("ema", "ema"), ("generator", "ema"), ("critic", "critic")):
            torch.testing.assert_close(dict(second[part]), dict(first[origin]), atol=1e-8, rtol=0)
        assert second["counters"]["step"] == 1
    assert run("--steps", "2", "--run", name) == 0              # continues without the flag
    assert "INIT_FROM" not in capsys.readouterr().out.split("continuing")[0]


def test_a_start_from_a_file_without_critic_says_so(run, tmp_path, capsys):
    assert run("--steps", "1") == 0
    saved = newest(tmp_path)
    checkpoints.save_as(tmp_path / "weights.pt", {name: saved[name] for name in ("ema", "constants", "counters")})
    assert run("--steps", "1", "--run", "second", "--init-from", str(tmp_path / "weights.pt")) == 0
    assert "with a new critic" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(["--width", "12"], "give --width 8"),
                                          (["--init-from", "nowhere"], "nowhere"),
                                          (["--latent-dim", "8", "--patch", "16"], "give --latent-dim 16 --patch 8")])
def test_a_start_from_weights_that_do_not_fit_is_refused(run, tmp_path, capsys, flags, words):
    assert run("--steps", "1") == 0
    capsys.readouterr()
    assert run("--steps", "1", "--run", "second", "--init-from", str(tmp_path / "runs" / "photos"), *flags) == 2
    assert words in error_line(capsys)


# ------------------------------------------------------------------------------------- checkpoints, evaluation

def test_a_damaged_checkpoint_is_set_aside_and_does_not_count_as_kept(run, tmp_path, capsys):
    folder = tmp_path / "runs" / "photos" / "checkpoints"
    run("--steps", "1")
    run("--steps", "2")
    (folder / "step_00000002.pt").write_bytes(b"damaged")
    assert run("--steps", "3") == 0
    assert "step_00000002.pt" in capsys.readouterr().out
    left = sorted(file.name for file in folder.iterdir())
    assert left == ["step_00000001.pt", "step_00000002.pt.damaged", "step_00000003.pt"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_regular_checkpoint_is_written_after_a_skipped_update(device, run, monkeypatch):
    """As on CUDA too, where the loop does not read the count of skipped updates after each step."""
    if device == "cuda":
        monkeypatch.setattr(training, "must_wait", lambda state, c: state.counters["skipped_in_a_row"])
    poison(monkeypatch, at=lambda step, rollbacks: step in (1, 2))     # skipped: steps 2 and 3
    saved = []
    monkeypatch.setattr(checkpoints, "save",
                        lambda folder, state, step, sound: saved.append((step, sound)) or "a file")
    run("--steps", "5", "--checkpoint-every", "2")
    assert saved == [(0, True), (4, True), (5, True)]


def test_a_run_with_several_other_sizes_is_refused_with_the_flags_of_all(run, capsys):
    assert run("--steps", "1") == 0
    capsys.readouterr()
    assert run("--steps", "2", "--width", "16", "--no-noise-maps") == 2
    assert "give --width 8 --noise-maps, or" in error_line(capsys)


@pytest.mark.parametrize("poisoned, evaluated", [(3, []), (2, [4])])
def test_a_step_with_a_skipped_update_is_not_scored(poisoned, evaluated, run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "must_wait", lambda state, c: state.counters["skipped_in_a_row"])
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: None)
    poison(monkeypatch, at=lambda step, rollbacks: step == poisoned)
    run("--steps", "5", "--evaluate-every", "4", "--evaluate-count", "4")
    assert [line["step"] for line in lines(tmp_path) if "evaluate_sliced_wasserstein" in line] == evaluated


def test_on_cuda_the_host_waits_for_logged_lines_for_nan_patience_and_while_updates_are_skipped():
    c = SimpleNamespace(LOG_EVERY=4, NAN_PATIENCE=6)

    def waits(device, step, in_a_row=0):
        counters = {"step": step, "skipped_in_a_row": in_a_row}
        return training.must_wait(SimpleNamespace(device=torch.device(device), counters=counters), c)
    assert [step for step in range(1, 13) if waits("cuda", step)] == [4, 6, 8, 12]
    assert waits("cuda", 5, in_a_row=1) and waits("cpu", 5)


def test_a_better_score_writes_best_pt_and_a_worse_one_does_not(run, tmp_path, monkeypatch, capsys):
    scores = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: None)
    monkeypatch.setattr(training.evaluate, "scores", lambda *_: {"sliced_wasserstein": next(scores)})
    for steps in ("4", "6"):
        assert run("--steps", steps, "--evaluate-every", "2", "--evaluate-count", "4") == 0
    best = checkpoints.load(tmp_path / "runs" / "photos" / "checkpoints" / "best.pt")
    assert best["counters"]["step"] == 4 and best["counters"]["best"] == ["sliced_wasserstein", 2.0]
    found = [(line["step"], line["evaluate_sliced_wasserstein"]) for line in lines(tmp_path)
             if "evaluate_sliced_wasserstein" in line]
    assert found == [(2, 3.0), (4, 2.0), (6, 5.0)]
    assert capsys.readouterr().out.count("best so far") == 2


def test_scores_are_those_of_the_averaged_generator_with_the_same_noise(run, monkeypatch):
    calls, generate = [], training.evaluate.generate
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: None)
    monkeypatch.setattr(training.evaluate, "generate",
                        lambda *args, **more: calls.append((args, generate(*args, **more))) or calls[-1][1])
    assert run("--steps", "4", "--evaluate-every", "2", "--evaluate-count", "6") == 0
    assert [args[1:] for args, _ in calls] == [(16, 6, 0)] * 2
    assert not any(p.requires_grad for p in calls[0][0][0].parameters())           # the averaged one
    assert len(calls[0][1]) == 6 and not torch.equal(calls[0][1], calls[1][1])


def test_held_out_images_are_scored_too(run, tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: lambda images: images.flatten(1).float())
    images = image_folder(80, name="more")
    assert run("--steps", "2", "--evaluate-every", "2", "--evaluate-count", "64", images=images) == 0
    line = next(line for line in lines(tmp_path, "more") if "evaluate_kid" in line)
    assert math.isfinite(line["evaluate_overfitting"]) and line["evaluate_reconstruction_kid"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                         {"PYTHONIOENCODING": "cp1252"}])
def test_names_that_the_output_cannot_represent_stop_nothing(photos, tmp_path, environment):
    folder = tmp_path / os.fsdecode(b"bilder_\xfc \xe9\x9b\xaa")                 # not UTF-8; a Chinese character
    os.rename(photos, folder)
    (folder / os.fsdecode(b"kaputt_\xfc.jpg")).write_text("no image")
    for script, arguments in (("training", ["--data", folder, "--runs-dir", tmp_path / "runs", "--steps", "1", *SMALL]),
                              ("report", [tmp_path / "runs" / folder.name]),
                              ("evaluate", [tmp_path / "runs" / folder.name, "--data", folder, "--count", "4",
                                            "--extractor", "none"])):
        done = subprocess.run([sys.executable, Path(training.__file__).with_name(f"{script}.py"), *arguments],
                              capture_output=True, env={**os.environ, **environment}, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        assert rb"bilder_\udcfc" in done.stdout
