"""rollouts.py: measured errors and values along videos, against known answers."""

import itertools

import numpy as np
import pytest
import torch
from conftest import PAST

import rollouts
import run_log


@pytest.fixture
def start(start_stage_2):
    return start_stage_2


def test_a_model_without_delta_is_as_bad_as_copying(start):
    state, c, clips = start()
    state.ema.layer.dynamics.to_delta.weight.data.zero_()
    found = rollouts.prediction_errors(state.ema, c, clips, state.codes)
    assert set(found) == {f"r{ahead}{kind}" for ahead in (1, 4, 8) for kind in ("", "_frozen", "_linear")}
    assert all(value == pytest.approx(1) for name, value in found.items() if "linear" not in name)


def test_a_model_that_knows_the_motion_has_no_error(start, monkeypatch):
    """Codes move by a constant step, which the window shows and the frozen window hides."""
    state, c, clips = start()
    step = torch.randn(c.LATENT_DIM, generator=torch.Generator().manual_seed(1)) / 20
    state.codes = torch.arange(len(clips.images))[:, None] * step, state.codes[1]
    monkeypatch.setattr(state.ema.layer, "next_code", lambda window: 2 * window.codes[:, 0] - window.codes[:, 1])
    found = rollouts.prediction_errors(state.ema, c, clips, state.codes)
    assert max(found[f"r{ahead}{kind}"] for ahead in (1, 4, 8) for kind in ("", "_linear")) < 1e-3
    assert found["r1_frozen"] == found["r8_frozen"] == 1


def test_predictions_of_clips_that_are_too_short_are_not_measured(start):
    state, c, clips = start(lengths=(5, 8))
    assert rollouts.prediction_errors(state.ema, c, clips, state.codes) == {}
    assert set(rollouts.measure(state.ema, c, clips, state.codes)) == {"contrast", "z_growth", "speed", "speed_95",
                                                                       "drift"}


def test_the_course_of_known_frames():
    """Two videos of 4 x 4 pixels: one fades from stripes to grey, one grows brighter by 0.1 per frame."""
    stripes = torch.tensor([-1.0, 1.0] * 8).view(1, 1, 4, 4)
    frames = [torch.cat([stripes * (1 - t / 4), torch.full((1, 1, 4, 4), 0.1 * t)]) for t in range(5)]
    found = rollouts.course(iter(frames))
    deviation = (16 / 15) ** 0.5
    torch.testing.assert_close(found["contrast"][:, 0], deviation * torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(found["drift"], torch.tensor([[0, 0.1 * t] for t in range(5)]))
    torch.testing.assert_close(found["speed"], torch.tensor([[0.25, 0.1]] * 4))
    assert found["acceleration"].shape == (3, 2) and found["acceleration"].max() < 1e-6


def test_video_values_are_ratios():
    def values(speed, drift):
        return {"contrast": torch.tensor([[2.0], [1.0]]), "length": torch.tensor([[1.0], [1.5]]),
                "speed": torch.full((4, 2), speed), "drift": torch.tensor([[0.0], [drift]])}
    found = rollouts.video_values(values(0.3, 0.2), values(0.2, 0.1))
    assert found == pytest.approx({"contrast": 0.5, "z_growth": 1.5, "speed": 1.5, "speed_95": 1.5, "drift": 2})


def test_late_frames_are_those_of_a_roll(start):
    state, c, _ = start()
    noise = torch.randn(2, c.LATENT_DIM + c.MOTION_DIM, generator=torch.Generator().manual_seed(0))
    window = rollouts.Window.still(state.ema.start(noise[:, :c.LATENT_DIM]), noise[:, c.LATENT_DIM:], PAST)
    with torch.no_grad():
        *_, (image, _) = itertools.islice(state.ema.roll(window), 16)
        torch.testing.assert_close(rollouts.late_frames(state.ema, c, noise), image)


def test_sheets_hold_real_frames_their_continuation_and_videos_from_noise(start):
    state, c, clips = start()
    real, continued, from_noise = rollouts.videos(state.ema, c, clips, state.codes)
    assert real.shape == continued.shape == (1, 32, 3, 32, 32) and from_noise.shape == (4, 32, 3, 32, 32)
    frames = torch.from_numpy(clips.images[72 + PAST:72 + PAST + 32]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(real[0], frames)
    sheet = run_log.strips((real, continued, from_noise))
    assert sheet.shape == (6 * 34 - 2, 16 * 34 - 2, 3)
    assert np.abs(sheet[:32, 34:66].astype(int) - clips.images[72 + PAST + 2]).max() <= 1
    clips.clip_offsets[-1] -= 10                                 # the clip ends before the row
    real, *_ = rollouts.videos(state.ema, c, clips, state.codes)
    assert (real[0, -5:] == 0).all() and (real[0, :10] != 0).any()
