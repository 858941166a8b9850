"""Stage 3 of a run on clips: decoder, TransformerParamTanh and critics learn together, from predicted frames.

Half of the videos of a batch continue a clip by UNROLLED frames, which the real ones are compared with. The other half
runs freely: from noise, or from a clip, and first for a while without gradient, so that late frames are judged too.
Three critics judge all videos: one the last frame; one a near pair, two neighbours; one a far pair, the anchor and the
last frame, which must show the same scene. A pair is (x_a, x_b, x_b - x_a). Random draws are keyed, as in
training_step.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import dynamics
import losses
import training_step
import update
from dynamics import Windows, unrolled
from model_definitions import Generator, Window
from training_step import tensor_fields, to_device

PREFIXES = (0, 4, 8, 16)       # frames that free videos run before those with gradient; one of them per step
FED_BACK_EVERY = 8             # of these, as generated videos feed every image back: rendering all would take too long
UNROLLED = 3                   # predicted frames with gradient
CLIP_STARTS = 0.5              # share of the free videos that start from the window of a clip
DECODED_EVERY = 4              # of the images of a free video that the Transformer reads
WARM_UP = 100                  # steps in which the learning rates of decoder and layer rise


# ------------------------------------------------------------------------------------- stage

def begin(state, c, image_set: data.ImageSet) -> None:
    """Starts stage 3, continues it after a resume, or does nothing. The generator takes its averaged weights at the
    start."""
    if state.counters["stage"] < 3:
        state.counters["stage"] = 3
        state.generator.load_state_dict(state.ema.state_dict())
        state.graphs.clear()
    if state.codes is None:
        state.codes = dynamics.encode_frames(state.generator.vae, image_set, state.device, c.FLIP)


def set_learning_rates(state, c) -> None:
    """Sets the rates of the current step."""
    state.decay_learning_rates(c)
    steps = (state.counters["images_seen"] - 1000 * c.DYNAMICS_KIMG) / c.BATCH_SIZE
    scale = state.learning_rate_scale(c) * min(1, (1 + steps) / WARM_UP)
    for group, rate in zip(state.generator_optimizer.param_groups, (c.JOINT_LEARNING_RATE, c.JOINT_LAYER_RATE)):
        state.set_rate(group, rate * scale)


# ------------------------------------------------------------------------------------- batch

class Videos(NamedTuple):
    """The generator's pass over a batch of B videos, of which H = B / 2 are compared with their clips."""
    frame: Tensor                             # (B, C, H, W) in [-1, 1]: for the frame critic
    near: Tensor                              # (B, 3*C, H, W): a pair of neighbours
    far: Tensor | None                        # (B, 3*C, H, W): anchor and last frame
    alpha: Tensor                             # (2B, 1, H, W)
    reconstruction: Tensor                    # (H, C, H, W) in [-1, 1], of `target`
    predicted: Tensor                         # (H, C, H, W) in [-1, 1], of `target`
    code_error: Tensor                        # scalar
    motion_kl: Tensor                         # scalar


