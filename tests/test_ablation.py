"""benchmarks/ablation.py: the layers compute what its docstring says, and the report what the tables contain."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation
import tables

import command_line
import data
import extractors
import training_step
from errors import InputError

CPU = torch.device("cpu")
DOCS = Path(__file__).resolve().parents[1] / "docs"


def state_of(name):
    c, _ = command_line.parse_constants(SMALL)
    return ablation.new_state(name, c, CPU), c


@pytest.mark.parametrize("name", ablation.LAYERS)
def test_every_layer_trains_from_the_same_critic_and_vae(name, photos, tmp_path):
    (state, c), (other, _) = state_of(name), state_of("transformer")
    for a, b in ((state.critic, other.critic), (state.generator.vae, other.generator.vae)):
        assert all(torch.equal(tensor, b.state_dict()[key]) for key, tensor in a.state_dict().items())
    before = {key: p.detach().clone() for key, p in state.generator.named_parameters()}
    images = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0)
    assert all(value.isfinite() for value in training_step.training_step(state, c, images).values())
    changed = {key for key, p in state.generator.named_parameters() if not torch.equal(p, before[key])}
    assert any(key.startswith("vae") for key in changed)
    learned = {"transformer": "layer.to_s.weight", "still": "layer.to_s.weight", "scalar": "layer.s"}
    assert {key for key in changed if key in learned.values()} == ({learned[name]} if name in learned else set())


def test_layers_without_a_transformer_have_their_closed_forms():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    none, fixed, scalar = (state_of(name)[0].generator.layer for name in ("none", "fixed", "scalar"))
    with torch.no_grad():
        scalar.s.fill_(0.5)
    assert torch.equal(none(x), 2 * x - 1)
    torch.testing.assert_close(fixed(x), torch.tanh(3 * (2 * x - 1)))
    torch.testing.assert_close(scalar(x), torch.tanh(3 ** (1 + math.tanh(0.5)) * (2 * x - 1)))


def test_only_a_still_video_repeats_one_image():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, still in (("still", True), ("transformer", False)):
        video = state_of(name)[0].generator.layer.video
        frames = video(x, video.draw(torch.Generator().manual_seed(0))).unflatten(1, (-1, 3))
        assert torch.equal(frames, frames[:, :1].expand_as(frames)) == still


# ------------------------------------------------------------------------------------- report

def row(layer, seed, steps, frechet):
    return {"set": "set", "layer": layer, "seed": seed, "steps": steps, "images": 16.0 * steps, "frechet": frechet,
            "kid": 1.0, "kid_error": 0.1, "reconstruction": 0.2, "decoder_width": 0, "flags": "", "machine": "a"}


def test_differences_are_paired_by_seed_at_equal_steps_and_at_equal_minutes(tmp_path, capsys):
    rows = [row("transformer", 0, 10, 100.0), row("fixed", 0, 10, 110.0), row("transformer", 1, 10, 200.0),
            row("fixed", 1, 10, 196.0), row("fixed", 2, 10, 50.0), row("fixed", 0, 40, 70.0), row("fixed", 1, 40, 96.0),
            row("fixed", 2, 40, 10.0), row("wide", 0, 10, 1.0)]
    for line in rows:
        tables.append(tmp_path / "t.csv", ablation.COLUMNS, line)
    for layer, seconds in (("transformer", 12.0), ("fixed", 6.0), ("wide", 36.0)):     # 20 steps of fixed, 3.3 of wide
        tables.append(tmp_path / "t_times.csv", ablation.TIMES, {
            "layer": layer, "decoder_width": 8, "seconds": seconds, "flags": "", "machine": "M"})
    assert ablation.read_table(tmp_path / "t.csv") == rows

    found = ablation.views(rows, ablation.read_times(tmp_path / "t.csv")[0])
    assert {r["steps"] for r in found["steps", "set"]} == {10}
    assert ablation.differences(found["steps", "set"]) == {"wide": [-99], "fixed": [10, -4]}
    assert ablation.differences(found["minutes", "set"]) == {"fixed": [pytest.approx(-10), pytest.approx(-54)]}
    ablation.start(["--csv", str(tmp_path / "t.csv")])
    out = capsys.readouterr().out
    assert "at equal steps in 1 of 2 pairs (the distance with a fixed alpha minus the Transformer's is +3.0" in out
    assert "at equal minutes in 0 of 2 pairs" in out and "set, after 2.0 minutes of M:" in out
    assert "| fixed | 3 | 10 | 160 | 1.0 | 118.7 | +3.0 (9.9) | 1 | 0.200 |" in out
    assert "| fixed | 3 | 20 | 320 | 2.0 | 88.7 | -32.0 (31.1) | 1 | 0.200 |" in out


def test_between_two_scores_lies_a_line_over_the_logarithm_and_outside_the_nearest():
    cell = [row("fixed", 0, 400, 60.0), row("fixed", 0, 100, 100.0)]
    assert [ablation.at_steps(cell, steps)["frechet"] for steps in (50, 100, 200, 400, 900)] == \
        pytest.approx([100, 100, 80, 60, 60])


def test_the_committed_tables_give_the_documented_sentence_and_a_plot(tmp_path, capsys):
    ablation.start(["--csv", str(DOCS / "ablation.csv"), "--plot", str(tmp_path / "t.png")])
    out = capsys.readouterr().out
    assert "at equal steps in 3 of 6 pairs" in out and "at equal minutes in 0 of 6 pairs" in out
    assert "| wide | 3 | 2,000 | 16,000 | 12.3 | 172.7 | -27.5 (6.3) | 437 | 0.074 |" in out
    assert (tmp_path / "t.png").stat().st_size > 1000
    ablation.start(["--csv", str(DOCS / "ablation_variations.csv")])
    assert "| inner_fixed | 2 |" in capsys.readouterr().out


def test_another_table_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of this script"):
        ablation.start(["--csv", str(tmp_path / "other.csv")])


@pytest.mark.slow
def test_trains_what_the_table_lacks_and_nothing_twice(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "TURNS", 1)
    if extractors.find_extractor(CPU) is None:
        pytest.skip("needs the weights of requirements-weights.txt")
    table = tmp_path / "t.csv"
    flags = ["--data", str(image_folder(40, name="set")), "--csv", str(table), "--seeds", "1", "--steps", "2",
             "--count", "36"]
    more = [*SMALL[2:], "--image-size", "32", "--runs-dir", str(tmp_path / "runs")]
    ablation.start([*flags, "--only", "fixed", *more])
    first = table.read_text()
    ablation.start([*flags, "--only", "fixed", "transformer", *more])
    assert table.read_text().startswith(first)
    rows, (times, machine) = ablation.read_table(table), ablation.read_times(table)
    assert list(times) == list(ablation.LAYERS) and machine == rows[0]["machine"]
    further = math.ceil(2 * times["transformer"] / times["fixed"])
    assert {(r["layer"], r["steps"]) for r in rows} == {("fixed", 2), ("fixed", further), ("transformer", 2)}
    assert all(r["images"] == r["steps"] * 4 for r in rows)
    with pytest.raises(InputError, match="was made with"):
        ablation.start([*flags, "--width", "8"])
