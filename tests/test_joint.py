"""Stage 3 of a run on clips: draws, the videos that are judged, and the losses, against independent formulas."""

import numpy as np
import pytest
import torch
from conftest import PAST
from test_dynamics import rows_as_codes

import dynamics
import joint
import losses
import update
from distributed import Ranks
from model_definitions import Window


@pytest.fixture
def start(start_stage_2):
    """start(*flags) returns a state at the beginning of stage 3, its constants and clips."""
    def new(*flags, **others):
        state, c, clips = start_stage_2(*flags, **others)
        state.counters["images_seen"] = 2000
        joint.begin(state, c, clips)
        return state, c, clips
    return new


def with_prefix(monkeypatch, prefix):
    monkeypatch.setattr(joint, "PREFIXES", (prefix,))


# ------------------------------------------------------------------------------------- draws

def test_batches_hold_what_they_say(start, monkeypatch):
    """Codes are the rows of their frames, so that a batch shows which frames it holds."""
    state, c, clips = start("--batch-size", "64")
    rows_as_codes(state, c, clips)
    for prefix in (0, 8):
        with_prefix(monkeypatch, prefix)
        batch = joint.draw_batch(state, c, clips, 0)
        assert batch.kind == ("joint", prefix) and len(batch.real) == 64 and len(batch.free) == 32
        pixels = torch.from_numpy(clips.images).permute(0, 3, 1, 2) / 127.5 - 1
        clip_of = np.repeat(np.arange(5), np.diff(clips.clip_offsets))
        for i in range(32):
            shown = int(batch.code[i, 0])
            assert batch.windows.targets[i, -1, 0] == shown and torch.equal(batch.target[i], pixels[shown])
            begin = clips.clip_offsets[clip_of[shown]]
            cold = batch.windows.cold[i]
            oldest = int(batch.windows.codes[i, 0, 0]) if cold else begin
            rows = [max(shown - k, oldest) for k in range(1, PAST + 2)]
            torch.testing.assert_close(batch.earlier[i].unflatten(0, (-1, 3)), (1 + pixels[rows]) / 2)
            assert clip_of[int(batch.free[i, 0, 0])] == clip_of[int(batch.free_anchor[i, 0])] < 4
        assert 0 < batch.is_noise.sum() < 32 and 0 < batch.free_first.sum() < 32


