"""Which makes better pictures in the same minutes: this project with its defaults, or the DCGAN of PyTorch's examples.

    python benchmarks/quality.py --data DIR                               # 20 minutes each, one seed: 40 minutes
    python benchmarks/quality.py --data DIR OTHER --seeds 3               # 3 seeds on two sets: 4 hours
    python benchmarks/quality.py --data DIR --minutes 5 -- --width 16     # flags of training.py behind --

64 px, one training after the other on the same cores and the same images; minutes are of the training loop, without
imports and decoding. Both sides are scored (evaluate.py) with --count pictures against the same --count real ones
of the training split. Needs the extractor's weights: see evaluate.py. Nothing else should run meanwhile.

OUT/results.csv holds each training that is done, and the next call goes on from there: give another --out after a
change. OUT/SET_seed0.png shows real pictures, this project's and DCGAN's, not picked. Bad input: status 2.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables

import checkpoints
import command_line
import data
import evaluate
import extractors
import model_definitions
import pictures
import training
from command_line import positive
from errors import InputError

HERE = Path(__file__).resolve().parent
SIZE = 64
COLUMNS = ("set", "side", "seed", "minutes", "steps", "images_seen", "frechet", "kid", "kid_error", "precision",
           "recall", "sliced_wasserstein")
SHOWN = 36              # pictures of each kind on a sheet


def real_images(folder, c, count):
    image_set = data.load_images_of_run(folder, c)
    if len(image_set.train) < count:
        raise InputError(f"{folder}: {len(image_set.train):,} images to train on, fewer than --count {count:,}")
    return evaluate.some(image_set, count)


def run_or_raise(command):
    """The output of a command; what it complained of as an InputError."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"{Path(command[0]).name} ended with status {result.returncode}: "
                         f"{result.stderr.strip()[-300:]}")
    return result.stdout


def train_project(folder, name, seed, arguments):
    """(pictures uint8 (N, 3, 64, 64), steps, images seen) of a run made by training.py."""
    run = f"{name}_seed{seed}"
    shutil.rmtree(arguments.out / "runs" / run, ignore_errors=True)       # of a training that was interrupted
    run_or_raise([HERE.parent / "training.py", "--data", folder, "--image-size", SIZE, "--minutes", arguments.minutes,
                  "--steps", 10**9, "--seed", seed, "--runs-dir", arguments.out / "runs", "--run", run,
                  *arguments.flags])
    _, saved = checkpoints.find(arguments.out / "runs" / run)
    generator, c = model_definitions.from_checkpoint(saved, torch.device("cpu"))
    made = evaluate.generate(generator, c.LATENT_DIM, arguments.count, seed)
    return made, saved["counters"]["step"], saved["counters"]["images_seen"]


def train_dcgan(folder, name, seed, arguments):
    """The same of benchmarks/peers/dcgan.py."""
    file = arguments.out / f"{name}_dcgan_seed{seed}.npy"
    out = run_or_raise([HERE / "peers" / "dcgan.py", "--data", folder, "--minutes", arguments.minutes, "--seed", seed,
                        "--count", arguments.count, "--out", file, "--runs-dir", arguments.out / "runs"])
    counts = json.loads(out.strip().splitlines()[-1])
    return torch.from_numpy(np.load(file)), counts["steps"], counts["images_seen"]


def measure(folder, c, extractor, arguments, done):
    """Makes the trainings of one set that are not in `done`, appends each to results.csv, and draws the sheet."""
    name = Path(folder).resolve().name
    real, file = real_images(folder, c, arguments.count), arguments.out / "results.csv"
    real_features = None                              # made once, if there is anything to score
    for seed in range(arguments.seeds):
        shown = [real[:SHOWN]]
        for side, train in (("this project", train_project), ("DCGAN", train_dcgan)):
            if (name, side, str(seed)) in done:
                continue
            print(f"{time.strftime('%H:%M')} {name}, seed {seed}: {side} for {arguments.minutes:g} minutes", flush=True)
            made, steps, seen = train(folder, name, seed, arguments)
            shown.append(made[:SHOWN])
            real_features = extractor(real) if real_features is None else real_features
            found = evaluate.scores(made, real, extractor, real_features)
            tables.append(file, COLUMNS, {
                "set": name, "side": side, "seed": seed, "minutes": arguments.minutes, "steps": steps,
                "images_seen": seen, **{key: f"{value:.4f}" for key, value in found.items() if key in COLUMNS}})
        if len(shown) == 3:
            sheets = [pictures.grid(part.permute(0, 2, 3, 1).numpy()) for part in shown]
            pictures.save_picture(arguments.out / f"{name}_seed{seed}.png", pictures.beside(*sheets))


