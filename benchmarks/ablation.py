"""Compares output layers behind the same decoder and critic, with the same seeds, images and z.

    python benchmarks/ablation.py --data DIR OTHER --csv docs/ablation.csv      # trains what the table lacks, reports
    python benchmarks/ablation.py --csv docs/ablation.csv --plot docs/ablation.png                     # only reports
    python benchmarks/ablation.py --data DIR --csv my.csv --only fixed transformer --seeds 5 --image-size 64

Prints one sentence on the Transformer against a fixed alpha, and Markdown tables. Other flags are constants of
config.py; without any, --image-size 32 --patch 8.

TABLE_times.csv holds the seconds per step of each layer, measured first, in turns; nothing else should run meanwhile.
Then each layer, set and seed is trained once and scored twice: after --steps steps, and after as many as it makes
while the Transformer makes --steps, so that a layer which is only slower shows as such. Each score compares --count
generated with as many real images (evaluate.py), and held-out images, or else training images, with their
reconstructions. Rows are appended when they are known; the same command continues with what is missing. The times may
be those of another machine: a score between two measured ones is interpolated linearly over the logarithm of the steps.

Layers, all after the Sigmoid's x in [0, 1]:
    none         2x - 1
    fixed        tanh(ALPHA_INIT * (2x - 1))
    scalar       tanh(alpha * (2x - 1)) with one learned alpha (Dynamic Tanh, Zhu et al. 2025)
    transformer  TransformerParamTanh
    still        TransformerParamTanh on a video of one image repeated
docs/layer.md describes those that were measured and removed; tables may contain them.
"""

import copy
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tables
import torch
from tables import machine
from torch import nn

import command_line
import data
import evaluate
import extractors
import metrics
import model_definitions
import run_state
import training_step
import update
from command_line import positive
from errors import InputError
from model_definitions import TransformerParamTanh

NUMBERS = ("images", "frechet", "kid", "kid_error", "reconstruction")
COLUMNS = ("set", "layer", "seed", "steps", *NUMBERS, "decoder_width", "flags", "machine")
TIMES = ("layer", "decoder_width", "seconds", "flags", "machine")             # columns of the times file
DEFAULT_FLAGS = ["--image-size", "32", "--patch", "8"]         # 16 tokens, as at 64 px
TIMED_STEPS = 4                                               # per turn
TURNS = 12
NEAR = 0.05                                                   # share of its steps by which a score may miss a view


# ------------------------------------------------------------------------------------- layers

class NoLayer(TransformerParamTanh):
    """2x - 1."""

    def apply_alpha(self, x, alpha):
        return 2 * x - 1


class OneAlpha(TransformerParamTanh):
    """One learned alpha for all images and pixels, within TransformerParamTanh's bounds."""

    def __init__(self, *sizes, **others):
        super().__init__(*sizes, **others)
        self.s = nn.Parameter(torch.zeros(1))

    def alpha(self, x, earlier=None, changes=None, window=None):
        return (self.alpha_init * self.alpha_span ** torch.tanh(self.s)).expand_as(x[:, :1])


LAYERS = {               # class and constants; with ALPHA_SPAN 1 alpha is constant and the Transformer does not run
    "none": (NoLayer, {"ALPHA_SPAN": 1.0}),
    "fixed": (TransformerParamTanh, {"ALPHA_SPAN": 1.0}),
    "scalar": (OneAlpha, {"LAYER_RATE": 1.0}),                # the lower rate is for thousands of weights
    "transformer": (TransformerParamTanh, {}),
    "still": (TransformerParamTanh, {"VIDEO_SHIFT": 0.0, "VIDEO_BRIGHTNESS": 0.0, "VIDEO_NOISE": 0.0}),
}
ORDER = ("none", "wide", "fixed", "scalar", "transformer", "bias", "still", "detached", "inner", "inner_fixed")


def new_state(name: str, c, device: torch.device) -> run_state.State:
    """Returns the state of a run with one of LAYERS, whose constants are set in c. All other weights are those of a run
    with the Transformer."""
    layer_class, constants = LAYERS[name]
    vars(c).update(constants)
    state = run_state.new_state(c, device)
    if layer_class is not TransformerParamTanh:
        layer = model_definitions.build(c, layer_class)[0].layer.to(device)
        tables.replace_layer(state, layer)
    return state


