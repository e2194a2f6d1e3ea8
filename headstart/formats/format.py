"""The interface of a file format, and the comparison of a written model with the one that is read back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TOKENS = (2, 32)
"""Rows and length of the random tokens whose logits are compared; a shorter context shortens them."""
NEW_TOKENS = 32
"""Tokens of a greedy text that is compared."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of logits, relative to the largest logit, that another order of sums may make."""
COARSE = 5e-2
"""Largest relative difference in dtypes of fewer bits."""


@dataclass(frozen=True)
class Check:
    """One comparison that was made, or could not be."""

    by: str
    """The reader of the result."""
    found: str
    """The outcome, for people."""
    differences: list[float] | None = None
    """The largest difference of logits, for each head."""
    largest: float | None = None
    """The largest logit of all."""
    passed: bool | None = True
    """None: the comparison could not be made here."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields that say something."""
        return {key: value for key, value in asdict(self).items() if value is not None or key == "passed"}


def random_text(model: Transformer) -> Tensor:
    """Return tokens (B, T) int64, the same for every model of the same vocabulary and context."""
    config = model.config
    length = min(TOKENS[1], config.context)
    return torch.randint(0, config.vocab_size, (TOKENS[0], length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare_logits(by: str, model: Transformer, again: Callable[[Tensor], Tensor], heads: int) -> Check:
    """Compare the logits of heads 1..`heads` of `model`, in its dtype, with those of the model that was read back.

    `by` names the reader. `again` maps (B, T) int64 to (B, T, heads, V) in any dtype, NaN where sequential heads lack
    the tokens between, -inf outside a draft vocabulary. Raises UsageError if they differ by more than rounding.
    """
    tokens_BT = random_text(model)
    mine = model(tokens_BT, heads=heads).float()
    theirs = again(tokens_BT).float()
    present = ~mine.isnan()
    if mine.shape != theirs.shape or not torch.equal(present, ~theirs.isnan()):
        raise UsageError(f"{by}: read back, the result has logits of another shape; nothing was kept, report this")
    gaps = (mine.nan_to_num() - theirs.nan_to_num()).abs()
    differences = [float(gaps[:, :, k].max()) for k in range(heads)]
    largest = float(mine[mine.isfinite()].abs().max())
    allowed = ROUNDING.get(model.trunk.embedding.weight.dtype, COARSE) * max(largest, 1e-3)
    if not all(math.isfinite(gap) and gap <= allowed for gap in differences):
        raise UsageError(
            f"{by}: read back, logits differ by {max(differences):.3g} where the largest is {largest:.3g}; "
            "nothing was kept, report this"
        )
    shown = ", ".join(f"head {k} {gap:.2g}" for k, gap in enumerate(differences, start=1))
    return Check(by, f"largest difference of logits {shown} (largest logit {largest:.3g})", differences, largest)


def compare_greedy_tokens(by: str, model: Transformer, plain: list[int], drafted: list[int], passes: int) -> Check:
    """Compare the greedy tokens of all heads with those of head 1 alone, which took a pass per token.

    Raises UsageError if they differ in float32 or float64. With fewer bits, near ties may separate them, and the check
    reports where.
    """
    if plain == drafted:
        found = f"the same greedy text with all heads as without, {len(plain)} tokens in {passes} passes"
        return Check(by, found)
    if model.trunk.embedding.weight.dtype in ROUNDING:
        raise UsageError(f"{by}: writes another greedy text with all heads; nothing was kept, report this")
    same = next(i for i, pair in enumerate(zip([*plain, -1], [*drafted, -2])) if pair[0] != pair[1])
    return Check(by, f"the greedy output with heads differs after {same} tokens, by rounding", passed=None)


class Format(ABC):
    """One file format. Its class is in the file of the format; the registry names it."""

    is_file: ClassVar[bool] = False
    """True if a result is one file; otherwise it is a directory."""
    folder: ClassVar[str] = ""
    """The folder in a result that holds the ordinary model, with its config.json and its tokenizer."""
    whole: ClassVar[bool] = True
    """True if a result is a model of its own, with a tokenizer and the tokens that end its text."""
    readable: ClassVar[bool] = True
    """True if the format has `read`. Results of the others are read as another format, or not at all."""

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Return whether `path` holds a model in this format."""

    def opened(self, path: Path) -> AbstractContextManager[object]:
        """Return a context in which several reads of the model at `path` share what they all need."""
        return nullcontext()

    def files(self, path: Path) -> list[Path]:
        """Return the files of the model at `path`: all in its directory."""
        return sorted(file for file in path.rglob("*") if file.is_file())

    def details(self, path: Path) -> dict[str, Any]:
        """Return what only this format says about the model at `path`, for `headstart inspect`."""
        return {}

    @abstractmethod
    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write the model into an empty folder, or as a file, and return lines about what the format cannot carry.

        Raises UsageError for a model that the format cannot express.
        """

    def name_base(self, path: Path, base: str) -> None:  # noqa: B027
        """Write the path or name of the converted model where a result of heads alone has a place for it."""

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Read the result back and compare it with the model. Raises UsageError if it differs."""
        return [compare_all_heads(model, self.read(path))]

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model at `path`, in the dtype that it is stored in unless another is given."""
        raise NotImplementedError

    def read_blocks(self, path: Path, model: Transformer | None = None) -> Transformer | None:
        """Return the model at `path` with its matrices in the blocks that are stored, which only `pack` takes.

        Args:
            path: the model.
            model: the model at `path` with heads, whose matrices are replaced (None: it is read).

        Returns:
            None if the file holds no matrix in blocks.
        """
        return None

    def read_config(self, path: Path) -> ModelConfig:
        """Return the configuration of the model at `path`."""
        raise NotImplementedError

    def read_dtype(self, path: Path) -> torch.dtype:
        """Return the dtype that the embedding is stored in."""
        raise NotImplementedError

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """Return the tokenizer of the model at `path`, if it has one."""
        raise NotImplementedError


def compare_all_heads(model: Transformer, again: Transformer, by: str = "headstart") -> Check:
    """Compare the logits of all heads with those of the model that was read back."""
    heads = model.config.heads
    return compare_logits(by, model, lambda tokens: again(tokens, heads=heads), heads)
