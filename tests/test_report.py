"""The page of a run: what it holds, what it does with a long log and a damaged run, and how it behaves in a browser."""

import base64
import io
import json
import os
import re
import time

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

import config
import pictures
import report

pytest_plugins = ["chromium"]


def draw_sheets(folder, i, step, side=16):
    """Writes the sheets and the video of a step; all sheets differ in colour."""
    name = folder / "samples" / f"step_{step:08d}"
    for kind, colour in colours(i).items():
        sheet = np.full((2 * side, 2 * side, 3), colour, np.uint8)
        if kind == "alpha":
            sheet = pictures.beside(sheet, np.zeros((2 * side, 20, 3), np.uint8))        # where the scale is
        pictures.save_picture(f"{name}_{kind}.png", sheet)
    pictures.save_video(f"{name}_video.gif", [np.full((side, side, 3), 40 * t, np.uint8) for t in range(4)], 8)


def colours(i):
    return {"generated": (200, 10 * i, 0), "alpha": (0, 200, 10 * i), "real": (90, 90, 90),
            "reconstructed": (10 * i, 0, 200)}


def make_run(folder, steps=(), side=16, lines=60, **values):
    """A run's folder as training leaves it. values: constants or functions of the step, for metrics.jsonl."""
    folder.mkdir()
    for i, step in enumerate(steps):
        draw_sheets(folder, i, step, side)
    values = {"score_gap": lambda step: 5 + step / 100, "alpha_mean": 3.0, "alpha_min": 2.0, "alpha_max": 4.0, **values}
    with open(folder / "metrics.jsonl", "w") as log:
        for step in range(20, 20 * lines + 1, 20):
            row = {key: value(step) if callable(value) else value for key, value in values.items()}
            log.write(json.dumps({"step": step, **row}) + "\n")
    (folder / "config.json").write_text(json.dumps({"IMAGE_SIZE": side, "ALPHA_INIT": 3.0, "STEPS": 1000}))
    return folder


def page_data(folder, live=False):
    """Writes the page and returns the data that it draws."""
    page = report.write(folder, live).read_text()
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def curves_of(folder):
    return {curve["key"]: curve for curve in page_data(folder)["values"]}


def decoded(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "first", steps=(0, 50, 100))


# ------------------------------------------------------------------------------------- images and constants

def test_real_run_becomes_one_page(run, tmp_path, capsys):
    assert run("--steps", "2", "--sample-every", "1", "--log-every", "1") == 0
    folder = tmp_path / "runs" / "photos"
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    file = folder / "index.html"
    assert capsys.readouterr().out == f"{file}: {file.stat().st_size / 1e6:.2f} MB\n"
    assert "default-src 'none'" in file.read_text()              # the browser refuses all requests
    data = page_data(folder)
    assert [point["step"] for point in data["points"]] == [0, 1, 2]
    for point in data["points"]:
        assert point["motion"] is None                           # a run on still images
        for kind in set(report.KINDS) - {"motion", "classes"}:
            with Image.open(folder / "samples" / f"step_{point['step']:08d}_{kind}.png") as sheet, \
                    decoded(data["pictures"][point[kind]][0]) as shown:
                if kind == "alpha":                              # the page draws the scale itself
                    assert shown.size == tuple(data["pictures"][point["generated"]][1:])
                    sheet = sheet.crop((0, 0, *shown.size))
                assert shown.size == sheet.size
                assert np.abs(np.asarray(shown, int) - np.asarray(sheet.convert("RGB"), int)).mean() < 12
    size = SMALL[SMALL.index("--image-size") + 1]
    assert ["IMAGE_SIZE", size, str(config.IMAGE_SIZE), True] in data["constants"]
    assert ["ALPHA_INIT", "3.0", "3.0", False] in data["constants"]


def test_points_in_time_are_even_and_fewer_where_the_page_would_be_too_large(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", steps=range(0, 3000, 50), side=8)
    steps = [point["step"] for point in page_data(folder)["points"]]
    assert (len(steps), steps[0], steps[-1]) == (40, 0, 2950) and set(np.diff(steps)) == {50, 100}
    monkeypatch.setattr(report, "PAGE_BYTES", (folder / "index.html").stat().st_size - 1)
    assert [point["step"] for point in page_data(folder)["points"]][::19] == [0, 2950]


def test_largest_sheets_of_noise_fit_forty_points_into_the_limit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1546, 1546, 3), np.uint8)
    pictures.save_picture(make_run(tmp_path / "run") / "samples" / "step_00000000_generated.png", noise)
    (uri, width, height), = page_data(tmp_path / "run")["pictures"]
    assert (width, height) == (1546, 1546) and max(decoded(uri).size) <= 640
    assert (3 * report.POINTS_IN_TIME + 1) * len(uri) + report.VIDEO_BYTES * 4 / 3 < 0.95 * report.PAGE_BYTES


