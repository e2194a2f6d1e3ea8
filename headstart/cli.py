"""The commands: one function each, which only calls its room. What is around them is in `entry.py`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from headstart.errors import UsageError

# torch is imported inside the commands: `headstart --help` answers at once.


def _threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)


def _print_json(result: object) -> None:
    print(json_module.dumps(result, indent=2, default=str))


def demo(
    out: Path = Path("runs/demo"),
    minutes: float = 3.5,
    seed: int = 0,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Train and decode on an embedded corpus, with a report.

    Args:
        out: run folder; the report is OUT/report.html. A finished demo is trained anew.
        minutes: how long to train; decoding takes about one minute more.
        seed: of weights, data order and sampling.
        threads: CPU threads (default: all cores).
        json: print the results as JSON.
    """
    from headstart.demo.run import run_demo

    _threads(threads)
    result = run_demo(out, minutes=minutes, seed=seed)
    if json:
        _print_json(result)


def prepare(
    sources: Positional[tuple[str, ...]] = (),
    *,
    out: Path,
    tokenizer: str = "bytes",
    train_bpe: int | None = None,
    text_field: str = "text",
    split: str = "train",
    hf_config: str | None = None,
    validation_fraction: float | None = None,
    validation_sources: tuple[str, ...] = (),
    seed: int = 0,
    workers: int | None = None,
    verify: bool = False,
    json: bool = False,
) -> None:
    """Turn text, code and datasets into token shards for training.

    Stopped or killed, the same command goes on where it was; other arguments start anew.

    Args:
        sources: files, folders, globs, python-stdlib (the sources of the running interpreter), hf:NAME (a dataset of
            the Hugging Face hub, streamed) or hf:FOLDER. In folders too, .jsonl, .jsonl.gz, .jsonl.zst and
            .parquet hold a document in each line or row; every other file is one document of text.
        out: folder to write; it must not exist or be an earlier preparation.
        tokenizer: bytes, a tokenizer.json, a directory that holds one, or a hub id OWNER/NAME.
        train_bpe: learn a byte-level BPE vocabulary of this size from the sources, instead of --tokenizer.
        text_field: the field or column that holds the text; a.b is field b within a.
        split: the split to take from hf: datasets.
        hf_config: the configuration to take of hf: datasets.
        validation_fraction: share of the documents held out (default: 0.02, or none where sources are held out).
        validation_sources: sources that are held out whole, also where one of SOURCES contains them.
        seed: chooses the documents held out.
        workers: processes (default: all cores); the output does not depend on it.
        verify: prepare nothing; read the folder --out and name its damaged files, exit status 1 if there are any.
        json: print the manifest as JSON.
    """
    from headstart.data import shards
    from headstart.data.bpe import NewBpe
    from headstart.data.hub_datasets import is_dataset
    from headstart.data.tokenizers import load_tokenizer
    from headstart.data.units import Selection
    from headstart.machine import cores
    from headstart.terminal import Progress, say

    if verify:
        if sources:
            raise UsageError(f"{sources[0]}: --verify takes no source; it reads the folder --out")
        faults = shards.verify(out)
        for fault in faults:
            say(fault)
        say(f"{out}: {len(faults)} damaged" if faults else f"{out}: every file is as prepare wrote it")
        raise SystemExit(1 if faults else 0)
    if train_bpe is not None and tokenizer != "bytes":
        raise UsageError("--train-bpe and --tokenizer: give one of the two")
    fraction = (0.0 if validation_sources else 0.02) if validation_fraction is None else validation_fraction
    unit = "documents" if any(map(is_dataset, (*sources, *validation_sources))) else "bytes"
    with Progress("prepare", unit=unit) as bar:
        manifest = shards.prepare(
            sources,
            out,
            load_tokenizer(tokenizer) if train_bpe is None else NewBpe(train_bpe),
            selection=Selection(text_field, split, hf_config),
            validation_fraction=fraction,
            validation_sources=validation_sources,
            seed=seed,
            workers=cores() if workers is None else workers,
            progress=bar.update,
            report=say,
        )
    for name, content in manifest["splits"].items():
        say(f"{name}: {content['documents']:,} documents, {content['tokens']:,} tokens")
    say(f"prepared: {out}")
    if json:
        _print_json(manifest)


