"""Random draws by key: each draw of a run is a function of (seed, purpose, numbers), never of what was drawn before.

A run that was stopped at step 1,000 and goes on draws at step 1,001 what it would have drawn anyway, with any
number of loader processes, and torch's global generator is neither read nor moved. The numbers are what the
caller tells apart by: rollbacks, step, critic update, image index.

    random_keys.generator(SEED, "noise", rollbacks, step)   # a torch.Generator on the CPU
"""

import zlib

import numpy as np
import torch


def seed_sequence(seed, purpose, *numbers):
    """The SeedSequence of a key: `seed` and `numbers` are non-negative integers, `purpose` a short name.

    Numbers are split into two 32-bit words each, so that no two keys of one length run into one another; the
    purpose goes in by its CRC-32, since Python's own hash of a string changes from process to process.
    """
    words = [zlib.crc32(purpose.encode())]
    for number in (seed, *numbers):
        words += [int(number) & 0xFFFFFFFF, int(number) >> 32]
    return np.random.SeedSequence(words)


def numpy_generator(seed, purpose, *numbers):
    """A numpy Generator for this key."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *numbers)))


def generator(seed, purpose, *numbers):
    """A torch.Generator on the CPU for this key.

    On the CPU for every device: then a run draws the same numbers on each of them.
    """
    state = seed_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)    # manual_seed takes a signed 64-bit number
