import os

import pytest
import torch

import checkpoints
from checkpoints import InputError


def state(value=1.0):
    return {"weights": {"w": torch.full((64, 64), value)}, "counters": {"step": 3}, "constants": {}, "ema": {}}


def flip_stored_byte(file):
    data = bytearray(file.read_bytes())
    data[data.find(torch.full((64,), 1.0).numpy().tobytes()) + 100] ^= 1
    file.write_bytes(data)


def test_what_was_saved_is_loaded(tmp_path):
    file = checkpoints.save(tmp_path, state(), 7)
    loaded = checkpoints.load(file)
    assert file.name == "step_00000007.pt"
    assert torch.equal(loaded["weights"]["w"], state()["weights"]["w"]) and loaded["counters"] == {"step": 3}


def test_the_newest_two_are_kept_and_best_is_never_pruned(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"x")
    for step in (1, 2, 10):
        checkpoints.save(tmp_path, state(), step)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best.pt", "step_00000002.pt", "step_00000010.pt"]


@pytest.mark.parametrize("damage", [
    flip_stored_byte,
    lambda file: file.write_bytes(file.read_bytes()[:1000]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"a text, not a checkpoint" * 100),
    lambda file: torch.save({"weights": 1}, file),
    lambda file: torch.save([1, 2], file),
    lambda file: torch.save({"format": 1, "code": print}, file),
    lambda file: torch.save({"format": checkpoints.FORMAT, "counters": {}, "ema": {}}, file),
    lambda file: torch.save({"format": checkpoints.FORMAT, "counters": {}, "ema": {}, "constants": 3}, file),
    lambda file: torch.save({"format": "2"}, file),
])
def test_a_damaged_file_is_named_and_the_older_one_used(tmp_path, damage):
    old = checkpoints.save(tmp_path, state(), 1)
    damage(checkpoints.save(tmp_path, state(), 2))
    said = []
    file, loaded = checkpoints.newest(tmp_path, warn=said.append)
    assert file == old and torch.equal(loaded["weights"]["w"], state()["weights"]["w"])
    assert len(said) == 1 and "step_00000002.pt" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("number", [1, checkpoints.FORMAT + 1])
def test_a_whole_file_of_another_version_is_not_passed_over(tmp_path, number):
    """Going on from the older one would throw away what came after it."""
    checkpoints.save(tmp_path, state(), 1)
    torch.save({**state(), "format": number}, tmp_path / "step_00000002.pt")
    with pytest.raises(InputError, match=f"step_00000002.pt: format {number}, this program reads"):
        checkpoints.newest(tmp_path, set_aside=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_00000001.pt", "step_00000002.pt"]


def test_all_damaged_raises_one_line_and_deletes_nothing(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, state(), step).write_bytes(b"junk")
    with pytest.raises(InputError, match="none of its 2"):
        checkpoints.newest(tmp_path, warn=lambda line: None)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "missing") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    checkpoints.write_atomically(file, lambda handle: handle.write(b"old"))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoints.write_atomically(file, full_disk)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        checkpoints.write_atomically(file, lambda handle: handle.write(b"new"))
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"] and file.read_bytes() == b"old"


def test_find_takes_a_run_a_checkpoint_folder_or_a_file(tmp_path):
    file = checkpoints.save(tmp_path / "run" / "checkpoints", state(), 4)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", file):
        assert checkpoints.find(path)[0] == file
    for path, words in ((tmp_path / "none", "no such run"), (tmp_path, "no checkpoint")):
        with pytest.raises(InputError, match=words):
            checkpoints.find(path)


def test_a_users_own_file_is_neither_used_nor_deleted(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, state(step), step)
    for name in ("step_backup.pt", "step_00000009 (copy).pt", "best.pt"):
        (tmp_path / name).write_bytes((tmp_path / "step_00000001.pt").read_bytes())
    assert checkpoints.newest(tmp_path)[0].name == "step_00000002.pt"
    for step in (3, 4):
        checkpoints.save(tmp_path, state(step), step)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "best.pt", "step_00000003.pt", "step_00000004.pt", "step_00000009 (copy).pt", "step_backup.pt"]


def test_what_is_set_aside_is_said(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, state(), step)
    (tmp_path / "step_00000002.pt").write_bytes(b"junk")
    said = []
    checkpoints.newest(tmp_path, warn=said.append, set_aside=True)
    assert len(said) == 2 and "step_00000002.pt is now step_00000002.pt.damaged" in said[1]
