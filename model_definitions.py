"""The networks: VAE, Discriminator, TransformerParamTanh, and the Generator that joins VAE and layer.

Two ranges, never mixed: `x`, in [0, 1], is what the decoder's Sigmoid gives; `image`, in [-1, 1], is what
tanh(alpha * (2x - 1)) makes of it. Real pictures, critic inputs and encoder inputs are images in [-1, 1].

All sizes come as arguments; config.py holds the values and `build` in this file maps them.
"""

import copy
import functools
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

SMALLEST_SIDE = 8           # a feature map is halved while its side is this or more, so all sizes end at 4..7 pixels
LOGVAR_RANGE = (-20.0, 20.0)    # wide: keeps exp(logvar) finite, and never reached by a healthy run


# ------------------------------------------------------------------------------------- sizes and blocks

def sides(image_size):
    """The sides of the feature maps from the picture down: 128 -> [128, 64, 32, 16, 8, 4], 48 -> [48, 24, 12, 6]."""
    found = [image_size]
    while found[-1] >= SMALLEST_SIDE:
        found.append(found[-1] // 2)
    return found


def widths(image_size, width, width_max):
    """Channels after each halving: `width`, doubled a block, at most `width_max`; one number a block."""
    return [min(width * 2 ** i, width_max) for i in range(len(sides(image_size)) - 1)]


def group_norm(channels):
    """GroupNorm in 8 groups (fewer where 8 does not divide): like every part here, blind to the rest of the batch."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def conv_block(channels_in, channels_out, for_critic):
    """(Conv2d, activation, MaxPool2d), the block of encoder and critic: (B, C_in, H, W) -> (B, C_out, H // 2, W // 2).

    The encoder's has GroupNorm and ReLU. The critic's has LeakyReLU and no normalisation, and pools in two steps,
    maximum at stride 1 and then a 2 x 2 mean (Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"):
    plain max pooling hands the gradient to one pixel in four, which is seen as a pattern of dots in what the
    generator learns from it. The mean's ceil_mode makes H - 1 maxima end at H // 2 for even and odd H alike;
    count_include_pad changes nothing without padding, but with it torch 2.14 compiles a wrong gradient
    (pytorch/pytorch issue 198119).
    """
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    if not for_critic:
        return nn.Sequential(conv, group_norm(channels_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True), MaxPool2dTwiceDifferentiable(2, stride=1),
                         nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))


class ModulatedNorm(nn.Module):
    """GroupNorm whose scale and shift follow z: (B, C, H, W), z (B, LATENT_DIM) -> (B, C, H, W).

    So z reaches each size of the decoder at once, and what holds all over a picture, such as a colour, need not travel
    through the feature maps (Chen et al. 2019, "On Self Modulation for Generative Adversarial Networks").
    """

    def __init__(self, channels, latent_dim):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_scale_and_shift = nn.Linear(latent_dim, 2 * channels)

    def forward(self, x, z):
        x = self.norm(x)
        with full_precision(z):                              # in bfloat16 they would be off all over the picture
            scale, shift = self.to_scale_and_shift(z)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(x + shift, x, scale)


class EqualisedLinear(nn.Linear):
    """Linear whose weights are kept near 1 and divided by sqrt(N) where they are used: (B, N) -> (B, M). It starts as
    `scale` times an nn.Linear (equalised learning rate: Karras et al. 2018, "Progressive Growing of GANs").

    Adam moves each weight by about the learning rate a step, so a plain Linear's output by up to that times N. mu and
    logvar read thousands of features, and left the prior within tens of steps, the further the larger the picture; on
    photos reconstructions stayed grey.
    """

    def __init__(self, features_in, features_out, scale=1.0):
        super().__init__(features_in, features_out)
        self.weight.data.mul_(scale * features_in ** 0.5)

    def forward(self, x):
        return super().forward(x * self.in_features ** -0.5)


class DecoderBlock(nn.Module):
    """(ModulatedNorm, ReLU, ConvTranspose2d), twice the side, plus output_padding; then, unless it is the last block,
    (ModulatedNorm, ReLU, Conv2d) beside a way straight through, the sum scaled to keep its variance (He et al. 2016,
    "Identity Mappings in Deep Residual Networks"). (B, C_in, H, W), z (B, LATENT_DIM) -> (B, C_out, 2H, 2W).

    The ConvTranspose2d is 4 x 4 at stride 2: each output pixel is made by 4 taps, none by more.
    """

    def __init__(self, channels_in, channels_out, latent_dim, output_padding, last):
        super().__init__()
        self.norm = ModulatedNorm(channels_in, latent_dim)
        self.up = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, output_padding=output_padding)
        self.last = last
        if not last:
            self.residual_norm = ModulatedNorm(channels_out, latent_dim)
            self.residual = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x, z):
        x = self.up(F.relu(self.norm(x, z), inplace=True))
        if self.last:
            return x
        return (x + self.residual(F.relu(self.residual_norm(x, z), inplace=True))) * math.sqrt(0.5)


def conv_tower(image_size, channels, width, width_max, for_critic):
    """Conv blocks from the picture down to 4..7 pixels a side; and the number of features that they end with."""
    channel_list = [channels, *widths(image_size, width, width_max)]
    blocks = [conv_block(a, b, for_critic) for a, b in pairwise(channel_list)]
    return nn.Sequential(*blocks), channel_list[-1] * sides(image_size)[-1] ** 2


class MaxPool2dTwiceDifferentiable(nn.MaxPool2d):
    """MaxPool2d by the operator that also gives indices: equal values, and the only form that MPS can
    differentiate twice, as the gradient penalty does."""

    def forward(self, x):
        return F.max_pool2d(x, self.kernel_size, self.stride, return_indices=True)[0]


def run(modules, x, *others, recompute=False):
    """x through all modules, each called with x and others. With recompute their activations are not kept but computed
    again in the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): only for modules
    that draw nothing."""
    for module in modules:
        if recompute:
            x = checkpoint(module, x, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            x = module(x, *others)
    return x


def full_precision(x):
    """A context in which autocast leaves everything on x's device in float32."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


# ------------------------------------------------------------------------------------- VAE

class VAE(nn.Module):
    """Encoder of (Conv2d, ReLU, MaxPool2d) blocks, Linear heads for mu and logvar; decoder of ReLU and
    ConvTranspose2d, see DecoderBlock, and a Sigmoid at the end (Kingma and Welling 2013, "Auto-Encoding Variational
    Bayes").

    image (B, C, H, W) in [-1, 1] -> mu, logvar (B, LATENT_DIM);  z (B, LATENT_DIM) -> x (B, C, H, W) in [0, 1].
    """

    def __init__(self, image_size, channels, latent_dim, width, width_max, encoder_width, recompute=False):
        super().__init__()
        self.latent_dim, self.recompute = latent_dim, recompute
        self.encoder, features = conv_tower(image_size, channels, encoder_width, width_max, for_critic=False)
        self.to_mu = EqualisedLinear(features, latent_dim)
        self.to_logvar = EqualisedLinear(features, latent_dim, scale=0.1)    # the posterior starts near the prior

        side_list = sides(image_size)[::-1]                                    # from the smallest up
        channel_list = widths(image_size, width, width_max)[::-1]              # from the widest down
        self.start_shape = (channel_list[0], side_list[0], side_list[0])
        self.from_z = nn.Linear(latent_dim, math.prod(self.start_shape))
        self.decoder = nn.ModuleList(
            DecoderBlock(a, b, latent_dim, output_padding=next_side - 2 * side, last=next_side == image_size)
            for (a, b), (side, next_side) in zip(pairwise([*channel_list, channels]), pairwise(side_list)))

        he_init(self.from_z, self.decoder)
        for module in self.decoder.modules():
            if isinstance(module, ModulatedNorm):            # scale and shift start near 1 and 0, whatever z
                nn.init.normal_(module.to_scale_and_shift.weight, std=0.02)

    def encode(self, image):
        """image (B, C, H, W) in [-1, 1] -> mu, logvar (B, LATENT_DIM), unbounded but for logvar's wide clamp."""
        features = run(self.encoder, image, recompute=self.recompute).flatten(1).to(image.dtype)
        with full_precision(features):
            return self.to_mu(features), self.to_logvar(features).clamp(*LOGVAR_RANGE)

    def reparameterize(self, mu, logvar, noise):
        """z = mu + sigma * noise, with noise (B, LATENT_DIM) from N(0, I), drawn by the caller."""
        return mu + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """z (B, LATENT_DIM) -> x (B, C, H, W) in [0, 1]."""
        hidden = self.from_z(z).unflatten(1, self.start_shape)
        hidden = run(self.decoder[:-1], hidden, z, recompute=self.recompute)
        with full_precision(hidden):                         # the picture itself is never rounded to bfloat16
            return torch.sigmoid(run(self.decoder[-1:], hidden.to(z.dtype), z, recompute=self.recompute))

    def forward(self, image, noise):
        """image in [-1, 1], noise (B, LATENT_DIM) -> x in [0, 1], mu, logvar."""
        mu, logvar = self.encode(image)
        return self.decode(self.reparameterize(mu, logvar, noise)), mu, logvar


# ------------------------------------------------------------------------------------- critic

class Discriminator(nn.Module):
    """The critic, symmetric with the encoder: image (B, C, H, W) in [-1, 1] -> one unbounded score an image, (B,).

    No Sigmoid, and nothing that ties the pictures of a batch together, since the gradient penalty of WGAN-GP
    (Gulrajani et al. 2017) judges each input on its own.
    """

    def __init__(self, image_size, channels, width, width_max):
        super().__init__()
        self.blocks, features = conv_tower(image_size, channels, width, width_max, for_critic=True)
        self.to_score = nn.Linear(features, 1)
        # With torch's default the gradient with respect to the input starts near 0.01, and the first
        # hundreds of steps would only raise it to the 1 that the penalty asks for.
        he_init(self.blocks, self.to_score, slope=0.2)

    def forward(self, image):
        features = self.blocks(image).flatten(1).to(image.dtype)
        with full_precision(features):
            return self.to_score(features).squeeze(1)

    def probability(self, image):
        """Probability that each image is real, (B,) in (0, 1): sigmoid of the score, whose zero the drift term
        of the critic's loss keeps between the two sides."""
        return torch.sigmoid(self(image))


def he_init(*modules, slope=0.0):
    """He et al. 2015 for each convolution and Linear: variance 2 / fan_in. ConvTranspose2d: see bilinear_init."""
    for module in (m for part in modules for m in part.modules()):
        if isinstance(module, nn.ConvTranspose2d):
            bilinear_init(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=slope)
        else:
            continue
        nn.init.zeros_(module.bias)


def bilinear_init(weight):
    """Starts a 4 x 4 ConvTranspose2d of stride 2 as a random 1 x 1 convolution and a bilinear doubling of the size.

    weight (C_in, C_out, 4, 4). With independent weights each of the four pixels that come from one gets its own
    mixture of channels, a chessboard that training takes long to unlearn (Aitken et al. 2017, "Checkerboard artifact
    free sub-pixel convolution", start equal for the same reason).
    """
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    mixture = torch.randn(*weight.shape[:2], 1, 1) * math.sqrt(2 / weight.shape[0])
    with torch.no_grad():
        weight.copy_(mixture * line[:, None] * line)


# ------------------------------------------------------------------------------------- synthetic video

class Changes(NamedTuple):
    """What is done to the frames of a video. Drawn once, before anything that may be computed twice."""
    shift: torch.Tensor      # (T, 2) int64: dy, dx of each frame, pixels
    added: torch.Tensor      # (T*C, H, W) or (T*C, 1, 1): brightness and noise

    def to(self, tensor):
        """On the tensor's device, `added` in its dtype."""
        return Changes(self.shift.to(tensor.device), self.added.to(tensor))


class SyntheticVideo(nn.Module):
    """T slightly modified copies of a picture, stacked: (B, C, H, W) in [0, 1] -> (B, T*C, H, W), near [0, 1].

    Frame 0 is the picture itself; frame t is shifted, brightened or darkened, and given noise, all with a
    strength that grows linearly with t. Shift and brightness are drawn a frame and shared by the batch, the
    noise is one (T, C, H, W) field: so a batch split over processes sees what the whole one would. Not clamped,
    so that no pixel loses its gradient.
    """

    def __init__(self, num_frames, channels, image_size, shift, brightness, noise):
        super().__init__()
        self.num_frames, self.channels, self.size = num_frames, channels, image_size
        self.brightness, self.noise = brightness, noise
        self.pad = round(shift * image_size)          # the largest shift, pixels

    def draw(self, generator=None):
        """The Changes of one video, on the CPU; without a generator a fixed schedule without noise."""
        strength = torch.linspace(0, 1, self.num_frames)
        if generator is not None:
            shift = torch.rand(self.num_frames, 2, generator=generator) * 2 - 1
            brightness = torch.rand(self.num_frames, generator=generator) * 2 - 1
        else:
            angle = torch.arange(self.num_frames) * (math.pi * (3 - math.sqrt(5)))     # golden angle: even turns
            shift = torch.stack([angle.cos(), angle.sin()], dim=1)
            brightness = (angle * 2).sin()
        shift = (shift * strength[:, None] * self.pad).round().long()
        added = (brightness * strength * self.brightness)[:, None, None, None].expand(-1, self.channels, 1, 1)
        if generator is not None:
            field = torch.randn(self.num_frames, self.channels, self.size, self.size, generator=generator)
            added = added + self.noise * strength[:, None, None, None] * field
        return Changes(shift, added.flatten(0, 1))

    def padded(self, picture):
        """The picture with its border pixels repeated `pad` times on each side.

        F.pad(mode="replicate") does the same, but its backward pass is not deterministic on CUDA, and torch 2.14
        compiles it wrongly in channels_last.
        """
        for dim in (2, 3):
            shape = [-1] * dim + [self.pad] + [-1] * (3 - dim)
            first, last = (picture.narrow(dim, i, 1).expand(shape) for i in (0, picture.shape[dim] - 1))
            picture = torch.cat([first, picture, last], dim)
        return picture

    def forward(self, picture, changes):
        """picture (B, C, H, W) in [0, 1] -> (B, T*C, H, W)."""
        height, width, padded = *picture.shape[2:], self.padded(picture)
        frames = [padded[:, :, self.pad + dy:self.pad + dy + height, self.pad + dx:self.pad + dx + width]
                  for dy, dx in changes.shift.tolist()]
        return torch.cat(frames, dim=1) + changes.added

    def embed(self, picture, conv, changes):
        """conv(self(picture, changes)), without making the frames: (B, C, H, W) -> (B, D, H/PATCH, W/PATCH).

        Shifting and a convolution are both linear, so T shifted copies under T kernels are one picture under the
        sum of the shifted kernels; what is added to the frames is the same for the whole batch and goes through
        the convolution once. That one kernel is wide and its stride is PATCH: with PATCH x PATCH pixels gathered
        into channels it becomes a small kernel on many channels, half the time. Equal to float tolerance.
        """
        patch = conv.kernel_size[0]
        kernel = self.shifted_sum(conv.weight, changes.shift)
        fill = -kernel.shape[2] % patch                                                     # up to whole patches
        kernel, padded = F.pad(kernel, (0, fill, 0, fill)), F.pad(self.padded(picture), (0, fill, 0, fill))
        added = changes.added.expand(-1, *picture.shape[2:])[None]
        return F.conv2d(F.pixel_unshuffle(padded, patch), F.pixel_unshuffle(kernel, patch)) + conv(added)

    def shifted_sum(self, weight, shift):
        """Kernels (D, T*C, P, P), frame t's moved by shift[t], summed over the frames: (D, C, K, K), K = P + 2 * pad.

        As two matrix products with 0-1 matrices, columns and then rows, so that no shift leaves the device.
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

def encoder_layer(layer, x):
    """layer(x) of an nn.TransformerEncoderLayer with norm_first, ReLU and no dropout, (B, N, D) -> (B, N, D).

    Written out because nn.MultiheadAttention reorders and copies its tensors: this takes three quarters of the time.
    """
    attention = layer.self_attn
    queries, keys, values = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias).unflatten(
        2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)                         # each (B, heads, N, D / heads)
    heads = F.scaled_dot_product_attention(queries, keys, values)
    x = x + attention.out_proj(heads.transpose(1, 2).flatten(2))
    return x + layer.linear2(F.relu(layer.linear1(layer.norm2(x)), inplace=True))


class TransformerParamTanh(nn.Module):
    """tanh(alpha * (2x - 1)) with alpha set per pixel by a Transformer that looks at a synthetic video of x.

        x (B, C, H, W) in [0, 1]
        -> displayed (1 + tanh(ALPHA_INIT * (2x - 1))) / 2, in [0, 1]
        -> video (B, T*C, H, W) -> patch tokens (B, N, D), normalised -> Transformer encoder (12 heads, 12 layers)
        -> Linear: s, one a 4 x 4 pixels -> alpha = ALPHA_INIT * ALPHA_SPAN ** tanh(s), (B, 1, H, W)
        -> image = tanh(alpha * (2x - 1)), in [-1, 1]

    alpha is positive and bounded, ALPHA_INIT / ALPHA_SPAN .. ALPHA_INIT * ALPHA_SPAN, so that no step can turn a
    picture grey or saturate the layer for good. The head starts at zero: the layer begins as tanh(ALPHA_INIT * .).
    With an ALPHA_SPAN of 1 it stays that, and the Transformer is not run.
    Compare Dynamic Tanh (Zhu et al. 2025, "Transformers without Normalization"): one learned scalar a layer,
    where here a Transformer predicts alpha for each picture and place.
    """

    CELL = 4      # one value of s for each CELL x CELL pixels; bilinear interpolation leaves no seams between patches

    def __init__(self, image_size, channels, num_frames, patch, dim, heads, layers, alpha_init, alpha_span,
                 alpha_per_channel, shift, brightness, noise, recompute=False):
        super().__init__()
        self.channels, self.image_size, self.recompute = channels, image_size, recompute
        self.alpha_init, self.alpha_span = alpha_init, alpha_span
        self.video = SyntheticVideo(num_frames, channels, image_size, shift, brightness, noise)
        self.to_tokens = nn.Conv2d(num_frames * channels, dim, patch, stride=patch)
        self.token_norm = nn.LayerNorm(dim)
        nn.init.normal_(self.to_tokens.weight)          # before a norm their size only sets how fast Adam turns them
        self.side = image_size // patch                                  # patches along one side of the picture
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, dim_feedforward=4 * dim, dropout=0.0, batch_first=True,
                                           norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self._initialise_each_layer()
        self.cells = patch // self.CELL                                  # values of s along one side of a patch
        self.alpha_channels = channels if alpha_per_channel else 1
        self.to_s = nn.Linear(dim, self.alpha_channels * self.cells ** 2)
        nn.init.zeros_(self.to_s.weight)
        nn.init.zeros_(self.to_s.bias)

    def _initialise_each_layer(self):
        """nn.TransformerEncoder copies the first layer's weights into all others; draw each anew."""
        for layer in self.transformer.layers:
            for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
                linear.reset_parameters()
            layer.self_attn._reset_parameters()

    def displayed(self, x):
        """x in [0, 1] -> the picture as the layer would show it at the start, in [0, 1]."""
        return (1 + torch.tanh(self.alpha_init * (2 * x - 1))) / 2

    def frames(self, x, video=None, changes=None):
        """What the Transformer sees, (B, T*C, H, W): synthetic copies, or the current picture and `video` behind it."""
        if video is not None:
            return torch.cat([self.displayed(x), video], dim=1)
        return self.video(self.displayed(x), self._on_device(changes, x))

    def _on_device(self, changes, x):
        return (self.video.draw() if changes is None else changes).to(x)

    def alpha(self, x, video=None, changes=None):
        """alpha for x (B, C, H, W) in [0, 1]: (B, 1, H, W), or (B, C, H, W) per channel.

        video as in `forward`; changes: what `self.video.draw` gave, None for the fixed schedule.
        """
        if self.alpha_span == 1:                                                  # there is nothing to predict
            return torch.full_like(x[:, :self.alpha_channels], self.alpha_init)
        s = self.to_s(self.encode(self.tokens(x, video, changes))).to(x.dtype)    # (B, N, alpha_channels * cells**2)
        s = s.transpose(1, 2).unflatten(2, (self.side, self.side))
        s = F.pixel_shuffle(s, self.cells)                                        # (B, alpha_channels, H/4, W/4)
        s = F.interpolate(s, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.alpha_init * self.alpha_span ** torch.tanh(s)

    def tokens(self, x, video=None, changes=None):
        """What the Transformer reads, (B, N, D): patches of the frames, each normalised, and their positions.

        A patch of the video has thousands of values, nearly alike from frame to frame. Unless they are centred and
        their sum is normalised, Adam drives all tokens the same way, to hundreds of times what the Transformer's
        layers add, and alpha ends up the same everywhere.
        """
        if video is None:
            patches = self.video.embed(self.displayed(x) - 0.5, self.to_tokens, self._on_device(changes, x))
        else:
            patches = self.to_tokens(self.frames(x, video) - 0.5)                 # (B, D, H/PATCH, W/PATCH)
        return self.token_norm(patches.flatten(2).transpose(1, 2)) + self.positions

    def encode(self, tokens):
        """self.transformer(tokens), (B, N, D) -> (B, N, D)."""
        layers = [functools.partial(encoder_layer, layer) for layer in self.transformer.layers]
        return self.transformer.norm(run(layers, tokens, recompute=self.recompute))

    def forward(self, x, video=None, generator=None):
        """x (B, C, H, W) in [0, 1] -> image (B, C, H, W) in [-1, 1].

        video: the T-1 earlier pictures, newest first, (B, (T-1)*C, H, W) in [0, 1], in place of modified copies.
        generator: a torch.Generator on the CPU that draws the copies' changes; without one a fixed schedule
        without noise is used, so that one z is one picture.
        """
        return self.apply_alpha(x, self.alpha(x, video, self.video.draw(generator)))

    def apply_alpha(self, x, alpha):
        """tanh(alpha * (2x - 1)): x in [0, 1] -> image in [-1, 1]."""
        return torch.tanh(alpha * (2 * x - 1))

    def extra_repr(self):
        low, high = self.alpha_init / self.alpha_span, self.alpha_init * self.alpha_span
        return f"alpha starts at {self.alpha_init:g}, stays in {low:g}..{high:g}"


# ------------------------------------------------------------------------------------- generator

class Generator(nn.Module):
    """VAE and layer in one: the only place that joins the two. z -> image, image -> image."""

    def __init__(self, vae, layer):
        super().__init__()
        self.vae, self.layer = vae, layer

    def forward(self, z, video=None, generator=None):
        """z (B, LATENT_DIM) -> image (B, C, H, W) in [-1, 1]; video and generator as in TransformerParamTanh."""
        return self.layer(self.vae.decode(z), video, generator)

    def image_and_alpha(self, z, video=None, changes=None):
        """The image and the alpha that made it, (B, 1, H, W), or (B, C, H, W) per channel."""
        x = self.vae.decode(z)
        alpha = self.layer.alpha(x, video, changes)
        return self.layer.apply_alpha(x, alpha), alpha

    def reconstruct(self, image):
        """image in [-1, 1] -> its reconstruction from mu, in [-1, 1]."""
        return self(self.vae.encode(image)[0])


def build(constants):
    """Generator and Discriminator of a run, from its constants (config.py or a checkpoint's)."""
    c = constants
    recompute = getattr(c, "RECOMPUTE_ACTIVATIONS", False)       # a checkpoint may be older than the constant
    vae = VAE(c.IMAGE_SIZE, c.CHANNELS, c.LATENT_DIM, c.WIDTH, c.WIDTH_MAX, c.ENCODER_WIDTH, recompute)
    layer = TransformerParamTanh(
        c.IMAGE_SIZE, c.CHANNELS, c.NUM_FRAMES, c.PATCH, c.TRANSFORMER_DIM, c.TRANSFORMER_HEADS, c.TRANSFORMER_LAYERS,
        c.ALPHA_INIT, c.ALPHA_SPAN, c.ALPHA_PER_CHANNEL, c.VIDEO_SHIFT, c.VIDEO_BRIGHTNESS, c.VIDEO_NOISE,
        recompute)
    return Generator(vae, layer), Discriminator(c.IMAGE_SIZE, c.CHANNELS, c.WIDTH, c.WIDTH_MAX)


def from_checkpoint(saved, device):
    """The averaged (EMA) generator of a loaded checkpoint, ready for use, and the run's constants."""
    constants = SimpleNamespace(**saved["constants"])
    generator, _ = build(constants)
    generator.load_state_dict(saved["ema"])
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), constants


# ------------------------------------------------------------------------------------- summary

class CountMultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and matrix products while it is on, in `total`.

    torch's own FlopCounterMode raises under a double backward, and counts fused attention as 0 on the CPU: so
    count with gradients on (no fast path) and the MATH backend of attention, as `multiply_adds` does.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(operator, "_overloadpacket", None))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out) // 2      # the registry counts both operations
        return out


