"""export.py: main in process on a small run with axes; the page in a headless Chromium, over its debugging pipe."""

import base64
import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Chromium
from conftest import SMALL, draw_images
from PIL import Image

import checkpoints
import config
import export
import generate
import latent_space
import model_definitions
import training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on drawn images, whose checkpoint has principal axes."""
    folder = tmp_path_factory.mktemp("export")
    images = draw_images(str(folder / "photos"), 8)
    flags = ["--runs-dir", str(folder / "runs"), "--steps", "2", *SMALL, "--transformer-layers", "1"]
    assert training.main(["--data", images, *flags]) == 0
    file, saved = checkpoints.find(folder / "runs" / "photos")
    saved["axes"] = latent_space.principal_axes(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    name = "layer.to_s.weight"              # zero at the start: alpha would be the same everywhere, video or not
    saved["ema"][name] = torch.randn(saved["ema"][name].shape, generator=torch.Generator().manual_seed(1))
    torch.save(saved, file)
    return folder / "runs" / "photos"


@pytest.fixture(scope="module")
def model(trained):
    """The run as an ONNX file's bytes, made once by the command, and what the command printed."""
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name, reason=f"the optional package {name} is not installed")
    file, printed = trained / "exported" / "photos.onnx", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.main([str(trained), "--out", str(file)]) == 0
    assert [f.name for f in file.parent.iterdir()] == ["photos.onnx"]          # no file of weights beside it
    return file.read_bytes(), printed.getvalue()


@pytest.fixture
def made(model, monkeypatch):
    """The ONNX file is not made anew."""
    monkeypatch.setattr(export, "to_onnx", lambda generator, latent_dim: model[0])


@pytest.fixture
def dist(tmp_path):
    """A folder with files named as onnxruntime-web's, and one more."""
    (tmp_path / "dist").mkdir()
    for name in (*export.ORT_FILES, "ort.all.js"):
        (tmp_path / "dist" / name).write_text(name)
    return tmp_path / "dist"


def load(path):
    return model_definitions.from_checkpoint(checkpoints.find(path)[1], torch.device("cpu"))[0]


