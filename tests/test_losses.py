import math

import pytest
import torch

import losses
from model_definitions import Discriminator


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def linear_critic(w):
    return lambda image: (image * w).flatten(1).sum(1)


# ------------------------------------------------------------------------------------- penalty

def test_penalty_of_a_linear_critic_is_closed_form(rng):
    w = torch.randn(3, 8, 8, generator=rng)
    norm = losses.gradient_norm(linear_critic(w), torch.randn(5, 3, 8, 8, generator=rng))
    torch.testing.assert_close(norm, torch.full((5,), w.norm().item()))
    torch.testing.assert_close(losses.gradient_penalty(norm), (w.norm() - 1) ** 2)


def test_penalty_of_a_quadratic_critic_is_the_mean_over_samples(rng):
    x = torch.randn(4, 1, 6, 6, generator=rng)
    norm = losses.gradient_norm(lambda image: image.square().flatten(1).sum(1) / 2, x)      # its gradient is x itself
    expected = [(x[i].norm().item() - 1) ** 2 for i in range(4)]
    assert losses.gradient_penalty(norm).item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert losses.gradient_penalty(norm, count=8).item() == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert losses.gradient_penalty(norm[:0], count=1) == 0


def test_penalty_has_a_finite_gradient_where_the_critic_is_flat():
    w = torch.zeros(3, 8, 8, requires_grad=True)
    losses.gradient_penalty(losses.gradient_norm(linear_critic(w), torch.ones(2, 3, 8, 8))).backward()
    assert torch.isfinite(w.grad).all()


def test_penalty_gradients_equal_those_of_autograd_grad(rng):
    critic = Discriminator(32, width=8, width_max=32)
    x_hat = (torch.rand(3, 3, 32, 32, generator=rng) * 2 - 1).requires_grad_()
    weights = list(critic.parameters())[:-1]                        # the last bias does not enter the gradient
    ours = torch.autograd.grad(losses.gradient_penalty(losses.gradient_norm(critic, x_hat)), weights,
                               materialize_grads=True)
    gradient, = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()
    theirs = torch.autograd.grad(penalty, weights, materialize_grads=True)
    assert any(gradient.abs().max() > 0 for gradient in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_x_hat_lies_between_real_and_fake_with_one_e_per_sample():
    real, fake = torch.full((3, 1, 2, 2), 10.0), torch.zeros(3, 1, 2, 2)
    x_hat = losses.interpolate(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert x_hat.flatten(1).tolist() == [[0.0] * 4, [2.5] * 4, [10.0] * 4]


# ------------------------------------------------------------------------------------- both losses

def test_critic_loss_of_known_scores():
    loss = losses.critic_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0]), lambda_drift=0.1)
    assert loss.item() == pytest.approx(-0.5 - 2 + 0.1 * (5 + 0.5) / 2)


def test_generator_loss_of_known_terms_at_64_and_128_pixels():
    """LAMBDA_REC and LAMBDA_KL count once at 3 x 64 x 64 and twice at 3 x 128 x 128."""
    for elements, factor in ((12288, 1), (4 * 12288, 2), (4096, math.sqrt(1 / 3))):
        loss = losses.generator_loss(torch.tensor([2.0, 4.0]), torch.tensor(0.1), torch.tensor(30.0), elements, 100.0,
                                     12.0)
        assert loss.item() == pytest.approx(-3 + factor * (10 + 12 * 30 / elements))


def test_kl_agrees_with_torch_distributions(rng):
    mu, logvar = torch.randn(6, 10, generator=rng), torch.randn(6, 10, generator=rng)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(losses.kl_divergence(mu, logvar), expected)
    assert losses.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_reconstruction_is_the_mean_absolute_error_over_all_elements():
    image, target = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.0, 0.5]]]])
    assert losses.reconstruction_loss(image, target).item() == pytest.approx((1 + 1.5) / 2)


def test_flow_matching_loss_of_a_known_velocity(rng):
    code, noise, t = torch.randn(5, 3, generator=rng), torch.randn(5, 3, generator=rng), torch.rand(5, generator=rng)
    expected = sum(((1 - t[i]) * noise[i] + t[i] * code[i] + t[i] - (code[i] - noise[i])).square().sum()
                   for i in range(5)) / 15
    found = losses.flow_matching_loss(lambda x, t: x + t[:, None], code, noise, t)
    torch.testing.assert_close(found, expected)
    assert losses.flow_matching_loss(lambda x, t: code - noise, code, noise, t) == 0


# ------------------------------------------------------------------------------------- video

def test_motion_weighted_error_counts_what_moves_more():
    target = torch.zeros(1, 3, 2, 2)
    others = torch.zeros(1, 9, 2, 2)
    others[:, :, 0, 0] = 0.5                          # the mean of the four frames there is 3/8, so the weight is 4
    weights = torch.tensor([[4.0, 1], [1, 1]]) / (7 / 4)
    for row, column in ((0, 0), (1, 0)):
        image = target.clone()
        image[:, :, row, column] = 0.1
        error = losses.motion_weighted_error(image, target, others)
        torch.testing.assert_close(error, 0.1 * weights[row, column] / 4)


def test_motion_weighted_error_of_a_still_clip_is_the_mean_absolute_error(rng):
    image, target = torch.rand(2, 2, 3, 4, 4, generator=rng)
    error = losses.motion_weighted_error(image, target, target.repeat(1, 5, 1, 1))
    torch.testing.assert_close(error, losses.reconstruction_loss(image, target))
