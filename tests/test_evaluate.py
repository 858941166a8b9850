"""evaluate.py: main in process on folders, a run and bad input; the extractor is a small stand-in unless its weights
are at hand."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import evaluate
import training


class StandIn:
    """Features that need no weights: mean and deviation of each channel in a 2 x 2 raster."""
    name = "a stand-in, 24 features"

    def __call__(self, images):
        cells = images.float().unflatten(3, (2, -1)).unflatten(2, (2, -1))
        return torch.cat([cells.mean((3, 5)).flatten(1), cells.std((3, 5)).flatten(1)], dim=1)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda device: StandIn())


def folder(path, count, level, seed):
    """Pictures of noise around a grey level, in a folder of their own."""
    path.mkdir()
    g = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(g.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def numbers(text):
    """The first number of each line that begins with a score's name."""
    names = ("Frechet distance", "KID x 1000", "precision", "recall", "sliced Wasserstein")
    return {name: float(line.removeprefix(name).split()[0]) for line in text.splitlines() for name in names
            if line.startswith(name)}


def test_two_folders_alike_are_nearer_than_two_that_are_not(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real, alike = folder(tmp_path / "real", 40, 100, 0), folder(tmp_path / "alike", 40, 100, 1)
    darker = folder(tmp_path / "darker", 40, 60, 2)
    found = {}
    for other in (alike, darker):
        assert evaluate.main([str(other), "--data", str(real), "--image-size", "32"]) == 0
        found[other.name] = numbers(capsys.readouterr().out)
        assert len(found[other.name]) == 5
    assert found["darker"]["Frechet distance"] > 100 * found["alike"]["Frechet distance"]
    assert found["darker"]["KID x 1000"] > 1 > abs(found["alike"]["KID x 1000"] / found["darker"]["KID x 1000"])
    assert (found["darker"]["precision"], found["darker"]["recall"]) == (0, 0)
    assert min(found["alike"]["precision"], found["alike"]["recall"]) > 0.4


def test_a_run_is_scored_by_its_averaged_generator_and_a_seed_repeats(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 20, 128, 0)
    assert training.main(["--data", str(real), "--steps", "2", *SMALL]) == 0
    capsys.readouterr()
    outputs = []
    for extra in ([], [], ["--seed", "1"]):
        assert evaluate.main(["runs/real", "--data", str(real), "--count", "16", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert "16 pictures against 16 real ones, 32 px" in outputs[0]
    assert outputs[0] == outputs[1] != outputs[2]


def test_without_weights_a_line_says_so_and_the_other_score_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "find_extractor", lambda device: None)
    real = folder(tmp_path / "real", 8, 128, 0)
    assert evaluate.main([str(real), "--data", str(real), "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "no Frechet distance" in out and numbers(out) == {"sliced Wasserstein": 0.0}


@pytest.mark.parametrize("argv, word", [
    (["nowhere", "--data", "DIR"], "nowhere"),
    (["DIR", "--data", "nowhere"], "nowhere"),
    (["DIR", "--data", "DIR", "--count", "3"], "--count"),
    (["DIR", "--data", "DIR", "--seed", "-1"], "--seed"),
    (["DIR", "--data", "DIR", "--image-size", "33"], "--image-size"),
    (["DIR"], "--data"),
])
def test_bad_input_is_one_line_and_status_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 4, 128, 0)
    assert evaluate.main([str(real) if a == "DIR" else a for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error


def test_the_weights_load_and_give_features_of_the_whole_network():
    """Equal to torchvision's own forward pass up to its classifier."""
    extractor = evaluate.find_extractor(torch.device("cpu"))
    if extractor is None:
        pytest.skip("the weights of MobileNetV2 are not on this machine")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert found.shape == (3, 1280) and found.std() > 0.05
    grey = extractor(images[:, :1])
    torch.testing.assert_close(grey, extractor(images[:, :1].expand(-1, 3, -1, -1)))
    assert (grey - found).abs().max() > 0.1
