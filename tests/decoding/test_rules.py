"""Rules that weigh drafts: lossless ones have the target's law, by enumeration and by drawing; lossy ones do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from laws import chi_square, small_models
from shapes import HEADS, packed

from headstart.decoding import decode_pass as pass_module
from headstart.decoding import verify as verify_module
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.policy.calibration import EDGES, AcceptanceTable, PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.sampling import SamplingRows
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.decoding.verify import block_probabilities, chain_probabilities, lossy, weighed
from headstart.errors import UsageError

V, G = 3, 3
PROMPT = tuple(b"the cat then")


class Chances:
    """A random target for G + 1 tokens, token by token, and random drafts for the first G of them: a product, or a
    chain in which each depends on those before."""

    def __init__(self, seed: int, chained: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = {
            prefix: torch.rand(V, generator=generator, dtype=torch.float64).pow(2).add(1e-3)
            for length in range(G + 1)
            for prefix in itertools.product(range(V), repeat=length)
        }
        self.target = {prefix: p / p.sum() for prefix, p in self.target.items()}
        q = torch.rand(G, V, generator=generator, dtype=torch.float64).pow(2)
        q[1, 0] = 0  # a draft head may exclude a token
        self.drafts = {prefix: q[len(prefix)] / q[len(prefix)].sum() for prefix in self.target if len(prefix) < G}
        if chained:
            for prefix, product in self.drafts.items():
                other = torch.rand(V, generator=generator, dtype=torch.float64).pow(2) * (product > 0)
                self.drafts[prefix] = other / other.sum()

    def probability(self, tokens: tuple[int, ...], start: int = 0) -> float:
        """Return the probability of tokens[start:], given those before."""
        result = 1.0
        for i in range(start, len(tokens)):
            result *= float(self.target[tokens[:i]][tokens[i]])
        return result

    def joint(self, block: bool, fed: int) -> tuple[dict[tuple[int, ...], float], float]:
        """The law of G + 1 tokens: one pass with this rule, what it leaves open drawn from the target; and how many
        drafts it keeps on average. Every draft and every outcome of its draws is played through."""
        law: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(V), repeat=G + 1), 0.0)
        kept = 0.0
        for drafts in itertools.product(range(V), repeat=G):
            weight = float(torch.stack([self.drafts[drafts[:i]][x] for i, x in enumerate(drafts)]).prod())
            if weight == 0:
                continue
            p = torch.stack([self.target[drafts[:i]] for i in range(G + 1)])[None]
            q = torch.stack([self.drafts[drafts[:i]] for i in range(G)])[None]
            x, g = torch.tensor([drafts]), torch.tensor([fed])
            h = block_probabilities(p[:, :G], q, x, g)[0] if block else chain_probabilities(p[:, :G], q, x)
            for outcome in itertools.product((True, False), repeat=G):
                chance = weight
                for i, below in enumerate(outcome):
                    chance *= float(h[0, i]) if below else 1 - float(h[0, i])
                if chance == 0:
                    continue
                draws = torch.tensor([[-1.0 if below else 2.0 for below in outcome]], dtype=torch.float64)
                accepted, rest = weighed(p, q, x, g, torch.tensor([block]), draws)
                a = int(accepted)
                assert a <= fed
                kept += chance * a
                after = rest[0] / rest[0].sum()
                for y in range(V):
                    start = (*drafts[:a], y)
                    for tail in itertools.product(range(V), repeat=G - a):
                        tokens = start + tail
                        law[tokens] += chance * float(after[y]) * self.probability(tokens, a + 1)
        return law, kept

    def error(self, block: bool, fed: int) -> float:
        """The largest distance of a joint probability from the target's."""
        law, _ = self.joint(block, fed)
        assert sum(law.values()) == pytest.approx(1)
        return max(abs(chance - self.probability(tokens)) for tokens, chance in law.items())


@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
@pytest.mark.parametrize("fed", range(G + 1))
def test_lossless_rules_have_the_targets_joint_distribution_by_enumeration(block: bool, fed: int) -> None:
    for seed in range(3):
        assert Chances(seed).error(block, fed) < 1e-12


@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
def test_so_they_have_for_chains_of_drafts(block: bool) -> None:
    assert Chances(0, chained=True).error(block, G) < 1e-12


