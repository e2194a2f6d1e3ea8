"""Sources of a tokenizer of the `tokenizers` library: the files of a directory, or a program that built it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from headstart.data import tokenizer_limits
from headstart.data.special_tokens import (
    ADDED_FILE,
    CONFIG_FILE,
    MAP_FILE,
    OWN_KIND,
    TOKENIZER_FILE,
    added_tokens,
    read_json,
    special_tokens,
)
from headstart.errors import UsageError, first_line, shorten
from headstart.fileio import read_bounded

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE = 1 << 20
"""The largest chat template, in bytes."""
OTHER_FILES = (MAP_FILE, ADDED_FILE, TEMPLATE_FILE, "vocab.json", "merges.txt", "tokenizer.model")
END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<eos>")
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
"""Content of tokenizer_config.json, without which AutoTokenizer refuses a tokenizer.json."""


class TokenizerSource(Protocol):
    """Gives `PretrainedTokenizer` a tokenizer, and what belongs to it."""

    @property
    def name(self) -> str:
        """The name of the tokenizer, for messages."""
        ...

    @property
    def directory(self) -> Path | None:
        """The folder of its files; None if it comes from elsewhere."""
        ...

    @property
    def learnt(self) -> bool:
        """True for a tokenizer that `headstart prepare` learnt from plain documents."""
        ...

    def engine(self) -> Any:
        """Return the `tokenizers.Tokenizer`, with all tokens that a text may spell."""
        ...

    def special_tokens(self) -> Mapping[str, str]:
        """Return the text of each special token that has a name, such as `bos_token`."""
        ...

    def vocab_size(self, engine: Any) -> int:
        """Return one more than the largest id."""
        ...

    def end_token(self, engine: Any) -> str:
        """Return the text of the token that ends documents. Raises UsageError if there is none."""
        ...

    def chat_template(self) -> str | None:
        """Return the source of the chat template, None without one. Raises UsageError if it cannot be read."""
        ...

    def save(self, engine: Any, directory: Path) -> None:
        """Write the tokenizer's files into a directory that exists."""
        ...


