"""Small tokenizers of the kinds that models have, and models of random weights under them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from headstart.data.tokenizers import PretrainedTokenizer
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

WORDS = (
    "def f(x): return x the model writes several tokens at once and the text is the same as before "
    "import class self for in range print value y = x + 1 yes no hello world\n 1986 "
) * 30
END, TURN = "</s>", "<|turn_end|>"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _save(engine: object, folder: Path) -> PretrainedTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(engine), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return PretrainedTokenizer(folder)


def sentencepiece(folder: Path, prefix: bool = True, metaspace: bool = False) -> PretrainedTokenizer:
    """Like Llama 2: visible spaces, byte tokens, the first space of a text stripped. Without `prefix` like Gemma, which
    strips none; with `metaspace` like Mistral's first releases, whose decoder is one step of that name."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    engine.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", END, TURN, *BYTE_TOKENS]
    engine.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    )
    content = json.loads(engine.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTE_TOKENS]
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    if metaspace:
        one = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        decoders = [{"type": "ByteFallback"}, one]
    content["decoder"] = {"type": "Sequence", "decoders": decoders}
    return _save(content, folder)


def byte_level(folder: Path, digits: bool = False, lacking: bytes = b"") -> PretrainedTokenizer:
    """Byte-level BPE like Llama 3; with `digits` like SmolLM, one token a digit; without tokens for the bytes
    `lacking`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from headstart.data.byte_tokenizer import byte_alphabet

    alphabet = [letter for byte, letter in enumerate(byte_alphabet()) if byte not in lacking]
    engine = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]) if digits else level
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", END, TURN], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator([WORDS + " é日本🎉" * 9], trainer)
    return _save(json.loads(engine.to_str()), folder)


KINDS: dict[str, Callable[[Path], PretrainedTokenizer]] = {
    "llama2": sentencepiece,
    "gemma": lambda folder: sentencepiece(folder, prefix=False),
    "metaspace": lambda folder: sentencepiece(folder, metaspace=True),
    "llama3": byte_level,
    "smollm": lambda folder: byte_level(folder, digits=True),
}


def random_model(vocab_size: int, heads: int = 2) -> Transformer:
    """A model whose greedy text wanders."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocab_size, dim=32, layers=heads + 1, attention_heads=2, context=128, heads=heads, head_kind="linear"
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model
