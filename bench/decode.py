"""Measure decoding: several tokens per pass against one, and the same weights in our decoding and in that of peers."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bench import processes, streams
from bench.peers.contest import GGUF_BARS, PEERS, Contest, PeerName, Subject
from bench.report import NONE, Bar, BenchSettings, Findings, count, run_parts
from bench.streams import Stream, Synthetic, acceptance_table, p50_p95, share_right
from headstart.console import say
from headstart.decoding.engine import Engine
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.blocks import Quantize
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import Tuning, read_tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import (
    DTYPES,
    first_difference,
    interleave,
    pass_costs,
    random_model,
    ratios,
)
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.free_running import repeated
from headstart.evaluation.inputs import load_prompts
from headstart.formats.bundled import boxed_model
from headstart.formats.gguf_file import GgufFile
from headstart.formats.heads import save_heads
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model
from headstart.hardware import dtype_on
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.model.transformer import Transformer
from headstart.training.adapt.new_heads import config_with_heads, with_heads

Part = Literal["model", "sweep", "peers"]
Size = Literal["12M", "105M", "235M", "1.3B", "6.7B"]

SIZES: dict[str, ModelConfig] = {
    "12M": ModelConfig(vocab_size=4096, dim=256, layers=13, attention_heads=4, context=4096),
    # 32 blocks, so that four transformer heads stand to the trunk as in the paper's 7B model: 28 + 4.
    "105M": ModelConfig(vocab_size=4096, dim=512, layers=32, attention_heads=8, context=4096),
    "235M": ModelConfig(vocab_size=4096, dim=768, layers=32, attention_heads=12, context=4096),
    # The paper's own (Table S14), for GPUs; the larger one is that of its Tables S2 and S3.
    "1.3B": PRESETS["1.3B"],
    "6.7B": PRESETS["6.7B"],
}
"""Models with random weights by their approximate number of parameters."""
POLICY_BAR = Bar(">=", 0.97)
EFFICIENCY_BAR = Bar(">=", 0.88)
"""Bar of a trained model: the speed-up of all heads over their tokens per pass, batch 1, greedy."""
LOW = 1.1
"""Tokens per pass at which drafting loses, which the policy must find out."""
PLAIN, POLICY, POLICY_LOW = "plain", "policy", "policy, low"


@dataclass(frozen=True)
class Heads:
    """A kind of heads to sweep, with the paper's numbers."""

    name: str
    fields: dict[str, Any]
    """Fields of a ModelConfig that give it these heads."""
    tokens_per_pass: float
    """Synthetic acceptance with all heads: the paper's."""
    paper: dict[int, tuple[float, float]]
    """Speed-up and tokens per pass by k."""
    bar: Bar
    """Bar of the speed-up of all heads over their tokens per pass, batch 1."""

    def put_on(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with these heads."""
        return replace(config, wiring="parallel", **self.fields)


KINDS = {
    "tokens": Heads(
        "4 parallel transformer heads (Table S2)",
        {"heads": 4, "head_kind": "transformer"},
        3.5,
        {1: (1.0, 1.0), 2: (1.85, 1.94), 3: (2.54, 2.78), 4: (3.05, 3.50)},
        Bar(">=", 0.85),
    ),
    "bytes": Heads(
        "8 replicated byte heads (Table S3)",
        {"heads": 8, "head_kind": "replicated", "vocab_size": 256},
        7.04,
        {1: (1.0, 1.0), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)},
        Bar(">=", 0.9),
    ),
}


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Speed of decoding, of a trained model and of random weights."""

    parts: tuple[Part, ...] = ("model", "sweep", "peers")
    """model: a trained model by the number of heads; sweep: random weights whose drafts are right at the rate of the
    paper's models; peers: other programs with the same weights."""
    model: Path | None = None
    """Directory or GGUF file of the parts model and peers (None: the model in the box; for peers random weights)."""
    sizes: tuple[Size, ...] = ("12M", "105M")
    """Models with random weights of the parts sweep and peers."""
    kinds: tuple[Literal["tokens", "bytes"], ...] = ("tokens", "bytes")
    """Heads of the part sweep: four transformer heads (Table S2), eight byte heads (Table S3)."""
    batches: tuple[int, ...] = (1, 8)
    """Numbers of sequences decoded at once."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads K of the part model; those that the model does not have are left out."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """Temperatures of the part model; 0: greedy. The other parts are greedy."""
    peers: tuple[PeerName, ...] = PEERS
    """Peers to compare with. The table reports one that is not installed."""
    peer_python: tuple[str, ...] = ()
    """Interpreters that have a peer's package, as PEER=PATH, like llama-cpp=/envs/llama/bin/python (for the others:
    this one)."""
    compile_peers: bool = False
    """Also measure transformers compiled over a static cache, and vLLM compiled: minutes each."""
    threads: int = 1
    """CPU threads."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the weights (auto: the faster one here)."""
    quantize: Quantize | None = None
    """Quantized weights of the part model, and of our side of the part peers, whatever the dtype."""
    device: str = "cpu"
    """cpu or cuda."""
    repetitions: int = 5
    """Rounds of whole generations."""
    prompt_tokens: int = 64
    """Length of a prompt."""
    new_tokens: int = 128
    """Tokens generated after it."""
    synthetic_heads: int = 4
    """Heads that a GGUF file has in the part peers, head 1 included; a copy of its last block each (1: none)."""
    draft_vocab: int = 8192
    """Tokens that they propose, as after `headstart adapt --draft-vocab` (0: the whole vocabulary)."""
    tokens_per_pass: float = 2.5
    """Rate at which their drafts are made right."""
    prompts: Path | None = None
    """Prompts of a trained model: a line each, or .jsonl with "prompt" or "text" (None: those in its directory, or
    pieces of held-out documents of its run; for a GGUF file random tokens)."""
    data: Path | None = None
    """Folder of prepared tokens whose held-out documents give the prompts (None: that of the model's run)."""
    prompt_count: int = 8
    """Number of prompts."""
    tune_seconds: float = 5.0
    """Seconds in which the policy of the part sweep measures the cost of passes, at each batch size."""

    def check(self) -> None:
        """Raise UsageError for settings that some part cannot run with."""
        if 1 not in self.heads:
            raise UsageError("--heads lacks 1; add it, for plain decoding is what the others are compared with")
        for name in ("batches", "temperatures"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is empty; name one value or more")
        for name in ("repetitions", "threads", "prompt_tokens", "new_tokens", "prompt_count", "synthetic_heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if "peers" in self.parts and self.device != "cpu":
            raise UsageError(f"--device {self.device}: the part peers runs on a CPU; name the other --parts")
        self.pythons()

    def pythons(self) -> dict[str, str]:
        """Return the interpreter of each peer that --peer-python names."""
        found = dict(each.partition("=")[::2] for each in self.peer_python)
        for name, python in found.items():
            if name not in PEERS or not Path(python).is_file():
                raise UsageError(f"--peer-python {name}={python}: give PEER=FILE, PEER one of {', '.join(PEERS)}")
        return found

    def load_prompts(self, model: Path) -> list[list[int]]:
        """Return the prompts for a trained model."""
        if model.is_file() and self.prompts is None and self.data is None:
            return random_prompts(load_config(model).vocab_size, self.prompt_count, self.prompt_tokens)
        size = {"count": self.prompt_count, "tokens": self.prompt_tokens, "room": self.new_tokens}
        return [list(each) for each in load_prompts(model, prompts=self.prompts, data=self.data, **size)]

    def case(self, batch: int, **details: Any) -> dict[str, Any]:
        """Return a case of `heads_case`."""
        names = ("dtype", "device", "quantize", "new_tokens", "repetitions", "tune_seconds")
        common = {name: getattr(self, name) for name in names}
        return common | {"model": None, "batch": batch, "temperature": 0.0, "tokens_per_pass": None} | details


def run(settings: Settings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    settings.check()
    settings = replace(settings, dtype=dtype_on(settings.device, settings.dtype))
    parts: dict[str, Callable[[Settings], Findings]] = {"model": model, "sweep": sweep, "peers": peers}
    return run_parts("decode", settings, {name: part for name, part in parts.items() if name in settings.parts})


def model(settings: Settings) -> Findings:
    """Measure every number of heads and the policy of a trained model, greedily and sampled."""
    found, path = Findings("model"), settings.model or boxed_model()
    config, prompts = load_config(path), settings.load_prompts(path)
    for batch, temperature in itertools.product(settings.batches, settings.temperatures):
        case = settings.case(batch, model=str(path), prompts=prompts, heads=settings.heads, temperature=temperature)
        where = f"{'greedy' if temperature == 0 else f'temperature {temperature}'}, batch {batch}"
        bar = EFFICIENCY_BAR if temperature == 0 and batch == 1 else None
        _report_heads(found, where, processes.call(heads_case, case, threads=settings.threads), bar)
    found.note(
        f"{path}: n = {config.heads} {config.head_kind} heads, {config.wiring}, {settings.quantize or settings.dtype}, "
        f"{count(settings.threads, 'thread')}; {count(len(prompts), 'prompt')} of at most {settings.prompt_tokens} "
        f"tokens, {settings.new_tokens} new tokens; prompts are not timed, end tokens end no output. Policy: rows of "
        "each pass chosen by what `headstart tune` measured. The paper's Table S3 has (n = 8, speed-up and bytes per "
        f"forward of a 7B byte-level code model on GPUs) {_in_words(KINDS['bytes'])}."
    )
    return found


def sweep(settings: Settings) -> Findings:
    """Measure every number of heads and the policy at the acceptance of the paper's models."""
    found = Findings("sweep")
    for size, name, batch in itertools.product(settings.sizes, settings.kinds, settings.batches):
        kind = KINDS[name]
        config = kind.put_on(SIZES[size])
        case = settings.case(
            batch, config=asdict(config), prompts=random_prompts(config.vocab_size, batch, settings.prompt_tokens),
            heads=list(kind.paper), tokens_per_pass=kind.tokens_per_pass, quantize=None,
        )  # fmt: skip
        answer = processes.call(heads_case, case, threads=settings.threads)
        _report_heads(found, f"{size}, {kind.name}, batch {batch}", answer, kind.bar if batch == 1 else None)
    found.note(
        f"random weights, {settings.dtype}, {count(settings.threads, 'thread')}; drafts made right at the rate of the "
        "paper's models (synthetic acceptance), so the output stays that of plain decoding. Tokens/s of all rows "
        "together, while all of them write; prompts are not timed. The policy has measured what passes cost here and "
        f"knows how often drafts are right; at the low rate, {LOW} tokens per pass, it can only lose. The paper has "
        f"(speed-up and tokens per pass, code) {'; '.join(map(_in_words, KINDS.values()))}."
    )
    return found


def _in_words(kind: Heads) -> str:
    return f"{kind.name}: " + ", ".join(f"k = {k} {up:.2f} and {tokens:.2f}" for k, (up, tokens) in kind.paper.items())


def _report_heads(found: Findings, where: str, answer: dict[str, Any], bar: Bar | None) -> None:
    """Add the measurements of one case of `heads_case`; `bar` judges the gain over the tokens per pass."""
    speeds, details = answer["tokens_per_second"], answer["details"]
    most = max(int(name) for name in speeds if name.isdigit())
    for name, values in speeds.items():
        what = f"{where}, " + (f"K = {name}" if name.isdigit() else name)
        found.measure(what, values, "tokens/s", **details[name])
        if name != PLAIN:
            judge = POLICY_BAR if name in (POLICY, POLICY_LOW) else None
            found.ratio(f"{what} / plain", values, speeds[PLAIN], judge)
        if most > 1 and name in (str(most), POLICY):
            kept = [gain / details[name]["tokens_per_pass"] for gain in ratios(values, speeds[PLAIN])]
            found.measure(f"{what} / plain over its tokens per pass", kept, bar=bar)
    # A count with a bar, so that a lossy run shows as missed and not as a remark.
    differing = answer["differing"]
    what = f"{where}: numbers of heads whose output differs from K = 1"
    found.measure(what, [len(differing)], bar=NONE, differing=differing)


def heads_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the speeds of plain decoding, every number of heads and the policy, which take turns, and their outputs.

    Drafts are the model's own, or right at the rate of `tokens_per_pass`.
    """
    dtype = "float32" if case["quantize"] else case["dtype"]
    if case["model"] is None:
        model = random_model(ModelConfig(**case["config"]), dtype, case["device"])
    else:
        model = load_model(case["model"], dtype=DTYPES[dtype], device=case["device"])
    decoder = Decoder(pack(model, quantize=case["quantize"]), case)
    n, rate = model.config.heads, case["tokens_per_pass"]
    ks = [k for k in case["heads"] if k <= n]
    variants: dict[str, Callable[[], float]] = {PLAIN: partial(decoder.measure, PLAIN, 1, exact=False)}
    variants |= {str(k): partial(decoder.measure, str(k), k, rate=rate) for k in ks}
    if backend_of(model).row_exact:  # else a policy has nothing to choose
        for name, tuning, right in _policies(model, case):
            decoder.policies[name] = DraftPolicy(tuning)
            variants[name] = partial(decoder.measure, name, None, rate=right)
    speeds = interleave(variants, case["repetitions"])
    last = {name: runs[-1] for name, runs in decoder.kept.items()}
    outputs = {name: [tokens for stream in group for tokens in stream.tokens] for name, group in last.items()}
    stats = {name: streams.Stats.summed([stream.stats for stream in group]) for name, group in last.items()}
    details = {
        name: {
            "tokens_per_pass": stats[name].tokens_per_pass,
            "rows_per_pass": stats[name].rows_per_pass,
            "acceptance": stats[name].acceptance,
            "ms_between_passes_p50_p95": p50_p95([gap for stream in group for gap in streams.gaps(stream.stamps)]),
        }
        for name, group in last.items()
    }
    details[PLAIN]["repeated_8_grams"] = repeated(outputs["1"])
    # The output of exact=False is only equal up to rounding, so it is not required.
    differing = [n for n in outputs if n != PLAIN and first_difference(outputs["1"], outputs[n]) is not None]
    return {"tokens_per_second": speeds, "details": details, "differing": differing}


def _policies(model: Transformer, case: dict[str, Any]) -> list[tuple[str, Tuning, float | None]]:
    """Return policies by name, each with what it knows and the rate of its drafts."""
    rate, n = case["tokens_per_pass"], model.config.heads
    if rate is None:
        tuning = read_tuning(case["model"], model)
        return [] if tuning is None else [(POLICY, tuning, None)]
    length = len(case["prompts"][0]) + case["new_tokens"] // 2
    costs = pass_costs(model, (case["batch"],), length, case["tune_seconds"])
    tables = [
        (name, right, acceptance_table(share_right(right, n), n)) for name, right in ((POLICY, rate), (POLICY_LOW, LOW))
    ]
    return [(name, Tuning(table, table, costs), right) for name, right, table in tables]


@dataclass
class Decoder:
    """A model with the prompts of a case, in groups that are decoded at once."""

    model: Transformer
    case: dict[str, Any]
    policies: dict[str, DraftPolicy] = field(default_factory=dict)
    kept: dict[str, list[list[Stream]]] = field(default_factory=dict)
    """Streams of each variant, by round and group."""
    engines: dict[str, Engine] = field(default_factory=dict)
    outputs: dict[int, list[list[int]]] = field(default_factory=dict)
    """Plain outputs of each group."""

    def measure(self, name: str, heads: int | None, *, exact: bool = True, rate: float | None = None) -> float:
        """Decode all groups and return the tokens per second."""
        batch, done = self.case["batch"], []
        groups = [self.case["prompts"][i : i + batch] for i in range(0, len(self.case["prompts"]), batch)]
        for number, prompts in enumerate(groups):
            requests = [
                Request(tuple(prompt), self.case["new_tokens"], Sampling(self.case["temperature"], seed=seed), heads)
                for seed, prompt in enumerate(prompts, number * batch)
            ]
            synthetic = None
            if rate is not None:
                if number not in self.outputs:
                    self.outputs[number] = streams.plain_outputs(self.model, requests)
                synthetic = Synthetic(self.outputs[number], share_right(rate, self.model.config.heads))
            engine = self.engines.get(name)
            if engine is None:
                policy = self.policies.get(name)
                engine = streams.engine_for(self.model, requests, exact=exact, policy=policy)
            # On a GPU one engine serves all rounds, as in a server: it captures its graphs in the first, which does not
            # count. On a CPU there is nothing to capture, and the caches of all engines together need not fit.
            if self.case["device"] != "cpu" and len(groups) == 1:
                self.engines[name] = engine
            done.append(streams.decode(self.model, requests, synthetic=synthetic, engine=engine))
        self.kept.setdefault(name, []).append(done)
        return streams.tokens_per_second(*(stream.stamps for stream in done))


def peers(settings: Settings) -> Findings:
    """Measure every peer with the model of --model, or with random weights of each size and four heads."""
    found = Findings("peers")
    with tempfile.TemporaryDirectory() as name:
        contest = Contest(
            settings.peers, settings.pythons(), settings.threads, settings.dtype, settings.quantize,
            settings.new_tokens, settings.repetitions, settings.compile_peers, Path(name),
        )  # fmt: skip
        if settings.model is None:
            subjects = [random_subject(size, settings, Path(name)) for size in settings.sizes]
        else:
            subjects = [trained_subject(settings.model, settings, Path(name))]
        for subject in subjects:
            for batch in settings.batches:
                say(f"peers: {subject.label}, batch {batch}")
                contest.compare(found, subject, batch)
        found.note(contest.note())
    return found


def random_subject(size: str, settings: Settings, folder: Path) -> Subject:
    """Return a model with random weights and four heads, with prompts for the largest batch."""
    kind = KINDS["tokens"]
    config = kind.put_on(SIZES[size])
    save_model(random_model(config, settings.dtype, "cpu"), folder / size)
    prompts = random_prompts(config.vocab_size, max(settings.batches), settings.prompt_tokens)
    return Subject(size, folder / size, prompts, kind.tokens_per_pass)


def trained_subject(model: Path, settings: Settings, folder: Path) -> Subject:
    """Return a trained model with its prompts, a GGUF file with heads that `synthetic_heads` asks for."""
    subject = Subject(model.name, model, settings.load_prompts(model), None)
    if not model.is_file():
        return subject
    file, config = GgufFile(model), load_config(model)
    bits = 8 * sum(map(file.stored_bytes, file.names)) / config.parameters()["total"]
    subject = replace(subject, bars={"llama-cpp": GGUF_BARS["4 bits" if bits < 7 else "8 bits"]} if bits < 9 else {})
    if settings.synthetic_heads == 1:
        return subject
    size = min(settings.draft_vocab, config.vocab_size) or None
    with_them = config_with_heads(config, settings.synthetic_heads, draft_vocab=size)
    d2t = None if size is None else torch.arange(size)
    save_heads(with_heads(load_model(model), with_them, d2t=d2t), folder / "heads")
    return replace(subject, heads=folder / "heads", tokens_per_pass=settings.tokens_per_pass)


def random_prompts(vocab_size: int, number: int, length: int) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = random.Random(1)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(number)]
