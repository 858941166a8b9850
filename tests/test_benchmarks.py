"""Each benchmark runs from end to end at a tiny size and prints what its docstring says."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import counting
import motion
import step

import command_line
import demo_images
import extractors
import joint
import losses
import model_definitions
import run_state
import training
import training_step


@pytest.fixture
def start(capsys):
    """start(script, *flags) runs a benchmark; returns the exit status, standard output and error."""
    def call(script, *flags):
        file = Path(step.__file__).parent / script
        spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)   # distributed.py exists twice
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        return command_line.run_script(script, module.start, flags), *capsys.readouterr()
    return call


def networks():
    c, _ = command_line.parse_constants(SMALL)
    return model_definitions.build(c)


# ------------------------------------------------------------------------------------- counting

def test_counted_multiply_adds_are_those_counted_by_hand():
    def layers():
        y = torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), padding=1)
        return y.flatten(1) @ torch.ones(4 * 8 * 8, 10)

    assert counting.multiply_adds(layers) == 2 * (4 * 3 * 9 * 64 + 256 * 10)


def test_the_count_includes_attention():
    tokens, dim = 16, 24
    block = networks()[0].layer.transformer.layers[0]
    by_hand = tokens * dim * (4 * dim + 2 * 4 * dim) + 2 * tokens * tokens * dim    # Linear layers, then attention
    assert counting.multiply_adds(lambda: block(torch.zeros(1, tokens, dim))) == by_hand


def test_the_count_includes_the_inner_gradient_of_the_penalty():
    critic, image = networks()[1], torch.zeros(2, 3, 32, 32)
    forward = counting.multiply_adds(lambda: critic(image))
    assert counting.multiply_adds(lambda: losses.gradient_norm(critic, image)) > 1.9 * forward


def test_the_parts_of_a_step_count_what_a_whole_step_counts():
    c, _ = command_line.parse_constants(SMALL)
    state, images = run_state.new_state(c, torch.device("cpu")), step.random_images(c, 16)
    torch.nn.init.normal_(state.generator.layer.to_s.weight, std=0.02)
    parts = sum(calls * counting.multiply_adds(function) for function, calls in step.parts(state, c, images).values())
    whole = counting.multiply_adds(lambda: training_step.training_step(state, c, images))
    assert parts == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("operation,tensors", [
    (lambda a, b: a + b, 3), (lambda a, b: a.add_(b), 3), (lambda a, b: a.copy_(b), 2), (lambda a, b: a.zero_(), 1),
    (lambda a, b: torch.cat([a, b]), 4), (lambda a, b: torch._foreach_add_([a, a], [b, b]), 6),
    (lambda a, b: a.view(10, 100)[3:].T, 0), (lambda a, b: a.new_empty(1000), 0),
    (lambda a, b: a[:500].expand(8, 500).clone(), 9 / 2)])
def test_counted_bytes_are_those_read_and_written(operation, tensors):
    a, b = torch.zeros(1000), torch.ones(1000)
    assert counting.count(lambda: operation(a, b)).bytes == tensors * 4000


def test_the_purposes_of_a_step_take_its_whole_time():
    c, _ = command_line.parse_constants(SMALL)
    state, images = run_state.new_state(c, torch.device("cpu")), step.random_images(c, 16)
    found, whole, _ = counting.time_by_purpose(lambda: training_step.training_step(state, c, images), state.device)
    assert sum(duration for duration, _ in found.values()) == pytest.approx(whole, rel=1e-3)
    assert set(found) == set(counting.PURPOSES)
    assert found["convolution, forward"][1] > 10


# ------------------------------------------------------------------------------------- scripts

def test_step_compares_losses_and_prints_ratio_and_parts(start):
    status, out, error = start("step.py", "--repeats", "1", *SMALL)
    assert status == 0, error
    for words in ("same losses: critic_loss", "ratio", "GFLOP/s", "critic scores", "the layer takes"):
        assert words in out


def test_step_prints_a_row_per_setting(start):
    status, out, error = start("step.py", "--rows", "cpu", "--repeats", "1", *SMALL)
    assert status == 0, error
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[3:]]
    assert [row[0] for row in rows] == [f"{name} {' '.join(SMALL)}" for name in step.ROWS["cpu"]]
    for _, ms, graph, host, layer, kernels, gigabytes, floor, rate, _ in rows:
        assert graph == host == "" and layer.endswith("%") and int(kernels) > 100
        assert 0 < float(floor) < float(ms) and 0 < float(gigabytes) < 1
        assert float(rate) == pytest.approx(4000 / float(ms), rel=0.1)


def test_step_lists_the_most_expensive_purposes(start):
    status, out, error = start("step.py", "--profile", *SMALL)
    assert status == 0, error
    rows = [line.split("|") for line in out.splitlines() if line.endswith(" |")][2:]
    shares = [float(row[3].strip(" %")) for row in rows]
    assert len(rows) == step.MOST + 1 and sum(shares) == pytest.approx(100, abs=1)
    assert shares[:-1] == sorted(shares[:-1], reverse=True)


def test_step_fails_if_the_losses_differ(start, monkeypatch):
    real = losses.kl_divergence
    monkeypatch.setattr(losses, "kl_divergence", lambda mu, logvar: 1.01 * real(mu, logvar))
    status, _, error = start("step.py", "--repeats", "1", *SMALL)
    assert status == 1 and "step.py: the losses differ: kl is " in error


def test_loader_prints_a_row_per_comparison(start, image_folder):
    image_folder(8, name="set/one")
    folder = os.path.dirname(image_folder(8, name="set/two", seed=1))
    status, out, error = start("loader.py", "--data", folder, "--image-size", "32", "--repeats", "1", "--large", "1",
                             "--workers", "0")
    assert status == 0, error
    for words in ("first pass, DIR", "first pass, photos", "warm batches", "warm over a step"):
        assert words in out


@pytest.mark.skipif(sys.platform != "linux", reason="drops files from Linux's file cache")
def test_disk_compares_read_batch_with_plain_reads_and_deletes_its_file(start, tmp_path):
    status, out, error = start("disk.py", "--images", "256", "--seconds", "0.1", "--repeats", "2",
                               "--folder", str(tmp_path))
    assert status == 0, error
    first, *rows = out.splitlines()
    assert "256 images of 64 px" in first and "warning: the images fit into the memory" in first
    assert [row.split(" |")[0] for row in rows[2:]] == ["| data.read_batch, batches of 64", "| 1 thread", "| 4 threads",
                                                        "| 16 threads"]
    assert "| 12,288 |" in rows[3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command,words", [
    ("step.py --image-size 33", "--image-size 33"), ("loader.py --data /nowhere", "/nowhere"),
    ("step.py --rows tpu", "--rows"),
    ("disk.py --folder /nowhere", "/nowhere"), ("disk.py --images 1000000000", "give another --folder"),
    ("loader.py --data /nowhere --repeats 0", "--repeats 1 or more"), ("peers/dcgan.py --data /nowhere", "/nowhere"),
    ("quality.py --data set --count 9", "must be 36 or more"), ("quality.py --data a/set b/set", "names of the"),
    ("distributed.py --processes 1", "--processes 1"), ("soak.py --kills 0", "must be above 0"),
    ("alpha.py /nowhere", "/nowhere"), ("alpha.py RUN --count 1", "must be 4"),
    ("ablation.py --csv none.csv", "contains no rows"), ("ablation.py --csv none.csv --only alpha", "--only"),
    ("ablation.py --csv none.csv -- --image-size 33", "--image-size 33")])
def test_invalid_input_is_one_line_and_status_2(start, command, words):
    status, _, error = start(*command.split())
    assert status == 2 and error.count("\n") == 1 and words in error, error


def test_stages_compares_the_steps_of_all_stages(start, monkeypatch):
    monkeypatch.setattr(joint, "PREFIXES", joint.PREFIXES)                # the script changes it
    status, out, error = start("stages.py", "--repeats", "1", *SMALL)
    assert status == 0, error
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [
        "still images", "stage 1", *(f"stage 2, {count} frames unrolled" for count in (1, 4, 14)),
        *(f"stage 3, prefix of {prefix}" for prefix in (0, 4, 8, 16))]
    assert rows[0][2] == "1.00 (1.00 to 1.00)" and all(float(row[1]) > 0 for row in rows)


def test_motion_measures_predictions_against_copies_and_linear_maps(tmp_path, monkeypatch, capsys):
    clips = demo_images.make_clips(tmp_path / "clips", 3, 40, 32)
    flags = [*SMALL, "--data", str(clips), "--runs-dir", str(tmp_path), "--run", "small", "--folders", "clips",
             "--vae-kimg", "0.004", "--dynamics-kimg", "0.04", "--steps", "5"]
    assert training.main(flags) == 0
    capsys.readouterr()
    monkeypatch.setattr(motion, "LONG_FRAMES", 70)
    monkeypatch.setattr(motion, "VIDEOS", 2)
    monkeypatch.setattr(motion, "CLIPS", 3)
    assert motion.main([str(tmp_path / "small"), "--steps", "4", "--strip", str(tmp_path / "strip.png")]) == 0
    def table(text):
        return {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")]
                                                    for line in text.splitlines() if line.startswith("|"))}

    rows, videos = map(table, capsys.readouterr().out.split("\n\n"))
    assert rows[""] == ["r1", "r4", "r8", "p1", "p4", "p8", "p16"] and rows["copy"][:3] == ["1", "1", "1"]
    assert {"constant velocity", "linear map", "Transformer", "Transformer, frozen window"} <= rows.keys()
    assert float(rows["linear map"][0]) != 1 and float(rows["Transformer"][3]) > 0
    assert videos[""] == ["speed", "hops", "contrast 63", "drift 31", "length 63", "contrast 69", "length 69"]
    assert len(videos["videos from noise"]) == 7 and float(videos["real clips"][2]) > 0
    landed = [demo_images.motion(index, 48, 5) for index in range(20)]
    counted = [motion.landings((32 * state["y"]).tolist()) for state in landed]
    assert np.mean(counted) == pytest.approx(np.mean([state["landed"][2:-2].sum() for state in landed]), rel=0.1)
    assert (tmp_path / "strip.png").stat().st_size > 10_000
    (clips / "states.npz").unlink()
    assert motion.main([str(tmp_path / "small")]) == 2 and "moving demo set" in capsys.readouterr().err


def test_the_linear_map_continues_a_motion_that_is_linear():
    """Codes turn by a constant angle: the next one is a linear map of the two before."""
    angle = 0.3 * torch.arange(40)[:, None] + torch.tensor([0.0, 1.5, 3.0])
    mu = torch.stack([angle.cos(), angle.sin()], dim=2).transpose(0, 1).flatten(0, 1)          # 3 clips of 40 frames
    clips = SimpleNamespace(clip_offsets=np.array([0, 40, 80, 120]), train_clips=np.array([0, 1]))
    made = motion.linear_map(clips, mu, mu[110 - torch.arange(1, 16)][None], 8)
    torch.testing.assert_close(made, mu[None, 110:118], rtol=0, atol=0.03)


@pytest.mark.slow
def test_distributed_prints_an_efficiency_per_kind_of_scaling(start):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    status, out, error = start("distributed.py", "--steps", "1", "--turns", "1", *SMALL[:-6])
    assert status == 0, error
    assert "| 2, strong scaling | 4 |" in out and "| 2, weak scaling | 8 |" in out and "Ethernet" in out


@pytest.mark.slow
def test_soak_ends_like_the_uninterrupted_run(start):
    # More steps than an idle machine makes before the second kill.
    status, out, error = start("soak.py", "--kills", "2", "--steps", "400")
    assert status == 0, error
    assert "2 kills" in out and "equal to those of the uninterrupted run" in out


PEER = """
import argparse, json, numpy
parser = argparse.ArgumentParser()
parser.add_argument("--minutes", nargs="+", type=float)
for flag in ("--data", "--seed", "--count", "--out", "--runs-dir"):
    parser.add_argument(flag)
