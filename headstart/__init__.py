"""Headstart: language models that predict several tokens at once, and decode several tokens per pass losslessly.

import headstart
model = headstart.load()  # the model in the box; or load("runs/demo/model")
model.generate("def fibonacci(", max_new_tokens=200).text
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Two threads of a torch operator wait for each other by spinning. Where a processor is shared, the spinning thread
# keeps the other from running for a whole time slice: products then take 8 ms whatever their size. A short spin costs
# nothing on an idle machine. libgomp reads this once, when torch is loaded: after `import torch` it has no effect.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__version__ = "0.1.0"
__all__ = [
    "Constraint",
    "GenerationSettings",
    "LanguageModel",
    "Output",
    "Penalties",
    "Request",
    "Sampling",
    "UsageError",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from headstart.api import Constraint, GenerationSettings, LanguageModel, Output, Penalties, Request, Sampling, load
    from headstart.errors import UsageError


def __getattr__(name: str) -> Any:
    # torch takes over a second to import: `import headstart` and `headstart --help` must not pay for it.
    if name == "UsageError":
        from headstart.errors import UsageError

        return UsageError
    if name in __all__:
        from headstart import api

        return getattr(api, name)
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
