"""Writes one HTML page of a run, runs/NAME/index.html, that needs no network.

    python report.py runs/NAME

Training writes it at every sample. It reads only the files of the run's folder, whatever is there of them, and loads
no checkpoint. This file collects what the page shows as JSON; the script in report_page.html draws it.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import base64
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageSequence

import checkpoints
import command_line
import config
import pictures
from command_line import InputError
from run_log import HEALTHY, Value, duration, range_of, range_words, short

TEMPLATE = Path(__file__).with_name("report_page.html")
PAGE_BYTES = 10_000_000     # the page is smaller for every run
POINTS_IN_TIME = 40         # of the slider, at most
RELOAD_SECONDS = 30         # of the page of a run that is being trained
LOG_LINES = 2_000           # lines of metrics.jsonl that are parsed, beside the newest and those with scores
NEWEST_LINES = 50           # the newest lines, all of which are parsed
CURVE_POINTS = 240          # of a curve; a longer log is averaged
RECENT = 5                  # logged lines whose median is the newest value
SKIPPED_SHOWN = 50          # names of skipped files on the page

BANDS = {"alpha_mean": ("alpha_min", "alpha_max")}                     # around a curve, instead of curves of their own
KINDS = ("generated", "classes", "alpha", "real", "reconstructed", "motion")                # of sample sheets
# Longest side in pixels and WebP quality. The first that fits SHEET_BYTES is used: 121 sheets in base64 are 8 MB.
ENCODINGS = ((640, 85), (640, 65), (512, 50), (384, 35), (256, 20))
SHEET_BYTES = 48_000
VIDEO_BYTES = 500_000

SCORE_TITLES = {"frechet": "Frechet distance", "kid": "KID \u00d7 1000", "sliced_wasserstein": "Sliced Wasserstein",
                "reconstruction_kid": "Reconstructions' KID \u00d7 1000"}
HIGHER_IS_BETTER = ("precision", "recall", "diversity")
COURSES = {"contrast": ("Contrast", "Standard deviation of a frame's values, from -1 to 1."),
           "drift": ("Colour drift", "Difference of a frame's mean colour from that of frame 0."),
           "speed": ("Speed", "Mean absolute difference from the frame before."),
           "acceleration": ("Acceleration", "Mean absolute second difference. Far above real clips, videos jitter."),
           "length": ("Length of codes", "|z| / sqrt(LATENT_DIM). Level is good.")}


# ------------------------------------------------------------------------------------- the files of a run

def read_run(folder: str | Path) -> SimpleNamespace:
    """Returns what a run's folder holds; a part is empty if its file is missing or unreadable.

    Raises InputError if there is neither config.json nor metrics.jsonl.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder} holds no run, neither config.json nor metrics.jsonl: must be a folder such as "
                         "runs/NAME")
    sheets, videos, courses = {}, {}, {}
    for file in (folder / "samples").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)_(?:(\w+)\.png|video\.gif|course\.json)", file.name):
            if match[2] is None:
                (videos if file.suffix == ".gif" else courses)[int(match[1])] = file
            elif match[2] in KINDS:
                sheets.setdefault(int(match[1]), {})[match[2]] = file
    return SimpleNamespace(
        name=folder.resolve().name, constants=parsed(read_text(folder / "config.json")),
        rows=read_log(folder / "metrics.jsonl"), sheets=sheets, videos=videos, courses=courses,
        skipped=[line for line in read_text(folder / "skipped.txt").splitlines() if line.strip()],
        checkpoints=[file.name for file in checkpoints.step_files(folder / "checkpoints")])


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parsed(text: str | bytes) -> dict:
    """Returns the dict that a JSON text holds, {} for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_log(file: Path) -> list[dict]:
    """Returns lines of metrics.jsonl that have a step, in order of their steps.

    Of a log of more than LOG_LINES lines only so many evenly spaced ones are parsed, the newest, and all with scores:
    parsing every line of a long log takes seconds, during which training waits.
    """
    try:
        with file.open("rb") as lines:
            count = sum(1 for _ in lines)
            every = max(1, -(-count // LOG_LINES))
            lines.seek(0)
            wanted = [line for number, line in enumerate(lines)
                      if number % every == 0 or number >= count - NEWEST_LINES or b'"evaluate_' in line]
    except OSError:
        return []
    rows = [row for row in map(parsed, wanted) if is_number(row.get("step")) and row["step"] >= 0]
    return sorted(rows, key=lambda row: row["step"])


def is_number(value) -> bool:
    """True for a number that can be drawn: finite, and within float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


