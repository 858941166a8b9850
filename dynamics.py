"""Stage 2 of a run on clips: the VAE is frozen, and the Transformer learns to predict the code of the next frame.

A window of earlier codes is unrolled: each predicted code becomes the newest of the next window. Every random draw is
keyed and made for the whole batch of MOTION_BATCH windows, as in training_step.py.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import losses
import pictures
import training_step
import update
from model_definitions import Generator, Window
from random_keys import torch_generator

UNROLLING = ((0.0, 1), (0.3, 4), (0.55, 14))    # (share of stage 2 from which, predicted frames per window)
WARM_UP = 100                  # updates in which the learning rate rises ...
FALLS_FROM, LOWEST = 0.5, 0.02 # ... and the share of stage 2 from which it falls, linearly, to this share of it
CODE_NOISE = 0.3               # largest noise of a window's codes, in standard deviations of their posterior
RENDERED_EVERY = 2             # one frame of every 2nd window is rendered
CHUNK = 64                     # frames that are encoded at once
SMALLEST_CHANGE = 1e-3         # of a dimension of the codes, where nothing moves
AHEAD = (1, 4, 8)              # frames ahead at which predictions are measured
MEASURED_CLIPS = 32            # at most
STARTS = 3                     # windows per measured clip
LONG = 64                      # frames after which the length of the codes is measured


# ------------------------------------------------------------------------------------- stage

def is_stage_2(state, c) -> bool:
    """Returns whether the run learns motion now; it depends on the images seen alone."""
    return c.FOLDERS == "clips" and state.counters["images_seen"] >= 1000 * c.VAE_KIMG


def last_step(c) -> int:
    """Returns the number of steps of both stages."""
    return math.ceil(1000 * c.VAE_KIMG / c.BATCH_SIZE) + math.ceil(
        1000 * (c.DYNAMICS_KIMG - c.VAE_KIMG) / c.MOTION_BATCH)


def progress(state, c) -> float:
    """Returns the share of stage 2 that is done, 0 to 1."""
    return (state.counters["images_seen"] / 1000 - c.VAE_KIMG) / (c.DYNAMICS_KIMG - c.VAE_KIMG)


def learning_rate(state, c) -> float:
    """Returns the learning rate of the current step of stage 2."""
    done = progress(state, c)
    windows = state.counters["images_seen"] - 1000 * c.VAE_KIMG
    rising, falling = (1 + windows / c.MOTION_BATCH) / WARM_UP, (1 - done) / (1 - FALLS_FROM)
    return c.MOTION_LEARNING_RATE * state.counters["lr_scale"] * min(1, rising) * max(LOWEST, min(1, falling))


def begin(state, image_set: data.ImageSet) -> None:
    """Starts stage 2, also after a resume: the VAE takes its averaged weights, which then no longer change, and all
    frames are encoded once. The unit of changes is found."""
    vae = state.generator.vae
    vae.load_state_dict(state.ema.vae.state_dict())
    state.graphs.clear()                             # those of stage 1 are not needed any more
    state.codes = mu, _ = encode_frames(vae, image_set, state.device)
    later = np.setdiff1d(image_set.train, image_set.clip_offsets)             # all frames but the first of each clip
    change = (mu[later] - mu[later - 1]).square().mean(0).sqrt().clamp_min(SMALLEST_CHANGE)
    for generator in (state.generator, state.ema):
        generator.layer.dynamics.change.copy_(change)


@torch.no_grad()
def encode_frames(vae, image_set: data.ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar of all frames, each (N, LATENT_DIM), from chunks of one size, so that a resumed run gets
    equal bits."""
    rows = np.arange(len(image_set.images))
    parts = [vae.encode(training_step.read_images(image_set, rows[start:start + CHUNK], device))
             for start in range(0, len(rows), CHUNK)]
    mu, logvar = (torch.cat(column) for column in zip(*parts))
    return mu, logvar


# ------------------------------------------------------------------------------------- batch

