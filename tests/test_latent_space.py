import torch

import latent_space


def test_a_walk_closes_passes_its_keyframes_and_stays_on_the_shell():
    keyframes = latent_space.draw_z(0, 0, 4, 128)
    path = latent_space.walk(keyframes, 80)
    torch.testing.assert_close(path[::20], keyframes)
    norms = path.norm(dim=1)
    assert norms.min() > 0.99 * keyframes.norm(dim=1).min() and norms.max() < 1.01 * keyframes.norm(dim=1).max()
    steps = (path.roll(-1, 0) - path).norm(dim=1)
    assert steps.max() < 0.15 * keyframes[0].norm()          # no jump, also from the last point to the first


def test_an_open_walk_begins_and_ends_on_its_keyframes():
    keyframes = latent_space.draw_z(0, 0, 3, 32)
    torch.testing.assert_close(latent_space.walk(keyframes, 21, loop=False)[[0, 10, 20]], keyframes)
    assert len(latent_space.walk(keyframes[:1], 5, loop=False)) == 5


def test_spherical_interpolation_keeps_a_constant_angular_speed():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(t * torch.pi / 2)
        expected = 2 * torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(latent_space.spherical(a, b, torch.tensor(t)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(latent_space.spherical(a, 2 * a, 0.5), 1.5 * a)        # equal directions


def test_principal_axes_of_a_stretched_cloud_are_its_directions():
    rng = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng))
    widths = torch.tensor([5.0, 3.0, 1.0, 0.2])
    mu = (torch.randn(20_000, 4, generator=rng) * widths) @ turned.T + 7
    found = latent_space.principal_axes(mu)
    torch.testing.assert_close(found["deviations"], widths, rtol=0.02, atol=0)
    torch.testing.assert_close((found["axes"] @ turned).abs(), torch.eye(4), atol=0.02, rtol=0)
    torch.testing.assert_close(found["mean"], mu.mean(0))
    assert (found["axes"].gather(1, found["axes"].abs().argmax(1, keepdim=True)) > 0).all()


def test_fewer_points_than_dimensions_give_as_many_axes_as_points():
    found = latent_space.principal_axes(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    assert found["axes"].shape == (3, 8) and found["deviations"].shape == (3,) and found["deviations"][2] < 1e-5
