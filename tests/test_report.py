"""The page of a run: what it holds, what it does with a long log and a damaged run, and how it behaves in a browser."""

import base64
import io
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from chromium import Chromium
from conftest import SMALL
from PIL import Image

import config
import pictures
import report
import run_log


def make_run(folder, steps=(0, 50, 100), side=16, lines=30, **values):
    """A run's folder as training leaves it: every sheet of a step has a colour of its own. values: functions of the
    step, or constants, for metrics.jsonl."""
    (folder / "samples").mkdir(parents=True)
    for i, step in enumerate(steps):
        name = folder / "samples" / f"step_{step:08d}"
        for kind, colour in colours(i).items():
            sheet = np.full((2 * side, 2 * side, 3), colour, np.uint8)
            if kind == "alpha":
                sheet = pictures.beside(sheet, np.zeros((2 * side, 20, 3), np.uint8))        # where the scale is
            pictures.save_picture(f"{name}_{kind}.png", sheet)
        pictures.save_video(f"{name}_video.gif", [np.full((side, side, 3), 40 * t, np.uint8) for t in range(4)], 8)
    values = {"score_gap": lambda step: 5 + step / 100, "gradient_norm": 1.25, "alpha_mean": 3.0, "alpha_min": 2.0,
              "alpha_max": 4.0, "seconds": lambda step: step / 2, "images_seen": lambda step: 16 * step, **values}
    with open(folder / "metrics.jsonl", "w") as log:
        for step in range(20, 20 * lines + 1, 20):
            row = {key: value(step) if callable(value) else value for key, value in values.items()}
            log.write(json.dumps({"step": step, **row}) + "\n")
    defaults = {name: getattr(config, name) for name in dir(config) if name.isupper()}
    (folder / "config.json").write_text(json.dumps({**defaults, "IMAGE_SIZE": side}))
    return folder


def colours(i):
    return {"generated": (200, 10 * i, 0), "alpha": (0, 200, 10 * i), "real": (90, 90, 90),
            "reconstructed": (10 * i, 0, 200)}


def page_data(folder, live=False):
    """Writes the page and returns the data that it draws."""
    page = report.write(folder, live).read_text()
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def curves_of(data):
    return {curve["key"]: curve for curve in [*data["values"], *data["scores"]]}


def decoded(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "first")


# ------------------------------------------------------------------------------------- images and constants

def test_real_run_becomes_one_page(run, tmp_path, capsys):
    assert run("--steps", "2", "--sample-every", "1", "--log-every", "1") == 0
    folder = tmp_path / "runs" / "photos"
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    file = folder / "index.html"
    assert capsys.readouterr().out == f"{file}: {file.stat().st_size / 1e6:.2f} MB\n"
    data = page_data(folder)
    assert [point["step"] for point in data["points"]] == [0, 1, 2]
    for point in data["points"]:
        for kind in report.KINDS:
            with Image.open(folder / "samples" / f"step_{point['step']:08d}_{kind}.png") as sheet, \
                    decoded(data["pictures"][point[kind]][0]) as shown:
                if kind == "alpha":                              # the page draws the scale itself
                    assert shown.size == tuple(data["pictures"][point["generated"]][1:])
                    sheet = sheet.crop((0, 0, *shown.size))
                assert shown.size == sheet.size
                assert np.abs(np.asarray(shown, int) - np.asarray(sheet.convert("RGB"), int)).mean() < 12
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(curves_of(data)["kl"]["y"], [row["kl"] for row in log if "kl" in row], rtol=1e-3)
    size = SMALL[SMALL.index("--image-size") + 1]
    assert ["IMAGE_SIZE", size, str(config.IMAGE_SIZE), True] in data["constants"]
    assert ["ALPHA_INIT", "3.0", "3.0", False] in data["constants"]


def test_page_names_no_address_and_forbids_all_requests(folder):
    page = re.sub(r"base64,[A-Za-z0-9+/=]*", "", report.write(folder).read_text())
    page = page.replace("http://www.w3.org/", "")                # names of SVG and HTML, not addresses
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|srcset|<script src|rel=.style", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(("total", "shown"), [(1, 1), (41, 40), (100, 40)])
def test_points_in_time_are_few_and_even(tmp_path, total, shown):
    folder = make_run(tmp_path / "run", steps=(), lines=1)
    for step in range(total):
        pictures.save_picture(folder / "samples" / f"step_{step:08d}_real.png", np.zeros((4, 4, 3), np.uint8))
    steps = [point["step"] for point in page_data(folder)["points"]]
    assert (len(steps), steps[0], steps[-1]) == (shown, 0, total - 1)
    assert shown == 1 or np.ptp(np.diff(steps)) <= 1


