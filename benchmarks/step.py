"""How fast one training step is, beside a textbook version of the same mathematics and beside the machine's best.

    python benchmarks/step.py --batch-size 16                  # the reference shape, (16, 3, 128, 128)
    python benchmarks/step.py --image-size 64 --profile        # any constant of config.py; the ten costliest operators
    python benchmarks/step.py --compile --repeats 20           # the shipped code compiled

First it checks that both versions compute the same losses. Then both make STEPS_A_TURN steps at a time, in turns, in
one process, the textbook's with the C library's own way with memory (see training_step.keep_freed_memory): medians,
and the range of the ratio over the turns. Between them a matrix product and a convolution are timed, whose best is
what the machine can do. The table says where a step of the shipped code goes: multiply-adds (as in the summary that
training.py prints, backward passes included) and seconds of each part, timed alone. Random pictures;
nothing is read or written.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import textbook

import command_line
import data
import losses
import training_step
from model_definitions import CountMultiplyAdds

TOLERANCE = 2e-3         # of a loss, relative: float32 sums in another order
STEPS_A_TURN = 4


# ------------------------------------------------------------------------------------- what is timed

def random_images(c, count=256):
    """An ImageSet of smooth random pictures in memory."""
    coarse = torch.rand(count, c.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=c.IMAGE_SIZE, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return data.ImageSet(pixels, [str(i) for i in range(count)], np.arange(count), np.arange(0), [])


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    """Wall-clock time of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def machine_best(device):
    """(matrix product, convolution), FLOP/s in float32: what a step is held against."""
    a = torch.randn(2048, 2048, device=device)
    x = torch.randn(16, 128, 32, 32, device=device).to(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return (2 * 2048 ** 3 / seconds(lambda: a @ a, device),
                2 * 16 * 128 * 128 * 9 * 32 ** 2 / seconds(lambda: F.conv2d(x, kernel, padding=1), device))


def parts(state, c, image_set):
    """{name: (function, calls a step)}: each part of a step alone, forward and backward as the step does them."""
    batch = training_step.make_batch(state, c, image_set, 0)
    vae, layer, critic = state.generator.vae, state.generator.layer, state.critic
    z = torch.cat([batch.z, batch.posterior_noise]).requires_grad_()
    with torch.no_grad():
        x = vae.decode(z)
        fake = layer(x)[:c.BATCH_SIZE]
        tokens = layer.tokens(x, changes=batch.changes)
        s = layer.alpha(x)
    fake, tokens, x, s = (t.detach().requires_grad_() for t in (fake, tokens, x, s))

    def penalty():
        losses.gradient_penalty(losses.gradient_norm(critic, fake.detach()[::c.GP_EVERY])).backward()

    def frozen_critic():
        critic.requires_grad_(False)
        critic(fake).mean().backward()
        critic.requires_grad_(True)

    def heads():
        mu, logvar = vae.encode(batch.real)
        (mu.mean() + logvar.mean()).backward()

    def transformer():
        layer.to_s(layer.encode(tokens)).mean().backward()

    def alpha():
        small = F.interpolate(F.avg_pool2d(s, 4), size=x.shape[2:], mode="bilinear")
        layer.apply_alpha(x, layer.alpha_init * layer.alpha_span ** torch.tanh(small)).mean().backward()

    def update():
        training_step.apply_update(state, state.critic, state.critic_optimizer)
        training_step.apply_update(state, state.generator, state.generator_optimizer)
        training_step.update_ema(state, c)

    return {
        "critic scores": (lambda: training_step.critic_scores(critic, batch.real, fake.detach(), 0.0)[0].backward(),
                          c.N_CRITIC),
        "gradient penalty": (penalty, c.N_CRITIC),
        "critic in the generator's update": (frozen_critic, 1),
        "encoder": (heads, 1),
        "decoder": (lambda: vae.decode(z).mean().backward(), 1),
        "layer: video and patch tokens": (
            lambda: layer.tokens(x, changes=batch.changes).square().mean().backward(), 1),
        "layer: Transformer and alpha head": (transformer, 1),
        "layer: alpha and tanh": (alpha, 1),
        "optimizers, finite checks, EMA": (update, 1),
        "batch and random draws": (lambda: training_step.make_batch(state, c, image_set, 0), c.N_CRITIC),
    }


def count(function):
    """Multiply-adds of one call; the MATH backend, since fused attention can't be looked into."""
    with sdpa_kernel(SDPBackend.MATH), CountMultiplyAdds() as counter:
        function()
    return counter.total


# ------------------------------------------------------------------------------------- what is printed

def check_same_losses(state, book, c, image_set):
    """Both versions from the same weights, one step; raises SystemExit where they differ."""
    ours = {name: float(value) for name, value in training_step.training_step(state, c, image_set).items()}
    theirs = textbook.training_step(book, c, image_set)
    worst = max(theirs, key=lambda name: abs(ours[name] - theirs[name]) / max(1, abs(theirs[name])))
    for name, value in theirs.items():
        if abs(ours[name] - value) > TOLERANCE * max(1, abs(value)):
            raise SystemExit(f"step.py: {name} is {ours[name]:.6g} here and {value:.6g} in the textbook's step")
    print(f"same losses: {', '.join(theirs)}; furthest apart {worst}, {ours[worst]:.6g} and {theirs[worst]:.6g}")


def compare(state, book, c, image_set, repeats):
    """Alternating turns; returns the machine's best in FLOP/s."""
    def timed_steps(function, which):
        def turn():
            for _ in range(STEPS_A_TURN):
                function(which, c, image_set)

        training_step.keep_freed_memory(which is state)
        turn()                                                   # settles memory and caches after the other's turn
        return seconds(turn, state.device) / STEPS_A_TURN

    ours, theirs, best = [], [], []
    for turn in range(repeats + 1):                              # the first turn warms up
        best.append(machine_best(state.device))
        pair = timed_steps(training_step.training_step, state), timed_steps(textbook.training_step, book)
        if turn:
            ours.append(pair[0])
            theirs.append(pair[1])
    ratios = [b / a for a, b in zip(ours, theirs)]
    product, convolution = (statistics.median(column) for column in zip(*best[1:]))
    for name, values in (("this project", ours), ("textbook", theirs)):
        median = statistics.median(values)
        print(f"{name:14}{median:8.3f} s a step ({min(values):.3f} to {max(values):.3f})"
              f"{c.BATCH_SIZE / median:8.1f} images/s")
    print(f"{'ratio':14}{statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"machine: matrix product {product / 1e9:.0f}, convolution {convolution / 1e9:.0f} GFLOP/s, float32, "
          f"{torch.get_num_threads()} threads")
    return max(product, convolution)


def print_parts(state, c, image_set, best, rounds):
    """Times whole steps and each part alone in the same rounds, so that a change of the machine's speed hits all."""
    whole, table = [], {name: (*entry, []) for name, entry in parts(state, c, image_set).items()}
    for _ in range(rounds + 1):
        whole.append(seconds(lambda: [training_step.training_step(state, c, image_set) for _ in range(STEPS_A_TURN)],
                             state.device) / STEPS_A_TURN)
        for function, calls, durations in table.values():
            durations.append(calls * seconds(function, state.device))
    step_seconds = statistics.median(whole[1:])
    print(f"{'part':36}{'multiply-adds':>15}{'seconds':>10}{'of the step':>13}{'of the peak':>13}")
    total, layer = 0, 0.0
    for name, (function, calls, durations) in table.items():
        duration, adds = statistics.median(durations[1:]), round(calls * count(function))
        total += adds
        layer += duration * name.startswith("layer")
        print(f"{name:36}{adds:15,}{duration:10.3f}{duration / step_seconds:12.0%} {2 * adds / duration / best:12.0%}")
    print(f"{'a step':36}{total:15,}{step_seconds:10.3f}{1:12.0%} {2 * total / step_seconds / best:12.0%}")
    print(f"the layer takes {layer / step_seconds:.0%} of a step; "
          f"{2 * total / step_seconds / 1e9:.0f} GFLOP/s of {best / 1e9:.0f}")


def print_profile(state, c, image_set):
    with torch.profiler.profile() as profile:
        for _ in range(STEPS_A_TURN):
            training_step.training_step(state, c, image_set)
    key = "self_device_time_total" if state.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: getattr(row, key), reverse=True)
    whole = sum(getattr(row, key) for row in rows)
    for row in rows[:10]:
        print(f"{row.key[:60]:60}{getattr(row, key) / whole:7.1%}{row.count // STEPS_A_TURN:7} calls a step")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="turns that are counted [%(default)s]")
    parser.add_argument("--profile", action="store_true", help="print the ten costliest operators")
    arguments, flags = parser.parse_known_args(argv)
    try:
        c, _ = command_line.parse_constants(flags, "step.py", __doc__)
        device = command_line.choose_device(c.DEVICE)
    except command_line.InputError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    training_step.set_up(device, c)
    state, image_set = training_step.new_state(c, device), random_images(c)
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02)     # at 0 no gradient would pass the head
    book = textbook.like(state, c)
    print(f"batch ({c.BATCH_SIZE}, {c.CHANNELS}, {c.IMAGE_SIZE}, {c.IMAGE_SIZE}), {c.TRANSFORMER_HEADS} heads, "
          f"{c.TRANSFORMER_LAYERS} layers; torch {torch.__version__} on {device}")
    check_same_losses(state, book, c, image_set)
    best = compare(state, book, c, image_set, arguments.repeats)
    training_step.set_up(device, c)
    print_parts(state, c, image_set, best, arguments.repeats)
    if arguments.profile:
        print_profile(state, c, image_set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
