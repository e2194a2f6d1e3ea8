"""Check the forms of calls: their parser, and that a required call is what the schemas of the tools say."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from headstart.serving.tools import CallParser, Hermes, Llama, Mistral, ToolFormat, choose_format, written_out

CALL = '{"name": "f", "arguments": {"x": "a}\\"{,", "y": [1, {"z": 2}]}}'
ARGUMENTS = '{"x": "a}\\"{,", "y": [1, {"z": 2}]}'


def parsed(form: ToolFormat, text: str, size: int = 10_000) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and the calls of a text that arrives in pieces of so many characters."""
    parser = CallParser(form, {"f", "g"})
    content, calls = "", []
    for at in range(0, len(text), size):
        said, parts = parser.push(text[at : at + size])
        content += said
        for part in parts:
            if part.name is not None:
                assert part.index == len(calls)
                calls.append((part.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = name, arguments + part.arguments
    return content + parser.finish(), calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (Hermes(), "hi there ", "hi there ", []),
        (Hermes(), f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
        (Hermes(), f"Well.\n\n<tool_call>{CALL}</tool_call>\n", "Well.", [("f", ARGUMENTS)]),
        (Hermes(), f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}", "", [("f", ARGUMENTS)] * 2),
        (Hermes(), '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call> so', "so", [("g", '{"a": 1}')]),
        (Hermes(), '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
        (Hermes(), '<tool_call>{"name": "g", "arguments": {"a', "", [("g", '{"a')]),
        (Hermes(), "a <tool_call> b", "a <tool_call> b", []),
        (Hermes(), "a <tool", "a <tool", []),
        (Hermes(), '<tool_call>{"name": "h", "arguments": {}}', '<tool_call>{"name": "h", "arguments": {}}', []),
        (Hermes(), "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        (Hermes(), '<tool_call>{"name": ["f"]}', '<tool_call>{"name": ["f"]}', []),
        (Mistral(), f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [("f", ARGUMENTS)] * 2),
        (Mistral(), "[TOOL_CALLS] [oh]", "[TOOL_CALLS] [oh]", []),
        (Llama(), '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        (Llama(), '\n<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "",
         [("f", '{"x": 1}'), ("g", "{}")]),
        (Llama(), '{"x": 1} is JSON', '{"x": 1} is JSON', []),
    ],
)  # fmt: skip
def test_calls_are_found_in_pieces_of_any_size(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert parsed(form, text, size) == (content, calls)


def test_no_text_is_lost_or_breaks_the_parser() -> None:
    dice = random.Random(0)
    marks = ["<tool_call>", "</tool_call>"]
    parts = ["{", "}", '"', "\\", '"name"', ": ", '"f"', ", ", '"arguments"', "[", " x\n"]
    for _ in range(400):
        text = "".join(dice.choice([*marks, *parts]) for _ in range(dice.randrange(12)))
        whole = parsed(Hermes(), text)
        assert parsed(Hermes(), text, 1) == whole and (whole[1] or whole[0] == text)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", Hermes),
        ("{{ '[TOOL_CALLS] [' }}", Mistral),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", None),
        ("Environment: ipython {{ parameters }}", Llama),
        ("<tool_call><function=f>", None),
        ("{{ message.content }}", None),
    ],
)
def test_a_template_names_its_form(template: str, form: type[ToolFormat] | None) -> None:
    found = choose_format(template)
    assert found is None if form is None else isinstance(found, form)


def test_tools_are_written_out_for_templates_that_show_none() -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "b"},
    ]
    system, user, said, results = written_out(messages, [{"type": "function", "function": {"name": "f"}}])
    assert system["content"].startswith("Be brief.") and '{"name": "f"}' in system["content"]
    assert user == messages[1] and set(said) == {"role", "content"}
    assert parsed(Hermes(), said["content"]) == ("", [("f", '{"x": 1}')] * 2)
    assert results["role"] == "user" and results["content"].count("<tool_response>") == 2
    assert written_out(messages[:2], []) == messages[:2]
    assert json.loads(parsed(Hermes(), said["content"])[1][0][1]) == {"x": 1}
