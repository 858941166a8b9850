"""Fixtures that several test files share. Tests draw their own images."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import training

torch.set_num_threads(1)       # the tensors here are small: two threads would mostly wait for one another
signal.signal(signal.SIGINT, signal.default_int_handler)    # or children would ignore it where a shell ran us behind &

# Flags of a run that takes a fraction of a second a step.
SMALL = ["--image-size", "32", "--batch-size", "4", "--width", "8", "--encoder-width", "4", "--width-max", "32",
         "--latent-dim", "16", "--transformer-dim", "24", "--transformer-layers", "2", "--patch", "8",
         "--sample-count", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2", "--gp-every", "2"]


def draw_images(folder, count, size=40, seed=0):
    """Writes `count` small PNGs, all different, each two flat colours with a slanted border; returns the folder."""
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    rows, columns = np.mgrid[:size, :size]
    for number in range(count):
        one, other = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        side = columns + rng.normal() * rows > rng.uniform(0, size)
        picture = Image.fromarray(np.where(side[..., None], one, other))
        picture.putpixel((0, 0), (number % 256, number // 256, 0))    # no two are equal
        picture.save(os.path.join(folder, f"{number:04d}.png"))
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
    """The lines of a run's log."""
    return [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch, at):
    """A step whose number `at(step, rollbacks)` holds for has a critic that sees NaN."""
    one_step = training.training_step

    def step(state, c, images):
        if at(state.counters["step"], state.counters["rollbacks"]):
            weight = next(state.critic.parameters())
            kept = weight.detach().clone()
            weight.data.fill_(float("nan"))
            values = one_step(state, c, images)
            weight.data.copy_(kept)
            return values
        return one_step(state, c, images)
    monkeypatch.setattr(training, "training_step", step)
