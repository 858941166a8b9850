"""Trains VAE, TransformerParamTanh and Discriminator on a folder of images.

    python training.py --data ./images                        # runs/images; the same command continues the run
    python training.py --data ./images --image-size 64 --run small
    python training.py                                        # on the built-in demo set
    python training.py --data ./videos --folders clips        # clips: folders of frames, .gif, .webp, .mp4, ...
    torchrun --nproc-per-node 4 -- training.py --data ./images   # the same mathematics on 4 GPUs

Every constant of config.py is a flag; --help lists them.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import contextlib
import functools
import importlib.util
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

import command_line
import data
import demo_images
import distributed
import dynamics
import evaluate
import extractors
import joint
import latent_space
import metrics
import owls
import report
import rollouts
import run_state
import update
from command_line import InputError, RunError
from run_log import Log, NoLog, is_sample_step, print_line, print_start, write_samples
from training_step import training_step

# ------------------------------------------------------------------------------------- start

def prepare_constants(argv: Sequence[str] | None) -> tuple[SimpleNamespace, set[str]]:
    """Returns the run's constants with DATA and RUN filled in, and the names that were given as flags."""
    c, given = command_line.parse_constants(argv, "training.py", __doc__)
    if c.TENSORBOARD and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard, which is not installed: pip install -r "
                         "requirements-extras.txt")
    if c.DATA:
        root = Path(os.path.expanduser(c.DATA)).resolve()
        c.DATA = str(root)
        name = root.name.lstrip(".")
        if len(os.fsencode(name)) > command_line.RUN_BYTES:
            name = os.fsencode(name)[:command_line.RUN_BYTES].decode(errors="ignore")
        c.RUN = c.RUN or name or "images"
        if c.FOLDERS == "classes":
            c.CLASSES = data.find_classes(root, c.RUNS_DIR)
        runs = Path(c.RUNS_DIR).resolve()
        if (runs / c.RUN).is_relative_to(root) and (runs == root or not runs.is_relative_to(root)):
            raise InputError(f"the run's folder {runs / c.RUN} is among the images, and the next start would train on "
                             "its samples: give another --runs-dir")
    else:
        c.RUN = c.RUN or ("demo" if c.FOLDERS == "ignore" else f"demo_{c.FOLDERS}")
        if c.FOLDERS == "classes":
            c.CLASSES = sorted(owls.SKIES)
    return c, given


