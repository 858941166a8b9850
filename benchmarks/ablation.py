"""What the output layer earns: eight layers behind the same decoder, with the same seeds, images and z.

    python benchmarks/ablation.py --data DIR OTHER --csv docs/ablation.csv       # trains what it lacks, then reports
    python benchmarks/ablation.py --csv docs/ablation.csv --plot docs/ablation.png             # only reports
    python benchmarks/ablation.py --data DIR --csv my.csv --only fixed transformer --seeds 5 --steps 4000

First all layers make steps in turns, while nothing else should run: TABLE_times.csv says how long a step of each takes.
Then one training a cell (layer, set, seed), --jobs at once, scored twice: after --steps steps, and after as many as it
makes while the Transformer makes --steps, so that a layer that is merely slower shows as such. Scored with --count
pictures against as many real ones (evaluate.py), and with the reconstruction error of held-out images (of training
images where none is held out). Each row is appended to the table when it is known; the same command goes on with what
is missing. Flags of training.py may follow behind --, in place of --image-size 32 --patch 8. Needs the extractor's
weights. Bad input: status 2.

The report's equal minutes are those of the times file that lies beside the table, which may be another machine's: a
score between two that were measured is taken from the straight line over the logarithm of the steps.

The layers, all after the Sigmoid's x in [0, 1]:
    none         2x - 1
    wide         2x - 1, with a decoder so wide, at most doubled, that a step takes as long as the Transformer's
    fixed        tanh(ALPHA_INIT * (2x - 1))
    scalar       tanh(alpha * (2x - 1)) with one learned alpha (Dynamic Tanh, Zhu et al. 2025)
    transformer  TransformerParamTanh, as in model_definitions.py
    bias         the same Transformer, but s is added to the decoder's logits, and alpha is ALPHA_INIT
    still        TransformerParamTanh that sees one picture repeated, not modified copies
    detached     TransformerParamTanh through whose video no gradient flows back
Only if --only names them:
    inner        the Transformer's alpha acts before the decoder's last ConvTranspose2d: tanh(alpha / ALPHA_INIT * .) of
                 what that one's norm gives, for a second, final picture; the last tanh keeps ALPHA_INIT
    inner_fixed  the same tanh, without a Transformer: one picture
"""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables

import command_line
import data
import evaluate
import extractors
import metrics
import model_definitions
import training_step
from command_line import positive
from errors import InputError
from model_definitions import TransformerParamTanh

KEYS = ("set", "layer", "seed", "steps")                      # of a row
NUMBERS = ("images", "frechet", "kid", "kid_error", "reconstruction")
COLUMNS = (*KEYS, *NUMBERS, "decoder_width", "flags", "machine")
TIMES = ("layer", "decoder_width", "seconds", "flags", "machine")             # columns of the times file
DEFAULT_FLAGS = ("--image-size", "32", "--patch", "8")         # 16 tokens, as at 64 px
TIMED_STEPS = 4                                               # of a turn, after those that warm up
TURNS = 12
NEAR = 0.05                                                   # share of its steps by which a score may miss a view
APPENDING = threading.Lock()


# ------------------------------------------------------------------------------------- the layers

class NoTransformer(TransformerParamTanh):
    """tanh(ALPHA_INIT * (2x - 1)).

    All these layers build the whole TransformerParamTanh first: so the critic, which is built after it, has the same
    weights whatever the layer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.transformer = self.to_s = self.to_tokens = self.token_norm = nn.Identity()
        del self.positions

    def alpha(self, x, video=None, changes=None):
        return torch.full_like(x[:, :1], self.alpha_init)


class NoLayer(NoTransformer):
    """2x - 1."""

    def apply_alpha(self, x, alpha):
        return 2 * x - 1


class OneAlpha(NoTransformer):
    """One learned alpha for all, within the same bounds."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.s = nn.Parameter(torch.zeros(1))

    def alpha(self, x, video=None, changes=None):
        return (self.alpha_init * self.alpha_span ** torch.tanh(self.s)).expand_as(x[:, :1])


class Bias(TransformerParamTanh):
    """s moves the decoder's logits by up to ALPHA_INIT either way, where TransformerParamTanh sets alpha by it."""

    def apply_alpha(self, x, alpha):
        tanh_s = torch.log(alpha / self.alpha_init) / math.log(self.alpha_span)
        moved = torch.sigmoid(torch.logit(x, eps=1e-6) + self.alpha_init * tanh_s)
        return super().apply_alpha(moved, self.alpha_init)


class Detached(TransformerParamTanh):
    def alpha(self, x, video=None, changes=None):
        return super().alpha(x.detach(), video, changes)