def test_block_verification_keeps_more() -> None:
    gains = []
    for seed in range(5):
        chances = Chances(seed)
        gains.append(chances.joint(True, G)[1] - chances.joint(False, G)[1])
    assert min(gains) > -1e-12 and max(gains) > 0.01


@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
def test_wrong_rules_fail_the_enumeration(block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify_module.residual
    # The token after a rejected draft drawn from the target instead of the residual.
    monkeypatch.setattr(verify_module, "residual", lambda p, q, weight, whole: p)
    assert Chances(0).error(block, G) > 1e-3
    # The residual of another weight.
    monkeypatch.setattr(verify_module, "residual", lambda p, q, weight, whole: right(p, q, weight * 0.9, whole))
    assert Chances(0).error(block, G) > 1e-3
    # The residual where all drafts were kept.
    monkeypatch.setattr(verify_module, "residual", lambda p, q, w, whole: right(p, q, w, torch.zeros_like(whole)))
    assert Chances(0).error(block, G) > 1e-3


CHAIN = {"head_kind": "sequential", "wiring": "causal"}


@pytest.mark.parametrize(("kind", "top_k"), [("match", 0), ("block", 2)])
def test_texts_drawn_with_lossless_rules_follow_the_models_law(kind: str, top_k: int) -> None:
    """Without top-k, and of other windows than chains of parallel heads: `test_windows_law.py`."""
    raw, model = small_models()
    # 1.8 is far beyond p = 1e-3 for 20 cells and more.
    assert chi_square(model, raw, Rule(kind), Sampling(1.0, top_k), 512) < 1.8


def test_a_wrong_rule_does_not_follow_the_models_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: after a rejected draft, a token of the target instead of the residual."""
    raw, model = small_models()
    monkeypatch.setattr(verify_module, "residual", lambda p, q, weight, whole: p)
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0)) > 3


def test_drafts_that_are_weighed_have_noise_of_their_own() -> None:
    rows = SamplingRows(2, "cpu")
    rows.set(0, Sampling(1.0, seed=4))
    rows.set(1, Sampling(1.0, seed=4), Rule("rejection"))
    root, offset = torch.zeros(2, dtype=torch.int64), torch.arange(2000)
    positions = offset.expand(2, -1)
    target, drafts = (
        noise.values(8) for noise in (rows.noise(positions, slice(0, 2)), rows.draft_noise(root, offset, slice(0, 2)))
    )
    assert torch.equal(target[0], target[1]) and torch.equal(target[0], drafts[0])
    uniform = rows.uniform(root, offset, slice(0, 2))[1]
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.mean() == pytest.approx(0.5, abs=0.03)
    streams = torch.stack([target[1, :, 0], drafts[1, :, 0], uniform])
    assert (torch.corrcoef(streams) - torch.eye(3)).abs().max() < 0.08


@pytest.mark.slow
def test_lossy_rules_do_not_follow_the_models_law() -> None:
    raw, model = small_models()
    for text in ("lossy-top-k:2", "lossy-minimum:3"):
        assert not Rule.parse(text).lossless
        assert chi_square(model, raw, Rule.parse(text), Sampling(1.0)) > 3, text


class Sure(DraftPolicy):
    """Feeds the drafts of which their heads are sure."""

    def __init__(self) -> None:
        costs = PassCosts((1,), (1.0,), ((1.0, 1.1, 1.2),))
        table = AcceptanceTable((0.5, 0.5), ((0.5,) * (len(EDGES) + 1),) * 2)
        super().__init__(Tuning(table, table, costs))

    def prefixes(self, sampled, confidences):
        return confidences

    def plan(self, slots, prefixes, sampled=False):
        return 1 + max(sum(c > 0.4 for c in p) for p in prefixes), True


@pytest.mark.slow
def test_feeding_only_sure_drafts_does_not_bend_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that was drawn with a high probability must not be fed rather than one drawn with a low one."""
    raw, model = small_models(layers=1, head_kind="linear")  # one request at a time: small passes
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0), 500, EngineConfig(exact=False), Sure()) < 1.8

    def of_the_draft_drawn(state, logits, drafts, expected, slots):  # the negative control
        return state.sampling.confidence(logits, drafts, slots)

    monkeypatch.setattr(pass_module, "confidence_to_feed", of_the_draft_drawn)
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0), 700, EngineConfig(exact=False), Sure()) > 2.5


