"""Train a byte-level model with 8 heads on the embedded corpus, decode with it, and write the demo's report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import headstart
from headstart.api import LanguageModel
from headstart.console import duration, say, show_pieces, table
from headstart.data.shards import TokenShards
from headstart.decoding.engine import generate_all
from headstart.decoding.generation import Generation, OriginStream, Stats
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.free_running import repeated
from headstart.evaluation.inputs import cut_prompts, read_prompts
from headstart.evaluation.settings import PROMPTS_FILE
from headstart.fileio import write_text
from headstart.formats.bundled import boxed_model
from headstart.hardware import describe, dtype_on
from headstart.model.config import ModelConfig
from headstart.reports.demo import BOXED, Decoded, DecodingRow, DemoReport, Sample, write_report
from headstart.training.config import BatchConfig, CheckpointConfig, DataConfig, RunConfig, ValidationConfig
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.run_folder import RunFolder
from headstart.training.trackers import WatchConfig

TEMPERATURE = 0.8
MAX_STEPS = 20_000
"""Most steps on any machine: after these the small model has read its corpus several times."""


@dataclass(frozen=True)
class DecodingSizes:
    """Sizes of the decoding half: prompts, new bytes, numbers of heads."""

    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads to decode with; the first is 1, plain decoding."""
    prompts: int = 12
    prompt_bytes: int = 128
    new_bytes: int = 128
    seconds: float = 25.0
    """Seconds of each of the four comparisons; prompts for which they leave no time are left out."""


def demo_config(out: Path, minutes: float, seed: int) -> RunConfig:
    """Return the demo's settings: those that learned most in a few minutes on two cores (docs/lab-notes.md)."""
    return RunConfig(
        steps=MAX_STEPS,
        minutes=minutes,
        run_dir=out,
        seed=seed,
        device="cpu",
        dtype=dtype_on("cpu"),
        compile=False,  # would take a third of the time
        model=ModelConfig(
            vocab_size=256, dim=128, layers=4, attention_heads=4, heads=8, head_kind="replicated", context=256
        ),
        data=DataConfig(sources=("python-stdlib",)),
        batch=BatchConfig(rows=16, length=128),
        optimizer=OptimizerConfig(kind="muon", lr=1.5e-2, warmup_steps=40, final_lr_ratio=0.05),
        validation=ValidationConfig(every=200, rows=64),
        checkpoints=CheckpointConfig(every=400, keep_last=1),
        watch=WatchConfig(sample_tokens=0),  # it decodes enough after training
    )


