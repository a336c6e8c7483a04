"""Random numbers of campaigns: CAPKIT_SEED gives others; the seed is printed, so that a fault can be repeated."""

import os
import random


def seeded_random():
    """A `random.Random` of the seed in CAPKIT_SEED, 0 without it."""
    seed = int(os.environ.get("CAPKIT_SEED", 0))
    print(f"\nCAPKIT_SEED={seed}")
    return random.Random(seed)
