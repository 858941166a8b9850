"""Time and peak memory of one training step against the constants that set its size, each varied alone.

    python benchmarks/scaling.py                                                # a table and the exponents
    python benchmarks/scaling.py --csv scaling.csv --out docs/scaling.png       # the picture too; again: goes on
    python benchmarks/scaling.py --only BATCH_SIZE,PATCH -- --lambda-gp 0       # flags of config.py, for all cells

The base point is 64 px, batch 16 and config.py's values for the rest, unless flags behind -- say otherwise. Each cell
is a process of its own, for the peak of a process only rises: one step to warm up, then --steps steps in rounds of
GP_EVERY, each with its share of gradient penalties, of which the fastest counts. Memory is the peak of all these steps,
weights and optimizer included: on CUDA torch's count, on the CPU the process's peak less that after the imports. An
exponent is the slope of log(cost) over log(value) by least squares; `last` is the slope between the two dearest values,
which a constant part of the cost flattens less. A CSV's cells are not measured again: delete it when the code changes.
"""

import codecs
import csv
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import checkpoints
import command_line
import data
import training_step
from errors import InputError

BASE = ["--image-size", "64", "--batch-size", "16"]
VALUES = {     # from cheap to dear
    "IMAGE_SIZE": [64, 128, 256],
    "BATCH_SIZE": [4, 8, 16, 32, 64],
    "NUM_FRAMES": [4, 8, 16, 32, 64],
    "TRANSFORMER_DIM": [48, 96, 192, 384],
    "PATCH": [32, 16, 8, 4],
}
COLUMNS = [*VALUES, "device", "flags", "seconds", "MiB"]     # of the CSV; the last two are the result
COLOURS = dict(zip(VALUES, ("#0072b2", "#d55e00", "#009e73", "#a0568c", "#555555")))


def peak_bytes(device):
    """The most memory that this process has held so far; on CUDA, what torch has held there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":     # where ru_maxrss starts at the peak of the process that started this one
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    import resource  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(steps, flags):
    """What a cell's process does: prints [seconds a step, peak MiB] as JSON."""
    c, _ = command_line.parse_constants(flags)
    device = command_line.choose_device(c.DEVICE)
    shape = (c.BATCH_SIZE, c.IMAGE_SIZE, c.IMAGE_SIZE, c.CHANNELS)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image_set = data.ImageSet(images, [], np.arange(len(images)), np.arange(0), [])
    before, times = peak_bytes(device), []

    training_step.set_up(device, c)
    state = training_step.new_state(c, device)
    for _ in range(steps + 1):                      # the first warms up
        training_step.training_step(state, c, image_set)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    print(json.dumps([min(np.diff(times)), (peak_bytes(device) - before) / 2**20]))


def read_csv(file):
    """{(all columns but the result): [seconds, MiB]}; {} where there is no file yet. Raises InputError."""
    header, *rows = Path(file).read_text("utf-8", "replace").split("\n") if Path(file).exists() else [",".join(COLUMNS)]
    if header != ",".join(COLUMNS):
        raise InputError(f"{file} is no table of this script: give another --csv")
    return {tuple(row[:-2]): [float(cost) for cost in row[-2:]] for row in csv.reader(rows) if row}


def measure_all(options, extra):
    """Measures and prints all cells: the base point, {constant: [(value, seconds, MiB), ...]}, how many failed."""
    found, lines, failed = read_csv(options.csv) if options.csv else {}, {}, 0

    def cell(*more):
        flags = [*BASE, *extra, *more]
        c, _ = command_line.parse_constants(flags)
        device = command_line.choose_device(c.DEVICE).type
        if device == "mps":
            raise InputError("torch keeps no peak of memory on mps: add -- --device cpu")
        key = (*(str(getattr(c, name)) for name in VALUES), device, " ".join(extra))
        if key not in found:
            child = subprocess.run([sys.executable, __file__, "--cell", str(options.steps), *flags],
                                   capture_output=True, text=True)
            if child.returncode:    # -9 is what ends a process for lack of memory
                raise InputError(f"exit status {child.returncode} {child.stderr.strip().rpartition(chr(10))[2]}")
            found[key] = json.loads(child.stdout.splitlines()[-1])
            if options.csv:
                rows = [COLUMNS, *([*known, *costs] for known, costs in found.items())]
                checkpoints.write_atomically(options.csv, lambda file: csv.writer(
                    codecs.getwriter("utf-8")(file), lineterminator="\n").writerows(rows))
        return key, *found[key]

    key, base_seconds, base_mib = cell()
    base = dict(zip(VALUES, map(int, key)))
    print(f"base point on {key[-2]}:", ", ".join(f"{name} {value}" for name, value in base.items()), *extra)
    print(f"{'constant':16}{'value':>6}{'s a step':>11}{'MiB':>9}{'x time':>9}{'x memory':>10}")
    for name in options.only:
        lines[name] = []
        for value in sorted({*VALUES[name], base[name]}, reverse=name == "PATCH"):
            try:
                _, seconds, mib = cell(command_line.flag(name), str(value))
                lines[name].append((value, seconds, mib))
                text = f"{seconds:11.3f}{mib:9.0f}{seconds / base_seconds:9.2f}{mib / base_mib:10.2f}"
            except InputError as error:
                text, failed = f"   no result: {error}", failed + 1
            print(f"{name:16}{value:6}{text}", flush=True)
    return base, {name: line for name, line in lines.items() if len(line) > 1}, failed


