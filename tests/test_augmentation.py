"""Changed training images: what augment does, and that only unchanged images reach the prior."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_heads, draw_images, drawn_batches, lines, pieces_of_two_ranks

import augmentation
import checkpoints
import command_line
import data
import losses
import random_keys
import run_state
import training_step
from distributed import SINGLE


@pytest.fixture
def start(tmp_path):
    """start(*flags) returns a new state with random heads, its constants and 12 images."""
    root = draw_images(tmp_path / "photos", 12)

    def new(*flags, ranks=SINGLE):
        c, _ = command_line.parse_constants([*SMALL, "--batch-size", "8", *flags])
        image_set = data.load_images(root, c.IMAGE_SIZE, c.CHANNELS, tmp_path / "cache", workers=0, progress=False)
        state = run_state.new_state(c, torch.device("cpu"), ranks)
        draw_heads(state.generator)
        augmentation.update_share(state, c, image_set)
        return state, c, image_set
    return new


def changes(**given):
    """The changes of one image from draws in the middle, except those given by name, in [-1, 1]."""
    names = ("angle", "scale", "x", "y", "hue", "contrast", "brightness")
    assert len(names) == augmentation.DRAWS and set(given) <= set(names)
    return augmentation.changes(torch.tensor([[(1 + given.get(name, 0)) / 2 for name in names]],
                                             dtype=torch.get_default_dtype()))


# ------------------------------------------------------------------------------------- one image

@pytest.fixture
def image(float64):
    """A smooth image in [-0.7, 0.7], bright at the right and below its middle."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 65), torch.linspace(-1, 1, 65), indexing="ij")
    bump = torch.exp(-((x - 0.3) ** 2 + (y - 0.1) ** 2) / 0.05)
    return torch.stack([0.7 * bump, -0.5 * bump, 0.2 * bump])[None]


def centre(image):
    """The place (x, y) of the brightest part, as shares of half the side."""
    weight = image[0, 0].clamp_min(0)
    place = (torch.arange(65) - 32) / 32.5
    return ((weight.sum(0) * place).sum() / weight.sum()).item(), ((weight.sum(1) * place).sum() / weight.sum()).item()


def test_draws_in_the_middle_change_nothing(image):
    torch.testing.assert_close(augmentation.augment(image, changes()), image, atol=1e-12, rtol=0)


def test_a_shift_moves_by_its_share_of_the_side(image):
    x, y = centre(image)
    moved = centre(augmentation.augment(image, changes(x=0.8, y=-1)))
    assert moved == pytest.approx((x - 0.8 * 2 * augmentation.SHIFT, y + 2 * augmentation.SHIFT), abs=2e-3)


def test_a_turn_and_a_scale_are_about_the_centre(image):
    x, y = centre(image)
    angle, scale = augmentation.ANGLE, math.exp(augmentation.SCALE)
    turned = centre(augmentation.augment(image, changes(angle=1)))
    expected = (math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y)
    assert turned == pytest.approx(expected, abs=2e-3)
    assert centre(augmentation.augment(image, changes(scale=1))) == pytest.approx((scale * x, scale * y), abs=2e-3)