# ------------------------------------------------------------------------------------- measuring

def prepare(folder: str, flags: list[str]):
    """Returns (c, device, image_set) for a training on a folder."""
    c, _ = command_line.parse_constants(["--data", folder, *flags])
    device = command_line.choose_device(c.DEVICE)
    update.set_up(device, c)
    return c, device, data.load_images_of_run(folder, c)


def measure_times(arguments) -> None:
    """Writes the times file, measured on the first set. All layers take turns, with one state in memory at a time as in
    a training; the fastest turn counts, because other work on the machine can only add time."""
    c, device, image_set = prepare(arguments.data[0], arguments.flags)
    warm_up = 1 + (update.RecordedStep.WARM_UP if device.type == "cuda" else 0)
    times = {name: math.inf for name in LAYERS}
    for _, name in itertools.product(range(TURNS), LAYERS):
        own = copy.copy(c)
        state = new_state(name, own, device)
        for _ in range(warm_up):
            training_step.training_step(state, own, image_set)
        start = tables.now()
        for _ in range(TIMED_STEPS):
            training_step.training_step(state, own, image_set)
        times[name] = min(times[name], (tables.now() - start) / TIMED_STEPS)
    for name, seconds in times.items():
        tables.append(times_file(arguments.csv), TIMES, {
            "layer": name, "decoder_width": c.WIDTH, "seconds": round(seconds, 5),
            "flags": " ".join(arguments.flags), "machine": machine(device)})


def measure_all(arguments) -> None:
    """Trains what the table lacks, seeds in the outermost loop: a table that is cut short has complete pairs. Raises
    InputError for a table that was made with other flags."""
    rows = read_table(arguments.csv)
    others = {row["flags"] for row in rows} - {" ".join(arguments.flags)}
    if others:
        raise InputError(f"{arguments.csv} was made with {others.pop()}: give those flags, or another --csv")
    if not times_file(arguments.csv).exists():
        print(f"{time.strftime('%H:%M')} timing the layers", flush=True)
        measure_times(arguments)
    times, _ = read_times(arguments.csv)
    done = {(row["set"], row["layer"], row["seed"]) for row in rows}
    for seed, folder, name in itertools.product(range(arguments.seeds), arguments.data, arguments.only):
        if (Path(folder).resolve().name, name, seed) not in done:
            measure(arguments, seed, folder, name, math.ceil(steps_meanwhile(times, name, arguments.steps)))


def measure(arguments, seed: int, folder: str, name: str, further: int) -> None:
    """Makes one training and appends its scores after arguments.steps and after `further` steps."""
    c, device, image_set = prepare(folder, [*arguments.flags, "--seed", str(seed)])
    set_name, state = Path(folder).resolve().name, new_state(name, c, device)
    print(f"{time.strftime('%H:%M')} {set_name}, {name}, seed {seed}", flush=True)
    for steps in sorted({arguments.steps, further}):
        while state.counters["step"] < steps:
            training_step.training_step(state, c, image_set)
        tables.append(arguments.csv, COLUMNS, {
            "set": set_name, "layer": name, "seed": seed, "steps": steps, "images": state.counters["images_seen"],
            **score(state.ema, image_set, arguments.count, seed), "decoder_width": c.WIDTH,
            "flags": " ".join(arguments.flags), "machine": machine(device)})


@torch.inference_mode()
def score(generator: model_definitions.Generator, image_set: data.ImageSet, count: int, seed: int) -> dict[str, float]:
    """Returns Frechet distance, KID, its error, and the mean absolute error of reconstructions in [-1, 1]."""
    device = next(generator.parameters()).device
    extractor = extractors.need_extractor(device)
    real = extractor(evaluate.sample_images(image_set, count))
    made = extractor(evaluate.generate(generator, generator.vae.latent_dim, count, seed))
    kid, kid_error = metrics.kernel_distance(made, real)
    rows = (image_set.held_out if len(image_set.held_out) else image_set.train)[:count]
    images = [data.to_image(part.to(device)) for part in data.read_batch(image_set, rows).split(64)]
    errors = [(generator.reconstruct(part) - part).abs().mean(dim=(1, 2, 3)) for part in images]
    return {"frechet": metrics.frechet_distance(made, real), "kid": kid, "kid_error": kid_error,
            "reconstruction": torch.cat(errors).mean().item()}


