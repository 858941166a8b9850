"""How well a model trained on clips predicts the frames that follow: on the moving demo set, in pixels too.

    python benchmarks/motion.py runs/demo_clips                        # a few minutes; needs stage 2 to have begun
    python benchmarks/motion.py runs/demo_clips --strip motion.png     # and shows continued clips and videos from noise

All is measured on 64 clips that are drawn for it with another seed. The few that a run holds out say too little: for 9
of the 64, p8 divided by that of a copy varies from 0.25 to 0.51. From windows of these clips, codes are predicted for
16 frames. r1, r4, r8: mean absolute error of the rendered prediction, against the rendered code of the real frame,
divided by that of a copy of the last known frame. p1 to p16: distance in pixels between the owl's position in the
rendered prediction and its real one. A small network reads the position; it is trained here on real and on
reconstructed training frames, and its own error is printed.

copy: the last known frame. constant velocity: mu goes on as between the last two frames. linear map: of the 9 newest
codes of a window, fitted to the training clips by least squares. frozen window: the Transformer reads copies of its
newest code, so that nothing shows the motion.

Then 32 videos from noise are compared with the same clips. speed: of the owl from frame to frame, in pixels, at the
5%, 50% and 95% quantile, as the network reads it. hops: landings per 64 frames. contrast, length: of frames and of z,
at frame 63 and 599, divided by those of frame 0. drift: how far the mean colour of frame 31 is from that of frame 0,
values from -1 to 1.
"""

import functools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tables  # noqa: F401 (the project's root on sys.path)
import torch
from torch import Tensor, nn

import command_line
import data
import demo_images
import dynamics
import pictures
import rollouts
import run_log
import training
from command_line import InputError, positive
from model_definitions import Generator, Window, load_generator
from rollouts import rendered
from training_step import read_images

AHEAD, MEASURED = (1, 4, 8, 16), (1, 4, 8)
CLIPS, STARTS = 64, 3
NEW_SEED = 1000                                       # of the clips that are drawn here
VIDEOS, FRAMES, LONG_FRAMES = 32, 64, 600             # from noise
LINEAR_CODES, RIDGE = 9, 4e-4                         # newest codes of a window that the linear map reads
BATCH = 64
TURN = 2.0                                            # pixels that the owl must rise after a landing
RATE = 2e-3                                           # of Adam, for the network that reads positions


