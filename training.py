"""Trains VAE, TransformerParamTanh and Discriminator on a folder of images.

    python training.py --data ./images                        # runs/images; the same command again goes on from there
    python training.py --data ./images --image-size 64 --run small
    python training.py                                        # on the built-in demo set

Every constant of config.py is a flag; --help lists them.
"""

import contextlib
import copy
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoints
import command_line
import data
import demo_images
import losses
import model_definitions
import pictures
import random_keys
from checkpoints import CheckpointError
from command_line import InputError
from data import DataError

# Constants that the shapes of the weights follow from: a run can't go on with others.
SIZES = ("IMAGE_SIZE", "CHANNELS", "LATENT_DIM", "WIDTH", "WIDTH_MAX", "NUM_FRAMES", "PATCH", "TRANSFORMER_DIM",
         "TRANSFORMER_HEADS", "TRANSFORMER_LAYERS", "ALPHA_PER_CHANNEL")
PLAIN_LINE_SECONDS = 20        # between two progress lines where there is no terminal for a bar


# ------------------------------------------------------------------------------------- state

@dataclass
class State:
    """All that changes while a run trains, and all that a checkpoint holds."""
    generator: model_definitions.Generator
    critic: model_definitions.Discriminator
    ema: model_definitions.Generator
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    device: torch.device
    counters: dict = field(default_factory=lambda: {"step": 0, "images_seen": 0, "rollbacks": 0, "skipped_updates": 0})

    PARTS = ("generator", "critic", "ema", "generator_optimizer", "critic_optimizer")

    def state_dict(self):
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS}, "counters": dict(self.counters)}

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.counters.update(saved["counters"])

    def draw(self, constants, purpose, update=0):
        """The torch.Generator for one purpose of the current step and critic update."""
        return random_keys.generator(constants.SEED, purpose, self.counters["rollbacks"], self.counters["step"], update)


def new_state(c, device):
    """Networks and optimizers at their start, a function of SEED; torch's global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_keys.generator(c.SEED, "weights").initial_seed())
        generator, critic = model_definitions.build(c)
    generator, critic = (m.to(device, memory_format=torch.channels_last) for m in (generator, critic))
    ema = copy.deepcopy(generator).requires_grad_(False)
    fused = device.type in ("cuda", "cpu")               # twice as fast as the default, on the CPU too

    def adam(model, learning_rate):
        return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(c.BETA_1, c.BETA_2), fused=fused)

    return State(generator, critic, ema, adam(generator, c.LEARNING_RATE), adam(critic, c.CRITIC_LEARNING_RATE), device)


# ------------------------------------------------------------------------------------- one training step

def real_batch(state, c, image_set, update):
    """The real images of a critic update, (B, C, H, W) in [-1, 1]: a function of SEED, step and update alone."""
    position = (state.counters["step"] * c.N_CRITIC + update) * c.BATCH_SIZE
    indices = image_set.train[data.batch_indices(len(image_set.train), c.SEED, position, c.BATCH_SIZE)]
    flips = None
    if c.FLIP:
        flips = torch.rand(c.BATCH_SIZE, generator=state.draw(c, "flip", update)).numpy() < 0.5
    batch = data.read_batch(image_set, indices, flips)
    if state.device.type == "cuda":                 # only from pinned memory, and on CUDA, is the short cut safe
        batch = batch.pin_memory().to(state.device, non_blocking=True)
    return data.to_image(batch.to(state.device)).contiguous(memory_format=torch.channels_last)


def draw_z(state, c, purpose, update=0):
    """Noise (B, LATENT_DIM) from N(0, I)."""
    z = torch.randn(c.BATCH_SIZE, c.LATENT_DIM, generator=state.draw(c, purpose, update))
    return z.to(state.device)


def apply_update(state, loss, model, optimizer):
    """One optimizer step on the loss, unless a gradient is not finite: then nothing is applied, and it is counted."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not torch.isfinite(norm):
        state.counters["skipped_updates"] += 1
        return
    optimizer.step()


def critic_step(state, c, real, update):
    """L_D = mean D(fake) - mean D(real) + LAMBDA_GP * GP + drift; returns scalars (tensors) to log."""
    with torch.no_grad():
        fake = state.generator(draw_z(state, c, "critic z", update), generator=state.draw(c, "critic video", update))
    real_score, fake_score = state.critic(torch.cat([real, fake])).chunk(2)

    values = {}
    penalty, weight = torch.zeros((), device=state.device), 0.0
    if (state.counters["step"] * c.N_CRITIC + update + 1) % c.GP_EVERY == 0:
        e = torch.rand(len(real), generator=state.draw(c, "between", update)).to(state.device)
        norm = losses.gradient_norm(state.critic, losses.between(real, fake, e))
        penalty, weight = losses.gradient_penalty(norm), c.LAMBDA_GP * c.GP_EVERY
        values = {"gradient_norm": norm.detach().mean(), "gradient_penalty": penalty.detach()}
    loss = losses.critic_loss(real_score, fake_score, penalty, weight, c.LAMBDA_DRIFT)
    apply_update(state, loss, state.critic, state.critic_optimizer)
    return {"critic_loss": loss.detach(), "score_gap": (real_score.mean() - fake_score.mean()).detach(), **values}


