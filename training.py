"""Trains VAE, TransformerParamTanh and Discriminator on a folder of images.

    python training.py --data ./images                        # runs/images; the same command again goes on from there
    python training.py --data ./images --image-size 64 --run small
    python training.py                                        # on the built-in demo set

Every constant of config.py is a flag; --help lists them.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import checkpoints
import command_line
import data
import demo_images
from checkpoints import CheckpointError
from command_line import InputError
from data import DataError
from run_log import Log, is_sample_step, print_start, write_samples
from training_step import new_state, set_up, training_step

# Constants that the shapes of the weights follow from: a run can't go on with others.
SIZES = ("IMAGE_SIZE", "CHANNELS", "LATENT_DIM", "WIDTH", "WIDTH_MAX", "NUM_FRAMES", "PATCH", "TRANSFORMER_DIM",
         "TRANSFORMER_HEADS", "TRANSFORMER_LAYERS", "ALPHA_PER_CHANNEL")


# ------------------------------------------------------------------------------------- start

def prepare_constants(argv):
    """The run's constants with DATA and RUN filled in, and the names that were given as flags."""
    c, given = command_line.parse_constants(argv, "training.py", __doc__)
    if c.DATA:
        root = Path(os.path.expanduser(c.DATA)).resolve()
        c.DATA = str(root)
        c.RUN = c.RUN or root.name.lstrip(".")[:100] or "images"
        runs = Path(c.RUNS_DIR).resolve()
        if (runs / c.RUN).is_relative_to(root) and (runs == root or not runs.is_relative_to(root)):
            raise InputError(f"the run's folder {runs / c.RUN} lies among the images, where the next start would train "
                             "on its samples: give another --runs-dir")
    else:
        c.RUN = c.RUN or "demo"
    return c, given


def make_run_folder(c, image_set):
    """The run's folder with what is known at the start: config.json and the names of skipped files."""
    folder = Path(c.RUNS_DIR) / c.RUN
    try:
        for part in (folder / "samples", folder / "checkpoints"):
            part.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically(folder / "config.json", lambda f: f.write(json.dumps(vars(c), indent=2).encode()))
        data.write_skipped(image_set, folder / "skipped.txt")
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); give another --runs-dir") from None
    return folder


def load_data(c):
    """The ImageSet of DATA, or of the demo set; skipped files are named."""
    root = c.DATA
    if not root:
        root = Path(c.RUNS_DIR) / f"demo_images_{c.IMAGE_SIZE}"
        try:
            demo_images.make(root, size=c.IMAGE_SIZE)
        except (ValueError, OSError) as error:
            raise InputError(f"the demo set can't be drawn: {error}; give --data or another --runs-dir") from None
    image_set = data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, Path(c.RUNS_DIR) / ".cache", c.BACKGROUND,
                                 c.NUM_WORKERS, c.HELD_OUT_SHARE, c.HELD_OUT_MIN, leave_out=c.RUNS_DIR)
    for line in data.summary_lines(image_set):
        print(line)
    return image_set


def check_continuing(c, given, saved):
    """Refuses to go on with other sizes or another folder; says what else has changed."""
    for name in SIZES:
        if saved[name] != getattr(c, name):
            raise InputError(f"run {c.RUN} was made with {name} {saved[name]}, not {getattr(c, name)}: give "
                             f"{command_line.as_given(name, saved[name])}, or --run NEWNAME for a new run")
    if "RUN" not in given and saved["DATA"] != c.DATA:
        raise InputError(f"run {c.RUN} was made from {saved['DATA'] or 'the demo set'}, not "
                         f"{c.DATA or 'the demo set'}: give --run NEWNAME")
    for name, old in saved.items():
        new = getattr(c, name, None)
        if new is not None and new != old and name != "RUNS_DIR":
            print(f"{name} is now {new}, was {old}")


