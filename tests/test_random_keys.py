import subprocess
import sys
from pathlib import Path

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


def test_a_key_means_the_same_in_another_process():
    program = "import random_keys; print(random_keys.torch_generator(3, 'noise', 7).initial_seed())"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                               cwd=Path(random_keys.__file__).parent).stdout
    assert int(elsewhere) == random_keys.torch_generator(3, "noise", 7).initial_seed()


def test_torchs_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    torch.randn(3, generator=random_keys.torch_generator(0, "noise"))
    assert torch.equal(before, torch.get_rng_state())