def columns(rows: list[dict], *keys: str) -> np.ndarray:
    """Returns (n, len(keys)): the values of the rows that hold a number for every key."""
    found = [[row[key] for key in keys] for row in rows if all(is_number(row.get(key)) for key in keys)]
    return np.array(found, dtype=np.float64).reshape(-1, len(keys))


def constants_for_ranges(constants: dict) -> SimpleNamespace:
    """Returns the constants that ranges depend on; config.py's where the run's own are missing or invalid."""
    found = {name: getattr(config, name) for name in ("IMAGE_SIZE", "ALPHA_INIT", "ALPHA_SPAN")}
    found.update((name, constants[name]) for name in found if is_number(constants.get(name)) and constants[name] > 0)
    return SimpleNamespace(**found)


# ------------------------------------------------------------------------------------- values and curves

def state_of(value: Value, limits: tuple[float, float] | None, values: np.ndarray, step: int) -> str:
    """Returns the state of a value's newest numbers, values (n,): healthy, early, look at it, falling, level, rising;
    empty where the table of healthy values says nothing."""
    if limits and not limits[0] <= np.median(values[-RECENT:]) <= limits[1]:
        return "early" if step < value.from_step else "look at it"
    if not value.trend:
        return "healthy" if limits else ""
    quarter = len(values) // 4
    if quarter < 2:
        return "early"
    before, now = values[-2 * quarter:-quarter].mean(), values[-quarter:].mean()
    change = (now - before) / max(abs(before), 1e-9)
    return "level" if abs(change) < 0.02 else "falling" if change < 0 else "rising"


def curve(rows: list[dict], key: str, title: str, words: str) -> dict | None:
    """Returns a curve for the page, or None if the log has no number for it.

    Its points are means over at most CURVE_POINTS groups of lines; low and high are the smallest and largest value of
    each group.
    """
    table = columns(rows, "step", key, *BANDS.get(key, (key, key)))
    if len(table) == 0:
        return None
    groups = np.array_split(table, min(len(table), CURVE_POINTS))
    x, *ys = np.array([(*g[:, :2].mean(0), g[:, 2].min(), g[:, 3].max()) for g in groups]).T
    return {"key": key, "title": title, "words": words, "newest": short(table[-1, 1]), "x": x.round().tolist(),
            **{name: [float(f"{v:.4g}") for v in column] for name, column in zip(("y", "low", "high"), ys)}}


def value_curves(run: SimpleNamespace, step: int) -> list[dict]:
    """Returns the curves of the values in HEALTHY, each with the state of its newest values and its healthy range."""
    c, found = constants_for_ranges(run.constants), []
    for value in HEALTHY:
        values, limits = columns(run.rows, value.key)[:, 0], range_of(value.healthy, c)
        unchanged = limits and limits[0] == limits[1] and (values == limits[0]).all()      # a counter that stayed at 0
        if value.key in BANDS["alpha_mean"] or unchanged:
            continue
        if drawn := curve(run.rows, value.key, value.title, value.words):
            expected = filter(None, [limits and range_words(limits), value.trend])
            found.append({**drawn, "healthy": limits, "newest": short(np.median(values[-RECENT:])),
                          "state": state_of(value, limits, values, step), "expected": ", ".join(expected)})
    return found


