"""`headstart prepare`: turn text, code and datasets into token shards for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from headstart.console import Progress, print_json, say
from headstart.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Turn text, code and datasets into token shards for training.

    A preparation that was stopped resumes when the same command is started again; with other arguments it starts anew.
    """

    sources: Positional[tuple[str, ...]] = ()
    """Files, folders, globs, python-stdlib (the sources of the running interpreter), hf:NAME (a dataset of the Hugging
    Face hub, streamed) or hf:FOLDER. A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file holds a document in each line or
    row, in folders too; every other file is one document of text."""
    out: Path
    """Folder to write. It must not exist, or hold an earlier preparation."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, a directory that holds one, or a hub id OWNER/NAME."""
    train_bpe: int | None = None
    """Learn a byte-level BPE vocabulary of this size from the sources, instead of --tokenizer."""
    text_field: str = "text"
    """The field or column that holds the text; a.b is field b within a."""
    conversations: bool = False
    """Read conversations, from the fields messages or conversations if --text-field names no other. The tokenizer's
    chat template writes them, and only the assistant's messages are trained on."""
    each_answer: bool = False
    """Write one document per reply of the assistant, with its history. Chat templates need it that render earlier turns
    differently when another turn follows."""
    rewards: bool = False
    """Read problems in the form of CodeContests: each of their Python programs is a document, after the problem and a
    line that says whether the program is correct or incorrect."""
    split: str = "train"
    """The split to take from hf: datasets."""
    hf_config: str | None = None
    """The configuration to take from hf: datasets."""
    validation_fraction: float | None = None
    """Share of the documents held out (None: 0.02, or none with --validation-sources)."""
    validation_sources: tuple[str, ...] = ()
    """Sources that are held out whole, even if one of SOURCES contains them."""
    seed: int = 0
    """Seed that chooses the documents held out."""
    deduplicate: bool = False
    """Leave out documents that equal or nearly equal an earlier one; without it they are counted."""
    literal: bool = False
    """Keep special tokens that a document spells out as text (--train-bpe always does)."""
    workers: int | None = None
    """Processes (None: one for each core). The output does not depend on it."""
    verify: bool = False
    """Prepare nothing: read the folder --out and name its damaged files. The exit status is 1 if there are any."""
    json: bool = False
    """Print the manifest as JSON."""


def run(settings: PrepareSettings) -> None:
    """Prepare the sources, or verify an earlier preparation."""
    from headstart.data.prepare.bpe import NewBpe
    from headstart.data.prepare.hub import is_dataset
    from headstart.data.prepare.pipeline import Preparation, prepare
    from headstart.data.prepare.units import Selection
    from headstart.formats.registry import load_data_tokenizer
    from headstart.hardware import cores

    if settings.verify:
        _verify(settings)
    if settings.train_bpe is not None and settings.tokenizer != "bytes":
        raise UsageError("--train-bpe and --tokenizer: give one of the two")
    fraction = settings.validation_fraction
    if fraction is None:
        fraction = 0.0 if settings.validation_sources else 0.02
    all_sources = (*settings.sources, *settings.validation_sources)
    with Progress("prepare", unit="documents" if any(map(is_dataset, all_sources)) else "bytes") as bar:
        manifest = prepare(
            settings.sources,
            settings.out,
            load_data_tokenizer(settings.tokenizer) if settings.train_bpe is None else NewBpe(settings.train_bpe),
            Preparation(
                selection=Selection(
                    settings.text_field,
                    settings.split,
                    settings.hf_config,
                    settings.conversations,
                    settings.each_answer,
                    settings.rewards,
                ),
                validation_fraction=fraction,
                validation_sources=settings.validation_sources,
                seed=settings.seed,
                deduplicate=settings.deduplicate,
                literal=settings.literal,
            ),
            workers=cores() if settings.workers is None else settings.workers,
            progress=bar.update,
            report=say,
        )
    for name, content in manifest["splits"].items():
        answers = sum(shard["targets"]["count"] for shard in content["shards"] if "targets" in shard)
        share = f", {answers:,} of them answers" if settings.conversations else ""
        say(f"{name}: {content['documents']:,} documents, {content['tokens']:,} tokens{share}")
    say(f"prepared: {settings.out}")
    if settings.json:
        print_json(manifest)


def _verify(settings: PrepareSettings) -> None:
    """Name the damaged files of the folder `out` and end the program: status 1 if there are any."""
    from headstart.data import shards
    from headstart.data.manifest import read_manifest, sealed

    if settings.sources:
        raise UsageError(f"{settings.sources[0]}: --verify takes no source; it reads the folder --out")
    faults = shards.verify(settings.out)
    for fault in faults:
        say(fault)
    if faults:
        say(f"{settings.out}: {len(faults)} damaged")
        raise SystemExit(1)
    complete = sealed(read_manifest(settings.out))
    checked = "every file is" if complete else "the tokens are (an older Headstart recorded no more)"
    say(f"{settings.out}: {checked} as prepare wrote it")
    raise SystemExit(0)
