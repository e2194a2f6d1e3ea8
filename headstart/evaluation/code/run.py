"""Run a model's programs against the tests of problems: pass@k, as in the paper's sections 3.1 to 3.3."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headstart.api import LanguageModel
from headstart.console import Progress, say
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.generation import Stats
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.code.pass_at_k import estimate, oracle
from headstart.evaluation.code.problems import CodeProblem, load_problems, load_shots
from headstart.evaluation.code.sandbox import Program, Sandbox
from headstart.evaluation.records import owned, whole_lines
from headstart.evaluation.settings import CodeSettings
from headstart.fileio import appending


@dataclass
class _Task:
    """The state of evaluating one set of problems."""

    model: LanguageModel
    settings: CodeSettings
    batch: int
    folder: Path
    problems: list[CodeProblem]
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)


def run_code(
    model: LanguageModel, task: str, settings: CodeSettings, batch: int, out: Path, model_name: str
) -> dict[str, Any]:
    """Evaluate `model` on `task`. Samples and verdicts are kept in OUT/TASK, and an interrupted run resumes from them.

    Raises UsageError for settings out of range, problems that cannot be read, a context that is too short, and a folder
    that holds samples of another model or other settings or that another run writes to.
    """
    _check(settings)
    shots = load_shots(task, settings.examples, settings.shots)
    problems = load_problems(task, settings.source, settings.problems, settings.rewarded, examples=shots)
    state = _Task(model, settings, batch, out / task, problems)
    cut = _encode(state, task)
    with owned(state.folder, _identity(task, settings, model_name)):
        found: dict[str, Any] = {"problems": len(problems), "cut_prompts": cut, "new_tokens": settings.new_tokens}
        counts: dict[float, list[tuple[int, int]]] = {}
        found["temperatures"] = {}
        with nullcontext() if problems[0].answer else Sandbox(settings.workers) as sandbox:
            for temperature in settings.temperatures:
                samples, speed = _write(state, task, temperature)
                verdicts = _judge(state, sandbox, task, temperature, samples)
                right = dict.fromkeys((problem.name for problem in problems), 0)
                for (name, _), status in verdicts.items():
                    right[name] += status == "passed"
                each = _samples(settings, temperature)
                counts[temperature] = [(each, count) for count in right.values()]
                found["temperatures"][f"{temperature:g}"] = {
                    "samples": each,
                    **{f"pass@{k}": asdict(estimate(counts[temperature], k)) for k in settings.k if k <= each},
                    "verdicts": _tally(verdicts.values()),
                    **speed,
                }
        found["oracle"] = {}
        for k in settings.k:
            able = {t: c for t, c in counts.items() if k <= c[0][0]}
            if able:
                temperature, best = oracle(able, k)
                found["oracle"][f"pass@{k}"] = {"temperature": temperature, **asdict(best)}
    return found


def _check(settings: CodeSettings) -> None:
    for name in ("samples", "new_tokens", "workers"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--code.{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")
    if (
        not settings.temperatures
        or min(settings.temperatures) < 0
        or len(set(settings.temperatures)) < len(settings.temperatures)
    ):
        raise UsageError("--code.temperatures must be one or more different numbers, 0 (greedy) or above")
    if settings.shots < 0:
        raise UsageError(f"--code.shots is {settings.shots}; it must be 0 or more")
    if not settings.k or min(settings.k) < 1:
        raise UsageError("--code.k must be one or more numbers, 1 or above")


def _samples(settings: CodeSettings, temperature: float) -> int:
    return settings.samples if temperature else 1  # greedy samples are all equal


def _encode(state: _Task, task: str) -> int:
    """Encode the prompts and return how many of them had to be cut."""
    context, new = state.model.config.context, state.settings.new_tokens
    room = context - new
    if room <= len(state.model.tokenizer.start_ids):
        raise UsageError(f"--code.new-tokens {new} leaves no room for a prompt in the context {context}; ask for fewer")
    cut = 0
    for problem in state.problems:
        ids = tuple(prompt_ids(state.model.tokenizer, problem.prompt))
        cut += len(ids) > room
        # The start token stays before the rest of a prompt.
        start = state.model.tokenizer.start_ids if len(ids) > room else ()
        state.prompts[problem.name] = (*start, *ids[-(room - len(start)) :])
    if cut and not state.settings.cut_prompts:
        raise UsageError(
            f"{task}: {cut} of {len(state.problems)} prompts are longer than the {room} tokens that the context "
            f"{context} leaves next to {new} new ones; take fewer --code.new-tokens, or --code.cut-prompts"
        )
    return cut


def _write(state: _Task, task: str, temperature: float) -> tuple[dict[tuple[str, int], str], dict[str, Any]]:
    """Return every sample at this temperature, by problem and number, and the cost of decoding them."""
    file, sittings = (state.folder / f"{name}-{temperature:g}.jsonl" for name in ("samples", "sittings"))
    samples = {(line["problem"], line["sample"]): line for line in whole_lines(file)}
    keys = [(p.name, i) for p in state.problems for i in range(_samples(state.settings, temperature))]
    missing = [key for key in keys if key not in samples]
    if len(missing) < len(keys):
        say(f"{task} at {temperature:g}: {len(keys) - len(missing)} of {len(keys)} programs are there already")
    if missing:
        with (
            Progress(f"{task}, temperature {temperature:g}", len(missing), unit="programs") as bar,
            appending(file) as lines,
        ):

            def keep(key: tuple[str, int], text: str, reason: str) -> None:
                samples[key] = {"problem": key[0], "sample": key[1], "completion": text, "finish": reason}
                lines.write(json.dumps(samples[key]) + "\n")
                lines.flush()
                bar.advance(1)

            stats, seconds = _generate(state, temperature, missing, None, keep)
        sitting = {"written": len(missing), "tokens": stats.tokens, "passes": stats.passes, "seconds": seconds}
        sitting["committed"] = stats.tokens + stats.ends
        if state.settings.compare_plain:
            plain_texts: dict[tuple[str, int], str] = {}
            with Progress(f"{task}, head 1 alone", len(missing), unit="programs") as bar:

                def compare(key: tuple[str, int], text: str, reason: str) -> None:
                    plain_texts[key] = text
                    bar.advance(1)

                _, plain = _generate(state, temperature, missing, 1, compare)
            differ = sum(plain_texts[key] != samples[key]["completion"] for key in missing)
            sitting |= {"plain_seconds": plain, "plain_differs": differ}
        with appending(sittings) as lines:
            lines.write(json.dumps(sitting) + "\n")
    return {key: samples[key]["completion"] for key in keys}, _speed(whole_lines(sittings))


def _speed(sittings: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up all runs that ended. Samples of an interrupted run are in none of them."""
    total = {name: sum(s[name] for s in sittings) for name in ("written", "tokens", "passes", "seconds")}
    if not total["passes"]:
        return total
    committed = sum(s.get("committed", s["tokens"]) for s in sittings)  # sittings of earlier versions lack it
    found = total | {"tokens_per_pass": committed / total["passes"]}
    compared = [s for s in sittings if "plain_seconds" in s]
    if compared:
        plain = sum(s["plain_seconds"] for s in compared)
        found |= {"plain_seconds": plain, "plain_differs": sum(s["plain_differs"] for s in compared)}
        found["speed_over_plain"] = plain / sum(s["seconds"] for s in compared)
    return found


