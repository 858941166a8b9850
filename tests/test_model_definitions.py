import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import config
import losses
import model_definitions
from model_definitions import Discriminator, TransformerParamTanh


def constants(**changes):
    small = {"IMAGE_SIZE": 32, "WIDTH": 8, "WIDTH_MAX": 32, "LATENT_DIM": 16, "PATCH": 8, "TRANSFORMER_DIM": 24,
             "TRANSFORMER_LAYERS": 2}
    return SimpleNamespace(**{**{k: v for k, v in vars(config).items() if k.isupper()}, **small, **changes})


def build(**changes):
    torch.manual_seed(0)
    return model_definitions.build(constants(**changes))


def wake_head(layer, std=0.5):
    """Small random weights for the head: at its zero start no gradient flows through alpha, by design."""
    torch.nn.init.normal_(layer.to_s.weight, std=std)
    return layer


@pytest.fixture
def g():
    return torch.Generator().manual_seed(1)


# ------------------------------------------------------------------------------------- shapes and ranges

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", range(32, 257, 16))
def test_every_allowed_size_gives_its_shapes(size, channels, g):
    generator, critic = build(IMAGE_SIZE=size, CHANNELS=channels, PATCH=16, TRANSFORMER_LAYERS=1)
    image = torch.rand(2, channels, size, size, generator=g) * 2 - 1
    with torch.no_grad():
        x, mu, logvar = generator.vae(image, torch.randn(2, 16, generator=g))
        made, alpha = generator.image_and_alpha(torch.randn(2, 16, generator=g))
        score = critic(image)
    assert x.shape == made.shape == image.shape
    assert mu.shape == logvar.shape == (2, 16)
    assert alpha.shape == (2, 1, size, size)
    assert score.shape == (2,)
    assert 4 <= model_definitions.sides(size)[-1] <= 7
    assert x.min() >= 0 and x.max() <= 1 and made.min() >= -1 and made.max() <= 1


def test_reference_shape_reads_48_channels_with_12_heads_and_12_layers():
    reference = SimpleNamespace(**{k: v for k, v in vars(config).items() if k.isupper()})
    generator, critic = model_definitions.build(reference)
    layer = generator.layer
    assert layer.to_tokens.in_channels == 48 == config.TRANSFORMER_IN_CHANNELS
    assert len(layer.transformer.layers) == 12
    assert all(each.self_attn.num_heads == 12 and each.self_attn.dropout == 0 for each in layer.transformer.layers)
    with torch.no_grad():
        image = generator(torch.randn(16, reference.LATENT_DIM))
        assert image.shape == (16, 3, 128, 128)
        assert critic(image).shape == (16,)


def test_probability_is_the_sigmoid_of_the_score(g):
    _, critic = build()
    image = torch.rand(3, 3, 32, 32, generator=g)
    torch.testing.assert_close(critic.probability(image), 1 / (1 + torch.exp(-critic(image))))


def test_no_part_ties_the_pictures_of_a_batch_together(g):
    generator, critic = build()
    wake_head(generator.layer)
    z, image = torch.randn(4, 16, generator=g), torch.rand(4, 3, 32, 32, generator=g) * 2 - 1
    with torch.no_grad():
        for function, batch in ((generator, z), (critic, image), (generator.reconstruct, image)):
            torch.testing.assert_close(function(batch)[2], function(batch[2:3])[0], rtol=1e-4, atol=1e-5)


def test_reparameterize_has_the_mean_and_deviation_of_its_posterior(g):
    generator, _ = build()
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(9.0)]])
    z = generator.vae.reparameterize(mu, logvar, torch.randn(100_000, 2, generator=g))
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 3.0]), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------- critic

def test_critic_starts_with_a_gradient_of_about_one(g):
    for size in (32, 64, 128):
        torch.manual_seed(0)
        critic = Discriminator(size, 3, 32, 256)
        norm = losses.gradient_norm(critic, torch.rand(4, 3, size, size, generator=g) * 2 - 1).mean().item()
        assert 0.1 < norm < 10, (size, norm)


