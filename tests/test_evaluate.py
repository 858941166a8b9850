"""evaluate.py: extractors on weights and files that the tests write themselves, main on small folders and a run."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial
import torch
import torchvision
from conftest import SMALL
from PIL import Image
from torch import nn

import checkpoints
import command_line
import data
import evaluate
import extractors
import model_definitions
import training
from errors import InputError


def noise(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------- torchvision's classifiers

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The empty folder in which torch.hub keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def save_random_weights(hub, network, weights):
    """Writes them with the names of layers that the published files have."""
    state = {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", key): value
             for key, value in network.state_dict().items()}
    torch.save(state, hub / Path(weights.url).name)


def as_trained(pixels, weights):
    """Returns images of the size and normalisation of the weights' preset, without its cropping."""
    preset = weights.transforms()
    small = torchvision.transforms.functional.resize(pixels.float() / 255, preset.crop_size, antialias=True)
    return torchvision.transforms.functional.normalize(small, preset.mean, preset.std)


def relative_difference(a, b):
    """Random weights make features of any size, down to 1e-6."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name, layer", [("squeezenet1_1", "classifier.1"), ("densenet121", "classifier")])
def test_features_are_the_input_of_the_last_layer(hub, name, layer):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    network = torchvision.models.get_model(name).eval()
    save_random_weights(hub, network, weights)
    extractor = extractors.choose_extractor(name, "cpu")
    pixels, seen = to_tensor(noise(2, 300)), []                # larger than 224 px, so that antialiasing matters
    found = extractor(pixels)
    network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(as_trained(pixels, weights))
    expected = seen[0] if seen[0].ndim == 2 else seen[0].relu().mean((2, 3))    # squeezenet: a convolution is last
    assert relative_difference(found, expected) < 1e-3
    assert f"{name} with {weights.name} weights, {found.shape[1]} features" in extractor.name
    assert "224 px bilinear" in extractor.name and "FID" not in extractor.name


def test_networks_with_another_normalisation_apply_it(hub):
    """The reference is torchvision's own way to load these weights, which sets transform_input."""
    weights = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    save_random_weights(hub, torchvision.models.googlenet(init_weights=False), weights)
    network = torchvision.models.googlenet(weights=weights).eval()
    network.fc = nn.Identity()
    pixels = to_tensor(noise(2))
    with torch.no_grad():
        expected = network(as_trained(pixels, weights))
    assert relative_difference(extractors.choose_extractor("googlenet", "cpu")(pixels), expected) < 1e-3


def test_mobilenets_weights_give_useful_features():
    extractor = extractors.find_extractor("cpu")
    if extractor is None:
        pytest.skip("the weights of MobileNetV2 are not on this machine")
    found = extractor(to_tensor(noise(3)))
    assert found.shape == (3, 1280) and found.std() > 0.05


def test_missing_weights_are_named_with_their_folder(hub):
    with pytest.raises(InputError, match=r"resnet50-\w+\.pth") as caught:
        extractors.choose_extractor("resnet50", "cpu")
    assert str(hub) in str(caught.value)


def test_missing_weights_of_the_default_extractor(hub, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert extractors.find_extractor("cpu") is None
    assert extractors.choose_extractor("auto", "cpu") is None and extractors.choose_extractor("none", "cpu") is None
    with pytest.raises(InputError, match=re.escape("requirements-weights.txt")):
        extractors.need_extractor("cpu")


@pytest.mark.parametrize("content", [b"none", {"other": torch.ones(1)}, [1]])
def test_damaged_weights_are_named(hub, content):
    file = hub / Path(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url).name
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match=file.name):
        extractors.choose_extractor("squeezenet1_1", "cpu")


# ------------------------------------------------------------------------------------- TorchScript files

def write_torchscript(file, body):
    """Writes a module whose forward(self, x) is `body`; returns the file's name."""
    class Module(torch.jit.ScriptModule):        # a new class each time, because define() changes the class
        pass

    module = Module()
    module.define(f"def forward(self, x):\n    {body}\n")
    module.save(str(file))
    return str(file)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_torchscript_file_reads_floats_in_0_to_1(tmp_path, channels):
    file = write_torchscript(tmp_path / "means.pt", "return x.mean((2, 3))")
    pixels = to_tensor(noise(extractors.CPU_BATCH + 1))[:, :channels]
    found = extractors.choose_extractor(file, "cpu")(pixels)
    torch.testing.assert_close(found, pixels.double().mean((2, 3)).expand(-1, 3).float() / 255)


