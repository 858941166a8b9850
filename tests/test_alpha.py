"""Compares the measurements of benchmarks/alpha.py with closed forms."""

import sys
from pathlib import Path

import numpy as np
import torch
from conftest import SMALL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import alpha

import checkpoints
import command_line
import model_definitions


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_interventions_keep_the_mean_that_they_name():
    own = random(4, 1, 8, 8) * 8 + 1
    found = alpha.interventions(own, 3.0)
    torch.testing.assert_close(found["its mean"].mean((2, 3)), own.mean((2, 3)))
    assert found["its mean"].std((2, 3)).max() < 1e-6 and found["the mean of all"].std() < 1e-6
    assert torch.equal(found["another's"][1], own[0]) and found["ALPHA_INIT"].unique().item() == 3


def test_matched_removes_contrast_and_brightness():
    target = random(3, 3, 8, 8)
    torch.testing.assert_close(alpha.matched(target * 0.3 - 2, target), target)
    slope, offset = np.polyfit(target[0].square().flatten().numpy(), target[0].flatten().numpy(), 1)
    expected = target[:1].square() * slope + offset
    torch.testing.assert_close(alpha.matched(target[:1].square(), target[:1]), expected, atol=1e-5, rtol=1e-5)


def test_edges_and_contrast_of_a_ramp_and_of_a_step():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    assert alpha.edges(ramp)[0, 1:-1, 1:-1].unique().tolist() == [8]
    torch.testing.assert_close(alpha.local_contrast(ramp)[0, 5, 5], torch.tensor(2.0))    # of -3..3: sqrt(28 / 7)
    step = (torch.arange(16) >= 8).float().expand(1, 3, 16, 16)
    assert (alpha.edges(step)[0, 8] > 0).nonzero().flatten().tolist() == [7, 8]
    assert alpha.local_contrast(torch.full((1, 3, 16, 16), 0.3)).max() < 1e-3


def test_correlation_is_pearsons_in_each_image():
    a, b = random(3, 8, 8), random(3, 8, 8).flip(0)
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.numpy(), b.numpy())]
    torch.testing.assert_close(alpha.correlation(a, b), torch.tensor(expected, dtype=torch.float32))


def test_the_critics_gradient_is_each_images_own():
    torch.manual_seed(0)
    critic, image = model_definitions.Discriminator(32, 3, 8, 32), random(2, 3, 32, 32)
    leaf = image[:1].clone().requires_grad_()
    gradient, = torch.autograd.grad(critic(leaf).sum(), leaf)
    torch.testing.assert_close(alpha.critic_gradient(critic, image)[0], gradient[0].square().sum(0).sqrt())


def test_a_checkpoint_gives_both_tables(tmp_path, capsys):
    c, _ = command_line.parse_constants(SMALL)
    generator, critic = model_definitions.build(c)
    checkpoints.save_as(tmp_path / "a.pt", {"constants": vars(c), "counters": {"step": 0},
                                            "ema": generator.state_dict(), "critic": critic.state_dict()})
    alpha.start([str(tmp_path / "a.pt"), "--count", "8"])
    out = capsys.readouterr().out
    assert "| its own | 0.000 | 0.000 |" in out and "| the critic's gradient |" in out
