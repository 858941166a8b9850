"""What a run shows while it trains: metrics.jsonl, progress, sample sheets, warnings, and the table of healthy values.

HEALTHY is the one table of what the logged values mean and which values are healthy. The page of a run (report.py),
the warnings during training and the table in docs/running.md are made from it.
"""

import collections
import contextlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
import data
import pictures
import random_keys
import rollouts

PLAIN_LINE_SECONDS = 20        # between two progress lines where there is no terminal for a bar
CLASSES_SHOWN = 16             # rows of the sample sheet of classes, at most, ...
IMAGES_PER_CLASS = 8           # ... and its columns
WARN_AFTER = 5                 # logged lines in a row outside a `lost` range before the warning

# ------------------------------------------------------------------------------------- healthy values

# (low, high); or one pair per image size in pixels, interpolated between sizes; or a function of alpha's bounds.
Range = tuple[float, float] | dict[int, tuple[float, float]] | Callable[[float, float], tuple[float, float]]


class Value(NamedTuple):
    """A value of metrics.jsonl: what it is, and which values are healthy."""
    key: str
    title: str
    words: str
    healthy: Range | None = None
    from_step: int = 0          # the range holds from this step on
    trend: str = ""             # the direction that a healthy value takes, in addition to its range
    bar: str = ""               # its name in the progress bar
    lost: Range | None = None   # training warns when WARN_AFTER logged lines in a row are outside
    advice: str = ""            # what to try then


