"""New heads on a trained model: its shape with them, and their first values.

Head 1 stays the same, bit for bit: it computes the same products over the same weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import UsageError
from headstart.model.config import HeadKindName, ModelConfig
from headstart.model.eagle import default_features
from headstart.model.heads import HEAD_KINDS
from headstart.model.layers import Block
from headstart.model.shape import Wiring
from headstart.model.transformer import Transformer

HEAD_FIELDS: dict[str, Any] = {
    **{"shared": True, "draft_vocab": None, "features": None, "norm_output": False, "draft_block": None}
}
"""Fields that describe heads of some kinds, and their defaults."""


def config_with_heads(
    config: ModelConfig,
    heads: int,
    kind: HeadKindName = "transformer",
    wiring: Wiring | None = None,
    *,
    replace_heads: bool = False,
    take_layers: bool = False,
    **fields: Any,
) -> ModelConfig:
    """Return the shape of a model of shape `config` with `heads` heads of `kind` in place of its own heads 2..n.

    An ordinary decoder of L layers keeps them all. Transformer heads: L - 1 in the trunk, the last one is head 1, and a
    block for each further head is added on top (the paper's "+layers"). Every other kind: all L in the trunk, and
    head 1 reads it as it is.

    Args:
        config: the shape of the existing model.
        heads: number of heads, head 1 included.
        kind: kind of the new heads.
        wiring: None: causal for sequential and eagle3 heads, parallel for all others.
        replace_heads: whether heads 2 and up of the existing model may be replaced.
        take_layers: whether transformer heads are blocks of the model in place of new ones (the paper's "+0 layers"):
            the trunk loses its last blocks to them.
        fields: further fields of the shape that describe heads: `HEAD_FIELDS`.

    Raises:
        UsageError: for heads that exist already, and for anticausal wiring, in which head 1 would read another head.
    """
    _check_model(config, heads, replace_heads)
    of_kind = HEAD_KINDS[kind]
    wiring = of_kind.wirings[0] if wiring is None else wiring
    if wiring == "anticausal":
        raise UsageError("wiring anticausal: head 1 would read the new heads and change; take parallel or causal")
    layers = config.next_token_layers
    if of_kind.takes_layers and layers == 1:
        raise UsageError(
            "the model has one layer, which transformer heads would leave no trunk; take another --head-kind, such as "
            "medusa"
        )
    if take_layers:
        _check_takes_layers(config, heads, kind)
    fields = {**HEAD_FIELDS, **fields}
    if of_kind.reads_features and fields["features"] is None:
        fields["features"] = default_features(layers)
    return replace(
        config,
        heads=heads,
        head_kind=kind,
        wiring=wiring,
        layers=layers,
        extra_layers=heads - 1 if of_kind.takes_layers and not take_layers else 0,
        **fields,
    )


def _check_model(config: ModelConfig, heads: int, replace_heads: bool) -> None:
    """Raise UsageError unless a model of shape `config` can get so many heads."""
    if heads < 2:
        raise UsageError(f"--heads is {heads}; head 1 is there already, so ask for 2 or more")
    if config.heads > 1 and not replace_heads:
        raise UsageError(
            f"the model has heads already ({config.heads} {config.head_kind}); --replace-heads puts new ones in the "
            "place of heads 2 and up"
        )
    if not config.kind.plain_decoder:
        raise UsageError(
            "head 1 of the model is no plain decoder (linear heads wired anticausally); take another model"
        )


def _check_takes_layers(config: ModelConfig, heads: int, kind: str) -> None:
    """Raise UsageError unless heads of `kind` can be the last blocks of a model of shape `config`."""
    if not HEAD_KINDS[kind].takes_layers:
        raise UsageError(f"take_layers is for transformer heads, not {kind}; leave it out")
    if config.next_token_layers <= heads:
        raise UsageError(
            f"take_layers: {heads} heads leave no layer of {config.next_token_layers} to the trunk; take fewer heads"
        )
    if config.window_layers is not None or config.nope_layers:
        raise UsageError(
            "take_layers: the layers of the model differ, and a head stands in another's place; leave it out"
        )


@torch.no_grad()
def with_heads(model: Transformer, config: ModelConfig, seed: int = 0, d2t: Tensor | None = None) -> Transformer:
    """Return `model` in the shape `config` that `config_with_heads` returned for it, with the draft vocabulary `d2t`.

    Weights of the path to head 1 are shared with `model`, in its dtype; those of new heads are float32 and their own.
    The first values of new heads:
      transformer   a copy of the last block, which is head 1 (Medusa's authors and others copy layers; the paper trains
                    from scratch). Wired in parallel they equal head 1 exactly. Heads that take the trunk's last blocks
                    (`take_layers`) are those, in order; head 1 keeps its own and reads a shorter trunk.
      linear        the identity: exactly head 1.
      replicated    a copy of the unembedding, of its rows of the draft vocabulary: exactly head 1.
      medusa        W and b of the residual zero, own unembeddings copies (arXiv 2401.10774): exactly head 1.
      stern         output maps zero, the hidden layer random: exactly head 1.
      sequential    a copy of the last block behind a join that passes the normed latent and leaves the token's
                    embedding out; training adds it. The norms give their outputs the size of the trunk's output,
                    which the block was trained on. DeepSeek-V3 (arXiv 2412.19437) and FastMTP (2509.18362)
                    prescribe nothing: they train their modules from scratch.
      eagle3        a copy of the last block that leaves the token's embedding out, of the final norm and of the
                    unembedding, behind a matrix that passes the last state. EAGLE-3 trains from scratch.
    """
    blocks = [*model.trunk.blocks, *(model.head(k) for k in model.path(1) if isinstance(model.head(k), Block))]
    last = blocks[-1].state_dict()
    old, state = dict(model.named_parameters()), dict[str, Tensor]()
    with torch.device("meta"):
        new = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    ks = range(1, config.heads + 1)
    own_blocks = {k: f"{names[0]}." for k in ks if (names := config.kind.block_names(k)) is not None}
    head_1 = own_blocks.pop(1, None)
    taken = len(blocks) - config.trunk_layers > 1  # the blocks between trunk and head 1
    source = {own: blocks[config.trunk_layers + k - 2 if taken else -1].state_dict() for k, own in own_blocks.items()}
    if config.draft_vocab is not None:
        assert d2t is not None and len(d2t) == config.draft_vocab
        state["unembedding.d2t"] = d2t

    def copied(name: str) -> Tensor | None:
        block = next((block for block in own_blocks.values() if name.startswith(block)), "")
        return config.kind.copied(name.removeprefix(block), source.get(block, last), old["unembedding.norm.weight"])

    for name, parameter in new.named_parameters():
        parts = name.split(".")
        if name.startswith("trunk.blocks."):
            value = blocks[int(parts[2])].state_dict()[".".join(parts[3:])]
        elif head_1 and name.startswith(head_1):
            value = last[name.removeprefix(head_1)]
        elif parts[0] == "unembedding" and parts[1] == "weights" and parts[2] != "0":
            first = old.get("unembedding.weights.0", old[EMBEDDING])
            value = _own(first if d2t is None else first[d2t])
        elif name in old and not name.startswith(OF_HEADS):
            value = old[name]
        elif (copy := copied(name)) is not None:
            value = _own(copy)
        else:
            value = torch.empty(parameter.shape, device=old[EMBEDDING].device)
            new_value_(name, value, new, generator)
        state[name] = nn.Parameter(value.detach())
    if config.tied:
        state["unembedding.weights.0"] = state[EMBEDDING]
    new.load_state_dict(state, assign=True)
    _set_sizes_(new)
    return new


EMBEDDING = "trunk.embedding.weight"
OF_HEADS = ("heads.", "unembedding.residuals.", "unembedding.draft_norm.")
"""Beginnings of the names of parameters that heads may have for themselves."""


def _own(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32, copy=True)


def _set_sizes_(model: Transformer) -> None:
    """Fill the norms of new heads whose outputs begin as large as the trunk's output."""
    if wide := model.config.kind.as_wide_at_first:
        size = size_of_latents(model)
        for name, parameter in model.named_parameters():
            if name.endswith(wide):
                parameter.fill_(size - model.config.norm_offset)


@torch.no_grad()
def size_of_latents(model: Transformer) -> float:
    """Return the root mean square of the trunk's output, as the median over random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (4, min(64, model.config.context)), generator=generator)
    z_BTD = model.latents(tokens_BT.to(model.device), [])[0]
    return float(z_BTD.float().square().mean(-1).sqrt().median())


@torch.no_grad()
def new_value_(name: str, tensor: Tensor, model: Transformer, generator: torch.Generator) -> None:
    """Fill `tensor` with the first value of a parameter that the old model does not have."""
    if not model.config.kind.begin_as_head_1(name, tensor):
        model.first_value_(name, tensor, generator)


def new_parameters(model: Transformer) -> set[str]:
    """Names of the parameters that heads 2..n have for themselves: what is trained where all else is frozen."""
    names = dict(model.named_parameters())
    of_heads = {name for name in names if name.startswith(OF_HEADS) and not name.startswith("heads.0.")}
    return of_heads | {name for name in names if name.startswith("unembedding.weights.") and not name.endswith(".0")}


def freeze(model: Transformer, names: set[str] | None = None) -> None:
    """Leaves only the parameters `names` to be trained (None: those of `new_parameters`)."""
    names = new_parameters(model) if names is None else names
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
