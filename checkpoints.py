"""Checkpoints on disk: written so that nothing trained is lost, read so that nothing in them can run code.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts. It is complete under its name or not
there at all: written to a temporary file in the same folder, flushed to the disk, renamed. A damaged one is
recognised, named, and the one before it is used.
"""

import contextlib
import errno
import io
import os
import re
import zipfile
from pathlib import Path

import filelock
import torch

FORMAT = 5       # raised when a field changes its meaning, or the networks their shape
KEEP = 2         # sound step files kept; best.pt and anything else in the folder is never touched
UNSOUND = "_unsound"
STEP_FILE = re.compile(rf"step_\d{{8,}}({UNSOUND})?\.pt")     # a user's step_backup.pt is none, and is left alone
REQUIRED = {"format", "constants", "counters", "ema"}        # what weights for sharing hold too


class CheckpointError(Exception):
    """No checkpoint can be read; the message is one line that names the file and the reason."""

    status = 2                  # of the process that ends by it


class OtherFormat(CheckpointError):
    """A whole checkpoint of another version: nothing to pass over, since training from an older one would lose it."""


def write_atomically(file, write):
    """Calls write(binary handle) on a temporary file beside `file` and renames it: `file` is old or new, never half.

    Raises what write and the file system raise (OSError on a full disk); the temporary file is gone then.
    """
    file = Path(file)
    temporary = file.with_name(file.name + ".part")
    try:
        with open(temporary, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":                       # the new name itself reaches the disk only with its folder
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(folder, state, step, sound=True):
    """Writes folder/step_00001000.pt and then drops what it makes superfluous. Returns the path.

    sound=False marks a state whose newest updates were not applied, by its name, step_00001000_unsound.pt: a run goes
    on from it, and a rollback passes it over. Kept are the newest KEEP sound files, and the newest unsound one while
    none of them is newer. Raises OSError (a full disk): then what was there is there still.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{step:08d}{'' if sound else UNSOUND}.pt"
    save_as(file, state)
    sound_files, unsound_files = step_files(folder, sound=True), step_files(folder, sound=False)
    dropped = sound_files[:-KEEP] + unsound_files[:-1]
    dropped += [f for f in unsound_files[-1:] if sound_files and f.name < sound_files[-1].name]
    for old in [*dropped, *folder.glob("step_*.part")]:         # .part: of a process that was killed while saving
        old.unlink(missing_ok=True)
    return file


def save_as(file, state):
    """Writes the dict as a checkpoint under this name. Raises OSError (a full disk)."""
    buffer = io.BytesIO()                       # torch.save into a file on a full disk raises what can't be told apart
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(file, lambda handle: handle.write(buffer.getbuffer()))


def drop_unsound(folder):
    """Deletes the unsound files of a checkpoint folder."""
    for file in step_files(folder, sound=False):
        file.unlink(missing_ok=True)


def step_files(folder, sound=None):
    """The step files of a checkpoint folder, oldest first; sound True or False: only those of that kind."""
    files = sorted(file for file in Path(folder).glob("step_*.pt") if STEP_FILE.fullmatch(file.name))
    return files if sound is None else [file for file in files if file.stem.endswith(UNSOUND) != sound]


@contextlib.contextmanager
def lock(folder):
    """Holds a run's folder for this process; the system frees it when the process ends, however it ends.

    Makes the folder; takes it away again if nothing came into it. Raises CheckpointError where another process holds
    it, OSError where it can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / "lock", timeout=0)          # torch needs filelock, so it is there
    try:
        held.acquire()
    except filelock.Timeout:
        raise CheckpointError(f"{folder}: another training writes to this run; --run NEWNAME starts a run of its "
                              "own") from None
    except (NotImplementedError, OSError) as error:
        # A file system without locks: we go on without one.
        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise
    try:
        yield
    finally:
        held.release()
        if [file.name for file in folder.iterdir()] in ([], ["lock"]):
            with contextlib.suppress(OSError):
                (folder / "lock").unlink(missing_ok=True)
                folder.rmdir()


def load(file, device="cpu"):
    """The dict that `save` was given. Raises CheckpointError for a missing, damaged, foreign or too new file.

    The check sums of the zip container are compared first: torch.load alone takes a flipped byte for a weight.
    """
    try:
        with zipfile.ZipFile(file) as container:
            damaged = container.testzip()
        state = None if damaged else torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except Exception as error:      # BadZipFile, RuntimeError, ValueError, EOFError, ...: all mean a file that is none
        raise CheckpointError(f"{file}: no readable checkpoint ({type(error).__name__})") from None
    if damaged:
        raise CheckpointError(f"{file}: damaged (the check sum of {damaged!a} is wrong)")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"{file}: no checkpoint of this project")
    if state["format"] != FORMAT:
        raise OtherFormat(f"{file}: format {state['format']}, this program reads {FORMAT}: use the version that "
                          "wrote it")
    if REQUIRED - state.keys() or not isinstance(state["constants"], dict):
        raise CheckpointError(f"{file}: no checkpoint of this project")
    return state


def newest(folder, device="cpu", warn=print, set_aside=False, sound=None):
    """(file, state) of the newest readable step file of a folder, or None where it holds none at all; sound as in
    step_files.

    A damaged one is named through `warn` and passed over; with set_aside it is renamed too, to *.damaged, so that
    it does not count among the KEEP that `save` keeps. Raises CheckpointError, and renames nothing, where all are
    damaged, or one as new as these is of another version.
    """
    files, damaged = step_files(folder, sound), []
    for file in reversed(files):
        try:
            state = load(file, device)
        except OtherFormat:
            raise
        except CheckpointError as error:
            damaged.append(file)
            warn(f"{error}; trying the one before" if file != files[0] else str(error))
            continue
        for bad in damaged if set_aside else []:
            bad.rename(bad.with_name(bad.name + ".damaged"))
            warn(f"{bad.name} is now {bad.name}.damaged")
        return file, state
    if files:
        raise CheckpointError(f"{folder}: none of its {len(files)} checkpoints can be read; nothing was changed, "
                              "--run NEWNAME starts a new run")
    return None


def find(path, device="cpu", warn=print):
    """(file, state) for what a user names: a run's folder, its checkpoint folder, or a single file."""
    path = Path(path)
    if path.is_file():
        return path, load(path, device)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or file")
    found = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path, device, warn)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there (yet); training.py writes the first one after "
                              "CHECKPOINT_EVERY steps or CHECKPOINT_MINUTES")
    return found
