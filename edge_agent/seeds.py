"""What a device draws in a round follows from the run's seed and its name: it can be repeated.

Neither is secret. Whoever repeats a run, after a crash or in a simulation, draws the same.
"""

import hashlib

import numpy as np


def order_seed(seed: int, run_id: bytes, round_number: int, agent_id: str) -> int:
    """Return what fixes the order of the device's data in a round's training."""
    return int.from_bytes(_digest(f"{seed}/{run_id.hex()}/{round_number}/{agent_id}")[:8], "little")


def rounding(seed: int, run_id: bytes, round_number: int, agent_id: str) -> np.random.Generator:
    """Return what rounds values up or down, and does nothing else.

    It does not depend on the attempt: an update that is encoded again, after a crash or for
    another cohort, has the same levels, so that the run ends with the same bytes.
    """
    text = f"rounding/{seed}/{run_id.hex()}/{round_number}/{agent_id}"
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(text), "little")))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