class MotionBatch(NamedTuple):
    """B windows of clips, K frames that follow each of them, and everything that is drawn: this rank's slice."""
    codes: Tensor           # (B, P, LATENT_DIM): the window, newest first, with noise
    targets: Tensor         # (B, K, LATENT_DIM): mu of the frames that follow; after the clip's end its last one ...
    valid: Tensor           # (B, K): ... and 0, else 1
    around: Tensor          # (B, 3, LATENT_DIM): mu before, at and after the first of these frames, for q
    anchor: Tensor          # (B, LATENT_DIM): mu of any frame of the clip
    noise: Tensor           # (B, MOTION_DIM) from N(0, I), for v
    cold: Tensor            # (B,): 1 where the window is still, else 0
    picked: Tensor          # (R,) int64: which of the K frames is rendered, of every RENDERED_EVERY-th window
    frame: Tensor           # (R, C, H, W) in [-1, 1]: that frame
    earlier: Tensor         # (R, P*C, H, W) in [0, 1]: the frames before it, newest first

    def tensors(self) -> list[Tensor]:
        return list(self)

    @property
    def kind(self) -> tuple[str, int]:
        """Batches of one kind can share a CUDA graph: those with the same K."""
        return "motion", self.targets.shape[1]


def draw_batch(state, c, image_set: data.ImageSet) -> MotionBatch:
    """Draws the windows of the current step, on the device."""
    frames = next(count for share, count in reversed(UNROLLING) if progress(state, c) >= share)             # K
    mine, rng = state.ranks.slice_of(c.MOTION_BATCH), state.rng(c, "windows")
    draws = torch.rand(5, c.MOTION_BATCH, generator=rng)[:, mine]
    code_noise = torch.randn(c.MOTION_BATCH, c.NUM_FRAMES - 1, c.LATENT_DIM, generator=rng)[mine]
    noise = torch.randn(c.MOTION_BATCH, c.MOTION_DIM, generator=rng)[mine]
    position = state.counters["step"] * c.MOTION_BATCH
    clips = data.batch_indices(len(image_set.train_clips), c.SEED, position, c.MOTION_BATCH, "clips")[mine]
    clips = image_set.train_clips[clips]
    begin, end = (torch.from_numpy(image_set.clip_offsets[clips + i]) for i in (0, 1))     # rows of the clips' frames

    def one_of(count, draw):                         # 0 .. count - 1
        return (draw * count).long().minimum(count - 1)

    # Rows: the first frame to predict, all K of them, the one to render, the anchor, and the window's.
    first = begin + 1 + one_of((end - begin - max(frames, 2)).clamp_min(1), draws[0])
    following = first[:, None] + torch.arange(frames)
    shown = first + one_of((end - first).clamp_max(frames), draws[1])
    anchor = begin + one_of(end - begin, draws[2])
    cold = (draws[3] < c.COLD_SHARE) | (first == begin + 1)
    oldest, last = torch.where(cold, first - 1, begin)[:, None], end[:, None] - 1

    def before(rows):                                # the P frames before, newest first
        return (rows[:, None] - torch.arange(1, c.NUM_FRAMES)).maximum(oldest)

    rendered = slice(None, None, RENDERED_EVERY)     # a rank's first window has an even number
    rows = torch.cat([shown[:, None], before(shown)], dim=1)[rendered]                                  # (R, 1 + P)
    images = training_step.read_images(image_set, rows.flatten().numpy(), state.device).unflatten(0, rows.shape)

    def put(tensor):
        return training_step.to_device(tensor, state.device)

    (mu, logvar), window, cold = state.codes, put(before(first)), put(cold)
    strength = CODE_NOISE * put(draws[4])[:, None, None]
    codes = mu[window] + strength * torch.exp(0.5 * logvar[window]) * put(code_noise)
    return MotionBatch(
        codes=torch.where(cold[:, None, None], codes[:, :1], codes),
        targets=mu[put(following.minimum(last))], valid=put((following <= last).to(mu.dtype)),
        around=mu[put((first[:, None] + torch.arange(-1, 2)).minimum(last))], anchor=mu[put(anchor)], noise=put(noise),
        cold=cold.to(mu.dtype), picked=put((shown - first)[rendered]), frame=images[:, 0],
        earlier=(1 + images[:, 1:].flatten(1, 2)) / 2)


