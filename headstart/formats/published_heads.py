"""Heads as others publish them: a config.json and one file of tensors, for a model that they do not contain.

They know the sizes of their model and none of its weights, so a base is judged by sizes alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headstart.errors import UsageError, first_line
from headstart.fileio import regular
from headstart.formats.assembly import assemble_in_place, parameters_by_part
from headstart.formats.heads import DetachedHeads
from headstart.formats.identity import LEAST_COSINE, sample
from headstart.formats.safetensors_files import TensorFiles
from headstart.formats.tensor_names import HEADS_FILE, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

AGAIN = "copy the heads again"


@dataclass(frozen=True)
class PublishedHeads(DetachedHeads):
    """Heads whose tensors have names of their layout."""

    directory: Path
    tensors: Mapping[str, Tensor]
    """The stored tensors by name, in any dtype."""

    @abstractmethod
    def tensor(self, name: str, base: Transformer) -> Tensor:
        """Return the tensor that a heads file of ours calls `name`, for a model with the parameters of `base`."""

    def attach(self, base: Transformer, named: Path) -> Transformer:
        """Return the model, in the dtype of `base`."""
        config = self.config_on(base.config, named)

        def fill(part: Part, target: Tensor) -> None:
            tensor = self.tensor(part.name, base)
            if tuple(tensor.shape) != part.shape:
                raise UsageError(
                    f"{self.directory}: the tensor for {part.name} has shape {list(tensor.shape)}, not "
                    f"{list(part.shape)} as its config.json says; {AGAIN}"
                )
            target.copy_(tensor)

        weight = base.trunk.embedding.weight
        return assemble_in_place(config, fill, weight.dtype, weight.device, parameters_by_part(base))

    def stored(self, name: str) -> Tensor:
        """Return a tensor of the file. Raises UsageError if it is missing or holds no numbers of 16 bits or more."""
        if name not in self.tensors:
            raise UsageError(f"{self.directory}: lacks {name}; {AGAIN}")
        tensor = self.tensors[name]
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UsageError(f"{self.directory}: {name} is stored as {tensor.dtype}; take unquantized heads")
        return tensor

    def refuse_others(self, known: set[str]) -> None:
        """Raise UsageError for tensors whose meaning headstart does not know."""
        others = sorted(set(self.tensors) - known)
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise UsageError(
                f"{self.directory}: holds {', '.join(others[:3])}{more}, which headstart does not compute with; take "
                "heads without it"
            )

    def check_draft_tokens(self, name: str, tokens: Tensor, vocab_size: int) -> None:
        """Raise UsageError unless a map from draft ids leads to token ids, each once."""
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            token = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise UsageError(
                f"{self.directory}: {name} leads to token {token}, and the vocabulary has {vocab_size:,}; {AGAIN}"
            )
        if len(tokens.unique()) != len(tokens):
            raise UsageError(f"{self.directory}: {name} leads to a token twice; {AGAIN}")


def read_tensors(directory: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of the first of these files that a directory holds. Raises UsageError if there is none."""
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        raise UsageError(f"{directory}: holds no {names[0]}, so no tensors of heads; {AGAIN}")
    if file.suffix == ".safetensors":
        files = TensorFiles([file])
        return {name: files.read(name) for name in files.names()}
    return read_pickle(file)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, which is mapped: nothing is read before it is copied.

    Raises UsageError for a file that holds anything but vectors and matrices by name.
    """
    try:
        content = torch.load(regular(file), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged pickle, KeyError and IndexError too
        reason = first_line(error)
        raise UsageError(f"{file}: is damaged, or holds more than tensors ({reason}); copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UsageError(f"{file}: holds no tensors by name; copy it again")
    for name, tensor in content.items():
        plain = isinstance(name, str) and tensor.layout == torch.strided and tensor.ndim in (1, 2)
        # An expanded tensor can have any size in a file of a few kB.
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UsageError(f"{file}: {name} is no vector or matrix that the file holds in full; copy it again")
    return content


def is_copy(theirs: Tensor, ours: Tensor) -> bool:
    """Return whether a matrix is the other one, perhaps rounded or quantized, by samples of their values."""
    if theirs.shape != ours.shape:
        return False
    mine, other = sample(ours).flatten(), sample(theirs).flatten()
    return float(torch.nn.functional.cosine_similarity(mine, other, dim=0)) >= LEAST_COSINE


def head_parts(config: ModelConfig) -> list[Part]:
    """Return the parts of a model that its heads file holds."""
    return [part for parts in stored_parts(config).values() for part in parts if part.file == HEADS_FILE]
