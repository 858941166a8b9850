"""Image quality after equal training time: this project with its defaults, and the DCGAN of PyTorch's examples.

    python benchmarks/quality.py --data DIR                               # 20 minutes each, one seed: 40 minutes
    python benchmarks/quality.py --data DIR OTHER --seeds 3               # 3 seeds on two sets: 4 hours
    python benchmarks/quality.py --data DIR --minutes 5 --width 16        # constants of config.py, for this project

64 px, one training after the other on the same cores and images; minutes are of the training loop, without imports and
decoding. Both sides are scored with --count generated against as many training images (evaluate.py), whose extractor
needs weights. Nothing else should run meanwhile.

Prints Markdown tables of the medians and ratios. OUT/results.csv holds each completed training; the same command
continues with what is missing. OUT/SET_seed0.png shows real images, this project's and DCGAN's, not selected.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tables
import torch
from tables import median_and_range, output_of

import checkpoints
import command_line
import data
import evaluate
import model_definitions
import pictures
from command_line import positive
from errors import InputError

FOLDER = Path(__file__).resolve().parent
SIZE = 64
COLUMNS = ("set", "side", "seed", "minutes", "steps", "images_seen", "frechet", "kid", "kid_error", "precision",
           "recall", "sliced_wasserstein")
SHOWN = 36              # images of each kind in the picture


def train_project(folder: str, name: str, seed: int, arguments) -> tuple[torch.Tensor, int, int]:
    """Trains with training.py. Returns images, uint8 (N, 3, 64, 64), and the numbers of steps and of images seen."""
    runs = arguments.out / "runs"
    shutil.rmtree(runs / f"{name}_seed{seed}", ignore_errors=True)            # of an interrupted training
    output_of("training.py", FOLDER.parent / "training.py", "--data", folder, "--image-size", SIZE,
              "--minutes", arguments.minutes, "--steps", 10**9, "--seed", seed, "--runs-dir", runs,
              "--run", f"{name}_seed{seed}", *arguments.flags)
    _, saved = checkpoints.find(runs / f"{name}_seed{seed}")
    generator, c = model_definitions.from_checkpoint(saved)
    made = evaluate.generate(generator, c.LATENT_DIM, arguments.count, seed)
    return made, saved["counters"]["step"], saved["counters"]["images_seen"]


def train_dcgan(folder: str, name: str, seed: int, arguments) -> tuple[torch.Tensor, int, int]:
    """The same for benchmarks/peers/dcgan.py."""
    file = arguments.out / f"{name}_dcgan_seed{seed}.npy"
    printed = output_of("dcgan.py", FOLDER / "peers" / "dcgan.py", "--data", folder, "--minutes", arguments.minutes,
                        "--seed", seed, "--count", arguments.count, "--out", file, "--runs-dir", arguments.out / "runs")
    counts = json.loads(printed.strip().splitlines()[-1])
    return torch.from_numpy(np.load(file)), counts["steps"], counts["images_seen"]


SIDES = {"this project": train_project, "DCGAN": train_dcgan}


def measure(folder: str, arguments, extractor, done: set) -> None:
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
        for side, train in SIDES.items():
            if (name, side, str(seed)) in done:
                continue
            print(f"{time.strftime('%H:%M')} {name}, seed {seed}: {side} for {arguments.minutes:g} minutes", flush=True)
            made, steps, seen = train(folder, name, seed, arguments)
            shown.append(made[:SHOWN])
            real_features = extractor(real) if real_features is None else real_features
            found = evaluate.scores(made, real, extractor, real_features)
            tables.append(arguments.out / "results.csv", COLUMNS, {
                "set": name, "side": side, "seed": seed, "minutes": arguments.minutes, "steps": steps,
                "images_seen": seen, **{key: f"{value:.4f}" for key, value in found.items() if key in COLUMNS}})
        if len(shown) == 3:
            grids = [pictures.grid(images.permute(0, 2, 3, 1).numpy()) for images in shown]
            pictures.save_picture(arguments.out / f"{name}_seed{seed}.png", pictures.beside(*grids))


def read_results(arguments) -> list[dict]:
    """Returns the rows of OUT/results.csv. Raises InputError if they have other minutes."""
    file = arguments.out / "results.csv"
    rows = tables.read(file, COLUMNS)
    if others := {float(row["minutes"]) for row in rows} - {arguments.minutes}:
        raise InputError(f"{file} holds trainings of {others.pop():g} minutes: give those --minutes, or another --out")
    return rows


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table of medians over seeds, and the ratios of the Frechet distances."""
    lines = ["| set | side | seeds | steps | images | Frechet distance (range) | KID x 1000 | precision | recall | "
             "sliced Wasserstein |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    ratios = [""]
    for name in dict.fromkeys(row["set"] for row in rows):
        frechet = {}
        for side in SIDES:
            cells = [row for row in rows if (row["set"], row["side"]) == (name, side)]
            frechet[side] = {cell["seed"]: float(cell["frechet"]) for cell in cells}
            if cells:
                median = {key: statistics.median(float(cell[key]) for cell in cells) for key in COLUMNS[4:]}
                lines.append(f"| {name} | {side} | {len(cells)} | {median['steps']:,.0f} | "
                             f"{median['images_seen']:,.0f} | {median_and_range(frechet[side].values(), 1)} | "
                             f"{median['kid']:.1f} | {median['precision']:.2f} | {median['recall']:.2f} | "
                             f"{median['sliced_wasserstein']:.1f} |")
        ours, theirs = frechet.values()
        if paired := [ours[seed] / theirs[seed] for seed in ours if seed in theirs]:
            ratios.append(f"{name}: Frechet distance {statistics.median(paired):.2f} of DCGAN's, median of "
                          f"{len(paired)} seeds ({min(paired):.2f} to {max(paired):.2f})")
    return lines + ratios


def start(argv) -> None:
    parser = command_line.Parser("quality.py", __doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR", help="one or more folders of images")
    parser.add_argument("--minutes", type=positive(float), default=20.0, metavar="X",
                        help="of each training [%(default)s]")
    parser.add_argument("--seeds", type=positive(int), default=1, metavar="N",
                        help="trainings of each side [%(default)s]")
    parser.add_argument("--count", type=positive(int), default=2048, metavar="N", help="images to score [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("quality"), metavar="DIR", help="[%(default)s]")
    arguments = tables.parse(parser, argv)
    if arguments.count < SHOWN:
        raise InputError(f"--count {arguments.count} is invalid: must be {SHOWN} or more")
    tables.check_distinct_names(arguments.data)
    extractor = evaluate.need_extractor(command_line.choose_device("auto"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = {(row["set"], row["side"], row["seed"]) for row in read_results(arguments)}
    for folder in arguments.data:
        measure(folder, arguments, extractor, done)
    print(f"{arguments.minutes:g} minutes each, {SIZE} px, {arguments.count:,} generated against {arguments.count:,} "
          f"real images, {extractor.name}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(table(read_results(arguments))))


if __name__ == "__main__":
    sys.exit(command_line.run_script("quality.py", start, None))
