"""Choice of tokens: greedy, or sampled with noise that belongs to the position.

A sampled token is argmax(transformed logits + g), where the Gumbel noise g is a hash of (seed, absolute position, token
id): drawing the same position again, in another window, batch or slot, with or without drafts, gives the same token.
Draft and verification share it, so a speculative sample *is* the plain sample of that seed (Daliri et al., 2408.07978).

Rules that weigh drafts (`Rule.weighs`) need other draws: the noise that drafts are drawn with, and the
uniforms that decide which drafts are kept. These draws belong to a window, not to a position: each is a hash of (seed,
position of the window's root, offset in the window). A rejection conditions every draw that the rule has looked at, in
block verification also the draws behind the rejected draft, and the next window covers the same positions again. Roots
only move forward, so no window uses a draw of another one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstart.decoding.kernels import cpu
from headstart.decoding.settings import COLDEST, Rule, Sampling


def _folded(seed: int) -> int:
    """Fold a seed, any Python integer, into 64 signed bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _stream(seed: int, number: int) -> int:
    """Return the seed of another stream of noise."""
    return (_folded(seed) ^ 0x5851F42D4C957F2D) * 6364136223846793005 + number


_M1, _M2, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # SplitMix64's, as signed integers


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64. Torch shifts arithmetically: the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _M1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _M2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def window_key(root_S: Tensor, offset_R: Tensor) -> Tensor:
    """Return the keys (S, R) int64 of draws that belong to windows with roots at positions `root_S` (S,).

    Keys of other roots or of other offsets, 1 to 2^31, differ.
    """
    return root_S[:, None] + (offset_R << 32)


