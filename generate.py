"""Pictures and videos from a trained run.

    python generate.py RUN --images 64 --seed 1 --out DIR            # DIR/00000.png ... and DIR/grid.png
    python generate.py RUN --video walk.mp4 --seconds 8              # a looping walk; or .webp, .gif, a folder
    python generate.py RUN --video mine.mp4 --mode keyframes --photos a.jpg b.jpg c.jpg
    python generate.py RUN --reconstruct PHOTO ...                   # through encoder and decoder, beside the original
    python generate.py RUN --interpolate a.jpg b.jpg                 # from one photo to another
    python generate.py RUN --direction DIR_A DIR_B --photos PHOTO    # what B has and A has not, given to a photo
    python generate.py RUN --directions 8                            # the principal axes, each at several strengths
    python generate.py RUN --alpha-maps 16                           # pictures and the alpha that made them

RUN is a run's folder, or a single checkpoint or weights file. One seed is one picture: picture i of seed S is always
the same, at any batch size. Several of these may be asked for at once. Bad input: one line, status 2.

--mode of a video:
    walk        a path through --keyframes random points
    keyframes   a path through --photos, each encoded
    feedback    a walk in which the layer sees the pictures before, in place of synthetic copies: its alphas shape
                the next frame
    synthetic   the synthetic video of training, left as the decoder made it, right through the layer
    progress    the pictures of one z at each sample of the training, from RUN/samples
"""

import argparse
import collections
import concurrent.futures
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
import command_line
import data
import latent_space
import model_definitions
import pictures
import random_keys
from command_line import positive
from errors import InputError

GRID_LIMIT = 256                                  # pictures on grid.png at most; the single files hold them all
WAITING_LIMIT = 64                                # pictures that wait to be written at most
STRENGTHS = (-2, -1, -0.5, 0, 0.5, 1, 2)           # of a principal axis, in standard deviations of the encoded pictures
EDITS = (-1, -0.5, 0, 0.5, 1, 1.5)                # of a direction between folders: 1 is from A's mean to B's
INTERPOLATED = 9                                  # pictures from one photo to the other, both included
MODES = ("walk", "keyframes", "feedback", "synthetic", "progress")


# ------------------------------------------------------------------------------------- rendering

def device_of(generator):
    return next(generator.parameters()).device


@torch.inference_mode()
def render(generator, z, batch_size=16):
    """z (N, LATENT_DIM) -> uint8 arrays (H, W, C), one after the other, a batch at a time."""
    for part in z.split(batch_size):
        yield from data.to_arrays(generator(part.to(device_of(generator))))


@torch.inference_mode()
def feedback(generator, z, frozen=False):
    """Images (1, C, H, W) in [-1, 1] along z (F, LATENT_DIM), one after the other, and the alpha of each.

    The window of each holds the T-1 pictures before it, newest first, where training's holds modified copies; copies
    of the first picture fill it at the start. frozen: it stays as it was at the start, to compare with.
    """
    layer, window = generator.layer, None
    for point in z:
        x = generator.vae.decode(point[None].to(device_of(generator)))
        if window is None:
            window = layer.displayed(x).repeat(1, layer.video.num_frames - 1, 1, 1)
        alpha = layer.alpha(x, window)
        image = layer.apply_alpha(x, alpha)
        if not frozen:
            window = torch.cat([(1 + image) / 2, window[:, :-layer.channels]], dim=1)
        yield image, alpha


