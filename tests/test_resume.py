"""A run that was interrupted and continued is the run that never was: equal tensor by tensor, line by line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, draw_images, poison

import checkpoints
import training

SCRIPT = Path(training.__file__)
STEPS = 9                       # of 4 pictures each: with 12 pictures to train on an epoch has 3 steps
WALL_CLOCK = ("images_per_second", "seconds")


def train(folder, images, *flags):
    return training.main(["--data", str(images), "--runs-dir", str(folder), *SMALL, "--log-every", "1", *flags])


def final(folder, images, steps=STEPS):
    """The last checkpoint and the log of a run."""
    run = Path(folder) / Path(images).name
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in log:
        for name in WALL_CLOCK:
            line.pop(name, None)           # a line of scores has none
    return checkpoints.load(run / "checkpoints" / f"step_{steps:08d}.pt"), log


def assert_equal(a, b, path=""):
    """Nested dicts and lists with tensors, all equal to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


def assert_same_run(a, b):
    (checkpoint_a, log_a), (checkpoint_b, log_b) = a, b
    for checkpoint in (checkpoint_a, checkpoint_b):                    # where a run lies and how it was started
        for name in ("RUNS_DIR", "NUM_WORKERS", "STEPS"):
            checkpoint["constants"].pop(name, None)
    assert_equal(checkpoint_a, checkpoint_b)
    assert log_a == log_b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(*flags): pictures, and the end of a run over them without a break; each made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    images = draw_images(str(folder / "photos"), 12)

    def get(*flags):
        if flags not in made:
            runs = folder / f"runs{len(made)}"
            assert train(runs, images, "--steps", str(STEPS), *flags) == 0
            made[flags] = final(runs, images)
        return images, made[flags]
    return get


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow),
                                  3, 4,        # 3: after the last batch of an epoch; 4: just after one
                                  pytest.param(8, marks=pytest.mark.slow)])
def test_going_on_from_any_step_is_exact(whole, tmp_path, step):
    images, expected = whole()
    assert train(tmp_path, images, "--steps", str(step)) == 0
    assert train(tmp_path, images, "--steps", str(STEPS)) == 0
    assert_same_run(final(tmp_path, images), expected)


@pytest.mark.parametrize("flags", [("--flip", "--micro-batch", "2"), ("--n-critic", "2", "--gp-every", "3"),
                                   pytest.param(("--batch-size", "5"), marks=pytest.mark.slow),
                                   pytest.param(("--recompute-activations",), marks=pytest.mark.slow),
                                   pytest.param(("--feedback-prob", "0.5", "--evaluate-every", "2",
                                                 "--evaluate-count", "8"), marks=pytest.mark.slow)])
def test_going_on_is_exact_with(whole, tmp_path, flags):
    images, expected = whole(*flags)
    assert train(tmp_path, images, "--steps", "4", *flags) == 0
    assert train(tmp_path, images, "--steps", str(STEPS), *flags) == 0
    assert_same_run(final(tmp_path, images), expected)


def test_going_on_with_other_workers_and_a_new_cache_is_exact(whole, tmp_path):
    images, expected = whole()
    assert train(tmp_path, images, "--steps", "4", "--num-workers", "2") == 0
    shutil.rmtree(tmp_path / ".cache")
    assert train(tmp_path, images, "--steps", str(STEPS), "--num-workers", "1") == 0
    assert_same_run(final(tmp_path, images), expected)


def test_other_random_draws_make_another_run(whole):
    """So that the comparisons above compare something."""
    _, expected = whole()
    _, other = whole("--seed", "1")
    with pytest.raises(AssertionError):
        assert_same_run(expected, other)


def test_going_on_after_a_rollback_is_exact(whole, tmp_path, monkeypatch):
    images, _ = whole()
    flags = ("--nan-patience", "2", "--checkpoint-every", "2")
    poison(monkeypatch, lambda step, rollbacks: step in (4, 5) and rollbacks == 0)       # back from 6 to 4
    assert train(tmp_path / "whole", images, "--steps", str(STEPS), *flags) == 0
    expected = final(tmp_path / "whole", images)
    assert expected[0]["counters"]["rollbacks"] == 1 and expected[0]["counters"]["lr_scale"] == 0.5
    assert expected[0]["generator_optimizer"]["param_groups"][0]["lr"] == 0.5e-3
    assert [line["step"] for line in expected[1]] == list(range(1, STEPS + 1))
    for stop in (5, 7):
        assert train(tmp_path / str(stop), images, "--steps", str(stop), *flags) == 0
        assert train(tmp_path / str(stop), images, "--steps", str(STEPS), *flags) == 0
        assert_same_run(final(tmp_path / str(stop), images), expected)


@pytest.mark.slow
def test_the_reference_depth_goes_on_exactly_in_processes_of_their_own(whole, tmp_path):
    """12 heads and 12 layers, the real script, another number of threads at the start."""
    images, _ = whole()
    small = [word for word in SMALL if word != "--transformer-layers"]
    small.remove("2")
    for name, stops in (("whole", (4,)), ("parts", (1, 4))):
        for steps in stops:
            subprocess.run([sys.executable, SCRIPT, "--data", str(images), "--runs-dir", str(tmp_path / name), *small,
                            "--log-every", "1", "--steps", str(steps)], check=True, capture_output=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    ends = [final(tmp_path / name, images, 4) for name in ("whole", "parts")]
    assert ends[0][0]["constants"]["TRANSFORMER_LAYERS"] == 12
    assert_same_run(*ends)
