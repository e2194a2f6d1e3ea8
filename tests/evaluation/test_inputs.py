from __future__ import annotations

import pytest

from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation.free_running import repeated
from headstart.evaluation.inputs import cut_prompts, read_documents, read_prompts

BYTES = ByteTokenizer()


def test_documents_of_folders_and_json_lines(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.jsonl").write_text('{"text": "é"}\n{"text": ""}\n')
    assert read_documents([str(tmp_path)], BYTES) == ([list(b"x = 1\n"), list("é".encode())], 8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").write_text("")
    with pytest.raises(UsageError, match="hold no text"):
        read_documents([str(tmp_path / "empty")], BYTES)


def test_prompts_are_pieces_that_go_on_and_lie_apart() -> None:
    documents = [list(range(100, 125)), [1, 2], list(range(10))]
    assert cut_prompts(documents, 9, 6, 4) == [tuple(range(102, 108)), tuple(range(112, 118)), tuple(range(6))]
    assert cut_prompts(documents, 2, 6, 4) == [tuple(range(102, 108)), tuple(range(112, 118))]
    assert cut_prompts(documents, 1, 3, 2) == [tuple(range(100, 103))]
    with pytest.raises(UsageError, match=r"no document has 30 tokens \(20 of a prompt and 10 after it\)"):
        cut_prompts(documents, 3, 20, 10)


def test_prompts_of_a_file(tmp_path) -> None:
    lines, json_lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("abc\n\nde\n")
    assert read_prompts(lines, BYTES) == [tuple(b"abc"), tuple(b"de")]
    json_lines.write_text('{"prompt": "abc\\n"}\n{"text": "de"}\n')
    assert read_prompts(json_lines, BYTES, 3) == [tuple(b"abc"), tuple(b"de")]
    json_lines.write_text('{"prompt": "abc"}\n{"question": "de"}\n')
    with pytest.raises(UsageError, match="prompt 2: no JSON object with"):
        read_prompts(json_lines, BYTES)
    lines.write_text("\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts(lines, BYTES)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt", BYTES)


def test_repeated_grams_are_counted_within_an_output() -> None:
    assert repeated([list(range(20))]) == 0
    assert repeated([[1, 2] * 8], size=2) == pytest.approx(13 / 15)  # 15 pairs, 2 of them new
    assert repeated([list(range(9)), list(range(9))]) == 0
