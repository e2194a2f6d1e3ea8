"""Learn a new byte-level BPE vocabulary from the sources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.data.prepare.documents import Document
from headstart.data.prepare.units import Selection, Unit, read
from headstart.data.tokenizers import CONFIG_FILE, OWN_KIND, TOKENIZER_FILE
from headstart.errors import UsageError

END_NAME = "<|endoftext|>"
SAMPLE_BYTES = 1 << 28
"""The most text to learn from, spread over all sources. More changes the merges little and costs memory."""
LONGEST_WORD = 256
"""Characters of a word. Learning takes time with their square; base64, DNA and minified code are long words."""
_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")


@dataclass(frozen=True)
class NewBpe:
    """A request to learn a vocabulary of this size: 256 bytes, the end token, and merges."""

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise UsageError(
                f"a BPE vocabulary of {self.vocab_size}: ask for at least 257, 256 bytes and the end token"
            )


def sample(units: Sequence[Unit], selection: Selection) -> Iterator[str]:
    """Yield the first documents of every unit, up to its share of SAMPLE_BYTES; always the same ones."""
    in_all = sum(unit.size for unit in units)
    for unit in units:
        room = SAMPLE_BYTES * unit.size / max(in_all, 1)
        for document in read(unit, selection):
            if room <= 0:
                break
            if isinstance(document, Document):
                room -= document.bytes
                yield document.text


def train(documents: Iterator[str], vocab_size: int, directory: Path) -> int:
    """Learn a vocabulary, write the tokenizer files, and return its size, smaller if there is too little text.

    Words are separated as in GPT-2. The same documents in the same order give the same files.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_NAME, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_cut(documents), trainer)
    config = {
        OWN_KIND: "bpe",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_NAME,
        "bos_token": END_NAME,
        "pad_token": END_NAME,
        "clean_up_tokenization_spaces": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENIZER_FILE).write_text(engine.to_str(pretty=True) + "\n", encoding="utf-8")
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return int(engine.get_vocab_size())


def _cut(documents: Iterable[str]) -> Iterator[str]:
    """Yield the documents in pieces without a word longer than LONGEST_WORD; longer words are cut."""
    for text in documents:
        begin = 0
        for run in _LONG.finditer(text):
            for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                yield text[begin:cut]
                begin = cut
        yield text[begin:]
