"""Speed of one training step: a table of several settings, and a comparison with a textbook version.

    python benchmarks/step.py --image-size 64 --repeats 4           # any constant of config.py
    python benchmarks/step.py --rows gpu --repeats 3                # the table for the settings ROWS["gpu"]
    python benchmarks/step.py --profile --batch-size 64             # a step's time by purpose

The table has a row for each setting:
    ms per step      in a loop as in training.py, which waits for the device only at its end
    ms of the graph  CUDA: the recorded graph alone, replayed in such a loop
    host             CUDA: 1 - graph / step, the share of a step in which the device waits for the host
    layer            1 - step / step with --alpha-span 1, timed in turns: the share of TransformerParamTanh
    kernels          CUDA: of a step without CUDA graph, copies included; CPU: calls of operators that write memory
    GB, ms at least  bytes that the operators read and write, and their time at the device's bandwidth, which a large
                     copy measures; what a cache keeps from one operator to the next takes less
    images/s, s per 1,000 images

On the CPU, without --rows and --profile, first checks that this project and the textbook version compute the same
losses. Then both make steps in turns, in one process; the textbook version uses glibc's default memory settings
(update.keep_freed_memory). Prints the medians and the range of their ratio over the turns, and the peak of the machine:
the faster of a matrix product and a convolution. A second table lists multiply-adds, backward passes included, and
seconds of each part of a step, timed alone. Images are random; nothing is read or written.
"""

import copy
import statistics
import sys
from collections.abc import Callable

import counting
import numpy as np
import tables
import textbook
import torch
import torch.nn.functional as F
from tables import median_and_range, seconds

import command_line
import data
import losses
import run_state
import training_step
import update
from command_line import positive
from errors import RunError

TOLERANCE = 2e-3         # of a loss, relative: float32 sums in another order
STEPS_PER_TURN = {"cpu": 4, "mps": 4, "cuda": 100}
COPIED = {"cpu": 2 ** 29, "mps": 2 ** 29, "cuda": 2 ** 32}      # bytes, many times the device's caches
MOST = 10                # purposes that --profile lists

WIDE = "--image-size 64 --batch-size 64 --width 64 --width-max 512 --encoder-width 32"
ROWS = {
    "gpu": {
        "batch 8": "--image-size 64 --batch-size 8",
        "batch 16": "--image-size 64 --batch-size 16",
        "batch 32": "--image-size 64 --batch-size 32",
        "batch 64": "--image-size 64 --batch-size 64",
        "batch 64, `--alpha-span 1`": "--image-size 64 --batch-size 64 --alpha-span 1",
        "wide": WIDE,
        "wide, `--alpha-span 1`": f"{WIDE} --alpha-span 1",
        "128 px, batch 16": "--image-size 128 --batch-size 16",
    },
    "wide": {"wide": WIDE},
    "cpu": {
        "64 px, batch 8": "--image-size 64 --batch-size 8",
        "128 px, batch 8": "--image-size 128 --batch-size 8",
    },
}


# ------------------------------------------------------------------------------------- what is timed

def random_images(c, count: int = 256) -> data.ImageSet:
    """Returns an ImageSet of smooth random images in memory."""
    coarse = torch.rand(count, c.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=c.IMAGE_SIZE, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return data.ImageSet(pixels, [str(i) for i in range(count)], np.arange(count), np.arange(0), [])


def new_state(c, device: torch.device) -> run_state.State:
    """Returns the state of a new run, with an alpha head that is not 0: with zeros no gradient passes the head."""
    state = run_state.new_state(c, device)
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02)
    return state


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
    code = batch.posterior_noise.clone().requires_grad_()
    with torch.no_grad():
        x = vae.decode(code)
        fake, tokens, alpha = layer(x), layer.tokens(x, changes=batch.changes), layer.alpha(x)
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
        "decoder": (lambda: vae.decode(code).mean().backward(), 1),
        "prior": (lambda: losses.prior_loss(state.generator.prior.velocity, code, batch.prior_noise,
                                            batch.prior_t).backward(), 1),
        "layer: video and patch tokens": (
            lambda: layer.tokens(x, changes=batch.changes).square().mean().backward(), 1),
        "layer: Transformer and alpha head": (lambda: layer.to_s(layer.encode(tokens)).mean().backward(), 1),
        "layer: alpha and tanh": (alpha_and_tanh, 1),
        "optimizers, finite checks, EMA": (updates, 1),
        "batch and random draws": (lambda: training_step.draw_batch(state, c, image_set, 0), c.N_CRITIC),
    }