ALPHA_STUCK = "Alpha is at its bound everywhere. Try a lower --learning-rate, or a new run with a higher --alpha-span"
HEALTHY = (
    Value("score_gap", "Score gap",
          "Mean D(real) - mean D(fake), the difference between the critic's scores. Above 10 in the first steps, then "
          "mostly 1 to 10 at 64 px and 5 to 20 at 128 px for drawings, less for photos. Noisy: below 0 in single "
          "steps is harmless.",
          {32: (-3, 10), 64: (-4, 15), 128: (-6, 25), 256: (-8, 50)}, 200, bar="gap", lost=(-1e4, 1e4),
          advice="The critic diverges. Try a lower --critic-learning-rate, a higher --lambda-gp, or --gp-every 1"),
    Value("gradient_norm", "Gradient norm",
          "Mean norm of the critic's gradient where the penalty measures it. It settles near 1 + W / (2 LAMBDA_GP) "
          "for a distance W. Above 3 for long the critic diverges; below 0.5 the generator learns nothing from it.",
          (0.7, 2.5), 200, bar="norm", lost=(0, 10),
          advice="The critic diverges: the penalty should keep the norm near 1. Try a lower --critic-learning-rate, a "
                 "higher --lambda-gp, or --gp-every 1"),
    Value("gradient_penalty", "Gradient penalty",
          "Mean of (gradient norm - 1)^2, before its weight LAMBDA_GP.", (0, 2), 200),
    Value("wasserstein", "Wasserstein estimate",
          "Score gap / gradient norm, the estimate of the Wasserstein distance. The gap alone is too large by that "
          "factor. Falls over thousands of steps.",
          {32: (-3, 8), 64: (-4, 12), 128: (-6, 20), 256: (-8, 40)}, 200, "falling", "W"),
    Value("critic_loss", "Critic loss",
          "L_D, the penalty included. Varies from step to step; after the first steps between -(score gap) and 0.",
          bar="D"),
    Value("generator_loss", "Generator loss",
          "L_G. Most of it is the reconstruction term, so it falls with the reconstruction error."),
    Value("reconstruction", "Reconstruction error",
          "Mean absolute difference between an image and its reconstruction, values from -1 to 1. Blobs at 0.3, clear "
          "shapes at 0.1, 0.03 at the end of a long run.", (0.01, 0.45), 200, "falling", "rec"),
    Value("kl", "KL divergence",
          "In nats, summed over the latent dimensions. Near 0 the encoder has collapsed: raise LAMBDA_REC or lower "
          "LAMBDA_KL.", (10, 1000), 200, bar="KL"),
    Value("posterior_variance", "Posterior variance",
          "Mean of mu^2 + sigma^2: the scale of the codes, which the prior learns. Near 1 after some hundred steps, "
          "0.1 in long runs. Far above 3 the encoder has left N(0, I).",
          (0.02, 3), 200),
    Value("prior_error", "Error of the prior",
          "Flow matching loss of the network that turns noise into codes: mean squared error of its velocity.",
          (0.05, 2), 200, "falling", "prior"),
    Value("augment", "Share of changed images",
          "Share of the training images that are turned, shifted and recoloured. With AUGMENT -1 it rises while the "
          "prior overfits, up to 0.7."),
    Value("alpha_mean", "Alpha",
          "The factor in the last tanh: mean over a batch. Starts at ALPHA_INIT and stays between ALPHA_INIT / "
          "ALPHA_SPAN and ALPHA_INIT * ALPHA_SPAN; with the defaults 1.6 to 2.6 after some hundred steps.",
          lambda low, high: (1.1 * low, high / 1.1), bar="alpha"),
    Value("alpha_min", "Alpha, smallest", "Smallest alpha of a batch.", lambda low, high: (low, high / 1.1),
          lost=lambda low, high: (0.98 * low, 0.98 * high), advice=ALPHA_STUCK),
    Value("alpha_max", "Alpha, largest", "Largest alpha of a batch.", lambda low, high: (1.1 * low, high),
          lost=lambda low, high: (1.02 * low, 1.02 * high), advice=ALPHA_STUCK),
    Value("alpha_spread", "Alpha within an image",
          "Standard deviation of alpha over the pixels of an image. At 0 all pixels have the same alpha."),
    Value("picture_spread", "Image spread",
          "Standard deviation over a batch of the images that the critic judges, of stills reconstructions, divided by "
          "that of the real ones. Near 0 they are all alike.", (0.4, 1.5), 200, lost=(0.05, 20),
          advice="Near 0 the decoder's images are all alike, far above 1 the real ones are. Try a lower "
                 "--learning-rate, a new run with another --seed, or look at the images in DATA"),
    Value("stage", "Stage", "Of a run on clips: 1 images, 2 motion, 3 both; else 1."),
    Value("motion_loss", "Motion loss", "Clips, stage 2: the sum of the next three values with their weights, and of "
          "prior_error. It rises when more frames are unrolled."),
    Value("code_error", "Error of codes", "Clips, from stage 2 on: mean absolute difference between the predicted "
          "codes of the unrolled frames and mu of the real ones.", bar="code"),
    Value("frame_error", "Error of frames", "Clips, from stage 2 on: mean absolute difference between a rendered frame "
          "and the real one, weighted by motion.", bar="frame"),
    Value("motion_kl", "KL of v", "Clips, from stage 2 on: what the motion code v says about a still start, in nats. "
          "At 0 videos cannot choose a direction: lower LAMBDA_MOTION.", (0.5, 20), bar="v"),
    Value("pair_critics_loss", "Pair critics' loss", "Clips, stage 3: the sum of L_D of both critics of pairs."),
    Value("near_score_gap", "Score gap, neighbours", "Clips, stage 3: as the score gap, of the critic of pairs of "
          "neighbouring frames."),
    Value("near_gradient_norm", "Gradient norm, neighbours", "The gradient norm of that critic.", (0.7, 2.5),
          lost=(0, 10), advice="The critic diverges. Try a lower --critic-learning-rate or a higher --lambda-gp"),
    Value("near_gradient_penalty", "Gradient penalty, neighbours", "That critic's penalty.", (0, 2)),
    Value("far_score_gap", "Score gap, distant frames", "Clips, stage 3: as the score gap, of the critic of pairs of a "
          "frame and the anchor. Steps without a prefix have none."),
    Value("far_gradient_norm", "Gradient norm, distant frames", "The gradient norm of that critic.", (0.7, 2.5),
          lost=(0, 10), advice="The critic diverges. Try a lower --critic-learning-rate or a higher --lambda-gp"),
    Value("far_gradient_penalty", "Gradient penalty, distant frames", "That critic's penalty.", (0, 2)),
    Value("evaluate_r1", "Error 1 frame ahead", "Clips, from stage 2 on: error of predicted frames of held-out "
          "clips, divided by that of a copy of the last known frame. 1 is as bad as copying.", (0.1, 0.8)),
    Value("evaluate_r4", "Error 4 frames ahead", "The same, 4 frames ahead.", (0.1, 0.9)),
    Value("evaluate_r8", "Error 8 frames ahead", "The same, 8 frames ahead. In stage 2 the lowest makes best.pt.",
          (0.1, 1.1)),
    Value("evaluate_r1_frozen", "Error 1 frame ahead, frozen", "The same from windows that hold copies of their last "
          "frame: it stays near 1 if the prediction comes from motion.", (0.8, 1.4)),
    Value("evaluate_r4_frozen", "Error 4 frames ahead, frozen", "The same, 4 frames ahead.", (0.7, 1.6)),
    Value("evaluate_r8_frozen", "Error 8 frames ahead, frozen", "The same, 8 frames ahead.", (0.6, 1.8)),
    Value("evaluate_contrast", "Contrast kept", "Clips, from stage 2 on: contrast of videos from noise after 64 "
          "frames, divided by that of their first frame. Far below 1 videos fade.", (0.85, 1.15)),
    Value("evaluate_z_growth", "Growth of codes", "Length of the codes after 64 frames of these videos, divided by "
          "that of the first. Far below 1 videos fade, far above 1 they turn into noise.", (0.85, 1.15)),
    Value("evaluate_speed", "Speed", "Median change from frame to frame in these videos, divided by that of clips.",
          (0.7, 1.3)),
    Value("evaluate_speed_95", "Speed of the fastest", "The same, 95% quantiles.", (0.5, 1.5)),
    Value("evaluate_drift", "Colour drift", "How far the mean colour of frame 31 is from that of frame 0, divided by "
          "the same in real clips.", (0, 2)),
    Value("images_per_second", "Images per second",
          "Training speed since the line before, samples and checkpoints included. In stage 2 of clips, "
          "windows: each stage has its own speed.",
          trend="level"),
    Value("skipped_updates", "Skipped updates",
          "Updates that were not applied because a gradient was not finite. A few are harmless.", (0, 0)),
    Value("skipped_in_a_row", "Skipped in a row",
          "Newest steps in a row with such an update. After NAN_PATIENCE steps the run goes back to its last good "
          "checkpoint.", (0, 0)),
    Value("rollbacks", "Rollbacks", "How often the run went back to its last good checkpoint.", (0, 0)),
    Value("learning_rate", "Learning rate", "LEARNING_RATE times lr_scale; it falls between DECAY_FROM_KIMG and "
          "DECAY_TO_KIMG, if these are given."),
    Value("lr_scale", "Learning rate scale", "Factor on the learning rates, halved by each rollback.", (1, 1)),
)


