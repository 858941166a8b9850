import numpy as np
import pytest
import torch
from conftest import SMALL, draw_images
from PIL import Image

import checkpoints
import generate
import latent_space
import model_definitions
import training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on drawn images."""
    folder = tmp_path_factory.mktemp("generate")
    images = draw_images(str(folder / "photos"), 8)
    assert training.main(["--data", images, "--runs-dir", str(folder / "runs"), "--steps", "2", *SMALL]) == 0
    return folder / "runs" / "photos"


def load(run):
    return model_definitions.from_checkpoint(checkpoints.find(run)[1], torch.device("cpu"))


def read(file):
    return np.asarray(Image.open(file)).astype(int)


def test_images_and_a_grid_are_written(trained, tmp_path, capsys):
    assert generate.main([str(trained), "--images", "5", "--seed", "1", "--out", str(tmp_path)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"0000{i}.png" for i in range(5)] + ["grid.png"]
    assert read(tmp_path / "00000.png").shape == (32, 32, 3)
    assert str(tmp_path / "grid.png") in capsys.readouterr().out


def test_one_seed_is_one_picture_at_any_count_and_batch_size(trained, tmp_path):
    for count in (3, 20):
        generate.main([str(trained), "--images", str(count), "--seed", "1", "--out", str(tmp_path / str(count))])
    generate.main([str(trained), "--images", "3", "--seed", "2", "--out", str(tmp_path / "other")])
    for i in range(3):
        name = f"{i:05d}.png"
        assert np.abs(read(tmp_path / "3" / name) - read(tmp_path / "20" / name)).max() <= 1
        assert np.abs(read(tmp_path / "3" / name) - read(tmp_path / "other" / name)).max() > 1
    generator, c = load(trained)
    z = latent_space.draw_z(1, 0, 5, c.LATENT_DIM)
    one, five = (np.stack(list(generate.render(generator, z, size))).astype(int) for size in (1, 5))
    assert np.abs(one - five).max() <= 1


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp"])
def test_a_walk_is_written_with_its_number_of_frames(trained, tmp_path, name):
    assert generate.main([str(trained), "--video", str(tmp_path / name), "--seconds", "1", "--fps", "10"]) == 0
    with Image.open(tmp_path / name) as video:
        assert video.is_animated and video.n_frames == 10


def test_a_single_checkpoint_file_does_too(trained, tmp_path):
    file = next((trained / "checkpoints").iterdir())
    assert generate.main([str(file), "--images", "1", "--out", str(tmp_path)]) == 0


def test_samples_come_from_the_averaged_generator(trained):
    generator, _ = load(trained)
    saved = torch.load(next((trained / "checkpoints").iterdir()), weights_only=True)
    name = "vae.from_z.weight"
    assert torch.equal(generator.state_dict()[name], saved["ema"][name])
    assert not torch.equal(saved["ema"][name], saved["generator"][name])


@pytest.mark.parametrize("argv,words", [
    (["{run}"], "nothing to do"), (["{run}", "--images", "0"], "--images"), (["{run}", "--video", "a.mp4"], ".gif"),
    (["{tmp}/none", "--images", "1"], "no such run"), (["{tmp}", "--images", "1"], "no checkpoint"),
    (["{run}", "--images", "1", "--seed", "-1"], "--seed"), (["{run}", "--video", "a.gif", "--fps", "99"], "--fps"),
    (["{run}", "--images", "1", "--out", "{tmp}/file/out"], "can't be written"),
    (["{run}", "--images", "1", "--device", "tpu"], "tpu"), ([], "run")])
def test_bad_input_is_one_line_and_status_2(trained, tmp_path, capsys, argv, words):
    (tmp_path / "file").write_text("a file in the way")
    assert generate.main([a.format(run=trained, tmp=tmp_path) for a in argv]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("generate.py: ") and words in text, text
