"""What benchmarks/alpha.py measures, against closed forms."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import alpha

import model_definitions
import training


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_interventions_keep_the_mean_that_they_name():
    own = random(4, 1, 8, 8) * 8 + 1
    found = alpha.interventions(own, 3.0)
    assert set(found) == {"its own", "its mean", "the mean of all", "another's", "ALPHA_INIT"}
    assert all(other.shape == own.shape for other in found.values())
    torch.testing.assert_close(found["its mean"].mean((2, 3)), own.mean((2, 3)))
    assert found["its mean"].std((2, 3)).max() < 1e-6 and found["the mean of all"].std() < 1e-6
    assert torch.equal(found["another's"][1], own[0]) and found["ALPHA_INIT"].unique().item() == 3


def test_a_straight_line_is_taken_out():
    target = random(3, 3, 8, 8)
    torch.testing.assert_close(alpha.matched(target * 0.3 - 2, target), target)
    line = np.polyfit(random(1, 3, 8, 8).square().flatten().numpy(), target[:1].flatten().numpy(), 1)
    torch.testing.assert_close(alpha.matched(target[:1].square(), target[:1]), target[:1].square() * line[0] + line[1],
                               atol=1e-5, rtol=1e-5)


def test_edges_and_contrast_of_a_ramp_and_of_a_step():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    assert alpha.edges(ramp)[0, 1:-1, 1:-1].unique().tolist() == [8]
    torch.testing.assert_close(alpha.local_contrast(ramp)[0, 5, 5], torch.tensor(2.0))    # of -3..3: sqrt(28 / 7)
    step = (torch.arange(16) >= 8).float().expand(1, 3, 16, 16)
    assert (alpha.edges(step)[0, 8] > 0).nonzero().flatten().tolist() == [7, 8]
    assert alpha.local_contrast(torch.full((1, 3, 16, 16), 0.3)).max() < 1e-3


def test_correlation_is_pearsons_in_each_picture():
    a, b = random(3, 8, 8), random(3, 8, 8).flip(0)
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.numpy(), b.numpy())]
    torch.testing.assert_close(alpha.correlation(a, b), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(alpha.correlation(a, -2 * a + 1), -torch.ones(3))


def test_the_critics_gradient_is_each_pictures_own():
    critic = model_definitions.Discriminator(32, 3, 8, 32)
    image = random(2, 3, 32, 32)
    leaf = image[:1].clone().requires_grad_()
    gradient, = torch.autograd.grad(critic(leaf).sum(), leaf)
    torch.testing.assert_close(alpha.critic_gradient(critic, image)[0], gradient[0].square().sum(0).sqrt())


def test_a_run_and_a_sheet(image_folder, tmp_path, capsys):
    assert training.main(["--data", str(image_folder(8)), "--runs-dir", str(tmp_path / "runs"), "--steps", "3",
                          *SMALL]) == 0
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    assert alpha.main([str(tmp_path / "runs" / "photos"), "--count", "8", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "| its own | 0.000 | 0.000 |" in out and "| the critic's gradient |" in out and sheet.is_file()


@pytest.mark.parametrize("flags,words", [(["nowhere"], "nowhere"), (["RUN", "--count", "1"], "give 4 or more")])
def test_bad_input_gives_one_line_and_status_2(flags, words, capsys):
    assert alpha.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