def range_of(limits: Range | None, c: SimpleNamespace) -> tuple[float, float] | None:
    """Returns (low, high) of a Value's `healthy` or `lost` for a run with IMAGE_SIZE, ALPHA_INIT and ALPHA_SPAN of c.

    None if it has no range, and for alpha if ALPHA_SPAN is 1: alpha is constant then.
    """
    if isinstance(limits, dict):
        low, high = (float(np.interp(c.IMAGE_SIZE, list(limits), ends)) for ends in zip(*limits.values()))
        return low, high
    if callable(limits):
        return limits(c.ALPHA_INIT / c.ALPHA_SPAN, c.ALPHA_INIT * c.ALPHA_SPAN) if c.ALPHA_SPAN > 1 else None
    return limits


def range_words(limits: tuple[float, float]) -> str:
    """(10, 1000) -> "10 to 1,000"; (0, 0) -> "0"."""
    low, high = map(short, limits)
    return low if low == high else f"{low} to {high}"


def healthy_table(c: SimpleNamespace) -> str:
    """Returns the Markdown table of HEALTHY, with alpha's ranges for the constants c, for docs/running.md."""
    rows = ["| value | what it is | healthy |", "| --- | --- | --- |"]
    for value in HEALTHY:
        if isinstance(value.healthy, dict):
            ranges = ", ".join(f"{range_words(ends)} at {side} px" for side, ends in value.healthy.items())
        else:
            ranges = value.healthy and range_words(range_of(value.healthy, c))
        healthy = filter(None, [ranges, value.trend, value.from_step and f"from step {value.from_step} on"])
        name = f"`{value.key}`" + (f" ({value.bar})" if value.bar else "")
        rows.append(f"| {name} | {value.words} | {'; '.join(healthy)} |")
    return "\n".join(rows) + "\n"


# ------------------------------------------------------------------------------------- words