@contextmanager
def one_line(wrong: str, fix: str) -> Iterator[None]:
    """Turn any error of the tokenizers library into UsageError; its PanicException is not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UsageError(f"{wrong} ({first_line(error)}); {fix}") from error


class TokenizerDirectory:
    """A `tokenizer.json` and the files next to it.

    Args:
        path: a directory, or the file itself.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / TOKENIZER_FILE if path.is_dir() else path
        self.directory = self.file.parent

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.directory.resolve().name

    @property
    def learnt(self) -> bool:
        """True if tokenizer_config.json says so."""
        config = self.directory / CONFIG_FILE
        return config.is_file() and read_json(config).get(OWN_KIND) == "bpe"

    def engine(self) -> Any:
        """Return the tokenizer of the file, bounded, with the tokens that only the files next to it name."""
        from tokenizers import Tokenizer as Engine

        content = read_json(self.file, f"name a {TOKENIZER_FILE} you may read")
        tokenizer_limits.check_growth(self.file, content)
        unreadable = f"{self.file}: not a tokenizer that the tokenizers library reads"
        with one_line(unreadable, "name a directory that AutoTokenizer.save_pretrained wrote"):
            engine = Engine.from_file(str(self.file))
        # A tokenizer.json may carry the truncation and padding of whoever saved it; neither may change documents.
        engine.no_truncation()
        engine.no_padding()
        self._add_tokens(engine)
        vocabulary = content["model"].get("vocab")
        tokenizer_limits.check_ids(self.file, content, vocabulary.values() if isinstance(vocabulary, dict) else ())
        return engine

    def _add_tokens(self, engine: Any) -> None:
        """Add the tokens that only the files next to it name, so that text can spell them, as in transformers."""
        from tokenizers import AddedToken

        names = {token.content for token in engine.get_added_tokens_decoder().values()}
        additions = added_tokens(self.directory)
        for text in special_tokens(self.directory).values():
            if engine.token_to_id(text) is not None:
                additions.append({"content": text, "special": True, "normalized": False})
        for each in additions:
            if each["content"] not in names:
                names.add(each["content"])
                engine.add_tokens([AddedToken(**each)])

    def special_tokens(self) -> Mapping[str, str]:
        """Return those of tokenizer_config.json and special_tokens_map.json."""
        return special_tokens(self.directory)

    def vocab_size(self, engine: Any) -> int:
        """Return one more than the largest id."""
        return max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def end_token(self, engine: Any) -> str:
        """Return the eos_token, or one of the usual names."""
        end = self.special_tokens().get("eos_token")
        for name in END_NAMES if end is None else (end,):
            if engine.token_to_id(name) is not None:
                return name
        config = self.directory / CONFIG_FILE
        if end is not None:
            raise UsageError(
                f"{config}: eos_token {shorten(json.dumps(end))} is no token of {self.file.name}; "
                "name one of its tokens"
            )
        raise UsageError(
            f"{self.file}: no end-of-document token found; name one of its tokens as eos_token in {config}"
        )

    def chat_template(self) -> str | None:
        """Return `chat_template.jinja`, or "chat_template" of tokenizer_config.json, "default" of several."""
        file = self.directory / CONFIG_FILE
        source = read_json(file).get("chat_template") if file.is_file() else None
        if (self.directory / TEMPLATE_FILE).exists():
            file = self.directory / TEMPLATE_FILE
            try:
                source = read_bounded(file, MAX_TEMPLATE).decode("utf-8")
            except OSError as error:
                raise UsageError(f"{file}: cannot be read ({error.strerror}); allow reading it") from error
            except UnicodeDecodeError as error:
                raise UsageError(f"{file}: not UTF-8; fetch the file again") from error
        elif isinstance(source, list):  # several, by name
            if not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in source):
                raise UsageError(
                    f"{file}: chat_template must be a text or a list of names and templates; fetch the file again"
                )
            source = next((each["template"] for each in source if each["name"] == "default"), None)
        return None if source is None else check_template(str(file), source)

    def save(self, engine: Any, directory: Path) -> None:
        """Copy the files, so that nothing in them is lost."""
        try:
            _copy(self.file, directory / TOKENIZER_FILE)
            for name in (CONFIG_FILE, *OTHER_FILES):
                if (self.directory / name).is_file():
                    _copy(self.directory / name, directory / name)
        except FileNotFoundError as error:
            raise UsageError(f"{error.filename}: gone since the tokenizer was loaded; load it again") from error
        if not (directory / CONFIG_FILE).is_file():
            _write_json(directory / CONFIG_FILE, CONFIG | {"eos_token": self.end_token(engine)})


@dataclass(frozen=True)
class BuiltTokenizer:
    """A tokenizer that a program built, such as the reader of a file format that holds a vocabulary."""

    name: str
    built: Any
    """The `tokenizers.Tokenizer`."""
    size: int
    """One more than the largest id."""
    special: Mapping[str, str]
    """Text of the special tokens by name; `eos_token` is one of them."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates by name; the usual one is "default"."""
    directory = None
    learnt = False

    def engine(self) -> Any:
        """Return the tokenizer that was built."""
        return self.built

    def special_tokens(self) -> Mapping[str, str]:
        """Return `special`."""
        return self.special

    def vocab_size(self, engine: Any) -> int:
        """Return `size`."""
        return self.size

    def end_token(self, engine: Any) -> str:
        """Return the eos_token."""
        return self.special["eos_token"]

    def chat_template(self) -> str | None:
        """Return the template that is called "default"."""
        return self.templates.get("default")

    def save(self, engine: Any, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        config: dict[str, Any] = CONFIG | dict(self.special)
        if self.templates.keys() == {"default"}:
            config["chat_template"] = self.templates["default"]
        elif self.templates:
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        (directory / TOKENIZER_FILE).write_text(engine.to_str(pretty=True) + "\n", encoding="utf-8")
        _write_json(directory / CONFIG_FILE, config)


def check_template(place: str, source: Any) -> str:
    """Return a chat template as it is. Raises UsageError if it is no text or too long."""
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        raise UsageError(f"{place}: the chat template must be a text of at most {MAX_TEMPLATE:,} bytes; fetch it again")
    return source


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
