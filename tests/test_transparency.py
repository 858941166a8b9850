"""CHANNELS = 4: transparent images from files to files."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import augmentation
import data
import evaluate
import extractors
import generate
import pictures
import training


@pytest.fixture
def folder(tmp_path):
    """12 discs of different colours on transparent ground, with soft edges, and one image without transparency."""
    (tmp_path / "discs").mkdir()
    y, x = np.mgrid[:40, :40]
    for i in range(12):
        opacity = np.clip((12 + i % 5 - np.hypot(x - 20, y - 20)) / 3, 0, 1)
        colour = np.array([20 * i, 255 - 20 * i, 90])
        pixels = np.concatenate([np.broadcast_to(colour, (40, 40, 3)), 255 * opacity[..., None]], axis=2)
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / "discs" / f"{i:02d}.png")
    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "discs" / "solid.png")
    return tmp_path / "discs"


def test_colours_are_multiplied_by_opacity_and_hidden_ones_are_zero(folder):
    pixels = data.read_photo(folder / "03.png", 40, 4)
    with Image.open(folder / "03.png") as picture:
        original = np.array(picture).astype(float)
    assert np.array_equal(pixels[..., 3], original[..., 3])
    assert np.abs(pixels[..., :3] - original[..., :3] * original[..., 3:] / 255).max() <= 0.5
    assert not pixels[0, 0].any()
    assert data.read_photo(folder / "solid.png", 40, 4)[5, 5].tolist() == [10, 20, 30, 255]


def test_borders_of_pad_are_transparent(tmp_path):
    Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / "wide.png")
    pixels = data.read_photo(tmp_path / "wide.png", 32, 4, 255, "pad")
    assert not pixels[[0, 7, 24, 31]].any() and pixels[16, 16].tolist() == [200, 100, 50, 255]


@pytest.mark.parametrize("suffix, tolerance", [("png", 1), ("webp", 12)])
def test_a_saved_picture_has_its_own_colours_again(folder, tmp_path, suffix, tolerance):
    pixels = data.read_photo(folder / "03.png", 40, 4)
    pictures.save_picture(tmp_path / f"out.{suffix}", pixels)
    with Image.open(folder / "03.png") as picture, Image.open(tmp_path / f"out.{suffix}") as saved:
        expected, found = np.array(picture).astype(int), np.array(saved).astype(int)
    assert found.shape == (40, 40, 4) and np.array_equal(found[..., 3], expected[..., 3])
    visible = expected[..., 3] > 128
    assert np.abs(found - expected)[visible].max() <= tolerance


def test_a_sheet_shows_transparent_images_over_white(folder):
    pixels = data.read_photo(folder / "03.png", 40, 4)
    with Image.open(folder / "03.png") as picture:
        white = Image.new("RGBA", picture.size, "white")
        expected = np.array(Image.alpha_composite(white, picture).convert("RGB")).astype(int)
    assert np.abs(pictures.grid([pixels]).astype(int) - expected).max() <= 1


def test_features_are_those_of_the_image_over_white(folder):
    seen = []
    extractor = extractors.Extractor(lambda images: seen.append(images) or images.mean((2, 3)), "mean", "cpu")
    pixels = np.stack([data.read_photo(folder / f"{i:02d}.png", 40, 4) for i in range(3)])
    extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert np.abs(255 * seen[0].permute(0, 2, 3, 1).numpy() - pictures.opaque(pixels)).max() <= 1.01


def test_changes_move_transparent_images_and_keep_their_colours():
    images = -torch.ones(1, 4, 32, 32)
    images[:, :, 8:20, 8:20] = torch.tensor([0.25, -0.5, 0.0, 1.0])[:, None, None]
    made = augmentation.augment(images, augmentation.changes(torch.full((1, augmentation.DRAWS), 0.9)))
    assert (made - images).abs().max() > 1
    inside = made[0, 3] > 0.999
    assert inside.sum() > 50
    torch.testing.assert_close(made[0, :, inside], torch.tensor([0.25, -0.5, 0.0, 1.0])[:, None].expand(
        4, int(inside.sum())), atol=2e-3, rtol=0)


def test_a_run_makes_transparent_images_and_opaque_sheets(folder, tmp_path):
    flags = ["--data", str(folder), "--runs-dir", str(tmp_path / "runs"), "--channels", "4", "--steps", "2", *SMALL]
    assert training.main(flags) == 0
    run, out = tmp_path / "runs" / "discs", tmp_path / "out"
    with Image.open(run / "samples" / "step_00000002_real.png") as sheet:
        assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == (255, 255, 255)
    assert generate.main([str(run), "--images", "2", "--out", str(out), "--reconstruct", str(folder / "03.png"),
                          "--alpha-maps", "2", "--video", str(tmp_path / "walk.webp"), "--seconds", "0.2"]) == 0
    with Image.open(out / "seed0_00000.png") as image, Image.open(out / "seed0_grid.png") as sheet:
        assert image.mode == "RGBA" and sheet.mode == "RGB"
    assert evaluate.main([str(run), "--data", str(folder), "--extractor", "none", "--out", str(tmp_path / "e")]) == 0
