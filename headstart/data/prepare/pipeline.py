"""Prepare token shards from sources, in many processes; an interrupted preparation resumes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from headstart.data.chat_template import ChatTemplate, need_chat_template
from headstart.data.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    NAMES,
    VERSION,
    WITH_TARGETS,
    check_target,
    dtype_for,
    manifest_text,
    seal,
)
from headstart.data.prepare import bpe
from headstart.data.prepare.encode import SPLITS, Encoder, Summary
from headstart.data.prepare.splitting import Splits, split_documents
from headstart.data.prepare.units import Selection, Unit, plan
from headstart.data.prepare.workers import run_all
from headstart.data.prepare.write import pack, write_names
from headstart.data.tokenizers import Tokenizer, load_tokenizer
from headstart.errors import UsageError
from headstart.fileio import claimed, replacing_directory, sha256_of

ALONE_BYTES = 1 << 23
"""Smaller amounts of text are encoded in this process: starting others would take longer."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes read, bytes in total), or (documents, None) if a dataset is among the sources."""
Report = Callable[[str], None]
"""Called with each line that a user should read."""


@dataclass(frozen=True)
class Preparation:
    """The choices that decide what `prepare` writes."""

    selection: Selection = field(default_factory=Selection)
    """Choices for sources with fields."""
    validation_fraction: float = 0.02
    """Share of the documents held out.

    A document is held out if a hash of (seed, its content) says so, independent of order and other documents, so equal
    documents share a side. If that leaves a split empty, the documents nearest to it change sides (validation takes
    some only if two documents differ).
    """
    validation_sources: tuple[str, ...] = ()
    """Sources held out whole: a split by project, author or year. Their files go nowhere else, even if another source
    contains them, and documents of other sources that equal one of theirs are left out."""
    seed: int = 0
    """Seed of the hash that decides which documents are held out."""
    deduplicate: bool = False
    """Leave out exact and near duplicates, which are counted in any case."""
    literal: bool = False
    """Keep special tokens that a document spells as text, as always with a new vocabulary; otherwise they become their
    ids, as in transformers."""

    def check(self) -> None:
        """Raise UsageError for values out of range and choices that exclude each other."""
        selection = self.selection
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction {self.validation_fraction}: must be at least 0 and below 1, such as 0.02"
            )
        if selection.each_answer and not selection.conversations:
            raise UsageError("each_answer is for conversations; ask for both (--conversations --each-answer)")
        if selection.rewards and (selection.conversations or selection.text_field != Selection.text_field):
            raise UsageError("rewards belong to problems of CodeContests; take --rewards without another field")


