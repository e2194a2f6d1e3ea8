"""Rules that weigh drafts keep the target's law over several windows: no window uses a draw of another one.

Played through exactly over two windows, where equal draws are one variable; and drawn 5,000 times through the engine.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding import sampling as sampling_module
from headstart.decoding import verify as verify_module
from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.pack import pack
from headstart.decoding.sampling import Noise, SamplingRows
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.decoding.verify import Evidence, verify
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

ONE = slice(0, 1)
LENGTH = 4
"""Tokens whose joint law is compared."""
WRONG_KEYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # A draw for each position, as it once was: the next window reads draws that a rejection has conditioned.
    "position": lambda root_S, offset_R: root_S[:, None] + offset_R,
    # A draw for each offset: every window reads the same ones.
    "offset": lambda root_S, offset_R: 0 * root_S[:, None] + offset_R,
}

Known = dict[object, tuple[float, float]]
"""The interval of (0, 1) that each draw read lies in."""
Branch = tuple[tuple[int, ...], float, Known]
"""The tokens committed, how probable that is, and what is known of the draws."""


def split(known: Known, draw: object, probabilities: list[float]) -> Iterator[tuple[int, float, Known]]:
    """Reads a draw: (outcome, its probability given what is known, what is known then) for each that is possible."""
    low, high = known.get(draw, (0.0, 1.0))
    end = 0.0
    for outcome, probability in enumerate(probabilities):
        start, end = end, end + probability
        left, right = max(low, start), min(high, end)
        if right - left > 1e-9:
            yield outcome, (right - left) / (high - low), known | {draw: (left, right)}


class Windows:
    """A random target and random drafts, whose windows the real decisions judge with the real draws.

    Two draws are one variable where the values that `SamplingRows` gives for them are equal. A draw is read as a number
    in (0, 1): of a draft, or of the candidates of a depth, through their cumulated probabilities.
    """

    def __init__(self, rule: str, seed: int, *, vocabulary: int = 3, tree: str = "", chained: bool = False) -> None:
        self.rule, self.vocabulary, self.chained = Rule(rule), vocabulary, chained
        self.tree = TreeRows(DraftTree.parse(tree or "0,0.0"), "cpu")
        self.depth, self.ranks, self.is_tree = self.tree.tree.depth, self.tree.tree.ranks, bool(tree)
        self.nodes = [(), *self.tree.tree.paths]
        self.lists = list(itertools.permutations(range(vocabulary), self.ranks))
        self.generator = torch.Generator().manual_seed(seed)
        self.laws: dict[object, list[float]] = {}
        self.one = self.rows(1)

    def rows(self, count: int) -> SamplingRows:
        """So many slots of one request."""
        rows = SamplingRows(1, "cpu")
        rows.set(0, Sampling(1.0, seed=11), self.rule)
        for name, value in vars(rows).items():
            setattr(rows, name, value.expand(count) if isinstance(value, Tensor) else value * count)
        return rows

    def law(self, *of: object) -> list[float]:
        if of not in self.laws:
            x = torch.rand(self.vocabulary, generator=self.generator, dtype=torch.float64).pow(2) + 0.02
            self.laws[of] = (x / x.sum()).tolist()
        return self.laws[of]

    def draft_law(self, tokens: tuple[int, ...], drafts: tuple[tuple[int, ...], ...]) -> list[float]:
        """Return the law of the next draft: a product, or a chain where drafts depend on those before."""
        return self.law("draft", len(drafts), *tokens, *([one[0] for one in drafts] if self.chained else ()))

    def candidates(self, q: list[float]) -> list[float]:
        """Return the probability of each list drawn without replacement."""
        chances = []
        for drawn in self.lists:
            chance, left = 1.0, 1.0
            for token in drawn:
                chance *= q[token] / left if left > 1e-9 else 1.0
                left -= q[token]
            chances.append(chance)
        return chances

    def drafted(self, branch: Branch, drafts: tuple[tuple[int, ...], ...] = ()) -> Iterator[tuple[Branch, tuple]]:
        """Every way to draw the window after `branch`."""
        if len(drafts) == self.depth:
            yield branch, drafts
            return
        tokens, chance, known = branch
        root, offset = torch.tensor([len(tokens)]), torch.tensor([len(drafts) + 1])
        draw = tuple(self.one.draft_noise(root, offset, ONE).values(self.vocabulary).flatten().tolist())
        for i, share, then in split(known, draw, self.candidates(self.draft_law(tokens, drafts))):
            yield from self.drafted((tokens, chance * share, then), (*drafts, self.lists[i]))

    def play(self, branches: list[Branch], monkeypatch: pytest.MonkeyPatch) -> list[Branch]:
        """One window after each branch, with every draft and every outcome of the draws that decide."""
        drawn = [case for branch in branches for case in self.drafted(branch)]
        outcomes = list(itertools.product((True, False), repeat=self.depth * self.ranks))
        cases = [(*case, outcome) for case in drawn for outcome in outcomes]
        paths = [[tuple(drafts[d][r] for d, r in enumerate(node)) for node in self.nodes] for _, drafts, _ in cases]
        targets = [
            [self.law("target", *tokens, *path) for path in of] for ((tokens, _, _), _, _), of in zip(cases, paths)
        ]
        q = [[self.draft_law(tokens, drafts[:d]) for d in range(self.depth)] for (tokens, _, _), drafts, _ in cases]
        forced = torch.tensor([[-1.0 if below else 2.0 for below in outcome] for _, _, outcome in cases])
        thresholds, draws, accepted, rest = self.judge(
            torch.tensor([len(tokens) for (tokens, _, _), _, _ in cases]),
            torch.tensor([[0, *(path[-1] for path in of[1:])] for of in paths]),
            torch.tensor(targets).log(),
            torch.tensor(q),
            forced,
            monkeypatch,
        )
        results: list[Branch] = []
        for i, ((tokens, chance, known), _, outcome) in enumerate(cases):
            for below, h, draw in zip(outcome, thresholds[i], draws[i]):
                found = [each for each in split(known, draw, [h, 1 - h]) if each[0] == (not below)]
                if not found:
                    break
                chance, known = chance * found[0][1], found[0][2]
            else:
                kept = paths[i][accepted[i]] if self.is_tree else paths[i][-1][: accepted[i]]
                position = torch.tensor([[len(tokens) + len(kept) + 1]])
                draw = tuple(self.one.noise(position, ONE).values(self.vocabulary).flatten().tolist())
                last = [float(x) for x in rest[i] / rest[i].sum()]
                for token, share, then in split(known, draw, last):
                    results.append(((*tokens, *kept, token), chance * share, then))
        return results

    def judge(
        self, root_S: Tensor, window: Tensor, logits: Tensor, q: Tensor, forced: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[list[list[float]], list[list[object]], list[int], Tensor]:
        """The real decisions, with `forced` draws: of each draw the threshold below which it keeps a draft, and its
        real value; the last row kept (in a chain, how many drafts), and the law of the token after it."""
        S, sampling = len(root_S), self.rows(len(root_S))
        chain: list[Tensor] = []
        block: list[tuple[Tensor, Tensor]] = []
        rests: list[Tensor] = []
        values: list[Tensor] = []

        def uniform(self: SamplingRows, root_S: Tensor, offset_R: Tensor, slots: slice) -> Tensor:
            values.append(real_uniform(self, root_S, offset_R, slots))
            return forced

        def noted(function: Callable, notes: list) -> Callable:
            def call(*arguments: Tensor) -> object:
                notes.append(function(*arguments))
                return notes[-1]

            return call

        real_uniform = SamplingRows.uniform
        state = SimpleNamespace(
            sampling=sampling,
            length_S=root_S,
            windows=SimpleNamespace(tokens_SW=window, drafted_S=torch.full((S,), self.depth), q_SKV=q),
            heads_S=torch.full((S,), self.depth + 1),
            constraints=SimpleNamespace(any=lambda slots: False),
            advance=lambda *_: None,
        )
        slots, tokens, noise = slice(0, S), torch.zeros_like(window), Noise(*torch.zeros(2, *window.shape).long())
        with monkeypatch.context() as patch:
            patch.setattr(SamplingRows, "uniform", uniform)
            for name, notes in (("chain_probabilities", chain), ("block_probabilities", block), ("residual", rests)):
                patch.setattr(verify_module, name, noted(getattr(verify_module, name), notes))
            if self.is_tree:
                walk, found = verify_module.recursive_rejection, []
                patch.setattr(verify_module, "recursive_rejection", noted(walk, found))
                verify(state, Evidence(slots, tokens, logits, noise, root_S.clone(), self.depth + 1, self.tree))
                (accepted, rest), thresholds = found[0], torch.cat(chain, 1)
            else:
                accepted = verify(state, Evidence(slots, tokens, logits, noise, root_S, self.depth + 1)).accepted_S
                rest, thresholds = rests[-1], block[0][0] if self.rule.kind == "block" else chain[0]
        named = [[("uniform", value) for value in row] for row in values[0].tolist()]
        return thresholds.double().tolist(), named, accepted.tolist(), rest.double()

    def error(self, monkeypatch: pytest.MonkeyPatch) -> float:
        """The largest distance of a joint probability of the first tokens from the target's, after two windows."""
        branches: list[Branch] = [((), 1.0, {})]
        for _ in range(2):
            branches = self.play(branches, monkeypatch)
        ends: Counter[tuple[int, ...]] = Counter()
        for tokens, chance, _ in branches:
            ends[tokens[:LENGTH]] += chance
        joint = dict.fromkeys(itertools.product(range(self.vocabulary), repeat=LENGTH), 0.0)
        for tokens, chance in ends.items():
            for tail in itertools.product(range(self.vocabulary), repeat=LENGTH - len(tokens)):
                joint[tokens + tail] += chance * self.probability(tokens + tail, len(tokens))
        assert sum(joint.values()) == pytest.approx(1)
        return max(abs(chance - self.probability(tokens)) for tokens, chance in joint.items())

    def probability(self, tokens: tuple[int, ...], start: int = 0) -> float:
        """Return the probability of tokens[start:], given those before."""
        return math.prod(self.law("target", *tokens[:i])[tokens[i]] for i in range(start, len(tokens)))