class BoundedNorm(model_definitions.ModulatedNorm):
    """tanh(gain * ModulatedNorm), with a gain, 1 or (B, 1, H, W), that InnerGenerator sets; keeps what came in."""

    gain, seen = 1.0, None

    def forward(self, x, z):
        self.seen = x, z
        return torch.tanh(self.gain * super().forward(x, z)).clone()     # the ReLU behind it works in place


class InnerGenerator(model_definitions.Generator):
    """alpha, predicted from a first picture, acts in the decoder's last block and makes a second one."""

    def __init__(self, vae, layer):
        super().__init__(vae, layer)
        self.block = vae.decoder[-1]
        self.block.norm.__class__ = BoundedNorm                          # the same weights

    def image_and_alpha(self, z, video=None, changes=None):
        x = self.vae.decode(z)
        alpha = self.layer.alpha(x, video, changes)
        if not isinstance(self.layer, NoTransformer):
            x = self.again(alpha)
        return self.layer.apply_alpha(x, self.layer.alpha_init), alpha

    def again(self, alpha):
        norm, (hidden, z) = self.block.norm, self.block.norm.seen
        norm.gain = F.interpolate(alpha / self.layer.alpha_init, size=hidden.shape[2:], mode="area")
        try:
            return torch.sigmoid(self.block(hidden, z))
        finally:
            norm.gain = 1.0

    def forward(self, z, video=None, generator=None):
        return self.image_and_alpha(z, video, self.layer.video.draw(generator))[0]


LAYERS = {"none": NoLayer, "wide": NoLayer, "fixed": NoTransformer, "scalar": OneAlpha,
          "transformer": TransformerParamTanh, "bias": Bias, "still": TransformerParamTanh, "detached": Detached,
          "inner": TransformerParamTanh, "inner_fixed": NoTransformer}
FURTHER = ("inner", "inner_fixed")                     # only if --only names them
STILL = {"VIDEO_SHIFT": 0.0, "VIDEO_BRIGHTNESS": 0.0, "VIDEO_NOISE": 0.0}


def new_state(name, c, device, decoder_width):
    """training_step.new_state with another layer and, for "wide", another decoder."""
    if name == "still":
        vars(c).update(STILL)
    if name == "scalar":
        c.LAYER_RATE = 1.0             # a share for a Transformer's thousands of weights; one number needs whole steps
    own = model_definitions.TransformerParamTanh, model_definitions.VAE, model_definitions.Generator
    model_definitions.TransformerParamTanh = LAYERS[name]
    if name in FURTHER:
        model_definitions.Generator = InnerGenerator
    if name == "wide":
        model_definitions.VAE = wider(decoder_width)
    try:
        return training_step.new_state(c, device)
    finally:
        model_definitions.TransformerParamTanh, model_definitions.VAE, model_definitions.Generator = own


