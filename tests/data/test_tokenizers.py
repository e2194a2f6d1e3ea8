"""Ids and text, round trips, and what transformers makes of the saved files."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.data.detokenizer import TextStream
from headstart.data.special_tokens import added_tokens
from headstart.data.tokenizers import LONG, ByteTokenizer, PretrainedTokenizer, load_tokenizer
from headstart.errors import UsageError

AWKWARD = [
    "",
    " ",
    "  leading and trailing  ",
    "def f(x):\n    return x\n",
    "line\r\nline\rline\n\n\n",
    "\t\ttabs",
    "NUL \0 in it",
    "ÿ and Ã¿ and \u00a0 and \u00ad",
    "naïve 日本語 🎉👩‍👩‍👧 \U0010ffff",
    "".join(map(chr, range(0x180))),
    " .,!? ' n't 're",
    "\ufeffBOM",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def bpe_tokenizer(directory: Path) -> Path:
    """A small byte-level BPE whose merges cut through UTF-8 characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(AWKWARD * 3 + ["日本語 日本 語学 🎉🎊 the then there"] * 9, trainer)
    # As Llama 3 does: its end token would be put in front of every text, were special tokens asked for.
    engine.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    engine.save(str(directory / "tokenizer.json"))
    return directory


def fallback_tokenizer(directory: Path) -> Path:
    """Build a tokenizer like Llama 2's: visible spaces, bytes for what the vocabulary lacks, first space stripped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁▁", "é", "�"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "▁")], byte_fallback=True, unk_token="<unk>"
    )
    engine = Tokenizer(model)
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "</s>"])
    engine.save(str(directory / "tokenizer.json"))
    return directory


def wordpiece_tokenizer(directory: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models

    words = ["</s>", "[UNK]", "the", "##re", "cat", ",", "do", "n't"]
    vocab = {**{word: i for i, word in enumerate(words)}, "##s": 10}  # 8 and 9 stay unused
    engine = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    engine.decoder = decoders.WordPiece()
    engine.save(str(directory / "tokenizer.json"))
    return directory


MAKERS = {"bpe": bpe_tokenizer, "fallback": fallback_tokenizer, "wordpiece": wordpiece_tokenizer}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    made = {name: PretrainedTokenizer(make(tmp_path_factory.mktemp(name))) for name, make in MAKERS.items()}
    return {"bytes": ByteTokenizer(), **made}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
@pytest.mark.parametrize("value", [5, ["x"], {"a": 1}, True, {"content": 5}])
def test_a_special_token_that_is_no_text_is_refused(tmp_path, file, name, value):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({name: value}))
    with pytest.raises(UsageError, match=rf"{file}: {name} is .*must be a token's text"):
        PretrainedTokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps({name: None}))
    assert PretrainedTokenizer(tmp_path).end_id == 255


def test_added_tokens_are_those_with_a_text_and_an_id(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"b": 9, "a": 7, "c": "8", "d": true, "e": null, "": 3}')
    assert [token["content"] for token in added_tokens(tmp_path)] == ["a", "b"]


def test_an_end_token_that_is_no_token_is_refused(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nope"}))
    with pytest.raises(UsageError, match=r'tokenizer_config.json: eos_token "nope" is no token of tokenizer.json'):
        PretrainedTokenizer(tmp_path)


@pytest.mark.parametrize("text", AWKWARD)
def test_byte_ids_are_the_utf8_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end_id]) == text


@pytest.mark.parametrize("name", MAKERS)
def test_long_texts_are_encoded_like_short_ones(tokenizers, name):
    text = "日本語 the then there, aé b  don't </s> " * 1000
    assert len(text) > LONG
    assert tokenizers[name].encode(text) == tokenizers[name].encode_with_offsets(text)[0]


def test_other_threads_run_while_a_long_text_is_encoded(tokenizers):
    begun, done, turns = threading.Event(), threading.Event(), 0

    def encode() -> None:
        begun.set()
        tokenizers["bpe"].encode("日本語 the then there " * 40_000)
        done.set()

    threading.Thread(target=encode).start()
    assert begun.wait(20)
    while not done.wait(0.001):
        turns += 1
    assert turns > 5


def test_byte_decoding_of_what_is_not_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.decode([0xC3, 255, 0xBF, 300]) == "ÿ"  # the end token and ids beyond the vocabulary vanish
    assert tokenizer.encode("<|end|>") == list(b"<|end|>")
    with pytest.raises(UsageError, match="-100"):
        tokenizer.decode([65, -100])


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_lone_surrogates_are_refused(tokenizers, name):
    with pytest.raises(UsageError, match="character 1 is a lone surrogate"):
        tokenizers[name].encode("a\ud800")


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_auto_tokenizer_reads_the_saved_files_alike(tokenizers, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers[name]
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.end_id
    for text in AWKWARD:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        if name == "bytes":
            assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
        assert theirs.decode([*ids, ours.end_id], skip_special_tokens=True) == text
    for text, broken in [(t, ours.encode(t)[1:]) for t in AWKWARD]:
        assert theirs.decode(broken) == ours.decode(broken), text


def test_loading_by_name_file_and_directory(tokenizers, tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    ByteTokenizer().save(tmp_path / "b")
    assert isinstance(load_tokenizer(tmp_path / "b"), ByteTokenizer)
    assert isinstance(load_tokenizer(str(tmp_path / "b" / "tokenizer.json")), ByteTokenizer)
    tokenizers["bpe"].save(tmp_path / "p")
    for source in (tmp_path / "p", tmp_path / "p" / "tokenizer.json"):
        loaded = load_tokenizer(source)
        assert isinstance(loaded, PretrainedTokenizer)
        assert (loaded.name, loaded.vocab_size, loaded.end_id) == ("p", tokenizers["bpe"].vocab_size, 0)


def test_saved_bytes_with_tokens_added_are_no_longer_bytes(tmp_path):
    ByteTokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 256, "content": "<|new|>"})
    file.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).vocab_size == 257


def test_pretrained_files_are_copied_and_truncation_is_not_obeyed(tmp_path):
    source = bpe_tokenizer(tmp_path)
    content = json.loads((source / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|other|>"}}))
    tokenizer = load_tokenizer(source)
    assert tokenizer.end_id == 1
    assert len(tokenizer.encode("many words that are not cut")) > 2
    tokenizer.save(tmp_path / "copy")
    tokenizer.save(source)  # onto itself
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.json").write_bytes(b"\xff\xfe\0")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "object.json").write_text("{}")
    content = json.loads((bpe_tokenizer(tmp_path) / "tokenizer.json").read_text().replace("<|endoftext|>", "<|x|>"))
    (tmp_path / "endless.json").write_text(json.dumps(content))
    for name, expected in [
        ("missing", "no such file"),
        ("empty", "holds no tokenizer.json"),
        ("noise.json", "not JSON"),
        ("list.json", "not a JSON object"),
        ("object.json", "not a tokenizer"),
        ("endless.json", "no end-of-document token"),
    ]:
        with pytest.raises(UsageError, match=expected) as raised:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize(("text", "why"), [("a" * 40 + "b", "retry-limit-in-match over"), ("c", "Missing")])
def test_what_the_library_raises_on_a_text_is_one_line(text, why, tmp_path):
    """It panics where a pattern takes too long, and a panic is not an Exception."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    engine = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="missing"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(
            UsageError, match=rf"tokenizer {tmp_path.name}: fails on this text \([^\n]*{why}[^\n]*\); fix"
        ):
            encode(text)