def run_demo(
    out: Path,
    *,
    minutes: float = 3.5,
    seed: int = 0,
    threads: int | None = None,
    make_config: Callable[[Path, float, int], RunConfig] = demo_config,
    sizes: DecodingSizes | None = None,
    find_boxed: Callable[[], Path] = boxed_model,
) -> dict[str, Any]:
    """Run the whole demo in the run folder `out`, and return what the report holds as plain data.

    Args:
        out: the run folder.
        minutes: how long to train.
        seed: seed of weights, data order and sampling.
        threads: CPU threads of the training (None: torch's choice, and fewer on a busy machine).
        make_config: returns the settings of the run for a folder, minutes and a seed.
        sizes: how much is decoded.
        find_boxed: returns the directory of the model in the box, or raises UsageError.
    """
    sizes = sizes or DecodingSizes()
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes}; it must be above 0")
    began = time.monotonic()
    say("Headstart demo: train a small byte-level model with 8 heads, then decode several bytes per pass, losslessly.")
    say("1. Training on the Python standard library's sources")
    config = replace(make_config(out, minutes, seed), threads=threads)
    _clear_earlier_demo(config)
    train(config)

    say("2. Decoding held-out code: plainly, and with 2, 4 and 8 heads")
    before = torch.get_num_threads()
    # A model this small gains nothing from a second thread, and loses if another program uses the other core.
    torch.set_num_threads(1)
    try:
        decoded = _decode(config, sizes, find_boxed)
    finally:
        torch.set_num_threads(before)
    training, validation = _read_metrics(config.run_dir)
    report = DemoReport(
        machine=_machine(before),
        settings=_settings(config, training, sizes),
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


def _clear_earlier_demo(config: RunConfig) -> None:
    """Remove an earlier demo from the run folder, whose time is spent."""
    folder = RunFolder(config.run_dir)
    if folder.config.exists() and (config.run_dir / "metrics.jsonl").exists():
        say(f"   {config.run_dir} holds an earlier demo, which is replaced (its prepared data is kept)")
        for old in (folder.checkpoints, folder.result):
            shutil.rmtree(old, ignore_errors=True)
        for file in (folder.metrics, folder.config, config.run_dir / "report.html", config.run_dir / "results.json"):
            file.unlink(missing_ok=True)
    elif config.run_dir.exists() and any(config.run_dir.iterdir()):
        leftovers = {path.name for path in config.run_dir.iterdir()} - {"data", "config.yaml", "checkpoints", ".lock"}
        if leftovers:
            raise UsageError(f"{config.run_dir}: holds something else ({min(leftovers)}); give another --out")


def _decode(config: RunConfig, sizes: DecodingSizes, find_boxed: Callable[[], Path]) -> dict[str, Any]:
    """Return the report's parts about decoding: the model just trained and the one in the box, on the same prompts."""
    model = headstart.load(config.run_dir / "model")
    try:
        box = find_boxed()
    except UsageError as error:
        say(f"   {error}; left out")
        shards = TokenShards.open(config.run_dir / "data", "validation")
        documents = [shards.document(d) for d in range(len(shards.documents))]
        prompts = cut_prompts(documents, sizes.prompts, sizes.prompt_bytes, sizes.new_bytes)
        boxed = None
    else:
        # The model in the box has read all of the demo's corpus: its own prompts are new to both.
        found = read_prompts(box / PROMPTS_FILE, model.tokenizer, sizes.prompt_bytes)
        prompts = [found[i * len(found) // sizes.prompts] for i in range(sizes.prompts)]
        boxed = _decode_with(headstart.load(box), prompts, sizes)
    return {**vars(_decode_with(model, prompts, sizes)), "boxed": boxed}


def _decode_with(model: LanguageModel, prompts: list[tuple[int, ...]], sizes: DecodingSizes) -> Decoded:
    _compare(model, prompts[:1], replace(sizes, new_bytes=16), 0.0)  # the first passes of a process are slower
    greedy, fastest, greedy_repeated = _compare(model, prompts, sizes, 0.0)
    sampled, _, sampled_repeated = _compare(model, prompts, sizes, TEMPERATURE)
    middle = prompts[len(prompts) // 2]
    return Decoded(
        decoding=greedy,
        fastest_plain=fastest,
        sampled=sampled,
        samples=[
            _sample(model, middle, sizes.new_bytes, Sampling()),
            _sample(model, middle, sizes.new_bytes, Sampling(temperature=TEMPERATURE, seed=1)),
        ],
        repeated={"greedy": greedy_repeated, "sampled": sampled_repeated},
    )


def _compare(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], sizes: DecodingSizes, temperature: float
) -> tuple[list[DecodingRow], DecodingRow, float]:
    """Decode `prompts`, as many as the time is enough for, with each number of heads, the first of which is 1.

    One head is plain exact decoding. Variants take turns on every prompt, so that a busy moment of the machine affects
    them all.

    Returns:
        A row for each number of heads, the row of plain decoding with exact=False, and how much of the output repeats
        itself.
    """
    heads, new_tokens, ends = sizes.heads, sizes.new_bytes, time.monotonic() + sizes.seconds
    generated: dict[int, list[Generation]] = {k: [] for k in heads}
    fastest: list[Generation] = []
    exact = model.engine(1, len(prompts[0]) + new_tokens, exact=True)
    small = model.engine(1, len(prompts[0]) + new_tokens, exact=False)
    for i, prompt in enumerate(prompts):
        if i and time.monotonic() > ends:
            say(f"   {i} of {len(prompts)} prompts in {sizes.seconds:g} seconds: the others are left out")
            break
        request = Request(prompt, new_tokens, Sampling(temperature=temperature, seed=i))
        for k in heads:
            generated[k] += generate_all(exact, [replace(request, heads=k)])
        fastest += generate_all(small, [replace(request, heads=1)])
    plain = generated[heads[0]]
    outputs = [generation.tokens for generation in plain]

    def row(k: int, generations: Sequence[Generation]) -> DecodingRow:
        stats = Stats.summed([generation.stats for generation in generations])
        return DecodingRow(
            heads=k,
            tokens_per_second=_speed(generations),
            tokens_per_pass=stats.tokens_per_pass,
            speedup=_speed(generations) / _speed(plain),
            identical=[generation.tokens for generation in generations] == outputs,
            acceptance=stats.acceptance,
        )

    return [row(k, generations) for k, generations in generated.items()], row(1, fastest), repeated(outputs)


def _speed(generations: Sequence[Generation]) -> float:
    """Return tokens per second, without the prefill of the prompts."""
    stats = Stats.summed([generation.stats for generation in generations])
    return stats.tokens / (stats.seconds - stats.prefill_seconds)


def _sample(model: LanguageModel, prompt: tuple[int, ...], new_tokens: int, sampling: Sampling) -> Sample:
    """Return a continuation with all heads, as pieces of text, each with the head that proposed it."""
    request = Request(prompt, new_tokens, sampling, heads=model.config.heads)
    generation = generate_all(model.engine(1, len(prompt) + new_tokens), [request])[0]
    return Sample(model.tokenizer.decode(prompt), OriginStream(generation, model.tokenizer).new())


def _read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training and the validation lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [x for x in lines if "loss/head1" in x], [x for x in lines if "validation/loss/head1" in x]


def _settings(config: RunConfig, training: list[dict[str, Any]], sizes: DecodingSizes) -> dict[str, str | int | float]:
    model, last = config.model, training[-1]
    assert config.minutes is not None
    return {
        "parameters": model.parameters()["total"],
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "head kind": model.head_kind,
        "optimiser": config.optimizer.kind,
        "learning rate": config.optimizer.lr,
        "steps": last["step"],
        "bytes seen": last["tokens"],
        "minutes": config.minutes,
        "prompts": sizes.prompts,
        "prompt bytes": sizes.prompt_bytes,
        "new bytes": sizes.new_bytes,
        "seed": config.seed,
    }


def _machine(threads: int) -> dict[str, str | int | float]:
    found = {name: value for name, value in describe().items() if isinstance(value, (str, int, float))}
    return {**found, "training threads": threads, "decoding threads": 1}


def _show(report: DemoReport) -> None:
    """Print the table of speeds, and a sample in the colours of the heads."""
    lines: list[list[str]] = []
    loops = []
    for name, decoded in (("just trained", report), (BOXED, report.boxed)):
        if decoded is None:
            continue
        lines += _table_rows(f"{name}, greedy", decoded.decoding) + _table_rows(f"{name}, sampled", decoded.sampled)
        if decoded.fastest_plain is not None:
            lines += _table_rows(f"{name}, greedy, exact=False", [decoded.fastest_plain], "up to rounding")
        loops.append(f"{name} {decoded.repeated['greedy']:.0%} greedy, {decoded.repeated['sampled']:.0%} sampled")
    table(["decoding", "heads", "tokens/s", "tokens per pass", "speed-up", "output identical"], lines)
    say(f"sampled: at temperature {TEMPERATURE}. Repeated 8-grams: {'; '.join(loops)}. Loops are easily drafted: with")
    say("many of them, tokens per pass flatter the model.")
    best = report.boxed or report
    sample = best.samples[0]
    origin = BOXED if report.boxed else "model just trained"
    show_pieces(f"written by the {origin}, greedily", sample.prompt, sample.pieces)
    if report.validation:
        bits = report.validation[-1]["validation/bits_per_byte/head1"]
        say(
            f"held-out code: {bits:.2f} bits per byte with head 1. Few drafts of so small a model are accepted; the "
            "paper's 7B byte model reaches 7.04 bytes per pass and 6.39 times the speed."
        )


def _table_rows(title: str, decoded: list[DecodingRow], otherwise: str = "NO") -> list[list[str]]:
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
