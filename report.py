"""One html page of a run, for a browser: runs/NAME/index.html.

    python report.py runs/NAME

The page holds everything itself, pictures and curves included, and asks no network for anything. Read are the files
of the run's folder alone, whatever of them is there; no checkpoint is loaded. Its layout, style and script stand in
report_page.html.
"""

import argparse
import base64
import datetime
import filecmp
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import string
import sys
import time
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence

import checkpoints
import config
import pictures

TEMPLATE = Path(__file__).with_name("report_page.html")
PAGE_BYTES = 10_000_000     # the page is smaller, whatever the run
POINTS_IN_TIME = 40         # at most
RELOAD_SECONDS = 30         # of the page of a run that is being trained
KINDS = ("generated", "alpha", "real", "reconstructed")
# Widest side in pixels and quality of a sheet, the first whose WebP fits SHEET_BYTES (121 of them in base64: 8 MB).
ENCODINGS = ((640, 85), (640, 65), (512, 50), (384, 35), (256, 20))
SHEET_BYTES = 48_000
VIDEO_BYTES = 500_000

CURVE_BINS = 240            # points of a curve, about one a pixel; a longer log is averaged
RECENT = 5                  # logged lines whose median stands at the top of the page
EARLY = 500                 # steps before which a value may be anywhere
SKIPPED_SHOWN = 50          # files


class ReportError(Exception):
    """There is no run to report; the message is one line."""


class Curve(NamedTuple):
    """A value of metrics.jsonl: what it is, and low <= value <= high is healthy; "trend" in place of a range where
    only its direction says something."""
    key: str
    title: str
    words: str
    healthy: tuple | str | None = None
    short: str = ""             # the healthy range in words; with it the value stands at the top of the page too


def curves(c):
    """The curves of a run with constants c (a dict), in the page's order."""
    init, span = number_of(c, "ALPHA_INIT"), number_of(c, "ALPHA_SPAN")
    low, high = init / max(span, 1e-9), init * span
    return (
        Curve("score_gap", "Score gap", "How much higher the critic scores real pictures than generated ones. Large in "
              "the first steps, then between 2 and 10; below 0 the critic takes fakes for real.", (0, 10),
              "above 0, mostly 2 to 10"),
        Curve("gradient_norm", "Gradient norm", "How steep the critic is where the penalty measures it. Best a little "
              "above 1. Above 3 for long it runs away; below 0.5 it tells the generator nothing.", (0.9, 2),
              "about 1 to 2"),
        Curve("wasserstein", "Wasserstein estimate", "Score gap over gradient norm: how far generated pictures are "
              "from real ones, as the critic sees it. Should fall, over thousands of steps.", "trend", "should fall"),
        Curve("reconstruction", "Reconstruction error", "Mean absolute difference between a picture and its "
              "reconstruction, values from \u22121 to 1. Should fall: blobs at 0.3, clear shapes at 0.1.", "trend",
              "should fall"),
        Curve("kl", "KL divergence", "How many nats the encoder says about a picture, all latent dimensions together. "
              "Tens to hundreds; near 0 it has stopped saying anything.", (10, 1000), "10 to 1,000 nats"),
        Curve("posterior_variance", "Posterior variance", "Mean of mu\u00b2 + sigma\u00b2. Near 1 encoded pictures "
              "and noise fill the same part of latent space, so samples can be as good as reconstructions.", (0.5, 2),
              "near 1"),
        Curve("alpha_mean", "Alpha", f"Steepness of the last tanh: its mean, and the band from the least to the "
              f"greatest of a batch. It may move from {short(low)} to {short(high)}; a mean that rests at either end "
              "is stuck.", (1.1 * low, high / 1.1) if span > 1 else None, f"inside {short(low)} to {short(high)}"),
        Curve("alpha_spread", "Alpha within a picture", "Standard deviation of alpha over the places of one picture. "
              "At 0 the Transformer treats all places alike; above, it picks out some."),
        Curve("picture_spread", "Picture spread", "How different generated pictures are from one another, real ones "
              "being 1. From 0.5 to 1; below 0.05 they are all the same picture.", (0.5, 1.1), "0.5 to 1"),
        Curve("critic_loss", "Critic loss", "What the critic minimises, penalty included. It jumps about; after the "
              "start it stays between minus the score gap and 0."),
        Curve("generator_loss", "Generator loss", "What VAE and Transformer minimise. The reconstruction error is most "
              "of it, so it falls as that does; its height says little."),
        Curve("images_per_second", "Images a second", "Speed of training since the line before, samples and "
              "checkpoints included. Level; where it drops, the machine was busy with something else.", None,
              "should be level"),
        Curve("skipped_updates", "Skipped updates", "Updates that were not applied, since a gradient was not finite. "
              "Stays at 0; a few are harmless, a steep rise is not.", (0, 0), "should be 0"),
        Curve("rollbacks", "Rollbacks", "Times that the run went back to its last good checkpoint and halved its "
              "learning rates. Stays at 0.", (0, 0)),
    )