@dataclasses.dataclass
class Batch:
    """B videos and everything that is drawn for them: this rank's slice, or a piece of it. H = B / 2: of videos 0 and
    1, 2 and 3, ..., one is compared with its clip, and the other is free."""
    windows: Windows                          # H windows of clips, and the UNROLLED frames after each
    free: Tensor                              # (H, P, LATENT_DIM): codes of the window of free videos, newest first
    free_anchor: Tensor                       # (H, LATENT_DIM): their anchor
    is_noise: Tensor                          # (H,) bool: where free videos start from z instead
    z: Tensor                                 # (H, LATENT_DIM) from N(0, I)
    v: Tensor                                 # (H, MOTION_DIM) from N(0, I), of free videos
    target: Tensor                            # (H, C, H, W) in [-1, 1]: the last of the frames after `windows`
    earlier: Tensor                           # (H, (P+1)*C, H, W) in [0, 1]: the frames before target, newest first
    code: Tensor                              # (H, LATENT_DIM): of target, with noise of the posterior
    free_first: Tensor                        # (H,) bool: of two neighbours, the first one is free
    real: Tensor                              # (B, C, H, W) in [-1, 1]
    real_before: Tensor                       # (B, C, H, W) in [-1, 1]: the frame before real
    real_anchor: Tensor                       # (B, C, H, W) in [-1, 1]: any frame of the clip
    e: Tensor                                 # (B, 3) in [0, 1): for x_hat of the three critics
    prefix: int                               # one of PREFIXES
    first: int = 0                            # position of the first video in the batch of BATCH_SIZE
    shared: bool = False                      # all updates use one pass of the generator
    videos: Videos | None = None              # that pass

    def pieces(self, size: int) -> list["Batch"]:
        """Returns micro-batches of `size` videos, an even number."""
        def part(tensor, start):
            return tensor[start * len(tensor) // len(self.real):(start + size) * len(tensor) // len(self.real)]

        return [dataclasses.replace(
            self, windows=Windows(*(part(tensor, start) for tensor in self.windows)), first=self.first + start,
            **{name: part(tensor, start) for name, tensor in tensor_fields(self).items()})
            for start in range(0, len(self.real), size)]

    def tensors(self) -> list[Tensor]:
        return [*self.windows, *tensor_fields(self).values()]

    @property
    def kind(self) -> tuple[str, int]:
        """Batches of one kind can share a CUDA graph: those with the same prefix."""
        return "joint", self.prefix

    def mixed(self, compared: Tensor, free: Tensor) -> Tensor:
        """Returns both halves (H, ...) as one batch (B, ...), in the order of the videos."""
        first = self.free_first.view(-1, 1, *[1] * (free.dim() - 1))
        both, swapped = (torch.stack(halves, dim=1) for halves in ((free, compared), (compared, free)))
        return torch.where(first, both, swapped).flatten(0, 1)


def draw_batch(state, c, image_set: data.ImageSet, critic_update: int) -> Batch:
    """Draws the batch of one critic update of the current step, on the device."""
    half, past = c.BATCH_SIZE // 2, c.NUM_FRAMES - 1
    mine, mine_of_half = state.ranks.slice_of(c.BATCH_SIZE), state.ranks.slice_of(half)
    rng = state.rng(c, "videos", critic_update)
    z, code_noise = torch.randn(2, half, c.LATENT_DIM, generator=rng)[:, mine_of_half]
    v = torch.randn(half, c.MOTION_DIM, generator=rng)[mine_of_half]
    draws = torch.rand(2, half, generator=rng)[:, mine_of_half]
    free_first, is_noise = draws[0] < 0.5, draws[1] >= CLIP_STARTS
    anchors, *e = torch.rand(4, c.BATCH_SIZE, generator=rng)[:, mine]
    prefix = PREFIXES[torch.randint(len(PREFIXES), (), generator=state.rng(c, "prefix"))]

    windows, places, _ = dynamics.draw_windows(state, c, image_set, c.BATCH_SIZE, UNROLLED, critic_update)
    windows, free = (Windows(*(tensor[i::2] for tensor in windows)) for i in (0, 1))
    places = dynamics.Places(*(rows[::2] for rows in places))
    shown = (places.first + UNROLLED - 1).minimum(places.end - 1)
    rows = torch.cat([shown[:, None], places.before(shown, past + 1)], dim=1)                       # (H, 1 + P + 1)
    images = dynamics.read_frames(image_set, rows, places.mirror, state.device)

    def put(tensor):
        return to_device(tensor, state.device)

    (mu, logvar), shown = state.codes, put(shown + places.mirror)
    return Batch(
        windows, free.codes, free.anchor, put(is_noise), put(z), put(v), images[:, 0],
        (1 + images[:, 1:].flatten(1, 2)) / 2, mu[shown] + torch.exp(0.5 * logvar[shown]) * put(code_noise),
        put(free_first), *real_frames(state, c, image_set, critic_update, anchors.numpy()), put(torch.stack(e, dim=1)),
        prefix, mine.start)


def real_frames(state, c, image_set: data.ImageSet, critic_update: int, draws: np.ndarray) -> Iterator[Tensor]:
    """Yields real, real_before and real_anchor, mirrored alike with FLIP. draws (B,) in [0, 1): choose the anchor."""
    rows, flips = training_step.rows_of_images(state, c, image_set, critic_update)
    begin, end = training_step.clip_bounds(image_set, rows)
    rows = np.maximum(rows, begin + 1)                           # the first frame of a clip has none before it
    anchors = np.minimum(begin + (draws * (end - begin)).astype(int), end - 1)
    for chosen in (rows, rows - 1, anchors):
        yield training_step.read_images(image_set, chosen, state.device, flips)


# ------------------------------------------------------------------------------------- generator's pass

def pair(a: Tensor, b: Tensor) -> Tensor:
    """Two images (B, C, H, W) as a pair critic reads them, (B, 3*C, H, W)."""
    return torch.cat([a, b, b - a], dim=1)


def make_videos(generator: Generator, c, batch: Batch) -> Videos:
    """The frames that are judged: of H videos that are compared with their clips, and of H free ones."""
    known, half, past = batch.windows, len(batch.free), c.NUM_FRAMES - 1
    v, kl = dynamics.motion_codes(generator.layer.dynamics, c, known)
    is_noise = batch.is_noise[:, None]
    with torch.no_grad():
        z = generator.start(batch.z)
        free = Window(torch.where(is_noise[:, None], z[:, None], batch.free), batch.v,
                      torch.where(is_noise, z, batch.free_anchor))
        prefix = unrolled(generator, free, batch.prefix, fed_back_every=FED_BACK_EVERY)
        run = torch.cat([free.codes.flip(1), prefix], dim=1)        # all codes of the free videos so far, oldest first
    start = torch.cat([known.codes.flip(1), run[:, -past:]])                                # (B, P, LATENT_DIM)
    v, anchor = torch.cat([v, batch.v]), torch.cat([known.anchor, free.anchor])
    codes = unrolled(generator, Window(start.flip(1), v, anchor), UNROLLED)                 # (B, UNROLLED, LATENT_DIM)
    sequence, run = torch.cat([start, codes], dim=1), torch.cat([run, codes[half:].detach()], dim=1)

    # The last two frames, from windows one frame apart.
    earlier = torch.cat([batch.earlier, images_before(generator, c, run)])
    both = [Window(sequence[:, -n - past:-n].flip(1), v, anchor) for n in (2, 1)]
    images, alpha = generator.image_and_alpha(
        torch.cat([codes[:, -2], codes[:, -1]]), torch.cat([earlier[:, c.CHANNELS:], earlier[:, :-c.CHANNELS]]),
        window=Window(*map(torch.cat, zip(*both))))
    before, last = (of_one_frame.split(half) for of_one_frame in images.chunk(2))

    # Images without a window: reconstructions and, without a prefix, the first images of videos from noise.
    stills = generator.render(batch.code if batch.prefix else torch.cat([batch.code, free.codes[:, 0]]))
    frame, far = last, None
    if batch.prefix:
        with torch.no_grad():
            anchors = generator.render(anchor).split(half)
        far = batch.mixed(*map(pair, anchors, last))
    else:                                        # the last frame from noise is too close to its anchor, the first
        frame = last[0], torch.where(is_noise[:, None, None], stills[half:], last[1])
    return Videos(batch.mixed(*frame), batch.mixed(*map(pair, before, last)), far, alpha, stills[:half], last[0],
                  dynamics.code_error(codes[:half], known), kl)


@torch.no_grad()
def images_before(generator: Generator, c, run: Tensor) -> Tensor:
    """The P + 1 frames before the last of the codes `run` (H, N, LATENT_DIM), newest first, (H, (P+1)*C, H, W) in
    [0, 1], as the layer would show them with ALPHA_INIT. Only every DECODED_EVERY-th is decoded, and stands for those
    before it: all would take a tenth of the step."""
    places = run.shape[1] - 2 - torch.arange(0, c.NUM_FRAMES, DECODED_EVERY, device=run.device)
    images = generator.layer.displayed(generator.vae.decode(run[:, places].flatten(0, 1)))
    images = images.unflatten(0, (-1, len(places))).repeat_interleave(DECODED_EVERY, dim=1)
    return images[:, :c.NUM_FRAMES].flatten(1, 2)


def videos_for_critics(generator: Generator, c, batch: Batch) -> Videos:
    """The videos without gradient. For a shared batch, the pass is stored, and the generator's update reuses it."""
    if batch.videos is not None:
        return batch.videos
    if batch.shared:
        batch.videos = make_videos(generator, c, batch)
        return batch.videos
    with torch.no_grad():
        return make_videos(generator, c, batch)


# ------------------------------------------------------------------------------------- algorithm

def critic_terms(state, c, batch: Batch) -> Iterator[tuple[Tensor, dict]]:
    """L_D of the frame critic, as in training_step.critic_terms."""
    fake = videos_for_critics(state.generator, c, batch).frame.detach()
    yield from training_step.wasserstein_terms(state.critic, c, batch.real, fake, batch.e[:, 0], batch.first)


def pair_critic_terms(state, c, batch: Batch) -> Iterator[tuple[Tensor, dict]]:
    """L_D of the near critic and of the far critic."""
    videos = videos_for_critics(state.generator, c, batch)
    for number, (name, real, fake) in enumerate((("near", batch.real_before, videos.near),
                                                 ("far", batch.real_anchor, videos.far)), 1):
        if fake is not None:
            yield from training_step.wasserstein_terms(
                state.pair_critics[name], c, pair(real, batch.real), fake.detach(), batch.e[:, number], batch.first,
                prefix=f"{name}_")


def generator_terms(state, c, batch: Batch) -> Iterator[tuple[Tensor, dict]]:
    """L_G = -mean D(frame) - LAMBDA_PAIR * (mean D_near(near) + mean D_far(far)) + LAMBDA_CODE * (error of codes)
    + LAMBDA_MOTION * KL(q(v) || N(0, I)) + JOINT_ERROR_SHARE * (f * LAMBDA_REC * reconstruction + LAMBDA_FRAME * (error
    of predicted frames)), f = losses.size_factor, as one term. The errors are those of the videos with a clip."""
    if not batch.shared:
        batch.videos = make_videos(state.generator, c, batch)
    videos, others = batch.videos, batch.earlier * 2 - 1
    judged = state.critic(videos.frame).mean() + c.LAMBDA_PAIR * sum(
        state.pair_critics[name](fake).mean() for name, fake in (("near", videos.near), ("far", videos.far))
        if fake is not None)
    error, frame_error = (losses.motion_weighted_error(image, batch.target, others)
                          for image in (videos.reconstruction, videos.predicted))
    factor = losses.size_factor(batch.target[0].numel())
    yield (-judged + c.LAMBDA_CODE * videos.code_error + c.LAMBDA_MOTION * videos.motion_kl
           + c.JOINT_ERROR_SHARE * (factor * c.LAMBDA_REC * error + c.LAMBDA_FRAME * frame_error),
           {"reconstruction": losses.reconstruction_loss(videos.reconstruction, batch.target),
            "code_error": videos.code_error, "frame_error": frame_error, "motion_kl": videos.motion_kl,
            **training_step.alpha_values(videos.alpha)})


def apply_updates(state, c, batches: list[Batch]) -> dict[str, Tensor]:
    """N_CRITIC updates of the three critics and one of decoder and layer. Returns as training_step.apply_updates."""
    for batch in batches:
        pieces = batch.pieces(c.MICRO_BATCH or len(batch.real))
        pieces[0].shared = len(pieces) == 1 and batch is batches[-1]
        values = update.descend(state, c, "critic", critic_terms, pieces)
        values |= update.descend(state, c, "pair_critics", pair_critic_terms, pieces)
    vae = state.generator.vae
    with update.frozen(state.critic, state.pair_critics, vae.encoder, vae.to_mu, vae.to_logvar):
        values |= update.descend(state, c, "generator", generator_terms, pieces)
    frame = torch.cat([piece.videos.frame.detach() for piece in pieces])
    return values | {"picture_spread": training_step.picture_spread(frame, batch.real)}


def joint_step(state, c, image_set: data.ImageSet) -> dict[str, Tensor]:
    """Trains for one step of stage 3. Returns as training_step."""
    begin(state, c, image_set)
    batches = [draw_batch(state, c, image_set, critic_update) for critic_update in range(c.N_CRITIC)]
    set_learning_rates(state, c)
    return training_step.take_step(state, c, apply_updates, batches, c.BATCH_SIZE, since=1000 * c.DYNAMICS_KIMG)