def test_page_stays_below_its_limit_with_fewer_points(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "long", steps=range(0, 3000, 50), side=8, lines=1)
    assert len(page_data(folder)["points"]) == 40
    monkeypatch.setattr(report, "PAGE_BYTES", (folder / "index.html").stat().st_size - 1)
    assert [point["step"] for point in page_data(folder)["points"]][::19] == [0, 2950]


def test_largest_sheets_of_noise_fit_forty_points_into_the_limit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1546, 1546, 3), np.uint8)
    folder = make_run(tmp_path / "run", steps=(), lines=1)
    pictures.save_picture(folder / "samples" / "step_00000000_generated.png", noise)
    (uri, width, height), = page_data(folder)["pictures"]
    assert (width, height) == (1546, 1546) and max(decoded(uri).size) <= 640
    assert (3 * report.POINTS_IN_TIME + 1) * len(uri) + report.VIDEO_BYTES * 4 / 3 < 0.95 * report.PAGE_BYTES


def test_equal_sheets_are_kept_once_and_a_changed_one_is_read_again(folder):
    points = page_data(folder)["points"]
    assert len({point["real"] for point in points}) == 1
    pictures.save_picture(folder / "samples" / "step_00000100_real.png", np.zeros((32, 32, 3), np.uint8))
    data = page_data(folder)
    assert data["points"][0]["real"] == data["points"][1]["real"] != data["points"][2]["real"]
    assert np.asarray(decoded(data["pictures"][data["points"][2]["real"]][0])).mean() < 3


def test_video_keeps_its_frames_and_their_time(folder):
    found = page_data(folder)["video"]
    times, moving = [], decoded(found["moving"])
    for frame in range(moving.n_frames):
        moving.seek(frame)
        moving.load()
        times.append(moving.info["duration"])
    assert len(times) == 4 and abs(sum(times) - 500) <= 20       # 8 per second
    assert found["step"] == 100 and decoded(found["still"]).n_frames == 1


# ------------------------------------------------------------------------------------- the log

def test_small_log_is_shown_line_by_line(tmp_path):
    folder = make_run(tmp_path / "run", kl=lambda step: 3 * step)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 600, "evaluate_kid": 7.5}) + "\n")
    curves = curves_of(page_data(folder))
    assert curves["kl"]["x"] == list(range(20, 601, 20)) and curves["kl"]["y"] == [3 * x for x in range(20, 601, 20)]
    assert (curves["evaluate_kid"]["x"], curves["evaluate_kid"]["y"]) == ([600], [7.5])
    assert set(curves["alpha_mean"]["low"]) == {2} and set(curves["alpha_mean"]["high"]) == {4}


def test_long_log_is_thinned_while_it_is_read(tmp_path, monkeypatch):
    folder, parsed = make_run(tmp_path / "run", steps=(), lines=1), []
    with open(folder / "metrics.jsonl", "w") as log:
        for i in range(1, 30_001):
            seconds = 0.5 * (i % 10_000 or 10_000)               # three starts of 5,000 s
            values = {value.key: i for value in run_log.HEALTHY}
            log.write(json.dumps({"step": 20 * i, **values, "kl": i % 3, "seconds": seconds}) + "\n")
            if i % 1000 == 0:
                log.write(json.dumps({"step": 20 * i, "evaluate_kid": i}) + "\n")
    loads, before = json.loads, time.process_time()
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    report.write(folder)
    assert time.process_time() - before < 5                      # of CPU time; measured: 0.3 s for 100,000 lines
    assert len(parsed) < 2500
    monkeypatch.undo()
    data = page_data(folder)
    curves = curves_of(data)
    assert curves["evaluate_kid"]["y"] == list(range(1000, 30_001, 1000))
    assert curves["kl"]["newest"] == "1" and curves["score_gap"]["newest"] == "29,998"       # of the last five lines
    assert len(curves["kl"]["x"]) == report.CURVE_POINTS
    assert set(curves["kl"]["low"][:-2]) == {0} and set(curves["kl"]["high"][:-2]) == {2}
    np.testing.assert_allclose(curves["score_gap"]["y"], np.array(curves["score_gap"]["x"]) / 20, rtol=0.01)
    assert "4.2 h of training" in data["facts"]                  # 15,000 s