class Motion:
    """How a video moves, in grey levels of 255, gathered while its frames (H, W, C) pass through `watch`."""

    def __init__(self):
        self.first, self.last, self.changes, self.flicker = [], [], [], []      # two frames at each end

    def watch(self, frames, loop):
        for frame in frames:
            self._add(frame.astype(np.float32))
            yield frame
        if loop and len(self.changes) > 1:
            for frame in self.first:                   # over the seam
                self._add(frame)
            self.changes.pop()                         # from the first to the second is counted already

    def _add(self, frame):
        if self.last:
            self.changes.append(float(np.abs(frame - self.last[-1]).mean()))
        if len(self.last) == 2:
            self.flicker.append(float(np.abs(self.last[1] - (self.last[0] + frame) / 2).mean()))
        self.last = [*self.last[-1:], frame]
        self.first += [frame] * (len(self.first) < 2)

    def line(self):
        if not self.changes:
            return "one frame, no motion"
        text = (f"change from frame to frame, levels of 255: mean {np.mean(self.changes):.2f}, spread "
                f"{np.std(self.changes):.2f}, largest {max(self.changes):.2f} (change {np.argmax(self.changes) + 1})")
        if self.flicker:
            text += f"; a frame against the mean of its neighbours: {np.mean(self.flicker):.2f}"
        return text


# ------------------------------------------------------------------------------------- what the user gives

def read_photos(paths, c):
    """(names, uint8 arrays (H, W, C)) of photos and of the photos in folders, decoded as training does.

    Raises InputError for one that can't be read."""
    files = []
    for path in paths:
        files += sorted(Path(path) / name for name in data.find_files(path)[0]) if Path(path).is_dir() else [Path(path)]
    photos = [data.read_photo(str(f), c.IMAGE_SIZE, c.CHANNELS, c.BACKGROUND) for f in bar(files, len(files), "file")]
    return [f.name for f in files], photos


def bar(iterable, total, unit):
    """A progress bar, where there is a terminal for it."""
    return tqdm(iterable, total=total, unit=unit, delay=1, disable=not sys.stderr.isatty())


# ------------------------------------------------------------------------------------- pictures

