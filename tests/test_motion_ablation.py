"""benchmarks/motion_ablation.py: the variants compute what its docstring says, the report what the table contains."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import PAST, SMALL, window_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import motion_ablation
import tables

import demo_images
import dynamics
import training

CPU = torch.device("cpu")


@pytest.fixture
def variant(start_stage_2):
    """variant(name) returns a state in stage 2 with a random Delta head, its constants and clips."""
    state, c, clips = start_stage_2()
    saved = {"ema": state.ema.state_dict(), "critic": state.critic.state_dict()}

    def new(name):
        own = type(c)(**vars(c))
        made = motion_ablation.new_state(name, own, saved, CPU)
        dynamics.begin(made, own, clips, state.codes)
        for generator in (made.generator, made.ema):
            torch.manual_seed(0)
            torch.nn.init.normal_(generator.layer.dynamics.to_delta.weight, std=0.02)
        return made, own, clips
    return new


@pytest.mark.parametrize("name", motion_ablation.VARIANTS)
def test_every_variant_trains_its_layer_on_the_runs_vae(variant, name):
    (state, c, clips), (live, _, _) = variant(name), variant("live")
    for key, weight in live.generator.vae.state_dict().items():
        assert torch.equal(state.generator.vae.state_dict()[key], weight)
    before = {key: weight.clone() for key, weight in state.generator.state_dict().items()}
    dynamics.motion_step(state, c, clips)
    changed = {key for key, weight in state.generator.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed and all(key.startswith(("layer", "prior")) for key in changed)
    assert ("layer.dynamics.to_delta.weight" in changed) == (name != "no delta")


def test_what_the_variants_see_of_a_window(variant):
    def moves(name, change):
        state, c, _ = variant(name)
        window, layer = window_of(c, torch.Generator().manual_seed(0)), state.generator.layer
        with torch.no_grad():
            torch.manual_seed(1)
            one = layer.next_code(window) - window.codes[:, 0]
            torch.manual_seed(1)
            other = change(window)
            return (layer.next_code(other) - other.codes[:, 0] - one).abs().max().item()

    def older(window):
        return window._replace(codes=torch.cat([window.codes[:, :1], 2 * window.codes[:, 1:]], 1))

    def copies(window):
        return window._replace(codes=window.codes[:, :1].expand_as(window.codes))

    for name in ("live", "shuffled", "fixed alpha", "mlp", "gru", "pixels", "pixels and codes", "window 2"):
        assert moves(name, older) > 1e-5, name
    assert moves("frozen", older) == moves("frozen", copies) == moves("no delta", older) == 0
    state, c, _ = variant("shuffled")
    still = copies(window_of(c, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        torch.testing.assert_close(state.generator.layer.next_code(still),
                                   variant("live")[0].generator.layer.next_code(still))


def test_mlp_and_gru_have_as_many_parameters_as_the_transformer(variant):
    expected = motion_ablation.parameters(variant("live")[0].generator.layer.transformer)
    for name in ("mlp", "gru"):
        assert motion_ablation.parameters(variant(name)[0].generator.layer.transformer) == pytest.approx(expected,
                                                                                                       rel=0.03)


@pytest.mark.parametrize("name", ["pixels", "pixels and codes"])
def test_pixels_are_those_of_the_codes_whether_or_not_they_were_decoded_before(variant, name):
    state, c, _ = variant(name)
    layer, window = state.generator.layer, window_of(c, torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = [layer.displayed(state.generator.vae.decode(code)) for code in window.codes.unbind(1)]
        torch.testing.assert_close(layer.images(window.codes), torch.stack(images, 1))
        rolled = dynamics.unrolled(state.generator, window, PAST + 2)
        decoded, render = [], layer.render
        layer.render = lambda codes: decoded.append(len(codes)) or render(codes)
        after = window
        for z in rolled.unbind(1):
            layer.known = None
            torch.testing.assert_close(layer.next_code(after), z)
            after = after.followed_by(z)
        assert decoded == [2 * PAST] * (PAST + 2)
        decoded.clear()
        layer.known = None
        dynamics.unrolled(state.generator, window, PAST + 2)
        assert decoded == [2 * PAST] + [2] * (PAST + 1)


def test_the_script_measures_what_is_missing_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clips = demo_images.make_clips(tmp_path / "clips", 5, 20, 32)
    assert training.main([*SMALL, "--data", str(clips), "--run", "small", "--folders", "clips", "--vae-kimg", "0.004",
                          "--dynamics-kimg", "0.02", "--steps", "2"]) == 0
    command = ["runs/small", "--csv", "t.csv", "--windows", "32", "--seeds", "1", "--plot", "t.png", "--joint", "1"]
    monkeypatch.setattr(motion_ablation, "clock", lambda device: 0)
    monkeypatch.setattr(motion_ablation, "NEAR", 9)
    real = motion_ablation.measure
    monkeypatch.setattr(motion_ablation, "measure", lambda *others: real(*others) | {"seconds": 1.0})
    assert motion_ablation.main([*command, "--only", "live", "no delta"]) == 0
    text = capsys.readouterr().out
    rows = tables.read(Path("t.csv"), motion_ablation.COLUMNS)
    assert [(row["variant"], row["view"]) for row in rows] == [("live", "windows"), ("live", "joint"),
                                                               ("no delta", "windows"), ("no delta", "joint")]
    assert rows[2]["r8"] == "1.0" and rows[1]["contrast"] and not rows[0]["contrast"]
    assert "| no delta | 1 | 32 | 0.0 | 1.000 | 1.000 | 1.000 |" in text and "clips, after stage 3:" in text
    assert Path("t.png").stat().st_size > 5000
    monkeypatch.setattr(motion_ablation, "measure", None)                     # nothing is missing
    assert motion_ablation.main([*command, "--only", "live", "no delta"]) == 0
    assert motion_ablation.main(["--csv", "none.csv"]) == 2 and "contains no rows" in capsys.readouterr().err


def test_views_and_differences_are_paired():
    def row(variant, view, seed, r8):
        return {"set": "a", "vae": "v", "variant": variant, "seed": seed, "view": view, "r8": r8}

    found = motion_ablation.views([row("live", "windows", 0, 0.5), row("live", "windows", 1, 0.6),
                                   row("mlp", "windows", 0, 0.7), row("mlp", "windows", 1, 0.7),
                                   row("mlp", "minutes", 0, 0.4)])
    assert motion_ablation.differences(found["a", "windows"], "r8") == {"mlp": pytest.approx([0.2, 0.1])}
    assert motion_ablation.differences(found["a", "minutes"], "r8") == {"mlp": pytest.approx([-0.1, 0.1])}