def read_results(arguments):
    """The rows of OUT/results.csv. Raises InputError where they are of other minutes."""
    file = arguments.out / "results.csv"
    rows = tables.read(file, COLUMNS)
    others = {float(row["minutes"]) for row in rows} - {arguments.minutes}
    if others:
        raise InputError(f"{file} holds trainings of {others.pop():g} minutes: give those, or another --out")
    return rows


def table(rows):
    """Lines of a Markdown table: medians over seeds for each set and side, and the ratio of the Frechet distances."""
    lines = ["| set | side | seeds | steps | images | Frechet distance (range) | KID x 1000 | precision | recall | "
             "sliced Wasserstein |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    ratios = []
    for name in dict.fromkeys(row["set"] for row in rows):
        distances = {}
        for side in ("this project", "DCGAN"):
            cells = [row for row in rows if (row["set"], row["side"]) == (name, side)]
            if not cells:
                continue

            def median(key, cells=cells):
                return statistics.median(float(cell[key]) for cell in cells)

            values = distances[side] = {cell["seed"]: float(cell["frechet"]) for cell in cells}
            lines.append(f"| {name} | {side} | {len(cells)} | {median('steps'):,.0f} | {median('images_seen'):,.0f} | "
                         f"{median('frechet'):.1f} ({min(values.values()):.1f} to {max(values.values()):.1f}) | "
                         f"{median('kid'):.1f} | {median('precision'):.2f} | {median('recall'):.2f} | "
                         f"{median('sliced_wasserstein'):.1f} |")
        both = distances.get("this project", {}).keys() & distances.get("DCGAN", {}).keys()
        if both:
            paired = [distances["this project"][seed] / distances["DCGAN"][seed] for seed in both]
            ratios.append(f"{name}: Frechet distance {statistics.median(paired):.2f} of DCGAN's, median of {len(both)} "
                          f"{'seed' if len(both) == 1 else 'seeds'} ({min(paired):.2f} to {max(paired):.2f})")
    return lines + [""] + ratios


def parse(argv):
    own, flags = command_line.split(argv)
    parser = command_line.Parser("quality.py", __doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR", help="one or more folders of images")
    parser.add_argument("--minutes", type=positive(float), default=20.0, metavar="X",
                        help="of each training [%(default)s]")
    parser.add_argument("--seeds", type=positive(int), default=1, metavar="N",
                        help="trainings of each side [%(default)s]")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="pictures to score [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("quality"), metavar="DIR", help="[%(default)s]")
    arguments = parser.parse_args(own)
    if arguments.count < SHOWN:
        raise InputError(f"--count {arguments.count} can't be: give {SHOWN} or more")
    training.prepare_constants(["--data", arguments.data[0], *flags])          # raises what training.py would
    arguments.flags = flags
    return arguments


def start(argv):
    arguments = parse(argv)
    extractor = extractors.need_extractor(command_line.choose_device("auto"))
    c, _ = command_line.parse_constants(["--image-size", str(SIZE), "--runs-dir", str(arguments.out / "runs")])
    tables.need_distinct_names(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = {(row["set"], row["side"], row["seed"]) for row in read_results(arguments)}
    for folder in arguments.data:                     # of names that differ, so no set's rows touch another's
        measure(folder, c, extractor, arguments, done)
    print(f"{arguments.minutes:g} minutes each, {SIZE} px, {arguments.count:,} pictures against {arguments.count:,} "
          f"real ones, {extractor.name}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(table(read_results(arguments))))
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except (InputError, checkpoints.InputError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality.py: stopped; the same command goes on with what is not in results.csv", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
