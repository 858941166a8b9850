"""What a run shows while it trains: sample sheets, metrics.jsonl, the progress bar, how long it will take."""

import contextlib
import json
import math
import sys
import textwrap
import time

import torch
from tqdm import tqdm

import checkpoints
import command_line
import data
import pictures
import random_keys

PLAIN_LINE_SECONDS = 20        # between two progress lines where there is no terminal for a bar
SYMPTOM_LINES = 5              # lines of metrics.jsonl in a row that must show a symptom before it is said


def is_sample_step(step, every):
    """0, 50, 100, 200, 400, ... until `every` is reached, then each multiple of it."""
    if step >= every:
        return step % every == 0
    return step == 0 or (step % 50 == 0 and (step // 50).bit_count() == 1)


@torch.no_grad()
def write_samples(state, c, image_set, folder):
    """Sheets from fixed noise and fixed pictures: real, generated, reconstructed, alpha maps, synthetic video."""
    columns = math.ceil(math.sqrt(c.SAMPLE_COUNT))
    shown = image_set.held_out if len(image_set.held_out) else image_set.train
    order = random_keys.numpy_generator(c.SEED, "pictures to reconstruct").permutation(len(shown))
    real = data.read_batch(image_set, shown[order[:c.SAMPLE_COUNT]], None)
    z = torch.randn(c.SAMPLE_COUNT, c.LATENT_DIM, generator=random_keys.torch_generator(c.SEED, "samples"))

    def in_batches(function, tensor):
        parts = [function(part.to(state.device)) for part in tensor.split(c.BATCH_SIZE)]
        return [torch.cat([p.cpu() for p in column]) for column in zip(*parts)]

    image, alpha = in_batches(state.ema.image_and_alpha, z)
    reconstructed, = in_batches(lambda batch: (state.ema.reconstruct(data.to_image(batch)),), real)
    frames = state.ema.layer.frames(state.ema.vae.decode(z[:4].to(state.device)))
    video = [pictures.grid(data.to_arrays(frame * 2 - 1), columns=4) for frame in frames.chunk(c.NUM_FRAMES, dim=1)]

    name = f"step_{state.counters['step']:08d}"
    low, high = c.ALPHA_INIT / c.ALPHA_SPAN, c.ALPHA_INIT * c.ALPHA_SPAN
    sheets = {kind: pictures.grid(data.to_arrays(part), columns) for kind, part in (
        ("real", data.to_image(real)), ("generated", image), ("reconstructed", reconstructed))}
    sheets["alpha"] = pictures.heat_maps(alpha.mean(1).numpy(), low, high, columns, log=True)
    for kind, sheet in sheets.items():
        pictures.save_picture(folder / f"{name}_{kind}.png", sheet)
    pictures.save_animation(folder / f"{name}_video.gif", video, fps=8)


def print_line(line):
    """Prints a line above the progress bar, at once also where the output is a file."""
    tqdm.write(line)
    sys.stdout.flush()


class Log:
    """metrics.jsonl, and the progress bar, or plain lines where the output is no terminal."""

    def __init__(self, run_folder, c, step):
        self.c, self.path = c, run_folder / "metrics.jsonl"
        self.start_at(step)
        self.last_line = self.started
        self.symptom_lines, self.disk_full = {}, False
        self.bar = tqdm(total=c.STEPS, initial=step, dynamic_ncols=True, disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar:5}| {n}/{total} {desc}")

    def start_at(self, step):
        """Opens metrics.jsonl without the lines after a step, and counts time and steps from there."""
        cut_metrics(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.first_step = self.last_step = step
        self.started = self.last_time = time.monotonic()
        self.first_step_done = None

    def back_to(self, step):
        """The run has gone back to a step."""
        self.file.close()
        self.start_at(step)
        self.bar.n = step
        self.bar.refresh()

    def step(self, state, values):
        """Takes the scalars (tensors) of one step; writes them down each LOG_EVERY steps, or where it was skipped."""
        c, step, now = self.c, state.counters["step"], time.monotonic()
        self.bar.update(1)
        self.say_duration(step, now)
        skipped = state.counters["skipped_in_a_row"]
        if step % c.LOG_EVERY and not skipped:
            return
        values = dict(zip(values, torch.stack(list(values.values())).tolist()))      # one wait for the device, not many
        values["wasserstein"] = values["score_gap"] / max(values["gradient_norm"], 1e-6)
        speed = c.BATCH_SIZE * (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}   # JSON has no nan
        self.write({**state.counters, **finite, "images_per_second": round(speed, 2),
                    "seconds": round(now - self.started, 2)})
        if skipped.bit_count() == 1:             # in full at first, then less and less often
            print_line(f"step {step}: an update was not applied, its gradient is not finite ({skipped} in a row): "
                + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.say_symptoms(step, values)
        self.show(step, values, speed, now)

    def write(self, line):
        """One line of metrics.jsonl; on a full disk it is lost, which is said once, and training goes on."""
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.disk_full = False
        except OSError as error:
            if not self.disk_full:
                print_line(f"{self.path}: can't be written ({error.strerror}); training goes on without these lines")
            self.disk_full = True
            with contextlib.suppress(OSError):
                self.file.close()                # with what could not be written
            self.file = self.path.open("a", encoding="utf-8")

    def say_symptoms(self, step, values):
        """Says what is plainly wrong, once for each symptom, when SYMPTOM_LINES lines in a row have shown it."""
        found = symptoms(values, self.c)
        for name, count in self.symptom_lines.items():
            if name not in found and count < SYMPTOM_LINES:
                self.symptom_lines[name] = 0
        for name, text in found.items():
            self.symptom_lines[name] = self.symptom_lines.get(name, 0) + 1
            if self.symptom_lines[name] == SYMPTOM_LINES:
                print_line(f"step {step}: {text}")

    def say_duration(self, step, now):
        """Once, after ten steps (the first does not count: it also warms up): how long the run will take."""
        if step == self.first_step + 1:
            self.first_step_done = now
        elif step == self.first_step + 11:
            print_line(duration_line(self.c, (now - self.first_step_done) / 10, step))

    def show(self, step, values, speed, now):
        names = {"D": "critic_loss", "gap": "score_gap", "norm": "gradient_norm", "W": "wasserstein",
                 "rec": "reconstruction", "KL": "kl", "alpha": "alpha_mean"}
        left = (now - self.started) / (step - self.first_step) * (self.c.STEPS - step)
        if self.c.MINUTES:
            left = min(left, max(0, 60 * self.c.MINUTES - (now - self.started)))
        text = f"{in_words(left)} left {speed:.1f} img/s " + " ".join(
            f"{short} {values[name]:.3g}" for short, name in names.items())
        text += f" ({values['alpha_min']:.2g}-{values['alpha_max']:.2g})"
        self.bar.set_description_str(text, refresh=False)
        if self.bar.disable and (now - self.last_line > PLAIN_LINE_SECONDS or step + self.c.LOG_EVERY > self.c.STEPS):
            self.last_line = now
            print(f"step {step}/{self.c.STEPS} {text}", flush=True)

    def close(self):
        self.bar.close()
        self.file.close()


class NoLog:
    """The Log of a process that is not the first: it keeps silent."""

    def __getattr__(self, name):
        return lambda *_: None


def symptoms(values, c):
    """What says that a run is lost, from the scalars of one step: {symptom: a sentence with what to try}."""
    low, high = c.ALPHA_INIT / c.ALPHA_SPAN, c.ALPHA_INIT * c.ALPHA_SPAN
    found = {}
    if values["gradient_norm"] > 10 or abs(values["score_gap"]) > 1e4:
        found["critic"] = (f"the critic runs away: score gap {values['score_gap']:.3g}, gradient norm "
                           f"{values['gradient_norm']:.3g} where the penalty asks for 1. Try a lower "
                           "--critic-learning-rate, a higher --lambda-gp, or --gp-every 1")
    if values["picture_spread"] < 0.05:
        found["pictures"] = (f"the generated pictures are all alike, their spread is {values['picture_spread']:.1%} of "
                             "the real ones'. Try a lower --learning-rate, or a new run with another --seed")
    if c.ALPHA_SPAN > 1 and (values["alpha_max"] < 1.02 * low or values["alpha_min"] > 0.98 * high):
        found["alpha"] = (f"alpha is {values['alpha_mean']:.3g} everywhere, at the bound of {low:.3g} to {high:.3g}. "
                          "Try a lower --learning-rate, or a new run with a higher --alpha-span")
    return found


def cut_metrics(file, step):
    """Drops lines after `step`, which the run will make again, and lines that were not finished."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    with checkpoints.atomic_write(file) as handle:
        handle.write("".join(kept).encode())


def in_words(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def duration_line(c, seconds_a_step, step):
    """How long the run will take, and when that is over a day, which flags make it fit one."""
    left = (c.STEPS - step) * seconds_a_step
    text = f"{c.STEPS} steps will take {in_words(left)} more at {seconds_a_step:.2f} s a step"
    if c.MINUTES and left > c.MINUTES * 60:
        return text + f"; --minutes {c.MINUTES:g} ends before that"
    if left <= 86400:
        return text
    fitting = int(step + 86400 / seconds_a_step)
    smaller = [s for s in command_line.IMAGE_SIZES
               if s < c.IMAGE_SIZE and s % c.PATCH == 0 and left * (s / c.IMAGE_SIZE) ** 2 < 86400]
    other = f", or --image-size {smaller[-1]} in a run of its own" if smaller else ""
    return text + f": to fit a day, give --steps {fitting}{other}"


def print_start(c, state, image_set):
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in vars(c).items()), 110, break_on_hyphens=False))
    together = f", {state.ranks.size} processes" if state.ranks.size > 1 else ""
    print(f"{len(image_set.train):,} images to train on, {len(image_set.held_out):,} held out; device {state.device}"
          f"{together}")
