"""What a run shows while it trains: the table of healthy values, warnings, the log on a full disk, words."""

import importlib.util
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, error_line, lines
from PIL import Image

import command_line
import config
import model_definitions
import run_log
import run_state

BY_KEY = {value.key: value for value in run_log.HEALTHY}


def unhealthy(values, **changed):
    """Returns the keys whose values are outside their range, for config.py's constants with these changes."""
    c, found = SimpleNamespace(**{"IMAGE_SIZE": 64, "ALPHA_INIT": 3.0, "ALPHA_SPAN": 3.0, **changed}), []
    for key, number in values.items():
        low, high = run_log.range_of(BY_KEY[key].healthy, c)
        found += [key] if not low <= number <= high else []
    return found


# ------------------------------------------------------------------------------------- the table of healthy values

@pytest.mark.parametrize(("size", "values"), [             # medians of five lines
    (64, dict(score_gap=4.97, gradient_norm=1.21, wasserstein=4.11, reconstruction=0.052, kl=337,     # avatars, 17,000
              posterior_variance=0.361, alpha_mean=2.47, picture_spread=0.976)),                      # steps
    (64, dict(score_gap=1.79, gradient_norm=1.08, wasserstein=1.66, reconstruction=0.045, kl=375,     # with a prior,
              posterior_variance=0.093, prior_error=0.239, alpha_mean=2.66, picture_spread=0.962)),   # 10,000 steps
    (64, dict(score_gap=8.9, gradient_norm=1.18, wasserstein=7.1, reconstruction=0.196, kl=120,       # 400 steps
              posterior_variance=1.04, alpha_mean=2.53, picture_spread=0.8)),
    (64, dict(score_gap=-2.7, gradient_norm=0.9, wasserstein=-3.0, reconstruction=0.164, kl=272,      # photos, 2,000
              posterior_variance=0.652, alpha_mean=1.81, picture_spread=1.07)),                       # steps
    (128, dict(score_gap=15, gradient_norm=1.6, wasserstein=9.4, posterior_variance=0.4)),            # avatars
    (32, dict(score_gap=0.13, gradient_norm=0.893, wasserstein=0.144, reconstruction=0.248, kl=60,    # photos
              posterior_variance=1.21, alpha_mean=2.02, picture_spread=0.709))])
def test_runs_that_ended_well_are_healthy(size, values):
    assert unhealthy(values, IMAGE_SIZE=size) == []


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("values", [
    dict(picture_spread=50_000, score_gap=300, gradient_norm=8, kl=1e5, posterior_variance=40, reconstruction=0.9,
         alpha_mean=9.0, wasserstein=200, gradient_penalty=50, skipped_updates=3, rollbacks=1),
    dict(picture_spread=0.01, score_gap=-300, gradient_norm=0.05, kl=0.1, posterior_variance=0.01, reconstruction=0.0,
         alpha_mean=1.0, lr_scale=0.5)])
def test_absurd_values_are_outside_at_every_size(size, values):
    assert unhealthy(values, IMAGE_SIZE=size) == list(values)


def test_ranges_follow_from_the_constants():
    assert run_log.range_of({64: (0, 10), 128: (2, 30)}, SimpleNamespace(IMAGE_SIZE=96)) == (1, 20)
    assert unhealthy({"alpha_mean": 15}) and not unhealthy({"alpha_mean": 15}, ALPHA_INIT=8.0)
    constant = SimpleNamespace(ALPHA_INIT=3.0, ALPHA_SPAN=1.0)
    assert run_log.range_of(BY_KEY["alpha_mean"].healthy, constant) is None


@pytest.mark.parametrize("size", [32, 48, 64, 128, 256])
def test_a_warning_comes_only_outside_the_healthy_range(size):
    c = SimpleNamespace(IMAGE_SIZE=size, ALPHA_INIT=3.0, ALPHA_SPAN=3.0)
    for value in run_log.HEALTHY:
        if (lost := run_log.range_of(value.lost, c)) and (healthy := run_log.range_of(value.healthy, c)):
            assert lost[0] <= healthy[0] < healthy[1] <= lost[1] and "Try " in value.advice


def test_the_documentation_holds_the_table():
    file = Path(run_log.__file__).parent / "docs" / "running.md"
    assert run_log.healthy_table(config) in file.read_text(encoding="utf-8")


