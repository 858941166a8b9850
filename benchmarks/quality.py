"""Image quality over training time: this project with its defaults, the DCGAN of PyTorch's examples, and other models.

    python benchmarks/quality.py --data DIR                               # 20 minutes each, one seed: 40 minutes
    python benchmarks/quality.py --data DIR OTHER --seeds 3               # 3 seeds on two sets: 4 hours
    python benchmarks/quality.py --data DIR --minutes 1 5 --width 16      # constants of config.py, for this project
    python benchmarks/quality.py --data DIR --peers other.py              # also a model of yours

64 px, one training after the other on the same cores and images; minutes are of the training loop, without imports and
decoding. After each of the --minutes, --count generated images are scored against as many training images
(evaluate.py), whose extractor needs weights. Nothing else should run meanwhile.

A peer is a script with the flags of peers/dcgan.py: --data DIR --minutes X ... --count N --seed N --out FOLDER
--runs-dir DIR. It trains for the longest time. At each time X, in ascending order, it writes FOLDER/X.npy (5.npy,
0.1.npy), uint8 (N, 3, 64, 64), and prints a line with a JSON object: minutes, steps, images_seen. The clock stops while
it writes. It may keep decoded images in DIR/.cache. DCGAN is always trained too.

Prints Markdown tables of the medians and ratios. OUT/results.csv holds each completed training; the same command
continues with what is missing. Give another --out for another --count or other flags. OUT/SET_seed0.png shows real
images and each side's at the end, not selected.
"""

import functools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tables
import torch
from tables import median_and_range, output_of

import checkpoints
import command_line
import data
import evaluate
import extractors
import model_definitions
import pictures
from command_line import positive
from errors import InputError

FOLDER = Path(__file__).resolve().parent
SIZE = 64
COLUMNS = ("set", "side", "seed", "minutes", "steps", "images_seen", "frechet", "kid", "kid_error", "precision",
           "recall", "sliced_wasserstein")
SHOWN = 36              # images of each kind in the picture

Trained = Iterator[tuple[float, torch.Tensor, int, int]]    # minutes, uint8 (N, 3, 64, 64), steps, images seen


def train_project(folder: str, run: str, seed: int, arguments) -> Trained:
    """Trains with training.py, which continues the run from one time to the next, and yields the images of each."""
    runs, trained = arguments.out / "runs", 0
    shutil.rmtree(runs / run, ignore_errors=True)                             # of an interrupted training
    for minutes in arguments.minutes:
        output_of("training.py", FOLDER.parent / "training.py", "--data", folder, "--image-size", SIZE,
                  "--minutes", minutes - trained, "--steps", 10**9, "--seed", seed, "--runs-dir", runs, "--run", run,
                  *arguments.flags)
        trained, (_, saved) = minutes, checkpoints.find(runs / run)
        generator, c = model_definitions.from_checkpoint(saved)
        made = evaluate.generate(generator, c.LATENT_DIM, arguments.count, seed)
        yield minutes, made, saved["counters"]["step"], saved["counters"]["images_seen"]


def train_peer(script: Path, folder: str, run: str, seed: int, arguments) -> Trained:
    """The same for a peer's script. Raises InputError if it does not print or write what it should."""
    out = arguments.out / f"{run}_{script.stem}"
    out.mkdir(exist_ok=True)
    printed = output_of(script.name, script, "--data", folder, "--minutes", *arguments.minutes, "--seed", seed,
                        "--count", arguments.count, "--out", out, "--runs-dir", arguments.out / "runs")
    try:
        found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        for minutes, line in zip(arguments.minutes, found, strict=True):
            made = torch.from_numpy(np.load(out / f"{minutes:g}.npy"))
            if (made.shape, made.dtype) != ((arguments.count, 3, SIZE, SIZE), torch.uint8):
                raise ValueError(f"{minutes:g}.npy is {made.dtype} {tuple(made.shape)}")
            yield minutes, made, line["steps"], line["images_seen"]
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{script}: must print a line and write uint8 images for each of the --minutes, see --help "
                         f"({error})") from None


