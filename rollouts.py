"""Videos of a model of clips: errors of predicted frames, values along a video, and what the sample sheets show.

Training calls this on held-out clips, or on training clips if the set is too small to hold some out.
"""

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import data
import training_step
from dynamics import CHUNK, unrolled
from model_definitions import Generator, Window
from random_keys import torch_generator

AHEAD = (1, 4, 8)              # frames ahead at which predictions are measured
MEASURED_CLIPS = 32            # at most
STARTS = 3                     # windows per measured clip
LONG = 64                      # frames of a measured video
VIDEOS = 16                    # measured videos from noise
DRIFT_AT = 31                  # frame whose colours are compared with those of frame 0
LATE = 16                      # frame of a video from noise that the scores of images use
SHOWN, SHOWN_FRAMES = 4, 32    # videos of each kind on a sheet, and their frames


# ------------------------------------------------------------------------------------- starts

def shown_clips(image_set: data.ImageSet) -> np.ndarray:
    """Returns the held-out clips, or the training clips if none are held out."""
    return image_set.held_out_clips if len(image_set.held_out_clips) else image_set.train_clips


def windows(c: SimpleNamespace, image_set: data.ImageSet, codes: tuple[Tensor, Tensor], count: int, starts: int,
            frames: int) -> tuple[Window, np.ndarray]:
    """Returns windows of `count` of shown_clips, each at `starts` evenly spaced places, and the rows of the first frame
    after each window. Clips without `frames` frames more are left out."""
    clips = shown_clips(image_set)
    begin, end = (image_set.clip_offsets[clips + i] for i in (0, 1))
    begin, end = (rows[end - begin > frames] for rows in (begin, end))
    begin, end = (rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] for rows in (begin, end))
    low = np.minimum(begin + c.NUM_FRAMES - 1, end - frames)
    first = np.linspace(low, end - frames, starts).astype(int).flatten()
    rows = np.maximum(first[:, None] - np.arange(1, c.NUM_FRAMES), np.tile(begin, starts)[:, None])
    earlier = codes[0][torch.from_numpy(rows).to(codes[0].device)]
    v = torch.randn(len(first), c.MOTION_DIM, generator=torch_generator(c.SEED, "motion codes of windows"))
    return Window(earlier, v.to(earlier.device), earlier[:, -1]), first


def from_noise(generator: Generator, c: SimpleNamespace, count: int, device: torch.device) -> Window:
    """Returns the windows of `count` videos that start from noise, always the same ones."""
    z = torch.randn(count, c.LATENT_DIM, generator=torch_generator(c.SEED, "samples"))
    v = torch.randn(count, c.MOTION_DIM, generator=torch_generator(c.SEED, "motion codes of samples"))
    return window_of_noise(generator, c, torch.cat([z, v], dim=1).to(device))


def window_of_noise(generator: Generator, c: SimpleNamespace, noise: Tensor) -> Window:
    """Returns the windows of the videos that start from noise = z and v, (N, LATENT_DIM + MOTION_DIM)."""
    z, v = noise.split((c.LATENT_DIM, c.MOTION_DIM), dim=1)
    return Window.still(generator.start(z), v, c.NUM_FRAMES - 1)


def rendered(generator: Generator, z: Tensor) -> Tensor:
    """Returns the image of each code (N, LATENT_DIM) on its own, (N, C, H, W) in [-1, 1]."""
    return torch.cat([generator.render(part) for part in z.split(CHUNK)])


# ------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def prediction_errors(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
                      codes: tuple[Tensor, Tensor], linear: bool = True) -> dict[str, float]:
    """Returns {"r1": the error of rendered predictions one frame ahead, divided by that of a copy of the last frame,
    ...} and "r1_frozen", the same from windows that show no motion, and with `linear` "r1_linear", that of codes that
    go on as between the last two frames. Empty if the clips are too short."""
    window, first = windows(c, image_set, codes, MEASURED_CLIPS, STARTS, max(AHEAD))
    if not len(first):
        return {}
    live, frozen = (unrolled(generator, window, max(AHEAD), frozen) for frozen in (False, True))
    newest = window.codes[:, 0, None]
    frames = torch.arange(1, 1 + max(AHEAD), device=newest.device)[:, None]
    predicted = {"": live, "_frozen": frozen} | ({"_linear": newest + frames * (newest - window.codes[:, 1, None])}
                                                 if linear else {})
    copy, found = rendered(generator, window.codes[:, 0]), {}
    for ahead in AHEAD:
        real = rendered(generator, codes[0][torch.from_numpy(first + ahead - 1).to(live.device)])
        by_copying = (copy - real).abs().mean()
        for kind, z in predicted.items():
            error = (rendered(generator, z[:, ahead - 1]) - real).abs().mean()
            found[f"r{ahead}{kind}"] = (error / by_copying).item()
    return found


