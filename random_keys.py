"""Keyed random draws: each draw is a function of (seed, purpose, numbers), never of what was drawn before.

A run that stopped at step 1,000 draws at step 1,001 what it would have drawn anyway. torch's global generator is
neither read nor moved. The numbers distinguish draws of one purpose: rollbacks, step, critic update, image index.

    random_keys.torch_generator(SEED, "noise", rollbacks, step)   # a torch.Generator on the CPU
"""

import zlib

import numpy as np
import torch


def seed_sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Returns the SeedSequence of a key. `seed` and `numbers` are non-negative integers.

    Each number becomes two 32-bit words, so that no two keys of equal length collide. The purpose enters by its
    CRC-32, because Python's hash of a string differs between processes.
    """
    words = [zlib.crc32(purpose.encode())]
    for number in (seed, *numbers):
        words += [int(number) & 0xFFFFFFFF, int(number) >> 32]
    return np.random.SeedSequence(words)


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Returns the numpy Generator of a key."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *numbers)))


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Returns the torch.Generator of a key, on the CPU, so that a run draws the same numbers for every device."""
    state = seed_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)    # manual_seed takes a signed 64-bit number
