"""LoRA (arXiv 2106.09685): a product B A of low rank is trained and added to a matrix W that stays as it is.

peft cannot do it, because our q, k and v (and gate and up) are one matrix. Each of its parts gets its own A and B, so
that the saved adapter is an ordinary peft adapter of the Hugging Face model. Names and shapes follow peft's format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.errors import UsageError
from headstart.fileio import replacing_directory
from headstart.formats.tensor_names import MODEL_FILE, Part, stored_parts
from headstart.model.transformer import Transformer

MOST_RANK = 65_536


@dataclass(frozen=True)
class LoraConfig:
    """Size and scale of the products. The defaults are Medusa-2's."""

    rank: int = 32
    """Rank of B A."""
    alpha: float = 16.0
    """Numerator of the factor alpha / rank of B A."""
    dropout: float = 0.05
    """Dropout of the input of A, during training; not of the unembedding's."""
    head: bool = False
    """Add a product to the unembedding too, as Medusa-2 does. A tied embedding stays as it is, and is then untied."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"adapt.lora.rank is {self.rank}; it must be at least 1")
        if self.rank > MOST_RANK:
            raise UsageError(f"adapt.lora.rank is {self.rank:.0e}; it must be at most {MOST_RANK:,}")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"adapt.lora.alpha is {self.alpha}; it must be finite and above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"adapt.lora.dropout is {self.dropout}; it must be at least 0 and below 1")


class Lora:
    """Products B A on every matrix of the blocks between a token and head 1's logits; on the unembedding if asked for.

    Each linear map gets the parameters `lora_A` (parts x rank, in) and `lora_B` (out, rank), float32. B is zero at
    first, so that the model is what it was.
    """

    def __init__(self, model: Transformer, config: LoraConfig, seed: int = 0) -> None:
        self.config, self._on = config, True
        parts = stored_parts(model.config)
        generator = torch.Generator().manual_seed(seed)
        self.parts: dict[str, list[Part]] = {}
        """Hugging Face's names of the parts of each map, by its name."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and parts.get(f"{name}.weight", [Part("", "", ())])[0].file == MODEL_FILE:
                self.parts[name] = parts[f"{name}.weight"]
                self._add(module, [part.shape[0] for part in self.parts[name]], generator)
        if config.head:
            self._add_to_unembedding(model, generator)
        self.names = {f"{name}.{which}" for name in self.parts for which in ("lora_A", "lora_B")}
        """Names of the parameters."""

    def _make_parameters(self, module: nn.Module, weight: Tensor, parts: int, generator: torch.Generator) -> None:
        """Give `module` the parameters of products for the `parts` of `weight` (out, in)."""
        rank, (outputs, inputs) = self.config.rank, weight.shape
        bound = 1 / math.sqrt(inputs)  # as peft's, and as a linear map's own first values
        a = torch.empty(parts * rank, inputs).uniform_(-bound, bound, generator=generator)
        module.lora_A = nn.Parameter(a.to(weight.device))
        module.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def _add_to_unembedding(self, model: Transformer, generator: torch.Generator) -> None:
        """Add a product to the matrix itself, which the loss reads in chunks."""
        unembedding = model.unembedding
        shape = (model.config.vocab_size, model.config.dim)
        self.parts["unembedding"] = [Part(MODEL_FILE, "lm_head.weight", shape)]
        self._make_parameters(unembedding, unembedding.weights[0], 1, generator)

        def add(weight: Tensor) -> Tensor:
            if not self._on:
                return weight
            A, B = unembedding.get_parameter("lora_A"), unembedding.get_parameter("lora_B")
            return weight + B @ A * (self.config.alpha / self.config.rank)

        unembedding.added = add

    def _add(self, module: nn.Linear, rows: list[int], generator: torch.Generator) -> None:
        rank = self.config.rank
        self._make_parameters(module, module.weight, len(rows), generator)

        def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not self._on:
                return out
            A, B = module.get_parameter("lora_A"), module.get_parameter("lora_B")
            x = F.dropout(inputs[0], self.config.dropout, training=torch.is_grad_enabled())
            low = F.linear(x, A).split(rank, -1)
            pieces = [F.linear(a, b) for a, b in zip(low, B.split(rows))]
            return out + torch.cat(pieces, -1) * (self.config.alpha / rank)

        module.register_forward_hook(add)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn the products off: within it the model is the original."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    @torch.no_grad()
    def merged(self, model: Transformer) -> Transformer:
        """Return a model without products whose matrices are W + alpha / rank B A, computed in float32.

        It is not tied if the unembedding has a product.
        """
        state = {name: value for name, value in model.state_dict().items() if name not in self.names}
        for name, parts in self.parts.items():
            a, b = (model.get_parameter(f"{name}.{which}").float() for which in ("lora_A", "lora_B"))
            rows = [part.shape[0] for part in parts]
            product = torch.cat([y @ x for x, y in zip(a.split(self.config.rank), b.split(rows))])
            key = "unembedding.weights.0" if name == "unembedding" else f"{name}.weight"
            weight = state[key]
            state[key] = (weight.float() + product * (self.config.alpha / self.config.rank)).to(weight.dtype)
        with torch.device("meta"):
            copy = Transformer(replace(model.config, tied=model.config.tied and not self.config.head))
        copy.load_state_dict(state, assign=True)
        return copy.requires_grad_(False)

    def save(self, model: Transformer, directory: Path, base: str) -> None:
        """Write a peft adapter for the model at `base`: adapter_config.json and adapter_model.safetensors."""
        tensors: dict[str, Tensor] = {}
        for name, parts in self.parts.items():
            a, b = (model.get_parameter(f"{name}.{which}").detach().cpu() for which in ("lora_A", "lora_B"))
            rows = [part.shape[0] for part in parts]
            for part, x, y in zip(parts, a.split(self.config.rank), b.split(rows)):
                key = f"base_model.model.{part.name.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = x.contiguous(), y.contiguous()
        content: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": sorted({part.name.split(".")[-2] for parts in self.parts.values() for part in parts}),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
        }
        with replacing_directory(directory) as temporary:
            (temporary / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