def score_curves(rows: list[dict]) -> list[dict]:
    """Returns a curve for each evaluate_ value in the log; a standard error is added to the newest value instead."""
    found = []
    known = {value.key for value in HEALTHY}
    for key in sorted({key for row in rows for key in row if key.startswith("evaluate_")} - known):
        name, error = key.removeprefix("evaluate_"), columns(rows, key + "_error")
        words = "Higher is better." if name in HIGHER_IS_BETTER else "Lower is better."
        if name == "overfitting":
            words = "Near 0 is good; towards 1 the critic memorises. Noise in the first thousands of steps."
        title = SCORE_TITLES.get(name, name.replace("_", " ").capitalize())
        drawn = curve(rows, key, title, f"{words} Comparable only for the same number and size of images.")
        if drawn and not key.endswith("_error"):
            drawn["newest"] += f" \u00b1 {short(error[-1, 0])}" if len(error) else ""
            found.append(drawn)
    return found


def course_curves(courses: dict[int, Path]) -> list[dict]:
    """Returns the newest values along a video as curves: the line is that of generated videos, the band that of real
    clips. A curve whose numbers are damaged is left out."""
    saved, found = parsed(read_text(courses[max(courses)])) if courses else {}, []
    for name, (title, words) in COURSES.items():
        made, low, high = parts = [saved.get(name, {}).get(part) for part in ("made", "low", "high")]
        if all(isinstance(part, list) and part and all(map(is_number, part)) for part in parts):
            first = {"speed": 1, "acceleration": 2}.get(name, 0)         # frame of the first value
            found.append({"key": "course_" + name, "title": title, "words": words, "newest": short(made[-1]),
                          "x": list(range(first, first + len(made))), "y": made, "low": low, "high": high,
                          "frames": first + len(made) - 1})
    return found


def facts(run: SimpleNamespace, step: int) -> list[str]:
    """Returns the line below the title, in parts."""
    steps, size = run.constants.get("STEPS"), run.constants.get("IMAGE_SIZE")
    found = [f"step {step:,.0f}" + (f" of {steps:,.0f}" if is_number(steps) and steps > 0 else "")]
    if run.constants.get("FOLDERS") == "clips" and run.rows and is_number(run.rows[-1].get("stage")):
        found.append(f"stage {run.rows[-1]['stage']:.0f} of 3")
    seen, seconds = columns(run.rows, "images_seen"), columns(run.rows, "seconds")[:, 0]
    if len(seen):
        found.append(f"{seen[-1, 0]:,.0f} images seen")
    if len(seconds):                             # counted from 0 at each start: the sum of the last line of each
        ends = np.append(np.diff(seconds) < 0, True)
        found.append(f"{duration(seconds[ends].sum())} of training")
    return found + ([f"{size:,.0f} px"] if is_number(size) else [])


# ------------------------------------------------------------------------------------- images

def picture(file: Path, size: tuple[int, int] | None = None, animated: bool = False) -> tuple[str, int, int] | None:
    """Returns (data URI, width, height) of a PNG or GIF as WebP; None if it is missing or damaged.

    size: (width, height) of the part at the top left to keep. animated: all frames of a GIF instead of the first.
    """
    try:
        return encoded(file, size, animated, file.stat().st_mtime_ns, file.stat().st_size)
    except Exception:       # Pillow raises OSError, SyntaxError, EOFError, struct.error, ... for damaged files
        return None


@functools.lru_cache(maxsize=1024)          # training writes the page again and again, with mostly the same sheets
def encoded(file, size, animated, _changed, _bytes):
    with Image.open(file, formats=["PNG", "GIF"]) as image:
        milliseconds = image.info.get("duration", 125)
        frames = [frame.convert("RGB") for frame in (ImageSequence.Iterator(image) if animated else [image])]
    frames = [frame.crop((0, 0, *size)) if size else frame for frame in frames]
    width, height = frames[0].size
    for side, quality in ENCODINGS:
        for frame in frames:
            frame.thumbnail((side, side))
        buffer = io.BytesIO()
        frames[0].save(buffer, "WEBP", quality=quality, method=2, save_all=True, append_images=frames[1:],
                       duration=milliseconds, loop=0)
        if buffer.tell() <= (VIDEO_BYTES if animated else SHEET_BYTES):
            break
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height


