"""clip_scores.py: scores of videos on clips whose answers are known, and evaluate.py on a run on clips."""

import numpy as np
import pytest
import torch
from conftest import SMALL, clips_of
from test_evaluate import StandIn, numbers

import clip_scores
import demo_images
import evaluate
import extractors
import metrics
import training

CPU = torch.device("cpu")
FRAMES = clip_scores.WINDOW


def brightening(count, frames=16, first=0):
    """Clips of 32 x 32 pixels that grow brighter with time, from grey levels first, first + 1, ... on."""
    clips = clips_of([frames] * count)
    level = first + np.arange(count)[:, None] + 12 * np.arange(frames)
    clips.images[:] = np.clip(level.reshape(-1, 1, 1, 1), 0, 255)
    return clips


def test_windows_lie_in_their_clips_and_come_once():
    clips = clips_of((3, 9, 30, 12, 40))
    starts = clip_scores.starts_of(clips, [0, 1, 3], 100, np.random.default_rng(0))
    assert sorted(starts) == [3, *range(42, 46)]                       # of clips of 3, 9 and 12 frames
    assert len(clip_scores.starts_of(clips, [2], 5, np.random.default_rng(0))) == 5
    assert len(clip_scores.starts_of(clips, [0], 5, np.random.default_rng(0))) == 0
    windows = clip_scores.read_windows(clips, starts, (0, 8))
    for window, row in zip(windows, starts):
        np.testing.assert_array_equal(window.permute(0, 2, 3, 1), clips.images[[row, row + 8]])


def test_generated_windows_are_the_frames_from_16_on_whatever_the_batch(start_stage_2, monkeypatch):
    state, c, _ = start_stage_2("--feedback", "0")             # each round through an untrained encoder adds rounding
    found = clip_scores.generated_windows(state.ema, c, 3, 7, CPU)
    monkeypatch.setattr(clip_scores, "BATCH", 2)
    apart = clip_scores.generated_windows(state.ema, c, 3, 7, CPU)
    assert found.shape == (3, FRAMES, 3, 32, 32) and found.dtype == torch.uint8
    assert (found.int() - apart.int()).abs().max() <= 1
    monkeypatch.setattr(clip_scores, "FROM", 0)
    early = clip_scores.generated_windows(state.ema, c, 3, 7, CPU)
    monkeypatch.setattr(clip_scores, "FROM", 4)
    assert torch.equal(early[:, 4:], clip_scores.generated_windows(state.ema, c, 3, 7, CPU)[:, :5])


def test_the_order_of_frames_is_recognised(start_stage_2, monkeypatch):
    _, c, _ = start_stage_2()
    monkeypatch.setattr(clip_scores, "ORDER_STEPS", 60)
    clips, rng = brightening(10), np.random.default_rng(0)
    halves = np.array_split(clips.train_clips, 2)
    others = clip_scores.starts_of(clips, halves[1], 50, rng)
    forward = clip_scores.read_windows(clips, others)
    for made, low, high in ((forward, 0.9, 1), (forward.flip(1), 0, 0.1)):
        before = torch.random.get_rng_state()
        (name, value, meaning), = clip_scores.of_order(c, clips, halves, others, made, CPU, 0)
        assert name == "order" and low <= value <= high
        of_real, of_reversed, of_shuffled = (float(part.split()[-1]) for part in meaning.split("of real")[1].split(","))
        assert of_real > 0.9 and of_reversed < 0.1 and of_shuffled < 0.35, meaning
        assert torch.equal(torch.random.get_rng_state(), before)


def test_motion_tells_moving_from_frozen_and_fast_clips():
    clips, rng = brightening(24), np.random.default_rng(0)
    reference, others = (clip_scores.starts_of(clips, half, 60, rng) for half in np.array_split(clips.train_clips, 2))
    made = clip_scores.read_windows(clips, others)
    for windows, word in ((made, "real clips"), (made[:, :1].expand(-1, FRAMES, -1, -1, -1), "frozen"),
                          (made[:, [0, 2]], "speed")):
        (_, value, meaning), = clip_scores.of_motion(StandIn(), clips, reference, others, windows,
                                                     np.random.default_rng(0))
        told = {part.rsplit(" ", 1)[0].split()[-1]: float(part.rsplit(" ", 1)[1])
                for part in meaning.split(" windows of ")[1].split(", ")}
        assert value == pytest.approx(told[word.split()[-1]], abs=0.06), (word, meaning)
        assert told["clips"] < 0.1 * min(told["frozen"], told["speed"], told["shuffled"])