ONLY_IF_ANY = ("skipped_updates", "rollbacks")          # no curve where they stay at 0
EVALUATION_TITLES = {
    "evaluate_frechet": "Frechet distance", "evaluate_kid": "KID \u00d7 1000",
    "evaluate_kid_error": "KID, standard error", "evaluate_precision": "Precision", "evaluate_recall": "Recall",
    "evaluate_sliced_wasserstein": "Sliced Wasserstein distance"}
EVALUATION_WORDS = {
    "evaluate_precision": "Share of the generated pictures that lie among real ones. Higher is better.",
    "evaluate_recall": "Share of the real pictures that lie among generated ones. Higher is better."}


# ------------------------------------------------------------------------------------- the files of a run

def read_run(folder):
    """What a run's folder holds, each part empty where its file is missing or can't be read.

    Raises ReportError where it is no run's folder: neither config.json nor metrics.jsonl there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; give a run's, such as runs/NAME")
    if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder}: no run here, neither config.json nor metrics.jsonl; give a folder such as "
                          "runs/NAME")
    constants = parsed(read_text(folder / "config.json"))
    sheets, videos = {}, {}
    for file in (folder / "samples").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)_(?:(\w+)\.png|video\.gif)", file.name):
            if match[2] is None:
                videos[int(match[1])] = file
            elif match[2] in KINDS:
                sheets.setdefault(int(match[1]), {})[match[2]] = file
    return SimpleNamespace(
        name=folder.resolve().name, constants=constants, rows=read_metrics(folder / "metrics.jsonl"), sheets=sheets,
        videos=videos, skipped=[line for line in read_text(folder / "skipped.txt").splitlines() if line.strip()],
        checkpoints=[file.name for file in checkpoints.step_files(folder / "checkpoints")])


def read_text(file):
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parsed(text):
    """The dict that a JSON text holds; {} for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(file):
    """The lines of metrics.jsonl that have a step, by step; an unfinished or foreign line is passed over."""
    rows = [parsed(line) for line in read_text(file).splitlines()]
    rows = [row for row in rows if is_number(row.get("step")) and row["step"] >= 0]
    return sorted(rows, key=lambda row: row["step"])


def is_number(value):
    """A number that a plot can take: finite, and no larger than a float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


def number_of(constants, name):
    """A run's constant where it is a number, else config.py's."""
    value = constants.get(name)
    return value if is_number(value) else getattr(config, name)


def column(rows, *keys):
    """(n, 1 + len(keys)): step and values of the rows that hold a number for every key."""
    found = [[row["step"], *(row[key] for key in keys)] for row in rows if all(is_number(row.get(k)) for k in keys)]
    return np.array(found, dtype=np.float64).reshape(-1, 1 + len(keys))


def seconds_trained(rows):
    """Seconds of training; the log's own count begins again at each start."""
    seconds = column(rows, "seconds")[:, 1]
    ends = [*np.flatnonzero(np.diff(seconds) < 0), len(seconds) - 1] if len(seconds) else []
    return sum(seconds[i] for i in ends)


# ------------------------------------------------------------------------------------- words

def short(value):
    """A number in about three digits."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "\u2212")


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def curve_of_evaluation(key):
    title = EVALUATION_TITLES.get(key, key.removeprefix("evaluate_").replace("_", " ").capitalize())
    return Curve(key, title, EVALUATION_WORDS.get(key, "Lower is better; compare only with numbers of as many "
                                                       "pictures of one size."))


def state_of(curve, values, step):
    """(word, sign) for a curve's newest values (n,): healthy, early, look at it; or its direction."""
    if curve.healthy is None:
        return "", ""
    if curve.healthy == "trend":
        quarter = len(values) // 4
        if quarter < 2:
            return "early", "\u25cb"
        before, now = values[-2 * quarter:-quarter].mean(), values[-quarter:].mean()
        change = (now - before) / max(abs(before), 1e-9)
        if abs(change) < 0.02:
            return "level", "\u2192"
        return ("falling", "\u2198") if change < 0 else ("rising", "\u2197")
    if curve.healthy[0] <= np.median(values[-RECENT:]) <= curve.healthy[1]:
        return "healthy", "\u25cf"
    return ("early", "\u25cb") if step < EARLY else ("look at it", "\u25b2")


