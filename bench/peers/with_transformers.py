"""transformers: generate() by default, with prompt lookup, and compiled over a static cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig
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


@torch.no_grad()
def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts of `bench engines` greedily, with the directory's own code if `code` says so."""
    torch.set_num_threads(case["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    model = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=getattr(torch, case["dtype"]), trust_remote_code=case["code"]
    ).eval()
    outputs = []
    for prompt in case["prompts"]:
        options: dict[str, Any] = {"return_tensors": "pt", "return_dict": True}
        if isinstance(prompt, str):
            read = tokenizer(prompt, return_tensors="pt")
        else:
            read = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        ids = read["input_ids"]
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case["new_tokens"],
            do_sample=False,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, ids.shape[1] :].tolist()
        passes = found.passes if case["code"] else len(tokens) - 1  # behind that over the prompt
        behind = len(tokens) - 1
        outputs.append({"prompt": ids[0].tolist(), "tokens": tokens, "behind": behind, "passes": passes})
    return {"version": f"transformers {transformers.__version__}, torch {torch.__version__}", "outputs": outputs}
