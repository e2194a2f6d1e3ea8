"""The speed-up of a trained model: tokens per second and per pass by number of heads, as in the paper's Table S3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import read_tuning
from headstart.decoding.policy.timing import DTYPES, Decoded, decode, first_difference, interleave
from headstart.decoding.settings import Request, Sampling
from headstart.evaluation.repetition import repeated
from headstart.formats.huggingface import load_model

PAPER = {1: (1.00, 1.00), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}
"""Table S3, byte-level code model with n = 8: k -> (relative speed-up, bytes per forward)."""

POLICY = "policy"
"""The variant whose rows are chosen pass by pass, where `headstart tune` has measured this model on this machine."""
FASTEST_PLAIN = "plain"
"""The variant K = 1, exact=False: the fastest ordinary decoding there is here, what a speed-up is measured against."""


def case(case: dict[str, Any]) -> dict[str, Any]:
    """All variants of one temperature, taking turns. Runs in a process of its own."""
    dtype = "float32" if case["quantize"] else case["dtype"]
    model = load_model(case["model"], dtype=DTYPES[dtype], device=case["device"])
    pack(model, quantize=case["quantize"])
    tuning = read_tuning(case["model"], model)
    last: dict[str, Decoded] = {}

    def measure(name: str, heads: int | None, exact: bool) -> float:
        requests = [
            Request(tuple(p), case["new_tokens"], Sampling(case["temperature"], seed=seed), heads)
            for seed, p in enumerate(case["prompts"])
        ]
        last[name] = decode(model, requests, case["batch"], exact, tuning if heads is None else None)
        return last[name].tokens_per_second

    ks = [k for k in case["heads"] if k <= model.config.heads]
    variants: dict[str, Callable[[], float]] = {FASTEST_PLAIN: partial(measure, FASTEST_PLAIN, 1, False)}
    variants |= {str(k): partial(measure, str(k), k, True) for k in ks}
    if tuning is not None and backend_of(model).row_exact:
        variants[POLICY] = partial(measure, POLICY, None, True)
    speeds = interleave(variants, case["repetitions"])
    reference = last[str(ks[0])].tokens
    return {
        "tokens_per_second": speeds,
        "tokens_per_pass": {name: d.stats.tokens_per_pass for name, d in last.items()},
        "rows_per_pass": {name: d.stats.rows_per_pass for name, d in last.items()},
        "acceptance": {name: d.stats.acceptance for name, d in last.items()},
        "repeated_8_grams": repeated(reference),
        # What exact=False gives is only equal up to rounding, so it is reported and not required.
        "first_difference": {name: first_difference(reference, d.tokens) for name, d in last.items()},
    }
