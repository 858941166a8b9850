"""The real script, in process, for a few steps on a few real files; bad input; one step by its parts."""

import ctypes
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, lines
from PIL import Image

import checkpoints
import command_line
import data
import losses
import run_log
import training
import training_step


@pytest.fixture
def small_state(photos, tmp_path):
    c, _ = command_line.parse_constants(["--data", photos, *SMALL])
    images = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0)
    return training_step.new_state(c, torch.device("cpu")), c, images


def vector(model):
    """A copy of all weights, end to end."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------- a run from outside

def test_a_run_leaves_what_a_person_looks_for(run, tmp_path, capsys):
    assert run("--steps", "12") == 0
    folder, out = tmp_path / "runs" / "photos", capsys.readouterr().out
    for kind, suffix in (("real", "png"), ("generated", "png"), ("reconstructed", "png"), ("alpha", "png"),
                         ("video", "gif")):
        for step in (0, 12):
            Image.open(folder / "samples" / f"step_{step:08d}_{kind}.{suffix}").load()
    assert json.loads((folder / "config.json").read_text())["IMAGE_SIZE"] == 32
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    assert lines(tmp_path)[-1]["images_seen"] == 48
    assert {"critic_loss", "score_gap", "gradient_norm", "wasserstein", "reconstruction", "kl", "posterior_variance",
            "alpha_mean", "alpha_min", "alpha_max", "images_per_second"} <= lines(tmp_path)[-1].keys()
    for words in ("TRANSFORMER_IN_CHANNELS=48", "multiply-adds", "Transformer", "12 steps will take", "step 12/12",
                  "12 images to train on"):
        assert words in out
    assert (folder / "checkpoints" / "step_00000012.pt").exists()
    assert '"reload_seconds":0' in (folder / "index.html").read_text()


def test_the_page_of_a_run_reloads_itself_until_the_run_ends(run, tmp_path, monkeypatch):
    live = []
    write = training.report.write
    monkeypatch.setattr(training.report, "write", lambda folder, on: live.append(on) or write(folder, on))
    assert run("--steps", "5", "--sample-every", "2") == 0
    assert live == [True, True, True, False]                       # steps 0, 2, 4, the end
    assert run("--steps", "6", "--sample-every", "2") == 0
    assert live[4:] == [True, False]


def test_the_same_command_goes_on_and_equals_a_run_without_a_break(run, tmp_path, capsys):
    run("--steps", "7", "--run", "whole")
    run("--steps", "3", "--run", "broken")
    assert "continuing" not in capsys.readouterr().out
    run("--steps", "7", "--run", "broken")
    assert "continuing" in capsys.readouterr().out

    whole, broken = (checkpoints.newest(tmp_path / "runs" / name / "checkpoints")[1] for name in ("whole", "broken"))
    for part in ("generator", "critic", "ema"):
        for name, weights in whole[part].items():
            assert torch.equal(weights, broken[part][name]), (part, name)
    clock = ("seconds", "images_per_second")
    assert [{k: v for k, v in line.items() if k not in clock} for line in lines(tmp_path, "whole")] == \
           [{k: v for k, v in line.items() if k not in clock} for line in lines(tmp_path, "broken")]


def test_a_finished_run_says_how_to_go_on(run, capsys):
    run("--steps", "1")
    assert run("--steps", "1") == 0
    assert "higher --steps" in capsys.readouterr().out


def test_metrics_after_the_checkpoint_are_cut_when_a_run_goes_on(run, tmp_path):
    run("--steps", "2")
    file = tmp_path / "runs" / "photos" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lost": true}\n{"step": 6, "los')
    run("--steps", "4")
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert not any("lost" in line for line in lines(tmp_path))


def test_minutes_ends_a_run_cleanly_with_a_checkpoint(run, tmp_path, capsys, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))
    assert run("--steps", "1000000", "--minutes", "0.5") == 0
    assert "goes on from there" in capsys.readouterr().out
    step = checkpoints.newest(tmp_path / "runs" / "photos" / "checkpoints")[1]["counters"]["step"]
    assert 0 < step <= 30


def test_sigterm_finishes_the_step_saves_and_exits_143(run, tmp_path):
    def when_it_trains():
        for _ in range(600):
            if (tmp_path / "runs" / "photos" / "metrics.jsonl").exists() and lines(tmp_path):
                return signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)

    thread = threading.Thread(target=when_it_trains)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    assert run("--steps", "1000000", "--minutes", "2") == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints.newest(tmp_path / "runs" / "photos" / "checkpoints")[1]["counters"]["step"] >= 2


def test_grey_pictures_and_an_odd_size_train(run, tmp_path):
    assert run("--steps", "1", "--channels", "1", "--image-size", "48", "--patch", "12") == 0


def test_skipped_files_are_named_and_stored_with_the_run(run, photos, tmp_path, capsys):
    (Path(photos) / "broken.jpg").write_bytes(b"no picture")
    assert run("--steps", "1") == 0
    assert "broken.jpg" in capsys.readouterr().out
    assert "broken.jpg" in (tmp_path / "runs" / "photos" / "skipped.txt").read_text()


def test_without_data_the_demo_set_is_drawn_and_trained_on(tmp_path, monkeypatch, capsys):
    make = training.demo_images.make
    monkeypatch.setattr(training.demo_images, "make", lambda folder, size: make(folder, 16, size))
    argv = ["--runs-dir", str(tmp_path / "runs"), "--steps", "1", *SMALL]
    assert training.main(argv) == 0
    assert "16 images to train on" in capsys.readouterr().out
    assert (tmp_path / "runs" / "demo" / "checkpoints" / "step_00000001.pt").exists()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("a file in the way")
    assert training.main(argv) == 2
    assert "can't be written (Not a directory); give another --runs-dir" in one_line(capsys)


def test_a_runs_own_pictures_are_never_training_images(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    for steps in ("1", "2"):
        assert training.main(["--data", ".", "--steps", steps, *SMALL]) == 0
        assert "12 images to train on" in capsys.readouterr().out
    assert training.main(["--data", ".", "--runs-dir", ".", "--steps", "1", *SMALL]) == 2
    assert "among the images" in one_line(capsys)
    assert training.main(["--data", "runs/photos", "--runs-dir", "runs", "--steps", "1", *SMALL]) == 2
    assert "among the images" in one_line(capsys)


def test_a_damaged_checkpoint_is_set_aside_and_does_not_count_as_kept(run, tmp_path, capsys):
    folder = tmp_path / "runs" / "photos" / "checkpoints"
    run("--steps", "1")
    run("--steps", "2")
    (folder / "step_00000002.pt").write_bytes(b"damaged")
    assert run("--steps", "3") == 0
    assert "step_00000002.pt" in capsys.readouterr().out
    left = sorted(file.name for file in folder.iterdir())
    assert left == ["step_00000001.pt", "step_00000002.pt.damaged", "step_00000003.pt"]


def test_no_regular_checkpoint_is_written_after_a_skipped_update(run, tmp_path, monkeypatch):
    one_step, saved = training.training_step, []

    def step_with_nan(state, c, images):
        values = one_step(state, c, images)
        if state.counters["step"] in (2, 3):
            state.skipped += 1
            values["kl"] = torch.tensor(float("nan"))
        return values

    monkeypatch.setattr(training, "training_step", step_with_nan)
    monkeypatch.setattr(training.checkpoints, "save",
                        lambda folder, state, step, sound: saved.append((step, sound)) or "a file")
    run("--steps", "5", "--checkpoint-every", "2")
    assert saved == [(0, True), (4, True), (5, True)]
    assert [(line["step"], line["kl"] is None) for line in lines(tmp_path)] == [(2, True), (3, True), (4, False)]


# ------------------------------------------------------------------------------------- bad input

def one_line(capsys):
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("training.py: "), text
    return text


def test_missing_empty_and_broken_folders_end_with_one_line_and_status_2(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty", "broken"):
        assert run("--steps", "1", images=tmp_path / name) == 2
        assert name in one_line(capsys)
        assert not (tmp_path / "runs" / name).exists()


@pytest.mark.parametrize("flags,words", [
    (["--image-size", "100"], "multiple of 16"), (["--no-such-flag"], "--no-such-flag"), (["--steps", "x"], "--steps"),
    (["--patch", "12"], "--patch 12")])
def test_bad_flags_end_with_one_line_and_status_2(run, capsys, flags, words):
    assert run(*flags) == 2
    assert words in one_line(capsys)


def test_other_sizes_are_refused_with_both_values(run, capsys):
    run("--steps", "1")
    capsys.readouterr()
    assert run("--steps", "2", "--latent-dim", "24") == 2
    line = one_line(capsys)
    assert all(words in line for words in ("LATENT_DIM 16, not 24", "--latent-dim 16", "--run NEWNAME"))
    assert run("--steps", "2", "--alpha-per-channel") == 2
    assert "give --no-alpha-per-channel," in one_line(capsys)


def test_two_folders_of_one_name_do_not_share_a_run(run, photos, tmp_path, capsys):
    run("--steps", "1")
    other = tmp_path / "elsewhere" / "photos"
    shutil.copytree(photos, other)
    capsys.readouterr()
    assert run("--steps", "2", images=other) == 2
    assert "--run NEWNAME" in one_line(capsys)
    assert run("--steps", "2", "--run", "photos", images=other) == 0


def test_what_may_change_is_applied_and_said(run, tmp_path, capsys):
    run("--steps", "1")
    assert run("--steps", "2", "--learning-rate", "0.5") == 0
    assert "LEARNING_RATE is now 0.5, was 0.001" in capsys.readouterr().out
    saved = checkpoints.newest(tmp_path / "runs" / "photos" / "checkpoints")[1]
    assert saved["generator_optimizer"]["param_groups"][0]["lr"] == 0.5


def test_a_runs_folder_that_is_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file in the way")
    assert run("--steps", "1") == 2
    assert "can't be written (Not a directory)" in one_line(capsys)


# ------------------------------------------------------------------------------------- one step

def test_a_step_leaves_the_global_generators_alone(small_state):
    state, c, images = small_state
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    training_step.training_step(state, c, images)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


def test_a_step_is_a_function_of_the_seed(photos, tmp_path):
    images, weights = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0), []
    for seed in ("1", "1", "2"):
        c, _ = command_line.parse_constants(["--data", photos, *SMALL, "--seed", seed])
        state = training_step.new_state(c, torch.device("cpu"))
        torch.manual_seed(len(weights))
        training_step.training_step(state, c, images)
        weights.append(vector(state.generator))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_each_side_moves_its_own_weights_only(small_state):
    state, c, images = small_state
    batch = training_step.make_batch(state, c, images, 0)

    def snapshot():
        return [vector(m) for m in (state.critic, state.generator)]

    critic, generator = snapshot()
    training_step.critic_step(state, c, batch)
    assert not torch.equal(critic, snapshot()[0]) and torch.equal(generator, snapshot()[1])
    assert all(p.grad is None for p in state.generator.parameters())
    critic, generator = snapshot()
    training_step.generator_step(state, c, batch)
    assert torch.equal(critic, snapshot()[0]) and not torch.equal(generator, snapshot()[1])
    assert all(p.requires_grad for p in state.critic.parameters())


def test_the_layer_learns_in_the_generators_update(small_state):
    state, c, images = small_state
    before = state.generator.layer.to_s.weight.clone()
    tokens = state.generator.layer.to_tokens.weight.clone()
    for _ in range(2):                          # the first step only wakes the head, through which the rest learns
        training_step.training_step(state, c, images)
    assert not torch.equal(before, state.generator.layer.to_s.weight)
    assert not torch.equal(tokens, state.generator.layer.to_tokens.weight)


def test_adams_first_step_is_the_learning_rate_and_the_layers_its_share(small_state):
    state, c, images = small_state
    c.LEARNING_RATE, c.LAYER_RATE = 1e-2, 0.5
    state.set_learning_rates(c)
    vae, head = state.generator.vae.from_z.weight.detach().clone(), state.generator.layer.to_s.weight.detach().clone()
    training_step.training_step(state, c, images)
    assert (state.generator.vae.from_z.weight - vae).abs().median().item() == pytest.approx(1e-2, rel=1e-3)
    assert (state.generator.layer.to_s.weight - head).abs().median().item() == pytest.approx(5e-3, rel=1e-3)


def test_an_update_that_is_not_finite_is_skipped_and_counted(small_state):
    state, c, images = small_state
    before = vector(state.critic)
    batch = training_step.make_batch(state, c, images, 0)
    batch.real[0, 0, 0, 0] = float("nan")
    training_step.critic_step(state, c, batch)
    assert torch.equal(before, vector(state.critic))
    assert state.count_skipped() and not state.count_skipped() and state.counters["skipped_updates"] == 1
    assert all(entry["step"] == 0 for entry in state.critic_optimizer.state.values())      # as if it had never been


@pytest.mark.parametrize("every, chosen", [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])])
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_the_penalty_is_the_mean_over_every_gp_every_th_picture(small_state, every, chosen, micro_batch):
    state, c, images = small_state
    c.GP_EVERY, c.LAMBDA_DRIFT, c.MICRO_BATCH = every, 0.0, micro_batch
    batch = training_step.make_batch(state, c, images, 0)
    with torch.no_grad():
        fake, _ = state.generator.image_and_alpha(batch.z, changes=batch.changes)
    x_hat = losses.interpolate(batch.real, fake, batch.between)[chosen]
    expected = (losses.gradient_norm(state.critic, x_hat) - 1).square().mean().item()
    values = training_step.critic_step(state, c, batch)
    assert values["gradient_penalty"].item() == pytest.approx(expected, rel=1e-3)
    assert (values["critic_loss"] + values["score_gap"]).item() == pytest.approx(10 * expected, abs=1e-3)


def test_ema_starts_as_a_copy_and_has_its_half_life(small_state):
    state, c, _ = small_state
    for parameter in state.generator.parameters():
        parameter.data.fill_(1.0)
    for parameter in state.ema.parameters():
        parameter.data.zero_()
    c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP = 0.04, 1e9                    # 40 images, 10 batches of 4
    state.counters["images_seen"] = 4
    for _ in range(10):
        training_step.update_ema(state, c)
    assert all(torch.allclose(p, torch.tensor(0.5), atol=1e-5) for p in state.ema.parameters())
    state.counters["images_seen"] = 0
    training_step.update_ema(state, c)
    assert all(torch.equal(p, q) for p, q in zip(state.ema.parameters(), state.generator.parameters()))


def test_the_critic_sees_each_image_once_an_epoch_with_several_updates_a_step(small_state):
    state, c, images = small_state
    c.N_CRITIC, seen = 3, []
    seen = [tuple(training_step.real_batch(state, c, images, update)[i].flatten()[:40].tolist())
            for update in range(3) for i in range(4)]
    assert len(set(seen)) == 12


# ------------------------------------------------------------------------------------- the same step, made otherwise

def gradients_of_a_step(photos, tmp_path, monkeypatch, *flags):
    """The gradients that both updates of one step hand to Adam, and the step's values."""
    c, _ = command_line.parse_constants(["--data", photos, *SMALL, *flags])
    state = training_step.new_state(c, torch.device("cpu"))
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    found = []

    def keep(state, model, optimizer):
        found.extend(p.grad.clone() for p in model.parameters())

    monkeypatch.setattr(training_step, "apply_update", keep)
    values = training_step.training_step(state, c, data.load_images(photos, 32, 3, tmp_path / "cache", workers=0))
    return found, values


