"""Pictures and videos from a trained run.

    python generate.py runs/NAME --images 64 --seed 1 --out DIR     # DIR/00000.png ... and DIR/grid.png
    python generate.py runs/NAME --video walk.gif --seconds 8       # a looping walk through latent space; .gif or .webp

One seed is one picture: picture i of seed S is always the same, at any batch size.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoints
import command_line
import data
import latent_space
import model_definitions
import pictures
from checkpoints import CheckpointError
from command_line import InputError

GRID_LIMIT = 256        # pictures on grid.png at most; the single files hold them all


@torch.inference_mode()
def render(generator, z, batch_size=16):
    """z (N, LATENT_DIM) -> uint8 arrays (H, W, C), one after the other, a batch at a time."""
    device = next(generator.parameters()).device
    for part in z.split(batch_size):
        yield from data.to_uint8(generator(part.to(device))).permute(0, 2, 3, 1).cpu().numpy()


def write_images(generator, constants, arguments):
    """arguments.images single files and a grid, in arguments.out."""
    out = Path(arguments.out)
    z = latent_space.draw_z(arguments.seed, 0, arguments.images, constants.LATENT_DIM)
    shown = []
    rendered = tqdm(render(generator, z), total=len(z), unit="image", disable=not sys.stderr.isatty())
    for i, picture in enumerate(rendered):
        pictures.save_png(out / f"{i:05d}.png", picture)
        if i < GRID_LIMIT:
            shown.append(picture)
    pictures.save_png(out / "grid.png", pictures.grid(shown))
    print(f"{len(z)} pictures and {out / 'grid.png'}")


def write_walk(generator, constants, arguments):
    """A looping walk through arguments.keyframes points as an animation, arguments.video."""
    keyframes = latent_space.draw_z(arguments.seed, 0, arguments.keyframes, constants.LATENT_DIM)
    z = latent_space.walk(keyframes, max(2, round(arguments.seconds * arguments.fps)))
    frames = tqdm(render(generator, z), total=len(z), unit="frame", disable=not sys.stderr.isatty())
    pictures.save_animation(Path(arguments.video), (pictures.grid(frame[None]) for frame in frames), arguments.fps)
    print(f"{len(z)} frames in {arguments.video}")


def positive(kind):
    """An argparse type: a `kind` above 0."""
    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} can't be: give a number above 0")
        return value
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def parse(argv):
    parser = command_line.Parser("generate.py", __doc__)
    parser.add_argument("run", help="a run's folder, or a single checkpoint file")
    parser.add_argument("--images", type=positive(int), metavar="N", help="how many pictures to write")
    parser.add_argument("--out", metavar="DIR", help="folder for the pictures [RUN/generated]")
    parser.add_argument("--video", metavar="FILE", help="file for a walk through latent space, .gif or .webp")
    parser.add_argument("--seconds", type=positive(float), default=8.0, metavar="X",
                        help="length of the video [%(default)s]")
    parser.add_argument("--fps", type=positive(float), default=20.0, metavar="X",
                        help="frames a second [%(default)s]")
    parser.add_argument("--keyframes", type=positive(int), default=6, metavar="N",
                        help="points that the walk passes through [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="one seed is one set of pictures [%(default)s]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} can't be: give 0 or more")
    if arguments.video and Path(arguments.video).suffix.lower() not in pictures.SUFFIXES:
        endings = " or ".join(pictures.SUFFIXES)
        raise InputError(f"--video {arguments.video} can't be: give a name that ends with {endings}")
    if not 1 <= arguments.fps <= pictures.FPS_LIMIT:
        raise InputError(f"--fps {arguments.fps:g} can't be: give 1 to {pictures.FPS_LIMIT}")
    if not arguments.images and not arguments.video:
        raise InputError("nothing to do: give --images N, --video FILE, or both")
    run = Path(arguments.run)
    arguments.out = arguments.out or (run if run.is_dir() else run.parent) / "generated"
    return arguments


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        arguments = parse(argv)
        device = command_line.choose_device(arguments.device)
        _, saved = checkpoints.find(arguments.run, device, warn=lambda line: print(line, file=sys.stderr))
        generator, constants = model_definitions.from_checkpoint(saved, device)
        for folder in [Path(arguments.out)] * bool(arguments.images) + [Path(arguments.video or ".").parent]:
            folder.mkdir(parents=True, exist_ok=True)
        if arguments.images:
            write_images(generator, constants, arguments)
        if arguments.video:
            write_walk(generator, constants, arguments)
    except (InputError, CheckpointError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("generate.py: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"generate.py: {error.filename or arguments.out}: can't be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
