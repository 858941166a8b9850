"""What a run shows while it trains: the table of healthy values, warnings, the log on a full disk, words."""

import contextlib
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import command_line
import config
import model_definitions
import run_log

# Values of runs that went well, medians of five lines: (IMAGE_SIZE, values).
HEALTHY_RUNS = {
    "avatars, 17,000 steps": (64, dict(
        score_gap=4.97, gradient_norm=1.21, wasserstein=4.11, reconstruction=0.052, kl=337, posterior_variance=0.361,
        alpha_mean=2.47, picture_spread=0.976)),
    "avatars, 400 steps": (64, dict(
        score_gap=8.9, gradient_norm=1.18, wasserstein=7.1, reconstruction=0.196, kl=120, posterior_variance=1.04,
        alpha_mean=2.53, picture_spread=0.8)),
    "photos, 2,000 steps": (64, dict(
        score_gap=-2.7, gradient_norm=0.9, wasserstein=-3.0, reconstruction=0.164, kl=272, posterior_variance=0.652,
        alpha_mean=1.81, picture_spread=1.07)),
    "avatars at 128 px": (128, dict(score_gap=15, gradient_norm=1.6, wasserstein=9.4, posterior_variance=0.4)),
    "photos at 32 px": (32, dict(
        score_gap=0.13, gradient_norm=0.893, wasserstein=0.144, reconstruction=0.248, kl=60, posterior_variance=1.21,
        alpha_mean=2.02, picture_spread=0.709)),
}
BY_KEY = {value.key: value for value in run_log.HEALTHY}


def constants(**changed):
    return SimpleNamespace(**{"IMAGE_SIZE": 64, "ALPHA_INIT": 3.0, "ALPHA_SPAN": 3.0, **changed})


def inside(key, number, c):
    low, high = run_log.range_of(BY_KEY[key].healthy, c)
    return low <= number <= high


# ------------------------------------------------------------------------------------- the table of healthy values

@pytest.mark.parametrize("name", HEALTHY_RUNS)
def test_runs_that_ended_well_are_healthy(name):
    size, values = HEALTHY_RUNS[name]
    assert [key for key, number in values.items() if not inside(key, number, constants(IMAGE_SIZE=size))] == []


@pytest.mark.parametrize(("key", "number"), [
    ("picture_spread", 50_000), ("picture_spread", 0.01), ("score_gap", 300), ("score_gap", -300), ("gradient_norm", 8),
    ("gradient_norm", 0.05), ("kl", 0.1), ("kl", 1e5), ("posterior_variance", 40), ("posterior_variance", 0.01),
    ("reconstruction", 0.9), ("reconstruction", 0.0), ("alpha_mean", 1.0), ("alpha_mean", 9.0), ("wasserstein", 200),
    ("gradient_penalty", 50), ("skipped_updates", 3), ("rollbacks", 1), ("lr_scale", 0.5)])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_absurd_values_are_outside_at_every_size(key, number, size):
    assert not inside(key, number, constants(IMAGE_SIZE=size))


def test_a_gap_that_is_healthy_at_128_px_is_too_large_at_64_px():
    assert inside("score_gap", 20, constants(IMAGE_SIZE=128)) and not inside("score_gap", 20, constants(IMAGE_SIZE=64))
    assert run_log.range_of({64: (0, 10), 128: (2, 30)}, constants(IMAGE_SIZE=96)) == (1, 20)


def test_the_range_of_alpha_follows_from_its_constants():
    assert inside("alpha_mean", 15, constants(ALPHA_INIT=8.0)) and not inside("alpha_mean", 15, constants())
    assert run_log.range_of(BY_KEY["alpha_mean"].healthy, constants(ALPHA_SPAN=1.0)) is None       # it is a constant


@pytest.mark.parametrize("size", [32, 48, 64, 128, 256])
def test_a_warning_comes_only_outside_the_healthy_range(size):
    c = constants(IMAGE_SIZE=size)
    for value in run_log.HEALTHY:
        if (lost := run_log.range_of(value.lost, c)) and (healthy := run_log.range_of(value.healthy, c)):
            assert lost[0] <= healthy[0] < healthy[1] <= lost[1] and "Try " in value.advice


