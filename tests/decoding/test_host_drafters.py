"""A drafter on the host is a class and a line in the registry: the engine knows none of them by name."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from shapes import HEADS, SHAPES, packed

from headstart.decoding.drafters import registry
from headstart.decoding.drafters.interface import HostDrafter, Turn
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.settings import Request
from headstart.decoding.window import Origin, Window

ORACLE = Origin(-2)
PROMPT = tuple(b"the cat then a dog")


class Oracle(HostDrafter):
    """Drafts what plain decoding has written before."""

    future: tuple[int, ...] = ()
    learned: ClassVar[list[tuple[int, int]]] = []

    @classmethod
    def rows(cls, config: EngineConfig) -> int:
        return 3

    def takes(self, generation: Generation) -> bool:
        return bool(self.future)

    def propose(self, turn: Turn) -> None:
        done = len(turn.generation.tokens)
        drafts = list(self.future[done : done + turn.rows - 1])
        window = turn.generation.window
        window.drafters, window.confidences, window.chances = [ORACLE] * len(drafts), [], [1.0] * len(drafts)
        turn.state.windows.replace(turn.slot, 0, drafts, True)

    def learn(self, window: Window, fed: int, accepted: int) -> None:
        if ORACLE in window.drafters:
            self.learned.append((fed, accepted))


def test_a_new_drafter_is_a_class_and_a_registry_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(next(iter(SHAPES)), torch.float32)
    request = Request(PROMPT, 24, heads=1)
    (plain,) = generate_all(Engine(model), [request])
    monkeypatch.setattr("headstart.decoding.engine.HOST_DRAFTERS", (Oracle, *registry.HOST_DRAFTERS))
    Oracle.future = tuple(plain.tokens)
    engine = Engine(model)
    (found,) = generate_all(engine, [request])
    assert engine.width == HEADS + 3 and found.tokens == plain.tokens
    assert found.stats.passes < 24 / 3  # windows of the oracle's drafts, all accepted
    assert set(found.origins[1:]) >= {ORACLE}
    assert Oracle.learned and all(accepted <= fed for fed, accepted in Oracle.learned)
