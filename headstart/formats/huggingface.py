"""Model directories: an ordinary Hugging Face model, with its further heads in files of their own."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from headstart.data.tokenizers import PretrainedTokenizer, Tokenizer, load_tokenizer
from headstart.errors import UsageError, needs_extra
from headstart.fileio import read_json, replacing_directory
from headstart.formats.assembly import assemble_in_place, stored_tensors
from headstart.formats.config_json import CONFIG_FILE, config_json, read_config
from headstart.formats.families import family_of
from headstart.formats.format import Format
from headstart.formats.generation_config import GENERATION_FILE, named_ends
from headstart.formats.safetensors_files import TensorFiles, model_files
from headstart.formats.tensor_names import EMBEDDING, HEADS_FILE, MODEL_FILE, UNEMBEDDING, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TOKENIZER_FILE = "tokenizer.json"


def save_model(
    model: Transformer, directory: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write `model` as a Hugging Face model directory; heads that head 1 does not need go to `heads/`.

    transformers, vLLM and llama.cpp load trunk and head 1 from it, as a model of its family. A model whose head 1 is no
    plain decoder (linear heads wired anticausally) is marked as our own architecture, and only headstart reads it.
    Parameters must be whole (unsharded).

    The directory is written under a temporary name and renamed, so that a kill leaves the previous one. A directory
    that exists is replaced as a whole, with all files in it, and must hold a model already. The tokenizer's `end_id`
    becomes the end and padding token, and the start token if it has no `start_ids`; None: a model of bare ids. Weights
    are stored as `dtype` (None: what they are).

    Raises UsageError if `directory` is something other than a model or cannot be written, the tokenizer has more ids
    than the model, or no family's directory can hold such a model and each of its tensors.
    """
    config = model.config
    # Resolved, so that "." has a name, and a link stays a link.
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a new directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG_FILE).is_file():
        raise UsageError(f"{directory}: holds files but no model, and saving would replace them; name a new directory")
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, "save the model")
    family_of(config)
    files = stored_tensors(model, dtype)
    name = str(files[MODEL_FILE][EMBEDDING].dtype).removeprefix("torch.")
    end_id = None if tokenizer is None else tokenizer.end_id
    start_id = end_id if tokenizer is None or not tokenizer.start_ids else tokenizer.start_ids[0]
    further = [] if tokenizer is None else sorted(tokenizer.end_ids - {tokenizer.end_id})
    ids = {"bos_token_id": start_id, "eos_token_id": [end_id, *further] if further else end_id, "pad_token_id": end_id}
    with replacing_directory(directory) as temporary:
        content = config_json(config, name, end_id) | {"bos_token_id": start_id}
        if tokenizer is not None and tokenizer.start_ids:
            content["headstart"]["start_ids"] = list(tokenizer.start_ids)
        _write_json(temporary / CONFIG_FILE, content)
        _write_json(temporary / GENERATION_FILE, {} if end_id is None else ids)
        for file, tensors in files.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            try:
                save_file(tensors, temporary / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise _system_error(error, directory / file) from error
        if tokenizer is not None:
            tokenizer.save(temporary)


def read_model(directory: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
    """Return the model in `directory`: one that `save_model` wrote, or an ordinary one of a family in `families.py`.

    The last layer of an ordinary model becomes head 1 of a model with one head. Parameters have `dtype` (None: that in
    which the embedding is stored). Raises UsageError for no model, another architecture, or files that are missing,
    damaged, or at odds with config.json.
    """
    config = read_config(directory)
    parts: dict[str, list[Part]] = {MODEL_FILE: []}
    for pieces in stored_parts(config).values():
        for part in pieces:
            parts.setdefault(part.file, []).append(part)

    model_tensors = TensorFiles(model_files(directory, MODEL_FILE))
    # Old Llama files hold rotary tables, which can be computed; a tied unembedding may be stored needlessly.
    ignored = [name for name in model_tensors.names() if re.fullmatch(r"model\.layers\.\d+\..*inv_freq", name)]
    model_tensors.check(parts[MODEL_FILE], directory / MODEL_FILE, [*ignored, *([UNEMBEDDING] if config.tied else [])])
    stored = {MODEL_FILE: model_tensors}
    if HEADS_FILE in parts:
        if not (directory / HEADS_FILE).is_file():
            raise UsageError(
                f"{directory / HEADS_FILE}: is missing, though {CONFIG_FILE} speaks of {config.heads} heads; copy it "
                'from where the model was saved, or remove the key "headstart" to load head 1 alone'
            )
        stored[HEADS_FILE] = TensorFiles([directory / HEADS_FILE])
        stored[HEADS_FILE].check(parts[HEADS_FILE], directory / HEADS_FILE)
    _check_tied(model_tensors, config.tied)

    dtype = model_tensors.dtype(EMBEDDING) if dtype is None else dtype

    def fill(part: Part, target: Tensor) -> None:
        stored[part.file].read_into(part.name, target)

    try:
        return assemble_in_place(config, fill, dtype, device)
    except UsageError as error:
        raise error if str(error).startswith(str(directory)) else UsageError(f"{directory}: {error}") from error


def read_tokenizer(
    directory: Path, vocab_size: int, more: Mapping[str, Any] = MappingProxyType({})
) -> Tokenizer | None:
    """Return the tokenizer saved in a directory whose model has `vocab_size` rows, or None if there is none.

    Its `start_ids` are the tokens that it puts before a text, if the model was trained with them: a model of ours that
    was not names its end token as bos_token_id. Added tokens for which the model has no row are left out (Gemma 3 has
    one). Its `end_ids` are its own end token and all that the directory names (`named_ends`). The fields of `more`
    replace those of config.json.

    Raises UsageError if it cannot be read, or has more tokens than the model.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, vocab_size, f"load {directory}")
    tokenizer.end_ids |= named_ends(directory, vocab_size)
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.fit(vocab_size)
        file = directory / CONFIG_FILE
        tokenizer.start_ids = known_start(tokenizer, {**(read_json(file) if file.is_file() else {}), **more})
    return tokenizer


def known_start(tokenizer: PretrainedTokenizer, content: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before a text, if the model of this config.json was trained with them.

    For other models the tokenizer decides, as in transformers. Ours have `start_ids`, or name the first as
    bos_token_id.
    """
    start, own = tokenizer.own_start(), content.get("headstart")
    if own is None or (isinstance(own, dict) and own.get("start_ids")):
        return start
    return start if start[:1] == (content.get("bos_token_id"),) and start[0] != tokenizer.end_id else ()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, action: str) -> None:
    """Raise UsageError if a tokenizer needs more rows than a model has; `action` begins the advice."""
    if tokenizer.vocab_size <= vocab_size:  # as a rule; to count the rows that 260,000 tokens need takes 0.3 s
        return
    needed = tokenizer.needed_rows if isinstance(tokenizer, PretrainedTokenizer) else tokenizer.vocab_size
    if needed > vocab_size:
        raise UsageError(
            f"tokenizer {tokenizer.name} has {needed} ids, the model's vocabulary {vocab_size}; "
            f"{action} with the tokenizer it was trained with"
        )


def _check_tied(tensors: TensorFiles, tied: bool) -> None:
    if tied and UNEMBEDDING in tensors.names():
        same = tensors.shape(UNEMBEDDING) == tensors.shape(EMBEDDING)
        if not same or not torch.equal(tensors.read(UNEMBEDDING), tensors.read(EMBEDDING)):
            raise UsageError(
                f"{tensors.path(UNEMBEDDING)}: {UNEMBEDDING} differs from the embedding, though config.json ties them; "
                "set tie_word_embeddings to false"
            )


def _system_error(error: SafetensorError, path: Path) -> OSError:
    """Return the system's error, which safetensors reports as text."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error), str(path))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_peer(directory: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Return the model that transformers loads from a directory. Raises UsageError if it is not installed."""
    with needs_extra("the comparison", "hf", "leave it out"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.to(device).eval()


def is_our_directory(path: Path) -> bool:
    """Return whether the config.json of a directory has the key "headstart"; one that cannot be read has not."""
    try:
        return "headstart" in read_json(path / CONFIG_FILE)
    except UsageError:
        return False


class DirectoryFormat(Format):
    """A format whose results hold an ordinary model: in `folder`, or where that is empty, at the top."""

    def read_dtype(self, path: Path) -> torch.dtype:
        """Return the dtype of the embedding."""
        return TensorFiles(model_files(path / self.folder, MODEL_FILE)).dtype(EMBEDDING)

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """Return the tokenizer.json of the model, if there is one."""
        return read_tokenizer(path / self.folder, self.read_config(path).vocab_size)


class HuggingFace(DirectoryFormat):
    """A Hugging Face model directory, which may hold further heads."""

    def detect(self, path: Path) -> bool:
        """Return whether the directory is one of ours; `read` takes ordinary ones too."""
        return is_our_directory(path)

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write everything."""
        save_model(model, path, tokenizer)
        return []

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model with all its heads."""
        return read_model(path, dtype, device)

    def read_config(self, path: Path) -> ModelConfig:
        """Return what config.json says."""
        return read_config(path)
