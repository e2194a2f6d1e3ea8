"""A language model that predicts several tokens at once (arXiv 2404.19737).

Headstart has written this file, which needs torch and transformers. Trunk and head 1 are the ordinary model in
model.safetensors, which any tool loads without this file. Head k predicts the k-th token behind a position; heads 2..n
lie in heads/heads.safetensors. `custom_generate/generate.py` decodes with all of them, and its output is that of
decoding with head 1.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(ids)                     # with all heads; heads=1: one token per pass
    model.head_logits(ids)                  # (batch, time, heads, vocabulary)

Shape suffixes: B batch, W rows of a pass, D width, H attention heads, K key/value heads, E width of one head, V tokens.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.utils import cached_file

HEADS_FILE = os.path.join("heads", "heads.safetensors")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class SequentialHead(LlamaDecoderLayer):
    """DeepSeek-V3's module: the latent of head k-1 and the embedding of token t+k-1, joined, then a block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, 0)
        self.latent_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.token_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)


class Cache:
    """Keys and values of every block of trunk and heads, for sequences of up to `length` tokens.

    Slot 0 is written and never read: it takes the rows before a sequence begins.
    """

    def __init__(self, model: HeadstartForCausalLM, batch: int, length: int) -> None:
        config = model.config
        blocks = config.num_hidden_layers + model.settings.heads
        shape = (blocks, 2, batch, config.num_key_value_heads, length + 1, config.head_dim)
        self.kept = torch.zeros(shape, dtype=model.dtype, device=model.device)

    def attend(self, block: int, q_BHWE: Tensor, k_BKWE: Tensor, v_BKWE: Tensor, rows: Rows) -> Tensor:
        """Write keys and values of the rows, and attend to them and all before them: (B, H, W, E)."""
        keys, values = self.kept[block]
        batch_B1 = torch.arange(keys.shape[0], device=keys.device)[:, None]
        keys[batch_B1, :, rows.slot_BW] = k_BKWE.transpose(1, 2)
        values[batch_B1, :, rows.slot_BW] = v_BKWE.transpose(1, 2)
        groups = q_BHWE.shape[1] != keys.shape[1]
        reach = rows.mask_B1WS.shape[-1]
        keys, values = keys[:, :, :reach], values[:, :, :reach]
        return F.scaled_dot_product_attention(q_BHWE, keys, values, rows.mask_B1WS, enable_gqa=groups)


class Rows:
    """Positions of the rows of a pass: row (b, w) is at `index` in sequence b, whose first `pad` tokens are padding.

    `reach`: an index that no row exceeds.
    """

    def __init__(self, model: HeadstartForCausalLM, index_BW: Tensor, pad_B: Tensor, reach: int) -> None:
        self.index_BW = index_BW
        self.slot_BW = (index_BW + 1).clamp(min=0)
        slots_S = torch.arange(reach + 2, device=index_BW.device)
        seen = (slots_S <= self.slot_BW[..., None]) & (slots_S > pad_B[:, None, None])
        # A row of padding sees itself, so that its attention is not NaN.
        self.mask_B1WS = (seen | (slots_S == self.slot_BW[..., None]))[:, None]
        position_BW = (index_BW - pad_B[:, None]).clamp(min=0)
        self.cos, self.sin = model.model.rotary_emb(model.lm_head.weight, position_ids=position_BW)


