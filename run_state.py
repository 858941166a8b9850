"""The state of a run, and its life on disk: saving, resuming, starting from another run's weights, rollback."""

import contextlib
import copy
import errno
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import checkpoints
import command_line
import data
import distributed
import model_definitions
import random_keys
from command_line import InputError, RunError
from run_log import print_line

FUSED_ADAM = ("cpu", "cuda")   # devices on which fused Adam takes the finite-gradient verdict as a tensor

DECAY_END = 0.05               # share of the learning rates that is left at DECAY_TO_KIMG

# Constants that determine the weights' shapes and meaning: a run cannot resume with other values.
SIZES = ("IMAGE_SIZE", "CHANNELS", "LATENT_DIM", "PRIOR_WIDTH", "WIDTH", "ENCODER_WIDTH", "WIDTH_MAX", "FINAL_WIDTH",
         "BALANCED_UPSAMPLING", "NOISE_MAPS", "NUM_FRAMES", "PATCH", "TRANSFORMER_DIM", "TRANSFORMER_HEADS",
         "TRANSFORMER_LAYERS", "ALPHA_PER_CHANNEL", "FOLDERS", "MOTION_DIM")
CLASSES_SHOWN = 8              # names in a message


# ------------------------------------------------------------------------------------- state

@dataclass
class State:
    """What changes during training, where it is, and who else trains. A checkpoint holds PARTS and counters."""
    generator: model_definitions.Generator
    critic: model_definitions.Discriminator
    ema: model_definitions.Generator
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    device: torch.device
    ranks: distributed.Ranks
    skipped: torch.Tensor                       # (2,) int64: updates not applied; newest steps in a row with one
    ema_weight: torch.Tensor                    # of the current step (update.ema_weight)
    # Of a run on clips:
    motion_optimizer: torch.optim.Optimizer | None = None          # of TransformerParamTanh and prior, in stage 2
    pair_critics: nn.ModuleDict | None = None                      # Discriminators "near" and "far", in stage 3
    pair_critics_optimizer: torch.optim.Optimizer | None = None
    codes: tuple[torch.Tensor, torch.Tensor] | None = None         # mu and logvar of all frames, from stage 2 on
    graphs: dict = field(default_factory=dict)  # recorded CUDA graphs (update.run_recorded)
    step_end: torch.cuda.Event | None = None    # of the newest step (update.wait_for_the_step_before)
    counters: dict = field(default_factory=lambda: {"step": 0, "images_seen": 0, "rollbacks": 0, "lr_scale": 1.0,
                                                    "skipped_updates": 0, "skipped_in_a_row": 0, "best": None,
                                                    "augment": 0.0,     # share of changed images
                                                    "stage": 1})    # of a run on clips: the newest that has begun

    PARTS = ("generator", "critic", "ema", "generator_optimizer", "critic_optimizer")
    PARTS_OF_CLIPS = ("motion_optimizer", "pair_critics", "pair_critics_optimizer")

    @property
    def motion(self) -> torch.nn.Module:
        """The networks that motion_optimizer updates."""
        return torch.nn.ModuleList([self.generator.layer, self.generator.prior])

    def parts(self) -> list[str]:
        """Returns the names of the networks and optimizers in a checkpoint."""
        return [*self.PARTS, *(self.PARTS_OF_CLIPS if self.pair_critics else ())]

    def state_dict(self) -> dict:
        return {**{name: getattr(self, name).state_dict() for name in self.parts()}, "counters": dict(self.counters)}

    def load_state_dict(self, saved: dict) -> None:
        for name in self.parts():
            part = getattr(self, name)
            if name.startswith("pair_critics") and name not in saved:      # a file from before stage 3 existed
                continue
            part.load_state_dict(saved[name])
            for group in part.param_groups if name.endswith("optimizer") else ():   # the file may be another device's
                group.update(fused=part.defaults["fused"], capturable=part.defaults["capturable"])
        self.graphs.clear()                      # they hold the addresses of Adam's old averages
        self.codes = None
        self.counters.update(saved["counters"])
        self.skipped.copy_(torch.tensor([self.counters["skipped_updates"], self.counters["skipped_in_a_row"]]))

    def rng(self, c, purpose: str, critic_update: int = 0) -> torch.Generator:
        """Returns the torch.Generator of one purpose in the current step and critic update."""
        counters = self.counters
        return random_keys.torch_generator(c.SEED, purpose, counters["rollbacks"], counters["step"], critic_update)

    def count_skipped(self) -> None:
        """Reads the counters of skipped updates from the device, and waits for it."""
        self.counters["skipped_updates"], self.counters["skipped_in_a_row"] = self.skipped.tolist()

    def set_learning_rates(self, c) -> None:
        """Sets the constants' learning rates, times lr_scale, which rollbacks reduce."""
        self.graphs.clear()                      # they hold the old rates
        for group, rate in self.groups_and_rates(c):
            group.update(lr=rate * self.counters["lr_scale"], betas=(c.BETA_1, c.BETA_2))

    def decay_learning_rates(self, c) -> None:
        """Sets the learning rates of the current step, if they fall with the images seen."""
        if not c.DECAY_TO_KIMG:
            return
        for group, rate in self.groups_and_rates(c):
            self.set_rate(group, rate * self.learning_rate_scale(c))

    def learning_rate_scale(self, c) -> float:
        """Returns the factor of all constants' learning rates: lr_scale, and the decay if there is one."""
        return self.counters["lr_scale"] * (decay(c, self.counters["images_seen"]) if c.DECAY_TO_KIMG else 1)

    def set_rate(self, group: dict, rate: float) -> None:
        """Sets a learning rate that changes from step to step: on CUDA a tensor, which a recorded step reads."""
        if self.device.type != "cuda":
            group["lr"] = rate
        elif isinstance(group["lr"], torch.Tensor) and group["lr"].is_cuda:       # one from a file is on the CPU
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.full((), rate, device=self.device)

    def groups_and_rates(self, c) -> Iterator[tuple[dict, float]]:
        """Yields each of the optimizers' groups of parameters with its constant learning rate."""
        yield from zip(self.generator_optimizer.param_groups, generator_rates(c))
        yield self.critic_optimizer.param_groups[0], c.CRITIC_LEARNING_RATE
        if self.pair_critics:
            yield self.pair_critics_optimizer.param_groups[0], c.CRITIC_LEARNING_RATE

    def checksum(self) -> int:
        """Returns the CRC-32 of all weights, which must be equal on all ranks; 0 with a single process."""
        if self.ranks.size == 1:
            return 0
        models = filter(None, (self.generator, self.critic, self.pair_critics))
        parameters = [p for model in models for p in model.parameters()]
        return zlib.crc32(torch.cat([p.detach().flatten() for p in parameters]).cpu().numpy())


