"""Trains VAE, TransformerParamTanh and Discriminator on a folder of images.

    python training.py --data ./images                        # runs/images; the same command again goes on from there
    python training.py --data ./images --image-size 64 --run small
    python training.py                                        # on the built-in demo set

Every constant of config.py is a flag; --help lists them.
"""

import contextlib
import copy
import ctypes
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

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
FUSED_ADAM = ("cpu", "cuda")   # where fused Adam is known to take a verdict on the device
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
    functions: SimpleNamespace       # where a step's time goes, compiled where COMPILE asks for it
    skipped: torch.Tensor            # updates not applied, counted on the device: see apply_update
    counters: dict = field(default_factory=lambda: {"step": 0, "images_seen": 0, "rollbacks": 0, "skipped_updates": 0})

    PARTS = ("generator", "critic", "ema", "generator_optimizer", "critic_optimizer")

    def state_dict(self):
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS}, "counters": self.read_counters()}

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.counters.update(saved["counters"])
        self.skipped.fill_(self.counters["skipped_updates"])

    def read_counters(self):
        """The counters as plain numbers; waits for the device."""
        self.counters["skipped_updates"] = int(self.skipped)
        return dict(self.counters)

    def draw(self, constants, purpose, update=0):
        """The torch.Generator for one purpose of the current step and critic update."""
        return random_keys.generator(constants.SEED, purpose, self.counters["rollbacks"], self.counters["step"], update)


def new_state(c, device):
    """Networks and optimizers at their start, a function of SEED; torch's global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_keys.generator(c.SEED, "weights").initial_seed())
        generator, critic = model_definitions.build(c)
    generator, critic = (m.to(device, memory_format=torch.channels_last) for m in (generator, critic))
    generator.layer.to_tokens.to(memory_format=torch.contiguous_format)       # rearranged each step, half the time so
    ema = copy.deepcopy(generator).requires_grad_(False)

    def adam(model, learning_rate):          # fused: twice as fast as the default, on the CPU too
        return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(c.BETA_1, c.BETA_2),
                                fused=device.type in FUSED_ADAM)

    functions = (generator_pass, generator_loss, critic_scores, losses.gradient_norm)
    compiled = {f.__name__: torch.compile(f, fullgraph=True) if c.COMPILE else f for f in functions}
    return State(generator, critic, ema, adam(generator, c.LEARNING_RATE), adam(critic, c.CRITIC_LEARNING_RATE), device,
                 SimpleNamespace(**compiled), torch.zeros((), dtype=torch.int64, device=device))


def set_up(device, c):
    """Process-wide settings for speed; none changes what is computed on the CPU."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if c.TF32 else "highest")
        torch.backends.cudnn.allow_tf32 = c.TF32
        torch.backends.cudnn.benchmark = True              # every step has the same shapes


def keep_freed_memory(keep=True):
    """Has Linux's C library keep the memory of freed tensors for the next ones; keep=False: as it does by itself.

    By itself it gives blocks above 32 MiB back at once and takes them anew, zeroed page by page: 40 ms for 64 MiB on
    the virtual machine that this was measured on, several times what was then computed in them.
    """
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1             # the parameters' numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):     # another system's library: nothing is done
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version                                  # noqa: B018
        library.mallopt(mmap_max, 0 if keep else 65536)
        library.mallopt(mmap_threshold, 2 ** 25)
        library.mallopt(trim_threshold, 2 ** 31 - 1 if keep else 2 ** 26)


# ------------------------------------------------------------------------------------- one training step

def to_device(tensor, device):
    """A tensor of this step on the device; to CUDA from pinned memory, so that the copy waits for nothing."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def real_batch(state, c, image_set, update):
    """The real images of a critic update, (B, C, H, W) in [-1, 1]: a function of SEED, step and update alone."""
    position = (state.counters["step"] * c.N_CRITIC + update) * c.BATCH_SIZE
    indices = image_set.train[data.batch_indices(len(image_set.train), c.SEED, position, c.BATCH_SIZE)]
    flips = None
    if c.FLIP:
        flips = torch.rand(c.BATCH_SIZE, generator=state.draw(c, "flip", update)).numpy() < 0.5
    return data.to_image(to_device(data.read_batch(image_set, indices, flips), state.device))


@dataclass
class Batch:
    """The real images of one critic update, and all that is drawn for it; the generator's update takes the last one."""
    update: int                                     # number of the critic update within the step
    real: torch.Tensor                              # (B, C, H, W) in [-1, 1]
    z: torch.Tensor                                 # (B, LATENT_DIM) from N(0, I), for the fakes
    posterior_noise: torch.Tensor                   # (B, LATENT_DIM) from N(0, I), for the reconstructions
    between: torch.Tensor                           # (B,) in [0, 1), for the penalty
    changes: model_definitions.Changes              # of the synthetic video's frames, one for the whole batch


