"""Each benchmark runs from end to end at a size that takes seconds; what it prints is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *flags):
    """Exit status, standard output and error of a script in a process of its own, from another folder."""
    done = subprocess.run([sys.executable, FOLDER / script, *flags], capture_output=True, text=True, cwd="/",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def class_folder(image_folder):
    image_folder(8, name="set/one")
    return os.path.dirname(image_folder(8, name="set/two", seed=1))


def test_step_compares_losses_and_prints_ratio_and_parts():
    status, out, error = run("step.py", "--repeats", "1", *SMALL)
    assert status == 0, error
    for words in ("same losses: critic_loss", "ratio", "GFLOP/s", "critic scores", "the layer takes"):
        assert words in out


def test_step_counts_what_a_whole_step_counts():
    sys.path.insert(0, str(FOLDER))
    import step
    import torch

    import command_line
    import training_step

    c, _ = command_line.parse_constants(SMALL)
    state = training_step.new_state(c, torch.device("cpu"))
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02)
    images = step.random_images(c, 16)
    parts = sum(calls * step.count(function) for function, calls in step.parts(state, c, images).values())
    whole = step.count(lambda: training_step.training_step(state, c, images))
    assert parts == pytest.approx(whole, rel=0.02)


def test_loader_prints_a_row_a_comparison(class_folder):
    status, out, error = run("loader.py", "--data", class_folder, "--image-size", "32", "--repeats", "1", "--large",
                             "1", "--workers", "0")
    assert status == 0, error
    for words in ("first pass, DIR", "first pass, photos", "warm batches", "warm over a step"):
        assert words in out


@pytest.mark.slow
def test_scaling_says_the_exponents():
    status, out, error = run("scaling.py", "--only", "NUM_FRAMES", "--steps", "1", "--", *SMALL[:-6])
    assert status == 0, error
    assert "exponent" in out and "linearly" in out


@pytest.mark.parametrize("script,flags", [("step.py", ("--image-size", "33")), ("loader.py", ("--data", "/nowhere")),
                                          ("scaling.py", ("--only", "NOTHING")),
                                          ("quality.py", ("--data", "/nowhere"))])
def test_bad_input_gives_one_line_and_status_2(script, flags):
    status, _, error = run(script, *flags)
    assert status == 2 and len(error.strip().splitlines()) == 1 and script in error


@pytest.mark.slow
def test_quality_trains_both_sides_scores_them_and_goes_on_from_its_results(image_folder, tmp_path):
    sys.path.insert(0, str(FOLDER))
    import evaluate

    images = image_folder(40, name="set")
    flags = ("--data", str(images), "--minutes", "0.02", "--count", "36", "--out", str(tmp_path / "out"), "--",
             *SMALL[2:], "--patch", "16")
    status, out, error = run("quality.py", *flags)
    if evaluate.find_extractor("cpu") is None:
        assert status == 2 and "requirements-weights.txt" in error
        return
    assert status == 0, error
    assert "set, seed 0: DCGAN" in out and "of DCGAN's, median of 1 seed" in out
    assert (tmp_path / "out" / "set_seed0.png").is_file()
    status, again, error = run("quality.py", *flags)
    assert status == 0 and "seed 0:" not in again, error
    assert again.splitlines()[-5:] == out.splitlines()[-5:]
    status, _, error = run("quality.py", *flags[:3], "1", *flags[4:])
    assert status == 2 and "holds trainings of 0.02 minutes" in error


def test_feedback_compares_four_windows_at_two_places(image_folder, tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(FOLDER))
    import feedback

    import training

    monkeypatch.setattr(feedback, "PLACES", (12, 30))
    monkeypatch.setattr(feedback, "REACH", 4)
    assert training.main(["--data", str(image_folder(8)), "--runs-dir", str(tmp_path / "runs"), "--steps", "1",
                          *SMALL]) == 0
    capsys.readouterr()
    assert feedback.main([str(tmp_path / "runs" / "photos")]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1].strip(), row[2].strip(), row[3].strip()) for row in rows] == [
        (head, window, place) for head in ("trained", "random") for window in ("walk", "feedback", "frozen", "fixed")
        for place in ("12", "30")]
    assert all(float(row[5]) > 0 for row in rows)
    assert all(row[4].split("(")[1].strip(" )") in {f"{row[4].split()[0]} to {row[4].split()[0]}"} for row in rows
               if row[2].strip() == "fixed")
    assert feedback.main([str(tmp_path / "none")]) == 2
