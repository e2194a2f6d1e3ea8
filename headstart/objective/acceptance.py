"""What the heads' accuracies promise for decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_tokens_per_pass(accuracies: Sequence[float]) -> float:
    """An estimate, made during training, of the tokens that a decoding pass will commit: 1 + sum_k prod_{j=2..k} acc_j.

    It is no measurement. It takes the top-1 accuracies of heads 2..k at one position for the chances of their drafts,
    and those chances for independent; and they were counted on given text, while decoding drafts the model's own.

    Args:
        accuracies: of heads 1..n, head 1 first, between 0 and 1; NaN for a head whose hits were not counted: the
            drafts end before it.

    Returns:
        From 1 to n; NaN where head 1's own is NaN, because then nothing was counted.
    """
    if math.isnan(accuracies[0]):
        return math.nan
    expected = accepted = 1.0
    for accuracy in accuracies[1:]:
        if math.isnan(accuracy):
            break
        accepted *= accuracy
        expected += accepted
    return expected
