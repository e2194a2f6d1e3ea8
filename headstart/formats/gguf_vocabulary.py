"""The vocabulary of a GGUF file: tokens, how text is split into them, start and end tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from headstart.data.byte_tokenizer import byte_alphabet
from headstart.data.chat_template import ChatTemplate, load_chat_template
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from headstart.errors import UsageError
from headstart.formats.gguf_split import split_of

ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        # The end of code that fills a gap, and the borders between the files of a repository:
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    }
)
"""Names of tokens that end a generation wherever they exist, as in llama.cpp."""
SPACE = "\u2581"
"""SentencePiece's sign for a space."""


@dataclass
class Vocabulary:
    """The facts about a tokenizer that llama.cpp needs. Lists are by id; an id without a token has the text ""."""

    model: str
    """gpt2 (byte-level BPE) or llama (SentencePiece's BPE)."""
    pre: str
    """llama.cpp's name for the split of text before merges."""
    tokens: list[str]
    control: set[int] = field(default_factory=set)
    """Ids of special tokens, which plain text never becomes and which are never shown."""
    added: set[int] = field(default_factory=set)
    """Ids of added tokens that are not special."""
    merges: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    """llama: the order of merges; two neighbours become the token with the highest score first."""
    unknown: int | None = None
    space_prefix: bool = False
    """llama: True if a space is put before text."""
    left: list[str] = field(default_factory=list)
    """Lines about what the file has no place for."""


def read_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the vocabulary of `tokenizer`, with `size` ids. Raises UsageError if llama.cpp splits text differently."""
    needed = tokenizer.needed_rows if isinstance(tokenizer, PretrainedTokenizer) else tokenizer.vocab_size
    if needed > size:
        raise UsageError(
            f"tokenizer {tokenizer.name} has {needed} ids, the model's vocabulary {size}; "
            "take the tokenizer that the model was trained with"
        )
    if isinstance(tokenizer, ByteTokenizer):
        tokens = [*byte_alphabet()[:255], tokenizer.end_name] + [""] * (size - 256)
        return Vocabulary("gpt2", "gpt-2", tokens, {tokenizer.end_id})
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise _refusal(tokenizer, "another kind")
    definition = tokenizer.definition()
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _refusal(tokenizer, f"a {model.get('type')} model")
    found = (_sentencepiece if model.get("byte_fallback") else _byte_level)(tokenizer, definition, size)
    for token, i in model["vocab"].items():
        if i < size:
            found.tokens[i] = token
    _read_added(found, definition.get("added_tokens") or [], tokenizer, size)
    return found


def add_vocabulary(writer: Any, found: Vocabulary, tokenizer: Tokenizer) -> None:
    """Write a vocabulary into a `gguf.GGUFWriter`, and add lines about end tokens that it has no place for."""
    from gguf import TokenType

    types = [int(TokenType.NORMAL if token else TokenType.UNUSED) for token in found.tokens]
    if found.scores is not None:
        for i, token in enumerate(found.tokens):
            types[i] = int(TokenType.BYTE) if _is_byte(token) else types[i]
    for token_id in found.added:
        types[token_id] = int(TokenType.USER_DEFINED)
    for token_id in found.control:
        types[token_id] = int(TokenType.CONTROL)
    if found.unknown is not None:
        types[found.unknown] = int(TokenType.UNKNOWN)
        writer.add_unk_token_id(found.unknown)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    # Names must differ, because llama.cpp looks up tokens by them.
    writer.add_token_list([token or f"[UNUSED{i}]" for i, token in enumerate(found.tokens)])
    writer.add_token_types(types)
    end = tokenizer.end_id
    if found.scores is None:
        # llama.cpp requires the list, and the format has no empty lists: this merge never applies.
        writer.add_token_merges(found.merges or [f"{found.tokens[end]} {found.tokens[end]}"])
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    start = tokenizer.start_ids
    template = load_chat_template(tokenizer)
    writer.add_bos_token_id(start[0] if start else _named_start(found, template, end))
    writer.add_add_bos_token(bool(start))
    writer.add_eos_token_id(end)
    writer.add_add_eos_token(False)
    writer.add_pad_token_id(end)
    turn = frozenset[int]() if template is None else template.turn_ends(tokenizer)
    # llama.cpp ends at the tokens of ENDS by itself. A place for one would make it what it is not: the end of a turn.
    further = [i for i in (turn | tokenizer.end_ids) - {end} if found.tokens[i] not in ENDS]
    further.sort(key=lambda i: (i not in turn, i))
    for add, token_id in zip((writer.add_eot_token_id, writer.add_eom_token_id), further):
        add(token_id)
    names = [found.tokens[i] for i in further[2:]]
    found.left += [f"end token {name}: the file has places for three" for name in names]
    found.left += [f"start token {found.tokens[i]}: llama.cpp puts one before a text" for i in start[1:]]
    if template is not None:
        writer.add_chat_template(template.source)


def _named_start(found: Vocabulary, template: ChatTemplate | None, end: int) -> int:
    """Return the token that chat templates call bos_token although no text begins with it; `end` if there is none."""
    name = None if template is None else dict(template.tokens).get("bos_token")
    return found.tokens.index(name) if name in found.tokens else end


def _refusal(tokenizer: Tokenizer, why: str) -> UsageError:
    return UsageError(
        f"tokenizer {tokenizer.name}: a GGUF file takes bytes, byte-level BPE that splits text in a way that llama.cpp "
        f"has a name for, or SentencePiece's BPE, and this is {why}; write the model without a tokenizer"
    )


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, sequences flattened."""
    if step is None:
        return []
    return [each for part in step[key] for each in _flat(part, key)] if step.get("type") == "Sequence" else [step]


