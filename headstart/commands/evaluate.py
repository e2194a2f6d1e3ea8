"""`headstart evaluate`: measure how well a model predicts text, and how many of its drafts are accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from headstart.console import Progress, print_result, say
from headstart.errors import UsageError
from headstart.evaluation.settings import CodeSettings, LmEvalSettings, SuiteSettings, SummarySettings
from headstart.fileio import write_text
from headstart.hardware import use_threads
from headstart.reports.evaluation import format_evaluation, markdown_of, page_of

if TYPE_CHECKING:
    from headstart.data.tokenizers import Tokenizer
    from headstart.evaluation.suite_run import Subject
    from headstart.model.transformer import Transformer

TASKS = ("heads", "acceptance")
"""Tasks that are measured if none is named."""
SUITE_TOKENS = 256
"""Most tokens generated after each prompt of a suite if no number is given."""
ACCEPTANCE_PROMPTS = 200
"""Prompts of the task acceptance if no number is given."""
ALIASES = {"prompt_count": " (--limit)", "new_tokens": " (--max-new-tokens)"}
"""Second names of options, for messages."""
ACCEPTANCE_FILE = "acceptance.json"
"""File of a model directory with the measured acceptance, which `headstart inspect` shows."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Measure how well a model predicts text, head by head, and how many of its drafts are accepted."""

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: the model in the box); with --url the server's name of a model."""
    url: str | None = None
    """Ask a server with OpenAI's API (http://HOST:PORT/v1) instead of loading a model, for the suites of prompts."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md)."""
    tasks: tuple[str, ...] = TASKS
    """heads: bits per byte, top-1 accuracy and correct drafts of every head on the text, with teacher forcing;
    acceptance: drafts accepted while the model generates, greedily and sampled; spec-bench, mt-bench, gsm8k,
    humaneval-prompts, mbpp-prompts, prompts: tokens per pass and speed-up on named prompts, see --suite.file and the
    other --suite options; humaneval, mbpp, mbpp-sanitized,
    apps-introductory, codecontests: programs generated and run against tests, see --code.samples and the other --code
    options; gsm8k-answers: pass@k of final answers, with the same options; cnn-dailymail, multi-news, orangesum,
    pn-summary, samsum, thaisum, wikisummary, xsum: ROUGE of summaries, see the --summaries options; lm-eval:NAME: a
    task of EleutherAI's lm-eval, such as lm-eval:arc_easy."""
    text: tuple[str, ...] = ()
    """Files, folders, globs or hf:NAME, as for `headstart prepare`. Give text that the model was not trained on.
    The chat template writes conversations, of which only the answers count."""
    prompts: Path | None = None
    """.jsonl with "prompt", "text" or "messages" in each line, or text with a prompt a line, for the tasks acceptance
    and prompts (None: for acceptance the prompts in the model directory, or pieces of the text). The chat template
    writes conversations."""
    prompt_count: Annotated[int | None, arg(aliases=["--limit"])] = None
    """The largest number of prompts, in a suite spread over its categories (None: all of a suite, 200 for the task
    acceptance)."""
    prompt_tokens: int | None = None
    """Tokens of a piece of the text, and of the longest prompt of a file (None: 256, or half the model's context; for a
    file, what the context has room for)."""
    long_prompts: Literal["skip", "middle", "start"] | None = None
    """Treatment of longer prompts of a file: skip leaves them out, middle cuts out their middle, start keeps their
    start and leaves conversations out. They are counted (None: skip, and start if --prompt-tokens is given)."""
    new_tokens: Annotated[int | None, arg(aliases=["--max-new-tokens"])] = None
    """Tokens generated after each prompt (None: 256, or what the prompt leaves of the context)."""
    temperature: float = 0.8
    """Temperature of the sampled half of the task acceptance."""
    batch: int = 8
    """Prompts decoded together."""
    length: int | None = None
    """Tokens of a window of the task heads (None: the model's context)."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of the weights (None: that of `headstart generate`)."""
    quantize: Literal["q4", "q8"] | None = None
    """q4 or q8: evaluate the model as `headstart generate --quantize q4` decodes it."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: torch's choice)."""
    suite: SuiteSettings = field(default_factory=SuiteSettings)
    code: CodeSettings = field(default_factory=CodeSettings)
    summaries: SummarySettings = field(default_factory=SummarySettings)
    lm_eval: LmEvalSettings = field(default_factory=LmEvalSettings)
    out: Path | None = None
    """Folder for results.json, results.md and results.html, the figures of suites, and what an interrupted evaluation
    resumes from: the records of suites and the programs."""
    record: bool = False
    """Put the acceptance into the model directory, or that of the heads, for `headstart inspect`."""
    json: bool = False
    """Print the results as JSON."""