# ------------------------------------------------------------------------------------- tables

def read_table(file: Path) -> list[dict]:
    """Returns the rows, with numbers as numbers. Raises InputError for another table."""
    return [{**row, **{name: int(row[name]) for name in ("seed", "steps", "decoder_width")},
             **{name: float(row[name]) for name in NUMBERS}} for row in tables.read(file, COLUMNS)]


def times_file(table: Path) -> Path:
    return table.with_name(f"{table.stem}_times.csv")


def read_times(table: Path) -> tuple[dict[str, float], str]:
    """Returns {layer: seconds per step} and their machine; {} and "" without the file."""
    rows = tables.read(times_file(table), TIMES)
    return {row["layer"]: float(row["seconds"]) for row in rows}, rows[0]["machine"] if rows else ""


def steps_meanwhile(times: dict[str, float], layer: str, steps: int) -> float:
    """Returns how many steps a layer makes while the Transformer makes `steps`."""
    return steps * (times["transformer"] / times[layer])


# ------------------------------------------------------------------------------------- report

def views(rows: list[dict], times: dict[str, float]) -> dict[tuple[str, str], list[dict]]:
    """Returns {("steps" or "minutes", set): rows}, one row per training: after the steps at which all were scored, and
    after the minutes that the Transformer takes for these. Omits a view that the table does not contain, and trainings
    that were not scored near it."""
    cells, found = {}, {}
    for row in rows:
        cells.setdefault((row["set"], row["layer"], row["seed"]), []).append(row)
    steps = max(set.intersection(*({row["steps"] for row in cell} for cell in cells.values())), default=None)
    if steps is None:
        return {}
    for (set_name, _, _), cell in cells.items():
        found.setdefault(("steps", set_name), []).append(at_steps(cell, steps))
    if {"transformer", *(layer for _, layer, _ in cells)} <= times.keys():
        for (set_name, layer, _), cell in cells.items():
            meanwhile = steps_meanwhile(times, layer, steps)
            row = at_steps(cell, meanwhile)
            if abs(row["steps"] / meanwhile - 1) < NEAR:
                found.setdefault(("minutes", set_name), []).append(row)
    for row in itertools.chain(*found.values()):
        row["minutes"] = row["steps"] * times.get(row["layer"], math.nan) / 60
    return found


def at_steps(cell: list[dict], steps: float) -> dict:
    """Returns a training's row at `steps`: interpolated over log(steps), or the nearest one outside of its scores."""
    cell = sorted(cell, key=lambda row: row["steps"])
    scored = [row["steps"] for row in cell]
    steps = min(max(steps, scored[0]), scored[-1])
    numbers = {name: float(np.interp(np.log(steps), np.log(scored), [row[name] for row in cell])) for name in NUMBERS}
    return {**cell[0], **numbers, "steps": round(steps), "images": cell[0]["images"] * steps / scored[0]}


