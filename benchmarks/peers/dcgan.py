"""The DCGAN of PyTorch's examples, as a yardstick for quality.py: the same settings, written anew.

    python benchmarks/peers/dcgan.py --data ./images --minutes 5 20 --count 2048 --out images

Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks":
64 px, z of 100, batch 64, Adam at 2e-4 with betas 0.5 and 0.999, binary cross-entropy, BatchNorm, weights from
N(0, 0.02). Reads images through data.py. Generates in batches of 64 with the statistics of the batch, as the example
does. At each of the --minutes it writes images as uint8 (N, 3, 64, 64) to OUT/MINUTES.npy, while the clock stops, and
prints a JSON object: minutes, steps, images_seen.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import command_line
import data
from command_line import positive

IMAGE_SIZE, BATCH, LATENT, WIDTH = 64, 64, 100, 64
LEARNING_RATE, BETAS = 2e-4, (0.5, 0.999)


def generator() -> nn.Sequential:
    """z (B, 100, 1, 1) -> image (B, 3, 64, 64) in [-1, 1]."""
    layers, channels = [], LATENT
    for out, stride, padding in ((8 * WIDTH, 1, 0), (4 * WIDTH, 2, 1), (2 * WIDTH, 2, 1), (WIDTH, 2, 1)):
        layers += [nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out),
                   nn.ReLU(inplace=True)]
        channels = out
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Sequential:
    """image (B, 3, 64, 64) -> logit that it is real, (B, 1, 1, 1)."""
    layers, channels = [nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)], WIDTH
    for out in (2 * WIDTH, 4 * WIDTH, 8 * WIDTH):
        layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2, inplace=True)]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 0, bias=False))


def initialise(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def train(image_set: data.ImageSet, minutes: Sequence[float], seed: int,
          device: torch.device) -> Iterator[tuple[float, nn.Module, int]]:
    """Trains for the longest of `minutes`. Yields each of them, the generator and the number of steps."""
    torch.manual_seed(seed)
    g, d = (net().apply(initialise).to(device) for net in (generator, discriminator))
    g_optimizer, d_optimizer = (torch.optim.Adam(net.parameters(), LEARNING_RATE, BETAS) for net in (g, d))
    loss, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(BATCH, device=device), torch.zeros(BATCH, device=device)
    step, seconds, times = 0, 0.0, sorted(minutes)
    while times:
        start = time.monotonic()
        indices = image_set.train[data.batch_indices(len(image_set.train), seed, step * BATCH, BATCH)]
        real = data.to_image(data.read_batch(image_set, indices).to(device))
        fake = g(torch.randn(BATCH, LATENT, 1, 1, device=device))

        d.zero_grad()
        (loss(d(real).flatten(), ones) + loss(d(fake.detach()).flatten(), zeros)).backward()
        d_optimizer.step()

        g.zero_grad()
        loss(d(fake).flatten(), ones).backward()
        g_optimizer.step()
        step, seconds = step + 1, seconds + time.monotonic() - start
        while times and seconds >= 60 * times[0]:
            yield times.pop(0), g, step


@torch.no_grad()
def generate(g: nn.Module, count: int, device: torch.device) -> torch.Tensor:
    """Returns images, uint8 (count, 3, 64, 64)."""
    batches = [data.to_uint8(g(torch.randn(BATCH, LATENT, 1, 1, device=device))).cpu()
               for _ in range(-(-count // BATCH))]
    return torch.cat(batches)[:count]


def start(argv) -> None:
    parser = command_line.Parser("dcgan.py", __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--minutes", type=positive(float), nargs="+", default=[20.0], metavar="X", help="[20]")
    parser.add_argument("--count", type=positive(int), default=2048, metavar="N", help="images to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("dcgan"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="its .cache holds the decoded images")
    arguments = parser.parse_args(argv)
    device = command_line.choose_device("auto")
    image_set = data.load_images(arguments.data, IMAGE_SIZE, 3, Path(arguments.runs_dir) / ".cache",
                                 leave_out=arguments.runs_dir)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for minutes, g, steps in train(image_set, arguments.minutes, arguments.seed, device):
        np.save(arguments.out / f"{minutes:g}.npy", generate(g, arguments.count, device).numpy())
        print(json.dumps({"minutes": minutes, "steps": steps, "images_seen": steps * BATCH}), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run_script("dcgan.py", start, None))