def points_in_time(sheets: dict[int, dict], count: int) -> tuple[list[dict], list[tuple]]:
    """Returns at most `count` evenly spaced points in time, such as {"step": 100, "generated": 3, ...}, with the index
    of each sheet in the returned list of pictures, or None. Equal sheets, such as the real images, are one picture."""
    points, index, steps = [], {}, sorted(sheets)
    for place in np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int):
        step, size = steps[place], None
        point = {"step": step}
        for kind in KINDS:
            file = sheets[step].get(kind)
            found = file and picture(file, size if kind == "alpha" else None)
            point[kind] = index.setdefault(found, len(index)) if found else None
            if found and kind == "generated":
                size = found[1:]                 # cuts off the scale beside alpha's sheet
        points.append(point)
    return points, list(index)


def newest_video(videos: dict[int, Path], courses: dict[int, Path]) -> dict | None:
    for step in sorted(videos, reverse=True):
        still, moving = picture(videos[step]), picture(videos[step], animated=True)
        if still and moving:
            return {"step": step, "still": still[0], "moving": moving[0], "width": still[1], "height": still[2],
                    "synthetic": step not in courses}
    return None


# ------------------------------------------------------------------------------------- the page

def page(run: SimpleNamespace, live: bool, count: int) -> str:
    """Returns the page's HTML, with at most `count` points in time."""
    step = int(max([0, *(row["step"] for row in run.rows[-1:]), *run.sheets]))
    steps, ranges = run.constants.get("STEPS"), constants_for_ranges(run.constants)
    defaults = {name: value for name, value in vars(config).items() if name.isupper()}
    points, sheets = points_in_time(run.sheets, count)
    data = {
        "name": run.name, "step": step, "written": int(time.time()), "reload_seconds": RELOAD_SECONDS if live else 0,
        "facts": facts(run, step), "progress": min(1, step / steps) if is_number(steps) and steps > 0 else None,
        "values": value_curves(run, step), "scores": score_curves(run.rows), "recent": RECENT,
        "points": points, "pictures": sheets, "video": newest_video(run.videos, run.courses),
        "courses": course_curves(run.courses),
        "alpha_scale": {"low": short(ranges.ALPHA_INIT / ranges.ALPHA_SPAN), "colours": pictures.HEAT_ANCHORS,
                        "high": short(ranges.ALPHA_INIT * ranges.ALPHA_SPAN)},
        "constants": [(name, json.dumps(value, ensure_ascii=False), json.dumps(defaults.get(name)),
                       (name, value) not in defaults.items()) for name, value in run.constants.items()],
        "skipped": run.skipped[:SKIPPED_SHOWN], "skipped_count": len(run.skipped),
        "system": (f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, "
                   f"{platform.platform(terse=True)}, {os.cpu_count()} CPU cores. "      # of the machine that trains
                   f"Checkpoints: {', '.join(run.checkpoints[-4:]) or 'none yet'}.")}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")      # no "</script>"
    return TEMPLATE.read_text(encoding="utf-8").replace("$data", text)


def write(folder: str | Path, live: bool = False) -> Path:
    """Writes folder/index.html from what the run's folder holds now, and returns its path.

    live: the page reloads itself every RELOAD_SECONDS. Raises InputError if there is no run, OSError if the page cannot
    be written; the page before then stays.
    """
    run, file = read_run(folder), Path(folder) / "index.html"
    for count in (POINTS_IN_TIME, 20, 10, 5, 2):            # fewer only if sheets are too many or too large
        text = page(run, live, count).encode()
        if len(text) < PAGE_BYTES:
            break
    with checkpoints.atomic_write(file) as handle:
        handle.write(text)
    return file


def start(argv: list[str] | None) -> None:
    parser = command_line.Parser("report.py", __doc__)
    parser.add_argument("run", help="a run's folder, such as runs/NAME")
    file = write(parser.parse_args(argv).run)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input, 1 if the page cannot be written."""
    return command_line.run_script("report.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
