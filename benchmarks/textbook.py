"""A training step written plainly from the papers, the slow twin of training_step.py.

Weights and random draws are training_step.py's, everything else is written again in the obvious way:
- the loss formulas are those of the papers (Gulrajani et al. 2017, Kingma and Welling 2013), not losses.py's,
- the synthetic video is made frame by frame in a Python loop and convolved,
- real and fake images pass the critic separately,
- each update makes its own images,
- the penalty's inner gradient comes from torch.autograd.grad,
- default Adam, EMA per parameter, tensors in torch's default layout, no weights frozen.

A test compares the gradients of a whole step in float64; step.py compares losses and speed.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import training_step as project
from model_definitions import Changes, Discriminator, Generator


@dataclass
class Textbook:
    """Networks and optimizers. `draws` is a State of which only the counters are used, for the random draws."""
    generator: Generator
    critic: Discriminator
    ema: Generator
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    draws: object


def like(state, c) -> Textbook:
    """Returns a Textbook with the weights of a State whose optimizers have not made a step."""
    generator, critic = (copy.deepcopy(m).to(memory_format=torch.contiguous_format)
                         for m in (state.generator, state.critic))
    groups = [{"params": [*generator.vae.parameters(), *generator.prior.parameters()], "lr": c.LEARNING_RATE},
              {"params": generator.layer.parameters(), "lr": c.LEARNING_RATE * c.LAYER_RATE}]
    return Textbook(generator, critic, copy.deepcopy(generator).requires_grad_(False),
                    torch.optim.Adam(groups, betas=(c.BETA_1, c.BETA_2)),
                    torch.optim.Adam(critic.parameters(), lr=c.CRITIC_LEARNING_RATE, betas=(c.BETA_1, c.BETA_2)),
                    copy.deepcopy(state))


# ------------------------------------------------------------------------------------- generator

def synthetic_video(image: Tensor, changes: Changes, pad: int) -> Tensor:
    """image (B, C, H, W) in [0, 1] -> frames (B, T*C, H, W)."""
    height, width, channels = *image.shape[2:], image.shape[1]
    frames = []
    for t, (dy, dx) in enumerate(changes.shift.tolist()):
        padded = F.pad(image, [pad] * 4, mode="replicate")
        shifted = padded[:, :, pad + dy:pad + dy + height, pad + dx:pad + dx + width]
        frames.append(shifted + changes.added[t * channels:(t + 1) * channels])
    return torch.cat(frames, dim=1)


def generate(generator: Generator, z: Tensor, changes: Changes) -> Tensor:
    """z (B, LATENT_DIM) -> image (B, C, H, W) in [-1, 1]: decoder, video, Transformer, tanh(alpha * (2x - 1))."""
    layer, x = generator.layer, generator.vae.decode(z)
    displayed = (1 + torch.tanh(layer.alpha_init * (2 * x - 1))) / 2
    patches = layer.to_tokens(synthetic_video(displayed, changes, layer.video.pad) - 0.5)    # (B, D, H/PATCH, W/PATCH)
    tokens = layer.token_norm(patches.flatten(2).transpose(1, 2)) + layer.positions          # (B, N, D)
    s = layer.to_s(layer.transformer(tokens)).transpose(1, 2).unflatten(2, patches.shape[2:])
    s = F.interpolate(F.pixel_shuffle(s, layer.cells), size=x.shape[2:], mode="bilinear", align_corners=False)
    alpha = layer.alpha_init * layer.alpha_span ** torch.tanh(s)
    return torch.tanh(alpha * (2 * x - 1))


# ------------------------------------------------------------------------------------- losses

def critic_loss(book: Textbook, c, batch: project.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns L_D = E D(fake) - E D(real) + lambda E (||grad D(x_hat)|| - 1)^2 + drift, and values to compare."""
    with torch.no_grad():
        mu, logvar = book.generator.vae.encode(batch.real)
        fake = generate(book.generator, mu + torch.exp(logvar / 2) * batch.posterior_noise, batch.changes)
    real_score, fake_score = book.critic(batch.real), book.critic(fake)
    drift = (real_score ** 2).mean() / 2 + (fake_score ** 2).mean() / 2

    e = batch.e[:, None, None, None]
    x_hat = (e * batch.real + (1 - e) * fake)[::c.GP_EVERY].requires_grad_()
    gradient, = torch.autograd.grad(book.critic(x_hat).sum(), x_hat, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    penalty = ((norm - 1) ** 2).mean()

    loss = fake_score.mean() - real_score.mean() + c.LAMBDA_GP * penalty + c.LAMBDA_DRIFT * drift
    return loss, {"critic_loss": loss, "score_gap": real_score.mean() - fake_score.mean(),
                  "gradient_norm": norm.mean(), "gradient_penalty": penalty}


def generator_loss(book: Textbook, c, batch: project.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns L_G = -E D(fake) + LAMBDA_REC * L1 + LAMBDA_KL * KL / (C*H*W) + E |velocity(x_t, t) - (code - noise)|^2,
    and values to compare. Both weights are multiplied by sqrt(C*H*W / (3 * 64 * 64))."""
    mu, logvar = book.generator.vae.encode(batch.real)
    sigma = torch.exp(logvar / 2)
    code = mu + sigma * batch.posterior_noise
    fake = generate(book.generator, code, batch.changes)
    reconstruction = F.l1_loss(fake, batch.real)
    kl = kl_divergence(Normal(mu, sigma), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()

    noise, t, code = batch.prior_noise.flatten(0, 1), batch.prior_t.flatten(), code.detach()
    code = code.repeat_interleave(len(noise) // len(code), dim=0)
    x_t = (1 - t[:, None]) * noise + t[:, None] * code
    prior_error = F.mse_loss(book.generator.prior.velocity(x_t, t), code - noise)

    elements = batch.real[0].numel()
    factor = (elements / (3 * 64 * 64)) ** 0.5
    loss = (-book.critic(fake).mean() + factor * (c.LAMBDA_REC * reconstruction + c.LAMBDA_KL * kl / elements)
            + prior_error)
    return loss, {"generator_loss": loss, "reconstruction": reconstruction, "kl": kl, "prior_error": prior_error}


# ------------------------------------------------------------------------------------- step

def apply(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def update_ema(book: Textbook, c) -> None:
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * book.draws.counters["images_seen"])
    weight = 1 - 0.5 ** (c.BATCH_SIZE / half_life)
    for averaged, current in zip(book.ema.parameters(), book.generator.parameters()):
        averaged.copy_((1 - weight) * averaged + weight * current)


def training_step(book: Textbook, c, image_set) -> dict[str, float]:
    """N_CRITIC critic updates, one generator update, EMA. Returns the step's scalars."""
    values = {}
    for critic_update in range(c.N_CRITIC):
        batch = project.draw_batch(book.draws, c, image_set, critic_update)
        batch.real = batch.real.contiguous()
        loss, values = critic_loss(book, c, batch)
        apply(loss, book.critic_optimizer)
    loss, more = generator_loss(book, c, batch)
    apply(loss, book.generator_optimizer)
    book.draws.counters["images_seen"] += c.BATCH_SIZE
    update_ema(book, c)
    book.draws.counters["step"] += 1
    return {name: value.item() for name, value in (values | more).items()}
