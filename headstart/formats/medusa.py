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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import assemble, stored_tensors
from headstart.formats.config_json import CONFIG_FILE, read_config
from headstart.formats.format import Check, compare_all_heads
from headstart.formats.huggingface import DirectoryFormat, save_model
from headstart.formats.safetensors_files import TensorFiles, model_files
from headstart.formats.tensor_names import EMBEDDING, HEADS_FILE, MODEL_FILE, UNEMBEDDING, Part
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
        left.append(f"draft vocabulary: not in {TGI}/, whose heads propose any token; the text is the same")
    return left


def load_medusa(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", heads_of: str = VLLM
) -> Transformer:
    """Return a model that `save_medusa` wrote, with the heads of the folder `heads_of`, "vllm" or "tgi".

    Parameters have `dtype` (None: that in which the embedding is stored). Raises UsageError for files that are missing,
    damaged, or at odds with one another.
    """
    directory = Path(directory)
    config, heads = _read_heads(directory, heads_of)
    file = directory / heads_of / _WEIGHTS[heads_of]
    base, names = TensorFiles(model_files(directory / BASE, MODEL_FILE)), set(heads.names())

    def read(part: Part) -> Tensor:
        if part.file == MODEL_FILE:
            return base.read(part.name)
        if part.name == "d2t":
            return _draft_tokens(config, directory)
        _, k, kind, which = part.name.split(".")
        name = _unembedding(heads_of, int(k) - 2) if kind == "lm_head" else _map(heads_of, int(k) - 2, which)
        if name not in names:
            raise UsageError(f"{file}: lacks {name}; convert the model again")
        return heads.read(name)

    if heads_of == VLLM and config.shared:
        stated = base.read(EMBEDDING if config.tied else UNEMBEDDING)
        if config.draft_vocab is not None:
            stated = stated[_draft_tokens(config, directory)]
        if "lm_heads.0.weight" not in names or not torch.equal(heads.read("lm_heads.0.weight"), stated):
            raise UsageError(f"{file}: its unembedding is not that of {BASE}/; convert the model again")
    return assemble(config, read, base.dtype(EMBEDDING) if dtype is None else dtype, device)


_PARTS = ("weight", "bias")
_LAYERS = {VLLM: "num_hidden_layers", TGI: "medusa_num_layers"}
_WEIGHTS = {VLLM: "model.safetensors", TGI: TGI_FILE}


def _read_heads(directory: Path, heads_of: str) -> tuple[ModelConfig, TensorFiles]:
    """Return the configuration of the model with its heads, and the file of the heads."""
    plain = read_config(directory / BASE)
    settings = read_json(directory / heads_of / CONFIG_FILE)
    file = directory / VLLM / CONFIG_FILE
    drafted = read_json(file).get("truncated_vocab_size")
    if drafted is not None and (type(drafted) is not int or not 1 <= drafted <= plain.vocab_size):
        raise UsageError(f"{file}: truncated_vocab_size must be a number of the vocabulary's tokens; convert again")
    heads = TensorFiles([directory / heads_of / _WEIGHTS[heads_of]])
    count = settings.get("num_heads" if heads_of == VLLM else "medusa_num_heads")
    if type(count) is not int or not 1 <= count < MOST_HEADS or settings.get(_LAYERS[heads_of]) != 1:
        raise UsageError(f"{directory / heads_of}: {CONFIG_FILE} must speak of heads of one layer; convert it again")
    if heads_of == VLLM:
        shared = bool(settings.get("original_lm_head"))
    else:
        shared = _unembedding(TGI, 0) not in heads.names()
    config = replace(plain, heads=count + 1, head_kind="medusa", wiring="parallel", shared=shared, draft_vocab=drafted)
    return config, heads


def _draft_tokens(config: ModelConfig, directory: Path) -> Tensor:
    """Return the token ids of the draft vocabulary. Raises UsageError if they are missing or not of this model."""
    file = directory / VLLM / _WEIGHTS[VLLM]
    heads = TensorFiles([file])
    if TOKEN_MAP not in heads.names():
        raise UsageError(f"{file}: lacks {TOKEN_MAP}; convert the model again")
    d2t = heads.read(TOKEN_MAP)
    if d2t.shape != (config.draft_vocab,) or d2t.dtype != torch.int64:
        raise UsageError(f"{file}: {TOKEN_MAP} does not list {config.draft_vocab} token ids; convert the model again")
    check_draft_tokens(d2t, config.vocab_size, f"{file}: {TOKEN_MAP}")
    return d2t


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
        return _read_heads(path, VLLM)[0]