def generator_step(state, c, real):
    """L_G = -mean D(fake) + LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W), for VAE and layer together.

    Noise and reconstructions go through decoder and layer in one pass.
    """
    state.critic.requires_grad_(False)
    mu, logvar = state.generator.vae.encode(real)
    noise = draw_z(state, c, "posterior noise")
    z = torch.cat([draw_z(state, c, "generator z"), state.generator.vae.reparameterize(mu, logvar, noise)])
    image, alpha = state.generator.image_and_alpha(z, generator=state.draw(c, "generator video"))
    fake, reconstructed = image.chunk(2)

    reconstruction, kl = losses.reconstruction_loss(reconstructed, real), losses.kl_divergence(mu, logvar)
    factor = losses.size_factor(*real.shape[1:])
    loss = losses.generator_loss(state.critic(fake), reconstruction, kl, real[0].numel(),
                                 c.LAMBDA_REC * factor, c.LAMBDA_KL * factor)
    apply_update(state, loss, state.generator, state.generator_optimizer)
    state.critic.requires_grad_(True)
    alpha, mu, logvar = alpha.detach(), mu.detach(), logvar.detach()
    return {"generator_loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.detach(),
            "posterior_variance": (mu.square() + logvar.exp()).mean(), "alpha_mean": alpha.mean(),
            "alpha_min": alpha.min(), "alpha_max": alpha.max(), "alpha_spread": alpha.std(dim=(2, 3)).mean()}


@torch.no_grad()
def update_ema(state, c):
    """Averages the generator's weights with a half-life in images, shorter at the start (Karras et al. 2020)."""
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * state.counters["images_seen"])
    weight = 1 - 0.5 ** (c.BATCH_SIZE / half_life) if half_life > 0 else 1.0
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.generator.parameters()), weight)


def training_step(state, c, image_set):
    """N_CRITIC critic updates, one generator update, EMA; returns the step's scalars (tensors)."""
    values = {}
    for update in range(c.N_CRITIC):
        real = real_batch(state, c, image_set, update)
        values |= critic_step(state, c, real, update)
    values |= generator_step(state, c, real)
    state.counters["images_seen"] += c.BATCH_SIZE
    update_ema(state, c)
    state.counters["step"] += 1
    return values


# ------------------------------------------------------------------------------------- what a run shows

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
    z = torch.randn(c.SAMPLE_COUNT, c.LATENT_DIM, generator=random_keys.generator(c.SEED, "samples"))

    def in_batches(function, tensor):
        parts = [function(part.to(state.device)) for part in tensor.split(c.BATCH_SIZE)]
        return [torch.cat([p.cpu() for p in column]) for column in zip(*parts)]

    image, alpha = in_batches(state.ema.image_and_alpha, z)
    reconstructed, = in_batches(lambda batch: (state.ema.reconstruct(data.to_image(batch)),), real)
    frames = state.ema.layer.frames(state.ema.vae.decode(z[:4].to(state.device)))
    video = [pictures.grid(to_array(frame * 2 - 1), columns=4) for frame in frames.chunk(c.NUM_FRAMES, dim=1)]

    name = f"step_{state.counters['step']:08d}"
    low, high = c.ALPHA_INIT / c.ALPHA_SPAN, c.ALPHA_INIT * c.ALPHA_SPAN
    maps = pictures.heat_map(alpha.mean(1).numpy(), low, high, log=True)
    for kind, sheet in (("real", to_array(data.to_image(real))), ("generated", to_array(image)),
                        ("reconstructed", to_array(reconstructed)), ("alpha", maps)):
        sheet = pictures.grid(sheet, columns)
        if kind == "alpha":
            sheet = pictures.beside(sheet, pictures.colour_bar(low, high, sheet.shape[0], log=True))
        pictures.save_png(folder / f"{name}_{kind}.png", sheet)
    pictures.save_animation(folder / f"{name}_video.gif", video, fps=8)


def to_array(image):
    """image (N, C, H, W) in [-1, 1] -> uint8 array (N, H, W, C)."""
    return data.to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()