def test_copies_of_clips_are_found_and_shown():
    clips, rng = clips_of([12] * 8), np.random.default_rng(0)
    copied = clip_scores.read_windows(clips, np.array([2, 25]))
    new = copied // 2
    for made, share in ((copied, 1), (new, 0)):
        sheets = {}
        (_, found, _), (_, distance, words) = clip_scores.of_copies(clips, made, rng, sheets)
        assert found == share and (distance < 0.5) == (share == 1) and "held-out" in words
    list(clip_scores.of_copies(clips, copied, rng, sheets))
    assert sheets["nearest_clips.png"].shape == (4 * 34 - 2, FRAMES * 34 - 2, 3)
    np.testing.assert_array_equal(sheets["nearest_clips.png"][34:66, :32], clips.images[2])
    clips.held_out_clips = clips.held_out_clips[:0]
    (name, _, words), = clip_scores.of_copies(clips, copied, rng, sheets)
    assert name == "nearest clip" and "held-out" not in words


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with clips/, and the runs of stage 1 and of stage 2 on it."""
    root = tmp_path_factory.mktemp("clips")
    clips = demo_images.make_clips(root / "clips", 6, 20, 32)
    flags = [*SMALL, "--data", str(clips), "--runs-dir", str(root / "runs"), "--folders", "clips",
             "--dynamics-kimg", "0.04", "--steps", "3"]
    assert training.main([*flags, "--run", "images", "--vae-kimg", "0.039"]) == 0
    assert training.main([*flags, "--run", "motion", "--vae-kimg", "0.004"]) == 0
    return root


def test_a_run_on_clips_gets_scores_of_its_videos(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr(extractors, "find_extractor", lambda device: StandIn())
    monkeypatch.setattr(clip_scores, "ORDER_STEPS", 4)
    outputs = []
    for _ in range(2):
        assert evaluate.main(["runs/motion", "--data", "clips", "--count", "64"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    found = numbers(outputs[0])
    assert {"prediction r1", "prediction r8", "contrast", "length of z", "speed, 95%", "colour drift",
            "flicker", "order", "motion distance", "nearest clip", "Frechet distance"} <= found.keys()
    assert "near-duplicates" not in outputs[0] and "16 videos" in outputs[0]
    assert {file.name for file in (root / "runs/motion/evaluation").iterdir()} == {
        "copies.png", "worst_reconstructed.png", "nearest_clips.png"}
    assert evaluate.main(["runs/images", "--data", "clips", "--count", "64"]) == 0
    out = capsys.readouterr().out
    assert "no scores of videos: the run has not learned motion yet, it is in stage 1" in out
    assert "order" not in numbers(out) and "reconstruction L1" in numbers(out)


def test_too_few_long_clips_are_no_error(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extractors, "find_extractor", lambda device: None)
    clips = demo_images.make_clips(tmp_path / "short", 5, FRAMES - 1, 32)
    assert evaluate.main([str(root / "runs/motion"), "--data", str(clips), "--count", "16", "--out", "sheets"]) == 0
    assert "no scores of videos: too few clips have 9 frames or more\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- metrics

def test_the_nearest_window_is_that_of_all_windows_compared_one_by_one():
    g = torch.Generator().manual_seed(0)
    windows, clips = torch.randn(5, 3, 4, generator=g), [torch.randn(n, 4, generator=g) for n in (6, 2, 9)]
    clips[2][4:7] = windows[1]
    distance, clip, frame = metrics.nearest_window(windows, clips)
    for window, found, where, start in zip(windows, distance, clip.tolist(), frame.tolist()):
        all_of = {(i, t): (window - part[t:t + 3]).square().sum(1).mean().sqrt().item()
                  for i, part in enumerate(clips) for t in range(len(part) - 2)}
        assert min(all_of, key=all_of.get) == (where, start)
        assert found.item() == pytest.approx(all_of[where, start], abs=1e-3)
    assert (clip[1], frame[1]) == (2, 4) and distance[1] < 1e-3


def test_the_motion_distance_of_a_constant_change_is_its_square_in_units_of_the_reference():
    g = torch.Generator().manual_seed(0)
    first, change = 3 * torch.randn(50, 6, generator=g, dtype=torch.float64), torch.randn(50, 6, generator=g).double()
    more = torch.linspace(-1, 1, 6).double()
    same, moved = metrics.motion_distances((first, first + change), (first, first + change),
                                           (first, first + change + more), axes=6)
    scale = first.var(0).sum() / change.var(0).sum()
    assert same == pytest.approx(0, abs=1e-6) and moved == pytest.approx((scale * more.square().sum()).item())


def test_flicker_counts_what_all_pixels_do_and_not_what_few_do():
    windows = torch.full((2, 4, 3, 8, 8), 100, dtype=torch.uint8)
    windows[:, 1::2, :, :3] = 250                                      # less than half of the picture
    assert metrics.flicker(windows) == 0
    windows[:, 1::2, :, 3:] += 7
    assert metrics.flicker(windows) == 7
