"""The networks: VAE, Prior, Discriminator, TransformerParamTanh, and Generator, which combines all but the critic.

Two value ranges: `x`, in [0, 1], is the output of the decoder's Sigmoid; `image`, in [-1, 1], is
tanh(alpha * (2x - 1)). Real images, critic inputs and encoder inputs are images in [-1, 1].

Sizes are keyword arguments, with the values of config.py as defaults; `build` passes a run's constants.
"""

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import checkpoints

SMALLEST_SIDE = 8               # a feature map is halved while its side is at least this: sizes end at 4 to 7 pixels
LOGVAR_RANGE = (-20.0, 20.0)    # keeps exp(logvar) finite; a healthy run never reaches the bounds


# ------------------------------------------------------------------------------------- sizes and helpers

def sides(image_size: int) -> list[int]:
    """Sides of the feature maps, from the image down: 128 -> [128, 64, 32, 16, 8, 4], 48 -> [48, 24, 12, 6]."""
    found = [image_size]
    while found[-1] >= SMALLEST_SIDE:
        found.append(found[-1] // 2)
    return found


def widths(image_size: int, width: int, width_max: int) -> list[int]:
    """Channels after each halving: `width`, doubled per block, at most `width_max`."""
    return [min(width * 2 ** i, width_max) for i in range(len(sides(image_size)) - 1)]


def apply_in_turn(modules: Iterable, x: Tensor, *others: Tensor, recompute: bool = False) -> Tensor:
    """Applies the modules in turn: x = module(x, *others). recompute=True does not keep their activations but computes
    them again in the backward pass (Chen et al. 2016), which is only valid for modules without random draws."""
    for module in modules:
        if recompute:
            x = checkpoint(module, x, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            x = module(x, *others)
    return x


def full_precision(x: Tensor) -> torch.autocast:
    """A context that disables autocast on x's device."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)        # autocast does not know "meta"


def he_init(*modules: nn.Module, slope: float = 0.0) -> None:
    """Initialises every convolution and Linear with variance 2 / ((1 + slope^2) fan_in) (He et al. 2015), slope that of
    the LeakyReLU before it; ConvTranspose2d with bilinear_init; biases with 0."""
    for module in (m for part in modules for m in part.modules()):
        if isinstance(module, nn.ConvTranspose2d):
            bilinear_init(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=slope)
        else:
            continue
        nn.init.zeros_(module.bias)


def bilinear_init(weight: Tensor) -> None:
    """Initialises a 4 x 4 ConvTranspose2d of stride 2 as a random 1 x 1 convolution and bilinear upsampling by 2.

    weight (C_in, C_out, 4, 4). Independent weights would mix channels differently for each of the four output pixels of
    an input pixel: a checkerboard, which training takes long to remove (compare Aitken et al. 2017).
    """
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    mixture = torch.randn(*weight.shape[:2], 1, 1) * math.sqrt(2 / weight.shape[0])
    with torch.no_grad():
        weight.copy_(mixture * line[:, None] * line)


# ------------------------------------------------------------------------------------- blocks

def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 8 groups, or fewer if 8 does not divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class MaxPool2dTwiceDifferentiable(nn.MaxPool2d):
    """MaxPool2d through the operator that also returns indices: equal values, and the only form whose second
    derivative, which the gradient penalty needs, exists on MPS."""

    def forward(self, x):
        return F.max_pool2d(x, self.kernel_size, self.stride, return_indices=True)[0]


def conv_block(channels_in: int, channels_out: int, for_critic: bool) -> nn.Sequential:
    """(Conv2d, activation, MaxPool2d), the block of encoder and critic: (B, C_in, H, W) -> (B, C_out, H // 2, W // 2).

    The encoder has GroupNorm and ReLU. The critic has LeakyReLU, no normalisation, and anti-aliased max pooling: max at
    stride 1, then a 2 x 2 mean (Zhang 2019). Plain max pooling passes the gradient to one pixel in four, which leaves a
    dot pattern in the generated images. ceil_mode averages the H - 1 maxima to H // 2 means, for even and odd H.
    """
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    if not for_critic:
        return nn.Sequential(conv, group_norm(channels_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True), MaxPool2dTwiceDifferentiable(2, stride=1),
                         nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))


def conv_tower(image_size: int, channels: int, width: int, width_max: int,
               for_critic: bool) -> tuple[nn.Sequential, int]:
    """Returns the conv blocks from the image down to a side of 4 to 7 pixels, and their number of output features."""
    channel_list = [channels, *widths(image_size, width, width_max)]
    blocks = [conv_block(a, b, for_critic) for a, b in pairwise(channel_list)]
    return nn.Sequential(*blocks), channel_list[-1] * sides(image_size)[-1] ** 2


class EqualisedLinear(nn.Linear):
    """Linear with an equalised learning rate (Karras et al. 2018): weights near 1, divided by sqrt(N) where they are
    used, (B, N) -> (B, M). Its initial weights have `scale` times the effect of those of nn.Linear.

    Adam moves each weight by about the learning rate per step, so that the output of a plain Linear can move by N times
    as much: mu and logvar, which read thousands of features, would leave N(0, I) within tens of steps.
    """

    def __init__(self, features_in: int, features_out: int, scale: float = 1.0):
        super().__init__(features_in, features_out)
        self.weight.data.mul_(scale * features_in ** 0.5)

    def forward(self, x):
        return super().forward(x * self.in_features ** -0.5)


class ModulatedNorm(nn.Module):
    """GroupNorm with scale and shift predicted from the code, which so reaches every scale of the decoder (Chen et al.
    2019, "On Self Modulation"): (B, C, H, W), code (B, LATENT_DIM) -> (B, C, H, W)."""

    def __init__(self, channels: int, latent_dim: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_scale_and_shift = nn.Linear(latent_dim, 2 * channels)

    def forward(self, x, code):
        x = self.norm(x)
        with full_precision(code):                           # an error of scale or shift would cover the whole image
            scale, shift = self.to_scale_and_shift(code)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(x + shift, x, scale)


class BalancedConvTranspose2d(nn.ConvTranspose2d):
    """ConvTranspose2d, 4 x 4 at stride 2, whose weights have the same sum for each of the four output pixels of an
    input pixel: a flat input gives a flat output. With free weights, photos got a grid of dots, also where they should
    be smooth (compare Odena et al. 2016, "Deconvolution and Checkerboard Artifacts")."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        parity = torch.arange(4) % 2
        same = parity[:, None] == parity                                      # of the taps along one axis
        same = (same[:, None, :, None] & same[:, None, :]).view(16, 16)       # of taps that reach the same output pixel
        self.register_buffer("balance", torch.eye(16) - same / 4 + 1 / 16, persistent=False)

    def forward(self, x):
        with full_precision(x):
            taps = self.weight.permute(0, 2, 3, 1).flatten(1, 2)              # (C_in, 16, C_out)
            weight = (self.balance @ taps).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, self.output_padding)


class DecoderBlock(nn.Module):
    """(ModulatedNorm, ReLU, ConvTranspose2d): (B, C_in, H, W), code (B, LATENT_DIM) -> (B, C_out, 2H, 2W), plus
    output_padding. Every block but the last adds a residual branch (ModulatedNorm, ReLU, Conv2d; He et al. 2016), and
    scales the sum to keep its variance. 4 x 4 at stride 2: every output pixel reads the same number of inputs.

    balanced: BalancedConvTranspose2d. noise_side, if not 0, is 2H plus output_padding: a fixed noise map of that side
    is added to each channel, with a learned strength, so that texture need not be made from a grid (Karras et al. 2019,
    "A Style-Based Generator Architecture", draw noise for each image: here an image stays a function of its code)."""

    def __init__(self, channels_in: int, channels_out: int, latent_dim: int, output_padding: int, last: bool,
                 balanced: bool, noise_side: int):
        super().__init__()
        self.norm = ModulatedNorm(channels_in, latent_dim)
        up = BalancedConvTranspose2d if balanced else nn.ConvTranspose2d
        self.up = up(channels_in, channels_out, 4, stride=2, padding=1, output_padding=output_padding)
        self.last, self.noisy = last, noise_side > 0
        if self.noisy:
            self.register_buffer("noise", torch.randn(noise_side, noise_side))
            self.noise_strength = nn.Parameter(torch.zeros(channels_out, 1, 1))
        if not last:
            self.residual_norm = ModulatedNorm(channels_out, latent_dim)
            self.residual = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x, code):
        x = self.up(F.relu(self.norm(x, code), inplace=True))
        if self.noisy:
            x = x + (self.noise_strength * self.noise).to(x.dtype)
        if self.last:
            return x
        return (x + self.residual(F.relu(self.residual_norm(x, code), inplace=True))) * math.sqrt(0.5)


class AddDetail(nn.Module):
    """Adds a convolution of the remaining channels to the first ones, the pixels: (B, C + FINAL_WIDTH, H, W) ->
    (B, C, H, W). No other layer connects neighbouring pixels of the image. Starts as 0."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return x[:, :self.channels] + self.conv(F.relu(x[:, self.channels:]))


# ------------------------------------------------------------------------------------- VAE

class VAE(nn.Module):
    """Encoder: blocks of Conv2d, GroupNorm, ReLU and MaxPool2d, and Linear heads for mu and logvar. Decoder: Linear,
    DecoderBlocks with ConvTranspose2d, AddDetail if final_width is not 0, and a Sigmoid (Kingma and Welling 2013,
    "Auto-Encoding Variational Bayes").

    image (B, C, H, W) in [-1, 1] -> mu, logvar (B, LATENT_DIM);  code (B, LATENT_DIM) -> x (B, C, H, W) in [0, 1].
    """

    def __init__(self, image_size: int, channels: int = 3, latent_dim: int = 128, width: int = 24,
                 width_max: int = 256, encoder_width: int = 16, final_width: int = 12, balanced_upsampling: bool = True,
                 noise_maps: bool = True, recompute: bool = False):
        super().__init__()
        self.latent_dim, self.recompute = latent_dim, recompute
        self.encoder, features = conv_tower(image_size, channels, encoder_width, width_max, for_critic=False)
        self.to_mu = EqualisedLinear(features, latent_dim)
        self.to_logvar = EqualisedLinear(features, latent_dim, scale=0.1)    # the posterior starts near N(0, I)

        side_list = sides(image_size)[::-1]                                    # from the smallest to the image
        channel_list = widths(image_size, width, width_max)[::-1]              # from the widest to `width`
        self.start_shape = (channel_list[0], side_list[0], side_list[0])
        self.from_z = nn.Linear(latent_dim, math.prod(self.start_shape))
        channel_pairs = pairwise([*channel_list, channels + final_width])
        self.decoder = nn.ModuleList(
            DecoderBlock(a, b, latent_dim, next_side - 2 * side, next_side == image_size, balanced_upsampling,
                         noise_side=noise_maps * next_side)
            for (a, b), (side, next_side) in zip(channel_pairs, pairwise(side_list)))
        self.detail = AddDetail(channels, final_width) if final_width else nn.Identity()

        he_init(self.from_z, self.decoder)
        for module in self.decoder.modules():
            if isinstance(module, ModulatedNorm):            # scale and shift start near 1 and 0 for every code
                nn.init.normal_(module.to_scale_and_shift.weight, std=0.02)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, C, H, W) in [-1, 1] -> mu, logvar (B, LATENT_DIM); logvar is clamped to LOGVAR_RANGE."""
        features = apply_in_turn(self.encoder, image, recompute=self.recompute).flatten(1).to(image.dtype)
        with full_precision(features):
            return self.to_mu(features), self.to_logvar(features).clamp(*LOGVAR_RANGE)

    def reparameterize(self, mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """code = mu + sigma * noise, noise (B, LATENT_DIM) drawn from N(0, I) by the caller."""
        return mu + torch.exp(0.5 * logvar) * noise

    def decode(self, code: Tensor) -> Tensor:
        """code (B, LATENT_DIM) -> x (B, C, H, W) in [0, 1]."""
        hidden = self.from_z(code).unflatten(1, self.start_shape)              # (B, C, 4..7, 4..7)
        hidden = apply_in_turn(self.decoder[:-1], hidden, code, recompute=self.recompute)
        with full_precision(hidden):                         # the image itself is never rounded to bfloat16
            hidden = apply_in_turn(self.decoder[-1:], hidden.to(code.dtype), code, recompute=self.recompute)
            return torch.sigmoid(self.detail(hidden))

    def forward(self, image, noise):
        """image in [-1, 1], noise (B, LATENT_DIM) -> x in [0, 1], mu, logvar."""
        mu, logvar = self.encode(image)
        return self.decode(self.reparameterize(mu, logvar, noise)), mu, logvar


# ------------------------------------------------------------------------------------- prior

class Prior(nn.Module):
    """Turns noise into codes as the encoder finds them: z (B, LATENT_DIM) from N(0, I), and, of a model with classes, a
    label (B, K) -> code (B, LATENT_DIM).

    Codes of images fill only a part of N(0, I), and what the decoder makes of the rest looks worse (Dai and Wipf 2019,
    "Diagnosing and Enhancing VAE Models"). This flow leads there: it follows dx/dt = velocity(x, t) from x = z at
    t = 0 to t = 1, and learns by losses.flow_matching_loss (Lipman et al. 2023). It starts as the identity.

    A label is 1 at its class and 0 elsewhere, or between two classes; zeros or None stand for any class.
    """

    BLOCKS = 3
    STEPS = 8           # of Heun's method, from z to the code
    FREQUENCIES = 16    # of the sines and cosines that stand for t

    def __init__(self, latent_dim: int, width: int, classes: int = 0):
        super().__init__()
        self.to_hidden = nn.Linear(latent_dim + 2 * self.FREQUENCIES, width)
        self.of_class = nn.Embedding(classes, width) if classes else None
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(self.BLOCKS))
        self.to_velocity = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_dim))
        nn.init.zeros_(self.to_velocity[1].weight)
        nn.init.zeros_(self.to_velocity[1].bias)

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x (N, LATENT_DIM), t (N,) in [0, 1], label (N, K) -> dx/dt (N, LATENT_DIM)."""
        with full_precision(x):
            angles = t[:, None] * (math.pi / 2 * torch.arange(1, 1 + self.FREQUENCIES, device=t.device))
            hidden = self.to_hidden(torch.cat([x, angles.sin(), angles.cos()], dim=1))
            if label is not None:
                hidden = hidden + label @ self.of_class.weight
            for block in self.blocks:
                hidden = hidden + block(hidden)
            return self.to_velocity(hidden)

    def forward(self, z, label=None):
        step = 1 / self.STEPS
        for i in range(self.STEPS):
            t = torch.full_like(z[:, 0], i * step)
            before = self.velocity(z, t, label)
            after = self.velocity(z + step * before, t + step, label)
            z = z + step / 2 * (before + after)
        return z


# ------------------------------------------------------------------------------------- critic

class Discriminator(nn.Module):
    """The critic, symmetric with the encoder: image (B, C, H, W) in [-1, 1] -> one unbounded score per image, (B,).

    Nothing connects the images of a batch: WGAN-GP penalises each input on its own (Gulrajani et al. 2017).
    """

    def __init__(self, image_size: int, channels: int = 3, width: int = 24, width_max: int = 256):
        super().__init__()
        self.blocks, features = conv_tower(image_size, channels, width, width_max, for_critic=True)
        self.to_score = nn.Linear(features, 1)
        # With torch's default the input gradient starts near 0.01, and hundreds of steps only raise it to 1.
        he_init(self.blocks, self.to_score, slope=0.2)

    def forward(self, image):
        features = self.blocks(image).flatten(1).to(image.dtype)
        with full_precision(features):
            return self.to_score(features).squeeze(1)

    def probability(self, image: Tensor) -> Tensor:
        """Probability that each image is real, (B,) in (0, 1): the sigmoid of the score, centred by the drift term."""
        return torch.sigmoid(self(image))


# ------------------------------------------------------------------------------------- synthetic video

class Changes(NamedTuple):
    """What distinguishes the frames of a synthetic video from its image."""
    shift: Tensor      # (T, 2) int64: dy, dx of each frame, pixels
    added: Tensor      # (T*C, H, W) or (T*C, 1, 1): brightness and noise

    def to(self, tensor: Tensor) -> "Changes":
        """Returns the changes on the tensor's device, `added` in its dtype."""
        return Changes(self.shift.to(tensor.device), self.added.to(tensor))