def generator_rates(c: SimpleNamespace) -> tuple[float, float]:
    """Returns the learning rates of VAE and prior, and of the layer."""
    return c.LEARNING_RATE, c.LEARNING_RATE * c.LAYER_RATE


def decay(c: SimpleNamespace, images_seen: int) -> float:
    """Returns the factor of the learning rates: 1 until DECAY_FROM_KIMG, then linear to DECAY_END at DECAY_TO_KIMG. It
    depends on the images seen alone, so that a longer run repeats the steps of a shorter one."""
    kimg = images_seen / 1000
    if kimg < c.DECAY_FROM_KIMG:
        return 1.0
    if kimg >= c.DECAY_TO_KIMG:
        return DECAY_END
    return 1 - (1 - DECAY_END) * (kimg - c.DECAY_FROM_KIMG) / (c.DECAY_TO_KIMG - c.DECAY_FROM_KIMG)


def new_state(c: SimpleNamespace, device: torch.device, ranks: distributed.Ranks = distributed.SINGLE) -> State:
    """Returns networks and optimizers at step 0, a function of SEED. torch's global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_keys.torch_generator(c.SEED, "weights").initial_seed())
        generator, critic = model_definitions.build(c)
        pair_critics = model_definitions.build_pair_critics(c)
    generator, critic = (m.to(device, memory_format=torch.channels_last) for m in (generator, critic))
    generator.layer.to_tokens.to(memory_format=torch.contiguous_format)    # rearranged in each step, twice as fast
    ema = copy.deepcopy(generator).requires_grad_(False)

    def adam(models, rates, beta_1=c.BETA_1):                 # fused: twice as fast as the default, on the CPU too
        groups = [{"params": model.parameters(), "lr": rate} for model, rate in zip(models, rates)]
        return torch.optim.Adam(groups, betas=(beta_1, c.BETA_2), fused=device.type in FUSED_ADAM,
                                capturable=device.type == "cuda")

    vae_and_prior = torch.nn.ModuleList([generator.vae, generator.prior])
    state = State(generator, critic, ema, adam([vae_and_prior, generator.layer], generator_rates(c)),
                  adam([critic], [c.CRITIC_LEARNING_RATE]), device, ranks,
                  skipped=torch.zeros(2, dtype=torch.int64, device=device),
                  ema_weight=torch.ones((), dtype=torch.float64, device=device if device.type == "cuda" else "cpu"))
    if pair_critics:
        state.pair_critics = pair_critics.to(device, memory_format=torch.channels_last)
        state.pair_critics_optimizer = adam([pair_critics], [c.CRITIC_LEARNING_RATE])
        # beta_1 0.9: stage 2 has no second network to overshoot.
        state.motion_optimizer = adam([state.motion], [c.MOTION_LEARNING_RATE], beta_1=0.9)
    return state


# ------------------------------------------------------------------------------------- the run's folder

def describe_run(c: SimpleNamespace, image_set: data.ImageSet, folder: Path) -> None:
    """Writes config.json and the names of skipped files, and creates the run's folders. Raises InputError."""
    try:
        for part in (folder / "samples", folder / "checkpoints"):
            part.mkdir(exist_ok=True)
        with checkpoints.atomic_write(folder / "config.json") as file:
            file.write(json.dumps(vars(c), indent=2).encode())
        data.write_skipped(image_set, folder / "skipped.txt")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}): {advice(error)}, or give another "
                         "--runs-dir") from None


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process, and deletes it at the end if nothing was written. Raises InputError."""
    def refuse():
        raise InputError(f"{folder}: another training writes to this run; --run NEWNAME starts a new run")

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(checkpoints.lock(folder, refuse))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --runs-dir") from None
        try:
            yield
        finally:
            if [file.name for file in folder.iterdir()] in ([], ["lock"]):
                with contextlib.suppress(OSError):
                    (folder / "lock").unlink(missing_ok=True)
                    folder.rmdir()


# ------------------------------------------------------------------------------------- resuming

def resume_or_start(c: SimpleNamespace, given: Sequence[str], device: torch.device,
                    ranks: distributed.Ranks) -> State:
    """Returns the state of the run's newest checkpoint, or a new one. Only rank 0 reads files. given: the names of the
    constants that were given as flags. Raises InputError."""
    state, folder = new_state(c, device, ranks), Path(c.RUNS_DIR) / c.RUN

    def find():
        found = checkpoints.newest(folder / "checkpoints", set_aside=True)
        if found is None:
            mention_runs_on_the_same_images(c, folder)
            return initial_weights(c) if c.INIT_FROM else None
        check_constants(c, given, found[1]["constants"], found[1]["counters"]["images_seen"])
        return found

    found = distributed.on_rank_0(ranks, find)
    if found is None:
        return state
    file, saved = found
    if "constants" not in saved:                 # the weights of INIT_FROM
        load_initial_weights(state, file, saved)
        return state
    load_checkpoint(state, file, saved)
    counters, before = state.counters, saved["constants"]
    print(f"continuing {folder} at step {counters['step']} from {file.name}")
    if counters["lr_scale"] != 1:
        if any(before.get(name) != getattr(c, name) for name in ("LEARNING_RATE", "CRITIC_LEARNING_RATE")):
            counters["lr_scale"] = 1.0           # new rates apply as they are given
        print(f"after {counters['rollbacks']} rollbacks (of {c.MAX_ROLLBACKS}) the learning rates are "
              f"{counters['lr_scale']:g} of LEARNING_RATE and CRITIC_LEARNING_RATE")
    state.set_learning_rates(c)
    return state


def mention_runs_on_the_same_images(c: SimpleNamespace, folder: Path) -> None:
    """Prints the runs that a new run may have been meant to continue: the data folder has perhaps another name now."""
    known = {}
    for config in sorted(folder.parent.glob("*/config.json")) if c.DATA else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            before = json.loads(config.read_text()).get("DATA")
            if before and before != c.DATA and (sizes := data.cached_sizes(before, c)):
                known[config.parent] = sizes
    found = data.file_sizes(c.DATA, c) if known else None          # listed once: a folder may have a million files
    for run in (run for run, sizes in known.items() if sizes == found):
        print(f"{run} was trained on the same images: --run {run.name} continues it")


def other_sizes(c: SimpleNamespace, saved: dict) -> tuple[list[str], str]:
    """Returns the names of SIZES that a checkpoint's constants `saved` have with other values, and these as flags. A
    file without a prior, of an earlier version, fits any PRIOR_WIDTH."""
    others = [name for name in SIZES if saved.get(name) != getattr(c, name)
              and not (name == "PRIOR_WIDTH" and saved.get(name) == 0)]
    return others, " ".join(command_line.as_given(name, saved.get(name)) for name in others)


def check_constants(c: SimpleNamespace, given: Sequence[str], saved: dict, images_seen: int) -> None:
    """Raises InputError if a run was made with other sizes or another folder. Prints what else has changed."""
    others, fitting = other_sizes(c, saved)
    if others:
        made = ", ".join(f"{name} {saved.get(name)}, not {getattr(c, name)}" for name in others)
        raise InputError(f"run {c.RUN} was made with {made}: give {fitting}, or --run NEWNAME for a new run")
    if saved["CLASSES"] != c.CLASSES:
        new, gone = (sorted(set(a) - set(b)) for a, b in ((c.CLASSES, saved["CLASSES"]), (saved["CLASSES"], c.CLASSES)))
        changes = [f"{what} {class_names(names)}" for what, names in (("without", new), ("with", gone)) if names]
        raise InputError(f"run {c.RUN} was trained {' and '.join(changes)}: give it the same class folders, or --run "
                         f"NEWNAME --init-from {Path(c.RUNS_DIR) / c.RUN} for a new run from its weights")
    if saved["FIT"] != c.FIT:
        raise InputError(f"run {c.RUN} was made with --fit {saved['FIT']}: give it again, or --run NEWNAME for a new "
                         "run")
    if saved["PRIOR_WIDTH"] == 0:
        raise InputError(f"run {c.RUN} was made by an earlier version, without a prior: --run NEWNAME --init-from "
                         f"{Path(c.RUNS_DIR) / c.RUN} starts a new run from its weights")
    for stage, name in ((2, "VAE_KIMG"), (3, "DYNAMICS_KIMG")) if saved["FOLDERS"] == "clips" else ():
        if images_seen >= 1000 * saved[name] and saved[name] != getattr(c, name):
            raise InputError(f"{command_line.flag(name)} {getattr(c, name):g} is invalid: stage {stage} of run {c.RUN} "
                             f"has begun: must be {saved[name]:g}")
    before, now = saved.get("DATA") or "the demo set", c.DATA or "the demo set"
    if "RUN" not in given and before != now:
        known = data.cached_sizes(saved["DATA"], c) if saved.get("DATA") and c.DATA else None
        found = data.file_sizes(c.DATA, c) if known else None
        if known is None or known != found:
            reason = "images cannot be compared"
            if known:
                both, either = known.items() & found.items(), known.items() | found.items()
                reason = f"{len(both):,} of {len(either):,} images are in both"
            raise InputError(f"run {c.RUN} was made from {before}, not {now} ({reason}): --run {c.RUN} continues it "
                             "all the same, --run NEWNAME starts a new run")
    for name, old in saved.items():
        new = getattr(c, name, None)
        if new is not None and new != old and name not in ("RUNS_DIR", "INIT_FROM"):
            print(f"{name} is now {new}, was {old}")


def class_names(names: Sequence[str]) -> str:
    """Returns the names of classes in words, at most CLASSES_SHOWN of them."""
    more = f" and {len(names) - CLASSES_SHOWN:,} more" if len(names) > CLASSES_SHOWN else ""
    return f"the class{'es' if len(names) > 1 else ''} {', '.join(map(data.printable, names[:CLASSES_SHOWN]))}{more}"


def initial_weights(c: SimpleNamespace) -> tuple[Path, dict]:
    """Returns the file of INIT_FROM and {part of the state: weights}: the averaged generator, and the critic if the
    file has one. Raises InputError."""
    file, saved = checkpoints.find(c.INIT_FROM)
    constants = saved["constants"]
    if "clips" not in (c.FOLDERS, constants["FOLDERS"]):                  # classes are learned anew
        constants = constants | {"FOLDERS": c.FOLDERS}
    others, fitting = other_sizes(c, constants)
    if "FOLDERS" in others:
        raise InputError(f"--init-from {c.INIT_FROM} was trained with {fitting}: must be a run with --folders "
                         f"{c.FOLDERS}")
    if others:
        raise InputError(f"--init-from {c.INIT_FROM} was made with other sizes: give {fitting}")
    return file, {part: saved[source] for part, source in (("generator", "ema"), ("ema", "ema"), ("critic", "critic"))
                  if source in saved}


def load_initial_weights(state: State, file: Path, weights: dict) -> None:
    """Loads the weights of a file into a new run's networks. Raises InputError if its networks differ."""
    try:
        for part in weights:
            model = getattr(state, part)
            new = {name: weight for name, weight in model.state_dict().items() if name.startswith("prior.")}
            old = {name: weight for name, weight in weights[part].items() if name != "prior.of_class.weight"}
            model.load_state_dict(new | old)                     # files of earlier versions have no prior
    except RuntimeError as error:
        raise InputError(f"{file}: its networks differ from this version's ({str(error).splitlines()[0]}): use a file "
                         "of this version") from None
    print(f"starting from {file}" + ("" if "critic" in weights else ", with a new critic: the file has none"))