@pytest.mark.parametrize("body, words", [
    ("return x.mean((1, 2, 3))", "float32 (3,)"),
    ("return x.mean((2, 3)) / 0", "finite"),
    ("return x.mean((2, 3))[1:]", "float32 (2, 3)"),
    ("return x.mean((2, 3)).long()", "int64 (3, 3)"),
    ("return [x.mean((2, 3))]", "list"),
    ("return x.flatten(1) @ torch.ones([7, 2])", "(3, 3, 32, 32)"),
    ("raise Exception('images of 299 px, please')", "299 px, please")])
def test_a_torchscript_file_that_is_no_extractor_is_refused_in_one_line(tmp_path, body, words):
    file = write_torchscript(tmp_path / "net.pt", body)
    with pytest.raises(InputError) as caught:
        extractors.choose_extractor(file, "cpu")(to_tensor(noise(3)))
    line = str(caught.value)
    assert words in line and file in line and "\n" not in line and len(line) < 500


@pytest.mark.parametrize("content", [b"", b"no zip", nn.Linear(2, 2).state_dict()])
def test_a_file_that_is_no_torchscript_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "net.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match="not a readable TorchScript file") as caught:
        extractors.choose_extractor(str(file), "cpu")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- parts

class MeanColour(nn.Module):
    """A generator whose latent space is an image's mean colour, and whose images have that colour everywhere."""

    def __init__(self):
        super().__init__()
        self.vae, self.weight = self, nn.Parameter(torch.zeros(1))

    def encode(self, image):
        return image.mean((2, 3)), None

    def forward(self, z):
        return z[:, :, None, None].expand(-1, -1, 32, 32)

    render = forward


def image_set(images, held_out=0):
    """Returns an ImageSet of uint8 (N, H, W, C) in memory, whose last `held_out` images are held out."""
    rows = np.arange(len(images))
    names = [f"folder/{i}.png" for i in rows]
    return data.ImageSet(images, names, rows[:len(rows) - held_out], rows[len(rows) - held_out:], [])


def numbers(text):
    """Returns {name: number} of the lines that begin with a score's name."""
    names = ("Frechet distance", "KID x 1000", "precision", "recall", "diversity", "sliced Wasserstein", "copies, 1%",
             "copies, 5%", "nearest image", "reconstruction L1", "prediction r1", "prediction r8", "contrast",
             "length of z", "speed, 95%", "colour drift", "flicker", "order", "motion distance", "nearest clip")
    return {name: float(line.removeprefix(name).split()[0]) for line in text.splitlines()
            for name in names if line.startswith(name)}


def test_shares_of_generated_images_make_up_the_whole():
    whole = evaluate.generate(MeanColour(), 3, 7, seed=2)
    parts = [evaluate.generate(MeanColour(), 3, 7, seed=2, share=(i, 3)) for i in range(3)]
    assert whole.shape == (7, 3, 32, 32) and torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, evaluate.generate(MeanColour(), 3, 7, seed=3))


def test_samples_are_distinct_training_images_that_depend_on_the_seed():
    of = image_set(noise(50, 16), held_out=20)
    found = evaluate.sample_images(of, 10)
    train = to_tensor(of.images[:30])
    rows = [int((train == image).flatten(1).all(1).nonzero()) for image in found]
    assert len(set(rows)) == 10 and len(evaluate.sample_images(of, 100)) == 30
    assert torch.equal(found, evaluate.sample_images(of, 10))
    assert not torch.equal(found, evaluate.sample_images(of, 10, seed=1))


def test_scores_use_given_features_and_tell_precision_from_recall():
    real = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    found = evaluate.scores(to_tensor(noise(8)), to_tensor(noise(16, seed=1)), lambda _: pytest.fail("computed again"),
                            real_features=torch.cat([real, real + 10]), features=real)
    assert (found["precision"], found["recall"]) == (1, 0.5)
    assert list(found) == ["frechet", "kid", "kid_error", "precision", "recall", "diversity", "sliced_wasserstein"]


