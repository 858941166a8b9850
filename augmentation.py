"""Random changes of training images, so that a VAE and a critic of few images learn more than these images.

Changed images are trained on like others, but the prior learns only the codes of unchanged ones. So no generated image
is tilted or recoloured by it: unlike with other adversarial networks (Karras et al. 2020, "Training Generative
Adversarial Networks with Limited Data"), no change can leak, at any share.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEW, MANY, LARGEST_SHARE = 300, 3_000, 0.7     # automatic share: LARGEST_SHARE up to FEW images, 0 from MANY on
DRAWS = 7                                      # numbers that augment needs for each image

# Largest changes, to both sides.
ANGLE = 0.2             # radians
SCALE = 0.18            # of the logarithm of the size
SHIFT = 0.125           # share of the side
HUE = 1.2               # radians, around the grey axis of RGB
CONTRAST = 0.2          # share of the range
BRIGHTNESS = 0.2        # in values of [-1, 1]


def share_of(c, images: int) -> float:
    """Returns the share of changed images: AUGMENT, or, if that is below 0, one that suits a set of so many images. 0
    for clips, whose frames belong together."""
    if c.FOLDERS == "clips":
        return 0
    if c.AUGMENT >= 0:
        return c.AUGMENT
    return LARGEST_SHARE * min(1, max(0, math.log(MANY / images) / math.log(MANY / FEW)))


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Returns images (B, C, H, W) in [-1, 1], each turned, scaled and shifted, with another hue, contrast and
    brightness, within the limits above. draws (B, DRAWS) in [0, 1). What enters at the edges is mirrored."""
    angle, scale, x, y, hue, contrast, brightness = (2 * draws - 1).unbind(1)
    angle, scale = ANGLE * angle, torch.exp(SCALE * scale)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([cos, -sin, 2 * SHIFT * x]), torch.stack([sin, cos, 2 * SHIFT * y])
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if images.shape[1] == 3:
        images = torch.einsum("bij,bjhw->bihw", turned_hue(HUE * hue), images)
    if images.shape[1] < 4:                                  # colours times opacity would no longer fit to opacity
        images = images * (1 + CONTRAST * contrast)[:, None, None, None] + BRIGHTNESS * brightness[:, None, None, None]
    return images.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def turned_hue(angle: Tensor) -> Tensor:
    """Returns the matrices (B, 3, 3) that turn RGB by the angles (B,) around its grey axis (Rodrigues' formula)."""
    axis = torch.full((3, 3), 1 / 3, device=angle.device, dtype=angle.dtype)              # projects on the axis
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(angle) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return axis + cos * (torch.eye(3).to(angle) - axis) + sin * across
