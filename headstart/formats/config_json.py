"""`config.json` of a model directory: the fields that transformers reads, and the key "headstart"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.families import FAMILIES, Family, decoder_fields, differences, family_of, read_decoder
from headstart.model.config import ModelConfig
from headstart.settings_loader import load_settings

CONFIG_FILE = "config.json"
FORMAT = 1
OWN_TYPE = "headstart"
AGAIN = "update headstart, or copy the model directory again"
NOT_COMPUTED = {
    "gemma2": "it caps scores and logits",
    "gemma3": "it reads pictures too; its text models are gemma3_text",
}
"""Families that users ask for, with the reason why they are not supported."""


def config_json(config: ModelConfig, dtype: str, end_id: int | None) -> dict[str, Any]:
    """Return the content of config.json.

    `dtype` is torch's name without the prefix; `end_id` is None for a model of bare ids. Raises UsageError if no
    family's directory can hold the model.
    """
    content = decoder_fields(config, family_of(config))
    if not config.kind.plain_decoder:
        # A model that is no plain decoder says so, rather than let other tools decode it wrongly.
        content |= {"architectures": ["HeadstartForCausalLM"], "model_type": OWN_TYPE}
    return {
        **content,
        "dtype": dtype,
        "torch_dtype": dtype,
        # Explicit nulls: transformers takes 1 and 2 for missing ones.
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "headstart": {"format": FORMAT, "model": config.to_dict()},
    }


def read_config(directory: Path) -> ModelConfig:
    """Return the configuration of the model in `directory`; an ordinary model of Hugging Face's has one head.

    Raises UsageError if there is no model, or one that headstart does not compute.
    """
    file = _config_path(directory)
    content = read_json(file)
    own = content.get("headstart")
    if own is None:
        return read_decoder(file, content, _named_family(file, content))
    config = _own_config(file, own)
    _check_agreement(file, config, content)
    return config


def _config_path(directory: Path) -> Path:
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory; name a directory that holds a model's {CONFIG_FILE}")
    if not directory.is_dir():
        raise UsageError(
            f"{directory}: is no GGUF file; name one, or the directory that holds the model's {CONFIG_FILE}"
        )
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UsageError(
            f"{directory}: holds no {CONFIG_FILE}, so it is no model; name a model directory, as RUN/model"
        )
    return file


def _named_family(file: Path, content: dict[str, Any]) -> Family:
    """Return the family that `model_type` names. Code in the directory (`auto_map`) is never run."""
    named = content.get("model_type")
    if named == "mistral" and "layer_types" in content:
        named = "ministral"  # transformers' name for a Mistral whose layers differ in their windows
    if isinstance(named, str) and named in FAMILIES:
        return FAMILIES[named]
    why = NOT_COMPUTED.get(str(named), "it would run code of its own" if content.get("auto_map") else "")
    raise UsageError(
        f"{file}: model_type is {json.dumps(named)}, which headstart does not compute{why and f' ({why})'}; "
        f"supported: {', '.join(FAMILIES)}"
    )


def _own_config(file: Path, own: object) -> ModelConfig:
    if not isinstance(own, dict) or not isinstance(own.get("model"), dict) or type(own.get("format")) is not int:
        raise UsageError(
            f'{file}: "headstart" must be {{"format": 1, "model": {{...}}}}; copy the model directory again'
        )
    if own["format"] != FORMAT:
        raise UsageError(
            f'{file}: "headstart" has format {own["format"]}, this version reads {FORMAT}; update headstart'
        )
    return load_settings(ModelConfig, own["model"], file, "headstart.model.", AGAIN)


def _check_agreement(file: Path, config: ModelConfig, content: dict[str, Any]) -> None:
    """Raise UsageError if the fields that other tools read and the key "headstart" describe different models."""
    try:
        family = family_of(config)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    named = content.get("model_type")
    expected = family.model_type if config.kind.plain_decoder else OWN_TYPE
    pairs = {"model_type": (named, expected)} if named != expected else {}
    for name, (said, wanted) in (pairs or differences(read_decoder(file, content, family), config)).items():
        raise UsageError(
            f'{file}: {name} is {json.dumps(said)}, but "headstart" describes a model with {json.dumps(wanted)}; '
            "change both, or remove the key to load head 1 alone"
        )
