"""Several processes under the real torchrun on gloo: they train what one process would, stop together, and notice one
that is gone or has other weights. Only on Linux: /proc tells who torchrun's children are."""

import dataclasses
import json
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
from conftest import SMALL, draw_images

import checkpoints
import data
import distributed
import training
import training_step

SCRIPT = Path(training.__file__)
FLAGS = ["--batch-size", "8", "--log-every", "1"]              # 8 pictures: 4, 2 or 1 a process


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and gloo")
STARTED = []


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    for process in STARTED:
        if process.poll() is None:
            for child in workers(process).values():
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.communicate()
    STARTED.clear()


def torchrun(ranks, folder, *flags, script=(SCRIPT,), options=()):
    STARTED.append(subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options,
         "--", *map(str, script), *map(str, flags)], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}))
    return STARTED[-1]


def in_double(setattr=setattr):
    """Has training.py train in float64. Rounding in float32 grows within 20 steps to a quarter of the way that weights
    travel, for Adam without momentum makes whole steps of gradients that are nothing but rounding."""
    new_state, make_batch, to_image = training.new_state, training_step.make_batch, data.to_image

    def double_state(*arguments):
        state = new_state(*arguments)
        for part in (state.generator, state.critic, state.ema):
            part.double()
        return state

    def double_batch(*arguments):
        batch = make_batch(*arguments)
        numbers = {name: getattr(batch, name).double() for name in ("real", "z", "posterior_noise", "between")}
        return dataclasses.replace(batch, **numbers, changes=batch.changes._replace(added=batch.changes.added.double()))

    setattr(training, "new_state", double_state)
    for name in ("write_samples", "print_start"):                # make float32 of their own
        setattr(training, name, lambda *_: None)
    setattr(data, "to_image", lambda pixels: to_image(pixels).double())
    setattr(training_step, "make_batch", double_batch)


def train(ranks, folder, *flags, status=0):
    """Trains in folder/runs, with torchrun where there are several processes; returns what was printed."""
    arguments = ["--data", str(folder / "photos"), "--runs-dir", str(folder / "runs"), *SMALL, *FLAGS, *flags]
    if ranks == 1:
        assert training.main(arguments) == status
        return ""
    script = [SCRIPT]
    if training.new_state is not training_step.new_state:
        script = [folder / "double.py"]
        script[0].write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                             "import test_distributed, training\n"
                             "test_distributed.in_double()\nsys.exit(training.main())\n")
    process = torchrun(ranks, folder, *arguments, script=script)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    return out


@pytest.fixture
def folder(tmp_path):
    draw_images(str(tmp_path / "photos"), 12)
    return tmp_path


def saved(folder, run="photos"):
    return checkpoints.find(folder / "runs" / run)[1]