def test_the_table_names_every_logged_value(tmp_path):
    of_clips = {value.key for value in run_log.HEALTHY if value.key in ("code_error", "frame_error")
                or value.key.startswith(("motion_", "pair_", "near_", "far_", "evaluate_"))}
    assert set(run_steps(tmp_path, 2)[0]) - {"step", "images_seen", "best", "seconds"} == set(BY_KEY) - of_clips


# ------------------------------------------------------------------------------------- metrics.jsonl

def new_log(folder, step=0):
    return run_log.Log(folder, command_line.parse_constants([*SMALL, "--steps", "1000"])[0], step)


def log_step(log, step, skipped=0, **changed):
    """Logs one step of training: its counters, and its values with these changes."""
    counters = run_state.State.__dataclass_fields__["counters"].default_factory() | {
        "step": step, "images_seen": 4 * step, "skipped_updates": skipped, "skipped_in_a_row": skipped}
    values = {"critic_loss": -3.0, "score_gap": 3.0, "gradient_norm": 1.2, "gradient_penalty": 0.1,
              "generator_loss": 20.0, "reconstruction": 0.2, "kl": 60.0, "posterior_variance": 1.0,
              "prior_error": 0.5, "alpha_mean": 2.5, "alpha_min": 2.0, "alpha_max": 3.0, "alpha_spread": 0.1,
              "picture_spread": 0.9, **changed}
    state = SimpleNamespace(counters=counters, generator_optimizer=SimpleNamespace(param_groups=[{"lr": 1e-3}]))
    log.step(state, {name: torch.tensor(value) for name, value in values.items()})


def run_steps(folder, steps, **changed):
    """Logs steps; a changed value may be a function of the step. Returns the lines of metrics.jsonl."""
    log = new_log(folder)
    for step in range(1, steps + 1):
        log_step(log, step, **{name: value(step) if callable(value) else value for name, value in changed.items()})
    log.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_log_every_th_step_is_a_line_with_the_estimated_distance(tmp_path):
    rows = run_steps(tmp_path, 7)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[0]["wasserstein"] == pytest.approx(2.5) and rows[0]["kl"] == 60 and rows[0]["images_seen"] == 8


def test_of_many_steps_in_a_row_that_are_not_finite_few_are_printed(tmp_path, capsys):
    log = new_log(tmp_path)
    for skipped in (1, 2, 3, 4, 5):
        log_step(log, 2 * skipped, skipped, kl=float("nan"))
    log.close()
    assert re.findall(r"\((\d) in a row\)", capsys.readouterr().out) == ["1", "2", "4"]


def test_lines_that_a_full_disk_does_not_take_are_dropped_with_one_warning(tmp_path, capsys):
    log, (limit, largest) = new_log(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, largest))       # writing more fails as it does on a full disk
    try:
        for step in (2, 3, 4):
            log.write({"step": step, "value": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, largest))
    log.write({"step": 5})
    log.write({"step": 6})
    log.close()
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1
    run_log.cut_metrics(tmp_path / "metrics.jsonl", 10)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps in ([1, 6], [1, 5, 6])        # 5 may share its line with the first bytes of 2


def test_a_continued_log_has_no_line_after_its_step_and_no_incomplete_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 2}\n{"step": 4}\n\xff\x00\n[]\n{"step": 6}\n{"kl": 1}\n{"step": 3, "k')
    log = new_log(tmp_path, step=4)
    log.write({"step": 5})
    log.close()
    assert file.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 5}\n'


# ------------------------------------------------------------------------------------- warnings and words

@pytest.mark.parametrize(("changed", "words"), [
    ({}, []), ({"gradient_norm": 20.0}, ["gradient norm 20"]), ({"picture_spread": 0.01}, ["image spread 0.01"]),
    ({"alpha_min": 1.0, "alpha_mean": 1.0, "alpha_max": 1.001}, ["alpha, largest 1"]),
    ({"alpha_min": 8.99, "alpha_mean": 9.0, "alpha_max": 9.0}, ["alpha, smallest 8.99"]),
    ({"gradient_norm": lambda step: 1.2 if step % 10 == 0 else 20.0}, []),                  # four lines in a row
    ({"gradient_norm": lambda step: 1.2 if step == 20 else 20.0}, ["gradient norm 20"])])   # leaves its range again