def test_time_of_training_adds_up_over_starts(tmp_path):
    times = iter([100, 600, 50, 300, 20])
    folder = make_run(tmp_path / "run", lines=5, seconds=lambda step: next(times))
    assert "15 min of training" in page_data(folder)["facts"]    # 600 + 300 + 20 s


@pytest.mark.parametrize(("value", "lines", "state"), [
    (1.25, 60, "healthy"), (9.0, 60, "look at it"), (0.05, 60, "look at it"), (9.0, 5, "early"),
    (lambda step: 40 if step in (1140, 1200) else 1.2, 60, "healthy")])       # single outliers change no median
def test_state_of_a_value_with_a_range(tmp_path, value, lines, state):
    curves = curves_of(page_data(make_run(tmp_path / "run", steps=(), lines=lines, gradient_norm=value)))
    assert curves["gradient_norm"]["state"] == state


@pytest.mark.parametrize(("value", "lines", "state"), [
    (lambda step: 0.4 - step / 5000, 40, "falling"), (lambda step: 0.1 + step / 5000, 40, "rising"), (0.2, 40, "level"),
    (0.2, 3, "early"), (1.5, 40, "look at it")])
def test_state_of_a_value_with_a_direction(tmp_path, value, lines, state):
    curves = curves_of(page_data(make_run(tmp_path / "run", steps=(), lines=lines, reconstruction=value)))
    assert curves["reconstruction"]["state"] == state


def test_healthy_ranges_are_those_of_the_runs_size(tmp_path):
    gaps = {side: curves_of(page_data(make_run(tmp_path / str(side), steps=(), side=side, score_gap=20, lines=60)))[
        "score_gap"] for side in (64, 128)}
    assert (gaps[64]["state"], gaps[128]["state"]) == ("look at it", "healthy")
    assert gaps[64]["healthy"][1] < 20 < gaps[128]["healthy"][1]


def test_scores_are_curves_with_their_standard_error(tmp_path):
    folder = make_run(tmp_path / "run", evaluate_frechet=lambda step: 100 - step / 100, evaluate_kid=3,
                      evaluate_kid_error=1.5, evaluate_new_one=7)
    scores = {curve["title"]: curve["newest"] for curve in page_data(folder)["scores"]}
    assert scores == {"Frechet distance": "94", "KID \u00d7 1000": "3 \u00b1 1.5", "New one": "7"}


def test_counters_are_shown_only_if_they_moved(tmp_path):
    none = page_data(make_run(tmp_path / "a", steps=(), skipped_updates=0, lr_scale=1.0))
    some = page_data(make_run(tmp_path / "b", steps=(), skipped_updates=lambda step: int(step > 300), lr_scale=0.5))
    assert not {"skipped_updates", "lr_scale"} & set(curves_of(none))
    assert {"skipped_updates", "lr_scale"} <= set(curves_of(some))


# ------------------------------------------------------------------------------------- damaged runs

def remove(name):
    return lambda folder: [os.remove(file) for file in folder.glob(name)]


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = [
    remove("config.json"), remove("metrics.jsonl"), remove("samples/*"), remove("samples/*alpha.png"),
    remove("samples/*generated.png"), remove("samples/step_00000100_*.png"), remove("samples/*.gif"),
    lambda folder: shutil.rmtree(folder / "samples"),
    text("config.json", b""), text("config.json", b"[1]"), text("config.json", b"\xff\xfe{"),
    text("config.json", b'{"STEPS": "many", "ALPHA_INIT": null, "ALPHA_SPAN": [], "IMAGE_SIZE": true, "X": {}}'),
    text("config.json", b'{"STEPS": 0, "ALPHA_SPAN": 0, "X": NaN}'), text("config.json", b"[" * 100_000),
    text("config.json", b'{"STEPS": 1e999, "ALPHA_INIT": -1, "ALPHA_SPAN": 1e300, "__builtins__": 1}'),
    text("metrics.jsonl", b""), text("metrics.jsonl", b'{"step": 20, "kl": 3.1}\n{"step": 40, "k'),
    text("metrics.jsonl", b'{"step": 20, "kl": null}\n{"step": 40, "kl": NaN}\n{"step": 60, "kl": 1e300}\n'),
    text("metrics.jsonl", b'{"step": "20", "kl": 3}\n{"kl": 3}\n[]\n7\n\x00\xff\n{"step": -5}\n{"step": 1e400}\n'),
    text("metrics.jsonl", b'{"step": 20, "kl": "<b>", "score_gap": true, "alpha_mean": 3, "evaluate_x": "y"}\n'),
    text("metrics.jsonl", b'{"step": 0, "kl": 0.0}\n{"step": 3e37, "kl": -3e37, "seconds": 3e37}\n'),
    text("samples/step_00000050_generated.png", b"no picture"), text("samples/step_00000100_video.gif", b"GIF89a"),
    lambda folder: os.truncate(folder / "samples" / "step_00000050_real.png", 60),
    lambda folder: (folder / "samples" / "step_00000150_real.png").mkdir(),
    text("skipped.txt", b"\xff\xfe\n")]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_what_is_missing_or_damaged_is_left_out(folder, number):
    DAMAGES[number](folder)
    assert report.main([str(folder)]) == 0
    data = page_data(folder)
    assert not re.search(r'"(nan|inf|-inf)"', json.dumps(data))
    for point in data["points"]:
        assert all(point[kind] is None or point[kind] < len(data["pictures"]) for kind in report.KINDS)


