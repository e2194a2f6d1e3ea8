"""Let a model summarize documents, and compare its summaries with references by ROUGE (paper section 3.7).

The weights may be those of a run's checkpoint with the best ROUGE-L on a validation split, as in the paper.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.api import LanguageModel
from headstart.console import Progress, say
from headstart.data.lines import read_placed_records
from headstart.data.prepare.hub import load_rows
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.generation import Stats
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError, needs_extra
from headstart.evaluation.intervals import resample
from headstart.evaluation.records import owned, whole_lines
from headstart.evaluation.settings import SummarySettings
from headstart.fileio import appending
from headstart.training.checkpoints import all_steps
from headstart.training.new_model import save_checkpoint

METRICS = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
"""Metrics of the paper's tables S8 to S10, as the package rouge-score names them."""
CHOICE = "rougeL"
"""Metric whose F1 on the validation split chooses a checkpoint."""


@dataclass(frozen=True)
class SummarySet:
    """A data set of documents with summaries.

    Attributes:
        source: its name on the hub.
        config: its configuration there.
        document, summary: names of its fields.
    """

    source: str
    document: str
    summary: str
    config: str | None = None


SETS = {
    "cnn-dailymail": SummarySet("hf:abisee/cnn_dailymail", "article", "highlights", "3.0.0"),
    "multi-news": SummarySet("hf:alexfabbri/multi_news", "document", "summary"),
    "orangesum": SummarySet("hf:EdinburghNLP/orange_sum", "text", "summary", "abstract"),
    "pn-summary": SummarySet("hf:HooshvareLab/pn_summary", "article", "summary", "1.0.0"),
    "samsum": SummarySet("hf:Samsung/samsum", "dialogue", "summary"),
    "thaisum": SummarySet("hf:nakhun/thaisum", "body", "summary", "thaisum"),
    "wikisummary": SummarySet("hf:m3hrdadfi/wiki_summary", "article", "highlights"),
    "xsum": SummarySet("hf:EdinburghNLP/xsum", "document", "summary"),
}
"""The paper's sets by the names of their tasks."""


@dataclass(frozen=True)
class Example:
    """A document with its reference."""

    document: str
    reference: str


def load_examples(task: str, file: Path | None, split: str, count: int | None = None) -> list[Example]:
    """Load the documents of a set from a .jsonl file with its fields, or a split from the hub; at most `count`.

    Raises UsageError for data that cannot be read or reached, and a document without a text or a reference.
    """
    chosen, option = SETS[task], "--summaries.source" if split == "test" else "--summaries.validation"
    rows: Iterator[tuple[str, Any]]
    if file is None:
        try:
            loaded = load_rows(chosen.source, split, chosen.config)
        except UsageError as error:
            raise UsageError(f"{error}; or give the documents as a file: {option} {task}.jsonl") from error
        rows = ((f"{task}, {split} split, row {number}", row) for number, row in enumerate(loaded, start=1))
    else:
        rows = read_placed_records(file)
    examples = []
    for place, row in islice(rows, count):
        values = [row.get(name) for name in (chosen.document, chosen.summary)]
        for name, text, what in zip((chosen.document, chosen.summary), values, ("to summarize", "as its reference")):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f'{place}: has no text "{name}" {what}; correct it, or take another file')
        examples.append(Example(*values))
    if not examples:
        raise UsageError(f"{file or task}: holds no document of {task}; name a file of them with {option}")
    return examples


def run_summaries(
    load: Callable[[Path], LanguageModel], path: Path, task: str, settings: SummarySettings, batch: int, out: Path
) -> dict[str, Any]:
    """Summarize the documents of `task`, and return the ROUGE of the summaries with intervals over documents.

    Summaries are kept in OUT/TASK, and an interrupted run resumes from them.

    Args:
        load: loads a model directory.
        path: the model; with `settings.choose` the folder of a run, of whose checkpoints the best is taken.
        task: a name of SETS.
        settings: documents and prompts.
        batch: summaries written together.
        out: folder of results.

    Raises:
        UsageError: settings out of range, data or a model that cannot be read, rouge-score is not installed, or the
            folder holds summaries of other settings.
    """
    with needs_extra(f"the task {task}", "eval"):
        import rouge_score  # noqa: F401
    for name, value in (("new-tokens", settings.new_tokens), ("documents", settings.documents)):
        if value is not None and value < 1:
            raise UsageError(f"--summaries.{name} is {value}; it must be at least 1")
    if settings.prompt.count("{document}") != 1:
        raise UsageError("--summaries.prompt must hold {document} once, where the document stands")
    folder, examples = out / task, load_examples(task, settings.source, "test", settings.documents)
    identity = {"task": task, "model": str(path.resolve())}
    identity |= {
        name: str(getattr(settings, name)) for name in ("source", "choose", "validation", "prompt", "new_tokens")
    }
    found: dict[str, Any] = {}
    with owned(folder, identity):
        if settings.choose:
            path, found = _choose(load, path, task, settings, batch, folder)
        return found | _score(load, path, examples, settings, batch, folder / "test.jsonl")