def make_batch(state, c, image_set, update):
    def draw(function, purpose, *shape):
        return to_device(function(shape, generator=state.draw(c, purpose, update)), state.device)

    changes = state.generator.layer.video.draw(state.draw(c, "video", update))
    return Batch(update, real_batch(state, c, image_set, update),
                 draw(torch.randn, "z", c.BATCH_SIZE, c.LATENT_DIM),
                 draw(torch.randn, "posterior noise", c.BATCH_SIZE, c.LATENT_DIM),
                 draw(torch.rand, "between", c.BATCH_SIZE),
                 model_definitions.Changes(*(to_device(tensor, state.device) for tensor in changes)))


def micro_batches(c):
    """Slices of a batch, MICRO_BATCH pictures each. All losses are means over pictures, so that gradients add up."""
    size = c.MICRO_BATCH or c.BATCH_SIZE
    return [slice(start, start + size) for start in range(0, c.BATCH_SIZE, size)]


def mixed_precision(state, c):
    """bfloat16 where it is safe, on CUDA; the networks keep scores, alpha and pictures in float32 themselves."""
    enabled = c.BFLOAT16 and state.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(state.device.type, torch.bfloat16, enabled=enabled)


def generator_pass(generator, real, z, posterior_noise, changes):
    """Pictures from z and reconstructions of real in one pass through decoder and layer.

    -> image (2B, C, H, W), the fakes and then the reconstructions, its alpha, and mu, logvar (B, LATENT_DIM)."""
    mu, logvar = generator.vae.encode(real)
    image, alpha = generator.image_and_alpha(
        torch.cat([z, generator.vae.reparameterize(mu, logvar, posterior_noise)]), changes=changes)
    return image, alpha, mu, logvar


def make_pictures(state, batch, part):
    """generator_pass over a part of the batch."""
    return state.functions.generator_pass(state.generator, batch.real[part], batch.z[part],
                                          batch.posterior_noise[part], batch.changes)


def generator_loss(critic, real, image, mu, logvar, lambda_rec, lambda_kl):
    """L_G = -mean D(fake) + LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W), and its two VAE terms."""
    fake, reconstructed = image.chunk(2)
    reconstruction, kl = losses.reconstruction_loss(reconstructed, real), losses.kl_divergence(mu, logvar)
    factor = losses.size_factor(*real.shape[1:])
    loss = losses.generator_loss(critic(fake), reconstruction, kl, real[0].numel(), lambda_rec * factor,
                                 lambda_kl * factor)
    return loss, reconstruction, kl


def critic_scores(critic, real, fake, lambda_drift):
    """L_D without its penalty, and the gap D(real) - D(fake): one pass for both sides."""
    real_score, fake_score = critic(torch.cat([real, fake])).chunk(2)
    return losses.critic_loss(real_score, fake_score, 0, 0, lambda_drift), real_score.mean() - fake_score.mean()


