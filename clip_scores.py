"""Scores of the videos of a model of clips, which evaluate.py prints beside those of its images.

A window is WINDOW frames in a row: of a clip, or of a video from noise, from frame FROM on. Half of the training clips
are the reference; windows of the other half show what each score is for real clips, also for frozen, shuffled and fast
ones, which makes the scale readable.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import dynamics
import metrics
import pictures
import random_keys
import rollouts
import training_step
from model_definitions import Discriminator, Generator

WINDOW, FROM = 9, rollouts.LATE
TRIPLE = (0, 2, 4)             # frames of a window whose order a network learns to recognise
SHUFFLED = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))
ORDER_STEPS, ORDER_BATCH, ORDER_RATE = 400, 32, 1e-3
BATCH = 32                     # videos that are made at once
COPY_CHECK = 256               # videos, and held-out windows, in the copy check
SHOWN = 6                      # pairs on its sheet
LEAST = 16                     # windows of each half of the training clips

Score = tuple[str, float, str]      # name, value, meaning


# ------------------------------------------------------------------------------------- windows

def starts_of(image_set: data.ImageSet, clips: Sequence[int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the rows of the first frames of up to `count` different windows of these clips, in random order."""
    offsets = image_set.clip_offsets
    starts = [np.arange(offsets[clip], offsets[clip + 1] - WINDOW + 1) for clip in clips]
    return rng.permutation(np.concatenate([np.zeros(0, int), *starts]))[:count]


def read_windows(image_set: data.ImageSet, starts: np.ndarray, frames: Sequence[int] = range(WINDOW)) -> Tensor:
    """Returns these frames of the windows, uint8 (N, T, C, H, W)."""
    rows = starts[:, None] + np.array(frames)
    return data.read_batch(image_set, rows.flatten()).unflatten(0, rows.shape)


@torch.inference_mode()
def generated_windows(generator: Generator, c: SimpleNamespace, count: int, seed: int, device: torch.device) -> Tensor:
    """Returns one window of each of `count` videos from noise, uint8 (count, WINDOW, C, H, W) on the CPU."""
    noise = torch.randn(count, c.LATENT_DIM + c.MOTION_DIM, generator=random_keys.torch_generator(seed, "evaluate"))
    found = []
    for part in noise.split(BATCH):
        roll = generator.roll(rollouts.window_of_noise(generator, c, part.to(device)))
        frames = itertools.islice(roll, FROM, FROM + WINDOW)
        found.append(torch.stack([data.to_uint8(image).cpu() for image, _ in frames], dim=1))
    return torch.cat(found)


# ------------------------------------------------------------------------------------- scores

def scores(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet, device: torch.device,
           extractor: Callable[[Tensor], Tensor] | None, count: int,
           seed: int) -> tuple[Iterator[Score], dict[str, np.ndarray]]:
    """Returns the scores of `count` videos from noise, computed when they are asked for, and the sheets {file: pixels},
    which are complete after the last one. extractor: as in evaluate.py. No scores if there are too few clips."""
    rng = random_keys.numpy_generator(seed, "evaluate clips")
    halves = np.array_split(rng.permutation(image_set.train_clips), 2)
    reference, others = (starts_of(image_set, clips, count, rng) for clips in halves)
    if min(len(reference), len(others)) < LEAST:
        print(f"no scores of videos: too few clips have {WINDOW} frames or more")
        return iter(()), {}
    sheets = {}

    def found():
        yield from of_predictions(generator, c, image_set, device)
        yield from of_courses(generator, c, image_set, device)
        made = generated_windows(generator, c, count, seed, device)
        yield ("flicker", metrics.flicker(made), "change of the median pixel from frame to frame, levels of 255, "
               f"{count} videos; real clips {metrics.flicker(read_windows(image_set, others)):.3f}")
        yield from of_order(c, image_set, halves, others, made, device, seed)
        if extractor:
            yield from of_motion(extractor, image_set, reference, others, made, rng)
        yield from of_copies(image_set, made[:COPY_CHECK], rng, sheets)

    return found(), sheets


@torch.inference_mode()
def of_predictions(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
                   device: torch.device) -> Iterator[Score]:
    clips = rollouts.shown_clips(image_set)
    rows = np.concatenate([np.arange(*image_set.clip_offsets[clip:clip + 2]) for clip in clips])
    mu = torch.zeros(len(image_set.images), c.LATENT_DIM, device=device)
    mu[torch.from_numpy(rows).to(device)] = dynamics.encode_rows(generator.vae, image_set, rows, device)[0]
    errors = rollouts.prediction_errors(generator, c, image_set, (mu, mu))
    kind = "held-out" if len(image_set.held_out_clips) else "training"
    for ahead in rollouts.AHEAD if errors else ():
        yield (f"prediction r{ahead}", errors[f"r{ahead}"],
               f"error of frame {ahead} after a window / that of a copy of its last "
               f"frame, {kind} clips; constant velocity of the codes {errors[f'r{ahead}_linear']:.3f}, "
               f"from a frozen window {errors[f'r{ahead}_frozen']:.3f}")


