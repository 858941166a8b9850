"""Files on disk: atomic writing, the lock of a folder, and checkpoints.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts; loading one cannot run code. A file is
complete under its name or absent: it is written to a temporary file, flushed to the disk and renamed.
"""

import contextlib
import errno
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock  # a requirement of torch

from errors import InputError

# torch is imported inside save_as and load: the processes that decode images import this file without torch.

FORMAT = 5       # increased when a field changes its meaning, or the networks their shapes
KEEP = 2         # good step files that are kept; best.pt and a user's own files are never deleted
UNSOUND = "_unsound"
STEP_FILE = re.compile(rf"step_\d{{8,}}({UNSOUND})?\.pt")
REQUIRED = {"format", "constants", "counters", "ema"}        # also in a file of weights for sharing
# Constants that older files lack, with the values that rebuild their networks.
OLDER = {"RECOMPUTE_ACTIVATIONS": False, "FINAL_WIDTH": 0, "BALANCED_UPSAMPLING": False, "NOISE_MAPS": False,
         "FOLDERS": "ignore", "CLIP_STRIDE": 1, "MOTION_DIM": 6, "FEEDBACK": 0.2, "PRIOR_WIDTH": 0,
         "CLASSES": [], "BALANCE_CLASSES": False, "FIT": "crop", "TENSORBOARD": False, "AUGMENT": 0.0}
SAFETENSORS, SAFETENSORS_PARTS = ".safetensors", ("ema", "axes")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)       # what a file system without locks answers


class DamagedCheckpoint(InputError):
    """A file that is missing, damaged, or no checkpoint: an older checkpoint may take its place."""


@contextlib.contextmanager
def atomic_write(file: str | Path) -> Iterator[BinaryIO]:
    """Yields a binary file object; its content replaces `file` at the end, or not at all if the body raises.

    Creates missing folders. Raises OSError, for example on a full disk; the temporary file is deleted then.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(file)           # a full disk does not name the file
        raise
    if os.name == "posix":                       # the new name reaches the disk only with its folder
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def lock(folder: str | Path, when_busy: Callable[[], None]) -> Iterator[None]:
    """Holds folder/lock for this process; the system releases it when the process ends, however it ends.

    Creates the folder. If another process holds the lock, calls when_busy, which may raise, and then waits. Without
    effect on a file system that has no locks. Raises OSError where the folder is not writable.
    """
    os.makedirs(folder, exist_ok=True)
    held = filelock.FileLock(os.path.join(folder, "lock"))
    try:
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            when_busy()
            held.acquire()
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        held.release()


# ------------------------------------------------------------------------------------- writing

def save(folder: str | Path, state: dict, step: int, sound: bool = True) -> Path:
    """Writes folder/step_00001000.pt, then deletes older step files. Returns the path.

    sound=False marks a state whose newest updates were not applied: step_00001000_unsound.pt. A run resumes from it,
    but a rollback skips it. Keeps the newest KEEP sound files, and the newest unsound file unless a sound one is newer.
    Raises OSError, for example on a full disk; the existing files then stay.
    """
    folder = Path(folder)
    file = folder / f"step_{step:08d}{'' if sound else UNSOUND}.pt"
    save_as(file, state)
    sound_files, unsound_files = step_files(folder, sound=True), step_files(folder, sound=False)
    superfluous = sound_files[:-KEEP] + unsound_files[:-1]
    superfluous += [f for f in unsound_files[-1:] if sound_files and f.name < sound_files[-1].name]
    for old in [*superfluous, *folder.glob("step_*.part")]:         # .part: left by a process killed while saving
        old.unlink(missing_ok=True)
    return file


def save_as(file: str | Path, state: dict) -> None:
    """Writes the dict as a checkpoint of this name. Raises OSError, for example on a full disk."""
    import torch
    buffer = io.BytesIO()                # torch.save into a file on a full disk raises an error without a reason
    torch.save({"format": FORMAT, **state}, buffer)
    with atomic_write(file) as handle:
        handle.write(buffer.getbuffer())


def save_safetensors(file: str | Path, weights: dict) -> None:
    """Writes weights for sharing (export.weights_only) as a safetensors file: tensors "ema.NAME" and "axes.NAME", and
    everything else as JSON in its metadata. Raises InputError without the package."""
    safetensors_torch = need_safetensors(file)
    tensors = {f"{part}.{name}": tensor.contiguous() for part in SAFETENSORS_PARTS
               for name, tensor in weights.get(part, {}).items()}
    others = {name: json.dumps(value) for name, value in weights.items() if name not in SAFETENSORS_PARTS}
    with atomic_write(file) as handle:
        handle.write(safetensors_torch.save(tensors, {"format": json.dumps(FORMAT), **others}))


def need_safetensors(file: str | Path):
    """Returns the module safetensors.torch. Raises InputError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(f"{file}: this kind of file needs the package safetensors, which is not installed: pip "
                         "install -r requirements-extras.txt") from None
    return safetensors.torch


