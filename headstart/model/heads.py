"""The kinds of prediction heads: one class each, in the registry `HEAD_KINDS`.

The heads form a tree rooted at the trunk: `Shape.parents` says which latent feeds which head. A head maps its parent's
latent to its own, (B, T, D) -> (B, T, D); the unembedding turns a latent into logits over the vocabulary.

A new kind of heads is a class here and a line in `HEAD_KINDS`. Everything else that depends on the kind asks the class.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import UsageError
from headstart.model.attention import causal_attention
from headstart.model.eagle import EagleHead, block_shape, default_features
from headstart.model.layers import Attend, Block, RMSNorm
from headstart.model.shape import Shape, Wiring

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a parameter -> its name in the heads file, and its shape."""


class KeptBytes(Protocol):
    """Bytes per position that autograd keeps for a block and for a norm, and bytes of a number in two dtypes."""

    @property
    def compute(self) -> int:
        """Bytes of a number in the dtype of products."""

    @property
    def residual(self) -> int:
        """Bytes of a number in the dtype of the residual stream."""

    def block(self) -> int:
        """Return the bytes of a block."""

    def norm(self) -> int:
        """Return the bytes of an RMSNorm."""


class PassHead(nn.Module):
    """A head that reads its parent's latent as it is, such as head 1 of an ordinary decoder."""

    def forward(self, z_BTD: Tensor, *_: object) -> Tensor:
        """Return the latent."""
        return z_BTD


class OutputHead(PassHead):
    """Head 1 on a trunk that hands out inputs of layers: it reads the trunk's output, which comes last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor, *_: object) -> Tensor:
        """Return the trunk's output."""
        return z[..., -self.dim :]


class Residuals(nn.Module):
    """A function f of heads 2..n that is added to the normed latent: x + f(x). Its last map is the head's own."""

    hidden: nn.Linear | None
    """The map that the heads share, with a ReLU behind it, if there is one."""
    silu: ClassVar[bool] = False
    """True if SiLU is applied to the result of a head's map."""

    @property
    def head_maps(self) -> nn.ModuleList:
        """The maps of heads 2..n."""
        raise NotImplementedError

    def forward(self, x: Tensor, k: int) -> Tensor:
        """Return the latent of head k from the normed latent of the trunk."""
        y = x if self.hidden is None else F.relu(self.hidden(x))
        y = self.head_maps[k - 2](y)
        return x + (F.silu(y) if self.silu else y)


