"""What alpha does in a trained model: what changes without it, and what it follows. No training.

    python benchmarks/alpha.py runs/NAME                  # change in grey levels, correlations: a minute
    python benchmarks/alpha.py runs/NAME --data DIR       # Frechet distances too

Interventions: alpha is replaced by its mean over the image, its mean over all images, another image's alpha, or
ALPHA_INIT, while the decoder's output stays the same. Prints the change of an image (mean absolute difference, levels
of 255); the change after matching contrast and brightness with a linear fit per image, because another constant alpha
is only another contrast; and the Frechet distance.

Correlations of log alpha, within each image, with edges (Sobel), local contrast (standard deviation of grey in 7 x 7
pixels) and, if the checkpoint contains the critic, the norm of the critic's gradient: for the same image, and for
another one. The difference tells alpha that follows the content from alpha that follows positions.
"""

import sys
from collections.abc import Sequence

import tables  # noqa: F401 (the project's root on sys.path)
import torch
import torch.nn.functional as F
from torch import Tensor

import command_line
import data
import evaluate
import extractors
import latent_space
import metrics
import model_definitions
from command_line import InputError
from model_definitions import Discriminator, Generator

BATCH = 32
WINDOW = 7                      # side of the window for local contrast, pixels


def interventions(alpha: Tensor, alpha_init: float) -> dict[str, Tensor]:
    """Returns {name: replacement of alpha (N, ., H, W)}."""
    return {"its own": alpha, "its mean": alpha.mean((2, 3), keepdim=True).expand_as(alpha),
            "the mean of all": alpha.mean().expand_as(alpha), "another's": alpha.roll(1, 0),
            "ALPHA_INIT": torch.full_like(alpha, alpha_init)}


def matched(image: Tensor, target: Tensor) -> Tensor:
    """Returns a * image + b, with a and b of each image (N, C, H, W) fitted to target by least squares."""
    x, y = image.flatten(1), target.flatten(1)
    x0, y0 = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (x0 * y0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True).clamp_min(1e-12)
    return (slope * x0 + y.mean(1, keepdim=True)).view_as(image)


def edges(image: Tensor) -> Tensor:
    """image (N, C, H, W) -> norm of the grey level's gradient by Sobel's kernels, (N, H, W)."""
    grey = F.pad(image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    return F.conv2d(grey, torch.stack([across, across.T])[:, None]).norm(dim=1)


def local_contrast(image: Tensor) -> Tensor:
    """image (N, C, H, W) -> standard deviation of the grey level in WINDOW x WINDOW pixels, (N, H, W)."""
    grey = F.pad(image.mean(1, keepdim=True), [WINDOW // 2] * 4, mode="replicate")
    mean, square = (F.avg_pool2d(values, WINDOW, 1) for values in (grey, grey.square()))
    return (square - mean.square()).clamp_min(0).sqrt()[:, 0]


def critic_gradient(critic: Discriminator, image: Tensor) -> Tensor:
    """image (N, C, H, W) -> norm of the gradient of its score at each pixel, (N, H, W)."""
    return torch.func.grad(lambda batch: critic(batch).sum())(image).norm(dim=1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Pearson's coefficient over the pixels of each image, (N, H, W) twice -> (N,); NaN if one is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@torch.inference_mode()
def decode(generator: Generator, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and alpha of all z (N, LATENT_DIM), on the CPU."""
    parts = []
    for part in z.to(generator.layer.positions.device).split(BATCH):
        x = generator.vae.decode(generator.start(part))
        parts.append((x.cpu(), generator.layer.alpha(x).cpu()))
    return tuple(torch.cat(found) for found in zip(*parts))


# ------------------------------------------------------------------------------------- tables

def print_interventions(images: dict[str, Tensor], extractor, real: Tensor | None) -> None:
    """Compares each intervention's images (N, C, H, W) with the model's own; real: features of real images."""
    print("\n| alpha | change, levels | contrast matched | Frechet distance |\n| --- | --- | --- | --- |")
    own = images["its own"]
    for name, image in images.items():
        change, rest = (127.5 * (other - own).abs().mean().item() for other in (image, matched(image, own)))
        distance = f"{metrics.frechet_distance(extractor(data.to_uint8(image)), real):.2f}" if extractor else ""
        print(f"| {name} | {change:.3f} | {rest:.3f} | {distance} |", flush=True)


def print_correlations(image: Tensor, alpha: Tensor, critic: Discriminator | None) -> None:
    """Correlates log alpha (N, ., H, W) with what can be seen in the image (N, C, H, W) and with the critic."""
    found = {"edges": edges(image), "local contrast": local_contrast(image)}
    if critic is not None:
        found["the critic's gradient"] = torch.cat([critic_gradient(critic, part) for part in image.split(BATCH)])
    print("\n| log alpha with | own image's | another's |\n| --- | --- | --- |")
    log_alpha = alpha.log().mean(1)
    for name, values in found.items():
        own, another = (correlation(log_alpha, other).nanmean() for other in (values, values.roll(1, 0)))
        print(f"| {name} | {own:.2f} | {another:.2f} |")


def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("alpha.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint or weights file")
    parser.add_argument("--data", metavar="DIR", help="real images, for Frechet distances")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="images [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the images [%(default)s]")
    flags = parser.parse_args(argv)
    if flags.count < evaluate.LEAST:
        raise InputError(f"--count {flags.count} is invalid: must be {evaluate.LEAST} or more")
    device = command_line.choose_device("auto")
    generator, c, saved = model_definitions.load_generator(flags.run, device)
    extractor, real, critic = None, None, None
    if flags.data:
        extractor = extractors.need_extractor(device)
        image_set = data.load_images_of_run(flags.data, c, data.cache_elsewhere(None))
        real = extractor(evaluate.sample_images(image_set, flags.count))
    if "critic" in saved:
        _, critic = model_definitions.build(c)
        critic.load_state_dict(saved["critic"])
    x, alpha = decode(generator, latent_space.draw_z(flags.seed, 0, flags.count, c.LATENT_DIM))
    images = {name: generator.layer.apply_alpha(x, other) for name, other in interventions(alpha, c.ALPHA_INIT).items()}
    print(f"{flags.count:,} images; alpha: mean {alpha.mean():.2f}, {alpha.min():.2f} to {alpha.max():.2f}; spread "
          f"within an image {alpha.std((2, 3)).mean():.3f}, of the images' means {alpha.mean((1, 2, 3)).std():.3f}")
    print_interventions(images, extractor, real)
    print_correlations(images["its own"], alpha, critic)


if __name__ == "__main__":
    sys.exit(command_line.run_script("alpha.py", start, None))
