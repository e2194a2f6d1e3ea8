"""Draw path-star graphs as sequences (arXiv 2403.06963, section 4): edges in any order, start and goal, the path.

    5,2|5,9|9,3|2,8/5,8=5,2,8        G(2, 3): 2 arms of 3 nodes, the start counted

Every node and mark is a token, commas are none. Only the path's second node shows which arm leads to the goal: the
first node is the start again, and after the second an edge leads from each node to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headstart.errors import UsageError


@dataclass(frozen=True)
class StarGraphs:
    """Graphs with `degree` arms of `length` nodes with the start; each graph draws its labels from `labels`."""

    degree: int = 2
    length: int = 3
    labels: int = 8

    def __post_init__(self) -> None:
        if self.degree < 1 or self.length < 2:
            raise UsageError(f"degree {self.degree}, length {self.length}: take at least 1 arm of at least 2 nodes")
        nodes = 1 + self.edges
        if self.labels < nodes:
            raise UsageError(f"labels is {self.labels}; a graph of {nodes} nodes needs as many, take {nodes} or more")

    @property
    def edges(self) -> int:
        """Number of edges."""
        return self.degree * (self.length - 1)

    @property
    def prompt(self) -> int:
        """Number of tokens up to and with "="."""
        return 3 * self.edges + 3

    @property
    def vocab_size(self) -> int:
        """Number of labels, of the marks "|", "=" and "/", and of `spare`."""
        return self.labels + 4

    @property
    def spare(self) -> int:
        """Token for masks or registers."""
        return self.labels + 3

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return sequences of `count` graphs, (count, prompt + length) int64."""
        E = self.edges
        bar, equals, slash = range(self.labels, self.labels + 3)
        nodes = rng.permuted(np.tile(np.arange(self.labels), (count, 1)), axis=1)[:, : 1 + E]
        start, arms = nodes[:, :1], nodes[:, 1:].reshape(count, self.degree, self.length - 1)
        sources = np.concatenate([np.broadcast_to(start[:, :, None], (count, self.degree, 1)), arms[:, :, :-1]], 2)
        edges = np.stack([sources, arms], -1).reshape(count, E, 2)
        order = rng.permuted(np.tile(np.arange(E), (count, 1)), axis=1)
        edges = np.take_along_axis(edges, order[:, :, None], 1)
        path = np.concatenate([start, arms[np.arange(count), rng.integers(self.degree, size=count)]], 1)
        sequences = np.full((count, self.prompt + self.length), bar)
        sequences[:, 0 : 3 * E : 3], sequences[:, 1 : 3 * E : 3] = edges[..., 0], edges[..., 1]
        sequences[:, 3 * E - 1], sequences[:, 3 * E], sequences[:, 3 * E + 1] = slash, start[:, 0], path[:, -1]
        sequences[:, 3 * E + 2], sequences[:, self.prompt :] = equals, path
        return sequences
