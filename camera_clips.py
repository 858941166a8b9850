"""Makes clips from photos: a camera pans and zooms over each one, so that a model of videos can be trained on stills.

    python camera_clips.py ./photos ./photo_clips                                     # a folder of 32 frames per photo
    python training.py --data ./photo_clips --folders clips --image-size 64

The frames of a clip are squares of 70% to 94% of the photo's side. Place, size and brightness follow sine curves of
their own, with random phases and periods of 24 to 64 frames. Objects cannot be learned to move from stills; the camera
can. The same command continues after an interruption and adds new photos.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoints
import clips
import command_line
import data
import random_keys
from command_line import InputError, positive

SIDE = (0.70, 0.94)            # of the square that a frame shows, share of the photo's side
LIGHT = 0.08                   # largest change of the brightness, share
PERIOD = (24, 64)              # frames of one sine
SETTINGS = "camera.json"       # file in the folder of clips
OVERSIZE = 2                   # the photo is read at this many times the size of a frame: zooming keeps details


def camera_path(key: str, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns {"left", "top", "side": of the squares, as shares of the photo's side, "light": factors}, each (frames,),
    as a function of the arguments. The squares stay within the photo."""
    rng = random_keys.numpy_generator(seed, f"camera {key}")

    def sine():
        return rng.uniform(0.5, 1) * np.sin(2 * np.pi * (np.arange(frames) / rng.uniform(*PERIOD) + rng.random()))

    low, high = SIDE
    side = (low + high) / 2 + (high - low) / 2 * sine()
    left, top = ((1 - side) / 2 * (1 + sine()) for _ in range(2))
    return {"left": left, "top": top, "side": side, "light": 1 + LIGHT * sine()}


def film(photo: np.ndarray, path: dict[str, np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the frames, uint8 (size, size, C), of a photo, uint8 (S, S, C)."""
    picture, whole = Image.fromarray(photo.squeeze()), len(photo)
    for left, top, side, light in zip(*(path[name].tolist() for name in ("left", "top", "side", "light"))):
        box = (left * whole, top * whole, (left + side) * whole, (top + side) * whole)
        frame = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
        yield np.clip(np.round(light * frame), 0, 255).astype(np.uint8)


def write_clip(folder: Path, photo: np.ndarray, path: dict[str, np.ndarray], size: int) -> None:
    """Writes folder/000.jpg and so on; the folder appears when all frames are written."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number, frame in enumerate(film(photo, path, size)):
        Image.fromarray(frame).save(part / f"{number:03d}.jpg", quality=95, subsampling=0)
    os.replace(part, folder)


def check_settings(folder: Path, settings: dict[str, int]) -> None:
    """Keeps the settings of the first call in the folder. Raises InputError for others, and for a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: must be a folder")
    file = folder / SETTINGS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with checkpoints.atomic_write(file) as out:
            out.write(json.dumps(settings).encode())
    elif (known := json.loads(file.read_text())) != settings:
        flags = " ".join(f"--{name} {value}" for name, value in known.items())
        raise InputError(f"{folder} was filmed with {flags}: give these, or a new folder")


def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("camera_clips.py", __doc__)
    parser.add_argument("photos", help="a folder of images")
    parser.add_argument("clips", type=Path, help="a new folder, or that of an earlier call")
    parser.add_argument("--frames", type=positive(int), default=32, help="of a clip [%(default)s]")
    parser.add_argument("--size", type=positive(int), default=64, help="side of a frame, pixels [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="another seed films in other ways [%(default)s]")
    flags = parser.parse_args(argv)
    if flags.seed < 0:
        raise InputError(f"--seed {flags.seed} is invalid: must be 0 or more")
    if flags.frames < clips.MIN_FRAMES:
        raise InputError(f"--frames {flags.frames} is invalid: must be {clips.MIN_FRAMES} or more")
    if Path(flags.photos).resolve().is_relative_to(flags.clips.resolve()):
        raise InputError(f"{flags.clips}: contains the photos: give another folder for the clips")
    found, skipped = data.find_files(flags.photos, flags.clips)
    check_settings(flags.clips, {name: vars(flags)[name] for name in ("frames", "size", "seed")})
    usable = 0
    for name in tqdm(found, desc="filming", unit="photo", disable=None):
        folder = flags.clips / name                          # of photo x/cat.jpg, x/cat.jpg/000.jpg and so on
        try:
            if not folder.exists():
                photo = data.read_photo(os.path.join(flags.photos, name), OVERSIZE * flags.size, 3)
                write_clip(folder, photo, camera_path(name, flags.frames, flags.seed), flags.size)
            usable += 1
        except InputError as error:
            skipped.append((name, str(error)))
    for name, reason in skipped:
        print(f"skipped {data.printable(name)}: {reason}")
    if not usable:
        raise InputError(f"{flags.photos}: none of its images can be used")
    print(f"{usable:,} clips of {flags.frames} frames of {flags.size} x {flags.size} pixels in {flags.clips}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 130 after Ctrl-C; the same command then continues."""
    return command_line.run_script("camera_clips.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
