"""What of TransformerParamTanh predicts motion: variants of its motion part on the same frozen VAE.

    python benchmarks/motion_ablation.py runs/demo_clips --csv docs/motion_ablation.csv             # hours; continues
    python benchmarks/motion_ablation.py --csv docs/motion_ablation.csv --plot docs/motion_ablation.png  # only reports
    python benchmarks/motion_ablation.py runs/a runs/b --csv my.csv --only live mlp --windows 4000 --seeds 1

Each run on clips gives a VAE, its data and its constants. Each variant and seed trains stage 2 anew, first with
--windows windows, then, if it is more than 10% faster or slower than `live`, with as many as it makes in the same time
(processor time on a CPU). --joint N adds N steps of stage 3 for the variants in JOINT and measures videos from noise.
Rows are appended when they are known; the same command continues with what is missing.

r1, r4, r8: as in benchmarks/motion.py, on the clips that a run holds out; of the moving demo set on 64 new clips.

Variants:
    live             the default: code tokens of the NUM_FRAMES - 1 frames before; Delta reads no pixels
    frozen           the window holds copies of its newest code
    shuffled         all codes but the newest one in random order
    fixed alpha      ALPHA_SPAN 1: the Transformer predicts codes alone
    mlp, gru         the same tokens, read by an MLP or a GRU with as many parameters as the Transformer; alpha fixed
    pixels           Delta reads the patches of the earlier images instead of their codes; alpha fixed
    pixels and codes Delta reads both; alpha fixed
    window 2, 4, 8   fewer earlier frames
    no delta         the code never changes: only alpha could carry motion
"""

import copy
import itertools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import motion
import tables
import torch
from tables import machine
from torch import nn

import command_line
import data
import dynamics
import joint
import model_definitions
import random_keys
import rollouts
import run_state
import training
import update
from command_line import positive
from errors import InputError
from model_definitions import TransformerParamTanh

ERRORS, OF_VIDEOS = ("r1", "r4", "r8"), ("contrast", "z_growth", "speed", "speed_95", "drift")
COLUMNS = ("set", "vae", "variant", "seed", "view", "windows", "seconds", *ERRORS, *OF_VIDEOS, "parameters", "machine")
JOINT = ("live", "frozen", "mlp", "no delta")
NEAR = 0.1                                                    # share by which times may differ


# ------------------------------------------------------------------------------------- variants

class Frozen(TransformerParamTanh):
    def next_code(self, window):
        return super().next_code(window._replace(codes=window.codes[:, :1].expand_as(window.codes)))


class Shuffled(TransformerParamTanh):
    def next_code(self, window):
        order = 1 + torch.rand(window.codes[:, 1:].shape[:2], device=window.codes.device).argsort(1)
        older = window.codes.gather(1, order[:, :, None].expand(-1, -1, window.codes.shape[2]))
        return super().next_code(window._replace(codes=torch.cat([window.codes[:, :1], older], 1)))


class NoDelta(TransformerParamTanh):
    def next_code(self, window):
        return window.codes[:, 0] + 0 * self.dynamics.delta(self.encode(self.dynamics.tokens(window))[:, :-1], window)


class Mlp(TransformerParamTanh):
    """Tokens (B, N, D) -> Linear, ReLU, Linear -> (B, N, D), as many parameters as the Transformer."""

    def __init__(self, *sizes, **others):
        super().__init__(*sizes, **others)
        size = self.dynamics.positions.shape[1] + 1, self.positions.shape[2]
        flat, count = math.prod(size), parameters(self.transformer)
        hidden = (count - flat) // (2 * flat + 1)
        self.transformer = nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, flat),
                                         nn.Unflatten(1, size))

    def encode(self, tokens, mask=None):
        return self.transformer(tokens)


class Gru(TransformerParamTanh):
    """The same with a GRU that reads the tokens from the oldest to the newest frame, v first."""

    def __init__(self, *sizes, **others):
        super().__init__(*sizes, **others)
        dim, count = self.positions.shape[2], parameters(self.transformer)
        hidden = round((-(4 * dim + 6) + math.sqrt((4 * dim + 6) ** 2 + 12 * (count - dim))) / 6)
        self.transformer = nn.ModuleList([nn.GRU(dim, hidden, batch_first=True), nn.Linear(hidden, dim)])

    def encode(self, tokens, mask=None):
        gru, to_token = self.transformer
        return to_token(gru(tokens.flip(1))[0]).flip(1)