class HeadKind(ABC):
    """The modules, numbers, names and first values of the heads of one kind, for a model of a given shape.

    Head 1 of most kinds is plain: nothing but the unembedding of its parent's latent. The attributes and private
    methods of a subclass describe the other heads.
    """

    description: ClassVar[str]
    """A few words about a head, for `headstart inspect`."""
    wirings: ClassVar[tuple[Wiring, ...]] = ("parallel", "causal", "anticausal")
    """The wirings that the heads can have; the first is the default of new heads."""
    why_wiring: ClassVar[str] = ""
    """The reason for `wirings`, as the end of a sentence about the heads."""
    reads_features: ClassVar[bool] = False
    """True if heads read inputs of the trunk's layers."""
    takes_layers: ClassVar[bool] = False
    """True if heads count among the model's layers, and leave fewer to the trunk."""
    first_block: ClassVar[int | None] = None
    """The first head that runs through a transformer block; the heads behind it do too."""
    in_unembedding: ClassVar[bool] = False
    """True if heads 2..n are parts of the unembedding, and all read the trunk's latent as it is."""
    norms_outputs: ClassVar[bool] = False
    """True if `norm_output` makes a difference."""
    reads_tokens: ClassVar[bool] = False
    """True if head k also reads token t+k-1. Drafts are then made one after the other, and otherwise all at once."""
    can_be_unshared: ClassVar[bool] = False
    """True if `shared: false` makes a difference."""
    copies_unembedding: ClassVar[bool] = False
    """True if the heads' own unembeddings begin training as copies of head 1's."""
    zero_at_first: ClassVar[tuple[str, ...]] = ()
    """Parts of names of parameters that begin training as zeros."""
    as_wide_at_first: ClassVar[tuple[str, ...]] = ()
    """Ends of names of norms whose outputs begin as large as the trunk's output, on a trained model."""
    narrow_at_first: ClassVar[tuple[str, ...]] = ()
    """Parts of names of maps into the residual stream, which begin training with small numbers."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def check(self) -> None:
        """Raise UsageError for fields of the shape that do not go with these heads."""
        shape = self.shape
        if shape.wiring not in self.wirings:
            raise UsageError(f"{shape.head_kind} heads {self.why_wiring}; set model.wiring to {self.wirings[0]}")
        if not shape.shared and not self.can_be_unshared:
            names = " and ".join(name for name, kind in HEAD_KINDS.items() if kind.can_be_unshared)
            raise UsageError(f"model.shared false is for {names} heads, not {shape.head_kind}; leave it out")
        if self.reads_tokens and shape.offset_of_heads[-1] > shape.heads:
            raise UsageError(
                f"{shape.head_kind} heads read the token before the one they predict; leave model.offsets out, or take "
                "another model.head_kind"
            )
        if not 0 <= shape.extra_layers <= shape.heads - 1:
            raise UsageError(f"model.extra_layers is {shape.extra_layers}; it must lie between 0 and heads - 1")
        if shape.extra_layers and not self.takes_layers:
            raise UsageError(
                f"model.extra_layers is for transformer heads; {shape.head_kind} heads take no trunk layer"
            )
        for name in ("features", "draft_block"):
            if getattr(shape, name) and not self.reads_features:
                raise UsageError(f"model.{name} is for eagle3 heads, not {shape.head_kind}; leave it out")
        if shape.norm_output and not self.norms_outputs:
            raise UsageError(
                f"model.norm_output is for eagle3 and sequential heads, not {shape.head_kind}; leave it out"
            )

    @property
    def trunk_layers(self) -> int:
        """Blocks of the trunk."""
        shape = self.shape
        return shape.layers - (shape.heads - shape.extra_layers if self.takes_layers else 0)

    @property
    def plain_decoder(self) -> bool:
        """True if trunk and head 1 together are an ordinary decoder of its family, which any tool can load."""
        return True

    @property
    def parents(self) -> tuple[int, ...]:
        """The tree of heads, see `Shape.wired`."""
        return self.shape.wired

    @property
    def features(self) -> tuple[int, ...]:
        """The layers whose inputs the heads read, ascending; the trunk's number of layers stands for its output."""
        return ()

    @property
    def block_shape(self) -> Shape:
        """The shape of the blocks that `block_names` names."""
        return self.shape

    @property
    def block_inputs(self) -> int:
        """Width of the input of their attention."""
        return self.shape.dim

    @property
    def unembeddings(self) -> int:
        """Matrices of the unembedding: head k has the k-th, or the last."""
        return 1

    @property
    def own_unembeddings(self) -> bool:
        """True if heads 2..n do not use head 1's unembedding."""
        return self.unembeddings > 1

    @property
    def one_cache(self) -> bool:
        """True if heads 2..n are steps of one module with one set of keys and values, see `attention.StepAttention`.

        Head k then stands k - 2 positions behind that of its row.
        """
        return False

    @property
    def repeats_module(self) -> bool:
        """True if several heads run through one module with parameters."""
        return False

    def is_plain(self, k: int) -> bool:
        """Return whether head k is nothing but the unembedding of its parent's latent."""
        return k == 1 and self.first_block != 1

    def has_block(self, k: int) -> bool:
        """Return whether head k runs through a transformer block, its own or one that heads share."""
        return self.first_block is not None and k >= self.first_block

    def layer(self, k: int) -> int:
        """Return the layer of the block of head k: how many blocks lie below it."""
        return self.trunk_layers + len(self.shape.path(k)) - 1

    def block_names(self, k: int) -> tuple[str, str] | None:
        """Return the name of the block that head k adds to the model, in the model and in its heads file."""
        return None

    def tensors(self, k: int) -> Tensors:
        """Return the parameters that head k adds to the model outside of blocks.

        Files call head k `heads.{k}`; in the model's ModuleLists it has the number k - 1, or k - 2 without head 1.
        """
        if self.is_plain(k):
            return {}
        V, D, own = self.shape.drafted_tokens, self.shape.dim, 1 < k <= self.unembeddings
        unembedding = {f"unembedding.weights.{k - 1}": (f"heads.{k}.lm_head.weight", (V, D))} if own else {}
        return {**unembedding, **self._tensors(k)}

    def parameters(self, k: int) -> int:
        """Return the number of parameters that head k adds to the model."""
        block = 0 if self.block_names(k) is None else self.block_shape.block_parameters + self._wider_weights()
        return block + sum(math.prod(shape) for _, shape in self.tensors(k).values())

    def multiplied_weights(self, k: int) -> int:
        """Return how many weights a token is multiplied with in head k, outside of its block and its unembedding."""
        return 0 if self.is_plain(k) else self._map_weights()

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes per position that autograd keeps for one head and its latent."""
        return 0

    def modules(self) -> nn.ModuleList:
        """Return the modules of the heads in order, head 1's first. Heads that share a module share the last."""
        ks = range(1, self.shape.heads + 1)
        plain = OutputHead(self.shape.dim) if self.features else PassHead()
        found = [plain if self.is_plain(k) else self._module(k) for k in ks]
        return nn.ModuleList(module for module in found if module is not None)

    def residuals(self) -> Residuals | None:
        """Return the module between the final norm and the unembedding: (normed latent, k) -> latent of head k."""
        return None

    def draft_norm(self) -> nn.Module | None:
        """Return the norm before the unembedding of heads 2..n; None: head 1's."""
        return None

    def copied(self, name: str, block: Mapping[str, Tensor], norm_D: Tensor) -> Tensor | None:
        """Return the first value of a parameter of new heads on an existing model; None: it is no copy.

        Args:
            name: the parameter; in a block of head k without the name of the block.
            block: the parameters of the last block before head 1's unembedding.
            norm_D: the weight of the final norm.
        """
        return block.get(name)

    def begin_as_head_1(self, name: str, tensor: Tensor) -> bool:
        """Fill a parameter of new heads so that they begin as head 1, and return True; else return False."""
        return False

    def describe(self, k: int) -> str:
        """Return a few words about head k."""
        return self.description

    def _tensors(self, k: int) -> Tensors:
        """Return the parameters of head k, which is not plain, outside of blocks and unembeddings."""
        return {}

    def _wider_weights(self) -> int:
        """Return the entries of a block's matrices for inputs that are wider than its stream."""
        shape = self.block_shape
        width = shape.attention_dim + 2 * shape.key_value_heads * shape.dim_per_head
        return (self.block_inputs - shape.dim) * width

    def _map_weights(self) -> int:
        """Return the entries of the matrices of a head that is not plain, outside of block and unembedding."""
        return 0

    def _module(self, k: int) -> nn.Module | None:
        """Return the module of head k, which is not plain; None for a head that runs through that of another."""
        return PassHead()


