"""YAML files of settings: hostile ones are refused in a line, quickly and in little memory."""

from __future__ import annotations

import pytest

from headstart.errors import UsageError
from headstart.training import yaml_settings
from headstart.training.config import load_config
from headstart.training.yaml_settings import read_mapping


def bomb(item: str) -> str:
    lines = ["a0: &a0 {x0: 1, y0: 2}"]
    return "\n".join(lines + [f"a{i}: &a{i} {item.format(', '.join([f'*a{i - 1}'] * 10), n=i)}" for i in range(1, 12)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb("{{<<: [{0}], z{n}: 1}}"), ":5: not YAML (more than 10,000 values)"),
        (bomb("[{0}]"), ":5: not YAML (more than 10,000 values)"),
        ("a: &a [*a]", ":1: not YAML (an anchor that holds itself)"),
        ("a: " + "[" * 3000, "nested more than 50 deep"),
        ("a: " + "{? " * 3000, "nested more than 50 deep"),
        ("- " * 3000, "nested more than 50 deep"),
        ("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
        ("steps: " + "9" * 100_000, ":1: not YAML (a number or date of over 100 characters)"),
        ("a: 1" + ":59" * 100_000, "a number or date of over 100 characters"),
        ("a:\n  b: 2024-99-99", ":2: not YAML ('2024-99-99': month must be in 1..12)"),
        ("a: !!int x", "'x': invalid literal"),
        ("a: !!timestamp x", "not YAML ('x': "),
        ("a: !!bool x", "not YAML ('x': "),
        ("a: " + "x" * 2**20, "larger than 1,048,576 bytes"),
        ("steps: " + "x" * 2**19, "it must be a whole number"),
        ("data: " + "x" * 2**19, "it must hold settings"),
        ('"a\\n' + "b" * 1000 + '": 1', "there is no setting 'a\\nb"),
    ],
)
def test_what_is_large_or_unreadable_is_refused_in_a_short_line(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(file)
    line = str(caught.value)
    assert said in line
    assert len(line.splitlines()) == 1
    assert len(line) < 1000


def test_aliases_merges_and_what_lies_at_the_bounds_are_read(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: [*a, 2.5, 2024-01-01, 'é']}\n")
    values = read_mapping(file)
    assert values["b"]["x"] == 1
    assert values["b"]["y"][:2] == [{"x": 1}, 2.5]
    file.write_text("a: " + "9" * 100 + "\nb: " + "[" * 47 + "]" * 47)
    assert read_mapping(file)["a"] == int("9" * 100)
    # Five values: the mapping, two keys, a list and what it holds. An alias counts as often as it stands for them.
    monkeypatch.setattr(yaml_settings, "MAX_NODES", 9)
    file.write_text("a: &a [1]\nb: [*a]\n")
    assert read_mapping(file)["b"] == [[1]]
    file.write_text("a: &a [1, 2]\nb: [*a]\n")
    with pytest.raises(UsageError, match="more than 9 values"):
        read_mapping(file)