KINDS = {
    "rejection": {"rule": "rejection"},
    "block": {"rule": "block"},
    "rejection of a chain": {"rule": "rejection", "chained": True},
    "block of a chain": {"rule": "block", "chained": True},
    "rejection of siblings": {"rule": "rejection", "tree": "0,1"},
    "rejection of a tree": {"rule": "rejection", "tree": "0,1,0.0,1.0", "vocabulary": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_windows_have_the_targets_joint_distribution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Windows(seed=1, **KINDS[kind]).error(monkeypatch) < 1e-6
    for wrong in WRONG_KEYS:
        with monkeypatch.context() as patch:
            patch.setattr(sampling_module, "window_key", WRONG_KEYS[wrong])
            error = Windows(seed=1, **KINDS[kind]).error(monkeypatch)
        # Rejection never looks behind the first draft that it rejects: to it a draw for each position is a fresh one.
        assert error < 1e-6 if wrong == "position" and "rejection" in kind else error > 1e-3, wrong


def fixed(heads: int = 4, **shape: Any) -> tuple[Transformer, Transformer]:
    """A model over three tokens whose weights come from a formula, in float64, and its decoding form."""
    config = ModelConfig(vocab_size=3, dim=16, layers=4, attention_heads=1, heads=heads, context=16, **shape)
    raw = Transformer(config).double()
    with torch.no_grad():
        for i, parameter in enumerate(raw.parameters()):
            if parameter.dim() > 1:
                wave = torch.sin(torch.arange(1, parameter.numel() + 1) * (i + 2.81) ** 2)
                parameter.copy_((wave * 4 / math.sqrt(parameter.shape[-1])).view_as(parameter))
            else:
                parameter.fill_(1)
    return raw, pack(copy.deepcopy(raw).float())


def law_of(raw: Transformer) -> Tensor:
    """The probability of each continuation of token 1, in the order of `itertools.product`."""
    every = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
    with torch.no_grad():
        logits = raw(torch.cat([torch.ones(len(every), 1, dtype=torch.int64), every], 1))[:, :-1]
    return logits.log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1).exp()


def surprise(law: Tensor, model: Transformer, rule: str, tree: str = "") -> float:
    """Return how many standard deviations chi-square lies above its mean, over sequences drawn with `COUNT` seeds.

    All are decoded in one batch; they begin as the engine begins a request whose prompt is read.
    """
    engine = Engine(model, EngineConfig(slots=COUNT, exact=False, tree=DraftTree.parse(tree) if tree else None))
    generations: list[Generation] = []
    for seed in range(COUNT):
        request = Request((1,), LENGTH, Sampling(1.0, seed=seed), acceptance=Rule(rule))
        generations.append(engine.submit(request))
        waiting = engine.scheduler.queue.pop()
        assert waiting is not None
        engine.begin(seed, waiting)
    while engine.busy:
        engine.step()
    assert sum(g.stats.passes for g in generations) < 0.8 * COUNT * LENGTH
    drawn = torch.zeros(3**LENGTH, dtype=torch.float64)
    for generation in generations:
        drawn[sum(token * 3**i for i, token in enumerate(reversed(generation.tokens)))] += 1
    common = law * COUNT >= 5
    seen, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (drawn, law * COUNT))
    seen, expected = seen[expected >= 5], expected[expected >= 5]
    freedom = len(seen) - 1
    assert freedom > 30
    return (float(((seen - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


COUNT = 5000
LINEAR = {"head_kind": "linear"}
SEQUENTIAL = {"head_kind": "sequential", "wiring": "causal"}
EAGLE: dict[str, Any] = {"head_kind": "eagle3", "wiring": "causal", "features": (0, 4)}
TREE = "0,1,0.0,1.0,0.1"


@pytest.mark.parametrize(
    ("shape", "rule", "tree", "wrong"),
    [
        (LINEAR, "rejection", "", "offset"),
        (LINEAR, "block", "", "position"),
        (SEQUENTIAL, "rejection", "", ""),
        (SEQUENTIAL, "block", "", "offset"),
        (EAGLE, "rejection", "", ""),
        (LINEAR, "rejection", TREE, "offset"),
    ],
)
def test_sequences_follow_the_models_law(
    shape: dict[str, Any], rule: str, tree: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, model = fixed(**shape)
    law = law_of(raw)
    assert surprise(law, model, rule, tree) < 3.5
    if wrong:
        monkeypatch.setattr(sampling_module, "window_key", WRONG_KEYS[wrong])
        assert surprise(law, model, rule, tree) > 5


@pytest.mark.parametrize("engine", [{}, {"tree": TREE}, {"lookup": 3}, {"constraint": "[\x00-\x02]{12}"}], ids=str)
def test_each_window_reads_draws_of_its_own(engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are drawn with, and judged by, draws of the window in which they stand, wherever drafts are made."""
    read: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[..., Tensor]:
        original = getattr(SamplingRows, name)

        def call(self: SamplingRows, root_S: Tensor, *arguments: Any) -> Tensor:
            read.append((name, int(root_S[0])))
            return original(self, root_S, *arguments)

        return call

    for name in ("uniform", "draft_noise"):
        monkeypatch.setattr(SamplingRows, name, noted(name))
    constraint = None
    if "constraint" in engine:
        pytest.importorskip("llguidance", reason="llguidance is not installed")
        constraint = Constraint.regex(engine["constraint"])
    rule = Rule("rejection" if "tree" in engine else "block")
    request = Request((1, 2, 1), 12, Sampling(1.0, seed=5), acceptance=rule, constraint=constraint)
    tree = DraftTree.parse(engine["tree"]) if "tree" in engine else None
    model = fixed(**LINEAR)[1]
    made = Engine(
        model, EngineConfig(exact=False, tree=tree, lookup=engine.get("lookup", 0)), tokenizer=ByteTokenizer()
    )
    tokens = generate_all(made, [request])[0].tokens
    judged = [root for name, root in read if name == "uniform"]
    drafted = [root for name, root in read if name == "draft_noise"]
    assert len(tokens) == 12 and len(judged) > 4
    assert judged == sorted(set(judged))
    assert list(dict.fromkeys(drafted))[: len(judged) - 1] == judged[1:]