class TransformerHeads(HeadKind):
    """One block per head (paper section 2)."""

    description = "transformer block"
    takes_layers = True
    first_block = 1

    def block_names(self, k: int) -> tuple[str, str] | None:
        """Return the names of a block of head k's own."""
        return f"heads.{k - 1}", f"heads.{k}"

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of a block."""
        return kept.block()

    def _module(self, k: int) -> nn.Module:
        return Block(self.shape, self.layer(k))


class LinearHead(nn.Module):
    """One matrix without nonlinearity, a linear probe of the latent (paper section B)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.map = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(
        self,
        z_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the mapped rows, those that `select` picks."""
        return self.map(z_BTD if select is None else select(z_BTD))


class LinearHeads(HeadKind):
    """One matrix per head (paper section B).

    Head 1 has none, which keeps trunk and head 1 an ordinary decoder, unless the wiring is anticausal: head 1 then
    reads head 2 and needs one.
    """

    description = "linear map"

    @property
    def plain_decoder(self) -> bool:
        """True if head 1 reads the trunk."""
        return self.shape.wiring != "anticausal"

    def is_plain(self, k: int) -> bool:
        """Return whether head k has no matrix."""
        return k == 1 and self.plain_decoder

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of the latent, and of its cast to the dtype of products."""
        return kept.compute * self.shape.dim * (1 if kept.residual == kept.compute else 2)

    def begin_as_head_1(self, name: str, tensor: Tensor) -> bool:
        """Make a map the identity."""
        if found := name.endswith(".map.weight"):
            nn.init.eye_(tensor)
        return found

    def _tensors(self, k: int) -> Tensors:
        return {f"heads.{k - 1}.map.weight": (f"heads.{k}.map.weight", (self.shape.dim, self.shape.dim))}

    def _map_weights(self) -> int:
        return self.shape.dim**2

    def _module(self, k: int) -> nn.Module:
        return LinearHead(self.shape)


class ReplicatedHeads(HeadKind):
    """One unembedding per head."""

    description = "own unembedding"
    wirings = ("parallel",)
    why_wiring = "have no latent of their own to chain"
    in_unembedding = True

    @property
    def unembeddings(self) -> int:
        """Matrices of the unembedding: one for each head."""
        return self.shape.heads


class MedusaResiduals(Residuals):
    """Medusa's heads (arXiv 2401.10774, section 2.1): x + SiLU(W x + b), x behind the final norm.

    W and b begin as zeros, so that a head begins as the next-token head. The bias is that of the authors' code; the
    paper has none.
    """

    silu = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden = None
        self.maps = nn.ModuleList(nn.Linear(shape.dim, shape.dim) for _ in range(shape.heads - 1))

    @property
    def head_maps(self) -> nn.ModuleList:
        """W and b of each head."""
        return self.maps


class MedusaHeads(HeadKind):
    """A residual layer per head behind the final norm (Medusa)."""

    description = "residual layer behind the final norm"
    wirings = ("parallel",)
    why_wiring = ReplicatedHeads.why_wiring
    in_unembedding = True
    can_be_unshared = True
    copies_unembedding = True
    zero_at_first = (".residuals.maps.",)

    @property
    def unembeddings(self) -> int:
        """Matrices of the unembedding: one, or one for each head."""
        return 1 if self.shape.shared else self.shape.heads

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of the input of SiLU, and of the sum."""
        return 0 if self.shape.heads == 1 else (kept.compute + kept.residual) * self.shape.dim

    def residuals(self) -> Residuals | None:
        """Return the residual layers."""
        return None if self.shape.heads == 1 else MedusaResiduals(self.shape)

    def describe(self, k: int) -> str:
        """Name the layer, and the unembedding of a head that has its own."""
        return self.description + (", own unembedding" if self.own_unembeddings else "")

    def _tensors(self, k: int) -> Tensors:
        D, ours, theirs = self.shape.dim, f"unembedding.residuals.maps.{k - 2}", f"heads.{k}.residual"
        return {f"{ours}.weight": (f"{theirs}.weight", (D, D)), f"{ours}.bias": (f"{theirs}.bias", (D,))}

    def _map_weights(self) -> int:
        return self.shape.dim**2


def _stern_width(shape: Shape) -> int:
    """Return the width of the layer that stern heads share: a SwiGLU's for each of heads 2..n."""
    return (shape.heads - 1) * shape.hidden


class SternResiduals(Residuals):
    """Stern's heads (arXiv 1811.03115, section 6): one feed-forward layer with an output per head, added to x.

    All heads read its hidden layer, which is as wide as those of n - 1 blocks. Head 1 stays x itself, so that the
    model without the other heads is what it is; in the paper it has an output too.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = _stern_width(shape)
        self.hidden = nn.Linear(shape.dim, width, bias=False)
        self.outputs = nn.ModuleList(nn.Linear(width, shape.dim, bias=False) for _ in range(shape.heads - 1))

    @property
    def head_maps(self) -> nn.ModuleList:
        """The output of each head."""
        return self.outputs


class SternHeads(HeadKind):
    """One feed-forward layer behind the final norm, with an output per head (Stern)."""

    description = "output of a shared feed-forward layer behind the final norm"
    wirings = ("parallel",)
    why_wiring = ReplicatedHeads.why_wiring
    in_unembedding = True
    narrow_at_first = (".residuals.outputs.",)

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of the hidden layer, of its gradient behind and before the ReLU, and of the sum."""
        return 3 * kept.compute * _stern_width(self.shape) + kept.residual * self.shape.dim

    def residuals(self) -> Residuals | None:
        """Return the feed-forward layer."""
        return None if self.shape.heads == 1 else SternResiduals(self.shape)

    def begin_as_head_1(self, name: str, tensor: Tensor) -> bool:
        """Make an output add nothing."""
        if found := ".residuals.outputs." in name:
            tensor.zero_()
        return found

    def _tensors(self, k: int) -> Tensors:
        D, H, module = self.shape.dim, _stern_width(self.shape), "unembedding.residuals"
        hidden: Tensors = {f"{module}.hidden.weight": ("heads.hidden.weight", (H, D))} if k == 2 else {}
        return {**hidden, f"{module}.outputs.{k - 2}.weight": (f"heads.{k}.output.weight", (D, H))}

    def _map_weights(self) -> int:
        return 2 * self.shape.dim * _stern_width(self.shape)  # each loss computes the hidden layer anew


class SequentialHead(nn.Module):
    """DeepSeek-V3's module (arXiv 2412.19437, section 2.2), a block that reads a latent and a token.

    The latent of head k-1 at t and the embedding of token t+k-1 are normed and joined by one matrix. The latent that
    comes out goes to the next head, and to the unembedding, whose final norm all heads share. With `norm_output` it has
    gone through a norm of the module's own, and the unembedding norms it no more.
    """

    def __init__(self, shape: Shape, layer: int, norm_output: bool) -> None:
        super().__init__()
        self.latent_norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)
        self.token_norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)
        self.join = nn.Linear(2 * shape.dim, shape.dim, bias=False)
        self.block = Block(shape, layer)
        self.norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset) if norm_output else None

    def forward(
        self,
        z_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
        *,
        ahead_BTD: Tensor,
    ) -> Tensor:
        """Return the latent, like `Block`; `ahead_BTD` holds the embedding of token t+k-1 for each position t."""
        joined = self.join(torch.cat([self.latent_norm(z_BTD), self.token_norm(ahead_BTD)], -1))
        z_BTD = self.block(joined, rotary, attend, select)
        return z_BTD if self.norm is None else self.norm(z_BTD)


