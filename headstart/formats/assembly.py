"""Models from stored tensors and stored tensors from models, whatever names a format has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType

import torch
from torch import Tensor, nn

from headstart.errors import UsageError
from headstart.formats.tensor_names import MODEL_FILE, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.draft_vocabulary import check_draft_tokens
from headstart.model.transformer import TRAINING_ALONE, Transformer

LLAMA = (
    *("vocab_size", "dim", "layers", "attention_heads", "kv_heads", "head_dim", "hidden_dim", "context", "tied"),
    *("attention_bias", "norm_eps", "rope_theta", "heads", "head_kind", "shared", "wiring", "extra_layers"),
)
"""The fields of ModelConfig that a plain Llama decoder and heads of every kind use."""


def assemble(
    config: ModelConfig, read: Callable[[Part], Tensor], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Transformer:
    """Return a model of `config` with the tensors that `read` returns for the parts of a model directory.

    `read` is called once for each `Part` of `stored_parts`. Raises UsageError for a tensor of another shape.
    """

    def fill(part: Part, target: Tensor) -> None:
        tensor = read(part)
        if tuple(tensor.shape) != part.shape:
            raise UsageError(
                f"{part.name}: has shape {list(tensor.shape)}, not {list(part.shape)} as its configuration says; "
                "use the configuration that was saved with it"
            )
        if part.dtype not in (None, tensor.dtype):
            raise UsageError(f"{part.name}: is {tensor.dtype}, not {part.dtype}; copy the model again")
        target.copy_(tensor)

    return assemble_in_place(config, fill, dtype, device)


def assemble_in_place(
    config: ModelConfig,
    fill: Callable[[Part, Tensor], None],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    shared: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> Transformer:
    """Return a model whose parameters `fill` writes, part by part, into their rows.

    The model is in memory only once. Parameters in `shared`, which `parameters_by_part` returned for another model, are
    taken as they are.
    """
    with torch.device("meta"):
        model = Transformer(config)
    check_names(model)
    state: dict[str, Tensor] = {}
    for name, parts in stored_parts(config).items():
        if (given := shared.get(parts[0].name)) is not None:
            state[name] = given
            continue
        rows = [part.shape[0] for part in parts]
        kind = parts[0].dtype or dtype
        parameter = torch.empty((sum(rows), *parts[0].shape[1:]), dtype=kind, device=device)
        for target, part in zip(parameter.split(rows), parts):
            fill(part, target)
            check_finite(part.name, target)
        state[name] = parameter if parts[0].dtype else nn.Parameter(parameter)
    if config.tied:
        state["unembedding.weights.0"] = state["trunk.embedding.weight"]
    if "unembedding.d2t" in state:
        check_draft_tokens(state["unembedding.d2t"], config.vocab_size, "d2t")
    model.load_state_dict(state, assign=True)
    return model


def parameters_by_part(model: Transformer) -> dict[str, nn.Parameter]:
    """Return the parameters of trunk and head 1 by the name of their first part in a model directory."""
    state = dict(model.named_parameters())
    files = stored_parts(model.config).items()
    return {parts[0].name: state[name] for name, parts in files if parts[0].file == MODEL_FILE}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UsageError if an entry is NaN or infinite. `aminmax` returns NaN if there is one, and takes no memory."""
    if tensor.is_meta or not tensor.numel():
        return
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise UsageError(
            f"{name}: holds NaN or infinite values, with which no text can be computed; copy the model again, or take "
            "an earlier checkpoint"
        )


def check_names(model: Transformer) -> None:
    """Raise UsageError if tensors of `model` have no place in a model directory, or places have no tensor.

    Saving would drop such tensors, and loading would fail.
    """
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
    """Return the tensors of each file of a model directory, by name; views of the parameters in their own dtype."""
    check_names(model)
    state = model.state_dict()
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}}
    for name, pieces in stored_parts(model.config).items():
        parameter = state[name].to("cpu", pieces[0].dtype or dtype).contiguous()
        for part, tensor in zip(pieces, parameter.split([part.shape[0] for part in pieces])):
            files.setdefault(part.file, {})[part.name] = tensor
    return files


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * E, ...) of queries or keys from Hugging Face's pairs to those of llama.cpp and Meta.

    Rotary positions turn coordinates i and i + E/2 as a pair in the first, 2i and 2i + 1 in the others.
    """
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * E, ...) of queries or keys from Meta's pairs to ours: the inverse of `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def inexpressible(config: ModelConfig, expressible: Iterable[str]) -> list[str]:
    """Return the fields of `config` that are not `expressible` in a format and differ from their defaults."""
    found = []
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in set(expressible) and getattr(config, field.name) != default:
            found.append(field.name)
    return found


def refuse_other_blocks(config: ModelConfig, place: str) -> None:
    """Raise UsageError if trunk and head 1 have other blocks than a plain Llama, for a `place` that holds no others."""
    names = inexpressible(config, (*LLAMA, "draft_vocab", "features", "norm_output", "draft_block"))
    others = [f"family {config.family}" if name == "family" else name for name in names]
    if others:
        raise UsageError(f"{place} holds plain Llama blocks, and this model has {', '.join(others)}; take headstart")