def _choose(
    load: Callable[[Path], LanguageModel], run: Path, task: str, settings: SummarySettings, batch: int, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Return the model of the checkpoint with the best ROUGE-L on the validation split, and the scores of all."""
    checkpoints = all_steps(run / "checkpoints")
    if not checkpoints:
        raise UsageError(f"{run}: holds no checkpoints; name the folder of a run, or leave --summaries.choose out")
    examples = load_examples(task, settings.validation, "validation", settings.documents)
    scores: dict[int, float] = {}
    for step, checkpoint in checkpoints.items():
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            save_checkpoint(checkpoint, Path(directory) / "model")
            file = folder / f"validation-{step}.jsonl"
            scored = _score(load, Path(directory) / "model", examples, settings, batch, file)
        scores[step] = scored[CHOICE]["f1"]["value"]
        say(f"{task}: step {step}, ROUGE-L {scores[step]:.4f} on the validation split")
    chosen = max(scores, key=lambda step: scores[step])
    save_checkpoint(checkpoints[chosen], folder / "model")
    return folder / "model", {"validation": {str(step): score for step, score in scores.items()}, "step": chosen}


def _score(
    load: Callable[[Path], LanguageModel],
    path: Path,
    examples: Sequence[Example],
    settings: SummarySettings,
    batch: int,
    file: Path,
) -> dict[str, Any]:
    """Return the scores of a model's summaries, which are kept in `file`."""
    from rouge_score.rouge_scorer import RougeScorer

    written, cut = _write(load(path), examples, settings, batch, file)
    scorer = RougeScorer(list(METRICS), use_stemmer=False)
    scores = [scorer.score(example.reference, summary) for example, summary in zip(examples, written)]
    found: dict[str, Any] = {"documents": len(examples), "cut_documents": cut, "new_tokens": settings.new_tokens}
    for metric in METRICS:
        f1 = resample([(score[metric].fmeasure, 1.0) for score in scores], lambda total, count: total / count)
        parts = {part: sum(getattr(s[metric], part) for s in scores) / len(scores) for part in ("precision", "recall")}
        found[metric] = {"f1": asdict(f1), **parts}
    return found


def _write(
    model: LanguageModel, examples: Sequence[Example], settings: SummarySettings, batch: int, file: Path
) -> tuple[list[str], int]:
    """Return the greedy summary of every document, and how many documents had to be cut; write those not in `file`."""
    prompts = [_prompt(model, example.document, settings) for example in examples]
    known = {line["document"]: line["summary"] for line in whole_lines(file)}
    missing = [i for i in range(len(examples)) if i not in known]
    if missing:
        longest = max(len(prompts[i][0]) for i in missing) + settings.new_tokens
        engine = model.engine(min(batch, len(missing)), longest, prefill_budget=None)
        asked = {}
        for i in missing:
            request = Request(prompts[i][0], settings.new_tokens, Sampling(0.0), stop=settings.stop)
            generation = engine.submit(request)
            asked[id(generation)] = (i, generation)
        with Progress(file.stem, len(missing), unit="summaries") as bar, appending(file) as lines:
            while engine.busy:
                for generation, _ in engine.step():
                    if generation.finished:
                        i, _ = asked[id(generation)]
                        known[i] = generation.text.strip()
                        lines.write(json.dumps({"document": i, "summary": known[i]}) + "\n")
                        lines.flush()
                        bar.advance(1)
        stats = Stats.summed([generation.stats for _, generation in asked.values()])
        if stats.passes:
            say(f"{stats.tokens:,} tokens written, {(stats.tokens + stats.ends) / stats.passes:.2f} a pass")
    return [known[i] for i in range(len(examples))], sum(cut for _, cut in prompts)


def _prompt(model: LanguageModel, document: str, settings: SummarySettings) -> tuple[tuple[int, ...], bool]:
    """Return a prompt's tokens, and whether the document's end was cut off to leave room for the summary."""
    tokenizer, room = model.tokenizer, model.config.context - settings.new_tokens

    def encode(text: str) -> tuple[int, ...]:
        return tuple(prompt_ids(tokenizer, settings.prompt.replace("{document}", text)))

    ids, pieces = encode(document), tokenizer.encode(document)
    cut, keep = len(ids) > room, len(pieces)
    while len(ids) > room:
        keep -= len(ids) - room
        if keep <= 0:
            raise UsageError(
                f"the context {model.config.context} leaves no room for a document next to {settings.new_tokens} new "
                "tokens; take fewer --summaries.new-tokens"
            )
        ids = encode(tokenizer.decode(pieces[:keep]))
    return ids, cut
