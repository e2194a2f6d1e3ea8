"""What a run on an existing model is told beside what every run is told."""

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
    """The model that new heads are put on, and what of it is trained."""

    model: Path
    """Its model directory. It is only read, and must stay as it is until the run has ended."""
    mode: Mode = "heads"
    """heads: only the new heads are trained, the model stays as it is to the bit (Medusa-1); joint: first the heads
    alone, then everything (Medusa-2)."""
    heads_first: float = 0.5
    """joint: fraction of the steps in which the heads are trained alone. Both parts have a warm-up and a fall of the
    learning rate of their own."""
    self_distilled: bool = False
    """joint: head 1 learns from the distribution of the model as it was, KL(original || head 1), not from the text."""
    lora: LoraConfig | None = None
    """joint: the weights stay as they are, and products of low rank beside them are trained (None: the weights)."""
    replace_heads: bool = False
    """Whether heads that the model has beyond the first give way to the new ones; otherwise it is refused."""
    frozen_dtype: FrozenDtype = "float32"
    """What weights that are never trained are held in; bfloat16 takes half the memory, for models stored so."""
    cache_states: Path | None = None
    """heads: folder for the hidden states that the frozen trunk gives, made once before the first step and read in
    every step in place of running it (None: it runs). Runs may share it."""
    cache_gib: float = 50.0
    """At most this many GiB of them."""

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, Mode), ("frozen_dtype", self.frozen_dtype, FrozenDtype)):
            if value not in get_args(known):
                raise UsageError(f"adapt.{name} {value!r} is unknown; take one of {', '.join(get_args(known))}")
        if self.cache_states is not None and self.mode != "heads":
            raise UsageError("adapt.cache_states is for adapt.mode heads: a trunk that is trained gives other states")
        if not self.cache_gib > 0:
            raise UsageError(f"adapt.cache_gib is {self.cache_gib}; it must be above 0")
        if not 0 <= self.heads_first < 1:
            raise UsageError(f"adapt.heads_first is {self.heads_first}; it must be at least 0 and below 1")
        if self.self_distilled and self.mode != "joint":
            raise UsageError("adapt.self_distilled is for adapt.mode joint: head 1 is not trained with the heads alone")
        if self.lora is not None and self.mode != "joint":
            raise UsageError("adapt.lora is for adapt.mode joint: with the heads alone nothing else is trained")
        if self.frozen_dtype != "float32" and self.mode == "joint" and self.lora is None:
            raise UsageError(
                f"adapt.frozen_dtype {self.frozen_dtype}: adapt.mode joint freezes nothing, and what is trained is "
                "float32; leave it out"
            )