def check_batch_size(c: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """Raises InputError if a batch cannot be divided evenly among the ranks."""
    windows = ranks.size * dynamics.RENDERED_EVERY
    if c.FOLDERS == "clips" and c.MOTION_BATCH % windows:
        raise InputError(f"--motion-batch {c.MOTION_BATCH} is invalid for {ranks.size} processes: must be a multiple "
                         f"of {windows}")
    pieces = ranks.size * (c.MICRO_BATCH or 1)
    if c.FOLDERS == "clips" and (c.BATCH_SIZE // ranks.size % 2 or c.MICRO_BATCH % 2):
        raise InputError(f"--batch-size {c.BATCH_SIZE} and --micro-batch {c.MICRO_BATCH} are invalid with --folders "
                         f"clips: images per process and micro-batch must be even numbers")
    if c.BATCH_SIZE % pieces:
        low = c.BATCH_SIZE // pieces * pieces
        raise InputError(f"--batch-size {c.BATCH_SIZE} is invalid for {ranks.size} processes"
                         + (f" and micro-batches of {c.MICRO_BATCH}" if c.MICRO_BATCH else "")
                         + f": must be a multiple of {pieces}, such as {f'{low} or ' if low else ''}{low + pieces}")


def demo_folder(c: SimpleNamespace) -> Path:
    """Returns the folder of the demo set that a run without DATA trains on."""
    return Path(c.RUNS_DIR) / f"demo_{'clips' if c.FOLDERS == 'clips' else 'images'}_{c.IMAGE_SIZE}"


def load_data(c: SimpleNamespace) -> data.ImageSet:
    """Returns the images of DATA, or of the demo set; prints the skipped files."""
    root = c.DATA
    if not root:
        root = demo_folder(c)
        (demo_images.make_clips if c.FOLDERS == "clips" else demo_images.make)(root, size=c.IMAGE_SIZE)
    image_set = data.load_images_of_run(root, c)
    data.set_labels(image_set, c)
    for i, name in enumerate(c.CLASSES):
        if not (image_set.labels == i).any():
            raise InputError(f"class folder {data.printable(name)}: contains no usable image: remove it, or add images")
    return image_set


# ------------------------------------------------------------------------------------- during training

class StopSignal:
    """Catches SIGINT, SIGTERM and SIGHUP (a closed terminal): sets `number`, and the loop ends after its step. A second
    signal ends the process at once."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self):
        self.number, self.before = None, {}

    def __enter__(self):
        signals = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]      # Windows has no SIGHUP
        with contextlib.suppress(ValueError):              # raised off the main thread, which gets no signals
            self.before = {s: signal.signal(s, self.receive) for s in signals
                           if signal.getsignal(s) != signal.SIG_IGN}                            # nohup ignores SIGHUP
        return self

    def receive(self, number, _frame):
        self.number = number
        with contextlib.suppress(OSError):                 # the terminal may be gone; print is not reentrant
            os.write(2, b"\nstopping after this step, then saving")
            os.write(2, b"\n" if distributed.started_by_torchrun() else b"; a second signal ends at once\n")
        signal.signal(number, signal.SIG_IGN if distributed.started_by_torchrun() else signal.SIG_DFL)

    def __exit__(self, error, *_):
        # When a rank fails, torchrun sends SIGTERM to the others, which still have to print why they end.
        ending = error is not None and distributed.started_by_torchrun()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


class Evaluation:
    """Every EVALUATE_EVERY steps, scores EVALUATE_COUNT images of the averaged generator, always from the same noise,
    and writes the scores to metrics.jsonl. The lowest score makes best.pt: KID if the extractor's weights are installed
    (evaluate.py), else the sliced Wasserstein distance."""

    def __init__(self, state: run_state.State, c: SimpleNamespace, image_set: data.ImageSet):
        self.state, self.c, self.image_set = state, c, image_set
        self.real = None                          # real images and their features, loaded at the first use

    def step(self, log: Log, saver: run_state.Saver) -> None:
        """Called after each step."""
        counters = self.state.counters
        if self.c.EVALUATE_EVERY == 0 or counters["step"] % self.c.EVALUATE_EVERY:
            return
        self.state.count_skipped()
        if counters["skipped_in_a_row"]:
            return
        stage = counters["stage"]
        found = (self.scores() if stage != 2 else {}) | (self.of_motion() if stage > 1 else {})
        if not self.state.ranks.is_first or not found:
            return
        log.write({"step": counters["step"], **{f"evaluate_{name}": round(value, 4) for name, value in found.items()}})
        kind, best = next(kind for kind in ("kid", "sliced_wasserstein", "r8") if kind in found), counters["best"]
        better = best is None or best[0] != kind or found[kind] < best[1]
        print_line(f"step {counters['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                   + (" (the best so far: best.pt)" if better else ""))
        if better and math.isfinite(found[kind]):
            counters["best"] = [kind, found[kind]]
            saver.save_best()

    def scores(self) -> dict[str, float]:
        """Images and features are divided among the ranks; rank 0 computes the scores."""
        ranks, count = self.state.ranks, self.c.EVALUATE_COUNT
        if self.real is None:
            self.extractor = extractors.find_extractor(self.state.device)
            self.real = evaluate.sample_images(self.image_set, count)
            evaluate.print_count_warning(min(count, len(self.real)))
            self.held_out = data.read_batch(self.image_set, evaluate.shuffled(self.image_set.held_out)[:count // 4])
            self.features = self.gather_features(self.real.tensor_split(ranks.size)[ranks.rank])
        dim, image_of, labels = self.c.LATENT_DIM, None, evaluate.labels_of_sample(self.image_set, count, self.c)
        if labels is not None:
            labels = labels[torch.arange(count) % len(labels)]
        if self.state.counters["stage"] == 3:                      # frames of videos from noise
            dim, image_of = dim + self.c.MOTION_DIM, functools.partial(rollouts.late_frames, self.state.ema, self.c)
        made = evaluate.generate(self.state.ema, dim, count, self.c.SEED, share=(ranks.rank, ranks.size),
                                 image_of=image_of, labels=labels)
        features, made = self.gather_features(made), torch.cat(distributed.gather(ranks, made))
        return distributed.on_rank_0(ranks, lambda: {
            **evaluate.scores(made, self.real, self.extractor, self.features, features), **self.of_held_out(made)})

    def of_motion(self) -> dict[str, float]:
        """Returns the values of predicted frames and of videos, on rank 0."""
        if not self.state.ranks.is_first:
            return {}
        return rollouts.measure(self.state.ema, self.c, self.image_set, self.state.codes)

    def of_held_out(self, made: torch.Tensor) -> dict[str, float]:
        """Returns scores that compare held-out with training and generated images: the critic's overfitting, and KID of
        the reconstructions, which needs fewer images than the other scores."""
        if len(self.held_out) < evaluate.LEAST:
            return {}
        found = {"overfitting": metrics.overfitting(*(
            evaluate.critic_scores(self.state.critic, images) for images in (self.real, self.held_out, made)))}
        if self.extractor is not None:
            _, reconstructed = evaluate.encode_and_reconstruct(self.state.ema, self.held_out)
            found["reconstruction_kid"], _ = metrics.kernel_distance(self.extractor(reconstructed), self.features)
        return found

    def gather_features(self, images: torch.Tensor) -> torch.Tensor | None:
        """Returns the features of all ranks' images, or None without an extractor."""
        if self.extractor is None:
            return None
        return torch.cat(distributed.gather(self.state.ranks, self.extractor(images)))


def write_if_possible(state: run_state.State, *writers) -> None:
    """Calls the writers of samples and page on rank 0. A full disk does not stop the training."""
    try:
        for write in writers if state.ranks.is_first else ():
            write()
    except OSError as error:
        print_line(f"step {state.counters['step']}: cannot write samples or page ({error.strerror}); training goes on")


# ------------------------------------------------------------------------------------- loop

def train(state: run_state.State, c: SimpleNamespace, image_set: data.ImageSet, folder: Path) -> int:
    """Trains until STEPS, MINUTES or a signal: step, log, samples, scores, checkpoint. Returns the exit status."""
    counters, ranks, started = state.counters, state.ranks, time.monotonic()
    page = functools.partial(report.write, folder)

    with StopSignal() as stop:
        saver, evaluation = run_state.Saver(state, c, folder), Evaluation(state, c, image_set)
        log = Log(folder, c, counters["step"]) if ranks.is_first else NoLog()
        samples = (functools.partial(write_samples, state, c, image_set, folder / "samples"),
                   functools.partial(log.show_samples, counters))
        if counters["step"] == 0:
            write_if_possible(state, *samples, functools.partial(page, live=True))
            distributed.on_rank_0(ranks, lambda: bool(saver.save()))      # a rollback needs it
        signal_number = time_up = 0
        while counters["step"] < c.STEPS and not signal_number and not time_up:
            step = (training_step, dynamics.motion_step, joint.joint_step)[dynamics.stage(state, c) - 1]
            stage, values = counters["stage"], step(state, c, image_set)
            if counters["stage"] > stage:
                print_line(f"step {counters['step']}: stage {counters['stage']} of 3 has begun")
            if must_wait(state, c):
                state.count_skipped()
            if counters["step"] % c.LOG_EVERY == 0 or counters["skipped_in_a_row"]:
                values = distributed.reduce_values(ranks, values, update.REDUCTIONS)
            log.step(state, values)
            if counters["skipped_in_a_row"] >= c.NAN_PATIENCE:
                run_state.roll_back(state, c, saver, log)
                continue
            if is_sample_step(counters["step"], c.SAMPLE_EVERY):
                write_if_possible(state, *samples, functools.partial(page, live=True))
            evaluation.step(log, saver)
            # A signal or a clock reaches one rank; all ranks must act on it at the same step.
            signal_number, time_up, due = distributed.maximum(ranks, [
                stop.number or 0, int(ranks.is_first and 0 < 60 * c.MINUTES < time.monotonic() - started),
                int(ranks.is_first and saver.due())])
            if due:
                state.count_skipped()
                check_weights(state)
                if ranks.is_first and not counters["skipped_in_a_row"]:
                    saver.save()
        log.close()
        state.count_skipped()
        check_weights(state)
        file = finish(state, image_set, saver, stop) if ranks.is_first else folder      # rank 0 reports a failure
        if not signal_number and not is_sample_step(counters["step"], c.SAMPLE_EVERY):
            write_if_possible(state, *samples)
        write_if_possible(state, functools.partial(page, live=False))
        distributed.gather(ranks, None)          # torchrun ends all ranks when the first one exits
    print(f"step {counters['step']} of {c.STEPS}: checkpoint {file or 'not written'}; images and curves in "
          f"{folder / 'index.html'}")
    if c.FOLDERS == "clips" and counters["stage"] < 3:
        print(f"the run ended in stage {counters['stage']} of 3: motion is learned after {c.VAE_KIMG:g} thousand "
              f"images (--vae-kimg), videos after {c.DYNAMICS_KIMG:g} (--dynamics-kimg)")
    if counters["step"] < c.STEPS:
        print("the same command continues the run")
    if signal_number:
        return 128 + signal_number
    return 0 if file else 1


def must_wait(state: run_state.State, c: SimpleNamespace) -> bool:
    """Returns whether the step's skipped updates must be known before the next step; the same on all ranks. On CUDA,
    where reading them waits for the device: for a logged line, every NAN_PATIENCE steps, and while updates are skipped.
    """
    step = state.counters["step"]
    return bool(state.device.type != "cuda" or step % c.LOG_EVERY == 0 or step % c.NAN_PATIENCE == 0
                or state.counters["skipped_in_a_row"])


def check_weights(state: run_state.State) -> None:
    """Raises RankError if the ranks' weights differ."""
    distributed.check_equal(state.ranks, state.checksum(), f"their weights at step {state.counters['step']}")


def finish(state: run_state.State, image_set: data.ImageSet, saver: run_state.Saver, stop: StopSignal) -> Path | None:
    """Writes the run's last checkpoint, with the principal axes of its latent space. Returns the file or None."""
    if stop.number:                              # after a signal, end soon
        return saver.save_last(stop)
    mu = latent_space.encode_sample(state.ema.vae, image_set)
    return saver.save_last(stop, axes=latent_space.principal_axes(mu))


# ------------------------------------------------------------------------------------- command line

def start(argv: Sequence[str] | None) -> int:
    try:
        c, given = prepare_constants(argv)
    except InputError as error:                  # every rank finds the same error: one per machine prints it
        if distributed.local_rank() > 0:
            raise distributed.RankError("", error.status) from None
        raise
    device = distributed.own_device(command_line.choose_device(c.DEVICE))
    update.set_up(device, c)
    folder = Path(c.RUNS_DIR) / c.RUN
    with distributed.joined(device) as ranks, contextlib.ExitStack() as held:
        if not ranks.is_first:                   # only rank 0 prints
            held.enter_context(contextlib.redirect_stdout(held.enter_context(open(os.devnull, "w"))))
        distributed.on_rank_0(ranks, lambda: check_batch_size(c, ranks))
        distributed.on_rank_0(ranks, lambda: held.enter_context(run_state.run_lock(folder)))
        try:
            return train_in(folder, c, given, device, ranks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(out_of_memory_line(c)) from None


def train_in(folder: Path, c: SimpleNamespace, given: set[str], device: torch.device, ranks: distributed.Ranks) -> int:
    """Builds or resumes the run in its locked folder, loads the images, and trains. Returns the exit status."""
    state = run_state.resume_or_start(c, given, device, ranks)
    image_set = distributed.once_per_machine_first(ranks, lambda: load_data(c))
    names = "\n".join(image_set.paths).encode("utf-8", "surrogateescape")
    distributed.check_equal(ranks, zlib.crc32(names), "their images: give each machine the same folder")
    distributed.on_rank_0(ranks, lambda: run_state.describe_run(c, image_set, folder))
    if device.type == "cuda":
        data.keep_on_device(image_set, device, c.DEVICE_IMAGES)
    print_start(c, state, image_set)
    if state.counters["step"] >= c.STEPS:
        print(f"run {c.RUN} is at step {state.counters['step']} of {c.STEPS}: give a higher --steps to continue")
        return 0
    return train(state, c, image_set, folder)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def out_of_memory_line(c: SimpleNamespace) -> str:
    """Returns what to do when the device's memory is full."""
    peak = f"; {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB were in use" if torch.cuda.is_available() else ""
    size = c.MICRO_BATCH or c.BATCH_SIZE
    smaller = next(n for n in range(max(1, size // 2), 0, -1) if c.BATCH_SIZE % n == 0)
    return (f"out of memory{peak}: give --micro-batch {smaller}, the same mathematics in less memory, or "
            "--recompute-activations, or a smaller --image-size")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 2 bad input; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM; 1 otherwise: not finite
    after all rollbacks, out of memory, a disk that stays full."""
    return command_line.run_script("training.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
