"""Trains VAE, TransformerParamTanh and Discriminator on a folder of images.

    python training.py --data ./images                        # runs/images; the same command again goes on from there
    python training.py --data ./images --image-size 64 --run small
    python training.py                                        # on the built-in demo set
    torchrun --nproc-per-node 4 -- training.py --data ./images   # the same mathematics on 4 GPUs

Every constant of config.py is a flag; --help lists them.
"""

import contextlib
import errno
import functools
import json
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch

import checkpoints
import command_line
import data
import demo_images
import distributed
import evaluate
import latent_space
import report
from errors import InputError
from run_log import Log, NoLog, is_sample_step, print_start, say, write_samples
from training_step import HOW_COMBINED, new_state, set_up, training_step

# Constants that the shapes of the weights follow from: a run can't go on with others.
SIZES = ("IMAGE_SIZE", "CHANNELS", "LATENT_DIM", "WIDTH", "ENCODER_WIDTH", "WIDTH_MAX", "NUM_FRAMES", "PATCH",
         "TRANSFORMER_DIM", "TRANSFORMER_HEADS", "TRANSFORMER_LAYERS", "ALPHA_PER_CHANNEL")


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


def describe_run(c, image_set, folder):
    """What is known at the start: config.json and the names of skipped files, and the folders for the rest."""
    for part in (folder / "samples", folder / "checkpoints"):
        part.mkdir(exist_ok=True)
    with checkpoints.atomic_write(folder / "config.json") as file:
        file.write(json.dumps(vars(c), indent=2).encode())
    data.write_skipped(image_set, folder / "skipped.txt")


def load_data(c):
    """The ImageSet of DATA, or of the demo set; skipped files are named."""
    root = c.DATA
    if not root:
        root = Path(c.RUNS_DIR) / f"demo_images_{c.IMAGE_SIZE}"
        try:
            demo_images.make(root, size=c.IMAGE_SIZE)
        except (ValueError, OSError) as error:
            raise InputError(f"the demo set can't be drawn: {error}; give --data or another --runs-dir") from None
    return data.load_images_of_run(root, c)


def check_continuing(c, given, saved):
    """Refuses to go on with other sizes or another folder; says what else has changed."""
    for name in SIZES:
        if saved.get(name) != getattr(c, name):
            raise InputError(f"run {c.RUN} was made with {name} {saved.get(name)}, not {getattr(c, name)}: give "
                             f"{command_line.as_given(name, saved.get(name))}, or --run NEWNAME for a new run")
    if "RUN" not in given and saved.get("DATA") != c.DATA:
        raise InputError(f"run {c.RUN} was made from {saved.get('DATA') or 'the demo set'}, not "
                         f"{c.DATA or 'the demo set'}: give --run NEWNAME")
    for name, old in saved.items():
        new = getattr(c, name, None)
        if new is not None and new != old and name not in ("RUNS_DIR", "INIT_FROM"):
            print(f"{name} is now {new}, was {old}")


def check_shares(c, ranks):
    """Raises InputError where the batch can't be dealt out to all processes in equal parts."""
    pieces = ranks.size * (c.MICRO_BATCH or 1)
    if c.BATCH_SIZE % pieces:
        low = c.BATCH_SIZE // pieces * pieces
        raise InputError(f"--batch-size {c.BATCH_SIZE} can't be dealt out to {ranks.size} processes"
                         + (f" in micro-batches of {c.MICRO_BATCH}" if c.MICRO_BATCH else "")
                         + f": give {f'{low} or ' if low else ''}{low + pieces}")