class HeadstartForCausalLM(LlamaForCausalLM):
    """An ordinary decoder, which computes head 1, with further heads."""

    _keys_to_ignore_on_load_missing = [r"^heads\."]  # noqa: RUF012  # they have a file of their own

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.settings = SimpleNamespace(**config.headstart["model"])
        """The fields of Headstart's ModelConfig."""
        n, kind, wiring = self.settings.heads, self.settings.head_kind, self.settings.wiring
        self.parents = {k: 0 for k in range(1, n + 1)}
        """The head whose latent head k reads; 0 is the trunk."""
        if wiring == "causal":
            self.parents = {k: k - 1 for k in range(1, n + 1)}
        elif wiring == "anticausal":
            self.parents = {k: k + 1 if k < n else 0 for k in range(1, n + 1)}
        self.on_path = self.path(1) if kind == "transformer" else []
        """Heads that are layers of the ordinary model, in order of computation."""
        self.trunk_layers = config.num_hidden_layers - len(self.on_path)
        self.draft_vocab: int | None = getattr(self.settings, "draft_vocab", None)
        """Number of tokens that heads 2..n propose (None: all); their ids are `heads.d2t`."""
        self.heads = nn.ModuleDict(self._further_heads(config))
        if self.draft_vocab is not None:
            self.heads.register_buffer("d2t", torch.zeros(self.draft_vocab, dtype=torch.long))
        self.post_init()

    def _further_heads(self, config: Any) -> dict[str, nn.Module]:
        """Return the modules that heads 2..n add to the ordinary model, by the names of heads.safetensors."""
        n, kind, shared, D = self.settings.heads, self.settings.head_kind, self.settings.shared, config.hidden_size

        def linear(rows: int, columns: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(columns, rows, bias=bias)

        heads: dict[str, nn.Module] = {}
        for k in range(2, n + 1):
            parts: dict[str, nn.Module] = {}
            if kind == "transformer" and k not in self.on_path:
                heads[str(k)] = LlamaDecoderLayer(config, 0)
            elif kind == "sequential" and (k == 2 or not shared):
                heads["shared" if shared else str(k)] = SequentialHead(config)
            elif kind == "linear":
                parts["map"] = linear(D, D)
            elif kind == "medusa":
                parts["residual"] = linear(D, D, bias=True)
            elif kind == "stern":
                width = (n - 1) * config.intermediate_size
                heads.setdefault("hidden", linear(width, D))
                parts["output"] = linear(D, width)
            if kind == "replicated" or (kind == "medusa" and not shared):
                parts["lm_head"] = linear(self.draft_vocab or config.vocab_size, D)
            if parts:
                heads[str(k)] = nn.ModuleDict(parts)
        return heads

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **options: Any) -> Any:
        """Load the ordinary model, and the heads from their own file."""
        loaded = super().from_pretrained(name, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if len(model.heads):
            file = cached_file(name, HEADS_FILE, **{key: options[key] for key in HUB_OPTIONS if key in options})
            model.heads.load_state_dict({key.removeprefix("heads."): value for key, value in load_file(file).items()})
        return loaded

    def save_pretrained(self, directory: Any, **options: Any) -> None:
        """Save the ordinary model, and the heads in their own file, which other tools ignore."""
        state = options.pop("state_dict", None) or self.state_dict()
        heads = {name: tensor.contiguous().cpu() for name, tensor in state.items() if name.startswith("heads.")}
        plain = {name: tensor for name, tensor in state.items() if name not in heads}
        super().save_pretrained(directory, state_dict=plain, **options)
        if "heads.d2t" in heads:
            heads["d2t"] = heads.pop("heads.d2t")
        if heads:
            os.makedirs(os.path.join(directory, "heads"), exist_ok=True)
            save_file(heads, os.path.join(directory, HEADS_FILE), metadata={"format": "pt"})

    def path(self, k: int) -> list[int]:
        """Return the heads between the trunk and head k in order of computation, head k last."""
        order: list[int] = []
        while k:
            order.insert(0, k)
            k = self.parents[k]
        return order

    def run_block(self, block: Any, number: int, x_BWD: Tensor, rows: Rows, cache: Cache) -> Tensor:
        """Run a block over the rows, and keep its keys and values as those of block `number`."""
        attention = block.self_attn
        normed = block.input_layernorm(x_BWD)
        q, k, v = (
            project(normed).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, rows.cos, rows.sin)
        attended = cache.attend(number, q, k, v, rows).transpose(1, 2).flatten(2)
        x_BWD = x_BWD + attention.o_proj(attended)
        return x_BWD + block.mlp(block.post_attention_layernorm(x_BWD))

    def trunk(self, tokens_BW: Tensor, rows: Rows, cache: Cache) -> Tensor:
        """Return the latent z (B, W, D) that heads read."""
        z_BWD = self.model.embed_tokens(tokens_BW)
        for layer in range(self.trunk_layers):
            z_BWD = self.run_block(self.model.layers[layer], layer, z_BWD, rows, cache)
        return z_BWD

    def head(self, k: int, z_BWD: Tensor, rows: Rows, cache: Cache, ahead_BW: Tensor | None = None) -> Tensor:
        """Return the latent (B, W, D) of head k from that of its parent.

        Sequential heads also read `ahead`, which holds token t+k-1 for row t.
        """
        kind, number = self.settings.head_kind, self.trunk_layers + k - 1
        if kind == "transformer":
            on_path = k in self.on_path
            block = self.model.layers[self.trunk_layers + self.on_path.index(k)] if on_path else self.heads[str(k)]
            return self.run_block(block, number, z_BWD, rows, cache)
        if kind == "linear" and k > 1:
            return self.heads[str(k)]["map"](z_BWD)
        if kind == "sequential" and k > 1:
            module = self.heads["shared" if self.settings.shared else str(k)]
            ahead_BWD = self.model.embed_tokens(ahead_BW)
            joined = module.join(torch.cat([module.latent_norm(z_BWD), module.token_norm(ahead_BWD)], -1))
            return self.run_block(module, number, joined, rows, cache)
        return z_BWD

    def unembed(self, latent: Tensor, k: int) -> Tensor:
        """Return the logits (..., V) of a latent (..., D) of head k."""
        x, kind = self.model.norm(latent), self.settings.head_kind
        if kind == "medusa" and k > 1:
            x = x + F.silu(self.heads[str(k)]["residual"](x))
        if kind == "stern" and k > 1:
            x = x + self.heads[str(k)]["output"](F.relu(self.heads["hidden"](x)))
        own = k > 1 and (kind == "replicated" or (kind == "medusa" and not self.settings.shared))
        if k == 1 or self.draft_vocab is None:
            return self.heads[str(k)]["lm_head"](x) if own else self.lm_head(x)
        d2t = self.heads.d2t
        logits = self.heads[str(k)]["lm_head"](x) if own else F.linear(x, self.lm_head.weight[d2t])
        wide = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        wide[..., d2t] = logits
        return wide

    @torch.no_grad()
    def head_logits(self, input_ids: Tensor, heads: int | None = None) -> Tensor:
        """Return logits (B, T, n, V) of tokens (B, T); entry k-1 predicts the k-th token behind each position.

        They are NaN where a sequential head lacks the tokens between.
        """
        B, T = input_ids.shape
        n = heads or self.settings.heads
        cache = Cache(self, B, T)
        index_BT = torch.arange(T, device=input_ids.device).expand(B, T)
        rows = Rows(self, index_BT, torch.zeros(B, dtype=torch.long, device=input_ids.device), T - 1)
        latents = {0: self.trunk(input_ids, rows, cache)}
        logits = []
        for k in range(1, n + 1):
            for step in self.path(k):
                if step not in latents:
                    ahead = F.pad(input_ids[:, step - 1 :], (0, min(step - 1, T)))
                    latents[step] = self.head(step, latents[self.parents[step]], rows, cache, ahead)
            found = self.unembed(latents[k], k)
            if self.settings.head_kind == "sequential" and k > 1:
                found[:, max(0, T - k + 1) :] = torch.nan
            logits.append(found)
        return torch.stack(logits, dim=2)