def short(value: float) -> str:
    """Returns a number with about three digits: 1.25, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Returns a duration in words: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def print_line(line: str) -> None:
    """Prints a line above the progress bar and flushes, so that it is seen at once in a file as well."""
    tqdm.write(line)
    sys.stdout.flush()


def duration_line(c: SimpleNamespace, seconds_per_step: float, step: int, images_seen: int = 0) -> str:
    """Returns how long the run will take; if that is over a day, with the flags that make it fit one. Of a run on
    clips, how long stage 1 will take: the other stages have other speeds."""
    if c.FOLDERS == "clips" and images_seen < 1000 * c.VAE_KIMG:
        left = (1000 * c.VAE_KIMG - images_seen) / c.BATCH_SIZE * seconds_per_step
        return f"stage 1 of 3 will take {duration(left)} more at {seconds_per_step:.2f} s per step"
    left = (c.STEPS - step) * seconds_per_step
    text = f"{c.STEPS} steps will take {duration(left)} more at {seconds_per_step:.2f} s per step"
    if c.MINUTES and left > c.MINUTES * 60:
        return f"{text}; --minutes {c.MINUTES:g} ends before that"
    if left > 86400:
        fitting = int(step + 86400 / seconds_per_step)
        text += f": to fit a day, give --steps {fitting}, or a smaller --image-size in a new run"
    return text


def print_start(c: SimpleNamespace, state, image_set) -> None:
    """Prints the constants, the parameters of each part, and what the run trains on."""
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in vars(c).items()), 110, break_on_hyphens=False))
    vae, layer = state.generator.vae, state.generator.layer

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    encoder, transformer = count(vae.encoder, vae.to_mu, vae.to_logvar), count(layer.transformer, layer.to_s)
    motion = count(layer.dynamics) if layer.dynamics else 0
    pair_critics = [("critics of pairs of frames", count(state.pair_critics))] if motion else []
    for part, parameters in (
            ("encoder", encoder), ("decoder", count(vae) - encoder), ("prior", count(state.generator.prior)),
            ("video and patch tokens", count(layer) - transformer - motion),
            ("Transformer and alpha head", transformer),
            *([("code tokens and Delta head", motion)] if motion else []), ("critic", count(state.critic)),
            *pair_critics):
        print(f"{part:28}{parameters:12,} parameters")
    processes = f", {state.ranks.size} processes" if state.ranks.size > 1 else ""
    if image_set.clip_offsets is None:
        print(f"{len(image_set.train):,} images to train on, {len(image_set.held_out):,} held out; device "
              f"{state.device}{processes}")
        if c.CLASSES:
            counts = np.bincount(image_set.labels[image_set.train], minlength=len(c.CLASSES))
            shown = [f"{data.printable(name)} {count:,}" for name, count in zip(c.CLASSES, counts)][:CLASSES_SHOWN]
            print(f"images to train on per class: {', '.join(shown)}{', ...' if len(c.CLASSES) > len(shown) else ''}")
        return
    print(f"{len(image_set.train_clips):,} clips of {len(image_set.train):,} frames to train on, "
          f"{len(image_set.held_out_clips):,} clips held out; device {state.device}{processes}")
    if np.diff(image_set.clip_offsets).max() <= max(rollouts.AHEAD):
        print(f"warning: predictions are not measured, because no clip has more than {max(rollouts.AHEAD)} frames")


# ------------------------------------------------------------------------------------- sample sheets

def is_sample_step(step: int, every: int) -> bool:
    """True at 0, 50, 100, 200, 400, ... until `every` is reached, then at each multiple of it."""
    if step >= every:
        return step % every == 0
    return step == 0 or (step % 50 == 0 and (step // 50).bit_count() == 1)


@torch.no_grad()
def write_samples(state, c: SimpleNamespace, image_set, folder: Path) -> None:
    """Writes sheets made from fixed noise and fixed images: real, generated, reconstructed, alpha, and the synthetic
    video; from stage 2 of a run on clips on, strips and an animation of videos instead of that, and values along them.

    Raises OSError, for example on a full disk.
    """
    columns = math.ceil(math.sqrt(c.SAMPLE_COUNT))
    shown = image_set.held_out if len(image_set.held_out) else image_set.train
    order = random_keys.numpy_generator(c.SEED, "pictures to reconstruct").permutation(len(shown))
    real = data.read_batch(image_set, shown[order[:c.SAMPLE_COUNT]], None)
    z = torch.randn(c.SAMPLE_COUNT, c.LATENT_DIM, generator=random_keys.torch_generator(c.SEED, "samples"))

    def in_batches(function, tensor):
        parts = [function(part.to(state.device)) for part in tensor.split(c.BATCH_SIZE)]
        return [torch.cat([p.cpu() for p in column]) for column in zip(*parts)]

    codes = state.ema.start(z.to(state.device))
    image, alpha = in_batches(state.ema.image_and_alpha, codes)
    reconstructed, = in_batches(lambda batch: (state.ema.reconstruct(data.to_image(batch)),), real)

    low, high = c.ALPHA_INIT / c.ALPHA_SPAN, c.ALPHA_INIT * c.ALPHA_SPAN
    sheets = {kind: pictures.grid(data.to_arrays(part), columns) for kind, part in (
        ("real", data.to_image(real)), ("generated", image), ("reconstructed", reconstructed))}
    sheets["alpha"] = pictures.heat_maps(alpha.mean(1).numpy(), low, high, columns, log=True)
    if c.CLASSES:                                # one row per class, of the same noise
        names, z = c.CLASSES[:CLASSES_SHOWN], z[:IMAGES_PER_CLASS]
        labels = torch.eye(len(c.CLASSES))[:len(names)].repeat_interleave(len(z), dim=0)
        codes_of_classes = state.ema.start(z.repeat(len(names), 1).to(state.device), labels.to(state.device))
        made, _ = in_batches(state.ema.image_and_alpha, codes_of_classes)
        rows = [pictures.grid(data.to_arrays(row), len(z)) for row in made.split(len(z))]
        sheets["classes"] = pictures.stack(rows, [data.printable(name) for name in names])
    name = f"step_{state.counters['step']:08d}"
    if state.codes is None:
        frames = state.ema.frames(codes[:4]).chunk(c.NUM_FRAMES, dim=1)                     # T of (4, C, H, W)
        video = [pictures.grid(data.to_arrays(frame * 2 - 1), columns=4) for frame in frames]
    else:
        videos = rollouts.videos(state.ema, c, image_set, state.codes)
        sheets["motion"] = strips(videos)
        video = [pictures.grid(data.to_arrays(frames), columns=rollouts.SHOWN)
                 for frames in torch.cat(videos).unbind(1)]
        with checkpoints.atomic_write(folder / f"{name}_course.json") as file:
            file.write(json.dumps(rollouts.compared(state.ema, c, image_set, state.device)).encode())
    for kind, sheet in sheets.items():
        pictures.save_picture(folder / f"{name}_{kind}.png", sheet)
    pictures.save_video(folder / f"{name}_video.gif", video, fps=8)


def strips(videos: tuple[torch.Tensor, torch.Tensor, torch.Tensor], every: int = 2) -> np.ndarray:
    """Returns rollouts.videos as one picture: pairs of rows, a real clip and below it the continuation that the model
    made, then videos from noise; every 2nd frame."""
    real, continued, from_noise = (video[:, ::every] for video in videos)
    rows = [*(row for pair in zip(real, continued) for row in pair), *from_noise]
    return pictures.grid([image for row in rows for image in data.to_arrays(row)], columns=len(rows[0]))


# ------------------------------------------------------------------------------------- log

class Log:
    """metrics.jsonl of a run, the same for TensorBoard, and the progress bar, or plain lines where the output is no
    terminal."""

    def __init__(self, folder: Path, c: SimpleNamespace, step: int):
        self.c, self.path = c, folder / "metrics.jsonl"
        self.lines_outside, self.disk_full = collections.Counter(), False
        self.start_at(step)
        self.last_progress = self.started
        self.board = open_board(folder / "tensorboard", step) if c.TENSORBOARD else None
        self.bar = tqdm(total=c.STEPS, initial=step, dynamic_ncols=True, disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar:5}| {n}/{total} {desc}")

    def start_at(self, step):
        """Opens metrics.jsonl without the lines after `step`; time and steps are counted from there."""
        cut_metrics(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.first_step = self.last_step = step
        self.started = self.last_time = time.monotonic()
        self.first_step_done = None

    def back_to(self, step: int) -> None:
        """Continues at an earlier step, after a rollback."""
        self.file.close()
        self.start_at(step)
        if self.board:
            self.to_board(lambda board: board.close())
            self.board = open_board(self.path.parent / "tensorboard", step)
        self.bar.n = step
        self.bar.refresh()

    def step(self, state, values: dict[str, torch.Tensor]) -> None:
        """Takes the scalars of one step; logs them every LOG_EVERY steps, and after a step with a skipped update."""
        c, step, now = self.c, state.counters["step"], time.monotonic()
        self.bar.update(1)
        if step == self.first_step + 1:
            self.first_step_done = now           # the first step is slower than the others
        elif step == self.first_step + 11:
            print_line(duration_line(c, (now - self.first_step_done) / 10, step, state.counters["images_seen"]))
        skipped = state.counters["skipped_in_a_row"]
        if step % c.LOG_EVERY and not skipped:
            return
        values = dict(zip(values, torch.stack(list(values.values())).tolist()))         # waits for the device once
        in_stage_2 = "motion_loss" in values
        if not in_stage_2:
            values["wasserstein"] = values["score_gap"] / max(values["gradient_norm"], 1e-6)
        images = c.MOTION_BATCH if in_stage_2 else c.BATCH_SIZE
        speed = images * (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}   # JSON has no NaN
        optimizer = state.motion_optimizer if in_stage_2 else state.generator_optimizer
        rate = float(optimizer.param_groups[0]["lr"])
        self.write({**state.counters, **finite, "learning_rate": rate, "images_per_second": round(speed, 2),
                    "seconds": round(now - self.started, 2)})
        if skipped.bit_count() == 1:             # at 1, 2, 4, 8, ... in a row
            print_line(f"step {step}: an update was not applied because its gradient is not finite ({skipped} in a "
                       "row): " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.warn(step, values)
        self.show_progress(step, values, speed, now)

    def write(self, line: dict) -> None:
        """Appends a line to metrics.jsonl. On a full disk the line is dropped; warns once, and training continues."""
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.disk_full = False
        except OSError as error:
            if not self.disk_full:
                print_line(f"{self.path}: cannot be written ({error.strerror}); training continues without these lines")
            self.disk_full = True
            with contextlib.suppress(OSError):
                self.file.close()                # drops what could not be written
            self.file = self.path.open("a", encoding="utf-8")
        self.to_board(lambda board: [board.add_scalar(name, value, line["step"]) for name, value in line.items()
                                     if name != "step" and isinstance(value, int | float)])

    def show_samples(self, counters: dict) -> None:
        """Copies the sample sheets of the current step to TensorBoard."""
        step = counters["step"]

        def copy(board):
            for file in sorted((self.path.parent / "samples").glob(f"step_{step:08d}_*.png")):
                board.add_image(file.stem.split("_")[2], np.array(Image.open(file)), step, dataformats="HWC")
            board.flush()
        self.to_board(copy)

    def to_board(self, write: Callable) -> None:
        """Calls write(SummaryWriter). A full disk ends the writing for TensorBoard, and training continues."""
        try:
            if self.board:
                write(self.board)
        except OSError as error:
            self.board = None
            print_line(f"{self.path.parent / 'tensorboard'}: cannot be written ({error.strerror}); training continues "
                       "without TensorBoard")

    def warn(self, step, values):
        """Prints what is wrong and what to try, once per value, after WARN_AFTER lines in a row outside `lost`."""
        for value in HEALTHY:
            limits, now = range_of(value.lost, self.c), values.get(value.key, math.nan)
            if limits is None or self.lines_outside[value.key] == WARN_AFTER:
                continue
            outside = math.isfinite(now) and not limits[0] <= now <= limits[1]
            self.lines_outside[value.key] = self.lines_outside[value.key] + 1 if outside else 0
            if self.lines_outside[value.key] == WARN_AFTER:
                print_line(f"step {step}: {value.title.lower()} {now:.3g} is outside {range_words(limits)} in "
                           f"{WARN_AFTER} logged lines in a row. {value.advice}")

    def show_progress(self, step, values, speed, now):
        left = (now - self.started) / (step - self.first_step) * (self.c.STEPS - step)
        if self.c.MINUTES:
            left = min(left, max(0, 60 * self.c.MINUTES - (now - self.started)))
        text = f"{duration(left)} left {speed:.1f} img/s " + " ".join(
            f"{value.bar} {values[value.key]:.3g}" for value in HEALTHY if value.bar and value.key in values)
        if "alpha_min" in values:
            text += f" ({values['alpha_min']:.2g}-{values['alpha_max']:.2g})"
        self.bar.set_description_str(text, refresh=False)
        last = step + self.c.LOG_EVERY > self.c.STEPS
        if self.bar.disable and (now - self.last_progress > PLAIN_LINE_SECONDS or last):
            self.last_progress = now
            print(f"step {step}/{self.c.STEPS} {text}", flush=True)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.to_board(lambda board: board.close())


def open_board(folder: Path, step: int):
    """Returns a SummaryWriter. TensorBoard hides earlier events of later steps."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder, purge_step=step + 1)


class NoLog:
    """The Log of ranks other than 0: all methods do nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def cut_metrics(file: Path, step: int) -> None:
    """Removes the lines after `step`, which the run will write again, and lines that are incomplete."""
    if not file.exists():
        return
    with checkpoints.atomic_write(file) as kept, file.open("rb") as lines:
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
