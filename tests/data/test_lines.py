"""Lines and JSON are read in one way by prepare, distill-data, evaluate, tune and the problems of pass@k."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from chats import chat_tokenizer

from headstart.commands.self_distillation import read_prompts as prompts_to_distill
from headstart.data.lines import parse_json, read_file_lines
from headstart.data.prepare.corpora import list_files
from headstart.data.prepare.documents import Document, Field, read_lines
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection, hold_conversations
from headstart.data.prompts import read_prompt_file
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation.code.problems import load_problems
from headstart.evaluation.inputs import fitting_prompts, prompt_limit, read_prompts

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
"""Characters at which only str.splitlines() ends a line."""


def test_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    content = f"\ufeff{ODD}\r\n \t\r\n\n x \nlast\u2028"
    for name, raw in (("p.txt", content.encode()), ("p.txt.gz", gzip.compress(content.encode()))):
        (tmp_path / name).write_bytes(raw)
        assert list(read_file_lines(tmp_path / name)) == [(1, ODD), (4, " x "), (5, "last\u2028")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_reader_keeps_odd_characters_and_drops_the_byte_order_mark(tmp_path: Path, mark: str, end: str) -> None:
    long = f'"n": 1{"0" * 5000}, "x": -1{"0" * 5000}'
    lines = [json.dumps({field: ODD}, ensure_ascii=False)[:-1] + f", {long}}}" for field in ("prompt", "text")]
    file = tmp_path / "p.jsonl"
    file.write_bytes((mark + end.join(lines) + end).encode())
    assert [prompt.text for prompt in prompts_to_distill(file)] == [ODD, ODD]
    assert [bytes(ids).decode() for ids in read_prompts(file, ByteTokenizer())] == [ODD, ODD]
    file.write_bytes((mark + lines[1] + end).encode())
    found = list(read_lines(list_files([str(file)])[0], Field(), 0, file.stat().st_size, 1))
    assert [document.text for document in found if isinstance(document, Document)] == [ODD]
    (tmp_path / "p.txt").write_bytes((mark + ODD + end + ODD).encode())
    assert [prompt.text for prompt in prompts_to_distill(tmp_path / "p.txt")] == [ODD, ODD]
    assert [bytes(ids).decode() for ids in read_prompts(tmp_path / "p.txt", ByteTokenizer())] == [ODD, ODD]
    problem = {"task_id": "t", "prompt": ODD, "entry_point": "f", "test": "def check(c): pass"}
    file.write_bytes((mark + json.dumps(problem, ensure_ascii=False) + end).encode())
    assert load_problems("humaneval", str(file))[0].prompt == ODD


def test_compressed_prompts_and_capital_names(tmp_path: Path) -> None:
    (tmp_path / "P.JSONL.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}'))
    assert [each.text for each in read_prompt_file(tmp_path / "P.JSONL.gz")] == ["a", "b"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-12])
    with pytest.raises(UsageError, match="damaged"):
        read_prompt_file(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfea", "line 1: cannot be read as UTF-8"),
        (b'{"prompt": "a"}\n\xff', "line 2: cannot be read as UTF-8"),
        (b"[" * 100_000, "prompt 1: not JSON .nested too deeply"),
        (b'{"prompt": 5}', "prompt 1: no JSON object with"),
        (b'"a"', "prompt 1: no JSON object with"),
        (b'{"messages": 5}', "prompt 1: holds int, not a list of messages"),
        (b"\xef\xbb\xbf", "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    for read in (prompts_to_distill, lambda file: read_prompts(file, ByteTokenizer())):
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "p.jsonl")


def test_whole_numbers_of_common_length_stay_exact() -> None:
    assert parse_json("[9007199254740993, -2, 1.5]") == [9007199254740993, -2, 1.5]
    assert parse_json("-1" + "0" * 5000) == -float("inf")


CHATS = [
    {"messages": [{"role": "user", "content": "hi"}]},
    {"messages": [{"role": "user", "content": "q" * 40}, {"role": "assistant", "content": "old"}]},
    {
        "conversations": [
            {"from": "human", "value": "yes"},
            {"from": "gpt", "value": "z"},
            {"from": "human", "value": "n"},
        ]
    },
    {"prompt": "plain " * 20},
]


def test_conversations_are_prompts_whose_end_is_never_cut(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in CHATS))
    opened = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    whole = fitting_prompts(file, tokenizer)
    prompts = [tokenizer._engine.decode(ids, skip_special_tokens=False) for ids in whole.prompts]
    assert prompts[1] == f"<|im_start|>user\n{'q' * 40}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[2].count("<|im_start|>") == 4 and prompts[2].endswith("n<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[3] == "plain " * 20 and (whole.skipped, whole.cut) == (0, 0)
    turn_end = frozenset(tokenizer.encode("<|im_end|>"))
    assert whole.ends == [turn_end] * 3 + [frozenset()]
    skipping = fitting_prompts(file, tokenizer, 40)
    assert (skipping.prompts, skipping.skipped) == ([whole.prompts[0]], 3)
    start = fitting_prompts(file, tokenizer, 40, "start")
    assert (start.skipped, start.cut, start.prompts) == (2, 1, [whole.prompts[0], whole.prompts[3][:40]])
    middle = fitting_prompts(file, tokenizer, 40, "middle")
    assert (middle.skipped, middle.cut) == (0, 3) and all(len(ids) <= 40 for ids in middle.prompts)
    assert list(middle.prompts[1][-len(opened) :]) == opened and middle.prompts[1][:2] == whole.prompts[1][:2]
    with pytest.raises(UsageError, match="all 4 prompts are longer than 3 tokens"):
        fitting_prompts(file, tokenizer, 3)


def test_prompts_of_a_file_may_fill_the_context() -> None:
    assert prompt_limit(None, None, 32, 128) == (96, "skip")
    assert prompt_limit(10, None, 32, 128) == (10, "start")
    assert prompt_limit(10, "middle", 32, 128) == (10, "middle")


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(UsageError, match=r"prompt 1: .*no chat template"):
        read_prompts(tmp_path / "p.jsonl", ByteTokenizer())
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hi"}]}\n')
    with pytest.raises(UsageError, match="prompt 1: asks nothing"):
        read_prompts(tmp_path / "p.jsonl", ByteTokenizer())


def test_texts_to_distill_may_be_messages_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("who?\nwhere?\n")
    found = prompts_to_distill(tmp_path / "p.txt", as_chat=True)
    assert [prompt.questions for prompt in found] == [
        (({"role": "user", "content": each},),) for each in ("who?", "where?")
    ]


def test_conversations_and_texts_are_prepared_together(tmp_path: Path) -> None:
    """Take what distill-data wrote together with documents, like `adapt --data`: every token of both counts."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    own, plain, text = (tmp_path / name for name in ("own.jsonl", "plain.jsonl", "a.txt"))
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    own.write_text(json.dumps({"place": 0, "messages": said, "finish_reason": "end"}) + "\n")
    plain.write_text(json.dumps({"place": 0, "prompt": "a", "text": "abc"}) + "\n")
    text.write_text("def")
    assert hold_conversations([str(plain), str(text), str(own)])
    assert not hold_conversations([str(plain), str(text)])
    both = Selection(conversations=True, texts=True)
    prepare(
        [str(own), str(plain), str(text)],
        tmp_path / "data",
        tokenizer,
        Preparation(selection=both, validation_fraction=0),
    )
    shards = TokenShards.open(tmp_path / "data", "train")
    assert shards.targets is not None
    targets = shards.targets[0 : len(shards.tokens)]
    found = {}
    for index, begin in enumerate(shards.documents.tolist()):
        ids = shards.document(index)
        mine = targets[begin : begin + len(ids)]
        found[tokenizer.decode(ids.tolist()).strip()] = tokenizer.decode(ids[mine].tolist()), int((~mine).sum())
    assert found["abc"] == ("abc", 0) and found["def"] == ("def", 0)
    (conversation,) = (value for name, value in found.items() if "yes" in name)
    assert conversation[0] == "yes" and conversation[1] > 5