def continue_or_start(c, given, device):
    """The newest checkpoint's state, or a new one."""
    state, folder = new_state(c, device), Path(c.RUNS_DIR) / c.RUN
    found = checkpoints.newest(folder / "checkpoints", device, set_aside=True)
    if found is None:
        return state
    file, saved = found
    check_continuing(c, given, saved["constants"])
    state.load_state_dict(saved)
    for optimizer, rate in ((state.generator_optimizer, c.LEARNING_RATE),
                            (state.critic_optimizer, c.CRITIC_LEARNING_RATE)):
        optimizer.param_groups[0].update(lr=rate, betas=(c.BETA_1, c.BETA_2))
    print(f"continuing {folder} at step {state.counters['step']} from {file.name}")
    return state


def cut_metrics(file, step):
    """Drops lines after `step`, which the continued run will make again, and a last line that was not finished."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
    checkpoints.write_atomically(file, lambda handle: handle.write("".join(kept).encode()))


class StopSignal:
    """SIGINT or SIGTERM sets `number`; the loop ends after its step. A second one ends the process at once."""

    def __init__(self):
        self.number, self.before = None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):              # raised off the main thread, where signals are not ours
            self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, _frame):
        os.write(2, b"\nstopping after this step, then saving; a second signal ends at once\n")   # print may be busy
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(state, c, image_set, folder):
    """The loop: step, log, samples, checkpoint, until STEPS, MINUTES or a signal. Returns the exit status."""
    counters, samples = state.counters, folder / "samples"

    def save():
        saved = {**state.state_dict(), "constants": dict(vars(c))}
        return checkpoints.save(folder / "checkpoints", saved, counters["step"])

    with StopSignal() as stop:
        if counters["step"] == 0:
            write_samples(state, c, image_set, samples)
        log = Log(folder, c, counters["step"])
        last_saved, due, skipped = log.started, False, counters["skipped_updates"]
        while counters["step"] < c.STEPS and stop.number is None:
            if c.MINUTES and time.monotonic() - log.started > 60 * c.MINUTES:
                break
            log.step(state, training_step(state, c, image_set))
            if is_sample_step(counters["step"], c.SAMPLE_EVERY):
                write_samples(state, c, image_set, samples)
            due = due or counters["step"] % c.CHECKPOINT_EVERY == 0 or (
                time.monotonic() - last_saved > 60 * c.CHECKPOINT_MINUTES)
            if due:
                skipped_before, skipped = skipped, state.read_counters()["skipped_updates"]
                if skipped == skipped_before:                   # so every regular checkpoint is a good one
                    save()
                    due, last_saved = False, time.monotonic()
        log.close()
        file = save()
        # Whoever sent a signal waits for the end.
        if stop.number is None and not is_sample_step(counters["step"], c.SAMPLE_EVERY):
            write_samples(state, c, image_set, samples)
    print(f"step {counters['step']} of {c.STEPS}: checkpoint {file}, pictures in {samples}")
    if counters["step"] < c.STEPS:
        print("the same command again goes on from there")
    return 0 if stop.number is None else 128 + stop.number


def start(argv):
    c, given = prepare_constants(argv)
    device = command_line.choose_device(c.DEVICE)
    set_up(device, c)
    state = continue_or_start(c, given, device)
    image_set = load_data(c)
    folder = make_run_folder(c, image_set)
    print_start(c, state, image_set)
    cut_metrics(folder / "metrics.jsonl", state.counters["step"])
    if state.counters["step"] >= c.STEPS:
        print(f"run {c.RUN} has its {c.STEPS} steps: give a higher --steps to go on")
        return 0
    return train(state, c, image_set, folder)


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what), 130 and 143 after SIGINT and SIGTERM."""
    try:
        return start(argv)
    except (InputError, DataError, CheckpointError) as error:
        print(f"training.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"training.py: {error.filename or 'a file'}: {error.strerror}; what was saved before is whole",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:             # before the loop, whose own handler ends it after a step
        print("training.py: stopped; the same command reads on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
