"""Settings of a run on an existing model, in addition to those of every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from headstart.errors import UsageError
from headstart.training.adapt.lora import LoraConfig

Mode = Literal["heads", "joint"]
FrozenDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class AdaptConfig:
    """The existing model, and the part of it that is trained."""

    model: Path
    """Model directory. It is only read, and must not change until the run has ended."""
    mode: Mode = "heads"
    """heads: train only the new heads, the model keeps its bits (Medusa-1); joint: train first the heads alone, then
    everything (Medusa-2)."""
    heads_first: float = 0.5
    """joint: fraction of the steps that train the heads alone. Both stages have their own learning rate schedule."""
    self_distilled: bool = False
    """joint: head 1 learns from the distribution of the original model, KL(original || head 1), not from the text."""
    lora: LoraConfig | None = None
    """joint: train products of low rank added to the weights, which stay as they are (None: train the weights)."""
    replace_heads: bool = False
    """Replace the heads 2 and up that the model has; without it, such a model is an error."""
    take_layers: bool = False
    """joint: transformer heads 2..n are the trunk's last blocks in place of new ones (the paper's "+0 layers")."""
    heads_only: bool = False
    """heads: write RUN/heads, the heads without their model, in place of RUN/model."""
    frozen_dtype: FrozenDtype = "float32"
    """Type of weights that are never trained; bfloat16 takes half the memory, for models stored in it."""
    cache_states: Path | None = None
    """heads: folder for the hidden states of the frozen trunk, computed once before the first step; steps read them
    instead of running the trunk (None: run it). Runs may share the folder."""
    cache_gib: float = 50.0
    """Most GiB of hidden states."""

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, Mode), ("frozen_dtype", self.frozen_dtype, FrozenDtype)):
            if value not in get_args(choices):
                raise UsageError(f"adapt.{name} {value!r} is unknown; take one of {', '.join(get_args(choices))}")
        if self.cache_states is not None and self.mode != "heads":
            raise UsageError("adapt.cache_states is for adapt.mode heads: a trunk that is trained gives other states")
        if not self.cache_gib > 0:
            raise UsageError(f"adapt.cache_gib is {self.cache_gib}; it must be above 0")
        if not 0 <= self.heads_first < 1:
            raise UsageError(f"adapt.heads_first is {self.heads_first}; it must be at least 0 and below 1")
        if self.self_distilled and self.mode != "joint":
            raise UsageError("adapt.self_distilled is for adapt.mode joint: head 1 is not trained with the heads alone")
        if self.take_layers and self.mode != "joint":
            raise UsageError(
                "adapt.take_layers is for adapt.mode joint: head 1 loses layers below it, and must be trained"
            )
        if self.lora is not None and self.mode != "joint":
            raise UsageError("adapt.lora is for adapt.mode joint: with the heads alone nothing else is trained")
        if self.heads_only and self.replace_heads:
            raise UsageError(
                "adapt.heads_only with adapt.replace_heads: heads alone are for a model with one head; leave one out"
            )
        if self.heads_only and self.mode != "heads":
            raise UsageError(
                f"adapt.mode {self.mode} changes {self.model} too, and heads trained with it fit no other model; take "
                "adapt.mode heads, or a model directory without adapt.heads_only"
            )
        if self.frozen_dtype != "float32" and self.mode == "joint" and self.lora is None:
            raise UsageError(
                f"adapt.frozen_dtype {self.frozen_dtype}: adapt.mode joint freezes nothing, and what is trained is "
                "float32; leave it out"
            )
