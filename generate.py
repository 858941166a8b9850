"""Images and videos from a trained model, and photos through it.

    python generate.py RUN --images 64 --seed 1 --out DIR       # DIR/seed1_00000.png ... and seed1_grid.png
    python generate.py RUN --seeds 1-10,42                      # the first image of each of these seeds
    python generate.py RUN --video walk.mp4 --seconds 8         # a looping walk; or .webp, .gif, a new folder
    python generate.py RUN --video v.mp4 --mode roll --grid 4x4 # of a model of clips: videos that start from noise
    python generate.py RUN --images 64 --class cats dogs        # of a model with classes: of these, in turn
    python generate.py RUN --reconstruct PHOTO ...              # photos through encoder and decoder

RUN is a run's folder, or a single checkpoint or weights file. Image i of a seed is always the same, whatever the number
of images. Also: --interpolate, --direction (between the images of two folders), --directions (principal axes) and
--alpha-maps. One command may combine several of these.

--mode of a video:
    walk        a path through --keyframes random points
    keyframes   a path through --photos, each encoded
    roll        a model of clips: what follows, frame by frame, from noise, from --photos, or from the end of a --clip
    synthetic   the synthetic video of training, left as the decoder made it, right through the layer
    progress    the images of one z at each sample of the training, from RUN/samples
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import argparse
import collections
import concurrent.futures
import itertools
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import command_line
import data
import latent_space
import pictures
import random_keys
from command_line import InputError, positive
from model_definitions import Generator, Window, learned_motion, load_generator

BATCH = 16                                        # images per pass through the generator
CODES = 256                                       # codes per pass through the prior
SEEDS_LIMIT = 100_000                             # of a range of --seeds
CLASSES_NAMED = 4                                 # in the name of a sheet at most
GRID_LIMIT = 256                                  # images on a sheet at most
WAITING_LIMIT = 64                                # images that wait to be written at most
STRENGTHS = (-2, -1, -0.5, 0, 0.5, 1, 2)          # along a principal axis, in standard deviations of encoded images
EDITS = (-1, -0.5, 0, 0.5, 1, 1.5)                # along a direction between folders: 1 leads from A's mean to B's
INTERPOLATED = 9                                  # images from one photo to the other, both included
MODES = ("walk", "keyframes", "roll", "synthetic", "progress")


# ------------------------------------------------------------------------------------- rendering

def on_device(generator: Generator, z: Tensor) -> Tensor:
    """Returns z on the generator's device."""
    return z.to(generator.layer.positions.device)


@torch.inference_mode()
def render(generator: Generator, codes: Tensor) -> Iterator[np.ndarray]:
    """Yields the image of each code (N, LATENT_DIM), uint8 (H, W, C)."""
    for part in codes.split(BATCH):
        yield from data.to_arrays(generator.render(on_device(generator, part)))


class Motion:
    """Measures how a video moves, in grey levels of 255: `changes` holds the mean absolute difference of each two
    neighbouring frames, `flicker` that of each frame and the mean of its two neighbours."""

    def __init__(self):
        self.changes, self.flicker = [], []
        self._newest = collections.deque(maxlen=3)

    def watch(self, frames: Iterable[np.ndarray], loop: bool) -> Iterator[np.ndarray]:
        """Yields the frames (H, W, C) and measures them; with loop also from the last frame to the first."""
        first = []
        for frame in frames:
            first += [frame] * (len(first) < 2)
            self._add(frame)
            yield frame
        if loop and len(self.changes) > 1:
            for frame in first:
                self._add(frame)
            self.changes.pop()                    # from the first to the second frame is counted already

    def _add(self, frame):
        newest = self._newest
        newest.append(frame.astype(np.float32))
        if len(newest) > 1:
            self.changes.append(float(np.abs(newest[-1] - newest[-2]).mean()))
        if len(newest) == 3:
            self.flicker.append(float(np.abs(newest[1] - (newest[0] + newest[2]) / 2).mean()))

    def line(self) -> str:
        """Returns the measured values as one line of text."""
        if not self.changes:
            return "one frame, no motion"
        text = (f"change from frame to frame, levels of 255: mean {np.mean(self.changes):.2f}, spread "
                f"{np.std(self.changes):.2f}, largest {max(self.changes):.2f} (change {np.argmax(self.changes) + 1})")
        if self.flicker:
            text += f"; a frame against the mean of its neighbours: {np.mean(self.flicker):.2f}"
        return text