def differences(rows: list[dict]) -> dict[str, list[float]]:
    """Returns {layer: Frechet distances of one set minus the Transformer's of the same seeds}; above 0 the layer is
    worse."""
    transformer = {row["seed"]: row["frechet"] for row in rows if row["layer"] == "transformer"}
    found = {name: [row["frechet"] - transformer[row["seed"]] for row in rows
                    if row["layer"] == name and row["seed"] in transformer] for name in ORDER if name != "transformer"}
    return {name: values for name, values in found.items() if values}


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def table(view: str, set_name: str, rows: list[dict], timed_on: str) -> list[str]:
    """Returns the lines of a Markdown table of one view and set. timed_on: the machine of the times."""
    after = (f"{rows[0]['steps']:,} steps" if view == "steps" else
             f"{statistics.median(row['minutes'] for row in rows):.1f} minutes of {timed_on}")
    lines = ["", f"{set_name}, after {after}:", "",
             "| layer | seeds | steps | images | minutes | Frechet distance | minus the Transformer's (spread) | "
             "KID x 1000 | reconstruction |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    paired = differences(rows)
    for name in ORDER:
        cells = [row for row in rows if row["layer"] == name]
        if cells:
            mean = {column: statistics.mean(row[column] for row in cells) for column in ("steps", "minutes", *NUMBERS)}
            difference = f"{statistics.mean(paired[name]):+.1f} ({spread(paired[name]):.1f})" if name in paired else ""
            lines.append(f"| {name} | {len(cells)} | {mean['steps']:,.0f} | {mean['images']:,.0f} | "
                         f"{mean['minutes']:.1f} | {mean['frechet']:.1f} | {difference} | {mean['kid']:.0f} | "
                         f"{mean['reconstruction']:.3f} |")
    return lines


def sentence(found: dict[tuple[str, str], list[dict]]) -> str:
    """Returns what the pairs say about the Transformer against a fixed alpha, its cheapest replacement."""
    values = {}
    for (view, _), rows in found.items():
        values.setdefault(view, []).extend(differences(rows).get("fixed", []))
    parts = [f"at equal {view} in {sum(value > 0 for value in pairs)} of {len(pairs)} pairs (the distance with a fixed "
             f"alpha minus the Transformer's is {statistics.mean(pairs):+.1f} on average"
             + (f", spread {spread(pairs):.1f})" if len(pairs) > 1 else ")") for view, pairs in values.items() if pairs]
    return "TransformerParamTanh had the lower Frechet distance " + ", and ".join(parts) + "." if parts else ""


def plot(found: dict[tuple[str, str], list[dict]], file: Path) -> None:
    """Draws a panel per set and view: the difference from the Transformer of every layer and seed, and the means."""
    from matplotlib.figure import Figure

    names, sets = (list(dict.fromkeys(part)) for part in zip(*found))
    figure = Figure(figsize=(9, 2.7 * len(sets)), dpi=160, layout="constrained")
    panels = figure.subplots(len(sets), len(names), squeeze=False, sharex=True)
    for (set_name, view), panel in zip(itertools.product(sets, names), panels.flat):
        paired = differences(found.get((view, set_name), []))
        tables.plot_differences(panel, paired, f"{set_name}, at equal {view}")
    figure.supxlabel("Frechet distance minus TransformerParamTanh's of the same seed: right of the line the "
                     "Transformer is better\n(dots: seeds; bars: their means)", fontsize=9)
    figure.savefig(file, facecolor="white", format="png")


# ------------------------------------------------------------------------------------- command line

def start(argv) -> None:
    parser = command_line.Parser("ablation.py", __doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR", help="folders of images; none: only the report")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="the table, read and appended to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the paired differences (needs matplotlib)")
    parser.add_argument("--only", nargs="+", default=list(LAYERS), choices=LAYERS, metavar="LAYER",
                        help=f"some of {' '.join(LAYERS)}")
    parser.add_argument("--seeds", type=positive(int), default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--steps", type=positive(int), default=800, metavar="N",
                        help="of each training, at least [%(default)s]")
    parser.add_argument("--count", type=positive(int), default=2048, metavar="N", help="images to score [%(default)s]")
    arguments = tables.parse(parser, argv)
    arguments.flags = arguments.flags or DEFAULT_FLAGS
    tables.check_distinct_names(arguments.data)
    if arguments.data:
        extractors.need_extractor(torch.device("cpu"))
        measure_all(arguments)
    rows, (times, timed_on) = read_table(arguments.csv), read_times(arguments.csv)
    if not rows:
        raise InputError(f"{arguments.csv}: contains no rows: give --data")
    found = views(rows, times)
    if not found:
        raise InputError(f"{arguments.csv}: its trainings have no number of steps in common at which they were scored")
    print(sentence(found))
    for (view, set_name), chosen in found.items():
        print("\n".join(table(view, set_name, chosen, timed_on)))
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    sys.exit(command_line.run_script("ablation.py", start, None))
