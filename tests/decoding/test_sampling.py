from __future__ import annotations

import pytest
import torch

from headstart.decoding.kernels import cpu
from headstart.decoding.sampling import SamplingRows, position_noise
from headstart.decoding.settings import Sampling
from headstart.errors import UsageError


def choose(logits: torch.Tensor, sampling: Sampling, positions: torch.Tensor) -> torch.Tensor:
    rows = SamplingRows(1, "cpu")
    rows.set(0, sampling)
    noise = rows.noise(positions[None], slice(0, 1))
    return rows.choose(logits.expand(1, len(positions), -1), noise, slice(0, 1))[0]


def test_noise_is_a_function_of_seed_position_and_token_alone() -> None:
    seeds, positions = torch.tensor([[7, 7], [8, 8]]), torch.tensor([[3, 4], [3, 4]])
    noise = position_noise(seeds, positions, 50)
    assert torch.equal(noise[1, 0], position_noise(torch.tensor(8), torch.tensor(3), 50))
    assert torch.equal(noise[0, 1, :20], position_noise(torch.tensor(7), torch.tensor(4), 20))
    assert len({tuple(row.tolist()) for row in noise.flatten(0, 1)}) == 4


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    noise = position_noise(torch.tensor(1).expand(4000), torch.arange(4000), 64).double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    centred = noise - noise.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * shifted).mean()) < 0.02
    other_seed = position_noise(torch.tensor(2).expand(4000), torch.arange(4000), 64).double()
    assert abs((centred * (other_seed - other_seed.mean())).mean()) < 0.02


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])
    draws = 200_000
    tokens = choose(logits, Sampling(temperature=0.8, seed=3), torch.arange(draws))
    expected = (logits / 0.8).softmax(-1) * draws
    statistic = ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum()
    assert statistic < 23.5  # chi-square, 4 degrees of freedom, p = 1e-4


def test_truncation_keeps_what_the_definitions_keep() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()

    def kept(**settings) -> set[int]:
        return set(choose(logits, Sampling(temperature=1.0, **settings), torch.arange(3000)).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_k=4) == {0, 1, 2, 3, 4}  # tied with the fourth
    assert kept(top_p=0.5) == {0}
    assert kept(top_p=0.51) == {0, 1}
    assert kept(top_p=0.8) == {0, 1, 2}
    assert kept(min_p=0.2) == {0, 1, 2}
    assert kept(min_p=0.26) == {0, 1}
    assert kept(top_k=3, top_p=0.9, min_p=0.3) == {0, 1}


def test_top_p_over_a_flat_vocabulary_sorts_all_of_it() -> None:
    """Past the first 256 candidates the whole row is sorted; the kept set is the same."""
    logits = torch.linspace(0, 1, 2000)
    tokens = choose(logits, Sampling(temperature=1.0, top_p=0.9), torch.arange(2_000))
    order = logits.softmax(-1).sort(descending=True)
    allowed = set(order.indices[order.values.cumsum(-1) - order.values < 0.9].tolist())
    assert len(allowed) > 1000 and set(tokens.tolist()) <= allowed


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 10
    tokens = choose(logits, Sampling(temperature, top_k=9, top_p=0.9, min_p=0.01), torch.arange(100))
    assert (tokens == logits.argmax()).all()


def test_each_slot_keeps_its_own_settings() -> None:
    logits = torch.randn(4, 1, 30, generator=torch.Generator().manual_seed(0))
    every = [Sampling(), Sampling(1.0, seed=4), Sampling(1.0, top_k=2, seed=4), Sampling(0.5, top_p=0.3, seed=9)]
    together = SamplingRows(4, "cpu")
    for slot, sampling in enumerate(every):
        together.set(slot, sampling)
    positions = torch.tensor([[5], [6], [7], [8]])
    got = together.choose(logits, together.noise(positions, slice(0, 4)), slice(0, 4))[:, 0].tolist()
    alone = [int(choose(logits[slot, 0], sampling, positions[slot])) for slot, sampling in enumerate(every)]
    assert got == alone
    assert got[0] == int(logits[0].argmax())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch):
    """Calls with the compiled choosing left out."""
    if cpu.chooser() is None:
        pytest.skip("no C compiler here: there is only torch's way")

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "chooser", lambda: None)
            return function(*arguments)

    return call


