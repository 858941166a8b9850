"""Several ranks under the real torchrun on gloo: they train what one process would, stop together, and notice a rank
that is gone or has other weights. Only on Linux: the tests find torchrun's children in /proc."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, lines

import checkpoints
import distributed
import training

SCRIPT = Path(training.__file__)
FLAGS = [*SMALL, "--batch-size", "8", "--log-every", "1"]              # 8 images: 4 or 2 per rank
PARTS = ("generator", "critic", "ema")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and gloo")


@pytest.fixture
def torchrun(photos, tmp_path):
    """torchrun(ranks, *flags) starts training.py, or another script, in tmp_path; all processes end with the test."""
    started = []

    def start(ranks, *flags, code="", options=()):
        """code: statements that change the modules before the training starts."""
        script = SCRIPT
        if code:
            script = tmp_path / "script.py"
            script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                              f"import conftest, training, training_step\n{code}\nsys.exit(training.main())\n")
        started.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options,
             "--", script, "--data", photos, "--runs-dir", tmp_path / "runs", *FLAGS, *flags],
            cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for child in ranks_of(process).values():
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.communicate()


@pytest.fixture
def train(photos, tmp_path, torchrun):
    """train(ranks, *flags) trains, with torchrun if ranks > 1, and returns what was printed. In float64 if the test is:
    in float32, Adam without momentum amplifies rounding to a quarter of the way within 20 steps."""
    def finished(ranks, *flags, status=0, code=""):
        if ranks == 1:
            assert training.main(["--data", photos, "--runs-dir", str(tmp_path / "runs"), *FLAGS, *flags]) == status
            return ""
        if torch.get_default_dtype() == torch.float64:
            code = "conftest.use_float64(setattr)\n" + code
        process = torchrun(ranks, *flags, code=code)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == status, out
        return out
    return finished


def saved(tmp_path, run="photos"):
    return checkpoints.find(tmp_path / "runs" / run)[1]


def assert_nearly_equal(tmp_path, one, other, share=1e-4):
    """Compares two runs: for each module the difference is at most `share` of the distance that its weights moved from
    the run "start"."""
    one, other, origin = (saved(tmp_path, run) for run in (one, other, "start"))
    for part in PARTS:
        for module in {name.rpartition(".")[0] for name in one[part]}:
            names = [name for name in one[part] if name.rpartition(".")[0] == module]
            a, b, first = (torch.cat([state[part][name].flatten() for name in names]) for state in (one, other, origin))
            assert (a - b).norm() <= share * (a - first).norm() + 1e-9, (part, module)
    for part in ("generator_optimizer", "critic_optimizer"):             # Adam's steps do not show the gradient's scale
        for number, entry in one[part]["state"].items():
            a, b = entry["exp_avg_sq"], other[part]["state"][number]["exp_avg_sq"]
            assert (a - b).norm() <= share * b.norm() + 1e-20, (part, number)


@pytest.fixture
def start(float64, train):
    """A run "start" whose weights stay those of step 0."""
    train(1, "--steps", "1", "--run", "start", "--learning-rate", "1e-30", "--critic-learning-rate", "1e-30")


# ------------------------------------------------------------------------------------- the same mathematics

@pytest.mark.parametrize("ranks, flags", [
    (2, ["--micro-batch", "2", "--gp-every", "3", "--n-critic", "2", "--flip"]),
    pytest.param(2, [], marks=pytest.mark.slow), pytest.param(4, [], marks=pytest.mark.slow)])
def test_several_ranks_train_what_one_would(tmp_path, train, start, ranks, flags):
    """12 images in batches of 8: every second batch crosses the border of an epoch."""
    for run, count in (("one", 1), ("many", ranks)):
        train(count, "--steps", "10", "--run", run, *flags)
    assert_nearly_equal(tmp_path, "one", "many")
    for one, many in zip(lines(tmp_path, "one"), lines(tmp_path, "many")):
        for name in ("critic_loss", "generator_loss", "score_gap", "gradient_norm", "kl", "alpha_min", "alpha_max"):
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
    assert saved(tmp_path, "many")["counters"] == saved(tmp_path, "one")["counters"]


def test_several_ranks_learn_motion_as_one_would(tmp_path, train, float64):
    flags = ["--folders", "clips", "--vae-kimg", "0.032", "--dynamics-kimg", "0.072"]        # 4 steps, 5, and 5
    train(1, *flags, "--steps", "1", "--run", "start", "--learning-rate", "1e-30", "--critic-learning-rate", "1e-30")
    for run, count in (("one", 1), ("many", 2)):
        train(count, *flags, "--motion-batch", "8", "--steps", "14", "--run", run)
    assert_nearly_equal(tmp_path, "one", "many")
    for one, many in zip(lines(tmp_path, "one"), lines(tmp_path, "many")):
        assert one["stage"] == many["stage"] == (1 if one["step"] <= 4 else 2 if one["step"] <= 9 else 3)
        for name in {"motion_loss", "code_error", "frame_error", "motion_kl", "pair_critics_loss", "far_score_gap",
                     "near_score_gap", "generator_loss"} & set(one):
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
    assert saved(tmp_path, "many")["counters"] == saved(tmp_path, "one")["counters"]


@pytest.mark.slow
def test_resuming_with_another_number_of_ranks_is_the_same_run(tmp_path, train, start):
    train(1, "--steps", "12", "--run", "whole")
    for ranks, steps in ((1, 4), (2, 8), (4, 12)):
        train(ranks, "--steps", str(steps), "--run", "parts")
    assert_nearly_equal(tmp_path, "whole", "parts")
    assert [line["step"] for line in lines(tmp_path, "parts")] == list(range(1, 13))


@pytest.mark.slow
def test_resuming_with_as_many_ranks_is_exact(tmp_path, train):
    train(2, "--steps", "6", "--run", "whole")
    for steps in ("3", "6"):
        train(2, "--steps", steps, "--run", "parts")
    one, other = saved(tmp_path, "whole"), saved(tmp_path, "parts")
    for part in PARTS:
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


@pytest.mark.slow
def test_scores_are_computed_together_and_equal(tmp_path, train):
    for run, ranks in (("one", 1), ("many", 2)):
        train(ranks, "--steps", "1", "--run", run, "--evaluate-every", "1", "--evaluate-count", "9")
    one, many = (next(line for line in lines(tmp_path, run) if "evaluate_sliced_wasserstein" in line)
                 for run in ("one", "many"))
    assert many == pytest.approx(one, rel=0.05)
    assert (tmp_path / "runs" / "many" / "checkpoints" / "best.pt").exists()


# ------------------------------------------------------------------------------------- signals, faults

def wait_for_step(tmp_path, step):
    file, end = tmp_path / "runs" / "photos" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end:
        if file.exists() and file.read_text().endswith("\n") and lines(tmp_path)[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


def ranks_of(process):
    """Returns {rank: process id} of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:                                        # it has just ended
            continue
        found.update({int(entry[5:]): int(child) for entry in environment if entry.startswith("RANK=")})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["torchrun", 0, 1])
