"""Efficiency of training with several processes: steps per second, bytes sent and time of communication.

    python benchmarks/distributed.py                          # CPU: 1 process and 2, each pinned to a core of its own
    python benchmarks/distributed.py --processes 8            # with GPUs: 1 and 8 of them
    python benchmarks/distributed.py --image-size 128         # constants of config.py; 64 px by default

Strong scaling divides one batch of BATCH_SIZE among the processes; weak scaling gives a batch of BATCH_SIZE to each.
Turns of one and of many processes alternate. An efficiency is a ratio within one turn: the speed of n processes over n
times that of one. The last lines estimate the communication on faster machines from the counted bytes and from the
speeds of their links. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import sys

import tables
import torch
from step import random_images
from tables import median_and_range, now, output_of

import command_line
import distributed
import run_state
import training_step
import update
from command_line import positive
from errors import InputError

WARM_UP = 2                      # steps that are not timed
LINKS = (("8 GPUs of one machine, PCIe 4.0 x16 at 25 GB/s", 25e9),
         ("8 GPUs of one machine, NVLink at 200 GB/s", 200e9),
         ("8 machines, 100 Gbit/s Ethernet at 11 GB/s", 11e9),
         ("8 machines, 10 Gbit/s Ethernet at 1.1 GB/s", 1.1e9))


def worker(steps: int, c) -> None:
    """Times `steps` steps in one process of several; rank 0 prints a line of JSON."""
    device = distributed.own_device(command_line.choose_device("auto"))
    if device.type != "cuda":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[distributed.local_rank()]})
        torch.set_num_threads(1)
    with distributed.joined(device) as ranks:
        update.set_up(device, c)
        state, images = run_state.new_state(c, device, ranks), random_images(c)
        spent, average_gradients = [], distributed.average_gradients

        def timed(ranks, model):
            begun = now()
            average_gradients(ranks, model)
            spent.append((now() - begun, 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)))

        distributed.average_gradients = timed
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                distributed.maximum(ranks, [0])                  # waits for all ranks
                spent.clear()
                begun = now()
            training_step.training_step(state, c, images)
        seconds = now() - begun
        if ranks.is_first:
            communication, reduced = (sum(column) / steps for column in zip(*spent))
            print(json.dumps({"seconds": seconds / steps, "communication": communication, "reduced": reduced,
                              "batch": c.BATCH_SIZE, "device": str(device)}))


def turn(processes: int, steps: int, flags: list[str]) -> dict:
    """Returns what rank 0 of so many processes printed. Raises RunError if they fail."""
    printed = output_of(f"torchrun with {processes} processes", "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", processes, "--", __file__, "--worker", "--steps", steps, *flags)
    return json.loads(printed.strip().splitlines()[-1])


def sent(reduced: float, processes: int) -> float:
    """Returns the bytes that each process sends in a ring all-reduce of so many bytes."""
    return 2 * (processes - 1) / processes * reduced


def print_table(found: dict[str, list[dict]], processes: int) -> None:
    print("| processes | batch | s per step | in communication | MB sent by each | efficiency (range over turns) |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for kind, turns in found.items():
        n = 1 if kind == "one" else processes
        ratios = [b["batch"] / n / a["batch"] * a["seconds"] / b["seconds"] for a, b in zip(found["one"], turns)]
        seconds, communication = (statistics.median(t[name] for t in turns) for name in ("seconds", "communication"))
        print(f"| {n}{'' if n == 1 else f', {kind} scaling'} | {turns[0]['batch']} | {seconds:.3f} | "
              f"{communication:.3f} s | {sent(turns[0]['reduced'], n) / 1e6:.1f} | "
              f"{median_and_range(ratios)} |")
    print("\nEstimated, not measured: a ring all-reduce of the gradients without overlap or latency.")
    for name, speed in LINKS:
        seconds = sent(found["strong"][0]["reduced"], 8) / speed
        print(f"{name}: {1000 * seconds:.1f} ms per step; 90% efficiency for steps of {9000 * seconds:.0f} ms or more")


def start(argv) -> None:
    parser = command_line.Parser("distributed.py", __doc__)
    parser.add_argument("--processes", type=positive(int), default=2, metavar="N", help="[%(default)s]")
    parser.add_argument("--steps", type=positive(int), default=10, metavar="N", help="timed per turn [%(default)s]")
    parser.add_argument("--turns", type=positive(int), default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = tables.parse(parser, argv)
    flags = ["--image-size", "64", *arguments.flags]
    c, _ = command_line.parse_constants(flags)
    if arguments.worker:
        return worker(arguments.steps, c)
    n, cores = arguments.processes, torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if not 2 <= n <= cores or c.BATCH_SIZE % n:
        raise InputError(f"--processes {n} is invalid: must be 2 to {cores}, the GPUs or cores of this machine, and "
                         f"divide the batch of {c.BATCH_SIZE}")
    kinds = {"one": (1, flags), "strong": (n, flags), "weak": (n, [*flags, "--batch-size", str(n * c.BATCH_SIZE)])}
    found = {kind: [] for kind in kinds}
    for _ in range(arguments.turns):
        for kind, (processes, own_flags) in kinds.items():
            found[kind].append(turn(processes, arguments.steps, own_flags))
    print(f"device {found['one'][0]['device']}, torch {torch.__version__}, {arguments.turns} turns of "
          f"{arguments.steps} steps\n")
    print_table(found, n)


if __name__ == "__main__":
    sys.exit(command_line.run_script("distributed.py", start, None))