def continue_or_start(c, given, device, ranks):
    """The newest checkpoint's state, or a new one. Files are the first process's to read; the others hear from it."""
    state, folder = new_state(c, device, ranks), Path(c.RUNS_DIR) / c.RUN

    def find():
        found = checkpoints.newest(folder / "checkpoints", set_aside=True)
        if found is None:
            return weights_to_start_from(c) if c.INIT_FROM else None
        check_continuing(c, given, found[1]["constants"])
        return found

    found = distributed.on_first(ranks, find)
    if found is None:
        return state
    file, saved = found
    if "constants" not in saved:                 # weights alone, of INIT_FROM
        start_from(state, file, saved)
        return state
    load_state(state, file, saved)
    counters, before = state.counters, saved["constants"]
    print(f"continuing {folder} at step {counters['step']} from {file.name}")
    if counters["lr_scale"] != 1:
        if any(before.get(name) != getattr(c, name) for name in ("LEARNING_RATE", "CRITIC_LEARNING_RATE")):
            counters["lr_scale"] = 1.0           # whoever gives new rates means them as they are
        print(f"after {counters['rollbacks']} rollbacks (of {c.MAX_ROLLBACKS}) the learning rates are "
              f"{counters['lr_scale']:g} of LEARNING_RATE and CRITIC_LEARNING_RATE")
    state.set_learning_rates(c)
    return state


def weights_to_start_from(c):
    """(file, {part of the state: weights}) of INIT_FROM for a new run: its averaged generator, and its critic where the
    file has one."""
    file, saved = checkpoints.find(c.INIT_FROM)
    others = [name for name in SIZES if saved["constants"].get(name) != getattr(c, name)]
    if others:
        fitting = " ".join(command_line.as_given(name, saved["constants"].get(name)) for name in others)
        raise InputError(f"--init-from {c.INIT_FROM} was made with other sizes: give {fitting}")
    return file, {part: saved[source] for part, source in (("generator", "ema"), ("ema", "ema"), ("critic", "critic"))
                  if source in saved}


def start_from(state, file, weights):
    """Gives a new run's networks the weights of a file. Raises InputError where its networks are others."""
    try:
        for part in weights:
            getattr(state, part).load_state_dict(weights[part])
    except RuntimeError as error:
        raise InputError(f"{file}: its networks are not those of this version "
                              f"({str(error).splitlines()[0]}): use a file of this version") from None
    print(f"starting from {file}" + ("" if "critic" in weights else ", with a new critic: the file holds none"))


def load_state(state, file, saved):
    """Brings state to what a checkpoint holds. Raises InputError where its networks are others."""
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: its networks are not those of this version ({reason}): use the version that "
                              "wrote it, or --run NEWNAME for a new run") from None


