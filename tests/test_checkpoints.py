import pytest
import torch

import checkpoints
from errors import InputError


def state(value=1.0):
    return {"weights": {"w": torch.full((64, 64), value)}, "counters": {"step": 3}, "constants": {}, "ema": {}}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def flip_stored_byte(file):
    content = bytearray(file.read_bytes())
    content[content.find(torch.full((64,), 1.0).numpy().tobytes()) + 100] ^= 1
    file.write_bytes(content)


def test_load_returns_what_was_saved(tmp_path):
    file = checkpoints.save(tmp_path, state(), 7)
    loaded = checkpoints.load(file)
    assert file.name == "step_00000007.pt"
    assert torch.equal(loaded["weights"]["w"], state()["weights"]["w"]) and loaded["counters"] == {"step": 3}


def test_save_keeps_the_newest_two_and_a_users_own_files(tmp_path):
    own = ["best.pt", "step_00000009 (copy).pt", "step_backup.pt"]
    for name in own:
        checkpoints.save_as(tmp_path / name, state(9.0))
    for step in (1, 2, 10):
        checkpoints.save(tmp_path, state(step), step)
    assert names(tmp_path) == sorted([*own, "step_00000002.pt", "step_00000010.pt"])
    assert checkpoints.newest(tmp_path)[0].name == "step_00000010.pt"


@pytest.mark.parametrize("damage", [
    flip_stored_byte,
    lambda file: file.write_bytes(file.read_bytes()[:1000]),
    lambda file: file.write_bytes(b"a text, not a checkpoint" * 100),
    lambda file: torch.save({"weights": 1}, file),
    lambda file: torch.save([1, 2], file),
    lambda file: torch.save({"format": 1, "code": print}, file),
    lambda file: torch.save({"format": checkpoints.FORMAT, "counters": {}, "ema": {}}, file),
    lambda file: torch.save({"format": checkpoints.FORMAT, "counters": {}, "ema": {}, "constants": 3}, file),
    lambda file: torch.save({"format": "2"}, file),
])
def test_a_damaged_or_foreign_file_is_named_and_the_older_one_used(tmp_path, damage):
    old = checkpoints.save(tmp_path, state(), 1)
    damage(checkpoints.save(tmp_path, state(), 2))
    warnings = []
    file, loaded = checkpoints.newest(tmp_path, warn=warnings.append)
    assert file == old and torch.equal(loaded["weights"]["w"], state()["weights"]["w"])
    assert len(warnings) == 1 and "step_00000002.pt" in warnings[0] and "\n" not in warnings[0]


def test_a_constant_that_an_older_file_lacks_gets_a_value_that_suits_its_networks(tmp_path):
    older = {"RECOMPUTE_ACTIVATIONS": False, "BALANCED_UPSAMPLING": False, "NOISE_MAPS": False, "FOLDERS": "ignore",
             "CLIP_STRIDE": 1, "MOTION_DIM": 6, "FEEDBACK": 0.2, "PRIOR_WIDTH": 0,
             "CLASSES": [], "BALANCE_CLASSES": False, "FIT": "crop", "TENSORBOARD": False,
             "AUGMENT": 0.0}
    checkpoints.save(tmp_path, state(), 1)
    assert checkpoints.newest(tmp_path)[1]["constants"] == {"FINAL_WIDTH": 0, **older}
    checkpoints.save(tmp_path, {**state(), "constants": {"FINAL_WIDTH": 12}}, 2)
    assert checkpoints.newest(tmp_path)[1]["constants"] == {"FINAL_WIDTH": 12, **older}


@pytest.mark.parametrize("number", [1, checkpoints.FORMAT + 1])
def test_a_file_of_another_format_is_refused_rather_than_skipped(tmp_path, number):
    """Training on from the older file would lose the steps of the newer one."""
    checkpoints.save(tmp_path, state(), 1)
    torch.save({**state(), "format": number}, tmp_path / "step_00000002.pt")
    with pytest.raises(InputError, match=f"step_00000002.pt: format {number}, but this version reads format"):
        checkpoints.newest(tmp_path, set_aside=True)
    assert names(tmp_path) == ["step_00000001.pt", "step_00000002.pt"]


def test_if_all_files_are_damaged_one_line_is_raised_and_nothing_changed(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, state(), step).write_bytes(b"junk")
    with pytest.raises(InputError, match="none of its 2"):
        checkpoints.newest(tmp_path, warn=lambda line: None, set_aside=True)
    assert names(tmp_path) == ["step_00000001.pt", "step_00000002.pt"]


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "missing") is None


def test_find_takes_a_run_a_checkpoint_folder_or_a_file(tmp_path):
    file = checkpoints.save(tmp_path / "run" / "checkpoints", state(), 4)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", file):
        assert checkpoints.find(path)[0] == file
    for path, words in ((tmp_path / "none", "no such run"), (tmp_path, "no checkpoint")):
        with pytest.raises(InputError, match=words):
            checkpoints.find(path)
