"""Measure single decoding passes: against the memory bandwidth, and by rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench import processes
from bench.report import Bar, BenchSettings, Findings, count, run_parts
from headstart import hardware
from headstart.decoding.kernels.blocks import Quantize
from headstart.decoding.kernels.pack import multiplies_blocks, pack
from headstart.decoding.memory import weight_bytes
from headstart.decoding.policy.timing import DTYPES, PASSES_OF_A_BLOCK, Pass, interleave, random_model, timed
from headstart.errors import UsageError
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.model.transformer import Transformer

BANDWIDTH_BARS = {0: Bar(">=", 0.65), 100_000_000: Bar(">=", 0.75), 1_000_000_000: Bar(">=", 0.8)}
"""Bars by the least number of parameters: a small model does not wait for its weights alone."""
WINDOW_BAR = Bar("<=", 1.3)
"""Bar of a pass over eight rows, over one row."""

BLOCKS: Literal["blocks"] = "blocks"
"""The type of the weights of a GGUF file that stay as they are stored."""
BLOCKS_BANDWIDTH_BAR = Bar(">=", 0.7)
BLOCKS_ROWS_BARS = {"4": Bar("<=", 1.3), "8": Bar("<=", 1.7)}
"""Bars of passes over several rows, over one row, with weights in blocks."""

Part = Literal["bandwidth", "rows"]


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Passes of head 1 of a trained model, or of one with random weights."""

    parts: tuple[Part, ...] = ("bandwidth", "rows")
    """bandwidth: share of the memory bandwidth that a plain pass reaches; rows: passes by rows, also quantized."""
    model: Path | None = None
    """Model directory or file (None: random weights)."""
    size: ModelConfig = field(default_factory=lambda: PRESETS["100M"])
    """Model with random weights."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, each number in a process of its own."""
    dtype: Literal["auto", "bfloat16", "float32", "blocks"] = "auto"
    """Type of the weights (auto: the faster one here; blocks, as they are stored, for a GGUF file)."""
    quantize: tuple[Quantize, ...] = ("q4", "q8")
    """Quantized weights that the part rows times in addition."""
    device: str = "cpu"
    """cpu or cuda."""
    passes: int = 60
    """Rounds of single passes."""
    cached: int = 128
    """Cached positions."""
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Rows of the part rows."""
    stream_mebibytes: int = 512
    """Size of what is read to measure the memory bandwidth."""

    def config(self) -> ModelConfig:
        """Return the configuration of the model, with one head."""
        return replace(self.size if self.model is None else load_config(self.model), heads=1)

    def answers(self, function: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, Any]]:
        """Yield the answer of a measuring process for each number of threads, after the name of that number."""
        names = ("dtype", "device", "passes", "cached", "rows", "quantize", "stream_mebibytes")
        case = {name: getattr(self, name) for name in names}
        case |= {"model": None if self.model is None else str(self.model), "config": asdict(self.config())}
        for threads in self.threads:
            yield count(threads, "thread"), processes.call(function, case, threads=threads)


def run(settings: Settings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    if not settings.threads or 1 not in settings.rows or settings.passes < 1:
        raise UsageError("--threads is empty, --rows lacks 1, or --passes is below 1; give such numbers")
    file = settings.model is not None and settings.model.is_file()
    if settings.dtype == BLOCKS and not (file and multiplies_blocks(settings.device)):
        raise UsageError("--dtype blocks is for a GGUF file on a CPU with compiled kernels; take another dtype")
    if file and settings.dtype == "auto" and multiplies_blocks(settings.device):
        settings = replace(settings, dtype=BLOCKS)
    settings = replace(settings, dtype=hardware.dtype_on(settings.device, settings.dtype))
    if settings.device != "cpu" or settings.dtype == BLOCKS:
        settings = replace(settings, quantize=())
    parts = {"bandwidth": bandwidth, "rows": rows}
    return run_parts("passes", settings, {name: part for name, part in parts.items() if name in settings.parts})


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


def packed_pass_bytes(model: Transformer, span: int, cache_bytes: int) -> int:
    """Return the same for a model in blocks with one head, by the bytes of its packed weights."""
    config = model.config
    unread = 0 if config.tied else weight_bytes(model.trunk.embedding)
    cache = 2 * config.next_token_layers * config.key_value_heads * config.dim_per_head * span
    return weight_bytes(model) - unread + cache * cache_bytes


def model_of(case: Mapping[str, Any], dtype: str) -> Transformer:
    """Return the trained model of a case, or random weights. With the type "blocks", a GGUF file is as it is stored."""
    if case["model"] is None:
        return random_model(ModelConfig(**case["config"]), dtype, case["device"])
    if dtype == BLOCKS:
        return load_model(case["model"], device=case["device"], blocks=True)
    return load_model(case["model"], dtype=DTYPES[dtype], device=case["device"])


def bandwidth(settings: Settings) -> Findings:
    """Measure which share of the memory bandwidth a plain pass reaches."""
    found, size, config = Findings("bandwidth"), 0, settings.config()
    shares: dict[str, list[float]] = {}
    for label, answer in settings.answers(bandwidth_case):
        size, stream = answer["bytes"], answer["stream_gb_per_second"]
        shares[label] = [size / s / 1e9 / stream for s in answer["seconds"]]
        found.times(f"plain pass, {label}", answer["seconds"])
        found.measure(f"stream read, {label}", [stream], "GB/s")
        found.measure(f"bytes of a pass / its time / stream read, {label}", shares[label])
    best = max(shares, key=lambda label: statistics.median(shares[label]))
    bar = BANDWIDTH_BARS[max(least for least in BANDWIDTH_BARS if config.parameters()["total"] >= least)]
    bar = BLOCKS_BANDWIDTH_BAR if settings.dtype == BLOCKS else bar
    found.measure(f"the same at the best setting ({best})", shares[best], bar=bar)
    found.note(
        f"a plain pass reads {size:,} bytes: the weights on head 1's path with the unembedding, and the keys and "
        f"values of its span. Stream read: the best of 2 x 5 sums over {settings.stream_mebibytes} MiB of fp32 with as "
        "many threads."
    )
    return found


def bandwidth_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of plain passes, the bytes of one, and the stream bandwidth."""
    threads, size = torch.get_num_threads(), case["stream_mebibytes"]
    model = model_of(case, case["dtype"])
    plain = Pass(pack(model, rows=1), rows=1, length=case["cached"])
    # The bandwidth is a limit: the better of two measurements, before and after, is what passes are compared with.
    before = hardware.stream_bandwidth(threads, device=case["device"], mebibytes=size)
    seconds = interleave({"plain": timed(plain)}, case["passes"], warmup=5)["plain"]
    stream = max(before, hardware.stream_bandwidth(threads, device=case["device"], mebibytes=size))
    if case["dtype"] == BLOCKS:
        read = packed_pass_bytes(model, plain.plan.span, plain.state.cache.keys.element_size())
    else:
        weight, cached = (x.element_size() for x in (model.trunk.embedding.weight, plain.state.cache.keys))
        read = pass_bytes(model.config, plain.plan.span, weight, cached)
    return {
        "seconds": seconds,
        "bytes": read,
        "stream_gb_per_second": stream,
    }