def apply_update(state, model, optimizer):
    """One optimizer step on the gradients; where one of them is not finite, nothing is applied, and it is counted.

    The verdict stays on the device, where fused Adam takes it as GradScaler would hand it: no wait for the device.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    bad = ~torch.isfinite(norm)
    state.skipped += bad
    if optimizer.defaults["fused"]:
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None
        optimizer.step()
    elif not bad:
        optimizer.step()


def critic_step(state, c, batch, shared=None):
    """One update on L_D = mean D(fake) - mean D(real) + LAMBDA_GP * GP + drift; returns scalars (tensors) to log.

    The penalty has a backward pass of its own, so that its graph and that of the scores never share the memory.
    """
    state.critic_optimizer.zero_grad(set_to_none=True)
    with_penalty = (state.counters["step"] * c.N_CRITIC + batch.update + 1) % c.GP_EVERY == 0
    parts, values = micro_batches(c), []
    for part in parts:
        with mixed_precision(state, c):
            if shared is not None:
                fake = shared[0].detach().chunk(2)[0]
            else:
                with torch.no_grad():
                    fake, _ = state.generator.image_and_alpha(batch.z[part], changes=batch.changes)
            loss, gap = state.functions.critic_scores(state.critic, batch.real[part], fake, c.LAMBDA_DRIFT)
        (loss / len(parts)).backward()
        values.append({"critic_loss": loss.detach(), "score_gap": gap.detach()})
        if with_penalty:
            x_hat = losses.between(batch.real[part], fake, batch.between[part])
            norm = state.functions.gradient_norm(state.critic, x_hat)
            penalty, weight = losses.gradient_penalty(norm), c.LAMBDA_GP * c.GP_EVERY
            (weight * penalty / len(parts)).backward()
            values[-1] |= {"gradient_norm": norm.detach().mean(), "gradient_penalty": penalty.detach(),
                           "critic_loss": (loss + weight * penalty).detach()}
    apply_update(state, state.critic, state.critic_optimizer)
    return combined(values)


def generator_step(state, c, batch, shared=None):
    """One update on L_G, VAE and layer together; returns scalars (tensors) to log."""
    state.generator_optimizer.zero_grad(set_to_none=True)
    state.critic.requires_grad_(False)
    parts, values = micro_batches(c), []
    for part in parts:
        with mixed_precision(state, c):
            image, alpha, mu, logvar = shared or make_pictures(state, batch, part)
            loss, reconstruction, kl = state.functions.generator_loss(
                state.critic, batch.real[part], image, mu, logvar, c.LAMBDA_REC, c.LAMBDA_KL)
        (loss / len(parts)).backward()
        alpha, mu, logvar = alpha.detach(), mu.detach(), logvar.detach()
        values.append({"generator_loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.detach(),
                       "posterior_variance": (mu.square() + logvar.exp()).mean(), "alpha_mean": alpha.mean(),
                       "alpha_min": alpha.min(), "alpha_max": alpha.max(),
                       "alpha_spread": alpha.std(dim=(2, 3)).mean()})
    apply_update(state, state.generator, state.generator_optimizer)
    state.critic.requires_grad_(True)
    return combined(values)


def combined(values):
    """The scalars of all micro-batches as one dict."""
    how = {"alpha_min": torch.amin, "alpha_max": torch.amax}
    return {name: how.get(name, torch.mean)(torch.stack([part[name] for part in values])) for name in values[0]}


@torch.no_grad()
def update_ema(state, c):
    """Averages the generator's weights with a half-life in images, shorter at the start (Karras et al. 2020)."""
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * state.counters["images_seen"])
    weight = 1 - 0.5 ** (c.BATCH_SIZE / half_life) if half_life > 0 else 1.0
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.generator.parameters()), weight)


def training_step(state, c, image_set):
    """N_CRITIC critic updates, one generator update, EMA; returns the step's scalars (tensors).

    The generator does not change between the last critic update and its own, so the two share z and, where a batch
    is one piece, the pass that made the pictures too.
    """
    values, shared, parts = {}, None, micro_batches(c)
    for update in range(c.N_CRITIC):
        batch = make_batch(state, c, image_set, update)
        if len(parts) == 1 and update == c.N_CRITIC - 1:
            with mixed_precision(state, c):
                shared = make_pictures(state, batch, parts[0])
        values |= critic_step(state, c, batch, shared)
    values |= generator_step(state, c, batch, shared)
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
        values = dict(zip(values, torch.stack(list(values.values())).tolist()))      # one wait for the device, not many
        if "gradient_norm" in values:
            values["wasserstein"] = values["score_gap"] / max(values["gradient_norm"], 1e-6)
        speed = c.BATCH_SIZE * (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}   # JSON has no nan
        line = {**state.read_counters(), **finite, "images_per_second": round(speed, 2),
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
        last_saved, due, skipped = log.started, False, counters["skipped_updates"]
        while counters["step"] < c.STEPS and stop.number is None:
            if c.MINUTES and time.monotonic() - log.started > 60 * c.MINUTES:
                break
            log.step(state, training_step(state, c, image_set))
            if is_sample_step(counters["step"], c.SAMPLE_EVERY):
                write_samples(state, c, image_set, samples)
            due = due or counters["step"] % c.CHECKPOINT_EVERY == 0 or (
                time.monotonic() - last_saved > 60 * c.CHECKPOINT_MINUTES)
            if due:
                skipped_before, skipped = skipped, state.read_counters()["skipped_updates"]
                if skipped == skipped_before:                   # so every regular checkpoint is a good one
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
    set_up(device, c)
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
