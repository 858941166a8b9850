"""--folders classes: labels from folders to images. main() of the scripts runs in process."""

import functools

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_heads, draw_images, drawn_batches, error_line, pieces_of_two_ranks
from test_export import READY, pixels, served, write_page

import checkpoints
import data
import demo_images
import evaluate
import export
import extractors
import generate
import latent_space
import losses
import metrics
import run_state
import training
import training_step
from distributed import SINGLE
from errors import InputError
from model_definitions import Generator, Prior, load_generator

pytest_plugins = ["chromium"]


@pytest.fixture
def folder(tmp_path):
    """Two classes: 6 images of "big cats", one of them in a subfolder, and 3 of "dogs"."""
    root = tmp_path / "pets"
    draw_images(root / "big cats", 5)
    draw_images(root / "big cats" / "lions", 1, seed=1)
    draw_images(root / "dogs", 3, seed=2)
    return root


@pytest.fixture
def start(folder, tmp_path):
    """start(*flags) returns a new state with classes and random heads, its constants and images."""
    def new(*flags, ranks=SINGLE):
        c, _ = training.prepare_constants(["--data", str(folder), "--folders", "classes", "--runs-dir",
                                           str(tmp_path / "runs"), *SMALL, *flags])
        state, image_set = run_state.new_state(c, torch.device("cpu"), ranks), training.load_data(c)
        draw_heads(state.generator)
        return state, c, image_set
    return new


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on two classes, whose prior is not the identity."""
    root = tmp_path_factory.mktemp("classes")
    for seed, name in enumerate(("a", "b")):
        draw_images(root / "pets" / name, 8, seed=seed)
    flags = ["--data", str(root / "pets"), "--folders", "classes", "--runs-dir", str(root / "runs"), "--steps", "2"]
    assert training.main([*flags, *SMALL]) == 0
    run = root / "runs" / "pets"
    file, saved = checkpoints.find(run)
    name = "prior.to_velocity.1.weight"
    saved["ema"][name] = 0.3 * torch.randn(saved["ema"][name].shape, generator=torch.Generator().manual_seed(0))
    torch.save(saved, file)
    return run


# ------------------------------------------------------------------------------------- data

def test_labels_are_the_first_folder_of_a_path(folder, start):
    _, c, image_set = start()
    assert c.CLASSES == ["big cats", "dogs"]
    assert [c.CLASSES[label] for label in image_set.labels] == [path.split("/")[0] for path in image_set.paths]
    assert np.bincount(image_set.labels).tolist() == [6, 3]


def test_classes_are_in_natural_order(tmp_path):
    for name in ("class 10", "class 2", "a"):
        draw_images(tmp_path / name, 1)
    assert data.find_classes(tmp_path) == ["a", "class 2", "class 10"]


@pytest.mark.parametrize("break_it, words", [
    (lambda root: draw_images(root, 1), "1 image directly in it, such as 0000.png"),
    (lambda root: [f.unlink() for f in (root / "dogs").iterdir()], "contains only the class folder big cats"),
    (lambda root: None, None)])
def test_folders_that_are_no_classes_are_one_line(folder, tmp_path, capsys, break_it, words):
    break_it(folder)
    status = training.main(["--data", str(folder), "--folders", "classes", "--runs-dir", str(tmp_path / "runs"),
                            "--steps", "0", *SMALL])
    if words is None:
        assert status == 0
    else:
        assert status == 2 and words in error_line(capsys)


def test_the_classes_of_the_demo_set_are_its_skies(tmp_path):
    c, _ = training.prepare_constants(["--folders", "classes", *SMALL])
    assert c.RUN == "demo_classes"
    assert data.find_classes(demo_images.make(tmp_path / "demo", count=60, size=16)) == c.CLASSES


def test_an_image_of_another_class_is_an_error(folder, start):
    _, c, image_set = start()
    c.CLASSES = ["big cats"]
    with pytest.raises(InputError, match=r"dogs/0000\.png: in none of the class folders big cats"):
        data.set_labels(image_set, c)


def test_a_class_without_usable_images_is_one_line(folder, tmp_path, capsys):
    (folder / "empty").mkdir()
    (folder / "empty" / "broken.jpg").write_text("no image")
    flags = ["--data", str(folder), "--folders", "classes", "--runs-dir", str(tmp_path / "runs"), "--steps", "1"]
    assert training.main([*flags, *SMALL]) == 2
    assert "class folder empty: contains no usable image" in error_line(capsys)


def test_a_class_that_is_held_out_as_a_whole_is_trained_on(start):
    _, c, image_set = start()
    image_set.train, image_set.held_out = np.array([0, 1, 2]), np.array([3, 4, 5, 6, 7, 8])       # 6, 7, 8 are dogs
    data.set_labels(image_set, c)
    assert image_set.train.tolist() == [0, 1, 2, 6, 7, 8] and image_set.held_out.tolist() == [3, 4, 5]


def test_balanced_classes_take_turns_in_random_order_with_random_images(start):
    _, _, image_set = start()
    rows = data.balanced_rows(image_set, 0, 0, 400)
    labels = image_set.labels[rows].reshape(200, 2)
    assert (labels.sum(1) == 1).all() and 70 < labels[:, 0].sum() < 130
    assert np.bincount(rows)[image_set.labels == 0].min() > 15 and np.bincount(rows)[image_set.labels == 1].min() > 40
    assert 30 < image_set.labels[rows[::4]].sum() < 70                         # of those that the penalty measures
    assert np.array_equal(data.balanced_rows(image_set, 0, 5, 7), rows[5:12])       # a function of the position
    assert not np.array_equal(data.balanced_rows(image_set, 1, 0, 24), rows[:24])


def test_images_come_as_often_as_they_are_or_balanced(start):
    for flags, shares in (((), [6 / 9, 3 / 9]), (("--balance-classes",), [0.5, 0.5])):
        state, c, image_set = start(*flags)
        labels = []
        for state.counters["step"] in range(9):
            rows, _ = training_step.rows_of_images(state, c, image_set, 0)
            labels += image_set.labels[rows].tolist()
        assert np.bincount(labels) / len(labels) == pytest.approx(shares)          # 36 labels of batches of 4


# ------------------------------------------------------------------------------------- batch and loss

def test_a_batch_has_the_labels_of_its_images_except_a_tenth(start):
    state, c, image_set = start("--batch-size", "8")
    zeros = 0
    for batch, rows in drawn_batches(state, c, image_set, 40):
        for label, row in zip(batch.labels, rows):
            expected = torch.eye(2)[image_set.labels[row]]
            zeros += int(not label.any())
            assert not label.any() or torch.equal(label, expected)
    assert 15 < zeros < 55                                                           # 320 labels


def test_ranks_and_micro_batches_share_the_labels_of_a_batch(start):
    state, c, image_set = start("--batch-size", "8")
    whole = training_step.draw_batch(state, c, image_set, 0).labels
    parts = pieces_of_two_ranks(start, "--batch-size", "8")
    assert torch.equal(torch.cat([part.labels for part in parts]), whole)


def test_each_draw_of_the_priors_loss_has_the_label_of_its_code(start, float64):
    state, _, _ = start()
    rng = torch.Generator().manual_seed(1)
    codes, labels = torch.randn(3, 16, generator=rng), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    noise, t = torch.randn(3, 4, 16, generator=rng), torch.rand(3, 4, generator=rng)
    found = losses.prior_loss(state.generator.prior.velocity, codes, noise, t, labels)
    expected = [losses.flow_matching_loss(functools.partial(state.generator.prior.velocity, label=labels[i:i + 1]),
                                          codes[i:i + 1], noise[i, j:j + 1], t[i, j:j + 1])
                for i in range(3) for j in range(4)]
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-12)


def test_micro_batches_change_no_gradient(start, float64):
    found = []
    for flags in ((), ("--micro-batch", "2")):
        state, c, image_set = start(*flags)
        training_step.training_step(state, c, image_set)
        found.append(state.generator.prior.of_class.weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------- prior

def test_zeros_stand_for_no_label_and_half_a_label_lies_between():
    torch.manual_seed(0)
    prior, x, t = Prior(4, 8, classes=2), torch.randn(5, 4), torch.rand(5)
    torch.nn.init.normal_(prior.to_velocity[1].weight)
    none, a, b, between = (prior.velocity(x, t, torch.tensor([label])) for label in
                           ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))
    assert torch.equal(prior.velocity(x, t), none)
    assert (a - b).abs().max() > 0.1 and (between - a).norm() < (b - a).norm()


def test_the_prior_learns_the_codes_of_each_class():
    """Class 0 has the codes (1, 1) and (-1, 1), class 1 only (0, -1); without a label, all of them."""
    torch.manual_seed(0)
    prior, points = Prior(2, 64, classes=2), torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    optimizer = torch.optim.Adam(prior.parameters(), lr=2e-3)
    for _ in range(1200):
        which = torch.randint(4, (192,))
        label = torch.eye(2)[which // 2] * (torch.rand(192, 1) > 0.2)
        optimizer.zero_grad()
        losses.flow_matching_loss(functools.partial(prior.velocity, label=label), points[which], torch.randn(192, 2),
                                  torch.rand(192)).backward()
        optimizer.step()
    z = torch.randn(400, 2)
    with torch.no_grad():
        found = [prior(z, label.expand(400, 2)) for label in (*torch.eye(2)[:, None], torch.zeros(1, 2))]
    shares = [[(code - point).norm(dim=1).lt(0.5).float().mean().item() for point in points[:3]] for code in found]
    assert shares[0][0] > 0.4 and shares[0][1] > 0.4 and shares[0][2] < 0.02
    assert shares[1][2] > 0.95
    assert min(shares[2]) > 0.15 and sum(shares[2]) > 0.9


# ------------------------------------------------------------------------------------- scores

def test_the_classes_of_features_are_recognised():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=rng)
    centres = 5 * torch.randn(3, 8, generator=rng)
    real, fake = (centres[labels] + torch.randn(300, 8, generator=rng) for _ in range(2))
    assert metrics.recognised(real, labels, fake) == pytest.approx((1, 1))
    swapped = centres[(labels + 1) % 3] + torch.randn(300, 8, generator=rng)
    assert metrics.recognised(real, labels, swapped) == pytest.approx((0, 1))
    chance, of_real = metrics.recognised(torch.randn(300, 8, generator=rng), labels, real)
    assert 0.15 < of_real < 0.5 and 0.1 < chance < 0.6


# ------------------------------------------------------------------------------------- scripts

def test_a_run_writes_a_sheet_with_a_row_per_class_and_its_names(trained):
    assert (trained / "samples" / "step_00000002_classes.png").exists()
    assert checkpoints.find(trained)[1]["constants"]["CLASSES"] == ["a", "b"]
    assert "Generated by class" in (trained / "index.html").read_text()


def test_generate_makes_images_of_a_class(trained, tmp_path, capsys):
    assert generate.main([str(trained), "--images", "4", "--class", "b", "a", "--out", str(tmp_path)]) == 0
    generator, z = Generator.from_file(trained), latent_space.draw_z(0, 0, 4, 16)
    with torch.no_grad():
        expected = data.to_arrays(generator(z, torch.eye(2)[[1, 0, 1, 0]]))
        of_any = data.to_arrays(generator(z))
    made = [data.read_photo(tmp_path / f"seed0_{i:05d}_{'ba'[i % 2]}.png", 32, 3) for i in range(4)]
    assert (tmp_path / "seed0_grid_b_a.png").exists()
    assert np.abs(np.stack(made).astype(int) - expected).max() <= 1 < np.abs(of_any.astype(int) - expected).max()


def test_a_walk_leads_from_class_to_class(trained, tmp_path):
    labels = latent_space.walk(torch.eye(2), 8, straight=True)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert torch.equal(labels[0], torch.eye(2)[0]) and torch.equal(labels[4], torch.eye(2)[1])
    walk = ["--video", str(tmp_path / "walk"), "--seconds", "0.5", "--fps", "8", "--keyframes", "2"]
    assert generate.main([str(trained), *walk, "--class", "a", "b"]) == 0
    first, middle = (data.read_photo(tmp_path / "walk" / f"{i:05d}.png", 32, 3).astype(int) for i in (0, 2))
    generator, z = Generator.from_file(trained), latent_space.draw_z(0, 0, 2, 16)
    with torch.no_grad():
        expected = data.to_arrays(generator(z, torch.eye(2)))
    assert np.abs(first - expected[0]).max() <= 1 and np.abs(middle - expected[1]).max() <= 1


def test_a_name_that_is_no_class_is_one_line(trained, capsys):
    assert generate.main([str(trained), "--images", "1", "--class", "c"]) == 2
    assert "--class c: no class of" in (error := capsys.readouterr().err) and "must be one of a, b" in error


def test_a_model_without_classes_says_so(run, tmp_path, capsys):
    assert run("--steps", "1") == 0
    capsys.readouterr()
    assert generate.main([str(tmp_path / "runs" / "photos"), "--images", "1", "--class", "a"]) == 2
    assert "has no classes" in capsys.readouterr().err


def test_a_run_resumes_only_with_its_classes_and_starts_from_other_runs(folder, photos, run, tmp_path, capsys):
    flags = ["--data", str(folder), "--folders", "classes", "--runs-dir", str(tmp_path / "runs"), *SMALL]
    assert training.main([*flags, "--steps", "2"]) == 0 and training.main([*flags, "--steps", "4"]) == 0
    draw_images(folder / "birds", 3, seed=4)
    capsys.readouterr()
    assert training.main([*flags, "--steps", "6"]) == 2
    assert "run pets was trained without the class birds: give it" in error_line(capsys)
    assert training.main([*flags, "--steps", "6", "--fit", "pad", "--run", "pets"]) == 2
    capsys.readouterr()
    assert training.main([*flags, "--steps", "1", "--run", "more", "--init-from", str(tmp_path / "runs" / "pets")]) == 0
    assert run("--steps", "1") == 0                                       # and from a run without classes
    assert training.main([*flags, "--steps", "1", "--run", "next", "--init-from",
                          str(tmp_path / "runs" / "photos")]) == 0


def test_evaluate_recognises_classes_and_scores_each(trained, tmp_path, monkeypatch, capsys):
    extractor = extractors.Extractor(lambda images: images.mean((2, 3)), "mean colour", "cpu")
    monkeypatch.setattr(evaluate, "choose_extractor", lambda *_: extractor)
    monkeypatch.setattr(evaluate, "MEANINGFUL", 4)
    folder = trained.parent.parent / "pets"
    assert evaluate.main([str(trained), "--data", str(folder), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "class recognised" in printed
    assert "of the class a, 8 images on each side" in printed and "of the class b, 8 images" in printed


def test_generated_images_of_a_score_have_the_labels_of_the_real_ones(start):
    state, c, image_set = start()
    labels = evaluate.labels_of_sample(image_set, 5, c)
    real = evaluate.sample_images(image_set, 5)
    rows = [next(i for i, image in enumerate(image_set.images) if np.array_equal(image, pixels.permute(1, 2, 0)))
            for pixels in real]
    assert labels.argmax(1).tolist() == image_set.labels[rows].tolist()
    made = evaluate.generate(state.generator, c.LATENT_DIM, 5, 0, labels=labels)
    halves = [evaluate.generate(state.generator, c.LATENT_DIM, 5, 0, share=(i, 2), labels=labels) for i in range(2)]
    other = evaluate.generate(state.generator, c.LATENT_DIM, 5, 0, labels=labels.flip(1))
    assert (made.int() - torch.cat(halves).int()).abs().max() <= 1 < (made.int() - other.int()).abs().max()


def test_an_older_file_has_no_classes():
    generator, c, _ = load_generator("pretrained/avatars64.pt")
    assert c.CLASSES == [] and generator.classes == 0


def test_a_walk_needs_a_point_for_each_class_and_class_needs_noise(trained, tmp_path, capsys):
    video = ["--video", str(tmp_path / "walk.webp"), "--keyframes", "2"]
    assert generate.main([str(trained), *video, "--class", "a", "b", "a"]) == 2
    assert "give --keyframes 3" in capsys.readouterr().err
    assert generate.main([str(trained), "--reconstruct", "a.png", "--class", "a"]) == 2
    assert "--class is for random z" in capsys.readouterr().err


def test_scores_during_training_are_of_images_with_labels(start, monkeypatch):
    state, c, image_set = start("--evaluate-count", "12")
    seen = []
    monkeypatch.setattr(extractors, "find_extractor", lambda device: None)
    monkeypatch.setattr(evaluate, "generate", lambda *arguments, labels, **more: seen.append(labels) or torch.zeros(
        12, 3, 32, 32, dtype=torch.uint8))
    training.Evaluation(state, c, image_set).scores()
    expected = evaluate.labels_of_sample(image_set, 12, c)
    assert len(expected) == 9 and torch.equal(seen[0], torch.cat([expected, expected[:3]]))


@pytest.fixture(scope="module")
def onnx(trained):
    """The bytes of the run's ONNX file."""
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name, reason=f"the optional package {name} is not installed")
    file = trained / "exported" / "pets.onnx"
    assert export.main([str(trained), "--out", str(file)]) == 0
    return file.read_bytes()


