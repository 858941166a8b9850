"""The DCGAN that PyTorch's examples train, as a yardstick: the same settings, in our own writing.

    python benchmarks/peers/dcgan.py --data ./images --minutes 20 --count 2048 --out pictures.npy

Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks":
64 px, z of 100, batch 64, Adam at 2e-4 with betas 0.5 and 0.999, binary cross-entropy, BatchNorm, weights from
N(0, 0.02). Images come through data.py, as this project's own; the pictures are drawn in batches of 64 with the
statistics of their batch, as the example draws its samples. Writes them as uint8 (N, 3, 64, 64), and the
generator's weights beside them. The last line it prints is a JSON object: steps, images seen, seconds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data

IMAGE_SIZE, BATCH, LATENT, WIDTH = 64, 64, 100, 64
LEARNING_RATE, BETAS = 2e-4, (0.5, 0.999)


def generator():
    """z (B, 100, 1, 1) -> image (B, 3, 64, 64) in [-1, 1]."""
    layers, channels = [], LATENT
    for out, stride, padding in ((8 * WIDTH, 1, 0), (4 * WIDTH, 2, 1), (2 * WIDTH, 2, 1), (WIDTH, 2, 1)):
        layers += [nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out),
                   nn.ReLU(inplace=True)]
        channels = out
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator():
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


def train(image_set, minutes, seed, device):
    """The trained generator, the steps made and the seconds they took."""
    torch.manual_seed(seed)
    nets = [net().apply(initialise).to(device) for net in (generator, discriminator)]
    fake_maker, judge = nets
    optimizers = [torch.optim.Adam(net.parameters(), LEARNING_RATE, BETAS) for net in nets]
    loss, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(BATCH, device=device), torch.zeros(BATCH, device=device)
    step, start = 0, time.monotonic()
    while (seconds := time.monotonic() - start) < 60 * minutes:
        indices = image_set.train[data.batch_indices(len(image_set.train), seed, step * BATCH, BATCH)]
        real = data.to_image(data.read_batch(image_set, indices).to(device))
        fake = fake_maker(torch.randn(BATCH, LATENT, 1, 1, device=device))

        judge.zero_grad()
        (loss(judge(real).flatten(), ones) + loss(judge(fake.detach()).flatten(), zeros)).backward()
        optimizers[1].step()

        fake_maker.zero_grad()
        loss(judge(fake).flatten(), ones).backward()
        optimizers[0].step()
        step += 1
    return fake_maker, step, seconds


@torch.no_grad()
def draw(fake_maker, count, device):
    """uint8 (count, 3, 64, 64)."""
    batches = [data.to_uint8(fake_maker(torch.randn(BATCH, LATENT, 1, 1, device=device))).cpu()
               for _ in range(-(-count // BATCH))]
    return torch.cat(batches)[:count]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="X")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="pictures to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", default="dcgan.npy", metavar="FILE")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="its .cache holds the decoded images")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        image_set = data.load_images(arguments.data, IMAGE_SIZE, 3, Path(arguments.runs_dir) / ".cache",
                                     leave_out=arguments.runs_dir)
    except data.DataError as error:
        print(f"dcgan.py: {error}", file=sys.stderr)
        return 2
    fake_maker, steps, seconds = train(image_set, arguments.minutes, arguments.seed, device)
    np.save(arguments.out, draw(fake_maker, arguments.count, device).numpy())
    torch.save(fake_maker.state_dict(), Path(arguments.out).with_suffix(".pt"))
    print(json.dumps({"steps": steps, "images_seen": steps * BATCH, "seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
