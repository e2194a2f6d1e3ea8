"""Estimate how often drafts are right and what passes cost; store the estimates in `tuning.json`.

`headstart tune` measures a `Tuning` and writes it into the model directory. `online.py` learns one while decoding.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from headstart import hardware
from headstart.decoding.drafters.tree import MOST_NODES, DraftTree, DynamicTree, parse_tree
from headstart.decoding.kernels.backend import backend_of
from headstart.errors import UsageError, shorten
from headstart.fileio import read_json, write_text
from headstart.model.transformer import Transformer

TUNING_FILE = "tuning.json"
EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""The confidences that separate one bin from the next."""
WORTHS = (0.005, 0.01, 0.02, 0.05, *EDGES)
"""The confidences of paths that separate one bin from the next."""
PRIOR = 4.0
"""Observations that a bin starts with, at the mean of its head."""
MOST_SLOTS = 10**6
MOST_MILLISECONDS = 10**9
AGAIN = "measure it again with headstart tune"


@dataclass(frozen=True)
class AcceptanceTable:
    """The shares of right drafts: entry k-2 counts head k if the drafts of heads 2..k-1 are right."""

    mean: tuple[float, ...]
    by_confidence: tuple[tuple[float, ...], ...]
    """[k-2][bin]: the same by the probability that head k gave its draft, in bins between `EDGES`."""
    rank_mean: tuple[tuple[float, ...], ...] = ()
    """[k-2][r]: how often the candidate of rank r of head k is right if heads 2..k-1 had the right tokens among their
    candidates; empty if that was not measured."""
    rank_by_confidence: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """[k-2][r][bin]: the same by the probability that head k gave its best candidate."""
    row_mean: tuple[float, ...] = ()
    """[r-1]: how often row r of a dynamic tree and its path are right; empty if that was not measured."""
    by_worth: tuple[float, ...] = ()
    """[bin]: the same by the confidence of the path, in bins between `WORTHS`."""

    @classmethod
    def from_passes(cls, observed: Sequence[tuple[Sequence[float], int]], heads: int) -> AcceptanceTable:
        """Count how drafts fared in passes that fed all of them, of a model with so many `heads`, head 1 included.

        `observed` holds for each pass the confidence of each draft, and how many drafts were accepted.
        """
        means, tables = [], []
        for i in range(heads - 1):
            reached = [(confidences[i], int(accepted == i)) for confidences, accepted in observed if accepted >= i]
            (mean,), (table,) = _count_ranks(reached, 1, 0.5)
            means.append(mean)
            tables.append(table)
        return cls(tuple(means), tuple(tables))

    @classmethod
    def uniform(cls, share: float, heads: int, tree: DraftTree | DynamicTree | None = None) -> AcceptanceTable:
        """Return the table of drafts that are all right with probability `share`, whatever their confidence."""
        bins = (share,) * (len(EDGES) + 1)
        table = cls((share,) * (heads - 1), (bins,) * (heads - 1))
        if isinstance(tree, DynamicTree):
            return replace(table, row_mean=(share,) * tree.nodes, by_worth=(share,) * (len(WORTHS) + 1))
        if tree is None:
            return table
        ranks = tree.ranks
        by_confidence = ((bins,) * ranks,) * (heads - 1)
        return replace(table, rank_mean=((share,) * ranks,) * (heads - 1), rank_by_confidence=by_confidence)

    def with_ranks(self, observed: Sequence[Sequence[tuple[float, int]]], ranks: int) -> AcceptanceTable:
        """Return this table with the shares of the first `ranks` ranks added; a larger rank counts as not found.

        `observed` holds for each position where heads drafted, in entry k-2: the probability that head k gave its best
        candidate, and the rank of the right token among its candidates.
        """
        means, tables = [], []
        for i in range(len(self.mean)):
            reached = [heads[i] for heads in observed if all(rank < ranks for _, rank in heads[:i])]
            mean, table = _count_ranks(reached, ranks, 0.1)
            means.append(mean)
            tables.append(table)
        return replace(self, rank_mean=tuple(means), rank_by_confidence=tuple(tables))

    def with_rows(self, observed: Sequence[Sequence[tuple[float, bool]]]) -> AcceptanceTable:
        """Return this table with the shares of right rows of dynamic trees added.

        `observed` holds for each pass the confidence of the path to each row, and whether that path is right.
        """
        right, of = [0.0] * (len(WORTHS) + 1), [0.0] * (len(WORTHS) + 1)
        for worth, kept in itertools.chain.from_iterable(observed):
            at = bisect_right(WORTHS, worth)
            right[at] += kept
            of[at] += 1
        middle = [(low + high) / 2 for low, high in itertools.pairwise((0.0, *WORTHS, 1.0))]
        shares = tuple((r + PRIOR * prior) / (all_in + PRIOR) for r, all_in, prior in zip(right, of, middle))
        means = tuple(sum(kept for _, kept in row) / len(row) for row in zip(*observed))
        return replace(self, row_mean=means, by_worth=shares)

    def covers(self, tree: DraftTree | DynamicTree) -> bool:
        """Return whether the shares of such trees were measured."""
        return len(self.row_mean) >= tree.nodes if isinstance(tree, DynamicTree) else bool(self.rank_mean)

    def kept(self, tree: DraftTree | DynamicTree) -> Sequence[float]:
        """Return for each row of a tree how often its path is right."""
        return self.row_mean[: tree.nodes] if isinstance(tree, DynamicTree) else tree.chances(self.rank_mean)

    def chances_by_worth(self, worths: Sequence[float]) -> list[float]:
        """Return for each row of a dynamic tree the probability that its path is right."""
        return [self.by_worth[bisect_right(WORTHS, worth)] for worth in worths]

    def prefixes(self, confidences: Sequence[float]) -> list[float]:
        """Return in entry j-1 the probability that the first j drafts are all right."""
        reached, prefixes = 1.0, []  # a plain loop: this runs in every pass
        for table, confidence in zip(self.by_confidence, confidences):
            reached *= table[bisect_right(EDGES, confidence)]
            prefixes.append(reached)
        return prefixes

    def chances(self, confidences: Sequence[float], tree: DraftTree) -> list[float]:
        """Return for each node of `tree` the probability that its path is right; nothing if nothing was drafted."""
        if not confidences:
            return []
        bins = [bisect_right(EDGES, confidence) for confidence in confidences]
        return tree.chances([[ranks[at] for ranks in head] for head, at in zip(self.rank_by_confidence, bins)])


