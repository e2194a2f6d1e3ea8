"""The tokenizer of byte-level models, and the checks of text and ids that all tokenizers share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from headstart.data.special_tokens import CONFIG_FILE, OWN_KIND, TOKENIZER_FILE
from headstart.errors import UsageError


def byte_alphabet() -> list[str]:
    """Return GPT-2's 256 visible characters, one per byte: itself if it prints, else 256 and up, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, spare = [], 256
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters


def check_text(text: str) -> None:
    """Raise UsageError if a text has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"text: character {error.start} is a lone surrogate, which has no UTF-8 form; "
            "read the text with errors='replace'"
        ) from None


def check_ids(tokens: Sequence[int]) -> None:
    """Raise UsageError for a negative id."""
    if len(tokens) > 0 and min(tokens) < 0:
        raise UsageError(f"token id {min(tokens)}: ids are not negative; drop padding and ignored positions first")


class ByteTokenizer:
    """A tokenizer whose 256 ids are the values of UTF-8 bytes, as in the paper's byte-level models (section 3.3).

    Byte 0xFF occurs in no UTF-8 text, so id 255 is the end of a document. The literal text "<|end|>" is seven plain
    bytes here; transformers, reading the saved files, turns it into id 255 like any special token.
    """

    name = "bytes"
    vocab_size = 256
    end_id = 255
    start_ids: tuple[int, ...] = ()
    end_name = "<|end|>"

    def __init__(self) -> None:
        self.end_ids = frozenset([self.end_id])

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        check_text(text)
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes 0 to 254. Other ids are dropped, negative ids raise, bad UTF-8 becomes U+FFFD."""
        check_ids(tokens)
        return bytes(token for token in tokens if token < self.end_id).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the byte of `token`, or b"" for the end token and for ids beyond the vocabulary."""
        check_ids([token])
        return bytes([token]) if token < self.end_id else b""

    def piece(self, token: int) -> str | None:
        """Return the name of `token` in the vocabulary; None for a byte."""
        return self.end_name if token == self.end_id else None

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` (byte-pair encoding without merges, so that id == byte) and its configuration."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Engine

        alphabet = byte_alphabet()
        engine = Engine(models.BPE(vocab={alphabet[byte]: byte for byte in range(self.end_id)}, merges=[]))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens([AddedToken(self.end_name, special=True, normalized=False)])
        config = {
            OWN_KIND: "bytes",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_name,
            "bos_token": self.end_name,
            "pad_token": self.end_name,
            "clean_up_tokenization_spaces": False,
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_text(engine.to_str(pretty=True) + "\n", encoding="utf-8")
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
