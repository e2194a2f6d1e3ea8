"""The engine: slots, each at its own length, decoded together pass by pass. Everything that generates runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from headstart.arguments import whole_number
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import compiled
from headstart.decoding.decode_pass import DecodingState, decode_step
from headstart.decoding.drafters.constrained import constrain
from headstart.decoding.drafters.lookup import MOST_LOOKUP, Lookup, Odds
from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.generation import Generation
from headstart.decoding.graphs import GraphedStep, cuda_capture
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.memory import DecodingMemory, check_memory, decoding_memory
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.sampling import log_probabilities
from headstart.decoding.scheduler import CHUNK, Admission
from headstart.decoding.settings import TREE_RULES, Request
from headstart.decoding.stopping import Stopper
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

EXACT_SPAN = 512
"""Exact decoding reads keys and values in multiples of this many positions: the block of torch's CPU attention. With
spans inside a block the last bits of a row depend on the span, hence on where its window happened to start; whole
blocks of masked positions add exactly nothing (docs/lab-notes.md)."""
SPAN = 64


class Engine:
    """Decodes up to `slots` requests at once; more wait in a queue.

    Args:
        model: in decoding form (`packing.pack`).
        slots: rows of the caches.
        context: most positions a request may reach (default: the model's).
        exact: True: a request's output is bit for bit the same for every number of heads. With the compiled kernels
            that costs nothing, and holds for every batch too. Elsewhere it fixes the shapes of a pass: all n rows of
            a window, all slots, whole attention blocks. False makes every pass as small as it can be: faster with few
            heads, equal up to rounding.
        deferred: see `decode_step`.
        policy: chooses the rows of each pass for requests that do not name a number of heads. Where `exact` fixes the
            shapes it has nothing to choose, and is left out.
        lookup: at most this many drafts of a window are looked up in the text itself, after those of the heads or in
            their place.
        prefill_budget: most prompt tokens that a step reads before its pass, so that a long prompt does not keep the
            others waiting (None: no limit, for batches in which nobody waits).
        prefix_reuse: whether a prompt goes on from the keys and values of a text that begins like it, in any slot. The
            output does not depend on it.
        tree: the heads' drafts fill a tree instead of a chain (None: the policy's, where it has one). Requests whose
            acceptance knows no trees get chains, and so do those decoded beside them.
        watch: called after each pass over drafts of which the confidence is known, with the generation, how many were
            fed and how many accepted. (`generation.confidences` are still those of the drafts fed.) It makes the engine
            ask for confidences without a policy too.
        graphs: whether passes run through CUDA graphs, see `GraphedStep` (None: on a CUDA device).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 1,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        exact: bool = True,
        deferred: bool = True,
        policy: DraftPolicy | None = None,
        lookup: int = 0,
        prefill_budget: int | None = 256,
        prefix_reuse: bool = True,
        tree: DraftTree | None = None,
        watch: Callable[[Generation, int, int], None] | None = None,
        graphs: bool | None = None,
    ) -> None:
        slots = whole_number("slots", slots, 1)
        context = None if context is None else whole_number("context", context, 1)
        lookup = whole_number("lookup", lookup, 0, MOST_LOOKUP)
        self.model, self.tokenizer, self.exact, self.deferred = model, tokenizer, exact, deferred
        self.context = context or model.config.context
        self.lookup, self.odds = lookup, Odds()
        self.width = model.config.heads + lookup
        backend = backend_of(model)
        self.fixed_shapes = exact and backend.needs_fixed_shapes(slots * self.width)
        # A policy is made for chains of all heads; those behind a gap of the offsets draft nothing.
        gaps = model.config.drafting_heads < model.config.heads
        self.policy = None if self.fixed_shapes or self.width == 1 or gaps else policy
        self.tree = self._planted(tree, slots)
        if self.tree is not None and exact and backend.needs_fixed_shapes(slots * self.width, tree=True):
            self.fixed_shapes, self.policy = True, None
        self._rows: TreeRows | None = None
        if self.tree is not None:
            self.width = max(self.width, self.tree.rows)
            self._rows = TreeRows(self.tree, model.trunk.embedding.weight.device)
        self._branching = self.tree is not None
        """Whether the windows now hold trees."""
        self.watch = watch
        self.step_span = EXACT_SPAN if self.fixed_shapes else SPAN
        device = model.trunk.embedding.weight.device
        check_memory(self._planned, slots, self.context, device)
        self.memory = self._planned(slots, self.context)
        self.state = DecodingState.empty(model, slots, self._capacity(self.context), self.width)
        on_gpu = self.state.length_S.device.type == "cuda"
        if graphs and not on_gpu:
            raise UsageError("graphs are for CUDA devices; leave graphs out, or load the model with device='cuda'")
        self.decode_pass: Callable[..., tuple[Tensor, Tensor]] = partial(decode_step, model, self.state)
        if graphs or (graphs is None and on_gpu):
            self.decode_pass = GraphedStep(model, self.state, cuda_capture())
        fixed_chunks = exact and backend.needs_fixed_shapes(CHUNK)
        self.admission = Admission(
            model, self.state, budget=prefill_budget, reuse=prefix_reuse, fixed_shapes=fixed_chunks
        )
        self._live: list[Generation | None] = [None] * slots
        """The requests that are being decoded; `admission` has those whose prompts are read, and those who wait."""
        self._lengths = [self.state.parked] * slots
        self.state.length_S.fill_(self.state.parked)

    def _capacity(self, context: int) -> int:
        # Behind the text a window, and what sequential heads keep there.
        return _round_up(context + self.width + self.model.config.ahead, self.step_span)

    def _planned(self, slots: int, context: int) -> DecodingMemory:
        """Of so many slots with such a context."""
        weight = self.model.trunk.embedding.weight
        return decoding_memory(
            self.model.config, slots, self._capacity(context), self.width, CHUNK, weight.dtype, weight.device
        )

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises UsageError if it does not fit this model."""
        config, drafting = self.model.config, self.model.config.drafting_heads
        heads = drafting if request.heads is None else request.heads
        if self.fixed_shapes and self.tree is not None and not _knows_trees(request):
            raise UsageError(
                f"acceptance {request.acceptance.kind} knows no draft trees, and exact decoding fixes windows here: "
                f"take {' or '.join(TREE_RULES)}, no tree, or exact=False"
            )
        if config.ahead and request.constraint is not None and request.acceptance.kind == "block":
            # Each later q was computed behind drafts that the constraint may have replaced: more chance than q tells.
            raise UsageError("acceptance block is not lossless for sequential heads with a constraint; take rejection")
        if not 1 <= heads <= drafting:
            gap = "" if drafting == config.heads else " before a gap in its offsets"
            raise UsageError(f"heads is {heads}; this model has {drafting}{gap}, take 1 (plain decoding) to that many")
        if not request.prompt:
            raise UsageError("the prompt is empty; give at least one token (to start a document, its end token)")
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if len(request.prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens; the context is {self.context}, which must also hold "
                "what is generated: shorten the prompt"
            )
        for name, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if count is not None and not 0 <= count <= config.vocab_size:
                raise UsageError(f"{name} is {count}; ask for 0 to {config.vocab_size} alternatives")
        beyond = next((token for token, _ in request.penalties.bias if token >= config.vocab_size), None)
        if beyond is not None:
            raise UsageError(f"logit bias names token {beyond}; the vocabulary has {config.vocab_size} tokens")
        largest, smallest = max(request.prompt), min(request.prompt)
        if smallest < 0 or largest >= config.vocab_size:
            bad = smallest if smallest < 0 else largest
            raise UsageError(f"the prompt holds token {bad}; this model's vocabulary has {config.vocab_size} tokens")
        ends = request.all_ends(self.tokenizer)
        matcher = None if request.matcher is None else request.matcher.restarted(ends)
        if matcher is None and request.constraint is not None:
            matcher = compiled(request.constraint, self.tokenizer, config.vocab_size, ends)
        limit = min(request.max_new_tokens, self.context - len(request.prompt))
        stopper = Stopper(limit, ends, request.stop, self.tokenizer, matcher, request.prompt)
        stopper.stop_tokens, stopper.keep_stop = request.stop_tokens, request.keep_stop
        generation = Generation(request, min(heads, self.most_heads), stopper)
        self.admission.waiting.append(generation)
        return generation

    @property
    def busy(self) -> bool:
        return self.admission.busy or any(self._live)

    @torch.no_grad()
    def step(self) -> list[tuple[Generation, str]]:
        """Admits what fits, reads prompts, runs one pass over the live slots, and returns what each committed (its
        released text)."""
        self.admission.admit([slot for slot, g in enumerate(self._live) if g is not None])
        for slot, generation in self.admission.fill():
            self.begin(slot, generation)
        live = [(slot, g) for slot, g in enumerate(self._live) if g is not None]
        if not live:
            return []
        first, last = (0, len(self._live)) if self.fixed_shapes else (live[0][0], live[-1][0] + 1)
        if self.state.length_S.is_cuda:
            first = 0  # rows cost little there, and each shape is a graph of its own
        rows, heads = self._shape([g for _, g in live], last - first)
        tree = self._rows.first(rows) if self._rows is not None and self._branching and rows > 1 else None
        draft_tree = self._rows if all(_knows_trees(g.request) for _, g in live) else None
        slots = slice(first, last)
        # Slots between the live ones run along, parked; their results are never read.
        starts = self._lengths[slots]
        wanted = max((-1 if g.request.logprobs is None else g.request.logprobs for _, g in live), default=-1)
        confident = heads > 1 and (self.policy is not None or self.watch is not None)
        tokens_SW, accepted_S = self.decode_pass(
            slots,
            rows=rows,
            heads=heads,
            span=min(_round_up(max(starts) + rows, self.step_span), self.state.cache.capacity),
            starts=starts,
            deferred=self.deferred,
            confident=confident,
            keep_logits=wanted >= 0,
            tree=tree,
            draft_tree=draft_tree,
            row_by_row=self.fixed_shapes,
        )
        self._branching = draft_tree is not None
        logits = self.state.logits_SRV
        logprobs = None if wanted < 0 or logits is None else log_probabilities(logits, tokens_SW, wanted)
        tokens, accepted = tokens_SW.tolist(), accepted_S.tolist()
        confidences = self.state.confidence_SK[slots].tolist() if confident else []
        windows = self.state.window_SW[slots].tolist() if self.lookup else []
        results, total = [], 0
        for slot, generation in live:
            at = slot - first
            committed = tokens[at][: accepted[at] + 1]
            self._lengths[slot] += len(committed)
            self.admission.slots.wrote(slot, committed, heads)
            total += len(committed)
            fed, beside = generation.fed(rows, None if tree is None else tree.tree)
            if self.watch is not None and generation.confidences and fed:
                self.watch(generation, fed, accepted[at])
            self._learn(generation, fed, accepted[at])
            before = len(generation.tokens)
            results.append((generation, generation.commit(committed, fed, beside)))
            if logprobs is not None and generation.request.logprobs is not None:
                generation.keep_logprobs(len(generation.tokens) - before, *(part[at] for part in logprobs))
            if heads < generation.heads and self.model.config.head_blocks:
                # Its drafting heads have missed these positions, and would draft from caches with holes.
                generation.heads = heads
                self.state.heads_S[slot] = heads
            generation.sources = list(range(2, min(generation.heads, heads) + 1))
            generation.confidences = confidences[at][: len(generation.sources)] if confident else []
            generation.prefixes = []
            if self.policy is not None:
                worth = self.policy.chances if self._branching else self.policy.prefixes
                generation.prefixes = worth(generation.sampled, generation.confidences)
            if generation.lookup is not None and not generation.finished:
                self._look_up(slot, generation, committed, windows[at])
            self._constrain(slot, generation)
        if self.policy is not None:
            self.policy.observe(last - first, len(live), rows, heads > 1, total, any(g.sampled for _, g in live))
        for slot, generation in live:
            if generation.finished:
                self._free(slot)
        if len(live) < last - first:  # the pass has moved those that are parked
            self.state.length_S[slots] = torch.tensor(self._lengths[slots], device=self.state.length_S.device)
        return results

    def _planted(self, tree: DraftTree | None, slots: int) -> DraftTree | None:
        """The tree that windows are, if any; sets how many heads that takes."""
        config = self.model.config
        if tree is None and self.policy is not None and not self.lookup:
            tree = self.policy.best_tree(slots)
        elif tree is not None and self.lookup:
            raise UsageError("drafts are looked up for chains only; take a draft tree or lookup, not both")
        heads = config.drafting_heads
        if tree is not None and (tree.depth >= heads or tree.ranks > config.vocab_size):
            raise UsageError(
                f"the draft tree has depth {tree.depth} and {tree.ranks} ranks; {heads} heads draft "
                f"{heads - 1} tokens ahead, of {config.vocab_size}: take a smaller one"
            )
        if tree is not None and not tree.is_chain and config.ahead:
            raise UsageError(
                "sequential heads draft one chain, each from the draft before; decode without a draft tree"
            )
        self.most_heads = heads if tree is None else tree.depth + 1
        if tree is None or tree.is_chain:
            return None
        if self.policy is not None and not self.policy.use_tree(tree):
            self.policy = None
        return tree

    def _shape(self, live: list[Generation], slots: int) -> tuple[int, int]:
        """Rows and heads of the next pass."""
        named = [g for g in live if self.policy is None or g.request.heads is not None]
        fixed = max((g.heads for g in named), default=1)
        planted = self.tree if self._branching else None
        if self.fixed_shapes:
            return self.width if self.tree is None else self.tree.rows, fixed
        depth = max((len(g.sources) for g in named), default=0)
        rows = 1 + depth if planted is None else planted.rows_within(depth)
        free = [g for g in live if g not in named]
        if self.policy is None or not free:
            return rows, fixed
        most, drafting = self.policy.plan(slots, [g.prefixes for g in free], any(g.sampled for g in live))
        return max(rows, most), max(fixed, *(g.heads for g in free)) if drafting else fixed

    def _learn(self, generation: Generation, fed: int, accepted: int) -> None:
        """How the drafts of a pass fared."""
        heads = sum(source > 0 for source in generation.sources)
        if self.policy is not None and generation.confidences:
            self.policy.learn(generation.sampled, generation.confidences, min(fed, heads), min(accepted, heads))
        if generation.match and fed > heads and accepted >= heads:
            self.odds.saw(generation.match, fed - heads, accepted - heads)

    def _look_up(self, slot: int, generation: Generation, committed: list[int], window: list[int]) -> None:
        """Looked up drafts into the window of a slot: in place of those of its heads, or after them, whichever can be
        expected to bring more."""
        lookup, heads = generation.lookup, len(generation.sources)
        assert lookup is not None
        lookup.push(committed)
        stats = generation.stats
        ahead = generation.prefixes or [
            (a + 0.5) / (d + 1) for a, d in zip(stats.accepted[:heads], stats.drafted[:heads])
        ]
        # Where drafts are weighed, what is fed must not depend on which drafts were drawn, so nothing follows those.
        weighs = generation.request.acceptance.weighs
        options = []
        for own in sorted({0, heads}):
            most = 0 if weighs and own else min(self.lookup, self.width - 1 - own)
            drafts, size = lookup.drafts(window[1 : 1 + own], most)
            chance = self.odds.of(size) if size else 0.0
            reached = ahead[own - 1] if own else 1.0
            prefixes = ahead[:own] + [reached * chance**j for j in range(1, len(drafts) + 1)]
            options.append((sum(prefixes), own, drafts, size, prefixes))
        _, own, drafts, generation.match, generation.prefixes = max(options, key=lambda option: option[0])
        generation.sources = generation.sources[:own] + [0] * len(drafts)
        generation.confidences = generation.confidences[:own]
        if drafts:
            self.state.propose(slot, own, drafts)

    def _constrain(self, slot: int, generation: Generation) -> None:
        """What the constraint of a slot, where it has one, makes of its window."""
        if generation.matcher is not None and not generation.finished:
            tree = self._rows if self._branching and _knows_trees(generation.request) else None
            # Beside trees a text that will get a chain begins without drafts.
            most = 1 if self._branching and tree is None else self.width
            constrain(self.state, slot, generation, self._lengths[slot], most, tree)

    def run(self) -> Iterator[tuple[Generation, str]]:
        """Steps until nothing is left."""
        while self.busy:
            yield from self.step()

    def cancel(self, generation: Generation) -> None:
        """Ends a request now: it leaves the queue, or its slot is free for the next step."""
        generation.cancel()
        if not self.admission.remove(generation) and generation in self._live:
            self._free(self._live.index(generation))

    def rewind(self, length: int) -> None:
        """All slots hold `length` positions again, whatever stands there: for timing the same step many times."""
        self._lengths = [length] * len(self._lengths)
        self.state.length_S.fill_(length)

    def _free(self, slot: int) -> None:
        self._live[slot] = None
        self.admission.left(slot)
        state = self.state
        state.length_S[slot] = self._lengths[slot] = state.parked
        state.drafted_S[slot] = 0
        state.heads_S[slot] = 1
        state.sampling.clear(slot)
        state.penalties.clear(slot)
        state.constraints.clear(slot)

    def begin(self, slot: int, generation: Generation) -> None:
        """Decoding begins: the prompt but its last token is in the caches, the last one the root of a window."""
        state, request = self.state, generation.request
        prompt = torch.tensor(request.prompt, device=state.length_S.device)
        self._live[slot] = generation
        if self.lookup:
            generation.lookup = Lookup(request.prompt)
        state.length_S[slot] = self._lengths[slot] = len(prompt) - 1
        state.window_SW[slot] = 0
        state.window_SW[slot, 0] = prompt[-1]
        state.drafted_S[slot] = 0
        state.heads_S[slot] = generation.heads
        state.sampling.set(slot, request.sampling, request.acceptance)
        state.penalties.set(slot, request.penalties, prompt)
        state.constraints.set(slot, generation.matcher is not None)
        self._constrain(slot, generation)


def _knows_trees(request: Request) -> bool:
    return request.acceptance.verifies_trees


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Runs `requests` to their ends; results in the order given."""
    generations = [engine.submit(request) for request in requests]
    for _ in engine.run():
        pass
    return generations