def assert_same_gradients(plain, other, tolerance=1e-3):
    """Relative L2 of each tensor; a bias before GroupNorm has no gradient but rounding, so a share of the whole too."""
    whole = torch.cat([one.flatten() for one in plain]).norm()
    for one, another in zip(plain, other):
        assert (one - another).norm() < tolerance * one.norm() + 1e-6 * whole


@pytest.mark.parametrize("flags", [("--micro-batch", "1"), ("--micro-batch", "2"), ("--recompute-activations",),
                                   ("--micro-batch", "2", "--recompute-activations")])
def test_saving_memory_changes_no_gradient(flags, photos, tmp_path, monkeypatch):
    plain, values = gradients_of_a_step(photos, tmp_path, monkeypatch)
    saving, saving_values = gradients_of_a_step(photos, tmp_path, monkeypatch, *flags)
    assert_same_gradients(plain, saving)
    assert {k: v.item() for k, v in saving_values.items()} == \
           pytest.approx({k: v.item() for k, v in values.items()}, rel=1e-3, abs=1e-4)


def test_recomputing_keeps_fewer_activations(photos, tmp_path, monkeypatch):
    def kept(*flags):
        c, _ = command_line.parse_constants(["--data", photos, *SMALL, *flags])
        state, total = training_step.new_state(c, torch.device("cpu")), 0
        batch = training_step.make_batch(state, c, data.load_images(photos, 32, 3, tmp_path / "cache", workers=0), 0)

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            training_step.make_pictures(state, batch, slice(0, c.BATCH_SIZE))
        return total

    assert kept("--recompute-activations") < 0.7 * kept()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_losses_are_one_graph_and_equal(photos, tmp_path, monkeypatch):
    """In float64: float32's rounding picks another of two nearly equal maxima, and one of them moves a gradient."""
    monkeypatch.setattr(data, "to_image", lambda pixels: pixels.double() / 127.5 - 1)
    torch.set_default_dtype(torch.float64)
    try:
        plain, values = gradients_of_a_step(photos, tmp_path, monkeypatch)
        compiled, compiled_values = gradients_of_a_step(photos, tmp_path, monkeypatch, "--compile")  # fullgraph=True
    finally:
        torch.set_default_dtype(torch.float32)
    assert {gradient.dtype for gradient in compiled} == {torch.float64}
    assert_same_gradients(plain, compiled)
    assert {k: v.item() for k, v in compiled_values.items()} == \
           pytest.approx({k: v.item() for k, v in values.items()}, rel=1e-3, abs=1e-4)