@pytest.mark.parametrize("size", [32, 48, 80, 112])
def test_anti_aliased_pooling_halves_and_rounds_down(size):
    block = model_definitions.conv_block(3, 8, for_critic=True)
    for side in model_definitions.sides(size)[:-1]:
        assert block(torch.zeros(1, 3, side, side)).shape == (1, 8, side // 2, side // 2)


def test_anti_aliased_pooling_is_the_mean_of_four_maxima(g):
    pool = model_definitions.conv_block(3, 8, for_critic=True)[2:]
    x = torch.randn(1, 1, 6, 6, generator=g)
    maxima = [[x[0, 0, i:i + 2, j:j + 2].max() for j in (2, 3)] for i in (2, 3)]
    torch.testing.assert_close(pool(x)[0, 0, 1, 1], torch.tensor(maxima).mean())


# ------------------------------------------------------------------------------------- synthetic video

def test_frame_0_is_the_picture_and_later_frames_are_slightly_changed_copies(g):
    video = TransformerParamTanh(32, 3, 16, 8, 24, 12, 1, 3.0, 3.0, False, 0.06, 0.1, 0.05).video
    picture = torch.rand(2, 3, 32, 32, generator=g)
    for generator in (None, g):
        frames = video(picture, video.draw(generator)).unflatten(1, (16, 3))
        torch.testing.assert_close(frames[:, 0], picture)
        change = (frames[:, 1:] - picture[:, None]).abs().mean(dim=(0, 2, 3, 4))
        assert (change > 0).all() and change[-1] > change[0]
        assert change.max() < 0.5


def test_frames_follow_their_schedule_without_a_generator_and_differ_with_two_seeds():
    video = TransformerParamTanh(32, 3, 16, 8, 24, 12, 1, 3.0, 3.0, False, 0.06, 0.1, 0.05).video
    picture = torch.rand(1, 3, 32, 32)
    assert torch.equal(video(picture, video.draw()), video(picture, video.draw()))
    one, again, other = (video(picture, video.draw(torch.Generator().manual_seed(s))) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_shifted_frame_is_the_picture_moved_by_whole_pixels():
    video = model_definitions.SyntheticVideo(16, 1, 32, shift=0.1, brightness=0.0, noise=0.0)
    picture = torch.rand(1, 1, 32, 32)
    changes = video.draw()
    frames, (dy, dx) = video(picture, changes), changes.shift[15].tolist()
    assert (dy, dx) != (0, 0)
    moved = torch.roll(picture, (-dy, -dx), (2, 3))[0, 0, 4:-4, 4:-4]      # away from the replicated border
    torch.testing.assert_close(frames[0, 15, 4:-4, 4:-4], moved)


@pytest.mark.parametrize("size,patch,channels", [(32, 8, 3), (48, 16, 1), (64, 4, 3)])
def test_fast_embedding_equals_convolving_the_frames(size, patch, channels, g):
    torch.manual_seed(0)
    layer = TransformerParamTanh(size, channels, 16, patch, 24, 12, 1, 3.0, 3.0, False, 0.06, 0.1, 0.05)
    picture = torch.rand(2, channels, size, size, generator=g, requires_grad=True)

    def gradients(function):
        out = function(layer.video.draw(torch.Generator().manual_seed(3)))
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        return out, *torch.autograd.grad((out * weights).sum(), [picture, *layer.to_tokens.parameters()])

    fast = gradients(lambda k: layer.video.embed(picture, layer.to_tokens, k))
    slow = gradients(lambda k: layer.to_tokens(layer.video(picture, k)))
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_given_video_takes_the_copies_place_behind_the_current_picture(g):
    generator, _ = build()
    layer = wake_head(generator.layer)
    x, video = torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 45, 32, 32, generator=g)
    frames = layer.frames(x, video)
    assert torch.equal(frames[:, :3], layer.displayed(x)) and torch.equal(frames[:, 3:], video)
    copies = layer.frames(x)[:, 3:]
    torch.testing.assert_close(layer(x, video=copies), layer(x), rtol=1e-4, atol=1e-5)
    assert (layer(x, video=video) - layer(x)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------- alpha

def test_layer_starts_as_a_plain_tanh_of_alpha_init(g):
    generator, _ = build()
    x = torch.rand(2, 3, 32, 32, generator=g)
    assert torch.equal(generator.layer.alpha(x), torch.full((2, 1, 32, 32), 3.0))
    torch.testing.assert_close(generator.layer(x), torch.tanh(3.0 * (2 * x - 1)))


@pytest.mark.parametrize("size, patch", [(32, 8), (128, 16)])
def test_adam_steps_in_one_direction_leave_the_tokens_apart(size, patch, g):
    """So the Transformer sees what the picture is. Not centred, tokens of different pictures would end 0.07 to 0.15
    apart; with torch's initial weights ten steps would leave nothing of what the tokens were."""
    layer = build(IMAGE_SIZE=size, PATCH=patch)[0].layer
    x = torch.rand(4, 3, size // patch, size // patch, generator=g).kron(torch.ones(patch, patch))
    signs = torch.where(torch.arange(len(layer.to_tokens.weight)) % 2 == 0, 1.0, -1.0)[:, None, None, None]

    @torch.no_grad()
    def tokens_after(steps):
        layer.to_tokens.weight += steps * config.LEARNING_RATE * config.LAYER_RATE * signs
        return layer.tokens(x) - layer.positions

    before, ten, thousand = (tokens_after(steps) for steps in (0, 10, 990))
    torch.testing.assert_close(thousand.square().mean(-1), torch.ones(4, (size // patch) ** 2), rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(before, ten, dim=-1).mean() > 0.9
    assert thousand.std(0).mean() > 0.5


def test_alpha_stays_within_its_bounds_whatever_the_weights(g):
    generator, _ = build()
    layer = wake_head(generator.layer, std=1000.0)
    alpha = layer.alpha(torch.rand(4, 3, 32, 32, generator=g))
    assert alpha.min() >= 1 - 1e-4 and alpha.max() <= 9 + 1e-4
    assert alpha.min() < 1.5 and alpha.max() > 8


def test_alpha_per_channel_has_one_map_a_channel(g):
    generator, _ = build(ALPHA_PER_CHANNEL=True)
    layer = wake_head(generator.layer)
    alpha = layer.alpha(torch.rand(2, 3, 32, 32, generator=g))
    assert alpha.shape == (2, 3, 32, 32) and (alpha[:, 0] - alpha[:, 1]).abs().max() > 1e-3


def test_each_patch_sets_alpha_where_it_lies():
    generator, _ = build()
    layer = generator.layer
    cells = torch.zeros(1, 16, 4)                        # 4 x 4 patches of 8 pixels, 2 x 2 cells in each
    cells[0, 6, 1] = 5.0                                 # patch row 1, column 2; its upper right cell
    layer.to_s = layer.token_norm = torch.nn.Identity()
    layer.encode = lambda tokens: tokens
    layer.positions = torch.nn.Parameter(cells)
    layer.video.embed = lambda picture, conv, changes: torch.zeros(1, 4, 4, 4)
    alpha = layer.alpha(torch.zeros(1, 3, 32, 32))[0, 0]
    row, column = divmod(alpha.argmax().item(), 32)
    assert 8 <= row < 12 and 20 <= column < 24


def test_encode_equals_torchs_transformer_encoder(g):
    generator, _ = build()
    layer = generator.layer
    tokens = torch.randn(2, 16, 24, generator=g, requires_grad=True)
    results = [(out, *torch.autograd.grad(out.square().sum(), [tokens, *layer.transformer.parameters()]))
               for out in (layer.encode(tokens), layer.transformer(tokens))]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_transformer_layers_start_with_different_weights():
    generator, _ = build()
    first, second = generator.layer.transformer.layers
    for name, weights in first.named_parameters():
        if weights.dim() == 2:
            assert not torch.equal(weights, dict(second.named_parameters())[name]), name


# ------------------------------------------------------------------------------------- gradients

def norms(module):
    return {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in module.named_parameters()}


def test_generator_gradient_reaches_every_weight_of_decoder_and_layer_but_not_the_encoder(g):
    generator, critic = build()
    wake_head(generator.layer)
    critic.requires_grad_(False)
    (-critic(generator(torch.randn(2, 16, generator=g))).mean()).backward()
    found = norms(generator)
    encoder = {n: v for n, v in found.items() if n.startswith(("vae.encoder", "vae.to_mu", "vae.to_logvar"))}
    assert encoder and not any(encoder.values())
    assert [n for n, v in found.items() if n not in encoder and v == 0] == []
    assert not any(norms(critic).values())


def test_reconstruction_gradient_reaches_the_encoder(g):
    generator, _ = build()
    image = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    losses.reconstruction_loss(generator.reconstruct(image), image).backward()
    assert norms(generator)["vae.encoder.0.0.weight"] > 0


@pytest.mark.parametrize("size", [32, 128])
def test_one_adam_step_of_the_heads_moves_the_posterior_little_at_any_size(size, g):
    """Adam's first step moves each weight by the learning rate, here all in the one direction that adds up."""
    vae = build(IMAGE_SIZE=size, WIDTH=config.WIDTH, WIDTH_MAX=config.WIDTH_MAX)[0].vae
    image = torch.rand(4, 3, size, size, generator=g) * 2 - 1
    with torch.no_grad():
        features = vae.encoder(image).flatten(1)
        mu, logvar = vae.encode(image)
        assert 0.7 < (mu.square() + logvar.exp()).mean() < 2
        weight = vae.to_mu.weight / features.shape[1] ** 0.5
        torch.testing.assert_close(mu, features @ weight.T + vae.to_mu.bias, rtol=1e-4, atol=1e-4)
        for head in (vae.to_mu, vae.to_logvar):
            head.weight += config.LEARNING_RATE
        for before, after in zip((mu, logvar), vae.encode(image)):
            assert 0.001 < (after - before).abs().max() < 0.1


def test_feedback_gradient_flows_through_alpha_alone(g):
    generator, _ = build()
    layer = wake_head(generator.layer)
    x = torch.rand(1, 3, 32, 32, generator=g, requires_grad=True)
    alpha = layer.alpha(x)
    through_alpha, = torch.autograd.grad(layer.apply_alpha(x.detach(), alpha).square().sum(), x)
    assert through_alpha.norm() > 0

    # Against a finite difference along the gradient, in float64: neither cut nor scaled.
    double = layer.double()
    base, direction = x.detach().double(), (through_alpha / through_alpha.norm()).double()

    def value(x_seen):
        return double.apply_alpha(base, double.alpha(x_seen)).square().sum()

    slope = (value(base + 1e-5 * direction) - value(base - 1e-5 * direction)) / 2e-5
    assert slope.item() == pytest.approx(through_alpha.norm().item(), rel=1e-3)


def test_at_the_exact_start_alpha_passes_no_gradient(g):
    generator, _ = build()
    x = torch.rand(1, 3, 32, 32, generator=g, requires_grad=True)
    gradient, = torch.autograd.grad(generator.layer.alpha(x).sum(), x)
    assert gradient.abs().max() == 0


# ------------------------------------------------------------------------------------- summary

def test_counted_multiply_adds_agree_with_counting_by_hand():
    def layers(x):
        y = torch.nn.functional.conv2d(x, torch.ones(4, 3, 3, 3), padding=1)
        return y.flatten(1) @ torch.ones(4 * 8 * 8, 10)

    assert model_definitions.multiply_adds(layers, torch.ones(2, 3, 8, 8)) == 2 * (4 * 3 * 9 * 64 + 256 * 10)


def test_count_sees_attention_and_the_penalty(g):
    generator, critic = build()
    tokens, dim = 16, 24
    block = generator.layer.transformer.layers[0]
    by_hand = tokens * dim * (4 * dim + 2 * 4 * dim) + 2 * tokens * tokens * dim    # Linear layers, then attention
    assert model_definitions.multiply_adds(block, torch.zeros(1, tokens, dim)) == by_hand
    image = torch.zeros(2, 3, 32, 32)
    forward = model_definitions.multiply_adds(critic, image)
    assert model_definitions.multiply_adds(lambda x: losses.gradient_norm(critic, x), image) > 1.9 * forward


def test_summary_lists_all_parameters_once_but_positions():
    generator, critic = build()
    rows = model_definitions.summary(generator, critic, batch_size=2)
    total = sum(p.numel() for m in (generator, critic) for p in m.parameters())
    assert sum(row[1] for row in rows) == total - generator.layer.positions.numel()
    assert all(row[2] > 0 for row in rows)


def test_modulated_norm_is_group_norm_scaled_and_shifted_by_z(g):
    norm = model_definitions.ModulatedNorm(16, 4)
    x, z = torch.randn(3, 16, 5, 5, generator=g), torch.randn(3, 4, generator=g)
    torch.nn.init.normal_(norm.to_scale_and_shift.weight, generator=g)
    grouped = x.view(3, 8, 2 * 25)
    plain = ((grouped - grouped.mean(2, keepdim=True)) /
             (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(x)
    linear = norm.to_scale_and_shift
    both = z @ linear.weight.T + linear.bias
    expected = plain * (1 + both[:, :16, None, None]) + both[:, 16:, None, None]
    torch.testing.assert_close(norm(x, z), expected, rtol=1e-4, atol=1e-5)


def test_z_reaches_every_size_of_the_decoder(g):
    """With the way from below cut, by zeros for what the first Linear gives, z still changes the picture."""
    generator, _ = build()
    torch.nn.init.zeros_(generator.vae.from_z.weight)
    norms = [m for m in generator.vae.decoder.modules() if isinstance(m, model_definitions.ModulatedNorm)]
    assert len(norms) == 2 * len(generator.vae.decoder) - 1
    z = torch.randn(2, 16, generator=g)
    for kept in norms:
        for norm in norms:
            torch.nn.init.normal_(norm.to_scale_and_shift.weight, std=1.0 if norm is kept else 0.0)
            torch.nn.init.normal_(norm.norm.bias, std=0.1)           # an empty picture has nothing to scale
        a, b = generator.vae.decode(z)
        assert (a - b).abs().max() > 1e-3


def test_a_transposed_convolution_starts_as_a_mixture_of_channels_doubled_bilinearly():
    generator, _ = build()
    layer = next(m for m in generator.vae.decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d))
    x = torch.randn(2, layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    mixture = layer.weight[:, :, 1, 1] / (9 / 16)
    expected = F.interpolate(torch.einsum("bihw,io->bohw", x, mixture), scale_factor=2, mode="bilinear")
    inside = (..., slice(1, -1), slice(1, -1))                     # the border ends there, interpolation repeats it
    torch.testing.assert_close(layer(x)[inside], expected[inside], rtol=1e-4, atol=1e-4)
    assert 0.5 < expected.std() / x.std() < 2
