"""Models made of tensors that other layouts keep under other names, and what of a model a layout has no field for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields

import torch
from torch import Tensor, nn

from headstart.errors import UsageError
from headstart.formats.tensor_names import MODEL_FILE, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.transformer import TRAINING_ALONE, Transformer

LLAMA = (
    *("vocab_size", "dim", "layers", "attention_heads", "kv_heads", "head_dim", "hidden_dim", "context", "tied"),
    *("attention_bias", "norm_eps", "rope_theta", "heads", "head_kind", "shared", "wiring", "extra_layers"),
)
"""The fields of ModelConfig that a plain Llama decoder and its heads of every kind use."""


def assemble(
    config: ModelConfig, read: Callable[[Part], Tensor], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of shape `config` with the tensors that `read` gives for the parts of a model directory.

    Args:
        read: the tensor of a `Part` (by the names of `stored_parts`), of its shape; asked once for each.
        dtype: of all parameters.
        device: where they are made.

    Raises:
        UsageError: a tensor of another shape.
    """

    def fill(part: Part, target: Tensor) -> None:
        tensor = read(part)
        if tuple(tensor.shape) != part.shape:
            raise UsageError(
                f"{part.name}: has shape {list(tensor.shape)}, not {list(part.shape)} as its configuration says; "
                "use the configuration that was saved with it"
            )
        target.copy_(tensor)

    return assemble_in_place(config, fill, dtype, device)


def assemble_in_place(
    config: ModelConfig,
    fill: Callable[[Part, Tensor], None],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Transformer:
    """The same where `fill` writes each part into the rows of the parameter that are its own, with nothing between: the
    model is never there twice."""
    with torch.device("meta"):
        model = Transformer(config)
    check_names(model)
    state: dict[str, Tensor] = {}
    for name, parts in stored_parts(config).items():
        rows = [part.shape[0] for part in parts]
        parameter = torch.empty((sum(rows), *parts[0].shape[1:]), dtype=dtype, device=device)
        for target, part in zip(parameter.split(rows), parts):
            fill(part, target)
            _check_finite(part.name, target)
        state[name] = nn.Parameter(parameter)
    if config.tied:
        state["unembedding.weights.0"] = state["trunk.embedding.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise UsageError where an entry is NaN or infinite. `aminmax` hands on NaN, and takes no memory of its own."""
    if tensor.is_meta or not tensor.numel():
        return
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise UsageError(
            f"{name}: holds NaN or infinite values, with which no text can be computed; copy the model again, or take "
            "an earlier checkpoint"
        )


def check_names(model: Transformer) -> None:
    """Raise UsageError, naming them, where tensors of `model` have no place in a model directory, or places no tensor:
    saving would drop them, and loading fail."""
    tied = {"unembedding.weights.0"} if model.config.tied else set()
    there, placed = set(model.state_dict()) - TRAINING_ALONE - tied, set(stored_parts(model.config))
    kind = f"a model with {model.config.head_kind} heads"
    for names, what in ((there - placed, "has no place for"), (placed - there, "needs")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UsageError(
                f"{kind}: a model directory {what} {some}; name every tensor in stored_parts "
                "(headstart/formats/tensor_names.py), or save the model without what was added to it or taken from it"
            )


def stored_tensors(model: Transformer, dtype: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
    """The content of each file: parts of parameters as views where they need no conversion."""
    check_names(model)
    state = model.state_dict()
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}}
    for name, pieces in stored_parts(model.config).items():
        parameter = state[name].to("cpu", dtype).contiguous()
        for part, tensor in zip(pieces, parameter.split([part.shape[0] for part in pieces])):
            files.setdefault(part.file, {})[part.name] = tensor
    return files


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * E, ...) of queries or keys, reordered: Hugging Face's Llama turns coordinates i and i + E/2 as a
    pair, llama.cpp's 2i and 2i + 1."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * E, ...) of queries or keys from Meta's pairs 2i, 2i + 1 to ours, i and i + E/2: the inverse of
    `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def inexpressible(config: ModelConfig, known: Iterable[str]) -> list[str]:
    """The fields of `config` that are not among the `known` ones and not what they are by default."""
    found = []
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in set(known) and getattr(config, field.name) != default:
            found.append(field.name)
    return found


def refuse_other_blocks(config: ModelConfig, place: str) -> None:
    """UsageError, naming the fields, where the blocks are not a plain Llama's, for a `place` that holds no others."""
    others = [f"family {config.family}" if name == "family" else name for name in inexpressible(config, LLAMA)]
    if others:
        raise UsageError(f"{place} holds plain Llama blocks, and this model has {', '.join(others)}; take headstart")
