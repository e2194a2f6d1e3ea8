"""Conversations: what is read of them, which tokens are the assistant's, and that only those become targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import BARE, CHATML, INSTRUCTIONS, MARKED, THINKING, chat_tokenizer

from headstart.data.batches import IGNORE, BatchStream, evaluation_batches
from headstart.data.chat_template import ChatTemplate, encode_conversation, load_chat_template
from headstart.data.conversations import Conversation, parse_conversation
from headstart.data.prepare import units, write
from headstart.data.prepare.bpe import NewBpe
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards, verify
from headstart.errors import UsageError

TALK = (
    {"role": "user", "content": "hello\n"},
    {"role": "assistant", "content": " hell ÿ, he said \n"},
    {"role": "user", "content": "and <|im_end|>?"},
    {"role": "assistant", "content": "well"},
)
CONVERSATION = Conversation(TALK)


def test_both_ways_of_writing_messages_are_read():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}] * 2}]
    sharegpt = [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "bb"}]
    expected = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"})
    for value in (turns, sharegpt):
        assert parse_conversation(value, None, "here").messages == expected
    assert parse_conversation(turns, '[{"name": "f"}]', "here").tools == ({"name": "f"},)
    for value, said in (
        ("text", "here: holds str, not a list"),
        (["a"], "here, message 1: not an object"),
        ([*turns, {"content": "b"}], "message 3: has no role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: its content is not text"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_conversation(value, None, "here")


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("excluded", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_messages_that_are_not_to_be_predicted(tmp_path, template, each, excluded):
    tokenizer = chat_tokenizer(tmp_path, template)
    found = load_chat_template(tokenizer)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "first"}]
    said += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "second"}]

    def answers(change_first, change_second):
        value = [said[0], said[1] | change_first, said[2], said[3] | change_second]
        conversation = parse_conversation(value, None, "here")
        pieces = encode_conversation(conversation, found, tokenizer, each)
        return conversation.answered, [tokenizer.decode(ids[answered].tolist()).strip() for ids, answered in pieces]

    both = ["first", "second"] if each else [answers({}, {})[1][0]]
    assert answers({"weight": 1}, {"train": True}) == (True, both)
    assert answers(excluded, {}) == (True, ["second"]) and answers({}, excluded) == (True, ["first"])
    assert answers(excluded, excluded) == (False, [] if each else [""])
    for wrong, line in (
        ({"weight": 0.5}, "message 2: weight 0.5; write 1"),
        ({"train": "no"}, "message 2: train 'no'"),
    ):
        with pytest.raises(UsageError, match=line):
            answers(wrong, {})


@pytest.mark.parametrize("template", [CHATML, MARKED, INSTRUCTIONS])
def test_texts_and_ids_are_those_of_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer(tmp_path, template, in_config=template is CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = load_chat_template(tokenizer)
    assert found is not None
    for messages, prompt in ((TALK, False), (TALK[:3], True)):
        expected = theirs.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        assert found.render(messages, prompt=prompt) == expected
    ((ids, answered),) = encode_conversation(CONVERSATION, found, tokenizer)
    expected = theirs.apply_chat_template(list(TALK), return_dict=True, return_assistant_tokens_mask=template is MARKED)
    added = 0 if template is INSTRUCTIONS else 1  # there the end token stands already
    assert ids.tolist() == expected["input_ids"] + [tokenizer.end_id] * added
    if template is MARKED:
        assert answered[:-1].tolist() == [bool(flag) for flag in expected["assistant_masks"]]


ANSWERS = {
    "ends of turns, not the line end behind": (CHATML, [" hell ÿ, he said \n<|im_end|>", "well<|im_end|>"]),
    "as marked": (MARKED, ["\nhell ÿ, he said<|im_end|>", "\nwell<|im_end|>"]),
    "end tokens": (INSTRUCTIONS, ["  hell ÿ, he said \n<|endoftext|>", " well<|endoftext|>"]),
    "a line end that ends a turn, and the end of the document": (
        BARE,
        [" hell ÿ, he said \n\n", "well\n<|endoftext|>"],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_assistant_wrote(tmp_path, name):
    template, expected = ANSWERS[name]
    tokenizer = chat_tokenizer(tmp_path, template)
    ((ids, answered),) = encode_conversation(CONVERSATION, load_chat_template(tokenizer), tokenizer)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(answered)) + 1)
    answers = [
        tokenizer._engine.decode(ids[run].tolist(), skip_special_tokens=False) for run in runs if answered[run[0]]
    ]
    assert answers == expected
    assert (
        tokenizer.encode(load_chat_template(tokenizer).render(TALK))
        == ids[: len(ids) - (template != INSTRUCTIONS)].tolist()
    )


def test_what_cannot_be_told_is_refused():
    with pytest.raises(
        UsageError, match=r"writes message 2.* differently.* mark them in the template with \{% generation"
    ):
        ChatTemplate(THINKING).answers(CONVERSATION)
    first, second = ChatTemplate(THINKING).answers(CONVERSATION, each=True)
    assert ChatTemplate(THINKING).answers(Conversation(TALK[:2])) == [first]
    answers = [text[begin:end] for text, spans in (first, second) for begin, end in spans]
    assert answers == ["<think></think> hell ÿ, he said \n<|im_end|>", "<think></think>well<|im_end|>"]
    marked, whole = (ChatTemplate(MARKED).answers(CONVERSATION, each=each) for each in (True, False))
    assert [span for _, spans in marked for span in spans] == whole[0][1] and marked[1][0] == whole[0][0]
    with pytest.raises(UsageError, match=r"does not take these messages .no system here"):
        ChatTemplate(INSTRUCTIONS).render([{"role": "system", "content": "be kind"}])
    with pytest.raises(UsageError, match="changes what it marks"):
        ChatTemplate("{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x | length }}").answers(
            CONVERSATION
        )
    with pytest.raises(UsageError, match="no characters"):
        ChatTemplate(MARKED).answers(Conversation(({"role": "user", "content": "\ufdd0"},)))


def test_a_template_is_held_in_its_sandbox():
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}"):
        with pytest.raises(UsageError, match="does not take these messages"):
            ChatTemplate(source).render(TALK)
    assert ChatTemplate("{{ strftime_now('%Y') }} {{ {'a': '<ä>'} | tojson }}").render(TALK) == '2024 {"a": "<ä>"}'


def talk(number: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * (1 + number % 3)
    return [
        {"role": role, "content": f"{role} {number} " + "hello " * (i + number % 5)} for i, role in enumerate(roles)
    ]


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """60 conversations in several units, and what is none."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"messages": talk(i)} for i in range(30)]
    sharegpt = [
        {"conversations": [{"from": each["role"], "value": each["content"]} for each in talk(i)]} for i in range(30, 60)
    ]
    rows += [{"messages": None}, {"messages": [{"role": "user", "content": "anybody?"}]}]
    for name, content in (("a.jsonl", rows), ("b.jsonl", sharegpt)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "README.md").write_text("about it")
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    return folder


