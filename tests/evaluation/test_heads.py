"""Scores of heads against a loop that reads every prefix anew, one position at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headstart.errors import UsageError
from headstart.evaluation.heads import score_documents
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

N, CONTEXT = 4, 16


@pytest.fixture(scope="module", params=["replicated", "transformer"])
def model(request) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=11, dim=16, layers=5, attention_heads=2, context=CONTEXT, heads=N, head_kind=request.param
    )
    model = Transformer(config).double()
    for parameter in model.parameters():  # a model that is sure of something
        parameter.data *= 6 if parameter.ndim == 2 else 1
    return model


@torch.no_grad()
def slowly(model: Transformer, documents: list[list[int]], end_id: int | None) -> dict[str, list[float]]:
    """Every position from the prefix that it may see: half a window at least, a whole one at most."""
    nats, right, prefix, known = ([0.0] * N for _ in range(4))
    commits, passes = [0] * N, [0] * N
    for document in documents:
        tokens = ([] if end_id is None else [end_id]) + document
        if len(tokens) < 2:
            continue
        starts = {}  # of the window that counts position t
        first = start = 0
        while first < len(tokens):
            stop = min(len(tokens), start + CONTEXT)
            starts |= dict.fromkeys(range(first, stop), start)
            first, start = stop, stop - CONTEXT // 2
        runs = []
        for t in range(len(tokens)):
            logits = model(torch.tensor([tokens[starts[t] : t + 1]]), heads=N)[0, -1]  # (n, V)
            run, going = 1, True
            for k in range(1, N + 1):
                if t + k >= len(tokens):
                    break
                target = tokens[t + k]
                known[k - 1] += 1
                nats[k - 1] -= logits[k - 1].log_softmax(-1)[target].item()
                hit = logits[k - 1].argmax().item() == target
                right[k - 1] += hit
                going = going and (k == 1 or hit)
                prefix[k - 1] += going
                run += going and k > 1
            runs.append(run)
        for k in range(1, N + 1):
            t = 0
            while t < len(tokens) - 1:
                t += min(runs[t], k, len(tokens) - 1 - t)
                passes[k - 1] += 1
            commits[k - 1] += len(tokens) - 1
    return {
        "bits_per_byte": [a / b / math.log(2) / 2 for a, b in zip(nats, known)],
        "top1": [a / b for a, b in zip(right, known)],
        "prefix": [a / b for a, b in zip(prefix[1:], known[1:])],
        "tokens_per_pass": [a / b for a, b in zip(commits, passes)],
    }


@pytest.mark.parametrize("end_id", [None, 10])
def test_scores_are_those_of_a_slow_loop(model, end_id) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(10, (size,), generator=generator).tolist() for size in (50, 1, 2, 16, 17, 33)]
    # What the model itself says next, so that there is something to be right about.
    with torch.no_grad():
        for document in documents[:1]:
            for t in range(8, 40):
                document[t] = model(torch.tensor([document[max(0, t - 8) : t]]))[0, -1].argmax().item()
    found = score_documents(model, documents, 2 * sum(map(len, documents)), end_id=end_id)
    for name, expected in slowly(model, documents, end_id).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6), name
    predicted = sum(len(document) - (end_id is None) for document in documents)
    assert found.tokens == predicted
    assert found.tokens_per_pass[0] == 1
    assert found.tokens_per_pass[-1] > 1.02  # else the comparison of drafts shows nothing


def test_what_cannot_be_scored(model) -> None:
    with pytest.raises(UsageError, match="no document has two tokens"):
        score_documents(model, [[1], []], 1)
    with pytest.raises(UsageError, match=r"length is 17; it must lie between 2 and the model's context 16"):
        score_documents(model, [[1, 2, 3]], 3, length=17)


@torch.no_grad()
def test_tokens_that_do_not_count_are_read_and_judged_nowhere(model) -> None:
    """Draft only the answers of conversations: passes begin before an answer and end with it."""
    document = [(7 * i + i * i) % 11 for i in range(14)]
    answer = np.zeros(14, dtype=bool)
    answer[5:9] = answer[12:] = True
    everything = score_documents(model, [document], 14, counted=[np.ones(14, dtype=bool)])
    assert everything == score_documents(model, [document], 14)
    hits = (model(torch.tensor([document]), heads=N)[0].argmax(-1)).tolist()  # (T, n)
    right, known, prefix = [0] * N, [0] * N, [0] * N
    commits, passes = [0] * N, [0] * N
    for begin, stop in ((5, 9), (12, 14)):
        runs = {}
        for t in range(begin - 1, stop - 1):
            good = [hits[t][k - 1] == document[t + k] for k in range(1, N + 1) if t + k < stop]
            for k, hit in enumerate(good, start=1):
                known[k - 1] += 1
                right[k - 1] += hit
                prefix[k - 1] += all(good[1:k])
            runs[t] = 1 + next((i for i, hit in enumerate(good[1:]) if not hit), len(good) - 1)
        for k in range(1, N + 1):
            t = begin - 1
            while t < stop - 1:
                t += min(runs[t], k)
                passes[k - 1] += 1
            commits[k - 1] += stop - begin
    found = score_documents(model, [document], 14, counted=[answer])
    assert found.tokens == 6 and found.top1 == [a / b for a, b in zip(right, known)]
    assert found.prefix == [a / b for a, b in zip(prefix[1:], known[1:])]
    assert found.tokens_per_pass == [a / b for a, b in zip(commits, passes)]
