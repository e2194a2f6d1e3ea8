"""vLLM on a CPU, through the steps of its engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, so that a step is a call
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import torch
import vllm
from vllm import LLM, SamplingParams


class Peer:
    """vLLM's engine."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        self.version = f"vllm {vllm.__version__}, torch {torch.__version__}"
        self.new_tokens = case["new_tokens"]
        self.engine = LLM(
            case["model"],
            dtype=case["dtype"],
            skip_tokenizer_init=True,
            max_model_len=case["prompt_tokens"] + self.new_tokens + 1,
            max_num_seqs=case["rows"],
            enable_prefix_caching=False,
            enforce_eager=not case["compile"],
        ).llm_engine
        torch.set_num_threads(case["threads"])  # it sets its own
        self.runs = 0
        name = "greedy, compiled" if case["compile"] else "greedy"
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {name: self.decode}

    def decode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Decode the prompts as one batch, greedily."""
        self.runs += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=self.new_tokens, min_tokens=self.new_tokens, ignore_eos=True, detokenize=False
        )
        names = [f"{self.runs}-{row}" for row in range(len(prompts))]
        for name, prompt in zip(names, prompts):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        stamps: list[tuple[float, list[int]]] = []
        tokens: dict[str, list[int]] = {name: [] for name in names}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now, counts = time.perf_counter(), dict.fromkeys(names, 0)
            for output in outputs:
                written = list(output.outputs[0].token_ids)
                counts[output.request_id] = len(written) - len(tokens[output.request_id])
                tokens[output.request_id] = written
            if any(counts.values()):
                stamps.append((now, list(counts.values())))
        return {"stamps": stamps, "tokens": list(tokens.values())}
