"""Published results of others on the benchmarks of `suites.py`: authors' numbers, with model and hardware.

Models, data, temperatures and engines differ, so these are landmarks and no contest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published result on one task: tokens per pass, speed-up over plain decoding, or both."""

    task: str
    method: str
    model: str
    setting: str
    """Hardware, engine and temperature, as far as they are published."""
    tau: float | None
    speedup: float | None
    source: str


_LEADERBOARD = "Spec-Bench leaderboard (github.com/hemingkx/Spec-Bench)"
_DSPARK, _JETSPEC = "arXiv 2607.05147, table 1", "arXiv 2606.18394, README of hao-ai-lab/JetSpec"
_LLAMA = "llama.cpp pull request 25173"
_BUNDLE = "SpecBundle (sgl-project/SpecForge)"
_A100, _T1 = "A100, fp16, batch 1, T = 0", "chain, block 7, T = 1"
_TREE = "tree; tau in an engine on B200, batch 1"

PUBLISHED = (
    Published("spec-bench", "Medusa", "Vicuna-7B", _A100, 2.31, 1.71, _LEADERBOARD),
    Published("spec-bench", "Hydra", "Vicuna-7B", _A100, None, 2.07, _LEADERBOARD),
    Published("spec-bench", "EAGLE-2", "Vicuna-7B", _A100, None, 2.36, _LEADERBOARD),
    Published("spec-bench", "SAM[EAGLE-2]", "Vicuna-7B", _A100, 4.58, 2.73, _LEADERBOARD),
    Published("spec-bench", "EAGLE-3", "Vicuna-13B", _A100, 5.71, 3.02, _LEADERBOARD),
    Published("mt-bench", "EAGLE-3", "Qwen3-4B", _T1, 2.39, None, _DSPARK),
    Published("mt-bench", "DSpark", "Qwen3-4B", _T1, 3.64, None, _DSPARK),
    Published("mt-bench", "EAGLE-3", "Llama-3.1-8B", "batch 1", 3.91, 2.39, _BUNDLE),
    Published("mt-bench", "JetSpec", "Qwen3-8B", _TREE, 4.88, 4.58, _JETSPEC),
    Published("mt-bench", "DSpark", "Qwen3-4B Q8", "llama.cpp", None, 1.67, _LLAMA),
    Published("gsm8k", "EAGLE-3", "Qwen3-4B", _T1, 5.14, None, _DSPARK),
    Published("gsm8k", "DSpark", "Qwen3-4B", _T1, 6.11, None, _DSPARK),
    Published("gsm8k", "EAGLE-3", "Llama-3.1-8B", "batch 1", 2.85, 1.81, _BUNDLE),
    Published("gsm8k", "JetSpec", "Qwen3-8B", _TREE, 7.94, 7.82, _JETSPEC),
    Published("gsm8k", "DSpark", "Qwen3-4B Q8", "llama.cpp", None, 3.21, _LLAMA),
    Published("humaneval-prompts", "EAGLE-3", "Qwen3-4B", _T1, 4.16, None, _DSPARK),
    Published("humaneval-prompts", "DSpark", "Qwen3-4B", _T1, 5.38, None, _DSPARK),
    Published("humaneval-prompts", "EAGLE-3", "Llama-3.1-8B", "batch 1", 4.91, 2.99, _BUNDLE),
    Published("humaneval-prompts", "JetSpec", "Qwen3-8B", _TREE, 6.92, 7.12, _JETSPEC),
    Published("humaneval-prompts", "DSpark", "Qwen3-4B Q8", "llama.cpp", None, 3.24, _LLAMA),
    Published("mbpp-prompts", "EAGLE-3", "Qwen3-4B", _T1, 3.69, None, _DSPARK),
    Published("mbpp-prompts", "DSpark", "Qwen3-4B", _T1, 5.13, None, _DSPARK),
    Published("mbpp-prompts", "JetSpec", "Qwen3-8B", _TREE, None, 6.73, _JETSPEC),
)
"""Published results, those of a task in the order of the report."""


def published(task: str) -> list[dict[str, Any]]:
    """Return the published results on a task as plain data; empty if none is known."""
    return [asdict(each) for each in PUBLISHED if each.task == task]
