"""metrics.py against scipy, torchmetrics and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial
import scipy.stats
import torch
from torchmetrics.image.kid import poly_mmd

import metrics


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=rng(seed), dtype=torch.float64)


def discs(count, side=32, seed=0):
    """Images of one coloured disc each on a plain background, in [-1, 1]: (count, 3, side, side)."""
    g = rng(seed)
    x, y, radius = (torch.rand(3, count, 1, 1, 1, generator=g) * 0.4 + 0.3) * side
    row, column = torch.arange(side).view(-1, 1), torch.arange(side)
    inside = (((row - y) ** 2 + (column - x) ** 2).sqrt() < radius / 2).float()
    background, colour = torch.rand(2, count, 3, 1, 1, generator=g) * 2 - 1
    return torch.lerp(background.expand(-1, -1, side, side), colour, inside)


def noise(count, side=32, seed=0):
    return torch.rand(count, 3, side, side, generator=rng(seed)) * 2 - 1


def distance(a, b, seed=0):
    return metrics.sliced_wasserstein(a, b, seed, patches=32, projections=64)


# ------------------------------------------------------------------------------------- features

def test_frechet_distance_equals_scipys_matrix_root():
    a, b = points(60, 8) @ points(8, 8, seed=1), points(50, 8, seed=2) @ points(8, 8, seed=3) + 1
    A, B = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_with_fewer_points_than_features_and_with_one_feature():
    a = points(10, 40)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    assert metrics.frechet_distance(a, a + 3) == pytest.approx(9 * 40, rel=1e-6)
    one = a[:, :1]
    assert metrics.frechet_distance(one, 2 * one) == pytest.approx((one.mean() ** 2 + one.var()).item())


def test_frechet_distance_refuses_features_that_are_not_finite():
    with pytest.raises(RuntimeError):
        metrics.frechet_distance(points(10, 4).log(), points(10, 4))


def test_kernel_distance_equals_torchmetrics():
    a, b = points(20, 3), points(20, 3, seed=1) + 0.5
    assert metrics.kernel_distance(a, b)[0] == pytest.approx(1000 * poly_mmd(a, b).item(), rel=1e-9)


def kernel_distances_of_draws(shift):
    pairs = [(points(60, 4, seed=2 * i), points(40, 4, seed=2 * i + 1) + shift) for i in range(300)]
    return np.array([metrics.kernel_distance(a, b) for a, b in pairs]).T


def test_kernel_distance_of_one_distribution_is_0_on_average():
    values, _ = kernel_distances_of_draws(shift=0)
    assert abs(values.mean()) < 4 * values.std() / 300 ** 0.5


def test_error_of_the_kernel_distance_is_its_spread_over_draws():
    values, errors = kernel_distances_of_draws(shift=1)
    assert values.std() == pytest.approx(errors.mean(), rel=0.15)


def test_precision_and_recall_of_one_of_two_clusters():
    real = torch.cat([points(50, 2) * 0.1, points(50, 2, seed=1) * 0.1 + 10])
    one_cluster = points(50, 2, seed=2) * 0.1
    precision, recall = metrics.precision_and_recall(real, one_cluster)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    assert metrics.precision_and_recall(one_cluster, real) == (recall, precision)
    assert metrics.precision_and_recall(real, real + 100) == (0, 0)
    assert metrics.precision_and_recall(real, real) == (1, 1)


def test_precision_uses_the_distance_to_the_kth_neighbour():
    """On a line, the first neighbours of 0, 1, 3, 7 are 1, 1, 2 and 4 away."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    generated = torch.tensor([[-1.1], [-0.9], [5.1], [11.1], [2.5]])       # out, in, in (7 reaches 3..11), out, in
    assert metrics.precision_and_recall(real, generated, neighbours=1)[0] == pytest.approx(3 / 5)


@pytest.mark.parametrize("function", [metrics.frechet_distance, metrics.kernel_distance, metrics.precision_and_recall,
                                      metrics.diversity])
def test_features_of_wrong_shapes_are_refused(function):
    for a, b in ((points(9, 3), points(9, 4)), (points(1, 3), points(9, 3)), (points(9, 3)[0], points(9, 3))):
        with pytest.raises(ValueError, match="features"):
            function(a, b)


# ------------------------------------------------------------------------------------- points