def test_log_without_its_last_half_line_shows_the_rest(folder):
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert curves_of(page_data(folder))["score_gap"]["x"][-1] == 580


@pytest.mark.parametrize("arguments", [["nowhere"], ["empty"], [], ["empty", "more"], ["--flag"], ["a_file"]])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    assert report.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report.py: ")
    assert sorted(os.listdir(tmp_path)) == ["a_file", "empty"] and os.listdir(tmp_path / "empty") == []


def test_page_that_cannot_be_written_leaves_the_one_before(folder, capsys, monkeypatch):
    before = report.write(folder).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "index.html.part")
    monkeypatch.setattr(os, "replace", full)
    assert report.main([str(folder)]) == 1
    assert capsys.readouterr().err == f"report.py: {folder / 'index.html'} cannot be used: No space left on device\n"
    assert (folder / "index.html").read_bytes() == before and not list(folder.glob("*.part"))


def test_only_a_live_page_reloads_and_the_first_skipped_files_are_named(folder):
    (folder / "skipped.txt").write_text("".join(f"photo{i:03d}.jpg: broken\n" for i in range(73)))
    data = page_data(folder)
    assert data["reload_seconds"] == 0 and page_data(folder, live=True)["reload_seconds"] == 30
    assert data["skipped_count"] == 73 and data["skipped"][::49] == ["photo000.jpg: broken", "photo049.jpg: broken"]


# ------------------------------------------------------------------------------------- in a browser

class Browser(Chromium):
    """A browser that shows a page of report.py, from its file."""

    def open(self, file, width=1000):
        """Shows a page anew."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def complaints(self):
        """Returns messages of the console, and requests to a network."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return ([e["params"] for e in self.events if e["method"] in kinds]
                + [url for url in asked if not url.startswith(("data:", "about:")) and not url.endswith("/index.html")])

    def colour(self, kind):
        """Returns the middle of a sheet as the page shows it, (r, g, b)."""
        return self.value(f"""(async () => {{
            const image = document.getElementById("{kind}"), canvas = document.createElement("canvas");
            await image.decode();
            canvas.width = canvas.height = 1;
            const context = canvas.getContext("2d");
            context.drawImage(image, -8, -8);
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }})()""")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def assert_shown(browser, i, step):
    assert browser.value("document.getElementById('at').value") == str(step)
    for kind, colour in colours(i).items():
        np.testing.assert_allclose(browser.colour(kind), colour, atol=8, err_msg=kind)


def test_browser_reports_errors_and_requests(browser, tmp_path):
    """The tests below rely on this."""
    (tmp_path / "index.html").write_text("<img src='http://127.0.0.1:9/a.png'><img src='b.png'><script>no()</script>")
    browser.open(tmp_path / "index.html")
    found = str(browser.complaints())
    assert "127.0.0.1:9/a.png" in found and "b.png" in found and "no is not defined" in found


def test_slider_and_keys_change_the_images(browser, folder):
    browser.open(report.write(folder))
    assert_shown(browser, 2, 100)                                # the newest first
    line = "document.querySelector('#score_gap .at').getBoundingClientRect().left"
    newest = browser.value(line)
    browser.value("document.getElementById('time').focus()")
    browser.press("ArrowLeft")
    assert_shown(browser, 1, 50)
    assert browser.value(line) < newest                          # the curves mark the same step
    browser.press("Home")
    assert_shown(browser, 0, 0)
    browser.value("document.getElementById('play').click()")
    browser.wait("document.getElementById('at').value === '100'")
    browser.wait("document.getElementById('play').textContent === 'Play'")
    assert browser.complaints() == []


