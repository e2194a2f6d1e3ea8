"""Hidden states on disk: what is read is what the trunk gives, and what is missing is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from headstart.errors import UsageError
from headstart.training.adapt.hidden_states import HiddenStates

ROWS, T, D = [5, 3], 4, 6


def truth(source: int, first: int, stop: int) -> Tensor:
    rows = torch.arange(first, stop)[:, None, None] + 10 * source
    return rows + torch.arange(T)[:, None] / 4 + torch.arange(D) / 64


def states(folder: Path, dtype: torch.dtype = torch.float32, model: str = "a") -> HiddenStates:
    return HiddenStates(folder, {"model": model}, ROWS, T, D, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    made: list[int] = []
    states(tmp_path, dtype).fill(truth, 2, made.append)
    assert made == [2, 2, 1, 2, 1]
    found = states(tmp_path, dtype).of(torch.tensor([[1, 2], [0, 4], [0, 0]]))
    expected = torch.cat([truth(1, 2, 3), truth(0, 4, 5), truth(0, 0, 1)]).to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    size = sum(file.stat().st_size for file in states(tmp_path, dtype).folder.glob("*.bin"))
    assert size == states(tmp_path, dtype).bytes == 8 * T * D * dtype.itemsize


def test_a_kill_costs_what_was_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.training.adapt.hidden_states.NOTE_SECONDS", -1.0)

    def killed(source: int, first: int, stop: int) -> Tensor:
        if first >= 2:
            raise KeyboardInterrupt
        return truth(source, first, stop)

    with pytest.raises(KeyboardInterrupt):
        states(tmp_path).fill(killed, 2)
    assert states(tmp_path).done() == [2, 0]
    asked: list[tuple[int, int]] = []

    def rest(source: int, first: int, stop: int) -> Tensor:
        asked.append((source, first))
        return truth(source, first, stop)

    states(tmp_path).fill(rest, 2)
    assert asked == [(0, 2), (0, 4), (1, 0), (1, 2)]
    assert torch.equal(states(tmp_path).of(torch.tensor([[0, 1], [0, 3]])), torch.cat([truth(0, 1, 2), truth(0, 3, 4)]))
    states(tmp_path).fill(killed, 2)  # nothing is missing
    assert states(tmp_path, model="b").done() == [0, 0]


def test_too_much_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"would take 0\.00 GiB, more than --cache-gib"):
        states(tmp_path).check_room(100)
    states(tmp_path).check_room(10_000)
    assert not list(tmp_path.iterdir())
