"""What a second process brings: steps a second, bytes sent and time in communication.

    python benchmarks/distributed.py                          # CPU: 1 process and 2, each pinned to a core of its own
    python benchmarks/distributed.py --processes 8            # with GPUs: 1 and 8 of them
    python benchmarks/distributed.py -- --image-size 128      # flags of training.py behind --; by itself 64 px

Strong scaling deals one batch of BATCH_SIZE out to all; weak scaling gives each process a batch of BATCH_SIZE. Turns
of one and of many processes alternate, and an efficiency is a ratio of medians within this run: the speed of n
processes over n times that of one. The last lines are an estimate on paper for faster machines, from the bytes that
were counted and from link speeds that are stated. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command_line
import distributed
import training_step
from errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent))

import step as step_benchmark

WARM_UP = 2                      # steps that are not timed
LINKS = (("8 GPUs of one machine, PCIe 4.0 x16 at 25 GB/s", 8, 25e9),
         ("8 GPUs of one machine, NVLink at 200 GB/s", 8, 200e9),
         ("8 machines, 100 Gbit/s Ethernet at 11 GB/s", 8, 11e9),
         ("8 machines, 10 Gbit/s Ethernet at 1.1 GB/s", 8, 1.1e9))


def worker(steps, flags):
    """One of the processes: times its steps, and prints a line of JSON if it is the first."""
    device = distributed.own_device(command_line.choose_device("auto"))
    if device.type != "cuda":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[distributed.local_rank()]})
        torch.set_num_threads(1)
    with distributed.joined(device) as ranks:
        c, _ = command_line.parse_constants(flags)
        training_step.set_up(device, c)
        state = training_step.new_state(c, device, ranks)
        images = step_benchmark.random_images(c, 256)
        spent, reduced, average = [0.0], [0], distributed.average_gradients

        def synchronised():
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def timed(ranks, model):
            begun = synchronised()
            average(ranks, model)
            spent[0] += synchronised() - begun
            reduced[0] += 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)

        distributed.average_gradients = timed
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                distributed.wait_for_all(ranks)
                spent[0], reduced[0], begun = 0.0, 0, synchronised()
            training_step.training_step(state, c, images)
        seconds = synchronised() - begun
        if ranks.first:
            print(json.dumps({"seconds": seconds / steps, "communication": spent[0] / steps,
                              "reduced": reduced[0] / steps, "batch": c.BATCH_SIZE, "device": str(device)}))


def turn(processes, steps, flags):
    """The dict that the first of so many processes printed."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(processes), "--", __file__, "--worker", "--steps", str(steps), "--", *flags],
                          capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise InputError(f"{processes} processes ended with status {done.returncode}, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def sent(reduced, processes):
    """Bytes that each process sends in a ring all_reduce of so many bytes."""
    return 2 * (processes - 1) / processes * reduced


def start(argv):
    own, flags = command_line.split(argv)
    parser = command_line.Parser("distributed.py", __doc__)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed in each turn [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(own)
    flags = ["--image-size", "64", *flags]
    c, _ = command_line.parse_constants(flags)
    if arguments.worker:
        worker(arguments.steps, flags)
        return 0
    n = arguments.processes
    cores = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if cores < 2:
        raise InputError("there is one GPU or core here: nothing to compare with")
    if not 2 <= n <= cores or c.BATCH_SIZE % n:
        raise InputError(f"--processes {n} can't be: give 2 to {cores} that divide a batch of {c.BATCH_SIZE}")
    kinds = {"one": (1, flags), "strong": (n, flags), "weak": (n, [*flags, "--batch-size", str(n * c.BATCH_SIZE)])}
    found = {kind: [] for kind in kinds}
    for _ in range(arguments.turns):
        for kind, (processes, own_flags) in kinds.items():
            found[kind].append(turn(processes, arguments.steps, own_flags))
    print("| processes | batch | s a step | in communication | MB sent by each | efficiency (range over turns) |\n"
          "| --- | --- | --- | --- | --- | --- |")
    one = [entry["seconds"] for entry in found["one"]]
    for kind, (processes, _) in kinds.items():
        seconds, communication = ([entry[name] for entry in found[kind]] for name in ("seconds", "communication"))
        gain = found[kind][0]["batch"] / found["one"][0]["batch"] / processes
        ratios = sorted(gain * a / b for a, b in zip(one, seconds))
        megabytes = sent(found[kind][0]["reduced"], processes) / 1e6
        print(f"| {processes} {'' if processes == 1 else kind} | {found[kind][0]['batch']} | "
              f"{statistics.median(seconds):.3f} | {statistics.median(communication):.3f} s | {megabytes:.1f} | "
              f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(f"device {found['one'][0]['device']}, torch {torch.__version__}, {arguments.turns} turns of "
          f"{arguments.steps} steps")
    reduced = found["strong"][0]["reduced"]
    print("\nAn estimate, not a measurement: a ring all_reduce of the gradients, nothing overlapped, latency left out.")
    for words, processes, speed in LINKS:
        seconds = sent(reduced, processes) / speed
        print(f"{words}: {1000 * seconds:.1f} ms a step; 90% efficiency where a step takes {9000 * seconds:.0f} ms or "
              "more")
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"distributed.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distributed.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