def load_checkpoint(state: State, file: Path, saved: dict) -> None:
    """Loads a checkpoint into the state. Raises InputError if its networks differ."""
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{file}: its networks differ from this version's ({str(error).splitlines()[0]}): use the "
                         "version that wrote the file, or --run NEWNAME for a new run") from None


# ------------------------------------------------------------------------------------- saving

class Saver:
    """Writes a run's checkpoints on rank 0: every CHECKPOINT_EVERY steps, every CHECKPOINT_MINUTES, and on request.

    While the newest step was skipped, no regular checkpoint is written, so every regular one is good. On a full disk
    the old files stay, training goes on, and the Saver tries again after RETRY_SECONDS.
    """

    RETRY_SECONDS = 60
    PATIENCE_SECONDS = 600                       # at the end of a run, if the disk is full

    def __init__(self, state: State, c: SimpleNamespace, folder: Path):
        self.state, self.c, self.folder, self.saved_step = state, c, folder / "checkpoints", state.counters["step"]
        self.save_in(60 * c.CHECKPOINT_MINUTES)

    def save_in(self, seconds: float) -> None:
        self.next_time = time.monotonic() + seconds

    def due(self) -> bool:
        """Returns, after each step, whether it is time to save."""
        counters = self.state.counters
        if counters["step"] % self.c.CHECKPOINT_EVERY == 0:
            self.save_in(0)
        return time.monotonic() >= self.next_time and not counters["skipped_in_a_row"]

    def save(self, **more) -> Path | None:
        """Saves now, with `more` beside the state. Returns the file, or None if it cannot be written."""
        counters = self.state.counters
        try:
            file = checkpoints.save(self.folder, {**self.contents(), **more}, counters["step"],
                                    sound=not counters["skipped_in_a_row"])
        except OSError as error:
            if counters["step"] == 0:
                raise InputError(f"{self.folder}: cannot write checkpoints ({error.strerror}): {advice(error)}, or "
                                 "give another --runs-dir") from None
            print_line(f"step {counters['step']}: cannot write the checkpoint ({error.strerror}); the earlier ones "
                       f"stay. Trying again later: {advice(error)} of {self.folder}")
            self.save_in(self.RETRY_SECONDS)
            return None
        self.save_in(60 * self.c.CHECKPOINT_MINUTES)
        self.saved_step = counters["step"]
        return file

    def save_last(self, stop, **more) -> Path | None:
        """Saves at the end of a run; on a full disk tries for PATIENCE_SECONDS, or until stop.number is set by a
        signal. Returns the file or None."""
        end = time.monotonic() + (0 if stop.number else self.PATIENCE_SECONDS)
        while (file := self.save(**more)) is None and time.monotonic() < end and stop.number is None:
            print_line(f"waiting up to {self.PATIENCE_SECONDS / 60:.0f} minutes for space; Ctrl-C gives up")
            for _ in range(self.RETRY_SECONDS):
                if stop.number is None:
                    time.sleep(1)
        if file is None:
            print_line(f"the steps from {self.saved_step} to {self.state.counters['step']} are lost")
        return file

    def save_best(self) -> None:
        """Saves as best.pt, which only a better score replaces."""
        try:
            checkpoints.save_as(self.folder / "best.pt", self.contents())
        except OSError as error:
            print_line(f"step {self.state.counters['step']}: cannot write best.pt ({error.strerror}); training goes on")

    def contents(self) -> dict:
        return {**self.state.state_dict(), "constants": dict(vars(self.c))}


