"""Speed of one training step, beside a textbook version of the same mathematics and the machine's peak.

    python benchmarks/step.py --batch-size 16                       # a batch of (16, 3, 128, 128)
    python benchmarks/step.py --image-size 64 --repeats 4           # any constant of config.py

First checks that both versions compute the same losses. Then both make STEPS_PER_TURN steps in turns, in one process;
the textbook version uses glibc's default memory settings (update.keep_freed_memory). Prints the medians and the range
of their ratio over the turns, and the peak of the machine: the faster of a matrix product and a convolution. A table
lists multiply-adds, backward passes included, and seconds of each part of a step, timed alone. Images are random;
nothing is read or written.
"""

import statistics
import sys
from collections.abc import Callable

import numpy as np
import tables
import textbook
import torch
import torch.nn.functional as F
from tables import median_and_range, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import command_line
import data
import losses
import run_state
import training_step
import update
from command_line import positive
from errors import RunError

TOLERANCE = 2e-3         # of a loss, relative: float32 sums in another order
STEPS_PER_TURN = 4


# ------------------------------------------------------------------------------------- multiply-adds

class CountMultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and matrix products in `total`.

    torch's FlopCounterMode raises under a double backward, and counts fused attention as 0 on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(operator, "_overloadpacket", None))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out) // 2      # the registry counts both operations
        return out


def multiply_adds(function: Callable) -> int:
    """Returns the multiply-adds of function(), backward passes inside included."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), CountMultiplyAdds() as counter:
        function()
    return counter.total


# ------------------------------------------------------------------------------------- what is timed

def random_images(c, count: int = 256) -> data.ImageSet:
    """Returns an ImageSet of smooth random images in memory."""
    coarse = torch.rand(count, c.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=c.IMAGE_SIZE, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return data.ImageSet(pixels, [str(i) for i in range(count)], np.arange(count), np.arange(0), [])


def machine_peak(device: torch.device) -> tuple[float, float]:
    """Returns the FLOP/s of a matrix product and of a convolution in float32."""
    a = torch.randn(2048, 2048, device=device)
    x = torch.randn(16, 128, 32, 32, device=device).to(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return (2 * 2048 ** 3 / seconds(lambda: a @ a),
                2 * 16 * 128 * 128 * 9 * 32 ** 2 / seconds(lambda: F.conv2d(x, kernel, padding=1)))


def parts(state, c, image_set) -> dict[str, tuple[Callable, int]]:
    """Returns {name: (function, calls per step)}: each part of a step alone, forward and backward."""
    batch = training_step.draw_batch(state, c, image_set, 0)
    vae, layer, critic = state.generator.vae, state.generator.layer, state.critic
    z = torch.cat([batch.z, batch.posterior_noise]).requires_grad_()         # of the fakes and the reconstructions
    with torch.no_grad():
        x = vae.decode(z)
        fake, tokens, alpha = layer(x)[:c.BATCH_SIZE], layer.tokens(x, changes=batch.changes), layer.alpha(x)
    tokens, x, alpha = (t.requires_grad_() for t in (tokens, x, alpha))

    def critic_scores():
        losses.critic_loss(*critic(torch.cat([batch.real, fake])).chunk(2), c.LAMBDA_DRIFT).backward()

    def penalty():
        losses.gradient_penalty(losses.gradient_norm(critic, fake[::c.GP_EVERY])).backward()

    def frozen_critic():
        with update.frozen(critic):
            critic(fake.clone().requires_grad_()).mean().backward()

    def encoder():
        mu, logvar = vae.encode(batch.real)
        (mu.mean() + logvar.mean()).backward()

    def alpha_and_tanh():
        small = F.interpolate(F.avg_pool2d(alpha, layer.CELL), size=x.shape[2:], mode="bilinear")
        layer.apply_alpha(x, layer.alpha_init * layer.alpha_span ** torch.tanh(small)).mean().backward()

    def updates():
        update.apply_if_finite(state, state.critic, state.critic_optimizer)
        update.apply_if_finite(state, state.generator, state.generator_optimizer)
        update.update_ema(state)

    return {
        "critic scores": (critic_scores, c.N_CRITIC),
        "gradient penalty": (penalty, c.N_CRITIC),
        "critic in the generator's update": (frozen_critic, 1),
        "encoder": (encoder, 1),
        "decoder": (lambda: vae.decode(z).mean().backward(), 1),
        "layer: video and patch tokens": (
            lambda: layer.tokens(x, changes=batch.changes).square().mean().backward(), 1),
        "layer: Transformer and alpha head": (lambda: layer.to_s(layer.encode(tokens)).mean().backward(), 1),
        "layer: alpha and tanh": (alpha_and_tanh, 1),
        "optimizers, finite checks, EMA": (updates, 1),
        "batch and random draws": (lambda: training_step.draw_batch(state, c, image_set, 0), c.N_CRITIC),
    }


# ------------------------------------------------------------------------------------- what is printed

def check_same_losses(state, book, c, image_set) -> None:
    """Makes one step with both versions from the same weights. Raises RunError if a loss differs."""
    ours = {name: float(value) for name, value in training_step.training_step(state, c, image_set).items()}
    theirs = textbook.training_step(book, c, image_set)
    apart = {name: abs(ours[name] - value) / max(1, abs(value)) for name, value in theirs.items()}
    worst = max(apart, key=apart.get)
    words = f"{worst} is {ours[worst]:.6g} in this project and {theirs[worst]:.6g} in the textbook version"
    if not apart[worst] <= TOLERANCE:
        raise RunError(f"the losses differ: {words}")
    print(f"same losses: {', '.join(theirs)}; the largest difference: {words}")


def compare(state, book, c, image_set, repeats: int) -> float:
    """Times both versions in alternating turns and prints the result. Returns the machine's peak in FLOP/s."""
    def turn(step, which):
        update.keep_freed_memory(which is state)
        step(which, c, image_set)                                # settles memory and caches
        return seconds(lambda: [step(which, c, image_set) for _ in range(STEPS_PER_TURN)]) / STEPS_PER_TURN

    rounds = [(turn(training_step.training_step, state), turn(textbook.training_step, book),
               *machine_peak(state.device)) for _ in range(repeats + 1)][1:]                 # the first one warms up
    ours, theirs, products, convolutions = zip(*rounds)
    for name, values in (("this project", ours), ("textbook", theirs)):
        print(f"{name:14}{median_and_range(values, 3)} s per step, "
              f"{c.BATCH_SIZE / statistics.median(values):.1f} images/s")
    print(f"{'ratio':14}{median_and_range([b / a for a, b in zip(ours, theirs)])}")
    product, convolution = statistics.median(products), statistics.median(convolutions)
    print(f"machine: matrix product {product / 1e9:.0f}, convolution {convolution / 1e9:.0f} GFLOP/s, float32, "
          f"{torch.get_num_threads()} threads")
    return max(product, convolution)