def prepare(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | bpe.NewBpe,
    settings: Preparation | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Encode the documents of `sources` (see `units.plan`) into the shards folder `out` and return its manifest.

    Conversations (`Selection.conversations`) are written by the tokenizer's chat template, and only what the assistant
    wrote is to be predicted; `bytes` then counts answers. The output is the same for every number of `workers`
    (processes). `report` gets each line that a user should read.

    `out` appears whole or not at all, and replaces an older shards folder. Work in progress lies next to it, in
    `.NAME.preparing`: after a failure or a kill, the same call resumes from it.

    Raises UsageError if a source or a setting is wrong, or `out` is something else than a shards folder.
    """
    settings = settings or Preparation()
    settings.check()
    if workers < 1:
        raise UsageError(f"workers {workers}: must be 1 or more")
    say = report or (lambda line: None)
    template = _template(tokenizer) if settings.selection.conversations else None
    out = Path(os.path.abspath(out))
    check_target(out)
    sources = [sources] if isinstance(sources, str) else list(sources)
    units = plan(sources, settings.selection, out, settings.validation_sources)
    if not units:
        raise UsageError(f"{', '.join(sources)}: no text outside {out}; name UTF-8 text files")
    with _working_folder(out, say) as work:
        if isinstance(tokenizer, bpe.NewBpe):
            tokenizer = _learn(tokenizer, [unit for unit in units if not unit.held_out], settings.selection, work, say)
        encoder = _encoder(tokenizer, settings, template, units, work)
        summaries = _encode(encoder, units, workers, progress, say)
        folders = [encoder.folder / encoder.key(unit) for unit in units]
        splitting = split_documents(folders, summaries, settings.validation_fraction, settings.deduplicate)
        _report_splits(splitting, summaries, settings, say)
        with replacing_directory(out) as folder:
            manifest = _write(folder, encoder, settings, sources, splitting, workers if len(units) > 1 else 1)
        shutil.rmtree(work)
    return manifest


def _template(tokenizer: Tokenizer | bpe.NewBpe) -> ChatTemplate:
    if isinstance(tokenizer, bpe.NewBpe):
        raise UsageError(
            "a new vocabulary has no chat template, which conversations need; learn it from text first, put a "
            "chat_template.jinja next to its tokenizer.json and give that as the tokenizer"
        )
    return need_chat_template(tokenizer)


def _encoder(
    tokenizer: Tokenizer, settings: Preparation, template: ChatTemplate | None, units: list[Unit], work: Path
) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokenizer, work / "tokenizer"),
        selection=settings.selection,
        validation_fraction=settings.validation_fraction,
        seed=settings.seed,
        dtype=DTYPES[dtype_for(tokenizer.vocab_size)],
        count_documents=any(unit.format == "dataset" for unit in units),
        folder=work / "units",
        template=template,
        literal=settings.literal or getattr(tokenizer, "learnt", False),
    )


def _write(
    folder: Path, encoder: Encoder, settings: Preparation, sources: list[str], splitting: Splits, workers: int
) -> dict[str, Any]:
    """Write the files of a shards folder and return its manifest."""
    tokenizer, with_targets = encoder.tokenizer, encoder.template is not None
    splits = {
        split: pack(splitting.segments[split], split, folder, encoder.dtype, workers, with_targets) for split in SPLITS
    }
    write_names(folder / NAMES, splitting.segments["validation"])
    tokenizer.save(folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "version": WITH_TARGETS if with_targets else VERSION,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "start_ids": list(tokenizer.start_ids),
        "dtype": dtype_for(tokenizer.vocab_size),
        "splits": splits,
        "sources": sources,
        "validation_sources": list(settings.validation_sources),
        **asdict(settings.selection),
        "seed": settings.seed,
        "validation_fraction": settings.validation_fraction,
        "literal": encoder.literal,
        "deduplicated": settings.deduplicate,
        "duplicates": asdict(splitting.duplicates),
    }
    seal(manifest, folder)
    (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return manifest


@contextmanager
def _working_folder(out: Path, say: Report) -> Iterator[Path]:
    """Own `.NAME.preparing` next to `out` within the block; remove it if it holds nothing to resume from."""
    work = out.with_name(f".{out.name}.preparing")
    taken = f"{out}: another process is preparing it; wait for it or give another --out"
    with claimed(work / "lock", taken, "give an --out you may write to"):
        (work / "units").mkdir(exist_ok=True)
        for left in (*out.parent.glob(f".{out.name}.writing-*"), *(work / "units").glob(".*")):
            shutil.rmtree(left, ignore_errors=True)  # half-written by a process that was killed
        try:
            yield work
        except BaseException:
            if any((work / "units").glob("[!.]*")):
                say(f"stopped; finished work is kept in {work}: the same command resumes from it")
            raise
        finally:
            if not any((work / "units").glob("[!.]*")) and not any(work.glob("vocabulary-*/[!.]*")):
                shutil.rmtree(work, ignore_errors=True)


def _learn(new: bpe.NewBpe, units: list[Unit], selection: Selection, work: Path, say: Report) -> Tokenizer:
    """Learn a vocabulary from these units, unless an interrupted call already has."""
    key = hashlib.sha256(repr((bpe.SAMPLE_BYTES, selection, units)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    folder = work / f"vocabulary-{key}" / f"bpe-{new.vocab_size}"
    if folder.exists():
        say("the vocabulary is learnt already")
    else:
        say(f"learning a vocabulary of {new.vocab_size:,} tokens from {bpe.SAMPLE_BYTES >> 20} MiB of text at most")
        with replacing_directory(folder) as temporary:
            size = bpe.train(bpe.sample(units, selection), new.vocab_size, temporary)
        if size < new.vocab_size:
            say(f"the text gives a vocabulary of {size:,} tokens and no more")
    return load_tokenizer(folder)


def _fingerprint(tokenizer: Tokenizer, folder: Path) -> str:
    """Return text that two tokenizers share only if they encode alike."""
    shutil.rmtree(folder, ignore_errors=True)
    with replacing_directory(folder) as temporary:
        tokenizer.save(temporary)
    files = [(file.name, sha256_of(file)) for file in sorted(folder.iterdir())]
    start = [tokenizer.start_ids] if tokenizer.start_ids else []
    return repr((tokenizer.vocab_size, tokenizer.end_id, files, *start))


def _encode(encoder: Encoder, units: list[Unit], workers: int, progress: Progress | None, say: Report) -> list[Summary]:
    """Encode the units that no earlier call has finished, and return the summaries of all."""
    keys = [encoder.key(unit) for unit in units]
    current = set(keys)
    for folder in encoder.folder.iterdir():
        if folder.name not in current:
            shutil.rmtree(folder)  # of a call with other arguments
    found = {key: summary for key in keys if (summary := encoder.finished(key)) is not None}
    todo = [unit for key, unit in zip(keys, units) if key not in found]
    if found:
        say(f"resuming: {len(found):,} of {len(units):,} pieces of work are done already")
    total = None if encoder.count_documents else sum(unit.size for unit in units)
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total)

    if total is None:
        advance(sum(summary.read for summary in found.values()))
    else:
        advance(total - sum(unit.size for unit in todo))
    left = Counter(unit.source for unit in units)
    if sum(unit.size for unit in todo) < ALONE_BYTES:
        workers = 1
    for summary in chain(list(found.values()), run_all(encoder.encode, todo, min(workers, len(todo)) or 1, advance)):
        found[summary.key] = summary
        left[summary.source] -= 1
        if left[summary.source] == 0:
            _finish_source(encoder, [each for each in found.values() if each.source == summary.source], say)
    return [found[key] for key in keys]


def _finish_source(encoder: Encoder, summaries: list[Summary], say: Report) -> None:
    """Report what a source skipped. If it holds no document, remove its units and raise UsageError."""
    skipped: Counter[str] = Counter()
    for summary in summaries:
        skipped.update(summary.skipped)
    source = summaries[0].source
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    documents = sum(summary.documents for summary in summaries)
    if documents == 0:
        for summary in summaries:
            shutil.rmtree(encoder.folder / summary.key)  # there is nothing in it to resume from
        raise UsageError(f"{source}: no document in it (skipped: {reasons or 'nothing'}); name UTF-8 text")
    if reasons:
        say(f"{source}: {documents:,} documents read; skipped: {reasons}")


def _report_splits(splitting: Splits, summaries: list[Summary], settings: Preparation, say: Report) -> None:
    """Report a missing validation split, duplicates, and documents that spell the end token."""
    duplicates = splitting.duplicates
    documents = sum(summary.documents for summary in summaries)
    if not splitting.segments["validation"] and settings.validation_fraction > 0:
        if documents == 1:
            say("a single document: it is for training, and there is no validation split")
        else:
            why = "are equal" if duplicates.exact == documents - 1 else "come from one conversation or problem"
            say(f"all {documents:,} documents {why}: they are for training, and there is no validation split")
    for line in duplicates.lines(settings.deduplicate):
        say(line)
    if spelled := sum(summary.spelled for summary in summaries):
        say(f"{spelled:,} documents spell the end token, which became its id (--literal keeps it as text)")