def of_courses(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
               device: torch.device) -> Iterator[Score]:
    values = rollouts.video_values(*rollouts.courses(generator, c, image_set, device))
    last = rollouts.LONG - 1
    yield "contrast", values["contrast"], f"of frame {last} / that of frame 0, {rollouts.VIDEOS} videos from noise"
    yield "length of z", values["z_growth"], "the same of |z|"
    yield "speed", values["speed"], "median change from frame to frame / that of real clips"
    yield "speed, 95%", values["speed_95"], "its 95% quantile / that of real clips"
    yield "colour drift", values["drift"], f"of frame {rollouts.DRIFT_AT} from frame 0 / that of real clips"


def of_order(c: SimpleNamespace, image_set: data.ImageSet, halves: Sequence[np.ndarray], others: np.ndarray,
             made: Tensor, device: torch.device, seed: int) -> Iterator[Score]:
    """A network learns on the first half of the clips to tell three frames in order from reversed and shuffled ones."""
    rng = random_keys.numpy_generator(seed, "order")
    starts = starts_of(image_set, halves[0], ORDER_STEPS * ORDER_BATCH, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Discriminator(c.IMAGE_SIZE, 3 * c.CHANNELS, width=16)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=ORDER_RATE)
    in_order = torch.arange(ORDER_BATCH, device=device) < ORDER_BATCH // 2
    for step in range(ORDER_STEPS):
        optimizer.param_groups[0]["lr"] = ORDER_RATE * (1 - step / ORDER_STEPS)
        frames = read_windows(image_set, rng.choice(starts, ORDER_BATCH), TRIPLE)
        for row in range(ORDER_BATCH // 2, ORDER_BATCH):
            order = (2, 1, 0) if row % 2 else SHUFFLED[rng.integers(len(SHUFFLED))]
            frames[row] = frames[row, list(order)]
        loss = F.binary_cross_entropy_with_logits(network(stacked(frames, device)), in_order.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def share(frames):
        return torch.cat([network(stacked(part, device)) > 0 for part in frames.split(ORDER_BATCH)]).float().mean()

    real = read_windows(image_set, others, TRIPLE)
    yield ("order", share(made[:, list(TRIPLE)]), "share of triples that a network takes for frames in order; of real "
           f"clips {share(real):.3f}, reversed {share(real.flip(1)):.3f}, "
           f"shuffled {np.mean([share(real[:, list(order)]) for order in SHUFFLED]):.3f}")


def stacked(frames: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, T, C, H, W) -> (B, T*C, H, W) in [-1, 1], on the device."""
    return data.to_image(frames.flatten(1, 2).to(device))


def of_motion(extractor: Callable[[Tensor], Tensor], image_set: data.ImageSet, reference: np.ndarray,
              others: np.ndarray, made: Tensor, rng: np.random.Generator) -> Iterator[Score]:
    """Compares features of two neighbouring frames, and their difference, with those of the reference."""
    def features(frames):
        return extractor(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)

    first, end = training_step.clip_bounds(image_set, others)
    anywhere = first + (rng.random(len(others)) * (end - first)).astype(int)       # a frame of the same clip
    of_reference, of_made = features(read_windows(image_set, reference, (0, 1))), features(made[:, :2])
    now, later, fast = features(read_windows(image_set, others, (0, 1, 2)))
    other, = features(read_windows(image_set, anywhere, (0,)))
    of_made, real, frozen, shuffled, double = metrics.motion_distances(
        of_reference, of_made, (now, later), (now, now), (now, other), (now, fast))
    yield ("motion distance", of_made, f"Frechet distance of features and their changes, {len(made)} videos; "
           f"{len(others)} windows of real clips {real:.1f}, frozen {frozen:.1f}, shuffled {shuffled:.1f}, double "
           f"speed {double:.1f}")


def of_copies(image_set: data.ImageSet, made: Tensor, rng: np.random.Generator,
              sheets: dict[str, np.ndarray]) -> Iterator[Score]:
    """How near videos are to the nearest window of a training clip, compared with windows of held-out clips."""
    held_out = read_windows(image_set, starts_of(image_set, image_set.held_out_clips, COPY_CHECK, rng))
    windows = torch.cat([made, held_out]).flatten(0, 1)
    points = metrics.thumbnails(windows).unflatten(0, (-1, WINDOW))
    clips = (metrics.thumbnails(data.read_batch(image_set, np.arange(*image_set.clip_offsets[clip:clip + 2])))
             for clip in image_set.train_clips)
    distance, clip, frame = metrics.nearest_window(points, clips)
    closest = distance[:len(made)].argsort(stable=True)[:SHOWN]
    starts = image_set.clip_offsets[image_set.train_clips[clip[closest].numpy()]] + frame[closest].numpy()
    pairs = torch.stack([made[closest], read_windows(image_set, starts)], dim=1).flatten(0, 2)
    sheets["nearest_clips.png"] = pictures.grid(list(pairs.permute(0, 2, 3, 1).numpy()), columns=WINDOW)
    of_made, compared = distance.split([len(made), len(held_out)])
    words = f"median distance to the nearest window of a training clip, RMS in levels at {metrics.THUMBNAIL} px"
    if len(held_out):
        words += f"; {compared.median():.3f} for windows of held-out clips"
        share = (of_made <= compared.quantile(0.05)).double().mean().item()
        yield ("copies of clips, 5%", share, f"share of {len(made)} videos as near to a training clip as the nearest "
               f"5% of {len(held_out)} windows of held-out clips; about 0.05 without copies")
    yield "nearest clip", of_made.median().item(), words
