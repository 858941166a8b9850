import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial
import scipy.stats
import torch

import metrics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=generator(seed), dtype=torch.float64)


def discs(count, side=32, seed=0):
    """Pictures of one coloured disc each on a plain ground, in [-1, 1]: (count, 3, side, side)."""
    g = generator(seed)
    x, y, radius = (torch.rand(3, count, 1, 1, 1, generator=g) * 0.4 + 0.3) * side
    row, column = torch.arange(side).view(-1, 1), torch.arange(side)
    inside = (((row - y) ** 2 + (column - x) ** 2).sqrt() < radius / 2).float()
    ground, colour = torch.rand(2, count, 3, 1, 1, generator=g) * 2 - 1
    return torch.lerp(ground.expand(-1, -1, side, side), colour, inside)


def noise(count, side=32, seed=0):
    return torch.rand(count, 3, side, side, generator=generator(seed)) * 2 - 1


def distance(a, b, seed=0, **settings):
    return metrics.sliced_wasserstein(a, b, seed, **{"patches": 32, "projections": 64, **settings})

# ------------------------------------------------------------------------------------- points

def test_shift_by_c_is_the_mean_of_its_projections():
    x, c = points(50, 5), points(1, 5, seed=1)
    directions = metrics.random_directions(16, 5, generator(3))
    expected = (directions @ c[0]).abs().mean().item()
    assert metrics.sliced_wasserstein_of_points(x, x + c, 3, 16) == pytest.approx(expected)


def test_shift_by_c_is_the_spheres_closed_form():
    """E|<c, w>| = |c| * Gamma(D/2) / (sqrt(pi) * Gamma((D+1)/2)) for w uniform on the unit sphere."""
    x, c = points(2, 147), points(1, 147, seed=1)
    expected = c.norm().item() * math.exp(math.lgamma(147 / 2) - math.lgamma(148 / 2)) / math.sqrt(math.pi)
    assert metrics.sliced_wasserstein_of_points(x, x + c, 0, 20_000) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n, m", [(40, 40), (40, 60), (7, 31), (1, 5)])
def test_one_dimension_is_scipys_wasserstein_distance(n, m):
    x, y = points(n, 1), points(m, 1, seed=1) * 2 + 1
    expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert metrics.sliced_wasserstein_of_points(x, y, 0, 4) == pytest.approx(expected, rel=1e-12)


def test_more_projections_than_one_group_are_all_counted():
    x, y = points(30, 4), points(30, 4, seed=1) + 0.5
    directions = metrics.random_directions(150, 4, generator(2)).numpy()
    each = [scipy.stats.wasserstein_distance(x.numpy() @ w, y.numpy() @ w) for w in directions]
    assert metrics.sliced_wasserstein_of_points(x, y, 2, 150) == pytest.approx(np.mean(each), rel=1e-12)


def test_order_of_the_points_does_not_matter():
    x, y = points(60, 6), points(60, 6, seed=1)
    shuffled = x[torch.randperm(60, generator=generator(2))]
    assert metrics.sliced_wasserstein_of_points(shuffled, x) == 0
    assert metrics.sliced_wasserstein_of_points(shuffled, y) == metrics.sliced_wasserstein_of_points(x, y)


def test_doubled_points_are_the_same_distribution():
    x, y = points(30, 3), points(20, 3, seed=1)
    assert metrics.sliced_wasserstein_of_points(torch.cat([x, x]), x) == pytest.approx(0, abs=1e-12)
    assert metrics.sliced_wasserstein_of_points(torch.cat([x, x]), y) == pytest.approx(
        metrics.sliced_wasserstein_of_points(x, y), rel=1e-12)


def test_distance_scales_with_the_points_and_is_symmetric():
    x, y = points(30, 3), points(20, 3, seed=1)
    once = metrics.sliced_wasserstein_of_points(x, y)
    assert metrics.sliced_wasserstein_of_points(3 * x, 3 * y) == pytest.approx(3 * once, rel=1e-12)
    assert metrics.sliced_wasserstein_of_points(y, x) == pytest.approx(once, rel=1e-12)