@pytest.fixture
def prepared(corpus, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(write, "SHARD_BYTES", 1000)  # so that shards end inside bytes of bits, and of segments
    lines: list[str] = []
    prepare(
        [str(corpus)],
        tmp_path / "out",
        chat_tokenizer(tmp_path / "tokenizer"),
        Preparation(selection=Selection(conversations=True), validation_fraction=0.2),
        report=lines.append,
    )
    assert lines == [f"{corpus}: 60 documents read; skipped: 1 not conversations, 1 null, 1 without an answer"]
    return tmp_path / "out"


def expected_flags(shards: TokenShards) -> np.ndarray:
    """Find answers by special tokens: from "<|im_start|>assistant\\n" to the end of the turn, which is included."""
    flags, start, writing, seen = [], [261, *b"assistant\n"], False, []
    for token in shards.tokens[:].tolist():
        flags.append(writing)
        writing = writing and token != 262
        seen.append(token)
        if seen[-len(start) :] == start:
            writing = True
    return np.array(flags)


def test_only_answers_become_targets(prepared, tmp_path):
    heads, length = 3, 29
    for split in ("train", "validation"):
        shards = TokenShards.open(prepared, split)
        flags = expected_flags(shards)
        assert shards.targets is not None and len(shards.targets) == len(shards.tokens) > 1000
        np.testing.assert_array_equal(shards.targets[:], flags)
        for begin, end in ((0, 1), (7, 7), (3, 900), (495, 1001), (8, 16)):
            np.testing.assert_array_equal(shards.targets[begin:end], flags[begin:end])
        answers = [content for i in range(60) for content in [each["content"] for each in talk(i)[1::2]]]
        part = shards.manifest["splits"][split]
        counts = [shard["targets"]["count"] for shard in part["shards"]]
        assert len(counts) > 1 and sum(counts) == flags.sum()
        assert shards.bytes_per_token == part["bytes"] / flags.sum() and part["bytes"] < sum(map(len, answers))
        document = np.repeat(np.arange(len(shards.documents)), np.diff([*shards.documents, len(shards.tokens)]))
        batches = list(evaluation_batches(shards, rows=4, length=length, heads=heads, limit_rows=None))
        targets = torch.cat([batch.targets for batch in batches])
        for row, here in enumerate(targets):
            for t in range(length):
                at = row * length + t
                for k in range(1, heads + 1):
                    taught = flags[at + k] and document[at] == document[at + k]
                    assert here[t, k - 1] == (shards.tokens[at + k : at + k + 1][0] if taught else IGNORE)
        assert ((targets == IGNORE).sum() > 0) and ((targets != IGNORE).sum() > 0)
        tokens = torch.cat([batch.tokens for batch in batches]).flatten()
        np.testing.assert_array_equal(tokens, shards.tokens[: len(tokens)])  # all is read, as before
    total = sum(len(content.encode()) for content in answers)
    assert (
        sum(TokenShards.open(prepared, split).manifest["splits"][split]["bytes"] for split in ("train", "validation"))
        == total
    )


def test_masked_and_plain_sources_are_mixed(prepared, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("y" * 3000)
    prepare(
        [str(plain)], tmp_path / "plain", chat_tokenizer(tmp_path / "tokenizer"), Preparation(validation_fraction=0)
    )
    talk, text = TokenShards.open(prepared, "train"), TokenShards.open(tmp_path / "plain", "train")
    assert text.targets is None and text.manifest["version"] == 2
    mixed = BatchStream([talk, text], rows=8, length=32, heads=2, seed=0, weights=[1, 1])
    alone = BatchStream(talk, rows=4, length=32, heads=2, seed=0)
    for _ in range(5):
        batch, expected = next(mixed), next(alone)
        of_text = (batch.tokens == ord("y")).all(1)
        assert of_text.sum() == 4
        assert (batch.targets[of_text] == ord("y")).all()
        assert torch.equal(batch.targets[~of_text], expected.targets) and (expected.targets == IGNORE).any()


def test_damage_is_named_and_older_versions_refuse(prepared):
    assert verify(prepared) == [] and json.loads((prepared / "manifest.json").read_text())["version"] == 3
    file = sorted(prepared.glob("train-*.targets"))[0]
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    assert [line.split(":")[0] for line in verify(prepared)] == [str(file)]
    file.write_bytes(content[:-1])
    with pytest.raises(UsageError, match=r"targets: has .* bytes where the manifest says"):
        TokenShards.open(prepared, "train")


def test_conversations_are_asked_for(corpus, tmp_path):
    chosen = Selection(conversations=True)
    with pytest.raises(UsageError, match=r'a.jsonl, line 1: field "messages" holds list.* --conversations'):
        prepare(
            [str(corpus / "a.jsonl")],
            tmp_path / "x",
            chat_tokenizer(tmp_path / "t"),
            Preparation(selection=Selection("messages")),
        )
    with pytest.raises(UsageError, match=r"has no chat template.* chat_template\.jinja next to"):
        prepare([str(corpus)], tmp_path / "x", chat_tokenizer(tmp_path / "u", None), Preparation(selection=chosen))
    with pytest.raises(UsageError, match=r"a\.jsonl:2: the chat template writes"):
        prepare([str(corpus)], tmp_path / "x", chat_tokenizer(tmp_path / "v", THINKING), Preparation(selection=chosen))
    with pytest.raises(UsageError, match="each_answer is for conversations"):
        prepare([str(corpus)], tmp_path / "x", NewBpe(300), Preparation(selection=Selection(each_answer=True)))
    with pytest.raises(UsageError, match="a new vocabulary has no chat template"):
        prepare([str(corpus)], tmp_path / "x", NewBpe(300), Preparation(selection=chosen))


def test_each_answer_can_be_a_document(corpus, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "v", THINKING)
    chosen = Selection(conversations=True, each_answer=True)
    prepare([str(corpus)], tmp_path / "x", tokenizer, Preparation(selection=chosen, validation_fraction=0.2))
    found, names = [], json.loads((tmp_path / "x" / "validation.names.json").read_text())
    for split in ("train", "validation"):
        shards = TokenShards.open(tmp_path / "x", split)
        documents = [tokenizer.decode(shards.document(i)) for i in range(len(shards.documents))]
        found += documents
        bounds = [*shards.documents, len(shards.tokens)]
        for i, text in enumerate(documents):
            answer = shards.document(i)[shards.targets[bounds[i] : bounds[i + 1]]].tolist()
            assert answer[-1] == 262 and text.endswith(tokenizer.decode(answer) + "\n")  # the last answer, and no other
            assert text.count("<think>") == 1 and tokenizer.decode(answer).startswith("<think></think>assistant")
    assert len(found) == len(set(found)) == 20 * (1 + 2 + 3) and len(names) == len(documents)


def test_conversations_of_equal_text_that_differ_otherwise_are_no_copies(tmp_path):
    def user(text, **more):
        return {"role": "user", "content": text, **more}

    def answer(text, **more):
        return {"role": "assistant", "content": text, **more}

    talks = [
        [user("a"), answer("b\n\nc"), user("d"), answer("e")],
        [user("a\n\nb"), answer("c"), user("d"), answer("e")],
        [user("q"), answer("", tool_calls=[{"name": "one"}])],
        [user("q"), answer("", tool_calls=[{"name": "two"}])],
        [user("q"), answer("", tool_calls=[{"name": "two"}], weight=1)],  # a copy
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chosen = Selection(conversations=True)
    tokenizer = chat_tokenizer(tmp_path / "t")
    manifest = prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "x", tokenizer, Preparation(selection=chosen, deduplicate=True)
    )
    assert manifest["duplicates"] == {"exact": 1, "near": 0, "near_held_out": 0, "left_out": 1}