class StopSignal:
    """SIGINT, SIGTERM or SIGHUP (a closed terminal) sets `number`; the loop ends after its step. A second one ends the
    process at once."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self):
        self.number, self.before = None, {}

    def __enter__(self):
        there = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]        # Windows has no SIGHUP
        with contextlib.suppress(ValueError):              # raised off the main thread, where signals are not ours
            self.before = {s: signal.signal(s, self.receive) for s in there
                           if signal.getsignal(s) != signal.SIG_IGN}                            # nohup ignores SIGHUP
        return self

    def receive(self, number, _frame):
        self.number = number
        with contextlib.suppress(OSError):                 # the terminal may be gone; print may be busy
            os.write(2, b"\nstopping after this step, then saving")
            os.write(2, b"\n" if distributed.started_by_torchrun() else b"; a second signal ends at once\n")
        signal.signal(number, signal.SIG_IGN if distributed.started_by_torchrun() else signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def mend(error):
    """What a user can do about an OSError of writing."""
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    return "make room on the disk" if full else "see to the permissions"


class Saver:
    """Writes a run's checkpoints: each CHECKPOINT_EVERY steps and each CHECKPOINT_MINUTES, and when told to. Of several
    processes the first has one.

    No regular checkpoint is written while the newest step was skipped, so every regular one is good. On a full disk
    the old ones stay, training goes on, and it is tried again after RETRY_SECONDS.
    """

    RETRY_SECONDS = 60
    PATIENCE_SECONDS = 600                       # at the end of a run, when the disk does not take its last checkpoint

    def __init__(self, state, c, folder):
        self.state, self.c, self.folder, self.saved_step = state, c, folder / "checkpoints", state.counters["step"]
        self.wait(60 * c.CHECKPOINT_MINUTES)

    def wait(self, seconds):
        self.next_time = time.monotonic() + seconds

    def due(self):
        """After each step: whether it is time to save."""
        counters = self.state.counters
        if counters["step"] % self.c.CHECKPOINT_EVERY == 0:
            self.wait(0)
        return time.monotonic() >= self.next_time and not counters["skipped_in_a_row"]

    def save(self, **more):
        """Saves now, whatever the time; returns the file, or None where the disk would not take it. more: what the
        file holds beside the state."""
        counters = self.state.counters
        try:
            file = checkpoints.save(self.folder, {**self.contents(), **more}, counters["step"],
                                    sound=not counters["skipped_in_a_row"])
        except OSError as error:
            if counters["step"] == 0:
                raise InputError(f"{self.folder}: no checkpoint can be written there ({error.strerror}): "
                                 f"{mend(error)}, or give another --runs-dir") from None
            say(f"step {counters['step']}: the checkpoint can't be written ({error.strerror}); the ones before "
                f"stay, and it is tried again: {mend(error)} of {self.folder}")
            self.wait(self.RETRY_SECONDS)
            return None
        self.wait(60 * self.c.CHECKPOINT_MINUTES)
        self.saved_step = counters["step"]
        return file

    def save_last(self, stop, **more):
        """save, again and again for PATIENCE_SECONDS where the disk will not take it, or until a signal: what was
        trained since the checkpoint before would be lost. Returns the file or None."""
        end = time.monotonic() + (0 if stop.number else self.PATIENCE_SECONDS)
        while (file := self.save(**more)) is None and time.monotonic() < end and stop.number is None:
            say(f"waiting up to {self.PATIENCE_SECONDS / 60:.0f} minutes for it; Ctrl-C gives up")
            for _ in range(self.RETRY_SECONDS):
                if stop.number is None:
                    time.sleep(1)
        if file is None:
            say(f"the steps after {self.saved_step} are lost, up to {self.state.counters['step']}")
        return file

    def contents(self):
        return {**self.state.state_dict(), "constants": dict(vars(self.c))}

    def save_best(self):
        """The state as best.pt, which nothing but a better one replaces."""
        try:
            checkpoints.save_as(self.folder / "best.pt", self.contents())
        except OSError as error:
            say(f"step {self.state.counters['step']}: best.pt can't be written ({error.strerror}); training goes on")


class Evaluation:
    """Each EVALUATE_EVERY steps the score of EVALUATE_COUNT pictures of the averaged generator, always from the same
    noise, goes to metrics.jsonl; the lowest makes best.pt. The score is KID where the extractor's weights are at hand
    (evaluate.py), else the sliced Wasserstein distance."""

    def __init__(self, state, c, image_set):
        self.state, self.c, self.image_set = state, c, image_set
        self.real = None                          # real images and their features, made when first asked for

    def step(self, log, saver):
        """After each step: scores where it is time to."""
        step = self.state.counters["step"]
        if self.c.EVALUATE_EVERY == 0 or step % self.c.EVALUATE_EVERY or self.state.counters["skipped_in_a_row"]:
            return
        found = self.scores()
        if not self.state.ranks.first:
            return
        log.write({"step": step, **{f"evaluate_{name}": round(value, 4) for name, value in found.items()}})
        kind = "kid" if "kid" in found else "sliced_wasserstein"
        best = self.state.counters["best"]
        better = best is None or best[0] != kind or found[kind] < best[1]
        say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            + (" (the best so far: best.pt)" if better else ""))
        if better and math.isfinite(found[kind]):
            self.state.counters["best"] = [kind, found[kind]]
            saver.save_best()

    def scores(self):
        """Pictures and features are shared out over the processes; the first makes numbers of them."""
        ranks, count = self.state.ranks, self.c.EVALUATE_COUNT
        if self.real is None:
            self.extractor = evaluate.find_extractor(self.state.device)
            self.real = evaluate.some(self.image_set, count)
            self.features = self.shared_features(self.real.tensor_split(ranks.size)[ranks.rank])
        made = evaluate.generate(self.state.ema, self.c.LATENT_DIM, count, self.c.SEED, share=(ranks.rank, ranks.size))
        features, made = self.shared_features(made), torch.cat(distributed.gathered(ranks, made))
        return distributed.on_first(ranks, lambda: evaluate.scores(made, self.real, self.extractor, self.features,
                                                                   features))

    def shared_features(self, images):
        """The features of all processes' images, or None without an extractor."""
        return self.extractor and torch.cat(distributed.gathered(self.state.ranks, self.extractor(images)))


