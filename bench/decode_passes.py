"""Measure single decoding passes: against the memory bandwidth, by rows, and with what drafting adds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import fresh_process
from bench.decode_settings import DecodeSettings, four_heads
from bench.report import Bar, Findings, count
from headstart import hardware
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.timing import DTYPES, PASSES_OF_A_BLOCK, Pass, interleave, random_model, ratios, timed
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig

BANDWIDTH_BARS = {0: Bar(">=", 0.65), 100_000_000: Bar(">=", 0.75), 1_000_000_000: Bar(">=", 0.8)}
"""Bars by the least number of parameters: a small model does not wait for its weights alone."""
WINDOW_BAR = Bar("<=", 1.3)
MERGED_BAR = Bar("<=", 1.05)
ROWS = (1, 2, 4, 8, 16)
"""Widths that the part rows times."""


def pass_bytes(config: ModelConfig, span: int, weight_bytes: int, cache_bytes: int) -> int:
    """Return the bytes that a plain pass of one window of one row reads.

    They are the weights on head 1's path, one row of the embedding, the unembedding, and the keys and values of `span`
    positions.
    """
    weights = config.parameters()["next_token_path"]
    if not config.tied:  # the embedding is looked up, not read; tied, it is the unembedding, and is read
        weights -= config.vocab_size * config.dim
    cache = 2 * config.next_token_layers * config.key_value_heads * config.dim_per_head * span
    return (weights + config.dim) * weight_bytes + cache * cache_bytes


def merged_bytes(config: ModelConfig, span: int, weight_bytes: int, cache_bytes: int) -> int:
    """Return the bytes that a pass of one window reads when it verifies and drafts with all heads.

    They are all weights but the embedding, an unembedding that heads share once for verification and once for all
    drafts, and the keys and values of every block.
    """
    weights = config.parameters()["total"]
    V, D = config.vocab_size, config.dim
    if not config.tied:
        weights -= V * D
    if not config.kind.own_unembeddings:
        weights += V * D
    cache = 2 * (config.trunk_layers + config.head_blocks) * config.key_value_heads * config.dim_per_head * span
    return (weights + config.heads * D) * weight_bytes + cache * cache_bytes


def bandwidth(settings: DecodeSettings) -> Findings:
    """Measure which share of the memory bandwidth a plain pass reaches."""
    found, size = Findings("bandwidth"), 0
    shares: dict[str, list[float]] = {}
    config = replace(settings.sizes, heads=1)
    for threads, label in settings.thread_labels():
        case = settings.case(config, stream_mebibytes=settings.stream_mebibytes)
        answer = fresh_process.call(bandwidth_case, case, threads=threads)
        size, stream = answer["bytes"], answer["stream_gb_per_second"]
        shares[label] = [size / s / 1e9 / stream for s in answer["seconds"]]
        found.times(f"plain pass, {label}", answer["seconds"])
        found.measure(f"stream read, {label}", [stream], "GB/s")
        found.measure(f"bytes of a pass / its time / stream read, {label}", shares[label])
    best = max(shares, key=lambda label: statistics.median(shares[label]))
    bar = BANDWIDTH_BARS[max(least for least in BANDWIDTH_BARS if config.parameters()["total"] >= least)]
    found.measure(f"the same at the best setting ({best})", shares[best], bar=bar)
    found.note(
        f"a plain pass reads {size:,} bytes: the weights on head 1's path with the unembedding, and the keys and "
        f"values of its span. Stream read: the best of 2 x 5 sums over {settings.stream_mebibytes} MiB of fp32 with as "
        "many threads."
    )
    return found


def bandwidth_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of plain passes, the bytes of one, and the stream bandwidth."""
    config, device = ModelConfig(**case["config"]), case["device"]
    threads = torch.get_num_threads()
    plain = Pass(pack(random_model(config, case["dtype"], device), rows=1), rows=1, length=case["length"])
    size = case["stream_mebibytes"]
    # The bandwidth is a limit: the better of two measurements, before and after, is what passes are compared with.
    before = hardware.stream_bandwidth(threads, device=device, mebibytes=size)
    seconds = interleave({"plain": timed(plain)}, case["passes"], warmup=5)["plain"]
    stream = max(before, hardware.stream_bandwidth(threads, device=device, mebibytes=size))
    weight_bytes = plain.model.trunk.embedding.weight.element_size()
    cache_bytes = plain.state.cache.keys.element_size()
    return {
        "seconds": seconds,
        "bytes": pass_bytes(config, plain.plan.span, weight_bytes, cache_bytes),
        "stream_gb_per_second": stream,
    }


def window(settings: DecodeSettings) -> Findings:
    """Measure a pass over several rows against a pass over one row of the same weights."""
    found, rows = Findings("window"), settings.window
    for threads, label in settings.thread_labels():
        case = settings.case(replace(settings.sizes, heads=1), rows=rows)
        answer = fresh_process.call(window_case, case, threads=threads)
        for name, seconds in answer.items():
            found.times(f"{f'{rows} rows' if name == 'window' else name}, {label}", seconds)
        one = min(("one row", "one row, own layout"), key=lambda name: statistics.median_high(answer[name]))
        found.ratio(f"{rows} rows / {one}, {label}", answer["window"], answer[one], WINDOW_BAR, PASSES_OF_A_BLOCK)
    found.note(
        f"trunk, head 1 and unembedding on {rows} rows against one row of the same {settings.sizes.layers} layers, "
        f"batch 1, at {settings.cached} cached positions. The faster of two one-row passes is the denominator: weights "
        f"laid out for {rows} rows, and for one (own layout)."
    )
    return found