def position_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise (..., V) fp32 for int64 `seeds` and `positions` of one shape (...).

    It is a pure function of (seed, position, token id), whatever the shape. Integer arithmetic hashes it, the same on
    every device; the last bit of its two logarithms depends on the device's library.
    """
    compiled = cpu.chooser() if seeds.device.type == "cpu" else None
    if compiled is None:
        return _reference_noise(seeds, positions, vocab_size)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    noise = torch.empty((*positions.shape, vocab_size))
    sizes = (positions.numel(), vocab_size, torch.get_num_threads())
    compiled.noise(seeds.data_ptr(), positions.data_ptr(), noise.data_ptr(), *sizes)
    return noise


def _reference_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    key = _mix(_mix(seeds + _STEP) + positions * _STEP)
    ids = torch.arange(1, vocab_size + 1, device=positions.device) * _STEP
    bits = _mix(key[..., None] + ids) >> 32 & 0xFFFFFFFF
    # A 32-bit uniform in (0, 1). Through log1p its smallest values, which decide about improbable tokens, stay exact to
    # 2^-33; the clamp keeps rounding from making the largest exactly 1.
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


@dataclass(frozen=True)
class Noise:
    """The noise of some positions (S, R), hashed where it is read: a choice reads that of few tokens."""

    seed_SR: Tensor
    """(S, R) int64."""
    position_SR: Tensor
    """(S, R) int64: positions, or the keys of windows (`window_key`)."""

    def rows(self, which: slice | Tensor) -> Noise:
        """Return the noise of the same rows of each slot."""
        return Noise(self.seed_SR[:, which], self.position_SR[:, which])

    def gather(self, row_SQ: Tensor) -> Noise:
        """Return the noise of Q rows of each slot, its own."""
        return Noise(self.seed_SR.gather(1, row_SQ), self.position_SR.gather(1, row_SQ))

    def values(self, vocab_size: int) -> Tensor:
        """Return the noise (S, R, V) of all tokens."""
        return position_noise(self.seed_SR, self.position_SR, vocab_size)


class SamplingRows:
    """The settings of all slots as tensors (S,), and on the host which transforms any of them needs."""

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self._of: list[Sampling] = [Sampling()] * slots
        self.rules: list[Rule] = [Rule()] * slots
        # What every pass asks of `_of` and `rules`.
        self._sampled, self._matching = [False] * slots, [True] * slots
        self.temperature = torch.zeros(slots, device=device)
        self.law_temperature = torch.zeros(slots, device=device)
        """Temperature of the distributions that a rule weighs: `temperature`, or that of the request where tokens are
        chosen greedily although it has one."""
        self.top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self.top_p = torch.ones(slots, device=device)
        self.min_p = torch.zeros(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.draft_seed = torch.zeros(slots, dtype=torch.int64, device=device)
        """Seed of the noise that drafts are drawn with: `seed`, or another one where a rule weighs drafts, which must
        be independent of the draws of the target."""
        self.weighs = torch.zeros(slots, dtype=torch.bool, device=device)
        """True where the slot's rule weighs probabilities; never in greedy slots."""
        self.block = torch.zeros(slots, dtype=torch.bool, device=device)
        """True where the slot's rule is block verification."""

    def set(self, slot: int, sampling: Sampling, rule: Rule | None = None, tree: bool = False) -> None:
        """Set the sampling and the acceptance rule of `slot`, and whether its drafts are trees.

        On trees `lossy-typical` is Medusa's: candidates and the token after the accepted ones are the best, no draws.
        """
        rule = rule or Rule()
        self.law_temperature[slot] = sampling.temperature
        if tree and rule.kind == "lossy-typical" and sampling.temperature > 0:
            sampling = replace(sampling, temperature=0.0)
        elif sampling.temperature == 0 and rule.kind in ("rejection", "block", "lossy-typical"):
            rule = Rule()  # the same where one token has all the probability
        self._keep(slot, sampling, rule)
        self.weighs[slot], self.block[slot] = rule.weighs, rule.kind == "block"
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = min(sampling.top_k, 2**62)  # more than any vocabulary, and an int64
        self.top_p[slot] = max(sampling.top_p, COLDEST)  # not 0 in float32: the best token stays
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = _folded(sampling.seed)
        self.draft_seed[slot] = _folded(_stream(sampling.seed, 1) if rule.weighs else sampling.seed)

    def clear(self, slot: int) -> None:
        """Make `slot` greedy, so that it costs the other slots no noise and no transforms."""
        self._keep(slot, Sampling(), Rule())
        self.temperature[slot] = 0

    def _keep(self, slot: int, sampling: Sampling, rule: Rule) -> None:
        self._of[slot], self.rules[slot] = sampling, rule
        self._sampled[slot], self._matching[slot] = sampling.temperature > 0, rule.kind == "match"

    def any_sampled(self, slots: slice) -> bool:
        """Return whether any of these slots needs noise."""
        return any(self._sampled[slots])

    def transforms(self, slots: slice) -> tuple[bool, int, bool, bool] | None:
        """Return which kernels `choose` runs, as far as the host decides.

        They depend on whether any of these slots is sampled, the largest top-k, and whether any has a top-p or a min-p.
        None where `choose` reads values on the host (top-p on a CPU).
        """
        settings = self._of[slots]
        top_p = any(s.top_p < 1 for s in settings)
        if top_p and self.temperature.device.type == "cpu":
            return None
        top_k = max((s.top_k for s in settings), default=0)
        return self.any_sampled(slots), top_k, top_p, any(s.min_p for s in settings)

    def noise(self, positions_SR: Tensor, slots: slice) -> Noise:
        """Return the noise of these positions."""
        return Noise(self.seed[slots, None].expand_as(positions_SR), positions_SR)

    def draft_noise(self, root_S: Tensor, offset_R: Tensor, slots: slice) -> Noise:
        """Return the noise of drafts at some offsets from the roots at positions `root_S`.

        It belongs to the window where the slot's rule weighs drafts, else to the draft's position, as in verification.
        """
        at_SR = torch.where(self.weighs[slots, None], window_key(root_S, offset_R), root_S[:, None] + offset_R)
        return Noise(self.draft_seed[slots, None].expand_as(at_SR), at_SR)

    def uniform(self, root_S: Tensor, offset_R: Tensor, slots: slice) -> Tensor:
        """Return draws (S, R) in [0, 1) for windows with roots at positions `root_S`, independent of all noise.

        A draw is below h with probability h, to 2^-24: always for h = 1, never for h = 0.
        """
        key = _mix(_mix(self.draft_seed[slots, None] ^ _M1) + window_key(root_S, offset_R) * _STEP)
        return (key >> 40 & 0xFFFFFF).float().mul_(2.0**-24)

    def plain_rules(self, slots: slice) -> bool:
        """Return whether all these slots accept by matching plain decoding."""
        return all(self._matching[slots])

    def probabilities(self, logits_SRV: Tensor, slots: slice) -> Tensor:
        """Return the distributions (S, R, V) that tokens are drawn from; greedy slots have temperature 1 here."""
        return self._transformed(logits_SRV.float(), slots, self.law_temperature).softmax(-1)

    def choose(self, logits_SRV: Tensor, noise_SR: Noise | None, slots: slice) -> Tensor:
        """Return tokens (S, R) int64 for logits (S, R, V), with the noise of the positions that they will have."""
        return self.best(logits_SRV, noise_SR, slots, 1)[..., 0]

    def best(self, logits_SRV: Tensor, noise_SR: Noise | None, slots: slice, count: int) -> Tensor:
        """Return the best tokens (S, R, count): that of `choose`, then what it would choose without those before.

        In sampled slots these are draws without replacement.
        """
        # Torch finds the largest of 32,000 in 20 us in fp32 and in 113 us in bf16; widening changes no comparison.
        logits_SRV = logits_SRV.float() if logits_SRV.dtype in (torch.bfloat16, torch.float16) else logits_SRV
        compiled = _compiled_for(logits_SRV)
        truncated = any(s.top_k or s.top_p < 1 or s.min_p for s in self._of[slots])
        if noise_SR is not None and (truncated or compiled is None):
            sampled_S = self.temperature[slots] > 0
            x_SRV = torch.where(sampled_S[:, None, None], self._transformed(logits_SRV, slots), logits_SRV)
            return draw(x_SRV, noise_SR, sampled_S, count)
        if compiled is not None:
            temperature = cpu.address(self.temperature, slots.start)
            return _compiled_best(compiled, logits_SRV, temperature, noise_SR, count)
        return _best_scores(logits_SRV, count)

    def candidates(
        self, logits_SRC: Tensor, noise_S1C: Tensor | None, slots: slice, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the best of C candidates (S, R, count), as `best` does, and the logarithms of their confidences.

        A confidence is the softmax of what candidates are chosen by: in sampled slots of the scores with their noise,
        which all rows share.
        """
        x_SRC = self._transformed(logits_SRC.float(), slots)
        if noise_S1C is None:
            best = self.best(logits_SRC, None, slots, count)
        else:
            x_SRC = x_SRC + torch.where(self.temperature[slots, None, None] > 0, noise_S1C, 0)
            best = x_SRC.topk(count, dim=-1).indices
        return best, x_SRC.gather(-1, best) - x_SRC.logsumexp(-1, keepdim=True)

    def _transformed(self, logits_SRV: Tensor, slots: slice, of_slots: Tensor | None = None) -> Tensor:
        settings = self._of[slots]
        temperature = (self.temperature if of_slots is None else of_slots)[slots, None, None]
        # Relative to the largest: however small the temperature, nothing overflows.
        x = (logits_SRV - logits_SRV.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1)
        if any(s.top_k for s in settings):
            x = _keep_top_k(x, self.top_k[slots, None], max(s.top_k for s in settings))
        if any(s.top_p < 1 for s in settings):
            x = _keep_top_p(x, self.top_p[slots, None, None])
        if any(s.min_p for s in settings):
            floor = x.amax(-1, keepdim=True) + self.min_p[slots, None, None].log()  # log 0 = -inf: nothing is dropped
            x = x.masked_fill(x < floor, float("-inf"))
        return x

    def confidence(self, logits_SRV: Tensor, tokens_SR: Tensor, slots: slice) -> Tensor:
        """Return the probability (S, R) fp32 of `tokens` at each slot's temperature (greedy: 1).

        Top-k, top-p and min-p are not applied.
        """
        compiled = _compiled_for(logits_SRV.float())
        if compiled is not None:
            logits_SRV, tokens_SR = logits_SRV.float().contiguous(), tokens_SR.contiguous()
            (S, R), V = tokens_SR.shape, logits_SRV.shape[2]
            confidence = torch.empty(S, R)
            pointers = (cpu.address(self.temperature, slots.start), tokens_SR.data_ptr(), confidence.data_ptr())
            compiled.confidence(logits_SRV.data_ptr(), *pointers, S * R, R, V, torch.get_num_threads())
            return confidence
        temperature = self.temperature[slots, None, None]
        x = logits_SRV.float()
        # Relative to the largest, as in `_transformed`.
        x = (x - x.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1)
        return (x.gather(-1, tokens_SR[..., None])[..., 0] - x.logsumexp(-1)).exp()


def draw(x_SRV: Tensor, noise_SR: Noise, sampled_S: Tensor | None = None, count: int = 1) -> Tensor:
    """Return the best tokens (S, R, count): of x + noise, where the largest x is 0, or in slots not sampled of x."""
    S, _, V = x_SRV.shape
    if (compiled := _compiled_for(x_SRV)) is not None:
        # At temperature 1 relative to 0, which changes no bit.
        temperature_S = torch.ones(S) if sampled_S is None else sampled_S.float()
        return _compiled_best(compiled, x_SRV, temperature_S.data_ptr(), noise_SR, count)
    scores = x_SRV + noise_SR.values(V)
    if sampled_S is not None:
        scores = torch.where(sampled_S[:, None, None], scores, x_SRV)
    return _best_scores(scores, count)


def _best_scores(scores_SRV: Tensor, count: int) -> Tensor:
    return scores_SRV.argmax(-1, keepdim=True) if count == 1 else scores_SRV.topk(count, dim=-1).indices


def _compiled_best(
    compiled: ctypes.CDLL, logits_SRV: Tensor, temperature: int, noise_SR: Noise | None, count: int
) -> Tensor:
    """Return the best tokens (S, R, count), given the address of the slots' temperatures."""
    logits_SRV = logits_SRV.contiguous()
    S, R, V = logits_SRV.shape
    tokens = torch.empty((S, R, count), dtype=torch.int64)
    keys = () if noise_SR is None else (noise_SR.seed_SR.contiguous(), noise_SR.position_SR.contiguous())
    pointers = [x.data_ptr() for x in keys] if keys else [None, None]
    sizes = (S * R, R, V, count, torch.get_num_threads())
    compiled.choose(logits_SRV.data_ptr(), temperature, *pointers, tokens.data_ptr(), *sizes)
    return tokens


def _compiled_for(logits: Tensor) -> ctypes.CDLL | None:
    return cpu.chooser() if logits.device.type == "cpu" and logits.dtype == torch.float32 else None


def _keep_top_k(x_SRV: Tensor, k_S1: Tensor, largest: int) -> Tensor:
    # By threshold, not by index: the result is a function of the row's values alone, ties included.
    best = x_SRV.topk(min(largest, x_SRV.shape[-1]), dim=-1).values
    index = (k_S1.clamp(1, best.shape[-1]) - 1).expand(x_SRV.shape[:2]).unsqueeze(-1)
    floor = best.gather(-1, index).masked_fill((k_S1 == 0)[..., None], float("-inf"))
    return x_SRV.masked_fill(x_SRV < floor, float("-inf"))


def _keep_top_p(x_SRV: Tensor, p_S11: Tensor) -> Tensor:
    total = x_SRV.logsumexp(-1, keepdim=True)
    # The head of the distribution nearly always holds the mass; the whole vocabulary is sorted only where it does not.
    # Both ways give the same values in the same order, hence the same threshold. The test costs nothing on a CPU;
    # elsewhere the host would wait for the whole pass.
    size = min(256, x_SRV.shape[-1]) if x_SRV.device.type == "cpu" else x_SRV.shape[-1]
    while True:
        best = x_SRV.topk(size, dim=-1).values
        before = (best - total).exp().cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        inside = before < p_S11
        if size == x_SRV.shape[-1] or not bool(inside[..., -1].any()):
            break
        size = x_SRV.shape[-1]
    floor = best.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
    return x_SRV.masked_fill((x_SRV < floor) & (p_S11 < 1), float("-inf"))


def log_probabilities(
    logits_SRV: Tensor, tokens_SR: Tensor, alternatives: int
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the log-probability of each token, and the best `alternatives` tokens with theirs, by slot and row."""
    logs = (logits_SRV if logits_SRV.element_size() == 8 else logits_SRV.float()).log_softmax(-1)
    best = logs.topk(alternatives, dim=-1)
    own = logs.gather(-1, tokens_SR[..., None])[..., 0]
    return own.tolist(), best.indices.tolist(), best.values.tolist()