def test_a_signal_to_one_or_all_ranks_stops_all_at_one_step_with_a_checkpoint(tmp_path, torchrun, train, receiver):
    process = torchrun(2, "--steps", "100000")
    wait_for_step(tmp_path, 2)
    os.kill(process.pid if receiver == "torchrun" else ranks_of(process)[receiver], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert f'Traceback (most recent call last):\n  File "{SCRIPT}' not in out, out
    step = saved(tmp_path)["counters"]["step"]
    assert step == lines(tmp_path)[-1]["step"] and "the same command continues the run" in out
    train(1, "--steps", str(step + 1))


@pytest.mark.slow
def test_if_a_rank_is_killed_the_others_end_with_one_line_and_the_checkpoint_is_complete(tmp_path, torchrun):
    process = torchrun(2, "--steps", "100000", "--checkpoint-every", "2")
    wait_for_step(tmp_path, 4)                         # the checkpoint of step 2 is written before step 3 is logged
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "another process has left" in out
    assert saved(tmp_path)["counters"]["step"] >= 2


@pytest.mark.slow
def test_torchruns_restart_continues_from_the_checkpoint(tmp_path, torchrun):
    process = torchrun(2, "--steps", "100000", "--checkpoint-every", "2", options=("--max-restarts", "1"))
    wait_for_step(tmp_path, 2)
    old = set(ranks_of(process).values())
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    end, new = time.monotonic() + 120, set()
    while time.monotonic() < end and not (len(new) == 2 and new.isdisjoint(old)):
        time.sleep(0.2)
        new = set(ranks_of(process).values())
    before = lines(tmp_path)[-1]["step"]
    wait_for_step(tmp_path, before + 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "continuing" in out and saved(tmp_path)["counters"]["step"] > before


FAULT = """
def faulty(state, *rest):
    batch = draw_batch(state, *rest)
    if state.ranks.rank == 1 and state.counters["step"] == 3:
        {}
    return batch
draw_batch, training_step.draw_batch = training_step.draw_batch, faulty
"""


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(tmp_path, train):
    train(2, "--steps", "6", code=FAULT.format("batch.real.fill_(float('nan'))"))
    assert [line["skipped_updates"] for line in lines(tmp_path)] == [0, 0, 0, 2, 2, 2]
    assert saved(tmp_path)["counters"]["step"] == 6


@pytest.mark.slow
def test_ranks_with_other_weights_are_noticed_before_a_checkpoint_is_written(tmp_path, train):
    out = train(2, "--steps", "6", code=FAULT.format("next(state.generator.parameters()).data[0] += 1"), status=1)
    assert "rank 1 and rank 0 differ in their weights" in out
    assert saved(tmp_path)["counters"]["step"] == 0


@pytest.mark.slow
def test_invalid_input_is_printed_by_one_rank(tmp_path, train):
    (tmp_path / "empty").mkdir()
    for flags, words in ((["--batch-size", "3"], "--batch-size 3 is invalid for 2 processes"),
                         (["--data", str(tmp_path / "empty")], "no images"),
                         (["--micro-batch", "8"], "micro-batches of 8: must be a multiple of 16"),
                         (["--image-size", "33"], "--image-size 33")):
        out = train(2, "--steps", "1", *flags, status=1)           # torchrun's own status for any failure
        assert len(re.findall(rf"^.*training\.py: .*{re.escape(words)}.*$", out, re.MULTILINE)) == 1, out
        assert "exitcode  : 2" in out


def test_ranks_that_cannot_connect_say_so(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", taken.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(distributed.RankError, match=r"rank 0: the processes did not connect .* port \d+ of"), \
                distributed.joined(torch.device("cpu")):
            pass