def test_a_tokenizer_that_has_no_id_for_a_text_says_so_when_its_start_is_asked_for(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"b": 0, "<|endoftext|>": 1}, unk_token="missing")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(
        UsageError, match=rf"tokenizer {tmp_path.name}: fails on the text 'a' \([^\n]*Missing[^\n]*\); fix"
    ):
        load_tokenizer(tmp_path).own_start()


def stream(tokenizer, tokens, cuts):
    """The pieces of a stream that gets `tokens` in portions."""
    text_stream = TextStream(tokenizer)
    pieces, start = [], 0
    for cut in [*sorted(cuts), len(tokens)]:
        pieces.append(text_stream.push(tokens[start:cut]))
        start = max(start, cut)
    return [*pieces, text_stream.finish()]


@settings(deadline=None)
@given(text=TEXT, data=st.data())
@pytest.mark.parametrize("name", ["bytes", "bpe", "fallback"])
def test_streamed_text_equals_decoded_text(tokenizers, name, text, data):
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode(text)
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=8))
    pieces = stream(tokenizer, tokens, cuts)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if "�" not in text:
        assert "�" not in "".join(pieces)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
@pytest.mark.parametrize("name", ["bytes", "bpe", "fallback", "wordpiece"])
def test_streamed_tokens_of_any_kind_equal_decoded_tokens(tokenizers, name, data):
    tokenizer = tokenizers[name]
    ids = st.integers(0, tokenizer.vocab_size + 3)
    if name == "fallback":
        ids = ids | st.integers(258, tokenizer.vocab_size) | st.sampled_from([2 + 0xC3, 2 + 0xBF])
    elif name != "wordpiece":
        ids = ids | st.sampled_from(tokenizer.encode("é日🎉")) | st.just(tokenizer.end_id)
    tokens = data.draw(st.lists(ids, max_size=24))
    assert "".join(stream(tokenizer, tokens, range(len(tokens)))) == tokenizer.decode(tokens)