def test_the_documentation_holds_the_table():
    file = Path(run_log.__file__).parent / "docs" / "running.md"
    assert run_log.healthy_table(config) in file.read_text(encoding="utf-8")


def test_the_table_names_every_logged_value(tmp_path):
    log, state = run_log.Log(tmp_path, log_constants(), 0), SimpleNamespace(counters=counters(2))
    log.step(state, tensors())
    log.close()
    logged = set(json.loads((tmp_path / "metrics.jsonl").read_text()))
    assert logged - {"step", "images_seen", "best", "seconds"} == set(BY_KEY)
    assert all(f"`{key}`" in run_log.healthy_table(config) for key in BY_KEY)


# ------------------------------------------------------------------------------------- metrics.jsonl

def log_constants(*flags):
    return command_line.parse_constants([*SMALL, *flags])[0]


def counters(step, skipped=0):
    return {"step": step, "images_seen": 4 * step, "rollbacks": 0, "lr_scale": 1.0, "skipped_updates": skipped,
            "skipped_in_a_row": skipped, "best": None}


def tensors(**changed):
    """The scalars of one training step."""
    values = {"critic_loss": -3.0, "score_gap": 3.0, "gradient_norm": 1.2, "gradient_penalty": 0.1,
              "generator_loss": 20.0, "reconstruction": 0.2, "kl": 60.0, "posterior_variance": 1.0, "alpha_mean": 2.5,
              "alpha_min": 2.0, "alpha_max": 3.0, "alpha_spread": 0.1, "picture_spread": 0.9, **changed}
    return {name: torch.tensor(value) for name, value in values.items()}


def run_steps(folder, steps, c=None, **changed):
    """Logs steps with these values; returns the lines of metrics.jsonl."""
    log = run_log.Log(folder, c or log_constants(), 0)
    for step in range(1, steps + 1):
        log.step(SimpleNamespace(counters=counters(step)), tensors(**changed))
    log.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_log_every_th_step_is_a_line_with_the_estimated_distance(tmp_path):
    rows = run_steps(tmp_path, 7)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[0]["wasserstein"] == pytest.approx(2.5) and rows[0]["kl"] == 60 and rows[0]["images_seen"] == 8


def test_a_step_that_is_not_finite_is_logged_as_null_and_printed_with_its_values(tmp_path, capsys):
    log = run_log.Log(tmp_path, log_constants(), 0)
    for skipped in (1, 2, 3):                              # the third is logged, not printed
        log.step(SimpleNamespace(counters=counters(2 * skipped + 1, skipped)), tensors(kl=float("nan")))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kl"] for row in rows] == [None] * 3
    out = capsys.readouterr().out
    assert out.count("was not applied") == 2 and "kl nan" in out and "score_gap 3" in out


