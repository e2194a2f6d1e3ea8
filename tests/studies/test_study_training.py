"""Training inside a case is the project's own, and its exact match is that of decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from headstart.decoding.engine import Engine, EngineConfig
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from studies import resume
from studies.resume import trainings_kept_in
from studies.training import (
    Trained,
    TrainingSettings,
    in_memory,
    run_config,
    sized,
    stream_of,
    train_model,
    written_right,
)

TINY = TrainingSettings(steps=6, rows=4, length=16, lr=1e-2, warmup_steps=2)


def silent(**fields: object) -> None:
    pass


def test_documents_in_memory_are_read_as_shards_are() -> None:
    shards = in_memory([[1, 2, 9], [3, 9], [4, 5, 6, 7, 8, 9]])
    config = run_config(replace(TINY, rows=1, length=8), sized("0.06M", vocab_size=10, heads=2), seed=0)
    batch = next(stream_of(shards, config))
    assert batch.tokens.tolist() == [[1, 2, 9, 3, 9, 4, 5, 6]]
    assert batch.targets[0, :, 0].tolist() == [2, 9, -100, 9, -100, 5, 6, 7]
    assert batch.targets[0, 3:5, 1].tolist() == [-100, -100]
    assert shards.document(1).tolist() == [3, 9]


def test_targets_may_begin_within_a_document() -> None:
    shards = in_memory([[1, 2, 9], [3, 9], [4, 5, 6, 7, 8, 9]], targets_from=[2, 1, 4])
    config = run_config(replace(TINY, rows=1, length=8), sized("0.06M", vocab_size=10, heads=2), seed=0)
    batch = next(stream_of(shards, config))
    assert batch.targets[0, :, 0].tolist() == [-100, 9, -100, 9, -100, -100, -100, -100]
    assert batch.targets[0, :, 1].tolist() == [9, -100, -100, -100, -100, -100, -100, 8]


def test_training_learns_and_is_seeded() -> None:
    shards = in_memory([[1, 2, 3, 9]] * 40)
    config = run_config(TINY, sized("0.06M", vocab_size=10, heads=2), seed=1)
    seen = []
    first, second = (
        train_model(config, stream_of(shards, config), silent, watch=lambda done, model, _: seen.append(done))
        for _ in range(2)
    )
    assert first.curve == second.curve and seen == [1, 2, 3, 4, 5, 6] * 2
    assert first.curve[0][0] > 2 and first.losses[0] < 0.7 * first.curve[0][0]
    assert 0 <= first.clipped <= 1 and not first.model.training
    onwards = train_model(config, stream_of(shards, config), silent, model=first.model)
    assert onwards.curve[0][0] < first.curve[0][0] - 0.5


def test_training_that_explodes_says_so() -> None:
    shards = in_memory([[1, 2, 3, 9]] * 40)
    config = run_config(replace(TINY, lr=1e30), sized("0.06M", vocab_size=10), seed=1)
    with pytest.raises(UsageError, match="lower the learning rate"):
        train_model(config, stream_of(shards, config), silent)


def test_exact_match_is_that_of_free_running() -> None:
    """Answers that the engine wrote are right throughout; one changed token is wrong, and what is behind it may be."""
    torch.manual_seed(0)
    model = Transformer(sized("0.06M", vocab_size=20, heads=2, context=64)).eval()
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    engine = Engine(pack(model), EngineConfig(slots=3))
    generations = [engine.submit(Request(tuple(prompt), 6, heads=1)) for prompt in prompts]
    while engine.busy:
        engine.step()
    answers = [list(generation.tokens) for generation in generations]
    assert written_right(model, prompts, answers, rows=2) == [[True] * 6] * 3
    changed = [[*answer[:2], (answer[2] + 1) % 20, *answer[3:]] for answer in answers]
    assert all(right[:3] == [True, True, False] for right in written_right(model, prompts, changed))


def test_a_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"size '2M' is unknown; take one of 0.06M"):
        sized("2M")
    counts = {size: sized(size).parameters()["non_embedding"] for size in ("0.06M", "0.25M", "0.55M", "1M")}
    assert all(abs(count / 1e6 - float(size[:-1])) < 0.01 + 0.05 * count / 1e6 for size, count in counts.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_training_resumes_from_its_checkpoint(
    optimizer: Literal["adamw", "muon"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    shards = in_memory([[1, 2, 3, 9], [4, 5, 9], [6, 7, 8, 2, 1, 9]] * 20)
    config = run_config(replace(TINY, optimizer=optimizer, accumulate=2), sized("0.06M", vocab_size=10, heads=2), 1)
    started: list[int] = []

    def train(stop_at: int | None = None) -> Trained:
        def watch(done: int, model: Transformer, seen: list[int]) -> None:
            started.append(done)
            seen.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        return train_model(config, stream_of(shards, config), silent, watch=watch)

    whole = train()
    with pytest.raises(KeyboardInterrupt), trainings_kept_in(tmp_path):
        train(stop_at=4)
    started.clear()
    with trainings_kept_in(tmp_path) as case:
        again = train()
        other = train(stop_at=None)  # the case's second training has a checkpoint of its own
    assert started == [4, 5, 6, *range(1, 7)] and again.seen == [1, 2, 3, 4, 5, 6]
    assert again.curve == whole.curve == other.curve and again.clipped == whole.clipped
    assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))
    assert case.spent.wall > 0 and case.states[1].spent.wall == 0
    (tmp_path / "training-0.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"training-0.pt: is damaged; delete it"), trainings_kept_in(tmp_path):
        train()
