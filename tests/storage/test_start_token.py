"""A start token stands before prompts where the model was trained with one, as transformers puts it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import headstart
from headstart.data.tokenizers import load_tokenizer, prompt_ids
from headstart.storage.model_directory import load_model, load_model_tokenizer, save_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer puts <s> before every text, written by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    directory = tmp_path_factory.mktemp("start") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def test_text_is_that_of_transformers(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer("def f(", return_tensors="pt")
    assert prompt.input_ids[0, 0] == 0
    with torch.no_grad():
        text = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    ours = headstart.load(directory)
    assert ours.generate("def f(", max_new_tokens=12).tokens == [token for token in text if token != 1]
    ids = ours.tokenizer.encode("def f(")
    assert ours.generate(ids, max_new_tokens=12).tokens != ours.generate("def f(", max_new_tokens=12).tokens
    assert prompt_ids(ours.tokenizer, "<s>def f(") == prompt_ids(ours.tokenizer, "def f(") == [0, *ids]
    assert prompt_ids(ours.tokenizer, "") == [0]


def test_the_directory_says_whether_the_model_knows_it(directory: Path, tmp_path: Path) -> None:
    model = load_model(directory)
    # Copied, it stays; trained by us with that tokenizer, the model has read no start token.
    save_model(model, tmp_path / "copied", load_model_tokenizer(directory))
    save_model(model, tmp_path / "trained", load_tokenizer(directory))
    for name, start, ids in (("copied", 0, (0,)), ("trained", 1, ())):
        for file in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / name / file).read_text())["bos_token_id"] == start
        tokenizer = load_model_tokenizer(tmp_path / name)
        assert tokenizer is not None and tokenizer.start_ids == ids
