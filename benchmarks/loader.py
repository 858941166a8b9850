"""Images a second of the loader beside a plain ImageFolder + DataLoader, and beside what a training step consumes.

    python benchmarks/loader.py --data ./images
    python benchmarks/loader.py --data ./images --large 0 --many 100000    # also the start on a set scanned before

The plain version reads the same files with as many workers, forked on Linux and persistent, and the same transforms:
short side resized (bicubic, antialiased), centre crop, [-1, 1]; shuffled batches of BATCH_SIZE. Both run in turns in
this process, --repeats times; printed are medians, in images a second, and of the ratio also min..max over the
repeats. The system's file cache is warm for both. DIR needs class folders, as ImageFolder does. Bad input: status 2.

    first pass, DIR      ours: scan, decode and cache into a fresh cache folder, which gives no batches yet; plain:
                         scan, start of the workers and first epoch, which gives all batches once
    first pass, photos   the same on --large drawn JPEGs of 3000 x 2000; fewer than data.POOL_FROM start no workers.
                         1.8 bits a pixel at quality 90; 400 crops of real photos had 1.9, the median 1.7
    warm batches         an epoch of training_step.real_batch, in this process; plain: the second epoch
    warm, mirrored       the same with FLIP; plain mirrors none
    warm over a step     warm batches, and the images that training_step consumes with config.py's constants on the
                         CPU. Nothing is read ahead, so a step spends 1 / ratio of its time on its batch.
    start on N, seconds  with --many N: load_images on N drawn files of 8 x 8 pixels that were scanned before; plain:
                         ImageFolder's listing. At 32 px, since a start reads no pixels, whatever their size.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command_line
import data
import training_step
from errors import InputError


def photo(rng, width=3000, height=2000):
    """(2000, 3000, 3) uint8: six octaves of smooth noise, each finer and fainter, and grain."""
    total = rng.normal(0, 6.4, (height, width, 3)).astype(np.float32)
    for octave in range(2, 8):
        cells = rng.normal(0, 90 / 1.7 ** (octave - 2), (3, 2 ** octave, 2 ** octave)).astype(np.float32)
        layers = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in cells]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    return (128 + total).clip(0, 255).astype(np.uint8)


def draw(folder, count, large):
    """Writes `count` files: photos, from the ninth on copies of the first eight, or pictures of 8 x 8 pixels."""
    folder.mkdir(parents=True)
    rng, ending = np.random.default_rng(0), ".jpg" if large else ".png"
    for i in range(count):
        if large and i >= 8:
            shutil.copy(folder / f"{i % 8}{ending}", folder / f"{i}{ending}")
        else:
            pixels = photo(rng) if large else rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}{ending}", quality=90)


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def load(root, c, cache):
    return data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, cache, c.BACKGROUND, c.NUM_WORKERS, progress=False)


def first_pass(root, c, scratch):
    """Images a second of load_images into a fresh cache."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as cache:
        took, image_set = timed(lambda: load(root, c, cache))
        return len(image_set.images) / took