def test_mixed_precision_keeps_scores_pictures_and_alpha_in_float32(small_state):
    state, c, images = small_state
    batch = training_step.make_batch(state, c, images, 0)
    args = state.generator, batch.real, batch.z, batch.posterior_noise, batch.changes
    exact = training_step.generator_pass(*args)
    inside = []
    state.generator.vae.encoder[0][0].register_forward_hook(lambda module, inputs, out: inside.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = training_step.generator_pass(*args)
        score = state.critic(batch.real)
    assert inside == [torch.bfloat16]
    for one, other in zip(exact, rounded):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, state.critic(batch.real), rtol=0.05, atol=0.05)


def test_the_cpu_stays_in_float32(small_state):
    state, c, _ = small_state
    with training_step.mixed_precision(state, c):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts waits for a GPU")
def test_a_step_on_cuda_waits_for_the_device_at_most_once(photos, tmp_path):
    c, _ = command_line.parse_constants(["--data", photos, *SMALL, "--device", "cuda"])
    state = training_step.new_state(c, torch.device("cuda"))
    images = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0)
    for _ in range(training_step.RecordedStep.WARM_UP + 1):
        training_step.training_step(state, c, images)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training_step.training_step(state, c, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("flags", [(), ("--n-critic", "2"), ("--feedback-prob", "0.5"), ("--micro-batch", "2"),
                                   ("--recompute-activations",)])
def test_a_recorded_step_computes_what_a_step_computes(flags, photos, tmp_path):
    """In full float32, so that nothing but the order of sums differs."""
    ends = []
    for way in ("--cuda-graph", "--no-cuda-graph"):
        c, _ = command_line.parse_constants(["--data", photos, *SMALL, "--device", "cuda", "--no-bfloat16", "--no-tf32",
                                             way, *flags])
        training_step.set_up(torch.device("cuda"), c)
        state = training_step.new_state(c, torch.device("cuda"))
        images = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0)
        start = torch.nn.utils.parameters_to_vector(state.generator.parameters()).detach()
        values = [training_step.training_step(state, c, images) for _ in range(12)]
        assert bool(state.graphs) == (way == "--cuda-graph")
        end = torch.nn.utils.parameters_to_vector(state.generator.parameters()).detach()
        ends.append((values[-1], end - start))
    (values, way), (plain_values, plain_way) = ends
    assert (way - plain_way).norm() < 0.1 * plain_way.norm()
    assert {k: v.item() for k, v in values.items()} == pytest.approx({k: v.item() for k, v in plain_values.items()},
                                                                     rel=0.05, abs=0.02)


