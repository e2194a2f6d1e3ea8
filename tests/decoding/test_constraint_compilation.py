"""Constraints that cannot be, and what compiling one takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from constrained import BYTES, CASES, PERSON, PROMPT, one
from shapes import packed

from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer
from headstart.decoding import constraints as constraints_module
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.engine import Engine
from headstart.decoding.settings import Request
from headstart.errors import UsageError


def test_grammars_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = ByteTokenizer(), []
    original = constraints_module.compile_constraint
    monkeypatch.setattr(constraints_module, "compile_constraint", lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(constraints_module, "KEPT_GRAMMARS", 2)
    for pattern in "ab", "ab", "cd", "ab", "ef", "ab", "cd":
        first = compiled(Constraint.regex(pattern), tokenizer, 256)
        assert first.push(ord(pattern[0])) and not first.push(ord("z"))  # of its own state
    assert [call[0].text for call in calls] == ["ab", "cd", "ef", "cd"]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.regex("[a"), "regular expression: unclosed character class"),
        (Constraint.regex("a(?=b)"), "regular expression: look-around"),
        (Constraint.regex("[a&&b]"), "regular expression: no text"),
        (Constraint.json_schema('{"type":'), "JSON schema: not JSON"),
        (Constraint.json_schema("[1]"), "JSON schema: it must be an object"),
        (Constraint.json_schema({"type": "objekt"}), "JSON schema: Invalid type: objekt"),
        (Constraint.json_schema({"not": {}}), 'JSON schema: Unimplemented keys: \\["not"\\]'),
        (Constraint.json_schema({"type": "string", "format": "x"}), "JSON schema: Unknown format: x"),
        (Constraint.json_schema({"minimum": 3, "maximum": 1, "type": "integer"}), "JSON schema: Unsatisfiable"),
        (Constraint.choice([]), "choice: \\[\\] must be a list"),
        (Constraint.choice(["a", ""]), "none of them empty"),
        (Constraint.lark("start: foo"), "Lark grammar: .*unknown name"),
        (Constraint.regex("ü"), "regular expression: no text of this model's tokens"),
    ],
)
def test_impossible_constraints(constraint: Constraint, message: str) -> None:
    engine = Engine(packed("transformer-parallel", torch.float32), tokenizer=BYTES)
    with pytest.raises(UsageError, match=message) as raised:
        engine.submit(Request(PROMPT, constraint=constraint))
    assert "\n" not in str(raised.value) and not engine.busy


def test_what_a_constraint_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = packed("transformer-parallel", torch.float32)
    with pytest.raises(UsageError, match="no constraint 'yaml'"):
        Constraint("yaml", "")
    with pytest.raises(UsageError, match="needs a tokenizer"):
        Engine(model).submit(Request(PROMPT, constraint=CASES["words"]))
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    Library(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="its kind does not support constraints"):
        Engine(model, tokenizer=PretrainedTokenizer(tmp_path)).submit(Request((1,), constraint=CASES["words"]))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    letters = {"model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []}, "decoder": level}
    (tmp_path / "tokenizer.json").write_text(json.dumps(letters))
    with pytest.raises(UsageError, match="no text of this model's tokens satisfies it"):
        Engine(model, tokenizer=PretrainedTokenizer(tmp_path)).submit(Request((1,), constraint=CASES["words"]))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = Engine(model, tokenizer=ByteTokenizer())
    with pytest.raises(UsageError, match=r"pip install 'headstart\[grammar\]'"):
        engine.submit(Request(PROMPT, constraint=CASES["words"]))
    assert len(one(engine, PROMPT, 5).tokens) == 5


def test_of_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(PERSON))
    assert Constraint.named(str(file), None) == Constraint.named(json.dumps(PERSON), None) == CASES["schema"]
    assert Constraint.named(None, "a+") == Constraint.regex("a+") and Constraint.named(None, None) is None
    with pytest.raises(UsageError, match="give one of them"):
        Constraint.named("{}", "a")
    with pytest.raises(UsageError, match=r"nowhere.json: No such file"):
        Constraint.named("nowhere.json", None)
