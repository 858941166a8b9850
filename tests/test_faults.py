"""What can go wrong in a long run: signals, kills, full disks, a second training, NaN, too little memory, old files."""

import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, around_step, error_line, lines, poison

import checkpoints
import run_state
import training


def checkpoint_folder(tmp_path):
    return tmp_path / "runs" / "photos" / "checkpoints"


def newest(tmp_path):
    """Returns the newest checkpoint of the run."""
    return checkpoints.newest(checkpoint_folder(tmp_path))[1]


def names(tmp_path):
    return sorted(file.name for file in checkpoint_folder(tmp_path).iterdir())


def run_script(tmp_path, code, *flags):
    """Executes `code` and then training.py in a process of its own; returns the finished process."""
    script = (f"import os, signal, sys\nsys.path.insert(0, {str(Path(training.__file__).parent)!r})\n"
              f"import checkpoints, training\n{code}\nsys.exit(training.main(sys.argv[1:]))")
    return subprocess.run([sys.executable, "-c", script, "--data", tmp_path / "photos", "--runs-dir",
                           tmp_path / "runs", *SMALL, *flags], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


# ------------------------------------------------------------------------------------- signals and kills

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_continue(run, tmp_path, monkeypatch, capfd, number, status):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            around_step(patch, lambda state: state.counters["step"] == 2 and signal.raise_signal(number))
            assert run("--steps", "100000") == status
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    out, error = capfd.readouterr()
    assert "stopping after this step" in error and "the same command continues the run" in out
    assert newest(tmp_path)["counters"]["step"] == 3
    assert run("--steps", "4") == 0


def test_a_second_signal_ends_at_once(photos, tmp_path):
    done = run_script(tmp_path, """
def step(state, c, image_set):
    if state.counters["step"] == 2:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return one_step(state, c, image_set)
one_step, training.training_step = training.training_step, step""", "--steps", "5", "--checkpoint-every", "2")
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "a second signal ends at once" in done.stderr
    assert newest(tmp_path)["counters"]["step"] == 2


def test_a_kill_while_saving_leaves_the_checkpoint_before_and_no_lock(run, tmp_path):
    """Killed between writing the temporary file and renaming it."""
    done = run_script(tmp_path, """
def replace(old, new):
    if "step_00000004" in str(new):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(old, new)
rename, os.replace = os.replace, replace""", "--checkpoint-every", "2", "--steps", "6")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "step_00000004.pt.part" in names(tmp_path)
    assert newest(tmp_path)["counters"]["step"] == 2
    assert run("--steps", "6", "--checkpoint-every", "2") == 0
    assert names(tmp_path) == ["step_00000004.pt", "step_00000006.pt"]


def test_two_trainings_in_one_run_are_refused(run, capsys, monkeypatch):
    statuses = []
    with monkeypatch.context() as patch:
        around_step(patch, lambda state: statuses.append(run("--steps", "3")))
        assert run("--steps", "1") == 0
    assert statuses == [2]
    error = error_line(capsys)
    assert "another training writes to this run" in error and "--run NEWNAME" in error
    assert run("--steps", "3") == 0


# ------------------------------------------------------------------------------------- disks

@pytest.fixture
def limit():
    """limit(size): a write beyond `size` bytes of a file fails, as on a full disk, until limit() or the test's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield set_limit
    set_limit()


def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(run, tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(run_state.Saver, "RETRY_SECONDS", 0)
    around_step(monkeypatch, lambda state: limit(20_000) if state.counters["step"] in (3, 4, 5) else limit())
    assert run("--steps", "8", "--checkpoint-every", "2") == 0
    out = capsys.readouterr().out
    assert "step 4: cannot write the checkpoint (File too large); the earlier ones stay" in out
    assert "step 8: " not in out
    assert names(tmp_path) == ["step_00000007.pt", "step_00000008.pt"]         # 7: the next try
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_a_disk_that_stays_full_ends_with_status_1_and_the_old_checkpoint(run, tmp_path, capsys, monkeypatch, limit):
    run("--steps", "2")
    monkeypatch.setattr(run_state.Saver, "PATIENCE_SECONDS", 0)
    before = (checkpoint_folder(tmp_path) / "step_00000002.pt").read_bytes()
    limit(20_000)
    assert run("--steps", "4") == 1
    limit()
    out = capsys.readouterr().out
    assert "checkpoint not written" in out and "the steps from 2 to 4 are lost" in out
    assert (checkpoint_folder(tmp_path) / "step_00000002.pt").read_bytes() == before
    assert run("--steps", "4") == 0


def test_the_last_checkpoint_waits_for_space(run, tmp_path, capsys, monkeypatch, limit):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 90:                           # in the second round
            limit()

    around_step(monkeypatch, lambda state: limit(20_000))
    monkeypatch.setattr(run_state.time, "sleep", sleep)
    assert run("--steps", "2") == 0
    assert capsys.readouterr().out.count("Ctrl-C gives up") == 2 and sum(slept) == 120
    assert newest(tmp_path)["counters"]["step"] == 2


def test_a_run_that_cannot_write_its_first_checkpoint_is_refused(run, capsys, limit):
    assert run("--steps", "1", "--run", "other") == 0                    # so that the images are decoded
    capsys.readouterr()
    limit(20_000)
    assert run("--steps", "100000") == 2
    assert "cannot write checkpoints (File too large): make room" in error_line(capsys)


# ------------------------------------------------------------------------------------- NaN and rollback

ROLLBACK = ("--nan-patience", "2", "--checkpoint-every", "2")


def test_an_update_that_is_not_finite_is_logged_with_its_values(run, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, lambda step, rollbacks: step == 2)
    assert run("--steps", "5") == 0
    out = capsys.readouterr().out
    assert "step 3: " in out and "not finite (1 in a row)" in out and "score_gap nan" in out
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]
    assert [line["skipped_updates"] for line in lines(tmp_path)] == [0, 2, 2]      # critic and generator
    assert [line["score_gap"] is None for line in lines(tmp_path)] == [False, True, False]


def test_a_run_rolls_back_max_rollbacks_times_over_all_starts_and_then_gives_up(run, tmp_path, capsys, monkeypatch):
    flags = (*ROLLBACK, "--max-rollbacks", "2", "--steps", "20")
    with monkeypatch.context() as patch:
        poison(patch, lambda step, rollbacks: step >= 4)
        assert run(*flags) == 1
        out, error = capsys.readouterr()
        assert out.count("updates in a row were not finite; back to step 4") == 2 and error.count("\n") == 1
        for words in ("up to step 6 are not finite, after 2 rollbacks", "step_00000004.pt is the last good checkpoint",
                      "--learning-rate 0.000125 --critic-learning-rate 0.000125 --max-rollbacks 5"):
            assert words in error
        counters = newest(tmp_path)["counters"]
        expected = {"lr_scale": 0.25, "rollbacks": 2, "step": 4, "skipped_in_a_row": 0}
        assert {name: counters[name] for name in expected} == expected
        assert run(*flags) == 1                        # a new start does not get new rollbacks
        out = capsys.readouterr().out
        assert "back to step" not in out and "after 2 rollbacks (of 2) the learning rates are 0.25 of" in out
    assert run("--steps", "5", "--learning-rate", "1e-4") == 0
    assert "the learning rates are 1 of" in capsys.readouterr().out
    assert newest(tmp_path)["generator_optimizer"]["param_groups"][0]["lr"] == 1e-4


def test_a_rollback_takes_new_random_draws_and_cuts_the_log(run, tmp_path, monkeypatch):
    drawn, rng = {}, run_state.State.rng

    def keep(state, c, purpose, *rest):
        found = rng(state, c, purpose, *rest)
        drawn[purpose, state.counters["step"], state.counters["rollbacks"]] = found.initial_seed()
        return found

    monkeypatch.setattr(run_state.State, "rng", keep)
    poison(monkeypatch, lambda step, rollbacks: step in (2, 3) and rollbacks == 0)
    assert run(*ROLLBACK, "--steps", "5", "--log-every", "1") == 0
    for purpose in ("posterior noise", "prior", "between", "video"):
        assert drawn[purpose, 2, 0] != drawn[purpose, 2, 1], purpose
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [line["rollbacks"] for line in lines(tmp_path)] == [0, 0, 1, 1, 1]


def test_a_kill_right_after_a_rollback_keeps_the_rollback(run, tmp_path, monkeypatch):
    def kill(state):
        if state.counters["rollbacks"] == 1:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        poison(patch, lambda step, rollbacks: step >= 2 and rollbacks == 0)
        around_step(patch, kill)
        run(*ROLLBACK, "--steps", "6")
    assert {name: newest(tmp_path)["counters"][name] for name in ("step", "rollbacks")} == {"step": 2, "rollbacks": 1}
    assert run(*ROLLBACK, "--steps", "6") == 0
    counters = newest(tmp_path)["counters"]
    assert (counters["step"], counters["rollbacks"], counters["lr_scale"]) == (6, 1, 0.5)


def test_a_stop_between_skipped_updates_is_marked_and_a_rollback_ignores_it(run, tmp_path, capsys, monkeypatch):
    flags = ("--nan-patience", "3", "--checkpoint-every", "2")
    poison(monkeypatch, lambda step, rollbacks: step >= 2 and rollbacks == 0)
    assert run("--steps", "4", *flags) == 0
    assert names(tmp_path) == ["step_00000000.pt", "step_00000002.pt", "step_00000004_unsound.pt"]
    assert run("--steps", "6", *flags) == 0            # continues at 4 with 2 in a row: step 5 is the third
    out = capsys.readouterr().out
    assert "at step 4 from step_00000004_unsound.pt" in out and "back to step 2 with 0.5" in out
    assert names(tmp_path) == ["step_00000004.pt", "step_00000006.pt"]


# ------------------------------------------------------------------------------------- memory, old checkpoints

@pytest.mark.parametrize("place, error", [
    ((training, "training_step"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    ((training, "training_step"), RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: "
                                               "can't allocate memory: you tried to allocate 8000000000 bytes.")),
    ((training, "training_step"), MemoryError()), ((run_state, "new_state"), MemoryError())])
def test_too_little_memory_is_one_line_with_a_micro_batch(run, capsys, monkeypatch, place, error):
    monkeypatch.setattr(*place, Mock(side_effect=error))
    assert run("--steps", "1") == 1
    line = error_line(capsys)
    assert "out of memory" in line and "--micro-batch 2" in line


def test_another_runtime_error_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(training, "training_step", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("--steps", "1")


def test_a_checkpoint_of_other_networks_is_refused_and_not_changed(run, tmp_path, capsys):
    run("--steps", "1")
    file = checkpoint_folder(tmp_path) / "step_00000001.pt"
    saved = torch.load(file, weights_only=True)
    saved["generator"]["vae.renamed"] = saved["generator"].pop("vae.to_mu.bias")
    torch.save(saved, file)
    before = file.read_bytes()
    capsys.readouterr()
    assert run("--steps", "2") == 2
    line = error_line(capsys)
    assert "step_00000001.pt" in line and "--run NEWNAME" in line
    assert file.read_bytes() == before


@pytest.mark.parametrize("number", range(1, checkpoints.FORMAT + 1))
def test_a_checkpoint_of_an_earlier_version_is_refused_and_its_weights_start_a_new_run(run, tmp_path, capsys, number):
    """tests/fixtures has a file of each format, from a run with these sizes."""
    content = gzip.decompress((Path(__file__).parent / "fixtures" / f"format_{number}.pt.gz").read_bytes())
    file = checkpoint_folder(tmp_path) / "step_00000001.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    sizes = ("--width", "2", "--encoder-width", "2", "--width-max", "4", "--latent-dim", "4", "--transformer-dim", "12",
             "--transformer-layers", "1", "--num-frames", "2", "--final-width", "0", "--no-balanced-upsampling",
             "--no-noise-maps")
    assert run("--run", "photos", "--steps", "2", *sizes) == 2
    line = error_line(capsys)
    assert file.read_bytes() == content
    if number < checkpoints.FORMAT:
        assert f"format {number}, but this version reads format {checkpoints.FORMAT}" in line
        return
    assert f"without a prior: --run NEWNAME --init-from {file.parent.parent} starts a new run" in line
    assert run("--run", "new", "--steps", "1", "--init-from", str(file), "--learning-rate", "1e-12", *sizes) == 0
    old, new = (checkpoints.find(path)[1]["ema"] for path in (file, file.parents[2] / "new"))
    torch.testing.assert_close({name: new[name] for name in old}, dict(old), atol=1e-8, rtol=0)
    assert "prior.to_hidden.weight" in new