def test_alpha_without_a_span_is_fixed_and_trains_without_the_transformer(photos, tmp_path, run, capsys):
    c, _ = command_line.parse_constants(["--data", photos, *SMALL, "--alpha-span", "1"])
    state = training_step.new_state(c, torch.device("cpu"))
    state.generator.layer.transformer.forward = state.generator.layer.encode = None              # not to be called
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(state.generator.layer(x), torch.tanh(3 * (2 * x - 1)))
    before = [p.detach().clone() for p in state.generator.layer.parameters()]
    values = training_step.training_step(state, c, data.load_images(photos, 32, 3, tmp_path / "cache", workers=0))
    assert (values["alpha_min"], values["alpha_max"], values["alpha_spread"]) == (3, 3, 0)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(state.generator.layer.parameters(), before))
    for steps in ("2", "4"):
        assert run("--steps", steps, "--alpha-span", "1") == 0                                   # and goes on
    out = capsys.readouterr().out
    assert "bound" not in out and "critic  " in out and "alpha head" not in out


def test_recorded_steps_are_forgotten_with_the_rates_and_the_state_that_they_hold(small_state):
    state, c, _ = small_state
    state.graphs["kind"] = training_step.RecordedStep()
    state.set_learning_rates(c)
    assert not state.graphs
    state.graphs["kind"] = training_step.RecordedStep()
    state.load_state_dict(state.state_dict())
    assert not state.graphs