flags = parser.parse_args()
for minutes in flags.minutes:
    shape = (int(flags.count), 3, 64, 64)
    numpy.save(f"{flags.out}/{minutes:g}.npy", numpy.random.default_rng(0).integers(0, 256, shape, dtype=DTYPE))
    print(json.dumps({"minutes": minutes, "steps": 1, "images_seen": 7}))
"""


@pytest.mark.slow
def test_quality_trains_all_sides_scores_them_and_continues_from_its_results(start, image_folder, tmp_path):
    images = image_folder(40, name="set")
    (tmp_path / "noise.py").write_text(PEER.replace("DTYPE", "numpy.uint8"))
    (tmp_path / "wrong.py").write_text(PEER.replace("DTYPE", "int"))
    flags = ("--data", str(images), "--minutes", "0.02", "0.01", "--count", "36", "--out", str(tmp_path / "out"),
             "--peers", str(tmp_path / "noise.py"), "--", *SMALL[2:], "--patch", "16")
    status, out, error = start("quality.py", *flags)
    if extractors.find_extractor("cpu") is None:
        assert status == 2 and "requirements-weights.txt" in error
        return
    assert status == 0, error
    assert "set, seed 0: DCGAN" in out and "of DCGAN's, median of 1 seeds" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| set | 0.")]
    assert [row[1:3] for row in rows] == [[minutes, side] for minutes in ("0.01", "0.02")
                                          for side in ("this project", "DCGAN", "noise")]
    assert 0 < int(rows[0][4]) < int(rows[3][4]) and rows[2][5] == "7"
    assert (tmp_path / "out" / "set_seed0.png").is_file()
    status, again, error = start("quality.py", *flags)
    assert status == 0 and "seed 0:" not in again, error
    assert again.splitlines()[-9:] == out.splitlines()[-9:]
    status, _, error = start("quality.py", *flags[:10], str(tmp_path / "wrong.py"), *flags[11:])
    assert status == 2 and "wrong.py: must print" in error and "0.01.npy is torch.int64" in error