def delete_unsound(folder: str | Path) -> None:
    """Deletes the unsound files of a checkpoint folder."""
    for file in step_files(folder, sound=False):
        file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- reading

def step_files(folder: str | Path, sound: bool | None = None) -> list[Path]:
    """Returns the step files of a checkpoint folder, oldest first; sound=True or False selects one kind."""
    files = sorted(file for file in Path(folder).glob("step_*.pt") if STEP_FILE.fullmatch(file.name))
    return files if sound is None else [file for file in files if file.stem.endswith(UNSOUND) != sound]


def load(file: str | Path, device="cpu") -> dict:
    """Returns the dict that was saved. Raises DamagedCheckpoint, or InputError for a file of another format.

    Compares the checksums of the zip container first, because torch.load does not notice a flipped byte.
    """
    import torch
    try:
        if Path(file).suffix == SAFETENSORS:
            damaged, state = None, load_safetensors(file, device)
        else:
            with zipfile.ZipFile(file) as container:
                damaged = container.testzip()
            state = None if damaged else torch.load(file, map_location=device, weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file}: no such file") from None
    except Exception as error:      # BadZipFile, RuntimeError, ValueError, EOFError, ...: depends on the damage
        raise DamagedCheckpoint(f"{file}: not a checkpoint or weights file of this project, or damaged "
                                f"({type(error).__name__})") from None
    if damaged:
        raise DamagedCheckpoint(f"{file}: damaged (the checksum of {damaged!a} is wrong)")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise DamagedCheckpoint(f"{file}: not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise InputError(f"{file}: format {state['format']}, but this version reads format {FORMAT}: use the version "
                         "that wrote the file")
    if REQUIRED - state.keys() or not isinstance(state["constants"], dict):
        raise DamagedCheckpoint(f"{file}: not a checkpoint of this project")
    state["constants"] = OLDER | state["constants"]
    return state


def load_safetensors(file: str | Path, device) -> dict:
    """Returns what save_safetensors was given. Raises InputError without the package, and other errors for a damaged
    file."""
    need_safetensors(file)
    import safetensors
    with safetensors.safe_open(file, "pt", device=str(device)) as content:
        state = {name: json.loads(text) for name, text in content.metadata().items()}
        for name in content.keys():                                   # noqa: SIM118  it is no dict
            part, _, rest = name.partition(".")
            state.setdefault(part, {})[rest] = content.get_tensor(name)
    return state


def newest(folder: str | Path, device="cpu", warn: Callable[[str], None] = print, set_aside: bool = False,
           sound: bool | None = None) -> tuple[Path, dict] | None:
    """Returns (file, state) of the newest readable step file of a folder, or None if it has no step file.

    Passes each damaged file's message to `warn` and goes on to the one before. set_aside renames damaged files to
    *.damaged, so that they do not count among the KEEP files. sound: as in step_files. Raises InputError, and renames
    nothing, if all files are damaged, or if one has another format: training on from an older file would lose it.
    """
    files, damaged = step_files(folder, sound), []
    for file in reversed(files):
        try:
            state = load(file, device)
        except DamagedCheckpoint as error:
            damaged.append(file)
            warn(f"{error}; trying the one before" if file != files[0] else str(error))
            continue
        for bad in damaged if set_aside else []:
            bad.rename(bad.with_name(bad.name + ".damaged"))
            warn(f"renamed {bad.name} to {bad.name}.damaged")
        return file, state
    if files:
        raise InputError(f"{folder}: none of its {len(files)} checkpoints is readable; nothing was changed. --run "
                         "NEWNAME starts a new run")
    return None


def find(path: str | Path, device="cpu", warn: Callable[[str], None] = print) -> tuple[Path, dict]:
    """Returns (file, state) for a run's folder, its checkpoint folder, or a single file. Raises InputError."""
    path = Path(path)
    if path.is_file():
        return path, load(path, device)
    if not path.is_dir():
        raise InputError(f"{path}: no such run or file")
    found = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path, device, warn)
    if found is None:
        raise InputError(f"{path}: contains no checkpoint yet; training.py writes one every CHECKPOINT_EVERY steps and "
                         "every CHECKPOINT_MINUTES")
    return found
