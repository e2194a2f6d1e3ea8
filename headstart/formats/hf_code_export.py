"""Model directories that decode with all heads in transformers alone: ours, with the code of `hf_code/`."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import LLAMA, inexpressible
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.families import family_of
from headstart.formats.format import (
    NEW_TOKENS,
    Check,
    Format,
    compare_all_heads,
    compare_greedy_tokens,
    compare_logits,
    random_text,
)
from headstart.formats.huggingface import is_our_directory, read_model, save_model
from headstart.model.transformer import Transformer

MODELING_FILE = "modeling_headstart.py"
GENERATE_FILE = "custom_generate/generate.py"
CLASS = "HeadstartForCausalLM"
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""The families whose blocks the code runs, with the prefix of their classes in transformers; the code has Llama."""
RUN_KINDS = ("transformer", "linear", "replicated", "medusa", "stern", "sequential")
"""The kinds of heads that the code runs."""
EXPRESSIBLE = (*LLAMA, "family", "rope_scaling", "qkv_bias", "qk_norm", "draft_vocab")


def save_hf_code(model: Transformer, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write `model` like `save_model`, with the code that transformers needs to decode with its heads.

    `config.json` names the code in `auto_map`: transformers runs it only with `trust_remote_code=True`, and otherwise
    loads an ordinary model (trunk and head 1). Headstart reads the directory like any of its own. Raises UsageError for
    a model whose head 1 is no plain decoder, for heads or a family that the code does not run, and as `save_model`.
    """
    if model.config.head_kind not in RUN_KINDS:
        raise UsageError(f"hf-code runs {', '.join(RUN_KINDS)} heads, not {model.config.head_kind}; take headstart")
    if not model.config.kind.plain_decoder:
        raise UsageError(
            "linear heads wired anticausally: head 1 is no plain decoder, which hf-code builds on; take headstart"
        )
    family, others = family_of(model.config).model_type, inexpressible(model.config, EXPRESSIBLE)
    if family not in FAMILIES or others:
        raise UsageError(
            f"hf-code runs the blocks of {', '.join(FAMILIES)} without sliding windows, and this model's are those of "
            f"{family}{''.join(f', with {name}' for name in others)}; take headstart"
        )
    save_model(model, directory, tokenizer)
    config = read_json(directory / CONFIG_FILE)
    config["auto_map"] = {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{CLASS}"}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in (MODELING_FILE, GENERATE_FILE):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(_of_family(template(file), family), encoding="utf-8")


def _of_family(code: str, family: str) -> str:
    """Return the code with the classes of another family, whose names differ in the prefix."""
    code = code.replace("models.llama.modeling_llama", f"models.{family}.modeling_{family}")
    return re.sub(r"\bLlama(?=[A-Z])", FAMILIES[family], code)


def template(file: str) -> str:
    """Return the text of a file of `hf_code/`."""
    return files("headstart.formats").joinpath("hf_code", file).read_text(encoding="utf-8")


def written_code(directory: Path, file: str) -> ModuleType:
    """Import a module from `directory`, without transformers' cache of modules."""
    name = f"headstart_hf_code_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, directory / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


class HfCode(Format):
    """A model directory with code for transformers, which headstart reads like any other."""

    readable = False

    def detect(self, path: Path) -> bool:
        """Return whether the directory is one of ours with the code."""
        return (path / MODELING_FILE).is_file() and is_our_directory(path)

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write the model directory and the code."""
        save_hf_code(model, path, tokenizer)
        return []

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare the logits of all heads, and the greedy text that transformers writes with and without heads."""
        checks, heads = [compare_all_heads(model, read_model(path))], model.config.heads
        try:
            import transformers
        except ImportError:
            return [*checks, Check("transformers", "transformers is not installed: not compared", passed=None)]
        transformers.logging.disable_progress_bar()
        # Like `trust_remote_code=True`, but the code does not stay in transformers' cache of modules.
        modeling, generating = written_code(path, MODELING_FILE), written_code(path, GENERATE_FILE)
        again = modeling.HeadstartForCausalLM.from_pretrained(path, dtype=model.trunk.embedding.weight.dtype)
        checks.append(compare_logits("transformers with the code", model, again.head_logits, heads))
        prompt = random_text(model)[:1, : model.config.context // 2]
        count = min(NEW_TOKENS, model.config.context // 2)
        settings: dict[str, Any] = {"max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        plain = transformers.LlamaForCausalLM.generate(again, prompt, **settings)[0, prompt.shape[1] :].tolist()
        found = generating.generate(prompt, model=again, return_dict_in_generate=True, **settings)
        drafted = found.sequences[0, prompt.shape[1] :].tolist()
        return [*checks, compare_greedy_tokens("transformers with the code", model, plain, drafted, found.passes)]
