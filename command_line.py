"""Flags made of config.py's constants, errors of one line, and the choice of device.

Every constant above config.py's last ruler is a flag: IMAGE_SIZE is `--image-size 64`, a boolean is `--flip` or
`--no-flip`. A flag overrules config.py.
"""

import argparse
import ast
import inspect
import math
import re
import sys
from types import SimpleNamespace

import torch

import config

DERIVED = ("TRANSFORMER_IN_CHANNELS",)
IMAGE_SIZES = range(32, 257, 16)

# What a constant may be, in words and as a test; the sign of the rest is checked by their type below.
LIMITS = {
    "IMAGE_SIZE": (lambda v: v in IMAGE_SIZES, "a multiple of 16 from 32 to 256"),
    "CHANNELS": (lambda v: v in (1, 3), "1 or 3"),
    "DEVICE": (lambda v: v in ("auto", "cuda", "mps", "cpu"), "auto, cuda, mps or cpu"),
    "BACKGROUND": (lambda v: 0 <= v <= 255, "0 to 255"),
    "NUM_WORKERS": (lambda v: v >= -1, "-1 (one a core), 0 or more"),
    "HELD_OUT_SHARE": (lambda v: 0 <= v <= 0.5, "0 to 0.5"),
    "ALPHA_INIT": (lambda v: 0 < v <= 100, "above 0, at most 100"),
    "ALPHA_SPAN": (lambda v: 1 <= v <= 100, "1 to 100"),
    "VIDEO_SHIFT": (lambda v: 0 <= v <= 0.5, "0 to 0.5"),
    "BETA_1": (lambda v: 0 <= v < 1, "0 or more, below 1"),
    "BETA_2": (lambda v: 0 <= v < 1, "0 or more, below 1"),
    "SEED": (lambda v: 0 <= v < 2 ** 63, "0 to 2^63 - 1"),
    "FEEDBACK_PROB": (lambda v: 0 <= v <= 1, "0 to 1"),
    "EVALUATE_COUNT": (lambda v: v >= 4, "4 or more"),
    "RUN": (lambda v: re.fullmatch(r"(?!\.)[^/\\\0]{0,100}", v) is not None,
            "a name of at most 100 characters without slashes or a dot in front"),
    "RUNS_DIR": (lambda v: v != "", "the name of a folder"),
}
MAY_BE_ZERO = ("STEPS", "MINUTES", "HELD_OUT_MIN", "LAMBDA_GP", "LAMBDA_DRIFT", "LAMBDA_REC", "LAMBDA_KL",
               "VIDEO_BRIGHTNESS", "VIDEO_NOISE", "EMA_HALF_LIFE_KIMG", "MICRO_BATCH", "MAX_ROLLBACKS",
               "EVALUATE_EVERY")


class InputError(Exception):
    """Something that the user gave can't be used; the message is one line that names it and the mend."""

    status = 2                  # of the process that ends by it


def constants_with_comments():
    """{name: (value, comment)} for every constant of config.py, in its order."""
    source = inspect.getsource(config)
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            comment = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2].strip()
            found[name] = (getattr(config, name), comment)
    return found


def flag(name):
    """IMAGE_SIZE -> --image-size"""
    return "--" + name.lower().replace("_", "-")


def no_flag(name):
    """FLIP -> --no-flip"""
    return "--no-" + flag(name).removeprefix("--")


def as_given(name, value):
    """How a user gives a constant this value: --image-size 64, --flip, --no-flip."""
    if isinstance(value, bool):
        return flag(name) if value else no_flag(name)
    return f"{flag(name)} {value}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors of one line, not a usage text and an exit; no abbreviations."""

    def __init__(self, program, description):
        super().__init__(prog=program, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message}; --help lists what is allowed")


def split(argv):
    """(a script's own flags, those behind -- that are training.py's); argv None: the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end], argv[end + 1:]


def positive(kind):
    """An argparse type: a `kind` above 0."""
    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} can't be: give a number above 0")
        return value
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def make_parser(program, description):
    """A Parser with a flag for each constant of config.py but the derived ones."""
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
    return parser


def with_derived(values):
    """A SimpleNamespace of constants, the derived ones computed from the others."""
    constants = SimpleNamespace(**values)
    constants.TRANSFORMER_IN_CHANNELS = constants.NUM_FRAMES * constants.CHANNELS
    return constants


def parse_constants(argv, program="training.py", description=""):
    """The constants of a run, from the flags `argv` over config.py; and the names that were given as flags.

    Raises InputError, one line, for an unknown flag and for a value that can't be.
    """
    parser = make_parser(program, description)
    constants = with_derived(vars(parser.parse_args(argv)))
    words = sys.argv[1:] if argv is None else argv
    flags = {word.partition("=")[0] for word in words}
    given = {name for name in vars(constants) if flags & {flag(name), no_flag(name)}}
    check(constants)
    return constants, given


def check(constants):
    """Raises InputError, one line that says what is allowed, for values that can't be."""
    for name, value in vars(constants).items():
        if name in LIMITS:
            allowed, words = LIMITS[name]
        elif isinstance(value, (bool, str)) or name in DERIVED:
            continue
        else:
            zero = name in MAY_BE_ZERO
            allowed, words = (lambda v: v >= 0, "0 or more") if zero else (lambda v: v > 0, "a number above 0")
        if (isinstance(value, float) and not math.isfinite(value)) or not allowed(value):
            sizes = f" ({', '.join(map(str, IMAGE_SIZES))})" if name == "IMAGE_SIZE" else ""
            raise InputError(f"{flag(name)} {value} can't be: give {words}{sizes}")
    c = constants
    if c.PATCH % 4 or c.IMAGE_SIZE % c.PATCH:
        fitting = [p for p in range(4, c.IMAGE_SIZE + 1, 4) if c.IMAGE_SIZE % p == 0]
        raise InputError(f"--patch {c.PATCH} does not fit --image-size {c.IMAGE_SIZE}: give one of "
                         f"{', '.join(map(str, fitting))}")
    if c.MICRO_BATCH and c.BATCH_SIZE % c.MICRO_BATCH:
        fitting = [n for n in range(1, c.BATCH_SIZE + 1) if c.BATCH_SIZE % n == 0]
        raise InputError(f"--micro-batch {c.MICRO_BATCH} does not divide --batch-size {c.BATCH_SIZE}: give one of "
                         f"{', '.join(map(str, fitting))}")
    if c.TRANSFORMER_DIM % c.TRANSFORMER_HEADS:
        low = c.TRANSFORMER_DIM // c.TRANSFORMER_HEADS * c.TRANSFORMER_HEADS
        raise InputError(f"--transformer-dim {c.TRANSFORMER_DIM} is no multiple of the {c.TRANSFORMER_HEADS} heads: "
                         f"give {max(low, c.TRANSFORMER_HEADS)} or {low + c.TRANSFORMER_HEADS}")


def choose_device(name):
    """auto -> CUDA where there is one, else MPS, else CPU. Raises InputError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(n for n in there if there[n]))
    if not there.get(name):
        found = " or ".join(n for n in there if there[n])
        raise InputError(f"--device {name} is not on this machine: give {found}, or auto")
    return torch.device(name)