class SyntheticVideo(nn.Module):
    """T slightly modified copies of an image, stacked: (B, C, H, W) in [0, 1] -> (B, T*C, H, W), near [0, 1].

    Frame 0 is the image; frame t is shifted, brightened or darkened, and noisy, with a strength that grows linearly
    with t. The changes are drawn per frame and shared by the batch, so no rank slices them. Not clamped, so that every
    pixel keeps its gradient.
    """

    def __init__(self, num_frames: int, channels: int, image_size: int, shift: float, brightness: float,
                 noise: float):
        super().__init__()
        self.num_frames, self.channels, self.image_size = num_frames, channels, image_size
        self.brightness, self.noise = brightness, noise
        self.pad = round(shift * image_size)          # largest shift, pixels

    def draw(self, rng: torch.Generator | None = None) -> Changes:
        """Returns the Changes of one video, on the CPU; without rng a fixed schedule without noise."""
        strength = torch.linspace(0, 1, self.num_frames)
        if rng is not None:
            shift = torch.rand(self.num_frames, 2, generator=rng) * 2 - 1
            brightness = torch.rand(self.num_frames, generator=rng) * 2 - 1
        else:
            angle = torch.arange(self.num_frames) * (math.pi * (3 - math.sqrt(5)))     # golden angle: even directions
            shift = torch.stack([angle.cos(), angle.sin()], dim=1)
            brightness = (angle * 2).sin()
        shift = (shift * strength[:, None] * self.pad).round().long()
        added = (brightness * strength * self.brightness)[:, None, None, None].expand(-1, self.channels, 1, 1)
        if rng is not None:
            field = torch.randn(self.num_frames, self.channels, self.image_size, self.image_size, generator=rng)
            added = added + self.noise * strength[:, None, None, None] * field
        return Changes(shift, added.flatten(0, 1))

    def padded(self, image: Tensor) -> Tensor:
        """Returns the image with its border pixels repeated `pad` times on each side. F.pad(mode="replicate") does the
        same, but its backward pass is not deterministic on CUDA."""
        for dim in (2, 3):
            shape = [-1] * dim + [self.pad] + [-1] * (3 - dim)
            first, last = (image.narrow(dim, i, 1).expand(shape) for i in (0, image.shape[dim] - 1))
            image = torch.cat([first, image, last], dim)
        return image

    def forward(self, image, changes):
        """image (B, C, H, W) in [0, 1] -> frames (B, T*C, H, W)."""
        height, width, padded = *image.shape[2:], self.padded(image)
        frames = [padded[:, :, self.pad + dy:self.pad + dy + height, self.pad + dx:self.pad + dx + width]
                  for dy, dx in changes.shift.tolist()]
        return torch.cat(frames, dim=1) + changes.added

    def embed(self, image: Tensor, conv: nn.Conv2d, changes: Changes) -> Tensor:
        """Returns conv(self(image, changes)) without making the frames: (B, C, H, W) -> (B, D, H/PATCH, W/PATCH).

        Shifting and convolution are linear: T shifted copies under T kernels equal one image under the sum of the
        shifted kernels, and what is added to the frames passes through the convolution once for the whole batch. With
        PATCH x PATCH pixels moved into channels, the large summed kernel is a small one on many channels, which takes
        half the time. Equal up to float rounding.
        """
        patch = conv.kernel_size[0]
        kernel = self.shifted_sum(conv.weight, changes.shift)
        fill = -kernel.shape[2] % patch                                                     # up to whole patches
        kernel, padded = F.pad(kernel, (0, fill, 0, fill)), F.pad(self.padded(image), (0, fill, 0, fill))
        added = changes.added.expand(-1, *image.shape[2:])[None]
        return F.conv2d(F.pixel_unshuffle(padded, patch), F.pixel_unshuffle(kernel, patch)) + conv(added)

    def shifted_sum(self, weight: Tensor, shift: Tensor) -> Tensor:
        """Sums the kernels of all frames, frame t shifted by shift[t]: (D, T*C, P, P) -> (D, C, K, K), K = P + 2 pad.

        As two matrix products with 0-1 matrices, columns then rows, so that the shifts stay on the device.
        """
        (dim, _, patch, _), frames = weight.shape, self.num_frames
        place = torch.arange(patch + 2 * self.pad, device=weight.device)
        offset = place[:, None] - place[:patch]                                             # (K, P)
        rows, columns = (offset == self.pad + shift.T[:, :, None, None]).to(weight)         # each (T, K, P)
        kernels = weight.unflatten(1, (frames, self.channels)).transpose(0, 1).reshape(frames, -1, patch)
        wide = (kernels @ columns.mT).view(frames, dim * self.channels, patch, -1)          # (T, D*C, P, K)
        wide = wide.transpose(0, 1).reshape(dim * self.channels, frames * patch, -1)        # (D*C, T*P, K)
        return (rows.transpose(0, 1).flatten(1) @ wide).unflatten(0, (dim, self.channels))  # (D, C, K, K)


