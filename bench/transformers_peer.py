"""The peer: transformers' own generation of the same weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headstart.decoding.engine import Engine
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.timing import DTYPES, interleave, random_model
from headstart.decoding.settings import Request
from headstart.formats.huggingface import load_model, load_peer, save_model
from headstart.model.config import ModelConfig


def case(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of our plain decoding and of transformers' `generate`. Runs in a process of its own."""
    config = ModelConfig(**case["config"])
    new_tokens, dtype, device = case["new_tokens"], case["dtype"], case["device"]
    torch.manual_seed(1)
    prompt = torch.randint(config.vocab_size, (case["prompt_tokens"],)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_model(random_model(config, dtype, "cpu"), directory)
        ours = pack(load_model(directory, device=device))
        theirs = load_peer(directory, DTYPES[dtype], device)
        outputs: dict[str, list[int]] = {}
        values = interleave(
            {
                "headstart": _ours(ours, prompt, new_tokens, outputs),
                "transformers": _theirs(theirs, prompt, new_tokens, outputs),
            },
            case["repetitions"],
        )
    mine, other = outputs["headstart"], outputs["transformers"]
    same = next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
    return {"tokens_per_second": values, "same_tokens_at_start": same, "new_tokens": [len(mine), len(other)]}


def _rate(stamps: list[float]) -> float:
    """Tokens per second between the first token and the last: the prompt's pass is over when the first one is there."""
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _ours(model: Any, prompt: list[int], new_tokens: int, outputs: dict[str, list[int]]) -> Callable[[], float]:
    def measure() -> float:
        engine = Engine(model, context=len(prompt) + new_tokens, exact=False)
        generation = engine.submit(Request(tuple(prompt), new_tokens, heads=1))
        stamps = []
        while engine.busy:
            engine.step()
            stamps.append(time.perf_counter())
        outputs["headstart"] = generation.tokens
        return _rate(stamps)

    return measure


def _theirs(model: Any, prompt: list[int], new_tokens: int, outputs: dict[str, list[int]]) -> Callable[[], float]:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Stamps(LogitsProcessor):
        """Sees the logits of every token as they are there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return scores

    ids = torch.tensor([prompt], device=model.device)

    def measure() -> float:
        stamps = Stamps()
        with torch.no_grad():
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                logits_processor=LogitsProcessorList([stamps]),
            )
        outputs["transformers"] = tokens[0, len(prompt) :].tolist()
        return _rate(stamps.times)

    return measure