def test_curves_are_drawn_to_scale(browser, tmp_path):
    browser.open(report.write(make_run(tmp_path / "run", lines=60, kl=lambda step: 3 * step,
                                       reconstruction=lambda step: 900 if step == 20 else 0.2 + step % 3)))
    points = np.array(browser.value("""['kl', 'reconstruction'].map(id => document.querySelector(`#${id} .line`)
        .getAttribute('d').slice(1).split('L').map(point => point.split(',').map(Number)))"""))
    kl, reconstruction = points
    slopes = np.diff(kl[:, 1]) / np.diff(kl[:, 0])
    np.testing.assert_allclose(slopes, slopes.mean(), rtol=0.1)  # a straight line, rising: y of an SVG grows downwards
    assert slopes.mean() < -0.3
    assert np.ptp(reconstruction[1:, 1]) > 30                    # a single value far out does not press the rest flat
    assert "up to 900" in browser.value("document.querySelector('#reconstruction').textContent")
    box = browser.value("(r => [r.x, r.y, r.height])(document.querySelector('#kl svg').getBoundingClientRect())")
    assert browser.value("document.querySelectorAll('.vitals a').length") == 5 and box[2] > 100


@pytest.mark.parametrize(("key", "then"), [("ArrowLeft", (1, 50)), ("End", (3, 200))])
def test_live_page_reloads_and_keeps_its_place_or_follows_the_newest(browser, folder, tmp_path, monkeypatch, key, then):
    monkeypatch.setattr(report, "RELOAD_SECONDS", 0.4)
    browser.open(report.write(folder, live=True), width=390)
    browser.value("document.getElementById('all').open = true; document.getElementById('time').focus();"
                  "scrollTo(0, 700)")
    browser.press(key)
    browser.value("window.old = true")
    make_run(tmp_path / "later", steps=(0, 50, 100, 200))
    for file in (tmp_path / "later" / "samples").glob("step_00000200_*"):
        shutil.copy(file, folder / "samples")
    monkeypatch.setattr(report, "RELOAD_SECONDS", 60)
    report.write(folder, live=True)
    browser.wait("!window.old && document.readyState === 'complete' && document.getElementById('time')?.max === '3'")
    assert_shown(browser, *then)
    assert browser.value("document.getElementById('all').open")
    assert browser.value("document.activeElement.id") == "time"
    browser.wait("Math.abs(scrollY - 700) < 3")
    assert browser.complaints() == []


def test_page_fits_a_phone(browser, tmp_path):
    folder = make_run(tmp_path / ("a_long_name_" * 8), evaluate_kid=3)
    (folder / "skipped.txt").write_text("deep/" * 40 + "photo.jpg: broken\n")
    browser.open(report.write(folder), width=320)
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") <= 320


HOSTILE = '<img src=x onerror=alert(1)>&"\'</script><!--$data'


def test_nothing_from_a_file_becomes_markup(browser, tmp_path):
    folder = make_run(tmp_path / HOSTILE.replace("/", ""))
    (folder / "skipped.txt").write_text(f"<script>alert(1)</script>.png: broken\na/{HOSTILE}.jpg: broken\n")
    (folder / "config.json").write_text(json.dumps({"DATA": HOSTILE, HOSTILE: 1, "DEVICE": HOSTILE, "STEPS": 1000}))
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 900, "evaluate_" + HOSTILE: 3}) + "\n")
    file = report.write(folder)
    assert file.read_text().count("</script>") == 2 and "<!--" not in file.read_text()
    browser.open(file)
    assert browser.value("document.querySelectorAll('img').length") == 5      # four sheets and the video
    assert browser.value("document.querySelectorAll('script').length") == 2
    shown = browser.value("document.body.textContent")
    assert HOSTILE.replace("/", "") in shown and "<script>alert(1)</script>.png: broken" in shown
    assert browser.complaints() == []


@pytest.mark.parametrize("log", ["", '{"step": 20, "kl": null}\n{"step": 40, "kl": NaN, "score_gap": 1e300}\n',
                                 '{"step": 3e37, "kl": -3e37}\n{"step": 0, "kl": 1e-30, "score_gap": -1}\n'])
def test_page_of_a_bare_or_absurd_run_has_no_error(browser, tmp_path, log):
    (tmp_path / "metrics.jsonl").write_text(log)
    browser.open(report.write(tmp_path, live=True))
    shown = browser.value("document.body.innerText")
    assert "No sample sheets yet" in shown and "config.json is missing" in shown and "NaN" not in shown
    assert not re.search("NaN|Infinity|undefined", browser.value("document.getElementById('main').innerHTML"))
    assert browser.complaints() == []
