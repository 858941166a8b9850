"""Kills a small training at random moments and compares its result with that of an uninterrupted run.

    python benchmarks/soak.py                       # 60 kills, about 10 minutes
    python benchmarks/soak.py --kills 6 --steps 200

training.py runs in processes of its own on the demo set, at 32 px with 2 layers. Half of the kills are SIGTERM, half
SIGKILL, at random moments: during imports, scan, steps or saving. Prints a table of the steps that had to be made
again: at most CHECKPOINT_EVERY after SIGKILL, none after SIGTERM once training handles signals. Both runs must end
with equal checkpoints, tensor by tensor, and equal logs without times; otherwise the exit status is 1.
"""

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

import tables  # noqa: F401 (the project's root on sys.path)
import torch

import checkpoints
import command_line
import demo_images
import training
from command_line import positive
from errors import RunError

CHECKPOINT_EVERY = 10
FLAGS = ["--image-size", "32", "--batch-size", "4", "--width", "8", "--width-max", "32", "--latent-dim", "16",
         "--transformer-dim", "24", "--transformer-layers", "2", "--patch", "8", "--sample-count", "4", "--flip",
         "--log-every", "1", "--gp-every", "2", "--sample-every", "200", "--device", "cpu",
         "--checkpoint-every", str(CHECKPOINT_EVERY)]
TIMES = ("images_per_second", "seconds")


def start_training(images: Path, runs: Path, steps: int, out: Path) -> subprocess.Popen:
    """Starts training.py in a process of its own, whose output goes into the file `out`."""
    command = [sys.executable, str(Path(training.__file__)), "--data", str(images), "--runs-dir", str(runs),
               "--run", "soak", "--steps", str(steps), *FLAGS]
    return subprocess.Popen(command, stdout=out.open("w"), stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def last_step(folder: Path) -> int:
    """Returns the step of the last complete line of metrics.jsonl, 0 without one."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_moment(process: subprocess.Popen, folder: Path, rng: random.Random) -> None:
    """Waits for a random moment: one in four within 8 s of the start, the others within 3 s of a new step."""
    before, limit, early = last_step(folder), time.monotonic() + 600, rng.random() < 0.25
    while not early and process.poll() is None and time.monotonic() < limit and last_step(folder) <= before:
        time.sleep(0.005)
    limit = time.monotonic() + rng.uniform(0, 8 if early else 3)
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


def soak(images: Path, runs: Path, steps: int, kills: int, rng: random.Random) -> list[dict]:
    """Kills the training `kills` times, then lets it end. Returns {signal, status, step, lost} of each kill, where
    `lost` is the number of logged steps that the next start made again. Raises RunError if a start fails."""
    rows, folder, out, waiting = [], runs / "soak", runs.with_suffix(".txt"), None
    while True:
        process = start_training(images, runs, steps, out)
        number = rng.choice((signal.SIGTERM, signal.SIGKILL)) if len(rows) < kills else None
        if number is not None:
            wait_for_moment(process, folder, rng)
            process.send_signal(number)
        process.wait()
        text = out.read_text()
        if "Traceback" in text and "KeyboardInterrupt" not in text:
            raise RunError(f"a start ended with a traceback:\n{text[-2000:]}")
        if waiting and (found := re.search(r"continuing .* at step (\d+)", text)):
            waiting["lost"], waiting = max(0, waiting["step"] - int(found[1])), None
        if number is None or process.returncode == 0:
            if process.returncode:
                raise RunError(f"the killed run ended with status {process.returncode}: {text[-1000:]}")
            return rows
        rows.append({"signal": number.name, "status": process.returncode, "step": last_step(folder), "lost": 0})
        waiting = waiting or rows[-1]            # a start that is killed before it continues loses no steps itself
        print(f"\r{len(rows)} kills, step {rows[-1]['step']} of {steps}", end="", file=sys.stderr, flush=True)


def result(folder: Path) -> tuple[dict, list[dict]]:
    """Returns what two runs are compared by: the newest checkpoint's contents and the log without times."""
    _, saved = checkpoints.newest(folder / "checkpoints")
    saved["constants"].pop("RUNS_DIR")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return saved, [{name: value for name, value in line.items() if name not in TIMES} for line in log]


def equal(a, b) -> bool:
    """Compares nested dicts, lists and tuples; tensors by type and value."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ["| signal | kills | exit status | steps made again, at most | in all |", "| --- | --- | --- | --- | --- |"]
    for name in ("SIGTERM", "SIGKILL"):
        chosen = [row for row in rows if row["signal"] == name]
        statuses, lost = sorted({row["status"] for row in chosen}), [row["lost"] for row in chosen]
        lines.append(f"| {name} | {len(chosen)} | {', '.join(map(str, statuses))} | {max(lost, default=0)} | "
                     f"{sum(lost)} |")
    return lines


def start(argv) -> None:
    parser = command_line.Parser("soak.py", __doc__)
    parser.add_argument("--kills", type=positive(int), default=60, metavar="N", help="[%(default)s]")
    parser.add_argument("--steps", type=positive(int), default=3000, metavar="N", help="of the run [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments [%(default)s]")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        demo_images.make(scratch / "images", 50, 32)
        rows = soak(scratch / "images", scratch / "killed", arguments.steps, arguments.kills,
                    random.Random(arguments.seed))
        start_training(scratch / "images", scratch / "whole", arguments.steps, scratch / "whole.txt").wait()
        same = equal(result(scratch / "killed" / "soak"), result(scratch / "whole" / "soak"))
    at = [row["step"] for row in rows]
    print("\n".join(["", *table(rows)]))
    print(f"{len(at)} kills at {len(set(at))} steps of {arguments.steps}, a checkpoint every {CHECKPOINT_EVERY} steps")
    if not same:
        raise RunError("the checkpoint or the log differs from that of the uninterrupted run")
    print("checkpoint and log are equal to those of the uninterrupted run")


if __name__ == "__main__":
    sys.exit(command_line.run_script("soak.py", start, None))
