"""Medusa heads in the layouts of vLLM and TGI: a folder with the ordinary model, and one of heads for each engine.

    base/    trunk and head 1, an ordinary model directory
    vllm/    config.json (model_type medusa), model.safetensors: blocks.{i}.layers.0.{weight,bias}, lm_heads.{i}.weight,
             token_map: the draft vocabulary, if there is one, whose rows alone lm_heads.0.weight then has
    tgi/     config.json, medusa_lm_head.safetensors: {i}.0.linear.{weight,bias}, {i}.1.weight

Their head i is our head i + 2: x + SiLU(W x + b) with x behind the final norm, then an unembedding, the model's or the
head's own. The authors' code (FasterDecoding) reads TGI's names too, if heads have unembeddings of their own. TGI knows
no draft vocabulary: its heads propose any token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import assemble, stored_tensors
from headstart.formats.config_fields import Fields
from headstart.formats.config_json import CONFIG_FILE, read_config
from headstart.formats.format import Check, compare_all_heads
from headstart.formats.huggingface import DirectoryFormat, read_model, save_model
from headstart.formats.published_heads import AGAIN, PublishedHeads, head_parts, is_copy, read_tensors
from headstart.formats.tensor_names import EMBEDDING, HEADS_FILE, MODEL_FILE, UNEMBEDDING
from headstart.model.bounds import MOST_HEADS
from headstart.model.config import ModelConfig
from headstart.model.draft_vocabulary import check_draft_tokens
from headstart.model.heads import MedusaHeads
from headstart.model.transformer import Transformer

BASE, VLLM, TGI = "base", "vllm", "tgi"
TGI_FILE = "medusa_lm_head.safetensors"
TOKEN_MAP = "token_map"
"""vLLM's name of the map from draft ids to token ids."""


def save_medusa(model: Transformer, directory: Path, tokenizer: Tokenizer | None = None) -> list[str]:
    """Write `model` into the existing folder `directory`, and return lines about what its user must know.

    Raises UsageError for heads of another kind.
    """
    config = model.config
    if config.heads == 1 or not isinstance(config.kind, MedusaHeads):
        kind = "one head" if config.heads == 1 else f"{config.head_kind} heads"
        raise UsageError(
            f"this model has {kind}; Medusa's layouts hold medusa heads alone (model.head_kind: medusa), and "
            "headstart and hf-code all kinds"
        )
    if config.drafting_heads < config.heads:
        raise UsageError(
            f"this model's heads predict {list(config.offset_of_heads)} ahead; Medusa's layouts know no gaps, "
            "take headstart"
        )
    if config.draft_vocab is not None and not config.shared:
        raise UsageError(
            f"this model's heads have a draft vocabulary of {config.draft_vocab:,} tokens and their own unembeddings, "
            "and vLLM reads a draft vocabulary only with the model's unembedding (shared: true); take headstart"
        )
    files = stored_tensors(model, None)
    plain = replace(config, heads=1, shared=True, draft_vocab=None)
    base = assemble(plain, lambda part: files[part.file][part.name], files[MODEL_FILE][EMBEDDING].dtype)
    save_model(base, directory / BASE, tokenizer)
    unembedding = files[MODEL_FILE][EMBEDDING if config.tied else UNEMBEDDING]
    maps = {part: [files[HEADS_FILE][f"heads.{k}.residual.{part}"] for k in _further(config)] for part in _PARTS}
    own = [] if config.shared else [files[HEADS_FILE][f"heads.{k}.lm_head.weight"] for k in _further(config)]

    vllm = {f"blocks.{i}.layers.0.{part}": tensor for part in _PARTS for i, tensor in enumerate(maps[part])}
    vllm |= {f"lm_heads.{i}.weight": tensor for i, tensor in enumerate(own or [unembedding])}
    if config.draft_vocab is not None:
        vllm[TOKEN_MAP] = files[HEADS_FILE]["d2t"]
        vllm["lm_heads.0.weight"] = unembedding[vllm[TOKEN_MAP]]
    tgi = {f"{i}.0.linear.{part}": tensor for part in _PARTS for i, tensor in enumerate(maps[part])}
    tgi |= {f"{i}.1.weight": tensor for i, tensor in enumerate(own)}
    _write(directory / VLLM, "model.safetensors", vllm, _vllm_config(config, str(unembedding.dtype)[6:]))
    # TGI takes a directory whose config names an architecture for an ordinary model.
    own_config = {"medusa_num_heads": config.heads - 1, "medusa_num_layers": 1, "base_model_name_or_path": f"../{BASE}"}
    _write(directory / TGI, TGI_FILE, tgi, own_config)
    left = [f'{TGI}/{CONFIG_FILE}: write the full path or hub id of {BASE}/ for "../{BASE}" before TGI reads it']
    if config.draft_vocab is not None:
        left.append(f"{VLLM}/: vLLM 0.32.0 refuses to load {TOKEN_MAP}, its draft vocabulary; train heads without one")
        left.append(f"draft vocabulary: not in {TGI}/, whose heads propose any token; the text is the same")
    return left