def plain_rates(root, c, epochs):
    """Images a second of each epoch of the DataLoader; the first holds the scan and the start of the workers."""
    transform = transforms.Compose([
        transforms.Resize(c.IMAGE_SIZE, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(c.IMAGE_SIZE), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    workers = {"persistent_workers": True, "multiprocessing_context": "fork" if sys.platform == "linux" else None}
    start, rates = time.perf_counter(), []
    loader = DataLoader(datasets.ImageFolder(root, transform), c.BATCH_SIZE, shuffle=True, num_workers=c.NUM_WORKERS,
                        **(workers if c.NUM_WORKERS else {}))
    for _ in range(epochs):
        count = sum(len(batch) for batch, _ in loader)
        rates.append(count / (time.perf_counter() - start))
        start = time.perf_counter()
    return rates


def warm_rate(state, c, image_set):
    """Images a second of real_batch over an epoch, of 50 batches at least: fewer are over too soon to time."""
    batches = max(50, len(image_set.train) // c.BATCH_SIZE)
    start = time.perf_counter()
    for _ in range(batches):
        training_step.real_batch(state, c, image_set, 0)
        state.counters["step"] += 1
    return batches * c.BATCH_SIZE / (time.perf_counter() - start)


def step_rate(state, c, image_set):
    """Images a second that training_step consumes, over 4 steps."""
    took, _ = timed(lambda: [training_step.training_step(state, c, image_set) for _ in range(4)])
    return 4 * c.N_CRITIC * c.BATCH_SIZE / took


def print_row(name, pairs):
    ratios = [ours / beside for ours, beside in pairs]
    values = [*map(statistics.median, (*zip(*pairs), ratios)), min(ratios), max(ratios)]
    words = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    asked = {"first pass, DIR": 1, "first pass, photos": 3, "warm over a step": 20}.get(name, "")
    print(f"{name:24}{words[0]:>10}{words[1]:>10}{words[2]:>10}   {words[3] + '..' + words[4]:16}{asked}")


def load_alike(root, c, scratch):
    """The ImageSet of the files that ImageFolder finds too. Raises InputError where the two differ."""
    image_set = load(root, c, scratch / "kept")
    try:
        found = len(datasets.ImageFolder(root))
    except FileNotFoundError:        # no class folder, or an empty one
        found = 0
    if found != len(image_set.images):
        raise InputError(f"{data.printable(root)}: ImageFolder finds {found:,} images, load_images can use "
                         f"{len(image_set.images):,}: give a folder of class folders that hold sound files alone")
    return image_set


def compare(flags, c, scratch):
    """Times in turns all that --many does not ask for, after an untimed turn, and prints it."""
    training_step.set_up(torch.device("cpu"), c)
    image_set, state = load_alike(flags.data, c, scratch), training_step.new_state(c, torch.device("cpu"))
    mirroring, photos = SimpleNamespace(**{**vars(c), "FLIP": True}), scratch / "photos"
    draw(photos / "all", flags.large, large=True)
    training_step.training_step(state, c, image_set)
    turns = []
    for _ in range(flags.repeats):
        ours, (plain, plain_warm) = first_pass(flags.data, c, scratch), plain_rates(flags.data, c, epochs=2)
        turn = {"first pass, DIR": (ours, plain)}
        if flags.large:
            turn["first pass, photos"] = first_pass(photos, c, scratch), *plain_rates(photos, c, epochs=1)
        turn["warm batches"] = warm_rate(state, c, image_set), plain_warm
        turn["warm, mirrored"] = warm_rate(state, mirroring, image_set), plain_warm
        turn["warm over a step"] = turn["warm batches"][0], step_rate(state, c, image_set)
        turns.append(turn)
    print(f"{len(image_set.images):,} files, {flags.large} photos; {c.IMAGE_SIZE} px, batches of {c.BATCH_SIZE}, "
          f"{c.NUM_WORKERS} workers, {torch.get_num_threads()} threads of torch, {flags.repeats} repeats\n"
          f"{'images a second':24}{'ours':>10}{'beside':>10}{'ratio':>10}   {'min..max':16}asked for at least")
    for name in turns[0]:
        print_row(name, [turn[name] for turn in turns])


def start_again(flags, c, scratch):
    """Prints the row of --many, in seconds."""
    c, root = SimpleNamespace(**{**vars(c), "IMAGE_SIZE": 32}), scratch / "many"
    draw(root / "all", flags.many, large=False)
    starts = (lambda: load(root, c, scratch)), (lambda: datasets.ImageFolder(root))
    print(f"N = {flags.many:,}: the first pass took {timed(starts[0])[0]:.3g} s")
    print_row("start on N, seconds", [[timed(start)[0] for start in starts] for _ in range(flags.repeats)])


def parse(argv):
    parser = command_line.Parser("loader.py", __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", type=os.path.expanduser, help="images in class folders")
    for flag, default in (("image-size", 128), ("workers", -1), ("large", 192), ("many", 0), ("repeats", 5)):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help="[%(default)s]")
    flags = parser.parse_args(argv)
    if flags.workers < -1 or flags.large < 0 or flags.many < 0 or flags.repeats < 1:
        raise InputError("give --workers -1 or more, --large and --many 0 or more, --repeats 1 or more")
    given = f"--image-size {flags.image_size} --num-workers {flags.workers} --channels 3"
    c, _ = command_line.parse_constants(given.split())
    if c.NUM_WORKERS < 0:
        c.NUM_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return flags, c


def main(argv=None):
    try:
        flags, c = parse(argv)
        with tempfile.TemporaryDirectory(prefix="loader-", ignore_cleanup_errors=True) as scratch:
            compare(flags, c, Path(scratch))
            if flags.many:
                start_again(flags, c, Path(scratch))
        return 0
    except (InputError, data.InputError) as error:
        print(f"loader.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
