"""`headstart tune`: measures how sure drafts are right and what a pass costs here, for decoding to choose by."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

import headstart
from headstart.benchmarks.passes import pass_costs
from headstart.benchmarks.speedup import load_prompts
from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation, Request
from headstart.decoding.int8 import Quantize
from headstart.decoding.packing import is_row_exact
from headstart.decoding.policy import AcceptanceTable, Tuning
from headstart.decoding.sampling import Sampling
from headstart.errors import UsageError
from headstart.evaluation.texts import sizes
from headstart.model.transformer import Transformer
from headstart.storage.boxed import model_directory
from headstart.storage.tuning_file import write_tuning
from headstart.terminal import Progress, format_table, say


@dataclass(frozen=True)
class TuneSettings:
    """Measure what drafts are worth and what a pass costs here, for decoding to choose by."""

    model: Positional[str | None] = None
    """A model directory (None: the model in the box). `tuning.json` is written into it."""
    prompts: Path | None = None
    """.jsonl with "prompt" or "text", or text with a prompt a line (None: the prompts in the model directory, or pieces
    of held-out documents of its run)."""
    data: Path | None = None
    """Folder of prepared tokens to take held-out documents from (None: that of the model's run)."""
    prompt_count: int = 32
    """At most this many prompts."""
    prompt_tokens: int | None = None
    """At most this many tokens of each (None: 128, or half the model's context)."""
    new_tokens: int | None = None
    """Written after each, greedily and sampled (None: 128, or what the prompt leaves of the context)."""
    temperature: float = 0.8
    """Of the sampled half."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes to time passes at; others are judged by the nearest two."""
    seconds: float = 4.0
    """Spent on timing passes at each batch size."""
    dtype: str | None = None
    """bfloat16 or float32 (None: as `headstart generate` would take)."""
    quantize: Quantize | None = None
    """int8: of the model as `headstart generate --quantize int8` decodes it; its costs are kept beside the others."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: as torch chooses). What is measured holds for this number alone."""


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Measures, writes `tuning.json`, and tells what was found."""
    path = model_directory(settings.model)
    for name in ("prompt_count", "prompt_tokens", "new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if settings.seconds <= 0:
        raise UsageError(f"--seconds is {settings.seconds}; passes need some time to be timed in, more than 0")
    batches = tuple(sorted(set(settings.batches)))
    if not batches or batches[0] < 1:
        raise UsageError(f"--batches {' '.join(map(str, batches))}: name batch sizes of at least 1")
    if settings.temperature <= 0:
        raise UsageError(f"--temperature is {settings.temperature}; the greedy half is measured anyway, take above 0")
    language_model = headstart.load(path, dtype=settings.dtype, device=settings.device, quantize=settings.quantize)
    model = language_model.transformer
    if model.config.heads == 1:
        raise UsageError(f"{path}: has one head, so there are no drafts to tune")
    length, new = sizes(settings.prompt_tokens, settings.new_tokens, model.config.context, most=128)
    prompts = load_prompts(
        path,
        prompts=settings.prompts,
        data=settings.data,
        count=settings.prompt_count,
        tokens=length,
        room=new,
    )
    greedy, sampled = (_acceptance(model, prompts, new, temperature) for temperature in (0.0, settings.temperature))
    costs = pass_costs(model, batches, length + new // 2, settings.seconds)
    tuning = Tuning(greedy, sampled, costs)
    more = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "prompts": len(prompts),
        "temperature": settings.temperature,
    }
    file = write_tuning(path, model, tuning, more)
    say(f"tuning: {file}")
    return {**_found(path, tuning), "exact": is_row_exact(model)}


def _acceptance(
    model: Transformer, prompts: list[tuple[int, ...]], new_tokens: int, temperature: float
) -> AcceptanceTable:
    """Of texts that the model writes with all heads, without end."""
    observed: list[tuple[list[float], int]] = []

    def watch(generation: Generation, fed: int, accepted: int) -> None:
        observed.append((generation.confidences, accepted))

    engine = Engine(model, slots=min(8, len(prompts)), watch=watch, prefill_budget=None)
    for seed, prompt in enumerate(prompts):
        engine.submit(Request(prompt, new_tokens, Sampling(temperature, seed=seed)))
    with Progress("drafts, sampled" if temperature else "drafts, greedy", len(prompts), unit="prompts") as bar:
        while engine.busy:
            bar.advance(sum(generation.finished for generation, _ in engine.step()))
    return AcceptanceTable.of(observed, model.config.heads)


def _found(path: Path, tuning: Tuning) -> dict[str, Any]:
    n = len(tuning.greedy.mean) + 1
    return {
        "model": str(path),
        "acceptance": {"greedy": tuning.greedy.mean, "sampled": tuning.sampled.mean},
        "batches": [
            {
                "batch": slots,
                "plain_ms": plain,
                "drafting_ms": drafting,
                "expected_speedup": [tuning.expected(slots, rows) for rows in range(1, n + 1)],
            }
            for slots, plain, drafting in zip(tuning.costs.slots, tuning.costs.plain, tuning.costs.drafting)
        ],
    }


def format_tuning(found: dict[str, Any]) -> str:
    """`tune`'s result for people."""
    n = len(found["acceptance"]["greedy"]) + 1
    rows = [[kind, *(f"{share:.0%}" for share in found["acceptance"][kind])] for kind in ("greedy", "sampled")]
    parts = [
        found["model"],
        "Drafts right where all before them are:",
        format_table(["", *(f"head {k}" for k in range(2, n + 1))], rows),
        "A pass, ms, and what fixed windows would write over plain decoding, greedily:",
    ]
    costs = []
    for batch in found["batches"]:
        milliseconds = [f"{cost:.2f}" for cost in (batch["plain_ms"], *batch["drafting_ms"])]
        costs.append([f"batch {batch['batch']}, ms", *milliseconds])
        costs.append(["    times plain", "1.00", *(f"{speedup:.2f}" for speedup in batch["expected_speedup"])])
    parts.append(format_table(["", "plain", *(f"{w} rows" for w in range(1, n + 1))], costs))
    where = "" if found["exact"] else " with --no-exact (exact decoding fixes the rows of a pass here)"
    parts.append(
        f"Decoding without --heads{where} now chooses the rows of each pass by this, and by how sure drafts are."
    )
    return "\n\n".join(parts)
