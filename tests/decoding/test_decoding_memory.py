from __future__ import annotations

from itertools import chain

import pytest
import torch
from shapes import packed
from torch import Tensor

from headstart import hardware
from headstart.decoding import memory as memory_module
from headstart.decoding.engine import Engine, EngineConfig
from headstart.decoding.memory import kv_bytes_per_token
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def tensors(owner: object) -> list[Tensor]:
    found = [x for x in chain.from_iterable(v if isinstance(v, tuple) else [v] for v in vars(owner).values())]
    return [x for x in found if isinstance(x, Tensor)]


def size(found: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["transformer", "linear", "replicated"])
@pytest.mark.parametrize(("slots", "context", "lookup"), [(1, 64, 0), (5, 100, 8)])
def test_the_plan_is_what_is_allocated(kind, dtype: torch.dtype, slots: int, context: int, lookup: int) -> None:
    config = ModelConfig(vocab_size=97, dim=48, layers=6, attention_heads=3, kv_heads=1, heads=4, head_kind=kind)
    engine = Engine(Transformer(config).to(dtype), EngineConfig(slots=slots, context=context, lookup=lookup))
    state = engine.state
    assert engine.memory.caches == state.cache.bytes == size(tensors(state.cache))
    parts = (state, state.windows, state.sampling, state.penalties)
    kept = size([tensor for part in parts for tensor in tensors(part)])
    assert kept <= engine.memory.state <= kept + 128 * slots


def test_keys_and_values_of_a_token() -> None:
    config = ModelConfig(dim=64, layers=6, attention_heads=4, kv_heads=2, heads=3, extra_layers=1)
    assert kv_bytes_per_token(config, torch.bfloat16) == 2 * (4 + 3) * 2 * 16 * 2


def test_what_does_not_fit_is_refused_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("replicated", torch.float32)
    need = Engine(model, EngineConfig(slots=3, context=640)).memory.total
    monkeypatch.setattr(memory_module, "free_memory", lambda device: need)
    with pytest.raises(UsageError) as refused:
        Engine(model, EngineConfig(slots=4, context=640))
    text = str(refused.value)
    assert "4 slots with a context of 640 need" in text and "\n" not in text
    slots, context = int(text.split("at most ")[1].split()[0]), int(text.split()[-1])
    Engine(model, EngineConfig(slots=slots, context=640))
    Engine(model, EngineConfig(slots=4, context=context))
    for too_many in ((slots + 1, 640), (4, context + 1)):
        with pytest.raises(UsageError, match="cpu has"):
            Engine(model, EngineConfig(slots=too_many[0], context=too_many[1]))
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 1)
    with pytest.raises(UsageError, match="free memory, or take a smaller model"):
        Engine(model)
    monkeypatch.setattr(memory_module, "free_memory", lambda device: None)  # nobody tells
    Engine(model)


def test_free_memory_of_this_machine() -> None:
    assert hardware.free_memory("cpu") == pytest.approx(hardware.available_memory(), rel=0.5)
    assert hardware.free_memory("meta") is None


def test_slots_that_nobody_uses_take_up_no_memory() -> None:
    """Pages of the caches are taken as they are written to, on boundaries of cache lines, and hold zeros."""
    before = hardware.resident_memory()
    zeros = hardware.untouched_zeros((4, 1 << 26), torch.float32, "cpu")  # 1 GiB
    after = hardware.resident_memory()
    assert zeros.shape == (4, 1 << 26) and zeros.dtype == torch.float32 and zeros.data_ptr() % 64 == 0
    assert zeros[3, -1000:].count_nonzero() == 0
    zeros[3, -1] = 1
    assert zeros[3, -1] == 1 and zeros[2].data_ptr() == zeros.data_ptr() + 2 * (1 << 28)
    if before is not None and after is not None:
        assert after - before < 1 << 28
    assert hardware.untouched_zeros((2, 3), torch.float64, "meta").is_meta


def test_a_context_that_nobody_named_leaves_half_of_the_memory(monkeypatch) -> None:
    def plan(context: int) -> memory_module.DecodingMemory:
        return memory_module.DecodingMemory(1000 * context, 0, 0)

    for free, wanted in (
        (10**9, 32_768),
        (32_768_000 * 2, 32_768),
        (10_000_000, 5_000),
        (1_000_000, 2_048),
        (None, 32_768),
    ):
        monkeypatch.setattr(memory_module, "free_memory", lambda device, free=free: free)
        assert memory_module.fitting_context(plan, 32_768, torch.device("cpu")) == wanted
    assert memory_module.fitting_context(plan, 512, torch.device("cpu")) == 512
