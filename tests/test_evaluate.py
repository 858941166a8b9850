"""evaluate.py: main in process on folders, a run and bad input; the extractor is a small stand-in unless its weights
are at hand."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import data
import evaluate
import training


class StandIn:
    """Features that need no weights: mean and deviation of each channel in a 2 x 2 raster."""
    name = "a stand-in, 24 features"

    def __call__(self, images):
        cells = images.float().unflatten(3, (2, -1)).unflatten(2, (2, -1))
        return torch.cat([cells.mean((3, 5)).flatten(1), cells.std((3, 5)).flatten(1)], dim=1)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(evaluate, "find_extractor", lambda device: StandIn())


def folder(path, count, level, seed):
    """Pictures of noise around a grey level, in a folder of their own."""
    path.mkdir()
    g = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(g.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def numbers(text):
    """The first number of each line that begins with a score's name."""
    names = ("Frechet distance", "KID x 1000", "precision", "recall", "diversity", "sliced Wasserstein", "copies, 1%",
             "copies, 5%", "nearest image", "reconstruction L1", "reconstruction PSNR", "reconstruction SSIM")
    return {name: float(line.removeprefix(name).split()[0].rstrip("%")) for line in text.splitlines()
            for name in names if line.startswith(name)}


def image_set(images, held_out=0):
    """An ImageSet of uint8 (N, H, W, C) in memory, whose last `held_out` images are held out."""
    rows = np.arange(len(images))
    names = [f"folder/{i}.png" for i in rows]
    return data.ImageSet(images, names, rows[:len(rows) - held_out], rows[len(rows) - held_out:], [])


