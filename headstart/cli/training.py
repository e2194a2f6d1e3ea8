"""Commands that make models: demo, prepare, train, compare."""

from __future__ import annotations

from pathlib import Path

import tyro
from tyro.conf import Positional

from headstart.cli.common import print_json, use_threads
from headstart.errors import UsageError


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
    from headstart.commands.demo import run_demo

    use_threads(threads)
    result = run_demo(out, minutes=minutes, seed=seed)
    if json:
        print_json(result)


def prepare(
    sources: Positional[tuple[str, ...]] = (),
    *,
    out: Path,
    tokenizer: str = "bytes",
    train_bpe: int | None = None,
    text_field: str = "text",
    conversations: bool = False,
    each_answer: bool = False,
    rewards: bool = False,
    split: str = "train",
    hf_config: str | None = None,
    validation_fraction: float | None = None,
    validation_sources: tuple[str, ...] = (),
    seed: int = 0,
    deduplicate: bool = False,
    literal: bool = False,
    workers: int | None = None,
    verify: bool = False,
    json: bool = False,
) -> None:
    """Turn text, code and datasets into token shards for training.

    Stopped or killed, the same command resumes where it was; other arguments start anew.

    Args:
        sources: files, folders, globs, python-stdlib (the sources of the running interpreter), hf:NAME (a dataset of
            the Hugging Face hub, streamed) or hf:FOLDER. In folders too, .jsonl, .jsonl.gz, .jsonl.zst and
            .parquet hold a document in each line or row; every other file is one document of text.
        out: folder to write; it must not exist or be an earlier preparation.
        tokenizer: bytes, a tokenizer.json, a directory that holds one, or a hub id OWNER/NAME.
        train_bpe: learn a byte-level BPE vocabulary of this size from the sources, instead of --tokenizer.
        text_field: the field or column that holds the text; a.b is field b within a.
        conversations: the field holds conversations (looked for in messages and conversations); they are written as the
            tokenizer's chat template has them, and only what the assistant wrote is trained on.
        each_answer: of a conversation is a document, with what comes before it: for chat templates that write a
            conversation otherwise once more follows.
        rewards: rows are problems in the form of CodeContests; each of their Python programs is a document, with the
            problem and a line that says whether it is correct or incorrect before it.
        split: the split to take from hf: datasets.
        hf_config: the configuration to take of hf: datasets.
        validation_fraction: share of the documents held out (default: 0.02, or none where sources are held out).
        validation_sources: sources that are held out whole, also where one of SOURCES contains them.
        seed: chooses the documents held out.
        deduplicate: leave out documents that equal or nearly equal an earlier one; without it they are counted.
        literal: special tokens that a document spells stay text (always so with --train-bpe).
        workers: processes (default: all cores); the output does not depend on it.
        verify: prepare nothing; read the folder --out and name its damaged files, exit status 1 if there are any.
        json: print the manifest as JSON.
    """
    from headstart.console import Progress, say
    from headstart.data import shards
    from headstart.data.manifest import read_manifest, sealed
    from headstart.data.prepare.bpe import NewBpe
    from headstart.data.prepare.hub import is_dataset
    from headstart.data.prepare.units import Selection
    from headstart.formats.huggingface import load_data_tokenizer
    from headstart.hardware import cores

    if verify:
        if sources:
            raise UsageError(f"{sources[0]}: --verify takes no source; it reads the folder --out")
        faults = shards.verify(out)
        for fault in faults:
            say(fault)
        whole = (
            "every file is" if sealed(read_manifest(out)) else "the tokens are (an older Headstart recorded no more)"
        )
        say(f"{out}: {len(faults)} damaged" if faults else f"{out}: {whole} as prepare wrote it")
        raise SystemExit(1 if faults else 0)
    if train_bpe is not None and tokenizer != "bytes":
        raise UsageError("--train-bpe and --tokenizer: give one of the two")
    fraction = (0.0 if validation_sources else 0.02) if validation_fraction is None else validation_fraction
    unit = "documents" if any(map(is_dataset, (*sources, *validation_sources))) else "bytes"
    with Progress("prepare", unit=unit) as bar:
        manifest = shards.prepare(
            sources,
            out,
            load_data_tokenizer(tokenizer) if train_bpe is None else NewBpe(train_bpe),
            selection=Selection(text_field, split, hf_config, conversations, each_answer, rewards),
            validation_fraction=fraction,
            validation_sources=validation_sources,
            seed=seed,
            workers=cores() if workers is None else workers,
            deduplicate=deduplicate,
            literal=literal,
            progress=bar.update,
            report=say,
        )
    for name, content in manifest["splits"].items():
        answers = sum(shard["targets"]["count"] for shard in content["shards"] if "targets" in shard)
        share = f", {answers:,} of them answers" if conversations else ""
        say(f"{name}: {content['documents']:,} documents, {content['tokens']:,} tokens{share}")
    say(f"prepared: {out}")
    if json:
        print_json(manifest)


def train(arguments: list[str]) -> None:
    """Train a model from a configuration: headstart train CONFIG.yaml [--run-dir DIR] [--steps N] [--a.b value].

    --profile records three steps for torch.profiler, see --profile.start and --profile.steps below.
    With --dry-run nothing is trained: tokens, memory and time are estimated, see headstart train CONFIG.yaml --dry-run
    --help.
    """
    from headstart.console import say
    from headstart.training.config import RunConfig, load_config
    from headstart.training.interruption import Interrupted
    from headstart.training.loop import train as run
    from headstart.training.processes import LostProcesses

    if arguments and arguments[0] in ("-h", "--help"):
        print(train.__doc__)
        print("Every setting of the file can be given as a flag over it:\n")
        once = (tyro.conf.AvoidSubcommands,)
        tyro.cli(RunConfig, prog="headstart train CONFIG.yaml", args=["--help"], config=once)
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("train needs a configuration file: headstart train CONFIG.yaml (configs/smoke.yaml is one)")
    if "--dry-run" in arguments:
        from headstart.training.estimate import dry_run, format_dry_run

        rest = [argument for argument in arguments[1:] if argument not in ("--dry-run", "--json")]
        found = dry_run(Path(arguments[0]), rest)
        print_json(found) if "--json" in arguments else print(format_dry_run(found))
        return
    settings = arguments[1:]
    if "--profile" in settings:
        settings = [*(setting for setting in settings if setting != "--profile"), "--profile.steps", "3"]
    try:
        run(load_config(Path(arguments[0]), settings))
    except (Interrupted, LostProcesses) as end:
        say(f"headstart: {end}")
        raise SystemExit(end.status) from None


def compare(runs: Positional[list[Path]], out: Path | None = None, json: bool = False) -> None:
    """Lay runs over one another: losses, speed, settings that differ, on one HTML page.

    Args:
        runs: run folders; those still going on too, and one alone.
        out: the page to write (default: runs/comparison.html; with --json none).
        json: print final numbers and differing settings as JSON.
    """
    from headstart.console import say
    from headstart.reports.compare import compare as compare_runs
    from headstart.reports.compare import format_comparison

    page = Path("runs/comparison.html") if out is None and not json else out
    result = compare_runs(runs, page)
    print_json(result) if json else print(format_comparison(result))
    if page is not None:
        say(f"page: {page}")
