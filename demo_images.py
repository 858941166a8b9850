"""The built-in demo sets, drawn with code: owls on a branch under a wide sky, and clips of hopping owls.

    python demo_images.py images                             # 4,096 owls of 128 x 128 pixels
    python demo_images.py images --count 500 --size 256
    python demo_images.py clips --clips 600 --size 64        # 600 clips of 48 frames

owls.py draws an owl; here it moves, and whole sets are written to the disk.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoints
import command_line
from command_line import InputError
from owls import Scene, draw, draw_branch, draw_land, draw_owl, draw_sky, draw_tail, factors, mix, pixels

FORMAT = 1  # increased when the drawings change, so that an older set is replaced
CLIP_FORMAT = 4  # the same for what only the clips show
MARKER, STATES = "demo_set.json", "states.npz"
LIMITS = {"count": (1, 1_000_000), "clips": (1, 100_000), "frames": (3, 1000), "size": (16, 1024),
          "seed": (0, 2 ** 63 - 1)}

# Clips. Lengths are those of the image, which spans -1..1; times are frames.
GRAVITY = 0.02
HOPS = range(8, 17)             # frames in the air: n frames of flight rise by GRAVITY * n^2 / 8, 0.16 to 0.64
HOP_SPEED = (0.02, 0.07)        # horizontal
NEW_HOP = 0.2                   # share of the landings after which the owl rests and then hops in another way
RESTS = range(9)                # frames on the branch between two different hops
BLINK = (0.5, 1, 1, 1, 0.5)     # how far the lids are closed
FEET, BODY = 0.755, 0.27        # y of the feet and of the body's middle in an owl of the still set
PERCH = 0.76                    # y of the feet on the branch


# ------------------------------------------------------------------------------------- clips

def motion(index: int, frames: int, seed: int = 0) -> dict:
    """Returns the state of clip `index`, {name: (frames,) array}, and of its owl, {name: number or str}.

    The owl flies as a ball does: at height h above the branch it moves by vx sideways and by vy down, and vy grows by
    GRAVITY per frame; the sides of the image turn vx around. Where it lands, four of five hops are repeated at
    once; the fifth is followed by a rest and by a hop of another height, speed and direction. The head turns by a
    quarter of the way to its goal in each frame. The eyes blink at the top of each hop, and now and then in a rest.
    Random are only: the kind of the next hop, the rest and its blinks, the goal and the time of the next one. All else
    follows from the frames before.

    x, y: middle of the body, in image coordinates: -1..1, y down
    vx, vy: velocity just after the frame, after the landing or bounce that it shows, per frame; in the air
        x[t + 1] = x[t] + vx[t] and y[t + 1] = y[t] + vy[t] + GRAVITY / 2; 0 while it rests
    tilt, turn: head's angle, radians clockwise, and where the face looks, -1 (left) to 1 (right)
    lids: how far a blink has closed them, 0 to 1
    landed, bounced: bool: the feet met the branch, or the owl a side of the image, after the frame before
    scale: the owl's size, a share of that in the still set
    hue, sky: its hue in turns, and the name of the sky
    """
    f, rng = factors(index, seed), np.random.default_rng([seed, index, 2])
    scale = rng.uniform(0.60, 0.75)
    reach = 1 - 0.46 * f["width"] * scale  # where the body touches the side
    x, vx, height, rise, tilt, turn, goal = rng.uniform(-reach, reach), 0.0, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0)
    hop, in_air, rest, blink, rows = None, 0, 1, len(BLINK), []
    for _ in range(64 + frames):  # the first 64 lead to a random moment of the movement
        landed = bounced = False
        if in_air:
            x, height, rise, in_air = x + vx, height + rise - GRAVITY / 2, rise - GRAVITY, in_air - 1
            bounced, landed = abs(x) > reach, in_air == 0
            if bounced:
                x, vx = math.copysign(2 * reach, x) - x, -vx
            if landed:
                height = rise = 0.0  # not a rounding error beside it
                if rng.random() < NEW_HOP:
                    hop, rest = None, rng.choice(RESTS)
        else:
            rest -= 1
        if not in_air and not rest:
            if hop is None:
                hop, vx = rng.choice(HOPS), rng.choice((-1, 1)) * rng.uniform(*HOP_SPEED)
            in_air, rise = hop, GRAVITY * hop / 2
        if rng.random() < 1 / 12:
            goal = rng.uniform(-0.45, 0.45), rng.uniform(-1, 1)
        tilt, turn = tilt + (goal[0] - tilt) / 4, turn + (goal[1] - turn) / 4
        if in_air:
            blinks = in_air == (hop + len(BLINK) - 1) // 2  # around the top, so that they do not show vy
        else:
            blinks = blink >= len(BLINK) and rest > 2 and rng.random() < 1 / 8  # ends before that of the hop
        blink = 0 if blinks else blink + 1
        rows.append((x, PERCH - (FEET - BODY) * scale - height, vx if in_air else 0.0, -rise, tilt, turn,
                     BLINK[blink] if blink < len(BLINK) else 0.0, landed, bounced))
    names = ("x", "y", "vx", "vy", "tilt", "turn", "lids", "landed", "bounced")
    state = dict(zip(names, np.array(rows[-frames:], np.float32).T))
    state |= {name: state[name].astype(bool) for name in ("landed", "bounced")}
    return state | {"scale": scale, "hue": f["hue"], "sky": f["sky"]}


def draw_clip(index: int, frames: int = 48, size: int = 128, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields the frames of clip `index`, uint8 (size, size, 3), functions of the arguments.

    The owl is that of image `index`, with open eyes, light lids and in softer light, so that blinks are seen, and owls
    at night. It moves as `motion` says; its wings open with its height. No part of a frame depends on the velocity, so
    that a single frame does not show where the owl is going.
    """
    scene, state = Scene(index, size, seed), motion(index, frames, seed)
    scene.f |= {"x": 0.0, "lean": 0.0, "branch": 0.0}
    for part in (draw_sky, draw_land, draw_branch):
        part(scene)
    background, fixed, scale = scene.canvas, scene.f, state["scale"]
    scene.shadow = mix(scene.shadow, scene.light, 0.4)
    scene.colours["lid"] = mix(scene.colours["body"], scene.colours["face"], 0.7)
    for x, y, tilt, turn, lids in zip(*(state[name].tolist() for name in ("x", "y", "tilt", "turn", "lids"))):
        height = PERCH - (FEET - BODY) * scale - y
        wings = min(0.08 + 2.2 * height, 0.9)
        scene.f = fixed | {"tilt": tilt, "turn": turn, "lids": 1.8 * lids, "left_wing": wings, "right_wing": wings}
        scene.canvas = background.copy()
        owl = scene.window(x, y - BODY * scale, scale)
        draw_tail(owl)
        draw_owl(owl)
        yield pixels(scene.canvas)