def advice(error: OSError) -> str:
    """Returns what a user can do about a failed write."""
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    return "make room on the disk" if full else "check the permissions"


def roll_back(state: State, c: SimpleNamespace, saver: Saver, log) -> None:
    """Returns to the last good checkpoint, with half the learning rates and new random draws, and saves at once.

    Raises RunError after MAX_ROLLBACKS.
    """
    counters, ranks = state.counters, state.ranks
    lost, rollbacks = counters["step"], counters["rollbacks"]

    def find():
        found = checkpoints.newest(saver.folder, sound=True)
        if rollbacks < c.MAX_ROLLBACKS and found is not None:
            return found
        continue_with = (f"{found[0]} is the last good checkpoint. The same command continues from it with" if found
                         else "there is no good checkpoint to return to. Start a new --run with")
        rates = [counters["lr_scale"] * rate / 2 for rate in (c.LEARNING_RATE, c.CRITIC_LEARNING_RATE)]
        raise RunError(f"the last {counters['skipped_in_a_row']} updates up to step {lost} are not finite, after "
                       f"{rollbacks} rollbacks: {continue_with} --learning-rate {rates[0]:.3g} --critic-learning-rate "
                       f"{rates[1]:.3g} --max-rollbacks {rollbacks + 3}; metrics.jsonl has the values")

    load_checkpoint(state, *distributed.on_rank_0(ranks, find))
    counters.update(rollbacks=rollbacks + 1, lr_scale=counters["lr_scale"] / 2)
    state.set_learning_rates(c)
    if ranks.is_first:
        checkpoints.delete_unsound(saver.folder)     # first: a kill between the two lines repeats the rollback
        saver.save()
    log.back_to(counters["step"])
    print_line(f"step {lost}: {c.NAN_PATIENCE} updates in a row were not finite; back to step {counters['step']} "
               f"with {counters['lr_scale']:g} of the learning rates (rollback {counters['rollbacks']} of "
               f"{c.MAX_ROLLBACKS})")