def _generate(
    state: _Task,
    temperature: float,
    keys: Sequence[tuple[str, int]],
    heads: int | None,
    keep: Callable[[tuple[str, int], str, str], None],
) -> tuple[Stats, float]:
    """Decode the samples `keys`. The seed is the sample's number, so a program does not depend on others."""
    settings = state.settings
    stops = {problem.name: problem.stop for problem in state.problems}
    longest = max(len(state.prompts[name]) for name, _ in keys) + settings.new_tokens
    engine = state.model.engine(min(state.batch, len(keys)), longest, prefill_budget=None)
    asked = {}
    for name, sample in keys:
        sampling = Sampling(temperature, top_p=settings.top_p if temperature else 1.0, seed=sample)
        request = Request(state.prompts[name], settings.new_tokens, sampling, heads, stop=stops[name])
        generation = engine.submit(request)
        asked[id(generation)] = ((name, sample), generation)
    began = time.perf_counter()
    while engine.busy:
        for generation, _ in engine.step():
            if generation.finished:
                keep(asked[id(generation)][0], generation.text, generation.finish_reason or "")
    seconds = time.perf_counter() - began
    return Stats.summed([generation.stats for _, generation in asked.values()]), seconds


def _judge(
    state: _Task, sandbox: Sandbox | None, task: str, temperature: float, samples: dict[tuple[str, int], str]
) -> dict[tuple[str, int], str]:
    """Return for each sample "passed" or the reason why not. Equal programs are run once."""
    file = state.folder / f"verdicts-{temperature:g}.jsonl"
    statuses = {(line["problem"], line["sample"]): line["status"] for line in whole_lines(file)}
    missing = [key for key in samples if key not in statuses]
    by_name = {problem.name: problem for problem in state.problems}
    equal: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for key in missing:
        equal.setdefault((key[0], samples[key]), []).append(key)
    with appending(file) as lines, Progress(f"{task}, tests", len(missing), unit="programs") as bar:
        for chunk in _chunks(list(equal), 64):
            programs: list[Program] = []
            spans = []
            for name, completion in chunk:
                more = by_name[name].programs(completion)
                spans.append((len(programs), len(programs) + len(more)))
                programs += more
            verdicts = [] if sandbox is None else sandbox.run(programs)
            for (name, completion), (start, end) in zip(chunk, spans):
                mine = verdicts[start:end]
                status = by_name[name].status(completion, mine)
                for key in equal[name, completion]:
                    statuses[key] = status
                    line = {"problem": key[0], "sample": key[1], "status": status}
                    lines.write(json.dumps(line | {"detail": next((v.detail for v in mine if v.detail), "")}) + "\n")
                bar.advance(len(equal[name, completion]))
            lines.flush()
    return {key: statuses[key] for key in samples}


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tally(statuses: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for status in statuses:
        found[status] = found.get(status, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _identity(task: str, settings: CodeSettings, model_name: str) -> dict[str, Any]:
    """Return the settings that samples depend on, which are the same for all samples of a folder."""
    kept = {name: getattr(settings, name) for name in ("source", "top_p", "new_tokens", "cut_prompts")}
    # The rest is named only if it is on, so that samples of earlier versions are still accepted.
    more = {name: value for name in ("rewarded", "shots", "examples") if (value := getattr(settings, name))}
    return {"task": task, "model": model_name, **kept, **more}
