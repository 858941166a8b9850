"""export.py: main() in process on a small run with axes; the page in a headless Chromium."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_images
from PIL import Image

import checkpoints
import config
import export
import latent_space
import training
from errors import InputError
from model_definitions import Generator, Window

pytest_plugins = ["chromium"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on drawn images, whose checkpoint has principal axes."""
    folder = tmp_path_factory.mktemp("export")
    images = draw_images(str(folder / "photos"), 8)
    flags = ["--runs-dir", str(folder / "runs"), "--steps", "2", *SMALL, "--transformer-layers", "1"]
    assert training.main(["--data", images, *flags]) == 0
    file, saved = checkpoints.find(folder / "runs" / "photos")
    saved["axes"] = latent_space.principal_axes(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    name = "layer.to_s.weight"              # zero at the start: alpha would be the same everywhere
    saved["ema"][name] = torch.randn(saved["ema"][name].shape, generator=torch.Generator().manual_seed(1))
    torch.save(saved, file)
    return folder / "runs" / "photos"


@pytest.fixture(scope="module")
def model(trained):
    """The bytes of the run's ONNX file, written once by the command, and what the command printed."""
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name, reason=f"the optional package {name} is not installed")
    file, printed = trained / "exported" / "photos.onnx", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.main([str(trained), "--out", str(file)]) == 0
    assert [f.name for f in file.parent.iterdir()] == ["photos.onnx"]          # no second file with the weights
    return file.read_bytes(), printed.getvalue()


@pytest.fixture
def made(model, monkeypatch):
    """to_onnx returns the model that was made once; the fixture is the list of its calls."""
    calls = []
    monkeypatch.setattr(export, "to_onnx", lambda generator, inputs, outputs: calls.append(outputs) or model[0])
    return calls


@pytest.fixture
def dist(tmp_path):
    """A folder with files named like onnxruntime-web's, and one more."""
    (tmp_path / "dist").mkdir()
    for name in (*export.ORT_FILES, "ort.all.js"):
        (tmp_path / "dist" / name).write_text(name)
    return tmp_path / "dist"


# ------------------------------------------------------------------------------------- ONNX

def test_onnx_makes_the_images_of_torch_at_any_batch_size(trained, model):
    import onnxruntime
    session = onnxruntime.InferenceSession(model[0], providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        z = torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))
        generator = Generator.from_file(trained)
        for offset in (torch.zeros(batch, 16), torch.linspace(-1, 1, 16).expand(batch, -1)):
            image, = session.run(["image"], {"z": z.numpy(), "offset": offset.numpy()})
            assert image.shape == (batch, 3, 32, 32) and image.dtype == np.float32
            expected = generator.render(generator.start(z) + offset)
            assert np.abs(image - expected.numpy()).max() < 1 / 127.5
        assert torch.equal(generator(z), generator.render(generator.start(z)))
    line = model[1].splitlines()[-1]
    assert f"photos.onnx: {len(model[0]) / 1e6:.1f} MB, onnxruntime " in line and "levels of 255 from torch" in line


def test_the_onnx_file_has_one_kernel_for_all_frames_and_no_path_of_this_machine(trained, model):
    import onnx
    graph = onnx.load_from_string(model[0]).graph
    assert not any(tensor.data_location for tensor in graph.initializer)
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert [24, 48, 8, 8] not in sizes.values()                     # the kernels of 16 frames with 3 channels each
    for path in (Path(export.__file__).parent, Path(torch.__file__).parent, trained):
        assert str(path).encode() not in model[0]


@pytest.mark.parametrize("factor", [0.98, float("nan")])
def test_a_model_with_other_images_is_not_written(trained, made, monkeypatch, tmp_path, capsys, factor):
    real = export.torch_images
    monkeypatch.setattr(export, "torch_images", lambda *inputs: real(*inputs) * factor)
    (tmp_path / "old.onnx").write_bytes(b"old")
    assert export.main([str(trained), "--out", str(tmp_path / "old.onnx")]) == 1
    assert capsys.readouterr().err.startswith("export.py: onnxruntime's images differ from torch's by up to ")
    assert [f.name for f in tmp_path.iterdir()] == ["old.onnx"] and (tmp_path / "old.onnx").read_bytes() == b"old"