def test_compiled_noise_is_torchs(reference) -> None:
    seeds = torch.tensor([[0, -1, 2**62, 5]]).expand(6, 4)
    positions = torch.arange(24).view(6, 4) * 1000
    ours, torchs = position_noise(seeds, positions, 999), reference(position_noise, seeds, positions, 999)
    assert ours.shape == torchs.shape
    assert torch.allclose(ours, torchs, rtol=1e-6, atol=1e-6)  # one hash, two libraries' logarithms
    assert torch.equal(ours[2, 1], position_noise(seeds[2, 1], positions[2, 1], 999))


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 1001])
def test_compiled_choosing_is_torchs(reference, vocabulary: int) -> None:
    rows = SamplingRows(3, "cpu")
    for slot, temperature in enumerate((0.0, 0.8, 1.3)):
        rows.set(slot, Sampling(temperature, seed=slot))
    logits = torch.randn(3, 5, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    logits[:, 1] = logits[:, 1].round()  # ties: the first of equals
    noise = rows.noise(torch.arange(15).view(3, 5), slice(0, 3))
    for given in (noise, None):
        tokens = rows.choose(logits, given, slice(0, 3))
        assert torch.equal(tokens, reference(rows.choose, logits, given, slice(0, 3)))
    sure = rows.confidence(logits, tokens, slice(0, 3))
    assert torch.allclose(sure, reference(rows.confidence, logits, tokens, slice(0, 3)), rtol=1e-5)
    assert torch.allclose(sure[0], logits[0].softmax(-1).gather(-1, tokens[0, :, None])[:, 0], rtol=1e-5)
    # A part of the slots, whose rows are not laid out one after another.
    some = slice(1, 3)
    wide = torch.randn(2, 7, vocabulary)[:, 1:6]
    some_noise = rows.noise(torch.arange(20).view(2, 10)[:, ::2], some)
    assert torch.equal(rows.choose(wide, some_noise, some), reference(rows.choose, wide, some_noise, some))


def slow_choice(logits_RV: torch.Tensor, temperature: float, noise_RV: torch.Tensor) -> torch.Tensor:
    """Return the first of the tokens with the largest score of each row, whose noise is computed for all tokens."""
    top = logits_RV.amax(-1, keepdim=True)
    return ((logits_RV - top) / torch.tensor(temperature) + noise_RV).argmax(-1)


def shapes_of_logits(vocabulary: int) -> torch.Tensor:
    """Return logits (R, V): flat, noisy, as of a language model, peaked, with ties, masked, far apart, of one token."""
    x = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    x *= torch.tensor([0, 0.1, 1, 3, 6, 3, 3, 1e4, 1])[:, None]
    x[4, vocabulary // 2] = 60
    x[5] = x[5].round()
    x[6, torch.arange(vocabulary) % 7 > 0] = float("-inf")
    x[8, 1:] = float("-inf")
    return x


@pytest.mark.parametrize("vocabulary", [1, 5, 32, 97, 4096, 49_152])
@pytest.mark.parametrize("temperature", [1e-30, 0.01, 0.3, 0.7, 1.0, 2.0, 50.0])
def test_choosing_hashes_few_tokens_and_finds_the_best(vocabulary: int, temperature: float) -> None:
    """Tokens whose noise would have to be too large are left out: the others are scored as in the definition."""
    rows = SamplingRows(1, "cpu")
    rows.set(0, Sampling(temperature, seed=7))
    logits = shapes_of_logits(vocabulary)[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        noise = rows.noise(torch.arange(9)[None] + 1000 * vocabulary, slice(0, 1))
        given = logits.to(dtype)
        tokens = rows.choose(given, noise, slice(0, 1))[0]
        assert torch.equal(tokens, slow_choice(given[0].float(), temperature, noise.values(vocabulary)[0]))


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 40, "top_p": 0.5}])
def test_choosing_among_kept_tokens_finds_the_best(settings: dict[str, float]) -> None:
    rows = SamplingRows(1, "cpu")
    rows.set(0, Sampling(0.8, seed=3, **settings))  # type: ignore[arg-type]
    logits = shapes_of_logits(3000)[None]
    noise = rows.noise(torch.arange(9)[None], slice(0, 1))
    kept = rows.probabilities(logits, slice(0, 1)) > 0
    want = ((logits - logits.amax(-1, keepdim=True)) / torch.tensor(0.8)).masked_fill(~kept, float("-inf"))
    assert torch.equal(rows.choose(logits, noise, slice(0, 1)), (want + noise.values(3000)).argmax(-1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_are_the_largest_scores_in_order(reference, count: int) -> None:
    rows = SamplingRows(3, "cpu")
    for slot, temperature in enumerate((0.0, 0.7, 1.0)):
        rows.set(slot, Sampling(temperature, seed=slot, top_k=10 * slot))
    logits = torch.randn(3, 4, 2000, generator=torch.Generator().manual_seed(1)) * 4
    for slots in (slice(0, 3), slice(0, 2), slice(0, 1)):  # with and without top-k, all greedy
        noise = rows.noise(torch.arange(4).expand(slots.stop, 4) + 50, slots)
        given = logits[slots]
        found = rows.best(given, noise, slots, count)
        assert torch.equal(found, reference(rows.best, given, noise, slots, count))
        assert torch.equal(found[..., 0], rows.choose(given, noise, slots))
        greedy = rows.best(given, None, slots, count)
        assert torch.equal(greedy, given.topk(count, dim=-1).indices)


def test_logits_without_a_largest_give_the_first_token(reference) -> None:
    """Nothing else is allowed, or a product overflowed: a token of the vocabulary all the same."""
    rows = SamplingRows(1, "cpu")
    rows.set(0, Sampling(1.0, seed=7))
    logits = torch.full((1, 2, 100), float("-inf"))
    logits[0, 1, 40] = float("inf")
    noise = rows.noise(torch.arange(2)[None], slice(0, 1))
    for call in (lambda function, *arguments: function(*arguments), reference):
        assert call(rows.choose, logits, noise, slice(0, 1))[0].tolist() == [0, 40]
