"""What the benchmarks share: the repository's root on sys.path, flags of training.py, and CSV tables of results.

A benchmark imports this file before the project's own, which lie in the root.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command_line
from errors import InputError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the parser's own flags, and the remaining ones: constants of config.py, of which `--` may mark the start.
    Raises InputError for an invalid flag."""
    words = sys.argv[1:] if argv is None else argv
    arguments, flags = parser.parse_known_args([word for word in words if word != "--"])
    command_line.parse_constants(flags, parser.prog)
    return arguments, flags


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


def check_distinct_names(folders: Sequence[str]) -> None:
    """Raises InputError if two folders have the same name, which is the name of the set in a table."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"--data {' '.join(names)} is invalid: the names of the folders must be different")
