"""Flags made from config.py's constants, one runner with one error path for all scripts, and the choice of device.

Every constant above config.py's last section is a flag: IMAGE_SIZE is `--image-size 64`, a boolean is `--flip` or
`--no-flip`. A flag overrides config.py.
"""

import argparse
import ast
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import config
import errors
from errors import InputError, RunError

if TYPE_CHECKING:    # torch takes seconds to import, and not every script needs it
    import torch

DERIVED = ("TRANSFORMER_IN_CHANNELS", "CLASSES")
IMAGE_SIZES = range(32, 513, 16)
RUN_BYTES = 200                  # file systems allow 255 for a name

# Constants with limits of their own: a test, and what the value must be. The others are checked for their sign.
LIMITS = {
    "IMAGE_SIZE": (lambda v: v in IMAGE_SIZES, f"one of {', '.join(map(str, IMAGE_SIZES))}"),
    "CHANNELS": (lambda v: v in (1, 3, 4), "1, 3 or 4"),
    "FOLDERS": (lambda v: v in ("ignore", "classes", "clips"), "ignore, classes or clips"),
    "AUGMENT": (lambda v: v == -1 or 0 <= v < 1, "0 or more and below 1, or -1"),
    "FIT": (lambda v: v in ("crop", "pad", "stretch"), "crop, pad or stretch"),
    "DEVICE": (lambda v: v in ("auto", "cuda", "mps", "cpu"), "auto, cuda, mps or cpu"),
    "BACKGROUND": (lambda v: 0 <= v <= 255, "0 to 255"),
    "NUM_WORKERS": (lambda v: v >= -1, "-1 (one per core), 0 or more"),
    "HELD_OUT_SHARE": (lambda v: 0 <= v <= 0.5, "0 to 0.5"),
    "ALPHA_INIT": (lambda v: 0 < v <= 100, "above 0, at most 100"),
    "ALPHA_SPAN": (lambda v: 1 <= v <= 100, "1 to 100"),
    "VIDEO_SHIFT": (lambda v: 0 <= v <= 0.5, "0 to 0.5"),
    "BETA_1": (lambda v: 0 <= v < 1, "0 or more, below 1"),
    "BETA_2": (lambda v: 0 <= v < 1, "0 or more, below 1"),
    "SEED": (lambda v: 0 <= v < 2 ** 63, "0 to 2^63 - 1"),
    "FEEDBACK": (lambda v: 0 <= v <= 1, "0 to 1"),
    "COLD_SHARE": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "EVALUATE_COUNT": (lambda v: v >= 4, "4 or more"),
    "RUN": (lambda v: re.fullmatch(r"(?!\.)[^/\\\0]*", v) is not None and len(os.fsencode(v)) <= RUN_BYTES,
            f"a name of at most {RUN_BYTES} bytes without slashes or a leading dot"),
    "RUNS_DIR": (lambda v: v != "", "the name of a folder"),
}
MAY_BE_ZERO = ("STEPS", "MINUTES", "FINAL_WIDTH", "VIDEO_BRIGHTNESS", "VIDEO_NOISE", "MICRO_BATCH", "DECAY_FROM_KIMG",
               "DECAY_TO_KIMG", "EMA_HALF_LIFE_KIMG", "MAX_ROLLBACKS", "DEVICE_IMAGES",
               "EVALUATE_EVERY")                                                       # and every LAMBDA


# ------------------------------------------------------------------------------------- scripts