def write_images(generator, c, arguments):
    """--images N: single files and a grid. Files are compressed and written beside the model, on other cores."""
    z = latent_space.draw_z(arguments.seed, 0, arguments.images, c.LATENT_DIM)
    shown, waiting, started = [], collections.deque(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for i, picture in enumerate(bar(render(generator, z), len(z), "image")):
            file = arguments.out / f"{i:05d}.{arguments.format}"
            waiting.append(pool.submit(pictures.save_picture, file, picture))
            if len(waiting) > WAITING_LIMIT:
                waiting.popleft().result()
            if i < GRID_LIMIT:
                shown.append(picture)
        for saved in waiting:
            saved.result()
    print(f"{len(z)} pictures, {len(z) / (time.monotonic() - started):.1f} a second")
    return save_sheet(arguments, "grid", pictures.grid(shown))


def save_sheet(arguments, name, sheet):
    file = arguments.out / f"{name}.{arguments.format}"
    pictures.save_picture(file, sheet)
    return file


def write_reconstructions(generator, c, arguments):
    """--reconstruct PHOTO ...: each photo over what encoder and decoder make of it; and that in single files."""
    names, photos = read_photos(arguments.reconstruct, c)
    z = latent_space.encode(generator.vae, photos)
    made = list(bar(render(generator, z), len(z), "photo"))
    for i, (name, picture) in enumerate(zip(names, made)):
        pictures.save_picture(arguments.out / f"reconstructed_{i:03d}_{Path(name).stem}.{arguments.format}", picture)
    error = np.abs(np.stack(made).astype(int) - np.stack(photos)).mean()
    print(f"{len(made)} photos, mean error {error:.1f} of 255 levels")
    columns, shown = min(len(made), 8), min(len(made), GRID_LIMIT)
    parts = [pictures.grid(part[i:i + columns], columns) for i in range(0, shown, columns)
             for part in (photos, made)]
    labels = ["photos", "reconstructed"] * (len(parts) // 2)
    return save_sheet(arguments, "reconstructed", pictures.stack(parts, labels))


def write_interpolation(generator, c, arguments):
    """--interpolate A B: the way from one photo to the other, the photos themselves at both ends."""
    _, photos = read_photos(arguments.interpolate, c)
    if len(photos) != 2:
        raise InputError(f"--interpolate got {len(photos)} photos: give two")
    a, b = latent_space.encode(generator.vae, photos)
    z = torch.stack([latent_space.spherical(a, b, t) for t in torch.linspace(0, 1, INTERPOLATED)])
    strip = pictures.grid(list(render(generator, z)), columns=INTERPOLATED)
    ends = [pictures.grid(photo[None]) for photo in photos]
    sheet = pictures.stack([pictures.beside(ends[0], strip, ends[1])], ["photo, from one to the other, photo"])
    return save_sheet(arguments, "interpolation", sheet)


def strengths_sheet(generator, rows, strengths, names=("",)):
    """Rows of pictures from lists of z (D,), a column for each strength; names: of blocks of rows."""
    made = list(render(generator, torch.stack([z for row in rows for z in row])))
    block = len(made) // len(names)
    labels = [f"{name} at strength " + ", ".join(f"{strength:+g}" if strength else "0" for strength in strengths)
              for name in names]
    return pictures.stack([pictures.grid(made[i * block:(i + 1) * block], columns=len(strengths))
                           for i in range(len(names))], labels)


def write_direction(generator, c, arguments):
    """--direction DIR_A DIR_B: what sets the pictures of B apart from those of A, given to photos, or to random
    pictures, at several strengths; the photos themselves at the left."""
    a, b = (latent_space.encode_sample(generator.vae, data.load_images_of_run(folder, c)).mean(0)
            for folder in arguments.direction)
    way = b - a
    if arguments.photos:
        _, photos = read_photos(arguments.photos, c)
        start = latent_space.encode(generator.vae, photos)
    else:
        photos, start = [], latent_space.draw_z(arguments.seed, 0, 6, c.LATENT_DIM)
    if way.norm() < 1e-6:
        raise InputError("--direction got two folders whose encoded pictures have the same mean: give two that differ")
    sheet = strengths_sheet(generator, [[z + strength * way for strength in EDITS] for z in start], EDITS, ["B - A"])
    if photos:
        sheet = pictures.beside(pictures.stack([pictures.grid(photos, columns=1)], ["photo"]), sheet)
    print(f"the direction is {way.norm():.2f} long; encoded pictures of B are {b.norm():.2f} from the origin")
    return save_sheet(arguments, "direction", sheet)


def write_directions(generator, c, arguments):
    """--directions K: the K principal axes of encoded training pictures, a row each, from their mean picture on."""
    axes = arguments.axes
    if axes is None:
        if not c.DATA or not Path(c.DATA).is_dir():
            raise InputError(f"{arguments.run}: holds no principal axes, and its images are not at "
                             f"{c.DATA or 'hand (the demo set)'}: let training.py come to its end, which writes them")
        axes = latent_space.principal_axes(latent_space.encode_sample(
            generator.vae, data.load_images_of_run(c.DATA, c)))
    count = len(axes["axes"])
    if arguments.directions > count:
        raise InputError(f"--directions {arguments.directions} can't be: this run has {count}")
    axes = {name: tensor.cpu() for name, tensor in axes.items()}
    start = latent_space.draw_z(arguments.seed, 0, 1, c.LATENT_DIM)[0]
    rows = []
    for axis, deviation in zip(axes["axes"][:arguments.directions], axes["deviations"]):
        at = start - ((start - axes["mean"]) @ axis) * axis            # the picture with nothing of this axis
        rows.append([at + strength * deviation * axis for strength in STRENGTHS])
    share = axes["deviations"].square()
    print(f"the first {arguments.directions} axes hold {share[:arguments.directions].sum() / share.sum():.0%} of the "
          "variance of encoded pictures")
    names = [f"axis {number}" for number in range(1, len(rows) + 1)]
    return save_sheet(arguments, "directions", strengths_sheet(generator, rows, STRENGTHS, names))


@torch.inference_mode()
def write_alpha_maps(generator, c, arguments):
    """--alpha-maps N: pictures, and beside them their alpha with its scale, the range that was found."""
    z = latent_space.draw_z(arguments.seed, 0, arguments.alpha_maps, c.LATENT_DIM)
    image, alpha = (torch.cat(parts) for parts in zip(*(generator.image_and_alpha(part.to(device_of(generator)))
                                                        for part in z.split(16))))
    alpha = alpha.mean(1).cpu().numpy()
    low, high = float(alpha.min()), float(alpha.max())
    print(f"alpha: mean {alpha.mean():.2f}, {low:.2f} to {high:.2f}, spread within a picture "
          f"{alpha.std(axis=(1, 2)).mean():.2f}")
    sheet = pictures.beside(pictures.grid(data.to_arrays(image)), pictures.heat_maps(alpha, low, high, log=True))
    return save_sheet(arguments, "alpha_maps", pictures.stack([sheet], ["pictures, and their alpha on a log scale"]))


# ------------------------------------------------------------------------------------- videos

def video_frames(generator, c, arguments):
    """(frames, how many, whether they loop) of --video in its --mode; frames are uint8 (H, W, 3), made as they are
    asked for."""
    count, loop = max(2, round(arguments.seconds * arguments.fps)), arguments.loop
    if arguments.mode == "progress":
        return progress_frames(arguments.run)
    if arguments.mode == "synthetic":
        return synthetic_frames(generator, c, arguments.seed), c.NUM_FRAMES, False
    if arguments.mode == "keyframes":
        _, photos = read_photos(arguments.photos, c)
        if len(photos) < 2:
            raise InputError(f"--mode keyframes got {len(photos)} photo: give two or more")
        keyframes = latent_space.encode(generator.vae, photos)
    else:
        keyframes = latent_space.draw_z(arguments.seed, 0, arguments.keyframes, c.LATENT_DIM)
    z = latent_space.walk(keyframes, count, loop)
    if arguments.mode != "feedback":
        return (pictures.grid(frame[None]) for frame in render(generator, z)), count, loop
    # A loop comes round to its start with the window that it left with.
    before = min(count, c.NUM_FRAMES - 1) if loop else 0
    images = feedback(generator, torch.cat([z[count - before:], z]))
    frames = (pictures.grid(data.to_arrays(image)) for i, (image, _) in enumerate(images) if i >= before)
    return frames, count, loop


@torch.inference_mode()
def synthetic_frames(generator, c, seed):
    """The synthetic video of four pictures, as training draws it: left what the decoder made of them, modified; right
    the same through the layer."""
    layer = generator.layer
    x = generator.vae.decode(latent_space.draw_z(seed, 0, 4, c.LATENT_DIM).to(device_of(generator)))
    changes = layer.video.draw(random_keys.torch_generator(seed, "generate", 0)).to(x)
    for frame in layer.video(x, changes).clamp(0, 1).chunk(c.NUM_FRAMES, dim=1):
        parts = [pictures.stack([pictures.grid(data.to_arrays(part))], [label])
                 for part, label in ((frame * 2 - 1, "from the decoder"), (layer(frame), "through the layer"))]
        yield pictures.beside(*parts)


def progress_frames(run):
    """The sheets of generated pictures that training wrote, oldest first, each under its step."""
    files = sorted((Path(run) / "samples").glob("step_*_generated.png"))
    if len(files) < 2:
        raise InputError(f"{run}: --mode progress needs the samples of a run, and found {len(files)} in "
                         f"{Path(run) / 'samples'}")

    def frames():
        for file in files:
            with Image.open(file) as sheet:
                yield pictures.stack([np.array(sheet.convert("RGB"))], [f"step {int(file.name.split('_')[1]):,}"])
    return frames(), len(files), False


def write_video(generator, c, arguments):
    """--video FILE."""
    motion = Motion()
    frames, count, loop = video_frames(generator, c, arguments)
    fps = arguments.fps
    if arguments.mode in ("progress", "synthetic"):            # as many frames as there are, over --seconds
        fps = min(fps, max(1, count / arguments.seconds))
    pictures.save_video(arguments.video, motion.watch(bar(frames, count, "frame"), loop), fps, arguments.loop)
    print(motion.line())
    return arguments.video


# ------------------------------------------------------------------------------------- command line

def make_parser():
    parser = command_line.Parser("generate.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a single checkpoint or weights file")
    asked = parser.add_argument_group("what to make")
    asked.add_argument("--images", type=positive(int), metavar="N", help="pictures from noise")
    asked.add_argument("--video", type=Path, metavar="FILE", help=".mp4, .webp, .gif, or the name of a folder to make")
    asked.add_argument("--reconstruct", nargs="+", metavar="PHOTO", help="photos through encoder and decoder")
    asked.add_argument("--interpolate", nargs=2, metavar="PHOTO", help="from one photo to another")
    asked.add_argument("--direction", nargs=2, metavar="DIR", help="what the second folder has and the first has not")
    asked.add_argument("--directions", type=positive(int), metavar="K", help="the K principal axes of latent space")
    asked.add_argument("--alpha-maps", type=positive(int), metavar="N", help="maps of alpha beside their pictures")
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, metavar="DIR", help="folder for all but videos [RUN/generated]")
    how.add_argument("--format", choices=("png", "webp"), default="png", help="of pictures [%(default)s]")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="one seed is one set of pictures [%(default)s]")
    how.add_argument("--mode", choices=MODES, default="walk", help="of the video [%(default)s]")
    how.add_argument("--seconds", type=positive(float), default=8.0, metavar="X", help="of the video [%(default)s]")
    how.add_argument("--fps", type=positive(float), default=20.0, metavar="X", help="frames a second [%(default)s]")
    how.add_argument("--loop", action=argparse.BooleanOptionalAction, default=True,
                     help="the video ends where it began")
    how.add_argument("--keyframes", type=positive(int), default=6, metavar="N",
                     help="random points that a walk passes through [%(default)s]")
    how.add_argument("--photos", nargs="+", default=[], metavar="PHOTO", help="for --mode keyframes and --direction")
    how.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    return parser


