"""Information of two discrete variables, in nats (paper sections 5.2 and L.2); joint distributions are (X, Y)."""

from __future__ import annotations

import numpy as np


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    """H(p, q) = -sum p log q, of distributions of one shape; H(p) where q is p."""
    seen = p > 0
    return float(-(p[seen] * np.log(q[seen])).sum())


def conditional_cross_entropy(p_XY: np.ndarray, q_XY: np.ndarray) -> float:
    """H(p_{X|Y}, q_{X|Y}) = E_{y ~ p_Y} H(p(.|y), q(.|y)), by its definition; for Y given X, transpose both."""
    total = 0.0
    for p_X, q_X in zip(p_XY.T, q_XY.T):
        if p_X.sum() > 0:
            total += p_X.sum() * cross_entropy(p_X / p_X.sum(), q_X / q_X.sum())
    return total


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """D(p || q)."""
    return cross_entropy(p, q) - cross_entropy(p, p)


def relative_information(p_XY: np.ndarray, q_XY: np.ndarray) -> float:
    """I_{p||q}(X;Y) = D(p || q_X (x) q_Y) - D(p || q), by its definition; the mutual information where q is p."""
    return divergence(p_XY, np.outer(q_XY.sum(1), q_XY.sum(0))) - divergence(p_XY, q_XY)


def identity_errors(p_XY: np.ndarray, q_XY: np.ndarray) -> dict[str, float]:
    """By how much the paper's identities fail: of entropies of p, of the lemma on cross-entropies, and their sums over
    both variables, which are a two-token loss."""
    errors = {}
    for name, q in (("entropy", p_XY), ("lemma", q_XY)):
        h_X = cross_entropy(p_XY.sum(1), q.sum(1))
        h_Y = cross_entropy(p_XY.sum(0), q.sum(0))
        shared = relative_information(p_XY, q)
        x_given_y, y_given_x = conditional_cross_entropy(p_XY, q), conditional_cross_entropy(p_XY.T, q.T)
        errors[name] = abs(h_X - (x_given_y + shared))
        errors[f"{name}, two tokens"] = abs(h_X + h_Y - (x_given_y + 2 * shared + y_given_x))
    return errors