class Log:
    """metrics.jsonl, and the progress bar, or plain lines where the output is no terminal."""

    def __init__(self, run_folder, c, step):
        self.c, self.first_step, self.started = c, step, time.monotonic()
        self.last_line = self.last_time = self.started
        self.last_step, self.first_step_done = step, None
        self.file = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(total=c.STEPS, initial=step, dynamic_ncols=True, disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar:5}| {n}/{total} {desc}")

    def step(self, state, values):
        """Takes the scalars (tensors) of one step; writes them down each LOG_EVERY steps."""
        c, step, now = self.c, state.counters["step"], time.monotonic()
        self.bar.update(1)
        self.say_duration(step, now)
        if step % c.LOG_EVERY:
            return
        values = {name: float(value) for name, value in values.items()}
        if "gradient_norm" in values:
            values["wasserstein"] = values["score_gap"] / max(values["gradient_norm"], 1e-6)
        speed = c.BATCH_SIZE * (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}   # JSON has no nan
        line = {**state.counters, **finite, "images_per_second": round(speed, 2),
                "seconds": round(now - self.started, 2)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.show(step, values, speed, now)

    def say_duration(self, step, now):
        """Once, after ten steps (the first does not count: it also warms up): how long the run will take."""
        if step == self.first_step + 1:
            self.first_step_done = now
        elif step == self.first_step + 11:
            tqdm.write(duration_line(self.c, (now - self.first_step_done) / 10, step))

    def show(self, step, values, speed, now):
        names = {"D": "critic_loss", "gap": "score_gap", "norm": "gradient_norm", "W": "wasserstein",
                 "rec": "reconstruction", "KL": "kl", "alpha": "alpha_mean"}
        left = (now - self.started) / (step - self.first_step) * (self.c.STEPS - step)
        if self.c.MINUTES:
            left = min(left, max(0, 60 * self.c.MINUTES - (now - self.started)))
        text = f"{in_words(left)} left {speed:.1f} img/s " + " ".join(
            f"{short} {values[name]:.3g}" for short, name in names.items() if name in values)
        text += f" ({values['alpha_min']:.2g}-{values['alpha_max']:.2g})"
        self.bar.set_description_str(text, refresh=False)
        if self.bar.disable and (now - self.last_line > PLAIN_LINE_SECONDS or step + self.c.LOG_EVERY > self.c.STEPS):
            self.last_line = now
            print(f"step {step}/{self.c.STEPS} {text}", flush=True)

    def close(self):
        self.bar.close()
        self.file.close()


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


# ------------------------------------------------------------------------------------- start, going on, end

def prepare_constants(argv):
    """The run's constants with DATA and RUN filled in, and the names that were given as flags."""
    c, given = command_line.parse_constants(argv, "training.py", __doc__)
    if c.DATA:
        root = Path(os.path.expanduser(c.DATA)).resolve()
        c.DATA = str(root)
        c.RUN = c.RUN or root.name.lstrip(".")[:100] or "images"
        runs = Path(c.RUNS_DIR).resolve()
        if (runs / c.RUN).is_relative_to(root) and (runs == root or not runs.is_relative_to(root)):
            raise InputError(f"the run's folder {runs / c.RUN} lies among the images, where the next start would train "
                             "on its samples: give another --runs-dir")
    else:
        c.RUN = c.RUN or "demo"
    return c, given


def make_run_folder(c, image_set):
    """The run's folder with what is known at the start: config.json and the names of skipped files."""
    folder = Path(c.RUNS_DIR) / c.RUN
    try:
        for part in (folder / "samples", folder / "checkpoints"):
            part.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically(folder / "config.json", lambda f: f.write(json.dumps(vars(c), indent=2).encode()))
        data.write_skipped(image_set, folder / "skipped.txt")
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); give another --runs-dir") from None
    return folder


def load_data(c):
    """The ImageSet of DATA, or of the demo set; skipped files are named."""
    root = c.DATA
    if not root:
        root = Path(c.RUNS_DIR) / f"demo_images_{c.IMAGE_SIZE}"
        try:
            demo_images.make(root, size=c.IMAGE_SIZE)
        except (ValueError, OSError) as error:
            raise InputError(f"the demo set can't be drawn: {error}; give --data or another --runs-dir") from None
    image_set = data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, Path(c.RUNS_DIR) / ".cache", c.BACKGROUND,
                                 c.NUM_WORKERS, c.HELD_OUT_SHARE, c.HELD_OUT_MIN, leave_out=c.RUNS_DIR)
    for line in data.summary_lines(image_set):
        print(line)
    return image_set


def check_continuing(c, given, saved):
    """Refuses to go on with other sizes or another folder; says what else has changed."""
    for name in SIZES:
        if saved[name] != getattr(c, name):
            raise InputError(f"run {c.RUN} was made with {name} {saved[name]}, not {getattr(c, name)}: give "
                             f"{command_line.as_given(name, saved[name])}, or --run NEWNAME for a new run")
    if "RUN" not in given and saved["DATA"] != c.DATA:
        raise InputError(f"run {c.RUN} was made from {saved['DATA'] or 'the demo set'}, not "
                         f"{c.DATA or 'the demo set'}: give --run NEWNAME")
    for name, old in saved.items():
        new = getattr(c, name, None)
        if new is not None and new != old and name != "RUNS_DIR":
            print(f"{name} is now {new}, was {old}")