def print_parts(state, c, image_set, peak: float, rounds: int) -> None:
    """Times whole steps and each part in the same rounds, so that a change of the machine's speed affects all."""
    found, times = parts(state, c, image_set), []
    for _ in range(rounds + 1):
        times.append([seconds(lambda: training_step.training_step(state, c, image_set)),
                      *(calls * seconds(function) for function, calls in found.values())])
    step_seconds, *durations = (statistics.median(column) for column in zip(*times[1:]))
    counts = [calls * multiply_adds(function) for function, calls in found.values()]
    print(f"{'part':36}{'multiply-adds':>15}{'seconds':>10}{'of the step':>13}{'of the peak':>13}")
    for name, count, duration in zip((*found, "a step"), (*counts, sum(counts)), (*durations, step_seconds)):
        print(f"{name:36}{count:15,}{duration:10.3f}{duration / step_seconds:13.0%}{2 * count / duration / peak:13.0%}")
    layer = sum(duration for name, duration in zip(found, durations) if name.startswith("layer"))
    print(f"the layer takes {layer / step_seconds:.0%} of a step")


# ------------------------------------------------------------------------------------- command line

def start(argv) -> None:
    parser = command_line.Parser("step.py", __doc__)
    parser.add_argument("--repeats", type=positive(int), default=8, metavar="N", help="timed turns [%(default)s]")
    arguments = tables.parse(parser, argv)
    c, _ = command_line.parse_constants(arguments.flags)
    device = command_line.choose_device(c.DEVICE)
    update.set_up(device, c)
    state, image_set = run_state.new_state(c, device), random_images(c)
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02)     # with zeros no gradient passes the head
    book = textbook.like(state, c)
    print(f"batch ({c.BATCH_SIZE}, {c.CHANNELS}, {c.IMAGE_SIZE}, {c.IMAGE_SIZE}), {c.TRANSFORMER_HEADS} heads, "
          f"{c.TRANSFORMER_LAYERS} layers; torch {torch.__version__} on {device}")
    check_same_losses(state, book, c, image_set)
    peak = compare(state, book, c, image_set, arguments.repeats)
    update.set_up(device, c)
    print_parts(state, c, image_set, peak, arguments.repeats)


if __name__ == "__main__":
    sys.exit(command_line.run_script("step.py", start, None))
