"""The page of a run: what is in it, what it does with half a run, and how it behaves in a browser."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from chromium import Chromium
from conftest import SMALL
from PIL import Image

import config
import pictures
import report


def make_run(folder, steps=(0, 50, 100), side=16, lines=30, **values):
    """A run's folder as training leaves it: every sheet of a step has a colour of its own. values: functions of the
    step, or constants, for metrics.jsonl."""
    (folder / "samples").mkdir(parents=True)
    for i, step in enumerate(steps):
        name = folder / "samples" / f"step_{step:08d}"
        for kind, colour in colours(i).items():
            sheet = np.full((2 * side, 2 * side, 3), colour, np.uint8)
            if kind == "alpha":
                sheet = pictures.beside(sheet, pictures.colour_bar(1, 9, 2 * side, log=True))
            pictures.save_picture(f"{name}_{kind}.png", sheet)
        pictures.save_animation(f"{name}_video.gif", [np.full((side, side, 3), 40 * t, np.uint8) for t in range(4)], 8)
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


def data_of(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def without_pictures(page):
    return re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)


def decoded(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "first")


# ------------------------------------------------------------------------------------- the page of a run

def test_real_run_becomes_one_page(run, tmp_path, capsys):
    assert run("--steps", "2", "--sample-every", "1", "--log-every", "1") == 0
    folder = tmp_path / "runs" / "photos"
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    file = folder / "index.html"
    assert capsys.readouterr().out == f"{file}: {file.stat().st_size / 1e6:.2f} MB\n"
    page = file.read_text()
    data = data_of(page)
    assert [point["step"] for point in data["points"]] == [0, 1, 2]
    for point in data["points"]:
        for kind in report.KINDS:
            with Image.open(folder / "samples" / f"step_{point['step']:08d}_{kind}.png") as sheet, \
                    decoded(data["pictures"][point[kind]]) as shown:
                if kind == "alpha":
                    sheet = sheet.crop((0, 0, *shown.size))      # the scale is drawn by the page
                assert shown.size == sheet.size
                assert np.abs(np.asarray(shown, int) - np.asarray(sheet.convert("RGB"), int)).mean() < 12
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert data["curves"]["kl"]["x"] == [row["step"] for row in log]
    assert report.short(log[-1]["kl"]) == data["curves"]["kl"]["y"][-1]
    size = SMALL[SMALL.index("--image-size") + 1]
    assert f"<mark>IMAGE_SIZE</mark></td><td><code>{size}</code></td><td><code>{config.IMAGE_SIZE}</code>" in page
    assert "<mark>ALPHA_INIT" not in page


def test_page_names_no_address(folder):
    page = without_pictures(report.write(folder).read_text())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|srcset|<link rel=\"stylesheet", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"#][^"]*)"', page))
    assert "default-src 'none'" in page


@pytest.mark.parametrize(("total", "shown"), [(1, 1), (2, 2), (40, 40), (41, 40), (400, 40)])
def test_points_in_time_are_few_and_even(total, shown):
    chosen = report.choose(list(range(total)), report.POINTS_IN_TIME)
    assert (len(chosen), chosen[0], chosen[-1]) == (shown, 0, total - 1)
    assert np.ptp(np.diff(chosen)) <= 1 if shown > 2 else True


def test_page_stays_below_its_limit_with_fewer_points(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "long", steps=range(0, 3000, 50), side=8, lines=1)
    full = report.write(folder).stat().st_size
    assert len(data_of((folder / "index.html").read_text())["points"]) == 40
    monkeypatch.setattr(report, "PAGE_BYTES", full - 1)
    assert report.write(folder).stat().st_size < full
    assert [p["step"] for p in data_of((folder / "index.html").read_text())["points"]][::19] == [0, 2950]


def test_largest_sheets_of_noise_fit_forty_points_into_the_limit(tmp_path):
    file = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1546, 1546, 3), np.uint8)).save(file, compress_level=0)
    uri, width, height = report.picture(file)
    assert (width, height) == (1546, 1546) and max(decoded(uri).size) <= 640
    sheets = 3 * report.POINTS_IN_TIME + 1
    assert sheets * len(uri) + report.VIDEO_BYTES * 4 / 3 < 0.95 * report.PAGE_BYTES


def test_equal_originals_are_kept_once(folder):
    data = data_of(report.write(folder).read_text())
    assert len({point["real"] for point in data["points"]}) == 1
    pictures.save_picture(folder / "samples" / "step_00000100_real.png", np.zeros((32, 32, 3), np.uint8))
    points = data_of(report.write(folder).read_text())["points"]
    assert points[0]["real"] == points[1]["real"] != points[2]["real"]


def test_sheet_that_changed_on_disk_changes_on_the_page(folder):
    before = data_of(report.write(folder).read_text())
    pictures.save_picture(folder / "samples" / "step_00000050_generated.png", np.zeros((32, 32, 3), np.uint8))
    after = data_of(report.write(folder).read_text())
    assert np.asarray(decoded(before["pictures"][before["points"][1]["generated"]])).mean() > 50
    assert np.asarray(decoded(after["pictures"][after["points"][1]["generated"]])).mean() < 3


def test_video_keeps_its_frames_and_their_time(folder):
    page = report.write(folder).read_text()
    video = decoded(re.search(r'data-moving="([^"]+)"', page)[1])
    assert video.n_frames == 4
    times = []
    for frame in range(4):
        video.seek(frame)
        video.load()
        times.append(video.info["duration"])
    assert abs(sum(times) - 500) <= 20                          # 8 a second
    assert decoded(re.search(r'id="video" src="([^"]+)"', page)[1]).n_frames == 1


# ------------------------------------------------------------------------------------- curves and values

def test_long_log_is_thinned_to_means_within_their_band():
    steps = np.arange(1, 10_001) * 20.0
    values = np.random.default_rng(0).normal(size=10_000)
    x, mean, low, high = report.thin(steps, values, values, values, bins=250)
    assert len(x) == 250                                        # of 40 lines each
    np.testing.assert_allclose(mean, values.reshape(250, 40).mean(1))
    np.testing.assert_allclose(x, steps.reshape(250, 40).mean(1))
    np.testing.assert_array_equal(low, values.reshape(250, 40).min(1))
    np.testing.assert_array_equal(high, values.reshape(250, 40).max(1))


def test_log_with_a_gap_has_no_point_there():
    steps = np.array([*range(100), *range(900, 1000)], float)
    x, mean, _, _ = report.thin(steps, steps, steps, steps, bins=100)
    assert np.all((x < 100) | (x >= 900)) and np.all(np.isfinite(mean)) and len(x) <= 100


def test_straight_values_are_a_straight_line(tmp_path):
    page = report.write(make_run(tmp_path / "r", kl=lambda step: 3 * step, lines=20)).read_text()
    figure = re.search(r'id="kl">.*?</figure>', page, re.S)[0]
    points = np.array([p.split(",") for p in re.search(r'class="line" points="([^"]*)"', figure)[1].split()], float)
    assert len(points) == 20
    slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
    np.testing.assert_allclose(slopes, slopes.mean(), rtol=0.05)
    assert slopes.mean() < 0                                    # y of an SVG grows downwards
    assert points[-1, 0] == report.RIGHT and points[0, 0] == pytest.approx(report.LEFT + 14.6, abs=0.1)     # 1/20


def test_few_large_values_at_the_start_do_not_press_a_curve_flat(tmp_path):
    folder = make_run(tmp_path / "r", score_gap=lambda step: 900 if step == 20 else 4 + step % 3, lines=60)
    page = report.write(folder).read_text()
    figure = re.search(r'id="score_gap">.*?</figure>', page, re.S)[0]
    y = np.array([p.split(",")[1] for p in re.search(r'class="line" points="([^"]*)"', figure)[1].split()], float)
    assert np.ptp(y[1:]) > 0.3 * (report.BOTTOM - report.TOP) and y.min() >= report.TOP
    assert "up to 900" in figure


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 8.1), (1e-7, 2e-7), (0, 20_000), (1e30, 3e30)])
def test_ticks_are_few_and_inside(low, high):
    found = report.ticks(low, high, 4)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 * high <= tick <= high * (1 + 1e-6) for tick in found)


def test_every_evaluation_is_a_curve_and_a_row(tmp_path):
    folder = make_run(tmp_path / "r", evaluate_frechet=lambda step: 100 - step / 100, evaluate_kid_error=1.5,
                      evaluate_new_one=7)
    page = report.write(folder).read_text()
    assert "<td>Frechet distance</td><td>94</td><td>600</td>" in page
    assert "<td>New one</td><td>7</td>" in page and "<td>KID, standard error</td><td>1.5</td>" in page
    assert {"evaluate_frechet", "evaluate_new_one"} <= set(data_of(page)["curves"])
    assert "evaluate" not in report.write(make_run(tmp_path / "none")).read_text()


def test_skipped_updates_are_a_curve_only_if_there_were_any(tmp_path):
    none = data_of(report.write(make_run(tmp_path / "a", skipped_updates=0)).read_text())
    some = data_of(report.write(make_run(tmp_path / "b", skipped_updates=lambda step: int(step > 300))).read_text())
    assert "skipped_updates" not in none["curves"] and "skipped_updates" in some["curves"]


@pytest.mark.parametrize(("values", "step", "word"), [
    ([50, 1.2, 1.3, 1.2, 1.3, 40], 9000, "healthy"),            # the median of the newest: one spike says nothing
    ([1.2, 9, 9, 9, 9, 9], 9000, "look at it"), ([9] * 6, 100, "early"), ([0.1] * 6, 9000, "look at it")])
def test_state_of_a_value_with_a_range(values, step, word):
    norm = next(curve for curve in report.curves({}) if curve.key == "gradient_norm")
    assert report.state_of(norm, np.array(values, float), step)[0] == word


@pytest.mark.parametrize(("values", "word"), [(np.linspace(9, 1, 40), "falling"), (np.linspace(1, 9, 40), "rising"),
                                              (np.ones(40), "level"), (np.ones(3), "early")])
def test_direction_of_a_value_without_a_range(values, word):
    distance = next(curve for curve in report.curves({}) if curve.key == "wasserstein")
    assert report.state_of(distance, values, 9000)[0] == word


def test_time_of_training_adds_up_over_starts():
    rows = [{"step": i, "seconds": s} for i, s in enumerate([10, 60, 5, 30, 2])]
    assert report.seconds_trained(rows) == 60 + 30 + 2
    assert report.seconds_trained([]) == 0


# ------------------------------------------------------------------------------------- half a run, and none

def remove(name):
    return lambda folder: [os.remove(file) for file in folder.glob(name)]


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize("harm", [
    remove("config.json"), remove("metrics.jsonl"), remove("samples/*"), remove("samples/*alpha.png"),
    remove("samples/*generated.png"), remove("samples/step_00000100_*.png"), remove("samples/*.gif"),
    lambda folder: shutil.rmtree(folder / "samples"),
    text("config.json", b""), text("config.json", b"[1]"), text("config.json", b"\xff\xfe{"),
    text("config.json", b"{}"),
    text("config.json", b'{"STEPS": "many", "ALPHA_INIT": null, "ALPHA_SPAN": [], "IMAGE_SIZE": true, "X": {}}'),
    text("config.json", b'{"STEPS": 0, "ALPHA_SPAN": 0}'), text("config.json", b"[" * 100_000),
    text("metrics.jsonl", b""), text("metrics.jsonl", b'{"step": 20, "kl": 3.1}\n{"step": 40, "k'),
    text("metrics.jsonl", b'{"step": 20, "kl": null}\n{"step": 40, "kl": NaN}\n{"step": 60, "kl": 1e300}\n'),
    text("metrics.jsonl", b'{"step": "20", "kl": 3}\n{"kl": 3}\n[]\n7\n\x00\xff\n{"step": -5}\n{"step": 1e400}\n'),
    text("metrics.jsonl", b'{"step": 20, "kl": "<b>", "score_gap": true, "alpha_mean": 3, "evaluate_x": "y"}\n'),
    text("metrics.jsonl", b'{"step": 0, "kl": 0.0}\n'),
    text("samples/step_00000050_generated.png", b"no picture"), text("samples/step_00000100_video.gif", b"GIF89a"),
    lambda folder: os.truncate(folder / "samples" / "step_00000050_real.png", 60),
    lambda folder: (folder / "samples" / "step_00000150_real.png").mkdir(),
    text("skipped.txt", b"\xff\xfe\n"),
])
def test_what_is_missing_or_damaged_is_left_out(folder, harm):
    harm(folder)
    assert report.main([str(folder)]) == 0
    page = (folder / "index.html").read_text()
    body = without_pictures(page[page.index("<body>"):page.index('<script type="application/json"')])
    assert page.endswith("</html>\n") and not re.search(r"\b(nan|inf|None)\b", body)
    for point in data_of(page)["points"]:
        assert all(point[kind] is None or point[kind] < len(data_of(page)["pictures"]) for kind in report.KINDS)


def test_log_without_its_last_half_line_shows_the_rest(folder):
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert data_of(report.write(folder).read_text())["curves"]["score_gap"]["x"][-1] == 580


@pytest.mark.parametrize("arguments", [["nowhere"], ["empty"], [], ["empty", "more"], ["--flag"], ["a_file"]])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    assert report.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report.py: ") and "runs/NAME" in err
    assert sorted(os.listdir(tmp_path)) == ["a_file", "empty"] and os.listdir(tmp_path / "empty") == []


def test_page_that_cannot_be_written_leaves_the_one_before(folder, capsys, monkeypatch):
    before = report.write(folder).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "index.html.part")
    monkeypatch.setattr(os, "replace", full)
    assert report.main([str(folder)]) == 1
    assert capsys.readouterr().err == "report.py: index.html.part: No space left on device\n"
    assert (folder / "index.html").read_bytes() == before and not list(folder.glob("*.part"))


HOSTILE = '<img src=x onerror=alert(1)>&"\'</script><!--$name'


def test_nothing_from_a_file_becomes_markup(tmp_path):
    folder = make_run(tmp_path / HOSTILE.replace("/", ""))
    (folder / "skipped.txt").write_text(f"a/{HOSTILE}.jpg: broken\n")
    (folder / "config.json").write_text(json.dumps({"DATA": HOSTILE, HOSTILE: 1, "DEVICE": HOSTILE}))
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 900, "evaluate_" + HOSTILE: 3}) + "\n")
    page = report.write(folder).read_text()
    assert page.count("<img") == page.count('<img id="') == 5
    assert page.count("</script>") == 2 and "<!--" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&quot;" in page


def test_skipped_files_are_counted_and_the_first_are_named(folder):
    (folder / "skipped.txt").write_text("".join(f"photo{i:03d}.jpg: broken\n" for i in range(73)))
    page = report.write(folder).read_text()
    assert "73 image files could not be used" in page and "and 23 more in skipped.txt" in page
    assert page.count(".jpg: broken") == 50 and "photo049" in page and "photo050" not in page


def test_only_a_live_page_reloads(folder):
    assert data_of(report.write(folder).read_text())["reload_seconds"] == 0
    assert data_of(report.write(folder, live=True).read_text())["reload_seconds"] == report.RELOAD_SECONDS == 30


# ------------------------------------------------------------------------------------- in a browser

class Browser(Chromium):
    """A browser that shows a page of report.py, from its file."""

    def open(self, file, width=1000, **media):
        """Shows a page anew; media: prefers_color_scheme="dark" and such."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def complaints(self):
        """What the console says, and what was asked of a network."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return ([e["params"] for e in self.events if e["method"] in kinds]
                + [url for url in asked if not url.startswith(("data:", "file:", "about:"))]
                + [url for url in asked if url.startswith("file:") and not url.endswith("/index.html")])

    def colour(self, kind):
        """The middle of a sheet as the page shows it, (r, g, b)."""
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
    assert browser.value("document.getElementById('time').getAttribute('aria-valuetext')") == f"step {step}"
    for kind, colour in colours(i).items():
        np.testing.assert_allclose(browser.colour(kind), colour, atol=8, err_msg=kind)


def test_browser_reports_errors_and_requests(browser, tmp_path):
    """What the tests below rely on."""
    (tmp_path / "index.html").write_text("<img src='http://127.0.0.1:9/a.png'><img src='b.png'><script>no()</script>")
    browser.open(tmp_path / "index.html")
    found = str(browser.complaints())
    assert "127.0.0.1:9/a.png" in found and "b.png" in found and "no is not defined" in found


def test_slider_and_keys_change_the_pictures(browser, folder):
    browser.open(report.write(folder))
    assert_shown(browser, 2, 100)                               # the newest first
    line = "document.querySelector('#score_gap .at').getBoundingClientRect().left"
    newest = browser.value(line)
    browser.value("document.getElementById('time').focus()")
    browser.press("ArrowLeft")
    assert_shown(browser, 1, 50)
    assert browser.value(line) < newest                            # the curves mark the same step
    browser.press("Home")
    assert_shown(browser, 0, 0)
    browser.press("ArrowRight")
    assert_shown(browser, 1, 50)
    assert browser.value("document.getElementById('generated').alt") == "Generated pictures, step 50"
    assert browser.complaints() == []


def test_curves_tell_their_values_under_the_pointer(browser, folder):
    browser.open(report.write(folder))
    browser.value("document.getElementById('curves').scrollIntoView()")
    box = browser.value("(r => [r.x, r.y, r.width, r.height])(document.querySelector('#score_gap svg')"
                     ".getBoundingClientRect())")
    middle = (report.LEFT + report.RIGHT) / 2 / report.WIDTH    # step 300 of 600
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + middle * box[2], y=box[1] + box[3] / 2)
    assert browser.value("document.querySelector('#score_gap output').value") == "step 300: 8"
    assert browser.value("document.querySelector('#gradient_norm output').value") == "step 300: 1.25"
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    browser.wait("document.querySelector('#score_gap output').value === '11'")
    assert browser.complaints() == []


def test_live_page_reloads_and_keeps_its_place(browser, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RELOAD_SECONDS", 0.4)
    browser.open(report.write(folder, live=True), width=390)
    browser.value("document.getElementById('time').focus(); document.getElementById('all-constants')"
               " && (document.getElementById('all-constants').open = true); scrollTo(0, 700)")
    browser.press("ArrowLeft")
    browser.value("window.old = true")
    make_run(tmp_path / "later", steps=(0, 50, 100, 200))
    for file in (tmp_path / "later" / "samples").glob("step_00000200_*"):
        shutil.copy(file, folder / "samples")
    monkeypatch.setattr(report, "RELOAD_SECONDS", 60)
    report.write(folder, live=True)
    browser.wait("!window.old && document.readyState === 'complete' && document.getElementById('time')?.max === '3'")
    assert_shown(browser, 1, 50)
    assert browser.value("document.getElementById('all-constants').open")
    assert browser.value("document.activeElement.id") == "time"
    assert abs(browser.value("scrollY") - 700) < 3
    assert browser.complaints() == []


def test_page_at_the_newest_step_follows_the_run(browser, folder, tmp_path):
    browser.open(report.write(folder))
    make_run(tmp_path / "later", steps=(0, 50, 100, 200))
    for file in (tmp_path / "later" / "samples").glob("step_00000200_*"):
        shutil.copy(file, folder / "samples")
    report.write(folder)
    browser.value("window.old = true; location.reload()")
    browser.wait("!window.old && document.readyState === 'complete' && document.getElementById('time')?.max === '3'")
    assert_shown(browser, 3, 200)


def test_playing_goes_on_over_a_reload_to_the_end(browser, folder):
    browser.open(report.write(folder))
    browser.value("document.getElementById('play').click()")       # at the end: begins anew
    assert browser.value("document.getElementById('at').value") == "0"
    browser.value("window.old = true; location.reload()")
    browser.wait("!window.old && document.readyState === 'complete'")
    assert browser.value("document.getElementById('play').textContent") == "Pause"
    browser.wait("document.getElementById('at').value === '100'")
    browser.wait("document.getElementById('play').textContent === 'Play'")


def test_video_stands_still_for_who_wants_less_motion(browser, folder):
    page = report.write(folder)
    moving = "document.getElementById('video').src === document.getElementById('video').dataset.moving"
    browser.open(page, prefers_reduced_motion="no-preference")
    assert browser.value(moving)
    browser.open(page, prefers_reduced_motion="reduce")
    assert not browser.value(moving)
    browser.value("document.getElementById('move').click()")
    assert browser.value(moving)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1000])
def test_page_fits_its_width_and_can_be_read(browser, tmp_path, width, scheme):
    folder = make_run(tmp_path / ("a_long_name_" * 8), evaluate_kid=3)
    (folder / "skipped.txt").write_text("deep/" * 40 + "photo.jpg: broken\n")
    browser.open(report.write(folder), width=width, prefers_color_scheme=scheme)
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    contrasts = browser.value("""(() => {
        const light = text => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(v => v / 255).map(
                v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const page = light(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll("h1, h2, h3, b, small, figcaption, output, td, th, .note, .state")]
            .map(part => light(getComputedStyle(part).color))
            .map(ink => (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05));
    })()""")
    assert len(contrasts) > 50 and min(contrasts) >= 4.5        # WCAG 2.2, 1.4.3
    assert browser.value("document.querySelectorAll('img:not([alt]), img[alt=\"\"]').length") == 0
    assert browser.value("[...document.querySelectorAll('button')].every(button => button.innerText.trim())")


def test_page_without_anything_runs_without_an_error(browser, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text("")
    browser.open(report.write(tmp_path / "bare", live=True))
    assert "No sample sheets yet" in browser.value("document.body.innerText")
    assert browser.complaints() == []
