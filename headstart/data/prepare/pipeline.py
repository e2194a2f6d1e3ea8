"""Preparation: sources into a shards folder, in many processes, going on where an interrupted call stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
from headstart.data.prepare.splitting import split_documents
from headstart.data.prepare.units import Selection, Unit, plan
from headstart.data.prepare.workers import run_all
from headstart.data.prepare.write import pack, write_names
from headstart.data.tokenizers import Tokenizer, load_tokenizer
from headstart.errors import UsageError
from headstart.fileio import replacing_directory, sha256_of, take_lock, unwritable

ALONE_BYTES = 1 << 23
"""Less than this is encoded in this process: others would take longer to start."""

Report = Callable[[str], None]


def prepare(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | bpe.NewBpe,
    *,
    selection: Selection | None = None,
    validation_fraction: float = 0.02,
    validation_sources: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    deduplicate: bool = False,
    literal: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Encodes the documents of `sources` (see `units.plan`) into the shards folder `out`; returns its manifest.

    A document goes to validation if a hash of (seed, its content) says so, whatever the order and the other documents:
    equal documents share a side. If that leaves a split empty, the documents nearest to it change sides (validation
    takes some if two documents differ). All of `validation_sources` goes to validation, and their files to nothing
    else, even if a source contains them: a split by project, by author, by year. A document of another source that
    equals one of theirs is left out.

    Exact and near duplicates are counted, in the manifest and by `report`; with `deduplicate` they are left out.

    With `literal` special tokens that a document spells stay text, as they always do with a vocabulary that
    `bpe.NewBpe` learnt. Otherwise they become their ids, as in transformers.

    Of conversations (`selection.conversations`) all is written as the tokenizer's chat template has it, and what the
    assistant wrote is told from the rest: that alone is to be predicted. `bytes` then counts answers. With
    `selection.each_answer` each answer is a document, with what comes before it. With `selection.rewards` each program
    of a problem is one, marked as correct or incorrect (`rewarded_programs`).

    The output is the same for every number of `workers` (processes). `progress` gets (bytes read, bytes in all), or
    (documents, None) where a dataset is among the sources.

    `out` appears whole or not at all; an older shards folder there is replaced, anything else there raises UsageError.
    Work lies beside it, in `.NAME.preparing`: after a failure or a kill, the same call goes on with what is done.
    """
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation_fraction {validation_fraction}: must be at least 0 and below 1, such as 0.02")
    if workers < 1:
        raise UsageError(f"workers {workers}: must be 1 or more")
    selection, say = selection or Selection(), report or (lambda line: None)
    if selection.each_answer and not selection.conversations:
        raise UsageError("each_answer is for conversations; ask for both (--conversations --each-answer)")
    if selection.rewards and (selection.conversations or selection.text_field != Selection.text_field):
        raise UsageError("rewards belong to problems of CodeContests; take --rewards without another field")
    template = _template(tokenizer) if selection.conversations else None
    out = Path(os.path.abspath(out))
    check_target(out)
    sources = [sources] if isinstance(sources, str) else list(sources)
    units = plan(sources, selection, out, validation_sources)
    if not units:
        raise UsageError(f"{', '.join(sources)}: no text outside {out}; name UTF-8 text files")
    with _working_folder(out, say) as work:
        if isinstance(tokenizer, bpe.NewBpe):
            tokenizer = _learn(tokenizer, [unit for unit in units if not unit.held_out], selection, work, say)
        encoder = Encoder(
            tokenizer=tokenizer,
            fingerprint=_fingerprint(tokenizer, work / "tokenizer"),
            selection=selection,
            validation_fraction=validation_fraction,
            seed=seed,
            dtype=DTYPES[dtype_for(tokenizer.vocab_size)],
            count_documents=any(unit.format == "dataset" for unit in units),
            folder=work / "units",
            template=template,
            literal=literal or getattr(tokenizer, "learnt", False),
        )
        summaries = _encode(encoder, units, workers, progress, say)
        folders = [encoder.folder / encoder.key(unit) for unit in units]
        splitting = split_documents(folders, summaries, validation_fraction, deduplicate)
        segments = splitting.segments
        if not segments["validation"] and validation_fraction > 0:
            say(_no_validation(sum(summary.documents for summary in summaries), splitting.duplicates.exact))
        for line in splitting.duplicates.told(deduplicate):
            say(line)
        if spelled := sum(summary.spelled for summary in summaries):
            say(f"{spelled:,} documents spell the end token, which became its id (--literal keeps it as text)")
        with replacing_directory(out) as folder:
            splits = {
                split: pack(
                    segments[split],
                    split,
                    folder,
                    encoder.dtype,
                    workers if len(units) > 1 else 1,
                    template is not None,
                )
                for split in SPLITS
            }
            write_names(folder / NAMES, segments["validation"])
            tokenizer.save(folder / "tokenizer")
            manifest = {
                "format": FORMAT,
                "version": VERSION if template is None else WITH_TARGETS,
                "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "end_id": tokenizer.end_id,
                "start_ids": list(tokenizer.start_ids),
                "dtype": dtype_for(tokenizer.vocab_size),
                "splits": splits,
                "sources": sources,
                "validation_sources": list(validation_sources),
                **asdict(selection),
                "seed": seed,
                "validation_fraction": validation_fraction,
                "literal": encoder.literal,
                "deduplicated": deduplicate,
                "duplicates": asdict(splitting.duplicates),
            }
            seal(manifest, folder)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        shutil.rmtree(work)
    return manifest


