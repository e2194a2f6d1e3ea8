"""Proofs of exports: what is compared, and what the report says about engines that differ, fail or are missing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import engines
from bench.engines import PROOFS, Answers, Settings, Trial
from bench.environments import ENVIRONMENTS, Environment
from bench.peers.with_headstart import answer
from bench.processes import ProcessError
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model_tokenizer
from tests.models import random_model

NO_MODULE = Environment(("no-such-package==1",), "no_such_module_here", cost="nothing")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tests need no compiled kernels, and no process of its own for our answers."""
    monkeypatch.setenv("HEADSTART_NATIVE", "0")
    monkeypatch.setattr(
        engines.processes, "call", lambda function, case, threads: json.loads(json.dumps(function(case)))
    )


@pytest.fixture(scope="session")
def medusa_directory(model_directory, tmp_path_factory):
    """A tiny byte model with three medusa heads, in float32."""
    config = replace(load_config(model_directory), heads=3, head_kind="medusa", layers=2)
    directory = tmp_path_factory.mktemp("medusa") / "model"
    save_model(random_model(config), directory, load_model_tokenizer(model_directory))
    return directory


def pretend(monkeypatch, change=lambda output, drafts: output):
    """Let Headstart answer for every engine, in this process; `change` makes an engine of it."""
    asked: list[dict[str, Any]] = []

    def ask(trial: Trial, engine: str, case: dict[str, Any], ends: frozenset[int]) -> Answers:
        asked.append({"engine": engine, **case})
        trial.versions[engine] = f"{engine} 1"
        drafts = 0 if case["speculative"] is None else case["speculative"]["num_speculative_tokens"]
        case = case | {"heads_from": None, "heads": [1]}
        outputs = json.loads(json.dumps(answer(case)))["outputs"]["1"]
        return Answers.of_engine([change(each, drafts) for each in outputs], ends)

    monkeypatch.setattr(Trial, "ask", ask)
    monkeypatch.setattr(Trial, "python", lambda self, engine: sys.executable)
    return asked


def run(model: Path, **changes: Any):
    found = engines.run(Settings(model=model, prompt_count=2, new_tokens=8, **changes))
    return {row["what"]: row for row in found["measurements"]}, found


def test_an_export_is_right_if_outputs_are_equal_and_as_many_drafts_are_accepted(medusa_directory, monkeypatch):
    asked = pretend(monkeypatch)
    rows, found = run(medusa_directory, formats=("headstart", "medusa"), engines=("vllm",))
    assert list(rows) == [
        "headstart, vllm: plain text equals Headstart's",
        "medusa, medusa heads, vllm, 2 drafts: text equals the engine's plain text",
        "medusa, medusa heads, vllm, 2 drafts: mean acceptance length, difference from Headstart's",
    ]
    plain, text, length = rows.values()
    assert plain["met"] and plain["median"] == 2 and plain["details"]["prompts read like here"] == "2 of 2"
    assert text["met"] and text["details"]["plain text like Headstart's"] == "2 of 2"
    assert length["details"]["engine"] == 1 and length["details"]["headstart"] >= 1
    # The engine loads the ordinary model, plainly and then with the heads that lie next to it.
    directory, again = asked[1]["model"], asked[2]["model"]
    assert directory == again and directory.endswith("/base") and asked[1]["speculative"] is None
    speculative = asked[2]["speculative"]
    assert (speculative["method"], speculative["num_speculative_tokens"]) == ("medusa", 2)
    assert speculative["model"] == directory.replace("/base", "/vllm")
    assert str(medusa_directory.parent) not in json.dumps(found["settings"])


def test_another_text_and_fewer_accepted_drafts_are_missed_bars(medusa_directory, monkeypatch):
    def change(output, drafts):
        if drafts:
            output["tokens"][3] ^= 1
            output["passes"] /= 2  # twice as long as ours at least
        return output

    pretend(monkeypatch, change)
    rows, found = run(medusa_directory, formats=("medusa",), engines=("vllm",))
    text, length = rows.values()
    assert text["met"] is False and text["median"] == 0 and text["details"]["differs for prompts"] == "1, 2"
    assert length["details"]["engine"] == 2 and not found["met"]
    assert length["met"] is (abs(2 / length["details"]["headstart"] - 1) <= 0.05)


