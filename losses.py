"""Losses: Wasserstein with gradient penalty for both networks, and the VAE's own terms.

Every function is pure: tensors in, tensors out, no random draws. `critic` is any function from images (B, C, H, W) to
scores (B,). Each formula is defined here once; training_step.py applies them.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------- critic

def critic_loss(real_score: Tensor, fake_score: Tensor, lambda_drift: float) -> Tensor:
    """L_D without its penalty: mean D(fake) - mean D(real) + LAMBDA_DRIFT * drift; scores (B,)."""
    wasserstein = fake_score.mean() - real_score.mean()
    return wasserstein + lambda_drift * score_drift(real_score, fake_score)


def score_drift(real_score: Tensor, fake_score: Tensor) -> Tensor:
    """(mean D(real)^2 + mean D(fake)^2) / 2: keeps the scores centred, which no other term does (Karras et al. 2018,
    appendix A.1, penalise the real scores only)."""
    return (real_score.square().mean() + fake_score.square().mean()) / 2


def interpolate(real: Tensor, fake: Tensor, e: Tensor) -> Tensor:
    """x_hat = e * real + (1 - e) * fake; images (B, C, H, W), one e in [0, 1) per sample, (B,)."""
    return torch.lerp(fake, real, e.view(-1, 1, 1, 1))


def gradient_norm(critic: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """||grad_x D(x)||_2 of each image over all C*H*W entries: (B, C, H, W) -> (B,), differentiable with respect to the
    critic's weights. The clamp keeps the derivative of the square root finite where the gradient is 0."""
    image = image.detach().requires_grad_()
    gradient, = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    return gradient.flatten(1).square().sum(1).clamp_min(1e-12).sqrt()


def gradient_penalty(norm: Tensor, count: float | None = None) -> Tensor:
    """GP = mean over images of (||grad D(x_hat)||_2 - 1)^2 (Gulrajani et al. 2017, equation 3).

    norm (B,), possibly empty. count: the number of images that the sum is divided by, len(norm) by default.
    """
    return (norm - 1).square().sum() / (len(norm) if count is None else count)


# ------------------------------------------------------------------------------------- VAE

def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over all elements, both in [-1, 1]: the negative log-likelihood of a Laplace distribution, up
    to its scale and a constant."""
    return (image - target).abs().mean()


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), summed over the latent dimensions,
    averaged over the batch (Kingma and Welling 2013, appendix B); mu, logvar (B, LATENT_DIM)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def flow_matching_loss(velocity: Callable[[Tensor, Tensor], Tensor], code: Tensor, noise: Tensor, t: Tensor,
                       weight: Tensor | None = None) -> Tensor:
    """Mean over all elements of |velocity(x_t, t) - (code - noise)|^2, x_t = noise + t * (code - noise) (Lipman et al.
    2023, "Flow Matching for Generative Modeling", with their sigma_min 0).

    code (N, D), noise (N, D) from N(0, I), t (N,) in [0, 1], weight (N,) of each code. At its minimum, velocity carries
    N(0, I) at t = 0 to the distribution of the codes at t = 1.
    """
    change = code - noise
    error = (velocity(noise + t[:, None] * change, t) - change).square()
    return error.mean() if weight is None else (weight[:, None] * error).mean()


def prior_loss(velocity: Callable, codes: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None = None,
               weight: Tensor | None = None) -> Tensor:
    """flow_matching_loss of the prior, for codes (B, LATENT_DIM) with D draws of noise (B, D, LATENT_DIM) and of t
    (B, D) each. velocity: Prior.velocity; labels (B, K): of the codes' classes; weight (B,): of each code. No gradient
    reaches the codes."""
    def for_each_draw(tensor):
        return None if tensor is None else tensor.repeat_interleave(noise.shape[1], dim=0)

    return flow_matching_loss(functools.partial(velocity, label=for_each_draw(labels)), for_each_draw(codes.detach()),
                              noise.flatten(0, 1), t.flatten(), for_each_draw(weight))


def size_factor(elements: int) -> float:
    """sqrt(C*H*W / 12288), the factor of LAMBDA_REC and LAMBDA_KL, which are written for 3 x 64 x 64 = 12288 elements.

    The critic's gradient with respect to an image has norm about 1 at any size; the gradient of a mean absolute error
    has norm 1 / sqrt(C*H*W). The factor keeps their ratio.
    """
    return (elements / 12288) ** 0.5


def generator_loss(fake_score: Tensor, reconstruction: Tensor, kl: Tensor, elements: int, lambda_rec: float,
                   lambda_kl: float) -> Tensor:
    """L_G = -mean D(fake) + f * (LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W)), f = size_factor.

    elements = C*H*W. The penalty is not part of L_G: it does not depend on the generator once x_hat is fixed.
    LAMBDA_KL / LAMBDA_REC is the scale b of the Laplace likelihood exp(-|image - target| / b).
    """
    factor = size_factor(elements)
    return -fake_score.mean() + lambda_rec * factor * reconstruction + lambda_kl * factor * kl / elements


# ------------------------------------------------------------------------------------- video

def motion_weighted_error(image: Tensor, target: Tensor, others: Tensor) -> Tensor:
    """Mean absolute error of frames (B, C, H, W), both in [-1, 1], each pixel weighted by 1 + 8 |target - mean|, which
    is large where something moves: the plain error loses small objects. The mean is that of the clip's frames, target
    and others (B, P*C, H, W) in [-1, 1]. The weights of each frame are divided by their mean."""
    channels = target.shape[1]
    mean = torch.cat([target, others], dim=1).unflatten(1, (-1, channels)).mean(1)
    weight = 1 + 8 * (target - mean).abs().mean(1, keepdim=True)
    return (weight / weight.mean((1, 2, 3), keepdim=True) * (image - target).abs()).mean()