def test_both_updates_of_a_step_share_one_generator_pass(small_state, monkeypatch):
    state, c, images = small_state
    calls = []
    decode = state.generator.vae.decode
    monkeypatch.setattr(state.generator.vae, "decode", lambda z: calls.append(len(z)) or decode(z))
    training_step.training_step(state, c, images)
    assert calls == [2 * c.BATCH_SIZE]
    c.N_CRITIC = 2
    training_step.training_step(state, c, images)
    assert calls[1:] == [c.BATCH_SIZE, 2 * c.BATCH_SIZE]


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
                    reason="a setting of the GNU C library")
def test_freed_memory_is_kept_for_the_next_tensor():
    script = ("import resource, torch, training_step\n"
              "def faults():\n"
              "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "    torch.ones(2 ** 24)\n"                                         # 64 MiB, 16,384 pages
              "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
              "for keep in (False, True):\n"
              "    training_step.keep_freed_memory(keep)\n"
              "    print(min(faults() for _ in range(9)))")             # small blocks may come to lie in between once
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                         cwd=Path(training.__file__).parent).stdout
    given_back, kept = map(int, out.split())
    assert given_back >= 32 > 10 * kept             # 32 where the system hands out huge pages


# ------------------------------------------------------------------------------------- feedback updates

def test_the_window_of_a_feedback_update_is_a_walk_that_comes_to_its_picture(small_state):
    state, c, images = small_state
    c.FEEDBACK_PROB = 1.0
    batch = training_step.make_batch(state, c, images, 0)
    window = training_step.earlier_pictures(state.generator, batch.z, batch.changes, batch.walk)
    assert window.shape == (c.BATCH_SIZE, (c.NUM_FRAMES - 1) * c.CHANNELS, 32, 32) and not window.requires_grad
    assert window.min() >= 0 and window.max() <= 1
    with torch.no_grad():
        now = (1 + state.generator.image_and_alpha(batch.z, changes=batch.changes)[0]) / 2
    distance = [(frame - now).abs().mean().item() for frame in window.chunk(c.NUM_FRAMES - 1, dim=1)]
    assert distance == sorted(distance) and 0 < distance[0] < 0.7 * distance[-1]
    still = batch.walk._replace(share=torch.zeros_like(batch.walk.share))
    window = training_step.earlier_pictures(state.generator, batch.z, batch.changes, still)
    torch.testing.assert_close(window, now.repeat(1, c.NUM_FRAMES - 1, 1, 1))


