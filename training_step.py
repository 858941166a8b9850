"""One training step: the batch and its random draws, the terms of both losses, the order of the updates.

Every random draw is a function of (SEED, rollbacks, step, critic update, purpose), made for the whole batch of
BATCH_SIZE and sliced per rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import augmentation
import data
import losses
import update
from model_definitions import Changes, Generator

CLIP_SAMPLE = 6                # frames of a clip from which it is known where an image of it moves
PRIOR_DRAWS = 8                # points on the way to each code at which the prior learns
NO_LABEL_SHARE = 0.1           # share of the codes that the prior learns without their class (Ho and Salimans 2022)


# ------------------------------------------------------------------------------------- batch

def tensor_fields(batch) -> dict[str, Tensor]:
    """Returns the fields of a dataclass that are tensors."""
    return {field.name: value for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)}


class Generated(NamedTuple):
    """The generator's pass over a batch, for both updates."""
    fake: Tensor                              # (B, C, H, W) in [-1, 1], from the codes
    code: Tensor                              # (B, LATENT_DIM), drawn from q(code | real)
    alpha: Tensor                             # (B, 1, H, W)
    mu: Tensor                                # (B, LATENT_DIM)
    logvar: Tensor                            # (B, LATENT_DIM)


@dataclasses.dataclass
class Batch:
    """The real images of one critic update and everything that is drawn for it: this rank's slice, or a piece of it.
    The generator's update uses the batch of the last critic update."""
    real: Tensor                              # (B, C, H, W) in [-1, 1]
    posterior_noise: Tensor                   # (B, LATENT_DIM) from N(0, I), for the codes
    prior_noise: Tensor                       # (B, PRIOR_DRAWS, LATENT_DIM) from N(0, I), and ...
    prior_t: Tensor                           # (B, PRIOR_DRAWS) in (0, 1): where the prior learns
    e: Tensor                                 # (B,) in [0, 1), for x_hat
    changes: Changes                          # of the synthetic video, for the whole batch
    labels: Tensor | None = None              # (B, K): 1 at the image's class, else 0; zeros for NO_LABEL_SHARE
    prior_weight: Tensor | None = None        # (B,): of each code in the prior's loss, 0 of changed images
    others: Tensor | None = None              # (B, K*C, H, W) in [-1, 1]: K frames of each image's clip
    first: int = 0                            # position of the first image in the batch of BATCH_SIZE
    shared: bool = False                      # both updates use one pass of the generator
    generated: Generated | None = None        # that pass

    def pieces(self, size: int) -> list["Batch"]:
        """Returns micro-batches of `size` images."""
        return [dataclasses.replace(self, first=self.first + start, **{
            name: tensor[start:start + size] for name, tensor in tensor_fields(self).items()})
            for start in range(0, len(self.real), size)]

    def tensors(self) -> list[Tensor]:
        """Returns every tensor that is drawn."""
        return [*tensor_fields(self).values(), *self.changes]

    @property
    def kind(self) -> str:
        """Batches of one kind can share a CUDA graph."""
        return "images"


def draw_batch(state, c, image_set: data.ImageSet, critic_update: int) -> Batch:
    """Draws the batch of one critic update of the current step, on the device."""
    mine = state.ranks.slice_of(c.BATCH_SIZE)

    def draw(function, purpose, *shape):
        return to_device(function(shape, generator=state.rng(c, purpose, critic_update))[mine], state.device)

    changes = state.generator.layer.video.draw(state.rng(c, "video", critic_update))
    rows, flips = rows_of_images(state, c, image_set, critic_update)
    others = None
    if image_set.clip_offsets is not None:
        frames = frames_of_clips(image_set, rows)
        others = read_images(image_set, frames.flatten(), state.device, flips if flips is None else
                             flips.repeat(CLIP_SAMPLE)).unflatten(0, frames.shape).flatten(1, 2)
    real, prior_weight = change_images(state, c, image_set, read_images(image_set, rows, state.device, flips),
                                       critic_update)
    return Batch(real,
                 draw(torch.randn, "posterior noise", c.BATCH_SIZE, c.LATENT_DIM),
                 *draw_for_prior(state, c, c.BATCH_SIZE, critic_update),
                 draw(torch.rand, "between", c.BATCH_SIZE),
                 Changes(*(to_device(tensor, state.device) for tensor in changes)),
                 draw_labels(state, c, image_set, rows, critic_update), prior_weight, others, mine.start)


