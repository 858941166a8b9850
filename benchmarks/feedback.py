"""Is a feedback video stable, and does it flicker? Four videos of one walk, with a run's own head and a random one.

    python benchmarks/feedback.py runs/NAME                       # 1,040 frames each: minutes
    python benchmarks/feedback.py runs/NAME --seed 1

walk: each frame with its synthetic copies; feedback: with the pictures before it (generate.py --mode feedback);
frozen: with the copies of the first frame throughout; fixed: the walk with one alpha everywhere, the mean of the
first frame's, so without what the layer adds. Compared are 40 frames around frame 50 and around frame 1,000:
alpha's mean and bounds, the change from frame to frame, and the flicker, a frame against the mean of its neighbours
(both in grey levels of 255). A loop that feeds on itself would show at frame 1,000 what was not there at 50.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoints
import command_line
import data
import generate
import latent_space
import model_definitions
from errors import InputError

PLACES, REACH = (50, 1000), 20          # frames in the middle, and frames on each side of them
FRAMES_A_KEYFRAME = 27                  # as in generate.py's default video: 160 frames over 6 keyframes
RANDOM_STD = 0.5                        # of the random head's weights: alpha then spreads over most of its range


@torch.inference_mode()
def walk(generator, z):
    """What generate.feedback yields, with synthetic copies in the window."""
    for point in z:
        yield generator.image_and_alpha(point[None].to(generate.device_of(generator)))


@torch.inference_mode()
def fixed(generator, z):
    """The walk with the mean of the first frame's alpha throughout."""
    alpha = None
    for point in z:
        x = generator.vae.decode(point[None].to(generate.device_of(generator)))
        if alpha is None:
            alpha = generator.layer.alpha(x)
            alpha = alpha.mean().expand_as(alpha)
        yield generator.layer.apply_alpha(x, alpha), alpha


def measure(images):
    """For each of PLACES: (alpha mean, min, max, change, flicker)."""
    found, motion, alphas = [], None, []
    for number, (image, alpha) in enumerate(images):
        place = next((p for p in PLACES if p - REACH <= number < p + REACH), None)
        if place is None:
            continue
        if number == place - REACH:
            motion, alphas = generate.Motion(), []
        list(motion.watch(data.to_arrays(image), loop=False))
        alphas.append(alpha)
        if number == place + REACH - 1:
            alpha = torch.cat(alphas)
            found.append((alpha.mean().item(), alpha.min().item(), alpha.max().item(), np.mean(motion.changes),
                          np.mean(motion.flicker)))
    return found


def start(argv):
    parser = command_line.Parser("feedback.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint or weights file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of walk and random head [%(default)s]")
    arguments = parser.parse_args(argv)
    device = command_line.choose_device("auto")
    _, saved = checkpoints.find(arguments.run, device)
    generator, c = model_definitions.from_checkpoint(saved, device)
    frames = PLACES[-1] + REACH
    keyframes = latent_space.draw_z(arguments.seed, 0, frames // FRAMES_A_KEYFRAME + 1, c.LATENT_DIM)
    z = latent_space.walk(keyframes, frames, loop=False)
    print("| head | window | frame | alpha (range) | change | flicker |\n| --- | --- | --- | --- | --- | --- |")
    for head in ("trained", "random"):
        if head == "random":
            random, weight = torch.Generator().manual_seed(arguments.seed), generator.layer.to_s.weight
            weight.copy_(RANDOM_STD * torch.randn(weight.shape, generator=random))
        for window, images in (("walk", walk(generator, z)), ("feedback", generate.feedback(generator, z)),
                               ("frozen", generate.feedback(generator, z, frozen=True)),
                               ("fixed", fixed(generator, z))):
            for place, (mean, low, high, change, flicker) in zip(PLACES, measure(images)):
                print(f"| {head} | {window} | {place:,} | {mean:.2f} ({low:.2f} to {high:.2f}) | {change:.2f} | "
                      f"{flicker:.2f} |", flush=True)
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"feedback.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("feedback.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