def test_diversity_is_the_ratio_of_scipys_mean_distances():
    a, b = points(30, 5), 3 * points(metrics.POINT_GROUP + 76, 5, seed=1)
    expected = scipy.spatial.distance.pdist(a).mean() / scipy.spatial.distance.pdist(b).mean()
    assert metrics.diversity(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.diversity(a[:1].expand(5, -1), a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("block", [1, 7, 50])
def test_nearest_equals_scipys_tree_for_any_block_size(block):
    a, b = points(20, 6), points(50, 6, seed=1)
    b[13] = a[4]
    found, index = metrics.nearest(a, b.split(block))
    expected, expected_index = scipy.spatial.cKDTree(b).query(a)
    assert index.tolist() == expected_index.tolist()
    assert torch.allclose(found, torch.from_numpy(expected)) and found[4] == 0


def test_nearest_leaves_out_the_point_itself_but_not_its_copy():
    b = points(20, 6)
    b[17] = b[3]
    found, index = metrics.nearest(b[[3, 5, 5]], b.split(4), torch.tensor([3, 5, -1]))
    assert (index[0], found[0]) == (17, 0) and (index[2], found[2]) == (5, 0)
    assert found[1] == pytest.approx(sorted((b - b[5]).norm(dim=1).tolist())[1])
    assert metrics.nearest(b[:1], [b[:1]], torch.tensor([0]))[0].item() == math.inf


def test_closest_pairs_come_once_in_order_and_in_units_of_the_median():
    x = torch.arange(20.0)[:, None] ** 2                     # nearest neighbours 1, 1, 3, 5, 7, ... apart
    x[19], x[18] = x[7], x[11] + 0.25
    pairs, distances = metrics.closest_pairs(x)
    assert pairs[:3].tolist() == [[7, 19], [11, 18], [0, 1]]
    median = torch.cdist(x, x).fill_diagonal_(math.inf).min(1).values.median().item()
    assert distances[:3].tolist() == pytest.approx([0, 0.25 / median, 1 / median])
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)


@pytest.mark.parametrize("n, m", [(40, 40), (40, 60), (7, 31), (1, 5)])
def test_wasserstein_distance_in_one_dimension_equals_scipys(n, m):
    """All unit vectors are 1 or -1, so that each projection, in every group, has the same distance."""
    x, y = points(n, 1), points(m, 1, seed=1) * 2 + 1
    found = metrics.sliced_wasserstein_of_points(x, y, rng(), projections=2 * metrics.PROJECTION_GROUP + 3)
    assert found == pytest.approx(scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-12)


def test_wasserstein_distance_of_a_shift_is_the_closed_form_for_uniform_directions():
    """E|<c, w>| = |c| * Gamma(D/2) / (sqrt(pi) * Gamma((D+1)/2)) for w uniform on the unit sphere."""
    x, c = points(2, 147), points(1, 147, seed=1)
    expected = c.norm().item() * math.exp(math.lgamma(147 / 2) - math.lgamma(148 / 2)) / math.sqrt(math.pi)
    assert metrics.sliced_wasserstein_of_points(x, x + c, rng(), 20_000) == pytest.approx(expected, rel=0.03)


# ------------------------------------------------------------------------------------- images

def test_absolute_error_is_in_levels_and_per_image():
    dark = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    other = torch.stack([dark[0] + 40, dark[0] - 7])
    assert metrics.absolute_error(dark, other).tolist() == [40, 7]


@pytest.mark.parametrize("height, width, expected", [(131, 131, [131, 66, 33, 17]), (31, 31, [31, 16]), (30, 30, [30]),
                                                     (64, 98, [64, 32, 16])])
def test_pyramid_levels_halve_down_to_16_pixels(height, width, expected):
    levels = metrics.laplacian_pyramid(torch.zeros(1, 1, height, width))
    assert [min(level.shape[2:]) for level in levels] == expected


@pytest.mark.parametrize("side", [64, 67])
def test_pyramid_equals_scipys_convolutions(side):
    image = torch.randn(1, 2, side, side, generator=rng(), dtype=torch.float64)
    row = np.array([1, 4, 6, 4, 1]) / 16

    def blur(picture):
        return scipy.ndimage.convolve(picture, np.outer(row, row)[None, None], mode="mirror")
    small = blur(image.numpy())[..., ::2, ::2]
    spread = np.zeros_like(image.numpy())
    spread[..., ::2, ::2] = small
    finest, *_, coarsest = metrics.laplacian_pyramid(image)
    assert np.allclose(finest, image.numpy() - 4 * blur(spread))
    assert np.allclose(coarsest, blur(small)[..., ::2, ::2])


def test_sliced_wasserstein_of_a_set_and_itself_is_0_and_its_mean_is_over_levels():
    assert distance(discs(40), discs(40)) == ({32: 0.0, 16: 0.0}, 0)
    levels, mean = distance(discs(20, 64), noise(20, 64))
    assert list(levels) == [64, 32, 16] and mean == pytest.approx(np.mean(list(levels.values())))


def test_sliced_wasserstein_is_symmetric_for_sets_of_different_sizes():
    there, back = distance(discs(30), noise(45)), distance(noise(45), discs(30))
    assert there[1] == pytest.approx(back[1], rel=1e-5) and there[1] > 0


def test_sliced_wasserstein_of_white_noise_and_grey_is_the_mean_of_a_half_normal():
    """The one level of a 16 x 16 image is the image: white noise, projected on a unit vector, is nearly normal with
    E|n| = sqrt(2 / pi), and grey is 0; times 1000."""
    white = torch.randn(200, 1, 16, 16, generator=rng())
    levels, _ = distance(white, torch.full_like(white, 0.3))
    assert levels[16] == pytest.approx(1000 * math.sqrt(2 / math.pi), rel=0.02)


def test_sliced_wasserstein_does_not_amplify_rounding_of_plain_images():
    black = torch.zeros(30, 3, 32, 32)
    rounded = black + 0.3 + 1e-6 * noise(30)
    assert distance(discs(30), rounded)[1] == pytest.approx(distance(discs(30), black)[1], rel=0.05)


def test_sliced_wasserstein_sees_a_fine_pattern_at_the_finest_level_only():
    """The blur removes a chessboard of single pixels: 1 - 4 + 6 - 4 + 1 = 0."""
    images = discs(30, 64)
    board = torch.arange(64).view(-1, 1).add(torch.arange(64)).remainder(2) - 0.5
    levels, _ = distance(images + 0.2 * board, images)
    assert levels[64] > 50 and levels[32] < 0.1 and levels[16] < 0.1


def test_sliced_wasserstein_ignores_brightness_and_contrast_that_all_images_share():
    images = discs(40)
    factor, offset = torch.tensor([0.5, 0.2, 0.9]).view(3, 1, 1), torch.tensor([-0.4, 0.1, 0.0]).view(3, 1, 1)
    assert distance(images * factor + offset, images)[1] < 0.01
    assert distance(images.roll(1, dims=1), images)[1] > 1       # exchanged channels change each image


def test_sliced_wasserstein_takes_uint8_and_float_images():
    levels = ((discs(30) + 1) * 127.5).round().to(torch.uint8)
    assert distance(levels, noise(30)) == distance(levels.float() / 127.5 - 1, noise(30))


def test_sliced_wasserstein_counts_images_beyond_the_first_group():
    images = discs(metrics.IMAGE_GROUP + 40, 16)
    assert distance(images, torch.cat([images[:-40], noise(40, 16)]))[1] > 20


@pytest.mark.parametrize("row, column", [(0, 0), (0, 15), (15, 0), (15, 15)])
def test_sliced_wasserstein_cuts_patches_in_every_corner(row, column):
    """A dot in any corner changes the distance; the one level of a 16 x 16 image is not blurred."""
    images = discs(20, 16) * 0.1
    dotted = images.clone()
    dotted[:, :, row, column] = 1
    assert distance(images, dotted)[1] > 10


def test_sliced_wasserstein_depends_on_its_seed_and_leaves_the_global_generators_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = discs(20), discs(20, seed=1)
    assert distance(a, b, 5) == distance(a, b, 5) != distance(a, b, 6)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("a, b, message", [
    (noise(4), noise(4, 48), "images must be"), (noise(4), noise(4)[:, :1], "images must be"),
    (noise(4)[0], noise(4)[0], "images must be"), (noise(0), noise(4), "at least 1"),
    (noise(4, 15), noise(4, 15), "16 x 16 pixels or more")])
def test_sliced_wasserstein_refuses_sets_of_wrong_shapes(a, b, message):
    with pytest.raises(ValueError, match=message):
        metrics.sliced_wasserstein(a, b)


# ------------------------------------------------------------------------------------- critic scores

def test_overfitting_is_0_for_a_critic_that_generalises_and_1_for_one_that_memorises():
    train, fake = torch.tensor([3.0, 5.0]), torch.tensor([-1.0, 0.0, 1.0])
    assert [metrics.overfitting(train, torch.tensor(held_out), fake)
            for held_out in ([4.0], [0.0, 0.0], [1.0, 3.0])] == [0, 1, 0.5]


# ------------------------------------------------------------------------------------- dots

@pytest.mark.parametrize("period", [2, 4])
def test_excess_power_is_1_for_noise_and_grows_with_the_power_of_dots(period):
    """White noise of variance 1 and dots: a wave of amplitude a adds a^2 / 2 (period 4) or a^2 (period 2) to the mean
    square, and the Hann window concentrates it in one frequency with 2/3 of the side (4/3 for real waves) as gain."""
    images = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    wave = torch.cos(2 * torch.pi * torch.arange(32) / period)
    lines = images + 0.5 * (wave + wave[:, None])                          # along rows and columns
    assert metrics.excess_power(images, period) == pytest.approx(1, abs=0.05)
    power = 0.25 * (1 if period == 2 else 0.25)                            # |amplitude of exp(i w x)|^2
    assert metrics.excess_power(lines, period) == pytest.approx(1 + power * 32 * 2 / 3, rel=0.05)


def test_excess_power_refuses_images_that_are_not_square():
    with pytest.raises(ValueError, match=r"must be .* square"):
        metrics.excess_power(torch.zeros(2, 3, 32, 48), 2)