WRITERS = {"images": write_images, "reconstruct": write_reconstructions, "interpolate": write_interpolation,
           "direction": write_direction, "directions": write_directions, "alpha_maps": write_alpha_maps,
           "video": write_video}


def parse(argv):
    arguments = make_parser().parse_args(argv)
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} can't be: give 0 or more")
    if not any(getattr(arguments, name) for name in WRITERS):
        raise InputError("nothing to do: give " + ", ".join(command_line.flag(name.upper()) for name in WRITERS))
    if arguments.video:
        check_video(arguments)
    if arguments.photos and not arguments.direction and not (arguments.video and arguments.mode == "keyframes"):
        raise InputError("--photos are for --direction and for --video with --mode keyframes: give one of these")
    run = Path(arguments.run)
    arguments.out = arguments.out or (run if run.is_dir() else run.parent) / "generated"
    return arguments


def check_video(arguments):
    """Raises InputError for what would stop a video after it was rendered."""
    if (problem := pictures.missing_for(arguments.video)) is not None:
        raise InputError(f"--video {arguments.video} can't be: {problem}")
    limit = pictures.FPS_LIMIT if arguments.video.suffix.lower() in pictures.SUFFIXES else pictures.MP4_FPS_LIMIT
    if not 1 <= arguments.fps <= limit:
        raise InputError(f"--fps {arguments.fps:g} can't be: give 1 to {limit}")
    if arguments.mode == "keyframes" and not arguments.photos:
        raise InputError("--mode keyframes needs photos: give --photos PHOTO PHOTO ...")
    if arguments.mode in ("walk", "feedback") and arguments.keyframes < 2:
        raise InputError(f"--keyframes {arguments.keyframes} can't be: a walk needs 2 or more")


def start(argv):
    arguments = parse(argv)
    device = command_line.choose_device(arguments.device)
    _, saved = checkpoints.find(arguments.run, device, warn=lambda line: print(line, file=sys.stderr))
    generator, c = model_definitions.from_checkpoint(saved, device)
    arguments.axes = saved.get("axes")                    # where the run came to its end
    for name, write in WRITERS.items():
        if getattr(arguments, name):
            print(write(generator, c, arguments))
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("generate.py: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"generate.py: {error.filename or 'a file'}: can't be written ({error.strerror})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