# ------------------------------------------------------------------------------------- ONNX of a video

@pytest.fixture(scope="module")
def video(clips_run, tmp_path_factory):
    """([start, step] as bytes, what the command printed) of the ONNX files of a model of clips."""
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name, reason=f"the optional package {name} is not installed")
    folder, printed = tmp_path_factory.mktemp("video"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.main([str(clips_run), "--out", str(folder / "v.onnx")]) == 0
    assert {f.name for f in folder.iterdir()} == {"v.onnx", "v_start.onnx"}
    return [(folder / name).read_bytes() for name in ("v_start.onnx", "v.onnx")], printed.getvalue()


def test_onnx_rolls_the_frames_of_torch(clips_run, video):
    import onnxruntime
    start, step = (onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"]) for part in video[0])
    assert "in 32 frames, at batch sizes 1 and 3, at most 0.0" in video[1] and "v.onnx and " in video[1]
    generator = Generator.from_file(clips_run)
    z, v = (torch.randn(2, n, generator=torch.Generator().manual_seed(n)) for n in (16, 6))
    with torch.no_grad():
        first = generator(z)
        rolled = [image for image, _ in itertools.islice(generator.roll(Window.still(generator.start(z), v, 3)), 9)]
    image, codes, earlier = start.run(["image", "codes", "earlier"], {"z": z.numpy()})
    np.testing.assert_allclose(image, first.numpy(), atol=1e-3)
    anchor = codes[:, 0]
    for expected in rolled:
        image, codes, earlier = step.run(["image", "next_codes", "next_earlier"], {
            "codes": codes, "v": v.numpy(), "anchor": anchor, "earlier": earlier})
        np.testing.assert_allclose(image, expected.numpy(), atol=1e-3)
    assert (rolled[-1] - first).abs().max() > 0.05                           # it moves


@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_a_video_model_with_other_images_is_not_written(clips_run, video, monkeypatch, tmp_path, capsys, factor):
    monkeypatch.setattr(export, "to_onnx", lambda module, inputs, outputs: video[0][len(inputs) == 4])
    session_of = export.session_of

    def wrong(model):
        run, count = session_of(model), itertools.count()
        return lambda **inputs: [found * (factor if next(count) == 30 else 1) for found in run(**inputs)]

    monkeypatch.setattr(export, "session_of", wrong)
    export.checked_onnx.cache_clear()
    assert export.main([str(clips_run), "--out", str(tmp_path / "v.onnx")]) == 1
    assert "onnxruntime's images differ from torch's" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- weights for sharing

@pytest.mark.parametrize("kind, other", [(".pt", ".safetensors"), (".safetensors", ".pt")])
def test_a_weights_file_holds_half_the_averaged_weights_and_nothing_private(trained, tmp_path, capsys, kind, other):
    pytest.importorskip("safetensors", reason="the optional package safetensors is not installed")
    file, again = tmp_path / f"shared{kind}", tmp_path / f"again{other}"
    assert export.main([str(trained), "--out", str(file), "--about", "drawn by a test"]) == 0
    line = capsys.readouterr().out
    assert f"{file}: {file.stat().st_size / 1e6:.1f} MB" in line and "levels of 255" in line
    saved, run = checkpoints.load(file), checkpoints.find(trained)[1]
    assert set(saved) == {"format", "constants", "ema", "counters", "axes", "about"}
    assert saved["ema"].keys() == run["ema"].keys() and {t.dtype for t in saved["ema"].values()} == {torch.float16}
    assert saved["counters"] == {"step": 2, "images_seen": 8} and saved["about"] == {"text": "drawn by a test"}
    assert saved["constants"] == {**run["constants"], "DATA": "photos", "RUNS_DIR": config.RUNS_DIR}
    assert all(torch.equal(saved["axes"][name], run["axes"][name]) for name in ("mean", "axes", "deviations"))
    assert str(trained.parent.parent).encode() not in file.read_bytes()
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    images, shared = (127.5 * Generator.from_file(path)(z) for path in (trained, file))
    assert (images - shared).abs().max() <= 2 and images.std() > 1
    assert export.main([str(file), "--out", str(again)]) == 0                # a shared file can be exported too
    assert checkpoints.load(again)["about"] == {"text": "drawn by a test"}


@pytest.mark.parametrize("path,name", [("/home/me/faces", "faces"), ("C:\\Users\\me\\faces\\", "faces"), ("", "")])
def test_only_the_name_of_the_data_folder_is_shared(trained, path, name):
    saved = checkpoints.find(trained)[1]
    saved["constants"]["DATA"] = path
    assert export.weights_only(saved)["constants"]["DATA"] == name


def test_a_damaged_safetensors_file_and_a_missing_package_are_one_line(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors", reason="the optional package safetensors is not installed")
    file = tmp_path / "shared.safetensors"
    assert export.main([str(trained), "--out", str(file)]) == 0
    content = file.read_bytes()
    for broken in (content[:100], content[:-10], b""):
        file.write_bytes(broken)
        with pytest.raises(checkpoints.DamagedCheckpoint, match="damaged"):
            checkpoints.load(file)
    file.write_bytes(content)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="needs the package safetensors"):
        checkpoints.load(file)
    capsys.readouterr()
    assert export.main([str(trained), "--out", str(file)]) == 2
    assert "needs the package safetensors" in capsys.readouterr().err and file.read_bytes() == content


# ------------------------------------------------------------------------------------- the page's folder

def test_a_page_is_a_folder_with_all_it_needs_and_shares_the_model_of_out(trained, model, made, dist, tmp_path, capsys):
    folder = tmp_path / "deep" / "page"
    flags = [str(trained), "--web", str(folder), "--ort", str(dist)]
    assert export.main([*flags, "--out", str(tmp_path / "a.onnx")]) == 0 and made == [["image"]]
    for about in ("", "again"):                                     # a new page may replace an earlier one
        assert export.main([*flags, "--about", about]) == 0
        assert {f.name for f in folder.iterdir()} == {"index.html", "model.onnx", "model.json", *export.ORT_FILES}
        assert [f.name for f in folder.parent.iterdir()] == ["page"]
        facts = json.loads((folder / "model.json").read_text())
        assert (facts["name"], facts["image_size"], facts["channels"]) == ("photos", 32, 3)
        assert (facts["latent_dim"], facts["step"], facts["images_seen"], facts["about"]) == (16, 2, 8, about)
        assert np.shape(facts["axes"]) == (8, 16) and facts["deviations"] == sorted(facts["deviations"], reverse=True)
    assert (tmp_path / "a.onnx").read_bytes() == (folder / "model.onnx").read_bytes() == model[0]
    printed = capsys.readouterr().out
    assert f"python -m http.server -d {folder}" in printed and "no sliders" not in printed


def test_a_checkpoint_without_axes_gives_a_page_and_weights_without_axes(trained, made, dist, tmp_path, capsys):
    saved = checkpoints.find(trained)[1]
    del saved["axes"]
    torch.save(saved, tmp_path / "plain.pt")
    flags = ["--web", str(tmp_path / "page"), "--ort", str(dist)]
    assert export.main([str(tmp_path / "plain.pt"), *flags]) == 0
    assert "no sliders" in capsys.readouterr().out
    assert json.loads((tmp_path / "page" / "model.json").read_text())["axes"] == []
    assert "axes" not in export.weights_only(saved)


@pytest.mark.parametrize("argv,words", [
    ("{run}", "nothing to do"), ("{run} --out {tmp}/a.zip", ".onnx, .pt or .safetensors"),
    ("{tmp}/none --out a.pt", "no such run"),
    ("{run} --out {tmp}/file/a.pt", "{tmp}/file"), ("{run} --out {checkpoint}", "give another name"),
    ("{run} --out {tmp}/a.pt --ort {tmp}/dist", "--web"), ("{run} --web {tmp}/page", "npm, which"),
    ("{run} --web {tmp}/page --ort {tmp}/in", "contains no ort.wasm"),
    ("{run} --web {tmp}/in --ort {tmp}/dist", "other files"),
    ("{run} --web {tmp}/file --ort {tmp}/dist", "{tmp}/file")])
def test_invalid_input_is_one_line_and_writes_nothing(trained, made, dist, monkeypatch, tmp_path, capsys, argv, words):
    monkeypatch.setattr(shutil, "which", lambda name: None)                 # a machine without npm
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "index.html").write_text("another page")
    checkpoint = next((trained / "checkpoints").glob("step*"))
    names, content = {"run": trained, "tmp": tmp_path, "checkpoint": checkpoint}, checkpoint.read_bytes()
    assert export.main(argv.format(**names).split()) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("export.py: ") and words.format(**names) in text, text
    assert {f.name for f in tmp_path.iterdir()} == {"file", "in", "dist"}
    assert (tmp_path / "in" / "index.html").read_text() == "another page" and checkpoint.read_bytes() == content


@pytest.mark.parametrize("package", export.ONNX_PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(trained, monkeypatch, tmp_path, capsys, package):
    for name in export.ONNX_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert export.main([str(trained), "--out", str(tmp_path / "new" / "a.onnx")]) == 2
    text = capsys.readouterr().err
    assert f"the package {package}," in text and "requirements-extras.txt" in text and not list(tmp_path.iterdir())


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

def pixels(browser):
    """Returns the image on the page, int (H, W, 3)."""
    text = browser.value("document.querySelector('canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB")).astype(int)


@contextlib.contextmanager
def served(folder):
    """Serves a folder on localhost; gives its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def write_page(run, folder, models):
    """Writes a page with the real onnxruntime-web, from the folder ORT_WEB_DIST or from npm. models: {outputs: model}.
    """
    given = os.environ.get("ORT_WEB_DIST")
    if given is None and shutil.which("npm") is None:
        pytest.skip("no onnxruntime-web: npm is not installed, and ORT_WEB_DIST names no folder with it")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setattr(export, "to_onnx", lambda generator, inputs, outputs: models[outputs[1:2] == ["next_codes"]])
        status = export.main([str(run), "--web", str(folder), *(["--ort", given] if given else [])])
    if status == 2 and "npm pack" in printed.getvalue():
        pytest.skip(f"no onnxruntime-web: {printed.getvalue().strip()}")
    assert status == 0, printed.getvalue()


@pytest.fixture(scope="module")
def site(trained, model, tmp_path_factory):
    """(folder, address) of a site on localhost. Its subfolder `page` is a page of still images."""
    folder = tmp_path_factory.mktemp("web")
    write_page(trained, folder / "page", [model[0]])
    with served(folder) as address:
        yield folder, address


@pytest.fixture
def page(browser, site):
    """The browser with the page open and its first image drawn."""
    browser.open(site[1] + "page/")
    browser.wait(READY)
    return browser


READY = "!document.querySelector('#new').disabled && !drawing"


@pytest.mark.slow
def test_the_page_shows_torchs_images_and_answers_click_slider_key_and_walk(trained, page, site):
    def torchs(z, offset=0):
        generator = Generator.from_file(trained)
        return 127.5 * (generator.render(generator.start(z[None]) + offset)[0].permute(1, 2, 0).numpy() + 1)

    first, z = pixels(page), torch.tensor(page.value("Array.from(normals(1, 16))"))
    assert first.shape == (32, 32, 3) and np.abs(first - torchs(z)).max() <= 1

    page.value("document.querySelector('#new').click()")
    page.wait(f"document.querySelector('#status').textContent !== 'Number 1' && {READY}")
    assert np.abs(pixels(page) - first).max() > 1

    page.value("document.querySelector('#number').value = 1; document.querySelector('#number').focus()")
    page.press("Enter")
    page.wait(f"document.querySelector('#status').textContent === 'Number 1' && {READY}")
    assert np.array_equal(pixels(page), first)

    page.value("document.querySelector('#axis2').focus()")
    for _ in range(10):
        page.press("ArrowRight")
    page.wait(f"document.querySelector('#value2').textContent === '+1.0' && {READY}")
    axes = checkpoints.find(trained)[1]["axes"]
    moved = torchs(z, axes["deviations"][2] * axes["axes"][2])
    assert np.abs(pixels(page) - moved).max() <= 1 < np.abs(pixels(page) - first).max()
    page.value("document.querySelector('#reset').click()")
    page.wait(f"document.querySelector('#value2').textContent === '0.0' && {READY}")
    assert np.array_equal(pixels(page), first)

    page.value("document.querySelector('#walk').click()")
    page.wait("position > 1.2")
    walked = pixels(page)
    page.wait(f"position > {page.value('position')} + 0.1")
    assert np.abs(pixels(page) - walked).max() > 0
    page.value("document.querySelector('#walk').click()")
    page.wait(f"!walking && {READY}")

    asked = {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith((site[1], "data:,", "about:")) for url in asked) and len(asked) >= 5, asked
    assert page.complaints() == []


@pytest.mark.slow
def test_the_pages_draws_are_normal_and_its_paths_those_of_latent_space(page):
    values = np.array(page.value("Array.from(normals(5, 20000))"))
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.02 and abs((values ** 3).mean()) < 0.1
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    a, b = (torch.tensor(page.value(f"Array.from(normals({n}, 16))")) for n in (5, 6))
    for t in (0.0, 0.3, 1.0):
        got = torch.tensor(page.value(f"Array.from(spherical(normals(5, 16), normals(6, 16), {t}))"))
        torch.testing.assert_close(got, latent_space.spherical(a, b, torch.tensor(t)), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("gone,words", [("model.onnx", ""), ("model.json", "model.json: 404"),
                                        (export.ORT_FILES[1], ""), (None, "python -m http.server")])
def test_a_page_that_cannot_load_its_model_says_why(browser, site, gone, words):
    folder, address = site
    shutil.copytree(folder / "page", folder / f"without_{gone}")
    if gone:
        (folder / f"without_{gone}" / gone).unlink()
    browser.open(f"{address if gone else folder.as_uri() + '/'}without_{gone}/index.html")     # None: without a server
    browser.wait("document.querySelector('#error')?.hidden === false")
    text = browser.value("document.querySelector('#error').innerText")
    assert text.startswith("The page cannot draw: ") and words in text
    assert browser.value("document.querySelector('#new').disabled")


@pytest.mark.slow
def test_the_page_of_clips_plays_torchs_frames_without_end(clips_run, video, browser, tmp_path):
    write_page(clips_run, tmp_path / "page", video[0])
    generator = Generator.from_file(clips_run)

    def torchs(z, v, count):
        window = Window.still(generator.start(z[None]), v[None], 3)
        with torch.no_grad():
            image, _ = next(itertools.islice(generator.roll(window), count - 1, None))
        return 127.5 * (image[0].permute(1, 2, 0).numpy() + 1)

    with served(tmp_path) as address:
        browser.open(address + "page/")
        browser.wait("shown > 3")                                            # it plays at once
        browser.value("document.querySelector('#fps').value = 60")
        browser.wait("shown > 12")
        assert browser.value("document.querySelectorAll('#sliders input').length") == 6
        browser.value("document.querySelector('#walk').click()")
        browser.value("last.then(() => new Promise((done) => setTimeout(done, 100)))")      # the frame under way
        z, v = torch.tensor(browser.value("Array.from(normals(1, 22))")).split((16, 6))
        assert np.abs(pixels(browser) - torchs(z, v, browser.value("shown"))).max() <= 1
        browser.value("(async () => { await showNumber(1); element('axis1').value = 2; await nextFrame(); })()")
        assert browser.value("document.querySelector('#status').textContent") == "Number 1, frame 1"
        v[1] += 2
        assert np.abs(pixels(browser) - torchs(z, v, 1)).max() <= 1
        assert browser.complaints() == []