def run(settings: EvaluateSettings) -> None:
    """Evaluate, write the results that the settings name, and print them."""
    from headstart.formats.bundled import find_model
    from headstart.formats.hub import local_path

    use_threads(settings.threads)
    if settings.url is not None:
        found = evaluate_server(settings.url, settings)
    else:
        path, heads = find_model(settings.model, settings.heads_from)
        settings = replace(settings, heads_from=heads)
        if settings.record and path.is_file():
            raise UsageError(f"{path}: --record puts a file into a model directory, and this is a file; leave it out")
        found = evaluate(path, settings)
    if settings.out is not None:
        write(found, settings.out)
    if settings.record:
        record(found, path if settings.heads_from is None else local_path(settings.heads_from))
    print_result(found, settings.json, format_evaluation)


def evaluate(path: Path, settings: EvaluateSettings) -> dict[str, Any]:
    """Run the tasks on the model directory `path`, and return the results as plain data.

    Raises UsageError for settings out of range, an unknown task, or a model that cannot be evaluated.
    """
    from headstart.api import load
    from headstart.evaluation.code.problems import HUB
    from headstart.evaluation.code.run import run_code
    from headstart.evaluation.lm_eval_tasks import PREFIX, run_lm_eval
    from headstart.evaluation.suites import SUITES
    from headstart.evaluation.summaries import SETS, run_summaries

    _check(settings, (*TASKS, *SUITES, *HUB, *SETS))
    programs = [task for task in settings.tasks if task in HUB]
    foreign = [task.removeprefix(PREFIX) for task in settings.tasks if task.startswith(PREFIX)]
    suites = [task for task in settings.tasks if task in SUITES]
    summarized = [task for task in settings.tasks if task in SETS]
    named = {name: getattr(settings, name) for name in ("heads_from", "dtype", "quantize")}
    found: dict[str, Any] = {"model": str(path), **{name: value for name, value in named.items() if value}}
    if set(settings.tasks) & set(TASKS):
        found |= _heads_and_acceptance(path, settings)
    if programs or foreign or suites:
        model = load(path, settings.dtype, settings.device, settings.quantize, settings.heads_from)
        found["heads_of_model"] = model.config.heads
        name = str(path.resolve()) + "".join(f" in {how}" for how in (settings.dtype, settings.quantize) if how)
    if suites:
        from headstart.evaluation.suite_run import ModelSubject

        new_tokens = settings.new_tokens or min(SUITE_TOKENS, model.config.context // 2)
        subject = ModelSubject(model, settings.suite, new_tokens, settings.long_prompts or "skip")
        found |= _suites(suites, subject, settings, name)
    if foreign:
        found["lm_eval"] = run_lm_eval(model, foreign, settings.lm_eval, settings.batch)
    if programs:
        assert settings.out is not None
        found["code"] = {
            task: run_code(model, task, settings.code, settings.batch, settings.out, name) for task in programs
        }
    if summarized:
        assert settings.out is not None
        options = (settings.dtype, settings.device, settings.quantize, settings.heads_from)
        asked = (settings.summaries, settings.batch, settings.out)
        found["summaries"] = {
            task: run_summaries(lambda each: load(each, *options), path, task, *asked) for task in summarized
        }
    return found


def evaluate_server(url: str, settings: EvaluateSettings) -> dict[str, Any]:
    """Run suites on a server with OpenAI's API, and return the results as plain data.

    Raises UsageError for other tasks, settings out of range, and a server that does not answer.
    """
    from headstart.evaluation.suite_run import ServerSubject
    from headstart.evaluation.suites import SUITES

    other = next((task for task in settings.tasks if task not in SUITES), None)
    if other is not None:
        raise UsageError(f"the task {other} needs the model itself; with --url take {', '.join(SUITES)}")
    if settings.record:
        raise UsageError("--record puts a file into a model directory, and --url names none; leave it out")
    _check(settings, tuple(SUITES))
    subject = ServerSubject(url, settings.model, settings.new_tokens or SUITE_TOKENS)
    return {"model": f"{subject.model} at {url}"} | _suites(settings.tasks, subject, settings, subject.model)


def _check(settings: EvaluateSettings, tasks: tuple[str, ...]) -> None:
    """Raise UsageError for an unknown task, settings out of range, and settings that exclude each other."""
    from headstart.evaluation.code.problems import HUB
    from headstart.evaluation.lm_eval_tasks import PREFIX
    from headstart.evaluation.suites import SUITES
    from headstart.evaluation.summaries import SETS

    for task in settings.tasks:
        if task not in tasks and not task.startswith(PREFIX):
            raise UsageError(f"there is no task {task!r}; take {', '.join(tasks)} or {PREFIX}NAME")
    programs, suites, sets = ([task for task in settings.tasks if task in kind] for kind in (HUB, SUITES, SETS))
    if (programs or sets) and settings.out is None:
        raise UsageError(
            f"the task {(*programs, *sets)[0]} keeps what the model writes; name a folder for it with --out"
        )
    for option, kind, file, named in (
        ("code.source", "problems", settings.code.source, programs),
        ("suite.file", "prompts", settings.suite.file, suites),
        ("summaries.source", "documents", settings.summaries.source, sets),
    ):
        if len(named) > 1 and file is not None:
            raise UsageError(f"--{option} is for one set of {kind}, not for {' and '.join(named)}; run them apart")
    for name in ("prompt_count", "prompt_tokens", "new_tokens", "batch"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}{ALIASES.get(name, '')} is {value}; it must be at least 1")
    if settings.quantize and settings.record:
        raise UsageError("--record keeps the acceptance of the model as it is stored; leave --quantize out")
    if suites:
        from headstart.evaluation.suite_run import check

        check(settings.suite)
        if settings.long_prompts == "start":
            raise UsageError("--long-prompts start would cut off what a suite asks; take skip or middle")


def _suites(tasks: Sequence[str], subject: Subject, settings: EvaluateSettings, name: str) -> dict[str, Any]:
    """Run suites and return their results by name."""
    import torch

    from headstart import hardware
    from headstart.evaluation.suite_run import run_suite
    from headstart.evaluation.suites import SUITES

    same: dict[str, Any] = {"model": name, "heads_from": settings.heads_from, "device": settings.device}
    if settings.url is None:
        same["threads"] = torch.get_num_threads()
    if settings.out is None:
        say("without --out an interrupted evaluation of prompts starts again")
    machine = hardware.describe()
    found = {
        task: run_suite(
            SUITES[task],
            subject,
            replace(settings.suite, file=settings.prompts)
            if task == "prompts" and settings.prompts
            else settings.suite,
            settings.prompt_count,
            settings.out,
            same,
        )
        for task in tasks
    }
    return {"suites": found, "machine": machine, "machine_line": hardware.summary(machine)}


def _heads_and_acceptance(path: Path, settings: EvaluateSettings) -> dict[str, Any]:
    """Run the tasks heads and acceptance, as far as they are asked for."""
    import torch

    from headstart.decoding.kernels.pack import decoding_dtype, pack
    from headstart.evaluation.heads import score_documents
    from headstart.evaluation.inputs import Documents, read_documents, sizes
    from headstart.evaluation.settings import PROMPTS_FILE
    from headstart.formats.registry import load_model, load_model_tokenizer

    tokenizer = load_model_tokenizer(path)
    if tokenizer is None:
        raise UsageError(f"{path}: has no tokenizer to read text with; add a tokenizer.json to a directory")
    prompts = settings.prompts
    if prompts is None and (path / PROMPTS_FILE).is_file():
        prompts = path / PROMPTS_FILE
    free = "acceptance" in settings.tasks
    if not settings.text and ("heads" in settings.tasks or (free and prompts is None)):
        raise UsageError("name what to evaluate on: --text FILE, FOLDER ... (the task acceptance also takes --prompts)")
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model = load_model(path, dtype, settings.device, settings.heads_from)
    model = model.to(dtype or decoding_dtype(model, settings.quantize)).eval()
    if settings.quantize:  # the decoding form reads the text too
        model = pack(model, quantize=settings.quantize)
    length, new = sizes(settings.prompt_tokens, settings.new_tokens, model.config.context if free else None)
    found: dict[str, Any] = {"heads_of_model": model.config.heads}
    documents, size = read_documents(settings.text, tokenizer) if settings.text else (Documents(), 0)
    if "heads" in settings.tasks:
        total = sum(map(len, documents))
        with Progress("heads", total, unit="tokens") as bar:
            scores = score_documents(
                model,
                documents,
                size,
                length=settings.length,
                end_id=None if tokenizer.start_ids or documents.targets is not None else tokenizer.end_id,
                start_tokens=0 if documents.targets is not None else len(tokenizer.start_ids),
                progress=bar.advance,
                counted=documents.targets,
            )
        found["heads"] = {"text": list(settings.text), "documents": len(documents), **asdict(scores)}
    if free and model.config.drafting_heads == 1:
        say(f"{path}: has no drafting head, so the task acceptance has nothing to measure and is left out")
    elif free:
        if "heads" in settings.tasks:  # the rest takes longer
            say(format_evaluation({"model": str(path), **found}))
        found["acceptance"] = _acceptance(model, tokenizer, prompts, documents, settings, length, new)
    return found


def _acceptance(
    model: Transformer,
    tokenizer: Tokenizer,
    file: Path | None,
    documents: Sequence[Sequence[int]],
    settings: EvaluateSettings,
    length: int,
    new: int,
) -> dict[str, Any]:
    """Measure how many drafts are accepted after prompts of a file, or after pieces of `documents`."""
    from headstart.decoding.engine import Engine, EngineConfig
    from headstart.decoding.kernels.pack import pack
    from headstart.evaluation.free_running import run_freely
    from headstart.evaluation.inputs import cut_prompts, fitting_prompts, prompt_limit

    count = settings.prompt_count or ACCEPTANCE_PROMPTS
    counts: dict[str, int] = {}
    ends: Sequence[frozenset[int]] = ()
    if file is not None:
        limit = prompt_limit(settings.prompt_tokens, settings.long_prompts, new, model.config.context)
        given = fitting_prompts(file, tokenizer, *limit)
        prompts, ends = given.prompts[:count], given.ends[:count]
        counts = {"skipped_prompts": given.skipped, "cut_prompts": given.cut}
        length = max(map(len, prompts))
    else:
        prompts = cut_prompts(documents, count, length, new)
    packed, slots = model if settings.quantize else pack(model), min(settings.batch, len(prompts))
    engine = Engine(packed, EngineConfig(slots=slots, prefill_budget=None), tokenizer=tokenizer)
    found: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": length, "new_tokens": new, **counts}
    for name, temperature in (("greedy", 0.0), (f"temperature {settings.temperature:g}", settings.temperature)):
        with Progress(f"acceptance, {name}", len(prompts), unit="prompts") as bar:
            found[name] = asdict(run_freely(engine, prompts, new, temperature, bar.advance, ends))
        say(f"acceptance, {name}: {found[name]['tokens_per_pass']:.2f} tokens per pass")
    return found


def write(found: dict[str, Any], out: Path) -> None:
    """Write OUT/results.json, OUT/results.md, OUT/results.html, and OUT/SUITE.png for each suite of prompts."""
    from headstart.reports.suites import draw_png, has_matplotlib

    write_text(out / "results.json", json.dumps(found, indent=2) + "\n")
    pictures = {task: f"{task}.png" for task in found.get("suites", {})} if has_matplotlib() else {}
    for task, name in pictures.items():
        draw_png(task, found["suites"][task], out / name)
    write_text(out / "results.md", markdown_of(found, pictures) + "\n")
    write_text(out / "results.html", page_of(found, bool(pictures)))
    files = ("results.json", "results.md", "results.html", *pictures.values())
    say(f"results: {', '.join(str(out / name) for name in files)}")


def record(found: dict[str, Any], path: Path) -> None:
    """Put the acceptance into the directory of the model or its heads, for `headstart inspect`."""
    write_text(path / ACCEPTANCE_FILE, json.dumps(acceptance_of(found), indent=2) + "\n")
    say(f"recorded: {path / ACCEPTANCE_FILE}")


def acceptance_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return tokens per pass and the shares of drafts accepted, head 2 first, for each way of running."""
    ways: dict[str, Any] = {}
    if "heads" in found:
        heads = found["heads"]
        ways["on text, teacher-forced"] = {
            "tokens_per_pass": heads["tokens_per_pass"][-1],
            "acceptance": heads["prefix"],
        }
    for name, way in found.get("acceptance", {}).items():
        if isinstance(way, dict):
            ways[f"free-running, {name}"] = {
                key: way[key] for key in ("tokens_per_pass", "acceptance", "repeated_8_grams")
            }
    return ways
