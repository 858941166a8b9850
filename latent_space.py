"""Points, paths and directions in latent space: of noise z, and of the codes that the prior makes from it.

Noise lies near a sphere of radius sqrt(LATENT_DIM). A straight line between two points would leave that sphere; paths
here interpolate direction and norm separately. Directions are those of codes.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import random_keys


def rng_of_image(seed: int, index: int) -> torch.Generator:
    """Returns the torch.Generator of image `index` of a seed."""
    return random_keys.torch_generator(seed, "generate", index)


def draw_z(seed: int, first: int, count: int, latent_dim: int) -> Tensor:
    """Returns z (count, LATENT_DIM) on the CPU, for the images first, first + 1, ...: each image has a key of its own,
    so it does not depend on `count`."""
    return torch.stack([torch.randn(latent_dim, generator=rng_of_image(seed, first + i)) for i in range(count)])


def spherical(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Returns the point at t in [0, 1] between a and b (..., D): its direction on the great circle (Shoemake 1985,
    "Animating Rotation with Quaternion Curves"), its norm interpolated linearly."""
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    direction_a, direction_b = a / norm_a, b / norm_b
    angle = torch.arccos((direction_a * direction_b).sum(-1, keepdim=True).clamp(-1, 1))
    direction = (torch.sin((1 - t) * angle) * direction_a + torch.sin(t * angle) * direction_b) / torch.sin(angle)
    # Equal directions have no great circle (0 / 0); the straight line is the same path then.
    return torch.where(angle < 1e-4, a + t * (b - a), direction * (norm_a + t * (norm_b - norm_a)))


def walk(keyframes: Tensor, frames: int, loop: bool = True, straight: bool = False) -> Tensor:
    """Returns a path (frames, D) through the keyframes (K, D). With loop it leads back to the first keyframe, without
    it the last point is the last keyframe. straight: along lines, as labels need it.

    Between two keyframes the speed rises from 0 and falls to 0 along a cosine, so the path has no visible corners.
    """
    parts = len(keyframes) if loop else len(keyframes) - 1
    path = []
    for position in torch.arange(frames) * parts / (frames if loop else max(1, frames - 1)):
        start = int(position)
        eased = (1 - torch.cos(torch.pi * (position - start))) / 2
        between = torch.lerp if straight else spherical
        path.append(between(keyframes[start], keyframes[(start + 1) % len(keyframes)], eased))
    return torch.stack(path)


@torch.inference_mode()
def encode(vae: nn.Module, arrays: Sequence[np.ndarray], batch_size: int = 16) -> Tensor:
    """Returns mu (N, LATENT_DIM), on the CPU, of uint8 arrays (H, W, C) of one size. vae: model_definitions.VAE."""
    device = vae.to_mu.weight.device
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    parts = tqdm(pixels.split(batch_size), desc="encoding", leave=False, delay=2, disable=not sys.stderr.isatty())
    return torch.cat([vae.encode(data.to_image(part.to(device)))[0].cpu() for part in parts])


def encode_sample(vae: nn.Module, image_set: data.ImageSet, count: int = 2048) -> Tensor:
    """Returns mu (N, LATENT_DIM) of `count` random training images, the same ones at each call, or of all."""
    order = random_keys.numpy_generator(0, "encode").permutation(len(image_set.train))
    return encode(vae, data.read_images(image_set.images, np.sort(image_set.train[order[:count]])))


def principal_axes(mu: Tensor) -> dict[str, Tensor]:
    """Returns the directions in which encoded images mu (N, D) vary most, those of the largest variance first.

    As {"mean": (D,), "axes": (min(N, D), D), unit vectors as rows, "deviations": (min(N, D),), standard deviations}.
    The sign of an axis is such that its largest entry is positive.
    """
    mean = mu.double().mean(0)
    _, values, axes = torch.linalg.svd(mu.double() - mean, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return {"mean": mean.float(), "axes": (axes * largest.sign()).float(),
            "deviations": (values / max(1, len(mu) - 1) ** 0.5).float()}
