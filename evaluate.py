"""Scores a model, or a folder of images, against a folder of real images, and checks for copies.

    python evaluate.py runs/NAME --data DIR                   # a run, or a checkpoint file
    python evaluate.py DIR_A --data DIR_B --image-size 64     # two folders of images
    python evaluate.py runs/NAME --data DIR --extractor inception_v3

Prints Frechet distance, kernel distance (KID), precision, recall and diversity on the features of a pretrained
network, and the sliced Wasserstein distance, which needs no weights. Compares how near generated and held-out images
are to training images. For a run, also reconstructs images of DIR, and lists the worst reconstructions and the
near-duplicates in latent space. Writes copies.png, worst_reconstructed.png and near_duplicates.png to RUN/evaluation.
For a run on clips, scores frame 16 of videos from noise, and the videos themselves: predictions, speed and drift, the
order of frames, a Frechet distance of motion, flicker, and copies of clips (nearest_clips.png). docs/video.md has each.
Scores depend on the number of images: compare only those with the same --count, image size and extractor.

--extractor is one of
    auto        torchvision's MobileNetV2 with its first ImageNet weights, from torch.hub's cache folder or the package
                in requirements-weights.txt; without weights, as none
    none        only what needs no weights
    a name      an image classifier of torchvision (inception_v3, resnet50, ...) whose ImageNet weights are in
                torch.hub's cache folder; its features are the input of its last layer. Nothing is downloaded
    a file      a TorchScript module: float32 (N, 3, H, W) in [0, 1], images at their own size -> float (N, D).
                It is a program that runs when it is loaded: load only files you trust
No distance is called FID, which is defined on other weights of Inception than torchvision's. A TorchScript file with
those weights (2048 features, resizing included) computes FID.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import clip_scores
import command_line
import config
import data
import metrics
import pictures
import random_keys
import rollouts
from command_line import InputError
from data import ImageSet
from extractors import NO_WEIGHTS, Extractor, choose_extractor, over_white, progress
from model_definitions import Generator, learned_motion, load_generator

LEAST = 4                   # images on each side: precision and recall use the third neighbour
MEANINGFUL = 64             # images: KID's standard error is 12% of a trained model's KID with 32, 9% with 64
BATCH = 64                  # images per batch, except:
GENERATED_BATCH = 32        # generated images
COPY_CHECK = 256            # generated images, and images compared with them, in the copy check
TRAINING_FACTOR = 4         # at most this times --count training images are reconstructed
NEAR = 0.25                 # near-duplicates are closer than this times the median distance to a nearest neighbour;
                            # recompressed, cropped (2%) and shifted (1 px) copies of avatars: 0.05 to 0.2
SHOWN = 18                  # pairs on a sheet


# ------------------------------------------------------------------------------------- images and scores

@torch.inference_mode()
def generate(generator: nn.Module, latent_dim: int, count: int, seed: int, share: tuple[int, int] = (0, 1),
             image_of: Callable | None = None, labels: Tensor | None = None) -> Tensor:
    """Returns `count` images from noise, uint8 (count, C, H, W) on the CPU. share (i, n): only the i-th of n parts.
    image_of: from noise (B, latent_dim) to images (B, C, H, W); None: the generator. labels (count, K): of a model with
    classes."""
    z = torch.randn(count, latent_dim, generator=random_keys.torch_generator(seed, "evaluate"))
    inputs = [tensor.tensor_split(share[1])[share[0]].split(GENERATED_BATCH)
              for tensor in (z, labels) if tensor is not None]
    device = next(generator.parameters()).device
    return torch.cat([data.to_uint8((image_of or generator)(*(tensor.to(device) for tensor in part))).cpu()
                      for part in progress(list(zip(*inputs)), "generating")])


def sample_images(image_set: ImageSet, count: int, seed: int = 0) -> Tensor:
    """Returns `count` images of the training split, or all if it has fewer: uint8 (count, C, H, W)."""
    return data.read_batch(image_set, shuffled(image_set.train, seed)[:count])


def labels_of_sample(image_set: ImageSet, count: int, c: Namespace) -> Tensor | None:
    """Returns the labels (count, K) of sample_images; None without classes."""
    if image_set.labels is None:
        return None
    return data.one_hot(image_set.labels[shuffled(image_set.train)[:count]], c)


def shuffled(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the rows in an order that depends only on their number and the seed."""
    return rows[random_keys.numpy_generator(seed, "evaluate").permutation(len(rows))]