def test_stream_passes_over_ids_that_decode_to_nothing(tokenizers):
    assert "".join(stream(tokenizers["wordpiece"], [2, 9, 4], range(3))) == "the cat"
    fallback = tokenizers["fallback"]
    tokens = [2 + 0xC3, fallback.vocab_size, 1, 2 + 0xBF, 2 + 0xFF]
    assert "".join(stream(fallback, tokens, range(5))) == fallback.decode(tokens) == "�" * 3


def test_stream_gives_each_character_as_soon_as_it_is_whole(tokenizers):
    text_stream = TextStream(ByteTokenizer())
    assert [text_stream.push([byte]) for byte in "aé🎉b".encode()] == ["a", "", "é", "", "", "", "🎉", "b"]
    assert text_stream.finish() == ""
    assert text_stream.push([0xF0, 0x9F]) + text_stream.finish() == "�"
    assert text_stream.push([65]) == "A"  # as new after finish


@pytest.mark.parametrize("name", ["bytes", "bpe", "fallback"])
def test_stream_work_does_not_grow_with_the_text(tokenizers, name, monkeypatch):
    tokenizer = tokenizers[name]
    sizes = []
    original = type(tokenizer).decode

    def counted(self, tokens):
        sizes.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    text_stream = TextStream(tokenizer)
    for token in tokenizer.encode("a b  ab" * 200):
        text_stream.push([token])
    assert max(sizes, default=0) <= 8


def test_importing_stays_cheap():
    code = (
        "import sys, headstart.data.tokenizers; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'tokenizers', 'torch')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_hub_id_is_fetched(tokenizers, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    tokenizers["bpe"].save(tmp_path)
    asked = []

    def fetch(repository, name):
        asked.append((repository, name))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    def unreachable(repository, name):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("owner/some-model")
    assert tokenizer.name == "owner/some-model" and tokenizer.encode("the then") == tokenizers["bpe"].encode("the then")
    assert ("owner/some-model", "tokenizer.json") in asked
    asked.clear()
    for no_id in ("nowhere", "a/b/c", "./nowhere", "../nowhere", "data/tokenizer.json", "/no/where"):
        with pytest.raises(UsageError, match="no such file or directory"):
            load_tokenizer(no_id)
    assert asked == []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UsageError, match=r"owner/name.*the hub gives none") as raised:
        load_tokenizer("owner/name")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["bytes", "bpe", "fallback"])
def test_tokenizers_can_be_given_to_other_processes(tokenizers, name):
    copy = pickle.loads(pickle.dumps(tokenizers[name]))
    text = "naïve 日本語 🎉"
    assert copy.encode(text) == tokenizers[name].encode(text)
    assert stream(copy, copy.encode(text), [2]) == stream(tokenizers[name], copy.encode(text), [2])