def log(folder, run="photos"):
    return [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def start(folder):
    """Weights at step 0, by part."""
    train(1, folder, "--steps", "1", "--run", "start", "--learning-rate", "1e-30", "--critic-learning-rate", "1e-30")
    return saved(folder, "start")


def assert_nearly_same(one, other, origin, share=1e-4):
    """For each module the difference is at most `share` of the distance that its weights have travelled."""
    for part in ("generator", "critic", "ema"):
        modules = {}
        for name in one[part]:
            modules.setdefault(name.rsplit(".", 1)[0], []).append(name)
        for module, names in modules.items():
            a, b, first = (torch.cat([state[part][name].flatten() for name in names]) for state in (one, other, origin))
            assert (a - b).norm() <= share * (a - first).norm() + 1e-9, (part, module)


# ------------------------------------------------------------------------------------- the same mathematics

@pytest.mark.parametrize("ranks, flags", [
    (2, []), pytest.param(4, ["--flip"], marks=pytest.mark.slow),
    pytest.param(2, ["--micro-batch", "2", "--n-critic", "2", "--gp-every", "3"], marks=pytest.mark.slow)])
def test_several_processes_train_what_one_would(folder, monkeypatch, ranks, flags):
    """12 pictures, batches of 8: every second batch goes over the border of an epoch."""
    in_double(monkeypatch.setattr)
    origin = start(folder)
    for run, n in (("one", 1), ("many", ranks)):
        train(n, folder, "--steps", "20", "--run", run, *flags)
    assert_nearly_same(saved(folder, "one"), saved(folder, "many"), origin)
    for one, many in zip(log(folder, "one"), log(folder, "many")):
        for name in ("critic_loss", "score_gap", "gradient_norm", "reconstruction", "kl", "alpha_min", "alpha_max"):
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
    assert saved(folder, "many")["counters"] == saved(folder, "one")["counters"]


@pytest.mark.slow
def test_the_first_steps_gradients_agree(folder):
    script = folder / "gradients.py"
    script.write_text(f"""
import sys, torch, distributed, training, training_step, command_line, data, os
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import SMALL
with distributed.joined(torch.device("cpu")) as ranks:
    c, _ = command_line.parse_constants([*SMALL, *{FLAGS!r}])
    state = training_step.new_state(c, torch.device("cpu"), ranks)
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    kept, update = [], training_step.apply_update
    def keep(state, model, optimizer):
        distributed.average_gradients(state.ranks, model)
        kept.append([p.grad.clone() for p in model.parameters()])
    training_step.apply_update = keep
    images = data.load_images({str(folder / 'photos')!r}, 32, 3, {str(folder / 'cache')!r}, workers=0)
    training_step.training_step(state, c, images)
    if ranks.first:
        torch.save(kept, f"gradients_{{ranks.size}}.pt")
""")
    for ranks in (1, 2):
        process = torchrun(ranks, folder, script=(script,))
        assert process.wait(120) == 0, process.stdout.read()
    one, two = (torch.load(folder / f"gradients_{ranks}.pt") for ranks in (1, 2))
    for a, b in zip(one, two):
        whole = torch.cat([gradient.flatten() for gradient in a]).norm()
        for x, y in zip(a, b):
            assert (x - y).norm() <= 1e-4 * x.norm() + 1e-7 * whole


@pytest.mark.slow
def test_going_on_with_another_number_of_processes_is_the_same_run(folder, monkeypatch):
    in_double(monkeypatch.setattr)
    origin = start(folder)
    train(1, folder, "--steps", "12", "--run", "whole")
    for ranks, steps in ((1, 4), (2, 8), (4, 12)):
        train(ranks, folder, "--steps", str(steps), "--run", "parts")
    assert_nearly_same(saved(folder, "whole"), saved(folder, "parts"), origin)
    assert [line["step"] for line in log(folder, "parts")] == list(range(1, 13))


@pytest.mark.slow
def test_going_on_with_as_many_processes_is_exact(folder):
    train(2, folder, "--steps", "6", "--run", "whole")
    for steps in (3, 6):
        train(2, folder, "--steps", str(steps), "--run", "parts")
    one, other = saved(folder, "whole"), saved(folder, "parts")
    for part in ("generator", "critic", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


@pytest.mark.slow
def test_scores_are_shared_out_and_equal(folder):
    for run, n in (("one", 1), ("many", 2)):
        train(n, folder, "--steps", "1", "--run", run, "--evaluate-every", "1", "--evaluate-count", "9")
    one, many = (next(line for line in log(folder, run) if "evaluate_sliced_wasserstein" in line)
                 for run in ("one", "many"))
    assert many == pytest.approx(one, rel=0.05)
    assert (folder / "runs" / "many" / "checkpoints" / "best.pt").exists()


# ------------------------------------------------------------------------------------- signals, faults

def wait_for_step(folder, step):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        file = folder / "runs" / "photos" / "metrics.jsonl"
        if file.exists() and file.read_text().endswith("\n") and log(folder)[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError("no steps")


def workers(process):
    """Process numbers of torchrun's children, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:                                        # it has just ended
            continue
        rank = next((int(entry[5:]) for entry in environment if entry.startswith("RANK=")), None)
        if rank is not None:
            found[rank] = int(child)
    return found


def running(folder, *flags, ranks=2, options=()):
    process = torchrun(ranks, folder, "--data", folder / "photos", "--runs-dir", folder / "runs", *SMALL, *FLAGS,
                       "--steps", "100000", *flags, options=options)
    wait_for_step(folder, 2)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", 0, 1])
def test_a_signal_to_one_or_all_stops_all_at_one_step_with_a_checkpoint(folder, whom):
    process = running(folder)
    os.kill(process.pid if whom == "torchrun" else workers(process)[whom], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "Traceback (most recent call last):\n  File \"" + str(SCRIPT) not in out, out
    step = saved(folder)["counters"]["step"]
    assert step == log(folder)[-1]["step"] and "the same command again goes on from there" in out
    train(1, folder, "--steps", str(step + 1))


@pytest.mark.slow
def test_when_one_dies_the_others_leave_with_a_line_and_the_checkpoint_is_whole(folder):
    process = running(folder, "--checkpoint-every", "2")
    wait_for_step(folder, 4)                           # the checkpoint of step 2 is written before step 3 is logged
    begun = time.monotonic()
    os.kill(workers(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert "another process has left" in out
    assert process.returncode == 1 and time.monotonic() - begun < 45
    assert saved(folder)["counters"]["step"] >= 2


@pytest.mark.slow
def test_torchruns_restart_goes_on_from_the_checkpoint(folder):
    process = running(folder, "--checkpoint-every", "2", options=("--max-restarts", "1"))
    old = set(workers(process).values())
    os.kill(workers(process)[1], signal.SIGKILL)
    end, new = time.monotonic() + 120, set()
    while time.monotonic() < end and not (len(new) == 2 and new.isdisjoint(old)):
        time.sleep(0.2)
        new = set(workers(process).values())
    before = log(folder)[-1]["step"]
    wait_for_step(folder, before + 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "continuing" in out and saved(folder)["counters"]["step"] > before


@pytest.mark.slow
@pytest.mark.parametrize("fault, words", [
    ("if state.ranks.rank == 1 and state.counters['step'] == 3: batch.real.fill_(float('nan'))", None),
    ("if state.ranks.rank == 1 and state.counters['step'] == 3: next(state.generator.parameters()).data[0] += 1",
     "rank 1 and rank 0 differ in their weights")])
def test_a_fault_on_one_process_is_all_ones(folder, fault, words):
    script = folder / "faulty.py"
    script.write_text(f"""
import sys, training, training_step
make = training_step.make_batch
def faulty(state, *rest):
    batch = make(state, *rest)
    {fault}
    return batch
training_step.make_batch = faulty
sys.exit(training.main())
""")
    process = torchrun(2, folder, "--data", folder / "photos", "--runs-dir", folder / "runs", *SMALL, *FLAGS, "--steps",
                       "6", script=(script,))
    out, _ = process.communicate(timeout=120)
    if words is None:
        assert process.returncode == 0, out
        assert [line["skipped_updates"] for line in log(folder)] == [0, 0, 0, 2, 2, 2]
        assert saved(folder)["counters"]["step"] == 6
    else:
        assert process.returncode == 1 and words in out
        assert saved(folder)["counters"]["step"] == 0                      # no later one was written


@pytest.mark.slow
def test_bad_input_is_said_by_one_process(folder):
    (folder / "empty").mkdir()
    for flags, words in ((["--batch-size", "3"], "can't be dealt out to 2 processes: give 2 or 4"),
                         (["--data", str(folder / "empty")], "no images in it"),
                         (["--batch-size", "8", "--micro-batch", "8"], "in micro-batches of 8: give 16"),
                         (["--image-size", "33"], "--image-size 33")):
        out = train(2, folder, "--steps", "1", *flags, status=1)           # torchrun's own status for any failure
        assert len(re.findall(rf"^.*training\.py: .*{re.escape(words)}.*$", out, re.MULTILINE)) == 1, out
        assert "exitcode  : 2" in out


# ------------------------------------------------------------------------------------- alone

def test_alone_nothing_is_done():
    alone, thing = distributed.ALONE, object()
    assert alone.share(12) == slice(0, 12) and distributed.largest(alone, [3, 0]) == [3, 0]
    assert distributed.gathered(alone, thing) == [thing] and distributed.on_first(alone, lambda: thing) is thing
    distributed.check_equal(alone, thing, "nothing")


def test_shares_are_the_whole_and_do_not_overlap():
    indices = range(12)
    assert [i for rank in range(4) for i in indices[distributed.Ranks(rank, 4).share(12)]] == list(indices)


def test_processes_that_do_not_meet_say_so_and_blame_nobody(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", taken.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(distributed.RankError, match=r"rank 0: the processes have not met .*is the port"), \
                distributed.joined(torch.device("cpu")):
            pass


def test_torchs_own_words_are_cut_to_what_says_something():
    text = "[/__w/src/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:42642: Connection reset by peer\nmore"
    assert distributed.brief(RuntimeError(text)) == "Read error [127.0.0.1]:42642: Connection reset by peer"
    assert len(distributed.brief(RuntimeError("word " * 100))) <= 160
