"""Stage 2 of a run on clips: the VAE is frozen, and the Transformer learns to predict the code of the next frame.
The prior goes on learning.

A window of earlier codes is unrolled: each predicted code becomes the newest of the next window. Every random draw is
keyed and made for the whole batch of MOTION_BATCH windows, as in training_step.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import losses
import training_step
import update
from model_definitions import Dynamics, Generator, Window

UNROLLING = ((0.0, 1), (0.3, 4), (0.55, 14))    # (share of stage 2 from which, predicted frames per window)
WARM_UP = 100                  # updates in which the learning rate rises ...
FALLS_FROM, LOWEST = 0.5, 0.02 # ... and the share of stage 2 from which it falls, linearly, to this share of it
CODE_NOISE = 0.3               # largest noise of a window's codes, in standard deviations of their posterior
RENDERED_EVERY = 2             # one frame of every 2nd window is rendered
CHUNK = 64                     # frames that are encoded at once


# ------------------------------------------------------------------------------------- stage

def stage(state, c) -> int:
    """Returns the stage of the next step, 1 to 3; it depends on the images seen alone. Runs on images stay in 1."""
    kimg = state.counters["images_seen"] / 1000
    return 1 + (kimg >= c.VAE_KIMG) + (kimg >= c.DYNAMICS_KIMG) if c.FOLDERS == "clips" else 1


def progress(state, c) -> float:
    """Returns the share of stage 2 that is done, 0 to 1."""
    return (state.counters["images_seen"] / 1000 - c.VAE_KIMG) / (c.DYNAMICS_KIMG - c.VAE_KIMG)


def learning_rate(state, c) -> float:
    """Returns the learning rate of the current step of stage 2."""
    done = progress(state, c)
    windows = state.counters["images_seen"] - 1000 * c.VAE_KIMG
    rising, falling = (1 + windows / c.MOTION_BATCH) / WARM_UP, (1 - done) / (1 - FALLS_FROM)
    return c.MOTION_LEARNING_RATE * state.counters["lr_scale"] * min(1, rising) * max(LOWEST, min(1, falling))


def begin(state, c, image_set: data.ImageSet, codes: tuple[Tensor, Tensor] | None = None) -> None:
    """Starts stage 2, with the averaged weights of VAE and prior, or continues it after a resume. The encoder will not
    change any more: all frames are encoded, unless their codes are given, and the buffers of Dynamics are found."""
    if state.counters["stage"] < 2:
        state.generator.vae.load_state_dict(state.ema.vae.state_dict())
        state.generator.prior.load_state_dict(state.ema.prior.state_dict())
    state.counters["stage"] = 2
    state.graphs.clear()                             # those of stage 1 are not needed any more
    state.codes = mu, _ = codes or encode_frames(state.generator.vae, image_set, state.device, c.FLIP)
    parts = (mu[row:row + len(image_set.images)].split(np.diff(image_set.clip_offsets).tolist())
             for row in range(0, len(mu), len(image_set.images)))                 # of all clips, then of mirrored ones
    clips = [part[clip] for part in parts for clip in image_set.train_clips]
    for generator in (state.generator, state.ema):
        generator.layer.dynamics.fit(clips)


@torch.no_grad()
def encode_frames(vae, image_set: data.ImageSet, device: torch.device,
                  mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar of all N frames, each (N, LATENT_DIM), from chunks of one size, so that a resumed run gets
    equal bits. mirrored: then of all mirrored frames, (2 N, LATENT_DIM)."""
    rows = np.arange(len(image_set.images))
    parts = [encode_rows(vae, image_set, rows, device, flip) for flip in (False, True)[:1 + mirrored]]
    mu, logvar = (torch.cat(column) for column in zip(*parts))
    return mu, logvar


