"""Compares the image loader with torchvision's ImageFolder and a DataLoader, and with what a training step consumes.

    python benchmarks/loader.py --data ./images                            # images in class folders
    python benchmarks/loader.py --data ./images --large 0 --many 100000    # also a start on a set scanned before

The baseline reads the same files with as many persistent workers and the same transforms: short side resized (bicubic,
antialiased), centre crop, [-1, 1], shuffled batches of BATCH_SIZE. Both run in turns in this process, --repeats times.
Prints medians in images per second, and the ratio as median and min..max. The system's file cache is warm for both.

    first pass, DIR      this project: scan, decode and cache into an empty cache, without batches;
                         baseline: listing, start of the workers and the first epoch
    first pass, photos   the same for --large JPEGs of 3000 x 2000 pixels of smooth noise with grain
    warm batches         an epoch of read_batch and to_image in this process; baseline: its second epoch
    warm, mirrored       the same with random mirroring; the baseline mirrors nothing
    warm over a step     warm batches; baseline: the images that training_step consumes with config.py's constants
    start on N, seconds  load_images on N small files that were scanned before; baseline: ImageFolder's listing
"""

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tables import now, seconds  # first: the project's root on sys.path
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import command_line
import data
import run_state
import training_step
import update
from errors import InputError

AIMS = {"first pass, DIR": 1, "first pass, photos": 3, "warm over a step": 20}    # least ratios


def photo(rng):
    """Returns (2000, 3000, 3) uint8: six octaves of smooth noise, each finer and fainter, and grain.

    At quality 90 a JPEG of it has 1.8 bits per pixel; 400 crops of real photos had 1.9.
    """
    total = rng.normal(0, 6.4, (2000, 3000, 3)).astype(np.float32)
    for octave in range(2, 8):
        cells = rng.normal(0, 90 / 1.7 ** (octave - 2), (3, 2 ** octave, 2 ** octave)).astype(np.float32)
        layers = [Image.fromarray(cell).resize((3000, 2000), Image.Resampling.BICUBIC) for cell in cells]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    return (128 + total).clip(0, 255).astype(np.uint8)


def write_images(folder, count, draw, suffix, distinct):
    """Writes `count` files in one class folder; after `distinct` drawn ones the rest are copies."""
    folder = folder / "all"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(min(count, distinct)):
        Image.fromarray(draw(rng)).save(folder / f"{i}{suffix}", quality=90)
    for i in range(distinct, count):
        shutil.copy(folder / f"{i % distinct}{suffix}", folder / f"{i}{suffix}")


def load(root, c, cache):
    return data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, cache, c.BACKGROUND, c.NUM_WORKERS, progress=False)


def first_pass(root, c, count):
    """Returns images per second of load_images with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        return count / seconds(lambda: load(root, c, cache))


def baseline(root, c, count):
    """Returns images per second of the DataLoader's first and second epoch."""
    transform = transforms.Compose([
        transforms.Resize(c.IMAGE_SIZE, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(c.IMAGE_SIZE), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    begun = now()
    loader = DataLoader(datasets.ImageFolder(root, transform), c.BATCH_SIZE, shuffle=True, num_workers=c.NUM_WORKERS,
                        persistent_workers=c.NUM_WORKERS > 0)
    for _ in loader:
        pass
    return count / (now() - begun), count / seconds(lambda: [None for _ in loader])


def warm(image_set, c, flip):
    """Returns images per second of an epoch of batches, at least 50 batches."""
    batches, rng = max(50, len(image_set.train) // c.BATCH_SIZE), np.random.default_rng(0)

    def epoch():
        for batch in range(batches):
            order = data.batch_indices(len(image_set.train), c.SEED, batch * c.BATCH_SIZE, c.BATCH_SIZE)
            flips = rng.random(c.BATCH_SIZE) < 0.5 if flip else None
            data.to_image(data.read_batch(image_set, image_set.train[order], flips))
    return batches * c.BATCH_SIZE / seconds(epoch)


def print_row(name, pairs):
    """Prints medians and ratios of (this project, baseline) over the turns."""
    ratios = [ours / other for ours, other in pairs]
    values = [*map(statistics.median, (*zip(*pairs), ratios)), min(ratios), max(ratios)]
    words = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    spread = f"{words[3]}..{words[4]}"
    print(f"{name:24}{words[0]:>14}{words[1]:>14}{words[2]:>10}   {spread:16}{AIMS.get(name, '')}")


def compare(flags, c, image_set, scratch):
    """Measures all comparisons in turns and prints a row for each."""
    count, steps, rows = len(image_set.images), 4, {}
    state, photos = run_state.new_state(c, torch.device("cpu")), scratch / "photos"
    write_images(photos, flags.large, photo, ".jpg", distinct=8)
    training_step.training_step(state, c, image_set)    # the first step is slower
    for _ in range(flags.repeats):
        first, second = baseline(flags.data, c, count)
        rate = warm(image_set, c, flip=False)
        step = seconds(lambda: [training_step.training_step(state, c, image_set) for _ in range(steps)]) / steps
        turn = {"first pass, DIR": (first_pass(flags.data, c, count), first), "warm batches": (rate, second),
                "warm, mirrored": (warm(image_set, c, flip=True), second),
                "warm over a step": (rate, c.N_CRITIC * c.BATCH_SIZE / step)}
        if flags.large:
            turn["first pass, photos"] = first_pass(photos, c, flags.large), baseline(photos, c, flags.large)[0]
        for name, pair in turn.items():
            rows.setdefault(name, []).append(pair)
    print(f"{count:,} files, {flags.large} photos; {c.IMAGE_SIZE} px, batches of {c.BATCH_SIZE}, {c.NUM_WORKERS} "
          f"workers, {torch.get_num_threads()} threads of torch, {flags.repeats} repeats\n"
          f"{'images per second':24}{'this project':>14}{'baseline':>14}{'ratio':>10}   {'min..max':16}aim")
    for name, pairs in rows.items():
        print_row(name, pairs)


def start(argv):
    parser = command_line.Parser("loader.py", __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="images in class folders")
    numbers = {"image-size": 128, "workers": os.cpu_count(), "large": 192, "many": 0, "repeats": 5}
    for flag, default in numbers.items():
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help="[%(default)s]")
    flags = parser.parse_args(argv)
    if min(flags.workers, flags.large, flags.many, flags.repeats - 1) < 0:
        raise InputError("--workers, --large and --many must be 0 or more, --repeats 1 or more")
    c, _ = command_line.parse_constants(["--image-size", str(flags.image_size), "--num-workers", str(flags.workers)])
    update.set_up(torch.device("cpu"), c)
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        scratch = Path(scratch)
        image_set = load(flags.data, c, scratch / "cache")
        class_folders = [entry for entry in Path(flags.data).iterdir() if entry.is_dir()]
        if not class_folders or len(datasets.ImageFolder(flags.data)) != len(image_set.images):
            raise InputError(f"{flags.data} is invalid: must be a folder of class folders without broken files")
        compare(flags, c, image_set, scratch)
        if flags.many:
            many = scratch / "many"
            write_images(many, flags.many, lambda rng: rng.integers(0, 256, (8, 8, 3), np.uint8), ".png", flags.many)
            load(many, c, scratch / "cache")
            print_row("start on N, seconds", [
                (seconds(lambda: load(many, c, scratch / "cache")), seconds(lambda: datasets.ImageFolder(many)))
                for _ in range(flags.repeats)])


if __name__ == "__main__":
    sys.exit(command_line.run_script("loader.py", start, None))
