"""The engine: slots, each at its own length, decoded together pass by pass. Everything that generates runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headstart.console import say
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Matcher, MinimumLength, compiled
from headstart.decoding.decode_pass import decode_pass
from headstart.decoding.drafters.interface import Turn
from headstart.decoding.drafters.registry import HOST_DRAFTERS
from headstart.decoding.drafters.tree import Branches, DraftTree, DynamicTree, TreeRows
from headstart.decoding.engine_config import EngineConfig
from headstart.decoding.generation import Generation
from headstart.decoding.graphs import GraphedPass, cuda_capture
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.cpu.stalls import REPORT
from headstart.decoding.memory import DecodingMemory, check_memory, decoding_memory
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.sampling import log_probabilities
from headstart.decoding.scheduler import CHUNK, Scheduler
from headstart.decoding.settings import TREE_RULES, Request
from headstart.decoding.state import DecodingState, PassPlan
from headstart.decoding.stopping import Stopper
from headstart.decoding.window import Origin, Window
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

EXACT_SPAN = 512
"""Span of attention in fixed shapes, in positions: the block of torch's CPU attention. With spans inside a block the
last bits of a row depend on the span, hence on where its window happened to start; whole blocks of masked positions
add exactly nothing (docs/lab-notes.md)."""
SPAN = 64
"""Span of attention elsewhere, in positions."""

Watch = Callable[[Generation, int, int], None]
"""(generation, drafts fed, drafts accepted)."""


class Engine:
    """Decodes requests in slots, and queues those that find no free slot.

    Args:
        model: the model in decoding form (`kernels.pack`).
        config: settings (None: the defaults).
        tokenizer: for text, stop strings, end tokens and constraints.
        policy: chooses the rows of each pass for requests that do not name a number of heads. With fixed shapes it has
            nothing to choose, and is left out.
        watch: called after each pass over drafts of known confidence, before the next window is made. With it,
            confidences are computed without a policy too.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        policy: DraftPolicy | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.model, self.tokenizer, self.watch = model, tokenizer, watch
        self.config = config = config or EngineConfig()
        self.context = config.context or model.config.context
        self._choose_shapes(policy)
        self._rows = TreeRows(self.tree, model.device) if isinstance(self.tree, DraftTree) else self.tree
        self._branching = self.tree is not None
        """True while the windows hold trees."""
        check_memory(self._planned_memory, config.slots, self.context, model.device)
        self.memory = self._planned_memory(config.slots, self.context)
        self.state = DecodingState.empty(model, config.slots, self._capacity(self.context), self.width)
        self.state.length_S.fill_(self.state.parked)
        if isinstance(self.tree, DynamicTree):
            self.state.windows.hold_trees(self.tree)
        on_gpu = model.device.type == "cuda"
        if config.graphs and not on_gpu:
            raise UsageError("graphs are for CUDA devices; leave graphs out, or load the model with device='cuda'")
        self.decode_pass: Callable[[PassPlan], tuple[Tensor, Tensor]] = partial(decode_pass, model, self.state)
        if config.graphs or (config.graphs is None and on_gpu):
            self.decode_pass = GraphedPass(model, self.state, cuda_capture())
        self.scheduler = Scheduler(
            model,
            self.state,
            budget=config.prefill_budget,
            reuse=config.prefix_reuse,
            fixed_chunks=config.exact and backend_of(model).needs_fixed_shapes(CHUNK),
        )
        self._drafters = [drafter for kind in HOST_DRAFTERS if (drafter := kind.make(config)) is not None]
        """Drafters on the host, in the order of their turns."""
        self._reads_windows = any(drafter.reads_tokens for drafter in self._drafters)
        self._drafting = tuple(Origin(k) for k in range(2, model.config.heads + 1))

    def _choose_shapes(self, policy: DraftPolicy | None) -> None:
        """Set the width of windows, their tree, whether shapes are fixed, and the policy if it has something to choose.

        Raises UsageError for a tree that this model cannot draft.
        """
        model, config, backend = self.model.config, self.config, backend_of(self.model)
        drafting = model.drafting_heads
        self._host_rows = sum(kind.rows(config) for kind in HOST_DRAFTERS)
        self.width = model.heads + self._host_rows
        self.fixed_shapes = config.exact and backend.needs_fixed_shapes(config.slots * self.width)
        # A policy is made for chains of all heads; heads after a gap of the offsets draft nothing.
        if self.fixed_shapes or self.width == 1 or drafting < model.heads:
            policy = None
        tree = config.tree
        if tree is not None and self._host_rows:
            raise UsageError("drafts are looked up for chains only; take a draft tree or lookup, not both")
        if tree is None and policy is not None and not self._host_rows:
            tree = policy.best_tree(config.slots)
        if tree is not None and (tree.depth >= drafting or tree.ranks > model.drafted_tokens):
            raise UsageError(
                f"the draft tree has depth {tree.depth} and {tree.ranks} ranks; {drafting} heads draft "
                f"{drafting - 1} tokens ahead, of {model.drafted_tokens}: take a smaller one"
            )
        if tree is not None and not tree.is_chain:
            self._check_tree(tree)
        self.most_heads = drafting if tree is None else tree.depth + 1
        if tree is not None and tree.is_chain:
            tree = None
        if tree is not None:
            if policy is not None and not policy.use_tree(tree):
                policy = None
            if config.exact and backend.needs_fixed_shapes(config.slots * self.width, tree=True):
                self.fixed_shapes, policy = True, None
            self.width = max(self.width, tree.rows, tree.drafted_rows if isinstance(tree, DynamicTree) else 0)
        self.tree, self.policy = tree, policy
        self.step_span = EXACT_SPAN if self.fixed_shapes else SPAN

    def _check_tree(self, tree: DraftTree | DynamicTree) -> None:
        """Raise UsageError unless the heads draft such trees: steps of one module dynamic ones, others static ones."""
        model = self.model.config
        if model.ahead and not model.kind.one_cache:
            raise UsageError(
                f"{model.head_kind} heads without norm_output draft one chain, each from a cache of its own; decode "
                "without a draft tree"
            )
        if isinstance(tree, DynamicTree) != bool(model.ahead):
            other = "take sizes such as 4x3:8" if model.ahead else "take a number of drafts, or nodes such as 0,1,0.0"
            kind = "from the drafts before" if model.ahead else "at once"
            raise UsageError(f"the draft tree {tree} is not for {model.head_kind} heads, which draft {kind}; {other}")

    def _capacity(self, context: int) -> int:
        # After the sequence come a window and what sequential heads keep there.
        return _round_up(context + self.width + self.model.config.ahead, self.step_span)

    def _planned_memory(self, slots: int, context: int) -> DecodingMemory:
        model = self.model
        return decoding_memory(
            model.config, slots, self._capacity(context), self.width, CHUNK, model.dtype, model.device
        )

    def generation(self, request: Request) -> Generation:
        """Return a request on its way, not queued yet. Raises UsageError if it does not fit this model."""
        config = self.model.config
        if self.fixed_shapes and self.tree is not None and not request.acceptance.verifies_trees:
            raise UsageError(
                f"acceptance {request.acceptance.kind} knows no draft trees, and exact decoding fixes windows here: "
                f"take {' or '.join(TREE_RULES)}, no tree, or exact=False"
            )
        request.check(config, self.context)
        ends = request.all_ends(self.tokenizer)
        matcher: Matcher | MinimumLength | None = None if request.matcher is None else request.matcher.restarted(ends)
        if matcher is None and request.constraint is not None:
            matcher = compiled(request.constraint, self.tokenizer, config.vocab_size, ends)
        if request.min_new_tokens:
            matcher = MinimumLength(request.min_new_tokens, config.vocab_size, ends | request.stop_tokens)
        limit = min(request.max_new_tokens, self.context - len(request.prompt))
        stream = None if self.tokenizer is None else request.text_stream(self.tokenizer)
        stopper = Stopper(limit, ends, request.stop, self.tokenizer, matcher, stream)
        stopper.stop_tokens, stopper.keep_stop = request.stop_tokens, request.keep_stop
        stopper.least = request.min_new_tokens
        heads = config.drafting_heads if request.heads is None else request.heads
        return Generation(request, min(heads, self.most_heads), stopper)

    def submit(self, request: Request) -> Generation:
        """Queue a request behind those that came before. Raises UsageError if it does not fit this model."""
        generation = self.generation(request)
        self.scheduler.submit(generation)
        return generation

    @property
    def busy(self) -> bool:
        """True if any request is not finished."""
        return self.scheduler.busy

    def run(self) -> Iterator[tuple[Generation, str]]:
        """Step until no request is left; yield what `step` returns."""
        while self.busy:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[tuple[Generation, str]]:
        """Admit what fits, read prompts, and run one pass over the slots that decode.

        Return each generation of the pass, with the text that its new tokens release.
        """
        scheduler = self.scheduler
        scheduler.admit()
        for slot, generation in scheduler.fill():
            self.begin(slot, generation)
        live = scheduler.decoding()
        if not live:
            return []
        plan, alternatives = self._plan(live)
        tokens_SD, accepted_S = self.decode_pass(plan)
        self._branching = plan.draft_tree is not None
        outcome = self._read(plan, tokens_SD, accepted_S, alternatives)
        results = [(generation, self._take(slot, generation, plan, outcome)) for slot, generation in live]
        if not self.state.length_S.is_cuda and (line := REPORT.after_pass()):
            say(line)
        slots = plan.slots.stop - plan.slots.start
        if self.policy is not None:
            total = sum(len(outcome.committed[slot - plan.slots.start]) for slot, _ in live)
            sampled = any(generation.sampled for _, generation in live)
            self.policy.observe(slots, len(live), plan.rows, plan.heads > 1, total, sampled)
        for slot, generation in live:
            if generation.finished:
                self._free(slot)
        if len(live) < slots:  # the pass has moved those that are parked
            lengths = torch.tensor(scheduler.lengths[plan.slots], device=self.state.length_S.device)
            self.state.length_S[plan.slots] = lengths
        return results

    def _plan(self, live: list[tuple[int, Generation]]) -> tuple[PassPlan, int]:
        """Return the shape of the next pass, and how many log-probabilities are asked for (-1: none)."""
        scheduler, state = self.scheduler, self.state
        first, last = (0, len(scheduler.live)) if self.fixed_shapes else (live[0][0], live[-1][0] + 1)
        if state.length_S.is_cuda:
            first = 0  # rows cost little there, and each shape is a graph of its own
        generations = [generation for _, generation in live]
        rows, heads = self._rows_and_heads(generations, last - first)
        # Slots between the live ones run along, parked; their results are never read.
        starts = scheduler.lengths[first:last]
        alternatives = max(-1 if g.request.logprobs is None else g.request.logprobs for g in generations)
        plan = PassPlan(
            slots=slice(first, last),
            rows=rows,
            heads=heads,
            span=min(_round_up(max(starts) + rows, self.step_span), state.cache.capacity),
            starts=starts,
            tree=self._tree_of(rows) if self._branching and rows > 1 else None,
            draft_tree=self._rows if all(g.request.acceptance.verifies_trees for g in generations) else None,
            deferred=self.config.deferred,
            confident=heads > 1 and (self.policy is not None or self.watch is not None),
            keep_logits=alternatives >= 0,
            row_by_row=self.fixed_shapes,
        )
        return plan, alternatives

    def _tree_of(self, rows: int) -> TreeRows | DynamicTree | None:
        """Return the tree of the first rows of a window; those of a dynamic tree are sorted, so any number will do."""
        return self._rows.first(rows) if isinstance(self._rows, TreeRows) else self._rows

    def _rows_and_heads(self, live: list[Generation], slots: int) -> tuple[int, int]:
        """Return the rows and heads of the next pass: as requests name them, as the policy chooses for the others."""
        policy = self.policy
        named = [g for g in live if policy is None or g.request.heads is not None]
        heads = max((g.heads for g in named), default=1)
        if self.fixed_shapes:
            return self.width if self.tree is None else self.tree.rows, heads
        depth = max((len(g.window.drafters) for g in named), default=0)
        rows = self.tree.rows_within(depth) if self.tree is not None and self._branching else 1 + depth
        free = [g for g in live if policy is not None and g.request.heads is None]
        if policy is None or not free:
            return rows, heads
        most, drafting = policy.plan(slots, [g.window.chances for g in free], any(g.sampled for g in live))
        return max(rows, most), max(heads, *(g.heads for g in free)) if drafting else heads

    def _read(self, plan: PassPlan, tokens_SD: Tensor, accepted_S: Tensor, alternatives: int) -> _Outcome:
        """Bring what a pass computed to the host."""
        logits = self.state.logits_SRV
        logprobs = log_probabilities(logits, tokens_SD, alternatives) if plan.keep_logits and logits is not None else ()
        windows = self.state.windows
        dynamic = plan.draft_tree if isinstance(plan.draft_tree, DynamicTree) and plan.heads > 1 else None
        confidences = None
        if plan.confident:
            known = windows.confidence_SK[plan.slots].tolist
            confidences = known() if dynamic is None else windows.worths(plan.slots, dynamic)
        return _Outcome(
            committed=[row[: count + 1] for row, count in zip(tokens_SD.tolist(), accepted_S.tolist())],
            logprobs=logprobs,
            confidences=confidences,
            windows=windows.tokens_SW[plan.slots].tolist() if self._reads_windows else None,
            depths=None if dynamic is None else windows.depths(plan.slots, dynamic),
        )

    def _take(self, slot: int, generation: Generation, plan: PassPlan, outcome: _Outcome) -> str:
        """Commit what a pass decided for one generation and make its next window. Return the text released."""
        at = slot - plan.slots.start
        committed, window = outcome.committed[at], generation.window
        self.scheduler.advance(slot, committed, plan.heads)
        fed, siblings = window.fed(plan.rows, plan.tree.tree if isinstance(plan.tree, TreeRows) else plan.tree)
        self._learn(generation, fed, len(committed) - 1)
        before = len(generation.tokens)
        text = generation.commit(committed, fed, siblings)
        if outcome.logprobs and generation.request.logprobs is not None:
            generation.keep_logprobs(len(generation.tokens) - before, *(part[at] for part in outcome.logprobs))
        if plan.heads < generation.heads and self.model.config.head_blocks:
            # Its drafting heads have missed these positions, and would draft from caches with holes.
            generation.heads = plan.heads
            self.state.heads_S[slot] = plan.heads
        drafters = list(self._drafting[: min(generation.heads, plan.heads) - 1])
        generation.window = window = Window(drafters)
        if outcome.depths is not None:
            depths = enumerate(outcome.depths[at])
            window.depths = {row: depth for row, depth in depths if 0 < depth <= len(drafters)}
        if outcome.confidences is not None:
            window.confidences = outcome.confidences[at]
            if outcome.depths is None:
                window.confidences = window.confidences[: len(drafters)]
        if self.policy is not None:
            chances = self.policy.chances if self._branching else self.policy.prefixes
            window.chances = chances(generation.sampled, window.confidences)
        self._propose(slot, generation, committed, outcome.windows[at] if outcome.windows is not None else [])
        return text

    def _learn(self, generation: Generation, fed: int, accepted: int) -> None:
        """Record which drafts of a pass were accepted, for the policy and for the drafters on the host."""
        window = generation.window
        if self.watch is not None and window.confidences and fed:
            self.watch(generation, fed, accepted)
        heads = sum([drafter.is_head for drafter in window.drafters])
        if self.policy is not None and window.confidences:
            self.policy.learn(generation.sampled, window.confidences, min(fed, heads), min(accepted, heads))
        for drafter in self._drafters:
            drafter.learn(window, fed - heads, accepted - heads)

    def _propose(self, slot: int, generation: Generation, committed: list[int], tokens: list[int]) -> None:
        """Let the drafters on the host rewrite the next window of a generation."""
        drafters = [drafter for drafter in self._drafters if drafter.takes(generation)]
        if generation.finished or not drafters:
            return
        tree = self._branches(slot) if self._branching and generation.request.acceptance.verifies_trees else None
        # A request that will get a chain has no drafts while the others hold trees. One for plain decoding has none
        # either, unless a drafter on the host adds rows.
        plain = generation.request.heads == 1 and not self._host_rows
        rows = 1 if plain or (self._branching and tree is None) else self.width
        turn = Turn(self.state, slot, generation, self.scheduler.lengths[slot], committed, tokens, rows, tree)
        for drafter in drafters:
            drafter.propose(turn)

    def _branches(self, slot: int) -> Branches | None:
        """Return the tree of the next window of a slot."""
        return (
            self._rows.branches if isinstance(self._rows, TreeRows) else self.state.windows.branches(slot, self._rows)
        )

    def begin(self, slot: int, generation: Generation) -> None:
        """Start decoding: the prompt but its last token is in the caches, the last one is the root of a window."""
        self.scheduler.begin(slot, generation)
        for drafter in self._drafters:
            drafter.begin(slot, generation.request.prompt)
        self.state.begin(slot, generation.request, generation.heads)
        rule = generation.request.acceptance
        if self.tree is not None and not rule.lossless:
            self.state.sampling.set(slot, generation.request.sampling, rule, tree=True)
        elif isinstance(self.tree, DynamicTree) and rule.verifies_trees:
            # The drafts of dynamic trees are no draws. To accept one with its probability under the target, and to draw
            # from the others after the last one, is to draw a token and look for it, which is what matching does.
            self.state.sampling.set(slot, generation.request.sampling)
        self._propose(slot, generation, [], [])

    def cancel(self, generation: Generation) -> None:
        """End a request now: it leaves the queue, or its slot is free for the next step."""
        generation.cancel()
        if not self.scheduler.remove(generation) and generation in self.scheduler.live:
            self._free(self.scheduler.live.index(generation))

    def rewind(self, length: int) -> None:
        """Set all slots back to `length` positions, whatever these hold: for timing the same step many times."""
        self.scheduler.lengths = [length] * len(self.scheduler.lengths)
        self.state.length_S.fill_(length)

    def _free(self, slot: int) -> None:
        self.scheduler.leave(slot)
        self.state.clear(slot)


@dataclass
class _Outcome:
    """Results of a pass on the host; entry s belongs to the s-th slot of the plan."""

    committed: list[list[int]]
    logprobs: tuple[list[Any], ...]
    """Log-probabilities as `log_probabilities` returns them, or ()."""
    confidences: list[list[float]] | None
    windows: list[list[int]] | None
    depths: list[list[int]] | None
    """Depths of the rows of dynamic trees."""


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Run `requests` to their ends; return their generations in the order given."""
    generations = [engine.submit(request) for request in requests]
    for _ in engine.run():
        pass
    return generations


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
