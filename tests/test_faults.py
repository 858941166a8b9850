"""What a night can bring: signals, kills, full disks, a second training, NaN, too little memory, old checkpoints."""

import contextlib
import gzip
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import SMALL, lines, poison

import checkpoints
import data
import run_log
import training
import training_step

SCRIPT = Path(training.__file__)


@pytest.fixture
def process(photos, tmp_path):
    """process(*flags) starts training.py in a process of its own, its output in a pipe."""
    started = []

    def start(*flags, **options):
        started.append(subprocess.Popen(
            [sys.executable, SCRIPT, "--data", photos, "--runs-dir", str(tmp_path / "runs"), *SMALL, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options))
        return started[-1]
    yield start
    for one in started:
        if one.poll() is None:
            one.kill()
            one.communicate()


def checkpoint_folder(tmp_path):
    return tmp_path / "runs" / "photos" / "checkpoints"


def wait_for_step(tmp_path, step, seconds=120):
    """Until metrics.jsonl has a line of that step."""
    file, end = tmp_path / "runs" / "photos" / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end:
        text = file.read_text() if file.exists() else ""
        if text.endswith("\n") and json.loads(text.splitlines()[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {seconds} s")


# ------------------------------------------------------------------------------------- signals and kills

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(process, run, tmp_path, number, status):
    trainer = process("--steps", "100000")
    wait_for_step(tmp_path, 4)
    trainer.send_signal(number)
    out, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == status and "Traceback" not in out
    assert "stopping after this step" in out and "the same command again goes on from there" in out
    _, saved = checkpoints.newest(checkpoint_folder(tmp_path))
    assert saved["counters"]["step"] >= lines(tmp_path)[-1]["step"]
    assert run("--steps", str(saved["counters"]["step"] + 1)) == 0


def test_a_second_signal_ends_at_once(process, tmp_path):
    trainer = process("--steps", "100000")
    wait_for_step(tmp_path, 2)
    os.kill(trainer.pid, signal.SIGSTOP)               # so that both are there before the step ends
    trainer.send_signal(signal.SIGTERM)
    os.kill(trainer.pid, signal.SIGCONT)
    end = time.monotonic() + 60
    while trainer.poll() is None and time.monotonic() < end:
        trainer.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert trainer.returncode in (-signal.SIGTERM, 143)
    assert not list(tmp_path.glob("runs/photos/checkpoints/*.damaged"))
    assert checkpoints.newest(checkpoint_folder(tmp_path)) is not None


def test_a_kill_while_saving_leaves_the_checkpoint_before(run, tmp_path, monkeypatch):
    """Killed between the temporary file and its name: the half-written file is passed over, and swept up later."""
    script = ("import os, sys; sys.path.insert(0, sys.argv[1]); import checkpoints, training\n"
              "def dies(old, new):\n"
              "    if 'step_00000004' in str(new): os.kill(os.getpid(), 9)\n"
              "    rename(old, new)\n"
              "rename, os.replace = os.replace, dies\n"
              "training.main(sys.argv[2:])")
    flags = ["--data", str(tmp_path / "photos"), "--runs-dir", str(tmp_path / "runs"), *SMALL, "--checkpoint-every",
             "2", "--steps", "6"]
    done = subprocess.run([sys.executable, "-c", script, SCRIPT.parent, *flags], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (checkpoint_folder(tmp_path) / "step_00000004.pt.part").exists()
    assert checkpoints.newest(checkpoint_folder(tmp_path))[1]["counters"]["step"] == 2
    assert run("--steps", "6", "--checkpoint-every", "2") == 0
    assert sorted(f.name for f in checkpoint_folder(tmp_path).iterdir()) == ["step_00000004.pt", "step_00000006.pt"]


def test_two_trainings_in_one_run_are_refused_and_a_dead_one_holds_nothing(process, run, tmp_path, capsys):
    trainer = process("--steps", "100000")
    wait_for_step(tmp_path, 2)
    assert run("--steps", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another training writes to this run" in error and "--run NEWNAME" in error
    trainer.kill()
    trainer.communicate()
    assert run("--steps", "3") == 0


# ------------------------------------------------------------------------------------- disks

@contextlib.contextmanager
def files_limited(size=None):
    """Inside, no file can grow beyond `size` bytes; yields a function that sets another limit, None for none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    limit(size)
    try:
        yield limit
    finally:
        limit(None)


def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(run, tmp_path, capsys, monkeypatch):
    """A limit on the size of a file stands for the full disk: the write of a checkpoint fails half way."""
    monkeypatch.setattr(training.Saver, "RETRY_SECONDS", 0)
    one_step = training.training_step

    def step(state, c, images):
        limit(20_000 if state.counters["step"] in (3, 4, 5) else None)
        return one_step(state, c, images)

    monkeypatch.setattr(training, "training_step", step)
    with files_limited() as limit:
        assert run("--steps", "8", "--checkpoint-every", "2") == 0
    out = capsys.readouterr().out
    assert "step 4: the checkpoint can't be written (File too large); the ones before stay" in out
    assert "step 8: " not in out
    files = sorted(f.name for f in checkpoint_folder(tmp_path).iterdir())
    assert files == ["step_00000007.pt", "step_00000008.pt"]         # 7: the try again
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_a_disk_that_stays_full_ends_with_status_1_and_the_old_checkpoint(run, tmp_path, capsys, monkeypatch):
    run("--steps", "2")
    monkeypatch.setattr(training.Saver, "PATIENCE_SECONDS", 0)
    before = (checkpoint_folder(tmp_path) / "step_00000002.pt").read_bytes()
    with files_limited(20_000):
        assert run("--steps", "4") == 1
    out = capsys.readouterr().out
    assert "checkpoint not written" in out and "the steps after 2 are lost, up to 4" in out
    assert (checkpoint_folder(tmp_path) / "step_00000002.pt").read_bytes() == before
    assert run("--steps", "4") == 0


def test_the_last_checkpoint_waits_for_room(run, tmp_path, capsys, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 90:                           # in the second round
            limit(None)

    def step(state, c, images):
        limit(20_000)
        return one_step(state, c, images)

    one_step = training.training_step
    monkeypatch.setattr(training, "training_step", step)
    monkeypatch.setattr(training.time, "sleep", sleep)
    with files_limited() as limit:
        assert run("--steps", "2") == 0
    assert capsys.readouterr().out.count("Ctrl-C gives up") == 2 and sum(slept) == 120
    assert checkpoints.newest(checkpoint_folder(tmp_path))[1]["counters"]["step"] == 2


def test_a_run_whose_first_checkpoint_can_not_be_written_is_refused(run, tmp_path, capsys):
    assert run("--steps", "1", "--run", "other") == 0                    # the images are decoded then
    capsys.readouterr()
    with files_limited(20_000):
        assert run("--steps", "100000") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no checkpoint can be written there (File too large): make room" in error


def test_lines_of_the_log_that_a_full_disk_took_are_said_once_and_lost_alone(tmp_path, capsys):
    c, _ = training.command_line.parse_constants(SMALL)
    log = run_log.Log(tmp_path, c, 0)
    log.write({"step": 1})
    with files_limited(20):
        for step in (2, 3, 4):
            log.write({"step": step, "value": 0.123456789})
    log.write({"step": 5})
    log.close()
    assert capsys.readouterr().out.count("can't be written (File too large)") == 1
    run_log.cut_metrics(tmp_path / "metrics.jsonl", 10)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps in ([1], [1, 5])        # 5 may share its line with what was left of 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_said_at_the_start(run, tmp_path, capsys):
    (tmp_path / "runs").mkdir(mode=0o555)
    assert run("--steps", "1") == 2
    assert "can't be written (Permission denied); give another --runs-dir" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- NaN and divergence

def test_a_step_that_is_not_finite_is_said_with_its_values(run, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, lambda step, rollbacks: step == 2)
    assert run("--steps", "5") == 0
    out = capsys.readouterr().out
    assert "step 3: an update was not applied, its gradient is not finite (1 in a row): " in out
    assert "score_gap nan" in out
    assert [line["skipped_updates"] for line in lines(tmp_path)] == [0, 2, 2]      # both sides' at step 3
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]


def test_a_run_that_stays_lost_goes_back_max_rollbacks_times_over_all_starts(run, tmp_path, capsys, monkeypatch):
    flags = ("--nan-patience", "2", "--checkpoint-every", "2", "--max-rollbacks", "2", "--steps", "20")
    poison(monkeypatch, lambda step, rollbacks: step >= 4)
    assert run(*flags) == 1
    captured = capsys.readouterr()
    assert captured.out.count("updates in a row were not finite; back to step 4") == 2
    assert captured.err.count("\n") == 1
    for words in ("up to step 6 are not finite", "after 2 rollbacks", "step_00000004.pt is the last good checkpoint",
                  "--learning-rate 0.000125 --critic-learning-rate 0.000125 --max-rollbacks 5"):
        assert words in captured.err
    _, saved = checkpoints.newest(checkpoint_folder(tmp_path))
    assert saved["counters"] | {"lr_scale": 0.25, "rollbacks": 2, "step": 4, "skipped_in_a_row": 0} == saved["counters"]
    assert run(*flags) == 1                            # another start has no rollbacks left
    out = capsys.readouterr().out
    assert "back to step" not in out and "after 2 rollbacks (of 2) the learning rates are 0.25 of" in out
    poison(monkeypatch, lambda step, rollbacks: False)
    assert run("--steps", "5", "--learning-rate", "1e-4") == 0
    assert "the learning rates are 1 of" in capsys.readouterr().out
    saved = checkpoints.newest(checkpoint_folder(tmp_path))[1]
    assert saved["generator_optimizer"]["param_groups"][0]["lr"] == 1e-4


def test_a_rollback_takes_new_random_draws_and_cuts_the_log(run, tmp_path, monkeypatch):
    drawn, make_batch = [], training_step.make_batch

    def keep(state, *rest):
        batch = make_batch(state, *rest)
        drawn.append((state.counters["step"], state.counters["rollbacks"], batch.z))
        return batch

    monkeypatch.setattr(training_step, "make_batch", keep)
    poison(monkeypatch, lambda step, rollbacks: step in (2, 3) and rollbacks == 0)
    assert run("--nan-patience", "2", "--checkpoint-every", "2", "--steps", "5", "--log-every", "1") == 0
    z = {key: value for *key, value in drawn for key in [tuple(key)]}
    assert not torch.equal(z[2, 0], z[2, 1])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [line["rollbacks"] for line in lines(tmp_path)] == [0, 0, 1, 1, 1]


def test_a_kill_between_a_rollback_and_the_next_checkpoint_keeps_the_rollback(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    one_step = training.training_step
    poison(monkeypatch, lambda step, rollbacks: step >= 2 and rollbacks == 0)
    poisoned = training.training_step

    def step(state, c, images):
        if state.counters["rollbacks"] == 1:
            raise Killed
        return poisoned(state, c, images)

    monkeypatch.setattr(training, "training_step", step)
    flags = ("--nan-patience", "2", "--checkpoint-every", "2", "--steps", "6")
    with pytest.raises(Killed):
        run(*flags)
    _, saved = checkpoints.newest(checkpoint_folder(tmp_path))
    assert saved["counters"]["rollbacks"] == 1 and saved["counters"]["step"] == 2
    monkeypatch.setattr(training, "training_step", one_step)
    assert run(*flags) == 0
    _, saved = checkpoints.newest(checkpoint_folder(tmp_path))
    assert saved["counters"]["rollbacks"] == 1 and saved["counters"]["lr_scale"] == 0.5


def test_a_stop_in_the_middle_of_bad_steps_is_marked_and_passed_over_by_a_rollback(run, tmp_path, capsys, monkeypatch):
    flags = ("--nan-patience", "3", "--checkpoint-every", "2")
    poison(monkeypatch, lambda step, rollbacks: step >= 2 and rollbacks == 0)
    assert run("--steps", "4", *flags) == 0
    assert [f.name for f in sorted(checkpoint_folder(tmp_path).iterdir())] == \
        ["step_00000000.pt", "step_00000002.pt", "step_00000004_unsound.pt"]
    assert run("--steps", "6", *flags) == 0            # goes on at 4, with 2 in a row: the third is step 5
    out = capsys.readouterr().out
    assert "at step 4 from step_00000004_unsound.pt" in out and "back to step 2 with 0.5" in out
    assert [f.name for f in sorted(checkpoint_folder(tmp_path).iterdir())] == ["step_00000004.pt", "step_00000006.pt"]


def values(**changed):
    return {"score_gap": 3.0, "gradient_norm": 1.2, "picture_spread": 0.9, "alpha_min": 2.0, "alpha_mean": 2.5,
            "alpha_max": 3.0, **changed}


@pytest.mark.parametrize("changed, words", [
    ({}, []), ({"gradient_norm": 20.0}, ["gradient norm 20"]), ({"score_gap": 5e4}, ["score gap 5e+04"]),
    ({"picture_spread": 0.01}, ["all alike"]),
    ({"alpha_min": 1.0, "alpha_mean": 1.0, "alpha_max": 1.001}, ["alpha is 1"]),
    ({"alpha_min": 8.99, "alpha_mean": 9.0, "alpha_max": 9.0}, ["alpha is 9"]),
])
def test_what_is_plainly_lost_is_said_once_with_what_to_try(tmp_path, capsys, changed, words):
    c, _ = training.command_line.parse_constants(SMALL)
    log = run_log.Log(tmp_path, c, 0)
    for step in range(4):
        log.say_symptoms(step, values(**changed))
    assert capsys.readouterr().out == ""               # a moment is no symptom
    for step in range(4, 20):
        log.say_symptoms(step, values(**changed))
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(words) and all(word in line and "Try " in line for word, line in zip(words, out))


# ------------------------------------------------------------------------------------- memory, old checkpoints

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    MemoryError()])
@pytest.mark.parametrize("place", ["training_step", "new_state"])
def test_too_little_memory_is_one_line_with_a_micro_batch(run, capsys, monkeypatch, error, place):
    def fails(*_):
        raise error
    monkeypatch.setattr(training, place, fails)
    assert run("--steps", "1") == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "out of memory" in text and "--micro-batch 2" in text


def test_another_runtime_error_is_not_taken_for_that(run, monkeypatch):
    def step(state, c, images):
        raise RuntimeError("a fault of ours")
    monkeypatch.setattr(training, "training_step", step)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("--steps", "1")


def test_a_checkpoint_of_other_networks_is_refused_by_a_line_and_left_as_it_was(run, tmp_path, capsys):
    run("--steps", "1")
    file = checkpoint_folder(tmp_path) / "step_00000001.pt"
    saved = torch.load(file, weights_only=True)
    saved["generator"]["vae.renamed"] = saved["generator"].pop("vae.to_mu.bias")
    torch.save(saved, file)
    before = file.read_bytes()
    assert run("--steps", "2") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "step_00000001.pt" in text and "--run NEWNAME" in text
    assert file.read_bytes() == before


@pytest.mark.parametrize("number", range(1, checkpoints.FORMAT + 1))
def test_a_checkpoint_of_each_format_goes_on_or_is_refused_by_a_line(tmp_path, photos, capsys, number):
    """tests/fixtures holds one of each format that was ever written, by a run with the flags below."""
    packed = (Path(__file__).parent / "fixtures" / f"format_{number}.pt.gz").read_bytes()
    file = checkpoint_folder(tmp_path) / "step_00000001.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.decompress(packed))
    status = training.main([
        "--data", photos, "--runs-dir", str(tmp_path / "runs"), "--run", "photos", "--image-size", "32", "--batch-size",
        "2", "--width", "2", "--encoder-width", "2", "--width-max", "4", "--latent-dim", "4", "--transformer-dim", "12",
        "--transformer-layers", "1", "--patch", "8", "--num-frames", "2", "--steps", "2", "--sample-count", "1"])
    out, error = capsys.readouterr()
    if number == checkpoints.FORMAT:
        assert status == 0 and "continuing" in out and checkpoints.newest(file.parent)[1]["counters"]["step"] == 2
    else:
        assert status == 2 and f"format {number}, this program reads {checkpoints.FORMAT}" in out + error
        assert gzip.decompress(packed) == file.read_bytes()


# ------------------------------------------------------------------------------------- very many files

class Entry:
    """An os.DirEntry of a file that is not there."""

    def __init__(self, number):
        self.name, self.number = f"picture_{number:07d}.jpg", number

    def is_dir(self):
        return False

    def stat(self):
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, self.number, 0, self.number, 0))


def test_the_memory_of_a_scan_grows_with_the_number_of_files_and_no_faster(tmp_path, monkeypatch):
    scandir = os.scandir

    def peak(count):
        monkeypatch.setattr(os, "scandir", lambda path: (
            (Entry(i) for i in range(count)) if str(path).rstrip("/") == str(tmp_path) else scandir(path)))
        tracemalloc.start()
        try:
            files, skipped = data.find_files(str(tmp_path))
            assert len(files) == count and not skipped
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)                                          # imports
    assert peak(80_000) < 5 * peak(20_000)
