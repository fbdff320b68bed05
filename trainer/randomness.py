"""The two streams of random draws: step n of a run is a pure function of (seed, n).

Host draws (order, captions, flips) come from `host`, device draws (noise, timesteps, VAE posterior, dropout) from a generator
that is seeded afresh by `key` before each step. Nothing is keyed by process, so one process equals several.
"""

from __future__ import annotations

import hashlib
import random


def key(seed: int, n: int, purpose: str) -> int:
    """A 32-bit hash of (seed, n, purpose), for seeding a generator."""
    digest = hashlib.blake2s(f"{seed} {n} {purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def host(seed: int, n: int, purpose: str) -> random.Random:
    """Python's generator for the host draws of step `n` that serve `purpose`."""
    return random.Random(key(seed, n, purpose))
