"""`headstart push`: a model directory, or heads alone, with a card, into a folder or onto the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from headstart.console import print_result, say
from headstart.data.prompts import read_prompt_file
from headstart.errors import UsageError, first_line, needs_extra
from headstart.evaluation.settings import PROMPTS_FILE
from headstart.fileio import read_json, replacing_directory

CARD = "README.md"
SENT = (
    *("config.json", "heads.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("heads/*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "chat_template.jinja", "acceptance.json", "tuning.json", PROMPTS_FILE, CARD),
    *("modeling_headstart.py", "custom_generate/generate.py", "LICENSE*", "NOTICE*"),
)
"""The files of a model directory, or of heads alone, that are sent; others in the directory stay."""


@dataclass(frozen=True)
class PushSettings:
    """Put a model, or draft heads alone, and a model card into a folder, or onto the Hugging Face hub."""

    model: Positional[str]
    """A model directory, or a directory of heads without their model."""
    to: str
    """A folder, or OWNER/NAME on the hub (hf:OWNER/NAME if a folder might be meant)."""
    licence: str | None = None
    """Identifier of the model's licence, as the hub writes it: apache-2.0, mit, ..."""
    base_model: str | None = None
    """Hub id of the model that heads were added to."""
    evaluation: str | None = None
    """A folder that `headstart evaluate --out` wrote; the card shows its numbers."""
    private: bool = False
    """Make a new repository on the hub private."""
    new_card: bool = False
    """Replace a README.md that someone else wrote."""
    json: bool = False
    """Print what was sent as JSON."""


def run(settings: PushSettings) -> None:
    """Push the model, and print what was sent."""
    print_result(push(settings), settings.json, format_push)


HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def push(settings: PushSettings, api: Any = None) -> dict[str, Any]:
    """Put a model directory, or heads alone, with a model card into a folder, or onto the hub (`hub_id`).

    `api` stands in for huggingface_hub's HfApi. The result has "to", "files" (paths in the result), "left" (files of
    the model directory that are not sent) and "card". Raises UsageError for no model, a folder that holds something
    else, damaged files, or a hub that refuses.
    """
    directory, to, evaluation = Path(settings.model), settings.to, settings.evaluation
    contents = _check_source(directory, settings.base_model)
    repository = hub_id(to)
    if (directory / PROMPTS_FILE).is_file():
        read_prompt_file(directory / PROMPTS_FILE)  # a damaged file would stop `evaluate` and `tune` at its receiver
    results = None
    if evaluation is not None:
        file = Path(evaluation)
        results = read_json(file / "results.json" if file.is_dir() else file)
    files = sorted({f for pattern in SENT for f in directory.glob(pattern) if f.is_file()})
    sent = {str(file.relative_to(directory)): file for file in files}
    present = [f for f in directory.rglob("*") if f.is_file()]
    left = sorted(str(file.relative_to(directory)) for file in present if file not in sent.values())
    contents[CARD], origin = _card(settings, repository or Path(to).resolve().name, results)
    if repository is None:
        target = Path(to).expanduser().resolve()
        _check_target(directory.resolve(), target)
        with replacing_directory(target) as temporary:
            _fill(temporary, sent, contents, shutil.copyfile)
        where = str(target)
    else:
        with tempfile.TemporaryDirectory(prefix="headstart-push-") as folder:
            _fill(Path(folder), sent, contents, os.symlink)
            where = _upload(Path(folder), repository, settings.private, api)
    return {"to": where, "files": sorted({*sent, CARD}), "left": left, "card": origin}


def hub_id(to: str) -> str | None:
    """Return OWNER/NAME if `to` means the hub, None if it means a folder.

    `to` is a folder if it exists, lies in a folder that exists, has another number of slashes, or starts with . / or ~;
    "hf:OWNER/NAME" always means the hub.
    """
    if to.startswith("hf:"):
        if not re.fullmatch(HUB_ID, to[3:]):
            raise UsageError(f"--to {to}: a repository on the hub is called hf:OWNER/NAME")
        return to[3:]
    path = Path(to)
    if not re.fullmatch(HUB_ID, to) or path.exists() or path.parent.is_dir():
        return None
    return to


def _check_source(directory: Path, base: str | None) -> dict[str, str]:
    """Return the text of heads.json with the name of the base, if the directory holds heads alone and it is given.

    Raises UsageError for a directory without model or heads.
    """
    from headstart.formats.heads import HEADS_CONFIG, StoredHeads, with_base_name
    from headstart.formats.registry import load_config

    if directory.is_file():
        raise UsageError(f"{directory}: is a file; push the directory that headstart convert makes of it")
    if not (directory / HEADS_CONFIG).is_file():
        load_config(directory)
        return {}
    StoredHeads.read(directory).open_tensors()
    return {} if base is None else {HEADS_CONFIG: with_base_name(directory / HEADS_CONFIG, base)}


def _card(settings: PushSettings, name: str, results: dict[str, Any] | None) -> tuple[str, str]:
    """Return the text of the card, and "written" or "kept as it is"."""
    from headstart.commands.card import MARK, write_card

    directory, licence, base = Path(settings.model), settings.licence, settings.base_model
    file = directory / CARD
    if file.is_file() and not settings.new_card:
        text = file.read_text(encoding="utf-8")
        if MARK not in text:
            given = [f for f, v in (("--licence", licence), ("--base-model", base), ("--evaluation", results)) if v]
            if given:
                raise UsageError(
                    f"{file}: was written by someone else and does not show {', '.join(given)}; add it there, or "
                    "replace the file with --new-card"
                )
            return text, "kept as it is"
    if licence is None:
        say("no licence was given, and the card says so; name one with --licence")
    return write_card(directory, name, licence, base, results), "written"


def _fill(folder: Path, sent: dict[str, Path], contents: dict[str, str], place: Any) -> None:
    """Put the files into the folder; those named in `contents` get that content."""
    for name, file in sent.items():
        if name not in contents:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            place(file.resolve(), folder / name)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


def _check_target(source: Path, target: Path) -> None:
    if source == target or target in source.parents:
        raise UsageError(f"{target}: is where the model lies; name another folder")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; name a folder")
    from headstart.formats.config_json import CONFIG_FILE
    from headstart.formats.heads import HEADS_CONFIG

    model_or_heads = any((target / name).is_file() for name in (CONFIG_FILE, HEADS_CONFIG))
    earlier = model_or_heads and (target / CARD).is_file()
    if target.is_dir() and any(target.iterdir()) and not earlier:
        raise UsageError(f"{target}: holds something else, and would be replaced; name a new folder")


def _upload(folder: Path, repository: str, private: bool, api: Any) -> str:
    """Upload the folder with the login of huggingface_hub, and return the address."""
    with needs_extra("pushing to the hub", "hf", "push to a folder"):
        from huggingface_hub import HfApi
    api = HfApi() if api is None else api
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Model written by Headstart")
    except Exception as error:  # the hub, the network and the disk raise many kinds
        reason = first_line(error)
        raise UsageError(
            f"{repository}: the hub refused it ({reason}); log in with `hf auth login`, or push to a folder"
        ) from error
    return f"https://huggingface.co/{repository}"


def format_push(found: dict[str, Any]) -> str:
    """Return the result of `push` as text."""
    lines = [f"card: {found['card']}", f"{len(found['files'])} files: {', '.join(found['files'])}"]
    if found["left"]:
        lines.append(f"not sent: {', '.join(found['left'])}")
    return "\n".join([*lines, found["to"]])
