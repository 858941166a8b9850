"""The whole system learns, on a small set with a few hundred steps at 32 px."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import command_line
import data
import metrics
import run_state
import training_step

STEPS = 300
# With seeds 0, 1 and 2 the reconstruction error after 300 steps was 0.11 of its value at the start, the sliced
# Wasserstein distance 0.54. A model that does not train stays at 1.
RECONSTRUCTION_SHARE = 0.3
DISTANCE_SHARE = 0.75


@pytest.fixture
def discs(tmp_path):
    """64 images of a soft disc of a warm colour on a blue background that becomes lighter downwards."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    (tmp_path / "discs").mkdir()
    for i in range(64):
        (row, column), radius = rng.uniform(10, 22, 2), rng.uniform(6, 9)
        inside = 1 / (1 + np.exp(np.hypot(rows - row, columns - column) - radius))[..., None]
        colour, ground = rng.uniform(150, 250, 3) * [1, 0.6, 0.2], [30, 50, 110] * (0.6 + 0.8 * rows[..., None] / 32)
        image = (inside * colour + (1 - inside) * ground).clip(0, 255)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "discs" / f"{i:02d}.png")
    return tmp_path / "discs"


@pytest.mark.slow
def test_training_brings_reconstructions_and_samples_close_to_the_data(discs, tmp_path):
    c, _ = command_line.parse_constants([*SMALL, "--data", str(discs), "--batch-size", "16", "--width-max", "64",
                                         "--latent-dim", "32", "--gp-every", "4", "--num-frames", "16"])
    image_set = data.load_images(discs, 32, 3, tmp_path / "cache", workers=0, progress=False)
    state = run_state.new_state(c, torch.device("cpu"))
    real = data.to_image(data.read_batch(image_set, image_set.train))
    z = torch.randn(64, c.LATENT_DIM, generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def errors():
        reconstruction = (state.ema.reconstruct(real) - real).abs().mean().item()
        return reconstruction, metrics.sliced_wasserstein(state.ema(z), real)[1]

    reconstruction_before, distance_before = errors()
    for _ in range(STEPS):
        training_step.training_step(state, c, image_set)
    reconstruction, distance = errors()
    assert reconstruction < RECONSTRUCTION_SHARE * reconstruction_before
    assert distance < DISTANCE_SHARE * distance_before
