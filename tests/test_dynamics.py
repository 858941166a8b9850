"""Stage 2 of a run on clips: windows and draws, and the algorithm; whole runs on clips."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PAST, SMALL, error_line, lines, window_of
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoints
import data
import demo_images
import dynamics
import losses
import model_definitions
import run_log
import training
import training_step
import update
from distributed import Ranks
from model_definitions import Window, load_generator


@pytest.fixture
def start(start_stage_2):
    return start_stage_2


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------- model

def test_codes_are_predicted_without_pixels_and_pixels_read_the_codes(start, rng):
    state, c, _ = start()
    layer, window = state.generator.layer, window_of(c, rng)
    x, earlier = torch.rand(2, 3, 32, 32, generator=rng), torch.rand(2, 9, 32, 32, generator=rng)
    with torch.no_grad():
        known = layer.dynamics.tokens(window)
        patches = layer.tokens(x, earlier)
        count = patches.shape[1]
        together = torch.arange(count + PAST + 1) < count
        outputs = layer.encode(torch.cat([patches, known], 1), together[:, None] | ~together)
        torch.testing.assert_close(outputs[:, count:], layer.encode(known))
        torch.testing.assert_close(layer.encode_patches(patches, window), outputs[:, :count])
        other = window._replace(codes=window.codes.flip(1))
        assert (layer.alpha(x, earlier, window=window) - layer.alpha(x, earlier, window=other)).abs().max() > 1e-4


def test_a_new_layer_predicts_the_newest_code_and_no_code_is_farther_from_the_anchor_than_clips_are(start, rng):
    state, c, _ = start()
    layer, window = state.generator.layer, window_of(c, rng)
    layer.dynamics.to_delta.weight.data.zero_()
    unit = torch.linspace(0.1, 2, c.LATENT_DIM)                                 # how much a clip changes, by dimension
    layer.dynamics.whiten.copy_(torch.diag(1 / unit))
    near, far = (window.anchor + factor * unit * F.normalize(window.codes[:, 0]) for factor in (2, 50))
    longest = layer.dynamics.REACH * c.LATENT_DIM ** 0.5
    assert 2 < longest < 50
    for code, factor in ((near, 2), (far, longest)):
        found = layer.next_code(window._replace(codes=torch.stack([code, *window.codes[:, 1:].unbind(1)], 1)))
        torch.testing.assert_close(found, window.anchor + factor * unit * F.normalize(window.codes[:, 0]))


def test_files_with_a_gaussian_start_or_without_a_limit_load(start):
    state, c, _ = start()
    weights = {name: weight for name, weight in state.ema.state_dict().items() if "whiten" not in name}
    for name in ("start_mean", "start_root"):
        weights[f"layer.dynamics.{name}"] = torch.zeros(1)
    generator, _ = model_definitions.build(c)
    generator.load_state_dict(weights)
    assert torch.equal(generator.layer.dynamics.whiten, torch.eye(c.LATENT_DIM))
    assert torch.equal(generator.layer.dynamics.change, state.ema.layer.dynamics.change)


def test_a_window_moves_by_one_frame_and_a_still_one_holds_copies(start, rng):
    _, c, _ = start()
    window, z = window_of(c, rng), torch.randn(2, c.LATENT_DIM, generator=rng)
    moved = window.followed_by(z)
    assert torch.equal(moved.codes[:, 0], z) and torch.equal(moved.codes[:, 1:], window.codes[:, :-1])
    assert moved.v is window.v and moved.anchor is window.anchor
    still = Window.still(z, window.v, PAST)
    assert still.codes.shape == (2, PAST, c.LATENT_DIM) and (still.codes == z[:, None]).all()


@pytest.mark.parametrize("share", [0.2, 0])
def test_a_roll_feeds_its_images_and_codes_back(start, rng, share):
    state, c, _ = start("--feedback", str(share))
    generator, window = state.generator, window_of(c, rng)
    with torch.no_grad():
        (image, z), (second, z_second) = (pair for pair, _ in zip(generator.roll(window), range(2)))
        earlier = torch.cat([(1 + generator.render(code)) / 2 for code in window.codes.unbind(1)], 1)
        predicted = generator.layer.next_code(window)
        assert torch.equal(image, generator.render(predicted, earlier, window=window))
        torch.testing.assert_close(z, (1 - share) * predicted + share * generator.vae.encode(image)[0])
        after = window.followed_by(z)
        predicted = generator.layer.next_code(after)
        earlier = torch.cat([(1 + image) / 2, earlier[:, :6]], 1)
        assert torch.equal(second, generator.render(predicted, earlier, window=after))
        torch.testing.assert_close(z_second, (1 - share) * predicted + share * generator.vae.encode(second)[0])


def test_a_roll_from_a_still_window_begins_with_copies_of_its_image(start, rng):
    state, c, _ = start()
    generator, window = state.generator, Window.still(*window_of(c, rng)[2:0:-1], PAST)
    with torch.no_grad():
        image, _ = next(generator.roll(window))
        copies = ((1 + generator.render(window.anchor)) / 2).repeat(1, PAST, 1, 1)
        torch.testing.assert_close(image, generator.render(generator.layer.next_code(window), copies, window=window))


# ------------------------------------------------------------------------------------- windows

def rows_as_codes(state, c, clips):
    """Makes mu of each frame its row, without noise, so that a batch shows which frames it holds."""
    rows = torch.arange(float(len(state.codes[0])))[:, None].expand(-1, c.LATENT_DIM)
    state.codes = rows, torch.full_like(rows, -1e4)


@pytest.mark.parametrize(("done", "frames", "flags"), [(0, 1, ()), (0.31, 4, ()), (0.56, 14, ()),
                                                       (0.56, 14, ("--flip",))])
def test_windows_hold_the_frames_before_and_targets_those_after(start, done, frames, flags):
    state, c, clips = start("--motion-batch", "64", *flags)
    rows_as_codes(state, c, clips)
    count, mirrored = len(clips.images), 0
    state.counters["images_seen"] += int(1000 * done)
    found = set()
    for step in range(4):
        state.counters["step"] = step
        batch = dynamics.draw_batch(state, c, clips)
        known = batch.windows
        assert batch.kind == ("motion", frames) and known.targets.shape[1] == frames
        for i in range(64):
            mirror = count * bool(known.anchor[i, 0] >= count)            # mirrored frames are in rows of their own
            mirrored += mirror > 0
            window, targets = ((codes[i, :, 0] - mirror).tolist() for codes in (known.codes, known.targets))
            cold = known.cold[i]
            first = int(targets[0])
            clip = np.searchsorted(clips.clip_offsets, first, side="right") - 1
            begin, end = clips.clip_offsets[clip:clip + 2]
            found.add((int(clip), bool(cold)))
            expected = [max(first - k, begin) for k in range(1, PAST + 1)]
            assert window == ([first - 1] * PAST if cold else expected)
            assert cold or first > begin + 1                     # a window of one frame shows no motion
            assert targets == [min(first + k, end - 1) for k in range(frames)]
            assert known.valid[i].tolist() == [float(first + k < end) for k in range(frames)]
            assert (known.around[i, :, 0] - mirror).tolist() == [first - 1, first, first + 1] and first + 1 < end
            assert begin <= known.anchor[i, 0] - mirror < end
            if i % dynamics.RENDERED_EVERY == 0:
                shown = first + int(batch.picked[i // 2])
                assert known.valid[i, shown - first] == 1
                oldest = first - 1 if cold else begin
                rows = [shown, *(max(shown - k, oldest) for k in range(1, PAST + 1))]
                pixels = torch.cat([batch.frame[i // 2], batch.earlier[i // 2] * 2 - 1]).unflatten(0, (-1, 3))
                real = torch.from_numpy(clips.images[rows]).permute(0, 3, 1, 2) / 127.5 - 1
                real = real.flip(3) if mirror else real
                torch.testing.assert_close(pixels, real)
    assert bool(mirrored) == bool(flags) and mirrored < 256
    assert {clip for clip, _ in found} == {0, 1, 2, 3}           # every training clip, never the one held out
    assert {(2, True), (2, False)} <= found


def test_noise_is_a_share_of_the_posterior_and_equal_in_still_windows(start):
    state, c, clips = start("--motion-batch", "512", lengths=(40,) * 5)
    state.codes = torch.zeros_like(state.codes[0]), torch.full_like(state.codes[1], 2 * np.log(3.0))      # sigma 3
    known = dynamics.draw_batch(state, c, clips).windows
    warm, cold = known.codes[known.cold == 0], known.codes[known.cold == 1]
    assert abs(len(cold) / 512 - 0.4) < 0.1
    assert (cold == cold[:, :1]).all() and (warm[:, 0] != warm[:, 1]).any(1).all()
    expected = 3 * dynamics.CODE_NOISE / 3 ** 0.5                            # E[r^2] = 1/3 for r in [0, 1)
    assert abs(warm.square().mean().sqrt() / expected - 1) < 0.05


def test_ranks_share_the_batch(start):
    state, c, clips = start()
    whole = dynamics.draw_batch(state, c, clips)
    parts = []
    for rank in range(2):
        state.ranks = Ranks(rank, 2)
        parts.append(dynamics.draw_batch(state, c, clips))
    for number, (tensor, *halves) in enumerate(zip(*(batch.tensors() for batch in (whole, *parts)))):
        assert torch.equal(tensor, torch.cat(halves)), number


# ------------------------------------------------------------------------------------- algorithm

def test_the_loss_is_that_of_the_formula(start):
    state, c, clips = start("--lambda-code", "2", "--lambda-frame", "3", "--lambda-motion", "0.5")
    state.counters["images_seen"] = 1400                         # four frames
    batch, layer = dynamics.draw_batch(state, c, clips), state.generator.layer
    known = batch.windows
    (loss, values), = dynamics.motion_terms(state, c, batch)
    code_errors, frame_errors, kl = [], [], []
    for i in range(8):
        mean, logvar = layer.dynamics.posterior(*(known.around[i:i + 1, k] for k in range(3)))
        v, kl_now = known.noise[i:i + 1], torch.zeros(())
        if known.cold[i]:
            v, kl_now = mean + logvar.exp().sqrt() * v, losses.kl_divergence(mean, logvar)
        kl.append(kl_now / 0.4)
        window = Window(known.codes[i:i + 1], v, known.anchor[i:i + 1])
        for k in range(4):
            z = layer.next_code(window)
            code_errors.append(known.valid[i, k] * (z - known.targets[i, k]).abs().mean())
            if i % 2 == 0 and k == batch.picked[i // 2]:
                frame, earlier = batch.frame[i // 2:i // 2 + 1], batch.earlier[i // 2:i // 2 + 1]
                image = state.generator.render(z, earlier, window=window)
                frame_errors.append(losses.motion_weighted_error(image, frame, earlier * 2 - 1))
            window = window.followed_by(z)
    expected = [torch.stack(part).mean() for part in (code_errors, frame_errors, kl)]
    change = known.anchor[:, None] - batch.prior_noise
    on_the_way = batch.prior_noise + batch.prior_t[:, :, None] * change
    velocity = state.generator.prior.velocity(on_the_way.flatten(0, 1), batch.prior_t.flatten())
    expected.append((velocity - change.flatten(0, 1)).square().mean())
    for name, value in zip(("code_error", "frame_error", "motion_kl", "prior_error"), expected):
        torch.testing.assert_close(values[name], value, msg=name)
    torch.testing.assert_close(loss, 2 * expected[0] + 3 * expected[1] + 0.5 * expected[2] + expected[3])


def test_predicted_codes_and_images_stay_float32_under_bfloat16_autocast(start):
    """With fake tensors, which have the dtypes that autocast gives them but compute nothing."""
    state, c, clips = start()
    batch, linear = dynamics.draw_batch(state, c, clips), torch.nn.functional.linear
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        window = Window(batch.windows.codes, batch.windows.noise, batch.windows.anchor)
        code = state.generator.layer.next_code(window)
        image, alpha = state.generator.image_and_alpha(code, batch.earlier.repeat(2, 1, 1, 1), window=window)
        (loss, values), = dynamics.motion_terms(state, c, batch)
        assert linear(code, state.generator.layer.dynamics.of_code.weight).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in (code, image, alpha, loss, *values.values())} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
def test_a_recorded_step_equals_a_plain_step(start):
    """In full float32, so that only the order of sums differs; through all three lengths of the unrolling."""
    ends = []
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        state, c, clips = start("--device", "cuda", "--no-bfloat16", "--no-tf32", graph, "--dynamics-kimg", "1.256")
        update.set_up(state.device, c)
        origin = torch.cat([p.detach().flatten() for p in state.motion.parameters()])
        while dynamics.progress(state, c) < 1:
            values = dynamics.motion_step(state, c, clips)
        assert len(state.graphs) == 3 * (graph == "--cuda-graph")
        ends.append((torch.cat([p.detach().flatten() for p in state.motion.parameters()]) - origin,
                     {name: value.item() for name, value in values.items()}))
    (moved, values), (plain_moved, plain_values) = ends
    assert (moved - plain_moved).norm() < 0.1 * plain_moved.norm()
    assert values == pytest.approx(plain_values, rel=0.05, abs=0.02)


def test_the_layer_and_the_prior_learn_and_their_averages_follow(start):
    state, c, clips = start()
    before = {part: {name: p.clone() for name, p in getattr(state, part).named_parameters()}
              for part in ("generator", "critic", "ema")}
    values = dynamics.motion_step(state, c, clips)
    assert state.counters["step"] == 1 and state.counters["images_seen"] == 1008
    assert set(values) == {"motion_loss", "code_error", "frame_error", "motion_kl", "prior_error"}
    for part, weights in before.items():
        changed = {name for name, p in getattr(state, part).named_parameters() if not torch.equal(p, weights[name])}
        if part == "critic":
            assert not changed
        else:
            assert all(name.startswith(("layer.", "prior.")) for name in changed)
            assert changed >= {"layer.dynamics.to_delta.weight", "layer.to_tokens.weight", "layer.to_s.weight",
                               "layer.dynamics.to_posterior.2.weight", "layer.transformer.layers.0.linear1.weight",
                               "prior.to_hidden.weight"}


def test_stage_2_begins_with_the_averaged_vae_and_prior(start):
    state, c, clips = start()
    generator, averaged = ([*model.vae.parameters(), *model.prior.parameters()] for model in (state.generator,
                                                                                              state.ema))
    for p in averaged:
        p.data.add_(0.01)
    dynamics.begin(state, c, clips)                              # as after a resume
    assert not any(torch.equal(*pair) for pair in zip(generator, averaged))
    state.counters["stage"], state.codes = 1, None
    dynamics.begin(state, c, clips)
    assert all(torch.equal(*pair) for pair in zip(generator, averaged))
    changes = [state.codes[0][i + 1:j] - state.codes[0][i:j - 1]
               for i, j in zip(clips.clip_offsets[:4], clips.clip_offsets[1:])]                # not of the one held out
    for generator in (state.generator, state.ema):
        torch.testing.assert_close(generator.layer.dynamics.change, torch.cat(changes).square().mean(0).sqrt())
    codes = state.codes[0][:72]                                                               # of the training clips
    offsets = clips.clip_offsets[:5].tolist()
    pairs = torch.cat([(codes[i:j, None] - codes[None, i:j]).flatten(0, 1) / (j - i) ** 0.5      # each frame counts 1
                       for i, j in itertools.pairwise(offsets)]).double()
    floor = state.ema.layer.dynamics.STILL ** 2 * torch.eye(c.LATENT_DIM)
    whiten = state.ema.layer.dynamics.whiten.double()
    white = whiten @ (pairs.T @ pairs / len(codes) + floor) @ whiten.T
    torch.testing.assert_close(white, torch.eye(c.LATENT_DIM, dtype=white.dtype), rtol=0, atol=1e-2)
    image = data.to_image(torch.from_numpy(clips.images[70:72]).permute(0, 3, 1, 2))
    with torch.no_grad():
        torch.testing.assert_close(state.codes[0][70:72], state.ema.vae.encode(image)[0], rtol=1e-4, atol=1e-5)


def test_stages_rates_and_lengths_follow_the_images_seen(start):
    state, c, _ = start("--motion-learning-rate", "1")
    seen = state.counters
    for images, stage in ((999, 1), (1000, 2), (1999, 2), (2000, 3)):
        seen["images_seen"] = images
        assert dynamics.stage(state, c) == stage
    for images, rate in ((1000, 0.01), (1080, 0.11), (1800, 0.4), (1900, 0.2), (2000, 0.02)):
        seen["images_seen"] = images
        assert dynamics.learning_rate(state, c) == pytest.approx(rate)
    c.FOLDERS = "ignore"
    assert dynamics.stage(state, c) == 1


# ------------------------------------------------------------------------------------- stage 1

def test_images_of_clips_come_with_frames_of_their_clip(start):
    state, c, clips = start("--flip")
    state.counters["images_seen"] = 0
    found, flipped = set(), set()
    for step in range(4):
        state.counters["step"] = step
        batch = training_step.draw_batch(state, c, clips, 0)
        assert batch.others.shape == (4, 3 * training_step.CLIP_SAMPLE, 32, 32)
        pixels = torch.cat([batch.real, batch.others], 1).unflatten(1, (-1, 3))
        pixels = ((pixels + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
        for frames in pixels:
            rows = [np.flatnonzero((clips.images == frame).all((1, 2, 3))) for frame in frames]
            flipped.add(not len(rows[0]))
            if not len(rows[0]):                             # mirrored, and the others with it
                rows = [np.flatnonzero((clips.images == frame[:, ::-1]).all((1, 2, 3))) for frame in frames]
            (first,), *others = (row.tolist() for row in rows)
            clip = np.searchsorted(clips.clip_offsets, first, side="right") - 1
            begin, end = clips.clip_offsets[clip:clip + 2]
            assert all(begin <= row < end for row, in others)
            assert len({row for row, in others}) == min(training_step.CLIP_SAMPLE, end - begin)
            found.add(int(clip))
    assert len(found) > 1 and flipped == {True, False}


def test_the_error_of_clips_is_weighted_by_motion(start):
    state, c, clips = start("--lambda-kl", "0")
    batch = training_step.draw_batch(state, c, clips, 0)
    (loss, values), = training_step.generator_terms(state, c, batch)
    fake = batch.generated.fake
    error = losses.motion_weighted_error(fake, batch.real, batch.others)
    expected = -state.critic(fake).mean() + c.LAMBDA_REC * losses.size_factor(3 * 32 * 32) * error
    torch.testing.assert_close(loss, expected + values["prior_error"])
    assert values["reconstruction"] == losses.reconstruction_loss(fake, batch.real) != error


# ------------------------------------------------------------------------------------- whole runs

OF_CLIPS = ("--folders", "clips", "--vae-kimg", "0.008", "--dynamics-kimg", "0.04", "--motion-batch", "8", "--steps",
            "8")


def test_a_run_on_clips_logs_its_stages_and_shows_videos(run, tmp_path, capsys):
    """The 12 photos are one clip. Two steps of stage 1, four of stage 2, of which the last is at K = 14, two of 3."""
    assert run(*OF_CLIPS, "--log-every", "1", "--sample-every", "3", "--evaluate-every", "3") == 0
    out = capsys.readouterr().out
    assert "1 clips of 12 frames to train on, 0 clips held out" in out and "code tokens and Delta head" in out
    assert "not measured" not in out and "the run ended in stage" not in out and "critics of pairs" in out
    assert "step 3: stage 2 of 3 has begun" in out and "step 7: stage 3 of 3 has begun" in out
    rows = lines(tmp_path)
    assert [row["stage"] for row in rows if "stage" in row] == [1, 1, 2, 2, 2, 2, 3, 3]
    measured = [row for row in rows if "evaluate_r1" in row]
    assert [row["step"] for row in measured] == [3, 6]
    assert {"evaluate_r8", "evaluate_r8_frozen", "evaluate_z_growth", "evaluate_speed"} <= set(measured[0])
    assert all(row["learning_rate"] > 0 for row in rows if "stage" in row)
    known = {value.key for value in run_log.HEALTHY} | {"step", "images_seen", "best", "seconds"}
    assert {key for row in rows for key in row} <= known
    assert {"code_error", "near_score_gap", "kl", "motion_loss"} <= {key for row in rows for key in row}
    folder = tmp_path / "runs" / "photos"
    assert (folder / "samples" / "step_00000006_motion.png").exists()
    assert not (folder / "samples" / "step_00000000_motion.png").exists()
    assert checkpoints.load(folder / "checkpoints" / "best.pt")["counters"]["best"][0] == "r8"
    course = json.loads((folder / "samples" / "step_00000006_course.json").read_text())
    assert set(course) == {"contrast", "drift", "speed", "acceleration", "length"}
    assert len(course["contrast"]["made"]) == 64 and len(course["contrast"]["low"]) == 12
    assert "motion" in (folder / "index.html").read_text()
    generator, c, _ = load_generator(folder)
    assert generator.layer.dynamics is not None and c.FOLDERS == "clips"
    assert run(*OF_CLIPS) == 0 and "give a higher --steps" in capsys.readouterr().out
    assert run(*OF_CLIPS, "--vae-kimg", "0.02") == 2 and "has begun: must be 0.008" in error_line(capsys)


def test_a_run_on_images_cannot_become_one_on_clips(run, tmp_path, capsys):
    assert run("--steps", "1") == 0
    assert run(*OF_CLIPS) == 2
    assert "--folders ignore" in error_line(capsys)
    assert run(*OF_CLIPS, "--run", "new", "--init-from", str(tmp_path / "runs" / "photos")) == 2
    assert "was trained with --folders ignore: must be a run with --folders clips" in error_line(capsys)


def test_a_run_that_ends_before_stage_3_says_so(run, image_folder, capsys):
    assert run(*OF_CLIPS, "--steps", "1", images=image_folder(5, name="short")) == 0
    out = capsys.readouterr().out
    assert "the run ended in stage 1 of 3: motion is learned after 0.008 thousand images" in out
    assert "predictions are not measured, because no clip has more than 8 frames" in out


def test_without_data_the_moving_demo_set_is_drawn(tmp_path, monkeypatch):
    draw = demo_images.make_clips
    monkeypatch.setattr(demo_images, "make_clips", lambda root, size: draw(root, 2, 12, size))
    assert training.main(["--runs-dir", str(tmp_path), *SMALL, *OF_CLIPS, "--steps", "3"]) == 0
    assert (tmp_path / "demo_clips_32" / "clip_00001" / "frame_011.jpg").exists()
    assert (tmp_path / "demo_clips" / "checkpoints" / "step_00000003.pt").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (("--motion-batch", "7"), "--motion-batch 7 is invalid for 1 processes: must be a multiple of 2"),
    (("--dynamics-kimg", "0.008"), "--dynamics-kimg 0.008 is invalid: must be above --vae-kimg 0.008"),
    (("--num-frames", "2"), "--num-frames 2 is invalid with --folders clips: must be 3 or more"),
    (("--micro-batch", "1"), "images per process and micro-batch must be even numbers"),
    (("--folders", "movies"), "--folders movies is invalid: must be ignore, classes or clips"),
    (("--cold-share", "0"), "--cold-share 0.0 is invalid: must be above 0, at most 1")])
def test_invalid_constants_are_one_line(run, capsys, flags, words):
    assert run(*OF_CLIPS, *flags) == 2
    assert words in error_line(capsys)


# ------------------------------------------------------------------------------------- training_step's own part

def test_read_images_reads_rows(start):
    _, _, clips = start()
    image = training_step.read_images(clips, np.array([5, 2]), torch.device("cpu"))
    torch.testing.assert_close(image, torch.from_numpy(clips.images[[5, 2]]).permute(0, 3, 1, 2) / 127.5 - 1)