class Lost(Exception):
    """Training went back MAX_ROLLBACKS times and is not finite again; the message is one line with what to try."""

    status = 1


def roll_back(state, c, saver, log):
    """Back to the last good checkpoint, with half the learning rates and new random draws; saved at once.

    Raises Lost where that was done MAX_ROLLBACKS times already.
    """
    counters, ranks = state.counters, state.ranks
    lost, rollbacks = counters["step"], counters["rollbacks"]

    def find():
        found = checkpoints.newest(saver.folder, sound=True)
        if rollbacks < c.MAX_ROLLBACKS and found is not None:
            return found
        where = (f"{found[0]} is the last good checkpoint. The same command goes on from it with" if found
                 else "there is no good checkpoint to go back to. Start a new --run with")
        rates = [counters["lr_scale"] * rate / 2 for rate in (c.LEARNING_RATE, c.CRITIC_LEARNING_RATE)]
        raise Lost(f"the last {counters['skipped_in_a_row']} updates up to step {lost} are not finite, after "
                   f"{rollbacks} rollbacks: {where} --learning-rate {rates[0]:.3g} --critic-learning-rate "
                   f"{rates[1]:.3g} --max-rollbacks {rollbacks + 3}; the values are in metrics.jsonl")

    load_state(state, *distributed.on_first(ranks, find))
    counters.update(rollbacks=rollbacks + 1, lr_scale=counters["lr_scale"] / 2)
    state.set_learning_rates(c)
    if ranks.first:
        checkpoints.delete_unsound(saver.folder)       # first: after a kill in between, the same thing is done again
        saver.save()
    log.back_to(counters["step"])
    say(f"step {lost}: {c.NAN_PATIENCE} updates in a row were not finite; back to step {counters['step']} with "
        f"{counters['lr_scale']:g} of the learning rates (rollback {counters['rollbacks']} of {c.MAX_ROLLBACKS})")


def train(state, c, image_set, folder):
    """The loop: step, log, samples, checkpoint, until STEPS, MINUTES or a signal. Returns the exit status."""
    counters, ranks, started = state.counters, state.ranks, time.monotonic()

    def show(*writers):
        try:
            for write in writers if ranks.first else ():
                write()
        except OSError as error:
            say(f"step {counters['step']}: samples and page can't be written ({error.strerror}); training goes on")

    def samples():
        write_samples(state, c, image_set, folder / "samples")

    def page(live=True):
        report.write(folder, live)

    def check_weights():
        distributed.check_equal(ranks, state.check_sum(), f"their weights at step {counters['step']}")

    with StopSignal() as stop:
        saver, evaluation = Saver(state, c, folder), Evaluation(state, c, image_set)
        log = Log(folder, c, counters["step"]) if ranks.first else NoLog()
        if counters["step"] == 0:
            show(samples, page)
            distributed.on_first(ranks, lambda: bool(saver.save()))      # a rollback needs one to go back to
        number = time_up = 0
        while counters["step"] < c.STEPS and not number and not time_up:
            values = training_step(state, c, image_set)
            state.count_skipped()
            if counters["step"] % c.LOG_EVERY == 0 or counters["skipped_in_a_row"]:
                values = distributed.combined(ranks, values, HOW_COMBINED)
            log.step(state, values)
            if counters["skipped_in_a_row"] >= c.NAN_PATIENCE:
                roll_back(state, c, saver, log)
                continue
            if is_sample_step(counters["step"], c.SAMPLE_EVERY):
                show(samples, page)
            evaluation.step(log, saver)
            # What a clock or a signal says to one process must be done by all at the same step.
            number, time_up, due = distributed.largest(ranks, [
                stop.number or 0, int(ranks.first and 0 < 60 * c.MINUTES < time.monotonic() - started),
                int(ranks.first and saver.due())])
            if due:
                check_weights()
                if ranks.first:
                    saver.save()
        log.close()
        check_weights()
        file = finish(state, image_set, saver, stop) if ranks.first else folder
        if not number and not is_sample_step(counters["step"], c.SAMPLE_EVERY):
            show(samples)
        show(functools.partial(page, live=False))
        distributed.wait_for_all(ranks)          # torchrun ends all when the first of them has left
    print(f"step {counters['step']} of {c.STEPS}: checkpoint {file or 'not written'}; pictures and curves in "
          f"{folder / 'index.html'}")
    if counters["step"] < c.STEPS:
        print("the same command again goes on from there")
    if number:
        return 128 + number
    return 0 if file else 1