@pytest.mark.slow
def test_what_a_chain_drew_does_not_decide_what_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The confidence of head 3 depends on the draft of head 2. So the policy may not read it: otherwise whether draft 2
    is fed would depend on draft 2."""

    class OnlyBothOrNone(Sure):
        def plan(self, slots, prefixes, sampled=False):
            return (3 if all(p and p[-1] > 0.45 for p in prefixes) else 1), True

    raw, model = small_models(layers=1, **CHAIN)
    one = EngineConfig(exact=False)
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0), 250, one, OnlyBothOrNone()) < 1.8
    told = pass_module.expected_confidence
    monkeypatch.setattr(pass_module, "expected_confidence", lambda q, chained: told(q, False))  # the negative control
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0), 700, one, OnlyBothOrNone()) > 2


def test_rules_side_by_side_do_not_change_one_another() -> None:
    """Each request of a mixed batch is what it is alone, and those that match are plain decoding's."""
    model = packed("transformer-parallel", torch.float32)
    kinds = ["match", "rejection", "lossy-top-k:2", "block", "match"]
    requests = [
        Request(PROMPT, 60, Sampling(0.9 * (i < 4), seed=i), acceptance=Rule.parse(text))
        for i, text in enumerate(kinds)
    ]
    together = generate_all(Engine(model, EngineConfig(slots=3)), requests)
    for request, generation in zip(requests, together):
        alone = generate_all(Engine(model), [request])[0]
        assert generation.tokens == alone.tokens and generation.stats.accepted == alone.stats.accepted
    for i in (0, 4):
        plain = generate_all(Engine(model), [Request(PROMPT, 60, requests[i].sampling, heads=1)])[0]
        assert together[i].tokens == plain.tokens


def test_a_rule_ends_with_its_request() -> None:
    engine = Engine(packed("replicated", torch.float32), EngineConfig(slots=2))
    generate_all(engine, [Request(PROMPT, 5, Sampling(1.0), acceptance=Rule("block"))])
    assert engine.state.sampling.plain_rules(slice(0, 2)) and not engine.state.sampling.any_sampled(slice(0, 2))


def test_greedily_lossless_rules_write_what_plain_decoding_writes(shape: str) -> None:
    model = packed(shape, torch.float32)
    plain = generate_all(Engine(model), [Request(PROMPT, 60, heads=1)])[0].tokens
    for text in ("rejection", "block", "lossy-typical", "lossy-top-k:1", "lossy-distance:0", "lossy-minimum:1"):
        got = generate_all(Engine(model), [Request(PROMPT, 60, acceptance=Rule.parse(text))])[0]
        assert got.tokens == plain, text
        assert got.stats.passes < 60


def test_minimum_block_size() -> None:
    model = packed("replicated", torch.float32)
    for least in (2, HEADS):
        rule = Rule("lossy-minimum", (least,))
        got = generate_all(Engine(model), [Request(PROMPT, 1 + least * 10, Sampling(1.0), acceptance=rule)])[0]
        assert got.stats.passes <= 11


def test_what_lossy_rules_keep() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02], [1.0, 0.0, 0.0, 0.0]])
    tokens = torch.tensor([0, 1, 0, 0])

    def kept(text: str, *drafts: int) -> list[bool]:
        return lossy(Rule.parse(text), p, torch.tensor(drafts), tokens).tolist()

    assert kept("lossy-top-k:2", 1, 3, 2) == [True, True, False]  # ties are kept
    assert kept("lossy-distance:1", 1, 1, 2) == [True, True, False]
    assert kept("lossy-minimum:2", 3, 3, 3) == [True, False, False]
    assert kept("lossy-minimum:2", 3, 1, 0) == [True, True, True]
    # Entropies 1.14, 1.39, 0.43: thresholds min(0.2, 0.6 exp(-H)) are 0.19, 0.15, 0.2.
    assert kept("lossy-typical:0.2:0.6", 1, 2, 1) == [True, True, False]
    assert kept("lossy-typical:0.2:0.6", 2, 2, 0) == [False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [("maybe", "no acceptance 'maybe'"), ("block:3", "takes 0 numbers"), ("lossy-typical:1", "takes 2 numbers"),
     ("lossy-top-k:x", "could not convert"), ("lossy-top-k:-1", "between 0 and"), ("lossy-top-k:nan", "between 0 and")],
)  # fmt: skip
def test_rules_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule.parse(text)