def continue_or_start(c, given, device):
    """The newest checkpoint's state, or a new one."""
    state, folder = new_state(c, device), Path(c.RUNS_DIR) / c.RUN
    found = checkpoints.newest(folder / "checkpoints", device, set_aside=True)
    if found is None:
        return state
    file, saved = found
    check_continuing(c, given, saved["constants"])
    state.load_state_dict(saved)
    for optimizer, rate in ((state.generator_optimizer, c.LEARNING_RATE),
                            (state.critic_optimizer, c.CRITIC_LEARNING_RATE)):
        optimizer.param_groups[0].update(lr=rate, betas=(c.BETA_1, c.BETA_2))
    print(f"continuing {folder} at step {state.counters['step']} from {file.name}")
    return state


def cut_metrics(file, step):
    """Drops lines after `step`, which the continued run will make again, and a last line that was not finished."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
    checkpoints.write_atomically(file, lambda handle: handle.write("".join(kept).encode()))


def print_start(c, state, image_set):
    print(textwrap.fill("  ".join(f"{name}={value}" for name, value in vars(c).items()), 110, break_on_hyphens=False))
    print(f"{'part':28}{'parameters':>12}{'multiply-adds an image':>26}")
    for name, parameters, count in model_definitions.summary(state.generator, state.critic, c.BATCH_SIZE):
        print(f"{name:28}{parameters:12,}{count:26,}")
    print(f"{len(image_set.train):,} images to train on, {len(image_set.held_out):,} held out; device {state.device}")


class StopSignal:
    """SIGINT or SIGTERM sets `number`; the loop ends after its step. A second one ends the process at once."""

    def __init__(self):
        self.number, self.before = None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):              # raised off the main thread, where signals are not ours
            self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, _frame):
        os.write(2, b"\nstopping after this step, then saving; a second signal ends at once\n")   # print may be busy
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(state, c, image_set, folder):
    """The loop: step, log, samples, checkpoint, until STEPS, MINUTES or a signal. Returns the exit status."""
    counters, samples = state.counters, folder / "samples"

    def save():
        saved = {**state.state_dict(), "constants": dict(vars(c))}
        return checkpoints.save(folder / "checkpoints", saved, counters["step"])

    with StopSignal() as stop:
        if counters["step"] == 0:
            write_samples(state, c, image_set, samples)
        log = Log(folder, c, counters["step"])
        last_saved, due = log.started, False
        while counters["step"] < c.STEPS and stop.number is None:
            if c.MINUTES and time.monotonic() - log.started > 60 * c.MINUTES:
                break
            skipped_before = counters["skipped_updates"]
            log.step(state, training_step(state, c, image_set))
            if is_sample_step(counters["step"], c.SAMPLE_EVERY):
                write_samples(state, c, image_set, samples)
            due = due or counters["step"] % c.CHECKPOINT_EVERY == 0 or (
                time.monotonic() - last_saved > 60 * c.CHECKPOINT_MINUTES)
            if due and counters["skipped_updates"] == skipped_before:      # so every regular checkpoint is a good one
                save()
                due, last_saved = False, time.monotonic()
        log.close()
        file = save()
        # Whoever sent a signal waits for the end.
        if stop.number is None and not is_sample_step(counters["step"], c.SAMPLE_EVERY):
            write_samples(state, c, image_set, samples)
    print(f"step {counters['step']} of {c.STEPS}: checkpoint {file}, pictures in {samples}")
    if counters["step"] < c.STEPS:
        print("the same command again goes on from there")
    return 0 if stop.number is None else 128 + stop.number


def start(argv):
    c, given = prepare_constants(argv)
    device = command_line.choose_device(c.DEVICE)
    state = continue_or_start(c, given, device)
    image_set = load_data(c)
    folder = make_run_folder(c, image_set)
    print_start(c, state, image_set)
    cut_metrics(folder / "metrics.jsonl", state.counters["step"])
    if state.counters["step"] >= c.STEPS:
        print(f"run {c.RUN} has its {c.STEPS} steps: give a higher --steps to go on")
        return 0
    return train(state, c, image_set, folder)


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what), 130 and 143 after SIGINT and SIGTERM."""
    try:
        return start(argv)
    except (InputError, DataError, CheckpointError) as error:
        print(f"training.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"training.py: {error.filename or 'a file'}: {error.strerror}; what was saved before is whole",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:             # before the loop, whose own handler ends it after a step
        print("training.py: stopped; the same command reads on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
