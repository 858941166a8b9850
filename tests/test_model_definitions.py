import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL

import command_line
import config
import losses
import model_definitions
from model_definitions import VAE, Discriminator, Prior, TransformerParamTanh


def build(*flags):
    """Returns a small generator and critic."""
    torch.manual_seed(0)
    return model_definitions.build(command_line.parse_constants([*SMALL, *flags])[0])


def small_layer(*flags):
    """Returns a small layer whose head has random weights: with its zero start no gradient passes through alpha."""
    layer = build(*flags)[0].layer
    torch.nn.init.normal_(layer.to_s.weight, std=0.5)
    return layer


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(1)


def images(rng, count, size=32, channels=3):
    return torch.rand(count, channels, size, size, generator=rng) * 2 - 1


# ------------------------------------------------------------------------------------- shapes and ranges

@pytest.mark.parametrize("size, channels", [*((size, 3) for size in command_line.IMAGE_SIZES), (32, 1), (112, 1)])
def test_every_allowed_size_gives_its_shapes(size, channels, rng):
    generator, critic = build("--image-size", str(size), "--channels", str(channels), "--patch", "16")
    image = images(rng, 1, size, channels)
    with torch.no_grad():
        x, mu, logvar = generator.vae(image, torch.randn(1, 16, generator=rng))
        made, alpha = generator.image_and_alpha(torch.randn(1, 16, generator=rng))
        score = critic(image)
    assert x.shape == made.shape == image.shape and alpha.shape == (1, 1, size, size)
    assert mu.shape == logvar.shape == (1, 16) and score.shape == (1,)
    assert x.min() >= 0 and x.max() <= 1 and made.min() >= -1 and made.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_convolution_at_full_size_adds_to_the_pixels(channels, rng):
    vae = build("--channels", str(channels), "--final-width", "4")[0].vae
    z = torch.randn(2, 16, generator=rng)
    with torch.no_grad():
        before = vae.decode(z)
        assert vae.decoder[-1].up.out_channels == channels + 4 and before.shape == (2, channels, 32, 32)
        vae.detail.conv.bias.fill_(0.5)
        after = vae.decode(z)
    assert torch.allclose(after.logit() - before.logit(), torch.tensor(0.5), atol=1e-4)


def test_the_reference_model_reads_48_channels_with_12_heads_and_12_layers():
    generator, _ = model_definitions.build(config)
    attentions = [layer.self_attn for layer in generator.layer.transformer.layers]
    assert generator.layer.to_tokens.in_channels == 48 == config.TRANSFORMER_IN_CHANNELS
    assert [(attention.num_heads, attention.dropout) for attention in attentions] == [(12, 0)] * 12


def test_keyword_defaults_equal_config():
    names = {"dim": "TRANSFORMER_DIM", "heads": "TRANSFORMER_HEADS", "layers": "TRANSFORMER_LAYERS",
             "shift": "VIDEO_SHIFT", "brightness": "VIDEO_BRIGHTNESS", "noise": "VIDEO_NOISE",
             "recompute": "RECOMPUTE_ACTIVATIONS"}
    for network in (VAE, Discriminator, TransformerParamTanh):
        first, *others = inspect.signature(network).parameters.values()
        assert first.name == "image_size"
        for parameter in others:
            if parameter.name == "motion_dim":               # only models of clips have one
                assert parameter.default == 0
                continue
            assert parameter.default == getattr(config, names.get(parameter.name, parameter.name.upper())), parameter