# ------------------------------------------------------------------------------------- the sets on disk

def make(folder: str | Path, count: int = 4096, size: int = 128, seed: int = 0) -> Path:
    """Draws `count` images of size x size pixels as folder/<sky>/owl_<number>.jpg, once. Returns the folder.

    A complete set is left as it is, an interrupted one is completed, one with other values is replaced. A second
    process waits until the first is done. Raises InputError for invalid values and for a folder with other files,
    OSError if the set cannot be written.
    """
    folder = Path(folder)

    def missing():
        there = {path.name for path in folder.glob("*/owl_*.jpg")}
        return [index for index in range(count) if f"owl_{index:06d}.jpg" not in there]

    def write(index):
        _save(draw(index, size, seed), folder / factors(index, seed)["sky"] / f"owl_{index:06d}.jpg")

    return _make(folder, {"format": FORMAT, "count": count, "size": size, "seed": seed}, missing, write)


def make_clips(folder: str | Path, count: int = 600, frames: int = 48, size: int = 128, seed: int = 0) -> Path:
    """Draws `count` clips as folder/clip_<number>/frame_<number>.jpg, once. Returns the folder.

    folder/states.npz holds what `motion` returns, stacked: np.load(folder / "states.npz")["x"][clip, frame], and
    ["hue"][clip] for what is fixed in a clip. The promises and errors are those of `make`.
    """
    folder = Path(folder)

    def missing():
        names = [f"clip_{index:05d}" for index in range(count)]
        clips = [index for index, name in enumerate(names) if len([*folder.glob(f"{name}/frame_*.jpg")]) < frames]
        return clips if (folder / STATES).exists() else [STATES, *clips]

    def write(item):
        if item == STATES:
            states = [motion(index, frames, seed) for index in range(count)]
            with checkpoints.atomic_write(folder / STATES) as file:
                np.savez(file, **{name: np.array([state[name] for state in states]) for name in states[0]})
            return
        for number, image in enumerate(draw_clip(item, frames, size, seed)):
            _save(image, folder / f"clip_{item:05d}" / f"frame_{number:03d}.jpg")

    return _make(folder, {"format": FORMAT, "clip_format": CLIP_FORMAT, "clips": count, "frames": frames, "size": size,
                          "seed": seed}, missing, write)


