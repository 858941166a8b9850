"""The layers of benchmarks/ablation.py are what its table says, and the table says what was trained."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation

import command_line
import data
import evaluate
import model_definitions
import training_step


def state_of(name, decoder_width=0):
    c, _ = command_line.parse_constants(SMALL)
    state = ablation.new_state(name, c, torch.device("cpu"), decoder_width or c.WIDTH)
    return state, c


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def show(layer, x, random_head=True):
    """What the layer makes of x, with the changes of a training step."""
    if random_head and isinstance(layer.to_s, torch.nn.Linear):
        torch.nn.init.normal_(layer.to_s.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return layer.apply_alpha(x, layer.alpha(x, changes=layer.video.draw(torch.Generator().manual_seed(2))))


@pytest.mark.parametrize("name", ablation.LAYERS)
def test_all_layers_start_from_the_same_critic_and_decoder(name):
    state, _ = state_of(name)
    other, _ = state_of("transformer")
    pairs = [(state.critic, other.critic), (state.generator.vae, other.generator.vae)]
    for a, b in pairs:
        for key, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[key]), key
    assert isinstance(other.generator.layer, model_definitions.TransformerParamTanh)
    assert model_definitions.TransformerParamTanh is ablation.LAYERS["transformer"]      # put back


@pytest.mark.parametrize("name", ablation.LAYERS)
def test_all_layers_train(name, photos, tmp_path):
    state, c = state_of(name)
    images = data.load_images(photos, 32, 3, tmp_path / "cache", workers=0)
    before = [p.detach().clone() for p in state.generator.parameters()]
    values = training_step.training_step(state, c, images)
    assert all(value.isfinite() for value in values.values())
    assert not any(torch.equal(p, old) for p, old in zip(state.generator.vae.parameters(), before) if p.grad.any())


def test_layers_without_a_transformer_have_their_closed_forms(x):
    none, fixed, scalar = (state_of(name)[0].generator.layer for name in ("none", "fixed", "scalar"))
    assert torch.equal(show(none, x), 2 * x - 1)
    torch.testing.assert_close(show(fixed, x), torch.tanh(3 * (2 * x - 1)))
    torch.testing.assert_close(show(scalar, x), torch.tanh(3 * (2 * x - 1)))
    with torch.no_grad():
        scalar.s.fill_(0.5)
    torch.testing.assert_close(show(scalar, x), torch.tanh(3 ** (1 + math.tanh(0.5)) * (2 * x - 1)))
    show(scalar, x).sum().backward()
    assert scalar.s.grad.abs() > 0
    assert [sum(p.numel() for p in layer.parameters()) for layer in (none, fixed, scalar)] == [0, 0, 1]


def test_bias_moves_logits_by_what_would_have_set_alpha(x):
    layer = state_of("bias")[0].generator.layer
    torch.testing.assert_close(show(layer, x, random_head=False), torch.tanh(3 * (2 * x - 1)), atol=1e-5, rtol=1e-5)
    image = show(layer, x)
    alpha = layer.alpha(x, changes=layer.video.draw(torch.Generator().manual_seed(2)))
    odds = x / (1 - x) * torch.exp(3 * torch.log(alpha / 3) / math.log(3))
    torch.testing.assert_close(image, torch.tanh(3 * (2 * odds / (1 + odds) - 1)), atol=1e-4, rtol=1e-4)
    assert (image - torch.tanh(3 * (2 * x - 1))).abs().max() > 0.1


def test_the_gradient_through_the_video_is_cut_where_it_is_detached_and_only_there(x):
    for name, cut in (("transformer", False), ("bias", False), ("still", False), ("detached", True)):
        layer, leaf = state_of(name)[0].generator.layer, x.clone().requires_grad_()
        show(layer, x)                                                                  # the random head
        alpha = layer.alpha(leaf, changes=layer.video.draw(torch.Generator().manual_seed(2)))
        gradient, = torch.autograd.grad(alpha.sum(), leaf, allow_unused=True)
        assert (gradient is None) == cut, name
        assert not cut or show(layer, leaf).requires_grad                                # x itself still learns


def test_inner_alpha_scales_what_the_last_convolution_reads():
    state, c = state_of("inner")
    fixed, _ = state_of("inner_fixed")
    z = torch.randn(2, c.LATENT_DIM, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(state.generator(z), fixed.generator(z))           # alpha starts at ALPHA_INIT
    layer, block, vae = state.generator.layer, state.generator.vae.decoder[-1], state.generator.vae
    torch.nn.init.normal_(layer.to_s.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    image, alpha = state.generator.image_and_alpha(z)
    hidden = model_definitions.run(vae.decoder[:-1], vae.from_z(z).unflatten(1, vae.start_shape), z)
    scale, shift = block.norm.to_scale_and_shift(z)[:, :, None, None].chunk(2, dim=1)
    normalised = block.norm.norm(hidden) * (1 + scale) + shift
    gain = alpha.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)) / 3      # 2 x 2 pixels of the picture each
    x = torch.sigmoid(block.up(torch.relu(torch.tanh(gain * normalised))))
    torch.testing.assert_close(image, torch.tanh(3 * (2 * x - 1)), rtol=1e-4, atol=1e-5)
    assert (image - fixed.generator(z)).abs().max() > 0.01
    torch.testing.assert_close(state.generator(z), image)                         # nothing is left of the gain


def test_a_still_video_is_one_picture_repeated(x):
    for name, still in (("still", True), ("transformer", False)):
        layer = state_of(name)[0].generator.layer
        frames = layer.video(x, layer.video.draw(torch.Generator().manual_seed(0))).unflatten(1, (-1, 3))
        assert torch.equal(frames, frames[:, :1].expand_as(frames)) == still


def test_the_wide_decoder_is_wider_and_the_rest_is_not():
    state, c = state_of("wide", decoder_width=2 * command_line.parse_constants(SMALL)[0].WIDTH)
    plain, _ = state_of("none")

    def count(module):
        return sum(p.numel() for p in module.parameters())
    assert count(state.generator.vae.decoder) > 3 * count(plain.generator.vae.decoder)
    assert count(state.generator.vae.encoder) == count(plain.generator.vae.encoder)
    assert count(state.critic) == count(plain.critic)
    assert state.generator(torch.randn(2, c.LATENT_DIM)).shape == (2, 3, 32, 32)


def row(layer, seed, steps, frechet, set_name="set"):
    return {"set": set_name, "layer": layer, "seed": seed, "steps": steps, "images": 16.0 * steps, "frechet": frechet,
            "kid": 1.0, "kid_error": 0.1, "reconstruction": 0.2, "decoder_width": 0, "flags": "", "machine": "a"}


def test_differences_are_paired_by_seed_and_say_which_way(tmp_path, capsys):
    rows = [row("transformer", 0, 10, 100.0), row("fixed", 0, 10, 110.0), row("transformer", 1, 10, 200.0),
            row("fixed", 1, 10, 196.0), row("fixed", 2, 10, 50.0), row("fixed", 0, 40, 70.0), row("fixed", 1, 40, 96.0),
            row("fixed", 2, 40, 10.0)]
    found = ablation.views(rows, {})
    assert list(found) == ["steps"] and {r["steps"] for r in found["steps"]} == {10}
    assert ablation.differences(found["steps"], "set") == {"fixed": [10, -4]}
    for line in rows:
        ablation.tables.append(tmp_path / "t.csv", ablation.COLUMNS, line)
    assert ablation.read_table(tmp_path / "t.csv") == rows
    for layer, seconds in (("transformer", 12.0), ("fixed", 6.0)):             # so 20 steps, half the way to 40 in logs
        ablation.tables.append(tmp_path / "t_times.csv", ablation.TIMES, {
            "layer": layer, "decoder_width": 8, "seconds": seconds, "flags": "", "machine": "M"})
    times, machine = ablation.read_times(tmp_path / "t.csv")
    found = ablation.views(rows, times)
    assert ablation.differences(found["minutes"], "set") == {"fixed": [pytest.approx(-10), pytest.approx(-54)]}
    slow = {**times, "wide": (36.0, 8)}                                             # 10 steps are not 3.3
    cells = {(r["layer"], r["seed"]) for r in ablation.views([*rows, row("wide", 0, 10, 1.0)], slow)["minutes"]}
    assert cells == {(r["layer"], r["seed"]) for r in found["minutes"]}
    assert "at equal steps in 1 of 2 pairs (the distance with a fixed alpha minus the Transformer's is +3.0" in \
        ablation.sentence(found)
    assert "at equal minutes in 0 of 2 pairs" in ablation.sentence(found) and machine == "M"
    assert ablation.main(["--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "t.png")]) == 0
    out = capsys.readouterr().out
    assert "set, after 2.0 minutes of M:" in out
    assert "| fixed | 3 | 10 | 160 | 1.0 | 118.7 | +3.0 (9.9) | 1 | 0.200 |" in out
    assert "| fixed | 3 | 20 | 320 | 2.0 | 88.7 | -32.0 (31.1) | 1 | 0.200 |" in out
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_between_two_scores_lies_a_line_over_the_logarithm_and_outside_the_nearest():
    cell = [row("fixed", 0, 400, 60.0), row("fixed", 0, 100, 100.0)]
    assert [ablation.at_steps(cell, steps)["frechet"] for steps in (50, 100, 200, 400, 900)] == \
        pytest.approx([100, 100, 80, 60, 60])
    assert ablation.at_steps(cell[:1], 500) == ablation.at_steps(cell[:1], 20) == cell[0]


def test_bad_input_gives_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for flags, words in ((["--csv", tmp_path / "none.csv"], "holds no rows"),
                         (["--csv", tmp_path / "other.csv"], "is no table of this script"),
                         (["--csv", tmp_path / "no" / "t.csv"], "there is no folder"),
                         (["--csv", tmp_path / "t.csv", "--only", "alpha"], "give some of none wide fixed"),
                         (["--csv", tmp_path / "t.csv", "--data", "a/set", "b/set"], "two folders of the same name"),
                         (["--csv", tmp_path / "t.csv", "--steps", "-1"], "give a number above 0"),
                         (["--csv", tmp_path / "t.csv", "--", "--image-size", "33"], "33")):
        assert ablation.main([str(flag) for flag in flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error


@pytest.mark.slow
def test_trains_what_the_table_lacks_and_nothing_twice(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "TURNS", 1)
    if evaluate.find_extractor(torch.device("cpu")) is None:
        pytest.skip("needs the weights of requirements-weights.txt")
    table = tmp_path / "t.csv"
    flags = ["--data", str(image_folder(40, name="set")), "--csv", str(table), "--seeds", "1", "--steps", "2",
             "--count", "36"]
    more = ["--jobs", "2", "--", *SMALL[2:], "--patch", "16", "--runs-dir", str(tmp_path / "runs")]
    assert ablation.main([*flags, "--only", "fixed", *more]) == 0
    first = table.read_text()
    assert ablation.main([*flags, "--only", "fixed", "transformer", *more]) == 0
    assert table.read_text().startswith(first)
    rows, (times, machine) = ablation.read_table(table), ablation.read_times(table)
    assert list(times) == list(ablation.LAYERS) and machine == rows[0]["machine"]
    further = math.ceil(2 * times["transformer"][0] / times["fixed"][0])
    assert sorted((r["layer"], r["steps"]) for r in rows) == sorted({("fixed", 2), ("fixed", further),
                                                                     ("transformer", 2)})
    assert all(r["images"] == r["steps"] * 4 and r["decoder_width"] == times[r["layer"]][1] for r in rows)
    capsys.readouterr()
    assert ablation.main([*flags, "--", "--width", "8"]) == 2
    assert "was made with" in capsys.readouterr().err
