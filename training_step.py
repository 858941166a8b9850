"""One training step: the state that it changes, the critic's and the generator's update, the averaged generator.

Every random draw is a function of (SEED, rollbacks, step, critic update, purpose), made for the whole batch.
"""

import contextlib
import copy
import ctypes
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch

import data
import distributed
import latent_space
import losses
import model_definitions
import random_keys

FUSED_ADAM = ("cpu", "cuda")   # where fused Adam is known to take a verdict on the device
WALK_POINTS = 3                # pictures of the walk behind a feedback update's window, each in several of its frames
WALK_LENGTH = 0.5              # the walk's longest way, as a share of the arc to another point


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
    ranks: distributed.Ranks = distributed.ALONE     # this process among those that train together
    graphs: dict = field(default_factory=dict)       # RecordedStep for each kind of step, see record_and_replay
    counters: dict = field(default_factory=lambda: {"step": 0, "images_seen": 0, "rollbacks": 0, "lr_scale": 1.0,
                                                    "skipped_updates": 0, "skipped_in_a_row": 0, "best": None})

    PARTS = ("generator", "critic", "ema", "generator_optimizer", "critic_optimizer")

    def state_dict(self):
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS}, "counters": dict(self.counters)}

    def check_sum(self):
        """Of all weights, bit by bit: processes that train together have the same. 0 where there is only one."""
        if self.ranks.size == 1:
            return 0
        parameters = [*self.generator.parameters(), *self.critic.parameters()]
        return zlib.crc32(torch.cat([p.detach().flatten() for p in parameters]).cpu().numpy())

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for optimizer in (self.generator_optimizer, self.critic_optimizer):      # the file may be of another device
            for group in optimizer.param_groups:
                group.update(fused=optimizer.defaults["fused"], capturable=optimizer.defaults["capturable"])
        self.graphs.clear()                      # they hold the addresses of Adam's averages before
        self.counters.update(saved["counters"])
        self.skipped.fill_(self.counters["skipped_updates"])

    def count_skipped(self):
        """Whether the newest step had an update that was not applied, counted then. Waits for the device."""
        before, self.counters["skipped_updates"] = self.counters["skipped_updates"], int(self.skipped)
        skipped = self.counters["skipped_updates"] > before
        self.counters["skipped_in_a_row"] = self.counters["skipped_in_a_row"] + 1 if skipped else 0
        return skipped

    def set_learning_rates(self, c):
        """The constants' rates, times what rollbacks left of them."""
        self.graphs.clear()                      # they hold the rates before
        for optimizer, rates in ((self.generator_optimizer, generator_rates(c)),
                                 (self.critic_optimizer, [c.CRITIC_LEARNING_RATE])):
            for group, rate in zip(optimizer.param_groups, rates):
                group.update(lr=rate * self.counters["lr_scale"], betas=(c.BETA_1, c.BETA_2))

    def draw(self, constants, purpose, update=0):
        """The torch.Generator for one purpose of the current step and critic update."""
        return random_keys.torch_generator(
            constants.SEED, purpose, self.counters["rollbacks"], self.counters["step"], update)


def generator_rates(c):
    """Adam's step sizes for the VAE and for the layer."""
    return c.LEARNING_RATE, c.LEARNING_RATE * c.LAYER_RATE


