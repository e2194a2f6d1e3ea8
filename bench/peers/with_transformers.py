"""transformers: generate() by default, with prompt lookup, and compiled over a static cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.generation.streamers import BaseStreamer


class Stamps(BaseStreamer):
    """A streamer that receives the prompt, then the tokens of each pass."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, list[int]]] = []
        self.prompt_seen = self.single = False

    def put(self, value: torch.Tensor) -> None:
        """Note the time of what a pass committed."""
        if self.prompt_seen:
            # Greedy decoding streams a token of each row, prompt lookup several of its only row.
            counts = [value.numel()] if self.single else [1] * value.shape[0]
            self.stamps.append((time.perf_counter(), counts))
        else:
            self.prompt_seen, self.single = True, value.shape[0] == 1

    def end(self) -> None:
        """Do nothing."""


class Peer:
    """The decoder of transformers."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, case["dtype"])
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype).eval()
        self.new_tokens = case["new_tokens"]
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {"greedy": self.decode}
        if case["rows"] == 1:  # it takes no batch
            self.variants["prompt lookup"] = partial(self.decode, prompt_lookup_num_tokens=10)
        if case["compile"]:
            compiled = CompileConfig(mode="default")
            compiled._compile_all_devices = True  # else it compiles on GPUs only
            self.variants["compiled, static cache"] = partial(
                self.decode, cache_implementation="static", compile_config=compiled
            )

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """Decode the prompts as one batch, greedily, with further `options` of generate()."""
        streamer, ids = Stamps(), torch.tensor(prompts, device=self.model.device)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            streamer=streamer,
            **options,
        )
        return {"stamps": streamer.stamps, "tokens": tokens[:, ids.shape[1] :].tolist()}