def test_equal_sheets_are_kept_once_and_a_changed_one_is_read_again(folder):
    assert len({point["real"] for point in page_data(folder)["points"]}) == 1
    pictures.save_picture(folder / "samples" / "step_00000100_real.png", np.zeros((32, 32, 3), np.uint8))
    data = page_data(folder)
    first, second, changed = (point["real"] for point in data["points"])
    assert first == second != changed and np.asarray(decoded(data["pictures"][changed][0])).mean() < 3


def test_video_keeps_its_frames_and_their_time(folder):
    found = page_data(folder)["video"]
    moving = decoded(found["moving"])
    moving.load()
    assert moving.n_frames == 4 and moving.info["duration"] == pytest.approx(1000 / 8, abs=5)
    assert found["step"] == 100 and decoded(found["still"]).n_frames == 1


# ------------------------------------------------------------------------------------- the log

def test_small_log_is_shown_line_by_line_without_its_last_half_line(tmp_path):
    folder = make_run(tmp_path / "run", kl=lambda step: 3 * step)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 1220, "k')
    curves, steps = curves_of(folder), list(range(20, 1201, 20))
    assert curves["kl"]["x"] == steps and curves["kl"]["y"] == [3 * step for step in steps]
    assert set(curves["alpha_mean"]["low"]) == {2} and set(curves["alpha_mean"]["high"]) == {4}


def test_long_log_is_thinned_while_it_is_read(tmp_path, monkeypatch):
    folder, parsed = make_run(tmp_path / "run"), []
    with open(folder / "metrics.jsonl", "w") as log:
        for i in range(1, 30_001):
            seconds = 0.5 * (i % 10_000 or 10_000)               # three starts of 5,000 s
            log.write(json.dumps({"step": 20 * i, "score_gap": i, "kl": i % 3, "seconds": seconds}) + "\n")
            if i % 1000 == 0:
                log.write(json.dumps({"step": 20 * i, "evaluate_kid": i}) + "\n")
    loads, before = json.loads, time.process_time()
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    report.write(folder)
    assert time.process_time() - before < 5                      # of CPU time; measured: 0.3 s for 100,000 lines
    assert len(parsed) < 2500
    monkeypatch.undo()
    data, curves = page_data(folder), curves_of(folder)
    assert data["scores"][0]["y"] == list(range(1000, 30_001, 1000))
    assert curves["kl"]["newest"] == "1" and curves["score_gap"]["newest"] == "29,998"       # of the last five lines
    assert len(curves["kl"]["x"]) == report.CURVE_POINTS
    assert set(curves["kl"]["low"][:-2]) == {0} and set(curves["kl"]["high"][:-2]) == {2}
    np.testing.assert_allclose(curves["score_gap"]["y"], np.array(curves["score_gap"]["x"]) / 20, rtol=0.01)
    assert "4.2 h of training" in data["facts"]                  # 15,000 s


@pytest.mark.parametrize(("key", "value", "lines", "state"), [
    ("gradient_norm", 1.25, 60, "healthy"), ("gradient_norm", 0.05, 60, "look at it"), ("gradient_norm", 9, 5, "early"),
    ("gradient_norm", lambda step: 40 if step in (1140, 1200) else 1.2, 60, "healthy"),       # outliers
    ("reconstruction", lambda step: 0.4 - step / 5000, 40, "falling"), ("reconstruction", 0.2, 40, "level"),
    ("reconstruction", lambda step: 0.1 + step / 5000, 40, "rising"), ("reconstruction", 0.2, 3, "early"),
    ("reconstruction", 1.5, 40, "look at it")])
def test_state_of_a_value_is_that_of_its_newest_lines(tmp_path, key, value, lines, state):
    assert curves_of(make_run(tmp_path / "run", lines=lines, **{key: value}))[key]["state"] == state


def test_healthy_ranges_are_those_of_the_runs_size(tmp_path):
    gaps = [curves_of(make_run(tmp_path / str(side), side=side, score_gap=20))["score_gap"] for side in (64, 128)]
    assert [gap["state"] for gap in gaps] == ["look at it", "healthy"]
    assert gaps[0]["healthy"][1] < 20 < gaps[1]["healthy"][1]


