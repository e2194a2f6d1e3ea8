"""What decoding passes cost on their own, by rows and slots."""

from __future__ import annotations

from typing import Any

import torch

from headstart import hardware
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.timing import Pass, interleave, random_model, timed
from headstart.model.config import ModelConfig


def pass_bytes(config: ModelConfig, span: int, weight_bytes: int, cache_bytes: int) -> int:
    """Bytes that a plain pass of one window of one row reads: the weights on head 1's path, one row of the embedding,
    the unembedding, and the keys and values of `span` positions."""
    weights = config.parameters()["next_token_path"]
    if not config.tied:  # the embedding is looked up, not read; tied, it is the unembedding, and is read
        weights -= config.vocab_size * config.dim
    cache = 2 * config.next_token_layers * config.key_value_heads * config.dim_per_head * span
    return (weights + config.dim) * weight_bytes + cache * cache_bytes


def merged_bytes(config: ModelConfig, span: int, weight_bytes: int, cache_bytes: int) -> int:
    """Bytes that a pass of one window which verifies and drafts with all heads reads: all weights but the embedding, an
    unembedding that heads share once for verification and once for all drafts, keys and values of every block."""
    weights = config.parameters()["total"]
    V, D = config.vocab_size, config.dim
    if not config.tied:
        weights -= V * D
    if not config.kind.own_unembeddings:
        weights += V * D
    cache = 2 * (config.trunk_layers + config.head_blocks) * config.key_value_heads * config.dim_per_head * span
    return (weights + config.heads * D) * weight_bytes + cache * cache_bytes


def bandwidth_case(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of plain passes, the bytes of one, and the stream bandwidth. Runs in a process of its own."""
    config, device = ModelConfig(**case["config"]), case["device"]
    threads = torch.get_num_threads()
    plain = Pass(pack(random_model(config, case["dtype"], device), rows=1), rows=1, length=case["length"])
    size = case["stream_mebibytes"]
    # Before and after: the bandwidth is a limit, so the better of two looks at it is the one to be held against.
    before = hardware.stream_bandwidth(threads, device=device, mebibytes=size)
    seconds = interleave({"plain": timed(plain)}, case["passes"], warmup=5)["plain"]
    stream = max(before, hardware.stream_bandwidth(threads, device=device, mebibytes=size))
    weight_bytes = plain.model.trunk.embedding.weight.element_size()
    cache_bytes = plain.state.cache.keys.element_size()
    return {
        "seconds": seconds,
        "bytes": pass_bytes(config, plain.span, weight_bytes, cache_bytes),
        "stream_gb_per_second": stream,
    }


def merged_case(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of whole passes, which verify and draft with all heads, and of plain ones, over the same weights; the
    bytes of each. Runs in a process of its own."""
    config, length = ModelConfig(**case["config"]), case["length"]
    n, model = config.heads, pack(random_model(config, case["dtype"], case["device"]))
    plain, merged = Pass(model, rows=1, length=length), Pass(model, rows=n, heads=n, length=length)
    size, cached = (x.element_size() for x in (model.trunk.embedding.weight, plain.state.cache.keys))
    seconds = interleave({"plain": timed(plain), "merged": timed(merged)}, case["passes"], warmup=5)
    return seconds | {
        "plain bytes": pass_bytes(config, plain.span, size, cached),
        "merged bytes": merged_bytes(config, plain.span, size, cached),
    }


def window_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of passes over `rows` rows and over one row. Runs in a process of its own.

    One row is timed twice: with weights laid out for the window, as a served model has them, and for one row.
    """
    config, rows, length = ModelConfig(**case["config"]), case["rows"], case["length"]
    model = random_model(config, case["dtype"], case["device"])
    own = random_model(config, case["dtype"], case["device"])
    model, own = pack(model, rows=rows), pack(own, rows=1)
    variants = {
        "window": timed(Pass(model, rows=rows, length=length)),
        "one row": timed(Pass(model, rows=1, length=length)),
        "one row, own layout": timed(Pass(own, rows=1, length=length)),
    }
    return interleave(variants, case["passes"], warmup=5)


def deferred_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of passes whose drafting heads run on the accepted row only, and on all rows, for each batch. Runs in a
    process of its own."""
    config = ModelConfig(**case["config"])
    model = pack(random_model(config, case["dtype"], case["device"]))
    n = config.heads
    variants = {
        f"{name} {batch}": timed(
            Pass(model, rows=n, heads=n, slots=batch, length=case["length"], deferred=name == "deferred")
        )
        for batch in case["batches"]
        for name in ("deferred", "all")
    }
    return interleave(variants, case["passes"], warmup=5)