def test_feedback_updates_come_with_their_probability_and_change_what_is_learned(small_state):
    state, c, images = small_state
    c.FEEDBACK_PROB = 0.3
    chosen = 0
    for step in range(200):
        state.counters["step"] = step
        chosen += training_step.make_batch(state, c, images, 0).walk is not None
    assert 40 <= chosen <= 80                                      # 60, with a standard deviation of 6.5
    state.generator.layer.to_s.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    state.counters["step"], made = 0, []
    for c.FEEDBACK_PROB in (0.0, 1.0):
        batch = training_step.make_batch(state, c, images, 0)
        made.append(training_step.make_pictures(state, batch, slice(0, c.BATCH_SIZE)))
    assert torch.equal(made[0][2], made[1][2]) and not torch.allclose(made[0][1], made[1][1], atol=1e-3)


@pytest.mark.parametrize("n_critic", ["1", "2"])
def test_feedback_updates_in_micro_batches_have_the_same_gradients(photos, tmp_path, monkeypatch, n_critic):
    flags = "--feedback-prob", "1", "--n-critic", n_critic
    whole, _ = gradients_of_a_step(photos, tmp_path, monkeypatch, *flags)
    parts, _ = gradients_of_a_step(photos, tmp_path, monkeypatch, *flags, "--micro-batch", "2")
    assert_same_gradients(whole, parts)