@dataclass(frozen=True)
class PublishedMedusa(PublishedHeads):
    """Medusa heads of one layer as vLLM, TGI and the authors' code read them."""

    count: int
    """Heads, without the model's own."""
    settings: Fields
    """The content of config.json."""
    draft_vocab: int | None = None
    place: str = VLLM
    """Whose names the tensors have."""

    @classmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether there is a file of the authors' name, or vLLM's model_type."""
        if not (directory / CONFIG_FILE).is_file():
            return False
        files = any((directory / name).is_file() for name in WEIGHTS[TGI])
        return files or read_json(directory / CONFIG_FILE).get("model_type") == "medusa"

    @classmethod
    def read(cls, directory: Path) -> PublishedMedusa:
        """Return the heads in a directory; a pickle is read with weights_only."""
        file = directory / CONFIG_FILE
        settings = Fields(file, read_json(file), AGAIN)
        place = TGI if any((directory / name).is_file() for name in WEIGHTS[TGI]) else VLLM
        if settings.content.get("model_type") == "medusa":
            place = VLLM
        count = settings.content.get("num_heads" if place == VLLM else "medusa_num_heads")
        if type(count) is not int or not 1 <= count < MOST_HEADS or settings.content.get(_LAYERS[place]) != 1:
            raise UsageError(f"{file}: must speak of Medusa heads of one layer; {AGAIN}")
        drafted = settings.content.get("truncated_vocab_size")
        if drafted is not None and (type(drafted) is not int or drafted < 1):
            raise UsageError(f"{file}: truncated_vocab_size must be a number of the vocabulary's tokens; {AGAIN}")
        return cls(directory, read_tensors(directory, WEIGHTS[place]), count, settings, drafted, place)

    @property
    def shared(self) -> bool:
        """True if the heads have the model's unembedding."""
        if self.place == TGI:
            return _unembedding(TGI, 0) not in self.tensors
        return bool(self.settings.content.get("original_lm_head"))

    def config_on(self, base: ModelConfig, named: Path) -> ModelConfig:
        """Return the configuration of a base of the same sizes with the heads."""
        self.check_base(base, named)
        pairs = {"hidden_size": base.dim, "vocab_size": base.vocab_size}
        for name, ours in pairs.items():
            theirs = self.settings.content.get(name)
            if theirs not in (None, ours):
                raise UsageError(
                    f"{self.directory}: its heads have {name} {theirs}, not {ours} as {named}; take the model that "
                    "they were trained on"
                )
        drafted = None if self.draft_vocab == base.vocab_size else self.draft_vocab
        if drafted is not None:
            if drafted > base.vocab_size:
                raise UsageError(
                    f"{self.settings.file}: truncated_vocab_size must be a number of the vocabulary's tokens; {AGAIN}"
                )
            self._draft_tokens(base.vocab_size)
        config = replace(
            base, heads=self.count + 1, head_kind="medusa", wiring="parallel", layers=base.next_token_layers,
            shared=self.shared, draft_vocab=drafted,
        )  # fmt: skip
        known = {self._name(part.name) for part in head_parts(config)}
        self.refuse_others(known | {TOKEN_MAP, _unembedding(VLLM, 0)})
        return config

    def attach(self, base: Transformer, named: Path) -> Transformer:
        """Return the model, whose unembedding must be that of vLLM's heads if they share it."""
        config = self.config_on(base.config, named)
        if self.place == VLLM and config.shared:
            name, stated = _unembedding(VLLM, 0), base.unembedding.weight(1)
            if config.draft_vocab is not None:
                stated = stated[self._draft_tokens(config.vocab_size)]
            if not is_copy(self.stored(name), stated):
                raise UsageError(
                    f"{self.directory}: {name}, the unembedding of its heads, is not that of {named}; take the model "
                    "that they were trained on"
                )
        return super().attach(base, named)

    def tensor(self, name: str, base: Transformer) -> Tensor:
        """Return the tensor; heads without biases add none."""
        if name == "d2t":
            return self._draft_tokens(base.config.vocab_size)
        stored = self._name(name)
        if name.endswith(".bias") and not self.settings.content.get("medusa_fc_bias", True):
            return torch.zeros(base.config.dim)
        return self.stored(stored)

    def _name(self, name: str) -> str:
        """Return the layout's name of a tensor of our heads file."""
        if name == "d2t":
            return TOKEN_MAP
        _, k, kind, which = name.split(".")
        return _unembedding(self.place, int(k) - 2) if kind == "lm_head" else _map(self.place, int(k) - 2, which)

    def _draft_tokens(self, vocab_size: int) -> Tensor:
        """Return the token ids of the draft vocabulary. Raises UsageError if they are missing or not of the model."""
        if TOKEN_MAP not in self.tensors:
            raise UsageError(f"{self.directory}: lacks {TOKEN_MAP}; {AGAIN}")
        d2t = self.tensors[TOKEN_MAP]
        if d2t.shape != (self.draft_vocab,) or d2t.dtype != torch.int64:
            raise UsageError(
                f"{self.directory}: {TOKEN_MAP} does not list {self.draft_vocab} token ids in order; {AGAIN}"
            )
        check_draft_tokens(d2t, vocab_size, f"{self.directory}: {TOKEN_MAP}")
        return d2t