def test_no_network_connects_the_images_of_a_batch(rng):
    generator, critic = build()
    torch.nn.init.normal_(generator.layer.to_s.weight, std=0.5)
    z, image = torch.randn(4, 16, generator=rng), images(rng, 4)
    with torch.no_grad():
        for function, batch in ((generator, z), (critic, image), (generator.reconstruct, image)):
            torch.testing.assert_close(function(batch)[2], function(batch[2:3])[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- critic

def test_probability_is_the_sigmoid_of_the_score(rng):
    critic, image = Discriminator(32), images(rng, 2)
    torch.testing.assert_close(critic.probability(image), 1 / (1 + torch.exp(-critic(image))))


def test_the_critic_starts_with_a_gradient_of_about_one(rng):
    for size in (32, 64, 128):
        torch.manual_seed(0)
        norm = losses.gradient_norm(Discriminator(size), images(rng, 2, size)).mean()
        assert 0.1 < norm < 10, (size, norm)


def test_the_critics_pooling_is_the_mean_of_four_maxima_and_halves_the_side(rng):
    pool = Discriminator(32).blocks[0][2:]
    x = torch.randn(1, 1, 6, 6, generator=rng)
    maxima = [[x[0, 0, i:i + 2, j:j + 2].max() for j in (2, 3)] for i in (2, 3)]
    torch.testing.assert_close(pool(x)[0, 0, 1, 1], torch.tensor(maxima).mean())
    for side in (4, 5, 9, 10):
        assert pool(torch.zeros(1, 1, side, side)).shape[2:] == (side // 2, side // 2)


# ------------------------------------------------------------------------------------- VAE

@pytest.mark.parametrize("size", [32, 128])
def test_one_adam_step_of_the_heads_moves_the_posterior_little_at_any_size(size, rng):
    """Adam's first step moves each weight by the learning rate; here all of them in the direction that adds up."""
    vae = VAE(size, latent_dim=16)
    image = images(rng, 4, size)
    with torch.no_grad():
        mu, logvar = vae.encode(image)
        assert 0.7 < (mu.square() + logvar.exp()).mean() < 2
        for head in (vae.to_mu, vae.to_logvar):
            head.weight += config.LEARNING_RATE
        for before, after in zip((mu, logvar), vae.encode(image)):
            assert 0.001 < (after - before).abs().max() < 0.1


def test_modulated_norm_is_group_norm_scaled_and_shifted_by_z(rng):
    norm = model_definitions.ModulatedNorm(16, 4)
    x, z = torch.randn(3, 16, 5, 5, generator=rng), torch.randn(3, 4, generator=rng)
    torch.nn.init.normal_(norm.to_scale_and_shift.weight, generator=rng)
    scale, shift = norm.to_scale_and_shift(z)[:, :, None, None].split(16, dim=1)
    torch.testing.assert_close(norm(x, z), F.group_norm(x, 8) * (1 + scale) + shift, rtol=1e-4, atol=1e-5)


def test_z_reaches_every_size_of_the_decoder(rng):
    """z changes the image through each of the decoder's norms alone, with the first Linear set to zero."""
    vae = build()[0].vae
    torch.nn.init.zeros_(vae.from_z.weight)
    norms = [module for module in vae.decoder.modules() if isinstance(module, model_definitions.ModulatedNorm)]
    assert len(norms) == 2 * len(vae.decoder) - 1
    z = torch.randn(2, 16, generator=rng)
    for kept in norms:
        for norm in norms:
            torch.nn.init.normal_(norm.to_scale_and_shift.weight, std=1.0 if norm is kept else 0.0)
            torch.nn.init.normal_(norm.norm.bias, std=0.1)           # constant features have nothing to scale
        first, second = vae.decode(z)
        assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("output_padding", [0, 1])
def test_balanced_upsampling_makes_flat_areas_from_flat_features(output_padding, rng):
    plain, balanced = (up(5, 7, 4, stride=2, padding=1, output_padding=output_padding) for up in
                       (torch.nn.ConvTranspose2d, model_definitions.BalancedConvTranspose2d))
    balanced.load_state_dict(plain.state_dict())
    flat = torch.randn(2, 5, 1, 1, generator=rng).expand(-1, -1, 8, 8)
    of_plain, of_balanced = (up(flat)[..., 1:15, 1:15] for up in (plain, balanced))
    assert of_plain.std((2, 3)).min() > 1e-3 and of_balanced.std((2, 3)).max() < 1e-6
    torch.testing.assert_close(of_plain.mean((2, 3)), of_balanced.mean((2, 3)))
    x = torch.randn(2, 5, 8, 8, generator=rng)
    model_definitions.bilinear_init(plain.weight)                     # already balanced
    balanced.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x), balanced(x))


def test_noise_maps_add_the_same_noise_to_every_image_with_the_strength_of_each_channel(rng):
    vae = build()[0].vae
    block, z = vae.decoder[-1], torch.randn(3, 16, generator=rng)
    with torch.no_grad():
        before = vae.decode(z).logit()
        block.noise_strength[1] = 0.5                                 # of the second colour
        change = vae.decode(z).logit() - before
    assert block.noise.shape == (32, 32) and abs(block.noise.std() - 1) < 0.1
    torch.testing.assert_close(change[:, 1], (0.5 * block.noise).expand(3, -1, -1), atol=1e-4, rtol=1e-3)
    assert change[:, [0, 2]].abs().max() < 1e-4


def test_the_first_trained_model_still_makes_the_same_images():
    generator = model_definitions.Generator.from_file(Path(__file__).parent / "fixtures" / "first_avatars64.pt")
    with torch.no_grad():
        image = generator(torch.linspace(-1.5, 1.5, 256).view(2, 128))
    means, pixels = image.mean((2, 3)).flatten(), image[:, :, 20::24, 31].flatten()
    torch.testing.assert_close(means, torch.tensor([0.9425, 0.7362, 0.4874, 0.4851, 0.1509, 0.1879]), atol=2e-4, rtol=0)
    torch.testing.assert_close(pixels, torch.tensor([0.8892, 0.7434, 0.4648, 0.7531, -0.4536, 0.5098, 0.9771, 0.9605,
                                                     0.5414, 0.4959, 0.1181, 0.1000]), atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------------- prior

def test_a_new_prior_returns_the_noise(rng):
    z = torch.randn(4, 128, generator=rng)
    assert torch.equal(Prior(128, 32)(z), z)
    generator = build()[0]
    assert torch.equal(generator.start(z[:, :16]), z[:, :16])


def test_the_prior_follows_the_velocity_of_a_gaussian(monkeypatch, rng):
    """The straight paths from N(0, 1) to N(m, s^2) have a velocity in closed form, which carries z to m + s * z."""
    m, s = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.5, 0.8, 1.5])

    def velocity(x, t, label):
        t = t[:, None]
        return m + (t * s ** 2 - (1 - t)) / ((1 - t) ** 2 + t ** 2 * s ** 2) * (x - t * m)

    prior, z = Prior(3, 8), torch.randn(50, 3, generator=rng)
    monkeypatch.setattr(prior, "velocity", velocity)
    torch.testing.assert_close(prior(z), m + s * z, atol=0.05, rtol=0)