# ------------------------------------------------------------------------------------- weights of another run, best.pt

def test_a_new_run_starts_from_the_weights_of_another(run, tmp_path, capsys):
    assert run("--steps", "3") == 0
    first = checkpoints.find(tmp_path / "runs" / "photos")[1]
    for source in (tmp_path / "runs" / "photos", tmp_path / "runs" / "photos" / "checkpoints" / "step_00000003.pt"):
        name = f"from_{source.name}"[:12]
        assert run("--steps", "1", "--init-from", str(source), "--run", name, "--learning-rate", "1e-12",
                   "--critic-learning-rate", "1e-12") == 0
        assert "starting from" in capsys.readouterr().out
        second = checkpoints.find(tmp_path / "runs" / name)[1]
        for part, origin in (("ema", "ema"), ("generator", "ema"), ("critic", "critic")):
            for key, weights in first[origin].items():
                torch.testing.assert_close(second[part][key], weights, atol=1e-8, rtol=0, msg=f"{part} {key}")
        assert second["counters"]["step"] == 1
    assert run("--steps", "2", "--run", name) == 0              # goes on, without the flag
    assert "INIT_FROM" not in capsys.readouterr().out.split("continuing")[0]


def test_a_start_from_a_file_without_critic_says_so(run, tmp_path, capsys):
    assert run("--steps", "1") == 0
    saved = checkpoints.find(tmp_path / "runs" / "photos")[1]
    checkpoints.save_as(tmp_path / "weights.pt", {name: saved[name] for name in ("ema", "constants", "counters")})
    assert run("--steps", "1", "--run", "second", "--init-from", str(tmp_path / "weights.pt")) == 0
    assert "with a new critic" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(["--width", "12"], "give --width 8"),
                                          (["--init-from", "nowhere"], "nowhere"),
                                          (["--latent-dim", "8", "--patch", "16"], "give --latent-dim 16 --patch 8")])
