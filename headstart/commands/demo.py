"""`headstart demo`: train a byte-level model with 8 heads on the embedded corpus, decode with it, write a report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

import headstart
from headstart.api import LanguageModel
from headstart.commands.demo_decoding import compare, sample
from headstart.console import Progress, duration, print_json, say, show_pieces, table
from headstart.data.batches import BatchStream
from headstart.data.shards import TokenShards
from headstart.decoding.settings import Sampling
from headstart.errors import UsageError
from headstart.evaluation.texts import PROMPTS_FILE, cut_prompts, read_prompts
from headstart.fileio import write_text
from headstart.formats.bundled import boxed_model
from headstart.hardware import describe, dtype_on, use_threads
from headstart.model.config import ModelConfig
from headstart.reports.demo import BOXED, Decoded, DecodingRow, DemoReport, write_report
from headstart.training.config import BatchConfig, CheckpointConfig, DataConfig, RunConfig, ValidationConfig
from headstart.training.loop import build_model, train
from headstart.training.optimizer import OptimizerConfig, build_optimizers
from headstart.training.processes import Processes
from headstart.training.run_folder import RunFolder
from headstart.training.step import train_step
from headstart.training.trackers import WatchConfig

HEADS = (1, 2, 4, 8)
PROMPTS, PROMPT_BYTES, NEW_BYTES = 12, 128, 128
TEMPERATURE = 0.8
MOST_STEPS = 20_000
"""However fast the machine: past this the little model has read its corpus several times."""


@dataclass(frozen=True)
class DemoSettings:
    """Train a small model on Python's own sources, decode with it, and write a report."""

    out: Path = Path("runs/demo")
    """Run folder; the report is OUT/report.html. A finished demo is trained again."""
    minutes: float = 3.5
    """How long to train; decoding takes about one minute more."""
    seed: int = 0
    """Seed of weights, data order and sampling."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    json: bool = False
    """Print the results as JSON."""


def run(settings: DemoSettings) -> None:
    """Run the demo and say where the report is."""
    use_threads(settings.threads)
    result = run_demo(settings.out, minutes=settings.minutes, seed=settings.seed)
    if settings.json:
        print_json(result)


def demo_config(out: Path, steps: int, seed: int) -> RunConfig:
    """The demo's settings: what learned most in a few minutes on two cores (docs/lab-notes.md)."""
    return RunConfig(
        steps=steps,
        run_dir=out,
        seed=seed,
        device="cpu",
        dtype=dtype_on("cpu"),
        compile=False,  # its steps are timed before it is known how many there will be
        model=ModelConfig(
            vocab_size=256, dim=128, layers=4, attention_heads=4, heads=8, head_kind="replicated", context=256
        ),
        data=DataConfig(sources=("python-stdlib",)),
        batch=BatchConfig(rows=16, length=128),
        optimizer=OptimizerConfig(kind="muon", lr=1.5e-2, warmup_steps=min(40, steps // 4), final_lr_ratio=0.05),
        validation=ValidationConfig(every=max(1, steps // 5), rows=64),
        checkpoints=CheckpointConfig(every=max(1, steps // 3), keep_last=1),
        watch=WatchConfig(sample_tokens=0),  # it writes enough when it has been trained
    )


def run_demo(out: Path, *, minutes: float = 3.5, seed: int = 0) -> dict[str, Any]:
    """Runs the whole demo in the run folder `out`; returns what the report holds, as plain data."""
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes}; it must be above 0")
    began = time.monotonic()
    say("Headstart demo: train a small byte-level model with 8 heads, then decode several bytes per pass, losslessly.")
    say("1. Training on the Python standard library's sources")
    config, seconds = _fit_to_time(_fresh(demo_config(out, 1, seed)), minutes)
    say(f"   {seconds * 1000:.0f} ms a step on this machine: {config.steps:,} steps in about {minutes:g} minutes")
    train(config)

    say("2. Decoding held-out code: plainly, and with 2, 4 and 8 heads")
    threads = torch.get_num_threads()
    # A model this small gains nothing from a second thread, and suffers where the other core is busy.
    torch.set_num_threads(1)
    try:
        decoded = _decode(config)
    finally:
        torch.set_num_threads(threads)
    training, validation = _metrics(config.run_dir)
    report = DemoReport(
        machine=_machine(threads),
        settings=_settings(config, minutes),
        training=training,
        validation=validation,
        **decoded,
    )
    _show(report)
    write_text(out / "results.json", json.dumps(asdict(report), indent=2) + "\n")
    write_report(out / "report.html", report)
    say(f"done in {duration(time.monotonic() - began)}; the model is in {out / 'model'}")
    say(f"report: {out / 'report.html'}")
    models: list[Decoded] = [report, *([report.boxed] if report.boxed else [])]
    if not all(row.identical for model in models for row in [*model.decoding, *model.sampled]):
        raise SystemExit("headstart: outputs were NOT identical; please report this with results.json")
    return asdict(report)


def _fresh(config: RunConfig) -> RunConfig:
    """An earlier demo in the folder makes room: its steps were counted for another moment of this machine."""
    folder = RunFolder(config.run_dir)
    if folder.config.exists() and (config.run_dir / "metrics.jsonl").exists():
        say(f"   {config.run_dir} holds an earlier demo, which is replaced (its prepared data is kept)")
        for old in (folder.checkpoints, folder.model):
            shutil.rmtree(old, ignore_errors=True)
        for file in (folder.metrics, folder.config, config.run_dir / "report.html", config.run_dir / "results.json"):
            file.unlink(missing_ok=True)
    elif config.run_dir.exists() and any(config.run_dir.iterdir()):
        leftovers = {path.name for path in config.run_dir.iterdir()} - {"data", "config.yaml", "checkpoints", ".lock"}
        if leftovers:
            raise UsageError(f"{config.run_dir}: holds something else ({min(leftovers)}); give another --out")
    return config


def _fit_to_time(config: RunConfig, minutes: float) -> tuple[RunConfig, float]:
    """The configuration with as many steps as fit into `minutes`, judged by a few trial steps."""
    folder = RunFolder(config.run_dir)
    with folder.claimed():
        folder.prepare_shards(config, Progress)
        (source,) = folder.open_sources(config)
    alone = Processes(torch.device("cpu"))
    model, sums = build_model(config, alone)
    optimizers = build_optimizers(model, config.optimizer, alone.device, config.dtype)
    stream = BatchStream(
        source.train, rows=config.batch.rows, length=config.length, heads=config.model.heads, seed=config.seed
    )
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        batches, weights = list(islice(stream, 1)), [1.0] * config.model.heads
        train_step(model, optimizers, batches, weights, 0.0, config, alone, sums)
        seconds.append(time.perf_counter() - began)
    step = median(seconds[2:])
    steps = max(10, min(MOST_STEPS, int(minutes * 60 / (1.04 * step))))  # 4 %: validation and saving
    return demo_config(config.run_dir, steps, config.seed), step


def _decode(config: RunConfig) -> dict[str, Any]:
    """The report's parts about decoding: the model just trained and the model in the box, with the same prompts."""
    model = headstart.load(config.run_dir / "model")
    box = _boxed()
    if box is None:
        shards = TokenShards.open(config.run_dir / "data", "validation")
        documents = [shards.document(d) for d in range(len(shards.documents))]
        prompts = cut_prompts(documents, PROMPTS, PROMPT_BYTES, NEW_BYTES)
    else:
        # The model in the box has read all of the demo's corpus: its own prompts are new to both.
        prompts = read_prompts(box / PROMPTS_FILE, model.tokenizer, PROMPT_BYTES)
        prompts = [prompts[i * len(prompts) // PROMPTS] for i in range(PROMPTS)]
    boxed = None if box is None else _decode_with(headstart.load(box), prompts)
    return {**vars(_decode_with(model, prompts)), "boxed": boxed}


def _boxed() -> Path | None:
    try:
        return boxed_model()
    except UsageError as error:
        say(f"   {error}; left out")
        return None


def _decode_with(model: LanguageModel, prompts: list[tuple[int, ...]]) -> Decoded:
    compare(model, prompts[:1], 16, 0.0, HEADS)  # the first passes of a process are slower
    greedy, fastest, greedy_repeated = compare(model, prompts, NEW_BYTES, 0.0, HEADS)
    sampled, _, sampled_repeated = compare(model, prompts, NEW_BYTES, TEMPERATURE, HEADS)
    middle = prompts[len(prompts) // 2]
    return Decoded(
        decoding=greedy,
        fastest_plain=fastest,
        sampled=sampled,
        samples=[
            sample(model, middle, NEW_BYTES, Sampling()),
            sample(model, middle, NEW_BYTES, Sampling(temperature=TEMPERATURE, seed=1)),
        ],
        repeated={"greedy": greedy_repeated, "sampled": sampled_repeated},
    )


def _metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [x for x in lines if "loss/head1" in x], [x for x in lines if "validation/loss/head1" in x]


def _settings(config: RunConfig, minutes: float) -> dict[str, str | int | float]:
    model = config.model
    return {
        "parameters": model.parameters()["total"],
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "head kind": model.head_kind,
        "optimiser": config.optimizer.kind,
        "learning rate": config.optimizer.lr,
        "steps": config.steps,
        "bytes seen": config.steps * config.tokens_per_step,
        "minutes": minutes,
        "prompts": PROMPTS,
        "prompt bytes": PROMPT_BYTES,
        "new bytes": NEW_BYTES,
        "seed": config.seed,
    }


def _machine(threads: int) -> dict[str, str | int | float]:
    found = {name: value for name, value in describe().items() if isinstance(value, (str, int, float))}
    return {**found, "training threads": threads, "decoding threads": 1}


def _show(report: DemoReport) -> None:
    def rows(title: str, decoded: list[DecodingRow], otherwise: str = "NO") -> list[list[str]]:
        return [
            [
                title,
                str(row.heads),
                f"{row.tokens_per_second:.0f}",
                f"{row.tokens_per_pass:.2f}",
                f"{row.speedup:.2f}",
                "yes" if row.identical else otherwise,
            ]
            for row in decoded
        ]

    lines: list[list[str]] = []
    loops = []
    for name, decoded in (("just trained", report), (BOXED, report.boxed)):
        if decoded is None:
            continue
        lines += rows(f"{name}, greedy", decoded.decoding) + rows(f"{name}, sampled", decoded.sampled)
        if decoded.fastest_plain is not None:
            lines += rows(f"{name}, greedy, exact=False", [decoded.fastest_plain], "up to rounding")
        loops.append(f"{name} {decoded.repeated['greedy']:.0%} greedy, {decoded.repeated['sampled']:.0%} sampled")
    table(["decoding", "heads", "tokens/s", "tokens per pass", "speed-up", "output identical"], lines)
    say(f"sampled: at temperature {TEMPERATURE}. Repeated 8-grams: {'; '.join(loops)}. Loops are easily drafted: where")
    say("there are many, tokens per pass flatter the model.")
    _show_sample(report)
    last = report.validation[-1] if report.validation else {}
    if last:
        say(
            f"held-out code: {last['validation/bits_per_byte/head1']:.2f} bits per byte with head 1. So small a model "
            "accepts few drafts; the paper's 7B byte model reaches 7.04 bytes per pass and 6.39 times the speed."
        )


def _show_sample(report: DemoReport) -> None:
    """A text of the best model there is, each byte in the colour of the head that drafted it, where colours show."""
    sample = (report.boxed or report).samples[0]
    show_pieces(
        f"written by the {BOXED if report.boxed else 'model just trained'}, greedily", sample.prompt, sample.pieces
    )