class Position(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> x, y of the owl in image coordinates, -1..1: (B, 2)."""

    def __init__(self, image_size: int, channels: int):
        super().__init__()
        axis = torch.linspace(-1, 1, image_size)
        self.place = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]
        layers, width, side = [], channels + 2, image_size
        for next_width in (16, 32, 64, 64):
            layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), nn.ReLU()]
            width, side = next_width, -(-side // 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side ** 2, 64), nn.ReLU(),
                                    nn.Linear(64, 2))

    def forward(self, image):
        return self.layers(torch.cat([image, self.place.expand(len(image), -1, -1, -1)], dim=1))


def positions(image_set: data.ImageSet, root: Path) -> Tensor:
    """Returns x and y of the owl in all frames, (N, 2). Raises InputError if this is not the moving demo set."""
    try:
        states = np.load(root / demo_images.STATES)
        clips = [int(name.removeprefix("clip_")) for name in image_set.clip_names]
        found = np.concatenate([np.stack([states["x"][clip], states["y"][clip]], axis=1) for clip in clips])
    except (OSError, ValueError, KeyError):
        found = ()
    if len(found) != len(image_set.images):
        raise InputError(f"{root}: not a complete moving demo set: must be one of demo_images.py, with --clip-stride 1")
    return torch.from_numpy(found).float()


def train_reader(generator: Generator, image_set: data.ImageSet, target: Tensor, steps: int) -> Position:
    """Returns a network that reads positions, trained on real training frames and on their reconstructions."""
    torch.manual_seed(0)
    c = generator.layer
    reader = Position(c.image_size, c.channels)
    optimizer = torch.optim.Adam(reader.parameters(), lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * max(0.02, 1 - step / steps)
        rows = image_set.train[torch.randint(len(image_set.train), (BATCH,)).numpy()]
        image = read_images(image_set, rows, torch.device("cpu"))
        if step % 2:
            with torch.no_grad():
                image = rendered(generator, generator.vae.encode(image)[0])
        loss = (reader(image) - target[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.requires_grad_(False)


def linear_map(image_set: data.ImageSet, mu: Tensor, window: Tensor, count: int) -> Tensor:
    """Returns the next `count` codes after windows (B, P, LATENT_DIM), (B, count, LATENT_DIM), from a linear map of
    codes, fitted to the training clips by ridge regression."""
    past = min(LINEAR_CODES, window.shape[1])

    def known(codes):                                 # (B, past, LATENT_DIM), newest first
        return torch.cat([codes[:, :1], codes[:, :-1] - codes[:, 1:]], dim=1).flatten(1)

    offsets = image_set.clip_offsets
    rows = torch.cat([torch.arange(offsets[clip] + past, offsets[clip + 1]) for clip in image_set.train_clips])
    inputs = known(mu[rows[:, None] - torch.arange(1, past + 1)])
    square = inputs.T @ inputs + RIDGE * len(rows) * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(square, inputs.T @ (mu[rows] - mu[rows - 1]))
    codes, found = window[:, :past], []
    for _ in range(count):
        found.append(codes[:, 0] + known(codes) @ weights)
        codes = torch.cat([found[-1][:, None], codes[:, :-1]], dim=1)
    return torch.stack(found, dim=1)


@torch.no_grad()
def measure(generator: Generator, c, image_set: data.ImageSet, mu: Tensor, new: data.ImageSet,
            codes: tuple[Tensor, Tensor], target: Tensor, reader: Position) -> dict[str, dict]:
    """Returns {predictor: {"r1": ratio, ..., "p1": pixels, ...}} on the clips of `new`, whose codes and positions are
    given. mu: of the frames of image_set, which the model was trained on."""
    window, first = rollouts.windows(c, new, codes, CLIPS, STARTS, max(AHEAD))
    frames = torch.arange(1, max(AHEAD) + 1)[None, :, None]
    newest, step = window.codes[:, 0, None], window.codes[:, 0, None] - window.codes[:, 1, None]
    predicted = {"copy": newest.expand(-1, max(AHEAD), -1), "constant velocity": newest + frames * step,
                 "linear map": linear_map(image_set, mu, window.codes, max(AHEAD)),
                 "Transformer": dynamics.unrolled(generator, window, max(AHEAD)),
                 "Transformer, frozen window": dynamics.unrolled(generator, window, max(AHEAD), frozen=True)}
    half, found = c.IMAGE_SIZE / 2, {name: {} for name in predicted}
    for ahead in AHEAD:
        rows = torch.from_numpy(first + ahead - 1)
        real = rendered(generator, codes[0][rows])
        made = {name: rendered(generator, z[:, ahead - 1]) for name, z in predicted.items()}
        for name, image in made.items():
            if ahead in MEASURED:
                found[name][f"r{ahead}"] = ((image - real).abs().mean() / (made["copy"] - real).abs().mean()).item()
            found[name][f"p{ahead}"] = half * (reader(image) - target[rows]).norm(dim=1).mean().item()
    rows = torch.from_numpy(first)
    for name, image in (("reader, real frames", read_images(new, first, torch.device("cpu"))),
                        ("reader, reconstructions", rendered(generator, codes[0][rows]))):
        found[name] = {"p1": half * (reader(image) - target[rows]).norm(dim=1).mean().item()}
    return found


def watch(frames: Iterable[Tensor], reader: Position) -> dict[str, Tensor]:
    """Returns rollouts.course of videos, and "speed": of the owl, pixels per frame, (T - 1, B), and "hops": landings
    per 64 frames, (1, B)."""
    places = []

    def watched():
        for frame in frames:
            places.append(reader(frame) * frame.shape[3] / 2)
            yield frame

    values = rollouts.course(watched())
    places = torch.stack(places)                      # (T, B, 2)
    hops = torch.tensor([[64 / len(places) * landings(y.tolist()) for y in places[:, :, 1].unbind(1)]])
    return values | {"speed": places.diff(dim=0).norm(dim=2), "hops": hops}


def landings(heights: Sequence[float]) -> int:
    """Returns how often y, which points down, grows by TURN and then falls by TURN."""
    count, falling, extreme = 0, False, heights[0]
    for y in heights:
        extreme = max(extreme, y) if falling else min(extreme, y)
        if falling and y < extreme - TURN:
            count, falling, extreme = count + 1, False, y
        elif not falling and y > extreme + TURN:
            falling, extreme = True, y
    return count


@torch.no_grad()
def measure_videos(generator: Generator, c, image_set: data.ImageSet, reader: Position) -> dict[str, list[str]]:
    """Returns the cells of each row of the table of videos."""
    clips = rollouts.shown_clips(image_set)[:CLIPS]
    begin, length = image_set.clip_offsets[clips], np.diff(image_set.clip_offsets)[clips].min()
    real = watch((read_images(image_set, begin + t, torch.device("cpu")) for t in range(length)), reader)
    window = rollouts.from_noise(generator, c, VIDEOS, torch.device("cpu"))
    made = rollouts.made_course(generator, window, FRAMES, functools.partial(watch, reader=reader))
    long = rollouts.made_course(generator, Window(*(tensor[:4] for tensor in window)), LONG_FRAMES)

    def kept(values, name):
        return f"{(values[name][-1].mean() / values[name][0].mean()).item():.2f}"

    def row(values, *more):
        speeds = values["speed"].flatten().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        drift = rollouts.drift_of(values, min(rollouts.DRIFT_AT, len(values["drift"]) - 1))
        return [" / ".join(f"{speed:.2f}" for speed in speeds), f"{values['hops'].mean().item():.2f}",
                kept(values, "contrast"), f"{drift:.4f}", *more]

    return {"real clips": row(real, "", "", ""),
            "videos from noise": row(made, kept(made, "length"), kept(long, "contrast"), kept(long, "length"))}


def new_clips(c, folder: Path) -> tuple[data.ImageSet, Tensor]:
    """Draws CLIPS clips and returns them, all of one split, and the positions of the owl in all frames, (N, 2)."""
    root = demo_images.make_clips(folder / "clips", CLIPS, size=c.IMAGE_SIZE, seed=NEW_SEED)
    new = data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, folder, c.BACKGROUND, held_out_share=0, folders="clips")
    return new, positions(new, root)


def report(generator: Generator, c, image_set: data.ImageSet, new: tuple[data.ImageSet, Tensor], reader: Position,
           strip: str | None) -> None:
    """Prints both tables, and writes the picture."""
    new, target = new
    names = [*(f"r{ahead}" for ahead in MEASURED), *(f"p{ahead}" for ahead in AHEAD)]
    print(f"| {' | '.join(['', *names])} |\n|{' --- |' * (1 + len(names))}")
    mu, codes = (dynamics.encode_frames(generator.vae, images, torch.device("cpu")) for images in (image_set, new))
    for name, values in measure(generator, c, image_set, mu[0], new, codes, target, reader).items():
        print(f"| {' | '.join([name, *(f'{values[key]:.3g}' if key in values else '' for key in names)])} |")
    names = ["speed", "hops", f"contrast {FRAMES - 1}", f"drift {rollouts.DRIFT_AT}", f"length {FRAMES - 1}",
             f"contrast {LONG_FRAMES - 1}", f"length {LONG_FRAMES - 1}"]
    print(f"\n| {' | '.join(['', *names])} |\n|{' --- |' * (1 + len(names))}")
    for name, cells in measure_videos(generator, c, new, reader).items():
        print(f"| {' | '.join([name, *cells])} |")
    if strip:
        pictures.save_picture(strip, run_log.strips(rollouts.videos(generator, c, new, codes)))


def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("motion.py", __doc__)
    parser.add_argument("run", help="a run on the moving demo set: its folder or a checkpoint")
    parser.add_argument("--steps", type=positive(int), default=3000,
                        help="training steps of the network that reads positions [%(default)s]")
    parser.add_argument("--strip", metavar="FILE", help="a picture: every 2nd frame of 4 new clips, the "
                        "continuation below each, and 4 videos from noise")
    flags = parser.parse_args(argv)
    generator, c, _ = load_generator(flags.run)
    if c.FOLDERS != "clips":
        raise InputError(f"{flags.run}: trained on still images: must be a run with --folders clips")
    root = Path(c.DATA or training.demo_folder(c))
    image_set = data.load_images_of_run(root, c, data.cache_elsewhere(None))
    target = positions(image_set, root)
    reader = train_reader(generator, image_set, target, flags.steps)
    with tempfile.TemporaryDirectory() as folder:
        report(generator, c, image_set, new_clips(c, Path(folder)), reader, flags.strip)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command_line.run_script("motion.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