def _byte_level(tokenizer: PretrainedTokenizer, definition: dict[str, Any], size: int) -> Vocabulary:
    model = definition["model"]
    steps = _flat(definition.get("pre_tokenizer"), "pretokenizers")
    whole_words = bool(model.get("ignore_merges"))
    split = split_of(steps, whole_words, set(byte_alphabet()) - model["vocab"].keys())
    if split is None:
        raise _refusal(tokenizer, "another split" + (", with ignore_merges" if whole_words else ""))
    normalizers = [step["type"] for step in _flat(definition.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"} or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal(tokenizer, f"one with {', '.join(normalizers) or 'marks within words'}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    left = ["normalization NFC: llama.cpp takes text as it is"] if normalizers else []
    return Vocabulary("gpt2", split.names[0], [""] * size, merges=merges, left=left)


def _sentencepiece(tokenizer: PretrainedTokenizer, definition: dict[str, Any], size: int) -> Vocabulary:
    model = definition["model"]
    normalizers = _flat(definition.get("normalizer"), "normalizers")
    steps = _flat(definition.get("pre_tokenizer"), "pretokenizers")
    replaced = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    left: list[str] = []
    if normalizers in (replaced, [{"type": "Prepend", "prepend": SPACE}, *replaced]) and not steps:
        prefix = len(normalizers) == 2
    elif not normalizers and [step["type"] for step in steps] == ["Metaspace"] and not steps[0].get("split", True):
        scheme = steps[0].get("prepend_scheme", "always")
        prefix = scheme != "never"
        if prefix:
            where = "the beginning" if scheme == "first" else "the beginning and behind special tokens"
            left.append(
                f"the space before text: the tokenizer puts one at {where} if there is none; llama.cpp at the "
                "beginning and behind special tokens, always"
            )
    else:
        raise _refusal(tokenizer, "another way to split text")
    vocabulary = model["vocab"]
    scores, rough = _scores(vocabulary, model["merges"], size)
    if rough:
        left.append(
            f"the order of merges: {rough} tokens are merged otherwise than llama.cpp does, as SentencePiece, so some "
            "text is split otherwise"
        )
    unknown = vocabulary.get(model.get("unk_token"))
    return Vocabulary("llama", "default", [""] * size, scores=scores, unknown=unknown, space_prefix=prefix, left=left)


def _scores(vocabulary: dict[str, int], merges: list[Any], size: int) -> tuple[list[float], int]:
    """Return a score for each id that keeps the order of merges, and the number of tokens for which it does not.

    SentencePiece merges any two neighbours that form a token, the best token first. That equals merges that name every
    split of every token, token by token. It differs if a split is missing, or the merge of another token lies between.
    """
    scores, ranks = [0.0] * size, {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[left, right] = rank
    by_token: dict[str, list[int]] = {}
    for (left, right), rank in ranks.items():
        by_token.setdefault(left + right, []).append(rank)
    made = by_token.keys() | {token for token in vocabulary if len(token) == 1}
    rough = 0
    for token, own in by_token.items():
        scores[vocabulary[token]] = -float(min(own))
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        lacking = any(pair not in ranks and pair[0] in made and pair[1] in made for pair in splits)
        rough += lacking or max(own) - min(own) >= len(own)
    return scores, rough


def _read_added(found: Vocabulary, entries: list[dict[str, Any]], tokenizer: PretrainedTokenizer, size: int) -> None:
    found.control.add(tokenizer.end_id)
    for entry in entries:
        if entry["id"] < size:
            found.tokens[entry["id"]] = entry["content"]
            (found.control if entry.get("special") else found.added).add(entry["id"])
    found.control.discard(-1 if found.unknown is None else found.unknown)
    found.added -= found.control
    if any(entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word") for entry in entries):
        found.left.append("added tokens that take the spaces around them, or stand alone: llama.cpp has no such tokens")


def _is_byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None
