"""Random changes of training images, so that VAE and critic learn more than the images of a small set.

Changed images are trained on like others, but the prior learns only the codes of unchanged ones. So no generated image
is tilted or recoloured by it: unlike with other adversarial networks (Karras et al. 2020, "Training Generative
Adversarial Networks with Limited Data"), no change can leak, at any share.

The share of changed images rises while the prior overfits: while its error is larger on the codes of held-out images
than on those of training images.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import distributed
import losses
import random_keys

CHECK_EVERY = 100       # steps between two checks of whether the prior overfits
CHECKED = 64            # images of each side, and ...
CHECKED_DRAWS = 16      # ... points on the way to each code
TOLERATED = 0.1         # larger error on held-out images, as a share, up to which the prior does not overfit
RISE_KIMG = 16          # thousand images in which the share would rise from 0 to 1
LARGEST_SHARE = 0.7
FEW = 200               # training images; smaller sets start with this share: their checks would come too late
DRAWS = 7               # numbers that augment needs for each image

# Largest changes, to both sides.
ANGLE = 0.2             # radians
SCALE = 0.18            # of the logarithm of the size
SHIFT = 0.125           # share of the side
HUE = 1.2               # radians, around the grey axis of RGB
CONTRAST = 0.2          # share of the range
BRIGHTNESS = 0.2        # in values of [-1, 1]


def update_share(state, c, image_set: data.ImageSet) -> None:
    """Sets the counter "augment", the share of changed images, before a step: AUGMENT, or, if that is -1, what the
    checks say. 0 for clips, whose frames belong together."""
    counters = state.counters
    if c.FOLDERS == "clips":
        counters["augment"] = 0.0
    elif c.AUGMENT >= 0:
        counters["augment"] = c.AUGMENT
    elif counters["step"] == 0:
        counters["augment"] = LARGEST_SHARE if len(image_set.train) < FEW else 0.0
    elif counters["step"] % CHECK_EVERY == 0 and len(image_set.held_out):
        overfits = distributed.on_rank_0(state.ranks, lambda: overfitting(state, c, image_set) > TOLERATED)
        change = CHECK_EVERY * c.BATCH_SIZE / (1000 * RISE_KIMG) * (1 if overfits else -1)
        counters["augment"] = min(LARGEST_SHARE, max(0.0, counters["augment"] + change))


@torch.no_grad()
def overfitting(state, c, image_set: data.ImageSet) -> float:
    """Returns by which share the prior's error is larger on held-out images than on training images, of CHECKED images
    each and always with the same noise."""
    errors = []
    for rows in (image_set.held_out, image_set.train):
        rows = rows[random_keys.numpy_generator(0, "overfitting").permutation(len(rows))[:CHECKED]]
        parts = data.read_batch(image_set, rows).split(c.MICRO_BATCH or c.BATCH_SIZE)
        codes = torch.cat([state.generator.vae.encode(data.to_image(part.to(state.device)))[0] for part in parts])
        labels = None if image_set.labels is None else data.one_hot(image_set.labels[rows], c).to(codes)
        rng = random_keys.torch_generator(0, "overfitting")
        noise = torch.randn(len(codes), CHECKED_DRAWS, c.LATENT_DIM, generator=rng)
        t = torch.randn(len(codes), CHECKED_DRAWS, generator=rng).sigmoid()
        errors.append(losses.prior_loss(state.generator.prior.velocity, codes, noise.to(codes), t.to(codes), labels))
    return (errors[0] / errors[1]).item() - 1


def changes(draws: Tensor) -> Tensor:
    """Returns the numbers (B, 17) that `augment` reads, within the limits above, from draws (B, DRAWS) in [0, 1)."""
    angle, scale, x, y, hue, contrast, brightness = (2 * draws - 1).unbind(1)
    angle, scale = ANGLE * angle, torch.exp(SCALE * scale)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    place = torch.stack([cos, -sin, 2 * SHIFT * x, sin, cos, 2 * SHIFT * y], dim=1)
    levels = torch.stack([1 + CONTRAST * contrast, BRIGHTNESS * brightness], dim=1)
    return torch.cat([place, turned_hue(HUE * hue).flatten(1), levels], dim=1)


def turned_hue(angle: Tensor) -> Tensor:
    """Returns the matrices (B, 3, 3) that turn RGB by the angles (B,) around its grey axis (Rodrigues' formula)."""
    axis = torch.full((3, 3), 1 / 3)                                               # projects on the axis
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return axis + cos * (torch.eye(3) - axis) + sin * across


def augment(images: Tensor, numbers: Tensor) -> Tensor:
    """Returns images (B, C, H, W) in [-1, 1], each turned, scaled and shifted, with another hue, contrast and
    brightness. What enters at the edges is mirrored. numbers: those of `changes`, on the images' device."""
    place, hue, contrast, brightness = numbers.split([6, 9, 1, 1], dim=1)
    grid = F.affine_grid(place.unflatten(1, (2, 3)), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if images.shape[1] == 3:
        images = torch.einsum("bij,bjhw->bihw", hue.unflatten(1, (3, 3)), images)
    if images.shape[1] < 4:                                  # colours times opacity would no longer fit to opacity
        images = images * contrast[:, :, None, None] + brightness[:, :, None, None]
    return images.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
