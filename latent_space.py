"""Points, paths and directions in latent space.

z of a normal distribution lies near a shell of radius sqrt(LATENT_DIM), and so does all that the decoder was trained
on: a straight line between two points would cut through the inside, where no picture ever was. Paths here take
direction and norm apart.
"""

import sys

import numpy as np
import torch
from tqdm import tqdm

import data
import random_keys


def draw_z(seed, first, count, latent_dim):
    """z (count, LATENT_DIM) of the pictures first, first + 1, ...: each from a key of its own."""
    return torch.stack([torch.randn(latent_dim, generator=random_keys.torch_generator(seed, "generate", first + i))
                        for i in range(count)])


def spherical(a, b, t):
    """From a (..., D) to b at t in [0, 1]: direction along the great circle, norm along the line between the norms."""
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    direction_a, direction_b = a / norm_a, b / norm_b
    angle = torch.arccos((direction_a * direction_b).sum(-1, keepdim=True).clamp(-1, 1))
    direction = (torch.sin((1 - t) * angle) * direction_a + torch.sin(t * angle) * direction_b) / torch.sin(angle)
    # Where the two directions are one the circle is none; the straight line differs from it by nothing.
    return torch.where(angle < 1e-4, a + t * (b - a), direction * (norm_a + t * (norm_b - norm_a)))


def walk(keyframes, frames, loop=True):
    """A path through keyframes (K, D), `frames` points long (frames, D); with loop the last leads back to the first,
    without it the last is the last keyframe.

    Between two keyframes the speed rises from 0 and falls to 0 again along a cosine, so that no corner is seen.
    """
    parts = len(keyframes) if loop else len(keyframes) - 1
    path = []
    for position in torch.arange(frames) * parts / (frames if loop else max(1, frames - 1)):
        start = int(position)
        eased = (1 - torch.cos(torch.pi * (position - start))) / 2
        path.append(spherical(keyframes[start], keyframes[(start + 1) % len(keyframes)], eased))
    return torch.stack(path)


@torch.inference_mode()
def encode(vae, arrays, batch_size=16):
    """uint8 arrays (N, H, W, C) -> mu (N, LATENT_DIM) on the CPU."""
    device = vae.to_mu.weight.device
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    parts = tqdm(pixels.split(batch_size), desc="encoding", leave=False, delay=2, disable=not sys.stderr.isatty())
    return torch.cat([vae.encode(data.to_image(part.to(device)))[0].cpu() for part in parts])


def encode_sample(vae, image_set, count=2048):
    """mu (N, LATENT_DIM) of `count` pictures of the training split, always the same ones; of all where it has fewer."""
    order = random_keys.numpy_generator(0, "encode").permutation(len(image_set.train))
    return encode(vae, image_set.images[np.sort(image_set.train[order[:count]])])


def principal_axes(mu):
    """The directions in which encoded pictures mu (N, D) differ most, the widest first.

    -> {"mean": (D,), "axes": (min(N, D), D), rows of length 1, "deviations": (min(N, D),)}. The sign of an axis is
    chosen so that its largest entry is positive.
    """
    mean = mu.double().mean(0)
    _, values, axes = torch.linalg.svd(mu.double() - mean, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return {"mean": mean.float(), "axes": (axes * largest.sign()).float(),
            "deviations": (values / max(1, len(mu) - 1) ** 0.5).float()}