# ------------------------------------------------------------------------------------- algorithm

def unrolled(generator: Generator, window: Window, count: int, frozen: bool = False) -> Tensor:
    """Returns the next `count` codes, (B, count, LATENT_DIM). frozen: the window holds copies of its newest code only.
    """
    codes = []
    for _ in range(count):
        if frozen:
            window = window._replace(codes=window.codes[:, :1].expand_as(window.codes))
        codes.append(generator.layer.next_code(window))
        window = window.followed_by(codes[-1])
    return torch.stack(codes, dim=1)


def motion_terms(state, c, batch: MotionBatch) -> Iterator[tuple[Tensor, dict]]:
    """L = LAMBDA_CODE * |z_t - mu(x_t)|, over the unrolled frames, + LAMBDA_FRAME * (error of one rendered frame)
    + LAMBDA_MOTION * KL(q(v) || N(0, I)), as one term with values to log."""
    mean, logvar = state.generator.layer.dynamics.posterior(*batch.around.unbind(1))
    cold = batch.cold[:, None]
    mean, logvar = cold * mean, cold * logvar                                # v of a moving window is N(0, I)
    v = mean + torch.exp(0.5 * logvar) * batch.noise
    kl = losses.kl_divergence(mean, logvar) / c.COLD_SHARE

    codes = unrolled(state.generator, Window(batch.codes, v, batch.anchor), batch.targets.shape[1])
    code_error = ((codes - batch.targets).abs().mean(2) * batch.valid).mean()

    rendered = slice(None, None, RENDERED_EVERY)
    past = torch.cat([batch.codes.flip(1), codes], dim=1)[rendered]          # (R, P + K, LATENT_DIM), oldest first
    row, place = torch.arange(len(past), device=past.device), batch.picked
    before = place[:, None] + torch.arange(batch.codes.shape[1], device=past.device).flip(0)
    window = Window(past[row[:, None], before], v[rendered], batch.anchor[rendered])
    image, _ = state.generator.image_and_alpha(past[row, place + batch.codes.shape[1]], batch.earlier, window=window)
    frame_error = losses.motion_weighted_error(image, batch.frame, batch.earlier * 2 - 1)
    yield (c.LAMBDA_CODE * code_error + c.LAMBDA_FRAME * frame_error + c.LAMBDA_MOTION * kl,
           {"code_error": code_error, "frame_error": frame_error, "motion_kl": kl})


def update_motion(state, c, batches: list[MotionBatch]) -> dict[str, Tensor]:
    """One update of TransformerParamTanh. Returns its scalars."""
    with update.frozen(state.generator.vae):
        return update.descend(state, c, "motion", motion_terms, batches)


def motion_step(state, c, image_set: data.ImageSet) -> dict[str, Tensor]:
    """Trains for one step of stage 2. Returns as training_step."""
    if state.codes is None:
        begin(state, image_set)
    state.set_rate(state.motion_optimizer.param_groups[0], learning_rate(state, c))
    return training_step.take_step(state, c, update_motion, [draw_batch(state, c, image_set)], c.MOTION_BATCH,
                                   since=1000 * c.VAE_KIMG)


# ------------------------------------------------------------------------------------- measuring

def windows(c, image_set: data.ImageSet, codes: tuple[Tensor, Tensor], count: int, starts: int,
            frames: int) -> tuple[Window, np.ndarray]:
    """Returns windows of `count` held-out clips, or training clips if none are held out, each at `starts` evenly spaced
    places, and the rows of the first frame after each window. Clips without `frames` frames more are left out."""
    clips = image_set.held_out_clips if len(image_set.held_out_clips) else image_set.train_clips
    begin, end = (image_set.clip_offsets[clips + i] for i in (0, 1))
    begin, end = (rows[end - begin > frames] for rows in (begin, end))
    begin, end = (rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] for rows in (begin, end))
    low = np.minimum(begin + c.NUM_FRAMES - 1, end - frames)
    first = np.linspace(low, end - frames, starts).astype(int).flatten()
    rows = np.maximum(first[:, None] - np.arange(1, c.NUM_FRAMES), np.tile(begin, starts)[:, None])
    earlier = codes[0][torch.from_numpy(rows).to(codes[0].device)]
    v = torch.randn(len(first), c.MOTION_DIM, generator=torch_generator(c.SEED, "motion codes of windows"))
    return Window(earlier, v.to(earlier.device), earlier[:, -1]), first