def draw_for_prior(state, c, count: int, critic_update: int) -> tuple[Tensor, Tensor]:
    """Draws noise (B, PRIOR_DRAWS, LATENT_DIM) and t (B, PRIOR_DRAWS) for the prior's loss: this rank's slice of those
    of `count` codes. t is denser in the middle of (0, 1), where the velocity is hardest to tell (Esser et al. 2024)."""
    mine, rng = state.ranks.slice_of(count), state.rng(c, "prior", critic_update)
    noise = torch.randn(count, PRIOR_DRAWS, c.LATENT_DIM, generator=rng)[mine]
    t = torch.randn(count, PRIOR_DRAWS, generator=rng)[mine].sigmoid()
    return to_device(noise, state.device), to_device(t, state.device)


def change_images(state, c, image_set: data.ImageSet, real: Tensor,
                  critic_update: int) -> tuple[Tensor, Tensor | None]:
    """Changes the counter's share of this rank's images (B, C, H, W). Returns them and the weights (B,) of their codes
    in the prior's loss, 0 of changed ones; None where AUGMENT is 0 and of clips. While the share is 0 there are weights
    too: all batches of a run are of one kind."""
    if not c.AUGMENT or image_set.clip_offsets is not None:
        return real, None
    mine = state.ranks.slice_of(c.BATCH_SIZE)
    draws = torch.rand(c.BATCH_SIZE, generator=state.rng(c, "unchanged", critic_update))
    kept = (draws >= state.counters["augment"]) | (draws == draws.max())                  # one at least, for the prior
    weight = to_device((kept * len(kept) / kept.sum())[mine], state.device)
    if kept.all():
        return real, weight
    draws = torch.rand(c.BATCH_SIZE, augmentation.DRAWS, generator=state.rng(c, "augment", critic_update))
    changed = augmentation.augment(real, to_device(augmentation.changes(draws[mine]), state.device))
    return torch.where(weight[:, None, None, None] > 0, real, changed), weight


def draw_labels(state, c, image_set: data.ImageSet, rows: np.ndarray, critic_update: int) -> Tensor | None:
    """Returns the labels (B, K) of this rank's images, zeros for NO_LABEL_SHARE of them; None without classes."""
    if image_set.labels is None:
        return None
    mine = state.ranks.slice_of(c.BATCH_SIZE)
    known = torch.rand(c.BATCH_SIZE, 1, generator=state.rng(c, "labels", critic_update))[mine] >= NO_LABEL_SHARE
    return to_device(data.one_hot(image_set.labels[rows], c) * known, state.device)


