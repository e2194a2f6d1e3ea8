"""The file formats of models: one class each, in the registry `FORMATS`; `load_model` and its siblings read them all.

A new format is a class in a file of its own and a line in `FORMATS`; a layout of heads without their model is a line in
`HEADS`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from headstart.data.tokenizers import Tokenizer, load_tokenizer
from headstart.errors import UsageError
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.eagle3 import Eagle3, EagleHeads
from headstart.formats.eagle3_gguf import Eagle3Gguf
from headstart.formats.format import Format
from headstart.formats.gguf import Gguf
from headstart.formats.heads import DetachedHeads, DraftHeads, StoredHeads
from headstart.formats.hf_code_export import HfCode
from headstart.formats.hub import HEADS_FILES, SUFFIX, local_path
from headstart.formats.huggingface import TOKENIZER_FILE, HuggingFace
from headstart.formats.medusa import Medusa, PublishedMedusa
from headstart.formats.meta import MetaRelease
from headstart.formats.mimo import Mimo
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

FORMATS: dict[str, Format] = {
    "headstart": HuggingFace(),
    "hf-code": HfCode(),
    "meta": MetaRelease(),
    "medusa": Medusa(),
    "mimo": Mimo(),
    "eagle3": Eagle3(),
    "speculators": Eagle3(speculators=True),
    "gguf": Gguf(),
    "eagle3-gguf": Eagle3Gguf(),
    "heads": DraftHeads(),
}
HEADS: tuple[type[DetachedHeads], ...] = (StoredHeads, EagleHeads, PublishedMedusa)
"""The layouts of heads without their model, which --heads-from takes."""


def format_named(name: str) -> Format:
    """Return the format that `headstart convert --to` names. Raises UsageError for an unknown one."""
    if name not in FORMATS:
        raise UsageError(f"--to {name}: there is no such format; take one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_at(path: Path) -> Format:
    """Return the format that reads the model at `path`: Hugging Face's, unless another detects it as its own.

    A name that ends in .gguf is a GGUF file, whatever it holds: its reader reports what is wrong.
    """
    if path.suffix == SUFFIX and not path.is_dir():
        return FORMATS["gguf"]
    readers = (form for form in FORMATS.values() if form.readable)
    found = next((form for form in readers if form.detect(path)), None)
    if found is None:
        found = FORMATS["heads" if any(layout.detect(path) for layout in HEADS) else "headstart"]
    return found


def read_heads(named: str | Path) -> DetachedHeads:
    """Return the heads in a directory, or of the name OWNER/NAME on the hub, in any layout of `HEADS`.

    Raises UsageError if there are none, or damaged ones.
    """
    directory = local_path(named, HEADS_FILES)
    return next((layout for layout in HEADS if layout.detect(directory)), StoredHeads).read(directory)


def load_model(
    named: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    heads: str | Path | None = None,
    blocks: bool = False,
) -> Transformer:
    """Return the model at a path, in any format that can be read, or of the name OWNER/NAME on the hub.

    Args:
        named: a directory or a GGUF file that exists, or a name on the hub.
        dtype: of all parameters (None: that in which the embedding is stored).
        device: where the parameters are made.
        heads: a directory of heads for this model, or its name on the hub (`heads.py`).
        blocks: whether matrices that are stored in blocks stay so, for `pack` alone.

    Raises:
        UsageError: no model, one that headstart does not compute, files that are missing, damaged, or at odds with one
            another, or heads of another model.
    """
    path = local_path(named)
    form = format_at(path)
    if heads is None:
        stays = form.read_blocks(path) if blocks else None
        return form.read(path, dtype, device) if stays is None else stays
    stored = read_heads(heads)
    stored.config_on(form.read_config(path), path)  # sizes are compared before tensors are read
    # The stored values are compared, not those of another dtype.
    model = stored.attach(form.read(path, None, device), path)
    if blocks:
        return form.read_blocks(path, model) or model
    return model if dtype is None else model.to(dtype)


def load_model_and_tokenizer(
    named: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    heads: str | Path | None = None,
    blocks: bool = False,
) -> tuple[Transformer, Tokenizer | None]:
    """Return what `load_model` and `load_model_tokenizer` return; what both read is read once."""
    path = local_path(named)
    with format_at(path).opened(path):
        return load_model(path, dtype, device, heads, blocks), load_model_tokenizer(path)


def load_config(named: str | Path, heads: str | Path | None = None) -> ModelConfig:
    """Return the configuration of a model that `load_model` loads. Raises UsageError like it."""
    path = local_path(named)
    config = format_at(path).read_config(path)
    return config if heads is None else read_heads(heads).config_on(config, path)


def load_dtype(named: str | Path) -> torch.dtype:
    """Return the dtype of the stored embedding, which `load_model` gives to all parameters by default."""
    path = local_path(named)
    return format_at(path).read_dtype(path)


def load_model_tokenizer(named: str | Path) -> Tokenizer | None:
    """Return the tokenizer of a model that `load_model` loads, or None if it has none; see `read_tokenizer`.

    Raises UsageError if it cannot be read, or has more tokens than the model.
    """
    path = local_path(named)
    return format_at(path).read_tokenizer(path)


def load_data_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer that documents are encoded with: what `load_tokenizer` finds.

    The tokenizer of a model has the start token that its model knows, so that documents begin as the model
    has seen them begin. Raises UsageError for anything else.
    """
    path = Path(source)
    if Gguf().detect(path) or path.suffix == SUFFIX:
        tokenizer = load_model_tokenizer(path)
        if tokenizer is None:
            raise UsageError(f"{path}: has no tokenizer; name a tokenizer.json, or a model that has one")
        return tokenizer
    if (path / CONFIG_FILE).is_file() and (path / TOKENIZER_FILE).is_file():
        with contextlib.suppress(UsageError):  # a model that headstart does not know still has a tokenizer
            return load_model_tokenizer(path) or load_tokenizer(source)
    return load_tokenizer(source)
