"""The next window of a constrained text: drafts that the constraint allows, and the mask of every row.

Both come from one walk. The state after the root masks row 0, and the first draft is chosen under the same mask; it
moves the state on, which masks row 1 and the second draft, and so forth. So no draft is wasted on what cannot be, and
where the constraint leaves one token, that is drafted whatever a head says, beyond the last head too: it is sure to be
kept.

Where a rule weighs drafts, they are no longer independent: draft i is drawn from its head's distribution under a mask
that the drafts before it decide. Rejection and block verification hold for any draft distribution given the drafts
before (Leviathan et al. 2211.17192; Sun et al. 2403.10444), and for windows that end where the drafts so far say so.
What must not look at drafts drawn is how many rows the policy feeds; so `prefixes` then knows nothing of them.
"""

from __future__ import annotations

import numpy as np
import torch

from headstart.decoding.generation import FORCED, Generation
from headstart.decoding.step import DecodingState


def constrain(
    state: DecodingState, slot: int, generation: Generation, root: int, end_id: int | None, most: int
) -> None:
    """Rewrites the window of `slot`, whose drafts nobody has checked, with its masks, and what the generation knows of
    it (`sources`, `prefixes`).

    Args:
        root: the absolute position of the window's root.
        most: rows that the window may fill.
    """
    matcher, sampling = generation.matcher, state.sampling
    assert matcher is not None
    slots = slice(slot, slot + 1)
    proposed = state.window_SW[slot].tolist()
    weighs = sampling.rules[slot].weighs
    # A request for plain decoding gets plain decoding, unless drafts are looked up anyhow.
    width = 1 if generation.request.heads == 1 and generation.lookup is None else most
    forbidden = state.constraints.rows(slot)
    forbidden[:] = False
    drafts: list[int] = []
    sources: list[int] = []
    shares: list[float] = []
    for row in range(width):
        allowed = matcher.allowed()
        if not allowed.any():  # the text is stuck: whatever is chosen here, the matcher refuses
            break
        np.logical_not(allowed, out=forbidden[row])
        if row + 1 == width:
            break
        source = generation.sources[row] if row < len(generation.sources) else None
        if np.count_nonzero(allowed) == 1:
            token, source, share = int(allowed.argmax()), FORCED, 1.0
        elif source is None:
            break
        else:
            token, share = proposed[row + 1], _share(generation.prefixes, row)
            if source and (weighs or not allowed[token]):
                token, share = _drawn(state, slots, source, root + row + 1, forbidden[row], share)
            elif not allowed[token]:
                break
        ends = token == end_id
        if not ends and not matcher.push(token):
            break
        if source == FORCED and weighs:
            state.draft_q()[slot, row].zero_()[token] = 1
        drafts.append(token)
        sources.append(source)
        shares.append(share)
        if ends or matcher.ended:
            break
    matcher.back(len(drafts) - (bool(drafts) and drafts[-1] == end_id))
    state.window_SW[slot, 1 : 1 + len(drafts)] = torch.tensor(drafts, dtype=torch.int64, device=state.window_SW.device)
    state.drafted_S[slot] = len(drafts)
    if weighs:  # up to the first token drawn all is known; what comes after it is estimated without it
        lead = next((i for i, source in enumerate(sources) if source > 0), len(sources))
        shares[lead:] = [_share(generation.prefixes, i) for i in range(lead, len(generation.prefixes))]
    generation.sources = sources
    generation.prefixes = np.cumprod(shares).tolist()
    generation.confidences = []  # they were of other drafts
    if FORCED in sources:
        generation.match = 0  # how the looked up ones fare says nothing of matches


def _share(prefixes: list[float], row: int) -> float:
    """The probability that draft `row + 1` is right where those before it are (1 where nothing estimates it)."""
    if row >= len(prefixes):
        return 1.0
    before = prefixes[row - 1] if row else 1.0
    return prefixes[row] / before if before else 0.0


def _drawn(
    state: DecodingState, slots: slice, head: int, position: int, forbidden_V: np.ndarray, share: float
) -> tuple[int, float]:
    """The draft of `head` under a mask, as `decode_step` would have chosen it, and how probable it is; where a rule
    weighs it, its distribution is kept and the probability stays what it was taken for without the mask."""
    sampling, V = state.sampling, state.vocab_size
    logits = state.constraints.kept(slots.start, head)
    logits = logits.masked_fill(torch.from_numpy(forbidden_V).to(logits.device), float("-inf"))[None, None]
    noise = None
    if sampling.any_sampled(slots):
        noise = sampling.draft_noise(torch.tensor([[position]], device=logits.device), V, slots)
    token = sampling.choose(logits, noise, slots)
    if sampling.rules[slots.start].weighs:
        state.draft_q()[slots, head - 2] = sampling.probabilities(logits, slots)[:, 0]
    else:
        share = float(sampling.confidence(logits, token, slots))
    return int(token), share