def test_onnx_draws_what_torch_draws_at_any_batch_size(trained, model):
    import onnxruntime
    session = onnxruntime.InferenceSession(model[0], providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        z = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
        image, = session.run(["image"], {"z": z.numpy()})
        assert image.shape == (batch, 3, 32, 32) and image.dtype == np.float32
        assert np.abs(image - load(trained)(z).numpy()).max() < 1 / 127.5


def test_the_onnx_file_has_the_video_folded_in_and_no_path_of_this_machine(trained, model):
    import onnx
    graph = onnx.load_from_string(model[0]).graph
    assert not any(tensor.data_location for tensor in graph.initializer)
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert [24, 48, 8, 8] not in sizes.values()                     # the kernels of 16 frames, 3 channels each
    for path in (Path(model_definitions.__file__).parent, Path(torch.__file__).parent, trained):
        assert str(path).encode() not in model[0]


def test_the_onnx_line_tells_size_times_and_difference(model):
    size, difference, name = len(model[0]) / 1e6, "levels of 255 from torch", "photos.onnx"
    line = model[1].splitlines()[-1]
    assert f"{name}: {size:.1f} MB, onnxruntime " in line and "ms an image, torch " in line and difference in line


@pytest.mark.parametrize("broken", ["other weights", "nan"])
def test_a_model_that_draws_otherwise_is_not_written(trained, made, monkeypatch, tmp_path, capsys, broken):
    real = export.draw
    change = {"other weights": lambda image: image * 0.98, "nan": lambda image: image * float("nan")}[broken]
    monkeypatch.setattr(export, "draw", lambda generator, z: change(real(generator, z)))
    (tmp_path / "old.onnx").write_bytes(b"old")
    for name in ("new.onnx", "old.onnx"):
        assert export.main([str(trained), "--out", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.startswith("export.py: onnxruntime's pictures differ from torch's by up to ")
    assert [f.name for f in tmp_path.iterdir()] == ["old.onnx"] and (tmp_path / "old.onnx").read_bytes() == b"old"


def test_a_weights_file_draws_the_runs_pictures_within_two_levels(trained, tmp_path, capsys):
    file = tmp_path / "shared.pt"
    assert export.main([str(trained), "--out", str(file)]) == 0
    line = capsys.readouterr().out
    assert f"{file}: {file.stat().st_size / 1e6:.1f} MB, torch " in line and "levels of 255" in line
    grids = []
    for path in (trained, file):
        assert generate.main([str(path), "--images", "4", "--out", str(tmp_path / "out")]) == 0
        grids.append(np.asarray(Image.open(tmp_path / "out" / "grid.png")).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 2 and grids[0].std() > 1       # weights are rounded to half precision


def test_a_weights_file_holds_half_the_averaged_weights_and_nothing_private(trained, tmp_path):
    file, again = tmp_path / "shared.pt", tmp_path / "again.pt"
    assert export.main([str(trained), "--out", str(file), "--about", "drawn by a test"]) == 0
    saved, run = checkpoints.load(file), checkpoints.find(trained)[1]
    assert set(saved) == {"format", "constants", "ema", "counters", "axes", "about"}
    assert saved["ema"].keys() == run["ema"].keys() and {t.dtype for t in saved["ema"].values()} == {torch.float16}
    assert saved["counters"] == {"step": 2, "images_seen": 8} and saved["about"] == {"text": "drawn by a test"}
    assert saved["constants"] == {**run["constants"], "DATA": "photos", "RUNS_DIR": config.RUNS_DIR}
    assert all(torch.equal(saved["axes"][name], run["axes"][name]) for name in ("mean", "axes", "deviations"))
    assert str(trained.parent.parent).encode() not in file.read_bytes()
    assert export.main([str(file), "--out", str(again)]) == 0                # a shared file can be exported too
    assert checkpoints.load(again)["about"] == {"text": "drawn by a test"}


@pytest.mark.parametrize("path,name", [("/home/me/faces", "faces"), ("C:\\Users\\me\\faces\\", "faces"), ("", "")])
def test_of_the_data_folder_only_its_name_is_shared(trained, path, name):
    saved = checkpoints.find(trained)[1]
    saved["constants"]["DATA"] = path
    del saved["axes"]
    assert export.weights_only(saved)["constants"]["DATA"] == name and "axes" not in export.weights_only(saved)


def test_a_page_is_a_folder_with_all_it_needs(trained, made, dist, tmp_path, capsys):
    for about, text in (("", ""), ("again", "again")):              # a page may be written over an earlier one
        folder = tmp_path / "deep" / "page"
        assert export.main([str(trained), "--web", str(folder), "--ort", str(dist), "--about", about]) == 0
        assert {f.name for f in folder.iterdir()} == {"index.html", "model.onnx", "model.json", *export.ORT_FILES}
        assert [f.name for f in folder.parent.iterdir()] == ["page"]
        facts = json.loads((folder / "model.json").read_text())
        assert (facts["name"], facts["image_size"], facts["channels"]) == ("photos", 32, 3)
        assert (facts["latent_dim"], facts["step"], facts["images_seen"], facts["about"]) == (16, 2, 8, text)
        assert np.shape(facts["axes"]) == (8, 16) and facts["deviations"] == sorted(facts["deviations"], reverse=True)
        line = capsys.readouterr().out
        assert "onnxruntime " in line and f"python -m http.server -d {folder}" in line and "no sliders" not in line


def test_a_file_and_a_page_in_one_call_are_one_model(trained, model, monkeypatch, dist, tmp_path):
    calls = []
    monkeypatch.setattr(export, "to_onnx", lambda generator, latent_dim: calls.append(latent_dim) or model[0])
    argv = [str(trained), "--out", str(tmp_path / "a.onnx"), "--web", str(tmp_path / "page"), "--ort", str(dist)]
    assert export.main(argv) == 0 and calls == [16]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "page" / "model.onnx").read_bytes() == model[0]


def test_without_axes_a_page_is_made_and_it_is_said(trained, made, dist, tmp_path, capsys):
    saved = checkpoints.find(trained)[1]
    del saved["axes"]
    torch.save(saved, tmp_path / "plain.pt")
    assert export.main([str(tmp_path / "plain.pt"), "--web", str(tmp_path / "page"), "--ort", str(dist)]) == 0
    assert "no principal axes" in capsys.readouterr().out
    assert json.loads((tmp_path / "page" / "model.json").read_text())["axes"] == []


@pytest.mark.parametrize("argv,words", [
    (["{run}"], "nothing to do"), (["{run}", "--out", "{tmp}/a.zip"], ".onnx or .pt"),
    (["{run}", "--out", "{tmp}/a"], ".onnx or .pt"), (["{tmp}/none", "--out", "{tmp}/a.pt"], "no such run"),
    (["{tmp}/file", "--out", "{tmp}/a.pt"], "no readable checkpoint"), (["{tmp}/in", "--out", "a.pt"], "no checkpoint"),
    (["{run}", "--out", "{tmp}/file/a.pt"], "can't be written"), (["{run}", "--out", "{file}"], "is there already"),
    (["{run}", "--out", "{tmp}/a.pt", "--ort", "{tmp}/dist"], "--web"),
    (["{run}", "--web", "{tmp}/page", "--ort", "{tmp}/in"], "no ort.wasm"),
    (["{run}", "--web", "{tmp}/in", "--ort", "{tmp}/dist"], "other files"),
    (["{run}", "--web", "{tmp}/file", "--ort", "{tmp}/dist"], "can't be written"),
    (["{run}", "--web", "{tmp}/page"], "npm pack onnxruntime-web@"), (["--out", "{tmp}/a.pt"], "run")])
def test_bad_input_is_one_line_status_2_and_nothing_written(trained, made, dist, monkeypatch, tmp_path, capsys, argv,
                                                            words):
    monkeypatch.setattr(shutil, "which", lambda name: None)                 # a machine without npm
    (tmp_path / "file").write_text("a file in the way")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "index.html").write_text("someone's page")
    names = {"run": trained, "tmp": tmp_path, "file": next((trained / "checkpoints").glob("step*"))}
    content = names["file"].read_bytes()
    assert export.main([a.format(**names) for a in argv]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("export.py: ") and words in text, text
    assert {f.name for f in tmp_path.iterdir()} == {"file", "in", "dist"}
    assert (tmp_path / "in" / "index.html").read_text() == "someone's page" and names["file"].read_bytes() == content


@pytest.mark.parametrize("package", export.ONNX_PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_brings_it(trained, monkeypatch, tmp_path, capsys, package):
    for name in export.ONNX_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert export.main([str(trained), "--out", str(tmp_path / "new" / "a.onnx")]) == 2
    text = capsys.readouterr().err
    assert f"the package {package}," in text and "pip install -r requirements-extras.txt" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script,words", [("echo 'npm error offline' >&2; exit 1", "npm error offline"),
                                          ("exit 0", "no reason given")])
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for npm is a shell script")
def test_npm_that_fails_is_one_line_and_leaves_nothing(trained, made, monkeypatch, tmp_path, capsys, script, words):
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(npm))
    assert export.main([str(trained), "--web", str(tmp_path / "page")]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and words in text and "--ort" in text
    assert [f.name for f in tmp_path.iterdir()] == ["npm"]


# ------------------------------------------------------------------------------------- in a browser

class Browser(Chromium):
    """A browser that shows a page of export.py."""

    def open(self, url):
        self.call("Page.navigate", url=url)

    def pixels(self):
        """The picture on the page, int (H, W, 3)."""
        text = self.value("document.querySelector('canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB")).astype(int)

    def click(self, selector):
        """A mouse click in the middle of an element."""
        x, y = self.value(f"(() => {{ const e = document.querySelector('{selector}'); e.scrollIntoView();"
                          "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self):
        """Errors and warnings of the console, and exceptions that nobody caught."""
        self.value("1")                                                     # what came before is read by now
        return [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"
                or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] in ("error", "warning"))
                or (e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning"))]


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(trained, model, tmp_path_factory):
    """The folder of a page with the real onnxruntime-web, out of the folder that ORT_WEB_DIST names or from npm."""
    folder = tmp_path_factory.mktemp("web") / "page"
    given = os.environ.get("ORT_WEB_DIST")
    if given is None and shutil.which("npm") is None:
        pytest.skip("no onnxruntime-web: npm is not installed, and ORT_WEB_DIST names no folder with it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", lambda generator, latent_dim: model[0])
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = export.main([str(trained), "--web", str(folder), *(["--ort", given] if given else [])])
    if status == 2 and "npm pack" in said.getvalue():
        pytest.skip(f"no onnxruntime-web: {said.getvalue().strip()}")
    assert status == 0, said.getvalue()
    return folder


@pytest.fixture
def served(page):
    """served(folder) serves a folder on localhost and returns its address."""
    with contextlib.ExitStack() as stack:
        def serve(folder=page):
            handler = functools.partial(QuietHandler, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}/"
        yield serve


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


READY = "document.readyState === 'complete' && !document.querySelector('#new').disabled && !drawing"


@pytest.mark.slow
def test_the_page_draws_what_torch_draws_and_answers_click_slider_key_and_walk(trained, browser, served):
    address = served()
    browser.open(address)
    browser.wait(READY)
    first = browser.pixels()
    z = torch.tensor(browser.value("Array.from(normals(1, 16))"))
    want = 127.5 * (load(trained)(z[None])[0].permute(1, 2, 0).numpy() + 1)
    assert first.shape == (32, 32, 3) and np.abs(first - want).max() <= 1

    browser.click("#new")
    browser.wait(f"document.querySelector('#status').textContent !== 'Number 1' && {READY}")
    assert np.abs(browser.pixels() - first).max() > 1

    browser.value("document.querySelector('#number').value = 1; document.querySelector('#number').focus()")
    browser.press("Enter")
    browser.wait(f"document.querySelector('#status').textContent === 'Number 1' && {READY}")
    assert np.array_equal(browser.pixels(), first)                          # a number is a picture

    browser.value("document.querySelector('#axis2').focus()")
    for _ in range(10):
        browser.press("ArrowRight")
    browser.wait(f"document.querySelector('#value2').textContent === '+1.0' && {READY}")
    axes = checkpoints.find(trained)[1]["axes"]
    want = 127.5 * (load(trained)((z + axes["deviations"][2] * axes["axes"][2])[None])[0].permute(1, 2, 0).numpy() + 1)
    assert np.abs(browser.pixels() - want).max() <= 1 < np.abs(browser.pixels() - first).max()
    browser.click("#reset")
    browser.wait(f"document.querySelector('#value2').textContent === '0.0' && {READY}")
    assert np.array_equal(browser.pixels(), first)

    browser.click("#walk")
    browser.wait("position > 1.2")
    assert browser.value("document.querySelector('#walk').textContent") == "Pause"
    seen = [browser.pixels()]
    for _ in range(3):
        browser.wait(f"position > {browser.value('position')} + 0.1")
        seen.append(browser.pixels())
    assert all(np.abs(a - b).max() > 0 for a, b in itertools.pairwise(seen))
    browser.click("#walk")
    browser.wait(f"!walking && {READY}")
    kept = browser.pixels()
    time.sleep(0.3)
    assert np.array_equal(browser.pixels(), kept)

    asked = {e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith((address, "data:,")) for url in asked) and len(asked) >= 5, asked
    assert browser.complaints() == []


@pytest.mark.slow
def test_the_pages_paths_are_those_of_latent_space(browser, served):
    browser.open(served())
    browser.wait(READY)
    values = np.array(browser.value("Array.from(normals(5, 20000))"))
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.02 and abs((values ** 3).mean()) < 0.1
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    a, b = (torch.tensor(browser.value(f"Array.from(normals({n}, 16))")) for n in (5, 6))
    for t in (0.0, 0.3, 1.0):
        got = torch.tensor(browser.value(f"Array.from(spherical(normals(5, 16), normals(6, 16), {t}))"))
        torch.testing.assert_close(got, latent_space.spherical(a, b, torch.tensor(t)), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["file", "model.onnx", "model.json", export.ORT_FILES[1]])
def test_a_page_that_cannot_load_its_model_says_so(browser, page, served, tmp_path, gone):
    folder = tmp_path / "broken"
    shutil.copytree(page, folder)
    if gone != "file":
        (folder / gone).unlink()
    browser.open(f"{folder.as_uri()}/index.html" if gone == "file" else served(folder))
    browser.wait("document.querySelector('#error')?.hidden === false")
    text = browser.value("document.querySelector('#error').innerText")
    assert text.startswith("No picture can be drawn: ") and browser.value("document.querySelector('#new').disabled")
    assert gone != "file" or "python -m http.server" in text
    assert gone != "model.json" or "model.json: 404" in text


@pytest.mark.slow
def test_the_page_fits_a_phone_and_has_no_sliders_without_axes(browser, page, served, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(page, folder)
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**facts, "axes": [], "deviations": []}))
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    for address, shown in ((served(), True), (served(folder), False)):
        browser.open(address)
        browser.wait(READY)
        assert browser.value("document.documentElement.scrollWidth") <= 360
        assert browser.value("document.querySelector('#directions').getClientRects().length > 0") is shown