# ------------------------------------------------------------------------------------- TransformerParamTanh

def encoder_layer(layer: nn.TransformerEncoderLayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns layer(x) for norm_first, ReLU and no dropout, (B, N, D) -> (B, N, D). mask (N, N): token i attends to
    token j where mask[i, j] is true; None: to all.

    Written out because nn.MultiheadAttention reorders and copies its tensors: this takes three quarters of the time.
    """
    attention = layer.self_attn
    queries, keys, values = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias).unflatten(
        2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)                         # each (B, heads, N, D / heads)
    heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    x = x + attention.out_proj(heads.transpose(1, 2).flatten(2))
    return x + layer.linear2(F.relu(layer.linear1(layer.norm2(x)), inplace=True))


class Window(NamedTuple):
    """What the Transformer reads of a clip, beside its images: P = NUM_FRAMES - 1 earlier frames, v, and the anchor."""
    codes: Tensor      # (B, P, LATENT_DIM), newest first; a short past repeats its oldest code
    v: Tensor          # (B, MOTION_DIM): what a still start does not show, N(0, I); constant along a video
    anchor: Tensor     # (B, LATENT_DIM): a code of the same clip, in a video the first one: keeps colours

    @classmethod
    def still(cls, code: Tensor, v: Tensor, frames: int) -> "Window":
        """Returns the window of a video that starts at code (B, LATENT_DIM): `frames` copies of it."""
        return cls(code[:, None].expand(-1, frames, -1), v, code)

    def followed_by(self, code: Tensor) -> "Window":
        """Returns the window one frame later, code (B, LATENT_DIM) being the newest one."""
        return self._replace(codes=torch.cat([code[:, None], self.codes[:, :-1]], dim=1))


class Dynamics(nn.Module):
    """The parts of TransformerParamTanh that learn motion: tokens of the codes and of v, the Delta head, and the motion
    posterior, which only training uses. frames: P; dim: of a token.

    Stage 2 finds its buffers in the data. `change`: the unit of differences between codes, their standard deviation
    from frame to frame. `whiten`: of the difference between two codes of one clip; it makes its covariance I.
    docs/video.md has the gains.
    """

    HIDDEN = 256
    LOGVAR = (-8.0, 4.0)            # range of v's log variance
    SMALLEST = 1e-3                 # standard deviation of a dimension of the codes, where nothing moves
    STILL = 0.03                    # the same for `whiten`: where clips never move, a video may by a little
    REACH = 1.5                     # largest length of a whitened code - anchor, in sqrt(LATENT_DIM)

    def __init__(self, latent_dim: int, motion_dim: int, frames: int, dim: int):
        super().__init__()
        self.of_code, self.of_change = nn.Linear(latent_dim, dim), nn.Linear(latent_dim, dim)
        self.of_v = nn.Linear(motion_dim, dim)
        self.register_buffer("change", torch.ones(latent_dim))
        self.register_buffer("whiten", torch.eye(latent_dim))
        self.positions = nn.Parameter(0.3 * torch.randn(1, frames, dim))
        self.to_hidden = nn.Linear(frames * dim + 3 * latent_dim + motion_dim, self.HIDDEN)
        self.to_delta = nn.Linear(self.HIDDEN, latent_dim)
        nn.init.zeros_(self.to_delta.weight)
        nn.init.zeros_(self.to_delta.bias)
        self.to_posterior = nn.Sequential(nn.Linear(3 * latent_dim, 128), nn.ReLU(), nn.Linear(128, 2 * motion_dim))

    def _load_from_state_dict(self, state_dict, prefix, *others):
        for name in ("start_mean", "start_root"):     # of earlier versions, whose videos started from a Gaussian
            state_dict.pop(prefix + name, None)
        state_dict.setdefault(prefix + "whiten", self.whiten)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def fit(self, clips: Sequence[Tensor]) -> None:
        """Sets the buffers from the codes of clips, each (T, LATENT_DIM)."""
        clips = [codes.cpu().double() for codes in clips]             # MPS has no float64
        changes, centred = (torch.cat(parts) for parts in zip(*(
            (codes.diff(dim=0), codes - codes.mean(0)) for codes in clips)))
        covariance = 2 * centred.T @ centred / len(centred) + self.STILL ** 2 * torch.eye(centred.shape[1])
        self.change.copy_(changes.square().mean(0).sqrt().clamp_min(self.SMALLEST))
        self.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))

    def tokens(self, window: Window) -> Tensor:
        """Returns one token per earlier frame, and that of v: (B, P + 1, D)."""
        codes = window.codes
        changes = F.pad((codes[:, :-1] - codes[:, 1:]) / self.change, (0, 0, 0, 1))           # the oldest has none
        return torch.cat([self.of_code(codes) + self.of_change(changes) + self.positions,
                          self.of_v(window.v)[:, None]], dim=1)

    def delta(self, outputs: Tensor, window: Window) -> Tensor:
        """Transformer's outputs of the code tokens (B, P, D) -> Delta = z_t - z_{t-1}, (B, LATENT_DIM)."""
        newest, anchor = window.codes[:, 0], window.anchor
        with full_precision(newest):
            known = torch.cat([outputs.flatten(1).to(newest.dtype), newest, window.v, anchor, anchor - newest], dim=1)
            return self.change * self.to_delta(F.relu(self.to_hidden(known)))

    def near_anchor(self, code: Tensor, anchor: Tensor) -> Tensor:
        """Returns codes (B, LATENT_DIM), each moved towards its anchor if it is farther away than two codes of a clip
        are. Where clips do not change, as in their colours, a small distance counts as far."""
        with full_precision(code):
            difference, longest = code - anchor, self.REACH * math.sqrt(code.shape[1])
            length = (difference @ self.whiten.T).norm(dim=1, keepdim=True)
            return anchor + difference * (longest / length.clamp_min(longest))

    def posterior(self, before: Tensor, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """q(v | mu_{t-1}, mu_t, mu_{t+1}), each (B, LATENT_DIM) -> mean and logvar of v, (B, MOTION_DIM)."""
        with full_precision(now):
            mean, logvar = self.to_posterior(torch.cat([before, (now - before) / self.change,
                                                        (after - now) / self.change], dim=1)).chunk(2, dim=1)
        return mean, logvar.clamp(*self.LOGVAR)


class TransformerParamTanh(nn.Module):
    """tanh(alpha * (2x - 1)), with alpha predicted per pixel by a Transformer that reads a synthetic video of x.

        x (B, C, H, W) in [0, 1]
        -> displayed (1 + tanh(ALPHA_INIT * (2x - 1))) / 2, in [0, 1]
        -> video (B, T*C, H, W) -> patch tokens (B, N, D), normalised -> Transformer encoder (12 heads, 12 layers)
        -> Linear: s, one per 4 x 4 pixels -> alpha = ALPHA_INIT * ALPHA_SPAN ** tanh(s), (B, 1, H, W)
        -> image = tanh(alpha * (2x - 1)), in [-1, 1]

    alpha stays within ALPHA_INIT / ALPHA_SPAN and ALPHA_INIT * ALPHA_SPAN, so that no step can make an image grey or
    saturate the layer for good. The head starts at zero: the layer starts as tanh(ALPHA_INIT * (2x - 1)). With
    alpha_span=1 it stays that, and the Transformer does not run. Compare Dynamic Tanh (Zhu et al. 2025), which has one
    learned scalar per layer.

    image_size and patch in pixels; shift as a share of image_size; brightness and noise in the range of x.

    With motion_dim, for models of clips, the same Transformer also reads a Window, and `next_code` predicts the code of
    the next frame: z_t = z_{t-1} + Delta. Code tokens attend only to each other, so that predicted codes need no
    rendering; the patch tokens of a rendered frame attend to everything.
    """

    CELL = 4      # one s per CELL x CELL pixels; bilinear interpolation leaves no seams between patches

    def __init__(self, image_size: int, channels: int = 3, num_frames: int = 16, patch: int = 16, dim: int = 48,
                 heads: int = 12, layers: int = 12, alpha_init: float = 3.0, alpha_span: float = 3.0,
                 alpha_per_channel: bool = False, shift: float = 0.06, brightness: float = 0.1, noise: float = 0.05,
                 recompute: bool = False, latent_dim: int = 128, motion_dim: int = 0):
        super().__init__()
        if image_size % patch or patch % self.CELL or dim % heads:
            raise ValueError(f"image_size {image_size}, patch {patch}, dim {dim} are invalid: patch must divide "
                             f"image_size and be a multiple of {self.CELL}, dim a multiple of the {heads} heads")
        self.channels, self.image_size, self.recompute = channels, image_size, recompute
        self.alpha_init, self.alpha_span = alpha_init, alpha_span
        self.video = SyntheticVideo(num_frames, channels, image_size, shift, brightness, noise)
        self.to_tokens = nn.Conv2d(num_frames * channels, dim, patch, stride=patch)
        self.token_norm = nn.LayerNorm(dim)
        nn.init.normal_(self.to_tokens.weight)    # the norm removes their scale; larger weights change more slowly
        self.side = image_size // patch                                  # patches along one side of the image
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side ** 2, dim))
        first = nn.TransformerEncoderLayer(dim, heads, dim_feedforward=4 * dim, dropout=0.0, batch_first=True,
                                           norm_first=True)
        self.transformer = nn.TransformerEncoder(first, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        for layer in self.transformer.layers:           # nn.TransformerEncoder copies the first layer's weights
            for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
                linear.reset_parameters()
            layer.self_attn._reset_parameters()
        self.cells = patch // self.CELL                                  # values of s along one side of a patch
        self.alpha_channels = channels if alpha_per_channel else 1
        self.to_s = nn.Linear(dim, self.alpha_channels * self.cells ** 2)
        nn.init.zeros_(self.to_s.weight)
        nn.init.zeros_(self.to_s.bias)
        self.dynamics = Dynamics(latent_dim, motion_dim, num_frames - 1, dim) if motion_dim else None

    def displayed(self, x: Tensor) -> Tensor:
        """x in [0, 1] -> the image as the layer would show it at the start, in [0, 1]."""
        return (1 + torch.tanh(self.alpha_init * (2 * x - 1))) / 2

    def frames(self, x: Tensor, earlier: Tensor | None = None, changes: Changes | None = None) -> Tensor:
        """Returns the video that the Transformer reads, (B, T*C, H, W): the displayed x, then modified copies of it, or
        `earlier` where it is given. Arguments as in forward."""
        if earlier is not None:
            return torch.cat([self.displayed(x), earlier], dim=1)
        return self.video(self.displayed(x), (changes or self.video.draw()).to(x))

    def tokens(self, x: Tensor, earlier: Tensor | None = None, changes: Changes | None = None) -> Tensor:
        """Returns the Transformer's input, (B, N, D): patches of the frames, each normalised, plus their positions.

        A token sums thousands of values, nearly equal from frame to frame. Unless they are centred and their sum is
        normalised, Adam moves all tokens in one direction, until alpha is the same everywhere.
        """
        if earlier is None:
            patches = self.video.embed(self.displayed(x) - 0.5, self.to_tokens, (changes or self.video.draw()).to(x))
        else:
            patches = self.to_tokens(self.frames(x, earlier) - 0.5)               # (B, D, H/PATCH, W/PATCH)
        return self.token_norm(patches.flatten(2).transpose(1, 2)) + self.positions

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns self.transformer(tokens), (B, N, D) -> (B, N, D). mask as in encoder_layer."""
        layers = [functools.partial(encoder_layer, layer) for layer in self.transformer.layers]
        return self.transformer.norm(apply_in_turn(layers, tokens, mask, recompute=self.recompute))

    def next_code(self, window: Window) -> Tensor:
        """Returns the code of the frame after the window, (B, LATENT_DIM)."""
        outputs = self.encode(self.dynamics.tokens(window))[:, :-1]
        return self.dynamics.near_anchor(window.codes[:, 0] + self.dynamics.delta(outputs, window), window.anchor)

    def encode_patches(self, patches: Tensor, window: Window) -> Tensor:
        """Returns the Transformer's outputs of the patch tokens (B, N, D) of a frame that follows the window."""
        known, count = self.dynamics.tokens(window), patches.shape[1]
        is_patch = torch.arange(count + known.shape[1], device=patches.device) < count
        return self.encode(torch.cat([patches, known], dim=1), is_patch[:, None] | ~is_patch)[:, :count]

    def alpha(self, x: Tensor, earlier: Tensor | None = None, changes: Changes | None = None,
              window: Window | None = None) -> Tensor:
        """Returns alpha for x (B, C, H, W) in [0, 1]: (B, 1, H, W), or (B, C, H, W) per channel. Arguments as in
        forward."""
        if self.alpha_span == 1:                                                  # alpha is constant
            return torch.full_like(x[:, :self.alpha_channels], self.alpha_init)
        patches = self.tokens(x, earlier, changes)
        outputs = self.encode(patches) if window is None else self.encode_patches(patches, window)
        s = self.to_s(outputs).to(x.dtype)                                        # (B, N, alpha_channels * cells**2)
        s = s.transpose(1, 2).unflatten(2, (self.side, self.side))
        s = F.pixel_shuffle(s, self.cells)                                        # (B, alpha_channels, H/4, W/4)
        s = F.interpolate(s, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.alpha_init * self.alpha_span ** torch.tanh(s)

    def apply_alpha(self, x: Tensor, alpha: Tensor) -> Tensor:
        """Returns tanh(alpha * (2x - 1)): x in [0, 1] -> image in [-1, 1]."""
        return torch.tanh(alpha * (2 * x - 1))

    def forward(self, x, earlier=None, changes=None, window=None):
        """x (B, C, H, W) in [0, 1] -> image (B, C, H, W) in [-1, 1].

        earlier: the T-1 earlier images, newest first, (B, (T-1)*C, H, W) in [0, 1], in place of modified copies.
        changes: of the modified copies, from video.draw(rng); None: the fixed schedule, so that the result depends on
        x alone. window: of a frame of a video, the Window before it. Raises ValueError for x of another size.
        """
        expected = (self.channels, self.image_size, self.image_size)
        if x.shape[1:] != expected:
            raise ValueError(f"x {tuple(x.shape)} is invalid: must be (B, {', '.join(map(str, expected))})")
        return self.apply_alpha(x, self.alpha(x, earlier, changes, window))

    def extra_repr(self):
        low, high = self.alpha_init / self.alpha_span, self.alpha_init * self.alpha_span
        return f"alpha starts at {self.alpha_init:g}, stays in [{low:g}, {high:g}]"


# ------------------------------------------------------------------------------------- generator

class Generator(nn.Module):
    """VAE, Prior and TransformerParamTanh, the only place that combines them.

        noise z -> Prior -> code -> decoder, layer -> image -> encoder -> code

        generator = Generator.from_file("pretrained/avatars64.pt")
        image = generator(torch.randn(16, generator.vae.latent_dim))      # (16, 3, 64, 64) in [-1, 1]

    prior: None in older models, whose codes are the noise itself.

    In a video, the encoder keeps the codes where those of real images are: predicted codes slowly leave them.
    docs/video.md has the gain.
    """

    def __init__(self, vae: VAE, layer: TransformerParamTanh, prior: Prior | None = None, feedback: float = 0.2):
        super().__init__()
        self.vae, self.layer, self.prior = vae, layer, prior
        self.feedback = feedback    # share of the way that the code of each frame of a video moves to that of its image

    @property
    def classes(self) -> int:
        """The number of classes, 0 for a model without them."""
        return 0 if self.prior is None or self.prior.of_class is None else self.prior.of_class.num_embeddings

    @classmethod
    def from_file(cls, path: str | Path, device="cpu") -> "Generator":
        """Returns the averaged (EMA) generator of a run's folder, checkpoint or weights file. Raises InputError."""
        return load_generator(path, device)[0]

    def image_and_alpha(self, code: Tensor, earlier: Tensor | None = None, changes: Changes | None = None,
                        window: Window | None = None) -> tuple[Tensor, Tensor]:
        """code (B, LATENT_DIM) -> image (B, C, H, W) in [-1, 1] and its alpha, (B, 1, H, W), or (B, C, H, W) per
        channel. earlier, changes and window as in TransformerParamTanh."""
        x = self.vae.decode(code)
        alpha = self.layer.alpha(x, earlier, changes, window)
        return self.layer.apply_alpha(x, alpha), alpha

    def forward(self, z, label=None):
        """z (B, LATENT_DIM) from N(0, I) -> image (B, C, H, W) in [-1, 1]. label (B, K): as in Prior."""
        return self.render(self.start(z, label))

    def start(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z (B, LATENT_DIM) from N(0, I) -> code (B, LATENT_DIM) of an image, or of the first frame of a video. label
        (B, K): as in Prior."""
        return z if self.prior is None else self.prior(z, label)

    def render(self, code: Tensor, earlier: Tensor | None = None, changes: Changes | None = None,
               window: Window | None = None) -> Tensor:
        """code (B, LATENT_DIM) -> image (B, C, H, W) in [-1, 1]. Other arguments as in TransformerParamTanh."""
        return self.image_and_alpha(code, earlier, changes, window)[0]

    def towards(self, code: Tensor, image: Tensor, share: float) -> Tensor:
        """Returns codes (B, LATENT_DIM) that are moved by this share of the way to those of images in [-1, 1]."""
        return code + share * (self.vae.encode(image)[0] - code)

    def reconstruct(self, image: Tensor) -> Tensor:
        """image in [-1, 1] -> its reconstruction from mu, in [-1, 1]."""
        return self.render(self.vae.encode(image)[0])

    def frames(self, code: Tensor, changes: Changes | None = None) -> Tensor:
        """code (B, LATENT_DIM) -> the synthetic video that the Transformer reads, (B, T*C, H, W), near [0, 1]."""
        return self.layer.frames(self.vae.decode(code), changes=changes)

    def roll(self, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields image (B, C, H, W) in [-1, 1] and code (B, LATENT_DIM) of the frames after the window, without end.
        The Transformer predicts each code from the codes before, and reads the images that were made before, at the
        start those of the window's codes: the feedback loop, closed in time."""
        is_still = torch.equal(window.codes, window.codes[:, :1].expand_as(window.codes))
        codes = window.codes[:, :1 if is_still else None].unbind(1)
        earlier = torch.cat([(1 + self.render(code)) / 2 for code in codes], dim=1)
        earlier = earlier.repeat(1, window.codes.shape[1] // len(codes), 1, 1)
        while True:
            image, window, earlier = self.next_frame(window, earlier)
            yield image, window.codes[:, 0]

    def next_frame(self, window: Window, earlier: Tensor) -> tuple[Tensor, Window, Tensor]:
        """Returns the image (B, C, H, W) in [-1, 1] of the frame after the window, and the window and the earlier
        images, as in TransformerParamTanh, of the frame after that."""
        code = self.layer.next_code(window)
        image, _ = self.image_and_alpha(code, earlier, window=window)
        earlier = torch.cat([(1 + image) / 2, earlier[:, :-self.layer.channels]], dim=1)
        return image, window.followed_by(self.towards(code, image, self.feedback)), earlier


def build(c: SimpleNamespace, layer_class: type[TransformerParamTanh] = TransformerParamTanh
          ) -> tuple[Generator, Discriminator]:
    """Returns the networks of a run from its constants: config.py's, or a checkpoint's. layer_class: another class
    with TransformerParamTanh's arguments, to compare with."""
    vae = VAE(c.IMAGE_SIZE, c.CHANNELS, latent_dim=c.LATENT_DIM, width=c.WIDTH, width_max=c.WIDTH_MAX,
              encoder_width=c.ENCODER_WIDTH, final_width=c.FINAL_WIDTH, balanced_upsampling=c.BALANCED_UPSAMPLING,
              noise_maps=c.NOISE_MAPS, recompute=c.RECOMPUTE_ACTIVATIONS)
    layer = layer_class(
        c.IMAGE_SIZE, c.CHANNELS, num_frames=c.NUM_FRAMES, patch=c.PATCH, dim=c.TRANSFORMER_DIM,
        heads=c.TRANSFORMER_HEADS, layers=c.TRANSFORMER_LAYERS, alpha_init=c.ALPHA_INIT, alpha_span=c.ALPHA_SPAN,
        alpha_per_channel=c.ALPHA_PER_CHANNEL, shift=c.VIDEO_SHIFT, brightness=c.VIDEO_BRIGHTNESS, noise=c.VIDEO_NOISE,
        recompute=c.RECOMPUTE_ACTIVATIONS, latent_dim=c.LATENT_DIM,
        motion_dim=c.MOTION_DIM if c.FOLDERS == "clips" else 0)
    prior = Prior(c.LATENT_DIM, c.PRIOR_WIDTH, len(c.CLASSES)) if c.PRIOR_WIDTH else None
    return Generator(vae, layer, prior, c.FEEDBACK), Discriminator(c.IMAGE_SIZE, c.CHANNELS, c.WIDTH, c.WIDTH_MAX)


def build_pair_critics(c: SimpleNamespace) -> nn.ModuleDict | None:
    """Returns the critics of pairs of frames (B, 3*C, H, W), {"near": Discriminator, "far": Discriminator}, of a run on
    clips, else None."""
    if c.FOLDERS != "clips":
        return None
    return nn.ModuleDict({name: Discriminator(c.IMAGE_SIZE, 3 * c.CHANNELS, c.WIDTH, c.WIDTH_MAX)
                          for name in ("near", "far")})


def from_checkpoint(saved: dict, device="cpu") -> tuple[Generator, SimpleNamespace]:
    """Returns the averaged (EMA) generator of a loaded checkpoint, in evaluation mode, and the run's constants."""
    c = SimpleNamespace(**saved["constants"])
    generator, _ = build(c)
    generator.load_state_dict(saved["ema"])
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), c


def learned_motion(saved: dict) -> bool:
    """Returns whether a loaded checkpoint is of a run on clips, from stage 2 on."""
    c = saved["constants"]
    return c["FOLDERS"] == "clips" and saved["counters"]["images_seen"] >= 1000 * c["VAE_KIMG"]


def load_generator(path: str | Path, device="cpu") -> tuple[Generator, SimpleNamespace, dict]:
    """Returns the averaged (EMA) generator of a run's folder, checkpoint or weights file, the run's constants, and all
    that the file holds. Prints damaged files that it skips to stderr. Raises InputError."""
    _, saved = checkpoints.find(path, device, warn=lambda line: print(line, file=sys.stderr))
    return *from_checkpoint(saved, device), saved