def finish(state, image_set, saver, stop):
    """The run's last checkpoint, with the principal axes of its latent space; returns the file or None."""
    if stop.number:                              # whoever sent a signal waits for the end
        return saver.save_last(stop)
    mu = latent_space.encode_some(state.ema.vae, image_set)
    return saver.save_last(stop, axes=latent_space.principal_axes(mu))


def start(argv):
    try:
        c, given = prepare_constants(argv)
    except InputError as error:                  # all processes find the same: one a machine says it
        if distributed.local_rank() > 0:
            raise distributed.RankError("", error.status) from None
        raise
    device = distributed.own_device(command_line.choose_device(c.DEVICE))
    set_up(device, c)
    folder = Path(c.RUNS_DIR) / c.RUN
    with distributed.joined(device) as ranks, contextlib.ExitStack() as held:
        if not ranks.first:                      # the first process speaks for all
            held.enter_context(contextlib.redirect_stdout(held.enter_context(open(os.devnull, "w"))))
        distributed.on_first(ranks, lambda: check_shares(c, ranks))
        def refuse():
            raise InputError(f'{folder}: another training writes to this run; --run NEWNAME starts a run of its own')
        try:
            distributed.on_first(ranks, lambda: held.enter_context(checkpoints.lock(folder, refuse)))
        except OSError as error:
            raise InputError(f"{folder}: can't be written ({error.strerror}); give another --runs-dir") from None
        try:
            return train_in(folder, c, given, device, ranks)
        except (RuntimeError, MemoryError) as error:
            if (line := memory_line(error, c)) is None:
                raise
            print(f"training.py: {line}", file=sys.stderr)
            return 1


def train_in(folder, c, given, device, ranks):
    """Trains in a run's folder, which this process holds, or the first one. Returns the exit status."""
    state = continue_or_start(c, given, device, ranks)
    image_set = distributed.in_turn(ranks, lambda: load_data(c))
    names = "\n".join(image_set.paths).encode("utf-8", "surrogateescape")
    distributed.check_equal(ranks, zlib.crc32(names), "their images: give each machine the same folder")
    try:
        distributed.on_first(ranks, lambda: describe_run(c, image_set, folder))
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}): {mend(error)}, or give another "
                         "--runs-dir") from None
    print_start(c, state, image_set)
    if state.counters["step"] >= c.STEPS:
        print(f"run {c.RUN} is at step {state.counters['step']} of {c.STEPS}: give a higher --steps to go on")
        return 0
    return train(state, c, image_set, folder)


def memory_line(error, c):
    """What to do about an allocation that failed, or None where the error is another."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
        return None
    peak = f"; {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB were in use" if torch.cuda.is_available() else ""
    size = c.MICRO_BATCH or c.BATCH_SIZE
    smaller = next(n for n in range(max(1, size // 2), 0, -1) if c.BATCH_SIZE % n == 0)
    return (f"out of memory{peak}: give --micro-batch {smaller}, the same mathematics in less memory, or "
            "--recompute-activations, or a smaller --image-size")


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what), 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM, 1 for
    the rest: lost to NaN, out of memory, a disk that stays full."""
    try:
        return start(argv)
    except (InputError, Lost, distributed.RankError) as error:
        if str(error):                    # none: another process says it
            print(f"training.py: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"training.py: {error.filename or 'a file'}: {error.strerror}; what was saved before is whole",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:             # before the loop, whose own handler ends it after a step
        print("training.py: stopped; the same command reads on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
