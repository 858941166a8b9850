import torch

import random_keys


def test_a_key_gives_the_same_draws_and_another_key_others():
    def draw(*key):
        return tuple(torch.randn(4, generator=random_keys.torch_generator(*key)).tolist())

    keys = [(0, "noise", 1, 2), (1, "noise", 1, 2), (0, "order", 1, 2), (0, "noise", 2, 1), (0, "noise", 1),
            (2 ** 40, "noise", 1, 2), (0, "noise", 1, 2 ** 33)]
    assert all(draw(*key) == draw(*key) for key in keys)
    assert len({draw(*key) for key in keys}) == len(keys)


def test_large_numbers_do_not_collide_with_their_neighbours():
    keys = [(0, "x", 2 ** 32), (0, "x", 0, 1), (1, "x", 0), (2 ** 32, "x", 0), (0, "x", 1)]
    assert len({random_keys.torch_generator(*key).initial_seed() for key in keys}) == len(keys)


def test_a_key_means_the_same_in_every_process_and_version():
    """Otherwise a resumed run would draw other numbers than the uninterrupted one."""
    assert random_keys.torch_generator(3, "noise", 7).initial_seed() == 7250169003755902807
    assert random_keys.numpy_generator(3, "noise", 7).integers(2 ** 32) == 2904118671


def test_torchs_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    torch.randn(3, generator=random_keys.torch_generator(0, "noise"))
    assert torch.equal(before, torch.get_rng_state())