@torch.inference_mode()
def critic_scores(critic: nn.Module, images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> the critic's scores (N,), on the CPU."""
    device = next(critic.parameters()).device
    return torch.cat([critic(data.to_image(part.to(device))).cpu() for part in images.split(BATCH)])


def scores(generated: Tensor, real: Tensor, extractor: Extractor | None = None, real_features: Tensor | None = None,
           features: Tensor | None = None) -> dict[str, float]:
    """Returns {name: score} for two sets of uint8 images, (N, C, H, W) and (M, C, H, W), N and M at least LEAST.

    features, real_features: extractor(generated) and extractor(real), if already computed. Without an extractor, only
    sliced_wasserstein and the diversity of thumbnails.
    """
    found = {}
    generated, real = over_white(generated), over_white(real)
    if extractor is not None:
        a = extractor(generated) if features is None else features
        b = extractor(real) if real_features is None else real_features
        found["frechet"] = metrics.frechet_distance(a, b)
        found["kid"], found["kid_error"] = metrics.kernel_distance(a, b)
        found["precision"], found["recall"] = metrics.precision_and_recall(b, a)
    else:
        a, b = metrics.thumbnails(generated), metrics.thumbnails(real)
    found["diversity"] = metrics.diversity(a, b)
    found["sliced_wasserstein"] = metrics.sliced_wasserstein(generated, real)[1]
    return found


# ------------------------------------------------------------------------------------- what is printed and drawn

def print_value(name: str, value: float, meaning: str) -> None:
    """Prints one line, at once also into a pipe, because the next value may take minutes."""
    print(f"{name:20} {value:8.3f}    {meaning}", flush=True)


def print_scores(found: dict[str, float], extractor: Extractor | None) -> None:
    """Prints the result of `scores`, each with its meaning."""
    if extractor:
        print_value("Frechet distance", found["frechet"], extractor.name)
        print_value("KID x 1000", found["kid"], f"standard error {found['kid_error']:.2f}; same features")
        print_value("precision", found["precision"], "share of the images within the real set; same features")
        print_value("recall", found["recall"], "share of the real images within the set; same features")
    points = "same features" if extractor else f"images at {metrics.THUMBNAIL} px"
    print_value("diversity", found["diversity"], f"mean distance between two images / between two real ones; {points}")
    print_value("sliced Wasserstein", found["sliced_wasserstein"], "mean over the levels of a Laplacian pyramid")


def print_classes(made: Tensor, real: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Prints how well the classes of generated images are recognised, and the Frechet distance of each class that has
    MEANINGFUL images. made, real (N, D): features of a generated and a real image of each class in `labels` (N,)."""
    found, of_real = metrics.recognised(real, labels, made)
    print_value("class recognised", found, "share of the images whose class a linear classifier of real images finds; "
                f"{of_real:.3f} of other real images; same features")
    for i, name in enumerate(classes):
        chosen = labels == i
        if chosen.sum() >= MEANINGFUL:
            print_value("Frechet distance", metrics.frechet_distance(made[chosen], real[chosen]),
                        f"of the class {data.printable(name)}, {int(chosen.sum()):,} images on each side")


def print_dot_pattern(generated: Tensor, real: Tensor) -> None:
    """Prints how much stronger a pattern of dots is in generated than in real images, uint8 (N, C, H, W)."""
    for period in (2, 4):
        made, expected = (metrics.excess_power(over_white(images), period) for images in (generated, real))
        print_value(f"dots, period {period}", made / expected, f"power at {period} pixels, relative to periods near it "
                    f"and to real images ({expected:.2f}); above 1.5 a pattern of dots is visible")


def print_count_warning(count: int) -> None:
    """Warns about scores of few images."""
    if count < MEANINGFUL:
        print(f"warning: {count} images are too few, these scores are mostly chance: use {MEANINGFUL} or more")


def check_copies(generated: Tensor, image_set: ImageSet) -> np.ndarray:
    """Prints how near generated images, uint8 (N, C, H, W), are to training images, compared with held-out images, or,
    if none is held out, with training images and the nearest other one. Returns a sheet of the closest pairs: a
    generated image, to its right the training image."""
    train, held_out = image_set.train, image_set.held_out
    kind, others = ("held-out images", held_out) if len(held_out) else ("training images", train)
    positions = shuffled(np.arange(len(others)))[:COPY_CHECK]
    own = torch.full((len(generated) + len(positions),), -1)
    if not len(held_out):
        own[len(generated):] = torch.from_numpy(positions)
    points = metrics.thumbnails(over_white(torch.cat([generated, data.read_batch(image_set, others[positions])])))
    parts = progress(np.split(train, range(BATCH, len(train), BATCH)), "copy check")
    of_train = (metrics.thumbnails(over_white(data.read_batch(image_set, part))) for part in parts)
    distance, index = metrics.nearest(points, of_train, own)

    distance, of_compared = distance.split([len(generated), len(positions)])
    for percent in (1, 5):
        share = (distance <= of_compared.quantile(percent / 100)).double().mean().item()
        print_value(f"copies, {percent}%", share, f"share of {len(distance)} images as near to a training image as the "
                    f"nearest {percent}% of {len(positions)} {kind}; about {percent / 100} without copies")
    print_value("nearest image", distance.median(), f"median distance to the nearest of {len(train):,} training "
                f"images, RMS in levels at {metrics.THUMBNAIL} px; {of_compared.median():.3f} for {kind}")
    if not len(held_out):
        print("no image is held out: the set is too small")
    closest = distance.argsort(stable=True)[:SHOWN]
    nearest = train[index[closest].numpy()]
    return pictures.pairs(generated[closest].permute(0, 2, 3, 1).numpy(), image_set.images[nearest])


@torch.inference_mode()
def encode_and_reconstruct(generator: Generator, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) -> mu (N, LATENT_DIM) and the reconstruction from it, uint8, both on the CPU."""
    device = next(generator.parameters()).device
    mu, _ = generator.vae.encode(data.to_image(pixels.to(device)))
    return mu.float().cpu(), data.to_uint8(generator.render(mu)).cpu()


def reconstruct_folder(generator: Generator, image_set: ImageSet, count: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Reconstructs up to `count` held-out and TRAINING_FACTOR * count training images and prints their mean L1 errors.

    Returns their rows in image_set.images (N,), mu (N, LATENT_DIM) and L1 errors (N,) in grey levels.
    """
    held_out, train = shuffled(image_set.held_out)[:count], shuffled(image_set.train)[:TRAINING_FACTOR * count]
    rows, found = np.concatenate([held_out, train]), []
    for part in progress(np.split(rows, range(BATCH, len(rows), BATCH)), "reconstructing"):
        real = data.read_batch(image_set, part)
        mu, reconstruction = encode_and_reconstruct(generator, real)
        found.append((mu, metrics.absolute_error(real, reconstruction)))
    mu, l1_errors = map(torch.cat, zip(*found))
    for kind, l1 in zip(("held-out", "training"), l1_errors.split([len(held_out), len(train)])):
        if len(l1):
            print_value("reconstruction L1", l1.mean(), f"levels of 255, mean over {len(l1):,} {kind} images")
    return rows, mu, l1_errors


def show_worst(generator: Generator, image_set: ImageSet, rows: np.ndarray, l1_errors: Tensor) -> np.ndarray:
    """Prints the images with the largest L1 errors. Returns a sheet, each above its reconstruction."""
    largest, worst = l1_errors.sort(descending=True, stable=True)
    rows = rows[worst[:SHOWN].numpy()]
    print("worst reconstructed: check that they belong to the set and that it contains enough like them")
    for number, (row, l1) in enumerate(zip(rows, largest), 1):
        print(f"{number:4}  {l1:5.1f} levels  {data.printable(image_set.paths[row])}")
    _, reconstruction = encode_and_reconstruct(generator, data.read_batch(image_set, rows))
    return pictures.pairs(image_set.images[rows], reconstruction.permute(0, 2, 3, 1).numpy(), above=True)


def show_near_duplicates(image_set: ImageSet, rows: np.ndarray, mu: Tensor) -> np.ndarray | None:
    """Prints the pairs of images that are near-duplicates in latent space. Returns a sheet of them, or None."""
    pairs, distances = metrics.closest_pairs(mu)
    near = int((distances < NEAR).sum())
    print(f"near-duplicates in latent space: {near:,} pairs are closer than {NEAR:g} times the median distance to a "
          f"nearest neighbour; the closest is at {distances[0]:.2f}")
    if near == 0:
        return None
    a, b = rows[pairs[:min(near, SHOWN)].numpy()].T
    difference = metrics.thumbnails(data.read_batch(image_set, a)) - metrics.thumbnails(data.read_batch(image_set, b))
    for number, (i, j, distance, levels) in enumerate(zip(a, b, distances, difference.norm(dim=1)), 1):
        print(f"{number:4}  {distance:5.2f}  {levels:5.1f} levels  {data.printable(image_set.paths[i])}  "
              f"{data.printable(image_set.paths[j])}")
    return pictures.pairs(image_set.images[a], image_set.images[b])


# ------------------------------------------------------------------------------------- command line

def parse(argv: Sequence[str] | None) -> Namespace:
    """Returns the arguments, and as `is_run` whether the path is a run or a checkpoint file, rather than a folder of
    images; `out` gets its default for a run. Raises InputError."""
    parser = command_line.Parser("evaluate.py", __doc__)
    parser.add_argument("path", metavar="RUN_OR_DIR", help="a run's folder, a checkpoint file, or a folder of images")
    parser.add_argument("--data", required=True, metavar="DIR", help="real images; for a run, its training images")
    parser.add_argument("--extractor", default="auto", metavar="NAME",
                        help="see above; a TorchScript file runs code: load only files you trust [%(default)s]")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="images on each side [%(default)s]")
    parser.add_argument("--out", metavar="DIR", help="folder for the sheets [RUN/evaluation; of a file: ./evaluation]")
    parser.add_argument("--cache", metavar="DIR", help="folder of decoded images [runs/.cache, or a temporary one]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise [%(default)s]")
    parser.add_argument("--image-size", type=int, default=config.IMAGE_SIZE, metavar="N",
                        help="for two folders; a run has its own [%(default)s]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.count < LEAST:
        raise InputError(f"--count {arguments.count} is invalid: must be {LEAST} or more")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} is invalid: must be 0 or more")
    path = Path(arguments.path)
    if not path.exists():
        raise InputError(f"{path}: no such run, file or folder of images")
    arguments.is_run = path.is_file() or (path / "config.json").is_file() or (path / "checkpoints").is_dir()
    if arguments.is_run and not arguments.out:
        arguments.out = (Path() if path.is_file() else path) / "evaluation"
    return arguments


def start(argv: Sequence[str] | None) -> None:
    """Evaluates what the command line names. Raises InputError."""
    arguments = parse(argv)
    c, _ = command_line.parse_constants(["--image-size", str(arguments.image_size)], "evaluate.py")
    device, generator = command_line.choose_device(arguments.device), None
    if arguments.is_run:
        generator, c, saved = load_generator(arguments.path, device)
    extractor = choose_extractor(arguments.extractor, device)
    if extractor is None and arguments.extractor == "auto":
        print(f"no Frechet distance: {NO_WEIGHTS}")
    cache = data.cache_elsewhere(arguments.cache)
    image_set = data.load_images_of_run(arguments.data, c, cache)
    data.set_labels(image_set, c)
    real = sample_images(image_set, arguments.count)
    made = real if generator else sample_images(data.load_images_of_run(arguments.path, c, cache), arguments.count)
    for path, images in ((arguments.data, real), (arguments.path, made)):
        if len(images) < LEAST:
            raise InputError(f"{path}: contains {len(images)} images to compare, must be {LEAST} or more")
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)          # an error here, before the work

    real_features = extractor and extractor(real)
    rolls = generator is not None and learned_motion(saved)
    if rolls:
        made = generate(generator, c.LATENT_DIM + c.MOTION_DIM, len(real), arguments.seed,
                        image_of=functools.partial(rollouts.late_frames, generator, c))
    elif generator:
        labels = labels_of_sample(image_set, arguments.count, c)
        made = generate(generator, c.LATENT_DIM, len(real), arguments.seed, labels=labels)
    print(f"{len(made):,} images against {len(real):,} real images, {c.IMAGE_SIZE} px")
    print_count_warning(min(len(made), len(real)))
    features = extractor and extractor(made)
    print_scores(scores(made, real, extractor, real_features, features), extractor)
    if generator and c.CLASSES and extractor:
        print_classes(features, real_features, labels.argmax(1), c.CLASSES)
    print_dot_pattern(made, real)
    sheets = {"copies.png": check_copies(made[:COPY_CHECK], image_set)}
    if generator:
        rows, mu, l1_errors = reconstruct_folder(generator, image_set, arguments.count)
        sheets["worst_reconstructed.png"] = show_worst(generator, image_set, rows, l1_errors)
        if c.FOLDERS != "clips":                                        # neighbouring frames are alike
            sheets["near_duplicates.png"] = show_near_duplicates(image_set, rows, mu)
    if rolls:
        found, of_videos = clip_scores.scores(generator, c, image_set, device, extractor,
                                              max(clip_scores.LEAST, len(real) // 4), arguments.seed)
        for name, value, meaning in found:
            print_value(name, value, meaning)
        sheets |= of_videos
    elif generator and c.FOLDERS == "clips":
        print("no scores of videos: the run has not learned motion yet, it is in stage 1")
    if arguments.out:
        for name, sheet in sheets.items():
            file = Path(arguments.out) / name
            if sheet is None:
                file.unlink(missing_ok=True)                            # of an earlier evaluation
            else:
                pictures.save_picture(file, sheet)
        print(f"wrote {', '.join(name for name in sheets if sheets[name] is not None)} to {arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run_script("evaluate.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