# ------------------------------------------------------------------------------------- comparison with the textbook

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
        steps = STEPS_PER_TURN[state.device.type]
        return seconds(lambda: [step(which, c, image_set) for _ in range(steps)]) / steps

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
    counts = [calls * counting.multiply_adds(function) for function, calls in found.values()]
    print(f"{'part':36}{'multiply-adds':>15}{'seconds':>10}{'of the step':>13}{'of the peak':>13}")
    for name, count, duration in zip((*found, "a step"), (*counts, sum(counts)), (*durations, step_seconds)):
        print(f"{name:36}{count:15,}{duration:10.3f}{duration / step_seconds:13.0%}{2 * count / duration / peak:13.0%}")
    layer = sum(duration for name, duration in zip(found, durations) if name.startswith("layer"))
    print(f"the layer takes {layer / step_seconds:.0%} of a step")


def compare_with_textbook(c, device: torch.device, repeats: int) -> None:
    """Prints the comparison with the textbook version, and the parts of a step."""
    state, image_set = new_state(c, device), random_images(c)
    book = textbook.like(state, c)
    print(f"batch ({c.BATCH_SIZE}, {c.CHANNELS}, {c.IMAGE_SIZE}, {c.IMAGE_SIZE}), {c.TRANSFORMER_HEADS} heads, "
          f"{c.TRANSFORMER_LAYERS} layers; torch {torch.__version__} on {device}")
    check_same_losses(state, book, c, image_set)
    peak = compare(state, book, c, image_set, repeats)
    update.set_up(device, c)
    print_parts(state, c, image_set, peak, repeats)


# ------------------------------------------------------------------------------------- table

def loop(state, c, image_set, steps: int) -> None:
    """Makes steps as training.py does, without logged lines."""
    for _ in range(steps):
        training_step.training_step(state, c, image_set)


def replay(graph: torch.cuda.CUDAGraph, steps: int) -> None:
    for _ in range(steps):
        graph.replay()


def bandwidth(device: torch.device) -> float:
    """Returns the bytes per second that a large copy reads and writes."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * len(source) / min(seconds(lambda: target.copy_(source)) for _ in range(10))


def eager(c, device: torch.device, image_set) -> Callable:
    """Returns a function that makes a step without CUDA graph, warmed up."""
    c = copy.copy(c)
    c.CUDA_GRAPH = False
    state = new_state(c, device)
    loop(state, c, image_set, update.RecordedStep.WARM_UP)
    return lambda: training_step.training_step(state, c, image_set)


def time_turns(c, device: torch.device, image_set, repeats: int) -> list[float]:
    """Returns the seconds of a step, of its graph, and of a step with ALPHA_SPAN 1, as medians of `repeats` turns. The
    graph's are 0 without one, the last are 0 if c has ALPHA_SPAN 1."""
    steps, state, fixed = STEPS_PER_TURN[device.type], new_state(c, device), copy.copy(c)
    fixed.ALPHA_SPAN = 1.0
    without = new_state(fixed, device) if c.ALPHA_SPAN != 1 else None
    warm_up = update.RecordedStep.WARM_UP + 2
    loop(state, c, image_set, warm_up)
    if without:
        loop(without, fixed, image_set, warm_up)
    graph = next((recorded.graph for recorded in state.graphs.values()), None)
    turns = [(seconds(lambda: loop(state, c, image_set, steps)) / steps,
              seconds(lambda: replay(graph, steps)) / steps if graph else 0,
              seconds(lambda: loop(without, fixed, image_set, steps)) / steps if without else 0)
             for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*turns)]