def _template(tokenizer: Tokenizer | bpe.NewBpe) -> ChatTemplate:
    if isinstance(tokenizer, bpe.NewBpe):
        raise UsageError(
            "a new vocabulary has no chat template, which conversations need; learn it from texts first, put a "
            "chat_template.jinja beside its tokenizer.json and give that as the tokenizer"
        )
    return need_chat_template(tokenizer)


@contextmanager
def _working_folder(out: Path, say: Report) -> Iterator[Path]:
    """`.NAME.preparing` beside `out`, for this process alone; removed where nothing in it is worth keeping."""
    work = out.with_name(f".{out.name}.preparing")
    try:
        (work / "units").mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
    except OSError as error:
        raise unwritable(work, error, "give an --out you may write to") from error
    with lock:
        if not take_lock(lock):
            raise UsageError(f"{out}: another process is preparing it; wait for it or give another --out")
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


def _learn(wanted: bpe.NewBpe, units: list[Unit], selection: Selection, work: Path, say: Report) -> Tokenizer:
    """The vocabulary learnt from these units, or the one that an earlier, interrupted call has learnt from them."""
    key = hashlib.sha256(repr((bpe.SAMPLE_BYTES, selection, units)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    folder = work / f"vocabulary-{key}" / f"bpe-{wanted.vocab_size}"
    if folder.exists():
        say("the vocabulary is learnt already")
    else:
        say(f"learning a vocabulary of {wanted.vocab_size:,} tokens from {bpe.SAMPLE_BYTES >> 20} MiB of text at most")
        with replacing_directory(folder) as temporary:
            size = bpe.train(bpe.sample(units, selection), wanted.vocab_size, temporary)
        if size < wanted.vocab_size:
            say(f"the text gives a vocabulary of {size:,} tokens and no more")
    return load_tokenizer(folder)


def _fingerprint(tokenizer: Tokenizer, folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    with replacing_directory(folder) as temporary:
        tokenizer.save(temporary)
    files = [(file.name, sha256_of(file)) for file in sorted(folder.iterdir())]
    start = [tokenizer.start_ids] if tokenizer.start_ids else []
    return repr((tokenizer.vocab_size, tokenizer.end_id, files, *start))


def _encode(
    encoder: Encoder,
    units: list[Unit],
    workers: int,
    progress: Callable[[int, int | None], None] | None,
    say: Report,
) -> list[Summary]:
    """The summaries of all units; those that an earlier call has finished are not encoded again."""
    keys = [encoder.key(unit) for unit in units]
    wanted = set(keys)
    for folder in encoder.folder.iterdir():
        if folder.name not in wanted:
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
            of_source = [each for each in found.values() if each.source == summary.source]
            if not any(each.documents for each in of_source):
                for each in of_source:
                    shutil.rmtree(encoder.folder / each.key)  # there is nothing in it to resume from
            _report_source(summary.source, of_source, say)
    return [found[key] for key in keys]


def _no_validation(documents: int, duplicates: int) -> str:
    """Return the line that says why no document is for validation."""
    if documents == 1:
        return "a single document: it is for training, and there is no validation split"
    why = "are equal" if duplicates == documents - 1 else "come from one conversation or problem"
    return f"all {documents:,} documents {why}: they are for training, and there is no validation split"


def _report_source(source: str, summaries: list[Summary], say: Report) -> None:
    """What was skipped. Raises UsageError where that was everything."""
    skipped: Counter[str] = Counter()
    for summary in summaries:
        skipped.update(summary.skipped)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    documents = sum(summary.documents for summary in summaries)
    if documents == 0:
        raise UsageError(f"{source}: no document in it (skipped: {reasons or 'nothing'}); name UTF-8 text")
    if reasons:
        say(f"{source}: {documents:,} documents read; skipped: {reasons}")