def rows_of_images(state, c, image_set: data.ImageSet, critic_update: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the rows of this rank's real images of a critic update, and which are mirrored, with FLIP."""
    mine = state.ranks.slice_of(c.BATCH_SIZE)
    position = (state.counters["step"] * c.N_CRITIC + critic_update) * c.BATCH_SIZE
    if c.BALANCE_CLASSES:
        rows = data.balanced_rows(image_set, c.SEED, position, c.BATCH_SIZE)[mine]
    else:
        rows = image_set.train[data.batch_indices(len(image_set.train), c.SEED, position, c.BATCH_SIZE)][mine]
    flips = None
    if c.FLIP:
        flips = torch.rand(c.BATCH_SIZE, generator=state.rng(c, "flip", critic_update)).numpy()[mine] < 0.5
    return rows, flips


def clip_bounds(image_set: data.ImageSet, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row of the first frame of each image's clip, and that of its last frame + 1."""
    ends = np.searchsorted(image_set.clip_offsets, rows, side="right")
    return image_set.clip_offsets[ends - 1], image_set.clip_offsets[ends]


def frames_of_clips(image_set: data.ImageSet, rows: np.ndarray) -> np.ndarray:
    """Returns the rows of CLIP_SAMPLE evenly spaced frames of each image's clip, (B, CLIP_SAMPLE)."""
    first, end = (bound[:, None] for bound in clip_bounds(image_set, rows))
    return first + (end - first) * (2 * np.arange(CLIP_SAMPLE) + 1) // (2 * CLIP_SAMPLE)


def read_images(image_set: data.ImageSet, rows: np.ndarray, device: torch.device,
                flips: np.ndarray | None = None) -> Tensor:
    """Returns the images in `rows`, mirrored where `flips` is true, on the device: (B, C, H, W) in [-1, 1]."""
    if image_set.on_device is None:
        pixels = to_device(data.read_batch(image_set, rows, flips), device)
    else:
        pixels = image_set.on_device[to_device(torch.from_numpy(rows), device)].permute(0, 3, 1, 2)
        if flips is not None:
            mirrored = to_device(torch.from_numpy(flips), device)[:, None, None, None]
            pixels = torch.where(mirrored, pixels.flip(3), pixels)
    return data.to_image(pixels)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device; to CUDA from pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ------------------------------------------------------------------------------------- generator's pass

def generate(generator: Generator, batch: Batch) -> Generated:
    """Fakes, decoded from codes of the real images. The prior turns noise into such codes: fakes from N(0, I) would
    train the decoder where it is not used."""
    mu, logvar = generator.vae.encode(batch.real)
    code = generator.vae.reparameterize(mu, logvar, batch.posterior_noise)
    fake, alpha = generator.image_and_alpha(code, changes=batch.changes)
    return Generated(fake, code, alpha, mu, logvar)


def fakes_for_critic(generator: Generator, batch: Batch) -> Tensor:
    """The fakes without gradient. For a shared batch, also stores the pass, which the generator's update reuses."""
    if batch.shared:
        batch.generated = generate(generator, batch)
        return batch.generated.fake.detach()
    with torch.no_grad():
        return generate(generator, batch).fake


# ------------------------------------------------------------------------------------- algorithm

def critic_terms(state, c, batch: Batch) -> Iterator[tuple[Tensor, dict]]:
    """L_D = mean D(fake) - mean D(real) + LAMBDA_DRIFT * drift + LAMBDA_GP * GP, as two terms with values to log.

    Each yielded loss has a backward pass of its own, which frees its graph: a new term that uses real_score or
    fake_score of wasserstein_terms belongs into its first loss, one with a forward pass of its own can be yielded by
    itself.
    """
    fake = fakes_for_critic(state.generator, batch)
    yield from wasserstein_terms(state.critic, c, batch.real, fake, batch.e, batch.first)


def wasserstein_terms(critic: Callable, c, real: Tensor, fake: Tensor, e: Tensor, first: int,
                      prefix: str = "") -> Iterator[tuple[Tensor, dict]]:
    """The two terms of L_D of a critic. first: position of image 0 in the batch of BATCH_SIZE; prefix: of the names."""
    real_score, fake_score = critic(torch.cat([real, fake])).chunk(2)
    yield (losses.critic_loss(real_score, fake_score, c.LAMBDA_DRIFT),
           {prefix + "score_gap": real_score.mean() - fake_score.mean()})

    measured = slice(-first % c.GP_EVERY, None, c.GP_EVERY)              # every GP_EVERY-th image of the whole batch
    measured_per_piece = math.ceil(c.BATCH_SIZE / c.GP_EVERY) * len(fake) / c.BATCH_SIZE         # on average
    x_hat = losses.interpolate(real[measured], fake[measured], e[measured])
    norm = losses.gradient_norm(critic, x_hat)
    penalty = losses.gradient_penalty(norm, measured_per_piece)
    yield c.LAMBDA_GP * penalty, {prefix + "gradient_norm": norm.sum() / measured_per_piece,
                                  prefix + "gradient_penalty": penalty}


def generator_terms(state, c, batch: Batch) -> Iterator[tuple[Tensor, dict]]:
    """L_G = -mean D(fake) + f * (LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W)) + (loss of the prior),
    f = losses.size_factor, as one term with values to log. The prior has weights of its own, so its loss needs no
    factor."""
    if not batch.shared:
        batch.generated = generate(state.generator, batch)
    fake, code, alpha, mu, logvar = batch.generated
    reconstruction, kl = losses.reconstruction_loss(fake, batch.real), losses.kl_divergence(mu, logvar)
    error = reconstruction
    if batch.others is not None:                 # of clips: what moves counts more
        error = losses.motion_weighted_error(fake, batch.real, batch.others)
    prior = losses.prior_loss(state.generator.prior.velocity, code, batch.prior_noise, batch.prior_t, batch.labels,
                              batch.prior_weight)
    yield (losses.generator_loss(state.critic(fake), error, kl, fake[0].numel(), c.LAMBDA_REC, c.LAMBDA_KL) + prior,
           {"reconstruction": reconstruction, "kl": kl, "posterior_variance": (mu.square() + logvar.exp()).mean(),
            "prior_error": prior, **alpha_values(alpha)})


def alpha_values(alpha: Tensor) -> dict[str, Tensor]:
    """Returns the values to log of alpha (B, 1, H, W)."""
    return {"alpha_mean": alpha.mean(), "alpha_min": alpha.min(), "alpha_max": alpha.max(),
            "alpha_spread": mean_deviation(alpha.detach().flatten(1), 1)}


def apply_updates(state, c, batches: list[Batch]) -> dict[str, Tensor]:
    """N_CRITIC critic updates and one generator update (Gulrajani et al. 2017, algorithm 1). Returns the scalars of the
    last critic update and of the generator update.

    Both use the same weights of the generator, so they share one pass of it, unless micro-batches limit the memory.
    """
    for batch in batches:
        pieces = batch.pieces(c.MICRO_BATCH or len(batch.real))
        pieces[0].shared = len(pieces) == 1 and batch is batches[-1]
        values = update.descend(state, c, "critic", critic_terms, pieces)
    with update.frozen(state.critic):
        values |= update.descend(state, c, "generator", generator_terms, pieces)
    fake = torch.cat([piece.generated.fake.detach() for piece in pieces])
    return values | {"picture_spread": picture_spread(fake, batch.real)}


def picture_spread(fake: Tensor, real: Tensor) -> Tensor:
    """The mean standard deviation over a batch of fakes, divided by that of real images."""
    return mean_deviation(fake, 0) / mean_deviation(real, 0).clamp_min(1e-6)


def mean_deviation(values: Tensor, dim: int) -> Tensor:
    """The mean of the standard deviations along a dimension. Tensor.std took 34 times as long on the CPU."""
    return (values - values.mean(dim, keepdim=True)).square().mean(dim).sqrt().mean()


def training_step(state, c, image_set: data.ImageSet) -> dict[str, Tensor]:
    """Trains for one step. Returns this rank's scalars (tensors) to log, which the next step may overwrite. On CUDA the
    step may still be running."""
    augmentation.update_share(state, c, image_set)
    batches = [draw_batch(state, c, image_set, critic_update) for critic_update in range(c.N_CRITIC)]
    state.decay_learning_rates(c)
    return take_step(state, c, apply_updates, batches, c.BATCH_SIZE)


def take_step(state, c, updates: Callable, batches: list, images: int, since: float = 0) -> dict[str, Tensor]:
    """Applies updates(state, c, batches), of `images` images, as one step. Returns as training_step. since: images seen
    from which on the weights are averaged."""
    state.counters["images_seen"] += images
    state.ema_weight.fill_(update.ema_weight(c, images, state.counters["images_seen"] - since))
    values = update.run_recorded(functools.partial(step_on_device, updates), state, c, batches)
    state.counters["step"] += 1
    update.wait_for_the_step_before(state)
    return values


def step_on_device(updates: Callable, state, c, batches: list) -> dict[str, Tensor]:
    """The part of a step that can be recorded as a CUDA graph: updates, the count of skipped steps, EMA."""
    before = state.skipped.clone()
    values = updates(state, c, batches)
    update.count_in_a_row(state, before)
    update.update_ema(state)
    return values