def wider(decoder_width):
    vae = model_definitions.VAE

    def build(image_size, channels, latent_dim, width, width_max, *others):
        return vae(image_size, channels, latent_dim, decoder_width, width_max * decoder_width // width, *others)
    return build


# ------------------------------------------------------------------------------------- one cell, in its own process

def train(cell, flags):
    """Prints a line of JSON for each score of one training."""
    name, seed = cell["layer"], cell["seed"]
    c, _ = command_line.parse_constants([*flags, "--seed", str(seed)])
    device = command_line.choose_device(c.DEVICE)
    training_step.set_up(device, c)
    image_set = data.load_images_of_run(c.DATA, c)
    state = new_state(name, c, device, cell["decoder_width"])
    for steps in cell["steps"]:
        while state.counters["step"] < steps:
            training_step.training_step(state, c, image_set)
            state.count_skipped()                                    # waits, so that steps don't queue up on a GPU
        print(json.dumps({"steps": steps, "images": state.counters["images_seen"],
                          **score(state.ema, image_set, cell["count"], seed, Path(cell["features"]))}), flush=True)


def score(generator, image_set, count, seed, features_file):
    """Frechet distance, KID, its error, and the mean absolute error of reconstructions in [-1, 1]."""
    extractor = extractors.need_extractor(next(generator.parameters()).device)
    if not features_file.exists():                                    # of the real images, once a set
        own = features_file.with_suffix(f".{os.getpid()}")            # another cell may be at it as well
        torch.save(extractor(evaluate.some(image_set, count)), own)
        own.replace(features_file)
    made = extractor(evaluate.generate(generator, generator.vae.latent_dim, count, seed))
    real = torch.load(features_file, weights_only=True)
    kid, error = metrics.kernel_distance(made, real)
    rows = (image_set.held_out if len(image_set.held_out) else image_set.train)[:count]
    images = data.read_batch(image_set, rows).split(evaluate.BATCH)
    errors = [metrics.absolute_error(part, evaluate.encode_and_reconstruct(generator, part)[1]) for part in images]
    return {"frechet": metrics.frechet_distance(made, real), "kid": kid, "kid_error": error,
            "reconstruction": torch.cat(errors).mean().item() / 127.5}


# ------------------------------------------------------------------------------------- how long a step takes

def time_steps(builders, image_set):
    """{name: seconds of a step} of {name: function that makes (state, constants)}. All take turns, one state in memory
    at a time, as in a training; the fastest turn counts, since other work on the machine only adds."""
    times = {name: [] for name in builders}
    for _ in range(TURNS):
        for name, build in builders.items():
            state, c = build()
            warm_up = 1 + (training_step.RecordedStep.WARM_UP if state.device.type == "cuda" else 0)
            for number in range(warm_up + TIMED_STEPS):
                if number == warm_up:
                    state.count_skipped()                                            # waits for the device
                    start = time.perf_counter()
                training_step.training_step(state, c, image_set)
            state.count_skipped()
            times[name].append((time.perf_counter() - start) / TIMED_STEPS)
    return {name: min(found) for name, found in times.items()}


def measure_times(arguments):
    """Rows of a times file, measured on the first set. The wide decoder has that width, in fours above WIDTH (so its
    GroupNorms keep 4 or 8 groups), with which a step without a layer takes as long as the Transformer's."""
    flags = ["--data", arguments.data[0], *arguments.flags]
    c, _ = command_line.parse_constants(flags)
    device = command_line.choose_device(c.DEVICE)
    training_step.set_up(device, c)
    image_set = data.load_images_of_run(c.DATA, c)
    widths = range(c.WIDTH + 4, 2 * c.WIDTH + 1, 4)

    def builder(name):
        def build():
            c, _ = command_line.parse_constants(flags)
            return new_state("wide" if name in widths else name, c, device, name), c
        return build

    names = [name for name in LAYERS if name != "wide"]
    seconds = time_steps({name: builder(name) for name in (*names, *widths)}, image_set)
    width = min(widths, key=lambda width: abs(seconds[width] - seconds["transformer"]))
    return [{"layer": name, "decoder_width": width if name == "wide" else c.WIDTH,
             "seconds": round(seconds[width if name == "wide" else name], 5), "flags": " ".join(arguments.flags),
             "machine": machine(device)} for name in LAYERS]


def read_times(table):
    """{layer: (seconds of a step, decoder width)} and the machine that they are of, {} and "" without the file."""
    rows = tables.read(times_file(table), TIMES)
    return ({row["layer"]: (float(row["seconds"]), int(row["decoder_width"])) for row in rows},
            rows[0]["machine"] if rows else "")


def times_file(table):
    return table.with_name(f"{table.stem}_times.csv")


def steps_meanwhile(times, layer, steps):
    """How many steps a layer makes while the Transformer makes `steps`; for the Transformer exactly those."""
    return steps * (times["transformer"][0] / times[layer][0])


# ------------------------------------------------------------------------------------- the table

def read_table(file):
    """The rows, numbers as numbers. Raises InputError where the file is another table."""
    return [{**row, **{name: int(row[name]) for name in ("seed", "steps", "decoder_width")},
             **{name: float(row[name]) for name in NUMBERS}} for row in tables.read(file, COLUMNS)]


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def measure_all(arguments):
    """Trains all cells that the table lacks, sets and seeds in the outer loops: a grid that was cut short is one of
    fewer pairs."""
    rows = read_table(arguments.csv)
    others = {row["flags"] for row in rows} - {" ".join(arguments.flags)}
    if others:
        raise InputError(f"{arguments.csv} was made with {others.pop()}: give another --csv")
    file = times_file(arguments.csv)
    if not file.exists():
        print(f"{time.strftime('%H:%M')} timing the layers", flush=True)
        for row in measure_times(arguments):
            tables.append(file, TIMES, row)
    times, _ = read_times(arguments.csv)
    done = {tuple(row[key] for key in ("set", "layer", "seed")) for row in rows}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        cells = [pool.submit(measure, arguments, seed, folder, name,
                             math.ceil(steps_meanwhile(times, name, arguments.steps)), times[name][1])
                 for seed in range(arguments.seeds) for folder in arguments.data for name in arguments.only
                 if (Path(folder).resolve().name, name, seed) not in done]
        try:
            errors = [cell.exception() for cell in cells]             # one bad cell doesn't stop the others
        finally:
            pool.shutdown(cancel_futures=True)
    for error in filter(None, errors):
        raise error


def measure(arguments, seed, folder, name, further, width):
    """One cell, scored after arguments.steps and after `further` steps."""
    flags, set_name = ["--data", folder, *arguments.flags], Path(folder).resolve().name
    c, _ = command_line.parse_constants(flags)
    cell = {"layer": name, "seed": seed, "decoder_width": width, "count": arguments.count,
            "steps": sorted({arguments.steps, further}),
            "features": str(Path(c.RUNS_DIR) / f"ablation_{set_name}_{c.IMAGE_SIZE}_{arguments.count}.pt")}
    Path(c.RUNS_DIR).mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M')} {set_name}, {name}, seed {seed}", flush=True)
    child = subprocess.run([sys.executable, __file__, "--cell", json.dumps(cell), *flags], capture_output=True,
                           text=True)
    if child.returncode:
        raise InputError(f"{set_name}, {name}, seed {seed} ended with status {child.returncode}: "
                         f"{child.stderr.strip()[-300:]}")
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"steps"')]
    with APPENDING:
        for row in found:
            tables.append(arguments.csv, COLUMNS, {
                "set": set_name, "layer": name, "seed": seed, **row, "decoder_width": width,
                "flags": " ".join(arguments.flags), "machine": machine(command_line.choose_device(c.DEVICE))})


# ------------------------------------------------------------------------------------- the report

def views(rows, times):
    """{view: rows}, one a cell: after the steps that all cells were scored at, and after the minutes that these take
    with the Transformer. A view that the table can't give is not there, nor is a cell that was scored elsewhere."""
    cells = {}
    for row in rows:
        cells.setdefault((row["set"], row["layer"], row["seed"]), []).append(row)
    common = set.intersection(*({row["steps"] for row in cell} for cell in cells.values())) if cells else ()
    if not common:
        return {}
    steps = max(common)
    found = {"steps": [at_steps(cell, steps) for cell in cells.values()]}
    if all(layer in times for _, layer, _ in cells) and "transformer" in times:
        meanwhile = {layer: steps_meanwhile(times, layer, steps) for layer in times}
        rows = [at_steps(cell, meanwhile[layer]) for (_, layer, _), cell in cells.items()]
        found["minutes"] = [row for row in rows if abs(row["steps"] / meanwhile[row["layer"]] - 1) < NEAR]
    for row in (row for view in found.values() for row in view):
        row["minutes"] = row["steps"] * times[row["layer"]][0] / 60 if row["layer"] in times else float("nan")
    return found


def at_steps(cell, steps):
    """The cell's row at `steps`: on the straight line over log(steps) between the scored ones around it, the nearest
    one where they don't reach so far."""
    cell = sorted(cell, key=lambda row: row["steps"])
    scored = [row["steps"] for row in cell]
    steps = min(max(steps, scored[0]), scored[-1])
    numbers = {name: float(np.interp(np.log(steps), np.log(scored), [row[name] for row in cell])) for name in NUMBERS}
    return {**cell[0], **numbers, "steps": round(steps), "images": cell[0]["images"] * steps / scored[0]}


def differences(rows, set_name):
    """{layer: [its Frechet distance minus the Transformer's of the same seed, ...]} of a view: above 0 that was
    better."""
    numbers = {(row["layer"], row["seed"]): row["frechet"] for row in rows if row["set"] == set_name}
    found = {name: [numbers[name, seed] - numbers["transformer", seed] for other, seed in numbers
                    if other == name and ("transformer", seed) in numbers]
             for name in LAYERS if name != "transformer"}
    return {name: values for name, values in found.items() if values}


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def table(found, timed_on=""):
    """Lines of a Markdown table for each view and set. timed_on: the machine whose minutes they are."""
    lines = []
    for view, rows in found.items():
        for set_name in dict.fromkeys(row["set"] for row in rows):
            chosen = [row for row in rows if row["set"] == set_name]
            paired = differences(rows, set_name)
            after = (f"{chosen[0]['steps']:,} steps" if view == "steps" else
                     f"{statistics.median(row['minutes'] for row in chosen):.1f} minutes of {timed_on}")
            lines += ["", f"{set_name}, after {after}:", "",
                      "| layer | seeds | steps | images | minutes | Frechet distance | "
                      "minus the Transformer's (spread) | KID x 1000 | reconstruction |",
                      "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
            for name in LAYERS:
                cells = [row for row in chosen if row["layer"] == name]
                if not cells:
                    continue
                mean = {column: statistics.mean(row[column] for row in cells)
                        for column in ("steps", "minutes", *NUMBERS)}
                difference = "" if name not in paired else (
                    f"{statistics.mean(paired[name]):+.1f} ({spread(paired[name]):.1f})")
                lines.append(f"| {name} | {len(cells)} | {mean['steps']:,.0f} | {mean['images']:,.0f} | "
                             f"{mean['minutes']:.1f} | {mean['frechet']:.1f} | {difference} | {mean['kid']:.0f} | "
                             f"{mean['reconstruction']:.3f} |")
    return lines


def sentence(found):
    """What the pairs say about the Transformer against a fixed alpha, the cheapest thing that could replace it."""
    parts = []
    for view, rows in found.items():
        values = [value for set_name in dict.fromkeys(row["set"] for row in rows)
                  for value in differences(rows, set_name).get("fixed", [])]
        if values:
            better, mean = sum(value > 0 for value in values), statistics.mean(values)
            found_spread = f", spread {spread(values):.1f}" if len(values) > 1 else ""
            parts.append(f"at equal {view} in {better} of {len(values)} pairs (the distance with a fixed alpha minus "
                         f"the Transformer's is {mean:+.1f} on average{found_spread})")
    return "TransformerParamTanh had the lower Frechet distance " + ", and ".join(parts) + "." if parts else ""


def draw(found, file):
    """A panel for each set and view: of each layer every seed's difference from the Transformer, and their mean."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(row["set"] for rows in found.values() for row in rows))
    figure = Figure(figsize=(9, 2.7 * len(sets)), dpi=160, layout="constrained")
    panels = figure.subplots(len(sets), len(found), squeeze=False, sharex=True)
    for line, set_name in zip(panels, sets):
        for panel, (view, rows) in zip(line, found.items()):
            paired = differences(rows, set_name)
            for place, values in enumerate(paired.values()):
                panel.plot(values, [place] * len(values), "o", color="#4a7ab5", ms=5, alpha=0.7)
                panel.plot([statistics.mean(values)], [place], "|", color="black", ms=16, mew=2)
            panel.axvline(0, color="#b04a3a", linewidth=1)
            panel.set_yticks(range(len(paired)), list(paired))
            panel.invert_yaxis()
            panel.set_title(f"{set_name}, at equal {view}", fontsize=10)
            panel.grid(axis="x", color="#e8e8e8")
            panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Frechet distance minus TransformerParamTanh's of the same seed: right of the line the "
                     "Transformer is better\n(dots: seeds; bars: their means)", fontsize=9)
    figure.savefig(file, facecolor="white", format="png")


# ------------------------------------------------------------------------------------- command line

def parse(argv):
    own, flags = command_line.split(argv)
    parser = command_line.Parser("ablation.py", __doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR", help="folders of images; none: only the report")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="the table: read, and appended to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the paired differences (needs matplotlib)")
    parser.add_argument("--only", nargs="+", default=[name for name in LAYERS if name not in FURTHER], metavar="LAYER",
                        help="some of the layers")
    parser.add_argument("--seeds", type=positive(int), default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--jobs", type=positive(int), default=1, metavar="N",
                        help="trainings at once: more than one fills a GPU [%(default)s]")
    parser.add_argument("--steps", type=positive(int), default=800, metavar="N",
                        help="of each training, at least [%(default)s]")
    parser.add_argument("--count", type=positive(int), default=2048, metavar="N",
                        help="pictures to score [%(default)s]")
    arguments = parser.parse_args(own)
    if unknown := [name for name in arguments.only if name not in LAYERS]:
        raise InputError(f"--only {' '.join(unknown)} can't be: give some of {' '.join(LAYERS)}")
    tables.need_distinct_names(arguments.data)
    for file in (arguments.csv, arguments.plot):
        if file and not file.parent.is_dir():
            raise InputError(f"{file} can't be written: there is no folder {file.parent}")
    arguments.flags = flags or list(DEFAULT_FLAGS)
    command_line.parse_constants(arguments.flags)                     # raises what training.py would
    if arguments.data:
        extractors.need_extractor(torch.device("cpu"))
    return arguments


def start(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--cell"]:
        train(json.loads(argv[1]), argv[2:])
        return 0
    arguments = parse(argv)
    if arguments.data:
        measure_all(arguments)
    rows = read_table(arguments.csv)
    if not rows:
        raise InputError(f"{arguments.csv} holds no rows: give --data")
    times, machine_of_times = read_times(arguments.csv)
    found = views(rows, times)
    if not found:
        raise InputError(f"{arguments.csv}: there is no number of steps that all its trainings were scored at")
    print("\n".join([sentence(found), *table(found, machine_of_times)]))
    if arguments.plot:
        draw(found, arguments.plot)
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"ablation.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablation.py: stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