def load_medusa(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", heads_of: str = VLLM
) -> Transformer:
    """Return a model that `save_medusa` wrote, with the heads of the folder `heads_of`, "vllm" or "tgi".

    Parameters have `dtype` (None: that in which the embedding is stored). Raises UsageError for files that are missing,
    damaged, or at odds with one another.
    """
    directory = Path(directory)
    base = read_model(directory / BASE, dtype, device)
    return _heads(directory, heads_of).attach(base, directory / BASE)


def _heads(directory: Path, heads_of: str) -> PublishedMedusa:
    """Return the heads of a folder; TGI's have the draft vocabulary of vLLM's, so that they are the same heads."""
    vllm = PublishedMedusa.read(directory / VLLM)
    if heads_of == VLLM:
        return vllm
    heads = PublishedMedusa.read(directory / TGI)
    if vllm.draft_vocab is None:
        return heads
    token_map = {TOKEN_MAP: vllm.tensors[TOKEN_MAP]}
    return replace(heads, tensors={**heads.tensors, **token_map}, draft_vocab=vllm.draft_vocab)


_PARTS = ("weight", "bias")
_LAYERS = {VLLM: "num_hidden_layers", TGI: "medusa_num_layers"}
WEIGHTS = {VLLM: (MODEL_FILE, "pytorch_model.bin"), TGI: (TGI_FILE, "medusa_lm_head.pt")}


def _map(place: str, i: int, part: str) -> str:
    return f"blocks.{i}.layers.0.{part}" if place == VLLM else f"{i}.0.linear.{part}"


def _unembedding(place: str, i: int) -> str:
    return f"lm_heads.{i}.weight" if place == VLLM else f"{i}.1.weight"


def _further(config: ModelConfig) -> range:
    return range(2, config.heads + 1)


def _vllm_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.dim,
        "vocab_size": config.vocab_size,
        # vLLM takes any key whose name holds "num" and "heads", or "num" and "layers": there is one of each.
        "num_heads": config.heads - 1,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": config.shared,
        **({} if config.draft_vocab is None else {"truncated_vocab_size": config.draft_vocab}),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _write(folder: Path, file: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Medusa(DirectoryFormat):
    """Medusa heads for engines, and the ordinary model below them."""

    folder = BASE

    def detect(self, path: Path) -> bool:
        """Return whether the folder holds the model and the heads for both engines."""
        return all((path / part / CONFIG_FILE).is_file() for part in (BASE, VLLM, TGI))

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write all heads, for each engine under its names."""
        return save_medusa(model, path, tokenizer)

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare the logits of all heads, as each engine names them."""
        return [
            compare_all_heads(model, load_medusa(path, heads_of=engine), f"headstart, as {engine} names them")
            for engine in (VLLM, TGI)
        ]

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model with the heads that vLLM reads."""
        return load_medusa(path, dtype, device)

    def read_config(self, path: Path) -> ModelConfig:
        """Return the configuration of the ordinary model with its heads."""
        return _heads(path, VLLM).config_on(read_config(path / BASE), path / BASE)
