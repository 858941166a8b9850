"""Metrics: how far a set of generated images is from a set of real ones. Pure functions of tensors.

Frechet distance, kernel distance, precision and recall compare features (N, D), which a pretrained network makes
of the images (evaluate.py chooses it); diversity and nearest neighbours take any points (N, D).

The sliced Wasserstein distance on Laplacian pyramids (Karras et al. 2018, "Progressive Growing of GANs",
section 5) needs no pretrained network: it compares small patches, one scale at a time. It sees texture, edges
and combinations of colours within 7 x 7 pixels of each scale, not objects, and it is no Frechet distance.
"""

import numpy as np
import torch
import torch.nn.functional as F

NEIGHBOURHOOD = 7          # side of a patch, pixels (section 5)
SMALLEST_LEVEL = 16        # side of the coarsest level, pixels: halving stops before a smaller one
PROJECTION_GROUP = 64      # directions projected and sorted at a time, which bounds memory
IMAGE_GROUP = 128          # images whose pyramid is built at a time, for the same reason
POINT_GROUP = 1024         # points whose distances from all others are in memory at a time
SSIM_WINDOW = 11           # side of structural similarity's window, pixels ...
SSIM_DEVIATION = 1.5       # ... and the deviation of its weights

# ------------------------------------------------------------------------------------- features

def frechet_distance(a, b):
    """||mean(a) - mean(b)||^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Heusel et al. 2017, equation 6).

    a (N, D), b (M, D): features, N and M at least 2. In float64. Finite sets of one distribution are some way apart,
    the farther the smaller they are: compare only numbers made with the same N and M, above D each. Called FID only
    with the 2048 features of Inception-v3. Returns a float.
    """
    _check_features(a, b, least=2)
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex numbers, no failed root.
    root = _symmetric_root(covariance_a)
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0)
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace()
    return (distance - 2 * eigenvalues.sqrt().sum()).item()


def _symmetric_root(matrix):
    """The root of a symmetric positive semidefinite matrix, by its eigenvalues; negative ones, of rounding, are 0.

    Raises ValueError if the square of the root is not the matrix.
    """
    values, vectors = torch.linalg.eigh(matrix)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    if not torch.allclose(root @ root, matrix, rtol=1e-6, atol=1e-9 * values.abs().max().item() + 1e-300):
        raise ValueError("the covariance of the features has no square root: are there infinite or NaN features?")
    return root


def kernel_distance(a, b):
    """(KID, standard error): squared maximum mean discrepancy with the kernel (<x, y> / D + 1)^3, unbiased
    (Binkowski et al. 2018, "Demystifying MMD GANs", section 4), times 1000.

    a (N, D), b (M, D): features, N and M at least 3. Over all pairs, where the paper draws subsets; its expectation
    does not depend on N and M, and it can be below 0. The error is that of the jackknife: each feature in turn is
    left out, on both sides. Returns two floats.
    """
    _check_features(a, b, least=3)
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):                          # for each i the sum over j other than i
        rows = kernel(x, x)
        return rows.sum(1) - rows.diagonal()

    def estimate(sum_a, n, sum_b, m, sum_ab):
        return sum_a / (n * (n - 1)) + sum_b / (m * (m - 1)) - 2 * sum_ab / (n * m)

    n, m, rows_a, rows_b, across = len(a), len(b), within(a), within(b), kernel(a, b)
    sum_a, sum_b, sum_ab = rows_a.sum(), rows_b.sum(), across.sum()
    without_a = estimate(sum_a - 2 * rows_a, n - 1, sum_b, m, sum_ab - across.sum(1))
    without_b = estimate(sum_a, n, sum_b - 2 * rows_b, m - 1, sum_ab - across.sum(0))
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_a, without_b))
    return 1000 * estimate(sum_a, n, sum_b, m, sum_ab).item(), 1000 * variance.sqrt().item()


def precision_and_recall(real, generated, neighbours=3):
    """Precision, the share of generated features that lie among the real ones, and recall, the reverse, each in [0, 1]
    (Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models").

    real (N, D), generated (M, D). A point lies among a set if, for some point of that set, it is no farther from it
    than that point's `neighbours`-th nearest neighbour within the set. Both depend on N and M. Returns two floats.
    """
    _check_features(real, generated, least=neighbours + 1)

    def among(points, others):
        reach = _distances(others, others).kthvalue(neighbours + 1, dim=1).values      # a point is its own nearest
        return (_distances(points, others) <= reach).any(1).double().mean().item()

    return among(generated, real), among(real, generated)


