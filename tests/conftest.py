"""Fixtures and helpers that several test files share."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import command_line
import data
import dynamics
import model_definitions
import run_state
import training
import training_step
from distributed import Ranks
from model_definitions import Window

torch.set_num_threads(1)       # the tensors are small: a second thread would mostly wait
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs, and their children, ignore it

# Flags of a run with steps of some hundredths of a second.
SMALL = ["--image-size", "32", "--batch-size", "4", "--width", "8", "--encoder-width", "4", "--width-max", "32",
         "--latent-dim", "16", "--prior-width", "16", "--transformer-dim", "24", "--transformer-layers", "2", "--patch",
         "8", "--num-frames", "4", "--sample-count", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2",
         "--gp-every", "2", "--augment", "0"]


def draw_images(folder, count, size=40, seed=0):
    """Writes `count` different PNG files, each with two flat colours and a slanted border; returns the folder."""
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    rows, columns = np.mgrid[:size, :size]
    for number in range(count):
        one, other = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        side = columns + rng.normal() * rows > rng.uniform(0, size)
        image = Image.fromarray(np.where(side[..., None], one, other))
        image.putpixel((0, 0), (number % 256, number // 256, 0))      # so that no two images are equal
        image.save(os.path.join(folder, f"{number:04d}.png"))
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(count, size=40, name="photos") draws a folder of `count` images and returns its path."""
    def draw(count, size=40, name="photos", seed=0):
        return draw_images(str(tmp_path / name), count, size, seed)
    return draw


@pytest.fixture
def photos(image_folder):
    return image_folder(12)


@pytest.fixture
def run(photos, tmp_path):
    """run(*flags) trains on the photos in tmp_path/runs and returns the exit status."""
    def start(*flags, images=photos):
        return training.main(["--data", str(images), "--runs-dir", str(tmp_path / "runs"), *SMALL, *flags])
    return start


def lines(tmp_path, name="photos"):
    """Returns the lines of a run's log."""
    return [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def error_line(capsys):
    """Returns what training.py wrote to stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("training.py: "), text
    return text


def around_step(monkeypatch, before):
    """Calls before(state) before each training step."""
    one_step = training.training_step

    def step(state, c, image_set):
        before(state)
        return one_step(state, c, image_set)
    monkeypatch.setattr(training, "training_step", step)


def poison(monkeypatch, at):
    """Makes the critic return NaN in each step for which at(step, rollbacks) is true."""
    one_step = training.training_step

    def step(state, c, image_set):
        if not at(state.counters["step"], state.counters["rollbacks"]):
            return one_step(state, c, image_set)
        weight = next(state.critic.parameters())
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        values = one_step(state, c, image_set)
        weight.data.copy_(kept)
        return values
    monkeypatch.setattr(training, "training_step", step)


def draw_heads(generator):
    """Draws the weights that start as zero, behind which no gradient would reach anything."""
    heads = [generator.layer.to_s, generator.prior.to_velocity[1]]
    if generator.layer.dynamics is not None:
        heads.append(generator.layer.dynamics.to_delta)
    for head in heads:
        head.weight.data.copy_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))


def drawn_batches(state, c, image_set, steps):
    """Yields the batch of each step and the rows of its images."""
    for state.counters["step"] in range(steps):
        yield training_step.draw_batch(state, c, image_set, 0), training_step.rows_of_images(state, c, image_set, 0)[0]


def pieces_of_two_ranks(start, *flags):
    """Returns the micro-batches of two images of both ranks' batches. start: the fixture of a test file."""
    return [piece for rank in range(2) for piece in
            training_step.draw_batch(*start(*flags, ranks=Ranks(rank, 2)), 0).pieces(2)]


def use_float64(setattr):
    """Makes new networks, random draws and images float64, for comparisons that float32 rounding would hide."""
    to_image = data.to_image
    torch.set_default_dtype(torch.float64)
    setattr(data, "to_image", lambda pixels: to_image(pixels).double())


@pytest.fixture
def float64(monkeypatch):
    use_float64(monkeypatch.setattr)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------- clips

LENGTHS = (3, 9, 30, 30, 40)                 # frames of the clips; the last one is held out
PAST = 3                                     # earlier frames of a window: NUM_FRAMES - 1


def clips_of(lengths, image_size=32):
    """Returns an ImageSet of clips with random pixels."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    images = np.random.default_rng(0).integers(0, 256, (offsets[-1], image_size, image_size, 3), dtype=np.uint8)
    last = len(lengths) - 1
    return data.ImageSet(images, [f"{i}.png" for i in range(len(images))], np.arange(offsets[last]),
                         np.arange(offsets[last], offsets[-1]), [], clip_offsets=offsets,
                         clip_names=[f"clip {i}" for i in range(len(lengths))], train_clips=np.arange(last),
                         held_out_clips=np.array([last]))


@pytest.fixture
def start_stage_2():
    """start_stage_2(*flags) returns a new state in stage 2 with random heads, its constants and clips."""
    def new(*flags, lengths=LENGTHS):
        c, _ = command_line.parse_constants([*SMALL, "--folders", "clips", "--vae-kimg", "1", "--dynamics-kimg", "2",
                                             "--motion-batch", "8", *flags])
        state, clips = run_state.new_state(c, command_line.choose_device(c.DEVICE)), clips_of(lengths)
        state.counters["images_seen"] = 1000
        draw_heads(state.generator)
        state.ema.load_state_dict(state.generator.state_dict())
        dynamics.begin(state, c, clips)
        return state, c, clips
    return new


def window_of(c, rng, count=2):
    """Returns random windows of clips."""
    return Window(torch.randn(count, c.NUM_FRAMES - 1, c.LATENT_DIM, generator=rng),
                  torch.randn(count, c.MOTION_DIM, generator=rng), torch.randn(count, c.LATENT_DIM, generator=rng))


@pytest.fixture(scope="session")
def clips_run(tmp_path_factory):
    """The folder of a run on clips with a random Delta head, in stage 2."""
    folder = tmp_path_factory.mktemp("clips")
    c, _ = command_line.parse_constants([*SMALL, "--folders", "clips", "--vae-kimg", "1", "--dynamics-kimg", "2"])
    torch.manual_seed(0)
    generator, _ = model_definitions.build(c)
    for head in (generator.layer.to_s, generator.layer.dynamics.to_delta):
        torch.nn.init.normal_(head.weight, std=0.1)
    checkpoints.save(folder / "run" / "checkpoints", {
        "constants": vars(c), "counters": {"step": 2, "images_seen": 1000}, "ema": generator.state_dict()}, step=2)
    return folder / "run"
