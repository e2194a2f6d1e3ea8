"""`headstart tune`: measures how sure drafts are right and what a pass costs here, for decoding to choose by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

import headstart
from headstart.api import LanguageModel
from headstart.console import Progress, format_table, print_result, say
from headstart.decoding.drafters.tree import MOST_NODES, DraftTree, grow
from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.int8 import Quantize
from headstart.decoding.policy.calibration import AcceptanceTable, Tuning, write_tuning
from headstart.decoding.policy.timing import pass_costs
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.free_running import draft_ranks
from headstart.evaluation.texts import FilePrompts, LongPrompts, find_prompts, prompt_limit, sizes
from headstart.formats.bundled import model_directory
from headstart.hardware import use_threads
from headstart.reports.evaluation import left_out

RANKS = 8
"""Candidates of a head that a tree may take."""
PAYS = 1.02
"""A tree must beat the best chain by more than timings are off."""


@dataclass(frozen=True)
class TuneSettings:
    """Measure what drafts are worth and what a pass costs here; decoding then chooses how many to feed."""

    model: Positional[str | None] = None
    """A model directory (None: the model in the box). `tuning.json` is written into it."""
    prompts: Path | None = None
    """.jsonl with "prompt", "text" or "messages" in each line, or text with a prompt a line (None: the prompts in the
    model directory, or pieces of held-out documents of its run). Conversations go through the chat template."""
    data: Path | None = None
    """Folder of prepared tokens to take held-out documents from (None: that of the model's run)."""
    prompt_count: int = 32
    """At most this many prompts."""
    prompt_tokens: int | None = None
    """Tokens of a piece of a document, and of the longest prompt of a file (None: 128, or half the model's context; of
    a file whatever the context has room for)."""
    long_prompts: LongPrompts | None = None
    """Longer prompts of a file are left out (skip), cut in their middle (middle), or cut to their start (start, which
    leaves conversations out); they are counted (None: skip, and start where --prompt-tokens is given)."""
    new_tokens: int | None = None
    """Written after each, greedily and sampled (None: 128, or what the prompt leaves of the context)."""
    temperature: float = 0.8
    """Of the sampled half."""
    tree_nodes: int = 0
    """Also measure trees of up to this many drafts, and use one where it beats a chain (0: chains only)."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes to time passes at; others are judged by the nearest two."""
    seconds: float = 4.0
    """Spent on timing passes at each batch size, greedy ones and sampled ones."""
    dtype: str | None = None
    """bfloat16 or float32 (None: as `headstart generate` would take)."""
    quantize: Quantize | None = None
    """int8: of the model as `headstart generate --quantize int8` decodes it; its costs are kept beside the others."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: as torch chooses). What is measured holds for this number alone."""
    json: bool = False
    """Print what was measured as JSON."""


def run(settings: TuneSettings) -> None:
    """Measure, write `tuning.json`, and print what was found."""
    use_threads(settings.threads)
    print_result(tune(settings), settings.json, format_tuning)


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Measures, writes `tuning.json`, and tells what was found."""
    path = model_directory(settings.model)
    for name in ("prompt_count", "prompt_tokens", "new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if settings.seconds <= 0:
        raise UsageError(f"--seconds is {settings.seconds}; passes need some time to be timed in, more than 0")
    if not 0 <= settings.tree_nodes <= MOST_NODES:
        raise UsageError(
            f"--tree-nodes is {settings.tree_nodes}; it must be 0 (chains only) or more, and at most {MOST_NODES}"
        )
    batches = tuple(sorted(set(settings.batches)))
    if not batches or batches[0] < 1:
        raise UsageError(f"--batches {' '.join(map(str, batches))}: name batch sizes of at least 1")
    if settings.temperature <= 0:
        raise UsageError(f"--temperature is {settings.temperature}; the greedy half is measured anyway, take above 0")
    language_model = headstart.load(path, dtype=settings.dtype, device=settings.device, quantize=settings.quantize)
    model = language_model.transformer
    if model.config.heads == 1:
        raise UsageError(f"{path}: has one head, so there are no drafts to tune")
    if model.config.drafting_heads < model.config.heads:
        raise UsageError(
            f"{path}: its heads predict with gaps between, and tables are of chains without; leave it untuned"
        )
    if settings.tree_nodes and model.config.ahead:
        raise UsageError(f"{path}: sequential heads draft one chain, not trees; leave --tree-nodes out")
    length, new = sizes(settings.prompt_tokens, settings.new_tokens, model.config.context, most=128)
    limit = prompt_limit(settings.prompt_tokens, settings.long_prompts, new, model.config.context)
    given = find_prompts(path, settings.prompts, settings.data, settings.prompt_count, length, new, limit)
    prompts = given.prompts
    length = sum(map(len, prompts)) // len(prompts)
    counts = {"prompts": len(prompts), "skipped_prompts": given.skipped, "cut_prompts": given.cut}
    if left_out(counts):
        say(f"{len(prompts)} prompts are used{left_out(counts)}")
    ranks = RANKS if settings.tree_nodes else 0
    greedy, seen = _acceptance(language_model, given, new, 0.0, ranks)
    sampled, _ = _acceptance(language_model, given, new, settings.temperature, ranks)
    largest = grow(greedy.rank_mean, settings.tree_nodes) if settings.tree_nodes else None
    costs, sampled_costs = (
        pass_costs(model, batches, length + new // 2, settings.seconds, largest, temperature)
        for temperature in (0.0, settings.temperature)
    )
    tuning = Tuning(greedy, sampled, costs, sampled_costs=sampled_costs)
    trees = [] if largest is None else _trees(tuning, largest, seen)
    if trees and (best := max(trees, key=lambda tree: tree["expected_speedup"]))["expected_speedup"] > PAYS * max(
        tree["expected_speedup"] for tree in trees if tree["chain"]
    ):
        tuning = replace(tuning, tree=DraftTree.parse(best["tree"]))
    more = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        **counts,
        "temperature": settings.temperature,
    }
    file = write_tuning(path, model, tuning, more)
    say(f"tuning: {file}")
    return {**_found(path, tuning), "trees": trees, "exact": backend_of(model).row_exact, **counts}


def _acceptance(
    language_model: LanguageModel, given: FilePrompts, new_tokens: int, temperature: float, ranks: int
) -> tuple[AcceptanceTable, list[list[int]]]:
    """Of texts that the model writes with all heads in chains; and with `ranks`, of every pass the ranks
    that the tokens which came had among the candidates of the heads."""
    observed: list[tuple[list[float], int]] = []
    drafted_at: dict[Generation, list[int]] = {}

    def watch(generation: Generation, fed: int, accepted: int) -> None:
        observed.append((generation.confidences, accepted))
        root = len(generation.request.prompt) + len(generation.tokens) - 1
        drafted_at.setdefault(generation, []).append(root - 1)

    model, tokenizer, prompts = language_model.transformer, language_model.tokenizer, given.prompts
    engine = Engine(model, slots=min(8, len(prompts)), tokenizer=tokenizer, watch=watch, prefill_budget=None)
    for seed, (prompt, ends) in enumerate(zip(prompts, given.ends or [frozenset[int]()] * len(prompts))):
        engine.submit(Request(prompt, new_tokens, Sampling(temperature, seed=seed), ends=ends))
    with Progress("drafts, sampled" if temperature else "drafts, greedy", len(prompts), unit="prompts") as bar:
        while engine.busy:
            bar.advance(sum(generation.finished for generation, _ in engine.step()))
    n = model.config.heads
    table = AcceptanceTable.from_passes(observed, n)
    if not ranks:
        return table, []
    seen: list[list[tuple[float, int]]] = []
    for generation, rows in drafted_at.items():
        text = [*generation.request.prompt, *generation.tokens]
        known = [row for row in rows if row + n < len(text)]
        if known:
            seen += draft_ranks(model, text, known, generation.request.sampling)
    return table.with_ranks(seen, ranks), [[rank for _, rank in heads] for heads in seen]


def _trees(tuning: Tuning, largest: DraftTree, seen: list[list[int]]) -> list[dict[str, Any]]:
    """What chains and the beginnings of the largest tree would write over plain decoding, greedily and one request at a
    time, by the drafts that they would have kept of those seen."""
    slots = tuning.costs.slots[0]
    plain, chain_costs = tuning.costs.at(slots)
    _, tree_costs = tuning.costs.at_tree(slots)
    chain = DraftTree(tuple((0,) * depth for depth in range(1, len(tuning.greedy.mean) + 1)))
    found = []
    for tree, costs in ((chain, chain_costs), (largest, tree_costs)):
        tokens = 1.0
        for rows, share in enumerate(tree.shares(seen), start=2):
            tokens += share
            part = DraftTree(tree.paths[: rows - 1])
            found.append(
                {
                    "tree": str(part),
                    "chain": tree is chain,
                    "nodes": rows - 1,
                    "tokens_per_pass": tokens,
                    "expected_speedup": tokens * plain / costs[rows - 1],
                }
            )
    return found


def _found(path: Path, tuning: Tuning) -> dict[str, Any]:
    n = len(tuning.greedy.mean) + 1
    return {
        "model": str(path),
        "tree": None if tuning.tree is None else str(tuning.tree),
        "acceptance": {"greedy": tuning.greedy.mean, "sampled": tuning.sampled.mean},
        "batches": [
            {
                "batch": slots,
                "plain_ms": plain,
                "drafting_ms": drafting,
                "expected_speedup": [tuning.expected_speedup(slots, rows) for rows in range(1, n + 1)],
                "expected_sampled": [tuning.expected_speedup(slots, rows, sampled=True) for rows in range(1, n + 1)],
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
        "A greedy pass, ms, and what fixed windows would write over plain decoding, greedily and sampled:",
    ]
    costs = []
    for batch in found["batches"]:
        milliseconds = [f"{cost:.2f}" for cost in (batch["plain_ms"], *batch["drafting_ms"])]
        costs.append([f"batch {batch['batch']}, ms", *milliseconds])
        for label, kind in (("times plain", "expected_speedup"), ("sampled", "expected_sampled")):
            costs.append([f"    {label}", "1.00", *(f"{speedup:.2f}" for speedup in batch[kind])])
    parts.append(format_table(["", "plain", *(f"{w} rows" for w in range(1, n + 1))], costs))
    if found["trees"]:
        best = {
            chain: max((t for t in found["trees"] if t["chain"] == chain), key=lambda tree: tree["expected_speedup"])
            for chain in (True, False)
        }
        rows = [
            [
                "chain" if chain else "tree",
                f"{t['nodes']}",
                f"{t['tokens_per_pass']:.2f}",
                f"{t['expected_speedup']:.2f}",
            ]
            for chain, t in best.items()
        ]
        parts += [
            "The best chain and the best tree, greedily and one request at a time:",
            format_table(["", "drafts", "tokens per pass", "times plain"], rows),
            f"Used where it pays: {found['tree']}" if found["tree"] else "The tree does not pay: chains are used.",
        ]
    where = "" if found["exact"] else " with --no-exact (exact decoding fixes the rows of a pass here)"
    parts.append(
        f"Decoding without --heads{where} now chooses the rows of each pass by this, and by how sure drafts are."
    )
    return "\n\n".join(parts)
