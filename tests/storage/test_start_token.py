"""A start token stands before prompts where the model was trained with one, as transformers puts it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import headstart
from headstart.data.shards import TokenShards, prepare
from headstart.data.tokenizers import load_tokenizer, prompt_ids
from headstart.model.config import ModelConfig
from headstart.storage.model_directory import load_data_tokenizer, load_model, load_model_tokenizer, save_model
from headstart.training.config import BatchConfig, DataConfig, RunConfig
from headstart.training.loop import train

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


def test_documents_for_such_a_model_begin_with_it(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text("<s>word " * i if i == 5 else f"text {i}")
    for name, source, start in (("model", directory, [0]), ("alone", directory / "tokenizer.json", [])):
        tokenizer = load_data_tokenizer(source)
        prepare([str(tmp_path / "text")], tmp_path / name, tokenizer, validation_fraction=0.3, seed=1)
        for split in ("train", "validation"):
            shards = TokenShards.open(tmp_path / name, split)
            assert shards.manifest["start_ids"] == start and shards.tokenizer().start_ids == tuple(start)
            for i in range(len(shards.documents)):
                tokens = shards.document(i).tolist()
                # A text that has it already does not get another.
                assert (
                    tokens.count(1) == 1
                    and tokens[-1] == 1
                    and tokens[:2].count(0) == (1 if start or 0 in tokens else 0)
                )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Unknown"]}')
    (tmp_path / "other" / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    assert load_data_tokenizer(tmp_path / "other").start_ids == ()


def test_a_model_trained_on_such_documents_knows_it(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words to read " * 40)
    data = DataConfig(sources=(str(tmp_path / "text.txt"),), tokenizer=str(directory), validation_fraction=0.0)
    model = ModelConfig(vocab_size=258, dim=16, layers=2, attention_heads=1, context=16)
    path = train(
        RunConfig(steps=1, run_dir=tmp_path / "run", device="cpu", model=model, data=data, batch=BatchConfig(1, 1, 16))
    )
    tokenizer = load_model_tokenizer(path)
    assert tokenizer is not None and tokenizer.start_ids == (0,)
    assert json.loads((path / "config.json").read_text())["bos_token_id"] == 0
