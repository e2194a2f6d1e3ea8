"""What is known of a model's drafts and of a machine's passes: how often which are right, and what rows cost.

`headstart tune` measures both (headstart/commands/tune.py), a file beside the model keeps them
(decoding/policy/tuning_file.py), and the policy chooses by them (policy.py).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from headstart import hardware
from headstart.decoding.drafters.tree import MOST_NODES, DraftTree
from headstart.decoding.kernels.backend import backend_of
from headstart.errors import UsageError, shorten
from headstart.model.transformer import Transformer

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Between the bins of confidence."""
PRIOR = 4.0
"""Observations that a bin starts with, at the mean of its head."""

MOST_SLOTS = 10**6
MOST_MILLISECONDS = 10**9


@dataclass(frozen=True)
class AcceptanceTable:
    """How often the draft of head k is right where those of heads 2..k-1 are; entry k-2."""

    mean: tuple[float, ...]
    by_confidence: tuple[tuple[float, ...], ...]
    """[k-2][bin]: by the probability that head k gave its draft, bins between `EDGES`."""
    rank_mean: tuple[tuple[float, ...], ...] = ()
    """[k-2][r]: how often the candidate of rank r of head k is right where heads 2..k-1 had the right ones among their
    candidates; empty where that was not measured."""
    rank_by_confidence: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """[k-2][r][bin]: the same by the probability that head k gave its best candidate."""

    @classmethod
    def of(cls, observed: Sequence[tuple[Sequence[float], int]], heads: int) -> AcceptanceTable:
        """Of passes that fed all drafts: the confidence of each and how many were accepted."""
        means, tables = [], []
        for i in range(heads - 1):
            reached = [(confidences[i], accepted > i) for confidences, accepted in observed if accepted >= i]
            mean = (sum(right for _, right in reached) + 0.5) / (len(reached) + 1)
            right_in, all_in = [PRIOR * mean] * (len(EDGES) + 1), [PRIOR] * (len(EDGES) + 1)
            for confidence, right in reached:
                at = bisect_right(EDGES, confidence)
                right_in[at] += right
                all_in[at] += 1
            means.append(mean)
            tables.append(tuple(a / b for a, b in zip(right_in, all_in)))
        return cls(tuple(means), tuple(tables))

    def with_ranks(self, observed: Sequence[Sequence[tuple[float, int]]], ranks: int) -> AcceptanceTable:
        """Of drafts made: entry k-2 the probability that head k gave its best candidate, and the rank of the right
        token. Ranks from `ranks` on count as none."""
        means, tables = [], []
        for i in range(len(self.mean)):
            reached = [heads[i] for heads in observed if all(rank < ranks for _, rank in heads[:i])]
            mean = [(sum(r == rank for _, r in reached) + 0.1) / (len(reached) + 1) for rank in range(ranks)]
            in_bin: list[list[float]] = [[PRIOR * share] * (len(EDGES) + 1) for share in mean]
            all_in = [PRIOR] * (len(EDGES) + 1)
            for confidence, rank in reached:
                at = bisect_right(EDGES, confidence)
                all_in[at] += 1
                if rank < ranks:
                    in_bin[rank][at] += 1
            means.append(tuple(mean))
            tables.append(tuple(tuple(a / b for a, b in zip(counts, all_in)) for counts in in_bin))
        return replace(self, rank_mean=tuple(means), rank_by_confidence=tuple(tables))

    def chances(self, confidences: Sequence[float], tree: DraftTree) -> list[float]:
        """Of each node of `tree` that its path is right; of none where nothing was drafted."""
        if not confidences:
            return []
        bins = [bisect_right(EDGES, confidence) for confidence in confidences]
        return tree.chances([[ranks[at] for ranks in head] for head, at in zip(self.rank_by_confidence, bins)])

    def prefixes(self, confidences: Sequence[float]) -> list[float]:
        """Entry j-1: the probability that the first j drafts are all right."""
        reached, prefixes = 1.0, []  # a plain loop: this runs in every pass
        for table, confidence in zip(self.by_confidence, confidences):
            reached *= table[bisect_right(EDGES, confidence)]
            prefixes.append(reached)
        return prefixes