@contextlib.contextmanager
def files_limited(size):
    """No file may grow beyond `size` bytes: writing fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_a_full_disk_does_not_take_are_dropped_with_one_warning(tmp_path, capsys):
    log = run_log.Log(tmp_path, log_constants(), 0)
    log.write({"step": 1})
    with files_limited(20):
        for step in (2, 3, 4):
            log.write({"step": step, "value": 0.123456789})
    log.write({"step": 5})
    log.close()
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1
    run_log.cut_metrics(tmp_path / "metrics.jsonl", 10)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps in ([1], [1, 5])        # 5 may share its line with the first bytes of 2


def test_a_continued_log_has_no_line_after_its_step_and_no_incomplete_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 2}\n{"step": 4}\n\xff\x00\n[]\n{"step": 6}\n{"kl": 1}\n{"step": 3, "k')
    log = run_log.Log(tmp_path, log_constants(), 4)
    log.write({"step": 5})
    log.close()
    assert file.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 5}\n'


def test_a_rollback_removes_the_lines_after_it(tmp_path):
    log = run_log.Log(tmp_path, log_constants(), 0)
    for step in (2, 4, 6):
        log.write({"step": step})
    log.back_to(2)
    log.write({"step": 4, "again": True})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4, "again": true}\n'


# ------------------------------------------------------------------------------------- warnings and words

@pytest.mark.parametrize(("changed", "words"), [
    ({}, None), ({"gradient_norm": 20.0}, "gradient norm 20"), ({"score_gap": 5e4}, "score gap 5e+04"),
    ({"picture_spread": 0.01}, "image spread 0.01"), ({"picture_spread": 5e4}, "image spread 5e+04"),
    ({"alpha_min": 1.0, "alpha_mean": 1.0, "alpha_max": 1.001}, "alpha, largest 1"),
    ({"alpha_min": 8.99, "alpha_mean": 9.0, "alpha_max": 9.0}, "alpha, smallest 8.99")])
def test_a_lost_run_is_warned_of_once_with_what_to_try(tmp_path, capsys, changed, words):
    c = log_constants("--steps", "1000")
    run_steps(tmp_path, 9, c, **changed)                   # four lines: a moment is no reason to warn
    assert "Try " not in capsys.readouterr().out
    run_steps(tmp_path, 40, c, **changed)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Try " in line]
    assert len(warnings) == (words is not None)
    assert all(words in line and line.startswith("step 10: ") for line in warnings)


def test_a_value_that_comes_back_in_time_is_not_warned_of(tmp_path, capsys):
    log = run_log.Log(tmp_path, log_constants("--steps", "1000"), 0)
    for step in range(2, 60, 2):
        norm = 1.2 if step % 10 == 0 else 20.0             # four lines in a row outside, then one inside
        log.step(SimpleNamespace(counters=counters(step)), tensors(gradient_norm=norm))
    log.close()
    assert "Try " not in capsys.readouterr().out


def test_a_value_is_warned_of_once_even_if_it_leaves_its_range_again(tmp_path, capsys):
    log = run_log.Log(tmp_path, log_constants("--steps", "1000"), 0)
    for step in range(2, 60, 2):
        norm = 1.2 if step == 20 else 20.0
        log.step(SimpleNamespace(counters=counters(step)), tensors(gradient_norm=norm))
    log.close()
    assert capsys.readouterr().out.count("Try ") == 1


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (5399, "90 min"),
                                                (9000, "2.5 h")])
def test_durations_in_words(seconds, words):
    assert run_log.duration(seconds) == words


def test_a_run_of_more_than_a_day_names_flags_that_fit_one():
    c = command_line.parse_constants(["--steps", "20000"])[0]
    assert "to fit a day, give --steps 10810, or a smaller --image-size" in run_log.duration_line(c, 8.0, 10)
    assert "fit a day" not in run_log.duration_line(c, 1.0, 10)
    c.MINUTES = 30
    assert run_log.duration_line(c, 8.0, 10).endswith("--minutes 30 ends before that")


def test_the_start_prints_the_parameters_of_each_part(capsys):
    c = log_constants()
    generator, critic = model_definitions.build(c)
    state = SimpleNamespace(generator=generator, critic=critic, device="cpu", ranks=SimpleNamespace(size=2))
    run_log.print_start(c, state, SimpleNamespace(train=range(1200), held_out=range(30)))
    out = capsys.readouterr().out
    counts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", out)]
    assert len(counts) == 5 and sum(counts) == sum(p.numel() for m in (generator, critic) for p in m.parameters())
    assert "IMAGE_SIZE=32" in out and "1,200 images to train on, 30 held out; device cpu, 2 processes" in out


def test_samples_come_early_and_then_at_their_distance():
    steps = [step for step in range(5001) if run_log.is_sample_step(step, 1000)]
    assert steps == [0, 50, 100, 200, 400, 800, 1000, 2000, 3000, 4000, 5000]
    assert [step for step in range(61) if run_log.is_sample_step(step, 20)] == [0, 20, 40, 60]