def test_the_prior_learns_where_codes_are():
    """Codes near two points, of which twice as many are near the first."""
    torch.manual_seed(0)
    prior, points = Prior(2, 64), torch.tensor([[1.0, 1.0], [-1.0, 0.5]])
    optimizer = torch.optim.Adam(prior.parameters(), lr=2e-3)
    for _ in range(400):
        code = points[(torch.arange(192) % 3) // 2] + 0.1 * torch.randn(192, 2)
        optimizer.zero_grad()
        losses.flow_matching_loss(prior.velocity, code, torch.randn(192, 2), torch.rand(192)).backward()
        optimizer.step()
    with torch.no_grad():
        found = prior(torch.randn(600, 2))
    distances = torch.cdist(found, points)
    assert (distances.min(1).values < 0.4).float().mean() > 0.9
    assert abs((distances[:, 0] < distances[:, 1]).float().mean() - 2 / 3) < 0.1


def test_a_transposed_convolution_starts_as_mixed_channels_and_bilinear_upsampling(rng):
    conv = build()[0].vae.decoder[0].up
    x = torch.randn(2, conv.in_channels, 8, 8, generator=rng)
    mixture = conv.weight[:, :, 1, 1] / (9 / 16)
    expected = F.interpolate(torch.einsum("bihw,io->bohw", x, mixture), scale_factor=2, mode="bilinear")
    inside = (..., slice(1, -1), slice(1, -1))                       # the two differ at the border
    torch.testing.assert_close(conv(x)[inside], expected[inside], rtol=1e-4, atol=1e-4)
    assert 0.5 < expected.std() / x.std() < 2


# ------------------------------------------------------------------------------------- synthetic video

def test_frame_0_is_the_image_and_later_frames_are_slightly_changed_copies(rng):
    video, image = TransformerParamTanh(32).video, torch.rand(2, 3, 32, 32, generator=rng)
    for changes in (video.draw(), video.draw(rng)):
        frames = video(image, changes).unflatten(1, (16, 3))
        torch.testing.assert_close(frames[:, 0], image)
        change = (frames[:, 1:] - image[:, None]).abs().mean(dim=(0, 2, 3, 4))
        assert (change > 0).all() and change[-1] > change[0] and change.max() < 0.5


@pytest.mark.parametrize("size, patch, channels", [(32, 8, 3), (48, 16, 1), (64, 4, 3)])
def test_the_fast_embedding_equals_a_convolution_of_the_frames(size, patch, channels, rng):
    layer = TransformerParamTanh(size, channels, patch=patch, dim=24, layers=1)
    image, changes = torch.rand(2, channels, size, size, generator=rng), layer.video.draw(rng)
    fast = layer.video.embed(image, layer.to_tokens, changes)
    torch.testing.assert_close(fast, layer.to_tokens(layer.video(image, changes)), rtol=1e-4, atol=1e-4)


def test_earlier_images_replace_the_modified_copies(rng):
    layer = small_layer()
    x, earlier = torch.rand(2, 3, 32, 32, generator=rng), torch.rand(2, 9, 32, 32, generator=rng)
    frames = layer.frames(x, earlier)
    assert torch.equal(frames[:, :3], layer.displayed(x)) and torch.equal(frames[:, 3:], earlier)
    copies = layer.frames(x)[:, 3:]
    torch.testing.assert_close(layer(x, earlier=copies), layer(x), rtol=1e-4, atol=1e-5)
    assert (layer(x, earlier=earlier) - layer(x)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------- alpha

def test_the_layer_starts_as_tanh_of_alpha_init_without_a_gradient_through_alpha(rng):
    layer, x = build()[0].layer, torch.rand(2, 3, 32, 32, generator=rng, requires_grad=True)
    alpha = layer.alpha(x)
    assert torch.equal(alpha, torch.full((2, 1, 32, 32), 3.0))
    torch.testing.assert_close(layer(x), torch.tanh(3.0 * (2 * x - 1)))
    assert torch.autograd.grad(alpha.sum(), x)[0].abs().max() == 0


def test_alpha_stays_within_its_bounds_for_any_weights(rng):
    layer = small_layer()
    torch.nn.init.normal_(layer.to_s.weight, std=1000.0)
    alpha = layer.alpha(torch.rand(4, 3, 32, 32, generator=rng))
    assert 1 - 1e-4 <= alpha.min() < 1.5 and 8 < alpha.max() <= 9 + 1e-4


def test_alpha_per_channel_has_one_map_per_channel(rng):
    alpha = small_layer("--alpha-per-channel").alpha(torch.rand(2, 3, 32, 32, generator=rng))
    assert alpha.shape == (2, 3, 32, 32) and (alpha[:, 0] - alpha[:, 1]).abs().max() > 1e-3


def test_each_patch_sets_alpha_at_its_own_place():
    layer = build()[0].layer
    s = torch.zeros(1, 16, 4)                            # 4 x 4 patches of 8 pixels, 2 x 2 cells in each
    s[0, 6, 1] = 5.0                                     # patch in row 1, column 2; its upper right cell
    layer.encode, layer.to_s = lambda tokens: s, torch.nn.Identity()
    row, column = divmod(layer.alpha(torch.zeros(1, 3, 32, 32)).argmax().item(), 32)
    assert 8 <= row < 12 and 20 <= column < 24


@pytest.mark.parametrize("size, patch", [(32, 8), (128, 16)])
def test_adam_steps_in_one_direction_leave_the_tokens_apart(size, patch, rng):
    """Not centred, the tokens of different images would end 0.07 to 0.15 apart; with torch's default initialisation
    ten steps would replace the tokens."""
    torch.manual_seed(0)
    layer = TransformerParamTanh(size, patch=patch, dim=24, layers=1)
    x = torch.rand(4, 3, size // patch, size // patch, generator=rng).kron(torch.ones(patch, patch))
    signs = torch.where(torch.arange(24) % 2 == 0, 1.0, -1.0)[:, None, None, None]

    @torch.no_grad()
    def tokens_after(steps):
        layer.to_tokens.weight += steps * config.LEARNING_RATE * config.LAYER_RATE * signs
        return layer.tokens(x) - layer.positions

    before, ten, thousand = (tokens_after(steps) for steps in (0, 10, 990))
    torch.testing.assert_close(thousand.square().mean(-1), torch.ones(4, (size // patch) ** 2), rtol=1e-3, atol=1e-3)
    assert F.cosine_similarity(before, ten, dim=-1).mean() > 0.9
    assert thousand.std(0).mean() > 0.5


def test_transformer_layers_start_with_different_weights():
    first, second = (dict(layer.named_parameters()) for layer in build()[0].layer.transformer.layers)
    for name, weights in first.items():
        assert weights.dim() < 2 or not torch.equal(weights, second[name]), name


# ------------------------------------------------------------------------------------- gradients

def test_the_feedback_gradient_through_alpha_is_neither_zero_nor_cut(rng):
    """In float64 against a finite difference along the gradient."""
    layer = small_layer().double()
    x = torch.rand(1, 3, 32, 32, generator=rng, dtype=torch.float64)

    def value(seen):
        return layer.apply_alpha(x, layer.alpha(seen)).square().sum()       # depends on `seen` through alpha alone

    seen = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(value(seen), seen)
    direction = gradient / gradient.norm()
    slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert gradient.norm() > 1e-3
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [{"image_size": 100}, {"image_size": 64, "patch": 6}, {"image_size": 64, "dim": 50}])
def test_sizes_that_do_not_fit_together_are_refused(sizes):
    with pytest.raises(ValueError, match="patch must divide image_size and be a multiple of 4, dim "):
        TransformerParamTanh(**sizes)


@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (2, 1, 64, 64)])
def test_an_input_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, 64, 64\)"):
        TransformerParamTanh(64, layers=1)(torch.zeros(shape))