def test_copies_are_found_and_shown_beside_their_training_images(capsys):
    real = noise(300, 16)
    of = torch.tensor([7, 150, 299, 42])
    generated = torch.cat([to_tensor(noise(4, 16, seed=1) // 2), to_tensor(real)[of]])
    sheet = evaluate.check_copies(generated, image_set(real))
    found = numbers(capsys.readouterr().out)
    assert found["copies, 1%"] == found["copies, 5%"] == 0.5
    label = sheet.shape[0] // 2 - 16 - 4                 # two rows of a label, an image and half of a gap
    np.testing.assert_array_equal(sheet[label:label + 16, :16], real[7])
    np.testing.assert_array_equal(sheet[label:label + 16, 18:34], real[7])


@pytest.mark.parametrize("held_out", [0, 40])
def test_copy_check_compares_with_held_out_images_if_there_are_any(held_out, capsys):
    real, one = noise(120, 16), noise(1, 16, seed=1)
    real[100] = real[3]                                  # a held-out image equals a training image
    evaluate.check_copies(to_tensor(one), image_set(real, held_out))
    out = capsys.readouterr().out
    levels = np.concatenate([one, real]).reshape(121, -1).astype(float)
    distances = scipy.spatial.distance.cdist(levels, levels) / levels.shape[1] ** 0.5 + np.diag([np.inf] * 121)
    to_train = distances[:, 1:121 - held_out].min(1)
    line, = (line for line in out.splitlines() if line.startswith("nearest image"))
    assert numbers(line)["nearest image"] == pytest.approx(to_train[0], abs=1e-3)
    expected = np.median(to_train[81:] if held_out else to_train[1:])
    assert float(line.split(";")[1].split()[0]) == pytest.approx(expected, rel=0.005)       # torch's median is lower
    assert ("40 held-out images" in out) == bool(held_out) != ("no image is held out" in out)


def test_the_worst_reconstruction_and_the_near_duplicates_are_found(capsys):
    """Plain images, except for one that is half black, half white: its reconstruction, grey, is 127 or 128 levels
    off."""
    colours = np.random.default_rng(0).integers(0, 256, (60, 1, 1, 3), dtype=np.uint8)
    real = np.broadcast_to(colours, (60, 32, 32, 3)).copy()
    real[11], real[11, :16] = 255, 0
    real[33] = real[20]
    real[33, 5, 5] ^= 7                                  # not equal, but nearly so
    of, generator = image_set(real, held_out=10), MeanColour()
    rows, mu, errors = evaluate.reconstruct_folder(generator, of, count=100)
    held_out, train = capsys.readouterr().out.splitlines()
    assert sorted(rows.tolist()) == list(range(60))
    assert len(evaluate.reconstruct_folder(generator, of, count=4)[0]) == 4 + evaluate.TRAINING_FACTOR * 4
    capsys.readouterr()
    assert "10 held-out images" in held_out and numbers(held_out)["reconstruction L1"] == 0
    assert "50 training images" in train and numbers(train)["reconstruction L1"] == pytest.approx(127.5 / 50, rel=0.01)

    sheet = evaluate.show_worst(generator, of, rows, errors)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "127.5", "levels", "folder/11.png"] and lines[2].split()[1:3] == ["0.0", "levels"]
    np.testing.assert_array_equal(sheet[22:54, :32], real[11])                   # under its label
    assert abs(int(sheet[60, 10, 0]) - 127) <= 1                                 # its reconstruction, below

    sheet = evaluate.show_near_duplicates(of, rows, mu)
    names = capsys.readouterr().out.splitlines()[1].split()[4:]
    assert set(names) == {"folder/20.png", "folder/33.png"}
    np.testing.assert_array_equal(sheet[22:54, :32], real[of.paths.index(names[0])])


# ------------------------------------------------------------------------------------- main

class StandIn:
    """Features that need no weights: mean and deviation of each channel in a 2 x 2 raster."""

    name = "a stand-in, 24 features"

    def __call__(self, images):
        cells = images.float().unflatten(3, (2, -1)).unflatten(2, (2, -1))
        return torch.cat([cells.mean((3, 5)).flatten(1), cells.std((3, 5)).flatten(1)], dim=1)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(extractors, "find_extractor", lambda device: StandIn())


def folder(path, count, level=128, seed=0):
    """Writes images of noise around a grey level to a new folder."""
    path.mkdir()
    g = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(g.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with real/, 21 images of which two are equal, and runs/real, a run of two steps on them."""
    root = tmp_path_factory.mktemp("trained")
    real = folder(root / "real", 20)
    shutil.copy(real / "3.png", real / "20.png")
    assert training.main(["--data", str(real), "--runs-dir", str(root / "runs"), "--steps", "2", *SMALL]) == 0
    return root


def test_two_folders_alike_are_nearer_than_two_that_are_not(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real, alike = folder(tmp_path / "real", 40, 100), folder(tmp_path / "alike", 40, 100, 1)
    darker = folder(tmp_path / "darker", 40, 60, 2)
    found = {}
    for other in (alike, darker):
        assert evaluate.main([str(other), "--data", str(real), "--image-size", "32"]) == 0
        found[other.name] = numbers(capsys.readouterr().out)
        assert len(found[other.name]) == 9
    assert found["darker"]["Frechet distance"] > 100 * found["alike"]["Frechet distance"]
    assert found["darker"]["KID x 1000"] > 1 > abs(found["alike"]["KID x 1000"] / found["darker"]["KID x 1000"])
    assert (found["darker"]["precision"], found["darker"]["recall"]) == (0, 0)
    assert min(found["alike"]["precision"], found["alike"]["recall"]) > 0.4
    assert found["alike"]["diversity"] == pytest.approx(1, abs=0.1)


def test_a_copied_folder_is_reported_as_copies_and_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extractors, "find_extractor", lambda device: None)
    real = folder(tmp_path / "real", 20)
    assert evaluate.main([str(real), "--data", str(real), "--image-size", "32", "--out", "sheets"]) == 0
    out = capsys.readouterr().out
    assert "no Frechet distance: no weights" in out
    assert numbers(out) == {"diversity": 1, "sliced Wasserstein": 0, "copies, 1%": 1, "copies, 5%": 1,
                            "nearest image": 0}
    assert [file.name for file in (tmp_path / "sheets").iterdir()] == ["copies.png"]


def test_a_run_gets_its_sheets_a_list_of_existing_files_and_scores_that_depend_on_the_seed(
        trained, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(trained)
    outputs = []
    for extra in ([], [], ["--seed", "1"]):
        assert evaluate.main(["runs/real", "--data", "real", "--count", "16", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    out = outputs[0]
    assert out == outputs[1] != outputs[2] and len(numbers(out)) == 10
    assert "16 images against 16 real images, 32 px" in out and "21 training images" in out
    sheets = {"copies.png", "worst_reconstructed.png", "near_duplicates.png"}
    assert {file.name for file in Path("runs/real/evaluation").iterdir()} == sheets
    worst, duplicates = out.split("near-duplicates")
    names = [line.split()[3] for line in worst.splitlines() if " levels  " in line]
    assert len(names) == 18 and all(Path("real", name).is_file() for name in names)
    _, *row, one, other = duplicates.splitlines()[1].split()
    assert row == ["0.00", "0.0", "levels"] and {one, other} == {"3.png", "20.png"}


def test_without_near_duplicates_the_sheet_of_an_earlier_evaluation_goes(trained, tmp_path, monkeypatch, stand_in):
    monkeypatch.chdir(tmp_path)
    different = folder(tmp_path / "different", 20, seed=1)
    file = next((trained / "runs/real/checkpoints").glob("*.pt"))
    for name in ("near_duplicates.png", "other.png"):
        (tmp_path / name).write_bytes(b"earlier")
    assert evaluate.main([str(file), "--data", str(different), "--count", "16", "--out", str(tmp_path)]) == 0
    assert {f.name for f in tmp_path.glob("*.png")} == {"copies.png", "worst_reconstructed.png", "other.png"}
    assert not (file.parent / "evaluation").exists()


@pytest.mark.parametrize("argv, word", [
    (["nowhere", "--data", "DIR"], "nowhere"),
    (["DIR", "--data", "nowhere"], "nowhere"),
    (["DIR", "--data", "DIR", "--count", "3"], "--count"),
    (["DIR", "--data", "DIR", "--seed", "-1"], "--seed"),
    (["DIR", "--data", "DIR", "--image-size", "33"], "--image-size"),
    (["DIR", "--data", "DIR", "--extractor", "raft_small"], "raft_small: no such file and no image classifier"),
    (["DIR", "--data", "DIR", "--extractor", "nowhere.pt"], "nowhere.pt: no such file"),
    (["DIR", "--data", "DIR", "--image-size", "32", "--out", "real/0.png"], "real/0.png"),
    (["FEW", "--data", "DIR", "--image-size", "32", "--out", "new"], "few"),
    (["DIR", "--data", "FEW", "--image-size", "32", "--out", "new"], "few"),
])
def test_bad_input_is_one_line_and_status_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {"DIR": str(folder(tmp_path / "real", 4)), "FEW": str(folder(tmp_path / "few", 3))}
    assert evaluate.main([folders.get(a, a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error and not (tmp_path / "new").exists()


def test_the_cache_is_in_the_working_directory_and_not_in_runs_dir(tmp_path, image_folder, monkeypatch, capsys):
    c, _ = command_line.parse_constants([*SMALL, "--runs-dir", "/proc/of/another/machine"])
    generator, _ = model_definitions.build(c)
    checkpoints.save_as(tmp_path / "run.pt", {"constants": vars(c), "counters": {}, "ema": generator.state_dict()})
    images, argv = image_folder(70), [str(tmp_path / "run.pt"), "--extractor", "none", "--count", "70"]
    monkeypatch.chdir(tmp_path)
    for flags, folder in (([], "runs/.cache"), (["--cache", "mine"], "mine")):
        assert evaluate.main([*argv, "--data", images, *flags]) == 0
        assert len(list((tmp_path / folder).glob("photos-*"))) == 1
    shutil.rmtree("runs")
    Path("runs").write_text("a file in the way")                     # stands for a directory that is not writable
    assert evaluate.main([*argv, "--data", images]) == 0
    assert Path("runs").is_file() and "warning" not in capsys.readouterr().out