def run_script(program: str, function: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    """Returns the exit status of function(argv): its own, or 0 for None. Every error is one line on stderr.

    InputError and RunError bring their status, 2 and 1. A path that cannot be used is bad input, 2; any other OSError,
    such as a full disk, is 1; Ctrl-C is 130. Characters that the output's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is errors.end_during_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return function(argv) or 0
    except (InputError, RunError) as error:
        line, status = str(error), error.status
    except BrokenPipeError:                      # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)      # what is still buffered must not raise again at exit
        return 141
    except OSError as error:
        bad_path = isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError,
                                      IsADirectoryError))
        line, status = f"{error.filename or 'a file'} cannot be used: {error.strerror or error}", 2 if bad_path else 1
    except KeyboardInterrupt:
        line, status = "stopped", 130
    if line:                                     # empty where another process prints the line
        print(f"{program}: {line}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises InputError instead of printing usage and exiting."""

    def __init__(self, program: str, description: str):
        super().__init__(prog=program, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        for kind, words in (("int", "whole number"), ("float", "number"), ("whole number", "whole number"),
                            ("number", "number")):
            message = message.replace(f"invalid {kind} value", f"must be a {words}, not")
        raise InputError(f"{message}; --help lists all flags")


def positive(kind: type) -> Callable[[str], float]:
    """Returns an argparse type: a finite `kind`, int or float, above 0."""
    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is invalid: must be above 0")
        return value
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def choose_device(name: str) -> "torch.device":
    """Returns the device; auto selects CUDA, else MPS, else CPU. Raises InputError for a device that is missing."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(n for n in available if available[n]))
    if not available.get(name):
        found = " or ".join(n for n in available if available[n])
        raise InputError(f"--device {name} is not available on this machine: must be {found}, or auto")
    return torch.device(name)


# ------------------------------------------------------------------------------------- constants as flags

def constants_with_comments() -> dict[str, tuple]:
    """Returns {name: (value, comment)} for every constant of config.py, in its order."""
    source = inspect.getsource(config)
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            comment = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2].strip()
            found[name] = (getattr(config, name), comment)
    return found


def flag(name: str) -> str:
    """IMAGE_SIZE -> --image-size"""
    return "--" + name.lower().replace("_", "-")


def as_given(name: str, value) -> str:
    """Returns the flag that sets a constant: --image-size 64, --flip, --no-flip."""
    if isinstance(value, bool):
        return flag(name) if value else flag("NO_" + name)
    return f"{flag(name)} {value}"


def parse_constants(argv: Sequence[str] | None, program: str = "training.py",
                    description: str = "") -> tuple[SimpleNamespace, set[str]]:
    """Returns a run's constants, the flags `argv` over config.py, and the names that were given as flags.

    argv None: the command line. Raises InputError for an unknown flag or an invalid value.
    """
    parser = Parser(program, description)
    group = parser.add_argument_group("constants of config.py")
    for name, (value, comment) in constants_with_comments().items():
        if name in DERIVED:
            continue
        text = comment.replace("%", "%%") + (" [%(default)s]" if value != "" else "")
        if isinstance(value, bool):
            group.add_argument(flag(name), dest=name, default=value, help=text, action=argparse.BooleanOptionalAction)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[type(value)]
            group.add_argument(flag(name), dest=name, default=value, help=text, metavar=metavar, type=type(value))
    words = sys.argv[1:] if argv is None else argv
    c = with_derived(vars(parser.parse_args(words)))
    flags = {word.partition("=")[0] for word in words}
    check(c)
    return c, {name for name in vars(c) if flags & {flag(name), flag("NO_" + name)}}


def with_derived(values: dict) -> SimpleNamespace:
    """Returns the constants with the derived ones computed from the others."""
    return SimpleNamespace(**{"CLASSES": [], **values,
                              "TRANSFORMER_IN_CHANNELS": values["NUM_FRAMES"] * values["CHANNELS"]})


def check(c: SimpleNamespace) -> None:
    """Raises InputError, one line that says which values work, for an invalid constant."""
    for name, value in vars(c).items():
        if name in LIMITS:
            allowed, words = LIMITS[name]
        elif isinstance(value, (bool, str)) or name in DERIVED:
            continue
        elif name in MAY_BE_ZERO or name.startswith("LAMBDA_"):
            allowed, words = (lambda v: v >= 0), "0 or more"
        else:
            allowed, words = (lambda v: v > 0), "above 0"
        if (isinstance(value, float) and not math.isfinite(value)) or not allowed(value):
            shown = value if len(str(value)) <= 60 else str(value)[:57] + "..."
            raise InputError(f"{flag(name)} {shown} is invalid: must be {words}")
    if c.PATCH % 4 or c.IMAGE_SIZE % c.PATCH:
        fitting = [p for p in range(4, c.IMAGE_SIZE + 1, 4) if c.IMAGE_SIZE % p == 0]
        raise InputError(f"--patch {c.PATCH} is invalid for --image-size {c.IMAGE_SIZE}: must be one of "
                         f"{', '.join(map(str, fitting))}")
    if (c.DECAY_FROM_KIMG or c.DECAY_TO_KIMG) and c.DECAY_TO_KIMG <= c.DECAY_FROM_KIMG:
        raise InputError(f"--decay-to-kimg {c.DECAY_TO_KIMG:g} is invalid: must be above --decay-from-kimg "
                         f"{c.DECAY_FROM_KIMG:g}, or both 0")
    if c.BALANCE_CLASSES and c.FOLDERS != "classes":
        raise InputError("--balance-classes needs --folders classes")
    if c.FOLDERS == "clips" and c.NUM_FRAMES < 3:
        raise InputError(f"--num-frames {c.NUM_FRAMES} is invalid with --folders clips: must be 3 or more")
    if c.FOLDERS == "clips" and c.DYNAMICS_KIMG <= c.VAE_KIMG:
        raise InputError(f"--dynamics-kimg {c.DYNAMICS_KIMG:g} is invalid: must be above --vae-kimg {c.VAE_KIMG:g}")
    if c.MICRO_BATCH and c.BATCH_SIZE % c.MICRO_BATCH:
        fitting = [n for n in range(1, c.BATCH_SIZE + 1) if c.BATCH_SIZE % n == 0]
        raise InputError(f"--micro-batch {c.MICRO_BATCH} is invalid for --batch-size {c.BATCH_SIZE}: must be one of "
                         f"{', '.join(map(str, fitting))}")
    if c.TRANSFORMER_DIM % c.TRANSFORMER_HEADS:
        low = c.TRANSFORMER_DIM // c.TRANSFORMER_HEADS * c.TRANSFORMER_HEADS
        raise InputError(f"--transformer-dim {c.TRANSFORMER_DIM} is invalid: must be a multiple of the "
                         f"{c.TRANSFORMER_HEADS} heads, such as {max(low, c.TRANSFORMER_HEADS)} or "
                         f"{low + c.TRANSFORMER_HEADS}")