def window_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of passes over `rows` rows and over one row.

    One row is timed twice: with weights laid out for the window, as a served model has them, and for one row.
    """
    config, rows, length = ModelConfig(**case["config"]), case["rows"], case["length"]
    model, own = (
        pack(random_model(config, case["dtype"], case["device"]), rows=laid_out_for) for laid_out_for in (rows, 1)
    )
    variants = {
        "window": timed(Pass(model, rows=rows, length=length)),
        "one row": timed(Pass(model, rows=1, length=length)),
        "one row, own layout": timed(Pass(own, rows=1, length=length)),
    }
    return interleave(variants, case["passes"], warmup=5)


def merged(settings: DecodeSettings) -> Findings:
    """Measure a pass that verifies and drafts with all heads, against a plain pass and the bytes of both."""
    found, config = Findings("merged"), four_heads(settings.sizes)
    answer = fresh_process.call(merged_case, settings.case(config), threads=settings.threads[-1])
    expected = answer["merged bytes"] / answer["plain bytes"]
    over = [ratio / expected for ratio in ratios(answer["merged"], answer["plain"], PASSES_OF_A_BLOCK)]
    for name in ("plain", "merged"):
        found.times(f"{name} pass", answer[name], bytes=answer[f"{name} bytes"])
    found.measure("merged / plain pass, over the same ratio of bytes", over, bar=MERGED_BAR)
    found.note(
        f"four parallel transformer heads, {config.parameters()['total']:,} parameters, batch 1: a pass over four rows "
        f"that verifies and drafts with all heads reads {expected:.3f} times the bytes of a plain pass."
    )
    return found


def merged_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of merged and of plain passes over the same weights, and the bytes of each."""
    config, length = ModelConfig(**case["config"]), case["length"]
    n, model = config.heads, pack(random_model(config, case["dtype"], case["device"]))
    plain, merged = Pass(model, rows=1, length=length), Pass(model, rows=n, heads=n, length=length)
    size, cached = (x.element_size() for x in (model.trunk.embedding.weight, plain.state.cache.keys))
    seconds = interleave({"plain": timed(plain), "merged": timed(merged)}, case["passes"], warmup=5)
    return seconds | {
        "plain bytes": pass_bytes(config, plain.plan.span, size, cached),
        "merged bytes": merged_bytes(config, plain.plan.span, size, cached),
    }


def deferred(settings: DecodeSettings) -> Findings:
    """Measure passes whose drafting heads run on the accepted row alone, against all rows."""
    found = Findings("deferred")
    for threads, label in settings.thread_labels():
        for n in settings.deferred_heads:
            case = settings.case(replace(settings.sizes, heads=n), batches=list(settings.deferred_batches))
            answer = fresh_process.call(deferred_case, case, threads=threads)
            for batch in settings.deferred_batches:
                fast, full = answer[f"deferred {batch}"], answer[f"all {batch}"]
                where = f"K = n = {n}, batch {batch}, {label}"
                found.times(f"accepted row, {where}", fast)
                found.times(f"all rows, {where}", full)
                found.ratio(f"accepted row / all rows, {where}", fast, full, block=PASSES_OF_A_BLOCK)
    found.note("a whole pass whose drafting heads (transformer, parallel) run on the accepted row, or on all rows.")
    return found


def deferred_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of passes with deferred heads and with heads on all rows, for each batch size."""
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


def rows(settings: DecodeSettings) -> Findings:
    """Measure passes by rows, in the dtype and in int8, of the trained model if one is given."""
    found, dtype = Findings("rows"), settings.dtype
    path = None if settings.model is None else str(settings.model)
    for threads, label in settings.thread_labels():
        case = settings.case(replace(settings.sizes, heads=1), model=path)
        answer = fresh_process.call(rows_case, case, threads=threads)
        for kind, seconds in answer.items():
            for width, values in seconds.items():
                what = f"{kind}, {count(int(width), 'row')}, {label}"
                found.times(what, values)
                others: dict[str, list[float]] = {dtype: answer[dtype][width]} if kind != dtype else {}
                others |= {"1 row": seconds["1"]} if width != "1" else {}
                for name, other in others.items():
                    found.ratio(f"{what} / {name}", values, other, block=PASSES_OF_A_BLOCK)
    weights = path or f"{settings.sizes.layers} layers of {settings.sizes.dim}, random weights"
    found.note(
        f"passes of head 1 without drafts at {settings.cached} cached positions, each after a pass of the same kind, "
        f"of {weights}; int8: headstart/decoding/kernels/int8.py."
    )
    return found


def rows_case(case: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of passes by dtype or int8, and by rows."""
    variants: dict[str, Callable[[], float]] = {}
    kinds = (case["dtype"], "int8")
    for kind in kinds:
        dtype = "float32" if kind == "int8" else kind
        if case["model"] is None:
            model = random_model(ModelConfig(**case["config"]), dtype, "cpu")
        else:
            model = load_model(case["model"], dtype=DTYPES[dtype])
        pack(model, quantize="int8" if kind == "int8" else None)
        variants |= {f"{kind} {width}": _timed_again(Pass(model, rows=width, length=case["length"])) for width in ROWS}
    seconds = interleave(variants, case["passes"], warmup=5)
    return {kind: {str(width): seconds[f"{kind} {width}"] for width in ROWS} for kind in kinds}


def _timed_again(one: Pass) -> Callable[[], float]:
    """Return a variant that runs a pass twice and times the second: caches hold nothing of it after another model's."""
    measure = timed(one)

    def measured() -> float:
        one()
        return measure()

    return measured