class Pixels(TransformerParamTanh):
    """Delta reads the patches of the earlier images, which are decoded from their codes without gradient."""

    WITH_CODES = False

    def __init__(self, *sizes, **others):
        super().__init__(*sizes, **others)
        self.render = None                                    # codes -> images in [0, 1]; of the run's VAE
        head, count = self.dynamics.to_hidden, self.side ** 2 - (0 if self.WITH_CODES else self.video.num_frames - 1)
        self.dynamics.to_hidden = nn.Linear(head.in_features + count * self.positions.shape[2], head.out_features)
        self.known = None                                     # the newest window's codes, and their images

    @torch.no_grad()
    def images(self, codes):
        """Decodes only the newest code if the others are those of the window before."""
        if self.known and len(self.known[0]) == len(codes) and torch.equal(self.known[0][:, :-1], codes[:, 1:]):
            images = torch.cat([self.render(codes[:, 0])[:, None], self.known[1][:, :-1]], dim=1)
        else:
            images = self.render(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        self.known = codes.detach(), images
        return images

    def next_code(self, window):
        images = self.images(window.codes)
        video = torch.cat([images[:, :1], images], dim=1).flatten(1, 2)           # the newest one stands for x
        patches = self.token_norm(self.to_tokens(video - 0.5).flatten(2).transpose(1, 2)) + self.positions
        known = self.dynamics.tokens(window)
        outputs = self.encode(torch.cat([patches, known if self.WITH_CODES else known[:, -1:]], dim=1))
        code = window.codes[:, 0] + self.dynamics.delta(outputs[:, :-1], window)
        return self.dynamics.near_anchor(code, window.anchor)


class PixelsAndCodes(Pixels):
    WITH_CODES = True


FIXED = {"ALPHA_SPAN": 1.0}
VARIANTS = {
    "live": (TransformerParamTanh, {}), "frozen": (Frozen, {}), "shuffled": (Shuffled, {}),
    "fixed alpha": (TransformerParamTanh, FIXED), "mlp": (Mlp, FIXED), "gru": (Gru, FIXED),
    "pixels": (Pixels, FIXED), "pixels and codes": (PixelsAndCodes, FIXED),
    **{f"window {count}": (TransformerParamTanh, {"NUM_FRAMES": count + 1}) for count in (2, 4, 8)},
    "no delta": (NoDelta, {}),
}


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def new_state(name: str, c: SimpleNamespace, saved: dict, device: torch.device) -> run_state.State:
    """Returns a state at the start of stage 2: the run's VAE, prior and frame critic, and a new layer."""
    layer_class, constants = VARIANTS[name]
    vars(c).update(constants)
    state = run_state.new_state(c, device)
    if layer_class is not TransformerParamTanh:
        with torch.random.fork_rng(devices=[]):               # as in run_state: equal weights where shapes are equal
            torch.manual_seed(random_keys.torch_generator(c.SEED, "weights").initial_seed())
            layer = model_definitions.build(c, layer_class)[0].layer.to(device)
        tables.replace_layer(state, layer)
    kept = {key: weight for key, weight in saved["ema"].items() if key.startswith(("vae.", "prior."))}
    for generator in (state.generator, state.ema):
        generator.load_state_dict(generator.state_dict() | kept)
    state.critic.load_state_dict(saved["critic"])
    if isinstance(state.generator.layer, Pixels):
        for generator in (state.generator, state.ema):
            decode, layer = generator.vae.decode, generator.layer
            layer.render = lambda codes, decode=decode, layer=layer: layer.displayed(decode(codes))
    state.counters |= {"stage": 1, "images_seen": round(1000 * c.VAE_KIMG)}
    return state


# ------------------------------------------------------------------------------------- measuring

def clock(device: torch.device) -> float:
    """Returns seconds of processor time on a CPU, of wall-clock time on a GPU."""
    return time.process_time() if device.type == "cpu" else tables.now()


class Source:
    """A run's VAE: its checkpoint, constants, clips, and the codes of all frames; and the clips to measure on."""

    def __init__(self, run: str, flags: list[str]):
        _, self.c, self.saved = model_definitions.load_generator(run)
        if self.c.FOLDERS != "clips" or "critic" not in self.saved:
            raise InputError(f"{run}: must be a run of training.py --folders clips, or one of its checkpoints")
        given, names = command_line.parse_constants(flags)
        vars(self.c).update({name: vars(given)[name] for name in names})
        self.device = command_line.choose_device(self.c.DEVICE)
        update.set_up(self.device, self.c)
        root = Path(self.c.DATA or training.demo_folder(self.c))
        self.name, self.vae = root.resolve().name, Path(run).resolve().stem
        self.clips = data.load_images_of_run(root, self.c, data.cache_elsewhere(None))
        generator = model_definitions.from_checkpoint(self.saved, self.device)[0]
        self.codes = dynamics.encode_frames(generator.vae, self.clips, self.device, self.c.FLIP)
        self.measured = self.clips, self.codes
        if not self.c.DATA:
            self.folder = tempfile.TemporaryDirectory()
            new, _ = motion.new_clips(self.c, Path(self.folder.name))
            self.measured = new, dynamics.encode_frames(generator.vae, new, self.device)


def measure(source: Source, name: str, seed: int, view: str, windows: int, joint_steps: int) -> dict:
    """Trains a variant and returns its row."""
    c = copy.copy(source.c)
    c.SEED, c.DYNAMICS_KIMG = seed, c.VAE_KIMG + windows / 1000
    torch.manual_seed(seed)
    state = new_state(name, c, source.saved, source.device)
    dynamics.begin(state, c, source.clips, source.codes)
    start = clock(state.device)
    while dynamics.stage(state, c) == 2:
        dynamics.motion_step(state, c, source.clips)
    row = {"set": source.name, "vae": source.vae, "variant": name, "seed": seed, "view": view, "windows": windows,
           "seconds": round(clock(state.device) - start, 1), "parameters": parameters(state.generator.layer),
           "machine": machine(state.device)}
    if joint_steps:
        state.counters["step"] = 0
        while state.counters["step"] < joint_steps:
            joint.joint_step(state, c, source.clips)
    new, codes = source.measured
    found = (rollouts.measure if joint_steps else rollouts.prediction_errors)(state.ema, c, new, codes)
    of_videos = OF_VIDEOS if joint_steps else ()
    return row | {column: round(found[column], 4) for column in (*ERRORS, *of_videos)}


def measure_all(arguments) -> None:
    """Trains what the table lacks, seeds in the outermost loop: a table that is cut short has complete pairs."""
    sources = [Source(run, arguments.flags) for run in arguments.runs]
    for seed, source, name in itertools.product(range(arguments.seeds), sources, arguments.only):
        def row_of(view, windows, joint_steps=0, name=name, source=source, seed=seed):
            """Returns the row of the table, which is measured if it is missing."""
            key = {"set": source.name, "vae": source.vae, "variant": name, "seed": str(seed), "view": view}
            for row in tables.read(arguments.csv, COLUMNS):
                if key.items() <= row.items():
                    return row
            print(f"{time.strftime('%H:%M')} {source.name}, {name}, seed {seed}, at equal {view}", flush=True)
            row = measure(source, name, seed, view, windows, joint_steps)
            tables.append(arguments.csv, COLUMNS, {column: row.get(column, "") for column in COLUMNS})
            return row

        ratio = (float(row_of("windows", arguments.windows, name="live")["seconds"])
                 / float(row_of("windows", arguments.windows)["seconds"]))
        if not 1 - NEAR < ratio < 1 + NEAR:
            row_of("minutes", round(arguments.windows * ratio))
        if arguments.joint and name in JOINT:
            row_of("joint", arguments.windows, arguments.joint)


# ------------------------------------------------------------------------------------- report

def views(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Returns {(set, view): rows}. At equal minutes, a variant that takes about as long as `live` has its row of equal
    windows."""
    found = {}
    for row in rows:
        found.setdefault((row["set"], row["view"]), []).append(row)
    for (set_name, view), chosen in found.items():
        if view == "minutes":
            there = {(row["variant"], row["vae"], row["seed"]) for row in chosen}
            chosen += [row for row in found.get((set_name, "windows"), ())
                       if (row["variant"], row["vae"], row["seed"]) not in there]
    return dict(sorted(found.items()))


def differences(rows: list[dict], column: str) -> dict[str, list[float]]:
    """Returns {variant: values minus those of `live` with the same VAE and seed}."""
    live = {(row["vae"], row["seed"]): row[column] for row in rows if row["variant"] == "live"}
    return {name: values for name in VARIANTS if name != "live" and (values := [
        row[column] - live[row["vae"], row["seed"]] for row in rows
        if row["variant"] == name and (row["vae"], row["seed"]) in live])}


def table(set_name: str, view: str, rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table: means over VAEs and seeds, and paired differences of r8."""
    extra = OF_VIDEOS if view == "joint" else ()
    head = ["variant", "seeds", "windows", "minutes", *ERRORS, "r8 minus live's (spread)", *extra]
    title = "after stage 3" if view == "joint" else f"at equal {view}"
    lines = ["", f"{set_name}, {title}:", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    paired = differences(rows, "r8")
    for name in VARIANTS:
        cells = [row for row in rows if row["variant"] == name]
        if not cells:
            continue
        mean = {column: statistics.mean(row[column] for row in cells)
                for column in ("windows", "seconds", *ERRORS, *extra)}
        spread = f" ({statistics.stdev(paired[name]):.3f})" if len(paired.get(name, ())) > 1 else ""
        difference = f"{statistics.mean(paired[name]):+.3f}{spread}" if name in paired else ""
        row = [name, str(len(cells)), f"{mean['windows']:,.0f}", f"{mean['seconds'] / 60:.1f}",
               *(f"{mean[column]:.3f}" for column in ERRORS), difference, *(f"{mean[column]:.2f}" for column in extra)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def plot(found: dict[tuple[str, str], list[dict]], file: Path) -> None:
    """Draws a panel per set and view: r8 minus that of `live`, for every VAE and seed, and the means."""
    from matplotlib.figure import Figure

    found = {key: rows for key, rows in found.items() if key[1] != "joint"}
    figure = Figure(figsize=(4.5 * len(found), 3.2), dpi=160, layout="constrained")
    for panel, ((set_name, view), rows) in zip(figure.subplots(1, len(found), squeeze=False).flat, found.items()):
        paired = differences(rows, "r8")
        tables.plot_differences(panel, paired, f"{set_name}, at equal {view}")
    figure.supxlabel("error 8 frames ahead (r8) minus that of the default: right of the line the variant is worse\n"
                     "(dots: seeds; bars: their means)", fontsize=9)
    figure.savefig(file, facecolor="white", format="png")


# ------------------------------------------------------------------------------------- command line

def start(argv) -> None:
    parser = command_line.Parser("motion_ablation.py", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs on clips, from stage 1 on; none: only the report")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="the table, read and appended to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the paired differences (needs matplotlib)")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT",
                        help=f"some of: {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=positive(int), default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--windows", type=positive(int), default=24_000, metavar="N",
                        help="of stage 2, 5 minutes of a core [%(default)s]")
    parser.add_argument("--joint", type=int, default=0, metavar="STEPS", help="of stage 3, for some variants [0]")
    arguments = tables.parse(parser, argv)
    measure_all(arguments)
    rows = [{**row, **{column: float(row[column] or "nan") for column in (*ERRORS, *OF_VIDEOS, "windows", "seconds")}}
            for row in tables.read(arguments.csv, COLUMNS)]
    if not rows:
        raise InputError(f"{arguments.csv}: contains no rows: give runs")
    found = views(rows)
    for (set_name, view), chosen in found.items():
        print("\n".join(table(set_name, view, chosen)))
    if arguments.plot:
        plot(found, arguments.plot)


def main(argv=None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command_line.run_script("motion_ablation.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