def test_directions_are_unit_vectors_without_a_preferred_side():
    directions = metrics.random_directions(20_000, 8, generator())
    assert torch.allclose(directions.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    covariance = directions.T @ directions / 20_000
    assert (covariance - torch.eye(8) / 8).abs().max() < 0.005 and directions.mean(0).abs().max() < 0.02

# ------------------------------------------------------------------------------------- pyramid

@pytest.mark.parametrize("side, sides", [
    (32, [32, 16]), (48, [48, 24]), (80, [80, 40, 20]), (112, [112, 56, 28]), (128, [128, 64, 32, 16]),
    (176, [176, 88, 44, 22]), (240, [240, 120, 60, 30]), (131, [131, 66, 33, 17]), (31, [31, 16]),
    (30, [30])])
def test_levels_halve_down_to_16_pixels(side, sides):
    assert metrics.pyramid_sides(side, side) == [(s, s) for s in sides]


@pytest.mark.parametrize("height, width", [(32, 32), (48, 48), (80, 80), (112, 112), (176, 176), (240, 240),
                                           (131, 131), (67, 98)])
def test_collapsed_pyramid_is_the_picture(height, width):
    image = torch.randn(2, 3, height, width, generator=generator(), dtype=torch.float64)
    levels = metrics.laplacian_pyramid(image)
    assert [tuple(level.shape[2:]) for level in levels] == metrics.pyramid_sides(height, width)
    assert torch.allclose(metrics.collapse(levels), image, atol=1e-12)


@pytest.mark.parametrize("side", [64, 67])
def test_pyramid_blurs_as_scipys_convolution_does(side):
    image = torch.randn(1, 2, side, side, generator=generator(), dtype=torch.float64)
    row = np.array([1, 4, 6, 4, 1]) / 16

    def blur(picture):
        return scipy.ndimage.convolve(picture, np.outer(row, row)[None, None], mode="mirror")
    small = blur(image.numpy())[..., ::2, ::2]
    spread = np.zeros_like(image.numpy())
    spread[..., ::2, ::2] = small
    finest, *_, coarsest = metrics.laplacian_pyramid(image)
    assert np.allclose(finest, image.numpy() - 4 * blur(spread))
    assert np.allclose(coarsest, blur(small)[..., ::2, ::2])


@pytest.mark.parametrize("side", [48, 67])
def test_plain_picture_leaves_nothing_but_the_coarsest_level(side):
    *fine, coarsest = metrics.laplacian_pyramid(torch.full((1, 3, side, side), 0.7, dtype=torch.float64))
    assert all(level.abs().max() < 1e-12 for level in fine)
    assert torch.allclose(coarsest, coarsest.new_tensor(0.7))


def test_pyramid_of_a_fine_pattern_is_in_the_finest_level_and_of_a_slow_wave_in_the_coarsest():
    column = torch.arange(64.0)
    fine, slow = torch.cos(math.pi * column), torch.cos(2 * math.pi * column / 64)
    energy = [[level.square().mean().item() for level in metrics.laplacian_pyramid(wave.expand(1, 1, 64, 64))]
              for wave in (fine, slow)]
    assert energy[0][0] > 100 * max(energy[0][1:]) and energy[1][2] > 100 * max(energy[1][:2])

# ------------------------------------------------------------------------------------- image sets

def test_images_against_themselves_are_0():
    levels, mean = distance(discs(40), discs(40))
    assert levels == {32: 0.0, 16: 0.0} and mean == 0


def test_mean_is_that_of_the_levels():
    levels, mean = distance(discs(20, 64), noise(20, 64))
    assert list(levels) == [64, 32, 16] and mean == pytest.approx(np.mean(list(levels.values())))


def test_noise_is_much_farther_than_other_images_of_the_same_kind():
    near, far = distance(discs(150), discs(150, seed=1)), distance(discs(150), noise(150))
    assert all(far[0][level] > 3 * near[0][level] for level in (32, 16)) and far[1] > 5 * near[1]


def test_more_noise_is_farther():
    clean = discs(100)
    means = [distance(discs(100, seed=1) + s * noise(100), clean)[1] for s in (0.0, 0.1, 0.3, 1.0)]
    assert means == sorted(means) and means[3] > 4 * means[0]


@pytest.mark.parametrize("m", [30, 45])
def test_swapped_sets_are_as_far_apart(m):
    there, back = distance(discs(30), noise(m)), distance(noise(m), discs(30))
    assert there[1] == pytest.approx(back[1], rel=1e-5) and there[1] > 0


def test_reordered_images_of_a_large_set_are_near():
    images = discs(150)
    assert distance(images.flip(0), images)[1] < 0.3 * distance(noise(150), images)[1]


def test_white_noise_against_plain_grey_is_the_mean_of_a_half_normal():
    """The one level of a 16 x 16 picture is the picture: white noise, projected on a unit vector, is nearly
    normal with E|n| = sqrt(2 / pi), and grey is 0; times 1000."""
    white = torch.randn(200, 1, 16, 16, generator=generator())
    levels, _ = distance(white, torch.full_like(white, 0.3))
    assert levels[16] == pytest.approx(1000 * math.sqrt(2 / math.pi), rel=0.02)


def test_plain_images_are_as_far_away_as_black_ones_rounding_or_not():
    black = torch.zeros(30, 3, 32, 32)
    rounded = black + 0.3 + 1e-6 * noise(30)
    assert distance(discs(30), rounded)[1] == pytest.approx(distance(discs(30), black)[1], rel=0.05)


def test_fine_pattern_is_seen_at_the_finest_level_alone():
    """The blur takes a chessboard of single pixels away whole: 1 - 4 + 6 - 4 + 1 = 0."""
    images = discs(30, 64)
    board = torch.arange(64).view(-1, 1).add(torch.arange(64)).remainder(2) - 0.5
    levels, _ = distance(images + 0.2 * board, images)
    assert levels[64] > 50 and levels[32] < 0.1 and levels[16] < 0.1


def test_brightness_and_contrast_that_all_images_share_are_not_seen():
    images = discs(40)
    factor, offset = torch.tensor([0.5, 0.2, 0.9]).view(3, 1, 1), torch.tensor([-0.4, 0.1, 0.0]).view(3, 1, 1)
    assert distance(images * factor + offset, images)[1] < 0.01
    assert distance(images.roll(1, dims=1), images)[1] > 1       # what each image has of its own is


def test_uint8_and_float_images_are_the_same():
    bytes_ = ((discs(30) + 1) * 127.5).round().to(torch.uint8)
    floats = bytes_.float() / 127.5 - 1
    assert distance(bytes_, noise(30)) == distance(floats, noise(30))
    assert distance(bytes_, floats)[1] < 1e-3


def test_images_beyond_one_group_are_all_counted():
    count = metrics.IMAGE_GROUP + 40
    images = discs(count, 16)
    changed = images.clone()
    changed[metrics.IMAGE_GROUP:] = noise(40, 16)
    assert distance(images, changed)[1] > 20


def test_seed_settles_the_result_and_the_global_generator_is_left_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = discs(20), discs(20, seed=1)
    assert distance(a, b, 5) == distance(a, b, 5) == distance(a, b, generator(5)) != distance(a, b, 6)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


def test_patches_lie_anywhere_in_the_picture():
    """A dot in any corner is found; at 16 x 16 pixels the one level is the picture: no blur spreads it."""
    for row, column in ((0, 0), (0, 15), (15, 0), (15, 15)):
        images = discs(20, 16) * 0.1
        dotted = images.clone()
        dotted[:, :, row, column] = 1
        assert distance(images, dotted)[1] > 10


def test_images_that_carry_a_gradient_are_taken():
    assert distance(discs(5).requires_grad_(), noise(5))[1] > 0


@pytest.mark.parametrize("a, b, message", [
    (noise(4), noise(4, 48), "image sets are"),
    (noise(4), noise(4)[:, :1], "image sets are"),
    (noise(4)[0], noise(4)[0], "image sets are"),
    (noise(0), noise(4), "at least 1"),
    (noise(4).long(), noise(4), "uint8 in 0..255 or float"),
    (noise(4, 15), noise(4, 15), "15 x 15 pixels: .* 16 or more")])
def test_sets_that_cannot_be_compared_are_refused_in_one_line(a, b, message):
    with pytest.raises(ValueError, match=message) as error:
        metrics.sliced_wasserstein(a, b)
    assert "\n" not in str(error.value)

# ------------------------------------------------------------------------------------- features

def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """Points on the axes, so that mean and covariance are exact: m and diag(s^2)."""
    def cross(mean, deviation):
        d = len(mean)
        arms = torch.diag(deviation) * ((2 * d - 1) / 2) ** 0.5                  # so that cov, over N - 1, is diag(s^2)
        return torch.cat([mean + arms, mean - arms])

    m, n = points(1, 6)[0], points(1, 6, seed=1)[0]
    s, t = points(1, 6, seed=2)[0].abs(), points(1, 6, seed=3)[0].abs()
    expected = (m - n).square().sum() + (s - t).square().sum()
    assert metrics.frechet_distance(cross(m, s), cross(n, t)) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_is_scipys_matrix_root_for_full_covariances():
    a, b = points(60, 8) @ points(8, 8, seed=1), points(50, 8, seed=2) @ points(8, 8, seed=3) + 1
    A, B = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(A @ B).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(A + B - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_with_fewer_points_than_features_and_from_itself():
    a = points(10, 40)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    assert metrics.frechet_distance(a, a + 3) == pytest.approx(9 * 40, rel=1e-6)


def test_frechet_distance_names_features_that_are_not_finite():
    a = points(10, 4)
    b = a.clone()
    b[0, 0] = float("nan")
    with pytest.raises((ValueError, RuntimeError)):
        metrics.frechet_distance(b, a)


def kid_by_loops(a, b):
    """The unbiased estimator, written out pair by pair."""
    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    return 1000 * (within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def test_kernel_distance_is_the_estimator_written_pair_by_pair():
    a, b = points(7, 3), points(5, 3, seed=1) + 0.5
    value, error = metrics.kernel_distance(a, b)
    assert value == pytest.approx(kid_by_loops(a.numpy(), b.numpy()), rel=1e-9)
    parts = [[kid_by_loops(np.delete(x.numpy(), i, 0), y.numpy()) for i in range(len(x))] for x, y in ((a, b), (b, a))]
    jackknife = sum((len(p) - 1) * np.var(p) for p in parts)
    assert error == pytest.approx(jackknife ** 0.5, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread_over_draws():
    found = [metrics.kernel_distance(points(60, 4, seed=2 * i), points(60, 4, seed=2 * i + 1)) for i in range(200)]
    values, errors = np.array(found).T
    assert abs(values.mean()) < 4 * values.std() / 200 ** 0.5
    assert values.std() == pytest.approx(errors.mean(), rel=0.35)


def test_precision_and_recall_where_they_are_plain():
    real = torch.cat([points(50, 2) * 0.1, points(50, 2, seed=1) * 0.1 + 10])
    half = points(50, 2, seed=2) * 0.1                              # one of the two real clusters
    precision, recall = metrics.precision_and_recall(real, half)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    assert metrics.precision_and_recall(half, real) == (recall, precision)
    assert metrics.precision_and_recall(real, real + 100) == (0, 0)
    assert metrics.precision_and_recall(real, real) == (1, 1)


def test_precision_by_hand_counts_the_kth_neighbour():
    """On a line, real at 0, 1, 3, 7: with k = 1 their reaches are 1, 1, 2 and 4."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    generated = torch.tensor([[-1.1], [-0.9], [5.1], [11.1], [2.5]])       # out, in, in (7 reaches 3..11), out, in
    assert metrics.precision_and_recall(real, generated, neighbours=1)[0] == pytest.approx(3 / 5)


@pytest.mark.parametrize("function", [metrics.frechet_distance, metrics.kernel_distance, metrics.precision_and_recall])
def test_features_that_do_not_fit_are_refused(function):
    for a, b in ((points(9, 3), points(9, 4)), (points(1, 3), points(9, 3)), (points(9, 3)[0], points(9, 3))):
        with pytest.raises(ValueError, match="features"):
            function(a, b)

# ------------------------------------------------------------------------------------- points

def test_diversity_is_the_ratio_of_scipys_mean_distances():
    a, b = points(30, 5), 3 * points(1100, 5, seed=1)                 # more than one group
    expected = scipy.spatial.distance.pdist(a).mean() / scipy.spatial.distance.pdist(b).mean()
    assert metrics.diversity(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.diversity(a[:1].expand(5, -1), a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("block", [1, 7, 50])
def test_nearest_is_scipys_in_whatever_blocks_the_others_come(block):
    a, b = points(20, 6), points(50, 6, seed=1)
    b[13] = a[4]
    distance, index = metrics.nearest(a, b.split(block))
    expected_distance, expected_index = scipy.spatial.cKDTree(b).query(a)
    assert index.tolist() == expected_index.tolist()
    assert torch.allclose(distance, torch.from_numpy(expected_distance)) and distance[4] == 0


def test_a_point_is_not_its_own_neighbour_but_its_copy_is():
    b = points(20, 6)
    b[17] = b[3]
    own = torch.tensor([3, 5, -1])
    distance, index = metrics.nearest(b[[3, 5, 5]], b.split(6), own)
    assert (index[0], distance[0]) == (17, 0) and (index[2], distance[2]) == (5, 0)
    assert distance[1] == pytest.approx(sorted((b - b[5]).norm(dim=1).tolist())[1])
    assert metrics.nearest(b[:1], [b[:1]], torch.tensor([0]))[0].item() == math.inf


def test_closest_pairs_are_the_planted_ones_once_each_and_in_units_of_the_median():
    x = torch.arange(20.0)[:, None] ** 2                     # nearest neighbours 1, 1, 3, 5, 7, ... apart
    x[19], x[18] = x[7], x[11] + 0.25
    pairs, distances = metrics.closest_pairs(x)
    assert pairs[:3].tolist() == [[7, 19], [11, 18], [0, 1]]
    each = torch.cdist(x, x).fill_diagonal_(math.inf).min(1).values
    assert distances[:3].tolist() == pytest.approx([0, 0.25 / each.median().item(), 1 / each.median().item()])
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)

# ------------------------------------------------------------------------------------- image by image

def levels(count, channels, height, width, seed=0):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator(seed))


@pytest.mark.parametrize("channels, height, width", [(3, 32, 48), (1, 11, 11), (3, 64, 64)])
def test_ssim_and_psnr_are_torchmetrics(channels, height, width):
    from torchmetrics.functional import image as torchmetrics

    a = (127.5 * (discs(6, 64)[:, :channels, :height, :width] + 1)).byte()
    b = (a.float() + torch.arange(6).view(-1, 1, 1, 1) * 8 * noise(6, 64)[:, :channels, :height, :width])
    b = b.clamp(0, 255).byte()
    a[0] = levels(1, channels, height, width)[0]             # nothing in common with b[0]
    _, places = torchmetrics.structural_similarity_index_measure(a.double(), b.double(), data_range=255.0,
                                                                 reduction="none", return_full_image=True)
    expected = places[..., 5:-5, 5:-5].mean((1, 2, 3))       # of its places, those whose window needs no padding
    assert torch.allclose(metrics.ssim(a, b), expected.float(), atol=1e-4)
    expected = torchmetrics.peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0, reduction="none",
                                                    dim=(1, 2, 3))
    assert torch.allclose(metrics.psnr(a, b), expected.float())


def test_errors_of_plain_pictures_are_closed_forms():
    dark, light = (torch.full((1, 3, 16, 16), level, dtype=torch.uint8) for level in (100, 140))
    assert metrics.absolute_error(dark, light).item() == 40
    assert metrics.psnr(dark, light).item() == pytest.approx(20 * math.log10(255 / 40))
    luminance = (2 * 100 * 140 + 2.55 ** 2) / (100 ** 2 + 140 ** 2 + 2.55 ** 2)
    assert metrics.ssim(dark, light).item() == pytest.approx(luminance, abs=1e-4)
    assert metrics.psnr(dark, dark).item() == math.inf and metrics.ssim(dark, dark).item() == pytest.approx(1)


def test_ssim_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(levels(1, 3, 10, 16), levels(1, 3, 10, 16))
