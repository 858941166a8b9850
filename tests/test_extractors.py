"""extractors.py: torchvision's classifiers and TorchScript files, on weights that the tests write themselves."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import extractors
from command_line import InputError

CPU = torch.device("cpu")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The empty folder in which torch.hub keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def images(count=3, side=40, channels=3):
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def save_random_weights(hub, network, weights):
    """With the names of layers that the published files have."""
    state = {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", key): value
             for key, value in network.state_dict().items()}
    torch.save(state, hub / Path(weights.url).name)


def as_trained(pixels, weights):
    """The preset's own normalisation on pictures of the preset's size, without its cut."""
    preset = weights.transforms()
    small = torchvision.transforms.functional.resize(pixels.float() / 255, preset.crop_size, antialias=True)
    return torchvision.transforms.functional.normalize(small, preset.mean, preset.std)


@pytest.mark.parametrize("name, layer", [("squeezenet1_1", "classifier.1"), ("shufflenet_v2_x0_5", "fc"),
                                         ("densenet121", "classifier")])
def test_features_are_what_goes_into_the_last_layer(hub, name, layer):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    network = torchvision.models.get_model(name).eval()
    save_random_weights(hub, network, weights)
    extractor = extractors.choose(name, CPU, side=40)
    found = extractor(images())
    seen = []
    network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(as_trained(images(), weights))
    expected = seen[0] if seen[0].ndim == 2 else seen[0].relu().mean((2, 3))    # squeezenet: a convolution is last
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.std() > 0 and f"{name} with {weights.name} weights, {found.shape[1]} features" in extractor.name
    assert "224 px bilinear" in extractor.name and "FID" not in extractor.name


def test_a_network_of_another_colour_scale_gets_it(hub):
    """torchvision's own way to make a network of these weights is the reference: it sets transform_input itself."""
    weights = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    save_random_weights(hub, torchvision.models.googlenet(init_weights=False), weights)
    network = torchvision.models.googlenet(weights=weights).eval()
    network.fc = nn.Identity()
    with torch.no_grad():
        expected = network(as_trained(images(2), weights))
    torch.testing.assert_close(extractors.choose("googlenet", CPU, 40)(images(2)), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_are_not_at_hand_are_named_with_their_place(hub):
    with pytest.raises(InputError, match=r"resnet50-\w+\.pth") as caught:
        extractors.choose("resnet50", CPU, 32)
    assert str(hub) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_weights_are_named(hub):
    file = hub / Path(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url).name
    file.write_bytes(b"none")
    with pytest.raises(InputError, match=file.name):
        extractors.choose("squeezenet1_1", CPU, 32)
    torch.save({"other": torch.ones(1)}, file)
    with pytest.raises(InputError, match=file.name):
        extractors.choose("squeezenet1_1", CPU, 32)


class Means(nn.Module):
    """The mean of each channel: the closed form that the tests compare with."""
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.mean((2, 3))


class Flat(nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.mean((1, 2, 3))


class NotFinite(nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.mean((2, 3)) / 0


class WholeNumbers(nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.mean((2, 3)).long()


class Several(nn.Module):
    def forward(self, picture: torch.Tensor) -> list[torch.Tensor]:
        return [picture.mean((2, 3))]


class WrongSize(nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.flatten(1) @ torch.ones(7, 2)


class Raises(nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        assert picture.shape[2] == 299, "pictures of 299 px, please"
        return picture


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_torchscript_file_gets_floats_from_0_to_1(tmp_path, channels):
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    extractor = extractors.choose(str(tmp_path / "means.pt"), CPU, side=40)
    pixels = images(extractors.CPU_BATCH + 1, channels=channels)
    expected = pixels.double().mean((2, 3)).expand(-1, 3).float() / 255
    torch.testing.assert_close(extractor(pixels), expected)
    assert extractor.name == "means.pt, 3 features, pictures at their own size"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("network, words", [(Flat, "float32 (3,)"), (NotFinite, "not finite"), (Several, "list"),
                                            (WholeNumbers, "int64 (3, 3)"), (WrongSize, "(3, 3, 40, 40)"),
                                            (Raises, "299 px, please")])
def test_a_torchscript_file_that_is_no_extractor_is_refused_in_one_line(tmp_path, network, words):
    file = tmp_path / "net.pt"
    torch.jit.script(network()).save(file)
    with pytest.raises(InputError) as caught:
        extractors.choose(str(file), CPU, side=40)
    line = str(caught.value)
    assert words in line and str(file) in line and "\n" not in line and len(line) < 500


@pytest.mark.parametrize("content, words", [(None, "no such file"), (b"", "TorchScript"), (b"no zip", "TorchScript")])
def test_a_file_that_is_no_torchscript_is_refused_in_one_line(tmp_path, content, words):
    file = tmp_path / "net.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        extractors.choose(str(file), CPU, side=40)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_no_torchscript(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="no readable TorchScript"):
        extractors.choose(str(tmp_path / "weights.pt"), CPU, side=40)


def test_none_is_none():
    assert extractors.choose("none", CPU, 32) is None
