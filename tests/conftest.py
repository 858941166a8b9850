"""Fixtures and helpers that several test files share."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import data
import training

torch.set_num_threads(1)       # the tensors are small: a second thread would mostly wait
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs, and their children, ignore it

# Flags of a run with steps of some hundredths of a second.
SMALL = ["--image-size", "32", "--batch-size", "4", "--width", "8", "--encoder-width", "4", "--width-max", "32",
         "--latent-dim", "16", "--transformer-dim", "24", "--transformer-layers", "2", "--patch", "8",
         "--num-frames", "4", "--sample-count", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2",
         "--gp-every", "2"]


def draw_images(folder, count, size=40, seed=0):
    """Writes `count` different PNG files, each with two flat colours and a slanted border; returns the folder."""
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    rows, columns = np.mgrid[:size, :size]
    for number in range(count):
        one, other = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        side = columns + rng.normal() * rows > rng.uniform(0, size)
        image = Image.fromarray(np.where(side[..., None], one, other))
        image.putpixel((0, 0), (number % 256, number // 256, 0))      # so that no two images are equal
        image.save(os.path.join(folder, f"{number:04d}.png"))
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(count, size=40, name="photos") draws a folder of `count` images and returns its path."""
    def draw(count, size=40, name="photos", seed=0):
        return draw_images(str(tmp_path / name), count, size, seed)
    return draw


@pytest.fixture
def photos(image_folder):
    return image_folder(12)


@pytest.fixture
def run(photos, tmp_path):
    """run(*flags) trains on the photos in tmp_path/runs and returns the exit status."""
    def start(*flags, images=photos):
        return training.main(["--data", str(images), "--runs-dir", str(tmp_path / "runs"), *SMALL, *flags])
    return start


def lines(tmp_path, name="photos"):
    """Returns the lines of a run's log."""
    return [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def error_line(capsys):
    """Returns what training.py wrote to stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("training.py: "), text
    return text


def around_step(monkeypatch, before):
    """Calls before(state) before each training step."""
    one_step = training.training_step

    def step(state, c, image_set):
        before(state)
        return one_step(state, c, image_set)
    monkeypatch.setattr(training, "training_step", step)


def poison(monkeypatch, at):
    """Makes the critic return NaN in each step for which at(step, rollbacks) is true."""
    one_step = training.training_step

    def step(state, c, image_set):
        if not at(state.counters["step"], state.counters["rollbacks"]):
            return one_step(state, c, image_set)
        weight = next(state.critic.parameters())
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        values = one_step(state, c, image_set)
        weight.data.copy_(kept)
        return values
    monkeypatch.setattr(training, "training_step", step)


def use_float64(setattr):
    """Makes new networks, random draws and images float64, for comparisons that float32 rounding would hide."""
    to_image = data.to_image
    torch.set_default_dtype(torch.float64)
    setattr(data, "to_image", lambda pixels: to_image(pixels).double())


@pytest.fixture
def float64(monkeypatch):
    use_float64(monkeypatch.setattr)
    yield
    torch.set_default_dtype(torch.float32)
