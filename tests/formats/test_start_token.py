"""A start token stands before prompts where the model was trained with one, as transformers puts it there."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headstart
from headstart.commands.convert import convert
from headstart.data.chat_template import load_chat_template
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer, prompt_ids
from headstart.decoding.constraints import Constraint
from headstart.errors import UsageError
from headstart.evaluation.heads import score_documents
from headstart.evaluation.inputs import cut_prompts, read_documents
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_data_tokenizer, load_model, load_model_tokenizer
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
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
        prepare([str(tmp_path / "text")], tmp_path / name, tokenizer, Preparation(validation_fraction=0.3, seed=1))
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


def test_what_is_evaluated_begins_with_it(directory: Path, tmp_path: Path) -> None:
    """Documents and prompts cut out of them. The start token is read and never predicted: no score counts it."""
    text = "the model writes several tokens at once" * 2
    (tmp_path / "a.txt").write_text(text)
    model = headstart.load(directory, dtype="float32")
    documents, size = read_documents([str(tmp_path / "a.txt")], model.tokenizer)
    assert documents == [[0, *model.tokenizer.encode(text)]] and size == len(text)
    prompts = cut_prompts(documents, 3, 8, 12)
    assert len(prompts) == 3 and all(len(prompt) == 8 and prompt[0] == 0 for prompt in prompts)
    assert all(
        model.tokenizer.decode(prompt) in text and len(model.tokenizer.decode(prompt)) == 7 for prompt in prompts
    )
    assert cut_prompts(documents, 1, 1, 60) == [(0,)]

    scores = score_documents(model.transformer, documents, size, length=64, start_tokens=1)
    logits = model.logits([documents[0][:64]])[0, :-1, 0].double().log_softmax(-1)
    assert scores.tokens == len(text)  # a byte a token here
    short = score_documents(model.transformer, [documents[0][:64]], 63, length=64, start_tokens=1)
    nats = -logits.gather(1, torch.tensor(documents[0][1:64])[:, None]).mean()
    assert short.bits_per_byte[0] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    two = score_documents(model.transformer, [documents[0][:64]], 62, length=64, start_tokens=2)
    assert two.tokens == 62 and two.bits_per_byte[0] == pytest.approx(
        float(-logits[1:].gather(1, torch.tensor(documents[0][2:64])[:, None]).mean()) / math.log(2), rel=1e-5
    )


def copied(directory: Path, target: Path, **config: object) -> Path:
    """Return a copy of the model directory; `config` changes its config.json, None takes a field out."""
    shutil.copytree(directory, target)
    content = json.loads((target / "config.json").read_text()) | config
    content = {name: value for name, value in content.items() if value is not None}
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("named", [None, 1, 7])
def test_of_a_foreign_model_the_tokenizer_says_how_texts_begin(directory: Path, tmp_path: Path, named: object) -> None:
    """Whatever config.json names as bos_token_id, transformers puts the start token of the tokenizer there."""
    foreign = copied(directory, tmp_path / "foreign", bos_token_id=named)
    tokenizer = load_model_tokenizer(foreign)
    assert tokenizer is not None and tokenizer.start_ids == (0,)
    assert prompt_ids(tokenizer, "a b") == transformers.AutoTokenizer.from_pretrained(foreign)("a b").input_ids
    # And after a conversion, which keeps the ids of config.json.
    convert(foreign, tmp_path / "ours")
    again = load_model_tokenizer(tmp_path / "ours")
    assert again is not None and again.start_ids == (0,)


def add_token(directory: Path, text: str, token: int) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": token, "content": text, **flags})
    file.write_text(json.dumps(content))


def test_an_added_token_for_which_the_model_has_no_row(directory: Path, tmp_path: Path) -> None:
    """Gemma 3 has such a token. The model loads and writes the same; naming the token is refused in a line."""
    more = copied(directory, tmp_path / "more")
    add_token(more, "<picture>", 258)
    ours, same = headstart.load(more), headstart.load(directory)
    assert ours.generate("def f(", max_new_tokens=12).tokens == same.generate("def f(", max_new_tokens=12).tokens
    digits = Constraint.regex("[0-9]+x")
    assert ours.generate("a", 12, constraint=digits).tokens == same.generate("a", 12, constraint=digits).tokens
    for prompt, message in (("see <picture>", "<picture> is token 258, and the model has 258 rows"), ([258], "258")):
        with pytest.raises(UsageError, match=message):
            ours.generate(prompt)
    (tmp_path / "a.txt").write_text("see <picture>")
    with pytest.raises(UsageError, match="<picture>"):
        read_documents([str(tmp_path / "a.txt")], ours.tokenizer)
    with pytest.raises(UsageError, match="<picture>"):
        prepare(
            [str(tmp_path / "a.txt")],
            tmp_path / "shards",
            load_data_tokenizer(more),
            Preparation(validation_fraction=0.0),
        )
    save_model(load_model(more), tmp_path / "again", load_model_tokenizer(more))
    assert headstart.load(tmp_path / "again").tokenizer.vocab_size == 258

    few = copied(directory, tmp_path / "few")
    save_model(Transformer(ModelConfig(vocab_size=200, dim=16, layers=2, attention_heads=1)), few)
    shutil.copy(directory / "tokenizer.json", few)
    shutil.copy(directory / "tokenizer_config.json", few)
    with pytest.raises(UsageError, match="has 258 ids, the model's vocabulary 200"):
        load_model_tokenizer(few)


def test_tokens_that_only_the_files_beside_name(directory: Path, tmp_path: Path) -> None:
    """Special tokens come from special_tokens_map.json and added_tokens_decoder, like in transformers."""
    named = copied(directory, tmp_path / "named")
    config = json.loads((named / "tokenizer_config.json").read_text())
    tokens = {name: config.pop(name) for name in ("bos_token", "eos_token")}
    config["chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    (named / "special_tokens_map.json").write_text(json.dumps(tokens | {"eos_token": {"content": "</s>"}}))
    tokenizer = load_model_tokenizer(named)
    assert tokenizer is not None and (tokenizer.end_id, tokenizer.start_ids) == (1, (0,))
    template = load_chat_template(tokenizer)
    assert template is not None and template.render([{"role": "user", "content": "x"}]) == "<s>x</s>"

    added = copied(directory, tmp_path / "added", vocab_size=300)
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {
        "added_tokens_decoder": {
            "259": {"content": "<|b|>", "special": False, **flags},
            "258": {"content": "<|a|>", "special": True, **flags},
        }
    }
    (added / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(added), load_model_tokenizer(added)
    assert ours is not None
    for text in ("<|a|> x<|b|>  y", "</s><|b|><|a|>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert max(ours.encode("<|a|><|b|>")) == 259 and ours.decode([258, 259]) == "<|b|>"
    config["added_tokens_decoder"] = {"x": 3}
    (added / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="added_tokens_decoder must hold tokens by their ids"):
        load_model_tokenizer(added)


def test_a_saved_model_ends_where_its_tokenizer_ends(directory: Path, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=258, dim=32, layers=2, attention_heads=2, context=32, norm_eps=1e-6)
    tokenizer = load_tokenizer(directory)
    tokenizer.end_ids |= {5, 9}
    save_model(Transformer(config), tmp_path / "model", tokenizer)
    again = load_model_tokenizer(tmp_path / "model")
    assert again is not None and (again.end_id, again.end_ids) == (tokenizer.end_id, {tokenizer.end_id, 5, 9})


@pytest.mark.parametrize(("source", "start"), [("model", (0,)), ("tokenizer", ())])
def test_conversion_keeps_how_texts_begin(directory: Path, tmp_path: Path, source: str, start: tuple[int]) -> None:
    """The start token survives MiMo's layout, and a tokenizer that is given."""
    sizes = ModelConfig(vocab_size=258, dim=32, layers=2, attention_heads=2, context=32, norm_eps=1e-6)
    config = replace(sizes, heads=2, head_kind="sequential", wiring="causal")
    words = load_model_tokenizer(directory) if source == "model" else load_tokenizer(directory)
    save_model(Transformer(config), tmp_path / "first", words)
    ends = {"eos_token_id": [1, 5], "bos_token_id": 0}
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps(ends))
    convert(tmp_path / "first", tmp_path / "mimo", to="mimo")
    read = load_model_tokenizer(tmp_path / "mimo")
    assert read is not None and read.start_ids == start
    convert(tmp_path / "mimo", tmp_path / "back")
    again = load_model_tokenizer(tmp_path / "back")
    assert again is not None and (again.start_ids, again.end_ids) == (start, {1, 5})
    assert json.loads((tmp_path / "mimo" / "generation_config.json").read_text()) == ends
    given = directory if source == "model" else directory / "tokenizer.json"
    convert(tmp_path / "mimo", tmp_path / "given", tokenizer=str(given))
    other = load_model_tokenizer(tmp_path / "given")
    assert other is not None and other.start_ids == start