def test_scores_are_curves_with_their_standard_error(tmp_path):
    folder = make_run(tmp_path / "run", evaluate_frechet=lambda step: 100 - step / 200, evaluate_kid=3,
                      evaluate_kid_error=1.5, evaluate_new_one=7)
    scores = {curve["title"]: curve["newest"] for curve in page_data(folder)["scores"]}
    assert scores == {"Frechet distance": "94", "KID \u00d7 1000": "3 \u00b1 1.5", "New one": "7"}


def test_counters_are_shown_only_if_they_moved(tmp_path):
    curves = curves_of(make_run(tmp_path / "a", skipped_updates=0, rollbacks=lambda step: step // 300, lr_scale=0.5))
    assert "skipped_updates" not in curves and {"rollbacks", "lr_scale"} <= set(curves)


# ------------------------------------------------------------------------------------- damaged runs

@pytest.mark.parametrize(("name", "content"), [                  # None: the file is missing
    ("config.json", None), ("metrics.jsonl", None), ("samples/*", None), ("samples/*alpha.png", None),
    ("samples/*generated.png", None), ("samples/*.gif", None), ("samples/*50_generated.png", b"no picture"),
    ("samples/*50_real.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("samples/*100_video.gif", b"GIF89a"),
    ("config.json", b"[1]"), ("config.json", b"\xff\xfe{"), ("config.json", b"[" * 100_000),
    ("config.json", b'{"STEPS": "many", "ALPHA_INIT": null, "ALPHA_SPAN": [], "IMAGE_SIZE": true, "X": {}}'),
    ("config.json", b'{"STEPS": 0, "ALPHA_SPAN": 0, "X": NaN}'),
    ("config.json", b'{"STEPS": 1e999, "ALPHA_INIT": -1, "ALPHA_SPAN": 1e300, "__builtins__": 1}'),
    ("metrics.jsonl", b'{"step": 20, "kl": null}\n{"step": 40, "kl": NaN}\n{"step": 60, "kl": 1e300}\n'),
    ("metrics.jsonl", b'{"step": "20", "kl": 3}\n{"kl": 3}\n[]\n7\n\x00\xff\n{"step": -5}\n{"step": 1e400}\n'),
    ("metrics.jsonl", b'{"step": 20, "kl": "<b>", "score_gap": true, "alpha_mean": 3, "evaluate_x": "y"}\n'),
    ("metrics.jsonl", b'{"step": 0, "kl": 0.0}\n{"step": 3e37, "kl": -3e37, "seconds": 3e37}\n')])
def test_what_is_missing_or_damaged_is_left_out(folder, name, content):
    for file in list(folder.glob(name)):
        file.unlink() if content is None else file.write_bytes(content)
    data = page_data(folder)
    assert not re.search(r'"(nan|inf|-inf)"', json.dumps(data))
    for point in data["points"]:
        assert all(point[kind] is None or point[kind] < len(data["pictures"]) for kind in report.KINDS)


@pytest.mark.parametrize("arguments", [["nowhere"], ["."], []])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report.py: ")
    assert os.listdir(tmp_path) == []


def test_page_that_cannot_be_written_leaves_the_one_before(folder, monkeypatch):
    before = report.write(folder).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert report.main([str(folder)]) == 1
    assert (folder / "index.html").read_bytes() == before and not list(folder.glob("*.part"))


def test_only_a_live_page_reloads_and_the_first_skipped_files_are_named(folder):
    (folder / "skipped.txt").write_text("".join(f"photo{i:03d}.jpg: broken\n" for i in range(73)))
    data = page_data(folder)
    assert data["reload_seconds"] == 0 and page_data(folder, live=True)["reload_seconds"] == 30
    assert data["skipped_count"] == 73 and data["skipped"][::49] == ["photo000.jpg: broken", "photo049.jpg: broken"]


# ------------------------------------------------------------------------------------- in a browser

READY = "document.readyState === 'complete'"      # `time`, `at`, `play` and get(id) are names of the page's script


def assert_shown(browser, i, step):
    """Compares the page's step, and the colour in the middle of each sheet, with draw_sheets."""
    assert browser.value("at.value") == str(step)
    for kind, colour in colours(i).items():
        shown = browser.value(f"""get("{kind}").decode().then(() => {{
            const context = document.createElement("canvas").getContext("2d");
            context.drawImage(get("{kind}"), -8, -8);
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }})""")
        np.testing.assert_allclose(shown, colour, atol=8, err_msg=kind)


def test_browser_reports_errors_and_requests(browser, tmp_path):
    """The tests below rely on this."""
    (tmp_path / "index.html").write_text("<img src='http://127.0.0.1:9/a.png'><img src='b.png'><script>no()</script>")
    browser.open((tmp_path / "index.html").as_uri())
    found = str(browser.complaints())
    assert "127.0.0.1:9/a.png" in found and "b.png" in found and "no is not defined" in found


def test_slider_and_keys_change_the_images(browser, folder):
    browser.open(report.write(folder).as_uri())
    assert_shown(browser, 2, 100)                                # the newest first
    line = "document.querySelector('#score_gap .at').getBoundingClientRect().left"
    newest = browser.value(line)
    browser.value("time.focus()")
    browser.press("ArrowLeft")
    assert_shown(browser, 1, 50)
    assert browser.value(line) < newest                          # the curves mark the same step
    browser.press("Home")
    assert_shown(browser, 0, 0)
    browser.value("play.click()")
    browser.wait("at.value === '100' && play.textContent === 'Play'")
    assert browser.complaints() == []


def test_curves_are_drawn_to_scale(browser, tmp_path):
    browser.open(report.write(make_run(tmp_path / "run", kl=lambda step: 3 * step, reconstruction=lambda step: (
        900 if step == 20 else 0.2 + step % 3))).as_uri())
    kl, reconstruction = np.array(browser.value("""["#kl", "#reconstruction"].map(id => document.querySelector(
        id + " .line").getAttribute("d").slice(1).split("L").map(point => point.split(",").map(Number)))"""))
    slopes = np.diff(kl[:, 1]) / np.diff(kl[:, 0])
    np.testing.assert_allclose(slopes, slopes.mean(), rtol=0.1)  # a straight line, rising: y of an SVG grows downwards
    assert slopes.mean() < -0.3
    assert np.ptp(reconstruction[1:, 1]) > 30                    # a single value far out does not press the rest flat
    assert "up to 900" in browser.value("document.querySelector('#reconstruction').textContent")


@pytest.mark.parametrize(("place", "then"), [(1, (1, 50)), (2, (3, 200))])
def test_live_page_reloads_and_keeps_its_place_or_follows_the_newest(browser, folder, monkeypatch, place, then):
    monkeypatch.setattr(report, "RELOAD_SECONDS", 0.4)
    browser.open(report.write(folder, live=True).as_uri())
    browser.wait(f"""{READY} && (get("all").open = true, time.focus(), scrollTo(0, 300), time.value = {place},
                                 time.dispatchEvent(new Event("input")))""")
    draw_sheets(folder, 3, 200)
    monkeypatch.setattr(report, "RELOAD_SECONDS", 60)
    report.write(folder, live=True)
    browser.wait(f"{READY} && time.max === '3' && Math.abs(scrollY - 300) < 3")
    assert_shown(browser, *then)
    assert browser.value("get('all').open && document.activeElement.id") == "time"
    assert browser.complaints() == []


def test_nothing_from_a_file_becomes_markup(browser, tmp_path):
    hostile = '<img src=x onerror=alert(1)>&"\'</script><!--$data'
    folder = make_run(tmp_path / hostile.replace("/", ""), steps=(0,))
    (folder / "skipped.txt").write_text(f"<script>alert(1)</script>.png: broken\na/{hostile}.jpg: broken\n")
    (folder / "config.json").write_text(json.dumps({"DATA": hostile, hostile: 1, "DEVICE": hostile, "STEPS": 1000}))
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 900, "evaluate_" + hostile: 3}) + "\n")
    file = report.write(folder)
    assert file.read_text().count("</script>") == 2 and "<!--" not in file.read_text()
    browser.open(file.as_uri())
    assert browser.value("document.querySelectorAll('img').length") == 5      # four sheets and the video
    assert browser.value("document.querySelectorAll('script').length") == 2
    shown = browser.value("document.body.textContent")
    assert hostile.replace("/", "") in shown and "<script>alert(1)</script>.png: broken" in shown
    assert browser.complaints() == []


@pytest.mark.parametrize("log", ["", '{"step": 3e37, "kl": -3e37}\n{"step": 0, "kl": 1e-30, "score_gap": NaN}\n'])
def test_page_of_a_bare_or_absurd_run_has_no_error(browser, tmp_path, log):
    (tmp_path / "metrics.jsonl").write_text(log)
    browser.open(report.write(tmp_path, live=True).as_uri())
    shown = browser.value("document.body.innerText")
    assert "No sample sheets yet" in shown and "config.json is missing" in shown
    assert not re.search("NaN|Infinity|undefined", browser.value("document.getElementById('main').innerHTML"))
    assert browser.complaints() == []