def train(arguments: list[str]) -> None:
    """Train a model from a configuration: headstart train CONFIG.yaml [--run-dir DIR] [--steps N] [--a.b value].

    --profile records three steps for torch.profiler, see --profile.start and --profile.steps below.
    With --dry-run nothing is trained: tokens, memory and time are estimated, see headstart train CONFIG.yaml --dry-run
    --help.
    """
    from headstart.terminal import say
    from headstart.training.config import RunConfig, load_config
    from headstart.training.interruption import Interrupted
    from headstart.training.loop import train as run
    from headstart.training.processes import LostProcesses

    if arguments and arguments[0] in ("-h", "--help"):
        print(train.__doc__)
        print("Every setting of the file can be given as a flag over it:\n")
        tyro.cli(RunConfig, prog="headstart train CONFIG.yaml", args=["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("train needs a configuration file: headstart train CONFIG.yaml (configs/smoke.yaml is one)")
    if "--dry-run" in arguments:
        from headstart.training.dry_run import dry_run, format_dry_run

        rest = [argument for argument in arguments[1:] if argument not in ("--dry-run", "--json")]
        found = dry_run(Path(arguments[0]), rest)
        _print_json(found) if "--json" in arguments else print(format_dry_run(found))
        return
    settings = arguments[1:]
    if "--profile" in settings:
        settings = [*(setting for setting in settings if setting != "--profile"), "--profile.steps", "3"]
    try:
        run(load_config(Path(arguments[0]), settings))
    except (Interrupted, LostProcesses) as end:
        say(f"headstart: {end}")
        raise SystemExit(end.status) from None


def generate(
    model: Positional[str | None] = None,
    *,
    prompt: str,
    max_new_tokens: int = 200,
    heads: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    acceptance: str = "match",
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    json_schema: str | None = None,
    regex: str | None = None,
    logprobs: int | None = None,
    lookup: int = 0,
    tree: str | None = None,
    exact: bool = True,
    dtype: Literal["bfloat16", "float32"] | None = None,
    quantize: Literal["int8"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    stats: bool = False,
    show: bool = False,
    json: bool = False,
) -> None:
    """Continue a prompt with a model directory, streaming the text.

    Args:
        model: a model directory (default: the model in the box).
        prompt: text to continue; - reads it from standard input.
        max_new_tokens: at most this many tokens.
        heads: how many heads decode, 1 being plain decoding (default: those worth it by what `headstart tune` measured;
            without that all). The output does not depend on it.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens (0: all).
        top_p: keep the most probable tokens that reach this probability together (1: all).
        min_p: keep tokens at least this probable relative to the best (0: all).
        seed: of the sampling noise.
        stop: strings that end the text.
        acceptance: which drafts are kept: match (the text of plain decoding), rejection or block (lossless in
            distribution, more are kept), or lossy-typical, lossy-top-k:3, lossy-distance, lossy-minimum.
        repetition_penalty: divides positive logits of tokens in prompt and text, multiplies negative ones (1: none).
        presence_penalty: taken once from the logits of tokens in the text.
        frequency_penalty: taken from the logit of a token as often as the text holds it.
        json_schema: write JSON that satisfies this schema: a file, or the schema itself.
        regex: write text that this regular expression matches whole.
        logprobs: with --json, the log-probability of each token and of this many most probable ones.
        lookup: at most this many drafts of a pass are looked up in the text itself.
        tree: windows are trees of several candidates of each head: of this many drafts, or with nodes given as ranks,
            0,1,0.0; 0: chains (default: what `headstart tune --tree-nodes` found best).
        exact: bit-identical output for every number of heads; --no-exact is the fastest path, equal up to rounding.
        dtype: bfloat16 or float32 (default: as stored; float32 on a CPU without instructions for bfloat16).
        quantize: int8: weights and activations of all products in 8 bits, on CPUs; faster, not quite the same model.
        device: cpu, cuda, ...
        threads: CPU threads (default: torch's choice; `headstart doctor` says which is best).
        stats: print tokens per pass, acceptance and speed afterwards, to standard error.
        show: print the prompt too, and each token in the colour of the head that drafted it.
        json: print text, tokens and statistics as JSON instead of streaming.
    """
    import headstart
    from headstart.decoding.acceptance import Rule
    from headstart.decoding.constraints import Constraint
    from headstart.decoding.generation import Request
    from headstart.decoding.origins import OriginStream
    from headstart.decoding.penalties import Penalties
    from headstart.decoding.sampling import Sampling
    from headstart.storage.boxed import model_directory
    from headstart.terminal import ColouredText, say

    _threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = headstart.load(model_directory(model), dtype=dtype, device=device, quantize=quantize)
    request = Request(
        prompt=tuple(loaded.tokenizer.encode(text)),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, seed),
        heads=heads,
        acceptance=Rule.parse(acceptance),
        penalties=Penalties(repetition_penalty, presence_penalty, frequency_penalty),
        constraint=Constraint.named(json_schema, regex),
        logprobs=logprobs,
        stop=stop,
    )
    context = min(loaded.config.context, len(request.prompt) + max_new_tokens)
    engine = loaded.engine(1, context, exact, lookup, tree=tree)
    generation = engine.submit(request)
    if show and not json:
        coloured, origins = ColouredText(), OriginStream(generation, loaded.tokenizer)
        coloured.legend("drafted by", loaded.config.heads)
        coloured.prompt(text)
        for _ in engine.run():
            for piece, head in origins.new():
                coloured.piece(piece, head)
    for _, piece in engine.run():  # nothing is left of what was shown
        if not json:
            print(piece, end="", flush=True)
    result = generation.stats
    if json:
        summary = result.summary() | {"finish_reason": generation.finish_reason}
        shown = {"text": generation.text, "tokens": generation.tokens, "stats": summary}
        if logprobs is not None:
            shown |= {"logprobs": generation.logprobs, "top_logprobs": generation.top_logprobs}
        _print_json(shown)
        return
    print()
    if stats:
        shares = "  ".join(f"head {k} {share:.0%}" for k, share in enumerate(result.acceptance, start=2))
        say(
            f"{result.tokens} tokens in {result.passes} passes of {result.rows_per_pass:.1f} rows: "
            f"{result.tokens_per_pass:.2f} tokens per pass, {result.tokens_per_second:.0f} tokens/s "
            f"({generation.finish_reason})"
        )
        if shares:
            say(f"accepted drafts: {shares}")


def _measure(
    command: str, arguments: list[str], settings_type: Any, run: Callable[[Any], Any], text: Callable[[Any], str]
) -> None:
    """A command that parses `arguments` into its settings, and prints what it finds (--json: as JSON)."""
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    settings = tyro.cli(settings_type, prog=f"headstart {command}", args=arguments)
    _threads(settings.threads)
    found = run(settings)
    _print_json(found) if json else print(text(found))


def evaluate(arguments: list[str]) -> None:
    """Measure what a model knows of a text, head by head, and how many of its drafts are right."""
    from headstart.evaluation import run

    _measure("evaluate", arguments, run.EvaluateSettings, run.run, run.format_evaluation)


def tune(arguments: list[str]) -> None:
    """Measure what drafts are worth and what a pass costs here, for decoding to choose by."""
    from headstart import tuning

    _measure("tune", arguments, tuning.TuneSettings, tuning.tune, tuning.format_tuning)


def inspect(model: Positional[str | None] = None, json: bool = False) -> None:
    """Show what a model directory holds: sizes, heads, wiring, acceptance.

    Args:
        model: a model directory, or one of the paper's sizes (1M, 3M, ... 6.7B, 13B) (default: the model in the box).
        json: print it as JSON.
    """
    from headstart.inspection import format_inspection
    from headstart.inspection import inspect as inspect_model
    from headstart.storage.boxed import model_directory

    found = inspect_model(model_directory(None) if model is None else model)
    _print_json(found) if json else print(format_inspection(found))


def compare(runs: Positional[list[Path]], out: Path | None = None, json: bool = False) -> None:
    """Lay runs over one another: losses, speed, settings that differ, on one HTML page.

    Args:
        runs: run folders; those still going on too, and one alone.
        out: the page to write (default: runs/comparison.html; with --json none).
        json: print final numbers and differing settings as JSON.
    """
    from headstart.comparison.report import compare as compare_runs
    from headstart.comparison.report import format_comparison
    from headstart.terminal import say

    page = Path("runs/comparison.html") if out is None and not json else out
    result = compare_runs(runs, page)
    _print_json(result) if json else print(format_comparison(result))
    if page is not None:
        say(f"page: {page}")


def doctor(model: Positional[str | None] = None, json: bool = False) -> None:
    """Look at machine, versions and threads; with a model, check that speculation equals plain decoding.

    Args:
        model: a model directory.
        json: print the findings as JSON.
    """
    from headstart.doctor import diagnose, format_diagnosis

    found = diagnose(model)
    _print_json(found) if json else print(format_diagnosis(found))
    if any(finding["status"] == "fail" for finding in found["findings"]):
        raise SystemExit(1)


def bench(arguments: list[str]) -> None:
    """Measure what it costs: headstart bench loss|train|decode [--out DIR] [--json] [settings]."""
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(bench.__doc__)
        return
    from headstart.benchmarks import decode, loss, report
    from headstart.benchmarks import train as training

    benchmarks: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
        "loss": (loss.LossSettings, loss.run),
        "train": (training.TrainSettings, training.run),
        "decode": (decode.DecodeSettings, decode.run),
    }
    if arguments[0] not in benchmarks:
        raise UsageError(f"there is no benchmark {arguments[0]!r}; take one of {', '.join(benchmarks)}")
    settings_type, run = benchmarks[arguments[0]]
    settings = tyro.cli(settings_type, prog=f"headstart bench {arguments[0]}", args=arguments[1:])
    result = run(settings)
    report.write(result, settings.out)
    _print_json(result) if json else print(report.format_markdown(result))


# These parse their own arguments: what they take depends on the first one.
RAW = (train, evaluate, tune, bench)
COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (demo, prepare, train, compare, generate, evaluate, tune, inspect, doctor, bench)
}