def test_real_pairs_are_frames_of_one_clip(start):
    state, c, clips = start("--batch-size", "64", "--flip")
    batch = joint.draw_batch(state, c, clips, 0)
    found = set()
    for images in zip(batch.real, batch.real_before, batch.real_anchor):
        frames = [((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for image in images]
        rows = [np.flatnonzero((clips.images == frame).all((1, 2, 3))) for frame in frames]
        flipped = not len(rows[0])
        if flipped:                                              # then all three are
            rows = [np.flatnonzero((clips.images == frame[:, ::-1]).all((1, 2, 3))) for frame in frames]
        (row,), (before,), (anchor,) = rows
        clip = np.searchsorted(clips.clip_offsets, row, side="right") - 1
        assert before == row - 1 and clips.clip_offsets[clip] <= anchor < clips.clip_offsets[clip + 1]
        found.add((int(clip), flipped, bool(anchor < row)))
    clips, flips, sides = map(set, zip(*found))
    assert clips <= set(range(4)) and flips == sides == {True, False}


def test_ranks_and_pieces_share_the_batch(start):
    state, c, clips = start("--batch-size", "8")
    whole = joint.draw_batch(state, c, clips, 0)
    parts = []
    for rank in range(2):
        state.ranks = Ranks(rank, 2)
        parts.append(joint.draw_batch(state, c, clips, 0))
    for others in (parts, whole.pieces(4), whole.pieces(2)):
        assert [part.first for part in others] == list(range(0, 8, 8 // len(others)))
        for number, (tensor, *some) in enumerate(zip(*(batch.tensors() for batch in (whole, *others)))):
            assert torch.equal(tensor, torch.cat(some)), number


def test_both_halves_are_mixed_in_pairs(start):
    state, c, clips = start("--batch-size", "8")
    batch = joint.draw_batch(state, c, clips, 0)
    batch.free_first = torch.tensor([True, False, False, True])
    mixed = batch.mixed(torch.arange(4)[:, None], 10 + torch.arange(4)[:, None]).flatten().tolist()
    assert mixed == [10, 0, 1, 11, 2, 12, 13, 3]


# ------------------------------------------------------------------------------------- videos

@pytest.mark.parametrize("prefix", [0, 8])
def test_videos_are_those_of_a_frame_by_frame_roll(start, monkeypatch, prefix):
    with_prefix(monkeypatch, prefix)
    state, c, clips = start()
    batch, generator = joint.draw_batch(state, c, clips, 0), state.generator
    made, layer, known = joint.make_videos(generator, c, batch), generator.layer, batch.windows
    v, kl = dynamics.motion_codes(layer.dynamics, c, known)
    starts = generator.start(batch.z)
    for i in range(2):
        one = slice(i, i + 1)
        free = 2 * i if batch.free_first[i] else 2 * i + 1
        compared = 4 * i + 1 - free

        window, real = Window(known.codes[one], v[one], known.anchor[one]), batch.earlier[one]
        images = []
        for earlier in (real[:, :-3], real[:, 3:], real[:, :-3]):         # of the first frame, nothing is judged
            z = layer.next_code(window)
            images.append(generator.render(z, earlier, window=window))
            window = window.followed_by(z)
        _, before, last = images
        torch.testing.assert_close(made.predicted[one], last)
        torch.testing.assert_close(made.near[[compared]], torch.cat([before, last, last - before], 1))
        torch.testing.assert_close(made.frame[[compared]], last)

        window = Window(batch.free[one], batch.v[one], batch.free_anchor[one])
        if batch.is_noise[i]:
            window = Window.still(starts[one], batch.v[one], PAST)
        first, codes = window.codes[:, 0], list(window.codes[0].flip(0))
        for number in range(1, prefix + 4):
            z = layer.next_code(window)
            if number == 8 <= prefix:                                     # as if every image had been fed back
                shown = torch.tanh(3 * (2 * generator.vae.decode(z) - 1))
                z = generator.vae.encode(shown)[0] + 0.8 ** 8 * (z - generator.vae.encode(shown)[0])
            window = window.followed_by(z)
            codes.append(window.codes[0, 0])
        images = [(1 + torch.tanh(3 * (2 * generator.vae.decode(z[None]) - 1))) / 2 for z in codes]
        at = Window(torch.stack(codes[-2:-2 - PAST:-1])[None], window.v, window.anchor)
        last = generator.render(codes[-1][None], torch.cat([images[-2]] * 3, 1), window=at)   # one stands for four
        torch.testing.assert_close(made.near[[free], 3:6], last)
        expected = generator.render(first) if prefix == 0 and batch.is_noise[i] else last
        torch.testing.assert_close(made.frame[[free]], expected)
        if prefix:
            torch.testing.assert_close(made.far[[free], :3], generator.render(window.anchor))
            torch.testing.assert_close(made.far[[compared], :3], generator.render(known.anchor[one]))
            assert torch.equal(made.far[:, 6:], made.far[:, 3:6] - made.far[:, :3])
    assert (made.far is None) == (prefix == 0) and made.motion_kl == kl


def test_no_gradient_flows_through_the_prefix(start, monkeypatch):
    with_prefix(monkeypatch, 8)
    state, c, clips = start()
    layer, seen = state.generator.layer, []
    next_code = layer.next_code
    monkeypatch.setattr(layer, "next_code", lambda window: seen.append(torch.is_grad_enabled()) or next_code(window))
    joint.make_videos(state.generator, c, joint.draw_batch(state, c, clips, 0))
    assert seen == [False] * 8 + [True] * 3


# ------------------------------------------------------------------------------------- algorithm

@pytest.mark.parametrize("prefix", [0, 16])
def test_the_losses_are_those_of_the_formulas(start, monkeypatch, prefix):
    with_prefix(monkeypatch, prefix)
    state, c, clips = start(
        "--lambda-pair", "0.7", "--lambda-drift", "0", "--gp-every", "1", "--lambda-rec", "30", "--joint-error-share",
        "0.5", "--lambda-code", "2", "--lambda-frame", "3", "--lambda-motion", "0.5")
    batch = joint.draw_batch(state, c, clips, 0)
    batch.shared = True

    def critic_loss(critic, real, fake, e):
        x_hat = (e[:, None, None, None] * real + (1 - e)[:, None, None, None] * fake).requires_grad_()
        gradient, = torch.autograd.grad(critic(x_hat).sum(), x_hat)
        return critic(fake).mean() - critic(real).mean() + 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    frame_loss = sum(loss for loss, _ in joint.critic_terms(state, c, batch))
    pair_loss = sum(loss for loss, _ in joint.pair_critic_terms(state, c, batch))
    made, near, far = batch.videos, state.pair_critics["near"], state.pair_critics["far"]
    frame, pair = made.frame.detach(), made.near.detach()
    torch.testing.assert_close(frame_loss, critic_loss(state.critic, batch.real, frame, batch.e[:, 0]))
    before, real = batch.real_before, batch.real
    expected = critic_loss(near, torch.cat([before, real, real - before], 1), pair, batch.e[:, 1])
    if prefix:
        anchor = batch.real_anchor
        expected += critic_loss(far, torch.cat([anchor, real, real - anchor], 1), made.far.detach(), batch.e[:, 2])
    torch.testing.assert_close(pair_loss, expected)

    (loss, values), = joint.generator_terms(state, c, batch)
    others = batch.earlier * 2 - 1
    expected = -state.critic(made.frame).mean() - 0.7 * near(made.near).mean() + 0.5 * made.motion_kl
    expected += -0.7 * far(made.far).mean() if prefix else 0
    error = losses.motion_weighted_error(state.generator.render(batch.code), batch.target, others)
    frame_error = losses.motion_weighted_error(made.predicted, batch.target, others)
    expected += 0.5 * (0.5 * 30 * error + 3 * frame_error) + 2 * values["code_error"]              # f = 0.5 at 32 px
    torch.testing.assert_close(loss, expected)


def test_the_encoder_and_the_prior_rest_and_all_else_learns(start):
    state, c, clips = start()
    before = {part: {name: p.clone() for name, p in getattr(state, part).named_parameters()}
              for part in ("generator", "critic", "pair_critics", "ema")}
    for _ in range(4):
        values = joint.joint_step(state, c, clips)
    assert state.counters["step"] == 4 and state.counters["images_seen"] == 2016 and "pair_critics_loss" in values
    for part, weights in before.items():
        same = {name for name, p in getattr(state, part).named_parameters() if torch.equal(p, weights[name])}
        resting = {name for name in weights if name.startswith(("vae.encoder", "vae.to_mu", "vae.to_logvar", "prior"))}
        assert same == resting, (part, same ^ resting)


def test_stage_3_begins_with_the_averaged_weights_once(start_stage_2):
    state, c, clips = start_stage_2()
    for p in state.ema.parameters():
        p.data.add_(0.01)
    state.counters["images_seen"] = 2000
    joint.begin(state, c, clips)
    assert state.counters["stage"] == 3
    assert all(torch.equal(one, other) for one, other in zip(state.generator.parameters(), state.ema.parameters()))
    for p in state.ema.parameters():
        p.data.add_(0.01)
    state.codes = None                                           # as after a resume
    joint.begin(state, c, clips)
    assert state.codes is not None
    assert not any(torch.equal(one, other) for one, other in zip(state.generator.parameters(), state.ema.parameters()))


def test_learning_rates_rise_and_then_fall_with_the_decay(start):
    state, c, _ = start("--decay-from-kimg", "4", "--decay-to-kimg", "6")
    vae, layer = state.generator_optimizer.param_groups
    for images, share in ((2000, 0.01), (2196, 0.5), (3000, 1), (5000, 0.525)):
        state.counters["images_seen"] = images
        joint.set_learning_rates(state, c)
        assert vae["lr"] == pytest.approx(1e-3 * share) and layer["lr"] == pytest.approx(3e-5 * share)
    assert state.pair_critics_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.525)


@pytest.mark.parametrize("prefix", [0, 8])
def test_micro_batches_change_no_gradient(start, monkeypatch, float64, prefix):
    with_prefix(monkeypatch, prefix)
    found, apply_if_finite = [], update.apply_if_finite

    def keep(state, model, optimizer):
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        apply_if_finite(state, model, optimizer)

    monkeypatch.setattr(update, "apply_if_finite", keep)
    for flags in ((), ("--micro-batch", "2")):
        state, c, clips = start("--gp-every", "3", "--width", "12", *flags)      # no group of one channel
        joint.joint_step(state, c, clips)
    assert len(found) == 6
    for whole, pieces in zip(found[:3], found[3:]):
        assert whole.keys() == pieces.keys()
        for name, gradient in whole.items():
            assert (gradient - pieces[name]).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
def test_a_recorded_step_equals_a_plain_step(start):
    """In full float32, so that only the order of sums differs; through all prefixes."""
    ends = []
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        state, c, clips = start("--device", "cuda", "--no-bfloat16", "--no-tf32", graph)
        update.set_up(state.device, c)
        origin = torch.cat([p.detach().flatten() for p in state.generator.parameters()])
        for _ in range(40):
            values = joint.joint_step(state, c, clips)
        assert len(state.graphs) == 4 * (graph == "--cuda-graph")
        ends.append((torch.cat([p.detach().flatten() for p in state.generator.parameters()]) - origin,
                     {name: value.item() for name, value in values.items()}))
    (moved, values), (plain_moved, plain_values) = ends
    assert (moved - plain_moved).norm() < 0.1 * plain_moved.norm()
    assert values == pytest.approx(plain_values, rel=0.05, abs=0.05)