def test_a_lost_run_is_warned_of_once_after_five_lines_with_what_to_try(tmp_path, capsys, changed, words):
    run_steps(tmp_path, 60, **changed)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Try " in line]
    assert len(warnings) == len(words)
    assert all(line.startswith(f"step 10: {start}") for line, start in zip(warnings, words))


def test_durations_in_words():
    assert [run_log.duration(s) for s in (0.4, 89, 600, 5399, 9000)] == ["0 s", "89 s", "10 min", "90 min", "2.5 h"]


def test_a_run_of_more_than_a_day_names_flags_that_fit_one():
    c = SimpleNamespace(STEPS=20000, MINUTES=0, FOLDERS="ignore", VAE_KIMG=40, BATCH_SIZE=8)
    assert "to fit a day, give --steps 10810, or a smaller --image-size" in run_log.duration_line(c, 8.0, 10)
    assert "fit a day" not in run_log.duration_line(c, 1.0, 10)
    c.MINUTES = 30
    assert run_log.duration_line(c, 8.0, 10).endswith("--minutes 30 ends before that")
    c.FOLDERS = "clips"
    assert run_log.duration_line(c, 0.5, 10, 1000 * 16) == "stage 1 of 3 will take 25 min more at 0.50 s per step"
    assert "steps will take" in run_log.duration_line(c, 0.5, 10, 1000 * 40)


def test_the_start_prints_the_parameters_of_each_part(capsys):
    c = command_line.parse_constants(SMALL)[0]
    generator, critic = model_definitions.build(c)
    state = SimpleNamespace(generator=generator, critic=critic, device="cpu", ranks=SimpleNamespace(size=2))
    run_log.print_start(c, state, SimpleNamespace(train=range(1200), held_out=range(30), clip_offsets=None))
    out = capsys.readouterr().out
    counts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", out)]
    assert len(counts) == 6 and sum(counts) == sum(p.numel() for m in (generator, critic) for p in m.parameters())
    assert "IMAGE_SIZE=32" in out and "1,200 images to train on, 30 held out; device cpu, 2 processes" in out


def test_samples_come_early_and_then_at_their_distance():
    steps = [step for step in range(5001) if run_log.is_sample_step(step, 1000)]
    assert steps == [0, 50, 100, 200, 400, 800, 1000, 2000, 3000, 4000, 5000]
    assert [step for step in range(61) if run_log.is_sample_step(step, 20)] == [0, 20, 40, 60]


# ------------------------------------------------------------------------------------- TensorBoard

def events_of(folder):
    """Returns what TensorBoard shows of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="the optional package tensorboard is not installed")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_tensorboard_gets_the_values_of_the_log_and_the_sheets_also_after_a_lost_step(run, tmp_path):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    folder = tmp_path / "runs" / "photos"
    flags = ("--tensorboard", "--checkpoint-every", "2", "--sample-every", "2")
    assert run("--steps", "6", *flags) == 0
    (folder / "checkpoints" / "step_00000006.pt").unlink()                   # steps 5 and 6 are lost
    assert run("--steps", "8", *flags) == 0
    found, logged = events_of(folder), {line["step"]: line["reconstruction"] for line in lines(tmp_path)}
    points = [(event.step, event.value) for event in found.Scalars("reconstruction")]
    assert points == [(step, pytest.approx(logged[step], rel=1e-6)) for step in (2, 4, 6, 8)]
    assert {"generated", "real", "reconstructed", "alpha"} <= set(found.Tags()["images"])
    sheets = {event.step: (event.width, event.height) for event in found.Images("generated")}
    with Image.open(folder / "samples" / "step_00000008_generated.png") as sheet:
        assert sheets[8] == sheet.size and {4, 6} <= sheets.keys()


def test_a_full_disk_ends_the_writing_for_tensorboard_and_not_the_training(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    c, _ = command_line.parse_constants([*SMALL, "--tensorboard"])
    log = run_log.Log(tmp_path, c, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    log.board.add_scalar = full
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
    log.show_samples({"step": 2})
    log.close()
    assert capsys.readouterr().out.count("training continues without TensorBoard") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_tensorboard_is_named(run, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--steps", "1", "--tensorboard") == 2
    assert "--tensorboard needs the package tensorboard" in error_line(capsys)
