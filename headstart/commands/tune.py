"""`headstart tune`: measure how often drafts are right and what passes cost, so that decoding can choose its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from headstart.arguments import whole_number
from headstart.console import Progress, format_table, print_result, say
from headstart.errors import UsageError
from headstart.hardware import use_threads
from headstart.reports.evaluation import left_out

if TYPE_CHECKING:
    from headstart.api import LanguageModel
    from headstart.decoding.drafters.tree import DraftTree, DynamicTree
    from headstart.decoding.generation import Generation
    from headstart.decoding.policy.calibration import AcceptanceTable, Tuning
    from headstart.evaluation.inputs import FilePrompts

RANKS = 8
"""The most candidates of a head in a tree."""
TREE_MARGIN = 1.02
"""The factor by which a tree must beat the best chain; less may be an error of timing."""


@dataclass(frozen=True)
class TuneSettings:
    """Measure how often drafts are right and what a pass costs here; decoding then chooses how many to feed."""

    model: Positional[str | None] = None
    """A model directory (None: the model in the box). `tuning.json` is written into it."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md). `tuning.json` is written into
    it."""
    prompts: Path | None = None
    """.jsonl with "prompt", "text" or "messages" in each line, or text with a prompt a line (None: the prompts in the
    model directory, or pieces of held-out documents of its run). Conversations go through the chat template."""
    data: Path | None = None
    """Folder of prepared tokens to take held-out documents from (None: that of the model's run)."""
    prompt_count: int = 32
    """At most this many prompts."""
    prompt_tokens: int | None = None
    """Tokens of a piece of a document, and the most tokens of a prompt from a file (None: 128, or half the model's
    context; for a file as many as the context has room for)."""
    long_prompts: Literal["skip", "middle", "start"] | None = None
    """Treatment of longer prompts of a file: skip leaves them out, middle cuts out their middle, start keeps their
    start and leaves conversations out (None: skip, or start with --prompt-tokens). The report counts them."""
    new_tokens: int | None = None
    """Tokens to generate after each prompt, greedily and sampled (None: 128, or as many as fit into the context)."""
    temperature: float = 0.8
    """Temperature of the sampled half."""
    tree_nodes: int = 0
    """Also measure trees of up to this many drafts, and use one if it beats a chain (0: chains only)."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes to time passes at; costs at other sizes follow from the nearest two."""
    seconds: float = 4.0
    """Seconds of timing passes at each batch size, for greedy and for sampled ones each."""
    dtype: str | None = None
    """bfloat16 or float32 (None: the dtype that `headstart generate` uses)."""
    quantize: Literal["q4", "q8"] | None = None
    """q4 or q8: tune the model as `headstart generate --quantize q4` decodes it; other costs in the file stay."""
    loss_text: Path | None = None
    """A text on which to measure the loss in bits per token (with --quantize; None: a short one)."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: torch's choice). Measured costs hold for this number alone."""
    json: bool = False
    """Print the measurements as JSON."""


def run(settings: TuneSettings) -> None:
    """Measure, write `tuning.json`, and print the measurements."""
    use_threads(settings.threads)
    print_result(tune(settings), settings.json, format_tuning)


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Measure acceptance and costs, write `tuning.json`, and return the measurements."""
    import torch

    from headstart.api import load_and_report
    from headstart.decoding.drafters.tree import DynamicTree, grow, parse_tree
    from headstart.decoding.kernels.backend import backend_of
    from headstart.decoding.policy.calibration import Tuning, write_tuning
    from headstart.decoding.policy.timing import pass_costs
    from headstart.evaluation.inputs import find_prompts, prompt_limit, sizes
    from headstart.formats.bundled import find_model
    from headstart.formats.hub import local_path

    path, named = find_model(settings.model, settings.heads_from)
    _check(settings)
    heads = None if named is None else local_path(named)
    language_model = load_and_report(
        path, settings.dtype, settings.device, settings.quantize, heads, settings.loss_text
    )
    model = language_model.transformer
    if model.config.heads == 1:
        raise UsageError(f"{path}: has one head, so there are no drafts to tune")
    if model.config.drafting_heads < model.config.heads:
        raise UsageError(f"{path}: its offsets have gaps, which tuning does not cover; decode without tuning")
    steps = model.config.kind.one_cache
    if settings.tree_nodes and model.config.ahead and not steps:
        raise UsageError(f"{path}: {model.config.head_kind} heads draft one chain, not trees; leave --tree-nodes out")
    length, new = sizes(settings.prompt_tokens, settings.new_tokens, model.config.context, most=128)
    limit = prompt_limit(settings.prompt_tokens, settings.long_prompts, new, model.config.context)
    given = find_prompts(path, settings.prompts, settings.data, settings.prompt_count, length, new, limit, heads)
    prompts = given.prompts
    length = sum(map(len, prompts)) // len(prompts)
    counts = {"prompts": len(prompts), "skipped_prompts": given.skipped, "cut_prompts": given.cut}
    if left_out(counts):
        say(f"{len(prompts)} prompts are used{left_out(counts)}")
    ranks = RANKS if settings.tree_nodes and not steps else 0
    greedy, seen = measure_acceptance(language_model, given, new, 0.0, ranks)
    sampled, _ = measure_acceptance(language_model, given, new, settings.temperature, ranks)
    largest: DraftTree | DynamicTree | None = None
    if settings.tree_nodes and steps:
        largest = DynamicTree.of_size(settings.tree_nodes, model.config.heads)
        greedy = greedy.with_rows(measure_rows(language_model, given, new, 0.0, largest))
        sampled = sampled.with_rows(measure_rows(language_model, given, new, settings.temperature, largest))
    elif settings.tree_nodes:
        largest = grow(greedy.rank_mean, settings.tree_nodes)
    costs, sampled_costs = (
        pass_costs(
            model, tuple(sorted(set(settings.batches))), length + new // 2, settings.seconds, largest, temperature
        )
        for temperature in (0.0, settings.temperature)
    )
    tuning = Tuning(greedy, sampled, costs, sampled_costs=sampled_costs)
    trees = [] if largest is None else _weigh_trees(tuning, largest, seen)
    if trees and _best(trees)["expected_speedup"] > TREE_MARGIN * _best(trees, chain=True)["expected_speedup"]:
        tuning = replace(tuning, tree=parse_tree(_best(trees)["tree"], model.config.heads))
    more = {"date": date.today().isoformat(), "torch": torch.__version__, **counts, "temperature": settings.temperature}
    file = write_tuning(heads or path, model, tuning, more)
    say(f"tuning: {file}")
    return {**_summarize(path, tuning), "trees": trees, "exact": backend_of(model).row_exact, **counts}


def _check(settings: TuneSettings) -> None:
    """Raise UsageError for settings out of range."""
    from headstart.decoding.drafters.tree import MOST_NODES

    for name in ("prompt_count", "prompt_tokens", "new_tokens"):
        value = getattr(settings, name)
        if value is not None:
            whole_number(f"--{name.replace('_', '-')}", value, 1)
    whole_number("--tree-nodes", settings.tree_nodes, 0, MOST_NODES)
    if settings.seconds <= 0:
        raise UsageError(f"--seconds is {settings.seconds}; give a time above 0")
    if not settings.batches or min(settings.batches) < 1:
        raise UsageError(f"--batches {' '.join(map(str, settings.batches))}: name batch sizes of at least 1")
    if settings.temperature <= 0:
        raise UsageError(
            f"--temperature is {settings.temperature}; give one above 0, greedy drafts are measured anyway"
        )


def measure_acceptance(
    language_model: LanguageModel, given: FilePrompts, new_tokens: int, temperature: float, ranks: int
) -> tuple[AcceptanceTable, list[list[int]]]:
    """Generate after each prompt with all heads, in chains, and count the right drafts.

    Return the table, and with `ranks` for each pass the rank of the right token among the candidates of each head.
    """
    from headstart.decoding.engine import Engine, EngineConfig
    from headstart.decoding.policy.calibration import AcceptanceTable
    from headstart.decoding.settings import Request, Sampling
    from headstart.evaluation.free_running import draft_ranks

    observed: list[tuple[list[float], int]] = []
    drafted_at: dict[Generation, list[int]] = {}

    def watch(generation: Generation, fed: int, accepted: int) -> None:
        observed.append((generation.window.confidences, accepted))
        root = len(generation.request.prompt) + len(generation.tokens) - 1
        drafted_at.setdefault(generation, []).append(root - 1)

    model, tokenizer, prompts = language_model.transformer, language_model.tokenizer, given.prompts
    engine = Engine(
        model, EngineConfig(slots=min(8, len(prompts)), prefill_budget=None), tokenizer=tokenizer, watch=watch
    )
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
        sequence = [*generation.request.prompt, *generation.tokens]
        followed = [row for row in rows if row + n < len(sequence)]
        if followed:
            seen += draft_ranks(model, sequence, followed, generation.request.sampling)
    return table.with_ranks(seen, ranks), [[rank for _, rank in heads] for heads in seen]


def measure_rows(
    language_model: LanguageModel, given: FilePrompts, new_tokens: int, temperature: float, tree: DynamicTree
) -> list[list[tuple[float, bool]]]:
    """Generate after each prompt with dynamic trees.

    Return for each pass the confidence of the path to each row, and whether the path is right.
    """
    from headstart.decoding.engine import Engine, EngineConfig
    from headstart.decoding.settings import Request, Sampling

    prompts, seen = given.prompts, list[list[tuple[float, bool]]]()
    config = EngineConfig(exact=False, prefill_budget=None, tree=tree)
    engine = Engine(language_model.transformer, config, tokenizer=language_model.tokenizer)
    windows, slots = engine.state.windows, slice(0, 1)
    with Progress("trees, sampled" if temperature else "trees, greedy", len(prompts), unit="prompts") as bar:
        for seed, (prompt, ends) in enumerate(zip(prompts, given.ends or [frozenset[int]()] * len(prompts))):
            one = engine.submit(Request(prompt, new_tokens, Sampling(temperature, seed=seed), ends=ends))
            while engine.busy:
                drafted, before = bool(one.window.drafters), len(one.tokens)
                tokens, branches = windows.tokens_SW[0].tolist(), windows.branches(0, tree)
                worths = windows.worths(slots, tree)[0]
                assert branches is not None
                engine.step()
                row, right = 0, set[int]()
                for token in one.tokens[before:]:
                    row = next((child for child in branches.children[row] if tokens[child] == token), 0)
                    if not row:
                        break
                    right.add(row)
                if drafted:
                    seen.append([(worth, i in right) for i, worth in enumerate(worths, start=1)])
            bar.advance(1)
    return seen


def _weigh_trees(tuning: Tuning, largest: DraftTree | DynamicTree, seen: list[list[int]]) -> list[dict[str, Any]]:
    """Return the expected speed-up of chains and of the beginnings of the largest tree over plain decoding.

    It holds for one greedy request at a time, and follows from the drafts that each would have kept of those in `seen`,
    or in a dynamic tree of those that were measured.
    """
    from itertools import accumulate

    from headstart.decoding.drafters.tree import DraftTree

    slots = tuning.costs.slots[0]
    plain, chain_costs = tuning.costs.at(slots)
    _, tree_costs = tuning.costs.at_tree(slots)
    chain = DraftTree(tuple((0,) * depth for depth in range(1, len(tuning.greedy.mean) + 1)))
    found = []
    for tree, costs in ((chain, chain_costs), (largest, tree_costs)):
        tokens = 1.0
        if isinstance(tree, DraftTree) and isinstance(largest, DraftTree):
            shares: Sequence[float] = tree.shares(seen)
        else:
            in_chain = tuple(accumulate(tuning.greedy.mean, lambda a, b: a * b))
            shares = in_chain if tree is chain else tuning.greedy.kept(largest)
        for rows, share in enumerate(shares, start=2):
            tokens += share
            found.append(
                {
                    "tree": str(tree.cut(rows - 1)),
                    "chain": tree is chain,
                    "nodes": rows - 1,
                    "tokens_per_pass": tokens,
                    "expected_speedup": tokens * plain / costs[rows - 1],
                }
            )
    return found


def _best(trees: list[dict[str, Any]], chain: bool | None = None) -> dict[str, Any]:
    """Return the fastest of the trees, of the chains alone, or of the real trees alone."""
    return max((t for t in trees if chain in (None, t["chain"])), key=lambda tree: tree["expected_speedup"])


def _summarize(path: Path, tuning: Tuning) -> dict[str, Any]:
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
    """Format the result of `tune` for people."""
    n = len(found["acceptance"]["greedy"]) + 1
    rows = [[kind, *(f"{share:.0%}" for share in found["acceptance"][kind])] for kind in ("greedy", "sampled")]
    parts = [
        found["model"],
        "Share of right drafts if all drafts before them are right:",
        format_table(["", *(f"head {k}" for k in range(2, n + 1))], rows),
        "Milliseconds of a greedy pass, and expected speed-up of fixed windows, greedily and sampled:",
    ]
    costs = []
    for batch in found["batches"]:
        milliseconds = [f"{cost:.2f}" for cost in (batch["plain_ms"], *batch["drafting_ms"])]
        costs.append([f"batch {batch['batch']}, ms", *milliseconds])
        for label, kind in (("times plain", "expected_speedup"), ("sampled", "expected_sampled")):
            costs.append([f"    {label}", "1.00", *(f"{speedup:.2f}" for speedup in batch[kind])])
    parts.append(format_table(["", "plain", *(f"{w} rows" for w in range(1, n + 1))], costs))
    if found["trees"]:
        rows = []
        for name, chain in (("chain", True), ("tree", False)):
            tree = _best(found["trees"], chain)
            rows.append([name, f"{tree['nodes']}", f"{tree['tokens_per_pass']:.2f}", f"{tree['expected_speedup']:.2f}"])
        parts += [
            "The best chain and the best tree, for one greedy request at a time:",
            format_table(["", "drafts", "tokens per pass", "times plain"], rows),
            f"Decoding uses this tree: {found['tree']}" if found["tree"] else "The tree does not pay: chains are used.",
        ]
    where = "" if found["exact"] else " with --no-exact (exact decoding fixes the rows of a pass here)"
    parts.append(
        f"Decoding without --heads{where} now chooses the rows of each pass by these numbers and by the confidence of "
        "each draft."
    )
    return "\n\n".join(parts)
