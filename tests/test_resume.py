"""A run that was stopped and continued equals the uninterrupted run bit by bit: every tensor, every logged value."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, draw_images, lines, poison

import checkpoints
import image_cache
import training

STEPS = 9                       # of 4 images each: with 12 images an epoch has 3 steps
FLAGS = [*SMALL, "--log-every", "1"]


def train(folder, images, *flags):
    assert training.main(["--data", str(images), "--runs-dir", str(folder / "runs"), *FLAGS, *flags]) == 0


def end_of(folder, steps=STEPS):
    """Returns the last checkpoint and the log, without constants that may differ and without clock times."""
    saved = checkpoints.load(folder / "runs" / "photos" / "checkpoints" / f"step_{steps:08d}.pt")
    for name in ("RUNS_DIR", "NUM_WORKERS", "STEPS"):
        del saved["constants"][name]
    log = [{name: value for name, value in line.items() if name not in ("images_per_second", "seconds")}
           for line in lines(folder)]
    return {"checkpoint": saved, "log": log}


def assert_equal(one, other, path=""):
    """Compares nested dicts and lists of tensors and plain values exactly."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{path}[{i}]")
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(*flags) returns the images and the end of an uninterrupted run; each is trained once."""
    root, ends = tmp_path_factory.mktemp("whole"), {}
    images = draw_images(str(root / "photos"), 12)

    def get(*flags):
        if flags not in ends:
            folder = root / str(len(ends))
            train(folder, images, "--steps", str(STEPS), *flags)
            ends[flags] = end_of(folder)
        return images, ends[flags]
    return get


@pytest.mark.parametrize("step", [1, 3, 4, 8])       # 3 is the end of an epoch
def test_resuming_at_any_step_is_exact(whole, tmp_path, step):
    images, expected = whole()
    for steps in (step, STEPS):
        train(tmp_path, images, "--steps", str(steps))
    assert_equal(end_of(tmp_path), expected)


@pytest.mark.parametrize("flags", [
    ("--flip", "--micro-batch", "2"), ("--n-critic", "2", "--gp-every", "3"),
    ("--batch-size", "5", "--recompute-activations"),
    ("--final-width", "4", "--decay-from-kimg", "0.008", "--decay-to-kimg", "0.03"),
    ("--evaluate-every", "2", "--evaluate-count", "8")])
def test_resuming_is_exact_with(whole, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: None)        # scores without its features
    images, expected = whole(*flags)
    for steps in (4, STEPS):
        train(tmp_path, images, "--steps", str(steps), *flags)
    assert_equal(end_of(tmp_path), expected)


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6, 8])    # around the start of stage 2, longer unrolling, around stage 3
def test_resuming_a_run_on_clips_is_exact(whole, tmp_path, monkeypatch, step):
    monkeypatch.setattr(training.extractors, "find_extractor", lambda device: None)        # scores without its features
    flags = ("--folders", "clips", "--vae-kimg", "0.012", "--dynamics-kimg", "0.024", "--motion-batch", "4",
             "--evaluate-every", "4", "--evaluate-count", "8")
    images, expected = whole(*flags)
    assert [line["stage"] for line in expected["log"] if "stage" in line] == [1] * 3 + [2] * 3 + [3] * 3
    for steps in (step, STEPS):
        train(tmp_path, images, "--steps", str(steps), *flags)
    assert_equal(end_of(tmp_path), expected)


def test_resuming_with_other_workers_and_a_new_cache_is_exact(whole, tmp_path, monkeypatch):
    images, expected = whole()
    monkeypatch.setattr(image_cache, "POOL_FROM", 1)            # scan processes, although there are few images
    monkeypatch.setattr(image_cache, "CHUNK", 2)
    train(tmp_path, images, "--steps", "4", "--num-workers", "2")
    shutil.rmtree(tmp_path / "runs" / ".cache")
    train(tmp_path, images, "--steps", str(STEPS), "--num-workers", "1")
    assert_equal(end_of(tmp_path), expected)


def test_other_random_draws_give_another_run(whole):
    """Otherwise the comparisons of this file would show nothing."""
    with pytest.raises(AssertionError, match="generator"):
        assert_equal(whole()[1]["checkpoint"], whole("--seed", "1")[1]["checkpoint"])


def test_resuming_after_a_rollback_is_exact(whole, tmp_path, monkeypatch):
    images, _ = whole()
    flags = ("--nan-patience", "2", "--checkpoint-every", "2")
    poison(monkeypatch, lambda step, rollbacks: step in (4, 5) and rollbacks == 0)       # back from step 6 to 4
    train(tmp_path / "whole", images, "--steps", str(STEPS), *flags)
    expected = end_of(tmp_path / "whole")
    saved = expected["checkpoint"]
    assert saved["counters"]["rollbacks"] == 1 and saved["counters"]["lr_scale"] == 0.5
    assert saved["generator_optimizer"]["param_groups"][0]["lr"] == 0.5e-3
    assert [line["step"] for line in expected["log"]] == list(range(1, STEPS + 1))
    for stop in ("5", "7"):
        for steps in (stop, str(STEPS)):
            train(tmp_path / stop, images, "--steps", steps, *flags)
        assert_equal(end_of(tmp_path / stop), expected)


@pytest.mark.slow
def test_resuming_is_exact_with_12_layers_in_processes_of_their_own(whole, tmp_path):
    images, _ = whole()
    for name, stops in (("whole", ("4",)), ("parts", ("1", "4"))):
        for steps in stops:
            subprocess.run([sys.executable, Path(training.__file__), "--data", images, "--runs-dir",
                            tmp_path / name / "runs", *FLAGS, "--transformer-layers", "12", "--steps", steps],
                           check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ends = [end_of(tmp_path / name, 4) for name in ("whole", "parts")]
    assert ends[0]["checkpoint"]["constants"]["TRANSFORMER_LAYERS"] == 12
    assert_equal(*ends)