def _make(folder: Path, values: dict, missing: Callable[[], list], write: Callable) -> Path:
    """Writes what is missing of the set with these values, after deleting one with others; see `make`.

    missing() returns the items that are not there, write(item) draws one and saves it.
    """
    for name, (low, high) in LIMITS.items():
        if not low <= values.get(name, low) <= high:
            raise InputError(f"--{name} {values[name]} is invalid: must be {low} to {high}")
    if _has_marker(folder, values) and not missing():
        return folder
    others = {path.name for path in folder.glob("[!.]*")} - {MARKER, MARKER + ".part", "lock"}
    if others and not (folder / MARKER).exists():
        raise InputError(f"{folder}: contains other files: must be a new or empty folder")
    with checkpoints.lock(folder, lambda: print(f"waiting for another process that draws {folder}")):
        if not _has_marker(folder, values):
            _delete(folder)
            with checkpoints.atomic_write(folder / MARKER) as file:
                file.write(json.dumps(values).encode())
        # Freeing a large block makes glibc keep freed memory from then on: 7 instead of 10 ms per image.
        np.empty(2 ** 24, np.uint8)
        bar = tqdm(missing(), desc="drawing the demo set", unit="clip" if "clips" in values else "img", disable=None)
        if bar.disable:    # the output is not a terminal: one plain line
            print(f"drawing the demo set in {folder}", flush=True)
        for item in bar:
            write(item)
    return folder


def _has_marker(folder, values):
    """Whether the folder holds a set, complete or not, with these values."""
    try:
        return values.items() <= dict(json.loads((folder / MARKER).read_text())).items()
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):        # none, or damaged
        return False


def _delete(folder):
    """Deletes the files of either set, and the folders that are empty then."""
    (folder / STATES).unlink(missing_ok=True)
    for old in [*folder.glob("*/owl_*"), *folder.glob("clip_*/frame_*")]:
        old.unlink()
        with contextlib.suppress(OSError):  # not empty
            old.parent.rmdir()


def _save(image, file):
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    # A tenth of PNG's time, half its size, no visible loss. Not flushed to the disk: it can be drawn again.
    Image.fromarray(image).save(part, "JPEG", quality=95, subsampling=0)
    os.replace(part, file)


# ------------------------------------------------------------------------------------- command line

def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("demo_images.py", __doc__)
    parser.add_argument("folder", type=Path, help="a new or empty folder, or an interrupted set to complete")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, default=4096, help="number of images [%(default)s]")
    number.add_argument("--clips", type=int, help="draw this number of clips instead: folders of numbered frames")
    parser.add_argument("--frames", type=int, help="frames of a clip [48]")
    parser.add_argument("--size", type=int, default=128, help="side of an image, pixels [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set [%(default)s]")
    flags = parser.parse_args(argv)
    if flags.clips is None:
        if flags.frames is not None:
            raise InputError("--frames is the length of a clip: add --clips with the number of clips")
        make(flags.folder, flags.count, flags.size, flags.seed)
        drawn = f"{flags.count} images"
    else:
        frames = 48 if flags.frames is None else flags.frames
        make_clips(flags.folder, flags.clips, frames, flags.size, flags.seed)
        drawn = f"{flags.clips} clips of {frames} frames"
    print(f"{drawn} of {flags.size} x {flags.size} pixels in {flags.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 another error, 130 after Ctrl-C; the same command then continues."""
    return command_line.run_script("demo_images.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
