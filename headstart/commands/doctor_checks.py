"""Check this machine, and that a model's speculation equals plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from headstart import hardware
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import decoding_dtype, multiplies_blocks, pack
from headstart.decoding.kernels.torch_backend import PackedLinear, can_pack
from headstart.decoding.memory import format_bytes, weight_bytes
from headstart.decoding.policy import timing
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.formats.gguf_file import GgufFile
from headstart.formats.heads import StoredHeads
from headstart.formats.hub import local_path
from headstart.formats.huggingface import load_peer
from headstart.formats.registry import load_config, load_model, load_model_tokenizer, read_heads
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

PROMPTS = ("def add(a, b):\n    return", "The history of the city begins")
NEW_TOKENS = 48
DECODE_SECONDS = 8.0
"""Approximate seconds of the decoding check; large models get fewer tokens."""
COMPARED_PARAMETERS = 300_000_000
"""The size above which models are compared with transformers on `FEW` tokens only, because fp32 takes long."""
FEW = 4


@dataclass(frozen=True)
class Sizes:
    """The sizes of the timed work."""

    product: int = 2048
    """Width of the weights that a window goes through."""
    product_seconds: float = 0.3
    """Seconds of timing products in each dtype."""
    stream_mebibytes: int = 512
    decoder: ModelConfig = field(
        default_factory=lambda: ModelConfig(vocab_size=8192, dim=512, layers=6, attention_heads=8)
    )
    passes: int = 20


@dataclass
class Finding:
    """The result of one check."""

    name: str
    status: Literal["ok", "warn", "fail"]
    sentence: str
    values: dict[str, Any]


def diagnose(
    model_path: str | Path | None = None, heads: str | Path | None = None, *, sizes: Sizes | None = None
) -> dict[str, Any]:
    """Check the machine and, if given, a model and a directory of heads for it.

    The result has "machine", "findings" (`Finding` as mappings) and "verdict", the worst status. Raises UsageError if
    `model_path` is not a readable model, and for heads of another one.
    """
    sizes = sizes or Sizes()
    config = None if model_path is None else load_config(model_path, heads)  # fails before anything is timed
    described = hardware.describe()
    findings = [
        _check_processor(described),
        _check_kernels(),
        _check_products(sizes),
        _check_windows(sizes),
        _check_threads(sizes),
        _check_bandwidth(sizes),
    ]
    if torch.cuda.is_available():
        findings.append(_check_gpu(sizes))
    if model_path is not None and config is not None:
        speeds = next(each for each in reversed(findings) if "gb_per_second" in each.values).values["gb_per_second"]
        speed = max(speeds.values()) if isinstance(speeds, dict) else speeds
        findings += _check_model(local_path(model_path), config, heads, speed)
    worst = max((f.status for f in findings), key=("ok", "warn", "fail").index)
    return {
        "machine": described,
        "model": None if model_path is None else str(model_path),
        "findings": [vars(finding) for finding in findings],
        "verdict": worst,
    }


def _check_processor(described: dict[str, Any]) -> Finding:
    sets, load = described["instruction_sets"], described["load_average"]
    busy = load is not None and load[0] > 0.5 * described["cores"]
    sentence = f"{described['cpu']}, {described['cores']} cores, {', '.join(sets) or 'no known instruction sets'}"
    if busy:
        sentence += f"; load average {load[0]:.1f}: other programs are running, so the times below are too high"
    return Finding("processor", "warn" if busy else "ok", sentence + ".", {"load_average": load})


def _check_kernels() -> Finding:
    """Report which products decoding uses, in the dtype that this processor decodes best in."""
    name = hardware.dtype_on("cpu")
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    if cpu.kernels(dtype) is not None:
        needs = "AVX-512 BF16" if dtype == torch.bfloat16 else "AVX2"
        return Finding("kernels", "ok", f"{name} decoding uses the compiled kernels ({needs}).", {"compiled": True})
    if not cpu.cpu_has_kernels(dtype):
        sentence = f"{name} decoding uses oneDNN's packed products; there are no compiled kernels for this processor."
        return Finding("kernels", "ok", sentence, {"compiled": False})
    sentence = (
        "the compiled kernels for this processor are missing: install a C compiler (cc) and set XDG_CACHE_HOME to a "
        "writable folder, and decoding is faster."
    )
    return Finding("kernels", "warn", sentence, {"compiled": False})


def _check_products(sizes: Sizes) -> Finding:
    """Time matrix products in fp32 and bf16, which bound training and prompts."""
    threads = torch.get_num_threads()
    rates = {
        dtype: hardware.matmul_peak(threads, dtype, seconds=sizes.product_seconds) / 1e9
        for dtype in ("float32", "bfloat16")
    }
    faster, used = max(rates, key=lambda dtype: rates[dtype]), hardware.dtype_on("cpu")
    sentence = f"{rates['float32']:,.0f} GFLOP/s in fp32, {rates['bfloat16']:,.1f} in bf16: "
    if faster == used:
        sentence += f"{faster} is the fast path and the default."
    else:
        sentence += f"{faster} is the fast path here, but {used} is the default: give dtype {faster}."
    return Finding("matrix products", "ok" if faster == used else "warn", sentence, {"gflops": rates})


def _check_windows(sizes: Sizes) -> Finding:
    """Time a packed linear map on 1 and 8 rows: the cost of a window over that of a single token."""
    n, copies = sizes.product, 4
    variants = {}
    for dtype in (torch.float32, torch.bfloat16):
        if not can_pack(torch.device("cpu"), dtype):
            continue
        # Several matrices in turn: a single one would stay in the cache, where rows cost more than reading.
        layers = [PackedLinear(torch.randn(4 * n, n).to(dtype), None, 8) for _ in range(copies)]
        for rows in (1, 8):
            run = partial(_run_all, layers, torch.randn(rows, n).to(dtype))
            variants[f"{str(dtype).removeprefix('torch.')} {rows}"] = timing.timed(run)
    best = {name: 1e3 * min(values) / copies for name, values in timing.interleave(variants, 5).items()}
    milliseconds = {
        name: {rows: best[f"{name} {rows}"] for rows in (1, 8)} for name in dict.fromkeys(v.split()[0] for v in best)
    }
    costs = {name: times[8] / times[1] for name, times in milliseconds.items()}
    if hardware.dtype_on("cpu") not in costs:
        sentence = (
            f"oneDNN packs no {hardware.dtype_on('cpu')} weights here: decoding uses plain products, which are slower."
        )
        return Finding("windows", "warn", sentence, {"cost_of_8_rows": costs, "milliseconds": milliseconds})
    fastest = min(milliseconds, key=lambda name: milliseconds[name][8])
    each = " and ".join(f"{cost:.2f} of one row in {name}" for name, cost in costs.items())
    sentence = f"8 rows cost {each} (packed {4 * n} x {n}); the faster for 8 rows is {fastest}."
    values = {"cost_of_8_rows": costs, "milliseconds": milliseconds, "fast_path": fastest}
    return Finding("windows", "ok" if costs[fastest] <= 2 else "warn", sentence, values)


def _run_all(layers: Sequence[PackedLinear], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


def _check_threads(sizes: Sizes) -> Finding:
    """Time a small decoding pass with 1, 2 and all threads: next to other programs more are much slower."""
    choices = sorted({1, min(2, hardware.cores()), hardware.cores()})
    before = torch.get_num_threads()
    small = timing.Pass(pack(timing.random_model(sizes.decoder, hardware.dtype_on("cpu"), "cpu")), rows=1)
    times: dict[int, list[float]] = {}
    try:
        for threads in choices:  # one number after the other: changing it costs more than a pass
            torch.set_num_threads(threads)
            times[threads] = _time_passes(small, sizes.passes)
    finally:
        torch.set_num_threads(before)
    medians = {threads: 1e3 * statistics.median(values) for threads, values in times.items()}
    worst = {threads: 1e3 * sorted(values)[int(0.9 * len(values))] for threads, values in times.items()}
    best = min(medians, key=lambda threads: medians[threads])
    # A tenth is not worth the risk: several threads wait for the slowest at every product.
    if medians[best] > 0.9 * medians[1] or worst[best] > worst[1]:
        why = "more threads gain less than a tenth, or wait for other programs"
        best = 1
    else:
        why = f"{medians[1] / medians[best]:.1f} times as fast as one"
    timings = ", ".join(f"{medians[t]:.2f} ms ({worst[t]:.2f} at the 90th percentile) with {t}" for t in choices)
    if len(choices) == 1:
        why = "there is one core"
    # The number that torch uses now, if it was timed.
    slow = before in medians and medians[before] > 1.25 * medians[best]
    sentence = f"a small pass takes {timings}: decode with {best} ({why}); OMP_NUM_THREADS={best} does it."
    return Finding(
        "threads",
        "warn" if slow else "ok",
        sentence,
        {"median_ms": medians, "p90_ms": worst, "use": best, "now": before},
    )


def _time_passes(small: timing.Pass, passes: int) -> list[float]:
    """Return the seconds of up to `passes` passes, or of fewer if they are slow, as with threads that wait."""
    measure = timing.timed(small)
    times: list[float] = []
    warmup, deadline = 2, time.perf_counter() + 2.0
    while len(times) < passes + warmup and (len(times) < warmup + 3 or time.perf_counter() < deadline):
        times.append(measure())
    return times[warmup:]


def _check_bandwidth(sizes: Sizes) -> Finding:
    speeds = {
        threads: hardware.stream_bandwidth(threads, mebibytes=sizes.stream_mebibytes, repetitions=3)
        for threads in sorted({1, hardware.cores()})
    }
    text = " and ".join(f"{speed:.0f} GB/s with {threads}" for threads, speed in speeds.items())
    best, dtype = max(speeds.values()), hardware.dtype_on("cpu")
    size = 0.1 * timing.DTYPES[dtype].itemsize
    sentence = (
        f"memory is read at {text} {'thread' if len(speeds) == 1 else 'threads'}: the weights of a 100M model in "
        f"{dtype} ({size:.1f} GB) allow at most {best / size:,.0f} passes a second."
    )
    return Finding("bandwidth", "ok", sentence, {"gb_per_second": speeds})


def _check_gpu(sizes: Sizes) -> Finding:
    speed = hardware.stream_bandwidth(1, device="cuda", mebibytes=sizes.stream_mebibytes, repetitions=3)
    supported = torch.cuda.is_bf16_supported()
    name = torch.cuda.get_device_name()
    sentence = f"{name} reads {speed:,.0f} GB/s and {'has' if supported else 'lacks'} bf16."
    return Finding("gpu", "ok" if supported else "warn", sentence, {"name": name, "gb_per_second": speed})


def _check_model(path: Path, config: ModelConfig, heads: str | Path | None, speed: float) -> list[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_model_tokenizer(path)
    prompts = _make_prompts(tokenizer, config)
    findings = [compare_with_transformers(path, config, prompts[0])]
    blocks = multiplies_blocks(device) and path.is_file()
    if heads is not None:
        findings.append(_check_base(load_model(path, heads=heads), path, heads))
    loaded = load_model(path, device=device, heads=heads, blocks=blocks)
    model = pack(loaded.to(decoding_dtype(loaded)))
    findings.append(_check_weights(model, path, speed))
    tokens = _count_affordable_tokens(model, prompts)
    for temperature in (0.0, 0.8):
        findings.append(_check_speculation(model, prompts, tokens, temperature))
    return findings


def _check_weights(model: Transformer, path: Path, speed: float) -> Finding:
    """Report the form and the bytes of the weights, and the passes that reading them at `speed` GB/s allows."""
    size, form = weight_bytes(model), backend_of(model).form
    stored = "blocks, as the file stores them" if form == "blocks" else str(model.dtype).removeprefix("torch.")
    sentence = (
        f"{format_bytes(size)} in {stored}; reading them all allows at most {1e9 * speed / size:,.0f} passes a second."
    )
    dequantized = path.is_file() and form is None and GgufFile(path).quantized
    if dequantized:
        sentence += " They are dequantized: there are no kernels for blocks here, or the embedding has no blocks."
    values = {"bytes": size, "form": form or str(model.dtype).removeprefix("torch.")}
    return Finding("weights", "warn" if dequantized else "ok", sentence, values)


def _check_base(model: Transformer, path: Path, heads: str | Path) -> Finding:
    """Compare all values of a model with those that its heads were trained on; loading compares samples."""
    stored = read_heads(heads)
    try:
        copy = stored.compare_base(model, path, all_values=True)
    except UsageError as error:
        return Finding("base of the heads", "fail", f"{error}.", {"copy": None})
    if copy is None or not isinstance(stored, StoredHeads):
        sentence = "the model has the sizes that the heads need; published heads do not say more about it."
        return Finding("base of the heads", "ok", sentence, {"copy": None})
    found = {
        "same": f"the model is the one that the heads were trained on (SHA-256 {stored.identity.sha256[:12]}...).",
        "rounded": "the model is the one that the heads were trained on, rounded differently.",
        "quantized": "the model is the one that the heads were trained on, quantized differently.",
    }
    return Finding("base of the heads", "ok", found[copy], {"copy": copy, "sha256": stored.identity.sha256})


def _make_prompts(tokenizer: Tokenizer | None, config: ModelConfig) -> list[tuple[int, ...]]:
    # A context may be tiny; a prompt takes at most a quarter of it.
    longest = max(1, config.context // 4)
    if tokenizer is None:
        return [tuple((7 * i + start) % config.vocab_size for i in range(min(8, longest))) for start in (1, 2)]
    return [tuple(tokenizer.encode(text)[:longest]) or (tokenizer.end_id,) for text in PROMPTS]


def _count_affordable_tokens(model: Transformer, prompts: Sequence[tuple[int, ...]]) -> int:
    room = max(1, model.config.context - max(map(len, prompts)))
    request = Request(prompts[0], min(4, room), heads=1)
    timing.decode(model, [request])  # the first run is slow for every model
    began = time.perf_counter()
    timing.decode(model, [request])
    seconds = (time.perf_counter() - began) / 4
    outputs = 2 * 2 * len(prompts)  # greedy and sampled, plain and with all heads
    return max(1, min(NEW_TOKENS, room, int(DECODE_SECONDS / outputs / seconds)))


def _check_speculation(
    model: Transformer, prompts: Sequence[tuple[int, ...]], tokens: int, temperature: float
) -> Finding:
    """Compare decoding with all heads that draft and with head 1 alone, both exact: the tokens must be identical."""
    n = model.config.drafting_heads

    def run(heads: int) -> timing.Decoded:
        requests = [Request(p, tokens, Sampling(temperature, seed=seed), heads) for seed, p in enumerate(prompts)]
        return timing.decode(model, requests, batch=len(prompts))

    kind = "greedy" if temperature == 0 else f"temperature {temperature}"
    name = f"speculation, {kind}"
    plain, full = run(1), run(n)
    difference = timing.first_difference(plain.tokens, full.tokens)
    values = {
        "identical": difference is None,
        "first_difference": difference,
        "tokens": tokens,
        "tokens_per_pass": full.stats.tokens_per_pass,
        "acceptance": full.stats.acceptance,
    }
    if difference is not None:
        output, at = difference
        sentence = (
            f"with {n} heads output {output + 1} differs from plain decoding at token {at + 1}: decoding is not "
            "lossless here; please report this with the lines above."
        )
        return Finding(name, "fail", sentence, values)
    if n == 1:
        return Finding(name, "ok", "the model has one head, so decoding is plain.", values)
    shares = " ".join(f"{share:.2f}" for share in full.stats.acceptance)
    sentence = (
        f"{len(prompts)} x {tokens} tokens with {n} heads are those of plain decoding; "
        f"{full.stats.tokens_per_pass:.2f} tokens per pass, acceptance of heads 2..{n}: {shares}."
    )
    return Finding(name, "ok", sentence, values)


def compare_with_transformers(
    path: Path, config: ModelConfig, prompt: tuple[int, ...], most_parameters: int = COMPARED_PARAMETERS
) -> Finding:
    """Compare the next tokens with those of transformers, in fp32, where rounding decides only exact ties."""
    name = "transformers"

    def left_out(why: str, status: Literal["ok", "warn"] = "ok") -> Finding:
        return Finding(name, status, f"not compared: {why}.", {"compared": False})

    if path.is_file():
        return left_out("transformers reads model directories, and this is a GGUF file")
    if not config.kind.plain_decoder:
        return left_out("linear heads wired anticausally are no plain decoder, only headstart reads them")
    parameters, free = config.parameters()["total"], hardware.available_memory()
    if parameters > most_parameters:
        prompt = prompt[:FEW]
    if free is not None and 5 * parameters > free:  # a copy in fp32, and the memory of a pass
        return left_out(
            f"a copy in fp32 takes {4 * parameters / 2**30:.1f} GiB, and {free / 2**30:.1f} are free", "warn"
        )
    try:
        peer = load_peer(path, torch.float32)
    except UsageError as error:
        return left_out(str(error).split(";")[0], "warn")
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        other = peer(tokens).logits[0].float()
        del peer  # one copy at a time
        own = load_model(path, dtype=torch.float32)(tokens)[0]
    gap = float((own - other).abs().max())
    disagreeing = int((own.argmax(-1) != other.argmax(-1)).sum())
    values = {"compared": True, "largest_logit_difference": gap, "disagreeing_positions": disagreeing}
    # A tie may fall either way; logits that differ by no more than rounding make a tie.
    same = disagreeing == 0 or gap <= 1e-4 * max(1.0, float(own.abs().max()))
    sentence = (
        f"the same next token at {len(prompt) - disagreeing} of {len(prompt)} positions, "
        f"logits within {gap:.1e} (fp32)."
    )
    return Finding(name, "ok" if same else "fail", sentence, values)
