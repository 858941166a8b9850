"""What alpha does in a trained model: what changes without it, and what it follows. No training.

    python benchmarks/alpha.py runs/NAME                             # change in grey levels, correlations: a minute
    python benchmarks/alpha.py runs/NAME --data DIR --sheet alpha.png       # Frechet distances too, and a picture

Interventions: in the same pictures from the decoder, alpha is replaced by its mean over the picture, by the mean over
all pictures, by another picture's alpha, and by ALPHA_INIT. Printed are the change of a picture (mean absolute
difference, levels of 255), its change once contrast and brightness are matched (a straight line fitted to each
picture), since another alpha everywhere is only another contrast, and the Frechet distance.

Correlations of log alpha, within each picture, with edges (Sobel), local contrast (standard deviation of grey in
7 x 7 pixels) and, from a checkpoint that holds the critic, the size of the critic's gradient there: with the picture's
own, and with another picture's, which tells alpha that follows the content from alpha that knows where things mostly
are. Bad input: status 2.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoints
import command_line
import data
import evaluate
import extractors
import latent_space
import metrics
import model_definitions
import pictures
from errors import InputError

BATCH = 32
SHOWN = 8                       # pictures on the sheet
WINDOW = 7                      # side of the square for local contrast, pixels


def interventions(alpha, alpha_init):
    """{name: an alpha in the place of alpha (N, ., H, W)}."""
    return {"its own": alpha, "its mean": alpha.mean((2, 3), keepdim=True).expand_as(alpha),
            "the mean of all": alpha.mean().expand_as(alpha), "another's": alpha.roll(1, 0),
            "ALPHA_INIT": torch.full_like(alpha, alpha_init)}


def matched(image, target):
    """image (N, C, H, W), of each the straight line a * image + b that comes nearest to target."""
    x, y = image.flatten(1), target.flatten(1)
    x0, y0 = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (x0 * y0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True).clamp_min(1e-12)
    return (slope * x0 + y.mean(1, keepdim=True)).view_as(image)


def edges(image):
    """image (N, C, H, W) -> size of the grey level's gradient (N, H, W), by Sobel's kernels."""
    grey = F.pad(image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    return F.conv2d(grey, torch.stack([across, across.T])[:, None]).square().sum(1).sqrt()


def local_contrast(image):
    """image (N, C, H, W) -> standard deviation of the grey level in WINDOW x WINDOW pixels, (N, H, W)."""
    grey = F.pad(image.mean(1, keepdim=True), [WINDOW // 2] * 4, mode="replicate")
    mean, square = (F.avg_pool2d(values, WINDOW, 1) for values in (grey, grey.square()))
    return (square - mean.square()).clamp_min(0).sqrt()[:, 0]


def critic_gradient(critic, image):
    """image (N, C, H, W) -> size of the gradient of its score at each pixel, (N, H, W)."""
    gradient = torch.func.grad(lambda batch: critic(batch).sum())(image)
    return gradient.square().sum(1).sqrt()


def correlation(a, b):
    """(N, H, W) twice -> Pearson's coefficient over the pixels of each, (N,); NaN where one is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@torch.inference_mode()
def decode(generator, z):
    """x and alpha of all z, on the CPU."""
    parts = []
    for part in z.split(BATCH):
        x = generator.vae.decode(part.to(next(generator.parameters()).device))
        parts.append((x.cpu(), generator.layer.alpha(x).cpu()))
    return tuple(torch.cat(found) for found in zip(*parts))


def start(argv):
    parser = command_line.Parser("alpha.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint or weights file")
    parser.add_argument("--data", metavar="DIR", help="real images, for Frechet distances")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="pictures [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pictures [%(default)s]")
    parser.add_argument("--sheet", metavar="FILE", help="PNG of some pictures with each alpha")
    arguments = parser.parse_args(argv)
    if arguments.count < evaluate.LEAST:
        raise InputError(f"--count {arguments.count} can't be: give {evaluate.LEAST} or more")
    device = command_line.choose_device("auto")
    _, saved = checkpoints.find(arguments.run, device)
    generator, c = model_definitions.from_checkpoint(saved, device)
    extractor = extractors.need_extractor(device) if arguments.data else None
    x, alpha = decode(generator, latent_space.draw_z(arguments.seed, 0, arguments.count, c.LATENT_DIM))
    images = {name: generator.layer.apply_alpha(x, other)
              for name, other in interventions(alpha, c.ALPHA_INIT).items()}
    own = images["its own"]
    print(f"{arguments.count:,} pictures; alpha {alpha.mean():.2f} on average, {alpha.min():.2f} to {alpha.max():.2f}; "
          f"spread within a picture {alpha.std((2, 3)).mean():.3f}, of pictures' means "
          f"{alpha.mean((1, 2, 3)).std():.3f}")

    real = extractor(evaluate.some(data.load_images_of_run(arguments.data, c), arguments.count)) if extractor else None
    print("\n| alpha | change, levels | contrast matched | Frechet distance |\n| --- | --- | --- | --- |")
    for name, image in images.items():
        change, rest = (127.5 * (other - own).abs().mean().item() for other in (image, matched(image, own)))
        distance = f"{metrics.frechet_distance(extractor(data.to_uint8(image)), real):.2f}" if extractor else ""
        print(f"| {name} | {change:.3f} | {rest:.3f} | {distance} |", flush=True)

    found = {"edges": edges(own), "local contrast": local_contrast(own)}
    if "critic" in saved:
        _, critic = model_definitions.build(c)
        critic.load_state_dict(saved["critic"])
        found["the critic's gradient"] = torch.cat([critic_gradient(critic, part) for part in own.split(BATCH)])
    print("\n| log alpha with | own picture's | another's |\n| --- | --- | --- |")
    log_alpha = alpha.log().mean(1)
    for name, values in found.items():
        own_one, another = (correlation(log_alpha, other).nanmean() for other in (values, values.roll(1, 0)))
        print(f"| {name} | {own_one:.2f} | {another:.2f} |")
    if arguments.sheet:
        write_sheet(arguments.sheet, images, alpha)
    return 0


def write_sheet(file, images, alpha):
    """The first pictures with each alpha, a row each, and their alpha on a scale of its own range."""
    rows = [pictures.grid(data.to_arrays(image[:SHOWN]), columns=SHOWN) for image in images.values()]
    shown = alpha[:SHOWN].mean(1).numpy()
    low, high = float(shown.min()), float(shown.max())
    rows.append(pictures.heat_maps(shown, low, high, columns=SHOWN, log=True))
    with evaluate.one_line(file):
        pictures.save_picture(file, pictures.stack(rows, [*images, f"alpha, {low:.3g} to {high:.3g}"]))


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"alpha.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alpha.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