def course(frames: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns values along videos, given as frames (B, C, H, W) in [-1, 1], one after the other: {name: (T, B)}.

    contrast: standard deviation of a frame; drift: mean difference of its mean colour from that of frame 0; speed:
    mean absolute difference from the frame before; acceleration: that of the second difference.
    """
    found, past, start = {name: [] for name in ("contrast", "drift", "speed", "acceleration")}, [], None
    for frame in frames:
        colour, past = frame.mean((2, 3)), [frame, *past[:2]]
        start = colour if start is None else start
        found["contrast"].append(frame.flatten(1).std(1))
        found["drift"].append((colour - start).abs().mean(1))
        if len(past) > 1:
            found["speed"].append((past[0] - past[1]).abs().flatten(1).mean(1))
        if len(past) > 2:
            found["acceleration"].append((past[0] - 2 * past[1] + past[2]).abs().flatten(1).mean(1))
    return {name: torch.stack(values) for name, values in found.items() if values}


@torch.no_grad()
def made_course(generator: Generator, window: Window, frames: int = LONG,
                course_of: Callable[[Iterable[Tensor]], dict[str, Tensor]] = course) -> dict[str, Tensor]:
    """Returns the course of the videos after a window, and "length": |z| / sqrt(LATENT_DIM)."""
    lengths = []

    def images():
        for image, z in itertools.islice(generator.roll(window), frames):
            lengths.append(z.norm(dim=1) / z.shape[1] ** 0.5)
            yield image

    return course_of(images()) | {"length": torch.stack(lengths)}


def real_course(image_set: data.ImageSet, device: torch.device, frames: int = LONG) -> dict[str, Tensor]:
    """Returns the course of up to MEASURED_CLIPS of the longest of shown_clips, up to the shortest one's end."""
    clips = shown_clips(image_set)
    begin, length = image_set.clip_offsets[clips], np.diff(image_set.clip_offsets)[clips]
    longest = np.argsort(-length, kind="stable")[:MEASURED_CLIPS]
    begin, frames = begin[longest], min(frames, length[longest].min())
    return course(training_step.read_images(image_set, begin + t, device) for t in range(frames))


def courses(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
            device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the course of VIDEOS videos from noise, and real_course."""
    return made_course(generator, from_noise(generator, c, VIDEOS, device)), real_course(image_set, device)


def drift_of(values: dict[str, Tensor], at: int) -> float:
    return values["drift"][at].mean().item()


def video_values(made: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, float]:
    """Returns what the courses of generated and real videos say, as ratios whose best value is 1: "contrast" and
    "z_growth", the last frame's by the first one's; "speed" and "speed_95", the median and 95% quantile by those of
    real clips; "drift", that of frame DRIFT_AT, or of the clips' last one, by that of real clips."""
    at = min(DRIFT_AT, len(real["drift"]) - 1, len(made["drift"]) - 1)
    found = {name: (values[-1].mean() / values[0].mean()).item()
             for name, values in (("contrast", made["contrast"]), ("z_growth", made["length"]))}
    for name, share in (("speed", 0.5), ("speed_95", 0.95)):
        found[name] = (made["speed"].quantile(share) / real["speed"].quantile(share).clamp_min(1e-6)).item()
    return found | {"drift": drift_of(made, at) / max(drift_of(real, at), 1e-6)}


def compared(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet, device: torch.device) -> dict:
    """Returns {value: {"made": medians of videos from noise, frame by frame, "low", "high": 5% and 95% quantiles of
    real clips, or of the videos where clips have no such value}}."""
    made, real = courses(generator, c, image_set, device)

    def curve(values, share):
        return [float(f"{value:.4g}") for value in values.quantile(share, dim=1).tolist()]

    return {name: {"made": curve(values, 0.5), "low": curve(real.get(name, values), 0.05),
                   "high": curve(real.get(name, values), 0.95)} for name, values in made.items()}


def measure(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
            codes: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns prediction_errors, without those of constant velocity, and video_values."""
    return (prediction_errors(generator, c, image_set, codes, linear=False)
            | video_values(*courses(generator, c, image_set, codes[0].device)))


@torch.no_grad()
def late_frames(generator: Generator, c: SimpleNamespace, noise: Tensor) -> Tensor:
    """Returns the LATE-th frame of each video that starts from noise = z and v, (N, LATENT_DIM + MOTION_DIM), as images
    (N, C, H, W) in [-1, 1]."""
    def late(part):
        image, _ = next(itertools.islice(generator.roll(window_of_noise(generator, c, part)), LATE - 1, None))
        return image

    return torch.cat([late(part) for part in noise.split(CHUNK)])


# ------------------------------------------------------------------------------------- sheets

@torch.no_grad()
def videos(generator: Generator, c: SimpleNamespace, image_set: data.ImageSet,
           codes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns SHOWN real videos, grey after the clip's end, what the model makes of the windows before them, and as
    many videos from noise, each (SHOWN, SHOWN_FRAMES, C, H, W) in [-1, 1]; fewer if there are fewer clips."""
    window, first = windows(c, image_set, codes, SHOWN, 1, min(SHOWN_FRAMES, 1 + max(AHEAD)))
    device, made = codes[0].device, []
    for start in (window, from_noise(generator, c, SHOWN, device)):
        images = [image for image, _ in itertools.islice(generator.roll(start), SHOWN_FRAMES)]
        made.append(torch.stack(images, dim=1))
    _, ends = training_step.clip_bounds(image_set, first)
    rows = first[:, None] + np.arange(SHOWN_FRAMES)
    real = training_step.read_images(image_set, np.minimum(rows, ends[:, None] - 1).flatten(), device)
    real = real.unflatten(0, rows.shape)
    real[torch.from_numpy(rows >= ends[:, None]).to(device)] = 0
    return real, *made