def test_a_start_from_what_does_not_fit_is_one_line(run, tmp_path, capsys, flags, words):
    assert run("--steps", "1") == 0
    capsys.readouterr()
    assert run("--steps", "1", "--run", "second", "--init-from", str(tmp_path / "runs" / "photos"), *flags) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and words in text


def test_the_best_score_makes_best_pt_and_a_worse_one_does_not(run, tmp_path, monkeypatch, capsys):
    scores = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(training.evaluate, "find_extractor", lambda device: None)
    monkeypatch.setattr(training.evaluate, "scores", lambda *_: {"sliced_wasserstein": next(scores)})
    assert run("--steps", "4", "--evaluate-every", "2", "--evaluate-count", "4") == 0
    assert run("--steps", "6", "--evaluate-every", "2", "--evaluate-count", "4") == 0
    best = checkpoints.load(tmp_path / "runs" / "photos" / "checkpoints" / "best.pt")
    assert best["counters"]["step"] == 4 and best["counters"]["best"] == ["sliced_wasserstein", 2.0]
    found = [(line["step"], line["evaluate_sliced_wasserstein"]) for line in lines(tmp_path)
             if "evaluate_sliced_wasserstein" in line]
    assert found == [(2, 3.0), (4, 2.0), (6, 5.0)]
    assert capsys.readouterr().out.count("best so far") == 2


def test_the_score_is_of_the_averaged_generator_from_the_same_noise(run, tmp_path, monkeypatch):
    calls = []
    real_generate = training.evaluate.generate
    monkeypatch.setattr(training.evaluate, "find_extractor", lambda device: None)
    monkeypatch.setattr(training.evaluate, "generate",
                        lambda *args, **more: calls.append((args, real_generate(*args, **more))) or calls[-1][1])
    assert run("--steps", "4", "--evaluate-every", "2", "--evaluate-count", "6") == 0
    assert [args[1:] for args, _ in calls] == [(16, 6, 0)] * 2
    assert not any(p.requires_grad for p in calls[0][0][0].parameters())           # the averaged one
    assert len(calls[0][1]) == 6 and not torch.equal(calls[0][1], calls[1][1])


def test_a_run_that_ends_by_itself_leaves_its_principal_axes(run, tmp_path):
    assert run("--steps", "1") == 0
    axes = checkpoints.find(tmp_path / "runs" / "photos")[1]["axes"]
    assert axes["axes"].shape == (12, 16) and axes["deviations"][0] > axes["deviations"][-2] > 0


# ------------------------------------------------------------------------------------- small parts

def test_samples_come_early_and_then_at_their_distance():
    steps = [s for s in range(5001) if run_log.is_sample_step(s, 1000)]
    assert steps == [0, 50, 100, 200, 400, 800, 1000, 2000, 3000, 4000, 5000]
    assert [s for s in range(61) if run_log.is_sample_step(s, 20)] == [0, 20, 40, 60]


def test_a_run_of_more_than_a_day_says_what_would_fit_one():
    c, _ = command_line.parse_constants(["--steps", "20000"])
    line = run_log.duration_line(c, 8.0, 10)
    assert "to fit a day, give --steps 10810, or --image-size 80" in line
    assert "fit a day" not in run_log.duration_line(c, 1.0, 10)
