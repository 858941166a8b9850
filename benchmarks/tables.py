"""What the benchmarks share: the repository's root on sys.path, flags, child processes, times, and CSV tables.

A benchmark imports this file before the project's own, which lie in the root.
"""

import argparse
import copy
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command_line
from errors import InputError, RunError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parser's own flags; `flags` are the remaining words: constants of config.py, of which `--` may mark
    the start. Raises InputError for an invalid flag."""
    words = sys.argv[1:] if argv is None else argv
    arguments, flags = parser.parse_known_args([word for word in words if word != "--"])
    command_line.parse_constants(flags, parser.prog)
    return argparse.Namespace(**vars(arguments), flags=flags)


def output_of(name: str, *command) -> str:
    """Returns what Python prints with these arguments. Raises RunError, which calls it `name`, if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def now() -> float:
    """Returns the time in seconds, after a GPU in use has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable) -> float:
    """Returns the wall-clock time of one call, a GPU's work included."""
    start = now()
    function()
    return now() - start


def machine(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Returns "1.88 (0.55 to 2.52)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def append(file: Path, columns: Sequence[str], row: dict) -> None:
    """Appends a row, a dict with `columns` as its keys; a new file starts with their names."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows, [] without a file. Raises InputError for a table with other columns."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise InputError(f"{file}: not a table of this script, or of an older version: give another file")
        return list(reader)


def replace_layer(state, layer: torch.nn.Module) -> None:
    """Gives a new run_state.State another layer: to its generators and to the optimizers that train it."""
    state.generator.layer, state.ema.layer = layer, copy.deepcopy(layer).requires_grad_(False)
    state.generator_optimizer.param_groups[1]["params"] = list(layer.parameters())
    if state.motion_optimizer:
        state.motion_optimizer.param_groups[0]["params"] = list(state.motion.parameters())


def plot_differences(panel, paired: dict[str, Sequence[float]], title: str) -> None:
    """Draws {name: differences from the default} on matplotlib's axes: a dot for each value, a bar for their mean."""
    for place, values in enumerate(paired.values()):
        panel.plot(values, [place] * len(values), "o", color="#4a7ab5", ms=5, alpha=0.7)
        panel.plot([statistics.mean(values)], [place], "|", color="black", ms=16, mew=2)
    panel.axvline(0, color="#b04a3a", linewidth=1)
    panel.set_yticks(range(len(paired)), list(paired))
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
    panel.grid(axis="x", color="#e8e8e8")
    panel.spines[["top", "right"]].set_visible(False)


def check_distinct_names(folders: Sequence[str]) -> None:
    """Raises InputError if two folders have the same name, which is the name of the set in a table."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"--data {' '.join(names)} is invalid: the names of the folders must be different")