def rows(settings: Settings) -> Findings:
    """Measure passes by rows, in the dtype and quantized."""
    found, dtype = Findings("rows"), settings.dtype
    for label, answer in settings.answers(rows_case):
        for kind, seconds in answer.items():
            for width, values in seconds.items():
                what = f"{kind}, {count(int(width), 'row')}, {label}"
                found.times(what, values)
                if kind != dtype:
                    found.ratio(f"{what} / {dtype}", values, answer[dtype][width], block=PASSES_OF_A_BLOCK)
                if width != "1":
                    bars = BLOCKS_ROWS_BARS if kind == BLOCKS else {"8": WINDOW_BAR} if kind == dtype else {}
                    found.ratio(f"{what} / 1 row", values, seconds["1"], bars.get(width), PASSES_OF_A_BLOCK)
    weights = settings.model or f"{settings.size.layers} layers of {settings.size.dim}, random weights"
    found.note(
        f"passes of head 1 without drafts at {settings.cached} cached positions, each after a pass of the same kind, "
        f"of {weights}; quantized: headstart/decoding/kernels."
    )
    return found


def rows_case(case: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of passes by kind of weights, and by rows."""
    variants: dict[str, Callable[[], float]] = {}
    kinds = {case["dtype"]: None, **{name: name for name in case["quantize"]}}
    for kind, quantize in kinds.items():
        model = pack(model_of(case, "float32" if quantize else kind), quantize=quantize)
        for width in case["rows"]:
            variants[f"{kind} {width}"] = _timed_again(Pass(model, rows=width, length=case["cached"]))
    seconds = interleave(variants, case["passes"], warmup=5)
    return {kind: {str(width): seconds[f"{kind} {width}"] for width in case["rows"]} for kind in kinds}


def _timed_again(one: Pass) -> Callable[[], float]:
    """Return a variant that runs a pass twice and times the second: caches hold nothing of it after another model's."""
    measure = timed(one)

    def measured() -> float:
        one()
        return measure()

    return measured