def new_state(c, device, ranks=distributed.ALONE):
    """Networks and optimizers at their start, a function of SEED; torch's global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_keys.torch_generator(c.SEED, "weights").initial_seed())
        generator, critic = model_definitions.build(c)
    generator, critic = (m.to(device, memory_format=torch.channels_last) for m in (generator, critic))
    generator.layer.to_tokens.to(memory_format=torch.contiguous_format)       # rearranged each step, half the time so
    ema = copy.deepcopy(generator).requires_grad_(False)

    def adam(models, rates):                 # fused: twice as fast as the default, on the CPU too
        groups = [{"params": model.parameters(), "lr": rate} for model, rate in zip(models, rates)]
        return torch.optim.Adam(groups, betas=(c.BETA_1, c.BETA_2), fused=device.type in FUSED_ADAM,
                                capturable=device.type == "cuda")

    functions = (generator_pass, generator_loss, critic_scores, losses.gradient_norm)
    compiled = {f.__name__: torch.compile(f, fullgraph=True) if c.COMPILE else f for f in functions}
    return State(generator, critic, ema, adam([generator.vae, generator.layer], generator_rates(c)),
                 adam([critic], [c.CRITIC_LEARNING_RATE]), device, SimpleNamespace(**compiled),
                 torch.zeros((), dtype=torch.int64, device=device), ranks)


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
    """The real images of a critic update, (B, C, H, W) in [-1, 1], this process's share of them: a function of SEED,
    step and update alone."""
    share = state.ranks.share(c.BATCH_SIZE)
    position = (state.counters["step"] * c.N_CRITIC + update) * c.BATCH_SIZE
    indices = image_set.train[data.batch_indices(len(image_set.train), c.SEED, position, c.BATCH_SIZE)][share]
    flips = None
    if c.FLIP:
        flips = torch.rand(c.BATCH_SIZE, generator=state.draw(c, "flip", update)).numpy()[share] < 0.5
    return data.to_image(to_device(data.read_batch(image_set, indices, flips), state.device))


class Walk(NamedTuple):
    """Where a picture of a feedback update comes from, in latent space."""
    origin: torch.Tensor                            # (B, LATENT_DIM) from N(0, I)
    share: torch.Tensor                             # (B, 1) in [0, 1): how much of WALK_LENGTH it came along

    def part(self, part):
        return Walk(*(tensor[part] for tensor in self))


@dataclass
class Batch:
    """The real images of one critic update, and all that is drawn for it; the generator's update takes the last one.

    All is drawn for the whole batch of BATCH_SIZE, of which each process holds its share: B pictures."""
    update: int                                     # number of the critic update within the step
    real: torch.Tensor                              # (B, C, H, W) in [-1, 1]
    z: torch.Tensor                                 # (B, LATENT_DIM) from N(0, I), for the fakes
    posterior_noise: torch.Tensor                   # (B, LATENT_DIM) from N(0, I), for the reconstructions
    between: torch.Tensor                           # (B,) in [0, 1), for the penalty
    changes: model_definitions.Changes              # of the synthetic video's frames, one for the whole batch
    walk: Walk | None = None                        # of a feedback update: see earlier_pictures


def make_batch(state, c, image_set, update):
    share = state.ranks.share(c.BATCH_SIZE)

    def draw(function, purpose, *shape):
        return to_device(function(shape, generator=state.draw(c, purpose, update))[share], state.device)

    changes, walk = state.generator.layer.video.draw(state.draw(c, "video", update)), None
    chance = state.draw(c, "feedback", update)
    if c.NUM_FRAMES > 1 and torch.rand((), generator=chance) < c.FEEDBACK_PROB:
        walk = Walk(*(to_device(tensor[share], state.device) for tensor in (
            torch.randn(c.BATCH_SIZE, c.LATENT_DIM, generator=chance), torch.rand(c.BATCH_SIZE, 1, generator=chance))))
    return Batch(update, real_batch(state, c, image_set, update),
                 draw(torch.randn, "z", c.BATCH_SIZE, c.LATENT_DIM),
                 draw(torch.randn, "posterior noise", c.BATCH_SIZE, c.LATENT_DIM),
                 draw(torch.rand, "between", c.BATCH_SIZE),
                 model_definitions.Changes(*(to_device(tensor, state.device) for tensor in changes)), walk)


def micro_batches(state, c):
    """Slices of this process's share of a batch, MICRO_BATCH pictures each. All losses are means over pictures, so that
    gradients add up."""
    count = c.BATCH_SIZE // state.ranks.size
    size = c.MICRO_BATCH or count
    return [slice(start, start + size) for start in range(0, count, size)]


def mixed_precision(state, c):
    """bfloat16 where it is safe, on CUDA; the networks keep scores, alpha and pictures in float32 themselves."""
    enabled = c.BFLOAT16 and state.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(state.device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def earlier_pictures(generator, z, changes, walk):
    """The window of a feedback update: the T-1 pictures of a walk that has come to z (B, LATENT_DIM), newest first,
    (B, (T-1)*C, H, W) in [0, 1]. No gradient goes through them.

    Made at WALK_POINTS places of the walk, each seen in several frames, with alphas from synthetic copies: a walk
    frame by frame would cost several steps.
    """
    frames = generator.layer.video.num_frames - 1
    ways = [WALK_LENGTH * walk.share * i / WALK_POINTS for i in range(1, WALK_POINTS + 1)]
    points = [generator.image_and_alpha(latent_space.spherical(z, walk.origin, way), changes=changes)[0]
              for way in ways]
    return torch.cat([(1 + points[i * WALK_POINTS // frames]) / 2 for i in range(frames)], dim=1)


def make_images(generator, z, changes, walk):
    """The image and alpha of z: its video holds modified copies, or, with a walk, the pictures before."""
    video = None if walk is None else earlier_pictures(generator, z, changes, walk)
    return generator.image_and_alpha(z, video, changes)


def generator_pass(generator, real, z, posterior_noise, changes, walk=None):
    """Pictures from z and reconstructions of real in one pass through decoder and layer.

    -> image (2B, C, H, W), the fakes and then the reconstructions, its alpha, and mu, logvar (B, LATENT_DIM)."""
    mu, logvar = generator.vae.encode(real)
    walk = None if walk is None else Walk(*(torch.cat([tensor, tensor]) for tensor in walk))
    image, alpha = make_images(generator, torch.cat([z, generator.vae.reparameterize(mu, logvar, posterior_noise)]),
                               changes, walk)
    return image, alpha, mu, logvar


def make_pictures(state, batch, part):
    """generator_pass over a part of the batch."""
    return state.functions.generator_pass(state.generator, batch.real[part], batch.z[part], batch.posterior_noise[part],
                                          batch.changes, batch.walk and batch.walk.part(part))


def generator_loss(critic, real, image, mu, logvar, lambda_rec, lambda_kl):
    """L_G = -mean D(fake) + LAMBDA_REC * reconstruction + LAMBDA_KL * KL / (C*H*W), and its two VAE terms."""
    fake, reconstructed = image.chunk(2)
    reconstruction, kl = losses.reconstruction_loss(reconstructed, real), losses.kl_divergence(mu, logvar)
    loss = losses.generator_loss(critic(fake), reconstruction, kl, real[0].numel(), lambda_rec,
                                 lambda_kl)
    return loss, reconstruction, kl


def critic_scores(critic, real, fake, lambda_drift):
    """L_D without its penalty, and the gap D(real) - D(fake): one pass for both sides."""
    real_score, fake_score = critic(torch.cat([real, fake])).chunk(2)
    return losses.critic_loss(real_score, fake_score, lambda_drift), real_score.mean() - fake_score.mean()


def apply_update(state, model, optimizer):
    """One optimizer step on the gradients' mean over all processes; where one of them is not finite, nothing is
    applied, and it is counted.

    The verdict stays on the device, where fused Adam takes it as GradScaler would hand it: no wait for the device.
    """
    distributed.average_gradients(state.ranks, model)
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
    parts, values, norms = micro_batches(state, c), [], []
    first = state.ranks.share(c.BATCH_SIZE).start
    measured = len(range(0, c.BATCH_SIZE, c.GP_EVERY)) / state.ranks.size     # pictures that the penalty is the mean of
    for part in parts:
        with mixed_precision(state, c):
            if shared is not None:
                fake = shared[0].detach().chunk(2)[0]
            else:
                with torch.no_grad():
                    fake, _ = make_images(state.generator, batch.z[part], batch.changes,
                                          batch.walk and batch.walk.part(part))
            loss, gap = state.functions.critic_scores(state.critic, batch.real[part], fake, c.LAMBDA_DRIFT)
        (loss / len(parts)).backward()
        values.append({"critic_loss": loss.detach(), "score_gap": gap.detach()})
        some = slice(-(first + part.start) % c.GP_EVERY, None, c.GP_EVERY)      # every GP_EVERY-th of the whole batch
        x_hat = losses.interpolate(batch.real[part][some], fake[some], batch.between[part][some])
        if len(x_hat):
            norms.append(state.functions.gradient_norm(state.critic, x_hat))
            (c.LAMBDA_GP * losses.gradient_penalty(norms[-1]) * len(x_hat) / measured).backward()
    apply_update(state, state.critic, state.critic_optimizer)
    norm, values = torch.cat([*norms, batch.between[:0]]).detach(), combined(values)     # a share may hold none
    penalty = (norm - 1).square().sum() / measured
    return {**values, "critic_loss": values["critic_loss"] + c.LAMBDA_GP * penalty,
            "gradient_norm": norm.sum() / measured, "gradient_penalty": penalty}


def generator_step(state, c, batch, shared=None):
    """One update on L_G, VAE and layer together; returns scalars (tensors) to log."""
    state.generator_optimizer.zero_grad(set_to_none=True)
    state.critic.requires_grad_(False)
    parts, values, fakes = micro_batches(state, c), [], []
    for part in parts:
        with mixed_precision(state, c):
            image, alpha, mu, logvar = shared or make_pictures(state, batch, part)
            loss, reconstruction, kl = state.functions.generator_loss(
                state.critic, batch.real[part], image, mu, logvar, c.LAMBDA_REC, c.LAMBDA_KL)
        (loss / len(parts)).backward()
        alpha, mu, logvar = alpha.detach(), mu.detach(), logvar.detach()
        fakes.append(image[:len(batch.real[part])].detach())
        values.append({"generator_loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.detach(),
                       "posterior_variance": (mu.square() + logvar.exp()).mean(), "alpha_mean": alpha.mean(),
                       "alpha_min": alpha.min(), "alpha_max": alpha.max(),
                       "alpha_spread": alpha.std(dim=(2, 3)).mean()})
    apply_update(state, state.generator, state.generator_optimizer)
    state.critic.requires_grad_(True)
    spread, real_spread = (pictures.std(0, correction=0).mean() for pictures in (torch.cat(fakes), batch.real))
    return {**combined(values), "picture_spread": spread / real_spread.clamp_min(1e-6)}


HOW_COMBINED = {"alpha_min": torch.amin, "alpha_max": torch.amax}    # over micro-batches and processes; else the mean


def combined(values):
    """The scalars of all micro-batches as one dict."""
    return {name: HOW_COMBINED.get(name, torch.mean)(torch.stack([part[name] for part in values]))
            for name in values[0]}


@torch.no_grad()
def update_ema(state, c):
    """Averages the generator's weights with a half-life in images, shorter at the start (Karras et al. 2020)."""
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * state.counters["images_seen"])
    weight = 1 - 0.5 ** (c.BATCH_SIZE / half_life) if half_life > 0 else 1.0
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.generator.parameters()), weight)


