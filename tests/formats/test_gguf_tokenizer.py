"""The tokenizer of a GGUF file: vocabularies made on the spot, and llama.cpp's ids on real files."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headstart.data.byte_tokenizer import ByteTokenizer, byte_alphabet
from headstart.data.chat_template import load_chat_template
from headstart.data.detokenizer import TextStream
from headstart.data.pieces import TextOffsets
from headstart.data.tokenizers import PretrainedTokenizer
from headstart.decoding.constraint_vocabulary import vocabulary_of
from headstart.decoding.constraints import Constraint, compiled
from headstart.errors import UsageError
from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_split import SPLITS, pre_tokenizer, split_of
from headstart.formats.gguf_tokenizer import tokenizer_from_metadata
from headstart.formats.gguf_vocabulary import read_vocabulary
from tests.gguf_models import real_files

gguf = pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LACKING = "ĄĞñ"
"""Characters of the byte alphabet (0x04, 0x1e, 0xf1) for which the small vocabulary has no token."""


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a small byte-level BPE in which ids 3.. are bytes, merges follow, and two ids are unused."""
    merges = ["t h", "th e", "Ġ the", "! !", "1 9", "a b"]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [letter for letter in byte_alphabet() if letter not in LACKING]
    names += [merge.replace(" ", "") for merge in merges] + ["<think>", "[PAD1]", "[PAD2]"]
    types = [CONTROL] * 3 + [NORMAL] * (len(names) - 6) + [USER_DEFINED, UNUSED, UNUSED]
    values = {
        **{"model": "gpt2", "pre": "smollm", "tokens": names, "token_type": types, "merges": merges},
        **{"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "add_bos_token": False},
    }
    return _metadata(values | changes)


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary, whose tokens merge by score."""
    pieces = ["▁", "a", "b", "c", "t", "h", "e", "th", "he", "▁th", "the", "ab", "bc", "aa", "aaaa", "▁the"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<start_of_turn>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED, CONTROL]
    order = {"bc": 0, "the": -1, "th": -2, "aa": -3, "▁th": -4, "ab": -5, "▁the": -7, "he": -8, "aaaa": -9}
    scores = [float(order.get(name, -100)) for name in names]
    return _metadata(
        {"model": "llama", "pre": "default", "tokens": names, "token_type": types, "scores": scores} | changes
    )


def _metadata(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def made(metadata: dict[str, Any]) -> PretrainedTokenizer:
    tokenizer = tokenizer_from_metadata(metadata, "m.gguf")
    assert isinstance(tokenizer, PretrainedTokenizer)
    return tokenizer


def pieces(tokenizer: PretrainedTokenizer, text: str) -> list[str | None]:
    return [tokenizer.piece(token) for token in tokenizer.encode(text)]


def test_no_vocabulary() -> None:
    assert tokenizer_from_metadata({}, "m") is None
    assert tokenizer_from_metadata({"tokenizer.ggml.model": "no_vocab"}, "m") is None


def test_byte_level_bpe() -> None:
    tokenizer = made(byte_level())
    assert pieces(tokenizer, "ab the 199") == ["ab", "Ġthe", "Ġ", "1", "9", "9"]  # smollm: digits one by one
    assert pieces(tokenizer, "x<|im_end|><think>y") == ["x", "<|im_end|>", "<think>", "y"]
    literal = [tokenizer.piece(token) for token in tokenizer.encode_literally("<|im_end|><think>")]
    assert literal == [*"<|im_end|>", "<think>"]  # as llama.cpp without parse_special
    assert tokenizer.decode(tokenizer.encode("the é 日<|im_end|><think>!")) == "the é 日<think>!"
    assert (tokenizer.end_id, tokenizer.end_ids, tokenizer.start_ids) == (2, {0, 2}, ())
    assert tokenizer.piece(tokenizer.encode("<think>")[0] + 1) is None  # [PAD1]
    assert tokenizer.vocab_size == len(byte_level()["tokenizer.ggml.tokens"]) - 2


def test_a_byte_without_a_token_is_dropped_and_nothing_merges_over_the_gap() -> None:
    tokenizer = made(byte_level())
    assert pieces(tokenizer, "!\x04! !!") == ["!", "!", "Ġ", "!!"]
    assert pieces(tokenizer, "a\x1eb ab") == ["a", "b", "Ġ", "ab"]


def test_whole_words_are_kept_where_the_split_says_so() -> None:
    names = [*byte_level()["tokenizer.ggml.tokens"], "whole"]
    types = [*byte_level()["tokenizer.ggml.token_type"], NORMAL]
    for pre, expected in (("llama-bpe", ["whole"]), ("smaug-bpe", [*"whole"])):
        tokenizer = made(byte_level(pre=pre, tokens=names, token_type=types, add_bos_token=None))
        assert pieces(tokenizer, "whole") == expected
        assert tokenizer.start_ids == ((1,) if pre == "llama-bpe" else ())  # in files that do not say


def test_sentencepiece() -> None:
    tokenizer = made(sentencepiece())
    assert pieces(tokenizer, "the abc") == ["▁the", "▁", "a", "bc"]  # "bc" has a higher score than "ab"
    assert pieces(tokenizer, "aaaaaa") == ["▁", "aaaa", "aa"]
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    # The space before text also comes behind a special token, a token of the user included.
    assert pieces(tokenizer, "a<start_of_turn>b  c") == ["▁", "a", "<start_of_turn>", "▁", "b", "  ", "▁", "c"]
    assert tokenizer.decode(tokenizer.encode("the é 日 a")) == "the é 日 a"
    assert (tokenizer.end_id, tokenizer.start_ids) == (2, (1,))
    assert tokenizer.own_start() == (1,)
    bare = made(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert pieces(bare, "the abc") == ["the", "▁", "a", "bc"] and bare.start_ids == () == bare.own_start()


def slow_merges(names: Sequence[str], scores: Sequence[float], text: str) -> list[str]:
    """Merge the neighbours whose union has the highest score, the leftmost of equals, until there are none."""
    of = dict(zip(names, scores))
    parts = list(text)
    while True:
        pairs = [(-of[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in of]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_sentencepiece_merges_like_its_definition() -> None:
    random.seed(0)
    letters = "ab▁c"
    names = [*sorted({"".join(random.choices(letters, k=random.randint(2, 5))) for _ in range(80)}), *letters]
    scores = [-float(random.random()) for _ in names]
    base = sentencepiece()
    tokens = base["tokenizer.ggml.tokens"][:259] + names
    types = base["tokenizer.ggml.token_type"][:259] + [NORMAL] * len(names)
    tokenizer = made(
        sentencepiece(tokens=tokens, token_type=types, scores=[-1e3] * 259 + scores, add_space_prefix=False)
    )
    for _ in range(500):
        text = "".join(random.choices("ab c", k=random.randint(1, 40)))
        assert pieces(tokenizer, text) == slow_merges(names, scores, text.replace(" ", "▁")), text


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, kind: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}<|im_end|>{% endfor %}"
    ours = made({**kind(add_bos_token=True), "tokenizer.chat_template": template, "tokenizer.chat_template.tool": "x"})
    ours.save(tmp_path)
    again, theirs = PretrainedTokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (again.vocab_size, again.end_id, again.own_start()) == (ours.vocab_size, ours.end_id, ours.start_ids)
    assert again.skipped == ours.skipped and theirs.eos_token_id == ours.end_id
    for text in ("the abc  199 é日🎉\n", "!\x04!", "<|im_end|></s><think>  x<unk>", "", " ", "aaaaaaa"):
        ids = ours.encode(text)
        assert again.encode(text) == ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.start_ids, *ids] == theirs(text)["input_ids"]
        assert again.encode_with_offsets(text) == ours.encode_with_offsets(text)
        assert again.decode(ids) == ours.decode(ids)
    said = [{"role": "user", "content": "the"}]
    rendered = load_chat_template(ours)
    assert rendered is not None and load_chat_template(again) == rendered
    assert rendered.render(said) == theirs.apply_chat_template(said, tokenize=False)
    read = read_vocabulary(ours, ours.vocab_size)  # and back into a GGUF file
    assert read.pre == kind()["tokenizer.ggml.pre"]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_a_tokenizer_travels_to_another_process(kind: Any) -> None:
    tokenizer = made(kind())
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the abc</s>") == tokenizer.encode("the abc</s>") and again.end_ids == tokenizer.end_ids


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_streams_and_offsets(kind: Any) -> None:
    tokenizer = made(kind())
    text = "the 日é🎉 ab"
    ids = tokenizer.encode(text)
    stream, offsets = TextStream(tokenizer, [tokenizer.end_id]), TextOffsets(tokenizer, [tokenizer.end_id])
    said, places = "", []
    for token in ids:
        places.append(offsets.push(token))
        said += stream.push([token])
        assert "\N{REPLACEMENT CHARACTER}" not in said and text.startswith(said.removeprefix(" "))
    assert (said + stream.finish()).removeprefix(" ") == text
    assert places == sorted(places) and places[0] == 0 and places[-1] >= len(text) - 2


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Constraint.regex("(a\x04|the) !"), "the !"),
        (Constraint.choice(["a\x1e", "ab"]), "ab"),
        (Constraint.json_schema({"enum": ["\x04", "the"]}), '"the"'),
        (Constraint.lark('start: "ab" | "\\u0004"'), "ab"),
    ],
)
def test_constraints_on_a_vocabulary_that_lacks_bytes(constraint: Constraint, text: str) -> None:
    tokenizer = made(byte_level())
    assert set(vocabulary_of(tokenizer).lacking) == {0x04, 0x1E, 0xF1}
    matcher = compiled(constraint, tokenizer, tokenizer.vocab_size)
    assert all(matcher.push(token) for token in tokenizer.encode(text)) and matcher.may_end
    with pytest.raises(UsageError, match="no text of this model's tokens"):
        compiled(Constraint.choice(["\x04"]), tokenizer, tokenizer.vocab_size)


def test_the_byte_tokenizer_comes_back() -> None:
    found = read_vocabulary(ByteTokenizer(), 300)
    names = [name or f"[UNUSED{i}]" for i, name in enumerate(found.tokens)]
    types = [CONTROL if i == 255 else UNUSED if i > 255 else NORMAL for i in range(300)]
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": names, "token_type": types, "merges": ["<|end|> <|end|>"]}
    assert isinstance(tokenizer_from_metadata(_metadata(values), "m"), ByteTokenizer)


def test_a_file_whose_token_is_not_utf8(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", b"\xff", b"\xfe"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"m.gguf: .*token 1, '.udcff', is not UTF-8"):
        tokenizer_from_metadata(GgufFile(tmp_path / "m.gguf").metadata, "m.gguf")


def test_end_and_start_tokens() -> None:
    names = [*byte_level()["tokenizer.ggml.tokens"], "<|eom_id|>", "</s>", "stop"]
    types = [*byte_level()["tokenizer.ggml.token_type"], CONTROL, NORMAL, NORMAL]
    size = len(names)
    tokenizer = made(byte_level(tokens=names, token_type=types, eot_token_id=size - 1, add_bos_token=True))
    assert tokenizer.end_ids == {0, 2, size - 3, size - 2, size - 1}
    assert tokenizer.start_ids == (1,) == tokenizer.own_start()
    assert tokenizer.encode("</s>") == [size - 2]  # llama.cpp takes such a name for a control token
    assert made(byte_level(eos_token_id=None)).end_id == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": (byte_level(model="rwkv"), "of the kind rwkv"),
    "kind of another type": (byte_level(model=5), "tokenizer.ggml.model is 5"),
    "split": (byte_level(pre="kimi-k2"), "splits text as kimi-k2"),
    "no tokens": (byte_level(tokens=None), "tokens is missing"),
    "empty": (byte_level(tokens=[]), "tokens is empty"),
    "tokens of another type": (byte_level(tokens=["a", 5]), "must be a list of strings"),
    "tokens that are no list": (byte_level(tokens="ab"), "must be a list of strings"),
    "twice": (byte_level(tokens=[*byte_level()["tokenizer.ggml.tokens"][:-1], "the"]), "are both the"),
    "not UTF-8": (byte_level(tokens=[*byte_level()["tokenizer.ggml.tokens"][:-1], "a\udcff"]), "is not UTF-8"),
    "types": (byte_level(token_type=[1, 2]), "token_type has 2 entries, and the vocabulary has"),
    "types of another type": (byte_level(token_type=["x"]), "must be a list of whole numbers"),
    "merges": (byte_level(merges=None), "merges is missing"),
    "merge of no tokens": (byte_level(merges=["t h", "q z"]), "q z does not make a token"),
    "merge of one": (byte_level(merges=["th"]), "th does not make a token"),
    "end": (byte_level(eos_token_id=10**6), "eos_token_id is 1000000, and the vocabulary has"),
    "negative": (byte_level(bos_token_id=-1), "bos_token_id is -1"),
    "end of another type": (byte_level(eos_token_id="x"), "must be a token id"),
    "start": (byte_level(bos_token_id=None, add_bos_token=True), "bos_token_id is missing"),
    "flag": (byte_level(add_bos_token=1), "must be true or false"),
    "scores": (sentencepiece(scores=[0.0]), "scores has 1 entries"),
    "no scores": (sentencepiece(scores=None), "scores is missing"),
    "not finite": (
        sentencepiece(scores=[float("nan")] * len(sentencepiece()["tokenizer.ggml.tokens"])),
        "token 0 has no finite score",
    ),
    "template": ({**byte_level(), "tokenizer.chat_template": 5}, "chat template must be a text"),
    "named template": ({**byte_level(), "tokenizer.chat_template.rag": ["x"]}, "chat_template.rag: the chat template"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_contradicts_itself(name: str) -> None:
    metadata, wrong = BAD[name]
    with pytest.raises(UsageError) as error:
        tokenizer_from_metadata(metadata, "m.gguf")
    assert str(error.value).startswith("m.gguf: ") and wrong in str(error.value) and "\n" not in str(error.value)


def test_each_split_is_read_and_written() -> None:
    names = [name for split in SPLITS for name in split.names]
    assert len(names) == len(set(names))
    for split in SPLITS:
        for lacking in (set(), {"Ą", "]", "^"}):
            steps = pre_tokenizer(split, lacking)["pretokenizers"]
            found = split_of(steps, split.whole_words, lacking)
            assert found is not None and found.patterns == split.patterns and found.whole_words == split.whole_words
        tokenizer = made(byte_level(pre=split.names[-1]))
        assert (
            tokenizer.decode(tokenizer.encode("I'll say: don't 12345!  x\n\n y")) == "I'll say: don't 12345!  x\n\n y"
        )


STORED = json.loads(Path(__file__).with_name("llama_cpp_ids.json").read_text(encoding="utf-8"))
"""Lines of text, and the CRC-32 of the ids (four bytes each) that llama.cpp makes of each with the vocabulary of a
file, special tokens parsed."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED["crc32"])
def test_ids_of_a_real_file_are_those_of_llama_cpp(name: str) -> None:
    (path,) = real_files(name)
    tokenizer = made(GgufFile(path).metadata)
    for line, expected in zip(STORED["lines"], STORED["crc32"][name], strict=True):
        ids = tokenizer.encode(line)
        assert zlib.crc32(b"".join(token.to_bytes(4, "little") for token in ids)) == expected, (line, ids)