@pytest.mark.slow
def test_onnx_has_a_label(trained, onnx):
    run, z = export.session_of(onnx), latent_space.draw_z(5, 0, 3, 16)
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    image, = run(z=z, offset=torch.zeros(3, 16), label=label)
    with torch.no_grad():
        expected = Generator.from_file(trained)(z, label)
    torch.testing.assert_close(image, expected, atol=1 / 127.5, rtol=0)


@pytest.mark.slow
def test_the_page_has_a_menu_of_classes(trained, onnx, browser, tmp_path):
    write_page(trained, tmp_path / "page", [onnx])
    generator = Generator.from_file(trained)

    def shows(z, *label):
        with torch.no_grad():
            image = generator(z[None], torch.tensor([label]))[0].permute(1, 2, 0).numpy()
        return np.abs(pixels(browser) - 127.5 * (image + 1)).max() <= 1

    with served(tmp_path) as address:
        browser.open(address + "page/")
        browser.wait(READY)
        z = torch.tensor(browser.value("Array.from(normals(1, 16))"))
        assert browser.value("[...document.querySelectorAll('#class option')].map((o) => o.text)") == ["any", "a", "b"]
        assert shows(z, 0.0, 0.0)
        browser.value("element('class').value = 1; element('class').dispatchEvent(new Event('change'))")
        browser.wait(READY)
        assert shows(z, 0.0, 1.0) and not shows(z, 0.0, 0.0)
        assert browser.complaints() == []
