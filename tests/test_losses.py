import math

import pytest
import torch
from torch import nn

import losses
import model_definitions


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def linear_critic(w):
    return lambda image: (image * w).flatten(1).sum(1)


def test_penalty_of_a_linear_critic_is_closed_form(g):
    w = torch.randn(3, 8, 8, generator=g)
    norm = losses.gradient_norm(linear_critic(w), torch.randn(5, 3, 8, 8, generator=g))
    torch.testing.assert_close(norm, torch.full((5,), w.norm().item()))
    torch.testing.assert_close(losses.gradient_penalty(norm), (w.norm() - 1) ** 2)


def test_penalty_of_a_quadratic_critic_is_the_mean_over_samples(g):
    x = torch.randn(4, 1, 6, 6, generator=g)
    norm = losses.gradient_norm(lambda image: image.square().flatten(1).sum(1) / 2, x)      # gradient is x itself
    want = [(x[i].norm().item() - 1) ** 2 for i in range(4)]
    assert losses.gradient_penalty(norm).item() == pytest.approx(sum(want) / 4, rel=1e-5)


def test_penalty_has_a_finite_gradient_where_the_critic_is_flat():
    w = torch.zeros(3, 8, 8, requires_grad=True)
    losses.gradient_penalty(losses.gradient_norm(linear_critic(w), torch.ones(2, 3, 8, 8))).backward()
    assert torch.isfinite(w.grad).all()


def test_penalty_and_its_weight_gradients_equal_the_textbook_form(g):
    critic = model_definitions.Discriminator(32, 3, 8, 32)
    x_hat = torch.rand(3, 3, 32, 32, generator=g) * 2 - 1
    losses.gradient_penalty(losses.gradient_norm(critic, x_hat)).backward()
    ours = [p.grad.clone() for p in critic.parameters() if p.grad is not None]

    critic.zero_grad()
    x = x_hat.clone().requires_grad_()
    gradient, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean().backward()
    theirs = [p.grad for p in critic.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_x_hat_lies_between_real_and_fake_with_one_e_a_sample():
    real, fake = torch.full((3, 1, 2, 2), 10.0), torch.zeros(3, 1, 2, 2)
    x_hat = losses.interpolate(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert x_hat.flatten(1).tolist() == [[0.0] * 4, [2.5] * 4, [10.0] * 4]


def test_critic_loss_is_the_sum_of_its_terms_by_hand():
    loss = losses.critic_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0]), torch.tensor(0.5), 10.0, 0.1)
    # fake mean -0.5, real mean 2, penalty 10 * 0.5, drift 0.1 * (5 + 0.5) / 2
    assert loss.item() == pytest.approx(-0.5 - 2 + 5 + 0.275)


def test_kl_agrees_with_torch_distributions(g):
    mu, logvar = torch.randn(6, 10, generator=g), torch.randn(6, 10, generator=g)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(losses.kl_divergence(mu, logvar), want)
    assert losses.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_reconstruction_is_the_mean_absolute_error_over_all_elements():
    image, target = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.0, 0.5]]]])
    assert losses.reconstruction_loss(image, target).item() == pytest.approx((1 + 1.5) / 2)


def test_generator_loss_by_hand():
    loss = losses.generator_loss(torch.tensor([2.0, 4.0]), torch.tensor(0.1), torch.tensor(30.0), 300, 100.0, 12.0)
    assert loss.item() == pytest.approx(-3 + 100 * 0.1 + 12 * 30 / 300)


def test_size_factor_is_one_at_64_and_two_at_128():
    assert losses.size_factor(3, 64, 64) == 1
    assert losses.size_factor(3, 128, 128) == 2
    assert losses.size_factor(1, 64, 64) == pytest.approx(math.sqrt(1 / 3))


def test_one_critic_step_raises_the_gap_and_one_generator_step_raises_the_fake_score(g):
    torch.manual_seed(0)
    critic = model_definitions.Discriminator(32, 3, 8, 32)
    real, z = torch.rand(8, 3, 32, 32, generator=g) * 2 - 1, torch.randn(8, 16, generator=g)
    generate = nn.Sequential(nn.Linear(16, 3 * 32 * 32), nn.Tanh(), nn.Unflatten(1, (3, 32, 32)))

    def gap():
        return (critic(real).mean() - critic(generate(z)).mean()).item()

    before, optimizer = gap(), torch.optim.SGD(critic.parameters(), lr=1e-3)
    losses.critic_loss(critic(real), critic(generate(z).detach()), torch.zeros(()), 0.0, 0.0).backward()
    optimizer.step()
    assert gap() > before

    before, optimizer = critic(generate(z)).mean().item(), torch.optim.SGD(generate.parameters(), lr=1e-3)
    losses.generator_loss(critic(generate(z)), torch.zeros(()), torch.zeros(()), 1, 0.0, 0.0).backward()
    optimizer.step()
    assert critic(generate(z)).mean().item() > before