def _count_ranks(
    reached: Sequence[tuple[float, int]], ranks: int, prior: float
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Return the share of each rank in all drafts, and [rank][bin] in those of each bin, for the first `ranks` ranks.

    `reached` holds for each draft its confidence and the rank of the right token; `prior` the observations of each rank
    to start with, out of one draft.
    """
    mean = [(sum(r == rank for _, r in reached) + prior) / (len(reached) + 1) for rank in range(ranks)]
    in_bin: list[list[float]] = [[PRIOR * share] * (len(EDGES) + 1) for share in mean]
    all_in = [PRIOR] * (len(EDGES) + 1)
    for confidence, rank in reached:
        at = bisect_right(EDGES, confidence)
        all_in[at] += 1
        if rank < ranks:
            in_bin[rank][at] += 1
    return tuple(mean), tuple(tuple(a / b for a, b in zip(counts, all_in)) for counts in in_bin)


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

    def at(self, slots: int) -> tuple[float, tuple[float, ...]]:
        """Return the cost of a plain pass, and of drafting passes by rows, for any number of slots.

        Costs lie on the straight line through the nearest two batch sizes measured.
        """
        if len(self.slots) == 1:
            return self.plain[0], self.drafting[0]
        high = min(max(bisect_right(self.slots, slots), 1), len(self.slots) - 1)
        low = high - 1
        share = (slots - self.slots[low]) / (self.slots[high] - self.slots[low])

        def between(a: float, b: float) -> float:
            return max(a + share * (b - a), 1e-6)

        rows = tuple(between(a, b) for a, b in zip(self.drafting[low], self.drafting[high]))
        # More rows are never cheaper: a measurement that says so is noise.
        return between(self.plain[low], self.plain[high]), tuple(itertools.accumulate(rows, max))

    def at_tree(self, slots: int) -> tuple[float, tuple[float, ...]]:
        """Return the same as `at` for windows that are trees, on the straight line between the rows measured."""
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


def cost_of_rows(costs: Sequence[float], rows: int) -> float:
    """Return the cost of this many rows; rows beyond those measured cost the average row each."""
    beyond = rows - len(costs)
    if beyond <= 0:
        return costs[rows - 1]
    return costs[-1] + beyond * ((costs[-1] - costs[0]) / (len(costs) - 1) if len(costs) > 1 else costs[0])


class Calibration:
    """The estimates that a policy chooses by: stored (`Tuning`), or learned while decoding (`OnlineCalibration`).

    Stored estimates learn nothing, so the methods do nothing here.
    """

    online: ClassVar[bool] = False
    """True if estimates are learned while decoding. They begin as priors, on costs from a few passes."""

    @property
    def current(self) -> Tuning:
        """The estimates in use now; another object whenever they have changed."""
        raise NotImplementedError

    def measure(self, slots: int, sampled: bool) -> None:
        """Time passes of `slots` windows if their costs are not known yet."""

    def learn(self, sampled: bool, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Count a window that fed `fed` drafts of the heads and accepted `accepted` of them."""

    def fade(self, sampled: bool) -> None:
        """Forget most of what was learned of drafts, after a time without any."""


@dataclass(frozen=True)
class Tuning(Calibration):
    """The estimates for one model on one machine, as `headstart tune` measures them."""

    greedy: AcceptanceTable
    sampled: AcceptanceTable
    costs: PassCosts
    tree: DraftTree | DynamicTree | None = None
    """The best windows, if they are no chains."""
    sampled_costs: PassCosts | None = None
    """Costs of passes with a sampled request: they make noise for every row (None: the costs of greedy passes)."""

    @property
    def current(self) -> Tuning:
        """These estimates, which never change."""
        return self

    def select(self, sampled: bool) -> tuple[AcceptanceTable, PassCosts]:
        """Return the table and the costs of sampled passes, or of greedy ones."""
        return (self.sampled, self.sampled_costs or self.costs) if sampled else (self.greedy, self.costs)

    def expected_speedup(self, slots: int, rows: int, sampled: bool = False) -> float:
        """Return the expected tokens per second of windows of `rows` rows, over those of plain decoding."""
        table, costs = self.select(sampled)
        plain, drafting = costs.at(slots)
        tokens = 1 + sum(itertools.accumulate(table.mean[: rows - 1], lambda a, b: a * b))
        return tokens * plain / drafting[rows - 1]

    def best_speedup(self, slots: int, tree: DraftTree | DynamicTree | None = None, sampled: bool = False) -> float:
        """Return the highest expected speed-up of any fixed number of rows, of a chain or of `tree`."""
        table, costs = self.select(sampled)
        if tree is None:
            return max(self.expected_speedup(slots, rows, sampled) for rows in range(1, len(table.mean) + 2))
        plain, drafting = costs.at_tree(slots)
        tokens = itertools.accumulate(table.kept(tree), initial=1.0)
        return max(count * plain / cost_of_rows(drafting, rows) for rows, count in enumerate(tokens, start=1))

    def tree_for(self, slots: int) -> DraftTree | DynamicTree | None:
        """Return `tree` if it is expected to beat chains at this batch size."""
        if self.tree is None or self.best_speedup(slots, self.tree) <= self.best_speedup(slots):
            return None
        return self.tree


def machine_key(model: Transformer) -> dict[str, Any]:
    """Return what costs depend on besides the model: stored costs hold where the key is equal."""
    backend, here = backend_of(model), hardware.describe()
    return {
        "processor": here["gpus"][0]["name"] if model.device.type == "cuda" and here["gpus"] else here["cpu"],
        "instruction_sets": here["instruction_sets"],
        "threads": torch.get_num_threads(),
        "dtype": backend.form or str(model.dtype).removeprefix("torch."),
        "compiled": backend.row_exact,
    }


def read_tuning(directory: str | Path, model: Transformer) -> Tuning | None:
    """Read the tuning of `model`, in decoding form, for this machine, dtype and number of threads.

    None if the directory has none for these. Raises UsageError if the file is damaged or belongs to another model.
    """
    file = Path(directory) / TUNING_FILE
    if not file.exists():
        return None
    try:
        return parse_tuning(read_json(file), model)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: is not a tuning ({error!r}); delete it, or {AGAIN}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def write_tuning(directory: str | Path, model: Transformer, tuning: Tuning, more: dict[str, Any]) -> Path:
    """Write `tuning` into the directory and keep the entries of other machines; `more` says how it was measured."""
    file = Path(directory) / TUNING_FILE
    content = read_json(file) if file.is_file() else None
    write_text(file, json.dumps(add_tuning(content, machine_key(model), tuning, more), indent=1) + "\n")
    return file


def add_tuning(
    content: dict[str, Any] | None, key: dict[str, Any], tuning: Tuning, more: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of a tuning file with this tuning in it; `more` says how it was measured."""
    tree = None if tuning.tree is None else str(tuning.tree)
    sampled = None if tuning.sampled_costs is None else asdict(tuning.sampled_costs)
    entry = {"setting": key, **asdict(tuning.costs), "sampled": sampled, "draft_tree": tree, **more}
    others = [e for e in (content or {"costs": []})["costs"] if e["setting"] != key]
    kept = {name: value for name, value in (content or {}).items() if name.startswith("acceptance")}
    tables = {"edges": EDGES, "greedy": asdict(tuning.greedy), "sampled": asdict(tuning.sampled)}
    return {**kept, acceptance_name(key): tables, "costs": [*others, entry]}


def parse_tuning(content: dict[str, Any], model: Transformer) -> Tuning | None:
    """Return the tuning of `model` as it runs here, from a file's content; None if this machine was not measured.

    Raises UsageError for content that does not fit the model.
    """
    key = machine_key(model)
    entry = next((e for e in content["costs"] if e["setting"] == key), None)
    if entry is None:
        return None
    measured = content[acceptance_name(key)]
    greedy, sampled = (parse_measured(AcceptanceTable, measured[kind]) for kind in ("greedy", "sampled"))
    costs, text = parse_measured(PassCosts, entry), entry.get("draft_tree")
    sampled_costs = None if entry.get("sampled") is None else parse_measured(PassCosts, entry["sampled"])
    both, n = [costs, sampled_costs or costs], model.config.heads
    tree = None if text is None else parse_tree(text, n)
    _check_numbers([greedy, sampled], both)
    if (
        list(measured.get("edges", EDGES)) != list(EDGES)
        or not all(_fits(table, n) for table in (greedy, sampled))
        or any(len(rows) != n for each in both for rows in each.drafting)
        or (tree is not None and (tree.depth >= n or not greedy.covers(tree) or not all(each.tree for each in both)))
    ):
        raise UsageError(f"the tuning is not of a model with {n} heads; {AGAIN}")
    return Tuning(greedy, sampled, costs, tree, sampled_costs)


Measured = TypeVar("Measured", AcceptanceTable, PassCosts)


def parse_measured(kind: type[Measured], entry: dict[str, Any]) -> Measured:
    """Return the table or the costs in an entry of a tuning file. Raises KeyError or TypeError for damaged ones."""
    names = [field.name for field in fields(kind) if field.default is MISSING or field.name in entry]
    return kind(**{name: tuple(map(_make_tuples, entry[name])) for name in names})


def _make_tuples(value: Any) -> Any:
    return tuple(map(_make_tuples, value)) if isinstance(value, list) else value


def acceptance_name(key: dict[str, Any]) -> str:
    """Return the name of the tables: acceptance depends on the weights, which q4 and q8 change, not on the machine."""
    return f"acceptance_{key['dtype']}" if key["dtype"] in ("q4", "q8") else "acceptance"


def _fits(table: AcceptanceTable, heads: int) -> bool:
    """Return whether the table has an entry for each of the heads 2..n, and one for each bin."""
    ranked = [len(head) for head in table.rank_mean] == [len(head) for head in table.rank_by_confidence]
    bins = [*table.by_confidence, *(rank for head in table.rank_by_confidence for rank in head)]
    return (
        {len(table.mean), len(table.by_confidence), len(table.rank_mean or table.mean)} == {heads - 1}
        and ranked
        and all(len(each) == len(EDGES) + 1 for each in bins)
        and len(table.by_worth) == (len(WORTHS) + 1 if table.row_mean else 0)
    )


def _check_numbers(tables: Sequence[AcceptanceTable], costs: Sequence[PassCosts]) -> None:
    """Raise UsageError for shares, milliseconds or sizes that no measurement gives."""
    for table in tables:
        ranks = [*table.rank_mean, *(rank for head in table.rank_by_confidence for rank in head)]
        _check_all(
            "a share of right drafts", [table.mean, *table.by_confidence, *ranks, table.row_mean, table.by_worth], 0, 1
        )
    for each in costs:
        _check_all("a batch size", [each.slots], 1, MOST_SLOTS, whole=True)
        _check_all("the rows of a tree", [each.tree_rows], 2, MOST_NODES + 1, whole=True)
        _check_all("the milliseconds of a pass", [each.plain, *each.drafting, *each.tree], 0, MOST_MILLISECONDS)
        measured = {len(each.slots), len(each.plain), len(each.drafting), len(each.tree or each.slots)}
        ascending = all(list(sizes) == sorted(set(sizes)) for sizes in (each.slots, each.tree_rows))
        if not each.slots or len(measured) > 1 or not ascending:
            raise UsageError(f"its costs are not of ascending batch sizes; {AGAIN}")
        if any(len(rows) != len(each.tree_rows) for rows in each.tree):
            raise UsageError(f"its costs of trees are not of its rows; {AGAIN}")
        if 0 in (*each.plain, *(ms for rows in (*each.drafting, *each.tree) for ms in rows)):
            raise UsageError(f"it holds a pass of 0 ms; {AGAIN}")


def _check_all(name: str, rows: Sequence[Sequence[Any]], least: int, most: int, *, whole: bool = False) -> None:
    for value in itertools.chain.from_iterable(rows):
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            raise UsageError(f"{name} is {shorten(repr(value))}, not {least} to {most:,}; {AGAIN}")