def measure(folder: str, sides: dict, arguments, extractor, done: set) -> None:
    """Makes the missing trainings of one set, appends them to results.csv, and writes a picture per seed. Raises
    InputError for a folder with too few images."""
    c, _ = command_line.parse_constants(["--image-size", str(SIZE), "--runs-dir", str(arguments.out / "runs")])
    image_set, name = data.load_images_of_run(folder, c), Path(folder).resolve().name
    if len(image_set.train) < arguments.count:
        raise InputError(f"{folder}: {len(image_set.train):,} training images, fewer than --count {arguments.count:,}")
    real = evaluate.sample_images(image_set, arguments.count)
    real_features = None
    for seed in range(arguments.seeds):
        shown = [real[:SHOWN]]
        for side, train in sides.items():
            if done.issuperset((name, side, str(seed), str(minutes)) for minutes in arguments.minutes):
                continue
            print(f"{time.strftime('%H:%M')} {name}, seed {seed}: {side} for {arguments.minutes[-1]:g} minutes",
                  flush=True)
            rows = []
            for minutes, made, steps, seen in train(folder, f"{name}_seed{seed}", seed, arguments):
                real_features = extractor(real) if real_features is None else real_features
                found = evaluate.scores(made, real, extractor, real_features)
                rows.append({"set": name, "side": side, "seed": seed, "minutes": minutes, "steps": steps,
                             "images_seen": seen, **{key: f"{found[key]:.4f}" for key in COLUMNS if key in found}})
            shown.append(made[:SHOWN])
            for row in rows:
                if (name, side, str(seed), str(row["minutes"])) not in done:
                    tables.append(arguments.out / "results.csv", COLUMNS, row)
        if len(shown) > len(sides):
            grids = [pictures.grid(images.permute(0, 2, 3, 1).numpy()) for images in shown]
            pictures.save_picture(arguments.out / f"{name}_seed{seed}.png", functools.reduce(pictures.beside, grids))


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table of medians over seeds, and the ratios of the Frechet distances."""
    lines = ["| set | minutes | side | seeds | steps | images | Frechet distance (range) | KID x 1000 | precision | "
             "recall | sliced Wasserstein |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    ratios, groups = [""], {}
    for row in rows:
        groups.setdefault((row["set"], float(row["minutes"])), {}).setdefault(row["side"], []).append(row)
    for name, minutes in sorted(groups):
        frechet = {}
        for side, cells in groups[name, minutes].items():
            frechet[side] = {cell["seed"]: float(cell["frechet"]) for cell in cells}
            median = {key: statistics.median(float(cell[key]) for cell in cells) for key in COLUMNS[4:]}
            lines.append(f"| {name} | {minutes:g} | {side} | {len(cells)} | {median['steps']:,.0f} | "
                         f"{median['images_seen']:,.0f} | {median_and_range(frechet[side].values(), 1)} | "
                         f"{median['kid']:.1f} | {median['precision']:.2f} | {median['recall']:.2f} | "
                         f"{median['sliced_wasserstein']:.1f} |")
        ours = frechet.pop("this project", {})
        for side, theirs in frechet.items():
            if paired := [ours[seed] / theirs[seed] for seed in ours if seed in theirs]:
                ratios.append(f"{name} after {minutes:g} minutes: Frechet distance {statistics.median(paired):.2f} of "
                              f"{side}'s, median of {len(paired)} seeds ({min(paired):.2f} to {max(paired):.2f})")
    return lines + ratios


def start(argv) -> None:
    parser = command_line.Parser("quality.py", __doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR", help="one or more folders of images")
    parser.add_argument("--minutes", type=positive(float), nargs="+", default=[5.0, 10.0, 20.0], metavar="X",
                        help="times at which each training is scored; it ends at the longest [5 10 20]")
    parser.add_argument("--peers", type=Path, nargs="+", default=[], metavar="FILE", help="scripts of other models")
    parser.add_argument("--seeds", type=positive(int), default=1, metavar="N",
                        help="trainings of each side [%(default)s]")
    parser.add_argument("--count", type=positive(int), default=2048, metavar="N", help="images to score [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("quality"), metavar="DIR", help="[%(default)s]")
    arguments = tables.parse(parser, argv)
    if arguments.count < SHOWN:
        raise InputError(f"--count {arguments.count} is invalid: must be {SHOWN} or more")
    tables.check_distinct_names(arguments.data)
    arguments.minutes = sorted(set(arguments.minutes))
    sides = {"this project": train_project, "DCGAN": functools.partial(train_peer, FOLDER / "peers" / "dcgan.py")}
    for script in arguments.peers:
        if not script.is_file() or script.stem in sides:
            raise InputError(f"--peers {script} is invalid: must be a Python file with a name of its own")
        sides[script.stem] = functools.partial(train_peer, script)
    extractor = extractors.need_extractor(command_line.choose_device("auto"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.csv"
    done = {(row["set"], row["side"], row["seed"], row["minutes"]) for row in tables.read(file, COLUMNS)}
    for folder in arguments.data:
        measure(folder, sides, arguments, extractor, done)
    print(f"{SIZE} px, {arguments.count:,} generated against {arguments.count:,} real images, {extractor.name}; "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(table(tables.read(file, COLUMNS))))


if __name__ == "__main__":
    sys.exit(command_line.run_script("quality.py", start, None))
