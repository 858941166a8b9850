"""What quality.py and ablation.py share: a CSV table that a later call goes on from, and the names of its sets."""

import csv
from pathlib import Path

from errors import InputError


def append(file, columns, row):
    """Appends row, a dict with columns as its keys, below a line of their names if file is new."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(file, columns):
    """The rows as dicts of texts, [] where there is no file. Raises InputError where it is another table."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise InputError(f"{file} is no table of this script, or of an older one: move it away")
        return list(reader)


def need_distinct_names(folders):
    """Raises InputError where two folders have the same name, by which a table knows a set."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"--data {' '.join(names)}: two folders of the same name, which would be one set in the table")