def exponents(line, power=1):
    """[(least squares, last) of time, the same of memory] over value ** power, from [(value, seconds, MiB), ...]."""
    value, *costs = np.log(np.array(line, float)).T * [[power], [1], [1]]
    return [(np.polyfit(value, cost, 1)[0], (cost[-1] - cost[-2]) / (value[-1] - value[-2])) for cost in costs]


def print_exponents(lines):
    print(f"\n{'exponent':18}{'of time':>9}{'last':>7}{'of memory':>12}{'last':>7}")
    for name, line in lines.items():
        also = {"IMAGE_SIZE": [("  in pixels", 2)], "PATCH": [("  in tokens", -2)]}.get(name, [])
        for label, power in [(name, 1), *also]:
            (seconds, last_seconds), (mib, last_mib) = exponents(line, power)
            print(f"{label:18}{seconds:9.2f}{last_seconds:7.2f}{mib:12.2f}{last_mib:7.2f}")
    for name in ("BATCH_SIZE", "NUM_FRAMES"):
        if name in lines:           # 1.05: a process takes memory in larger pieces than it needs
            linear = max(exponents(lines[name])[1]) <= 1.05
            print(f"memory grows {'no faster' if linear else 'FASTER'} than linearly in {name}")


def draw(base, lines, file):
    """Two panels, seconds and MiB a step over each value as a multiple of the base point's, all axes logarithmic."""
    from matplotlib.figure import Figure

    ratios = sorted({row[0] / base[name] for name, line in lines.items() for row in line})
    marks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    figure = Figure(figsize=(9, 4.2), dpi=200, layout="constrained")
    for panel, column, title in zip(figure.subplots(1, 2), (1, 2), ("seconds a step", "peak memory of a step, MiB")):
        panel.set(xscale="log", yscale="log", title=title, xlim=(ratios[0] / 1.2, ratios[-1] * 5.5))
        for name, line in lines.items():
            cost = {row[0] / base[name]: row[column] for row in line}
            panel.plot([*cost], [*cost.values()], "o-", ms=4, color=COLOURS[name])
        low, high = panel.get_ylim()
        panel.plot(ratios, np.multiply(ratios, cost[1]), "--", color="#999999", linewidth=1, zorder=1)
        below = 0
        for name in sorted(lines, key=lambda name: lines[name][-1][column]):       # from the lowest label up
            x, y = lines[name][-1][0] / base[name], lines[name][-1][column]
            if x > 1:
                below = y = max(y, below * (high / low) ** 0.06)                   # so that none covers another
            panel.annotate(f"{name} {exponents(lines[name])[column - 1][0]:.2f}", (x, y), (7, 0), va="center",
                           textcoords="offset points", color=COLOURS[name], fontsize=9)
        panel.minorticks_off()
        panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
        panel.set_ylim(low, high)
        panel.grid(color="#e8e8e8")
        panel.spines[["top", "right"]].set_visible(False)
    point = ", ".join(f"{name} {base[name]}" for name in lines)
    figure.supxlabel(f"multiple of {point}\nnumbers: exponents, by least squares; dashed: exponent 1", fontsize=9)
    figure.savefig(file, facecolor="white", format="png")


def main(argv=None):
    """Exit status: 0 done, 1 a cell has no result, 2 bad input (one line says what)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command_line.Parser("scaling.py", __doc__)
    parser.add_argument("--out", help="PNG to draw the picture to (needs matplotlib)")
    parser.add_argument("--csv", help="table of the cells: those found in it are not measured again")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a cell [%(default)s]")
    parser.add_argument("--only", default=",".join(VALUES), help="the constants to vary [%(default)s]")
    try:
        if argv[:1] == ["--cell"]:
            measure(int(argv[1]), argv[2:])
            return 0
        own, flags = command_line.split(argv)
        options = parser.parse_args(own)
        options.only = options.only.split(",")
        if unknown := [name for name in options.only if name not in VALUES]:
            raise InputError(f"--only {','.join(unknown)} can't be: give some of {','.join(VALUES)}")
        if options.out and importlib.util.find_spec("matplotlib") is None:
            raise InputError("--out needs matplotlib: pip install -r requirements-extras.txt")
        for file in (options.out, options.csv):
            if file and not Path(file).parent.is_dir():
                raise InputError(f"{file} can't be written: there is no folder {Path(file).parent}")
        base, lines, failed = measure_all(options, flags)
        print_exponents(lines)
        if options.out and lines:
            draw(base, lines, options.out)
    except (InputError, OSError) as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