def test_an_engine_that_fails_or_is_missing_does_not_stop_the_others(medusa_directory, monkeypatch):
    def ask(trial, engine, case, ends):
        raise ProcessError("failed: it ended with status 1; out of luck")

    monkeypatch.setattr(Trial, "ask", ask)
    monkeypatch.setitem(ENVIRONMENTS, "vllm", NO_MODULE)
    monkeypatch.setitem(ENVIRONMENTS, "transformers", replace(NO_MODULE, package="json"))
    rows, found = run(medusa_directory, formats=("headstart", "medusa"), engines=("vllm", "transformers"))
    assert list(rows) == ["headstart, transformers: loads and runs"]
    row = rows["headstart, transformers: loads and runs"]
    assert row["met"] is False and row["details"]["why"].endswith("out of luck")
    missing = [note for note in found["notes"] if "vllm: not installed" in note]
    assert len(missing) == 1 and "pip install no-such-package==1" in missing[0]


def test_answers_end_before_the_end_token_and_count_passes_behind_the_first():
    outputs = [
        {"prompt": [1, 2], "tokens": [5, 6, 9, 7], "behind": 3, "passes": 2},
        {"prompt": [3], "tokens": [4], "behind": 0, "passes": 0},
    ]
    found = Answers.of_engine(outputs, frozenset({9}))
    assert found.outputs == [[5, 6], [4]] and found.acceptance == 1.5
    other = replace(found, prompts=[[1, 2], [4]], outputs=[[5, 6], [4]])
    assert found.same_prompts(other) == 1 and found.same_outputs(other) == 2


def test_our_answers_with_and_without_heads(model_directory):
    """All drafts of this model are right: four heads commit four tokens a pass."""
    case = {"model": str(model_directory), "dtype": "float32", "heads_from": None, "threads": 1, "new_tokens": 13}
    found = answer({**case, "prompts": ["abc"], "heads": [1, 4]})
    plain, drafted = found["outputs"][1][0], found["outputs"][4][0]
    assert plain["tokens"] == drafted["tokens"] and len(plain["tokens"]) == 13 and plain["behind"] == plain["passes"]
    assert drafted["behind"] / drafted["passes"] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_count": 0}, "--prompt-count is 0; it must be at least 1"),
        ({"context": 8}, "--context 8: must hold a prompt and 8 new tokens"),
        ({"engine_python": ("sglang=/bin/sh",)}, "give ENGINE=FILE, ENGINE one of vllm, transformers, llama-cpp"),
        ({"engine_python": ("vllm=/no/such/file",)}, "--engine-python vllm=/no/such/file: give ENGINE=FILE"),
    ],
)
def test_bad_settings(model_directory, changes, message):
    with pytest.raises(UsageError, match=message):
        engines.run(Settings(**{"model": model_directory, "new_tokens": 8, **changes}))


def test_each_proof_fits_the_heads_of_its_format(medusa_directory):
    config = load_config(medusa_directory)
    fitting = [proof.format for proof in PROOFS if proof.fits(config)]
    assert fitting == ["hf-code", "medusa"]
    sequential = replace(config, head_kind="sequential", wiring="causal")
    mimo = next(proof for proof in PROOFS if proof.fits(sequential) and proof.format == "mimo")
    assert mimo.drafts(sequential) == ((1,), (2,))
    assert mimo.drafts(replace(sequential, heads=2)) == ((1,), ())
    assert mimo.drafts(replace(sequential, norm_output=True)) == ((2,), ())


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    made = []

    class Done:
        returncode, stdout, stderr = 0, "", ""

    def pip(step, **_):
        made.append(step)
        (tmp_path / "env").mkdir(exist_ok=True)
        return Done

    monkeypatch.setattr("bench.environments.subprocess.run", pip)
    environment = Environment(("one==1", "two==2"), "one", ("three",))
    python = environment.make(tmp_path / "env")
    assert [step[1:] for step in made] == [
        ["-m", "venv", str(tmp_path / "env")],
        ["-m", "pip", "install", "one==1", "two==2"],
        ["-m", "pip", "uninstall", "--yes", "three"],
    ]
    assert environment.make(tmp_path / "env") == python and len(made) == 3
    replace(environment, packages=("one==2",)).make(tmp_path / "env")
    assert len(made) == 6
    Done.returncode, Done.stderr = 1, "some lines\nERROR: No matching distribution\n"
    with pytest.raises(UsageError, match=r"-m venv .* failed \(ERROR: No matching distribution\)"):
        environment.make(tmp_path / "env")


@pytest.mark.slow  # processes that import transformers
def test_transformers_runs_its_exports(medusa_directory):
    pytest.importorskip("transformers")
    rows, _ = run(medusa_directory, formats=("headstart", "hf-code"), engines=("transformers",))
    assert len(rows) == 3 and all(row["met"] for row in rows.values())
