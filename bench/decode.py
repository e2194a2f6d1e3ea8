"""Decoding: against transformers, against the memory bandwidth, and several tokens per pass against one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bench import decode_passes, fresh_process, peer_speed, report, row_speed, speedup, sweep
from bench.report import Bar, count, measurement
from bench.sizes import Size
from headstart.console import say
from headstart.decoding.kernels.int8 import Quantize
from headstart.decoding.policy.timing import ratios
from headstart.errors import UsageError
from headstart.evaluation.texts import load_prompts
from headstart.formats.bundled import boxed_model
from headstart.formats.huggingface import load_config
from headstart.hardware import dtype_on
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS

PEER_BAR = Bar(">=", 1.5)
EFFICIENCY_BAR = Bar(">=", 0.88)

Part = Literal["plain", "bandwidth", "window", "merged", "deferred", "sweep", "peers", "rows", "model"]
Peer = Literal["transformers", "llama.cpp", "vllm"]
QUICK: dict[str, Any] = {
    "sizes": PRESETS["1M"],
    "model_sizes": ("12M",),
    "sweep_sizes": ("12M",),
    "sweep_batches": (1, 4),
    "sweep_lengths": ((16, 32),),
    "sweep_tune_seconds": 0.5,
    "peer_batches": (1,),
    "compile_peers": False,
    "repetitions": 2,
    "passes": 6,
    "prompt_tokens": 16,
    "new_tokens": 32,
    "deferred_heads": (4,),
    "stream_mebibytes": 64,
    "prompt_count": 2,
}
"""What `quick` makes of the settings."""


@dataclass(frozen=True)
class DecodeSettings:
    """Speed of decoding. The part "model" takes a trained model; the others use random weights."""

    parts: tuple[Part, ...] = ("plain", "bandwidth", "window", "deferred", "sweep", "peers")
    """plain: against transformers; bandwidth: share of the memory bandwidth; window: 8 rows against 1; merged:
    verifying and drafting in one pass, against the bytes it reads; deferred: heads on one row against all rows; sweep:
    heads, batch, lengths, temperature at the paper's acceptance; peers: against transformers, llama.cpp and vLLM; rows:
    passes by rows, also in int8, of --model if given; model: a trained model for K = 1, 2, 4, 8 (runs whenever --model
    is given)."""
    quick: bool = False
    """Small models, few and short rounds, whatever else is asked for: to see in minutes that all of it runs."""
    sizes: ModelConfig = field(default_factory=lambda: PRESETS["100M"])
    """The model with random weights; its heads are set by each part."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, each number in a process of its own; the parts "model", "sweep" and "peers" use the last."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights (auto: the faster one here)."""
    quantize: Quantize | None = None
    """int8: the part "model" decodes in int8, whatever the dtype."""
    device: str = "cpu"
    """cpu or cuda."""
    repetitions: int = 5
    """Rounds of whole generations (parts plain and model)."""
    passes: int = 60
    """Rounds of single passes (parts bandwidth, window, deferred and rows)."""
    prompt_tokens: int = 64
    """Length of a prompt."""
    new_tokens: int = 128
    """Tokens generated after it."""
    window: int = 8
    """Rows of the part "window"."""
    deferred_heads: tuple[int, ...] = (4, 8)
    """n = K of the part "deferred"."""
    deferred_batches: tuple[int, ...] = (1, 4)
    """Its batch sizes."""
    model_sizes: tuple[Size, ...] = ("12M", "105M", "235M")
    """Models with random weights of the part "peers"; a trained one that --model names comes beside them."""
    peers: tuple[Peer, ...] = ("transformers", "llama.cpp", "vllm")
    """Whom to compare with. One that is not installed is told in the table."""
    install_peers: bool = False
    """Make environments for peers that are not installed here, in the user's cache folder: llama.cpp is compiled, vLLM
    takes 2.5 GB."""
    compile_peers: bool = True
    """Also transformers compiled over a static cache, and vLLM compiled: minutes each."""
    peer_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the part "peers"."""
    sweep_sizes: tuple[Size, ...] = ("105M",)
    """Models with random weights of the part "sweep"."""
    sweep_kinds: tuple[Literal["tokens", "bytes"], ...] = ("tokens", "bytes")
    """Heads of the part "sweep": four transformer heads (Table S2), eight byte heads (Table S3)."""
    sweep_batches: tuple[int, ...] = (1, 4, 16, 64)
    """Its batch sizes. Of each of its settings the first is kept while another one changes."""
    sweep_lengths: tuple[tuple[int, int], ...] = ((64, 64), (512, 64), (64, 256))
    """Its lengths: of the prompt, and of what is written."""
    sweep_tune_seconds: float = 5.0
    """How long its policy measures what passes cost, at each batch size."""
    stream_mebibytes: int = 512
    """What is read to measure the memory bandwidth."""
    model: Path | None = None
    """Directory of a trained model (None: with the part "model", the model in the box)."""
    prompts: Path | None = None
    """Its prompts: a line each, or .jsonl with "prompt" or "text" (None: those in its directory, or pieces of held-out
    documents of its run)."""
    data: Path | None = None
    """Folder of prepared tokens to take held-out documents from (None: that of the model's run)."""
    prompt_count: int = 8
    """How many prompts."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """K, the numbers of heads to decode with; those that the model does not have are left out."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """Of the parts "model" and "sweep"; 0: greedy."""
    batch: int = 1
    """Prompts decoded at once."""
    out: Path = report.RESULTS
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""


def run(settings: DecodeSettings) -> dict[str, Any]:
    """Runs the parts asked for; see `report.result` for the shape of what comes back."""
    if "model" in settings.parts and settings.model is None:
        settings = replace(settings, model=boxed_model())
    if 1 not in settings.heads:
        raise UsageError("--heads must hold 1: plain decoding is what the others are compared with")
    if settings.quick:
        settings = replace(settings, **QUICK)
    for name in ("peer_batches", "sweep_batches", "sweep_lengths", "temperatures"):
        if not getattr(settings, name):
            raise UsageError(f"--{name.replace('_', '-')} names nothing; name one or more")
    settings = replace(settings, dtype=dtype_on(settings.device, settings.dtype))
    alone = decode_passes
    runners = {
        "plain": _plain,
        "bandwidth": alone.bandwidth,
        "window": alone.window,
        "merged": alone.merged,
        "deferred": alone.deferred,
    }
    measurements: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    notes: list[str] = []
    for part, runner in runners.items():
        if part in settings.parts:
            rows, note = runner(settings)
            measurements += rows
            notes.append(f"{part}: {note}")
    whole = {"sweep": _sweep, "peers": _peers, "rows": _rows}
    runs = [runner for part, runner in whole.items() if part in settings.parts]
    for runner_with_tables in [*runs, *([_model] if settings.model is not None else [])]:
        rows, more_tables, more_notes = runner_with_tables(settings)
        measurements += rows
        tables += more_tables
        notes += more_notes
    for row in measurements:
        say(f"{row['part']}: {row['what']}: {row['median']:.4g} {row['unit']}".rstrip())
    return report.result("decode", settings, measurements, notes, tables)


def _plain(settings: DecodeSettings) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]] = []
    agreement: list[int] = []
    config = replace(settings.sizes, heads=1)
    for threads in settings.threads:
        case = decode_passes.case_of(
            settings, config, prompt_tokens=settings.prompt_tokens, new_tokens=settings.new_tokens
        )
        answer = fresh_process.call("bench.transformers_peer:case", case, threads=threads)
        speeds = answer["tokens_per_second"]
        agreement.append(answer["same_tokens_at_start"])
        for name, values in speeds.items():
            rows.append(
                measurement("plain", f"{name}, {count(threads, 'thread')}", values, "tokens/s", threads=threads)
            )
        values = ratios(speeds["headstart"], speeds["transformers"])
        what = f"headstart / transformers, {count(threads, 'thread')}"
        rows.append(measurement("plain", what, values, bar=PEER_BAR, threads=threads))
    return rows, (
        f"one stream, batch 1, greedy, {config.parameters()['total']:,} parameters with random weights, n = 1, the "
        f"same model directory for both; {settings.prompt_tokens} prompt and {settings.new_tokens} new tokens, timed "
        "from the first new token to the last (the prompt is not counted). transformers: LlamaForCausalLM.generate, "
        f"use_cache, its default attention. The first {' and '.join(map(str, agreement))} tokens were the same (random "
        "weights have near ties, which rounding decides)."
    )


def _sweep(settings: DecodeSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    return sweep.run(
        settings.sweep_sizes,
        kinds=settings.sweep_kinds,
        at=sweep.points(settings.sweep_batches, settings.sweep_lengths, settings.temperatures),
        threads=settings.threads[-1],
        dtype=settings.dtype,
        device=settings.device,
        repetitions=settings.repetitions,
        tune_seconds=settings.sweep_tune_seconds,
    )


def _rows(settings: DecodeSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    at = settings.prompt_tokens + settings.new_tokens // 2
    return row_speed.run(settings.model, settings.sizes, settings.threads, settings.dtype, settings.passes, at)


def _peers(settings: DecodeSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    if settings.device != "cpu":
        raise UsageError(f'--device {settings.device}: the part "peers" runs on a CPU; name the other --parts')
    trained = None
    if settings.model is not None:
        trained = settings.model, [list(prompt) for prompt in _prompts(settings)]
    return peer_speed.run(
        settings.model_sizes,
        trained,
        peers=settings.peers,
        install=settings.install_peers,
        batches=settings.peer_batches,
        threads=settings.threads[-1],
        dtype=settings.dtype,
        repetitions=settings.repetitions,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        compiled=settings.compile_peers,
    )


def _prompts(settings: DecodeSettings) -> list[tuple[int, ...]]:
    assert settings.model is not None
    return load_prompts(
        settings.model,
        prompts=settings.prompts,
        data=settings.data,
        count=settings.prompt_count,
        tokens=settings.prompt_tokens,
        room=settings.new_tokens,
    )


def _model(settings: DecodeSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    assert settings.model is not None
    config = load_config(settings.model)
    threads = settings.threads[-1]
    prompts = _prompts(settings)
    rows: list[dict[str, Any]] = []
    tables = []
    ks = sorted(k for k in settings.heads if k <= config.heads)
    for temperature in settings.temperatures:
        case = decode_passes.case_of(
            settings,
            config,
            model=str(settings.model),
            prompts=prompts,
            new_tokens=settings.new_tokens,
            heads=ks,
            temperature=temperature,
            batch=settings.batch,
            quantize=settings.quantize,
        )
        answer = fresh_process.call("bench.speedup:case", case, threads=threads)
        name = "greedy" if temperature == 0 else f"temperature {temperature}"
        speeds, per_pass = answer["tokens_per_second"], answer["tokens_per_pass"]
        plain = speeds[speedup.FASTEST_PLAIN]
        what = f"{name}, plain (K = 1, exact=False)"
        rows.append(measurement("model", what, plain, "tokens/s", tokens_per_pass=per_pass[speedup.FASTEST_PLAIN]))
        lines: list[list[object]] = [[what, rows[-1]["median"], 1.0, None, 1.0, 1.0, "", "", "1.00"]]
        names = [str(k) for k in ks] + [speedup.POLICY] * (speedup.POLICY in speeds)
        for k in names:
            label = k if k == speedup.POLICY else f"K = {k}"
            speed = measurement("model", f"{name}, {label}", speeds[k], "tokens/s", tokens_per_pass=per_pass[k])
            over_plain = measurement("model", f"{name}, {label} / plain", ratios(speeds[k], plain))
            over_exact = measurement("model", f"{name}, {label} / K = 1", ratios(speeds[k], speeds["1"]))
            acceptance, fed = answer["acceptance"][k], answer["rows_per_pass"][k]
            rows += [speed | {"acceptance": acceptance, "rows_per_pass": fed}, over_plain, over_exact]
            gain = over_plain["median"]
            lines.append(
                [
                    label,
                    speed["median"],
                    gain,
                    over_exact["median"],
                    per_pass[k],
                    gain / per_pass[k],
                    " / ".join(f"{x:.2f}" for x in speedup.PAPER.get(int(k) if k.isdigit() else 0, ())),
                    " ".join(f"{share:.2f}" for share in acceptance),
                    f"{fed:.2f}",
                ]
            )
        if temperature == 0 and ks[-1] > 1:
            for k in [str(ks[-1]), *names[len(ks) :]]:
                kept = [gain / per_pass[k] for gain in ratios(speeds[k], speeds["1"])]
                label = k if k == speedup.POLICY else f"K = {k}"
                what = f"{name}, {label} / K = 1 over its tokens per pass"
                rows.append(measurement("model", what, kept, bar=EFFICIENCY_BAR))
        differing = [k for k in names if answer["first_difference"][k] is not None]
        # A count with a bar, so that a lossy run shows as missed and not as a remark.
        bar = Bar("<=", 0)
        what = f"{name}: numbers of heads whose output differs from K = 1"
        rows.append(measurement("model", what, [len(differing)], bar=bar, differing=differing))
        headers = ["", "tokens/s", "speed-up over plain", "over K = 1, exact", "tokens per pass", "efficiency"]
        tables.append(
            report.table(
                f"{settings.model}, {name}; {answer['repeated_8_grams']:.0%} of the 8-grams repeat themselves",
                [*headers, "paper, n = 8", "acceptance of heads 2..K", "rows fed"],
                lines,
            )
        )
    note = (
        f"model: n = {config.heads} {config.head_kind} heads, {config.wiring}, {settings.quantize or settings.dtype}, "
        f"{count(threads, 'thread')}; {len(prompts)} prompts of at most {settings.prompt_tokens} tokens, "
        f"{settings.new_tokens} new tokens, batch {settings.batch}; prompts are not timed, end tokens end no text. "
        "Efficiency = speed-up over plain / tokens per pass. Policy: rows of each pass chosen by what `headstart tune` "
        "measured. Paper, n = 8: Table S3, speed-up / bytes per forward of a 7B byte-level code model on GPUs."
    )
    return rows, tables, [note]