def bar(iterable: Iterable, total: int, unit: str) -> Iterable:
    """Wraps an iterable in a progress bar, which only a terminal shows."""
    return tqdm(iterable, total=total, unit=unit, delay=1, disable=not sys.stderr.isatty())


@torch.inference_mode()
def codes_of(generator: Generator, flags: Namespace, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns the codes of noise z (N, LATENT_DIM), times --truncation, and labels (N, K), on the CPU."""
    z = flags.truncation * z
    parts = zip(z.split(CODES), labels.split(CODES)) if labels is not None else ((part,) for part in z.split(CODES))
    return torch.cat([generator.start(*(on_device(generator, tensor) for tensor in part)).cpu() for part in parts])


def draw_codes(generator: Generator, flags: Namespace, count: int) -> Tensor:
    """Returns the codes of images 0, 1, ... of --seed, (count, LATENT_DIM) on the CPU."""
    return codes_of(generator, flags, latent_space.draw_z(flags.seed, 0, count, generator.vae.latent_dim),
                    labels_of(flags, count))


def labels_of(flags: Namespace, count: int) -> Tensor | None:
    """Returns the labels (count, K) of images of the classes of --class, in turn; None for any class."""
    return flags.labels[torch.arange(count) % len(flags.labels)] if flags.classes else None


# ------------------------------------------------------------------------------------- images and photos

def read_photos(paths: Sequence[str], c: SimpleNamespace) -> tuple[list[str], list[np.ndarray]]:
    """Returns the names and the uint8 arrays (H, W, C) of photos, and of all photos in folders, decoded as in training.

    Raises InputError for a photo that cannot be read.
    """
    files = []
    for path in map(Path, paths):
        files += sorted(path / name for name in data.find_files(path)[0]) if path.is_dir() else [path]
    photos = [data.read_photo(str(f), *data.settings_of(c)) for f in bar(files, len(files), "file")]
    return [f.name for f in files], photos


# Each of the following functions makes one kind of output and returns the name and the pixels of its sheet.

def make_images(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--images N, or the first image of each of --seeds: single files and a grid. Threads compress and write the files
    while the model computes the next."""
    shown, waiting, started = [], collections.deque(), time.monotonic()
    if flags.seeds:
        names, sheet = [f"seed{seed}_{0:05d}" for seed in flags.seeds], "seeds_grid"
        z = torch.cat([latent_space.draw_z(seed, 0, 1, generator.vae.latent_dim) for seed in flags.seeds])
        codes = codes_of(generator, flags, z, labels_of(flags, len(z)))
    else:
        names, sheet = [f"seed{flags.seed}_{i:05d}" for i in range(flags.images)], f"seed{flags.seed}_grid"
        codes = draw_codes(generator, flags, flags.images)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for i, image in enumerate(bar(render(generator, codes), len(codes), "image")):
            name = names[i] + (f"_{flags.classes[i % len(flags.classes)]}" if flags.classes else "")
            file = flags.out / f"{name}.{flags.format}"
            waiting.append(pool.submit(pictures.save_picture, file, image))
            if len(waiting) > WAITING_LIMIT:
                waiting.popleft().result()
            if i < GRID_LIMIT:
                shown.append(image)
        for saved in waiting:
            saved.result()
    print(f"{len(codes)} images, {len(codes) / (time.monotonic() - started):.1f} per second")
    return "_".join([sheet, *dict.fromkeys(flags.classes[:CLASSES_NAMED])]), pictures.grid(shown)


def reconstruct(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--reconstruct PHOTO ...: each reconstruction in a file, and a sheet of photos above reconstructions."""
    names, photos = read_photos(flags.reconstruct, c)
    z = latent_space.encode(generator.vae, photos)
    made = list(bar(render(generator, z), len(z), "photo"))
    for i, (name, image) in enumerate(zip(names, made)):
        pictures.save_picture(flags.out / f"reconstructed_{i:03d}_{Path(name).stem}.{flags.format}", image)
    error = np.abs(np.stack(made).astype(int) - np.stack(photos)).mean()
    print(f"photos: {len(made)}, mean error {error:.1f} of 255 levels")
    columns, shown = min(len(made), 8), min(len(made), GRID_LIMIT)
    parts = [pictures.grid(part[i:i + columns], columns) for i in range(0, shown, columns) for part in (photos, made)]
    return "reconstructed", pictures.stack(parts, ["photos", "reconstructed"] * (len(parts) // 2))


def interpolate(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--interpolate A B: a path between two encoded photos, with the photos themselves at both ends."""
    _, photos = read_photos(flags.interpolate, c)
    if len(photos) != 2:
        raise InputError(f"--interpolate got {len(photos)} photos: must be two")
    a, b = latent_space.encode(generator.vae, photos)
    z = torch.stack([latent_space.spherical(a, b, t) for t in torch.linspace(0, 1, INTERPOLATED)])
    images = list(render(generator, z))
    sheet = pictures.beside(*(pictures.grid(part, columns=len(part)) for part in (photos[:1], images, photos[1:])))
    return "interpolation", pictures.stack([sheet], ["photo, from one to the other, photo"])


def strengths_sheet(generator: Generator, start: Tensor, directions: Tensor, strengths: Sequence[float],
                    names: Sequence[str]) -> np.ndarray:
    """Returns N rows of images of start + strength * direction, one column per strength. start and directions: (N, D);
    names: one above each N / len(names) rows."""
    z = start[:, None] + torch.tensor(strengths)[:, None] * directions[:, None]              # (N, strengths, D)
    images = np.stack(list(render(generator, z.flatten(0, 1))))
    grids = [pictures.grid(part, columns=len(strengths)) for part in np.split(images, len(names))]
    text = ", ".join(f"{strength:+g}" if strength else "0" for strength in strengths)
    return pictures.stack(grids, [f"{name} at strength {text}" for name in names])


def edit(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--direction A B: the direction from the mean of A's encoded images to that of B's, added at several strengths to
    the codes of --photos, which stand at the left, or to random z."""
    cache = data.cache_elsewhere(flags.cache)
    a, b = (latent_space.encode_sample(generator.vae, data.load_images_of_run(folder, c, cache)).mean(0)
            for folder in flags.direction)
    direction = b - a
    if direction.norm() < 1e-6:
        raise InputError("--direction: the encoded images of the two folders have the same mean: must differ")
    _, photos = read_photos(flags.photos, c)
    start = (latent_space.encode(generator.vae, photos) if photos
             else draw_codes(generator, flags, 6))
    sheet = strengths_sheet(generator, start, direction[None], EDITS, ["B - A"])
    if photos:
        sheet = pictures.beside(pictures.stack([pictures.grid(photos, columns=1)], ["photo"]), sheet)
    print(f"the direction has length {direction.norm():.2f}; the mean of B is {b.norm():.2f} from the origin")
    return "direction", sheet


def show_axes(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--directions K: the K principal axes of encoded training images, one row each, through one random z."""
    axes = flags.axes
    if axes is None:
        if not c.DATA or not Path(c.DATA).is_dir():
            raise InputError(f"{flags.run}: contains no principal axes, which training.py writes when it ends, and "
                             f"its images ({c.DATA or 'the demo set'}) are missing")
        axes = latent_space.principal_axes(latent_space.encode_sample(
            generator.vae, data.load_images_of_run(c.DATA, c, data.cache_elsewhere(flags.cache))))
    count = flags.directions
    if count > len(axes["axes"]):
        raise InputError(f"--directions {count} is invalid: must be at most {len(axes['axes'])}, this run's axes")
    axes = {name: tensor.cpu() for name, tensor in axes.items()}
    start = draw_codes(generator, flags, 1)[0]
    directions, variance = axes["axes"][:count], axes["deviations"].square()
    centres = torch.stack([start - ((start - axes["mean"]) @ axis) * axis for axis in directions])    # 0 on their axis
    print(f"the first {count} axes explain {variance[:count].sum() / variance.sum():.0%} of the variance of encoded "
          "images")
    return "directions", strengths_sheet(generator, centres, axes["deviations"][:count, None] * directions, STRENGTHS,
                                         [f"axis {i + 1}" for i in range(count)])


@torch.inference_mode()
def map_alpha(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[str, np.ndarray]:
    """--alpha-maps N: images, and beside them their alpha, on a log scale from the smallest to the largest value."""
    z = on_device(generator, draw_codes(generator, flags, flags.alpha_maps))
    image, alpha = (torch.cat(parts) for parts in zip(*map(generator.image_and_alpha, z.split(BATCH))))
    alpha = alpha.mean(1).cpu().numpy()
    low, high = float(alpha.min()), float(alpha.max())
    print(f"alpha: mean {alpha.mean():.2f}, {low:.2f} to {high:.2f}, spread within an image "
          f"{alpha.std(axis=(1, 2)).mean():.2f}")
    sheet = pictures.beside(pictures.grid(data.to_arrays(image)), pictures.heat_maps(alpha, low, high, log=True))
    return f"seed{flags.seed}_alpha_maps", pictures.stack([sheet], ["pictures, and their alpha on a log scale"])


# ------------------------------------------------------------------------------------- videos

def make_video(generator: Generator, c: SimpleNamespace, flags: Namespace) -> None:
    """--video FILE: writes the video and prints how it moves."""
    fps, loop = flags.fps, flags.loop
    if flags.mode in ("progress", "synthetic"):
        frames, count = progress_frames(flags.run) if flags.mode == "progress" else synthetic_frames(generator, flags)
        fps, loop = min(fps, max(1, count / flags.seconds)), False           # a fixed number of frames over --seconds
    elif flags.mode == "roll":
        (frames, count), loop = rolled_frames(generator, c, flags), False
    else:
        frames, count = path_frames(generator, c, flags)
    motion = Motion()
    pictures.save_video(flags.video, motion.watch(bar(frames, count, "frame"), loop), fps, flags.loop)
    print(motion.line())


# Each of the following functions returns frames, uint8 (H, W, 3), computed when they are asked for, and their number.

def path_frames(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[Iterator[np.ndarray], int]:
    """--mode walk, keyframes: a path in latent space."""
    count = max(2, round(flags.seconds * flags.fps))
    if flags.mode == "keyframes":
        _, photos = read_photos(flags.photos, c)
        if len(photos) < 2:
            raise InputError(f"--mode keyframes got {len(photos)} photo: must be two or more")
        codes = latent_space.walk(latent_space.encode(generator.vae, photos), count, flags.loop)
    else:                                 # the way leads through noise, so that every frame is an image from noise
        keyframes = latent_space.draw_z(flags.seed, 0, flags.keyframes, generator.vae.latent_dim)
        labels = labels_of(flags, flags.keyframes)
        codes = codes_of(generator, flags, latent_space.walk(keyframes, count, flags.loop),
                         labels if labels is None else latent_space.walk(labels, count, flags.loop, straight=True))
    return (pictures.grid([image]) for image in render(generator, codes)), count


def rolled_frames(generator: Generator, c: SimpleNamespace, flags: Namespace) -> tuple[Iterator[np.ndarray], int]:
    """--mode roll: a grid of videos, each with a motion code of its own."""
    if not flags.learned_motion:
        why = "has not learned motion yet, it is in stage 1" if c.FOLDERS == "clips" else "was trained on still images"
        raise InputError(f"{flags.run} {why}: must be a run of training.py --folders clips, from stage 2 on")
    columns, rows = flags.grid
    cells, past = columns * rows, c.NUM_FRAMES - 1
    v = torch.stack([torch.randn(c.MOTION_DIM, generator=random_keys.torch_generator(flags.motion_seed, "motion", i))
                     for i in range(cells)])
    if flags.clip:
        codes = latent_space.encode(generator.vae, data.read_clip(flags.clip, c, past)).flip(0)       # newest first
        codes = torch.cat([codes, codes[-1:].expand(past - len(codes), -1)]).expand(cells, -1, -1)
        window = Window(codes, v, codes[:, -1])
    else:
        if flags.photos:
            codes = latent_space.encode(generator.vae, read_photos(flags.photos, c)[1])
            if len(codes) > cells:
                raise InputError(f"--photos gives {len(codes)} starts for {cells} videos: must fit into --grid")
            codes = codes[torch.arange(cells) % len(codes)]
        else:
            codes = draw_codes(generator, flags, cells)
        window = Window.still(codes, v, past)
    count = max(2, round(flags.seconds * flags.fps))
    return itertools.islice(roll(generator, window, columns), count), count


@torch.inference_mode()
def roll(generator: Generator, window: Window, columns: int) -> Iterator[np.ndarray]:
    """Yields the frames after the windows as grids, without end."""
    for image, _ in generator.roll(Window(*(on_device(generator, tensor) for tensor in window))):
        yield pictures.grid(data.to_arrays(image), columns)


@torch.inference_mode()
def synthetic_frames(generator: Generator, flags: Namespace) -> tuple[Iterator[np.ndarray], int]:
    """--mode synthetic: training's synthetic video of four images. Left the modified output of the decoder, right the
    same through the layer."""
    layer = generator.layer
    x = generator.vae.decode(on_device(generator, draw_codes(generator, flags, 4)))
    changes = layer.video.draw(latent_space.rng_of_image(flags.seed, 0)).to(x)
    frames = layer.video(x, changes).clamp(0, 1).chunk(layer.video.num_frames, dim=1)

    def sheet(frame):
        return pictures.beside(*(
            pictures.stack([pictures.grid(data.to_arrays(image))], [label])
            for image, label in ((frame * 2 - 1, "from the decoder"), (layer(frame), "through the layer"))))
    return map(sheet, frames), len(frames)


def progress_frames(run: str) -> tuple[Iterator[np.ndarray], int]:
    """--mode progress: the sheets of generated images that training wrote, oldest first, each below its step."""
    folder = Path(run) / "samples"
    files = sorted(folder.glob("step_*_generated.png"))
    if len(files) < 2:
        raise InputError(f"{run}: --mode progress needs two or more samples of a run, and found {len(files)} in "
                         f"{folder}")

    def sheet(file):
        with Image.open(file) as image:
            return pictures.stack([np.array(image.convert("RGB"))], [f"step {int(file.name.split('_')[1]):,}"])
    return map(sheet, files), len(files)


# ------------------------------------------------------------------------------------- command line

SHEETS = {"images": make_images, "seeds": make_images, "reconstruct": reconstruct, "interpolate": interpolate,
          "direction": edit, "directions": show_axes, "alpha_maps": map_alpha}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser("generate.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a single checkpoint or weights file")
    what = parser.add_argument_group("what to make")
    what.add_argument("--images", type=positive(int), metavar="N", help="images of random z")
    what.add_argument("--seeds", type=seed_list, metavar="1-10,42", help="the first image of each of these seeds")
    what.add_argument("--video", type=Path, metavar="FILE", help=".mp4, .webp, .gif, or the name of a new folder")
    what.add_argument("--reconstruct", nargs="+", metavar="PHOTO", help="photos through encoder and decoder")
    what.add_argument("--interpolate", nargs=2, metavar="PHOTO", help="from one photo to another")
    what.add_argument("--direction", nargs=2, metavar="DIR", help="what distinguishes the second folder from the first")
    what.add_argument("--directions", type=positive(int), metavar="K", help="the K principal axes of latent space")
    what.add_argument("--alpha-maps", type=positive(int), metavar="N", help="maps of alpha beside their images")
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, metavar="DIR",
                     help="folder for everything but videos [RUN/generated; for a single file, ./generated]")
    how.add_argument("--format", choices=("png", "webp"), default="png", help="of images [%(default)s]")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of all random z [%(default)s]")
    how.add_argument("--truncation", type=positive(float), default=1.0, metavar="X",
                     help="factor of all random z: below 1, images are more typical and less diverse [%(default)s]")
    how.add_argument("--class", dest="classes", nargs="+", default=[], metavar="NAME",
                     help="classes of the random images, in turn; a walk goes from one to the next")
    how.add_argument("--mode", choices=MODES, default="walk", help="of the video [%(default)s]")
    how.add_argument("--seconds", type=positive(float), default=8.0, metavar="X", help="of the video [%(default)s]")
    how.add_argument("--fps", type=positive(float), default=20.0, metavar="X", help="frames per second [%(default)s]")
    how.add_argument("--loop", action=argparse.BooleanOptionalAction, default=True,
                     help="GIF and WebP play again and again; a walk and keyframes end where they began")
    how.add_argument("--keyframes", type=positive(int), default=6, metavar="N",
                     help="for --mode walk: random points that it passes through [%(default)s]")
    how.add_argument("--photos", nargs="+", default=[], metavar="PHOTO",
                     help="for --mode keyframes and --direction; for --mode roll, the first frames")
    how.add_argument("--clip", metavar="CLIP", help="for --mode roll: a folder of frames or a video, to be continued")
    how.add_argument("--motion-seed", type=int, metavar="N", help="for --mode roll: of the motion codes [--seed]")
    how.add_argument("--grid", type=grid_size, default=(1, 1), metavar="4x3",
                     help="for --mode roll: columns and rows of videos [1x1]")
    how.add_argument("--cache", metavar="DIR",
                     help="folder for decoded images [runs/.cache, else a temporary one]")
    how.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    return parser


def grid_size(text: str) -> tuple[int, int]:
    """"4x3" -> (4, 3)."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is invalid: must be columns x rows, such as 4x3, each 1 to 99")
    return int(match[1]), int(match[2])


def seed_list(text: str) -> list[int]:
    """"1-3,42" -> [1, 2, 3, 42]."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + SEEDS_LIMIT:
            raise argparse.ArgumentTypeError(f"{text} is invalid: must be seeds or ranges of at most {SEEDS_LIMIT:,}, "
                                             "such as 1-10,42")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def parse(argv: Sequence[str] | None) -> Namespace:
    """Returns the flags. Raises InputError for flags that do not fit, before anything is rendered."""
    flags = make_parser().parse_args(argv)
    if flags.seed < 0:
        raise InputError(f"--seed {flags.seed} is invalid: must be 0 or more")
    outputs = (*SHEETS, "video")
    if not any(getattr(flags, name) for name in outputs):
        raise InputError("nothing to do: must have one of " + ", ".join(map(command_line.flag, outputs)))
    if flags.video:
        pictures.check_video(flags.video, flags.fps)
        if flags.mode == "keyframes" and not flags.photos:
            raise InputError("--mode keyframes needs --photos PHOTO PHOTO ...")
        if flags.mode == "walk" and flags.keyframes < 2:
            raise InputError(f"--keyframes {flags.keyframes} is invalid: must be 2 or more")
    if flags.photos and not flags.direction and not (flags.video and flags.mode in ("keyframes", "roll")):
        raise InputError("--photos is only for --direction and for --video with --mode keyframes or roll")
    for name in ("clip", "motion_seed"):
        if getattr(flags, name) is not None and not (flags.video and flags.mode == "roll"):
            raise InputError(f"{command_line.flag(name)} is only for --video with --mode roll")
    if flags.clip and flags.photos:
        raise InputError("--clip and --photos both give the start of the video: must be one of them")
    if flags.motion_seed is None:
        flags.motion_seed = flags.seed
    if flags.motion_seed < 0:
        raise InputError(f"--motion-seed {flags.motion_seed} is invalid: must be 0 or more")
    run = Path(flags.run)
    draws = any(getattr(flags, name) for name in ("images", "seeds", "direction", "directions", "alpha_maps"))
    if flags.classes and not draws and not (flags.video and flags.mode in ("walk", "roll", "synthetic")):
        raise InputError("--class is for random z, and none are drawn: give --images or --seeds, or --video with "
                         "--mode walk")
    if flags.video and flags.mode == "walk" and len(flags.classes) > flags.keyframes:
        raise InputError(f"--class names {len(flags.classes)} classes for a walk through {flags.keyframes} points: "
                         f"give --keyframes {len(flags.classes)}")
    if flags.images and flags.seeds:
        raise InputError("--images and --seeds both name the images: must be one of them")
    flags.out = flags.out or (Path() if run.is_file() else run) / "generated"
    return flags


def check_classes(flags: Namespace, c: SimpleNamespace) -> None:
    """Sets flags.labels, one row per name of --class, (len, K). Raises InputError for a name that is no class."""
    for name in flags.classes:
        if not c.CLASSES:
            raise InputError(f"--class {name}: {flags.run} has no classes: must be a run of training.py --folders "
                             "classes")
        if name not in c.CLASSES:
            raise InputError(f"--class {name}: no class of {flags.run}: must be one of "
                             f"{', '.join(map(data.printable, c.CLASSES))}")
    flags.labels = torch.eye(len(c.CLASSES))[[c.CLASSES.index(name) for name in flags.classes]]


def start(argv: Sequence[str] | None) -> None:
    flags = parse(argv)
    device = command_line.choose_device(flags.device)
    generator, c, saved = load_generator(flags.run, device)
    check_classes(flags, c)
    flags.axes, flags.learned_motion = saved.get("axes"), learned_motion(saved)              # axes: if the run ended
    for flag, make in SHEETS.items():
        if getattr(flags, flag):
            name, sheet = make(generator, c, flags)
            file = flags.out / f"{name}.{flags.format}"
            pictures.save_picture(file, sheet)
            print(file)
    if flags.video:
        make_video(generator, c, flags)
        print(flags.video)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 another error (one line on stderr)."""
    return command_line.run_script("generate.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