def multiply_adds(function, *args):
    """Multiply-adds of function(*args): convolutions and matrix products, backward passes inside included."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), CountMultiplyAdds() as count:
        function(*args)
    return count.total


def summary(generator, critic, batch_size):
    """Parameters and multiply-adds an image of each part: a list of (name, parameters, multiply-adds).

    Counted on the meta device, where only shapes are computed.
    """
    generator, critic = copy.deepcopy(generator).to("meta"), copy.deepcopy(critic).to("meta")
    vae, layer = generator.vae, generator.layer
    shape = (batch_size, layer.channels, layer.image_size, layer.image_size)
    image, z = torch.empty(shape, device="meta"), torch.empty(batch_size, vae.latent_dim, device="meta")
    tokens = layer.positions.expand(batch_size, -1, -1)
    changes = layer.video.draw().to(image)
    layer_parts = [] if layer.alpha_span == 1 else [             # with that, they are not run
        ("video and patch tokens", (layer.to_tokens, layer.token_norm), lambda x: layer.tokens(x, changes=changes),
         image),
        ("Transformer and alpha head", (layer.transformer, layer.to_s),
         lambda t: layer.to_s(layer.encode(t)), tokens),
    ]
    parts = [
        ("encoder", (vae.encoder, vae.to_mu, vae.to_logvar), vae.encode, image),
        ("decoder", (vae.from_z, vae.decoder), vae.decode, z),
        *layer_parts,
        ("critic", (critic,), critic, image),
    ]
    return [(name, sum(p.numel() for module in modules for p in module.parameters()),
             multiply_adds(function, argument) // batch_size) for name, modules, function, argument in parts]