def rendered(generator: Generator, z: Tensor) -> Tensor:
    """Returns the image of each code (N, LATENT_DIM) on its own, (N, C, H, W) in [-1, 1]."""
    return torch.cat([generator(part) for part in z.split(CHUNK)])


@torch.no_grad()
def measure(generator: Generator, c, image_set: data.ImageSet, codes: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns, for held-out clips, {"r1": the error of rendered predictions one frame ahead, divided by that of a copy
    of the last frame, ...}, "r1_frozen" the same from windows that show no motion, and "z_growth": the length of codes
    after LONG frames, divided by that of the last known code. Empty if the clips are too short."""
    window, first = windows(c, image_set, codes, MEASURED_CLIPS, STARTS, max(AHEAD))
    if not len(first):
        return {}

    live, frozen = unrolled(generator, window, LONG), unrolled(generator, window, max(AHEAD), frozen=True)
    copy, found = rendered(generator, window.codes[:, 0]), {}
    for ahead in AHEAD:
        real = rendered(generator, codes[0][torch.from_numpy(first + ahead - 1).to(live.device)])
        by_copying = (copy - real).abs().mean()
        for name, z in ((f"r{ahead}", live), (f"r{ahead}_frozen", frozen)):
            found[name] = ((rendered(generator, z[:, ahead - 1]) - real).abs().mean() / by_copying).item()
    found["z_growth"] = (live[:, -1].norm(dim=1).mean() / window.codes[:, 0].norm(dim=1).mean()).item()
    return found


@torch.no_grad()
def strips(generator: Generator, c, image_set: data.ImageSet, codes: tuple[Tensor, Tensor], count: int = 4,
           columns: int = 16, every: int = 2) -> list[Tensor]:
    """Returns rows of `columns` images (C, H, W) in [-1, 1], every 2nd frame: for `count` clips the real frames, grey
    after the clip's end, and below them the continuation of the window before; then `count` videos that start from
    noise."""
    frames = columns * every
    window, first = windows(c, image_set, codes, count, 1, min(frames, 1 + max(AHEAD)))
    device, past = codes[0].device, c.NUM_FRAMES - 1
    z = torch.randn(count, c.LATENT_DIM, generator=torch_generator(c.SEED, "samples")).to(device)
    v = torch.randn(count, c.MOTION_DIM, generator=torch_generator(c.SEED, "motion codes of samples")).to(device)
    found = []
    for start in (window, Window.still(z, v, past)):
        earlier = torch.stack([(1 + generator(code)) / 2 for code in start.codes.unbind(1)], dim=1).flatten(1, 2)
        made = [image for image, _ in itertools.islice(generator.roll(start, earlier), frames)][::every]
        found.append(torch.stack(made, dim=1))                                     # (B, columns, C, H, W)
    ends = image_set.clip_offsets[np.searchsorted(image_set.clip_offsets, first, side="right")]
    rows = first[:, None] + np.arange(0, frames, every)
    real = training_step.read_images(image_set, np.minimum(rows, ends[:, None] - 1).flatten(), device)
    real = real.unflatten(0, rows.shape)
    real[torch.from_numpy(rows >= ends[:, None]).to(device)] = 0
    pairs = [row for pair in zip(real, found[0]) for row in pair]
    return [*pairs, *found[1]]


def strip_sheet(generator: Generator, c, image_set: data.ImageSet, codes: tuple[Tensor, Tensor]) -> np.ndarray:
    """Returns the rows of `strips` as one picture, uint8 (H, W, 3)."""
    rows = strips(generator, c, image_set, codes)
    return pictures.grid([image for row in rows for image in data.to_arrays(row)], columns=len(rows[0]))
