"""One training step as a careful reader of the papers would write it first: the slow twin of training_step.py's.

The mathematics, weights and random draws are training_step.py's (checked by step.py); the ways are the obvious ones:
- the synthetic video is made frame by frame in a Python loop and convolved as it is,
- noise and reconstruction go through the generator in two passes, real and fake through the critic in two,
- each update makes its pictures anew with a generator pass of its own,
- the penalty takes its inner gradient from torch.autograd.grad,
- default Adam, EMA parameter by parameter, tensors in torch's plain layout (NCHW), nothing frozen.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import losses
from training_step import State, make_batch


@dataclass
class Textbook:
    """Networks and optimizers; `draws` is a State of which only the counters and the seed are used."""
    generator: torch.nn.Module
    critic: torch.nn.Module
    ema: torch.nn.Module
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    draws: State


def like(state, c):
    """A Textbook with the weights of a fresh State."""
    generator, critic = (copy.deepcopy(m).to(memory_format=torch.contiguous_format)
                         for m in (state.generator, state.critic))
    betas = (c.BETA_1, c.BETA_2)
    return Textbook(generator, critic, copy.deepcopy(generator).requires_grad_(False),
                    torch.optim.Adam([{"params": generator.vae.parameters(), "lr": c.LEARNING_RATE},
                                      {"params": generator.layer.parameters(), "lr": c.LEARNING_RATE * c.LAYER_RATE}],
                                     betas=betas),
                    torch.optim.Adam(critic.parameters(), lr=c.CRITIC_LEARNING_RATE, betas=betas), copy.deepcopy(state))


def synthetic_video(picture, changes, pad):
    """picture (B, C, H, W) in [0, 1] -> frames (B, T*C, H, W), one after the other."""
    height, width, channels = *picture.shape[2:], picture.shape[1]
    frames = []
    for t, (dy, dx) in enumerate(changes.shift.tolist()):
        padded = F.pad(picture, [pad] * 4, mode="replicate")
        shifted = padded[:, :, pad + dy:pad + dy + height, pad + dx:pad + dx + width]
        frames.append(shifted + changes.added[t * channels:(t + 1) * channels])
    return torch.cat(frames, dim=1)


def generate(generator, z, changes):
    """z -> image in [-1, 1]: decoder, video, Transformer, tanh(alpha * (2x - 1))."""
    layer, x = generator.layer, generator.vae.decode(z)
    tokens = layer.to_tokens(synthetic_video(layer.displayed(x), changes, layer.video.pad) - 0.5)
    side = tokens.shape[2]
    s = layer.to_s(layer.transformer(layer.token_norm(tokens.flatten(2).transpose(1, 2)) + layer.positions))
    s = F.pixel_shuffle(s.transpose(1, 2).unflatten(2, (side, side)), layer.cells)
    s = F.interpolate(s, size=x.shape[2:], mode="bilinear", align_corners=False)
    return torch.tanh(layer.alpha_init * layer.alpha_span ** torch.tanh(s) * (2 * x - 1))


def gradient_norm(critic, image):
    image = image.detach().requires_grad_()
    gradient, = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    return gradient.flatten(1).square().sum(1).clamp_min(1e-12).sqrt()


def critic_step(book, c, batch):
    with torch.no_grad():
        fake = generate(book.generator, batch.z, batch.changes)
    real_score, fake_score = book.critic(batch.real), book.critic(fake)
    norm = gradient_norm(book.critic, losses.between(batch.real, fake, batch.between)[::c.GP_EVERY])
    penalty = losses.gradient_penalty(norm)
    loss = losses.critic_loss(real_score, fake_score, penalty, c.LAMBDA_GP, c.LAMBDA_DRIFT)
    book.critic_optimizer.zero_grad()
    loss.backward()
    book.critic_optimizer.step()
    return {"critic_loss": loss, "score_gap": real_score.mean() - fake_score.mean(), "gradient_norm": norm.mean(),
            "gradient_penalty": penalty}


def generator_step(book, c, batch):
    mu, logvar = book.generator.vae.encode(batch.real)
    z = book.generator.vae.reparameterize(mu, logvar, batch.posterior_noise)
    reconstruction = losses.reconstruction_loss(generate(book.generator, z, batch.changes), batch.real)
    fake_score = book.critic(generate(book.generator, batch.z, batch.changes))
    kl, factor = losses.kl_divergence(mu, logvar), losses.size_factor(*batch.real.shape[1:])
    loss = losses.generator_loss(fake_score, reconstruction, kl, batch.real[0].numel(), c.LAMBDA_REC * factor,
                                 c.LAMBDA_KL * factor)
    book.generator_optimizer.zero_grad()
    loss.backward()
    book.generator_optimizer.step()
    return {"generator_loss": loss, "reconstruction": reconstruction, "kl": kl}


@torch.no_grad()
def update_ema(book, c):
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * book.draws.counters["images_seen"])
    weight = 1 - 0.5 ** (c.BATCH_SIZE / half_life)
    for averaged, current in zip(book.ema.parameters(), book.generator.parameters()):
        averaged.copy_((1 - weight) * averaged + weight * current)


def training_step(book, c, image_set):
    """N_CRITIC critic updates, one generator update, EMA; returns the step's scalars as numbers."""
    values = {}
    for update in range(c.N_CRITIC):
        batch = make_batch(book.draws, c, image_set, update)
        batch.real = batch.real.contiguous()
        values |= critic_step(book, c, batch)
    values |= generator_step(book, c, batch)
    book.draws.counters["images_seen"] += c.BATCH_SIZE
    update_ema(book, c)
    book.draws.counters["step"] += 1
    return {name: value.item() for name, value in values.items()}
