"""Model directories that decode with all heads in transformers alone: ours, and beside it code from `hf_code/`."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from headstart.storage.assembly import refuse_other_blocks
from headstart.storage.config_file import CONFIG_FILE, read_json
from headstart.storage.model_directory import save_model

MODELING_FILE = "modeling_headstart.py"
GENERATE_FILE = "custom_generate/generate.py"
CLASS = "HeadstartForCausalLM"


def save_hf_code(model: Transformer, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes `model` as `save_model` does, and beside it what transformers needs to decode with its heads.

    `config.json` names the code in `auto_map`: transformers runs it only where it is told `trust_remote_code=True`,
    and loads an ordinary Llama (trunk and head 1) where it is not. Headstart reads the directory as any of its own.

    Raises:
        UsageError: a model whose head 1 is no plain Llama decoder; as `save_model`.
    """
    if not model.config.plain_decoder:
        raise UsageError(
            "linear heads wired anticausally: head 1 is no plain Llama decoder, which hf-code builds on; take headstart"
        )
    refuse_other_blocks(model.config, "hf-code")
    save_model(model, directory, tokenizer)
    config = read_json(directory / CONFIG_FILE)
    config["auto_map"] = {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{CLASS}"}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in (MODELING_FILE, GENERATE_FILE):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(template(file), encoding="utf-8")


def template(file: str) -> str:
    """The text of a file that `save_hf_code` writes."""
    return files("headstart.storage").joinpath("hf_code", file).read_text(encoding="utf-8")


def written_code(directory: Path, file: str) -> ModuleType:
    """The module that lies in `directory`, imported from there and without transformers' cache of modules."""
    name = f"headstart_hf_code_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, directory / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
