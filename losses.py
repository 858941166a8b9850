"""Losses: Wasserstein with gradient penalty for both sides, and the VAE's own terms.

Every function is pure: tensors in, scalar tensors out, no random draws of its own.
`critic` is any function from images (B, C, H, W) to one score an image (B,).
"""

import torch

# ------------------------------------------------------------------------------------- critic

def gradient_norm(critic, image):
    """||grad_x D(x)||_2 of each image, over all C*H*W entries: (B, C, H, W) -> (B,), differentiable once more.

    torch.func.grad gives what torch.autograd.grad(..., create_graph=True) gives, and is the form that
    torch.compile accepts. The clamp keeps the derivative of the square root finite where the gradient is 0.
    """
    gradient = torch.func.grad(lambda x: critic(x).sum())(image)
    return gradient.flatten(1).square().sum(1).clamp_min(1e-12).sqrt()


def between(real, fake, e):
    """x_hat = e * real + (1 - e) * fake, with one e in [0, 1) a sample: e (B,)."""
    return torch.lerp(fake, real, e.view(-1, 1, 1, 1))


def gradient_penalty(norm):
    """GP = mean over samples of (||grad D(x_hat)||_2 - 1)^2 (Gulrajani et al. 2017, equation 3); norm (B,)."""
    return (norm - 1).square().mean()


def score_drift(real_score, fake_score):
    """(mean D(real)^2 + mean D(fake)^2) / 2: centres the scores, which the other terms leave free to wander
    together (Karras et al. 2018, appendix A.1, here for both sides)."""
    return (real_score.square().mean() + fake_score.square().mean()) / 2


def critic_loss(real_score, fake_score, penalty, lambda_gp, lambda_drift):
    """L_D = mean D(fake) - mean D(real) + LAMBDA_GP * GP + LAMBDA_DRIFT * drift, minimised by the critic."""
    wasserstein = fake_score.mean() - real_score.mean()
    return wasserstein + lambda_gp * penalty + lambda_drift * score_drift(real_score, fake_score)


# ------------------------------------------------------------------------------------- VAE

def reconstruction_loss(image, target):
    """Mean absolute error over all elements, both in [-1, 1]: a Laplace likelihood but for its scale."""
    return (image - target).abs().mean()


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)) = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), summed over the latent
    dimensions and averaged over the batch (Kingma and Welling 2013, appendix B); mu, logvar (B, LATENT_DIM)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def size_factor(channels, height, width):
    """sqrt(C*H*W / 12288): what LAMBDA_REC and LAMBDA_KL, written for 3 x 64 x 64, are multiplied by.

    The critic's push on a picture has norm about 1 whatever the size, that of a mean absolute error
    1 / sqrt(C*H*W); so the two stay in balance at every size.
    """
    return (channels * height * width / 12288) ** 0.5


def generator_loss(fake_score, reconstruction, kl, elements, lambda_rec, lambda_kl):
    """L_G = -mean D(fake) + LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W); elements = C*H*W.

    The penalty has no part in it: once x_hat is fixed it does not depend on the generator. LAMBDA_KL / LAMBDA_REC
    is the scale b of the Laplace likelihood exp(-|image - target| / b).
    """
    return -fake_score.mean() + lambda_rec * reconstruction + lambda_kl * kl / elements