def updates(state, c, batches):
    """All updates of a step, which is all that it does on the device but the averaging; returns the scalars to log.

    The generator does not change between the last critic update and its own, so the two share z and, where a batch
    is one piece, the pass that made the pictures too.
    """
    values, shared, parts = {}, None, micro_batches(state, c)
    for batch in batches:
        if len(parts) == 1 and batch is batches[-1]:
            with mixed_precision(state, c):
                shared = make_pictures(state, batch, parts[0])
        values |= critic_step(state, c, batch, shared)
    return values | generator_step(state, c, batches[-1], shared)


class RecordedStep:
    """`updates`, recorded once as a CUDA graph and then replayed: thousands of small kernels start as one.

    The first steps run as they are, on a stream of their own as PyTorch asks for: cuDNN chooses its algorithms, Adam
    makes its averages, and COMPILE compiles. The recording keeps the addresses of all tensors: new batches are copied
    to the first one's place.
    """

    WARM_UP = 3      # steps

    def __init__(self):
        self.steps, self.graph = 0, None

    def __call__(self, state, c, batches):
        self.steps += 1
        if self.steps <= self.WARM_UP:
            stream, before = torch.cuda.Stream(state.device), torch.cuda.current_stream(state.device)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                values = updates(state, c, batches)
            before.wait_stream(stream)
            return values
        if self.graph is None:
            self.graph, self.batches = torch.cuda.CUDAGraph(), batches
            with torch.cuda.graph(self.graph):
                self.values = updates(state, c, batches)
        else:
            torch._foreach_copy_(self.tensors(self.batches), self.tensors(batches))
        self.graph.replay()
        return {name: value.clone() for name, value in self.values.items()}

    @staticmethod
    def tensors(batches):
        return [tensor for batch in batches for tensor in (batch.real, batch.z, batch.posterior_noise, batch.between,
                                                           *batch.changes, *(batch.walk or ()))]


def record_and_replay(state, c, batches):
    """`updates` by way of the RecordedStep of this kind of step: with or without a walk, a graph each."""
    kind = tuple(batch.walk is None for batch in batches)
    return state.graphs.setdefault(kind, RecordedStep())(state, c, batches)


def training_step(state, c, image_set):
    """N_CRITIC critic updates, one generator update, EMA; returns the step's scalars (tensors) of this process."""
    batches = [make_batch(state, c, image_set, update) for update in range(c.N_CRITIC)]
    recorded = c.CUDA_GRAPH and state.device.type == "cuda" and state.ranks.size == 1
    values = (record_and_replay if recorded else updates)(state, c, batches)
    state.counters["images_seen"] += c.BATCH_SIZE
    update_ema(state, c)
    state.counters["step"] += 1
    return values