class SequentialHeads(HeadKind):
    """A block per head, or one for all heads, that also reads the token before the one to predict (DeepSeek-V3).

    Each head has keys and values of its own, at every position. With `norm_output` the heads are steps of one module
    over one set of keys and values instead, as in EAGLE and as engines run MiMo's module again and again.
    """

    description = "block that also reads the token before"
    wirings = ("causal",)
    why_wiring = "read one another's latents in turn"
    first_block = 2
    reads_tokens = True
    can_be_unshared = True
    norms_outputs = True
    as_wide_at_first = (".latent_norm.weight", ".token_norm.weight")

    def check(self) -> None:
        """Raise UsageError for fields of the shape that do not go with these heads."""
        super().check()
        if self.one_cache and not self.shape.shared:
            raise UsageError(
                "model.norm_output makes sequential heads steps of one module; leave it or model.shared false out"
            )

    @property
    def one_cache(self) -> bool:
        """True if the outputs of steps are normed."""
        return self.shape.norm_output

    @property
    def block_shape(self) -> Shape:
        """The shape of the blocks; steps over one cache see the whole context."""
        slides = self.one_cache and self.shape.window is not None
        return replace(self.shape, window_layers=()) if slides else self.shape

    @property
    def repeats_module(self) -> bool:
        """True if several heads run through one module."""
        return self.shape.shared and self.shape.heads > 2

    def layer(self, k: int) -> int:
        """Return the layer above the trunk and the heads before; a shared block has the first."""
        return self.trunk_layers + (0 if self.shape.shared else k - 2)

    def block_names(self, k: int) -> tuple[str, str] | None:
        """Return the names of the block of head k's module."""
        return (f"heads.{k - 1}.block", self._stored_name(k)) if self._adds_module(k) else None

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of a block, two norms, their joined outputs, and the product with the matrix."""
        norms = 3 if self.one_cache else 2
        return 0 if self.shape.heads == 1 else kept.block() + norms * kept.norm() + 3 * kept.compute * self.shape.dim

    def draft_norm(self) -> nn.Module | None:
        """Return the norm before the unembedding: head 1's, or none for outputs that the module norms."""
        return nn.Identity() if self.one_cache and self.shape.heads > 1 else None

    def copied(self, name: str, block: Mapping[str, Tensor], norm_D: Tensor) -> Tensor | None:
        """Return a copy of the last block, and of the final norm for the module's own."""
        return norm_D if name == "heads.1.norm.weight" else block.get(name)

    def begin_as_head_1(self, name: str, tensor: Tensor) -> bool:
        """Make a join pass the normed latent and ignore the token."""
        if found := name.endswith(".join.weight"):
            nn.init.eye_(tensor)  # the first half of the columns is the latent's
        return found

    def describe(self, k: int) -> str:
        """Name the block and the token that it reads."""
        if self.one_cache and k > 2:
            return f"step {k - 1} of the same module, on the output of head {k - 1} and token t+{k - 1}"
        return f"block{', shared,' if self.shape.shared else ''} that also reads token t+{k - 1}"

    def _adds_module(self, k: int) -> bool:
        return k == 2 or (k > 2 and not self.shape.shared)

    def _stored_name(self, k: int) -> str:
        return "heads.shared" if self.shape.shared else f"heads.{k}"

    def _tensors(self, k: int) -> Tensors:
        D = self.shape.dim
        shapes = {"latent_norm.weight": (D,), "token_norm.weight": (D,), "join.weight": (D, 2 * D)}
        shapes |= {"norm.weight": (D,)} if self.one_cache else {}
        named = {f"heads.{k - 1}.{name}": (f"{self._stored_name(k)}.{name}", shape) for name, shape in shapes.items()}
        return named if self._adds_module(k) else {}

    def _map_weights(self) -> int:
        return 2 * self.shape.dim**2

    def _module(self, k: int) -> nn.Module | None:
        return SequentialHead(self.block_shape, self.layer(k), self.one_cache) if self._adds_module(k) else None


