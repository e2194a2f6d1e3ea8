"""Draft heads without their base: a directory with the heads' tensors, their configuration, and the base's identity.

    heads.json                    configuration of the base with the heads; name, family and SHA-256 of the base
    heads/heads.safetensors       the heads, under the names of a model directory
    heads/identity.safetensors    digests and samples of the base's tensors (`identity.py`)

`StoredHeads.attach` puts the heads on their base, or on a rounded or quantized copy of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.console import say
from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json, replacing_directory
from headstart.formats.assembly import assemble_in_place, parameters_by_part, stored_tensors
from headstart.formats.config_json import CONFIG_FILE, FORMAT
from headstart.formats.families import differences, family_of
from headstart.formats.format import Check, Format, compare_all_heads
from headstart.formats.identity import Copy, Identity
from headstart.formats.safetensors_files import TensorFiles
from headstart.formats.tensor_names import HEADS_FILE, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.settings_loader import load_settings

HEADS_CONFIG = "heads.json"
IDENTITY_FILE = "heads/identity.safetensors"
AGAIN = "copy the heads again"
MAY_DIFFER = ("tie_word_embeddings",)
"""Fields in which a copy of the base may differ: some GGUF files hold a tied matrix twice, quantized differently."""


class DetachedHeads(ABC):
    """Heads in a directory without their model, in one of several layouts; tensors are read when they are attached."""

    directory: Path

    @classmethod
    @abstractmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether a directory holds heads in this layout."""

    @classmethod
    @abstractmethod
    def read(cls, directory: Path) -> DetachedHeads:
        """Return the heads in a directory. Raises UsageError if they are damaged, or none that headstart computes."""

    @abstractmethod
    def config_on(self, base: ModelConfig, named: Path) -> ModelConfig:
        """Return the configuration of the base `named` with the heads.

        Raises UsageError for a model of other sizes, or with heads of its own.
        """

    @abstractmethod
    def attach(self, base: Transformer, named: Path) -> Transformer:
        """Return a model with the parameters of `base` and the heads, in the dtype of `base`.

        Raises UsageError for another model, and for damaged files.
        """

    def compare_base(self, model: Transformer, named: Path, *, all_values: bool = False) -> Copy | None:
        """Return the kind of copy that trunk and head 1 of a model are of the base; None: the layout does not say.

        Args:
            model: has the sizes of the base.
            named: its path, for errors.
            all_values: whether to compare all values if the samples are equal.

        Raises:
            UsageError: the model has other weights.
        """
        return None

    def check_base(self, base: ModelConfig, named: Path) -> None:
        """Raise UsageError unless a model has one head, which is a plain decoder."""
        if base.heads > 1:
            raise UsageError(
                f"{named}: has {base.heads} heads already, and {self.directory} holds others; leave those out, or take "
                "a model with one head"
            )
        if not base.kind.plain_decoder:
            raise UsageError(f"{named}: head 1 is no plain decoder, and {self.directory} needs one; take another model")