@dataclass(frozen=True)
class PassCosts:
    """Milliseconds of a pass on one machine, by slots and rows."""

    slots: tuple[int, ...]
    """Batch sizes measured, ascending."""
    plain: tuple[float, ...]
    """[slots]: one row a slot, no drafting."""
    drafting: tuple[tuple[float, ...], ...]
    """[slots][W-1]: W rows a slot, and all heads draft."""
    tree_rows: tuple[int, ...] = ()
    """Rows of the trees measured, ascending."""
    tree: tuple[tuple[float, ...], ...] = ()
    """[slots][i]: windows that are trees of `tree_rows[i]` rows."""

    def at_tree(self, slots: int) -> tuple[float, tuple[float, ...]]:
        """`at` for windows that are trees; between the rows measured by the straight line."""
        known = (1, *self.tree_rows)
        by_rows = []
        for drafting, measured in zip(self.drafting, self.tree):
            costs = (drafting[0], *measured)
            row = []
            for rows in range(1, known[-1] + 1):
                high = max(1, bisect_left(known, rows))
                share = (rows - known[high - 1]) / (known[high] - known[high - 1])
                row.append(costs[high - 1] + share * (costs[high] - costs[high - 1]))
            by_rows.append(tuple(row))
        return replace(self, drafting=tuple(by_rows)).at(slots)

    def at(self, slots: int) -> tuple[float, tuple[float, ...]]:
        """(plain, drafting by rows) for any number of slots, by the straight line through the nearest two measured."""
        if len(self.slots) == 1:
            return self.plain[0], self.drafting[0]
        high = min(max(bisect_right(self.slots, slots), 1), len(self.slots) - 1)
        low = high - 1
        share = (slots - self.slots[low]) / (self.slots[high] - self.slots[low])

        def between(a: float, b: float) -> float:
            return max(a + share * (b - a), 1e-6)

        rows = tuple(between(a, b) for a, b in zip(self.drafting[low], self.drafting[high]))
        # More rows are never cheaper: where they were measured so, that was noise.
        return between(self.plain[low], self.plain[high]), tuple(itertools.accumulate(rows, max))


@dataclass(frozen=True)
class Tuning:
    """What `headstart tune` measured of a model on a machine."""

    greedy: AcceptanceTable
    sampled: AcceptanceTable
    costs: PassCosts
    tree: DraftTree | None = None
    """What windows are best, if no chain."""
    sampled_costs: PassCosts | None = None
    """Of passes in which some text is sampled: noise is made for every row (None: taken for those of greedy ones)."""

    def kind(self, sampled: bool) -> tuple[AcceptanceTable, PassCosts]:
        """What holds for passes that are sampled, or greedy."""
        return (self.sampled, self.sampled_costs or self.costs) if sampled else (self.greedy, self.costs)

    def expected(self, slots: int, rows: int, sampled: bool = False) -> float:
        """Tokens per second of windows of `rows` rows, over those of plain decoding."""
        table, costs = self.kind(sampled)
        plain, drafting = costs.at(slots)
        tokens = 1 + sum(itertools.accumulate(table.mean[: rows - 1], lambda a, b: a * b))
        return tokens * plain / drafting[rows - 1]

    def best(self, slots: int, tree: DraftTree | None = None, sampled: bool = False) -> float:
        """The highest of `expected` for any number of rows, of a chain or of `tree`."""
        table, pass_costs = self.kind(sampled)
        if tree is None:
            return max(self.expected(slots, rows, sampled) for rows in range(1, len(table.mean) + 2))
        plain, drafting = pass_costs.at_tree(slots)
        tokens = itertools.accumulate(tree.chances(table.rank_mean), initial=1.0)
        return max(count * plain / cost_of_rows(drafting, rows) for rows, count in enumerate(tokens, start=1))

    def tree_for(self, slots: int) -> DraftTree | None:
        """`tree` if it can be expected to beat chains at this batch size."""
        return self.tree if self.tree is not None and self.best(slots, self.tree) > self.best(slots) else None


def cost_of_rows(costs: Sequence[float], rows: int) -> float:
    """The cost of this many rows; beyond those measured, by the average row."""
    beyond = rows - len(costs)
    if beyond <= 0:
        return costs[rows - 1]
    return costs[-1] + beyond * ((costs[-1] - costs[0]) / (len(costs) - 1) if len(costs) > 1 else costs[0])


def setting(model: Transformer) -> dict[str, Any]:
    """What costs depend on, beside the model: an entry of costs holds where this is equal."""
    weight = model.trunk.embedding.weight
    backend, here = backend_of(model), hardware.describe()
    return {
        "processor": here["gpus"][0]["name"] if weight.device.type == "cuda" and here["gpus"] else here["cpu"],
        "instruction_sets": here["instruction_sets"],
        "threads": torch.get_num_threads(),
        "dtype": backend.quantize or str(weight.dtype).removeprefix("torch."),
        "compiled": backend.row_exact,
    }