class Eagle3Heads(HeadKind):
    """One block that reads states of the trunk, and in further steps its own outputs (EAGLE-3, `eagle.py`).

    It has a final norm and an output matrix of its own. Head k is step k - 1.
    """

    description = "step of EAGLE's block"
    wirings = ("causal",)
    why_wiring = "read one another's outputs in turn"
    reads_features = True
    first_block = 2
    reads_tokens = True
    norms_outputs = True
    copies_unembedding = True

    def check(self) -> None:
        """Raise UsageError for fields of the shape that do not go with these heads."""
        super().check()
        features, layers = self.features, self.trunk_layers
        ascending = all(before < after for before, after in pairwise(features))
        if self.shape.heads > 1 and not (features and ascending and features[-1] <= layers):
            raise UsageError(
                f"model.features is {list(features)}; it must ascend, up to {layers}, the trunk's output, such as "
                f"{list(default_features(layers))}"
            )

    @property
    def parents(self) -> tuple[int, ...]:
        """The tree of heads: heads 1 and 2 read the trunk, and each other one the head before."""
        return (0, *(0 if k == 2 else k - 1 for k in range(2, self.shape.heads + 1)))

    @property
    def features(self) -> tuple[int, ...]:
        """The layers whose inputs the heads read, ascending; the trunk's number of layers stands for its output."""
        if self.shape.heads == 1:
            return ()
        return default_features(self.trunk_layers) if self.shape.features is None else self.shape.features

    @property
    def block_shape(self) -> Shape:
        """The shape of the block: Llama's."""
        return block_shape(self.shape)

    @property
    def block_inputs(self) -> int:
        """Width of an embedding and a state."""
        return 2 * self.shape.dim

    @property
    def one_cache(self) -> bool:
        """True, because all steps share the block."""
        return True

    @property
    def unembeddings(self) -> int:
        """Matrices of the unembedding: head 1's, and that of all steps."""
        return min(2, self.shape.heads)

    @property
    def repeats_module(self) -> bool:
        """True if several heads run through the module."""
        return self.shape.heads > 2

    def layer(self, k: int) -> int:
        """Return the layer above the trunk."""
        return self.trunk_layers

    def block_names(self, k: int) -> tuple[str, str] | None:
        """Return the names of the block, which head 2 adds."""
        return ("heads.1.midlayer", "heads.shared.midlayer") if k == 2 else None

    def multiplied_weights(self, k: int) -> int:
        """Return the weights that a token is multiplied with outside of a block as wide as its stream."""
        if k == 1:
            return 0
        joined = len(self.features) * self.shape.dim**2 if k == 2 and len(self.features) > 1 else 0
        return joined + self._wider_weights()

    def kept_bytes(self, kept: KeptBytes) -> int:
        """Return the bytes of a block, a norm, and the normed inputs of its attention."""
        return 0 if self.shape.heads == 1 else kept.block() + kept.norm() + 3 * kept.compute * self.shape.dim

    def draft_norm(self) -> nn.Module | None:
        """Return the final norm of the steps; outputs that the module norms need none."""
        shape = self.shape
        if shape.heads == 1:
            return None
        return nn.Identity() if shape.norm_output else RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)

    def copied(self, name: str, block: Mapping[str, Tensor], norm_D: Tensor) -> Tensor | None:
        """Return a copy of the last block that ignores the embedding, and of the final norm."""
        if name == self._norm_name:
            return norm_D
        if name == "attention.qkv.weight":
            return torch.cat([torch.zeros_like(block[name]), block[name]], 1)
        if name == "hidden_norm.weight":
            return block.get("attention_norm.weight")
        return None if name == "attention_norm.weight" else block.get(name)

    def begin_as_head_1(self, name: str, tensor: Tensor) -> bool:
        """Make the matrix that joins states pass the last one."""
        if found := name.endswith(".fc.weight"):
            tensor.zero_()
            nn.init.eye_(tensor[:, -self.shape.dim :])
        return found

    def describe(self, k: int) -> str:
        """Name the step, and what it reads."""
        if k > 2:
            return f"step {k - 1} of the same block, on the output of head {k - 1} and token t+{k - 1}"
        inputs = [f"input of layer {f}" if f < self.trunk_layers else "the trunk's output" for f in self.features]
        return f"block that reads {', '.join(inputs)} and token t+1; own output matrix"

    @property
    def _norm_name(self) -> str:
        return "heads.1.norm.weight" if self.shape.norm_output else "unembedding.draft_norm.weight"

    def _tensors(self, k: int) -> Tensors:
        D, F = self.shape.dim, len(self.features)
        if k > 2:
            return {}
        fc: Tensors = {"heads.1.fc.weight": ("heads.shared.fc.weight", (D, F * D))} if F > 1 else {}
        hidden = {"heads.1.midlayer.hidden_norm.weight": ("heads.shared.midlayer.hidden_norm.weight", (D,))}
        return {**fc, **hidden, self._norm_name: ("heads.shared.norm.weight", (D,))}

    def _module(self, k: int) -> nn.Module | None:
        if k > 2:
            return None
        return EagleHead(self.block_shape, self.trunk_layers, len(self.features), self.shape.norm_output)


HEAD_KINDS: dict[str, type[HeadKind]] = {
    "transformer": TransformerHeads,
    "linear": LinearHeads,
    "replicated": ReplicatedHeads,
    "medusa": MedusaHeads,
    "stern": SternHeads,
    "sequential": SequentialHeads,
    "eagle3": Eagle3Heads,
}
