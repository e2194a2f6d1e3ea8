"""A tokenizer for conversations, and chat templates of the kinds that are about."""

from __future__ import annotations

import json
from pathlib import Path

from headstart.data.byte_tokenizer import byte_alphabet
from headstart.data.tokenizers import PretrainedTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ '\n' + message['content'] | trim }}<|im_end|>\n"
    "{%- endgeneration %}{% else %}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no ' + message['role'] + ' here') }}{% endif %}{% endfor %}"
)
THINKING = (  # what an answer thinks is left out once another question follows
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(
    folder: Path, template: str | None = CHATML, in_config: bool = False, more: tuple[str, ...] = ()
) -> PretrainedTokenizer:
    """Bytes, some pairs of bytes, and 3 special tokens and `more`, with a chat template; 264 ids without `more`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_alphabet()
    merges = [("h", "e"), ("l", "l"), ("Ċ", "Ċ"), ("Ġ", "h"), ("Ã", "¿")]
    vocab = {letter: number for number, letter in enumerate(letters)}
    vocab |= {a + b: 256 + number for number, (a, b) in enumerate(merges)}
    engine = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", *more)
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[2], "bos_token": special[0]}
    if template is not None and in_config:
        config["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return PretrainedTokenizer(folder)