@dataclass(frozen=True)
class StoredHeads(DetachedHeads):
    """Heads in our own layout, which knows their base."""

    directory: Path
    model: ModelConfig
    """Configuration of the base with the heads."""
    base: str | None
    """Name of the base, if it is known: OWNER/NAME on the hub, or the name of a directory or a file."""
    identity: Identity
    """Identity of the base."""

    @classmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether there is a heads.json."""
        return (directory / HEADS_CONFIG).is_file()

    @classmethod
    def read(cls, directory: Path) -> StoredHeads:
        """Return the heads in `directory`. Raises UsageError if there are none, or damaged or newer ones."""
        file = directory / HEADS_CONFIG
        if not file.is_file():
            raise UsageError(f"{directory}: {_why_no_heads(directory)}")
        content = read_json(file)
        base, form = content.get("base"), content.get("format")
        if not isinstance(base, dict) or not isinstance(base.get("name"), str | None) or type(form) is not int:
            raise UsageError(f'{file}: must be {{"format": 1, "base": {{...}}, "model": {{...}}}}; {AGAIN}')
        if form != FORMAT:
            raise UsageError(f"{file}: has format {form}, this version reads {FORMAT}; update headstart")
        model = load_settings(ModelConfig, content.get("model"), file, "model.", f"update headstart, or {AGAIN}")
        _check_separable(model, str(file))
        identity = Identity.read(directory / IDENTITY_FILE)
        if identity.sha256 != base.get("sha256"):
            raise UsageError(f"{directory / IDENTITY_FILE}: is not the base's that {HEADS_CONFIG} names; {AGAIN}")
        return cls(directory, model, base.get("name"), identity)

    def config_on(self, base: ModelConfig, named: Path) -> ModelConfig:
        """Return the configuration that the file has, for a base of its sizes."""
        self.check_base(base, named)
        found = {name: pair for name, pair in differences(base, self.model).items() if name not in MAY_DIFFER}
        families = family_of(base).model_type, family_of(self.model).model_type
        if found and families[0] != families[1]:
            found = {"model_type": families, **found}
        if found:
            pairs = [f"{name} {json.dumps(pair[0])}, not {json.dumps(pair[1])}" for name, pair in found.items()]
            raise UsageError(f"{self.directory}: its heads are not for {named}, with {_some(pairs)}; {self._advice}")
        return replace(self.model, tied=base.tied, context=base.context)

    def attach(self, base: Transformer, named: Path) -> Transformer:
        """Return the model; a line reports a base that is a rounded or quantized copy."""
        config = self.config_on(base.config, named)
        copy = self.compare_base(base, named)
        if copy != "same":
            say(f"{named}: is {copy} differently from the model of {self.directory}; drafts may be right less often")
        file, stored = self.directory / HEADS_FILE, self.open_tensors()

        def fill(part: Part, target: Tensor) -> None:
            stored.read_into(part.name, target)

        weight = base.trunk.embedding.weight
        try:
            return assemble_in_place(config, fill, weight.dtype, weight.device, parameters_by_part(base))
        except UsageError as error:
            raise error if str(error).startswith(str(file)) else UsageError(f"{file}: {error}") from error

    def open_tensors(self) -> TensorFiles:
        """Return the tensors of the heads. Raises UsageError for files that are missing or damaged."""
        parts = [part for pieces in stored_parts(self.model).values() for part in pieces if part.file == HEADS_FILE]
        file = self.directory / HEADS_FILE
        stored = TensorFiles([file])
        stored.check(parts, file, config=HEADS_CONFIG)
        return stored

    def compare_base(self, model: Transformer, named: Path, *, all_values: bool = False) -> Copy:
        """Compare the samples of the base, or all values."""
        copy, others = self.identity.compare_samples(model)
        if copy == "same" and all_values:
            others = self.identity.changed(model)
        if copy is None or (copy == "same" and others):
            raise UsageError(
                f"{self.directory}: its heads are not for {named}: {len(others)} of {len(self.identity.digests)} "
                f"tensors have other values ({_some(others)}), and it is no quantized copy; {self._advice}"
            )
        return copy

    @property
    def _advice(self) -> str:
        return "take the model that they were trained on" + ("" if self.base is None else f", {self.base}")


def save_heads(
    model: Transformer, directory: str | Path, base: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write heads 2..n of `model` and the identity of the rest, its base.

    The directory is written under a temporary name and renamed. One that exists is replaced as a whole, and must hold
    heads already.

    Args:
        model: on any device, with whole parameters.
        directory: where the heads go.
        base: name of the base (None: unknown).
        dtype: the dtype of the stored heads (None: their own).

    Raises:
        UsageError: the model has one head or no plain decoder; `directory` holds something else or cannot be written.
    """
    directory = Path(directory).resolve()
    _check_separable(model.config, "this model")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a new directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / HEADS_CONFIG).is_file():
        raise UsageError(f"{directory}: holds files but no heads, and saving would replace them; name a new directory")
    tensors = stored_tensors(model, dtype).get(HEADS_FILE, {})
    identity, family = Identity.of(model), family_of(model.config).model_type
    content = {
        "format": FORMAT,
        "base": {"name": base, "family": family, "sha256": identity.sha256},
        "model": model.config.to_dict(),
    }
    with replacing_directory(directory) as temporary:
        (temporary / HEADS_FILE).parent.mkdir()
        (temporary / HEADS_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / HEADS_FILE, {"format": "pt"})
        identity.save(temporary / IDENTITY_FILE)


def with_base_name(file: Path, base: str) -> str:
    """Return the text of a heads.json with another name of the base."""
    content = read_json(file)
    return json.dumps(content | {"base": content["base"] | {"name": base}}, indent=2) + "\n"


def next_token_model(model: Transformer) -> Transformer:
    """Return trunk and head 1 of `model`, with its parameters, as a model with one head."""

    def fill(part: Part, target: Tensor) -> None:
        raise AssertionError(f"{part.name} is no part of head 1")

    weight, shared = model.trunk.embedding.weight, parameters_by_part(model)
    return assemble_in_place(model.config.next_token_decoder, fill, weight.dtype, weight.device, shared)


def _check_separable(config: ModelConfig, what: str) -> None:
    """Raise UsageError for a model whose heads cannot be taken from it."""
    if config.heads == 1:
        raise UsageError(f"{what}: has one head, so there are no others; take a model with heads")
    if not config.kind.plain_decoder:
        raise UsageError(
            f"{what}: head 1 is no plain decoder (linear heads wired anticausally) and needs the others; take a model "
            "directory"
        )


def _why_no_heads(directory: Path) -> str:
    if not directory.exists():
        return "no such directory; name one that holds heads, or OWNER/NAME on the hub"
    if (directory / CONFIG_FILE).is_file():
        return f"is a model, not heads alone; take its heads from it with headstart convert {directory} OUT --to heads"
    return f"holds no {HEADS_CONFIG}, so no heads; name a directory that headstart adapt or convert wrote"


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


class DraftHeads(Format):
    """Heads without their base, which no reader takes for a model."""

    whole = False

    def detect(self, path: Path) -> bool:
        """Return whether the directory holds heads alone."""
        return StoredHeads.detect(path)

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write the heads, and the identity of the rest."""
        save_heads(model, path)
        return ["trunk and head 1: they are the model that the heads are attached to"]

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare the logits of all heads, attached to trunk and head 1."""
        return [compare_all_heads(model, StoredHeads.read(path).attach(next_token_model(model), path))]

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Raise UsageError."""
        self._refuse(path)

    def read_config(self, path: Path) -> ModelConfig:
        """Raise UsageError."""
        self._refuse(path)

    def read_dtype(self, path: Path) -> torch.dtype:
        """Raise UsageError."""
        self._refuse(path)

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """Raise UsageError."""
        self._refuse(path)

    def _refuse(self, path: Path) -> NoReturn:
        base = StoredHeads.read(path).base if StoredHeads.detect(path) else None
        raise UsageError(
            f"{path}: holds heads without their model; name the model{'' if base is None else f' ({base})'} and give "
            f"--heads-from {path}"
        )