def test_hue_keeps_greys_lengths_and_means_and_has_the_angle(float64):
    angles = torch.tensor([0.4, -1.1, 2 * math.pi / 3])
    matrices, grey = augmentation.turned_hue(angles), torch.full((3,), 0.3)
    torch.testing.assert_close(matrices @ grey, grey.expand(3, 3), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(3, 3, 3), atol=1e-12, rtol=0)
    torch.testing.assert_close((matrices.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2, angles.cos(), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrices[2] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-12, rtol=0)


def test_contrast_and_brightness_are_linear_and_clamped(image):
    made = augmentation.augment(image, changes(contrast=1, brightness=-0.5))
    expected = (1 + augmentation.CONTRAST) * image - 0.5 * augmentation.BRIGHTNESS
    torch.testing.assert_close(made, expected.clamp(-1, 1), atol=1e-12, rtol=0)
    assert augmentation.augment(torch.ones_like(image), changes(brightness=1)).max() == 1


def test_each_image_has_its_own_change_and_grey_images_work():
    images = torch.rand(5, 1, 32, 32) * 2 - 1
    numbers = augmentation.changes(torch.rand(5, augmentation.DRAWS))
    whole = augmentation.augment(images, numbers)
    one_by_one = [augmentation.augment(images[i:i + 1], numbers[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(one_by_one), atol=1e-6, rtol=0)
    assert ((whole - images).abs().mean((1, 2, 3)) > 0.05).all()


# ------------------------------------------------------------------------------------- in training

@pytest.mark.parametrize("flags, images, held_out, share", [
    ((), 79, 0, augmentation.LARGEST_SHARE), ((), 100, 16, augmentation.LARGEST_SHARE), ((), 500, 0, 0),
    (("--augment", "0.2"), 50, 0, 0.2),
    (("--augment", "0"), 50, 0, 0), (("--augment", "0.3"), 5000, 100, 0.3), (("--folders", "clips"), 50, 0, 0),
    (("--folders", "clips", "--augment", "0.5"), 50, 0, 0)])
def test_the_share_at_the_start_and_without_held_out_images_or_if_it_is_given(flags, images, held_out, share):
    c, _ = command_line.parse_constants(list(flags))
    image_set = SimpleNamespace(train=np.arange(images), held_out=np.arange(held_out))
    state = SimpleNamespace(counters={"step": 0, "augment": 0.5}, ranks=SINGLE)
    for state.counters["step"] in range(0, 100, 99):
        augmentation.update_share(state, c, image_set)
        assert state.counters["augment"] == share
    state.counters["step"] = 100
    if not held_out:
        augmentation.update_share(state, c, image_set)
        assert state.counters["augment"] == share


def test_the_share_rises_while_the_prior_overfits_and_then_falls(monkeypatch):
    c, _ = command_line.parse_constants(["--batch-size", "32"])
    image_set = SimpleNamespace(train=np.arange(400), held_out=np.arange(16))
    state = SimpleNamespace(counters={"step": 0, "augment": 0.0}, ranks=SINGLE)
    asked, found = [], []
    monkeypatch.setattr(augmentation, "overfitting", lambda state, *_: asked.append(state.counters["step"]) or (
        0.12 if state.counters["step"] < 600 else 0.08))
    for state.counters["step"] in range(1100):
        augmentation.update_share(state, c, image_set)
        found.append(state.counters["augment"])
    assert asked == [*range(100, 1100, 100)]
    assert found[::100] == pytest.approx([0, 0.2, 0.4, 0.6, 0.7, 0.7, 0.5, 0.3, 0.1, 0, 0])    # 3,200 of 16,000
    assert found[99] == 0 and found[100] == found[199]


def test_overfitting_compares_the_priors_errors_of_held_out_and_training_images(start, monkeypatch, float64):
    state, c, image_set = start()
    image_set.train, image_set.held_out = np.arange(8), np.arange(8, 12)
    codes = {row: torch.randn(16, generator=torch.Generator().manual_seed(row)) * (3 if row >= 8 else 1)
             for row in range(12)}
    rows_of = {image_set.images[row].tobytes(): row for row in range(12)}

    def encode(image):
        arrays = data.to_arrays(image)
        mu = torch.stack([codes[rows_of[array.tobytes()]] for array in arrays])
        return mu, mu

    monkeypatch.setattr(state.generator.vae, "encode", encode)
    torch.nn.init.zeros_(state.generator.prior.to_velocity[1].weight)                 # its velocity is 0 everywhere
    expected = [torch.stack([codes[row] for row in rows]).square().mean() + 1 for rows in (range(8, 12), range(8))]
    monkeypatch.setattr(augmentation, "CHECKED_DRAWS", 2000)                          # noise is independent of codes
    share = (expected[0] / expected[1]).item() - 1
    assert augmentation.overfitting(state, c, image_set) == pytest.approx(share, rel=0.02)
    image_set.held_out = image_set.train
    assert augmentation.overfitting(state, c, image_set) == 0


def test_the_share_is_logged_and_survives_a_resume(run, tmp_path):
    flags = ("--augment", "-1", "--log-every", "1")
    assert run("--steps", "2", *flags) == 0 and run("--steps", "3", *flags) == 0
    saved = checkpoints.find(tmp_path / "runs" / "photos")[1]
    assert saved["counters"]["augment"] == augmentation.LARGEST_SHARE                 # 12 photos
    assert [line["augment"] for line in lines(tmp_path)] == 3 * [augmentation.LARGEST_SHARE]


def test_a_check_reads_the_labels_of_a_run_with_classes(start, monkeypatch):
    state, c, image_set = start("--folders", "ignore")
    image_set.train, image_set.held_out, image_set.labels = np.arange(8), np.arange(8, 12), np.arange(12) % 3
    c.CLASSES, seen = ["a", "b", "c"], []

    def velocity(x, t, label):
        seen.append(label)
        return x

    monkeypatch.setattr(state.generator.prior, "velocity", velocity)
    augmentation.overfitting(state, c, image_set)
    rows = image_set.held_out[random_keys.numpy_generator(0, "overfitting").permutation(4)]
    expected = torch.eye(3)[rows % 3].repeat_interleave(augmentation.CHECKED_DRAWS, dim=0)
    assert torch.equal(seen[0], expected) and seen[1].shape == (8 * augmentation.CHECKED_DRAWS, 3)


def test_all_batches_of_a_run_that_may_change_images_have_the_same_tensors(start):
    state, c, image_set = start("--augment", "-1")
    names = []
    for state.counters["augment"] in (0.0, 0.7):
        batch = training_step.draw_batch(state, c, image_set, 0)
        names.append(list(training_step.tensor_fields(batch)))
    assert names[0] == names[1] and "prior_weight" in names[0]
    state.counters["augment"] = 0.0
    assert torch.equal(training_step.draw_batch(state, c, image_set, 0).prior_weight, torch.ones(8))


def test_a_batch_has_its_share_of_changed_images_which_weigh_nothing_for_the_prior(start):
    state, c, image_set = start("--augment", "0.6")
    unchanged = 0
    for batch, rows in drawn_batches(state, c, image_set, 40):
        as_it_is = [torch.equal(image, real) for image, real in
                    zip(batch.real, training_step.read_images(image_set, rows, state.device))]
        assert as_it_is == (batch.prior_weight > 0).tolist()
        unchanged += sum(as_it_is)
        if any(as_it_is):
            assert batch.prior_weight.mean().item() == pytest.approx(1)
    assert unchanged / 320 == pytest.approx(0.4, abs=0.08)


def test_without_changes_a_batch_is_as_before(start):
    state, c, image_set = start()
    assert training_step.draw_batch(state, c, image_set, 0).prior_weight is None


def test_changed_images_have_no_part_in_the_priors_loss(start, float64):
    state, _, _ = start()
    rng = torch.Generator().manual_seed(1)
    codes, noise, t = (torch.randn(4, 16, generator=rng), torch.randn(4, 3, 16, generator=rng),
                       torch.rand(4, 3, generator=rng))
    weight = torch.tensor([2.0, 0, 0, 2.0])
    found = losses.prior_loss(state.generator.prior.velocity, codes, noise, t, weight=weight)
    kept = [0, 3]
    assert found.item() == pytest.approx(losses.prior_loss(state.generator.prior.velocity, codes[kept], noise[kept],
                                                                  t[kept]).item(), rel=1e-12)
    equal = torch.ones(3)
    velocity = state.generator.prior.velocity
    assert losses.flow_matching_loss(velocity, codes[:3], noise[:3, 0], t[:3, 0], equal) == losses.flow_matching_loss(
        velocity, codes[:3], noise[:3, 0], t[:3, 0])


def test_ranks_and_micro_batches_share_the_changes_of_a_batch(start):
    state, c, image_set = start("--augment", "0.5")
    whole, parts = training_step.draw_batch(state, c, image_set, 0), pieces_of_two_ranks(start, "--augment", "0.5")
    torch.testing.assert_close(torch.cat([part.real for part in parts]), whole.real, atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([part.prior_weight for part in parts]), whole.prior_weight)


def test_micro_batches_change_no_gradient(start, float64):
    found = []
    for flags in ((), ("--micro-batch", "2")):
        state, c, image_set = start("--augment", "0.5", *flags)
        training_step.training_step(state, c, image_set)
        found.append({name: p.grad for name, p in state.generator.named_parameters() if name.startswith("prior.")})
    assert all(gradient.abs().sum() > 0 for name, gradient in found[0].items() if "velocity" in name)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-8, atol=1e-14)


def test_every_batch_has_an_unchanged_image(start):
    state, c, image_set = start("--augment", "0.9999")
    for batch, _ in drawn_batches(state, c, image_set, 10):
        assert sorted(batch.prior_weight.tolist()) == [0] * 7 + [8]
