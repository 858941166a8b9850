"""Stability and flicker of feedback videos: four videos of one walk, with a run's own head and with a random one.

    python benchmarks/feedback.py runs/NAME                       # 1,040 frames each: minutes
    python benchmarks/feedback.py runs/NAME --seed 1

The videos differ in what the Transformer reads. walk: modified copies of each frame; feedback: the frames before
(generate.py --mode feedback); frozen: copies of the first frame throughout; fixed: nothing, alpha is the mean of the
first frame's alpha everywhere. Compares 40 frames around frame 50 with 40 around frame 1,000: alpha's mean and range,
the change from frame to frame and the flicker (grey levels of 255, see generate.Motion). If feedback accumulated
errors, they would appear at frame 1,000 and not at frame 50.
"""

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tables  # noqa: F401 (the project's root on sys.path)
import torch
from torch import Tensor

import command_line
import data
import generate
import latent_space
import model_definitions
from model_definitions import Generator

PLACES, REACH = (50, 1000), 20          # frames in the middle, and frames on each side of them
FRAMES_PER_KEYFRAME = 27                # as in generate.py's default video: 160 frames, 6 keyframes
RANDOM_STD = 0.5                        # of the random head's weights: alpha then covers most of its range


def fixed(generator: Generator, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As Generator.feedback, with the mean of the first frame's alpha for every pixel of every frame."""
    mean = generator.image_and_alpha(z[:1])[1].mean()
    for point in z:
        yield generator.layer.apply_alpha(generator.vae.decode(point[None]), mean), mean.expand(1)


@torch.inference_mode()
def measure(frames: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, Tensor, generate.Motion]]:
    """Yields, for each of PLACES, the place, all values of alpha and the motion of the frames around it."""
    for number, (image, alpha) in enumerate(frames):
        place = next((p for p in PLACES if p - REACH <= number < p + REACH), None)
        if place is None:
            continue
        if number == place - REACH:
            motion, alphas = generate.Motion(), []
        list(motion.watch(data.to_arrays(image), loop=False))
        alphas.append(alpha.flatten())
        if number == place + REACH - 1:
            yield place, torch.cat(alphas), motion


def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("feedback.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint or weights file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of walk and random head [%(default)s]")
    flags = parser.parse_args(argv)
    device = command_line.choose_device("auto")
    generator, c, _ = model_definitions.load_generator(flags.run, device)
    count = PLACES[-1] + REACH
    keyframes = latent_space.draw_z(flags.seed, 0, count // FRAMES_PER_KEYFRAME + 1, c.LATENT_DIM)
    z = latent_space.walk(keyframes, count, loop=False).to(device)
    print("| head | window | frame | alpha (range) | change | flicker |\n| --- | --- | --- | --- | --- | --- |")
    for head in ("trained", "random"):
        if head == "random":
            rng, weight = torch.Generator().manual_seed(flags.seed), generator.layer.to_s.weight
            weight.copy_(RANDOM_STD * torch.randn(weight.shape, generator=rng))
        videos = {"walk": map(generator.image_and_alpha, z[:, None]), "feedback": generator.feedback(z),
                  "frozen": generator.feedback(z, frozen=True), "fixed": fixed(generator, z)}
        for name, frames in videos.items():
            for place, alpha, motion in measure(frames):
                print(f"| {head} | {name} | {place:,} | {alpha.mean():.2f} ({alpha.min():.2f} to {alpha.max():.2f}) | "
                      f"{np.mean(motion.changes):.2f} | {np.mean(motion.flicker):.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run_script("feedback.py", start, None))
