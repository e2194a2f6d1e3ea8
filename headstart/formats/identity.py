"""The identity of the model that heads were trained on: a digest of each tensor, and samples of its values.

The digests tell the model from every other one, whatever dtype its values are stored in. The samples are compared
without reading all values, and recognize the same values rounded or quantized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from headstart.errors import UsageError
from headstart.formats.assembly import stored_tensors
from headstart.formats.safetensors_files import PIECE_BYTES, TensorFiles
from headstart.formats.tensor_names import EMBEDDING, MODEL_FILE, UNEMBEDDING
from headstart.model.transformer import Transformer

GROUPS, GROUP = 8, 32
"""Groups of neighbours in a row that are sampled of a tensor, and their size: no format quantizes smaller blocks."""
LEAST_COSINE = 0.9
"""The least cosine of the angle between the samples of a matrix and of its quantized copy: 0.996 for 4 bits, 0.95 for
2 bits. Between two models it is about 0."""
MOST_DISTINCT = 0.955
"""The largest share of distinct values in the groups of a quantized matrix. It is 0.92 with 8 bits, 0.4 with 4, and
0.986 if a group is normally distributed in bfloat16."""
VECTOR_ROUNDING = 2e-7
"""The largest error of a norm, relative to 1 + norm, that a file stores so in float32 (Gemma in GGUF)."""

Copy = Literal["same", "rounded", "quantized"]


@dataclass(frozen=True)
class Identity:
    """Tell a base from other models; tensors have their names in a model directory."""

    digests: Mapping[str, str]
    """SHA-256 of the shape and the values of each tensor."""
    samples: Mapping[str, Tensor]
    """Groups of neighbouring values of each tensor, (GROUPS, GROUP) float32."""

    @classmethod
    def of(cls, model: Transformer) -> Identity:
        """Return the identity of trunk and head 1. All values are read."""
        tensors = base_tensors(model)
        return cls(digests_of(tensors), {name: sample(tensor) for name, tensor in tensors.items()})

    @property
    def sha256(self) -> str:
        """SHA-256 of the names and digests of all tensors."""
        lines = "\n".join(f"{name} {digest}" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def save(self, file: Path) -> None:
        """Write the samples as safetensors, with the digests as metadata."""
        save_file(dict(self.samples), file, {"format": "pt", "digests": json.dumps(dict(self.digests), sort_keys=True)})

    @classmethod
    def read(cls, file: Path) -> Identity:
        """Return what `save` wrote. Raises UsageError for a damaged file."""
        tensors = TensorFiles([file])
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        try:
            digests = json.loads(metadata["digests"])
        except (KeyError, ValueError, RecursionError) as error:
            raise UsageError(f"{file}: is damaged (no digests of tensors); copy the heads again") from error
        if not isinstance(digests, dict) or set(digests) != set(tensors.names()):
            raise UsageError(f"{file}: is damaged (digests of other tensors); copy the heads again")
        return cls(digests, {name: tensors.read(name).float() for name in tensors.names()})

    def compare_samples(self, model: Transformer) -> tuple[Copy | None, list[str]]:
        """Compare the samples with those of a model of the same sizes.

        Returns:
            The kind of copy that its trunk and head 1 are, None for other weights, and the names of the tensors whose
            values are neither the same nor rounded.
        """
        found = {name: sample(tensor) for name, tensor in base_tensors(model).items()}
        pairs = [(name, mine, found[name]) for name, mine in self.samples.items()]
        unequal = [pair for pair in pairs if not torch.equal(*pair[1:])]
        others = [pair for pair in unequal if not _is_rounded(*pair)]
        names = [name for name, _, _ in others]
        if not others:
            return ("rounded" if unequal else "same"), names
        matrices = [(mine, theirs) for name, mine, theirs in others if not _is_vector(name)]
        near = len(matrices) == len(others) and all(_cosine(*pair) >= LEAST_COSINE for pair in matrices)
        coarse = matrices and min(_distinct([pair[side] for pair in matrices]) for side in (0, 1)) <= MOST_DISTINCT
        return ("quantized" if near and coarse else None), names

    def changed(self, model: Transformer) -> list[str]:
        """Return the names of the tensors of a model that differ in any value. All values are read."""
        found = digests_of(base_tensors(model))
        return [name for name, digest in self.digests.items() if found.get(name) != digest]


def base_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of trunk and head 1 by name; a tied unembedding is the embedding under its own name."""
    tensors = stored_tensors(model, None)[MODEL_FILE]
    return tensors if UNEMBEDDING in tensors else tensors | {UNEMBEDDING: tensors[EMBEDDING]}


def sample(tensor: Tensor) -> Tensor:
    """Return groups of neighbouring values (GROUPS, GROUP) float32, the same places for every tensor of a shape.

    Groups of narrower tensors have the width of a row.
    """
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor[None]
    width = min(GROUP, rows.shape[1])
    in_row = rows.shape[1] // width
    count = len(rows) * in_row
    # Evenly spaced, and not all at the beginning of a row.
    places = (torch.arange(GROUPS) * count // GROUPS + torch.arange(GROUPS) * 7) % count
    columns = (places % in_row)[:, None] * width + torch.arange(width)
    return rows.detach()[(places // in_row)[:, None], columns].float().contiguous()


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each tensor; threads share the work."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(digest_of, tensors.values())))


def digest_of(tensor: Tensor) -> str:
    """Return the SHA-256 of shape and values, equal for every dtype that holds the same values.

    Values are hashed as bfloat16 if it holds them all, else as float32 or float64.
    """
    flat = tensor.detach().contiguous().view(-1)
    pieces = flat.split(PIECE_BYTES // 4)
    dtype = next((d for d in (torch.bfloat16, torch.float32) if all(_holds(d, piece) for piece in pieces)), flat.dtype)
    digest = hashlib.sha256(f"{list(tensor.shape)} {dtype}".encode())
    for piece in pieces:
        digest.update(piece.to(dtype).view(torch.uint8).numpy())
    return digest.hexdigest()


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Return whether a dtype holds the values exactly."""
    return values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values)


def _is_vector(name: str) -> bool:
    """Return whether a tensor is a norm or a bias, which quantized files hold in float32."""
    return "norm" in name or name.endswith(".bias")


def _is_rounded(name: str, mine: Tensor, theirs: Tensor) -> bool:
    """Return whether one side is the other in 16 bits, or a norm that is the other up to rounding."""
    if mine.shape != theirs.shape:
        return False
    if _is_vector(name) and torch.allclose(mine, theirs, rtol=VECTOR_ROUNDING, atol=VECTOR_ROUNDING):
        return True
    for one, other in ((mine, theirs), (theirs, mine)):
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(one.to(dtype).float(), other):
                return True
    return False


def _cosine(mine: Tensor, theirs: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0))


def _distinct(samples: list[Tensor]) -> float:
    """Return the share of distinct values in the groups of all samples."""
    groups = [group for tensor in samples for group in tensor]
    return sum(len(group.unique()) for group in groups) / sum(map(len, groups))