def noise(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class MeanColour(torch.nn.Module):
    """A generator whose latent space is a picture's mean colour, and its picture that colour."""
    def __init__(self):
        super().__init__()
        self.vae, self.weight = self, torch.nn.Parameter(torch.zeros(1))

    def encode(self, image):
        return image.mean((2, 3)), None

    def forward(self, z):
        return z[:, :, None, None].expand(-1, -1, 32, 32)


def test_two_folders_alike_are_nearer_than_two_that_are_not(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real, alike = folder(tmp_path / "real", 40, 100, 0), folder(tmp_path / "alike", 40, 100, 1)
    darker = folder(tmp_path / "darker", 40, 60, 2)
    found = {}
    for other in (alike, darker):
        assert evaluate.main([str(other), "--data", str(real), "--image-size", "32"]) == 0
        found[other.name] = numbers(capsys.readouterr().out)
        assert len(found[other.name]) == 9
    assert found["darker"]["Frechet distance"] > 100 * found["alike"]["Frechet distance"]
    assert found["darker"]["KID x 1000"] > 1 > abs(found["alike"]["KID x 1000"] / found["darker"]["KID x 1000"])
    assert (found["darker"]["precision"], found["darker"]["recall"]) == (0, 0)
    assert min(found["alike"]["precision"], found["alike"]["recall"]) > 0.4
    assert found["alike"]["diversity"] == pytest.approx(1, abs=0.1)


def test_a_run_is_scored_by_its_averaged_generator_and_a_seed_repeats(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 20, 128, 0)
    assert training.main(["--data", str(real), "--steps", "2", *SMALL]) == 0
    capsys.readouterr()
    outputs = []
    for extra in ([], [], ["--seed", "1"]):
        assert evaluate.main(["runs/real", "--data", str(real), "--count", "16", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert "16 pictures against 16 real ones, 32 px" in outputs[0]
    assert outputs[0] == outputs[1] != outputs[2]


def test_without_weights_a_line_says_so_and_the_other_score_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "find_extractor", lambda device: None)
    real = folder(tmp_path / "real", 8, 128, 0)
    assert evaluate.main([str(real), "--data", str(real), "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    found = numbers(out)
    assert "no Frechet distance" in out and "Frechet distance" not in found
    assert (found["sliced Wasserstein"], found["diversity"]) == (0, 1)


@pytest.mark.parametrize("argv, word", [
    (["nowhere", "--data", "DIR"], "nowhere"),
    (["DIR", "--data", "nowhere"], "nowhere"),
    (["DIR", "--data", "DIR", "--count", "3"], "--count"),
    (["DIR", "--data", "DIR", "--seed", "-1"], "--seed"),
    (["DIR", "--data", "DIR", "--image-size", "33"], "--image-size"),
    (["DIR"], "--data"),
    (["DIR", "--data", "DIR", "--extractor", "resnet51"], "resnet51"),
    (["DIR", "--data", "DIR", "--extractor", "nowhere.pt"], "nowhere.pt"),
    (["DIR", "--data", "DIR", "--image-size", "32", "--out", "real/0.png"], "real/0.png"),
    (["FEW", "--data", "DIR", "--image-size", "32", "--out", "new"], "few"),
    (["DIR", "--data", "FEW", "--image-size", "32", "--out", "new"], "few"),
])
def test_bad_input_is_one_line_and_status_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {"DIR": str(folder(tmp_path / "real", 4, 128, 0)), "FEW": str(folder(tmp_path / "few", 3, 128, 0))}
    assert evaluate.main([folders.get(a, a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error and not (tmp_path / "new").exists()


def test_the_weights_load_and_give_features_of_the_whole_network():
    """Equal to torchvision's own forward pass up to its classifier."""
    extractor = evaluate.find_extractor(torch.device("cpu"))
    if extractor is None:
        pytest.skip("the weights of MobileNetV2 are not on this machine")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert found.shape == (3, 1280) and found.std() > 0.05
    grey = extractor(images[:, :1])
    torch.testing.assert_close(grey, extractor(images[:, :1].expand(-1, 3, -1, -1)))
    assert (grey - found).abs().max() > 0.1


def test_copies_are_found_and_put_beside_their_images():
    images = noise(300, 16)
    of = torch.tensor([7, 150, 299, 42])
    generated = torch.cat([to_tensor(noise(4, 16, seed=1)), to_tensor(images)[of]])
    found = evaluate.copy_check(generated, image_set(images))
    assert found["nearest"][4:].tolist() == of.tolist() and found["distances"][4:].tolist() == [0] * 4
    assert found["compared"].min() > 50 and len(found["compared"]) == 256
    sheet = evaluate.copies_sheet(found, generated, image_set(images))
    label = sheet.shape[0] // 2 - 16 - 4                 # two rows of a label, a picture and half of a gap
    np.testing.assert_array_equal(sheet[label:label + 16, :16], images[7])
    np.testing.assert_array_equal(sheet[label:label + 16, 18:34], images[7])


@pytest.mark.parametrize("held_out", [0, 40])
def test_distances_are_compared_with_those_of_images_that_were_not_trained_on_if_there_are_any(held_out):
    images = noise(120, 16)
    images[100] = images[3]                              # a duplicate across the border
    found = evaluate.copy_check(to_tensor(noise(5, 16, seed=1)), image_set(images, held_out))
    assert len(found["compared"]) == (held_out or 120)
    assert (found["compared"] == 0).sum() == (1 if held_out else 2)
    assert (found["nearest"] < 120 - held_out).all()
    lines = " ".join(evaluate.copy_lines(found, image_set(images, held_out)))
    assert ("40 held-out images" in lines) == bool(held_out) != ("no image is held out" in lines)
    flat = [images[i].reshape(16 * 16 * 3).astype(float) for i in range(120 - held_out)]
    one = noise(5, 16, seed=1)[0].reshape(-1).astype(float)
    assert found["distances"][0].item() == pytest.approx(min(np.sqrt(((one - x) ** 2).mean()) for x in flat), rel=1e-6)


def test_small_pictures_distance_is_the_root_mean_square_of_levels():
    plain = torch.full((2, 3, 48, 48), 100, dtype=torch.uint8)
    plain[1] += 30
    a, b = evaluate.small(plain)
    assert (a - b).norm().item() == pytest.approx(30)


def test_the_look_at_a_folder_finds_the_worst_and_the_near_duplicates():
    """Plain pictures but for one that is half black, half white: its reconstruction, grey, is 127 or 128 levels off."""
    colours = np.random.default_rng(0).integers(0, 256, (60, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(colours, (60, 32, 32, 3)).copy()
    images[11], images[11, :16] = 255, 0
    images[33] = images[20]
    images[33, 5, 5] ^= 7                                # not equal, but nearly so
    of, generator = image_set(images, held_out=10), MeanColour()
    look = evaluate.look_at_folder(generator, of, count=100)
    assert sorted(look["rows"].tolist()) == list(range(60)) and look["held_out"].sum() == 10
    sheet, lines = evaluate.worst_reconstructed(generator, of, look)
    assert lines[1].split() == ["1", "127.5", "levels", "folder/11.png"] and lines[2].split()[1:3] == ["0.0", "levels"]
    np.testing.assert_array_equal(sheet[22:54, :32], images[11])                 # under its label
    assert abs(int(sheet[60, 10, 0]) - 127) <= 1                                 # its reconstruction, below
    sheet, lines = evaluate.near_duplicates(of, look)
    names = lines[1].split()[3:]
    assert set(names) == {"folder/20.png", "folder/33.png"}
    np.testing.assert_array_equal(sheet[22:54, :32], images[of.paths.index(names[0])])
    held_out = evaluate.reconstruction_lines(look)
    assert "10 held-out images" in held_out[0] and numbers(held_out[0])["reconstruction L1"] == 0
    assert float(held_out[0].split(";")[1].split()[0]) == pytest.approx(127.5 / 50, rel=0.01)


def test_pictures_far_from_each_other_are_no_near_duplicates():
    grid = np.stack(np.meshgrid(*[np.arange(10, 250, 60)] * 3), axis=-1).reshape(-1, 1, 1, 3)
    of = image_set(np.broadcast_to(grid.astype(np.uint8), (len(grid), 32, 32, 3)).copy())
    look = evaluate.look_at_folder(MeanColour(), of, count=4)
    assert len(look["rows"]) == 16                       # LOOK times count
    look = evaluate.look_at_folder(MeanColour(), of, count=100)
    sheet, (line,) = evaluate.near_duplicates(of, look)
    assert sheet is None and "1.00 of the median" in line


def test_a_run_leaves_its_sheets_and_names_files_that_are_there(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 20, 128, 0)
    (real / "20.png").write_bytes((real / "3.png").read_bytes())
    assert training.main(["--data", str(real), "--steps", "2", *SMALL]) == 0
    capsys.readouterr()
    assert evaluate.main(["runs/real", "--data", str(real), "--count", "16"]) == 0
    out = capsys.readouterr().out
    assert len(numbers(out)) == 12 and "20 training images" not in out and "21 training images" in out
    sheets = {"copies.png", "worst_reconstructed.png", "near_duplicates.png"}
    assert {file.name for file in (tmp_path / "runs/real/evaluation").iterdir()} == sheets
    assert out.split("near-duplicates")[1].splitlines()[1].split() in (["1", "0.00", "0.0", "3.png", "20.png"],
                                                                       ["1", "0.00", "0.0", "20.png", "3.png"])
    worst = [line.split()[-1] for line in out.splitlines() if " levels  " in line]
    assert len(worst) == 18 and all((real / name).is_file() for name in worst)

    (real / "20.png").unlink()                           # no near-duplicates: their sheet goes
    assert evaluate.main(["runs/real", "--data", str(real), "--count", "16"]) == 0
    assert {file.name for file in (tmp_path / "runs/real/evaluation").iterdir()} == sheets - {"near_duplicates.png"}

    file = next((tmp_path / "runs/real/checkpoints").glob("*.pt"))
    assert evaluate.main([str(file), "--data", str(real), "--count", "16", "--out", "elsewhere"]) == 0
    assert (tmp_path / "elsewhere/copies.png").is_file() and not (file.parent / "evaluation").exists()


def test_a_copied_folder_is_called_copies(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 20, 128, 0)
    assert evaluate.main([str(real), "--data", str(real), "--image-size", "32", "--out", "sheets"]) == 0
    found = numbers(capsys.readouterr().out)
    assert (found["copies, 1%"], found["nearest image"], found["diversity"]) == (100, 0, 1)
    assert [file.name for file in (tmp_path / "sheets").iterdir()] == ["copies.png"]


def test_what_cannot_be_written_leaves_nothing_half_written(tmp_path, monkeypatch, capsys, stand_in):
    monkeypatch.chdir(tmp_path)
    real = folder(tmp_path / "real", 6, 128, 0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    assert evaluate.main([str(real), "--data", str(real), "--image-size", "32", "--out", "sheets"]) == 2
    error = capsys.readouterr().err.strip()
    assert "copies.png" in error and "No space left" in error and "\n" not in error
    assert list((tmp_path / "sheets").iterdir()) == []
