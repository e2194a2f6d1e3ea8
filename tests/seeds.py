"""Shift the seeds of the models that tests train: `TESTS_SEED=7 make test` runs with other weights.

A test of a trained model must hold for any weights, because training ends differently on each processor.
"""

from __future__ import annotations

import os


def trained_seed(seed: int) -> int:
    """Return the seed for a model that a test trains: `seed`, shifted by TESTS_SEED."""
    return seed + int(os.environ.get("TESTS_SEED", "0"))
