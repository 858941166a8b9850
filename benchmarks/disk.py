"""Reads batches from a cache that is larger than the memory, beside the disk's own rate for such reads. Linux only.

    systemd-run --scope -p MemoryMax=4G python benchmarks/disk.py    # 1,000,000 images of 64 px, with 4 GB of memory
    python benchmarks/disk.py --images 100000 --folder /mnt/disk     # on another disk

The limit includes the system's file cache. Without systemd, a control group limits a shell and what it starts. As root,
with cgroup v1 (with v2 the folder is /sys/fs/cgroup/small, and the file of the limit memory.max):
    mkdir /sys/fs/cgroup/memory/small && cd /sys/fs/cgroup/memory/small
    echo 4G > memory.limit_in_bytes && echo $$ > cgroup.procs

Writes random pixels into a temporary folder, which is deleted at the end: 12.3 GB for 1,000,000 images. Then reads in
turns; before each, the system drops the file from its cache:
    data.read_batch    shuffled batches of 64, as training reads them
    N threads          os.preadv of one image at random places with O_DIRECT, past the file cache
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

import numpy as np
from tables import median_and_range  # first: the project's root on sys.path

import command_line
import data
from command_line import positive
from errors import InputError

SIDE, CHANNELS = 64, 3
IMAGE_BYTES = SIDE * SIDE * CHANNELS     # a multiple of 4,096, as O_DIRECT requires
BATCH = 64
THREADS = (1, 4, 16)
CHUNK = 1000                             # images per write


def memory_limit() -> int:
    """Returns the bytes that this process's control groups and the machine allow."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        path = line.split(":", 2)[2]
        for file in (f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes", f"/sys/fs/cgroup{path}/memory.max"):
            text = Path(file).read_text().strip() if Path(file).exists() else "max"
            limits += [] if text == "max" else [int(text)]
    return min(limits)


def write_pixels(file: Path, images: int) -> None:
    """Writes random pixels. Raises InputError if the disk has no room for them."""
    need, free = images * IMAGE_BYTES, shutil.disk_usage(file.parent).free
    if need > free:
        raise InputError(f"the images need {need:,} bytes, and {file.parent} has {free:,} free: give another --folder")
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, images, CHUNK):
            out.write(rng.bytes(min(CHUNK, images - start) * IMAGE_BYTES))
        out.flush()
        os.fsync(out.fileno())           # the system drops only what is on the disk


def bytes_from_disk() -> int:
    """Returns the bytes that this process has read from disks."""
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()
                if line.startswith("read_bytes"))


def batches(file: Path, images: int, seed: int, duration: float) -> int:
    """Reads batches for a time; returns the number of their images."""
    pixels = np.memmap(file, np.uint8, "r", shape=(images, SIDE, SIDE, CHANNELS))      # as load_images
    image_set = data.ImageSet(pixels, [], np.arange(images), np.arange(0), [])
    position, end = 0, time.perf_counter() + duration
    while time.perf_counter() < end:
        data.read_batch(image_set, data.batch_indices(images, seed, position, BATCH))
        position += BATCH
    return position


def plain_reads(file: Path, images: int, seed: int, duration: float, threads: int) -> int:
    """Reads images one by one in each of several threads, past the file cache; returns their number."""
    order, end = np.random.default_rng(seed).integers(0, images, 10 ** 6).tolist(), time.perf_counter() + duration
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read(thread):
        count, buffer = 0, mmap(-1, IMAGE_BYTES)                                       # aligned, as O_DIRECT requires
        while time.perf_counter() < end:
            place = order[(thread + count * threads) % len(order)]
            os.preadv(descriptor, [buffer], place * IMAGE_BYTES)
            count += 1
        return count

    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read, range(threads)))
    finally:
        os.close(descriptor)


def turn(function, file: Path, images: int, *others) -> tuple[float, float]:
    """Drops the file from the cache and reads. Returns images per second, and bytes from the disk per image."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before, start = bytes_from_disk(), time.perf_counter()
    count = function(file, images, *others)
    return count / (time.perf_counter() - start), (bytes_from_disk() - before) / count


def start(argv) -> None:
    parser = command_line.Parser("disk.py", __doc__)
    parser.add_argument("--images", type=positive(int), default=1_000_000, metavar="N", help="[%(default)s]")
    parser.add_argument("--folder", metavar="DIR", help="folder on the disk [the system's temporary folder]")
    parser.add_argument("--seconds", type=positive(float), default=5.0, metavar="S", help="of a turn [%(default)s]")
    parser.add_argument("--repeats", type=positive(int), default=3, metavar="N", help="timed turns [%(default)s]")
    flags = parser.parse_args(argv)
    if flags.folder and not os.path.isdir(flags.folder):
        raise InputError(f"--folder {flags.folder} is not a folder")
    with tempfile.TemporaryDirectory(prefix="disk-", dir=flags.folder) as folder:
        file, limit = Path(folder, "pixels.u8"), memory_limit()
        write_pixels(file, flags.images)
        reads = {f"data.read_batch, batches of {BATCH}": (batches,),
                 **{f"{n} thread{'s' * (n > 1)}": (plain_reads, n) for n in THREADS}}
        turns = [[turn(function, file, flags.images, seed, flags.seconds, *others)
                  for function, *others in reads.values()] for seed in range(flags.repeats)]
    size = flags.images * IMAGE_BYTES
    print(f"{flags.images:,} images of {SIDE} px: {size / 1e9:.1f} GB; memory {limit / 1e9:.1f} GB"
          + (": warning: the images fit into the memory" if size < limit else ""))
    print("| reads | images/s (range) | bytes from the disk per image | of the disk's best |\n" + "| --- " * 4 + "|")
    rates = {name: [rate for rate, _ in column] for name, column in zip(reads, zip(*turns))}
    best = max(statistics.median(rates[name]) for name in list(reads)[1:])
    for name, column in zip(reads, zip(*turns)):
        amount = statistics.median(amount for _, amount in column)
        print(f"| {name} | {median_and_range(rates[name], 0)} | {amount:,.0f} | "
              f"{statistics.median(rates[name]) / best:.0%} |")


if __name__ == "__main__":
    sys.exit(command_line.run_script("disk.py", start, None))
