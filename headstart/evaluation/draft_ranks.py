"""Which rank the right token had among the candidates of each drafting head, where heads drafted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Sampling
from headstart.model.transformer import Transformer


@torch.no_grad()
def draft_ranks(
    model: Transformer, text: Sequence[int], rows: Sequence[int], sampling: Sampling
) -> list[list[tuple[float, int]]]:
    """For each of `rows` and head k = 2..n, entry k-2: the probability that head k gave its best candidate there, and
    the rank of the token that the text has k later.

    Candidates are ranked as drafts are: by logits, or at a temperature with the noise of their position. Top-k, top-p
    and min-p are left out.

    Args:
        model: in decoding form.
        rows: positions of `text` with n tokens after them.
    """
    n = model.config.heads
    tokens = torch.tensor([text], device=model.trunk.embedding.weight.device)
    at = torch.tensor(rows, device=tokens.device)
    latents = model.latents(tokens, list(range(2, n + 1)))
    found: list[list[tuple[float, int]]] = []
    for k in range(2, n + 1):
        unembedding = model.unembedding
        assert isinstance(unembedding, PackedUnembedding)
        logits = unembedding(latents[k][:, at], k)[0].float() / (sampling.temperature or 1)  # (P, V)
        scores = logits
        if sampling.temperature:
            scores = logits + position_noise(torch.full_like(at, sampling.seed), at + k, logits.shape[-1])
        right = scores.gather(-1, tokens[0, at + k, None])
        ranks = (scores > right).sum(-1)
        confidence = logits.softmax(-1).gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
        found.append(list(zip(confidence.tolist(), ranks.tolist())))
    return [list(heads) for heads in zip(*found)]
