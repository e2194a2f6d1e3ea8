"""CUDA graphs of decoding passes.

A small model's pass is hundreds of kernels, each of which costs more to launch than to run; a graph launches all of
them at once, verification and drafting alike. A pass may be captured because nothing in it goes to the host, and
because all that it reads and changes is in `DecodingState`, at fixed addresses. What the host decides is the graph's
key: the plan of the pass, and the transforms of logits that any slot asks for. Tests replay without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from headstart.decoding.decode_pass import decode_pass
from headstart.decoding.state import DecodingState, PassPlan
from headstart.model.transformer import Transformer

Replay = Callable[[], tuple[Tensor, Tensor]]

MOST = 256
"""Most graphs of an engine; passes of further shapes run without."""


class GraphedPass:
    """`decode_pass` for one model and state, through graphs.

    The first pass of a key runs without a graph, which warms up what libraries allocate once; the second is captured,
    which computes nothing, and replayed. Passes that read values on the host, or bring new tensors from it, always run
    without: penalties, constraints, rules other than matching, log-probabilities.

    Args:
        capture: turns a function that runs kernels into one that replays them.
    """

    def __init__(self, model: Transformer, state: DecodingState, capture: Callable[[Replay], Replay]) -> None:
        self.model, self.state, self._capture = model, state, capture
        self._graphs: dict[Hashable, Replay | None] = {}

    def __call__(self, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """Run a pass, see `decode_pass`. The next call overwrites what it returns."""
        settings = graph_settings(self.state, plan.slots)
        key = _key(plan, settings)
        if settings is None or plan.keep_logits or (key not in self._graphs and len(self._graphs) >= MOST):
            return decode_pass(self.model, self.state, plan)
        # Without `starts`: a graph would keep the numbers of the pass that was captured.
        fixed = replace(plan, starts=None)

        def run() -> tuple[Tensor, Tensor]:
            return decode_pass(self.model, self.state, fixed)

        if key not in self._graphs:
            self._graphs[key] = None
            return run()
        replay = self._graphs[key]
        if replay is None:
            replay = self._graphs[key] = self._capture(run)
        return replay()


def _key(plan: PassPlan, settings: Hashable) -> Hashable:
    shape = (plan.slots.start, plan.slots.stop, plan.rows, plan.heads, plan.span, plan.tree, plan.draft_tree)
    return (*shape, plan.deferred, plan.confident, plan.row_by_row, settings)


def graph_settings(state: DecodingState, slots: slice) -> Hashable | None:
    """Return what of the slots' settings decides which kernels a pass runs; None where it cannot be captured."""
    if state.penalties.any(slots) or state.constraints.any(slots) or not state.sampling.plain_rules(slots):
        return None
    return state.sampling.transforms(slots)


def cuda_capture() -> Callable[[Replay], Replay]:
    """Return a capture into CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = run()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay

    return capture