def print_row(name: str, c, device: torch.device, image_set, repeats: int, rate: float) -> None:
    """Prints a row of the table. rate: the device's bandwidth in bytes per second."""
    whole, alone, fixed = time_turns(c, device, image_set, repeats)
    step = eager(c, device, image_set)
    counts = counting.count(step)
    kernels = counting.time_by_purpose(step, device)[2] if device.type == "cuda" else counts.calls
    graph, host = (f"{1000 * alone:.2f}", f"{1 - alone / whole:.0%}") if alone else ("", "")
    layer = f"{1 - fixed / whole:.0%}" if fixed else ""
    print(f"| {name} | {1000 * whole:.2f} | {graph} | {host} | {layer} | {kernels:,} | {counts.bytes / 1e9:.2f} | "
          f"{1000 * counts.bytes / rate:.2f} | {c.BATCH_SIZE / whole:,.1f} | {1000 * whole / c.BATCH_SIZE:.2f} |",
          flush=True)


def print_profile(name: str, c, device: torch.device, image_set) -> None:
    """Prints the most expensive purposes of a step without CUDA graph."""
    found, whole, _ = counting.time_by_purpose(eager(c, device, image_set), device)
    if not whole:
        raise RunError("the profiler recorded no kernels: CUPTI may be missing or not permitted")
    listed = list(found.items())[:MOST]
    rest = whole - sum(duration for _, (duration, _) in listed), sum(calls for _, calls in list(found.values())[MOST:])
    print(f"\n{name}: {1000 * whole:.2f} ms of {'kernels' if device.type == 'cuda' else 'operators'} in a step\n\n"
          "| purpose | ms | share | calls |\n| --- | --- | --- | --- |")
    for label, (duration, calls) in (*listed, ("all others", rest)):
        print(f"| {label} | {1000 * duration:.2f} | {duration / whole:.1%} | {calls:,} |")


def print_rows(settings: dict, device: torch.device, repeats: int, profile: bool) -> None:
    """Prints the table for {name: constants}, or with profile the purposes of each."""
    rate = bandwidth(device)
    print(f"{tables.machine(device)}, {rate / 1e9:,.0f} GB/s; torch {torch.__version__}")
    if not profile:
        print("| setting | ms per step | ms of the graph | host | layer | kernels | GB | ms at least | images/s | "
              "s per 1,000 images |\n|" + " --- |" * 10)
    for name, c in settings.items():
        image_set = random_images(c)
        if profile:
            print_profile(name, c, device, image_set)
        else:
            print_row(name, c, device, image_set, repeats, rate)


# ------------------------------------------------------------------------------------- command line

def start(argv) -> None:
    parser = command_line.Parser("step.py", __doc__)
    parser.add_argument("--repeats", type=positive(int), default=8, metavar="N", help="timed turns [%(default)s]")
    parser.add_argument("--rows", choices=ROWS,
                        help="print only the table, for these settings; other flags apply to all of them")
    parser.add_argument("--profile", action="store_true", help=f"print the {MOST} most expensive purposes of a step")
    arguments = tables.parse(parser, argv)
    given = " ".join(arguments.flags)
    rows = {" ".join([name, given]).strip(): flags for name, flags in
            (ROWS[arguments.rows] if arguments.rows else {"" if given else "default": ""}).items()}
    settings = {name: command_line.parse_constants([*flags.split(), *arguments.flags])[0]
                for name, flags in rows.items()}
    c = next(iter(settings.values()))
    device = command_line.choose_device(c.DEVICE)
    update.set_up(device, c)
    if not (arguments.rows or arguments.profile or device.type == "cuda"):
        compare_with_textbook(c, device, arguments.repeats)
    print_rows(settings, device, arguments.repeats, arguments.profile)


if __name__ == "__main__":
    sys.exit(command_line.run_script("step.py", start, None))