@torch.no_grad()
def encode_rows(vae, image_set: data.ImageSet, rows: np.ndarray, device: torch.device,
                mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar of the frames in `rows` (n,), or of these mirrored, each (n, LATENT_DIM)."""
    parts = [vae.encode(training_step.read_images(image_set, part, device, np.full(len(part), mirrored)))
             for part in np.split(rows, range(CHUNK, len(rows), CHUNK))]
    mu, logvar = (torch.cat(column) for column in zip(*parts))
    return mu, logvar


# ------------------------------------------------------------------------------------- batch

class Windows(NamedTuple):
    """B windows of clips and the codes of the K frames that follow each of them: this rank's slice."""
    codes: Tensor           # (B, P, LATENT_DIM): the window, newest first, with noise
    targets: Tensor         # (B, K, LATENT_DIM): mu of the frames that follow; after the clip's end its last one ...
    valid: Tensor           # (B, K): ... and 0, else 1
    around: Tensor          # (B, 3, LATENT_DIM): mu before, at and after the first of these frames, for q
    anchor: Tensor          # (B, LATENT_DIM): mu of any frame of the clip
    noise: Tensor           # (B, MOTION_DIM) from N(0, I), for v
    cold: Tensor            # (B,): 1 where the window is still, else 0


class Places(NamedTuple):
    """Where these windows are in their clips: rows of images, each (B,) int64."""
    first: Tensor           # the first of the K frames
    begin: Tensor           # the clip's first frame
    end: Tensor             # its last frame + 1
    oldest: Tensor          # the oldest frame of the window
    mirror: Tensor          # where the clip is mirrored, with FLIP: N, to be added to rows of codes; else 0

    def before(self, rows: Tensor, count: int) -> Tensor:
        """Returns the `count` frames before `rows` (B,), newest first, (B, count), repeating the oldest one."""
        return (rows[:, None] - torch.arange(1, count + 1)).maximum(self.oldest[:, None])


class MotionBatch(NamedTuple):
    """Windows with one rendered frame of every RENDERED_EVERY-th: this rank's slice."""
    windows: Windows
    picked: Tensor          # (R,) int64: which of the K frames is rendered, of every RENDERED_EVERY-th window
    frame: Tensor           # (R, C, H, W) in [-1, 1]: that frame
    earlier: Tensor         # (R, P*C, H, W) in [0, 1]: the frames before it, newest first
    prior_noise: Tensor     # (B, PRIOR_DRAWS, LATENT_DIM), as in training_step.Batch
    prior_t: Tensor         # (B, PRIOR_DRAWS)

    def tensors(self) -> list[Tensor]:
        return [*self.windows, *self[1:]]

    @property
    def kind(self) -> tuple[str, int]:
        """Batches of one kind can share a CUDA graph: those with the same K."""
        return "motion", self.windows.targets.shape[1]


def one_of(count: Tensor, draw: Tensor) -> Tensor:
    """Returns a whole number of 0 .. count - 1 for each draw in [0, 1)."""
    return (draw * count).long().minimum(count - 1)


def draw_windows(state, c, image_set: data.ImageSet, count: int, frames: int,
                 critic_update: int = 0) -> tuple[Windows, Places, Tensor]:
    """Draws `count` windows of training clips with `frames` frames after each, K. Returns this rank's slice of them,
    their places, and one more draw in [0, 1) per window, (B,)."""
    mine, rng = state.ranks.slice_of(count), state.rng(c, "windows", critic_update)
    draws = torch.rand(5, count, generator=rng)[:, mine]
    code_noise = torch.randn(count, c.NUM_FRAMES - 1, c.LATENT_DIM, generator=rng)[mine]
    noise = torch.randn(count, c.MOTION_DIM, generator=rng)[mine]
    position = (state.counters["step"] * c.N_CRITIC + critic_update) * count
    clips = data.batch_indices(len(image_set.train_clips), c.SEED, position, count, "clips")[mine]
    clips = image_set.train_clips[clips]
    begin, end = (torch.from_numpy(image_set.clip_offsets[clips + i]) for i in (0, 1))

    first = begin + 1 + one_of((end - begin - max(frames, 2)).clamp_min(1), draws[0])
    following = first[:, None] + torch.arange(frames)
    anchor = begin + one_of(end - begin, draws[2])
    cold = (draws[3] < c.COLD_SHARE) | (first == begin + 1)
    mirror = torch.zeros_like(first)
    if c.FLIP:
        flips = torch.rand(count, generator=state.rng(c, "mirrored windows", critic_update))[mine] < 0.5
        mirror = flips * len(image_set.images)
    places = Places(first, begin, end, torch.where(cold, first - 1, begin), mirror)
    last, of_codes = end[:, None] - 1, mirror[:, None]

    def put(tensor):
        return training_step.to_device(tensor, state.device)

    (mu, logvar), window = state.codes, put(places.before(first, c.NUM_FRAMES - 1) + of_codes)
    strength, cold = CODE_NOISE * put(draws[4])[:, None, None], put(cold)
    codes = mu[window] + strength * torch.exp(0.5 * logvar[window]) * put(code_noise)
    return Windows(
        codes=torch.where(cold[:, None, None], codes[:, :1], codes),
        targets=mu[put(following.minimum(last) + of_codes)], valid=put((following <= last).to(mu.dtype)),
        around=mu[put((first[:, None] + torch.arange(-1, 2)).minimum(last) + of_codes)],
        anchor=mu[put(anchor + mirror)], noise=put(noise), cold=cold.to(mu.dtype)), places, draws[1]


def read_frames(image_set: data.ImageSet, rows: Tensor, mirror: Tensor, device: torch.device) -> Tensor:
    """Returns the frames in rows (B, T) of windows, (B, T, C, H, W) in [-1, 1]. mirror (B,): as in Places."""
    flips = (mirror > 0).repeat_interleave(rows.shape[1]).numpy()
    return training_step.read_images(image_set, rows.flatten().numpy(), device, flips).unflatten(0, rows.shape)


def draw_batch(state, c, image_set: data.ImageSet) -> MotionBatch:
    """Draws the windows of the current step of stage 2, on the device."""
    frames = next(count for share, count in reversed(UNROLLING) if progress(state, c) >= share)             # K
    windows, places, draw = draw_windows(state, c, image_set, c.MOTION_BATCH, frames)
    shown = places.first + one_of((places.end - places.first).clamp_max(frames), draw)
    every = slice(None, None, RENDERED_EVERY)        # a rank's first window has an even number
    rows = torch.cat([shown[:, None], places.before(shown, c.NUM_FRAMES - 1)], dim=1)[every]            # (R, 1 + P)
    images = read_frames(image_set, rows, places.mirror[every], state.device)
    return MotionBatch(windows, training_step.to_device((shown - places.first)[every], state.device), images[:, 0],
                       (1 + images[:, 1:].flatten(1, 2)) / 2,
                       *training_step.draw_for_prior(state, c, c.MOTION_BATCH, 0))


# ------------------------------------------------------------------------------------- algorithm

def unrolled(generator: Generator, window: Window, count: int, frozen: bool = False, fed_back_every: int = 0) -> Tensor:
    """Returns the next `count` codes, (B, count, LATENT_DIM). frozen: the window holds copies of its newest code only.
    fed_back_every n: each n-th code moves as far to that of its image as with FEEDBACK in n frames."""
    codes = [window.codes[:, :0]]                # (B, 0, LATENT_DIM)
    for _ in range(count):
        if frozen:
            window = window._replace(codes=window.codes[:, :1].expand_as(window.codes))
        z = generator.layer.next_code(window)
        if fed_back_every and len(codes) % fed_back_every == 0:
            image = 2 * generator.layer.displayed(generator.vae.decode(z)) - 1               # with ALPHA_INIT
            z = generator.towards(z, image, 1 - (1 - generator.feedback) ** fed_back_every)
        window = window.followed_by(z)
        codes.append(z[:, None])
    return torch.cat(codes, dim=1)


def motion_codes(dynamics: Dynamics, c, windows: Windows) -> tuple[Tensor, Tensor]:
    """Returns v (B, MOTION_DIM), of still windows from q, of moving ones from N(0, I), and KL(q(v) || N(0, I))."""
    mean, logvar = dynamics.posterior(*windows.around.unbind(1))
    cold = windows.cold[:, None]
    mean, logvar = cold * mean, cold * logvar
    return mean + torch.exp(0.5 * logvar) * windows.noise, losses.kl_divergence(mean, logvar) / c.COLD_SHARE


def code_error(codes: Tensor, windows: Windows) -> Tensor:
    """Returns the mean of |z_t - mu(x_t)|; codes (B, K, LATENT_DIM)."""
    return ((codes - windows.targets).abs().mean(2) * windows.valid).mean()


def motion_terms(state, c, batch: MotionBatch) -> Iterator[tuple[Tensor, dict]]:
    """L = LAMBDA_CODE * |z_t - mu(x_t)|, over the unrolled frames, + LAMBDA_FRAME * (error of one rendered frame)
    + LAMBDA_MOTION * KL(q(v) || N(0, I)) + (loss of the prior, for the anchors), as one term with values to log."""
    known = batch.windows
    v, kl = motion_codes(state.generator.layer.dynamics, c, known)
    codes = unrolled(state.generator, Window(known.codes, v, known.anchor), known.targets.shape[1])
    error = code_error(codes, known)

    every = slice(None, None, RENDERED_EVERY)
    past = torch.cat([known.codes.flip(1), codes], dim=1)[every]             # (R, P + K, LATENT_DIM), oldest first
    row, place = torch.arange(len(past), device=past.device), batch.picked
    before = place[:, None] + torch.arange(known.codes.shape[1], device=past.device).flip(0)
    window = Window(past[row[:, None], before], v[every], known.anchor[every])
    image, _ = state.generator.image_and_alpha(past[row, place + known.codes.shape[1]], batch.earlier, window=window)
    frame_error = losses.motion_weighted_error(image, batch.frame, batch.earlier * 2 - 1)
    prior = losses.prior_loss(state.generator.prior.velocity, known.anchor, batch.prior_noise, batch.prior_t)
    yield (c.LAMBDA_CODE * error + c.LAMBDA_FRAME * frame_error + c.LAMBDA_MOTION * kl + prior,
           {"code_error": error, "frame_error": frame_error, "motion_kl": kl, "prior_error": prior})


def update_motion(state, c, batches: list[MotionBatch]) -> dict[str, Tensor]:
    """One update of TransformerParamTanh and the prior. Returns its scalars."""
    with update.frozen(state.generator.vae):
        return update.descend(state, c, "motion", motion_terms, batches)


def motion_step(state, c, image_set: data.ImageSet) -> dict[str, Tensor]:
    """Trains for one step of stage 2. Returns as training_step."""
    if state.codes is None:                          # also after a resume: the same codes and unit again
        begin(state, c, image_set)
    state.set_rate(state.motion_optimizer.param_groups[0], learning_rate(state, c))
    return training_step.take_step(state, c, update_motion, [draw_batch(state, c, image_set)], c.MOTION_BATCH,
                                   since=1000 * c.VAE_KIMG)
