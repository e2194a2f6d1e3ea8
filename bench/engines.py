"""Prove exports in the engines that they are for: the same text as the engine's own, as many drafts accepted as here.

Each engine answers the prompts in a process and an environment of its own. It loads the export and applies the chat
template itself, and decodes plainly, then with the heads. Headstart answers the same prompts with a chain of as many
drafts.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bench import processes
from bench.environments import ENVIRONMENTS
from bench.peers.with_headstart import answer as answer_here
from bench.processes import JsonProcess, ProcessError
from bench.report import Bar, BenchSettings, Findings, count, result
from headstart.commands.convert import convert
from headstart.console import say
from headstart.data.chat_template import load_chat_template
from headstart.data.prompts import read_prompt_file
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.bundled import boxed_model
from headstart.formats.registry import load_config, load_model_tokenizer
from headstart.model.config import ModelConfig

EngineName = Literal["vllm", "transformers", "llama-cpp"]
FormatName = Literal["headstart", "gguf", "hf-code", "medusa", "mimo", "eagle3", "speculators"]
ACCEPTANCE_BAR = Bar("<=", 5)
"""Largest difference of the mean acceptance lengths, in percent of ours."""
ANSWER_SECONDS = 1800.0
"""Seconds that an engine may take for all prompts."""
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that checks whether a number is prime.",
    "Explain in two sentences how rain forms.",
    "Translate into Spanish: The book is on the table.",
    "List three uses of a paper clip.",
    "Summarize in one sentence: The cat sat on the mat. The dog came in. The cat ran away.",
    "What is 12 times 8? Show the steps.",
    "Write a short poem about the sea.",
    "Give me a recipe for pancakes.",
    "Name the planets of the solar system in order.",
    "What does this print? for i in range(3): print(i * i)",
    "Write a polite e-mail that declines an invitation.",
)
"""The prompts without --prompts: messages of a user, or text to continue for a model without a chat template."""


@dataclass(frozen=True)
class Proof:
    """An export in an engine.

    Attributes:
        format: what `headstart convert --to` takes.
        engine: the engine that runs it.
        command: how a user runs it, for a path OUT of the export and K drafts.
        folder: the folder of the export with the model that the engine loads.
        drafts: the numbers of drafts to try, those judged first, and the further ones (none: plain text alone).
        fits: whether the format holds a model with these heads.
        options: fields of the case for a path of the export and a number of drafts.
        code: whether the engine loads the export with its code (trust_remote_code) also for plain text.
        alone: whether the export holds heads alone, and the engine loads the model itself.
    """

    format: FormatName
    engine: EngineName
    command: str
    folder: str = ""
    drafts: Callable[[ModelConfig], tuple[tuple[int, ...], tuple[int, ...]]] = lambda config: ((), ())
    fits: Callable[[ModelConfig], bool] = lambda config: config.heads == 1
    options: Callable[[Path, int], dict[str, Any]] = lambda path, drafts: {}
    code: bool = False
    alone: bool = False


def _all_drafts(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (config.heads - 1,), ()


def _has(kind: str | None, config: ModelConfig) -> bool:
    return config.heads > 1 and kind in (None, config.head_kind)


def _medusa(path: Path, drafts: int) -> dict[str, Any]:
    return {"speculative": {"method": "medusa", "model": str(path / "vllm"), "num_speculative_tokens": drafts}}


def _mimo(path: Path, drafts: int) -> dict[str, Any]:
    return {"speculative": {"method": "mtp", "num_speculative_tokens": drafts}}


def _mimo_drafts(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # The engine runs one module again and again, on its normed output; heads without norm_output read it as it is.
    if config.norm_output:
        return _all_drafts(config)
    return (1,), (config.heads - 1,) if config.shared and config.heads > 2 else ()


def _eagle3(path: Path, drafts: int) -> dict[str, Any]:
    return {"speculative": {"method": "eagle3", "model": str(path), "num_speculative_tokens": drafts}}


def _speculators(path: Path, drafts: int) -> dict[str, Any]:
    stored = read_json(path / "config.json")["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    return {"model": str(path), "speculative": None if drafts == stored else {"num_speculative_tokens": drafts}}


def _eagle3_drafts(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(1, min(4, config.heads - 1) + 1)), ()


PROOFS = (
    Proof("headstart", "transformers", 'AutoModelForCausalLM.from_pretrained("OUT")'),
    Proof("headstart", "vllm", "vllm serve OUT"),
    Proof("gguf", "llama-cpp", 'Llama("OUT.gguf").create_chat_completion(messages)'),
    Proof(
        "hf-code", "transformers", 'AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)',
        drafts=_all_drafts, fits=partial(_has, None), options=lambda path, drafts: {"code": True},
    ),
    Proof(
        "medusa", "vllm",
        'vllm serve OUT/base --speculative-config \'{"method": "medusa", "model": "OUT/vllm", '
        '"num_speculative_tokens": K}\'',
        "base", _all_drafts, partial(_has, "medusa"), _medusa,
    ),
    Proof(
        "mimo", "vllm",
        "vllm serve OUT --trust-remote-code --speculative-config "
        '\'{"method": "mtp", "num_speculative_tokens": K}\'',
        "", _mimo_drafts, partial(_has, "sequential"), _mimo, code=True,
    ),
    Proof(
        "eagle3", "vllm",
        'vllm serve MODEL --speculative-config \'{"method": "eagle3", "model": "OUT", "num_speculative_tokens": K}\'',
        "", _eagle3_drafts, partial(_has, "eagle3"), _eagle3, alone=True,
    ),
    Proof(
        "speculators", "vllm", "vllm serve OUT", "", _eagle3_drafts, partial(_has, "eagle3"), _speculators, alone=True
    ),
)  # fmt: skip
"""The exports that are proven, and their engines. A new export is a line here."""


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Prove exports in vLLM, transformers and llama.cpp: the engine's own text, as many drafts accepted as here."""

    model: Path | None = None
    """Model directory or GGUF file (None: the model in the box)."""
    heads_from: tuple[str, ...] = ()
    """Directories of heads for the model, one after the other (none: the model's own heads)."""
    formats: tuple[FormatName, ...] = ("headstart", "gguf", "hf-code", "medusa", "mimo", "eagle3", "speculators")
    """Exports to prove; those that do not hold the heads are left out."""
    engines: tuple[EngineName, ...] = ("vllm", "transformers", "llama-cpp")
    """Engines to run. A note reports one that is not installed, and how to get it."""
    engine_python: tuple[str, ...] = ()
    """Interpreters that have an engine's package, as ENGINE=PATH, like vllm=/envs/vllm/bin/python (for the others: this
    one)."""
    make_environments: Path | None = None
    """Folder in which environments of the engines without --engine-python are made with venv and pip, and kept."""
    drafts: tuple[int, ...] = ()
    """Numbers of drafts to try, of those that an export is tried with (none: all)."""
    prompts: Path | None = None
    """A line each, or .jsonl with "prompt", "text" or "messages" (None: twelve questions)."""
    prompt_count: int = 12
    """Number of prompts, from the first."""
    new_tokens: int = 64
    """Most tokens of an answer."""
    context: int = 512
    """Tokens of a prompt and its answer at most."""
    threads: int = 1
    """CPU threads."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. In bfloat16 near ties may separate two outputs."""

    def check(self) -> None:
        """Raise UsageError for settings that cannot run."""
        for name in ("prompt_count", "new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.context <= self.new_tokens:
            raise UsageError(f"--context {self.context}: must hold a prompt and {self.new_tokens} new tokens; raise it")
        self.pythons()

    def pythons(self) -> dict[str, str]:
        """Return the interpreter of each engine that --engine-python names."""
        found = dict(each.partition("=")[::2] for each in self.engine_python)
        for name, python in found.items():
            if name not in ENVIRONMENTS or not Path(python).is_file():
                raise UsageError(f"--engine-python {name}={python}: give ENGINE=FILE, ENGINE one of {_names()}")
        return found

    def load_prompts(self, model: Path) -> list[Any]:
        """Return the prompts: messages for a model with a chat template, else text."""
        tokenizer = load_model_tokenizer(model)
        if tokenizer is None:
            raise UsageError(f"{model}: has no tokenizer, so engines read no text; take a model with one")
        if self.prompts is not None:
            read = read_prompt_file(self.prompts)[: self.prompt_count]
            given: list[Any] = [p.text if p.conversation is None else list(p.conversation.messages) for p in read]
        else:
            given = list(PROMPTS[: self.prompt_count])
        if load_chat_template(tokenizer) is None:
            return given
        return [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in given]


def run(settings: Settings) -> dict[str, Any]:
    """Run every proof that fits the model and return the results, see `report.result`."""
    settings.check()
    found, model = Findings("engines"), settings.model or boxed_model()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(settings, model, settings.load_prompts(model), Path(name), found)
        trial.prove(None, load_config(model).next_token_decoder)
        own = [None] if load_config(model).heads > 1 else []
        for heads in settings.heads_from or own:
            trial.prove(heads, load_config(model, heads=heads))
        found.note(trial.note())
    # A report names no paths of the machine that wrote it.
    shown = replace(
        settings,
        model=Path(model.name),
        heads_from=tuple(Path(each).name for each in settings.heads_from),
        engine_python=tuple(settings.pythons()),
        make_environments=None,
        prompts=None if settings.prompts is None else Path(settings.prompts.name),
    )
    return result("engines", shown, found)


@dataclass
class Trial:
    """A model with its prompts, and the answers to them."""

    settings: Settings
    model: Path
    prompts: list[Any]
    folder: Path
    """Folder for exports and logs."""
    found: Findings
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the engines that ran."""
    missing: set[str] = field(default_factory=set)
    """Engines that a note reports already."""

    def prove(self, heads: str | None, config: ModelConfig) -> None:
        """Add the rows of all exports that fit a model with these heads."""
        proofs = [p for p in PROOFS if p.format in self.settings.formats and p.fits(config)]
        proofs = [p for p in proofs if p.engine in self.settings.engines and self.python(p.engine) is not None]
        if not proofs:
            return
        tried = {1} | {1 + drafts for p in proofs for group in p.drafts(config) for drafts in group}
        say(f"headstart: {config.heads} heads ...")
        here = processes.call(
            answer_here,
            self.case(self.model) | {"heads_from": heads, "heads": sorted(tried)},
            threads=self.settings.threads,
        )
        self.versions["headstart"] = here["version"]
        ours = Answers.of_headstart(here)
        for proof in proofs:
            label = "" if config.heads == 1 else f"{config.head_kind} heads, "
            if config.draft_vocab is not None:
                label += f"draft vocabulary {config.draft_vocab:,}, "
            try:
                self.run_proof(proof, label, heads, config, ours)
            except (ProcessError, UsageError) as error:
                say(f"{proof.format}: {error}")
                self.found.measure(
                    f"{proof.format}, {label}{proof.engine}: loads and runs", [0], bar=Bar(">=", 1), why=str(error)
                )

    def run_proof(
        self, proof: Proof, label: str, heads: str | None, config: ModelConfig, ours: Mapping[int, Answers]
    ) -> None:
        """Export the model, run it in the engine plainly and with each number of drafts, and add the rows."""
        suffix = ".gguf" if proof.format == "gguf" else ""
        path = self.folder / f"{proof.format}-{len(list(self.folder.iterdir()))}{suffix}"
        model, directory = self.model, path / proof.folder if proof.folder else path
        if proof.alone:
            model = directory = self.folder / "model"
            if not model.exists():
                convert(self.model, model, "headstart", self.settings.dtype)
        converted = convert(model, path, proof.format, self.settings.dtype, heads=heads)
        name = f"{proof.format}, {label}{proof.engine}"
        say(f"{name} ...")
        case = self.case(directory) | {"code": proof.code}
        plain = self.ask(proof.engine, case, ours[1].ends)
        total, judged_drafts = len(self.prompts), proof.drafts(config)
        details = {
            "prompts read like here": f"{plain.same_prompts(ours[1])} of {total}",
            "command": proof.command,
            "left out": "; ".join(converted["left_out"]) or "nothing",
        }
        if not any(judged_drafts):
            same = plain.same_outputs(ours[1])
            self._judge_text(name, "plain text equals Headstart's", same, plain, ours[1], details)
        for drafts in (*judged_drafts[0], *judged_drafts[1]):
            if self.settings.drafts and drafts not in self.settings.drafts:
                continue
            drafted = self.ask(proof.engine, case | proof.options(path, drafts), ours[1].ends)
            where = f"{name}, {count(drafts, 'draft')}"
            same = drafted.same_outputs(plain)
            more = {"plain text like Headstart's": f"{plain.same_outputs(ours[1])} of {total}", **details}
            self._judge_text(where, "text equals the engine's plain text", same, drafted, plain, more)
            theirs, mine = drafted.acceptance, ours[1 + drafts].acceptance
            self.found.measure(
                f"{where}: mean acceptance length, difference from Headstart's",
                [100 * abs(theirs / mine - 1)],
                "%",
                ACCEPTANCE_BAR if drafts in judged_drafts[0] else None,
                engine=theirs,
                headstart=mine,
                ratio=theirs / mine,
            )

    def _judge_text(
        self, where: str, what: str, same: int, answers: Answers, other: Answers, details: dict[str, Any]
    ) -> None:
        total = len(self.prompts)
        differs = [str(i + 1) for i, pair in enumerate(zip(answers.outputs, other.outputs)) if pair[0] != pair[1]]
        more = {"loads": "yes"} | ({"differs for prompts": ", ".join(differs)} if differs else {}) | details
        self.found.measure(f"{where}: {what}", [same], f"of {total}", Bar(">=", total), **more)

    def case(self, model: Path) -> dict[str, Any]:
        """Return the case of an `answer`, plainly."""
        settings = self.settings
        return {
            "model": str(model),
            "prompts": self.prompts,
            "new_tokens": settings.new_tokens,
            "context": settings.context,
            "threads": settings.threads,
            "dtype": settings.dtype,
            "code": False,
            "speculative": None,
        }

    def ask(self, engine: str, case: dict[str, Any], ends: frozenset[int]) -> Answers:
        """Return the answers of an engine, in a process of its own. Raises ProcessError if it fails."""
        python = self.python(engine)
        assert python is not None
        target = f"with_{engine.replace('-', '_')}:answer"
        environment = {"HF_MODULES_CACHE": str(self.folder / "modules")}  # code of exports stays in no cache
        log = self.folder / f"{engine}.log"
        with JsonProcess(
            python, target, threads=self.settings.threads, environment=environment, source=False, log=log,
            timeout=ANSWER_SECONDS,
        ) as process:  # fmt: skip
            found = process.ask(case)
        self.versions[engine] = found["version"]
        return Answers.of_engine(found["outputs"], ends)

    def python(self, engine: str) -> str | None:
        """Return the interpreter that has an engine; None, after a note, if there is none."""
        settings, environment = self.settings, ENVIRONMENTS[engine]
        if (named := settings.pythons().get(engine)) is not None:
            return named
        if settings.make_environments is not None:
            return str(environment.make(settings.make_environments.absolute() / engine))
        if importlib.util.find_spec(environment.package) is not None:
            return sys.executable
        if engine not in self.missing:
            self.missing.add(engine)
            self.found.note(
                f"{engine}: not installed, so its exports are not proven; give --make-environments DIR, or make one "
                f"(`{environment.command}`, {environment.cost}) and give --engine-python {engine}=ENV/bin/python"
            )
        return None

    def note(self) -> str:
        """Return the sentences that explain the rows."""
        chats = sum(not isinstance(prompt, str) for prompt in self.prompts)
        return (
            f"{'; '.join(self.versions.values())}. {count(len(self.prompts), 'prompt')}, {chats} of them conversations "
            f"that each engine writes by the export's own chat template; greedy, {self.settings.dtype}, at most "
            f"{self.settings.new_tokens} new tokens, one sequence at a time. The mean acceptance length is tokens per "
            "pass behind the first token, own token included. SGLang has no build for CPUs in the registries and is "
            "not run."
        )


@dataclass(frozen=True)
class Answers:
    """The answers of an engine to all prompts."""

    prompts: list[list[int]]
    outputs: list[list[int]]
    """Tokens before the first end token."""
    acceptance: float
    """Tokens per pass behind the first token."""
    ends: frozenset[int]

    @classmethod
    def of_engine(cls, outputs: Sequence[Mapping[str, Any]], ends: frozenset[int]) -> Answers:
        """Return what an `answer` found."""
        kept = []
        for output in outputs:
            tokens = output["tokens"]
            kept.append(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
        behind, passes = (sum(output[name] for output in outputs) for name in ("behind", "passes"))
        return cls([output["prompt"] for output in outputs], kept, behind / max(1, passes), ends)

    @classmethod
    def of_headstart(cls, found: Mapping[str, Any]) -> dict[int, Answers]:
        """Return what our `answer` found, by the number of heads."""
        ends = frozenset(found["ends"])
        return {int(heads): cls.of_engine(outputs, ends) for heads, outputs in found["outputs"].items()}

    def same_prompts(self, other: Answers) -> int:
        """Return the number of prompts that were turned into the same ids."""
        return sum(mine == theirs for mine, theirs in zip(self.prompts, other.prompts))

    def same_outputs(self, other: Answers) -> int:
        """Return the number of equal outputs."""
        return sum(mine == theirs for mine, theirs in zip(self.outputs, other.outputs))


def _names() -> str:
    return ", ".join(ENVIRONMENTS)