def tuning_from(content: dict[str, Any], model: Transformer) -> Tuning | None:
    """The tuning of `model` as it runs here, out of a file's content; None where this setting was not measured.

    Raises UsageError for content that does not fit the model.
    """
    here = setting(model)
    entry = next((e for e in content["costs"] if e["setting"] == here), None)
    if entry is None:
        return None
    measured = content[_acceptance_key(here)]
    greedy, sampled = (
        AcceptanceTable(
            tuple(a["mean"]),
            tuple(map(tuple, a["by_confidence"])),
            tuple(map(tuple, a.get("rank_mean", ()))),
            tuple(tuple(map(tuple, head)) for head in a.get("rank_by_confidence", ())),
        )
        for a in (measured["greedy"], measured["sampled"])
    )
    text, of_sampled = entry.get("draft_tree"), entry.get("sampled")
    tree = None if text is None else DraftTree.parse(text)
    tuning = Tuning(greedy, sampled, _costs_from(entry), tree, None if of_sampled is None else _costs_from(of_sampled))
    both = [tuning.costs, tuning.kind(True)[1]]
    n = model.config.heads
    _check_numbers([greedy, sampled], both)
    if (
        list(measured.get("edges", EDGES)) != list(EDGES)
        or not all(_fits(table, n) for table in (greedy, sampled))
        or any(len(rows) != n for costs in both for rows in costs.drafting)
        or (tree is not None and (tree.depth >= n or not tuning.greedy.rank_mean or not all(c.tree for c in both)))
    ):
        raise UsageError(f"the tuning is not of a model with {n} heads; measure it again with headstart tune")
    return tuning


def _fits(table: AcceptanceTable, heads: int) -> bool:
    """Return whether the table has an entry for each of the heads 2..n, and one for each bin."""
    ranked = [len(head) for head in table.rank_mean] == [len(head) for head in table.rank_by_confidence]
    bins = [*table.by_confidence, *(rank for head in table.rank_by_confidence for rank in head)]
    return (
        {len(table.mean), len(table.by_confidence), len(table.rank_mean or table.mean)} == {heads - 1}
        and ranked
        and all(len(each) == len(EDGES) + 1 for each in bins)
    )


def _check_numbers(tables: Sequence[AcceptanceTable], costs: Sequence[PassCosts]) -> None:
    """Raise UsageError for shares, milliseconds or sizes that no measurement gives."""
    for table in tables:
        ranks = [*table.rank_mean, *(rank for head in table.rank_by_confidence for rank in head)]
        _check_all("a share of right drafts", [table.mean, *table.by_confidence, *ranks], 0, 1)
    for each in costs:
        _check_all("a batch size", [each.slots], 1, MOST_SLOTS, whole=True)
        _check_all("the rows of a tree", [each.tree_rows], 2, MOST_NODES + 1, whole=True)
        _check_all("the milliseconds of a pass", [each.plain, *each.drafting, *each.tree], 0, MOST_MILLISECONDS)
        measured = {len(each.slots), len(each.plain), len(each.drafting), len(each.tree or each.slots)}
        ascending = all(list(sizes) == sorted(set(sizes)) for sizes in (each.slots, each.tree_rows))
        if not each.slots or len(measured) > 1 or not ascending:
            raise UsageError("its costs are not of ascending batch sizes; measure it again with headstart tune")
        if any(len(rows) != len(each.tree_rows) for rows in each.tree):
            raise UsageError("its costs of trees are not of its rows; measure it again with headstart tune")
        if 0 in (*each.plain, *(ms for rows in (*each.drafting, *each.tree) for ms in rows)):
            raise UsageError("a pass of 0 ms in it; measure it again with headstart tune")


def _check_all(name: str, rows: Sequence[Sequence[Any]], least: int, most: int, *, whole: bool = False) -> None:
    for value in itertools.chain.from_iterable(rows):
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            raise UsageError(
                f"{name} is {shorten(repr(value))}, not {least} to {most:,}; measure it again with headstart tune"
            )


def _costs_from(entry: dict[str, Any]) -> PassCosts:
    return PassCosts(
        tuple(entry["slots"]),
        tuple(entry["plain"]),
        tuple(map(tuple, entry["drafting"])),
        tuple(entry.get("tree_rows", ())),
        tuple(map(tuple, entry.get("tree", ()))),
    )


def content_with(
    content: dict[str, Any] | None, here: dict[str, Any], tuning: Tuning, more: dict[str, Any]
) -> dict[str, Any]:
    """`content` with this tuning in it, beside those of other settings; `more` says how it was measured."""
    tree = None if tuning.tree is None else str(tuning.tree)
    of_sampled = None if tuning.sampled_costs is None else asdict(tuning.sampled_costs)
    entry = {"setting": here, **asdict(tuning.costs), "sampled": of_sampled, "draft_tree": tree, **more}
    others = [e for e in (content or {"costs": []})["costs"] if e["setting"] != here]
    kept = {name: value for name, value in (content or {}).items() if name.startswith("acceptance")}
    tables = {"edges": EDGES, "greedy": asdict(tuning.greedy), "sampled": asdict(tuning.sampled)}
    return {**kept, _acceptance_key(here): tables, "costs": [*others, entry]}


def _acceptance_key(here: dict[str, Any]) -> str:
    """What heads know belongs to the weights, whatever machine runs them; those of int8 are others."""
    return "acceptance_int8" if here["dtype"] == "int8" else "acceptance"
