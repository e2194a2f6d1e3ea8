"""What passes cost on their own: beside the memory bandwidth, by rows, with and without what drafting adds."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from bench import fresh_process
from bench.report import Bar, count, measurement
from bench.sizes import four_heads
from headstart.decoding.policy.timing import PASSES_OF_A_BLOCK, ratios
from headstart.model.config import ModelConfig

if TYPE_CHECKING:
    from bench.decode import DecodeSettings

BANDWIDTH_BARS = {0: Bar(">=", 0.65), 100_000_000: Bar(">=", 0.75), 1_000_000_000: Bar(">=", 0.8)}
"""By how many parameters a model has at least: a small one does not wait for its weights alone."""
WINDOW_BAR = Bar("<=", 1.3)
MERGED_BAR = Bar("<=", 1.05)


def case_of(settings: DecodeSettings, config: ModelConfig, **more: Any) -> dict[str, Any]:
    """What every measuring process is told."""
    return {
        "config": asdict(config),
        "dtype": settings.dtype,
        "device": settings.device,
        "passes": settings.passes,
        "repetitions": settings.repetitions,
        "length": settings.prompt_tokens + settings.new_tokens // 2,
        **more,
    }


def bandwidth(settings: DecodeSettings) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    config = replace(settings.sizes, heads=1)
    shares: dict[int, list[float]] = {}
    size = 0
    for threads in settings.threads:
        case = case_of(settings, config, stream_mebibytes=settings.stream_mebibytes)
        answer = fresh_process.call("bench.passes:bandwidth_case", case, threads=threads)
        size, stream = answer["bytes"], answer["stream_gb_per_second"]
        milliseconds = [1e3 * s for s in answer["seconds"]]
        shares[threads] = [size / s / 1e9 / stream for s in answer["seconds"]]
        rows.append(
            measurement("bandwidth", f"plain pass, {count(threads, 'thread')}", milliseconds, "ms", threads=threads)
        )
        rows.append(
            measurement("bandwidth", f"stream read, {count(threads, 'thread')}", [stream], "GB/s", threads=threads)
        )
        what = f"bytes of a pass / its time / stream read, {count(threads, 'thread')}"
        rows.append(measurement("bandwidth", what, shares[threads], threads=threads, bytes=size))
    best = max(rows[2::3], key=lambda row: row["median"])["threads"]
    what = f"the same at the best setting ({count(best, 'thread')})"
    parameters = config.parameters()["total"]
    bar = BANDWIDTH_BARS[max(least for least in BANDWIDTH_BARS if parameters >= least)]
    rows.append(measurement("bandwidth", what, shares[best], bar=bar, threads=best))
    return rows, (
        f"a plain pass reads {size:,} bytes: the weights on head 1's path with the unembedding, and the keys and "
        f"values of its span. Stream read: the best of 2 x 5 sums over {settings.stream_mebibytes} MiB of fp32 "
        "with as many threads."
    )


def window(settings: DecodeSettings) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    config, window = replace(settings.sizes, heads=1), settings.window
    for threads in settings.threads:
        case = case_of(settings, config, rows=window)
        answer = fresh_process.call("bench.passes:window_case", case, threads=threads)
        timings = []
        for name, seconds in answer.items():
            label = f"{window} rows" if name == "window" else name
            milliseconds = [1e3 * s for s in seconds]
            timings.append(
                measurement("window", f"{label}, {count(threads, 'thread')}", milliseconds, "ms", threads=threads)
            )
        faster = min(("one row", "one row, own layout"), key=lambda name: sorted(answer[name])[len(answer[name]) // 2])
        what = f"{window} rows / {faster}, {count(threads, 'thread')}"
        values = ratios(answer["window"], answer[faster], PASSES_OF_A_BLOCK)
        rows += [*timings, measurement("window", what, values, bar=WINDOW_BAR, threads=threads)]
    return rows, (
        f"trunk, head 1 and unembedding on {window} rows against one row of the same {config.layers} layers, batch 1, "
        f"at {settings.prompt_tokens + settings.new_tokens // 2} cached positions. The faster of two one-row passes is "
        f"the denominator: weights laid out for {window} rows, and for one (own layout)."
    )


def merged(settings: DecodeSettings) -> tuple[list[dict[str, Any]], str]:
    config, threads = four_heads(settings.sizes), settings.threads[-1]
    answer = fresh_process.call("bench.passes:merged_case", case_of(settings, config), threads=threads)
    expected = answer["merged bytes"] / answer["plain bytes"]
    over = [ratio / expected for ratio in ratios(answer["merged"], answer["plain"], PASSES_OF_A_BLOCK)]
    rows = [
        measurement("merged", f"{name} pass", [1e3 * s for s in answer[name]], "ms", bytes=answer[f"{name} bytes"])
        for name in ("plain", "merged")
    ]
    rows.append(measurement("merged", "merged / plain pass, over the same ratio of bytes", over, bar=MERGED_BAR))
    return rows, (
        f"four parallel transformer heads, {config.parameters()['total']:,} parameters, batch 1: a pass over four rows "
        f"that verifies and drafts with all heads reads {expected:.3f} times the bytes of a plain pass over one row."
    )


def deferred(settings: DecodeSettings) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    for threads in settings.threads:
        for n in settings.deferred_heads:
            case = case_of(settings, replace(settings.sizes, heads=n), batches=list(settings.deferred_batches))
            answer = fresh_process.call("bench.passes:deferred_case", case, threads=threads)
            for batch in settings.deferred_batches:
                fast, full = answer[f"deferred {batch}"], answer[f"all {batch}"]
                where = f"K = n = {n}, batch {batch}, {count(threads, 'thread')}"
                details: dict[str, Any] = {"threads": threads, "heads": n, "batch": batch}
                rows += [
                    measurement("deferred", f"accepted row, {where}", [1e3 * s for s in fast], "ms", **details),
                    measurement("deferred", f"all rows, {where}", [1e3 * s for s in full], "ms", **details),
                    measurement(
                        "deferred",
                        f"accepted row / all rows, {where}",
                        ratios(fast, full, PASSES_OF_A_BLOCK),
                        **details,
                    ),
                ]
    return rows, "a whole pass whose drafting heads (transformer, parallel) run on the accepted row, against all rows."