# ------------------------------------------------------------------------------------- curves

WIDTH, HEIGHT = 340, 150                            # of a plot, in its own units, about pixels
LEFT, RIGHT, TOP, BOTTOM = 40, 332, 6, 130          # of the area where curves are


def thin(steps, values, low, high, bins=CURVE_BINS):
    """Four arrays (n,) of steps in order, values and band -> four of at most `bins`: means over equal parts of the
    steps, with the least of low and the greatest of high there."""
    if len(steps) <= bins:
        return steps, values, low, high
    part = np.minimum((steps - steps[0]) / max(steps[-1] - steps[0], 1) * bins, bins - 1).astype(int)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    return (np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts,
            np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts))


def limits(values):
    """(low, high) of a plot: all values, unless a few lie far out; those would press the rest flat."""
    near = np.percentile(values, (2, 98))
    room = max(0.5 * (near[1] - near[0]), 1e-9 * abs(near[1]))
    low, high = max(values.min(), near[0] - room), min(values.max(), near[1] + room)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def ticks(low, high, count):
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(curve, rows, last_step):
    """(figure as html, {"x": steps, "y": values}) of one curve, or None where the log has nothing for it."""
    keys = (curve.key, "alpha_min", "alpha_max") if curve.key == "alpha_mean" else (curve.key,) * 3
    table = column(rows, *keys)
    if len(table) == 0:
        return None
    newest, least, greatest = table[-1, 1], table[:, 2].min(), table[:, 3].max()
    steps, values, low, high = thin(*table.T)
    bottom, top = limits(np.concatenate([values, low, high]))
    x = LEFT + steps / last_step * (RIGHT - LEFT)

    def y(value):
        return BOTTOM - (np.clip(value, bottom, top) - bottom) / (top - bottom) * (BOTTOM - TOP)

    def points(xs, ys):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys))

    parts = []
    if isinstance(curve.healthy, tuple):
        lower, upper = y(curve.healthy[0]), y(curve.healthy[1])
        if lower > upper:
            parts.append(f'<rect class="good" x="{LEFT}" y="{upper:.1f}" width="{RIGHT - LEFT}" '
                         f'height="{lower - upper:.1f}"/>')
    for tick in ticks(bottom, top, 4):
        parts.append(f'<path class="rule" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
                     f'<text x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(0, last_step, 4):
        at = LEFT + tick / last_step * (RIGHT - LEFT)
        anchor = "end" if at > RIGHT - 12 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{tick:,.0f}</text>')
    if (high > low).any():
        parts.append(f'<polygon class="band" points="{points(x, y(high))} {points(x[::-1], y(low[::-1]))}"/>')
    if len(x) == 1:
        parts.append(f'<circle class="dot" cx="{x[0]:.1f}" cy="{y(values)[0]:.1f}" r="2"/>')
    parts.append(f'<polyline class="line" points="{points(x, y(values))}"/>')
    if greatest > top:
        parts.append(f'<text class="out" x="{RIGHT - 6}" y="{TOP + 9}" text-anchor="end">\u25b2 up to '
                     f'{short(greatest)}</text>')
    if least < bottom:
        parts.append(f'<text class="out" x="{RIGHT - 6}" y="{BOTTOM - 4}" text-anchor="end">\u25bc down to '
                     f'{short(least)}</text>')
    label = (f"{curve.title} over {len(table)} logged steps: first {short(table[0, 1])}, newest {short(newest)}, least "
             f"{short(least)}, greatest {short(greatest)}")
    figure = (f'<figure class="curve" id="{escape(curve.key)}"><h3>{escape(curve.title)} '
              f'<output>{short(newest)}</output></h3>'
              f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
              f'<path class="at" d="M{LEFT} {TOP}V{BOTTOM}"/><path class="hover" d="M{LEFT} {TOP}V{BOTTOM}"/></svg>'
              f"<figcaption>{escape(curve.words)}</figcaption></figure>")
    return figure, {"x": [round(s) for s in steps], "y": [short(v) for v in values]}


# ------------------------------------------------------------------------------------- pictures

def choose(items, count):
    """At most `count` of a list, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)][-count:]


def picture(file, size=None, animated=False):
    """A file as (data URI, width, height), WebP, cut to the top left `size` (width, height) where given, of a GIF the
    first frame or with animated all; None where it is missing or damaged."""
    try:
        stat = file.stat()
        return encoded(file, size, animated, stat.st_mtime_ns, stat.st_size)
    except Exception:       # OSError, SyntaxError, EOFError, struct.error, ...: all mean a file that is no picture
        return None


@functools.lru_cache(maxsize=1024)          # a training writes the page again and again, of mostly the same sheets
def encoded(file, size, animated, _changed, _bytes):
    with Image.open(file, formats=["PNG", "GIF"]) as image:
        duration = image.info.get("duration", 125)          # ms a frame
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)] if animated else [
            image.convert("RGB").crop((0, 0, *(size or image.size)))]
    options = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0} if animated else {}
    width, height = frames[0].size
    for side, quality in ENCODINGS:
        for frame in frames:
            frame.thumbnail((side, side))
        buffer = io.BytesIO()
        frames[0].save(buffer, "WEBP", quality=quality, method=2, **options)
        if buffer.tell() <= (VIDEO_BYTES if animated else SHEET_BYTES):
            break
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height


def points_in_time(sheets, steps):
    """([{"step": 100, "generated": 3, ...}], [picture]): the sheets of each step by their place among the pictures,
    None where there is none. Equal originals are one picture."""
    points, place, original = [], {}, None
    for step in steps:
        files = dict(sheets[step])
        if original and "real" in files and same(files["real"], original):
            files["real"] = original
        original = files.get("real", original)
        made = picture(files["generated"]) if "generated" in files else None
        point = {"step": step}
        for kind in KINDS:
            size = made[1:] if made and kind == "alpha" else None       # cuts the scale beside alpha's sheet off
            found = picture(files[kind], size) if kind in files else None
            point[kind] = place.setdefault(found, len(place)) if found else None
        points.append(point)
    return points, list(place)


def same(file, other):
    try:
        return filecmp.cmp(file, other, shallow=False)
    except OSError:
        return False


# ------------------------------------------------------------------------------------- parts of the page

def facts(run, step):
    """The line under the headline."""
    last, c = run.rows[-1] if run.rows else {}, run.constants
    steps = c.get("STEPS")
    found = [f"step <b>{step:,.0f}</b>" + (f" of {steps:,.0f}" if is_number(steps) and steps else "")]
    if is_number(last.get("images_seen")):
        found.append(f"<b>{last['images_seen']:,.0f}</b> images seen")
    if seconds := seconds_trained(run.rows):
        found.append(f"<b>{duration(seconds)}</b> of training")
    if is_number(c.get("IMAGE_SIZE")):
        found.append(f"{c['IMAGE_SIZE']:,.0f} px")
    return "".join(f"<li>{fact}</li>" for fact in found)


def progress(run, step):
    steps = run.constants.get("STEPS")
    if not is_number(steps) or steps <= 0:
        return ""
    return f'<progress max="1" value="{min(1, step / steps):.4f}" aria-label="steps done"></progress>'


def vitals(run, plotted, step):
    """The newest values, each beside what is healthy, with a link to its curve where it is plotted."""
    found = []
    for curve in curves(run.constants):
        values = column(run.rows, curve.key)[:, 1]
        if not curve.short or len(values) == 0:
            continue
        word, sign = state_of(curve, values, step)
        state = f'<span class="state {word.split()[0]}"><i aria-hidden="true">{sign}</i> {word}</span>' if word else ""
        link = f' href="#{curve.key}"' if curve.key in plotted else ""
        found.append(f"<li><a{link}>{escape(curve.title)}</a><b>{short(np.median(values[-RECENT:]))}</b>{state}"
                     f"<small>{escape(curve.short)}</small></li>")
    if not found:
        return '<p class="empty">No line in metrics.jsonl yet: the first comes after LOG_EVERY steps.</p>'
    return (f'<ul class="vitals">{"".join(found)}</ul><p class="note">Medians of the last {RECENT} logged steps, below '
            f"each what is healthy. Before step {EARLY} a value may still be anywhere.</p>")


def table(head, rows):
    """rows of cells that are html already."""
    cells = "".join(f'<th scope="col">{text}</th>' for text in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def constants_table(c):
    """The constants that differ from config.py's, and all of them folded away."""
    rows, changed = [], []
    for name, value in c.items():
        default = getattr(config, name, None)
        same_value, known = value == default, hasattr(config, name)
        words = "" if same_value else f"<code>{escape(json.dumps(default))}</code>" if known else "not in config.py"
        mark = "{}" if same_value else "<mark>{}</mark>"
        rows.append((mark.format(escape(name)), f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>", words))
        if not same_value:
            changed.append(rows[-1])
    head = ("constant", "this run", "config.py")
    top = table(head, changed) if changed else '<p class="note">All as in config.py.</p>'
    if not c:
        return '<p class="empty">config.json is missing or can\'t be read.</p>'
    return (f'{top}<details id="all-constants"><summary>All {len(rows)} constants</summary>{table(head, rows)}'
            "</details>")


def skipped_list(lines):
    if not lines:
        return '<p class="note">Every image file could be used.</p>'
    more = f'<p class="note">and {len(lines) - SKIPPED_SHOWN:,} more in skipped.txt</p>' if len(
        lines) > SKIPPED_SHOWN else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:SKIPPED_SHOWN])
    return (f'<details id="skipped-files"><summary>{len(lines):,} image file{"s" * (len(lines) > 1)} could not be '
            f'used</summary><ul class="files">{items}</ul>{more}</details>')


def system_table(run):
    """The machine that writes the page: in a training the one that trains."""
    versions = []
    for package in ("torch", "torchvision", "numpy", "pillow"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    rows = [("Python", platform.python_version()), ("Packages", ", ".join(versions)),
            ("System", platform.platform(terse=True)), ("CPU cores", str(os.cpu_count())),
            ("Device", f"{run.constants.get('DEVICE', 'unknown')} (the constant DEVICE)"),
            ("Checkpoints", ", ".join(run.checkpoints[-4:]) or "none yet")]
    body = "".join(f'<tr><th scope="row">{escape(a)}</th><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def evaluation(run, last_step):
    """(html, data of its curves) of every evaluate_ value in the log."""
    keys = sorted({key for row in run.rows for key in row if key.startswith("evaluate_")})
    keys = [key for key in keys if len(column(run.rows, key))]
    if not keys:
        return "", {}
    shown = [curve_of_evaluation(key) for key in keys]
    rows = [(f"{escape(curve.title)}", f"{column(run.rows, curve.key)[-1, 1]:.4g}",
             f"{column(run.rows, curve.key)[-1, 0]:,.0f}") for curve in shown]
    figures, data = figures_of([curve for curve in shown if not curve.key.endswith("_error")], run.rows, last_step)
    return (f'<section aria-labelledby="evaluation"><h2 id="evaluation">Evaluation</h2>'
            f'{table(("measure", "newest", "at step"), rows)}<div class="curves">{figures}</div></section>'), data


def figures_of(shown, rows, last_step):
    """(html, {key: data}) of all curves that have something to show."""
    plots = {curve.key: plot(curve, rows, last_step) for curve in shown}
    plots = {key: found for key, found in plots.items() if found}
    return "".join(found[0] for found in plots.values()), {key: found[1] for key, found in plots.items()}


SHEETS = {
    "generated": ("Generated", "the same noise at each step, through the averaged weights"),
    "alpha": ("Alpha that made them", "$scale"),
    "real": ("Originals", "held out from training where the set is large enough"),
    "reconstructed": ("Reconstructed", "the originals through encoder, decoder and layer")}


def samples(run, count):
    """(html, points, data URIs): the slider and the sheets that it changes, at most `count` points in time."""
    points, found = points_in_time(run.sheets, choose(sorted(run.sheets), count))
    if not found:
        return '<p class="empty">No sample sheets yet.</p>', [], []
    figures = []
    for kind, (title, words) in SHEETS.items():
        sizes = [found[point[kind]][1:] for point in points if point[kind] is not None]
        if sizes:
            width, height = sizes[-1]
            figures.append(f'<figure class="sheet"><figcaption><b>{title}</b> '
                           f'<span>{words.replace("$scale", alpha_scale(run.constants))}</span></figcaption>'
                           f'<img id="{kind}" width="{width}" height="{height}" alt=""></figure>')
    last = len(points) - 1
    slider = (f'<div class="slider"><button id="play" type="button">Play</button>'
              f'<label for="time">Step</label><input id="time" type="range" min="0" max="{last}" value="{last}" '
              f'step="1"><output id="at" for="time">{points[-1]["step"]:,}</output></div>')
    return f'{slider}<div class="sheets">{"".join(figures)}</div>', points, [uri for uri, _, _ in found]


def alpha_scale(c):
    """The colours of alpha's sheets with their numbers, equal ratios at equal distances."""
    init, span = number_of(c, "ALPHA_INIT"), number_of(c, "ALPHA_SPAN")
    colours = ",".join("rgb({},{},{})".format(*anchor) for anchor in pictures.HEAT_ANCHORS)
    bar = f'<i class="scale" style="background:linear-gradient(90deg,{colours})"></i>'
    return f"{short(init / max(span, 1e-9))} {bar} {short(init * span)}"


def video(run):
    """The newest synthetic video: its first frame, which the script sets going where motion is welcome."""
    for step in sorted(run.videos, reverse=True):
        still, moving = picture(run.videos[step]), picture(run.videos[step], animated=True)
        if still and moving:
            uri, width, height = still
            return (f'<figure class="video"><img id="video" src="{uri}" data-moving="{moving[0]}" width="{width}" '
                    f'height="{height}" alt="Synthetic video of four generated pictures at step {step:,}">'
                    f'<figcaption><button id="move" type="button">Play</button> Step {step:,}. What the Transformer '
                    "reads to set alpha, for four pictures: each itself and then copies of it, more shifted, "
                    "brightened and noisy from frame to frame (shown without the noise).</figcaption></figure>")
    return '<p class="empty">No video yet.</p>'


# ------------------------------------------------------------------------------------- the page

def page(run, live, count):
    """The whole html text, with at most `count` points in time."""
    step = max([0, *(row["step"] for row in run.rows[-1:]), *run.sheets])
    last_step = max(1, step)
    shown = [curve for curve in curves(run.constants)
             if curve.key not in ONLY_IF_ANY or column(run.rows, curve.key)[:, 1].any()]
    figures, data = figures_of(shown, run.rows, last_step)
    scores, data_of_scores = evaluation(run, last_step)
    slider, points, uris = samples(run, count)
    now = int(time.time())                     # the page counts minutes; whole seconds keep its length the same
    script_data = {"points": points, "pictures": uris, "curves": {**data, **data_of_scores}, "last_step": last_step,
                   "left": LEFT, "right": RIGHT, "reload_seconds": RELOAD_SECONDS if live else 0, "written": now}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(run.name), step=f"{step:,.0f}", facts=facts(run, step), progress=progress(run, step),
        live='<span class="live">training</span>' if live else "",
        written=datetime.datetime.fromtimestamp(now).strftime("%Y-%m-%d %H:%M:%S"),
        vitals=vitals(run, data, step), samples=slider, evaluation=scores,
        curves=figures or '<p class="empty">Nothing logged yet.</p>', video=video(run),
        constants=constants_table(run.constants), skipped=skipped_list(run.skipped), system=system_table(run),
        data=json.dumps(script_data, separators=(",", ":")).replace("<", "\\u003c"))


def write(folder, live=False):
    """Writes folder/index.html of what the run's folder holds now, and returns its path.

    live: the page loads itself anew each RELOAD_SECONDS, for a run that goes on. The page is whole under its name, or
    the one before stays. Raises ReportError where there is no run, OSError where the page can't be written.
    """
    run, file = read_run(folder), Path(folder) / "index.html"
    for count in (POINTS_IN_TIME, 20, 10, 5, 2):            # fewer only where sheets are too many or too large
        text = page(run, live, count).encode()
        if len(text) < PAGE_BYTES:
            break
    with checkpoints.atomic_write(file) as handle:
        handle.write(text)
    return file


def start(argv):
    def refuse(message):
        raise ReportError(f"{message}; give the folder of a run, such as runs/NAME")

    parser = argparse.ArgumentParser("report.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    parser.error = refuse
    file = write(parser.parse_args(argv).run)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return 0


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what), 1 where the page can't be written."""
    try:
        return start(argv)
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: {error.filename or argv}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