def _distances(x, y):
    """Euclidean distances (N, M); differences are squared one by one, so that a point is at 0 from itself."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(a, b, least):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}: two sets of features are (N, D) and (M, D) with N "
                         f"and M at least {least}")


# ------------------------------------------------------------------------------------- points

def diversity(generated, real):
    """Mean distance between two generated points as a share of that between two real ones: 0 where all are one, 1
    where they differ as real ones do. generated (N, D), real (M, D), N and M at least 2. In float64; a float.
    """
    _check_features(generated, real, least=2)

    def mean_distance(points):
        points, n = points.double(), len(points)
        rows = (torch.cdist(part, points).sum().item() for part in points.split(POINT_GROUP))
        return sum(rows) / (n * (n - 1))                    # a point's distance from itself is 0 and not counted

    return mean_distance(generated) / max(mean_distance(real), 1e-12)


def nearest(points, blocks, own=None):
    """Of each point the nearest one among many others: (Euclidean distances (N,) in float64, indices (N,)).

    points (N, D). blocks: an iterable of (M_i, D), the others part by part, so that they need not be in memory
    together; indices count through the parts. own (N,): which of the others a point is itself, or -1 where it is
    none of them; it is no neighbour of its own. Where there is no other, the distance is infinite.
    """
    points, first = points.double(), 0
    distance, index = points.new_full((len(points),), torch.inf), torch.zeros(len(points), dtype=torch.long)
    for block in blocks:
        block = block.double()
        squared = points.square().sum(1, keepdim=True) - 2 * points @ block.T + block.square().sum(1)
        if own is not None:
            here = ((own >= first) & (own < first + len(block))).nonzero()[:, 0]
            squared[here, own[here] - first] = torch.inf
        least, at = squared.min(1)
        # The product above rounds a distance of 0 to something near it: differences, for the one pair that counts.
        found = torch.where(least < torch.inf, (points - block[at]).norm(dim=1), torch.inf)
        nearer = found < distance
        distance, index = torch.where(nearer, found, distance), torch.where(nearer, first + at, index)
        first += len(block)
    return distance, index


def closest_pairs(points):
    """Each point with its nearest neighbour, each pair once, the closest first: (pairs (P, 2), distances (P,)).

    points (N, D), N at least 2. Distances are given as a share of the median distance of a point to its nearest
    neighbour: 1 is usual, 0 are equal points.
    """
    distance, index = nearest(points, points.split(POINT_GROUP), own=torch.arange(len(points)))
    pairs = torch.stack([torch.arange(len(points)), index], dim=1).sort(dim=1).values
    order = distance.argsort(stable=True)
    seen, kept = set(), []
    for i, pair in zip(order.tolist(), map(tuple, pairs[order].tolist())):
        if pair not in seen:
            seen.add(pair)
            kept.append(i)
    return pairs[kept], distance[kept] / distance.median().clamp_min(1e-12)

# ------------------------------------------------------------------------------------- image by image

def absolute_error(a, b):
    """Mean absolute difference of each image of a from the same one of b: (N,), in levels.

    a, b (N, C, H, W): uint8, or float in 0..255; so in the two functions below.
    """
    return (a.float() - b.float()).abs().mean((1, 2, 3))


def psnr(a, b):
    """Peak signal-to-noise ratio of each image, 10 log10(255^2 / mean squared difference): (N,), in dB; infinite
    where two images are equal."""
    return 10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean((1, 2, 3)))


def ssim(a, b):
    """Structural similarity of each image (Wang et al. 2004, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", equation 13): (N,), 1 where two are equal, about 0 where they have nothing in common.

    Mean over channels and over all places where the Gaussian window of 11 x 11, deviation 1.5, lies within the
    picture, with K1 = 0.01 and K2 = 0.03. Raises ValueError below 11 x 11 pixels.
    """
    if a.shape != b.shape or min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}: structural similarity takes two sets of one shape "
                         f"(N, C, H, W), {SSIM_WINDOW} x {SSIM_WINDOW} pixels or more")
    channels = a.shape[1]
    # float64, since a variance is the small difference of two large means; (N * C, 1, H, W)
    a, b = (images.double().flatten(0, 1)[:, None] for images in (a, b))
    place = torch.arange(SSIM_WINDOW, device=a.device, dtype=a.dtype) - SSIM_WINDOW // 2
    window = torch.softmax(-place ** 2 / (2 * SSIM_DEVIATION ** 2), dim=0).view(1, 1, 1, -1)

    def mean(x):
        return F.conv2d(F.conv2d(x, window), window.mT)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a ** 2, mean(b * b) - mean_b ** 2
    covariance, c1, c2 = mean(a * b) - mean_a * mean_b, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / (
        (mean_a ** 2 + mean_b ** 2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean((1, 2, 3)).view(-1, channels).mean(1).float()

# ------------------------------------------------------------------------------------- Laplacian pyramid

def pyramid_sides(height, width):
    """The (height, width) of each level, finest first: halved, rounded up, while both stay at 16 or more.

    Raises ValueError for images below 16 x 16.
    """
    if min(height, width) < SMALLEST_LEVEL:
        raise ValueError(f"{height} x {width} pixels: the sliced Wasserstein distance needs {SMALLEST_LEVEL} "
                         "or more on each side")
    sides = [(height, width)]
    while min(half := tuple((side + 1) // 2 for side in sides[-1])) >= SMALLEST_LEVEL:
        sides.append(half)
    return sides


def laplacian_pyramid(images):
    """(N, C, H, W) -> list of (N, C, h, w), finest first (Burt and Adelson 1983).

    Each level but the last is what the next halving loses; the last is the small picture left over.
    `collapse` gives the images back.
    """
    levels, picture = [], images
    for _ in pyramid_sides(*images.shape[2:])[1:]:
        smaller = _blur(picture)[..., ::2, ::2]
        levels.append(picture - _double(smaller, picture.shape[2:]))
        picture = smaller
    return [*levels, picture]


def collapse(levels):
    """The images of a Laplacian pyramid: the inverse of laplacian_pyramid."""
    picture = levels[-1]
    for level in reversed(levels[:-1]):
        picture = level + _double(picture, level.shape[2:])
    return picture


def _blur(picture):
    """Each channel convolved with (1, 4, 6, 4, 1) / 16 along both sides, mirrored at the border."""
    channels = picture.shape[1]
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=picture.dtype, device=picture.device) / 16
    kernel = kernel.expand(channels, 1, 1, 5)
    picture = F.conv2d(F.pad(picture, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)
    return F.conv2d(picture, kernel.mT, groups=channels)


def _double(picture, side):
    """Twice the size, or one less where `side` is odd: zeros between the pixels, then 4 times a blur."""
    doubled = picture.new_zeros(*picture.shape[:2], *side)
    doubled[..., ::2, ::2] = 4 * picture
    return _blur(doubled)

# ------------------------------------------------------------------------------------- sliced Wasserstein

@torch.no_grad()
def sliced_wasserstein(a, b, generator=0, patches=128, projections=512):
    """Distance of two image sets at each level of their Laplacian pyramids: ({level: distance}, mean).

    a (N, C, H, W), b (M, C, H, W): float tensors in [-1, 1] or uint8 in 0..255, on one device. A level is
    named by its shorter side in pixels. generator: a torch.Generator on the CPU, or a seed for a new one; the
    same state gives the same numbers, and torch's global generator is left alone.

    Per level, `patches` random 7 x 7 patches of each image are the points of its set, each channel is brought
    to mean 0 and standard deviation 1 over the set, and the distance is sliced_wasserstein_of_points, times
    1000 as in the paper's tables. For scale, at 64 px with 500 images a set: two halves of one set 13 (drawn
    faces) and 26 (photographs), one half against the other half blurred 3 x 3 59, faces against photographs
    158, against noise 224, against plain grey 695.

    Each set is normalised by its own statistics, as in the authors' program. So the distance is blind to a
    change of brightness or contrast of a channel that all images share: a set that is uniformly too dark, or
    has half the contrast, scores 0. Look for those elsewhere (mean and deviation of pixels, Frechet
    distance). Image i of both sets is cut at the same places, where the paper draws them apart: this makes
    the function symmetric and a set's distance from itself 0.

    Finite sets of one distribution are some way apart, the farther the smaller they are (faces: 27 with 100
    images a set, 13 with 500, 11 with 1,000): compare only numbers made with the same N, M and patches. The
    time grows with N * patches * projections: 13 s on one CPU core for 1,000 images of 64 px a set.

    Raises ValueError where shapes or types do not fit, a set is empty, or the images are below 16 x 16.
    """
    _check(a, b)
    generator = _generator(generator)
    distances = {}
    for level, side in enumerate(pyramid_sides(*a.shape[2:])):
        corner = torch.stack([torch.randint(length - NEIGHBOURHOOD + 1, (max(len(a), len(b)), patches),
                                            generator=generator) for length in side])
        points = [_descriptors(images, level, corner[:, :len(images)].to(images.device)) for images in (a, b)]
        distances[min(side)] = 1000 * sliced_wasserstein_of_points(*points, generator, projections)
    return distances, sum(distances.values()) / len(distances)


@torch.no_grad()
def sliced_wasserstein_of_points(x, y, generator=0, projections=512):
    """Mean over random directions w of the Wasserstein-1 distance between the numbers <x_i, w> and <y_j, w>.

    x (N, D), y (M, D): float tensors on one device. generator as in sliced_wasserstein. Along one direction
    the distance is that of the sorted numbers (Rabin et al. 2011); where N and M differ, that of the two
    quantile functions, which is exact as well. Returns a float.
    """
    directions = random_directions(projections, x.shape[1], _generator(generator)).to(x.dtype).to(x.device)
    n, m = len(x), len(y)
    # Quantile functions are constant between multiples of 1/n and of 1/m. Walk over all these pieces, in
    # units of 1/(n*m): piece k lies in x's step i[k] and in y's step j[k].
    ends = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    i, j = (ends[:-1] // m).to(x.device), (ends[:-1] // n).to(x.device)
    weight = (ends.diff().double() / (n * m)).to(x.dtype).to(x.device)
    total = 0.0
    for group in directions.split(PROJECTION_GROUP):
        x_sorted, y_sorted = _sort_rows(group @ x.T), _sort_rows(group @ y.T)
        difference = x_sorted - y_sorted if n == m else x_sorted[:, i] - y_sorted[:, j]
        total += (difference.abs() @ weight).sum().item()
    return total / projections


def random_directions(count, dimensions, generator):
    """Unit vectors, uniform on the sphere: (count, dimensions), on the CPU. generator: a torch.Generator."""
    return F.normalize(torch.randn(count, dimensions, generator=generator, dtype=torch.float64), dim=1)


def _generator(generator):
    return generator if isinstance(generator, torch.Generator) else torch.Generator().manual_seed(generator)


def _descriptors(images, level, corner):
    """The patches of one pyramid level as points: (N * patches, 49 * C), channels of mean 0 and deviation 1.

    corner (2, N, patches): top and left of each patch.
    """
    reach = torch.arange(NEIGHBOURHOOD, device=images.device)
    points = []
    for part, at in zip(images.split(IMAGE_GROUP), corner.split(IMAGE_GROUP, dim=1)):
        part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
        picture = laplacian_pyramid(part)[level].permute(0, 2, 3, 1)                  # (n, H, W, C)
        image = torch.arange(len(part), device=images.device).view(-1, 1, 1, 1)
        row = at[0][:, :, None, None] + reach[:, None]                                # (n, patches, 7, 1)
        column = at[1][:, :, None, None] + reach                                      # (n, patches, 1, 7)
        points.append(picture[image, row, column].flatten(0, 1))                      # (n * patches, 7, 7, C)
    points = torch.cat(points)
    deviation, mean = torch.std_mean(points, dim=(0, 1, 2), correction=0)
    # 1e-4 is a hundredth of a grey level: below it there is only rounding, which must not pass for a texture.
    return ((points - mean) / deviation.clamp_min(1e-4)).flatten(1)


def _sort_rows(numbers):
    """Rows in rising order. numpy sorts 64 rows of 128,000 in 0.14 s on one CPU core, torch in 1.4 s."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.sort(numbers.numpy(), axis=1))
    return numbers.sort(dim=1).values


def _check(a, b):
    if a.ndim != 4 or b.ndim != 4 or a.shape[1:] != b.shape[1:] or len(a) == 0 or len(b) == 0:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}: two image sets are (N, C, H, W) and "
                         "(M, C, H, W) with N and M at least 1")
    for images in (a, b):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"{images.dtype}: images are uint8 in 0..255 or float in [-1, 1]")
