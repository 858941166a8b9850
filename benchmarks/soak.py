"""Kills a small training again and again at random moments, and holds its end against the run that nobody touched.

    python benchmarks/soak.py                       # 60 kills, about 10 minutes
    python benchmarks/soak.py --kills 6 --steps 200

training.py runs in processes of their own on a drawn set, at 32 px with 2 layers. Half of the kills are SIGTERM, half
SIGKILL, at a moment drawn anew each time: during imports, scan, steps, saving or the last words. The table says what
each kind cost: steps made again, at most CHECKPOINT_EVERY after SIGKILL and none after SIGTERM (once the training has
its handler). Both runs must end in the same checkpoint, tensor by tensor, and the same log but for its clock.
Status 0: equal; 1: not.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoints
import demo_images
import training

CHECKPOINT_EVERY = 10
FLAGS = ["--image-size", "32", "--batch-size", "4", "--width", "8", "--width-max", "32", "--latent-dim", "16",
         "--transformer-dim", "24", "--transformer-layers", "2", "--patch", "8", "--sample-count", "4", "--flip",
         "--log-every", "1", "--gp-every", "2", "--sample-every", "200", "--device", "cpu",
         "--checkpoint-every", str(CHECKPOINT_EVERY)]
WALL_CLOCK = ("images_per_second", "seconds")


def start(images, runs, steps, out):
    """training.py in a process of its own; what it prints goes into the file `out`."""
    command = [sys.executable, str(Path(training.__file__)), "--data", str(images), "--runs-dir", str(runs),
               "--run", "soak", "--steps", str(steps), *FLAGS]
    return subprocess.Popen(command, stdout=out.open("w"), stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def wait_for_moment(process, out, folder, rng):
    """Until a random moment: one in four before training begins, the others up to 3 s after the first step of this
    start is in the log."""
    def first_step_done():
        went_on = re.search(r"continuing .* at step (\d+)", out.read_text())
        return "images to train on" in out.read_text() and last_logged(folder) > (int(went_on[1]) if went_on else 0)

    early = rng.random() < 0.25
    limit, begun = time.monotonic() + (rng.uniform(0, 8) if early else 600), early
    while process.poll() is None and time.monotonic() < limit:
        if not begun and first_step_done():
            limit, begun = time.monotonic() + rng.uniform(0, 3), True
        time.sleep(0.005)


def last_logged(folder):
    """The step of the last whole line of metrics.jsonl, 0 without one."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def end(folder):
    """What two runs are compared by: the newest checkpoint's contents and the lines of the log."""
    _, saved = checkpoints.newest(folder / "checkpoints")
    saved["constants"].pop("RUNS_DIR")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return saved, [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in log]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def soak(images, runs, steps, kills, rng):
    """Kills until it was done `kills` times, then lets the run end. Returns a row a kill: (kind, status, lost steps).

    Lost steps are those in the log at the kill that the next start made again.
    """
    rows, folder, out, waiting = [], runs / "soak", runs.with_suffix(".txt"), None
    while True:
        process = start(images, runs, steps, out)
        number = rng.choice((signal.SIGTERM, signal.SIGKILL)) if len(rows) < kills else None
        if number is not None:
            wait_for_moment(process, out, folder, rng)
            process.send_signal(number)
        process.wait()
        text = out.read_text()
        if "Traceback" in text and "KeyboardInterrupt" not in text:
            raise SystemExit(f"a start ended with a traceback:\n{text[-2000:]}")
        if waiting is not None and (found := re.search(r"continuing .* at step (\d+)", text)):
            waiting[2], waiting = max(0, waiting[3] - int(found[1])), None
        if number is None or process.returncode == 0:
            return rows, process.returncode
        rows.append([number.name, process.returncode, None, last_logged(folder)])       # steps lost, known later; step
        waiting = waiting or rows[-1]            # a start that is killed before it goes on costs no steps itself
        print(f"\r{len(rows)} kills, step {rows[-1][3]} of {steps}", end="", file=sys.stderr, flush=True)


def table(rows):
    lines = ["| signal | kills | exit status | steps made again, at most | in all |", "| --- | --- | --- | --- | --- |"]
    for kind in ("SIGTERM", "SIGKILL"):
        chosen = [row for row in rows if row[0] == kind]
        statuses = sorted({row[1] for row in chosen})
        lost = [row[2] for row in chosen if row[2] is not None]
        lines.append(f"| {kind} | {len(chosen)} | {', '.join(map(str, statuses))} | {max(lost, default=0)} | "
                     f"{sum(lost)} |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=3000, metavar="N", help="of the whole run [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments [%(default)s]")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        demo_images.make(images, 50, 32)
        rows, status = soak(images, Path(scratch) / "killed", arguments.steps, arguments.kills,
                            random.Random(arguments.seed))
        out = Path(scratch) / "whole.txt"
        whole_status = start(images, Path(scratch) / "whole", arguments.steps, out).wait()
        if status or whole_status:
            raise SystemExit(f"a run did not end well: status {status} and {whole_status}\n{out.read_text()[-1000:]}")
        same = equal(end(Path(scratch) / "killed" / "soak"), end(Path(scratch) / "whole" / "soak"))
    print(file=sys.stderr)
    print("\n".join(table(rows)))
    at = [row[3] for row in rows]
    print(f"{len(rows)} kills at {len(set(at))} steps from {min(at)} to {max(at)} of {arguments.steps}, with a "
          f"checkpoint each {CHECKPOINT_EVERY}: the end is "
          + ("equal, tensor by tensor, to that of the run without a break, and so is its log" if same else "NOT equal"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
