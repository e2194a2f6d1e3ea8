"""CUDA graphs of decoding passes: a small model's pass is hundreds of kernels, each of which costs more to launch than
to run. A graph launches all of them, verification and drafting alike, at once.

A pass may be captured because nothing in it goes to the host, and because all that it reads and changes lies in
`DecodingState`, at addresses that stay. What the host does decide is the graph's key: shapes, and which transforms of
logits any slot asks for. Where there is no GPU, tests replay through a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from headstart.decoding.decode_pass import DecodingState, decode_step
from headstart.model.transformer import Transformer

Replay = Callable[[], tuple[Tensor, Tensor]]

MOST = 256
"""Graphs kept by an engine; passes of further shapes run without."""


class GraphedStep:
    """`decode_step` for one model and state, through graphs.

    The first pass of a key runs as it is, which warms up what libraries allocate once; the second is captured, which
    computes nothing, and replayed. What reads values on the host, or brings new tensors from it, always runs as it is:
    penalties, constraints, rules other than matching, log-probabilities.

    Args:
        capture: turns a function that runs kernels into one that replays them.
    """

    def __init__(self, model: Transformer, state: DecodingState, capture: Callable[[Replay], Replay]) -> None:
        self.model, self.state, self._capture = model, state, capture
        self._graphs: dict[Hashable, Replay | None] = {}

    def __call__(
        self, slots: slice, *, starts: list[int] | None = None, keep_logits: bool = False, **shape: Any
    ) -> tuple[Tensor, Tensor]:
        """As `decode_step`. What it returns is overwritten by the next call."""
        settings = graph_settings(self.state, slots)
        key = (slots.start, slots.stop, *sorted(shape.items()), settings)

        def run() -> tuple[Tensor, Tensor]:
            # Without `starts`: a graph would keep the numbers of the pass that was captured.
            return decode_step(self.model, self.state, slots, starts=None, **shape)

        if settings is None or keep_logits or (key not in self._graphs and len(self._graphs) >= MOST):
            return decode_step(self.model, self.state, slots, starts=starts, keep_logits=keep_logits, **shape)
        if key not in self._graphs:
            self._graphs[key] = None
            return run()
        replay = self._graphs[key]
        if replay is None:
            replay = self._graphs[key] = self._capture(run)
        return replay()


def graph_settings(state: DecodingState, slots: slice) -> Hashable | None:
    """What of the slots' settings decides which kernels a pass runs; None where it cannot be captured."""
    if state.penalties.any(slots) or state.constraints.any(slots) or not state.sampling.plain_rules(slots):
        return None
    return state.sampling.transforms(slots)


def cuda_capture() -> Callable[[Replay], Replay]:
    """Captures into CUDA graphs that share one pool of memory."""
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
