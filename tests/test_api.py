from __future__ import annotations

import pytest
import torch

import headstart
from headstart import UsageError
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.kernels import pack
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


@pytest.fixture(scope="module", params=["transformer", "replicated"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, str]:
    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=4, attention_heads=2, heads=3, head_kind=request.param, context=96)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    path = str(tmp_path_factory.mktemp("models") / "model")
    save_model(model, path, ByteTokenizer(), dtype=torch.float32)
    return model, path


def test_logits_are_those_of_the_model_that_was_saved(saved) -> None:
    model, path = saved
    tokens = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens, heads=3)
    loaded = headstart.load(path)
    assert torch.allclose(loaded.logits(tokens), want, atol=1e-4)
    assert torch.allclose(loaded.logits(tokens.tolist(), heads=2), want[:, :, :2], atol=1e-4)


def test_a_list_of_prompts_is_a_list_of_outputs(saved) -> None:
    model = headstart.load(saved[1])
    prompts = ["def f(", [1, 2, 3], "x"]
    together = model.generate(prompts, max_new_tokens=20, temperature=1.0, seed=[4, 5, 6])
    for prompt, output, seed in zip(prompts, together, (4, 5, 6)):
        alone = model.generate(prompt, max_new_tokens=20, temperature=1.0, seed=seed, heads=1)
        assert (alone.tokens, alone.text) == (output.tokens, output.text)
        assert alone.stats.tokens_per_pass <= 1.0
    same_seed = model.generate(["ab", "ab"], max_new_tokens=20, temperature=1.0, seed=9)
    assert same_seed[0].tokens == same_seed[1].tokens


def test_streamed_pieces_are_the_text(saved) -> None:
    model = headstart.load(saved[1], dtype="bfloat16")
    text = model.generate("ab", max_new_tokens=60, temperature=1.0).text
    assert "".join(model.stream("ab", max_new_tokens=60, temperature=1.0)) == text


@pytest.mark.parametrize("tree", [6, "6", "0,1,0.0", 0])
def test_a_tree_changes_no_token(saved, tree) -> None:
    model = headstart.load(saved[1])
    plain = model.generate("ab", max_new_tokens=40, temperature=1.0, heads=1)
    fast = model.generate("ab", max_new_tokens=40, temperature=1.0, tree=tree)
    assert fast.tokens == plain.tokens and (fast.stats.siblings > 0) == bool(tree)
    assert "".join(model.stream("ab", max_new_tokens=40, temperature=1.0, tree=tree)) == fast.text
    with pytest.raises(UsageError, match="needs 1 before it"):
        model.generate("ab", tree="0,1.0")
    with pytest.raises(UsageError, match="-2 nodes"):
        model.generate("ab", tree=-2)


def test_the_context_bounds_what_is_generated(saved) -> None:
    out = headstart.load(saved[1]).generate("x" * 90, max_new_tokens=500)
    assert len(out.tokens) <= 6 and out.finish_reason in ("length", "end")


def test_settings_are_one_object_or_keywords(saved) -> None:
    model = headstart.load(saved[1])
    settings = headstart.GenerationSettings(max_new_tokens=20, temperature=1.0, seed=4)
    output = model.generate("ab", max_new_tokens=20, temperature=1.0, seed=4)
    assert model.generate("ab", settings=settings).tokens == output.tokens
    assert "".join(model.stream("ab", settings=settings)) == output.text
    assert model.generate("ab", 7, settings=settings).tokens == output.tokens[:7]
    assert model.generate("ab", settings=settings, heads=1).tokens == output.tokens
    with pytest.raises(UsageError, match="there is no setting 'temprature'; the nearest is 'temperature'"):
        model.generate("ab", temprature=0.5)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"seed": [1, 2.5]}, {"seed": None}, {"top_p": 0}, {"acceptance": "x"}, {"stop": 3},
     {"max_new_tokens": 1.5}, {"penalties": 5}, {"constraint": "[a-z]"}],
)  # fmt: skip
def test_settings_are_checked_when_they_are_made(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        headstart.GenerationSettings(**wrong)


def test_wrong_use(saved, tmp_path) -> None:
    model = headstart.load(saved[1])
    with pytest.raises(UsageError, match="empty"):
        model.generate("")
    with pytest.raises(UsageError, match="2 seeds"):
        model.generate(["a", "b", "c"], seed=[1, 2])
    with pytest.raises(UsageError, match="dtype"):
        headstart.load(saved[1], dtype="int3")
    with pytest.raises(UsageError):
        headstart.load(tmp_path)
    with pytest.raises(UsageError, match="between 1 and"):
        model.logits([[1, 2]], heads=4)


def test_a_directory_without_tokenizer_takes_ids(saved, tmp_path) -> None:
    save_model(saved[0], tmp_path / "bare", None, dtype=torch.float32)
    model = headstart.load(tmp_path / "bare")
    assert model.generate([1, 2], max_new_tokens=4).text == ""
    with pytest.raises(UsageError, match="token ids"):
        model.generate("text")
    with pytest.raises(UsageError, match="tokenizer"):
        next(model.stream([1, 2]))


@pytest.mark.parametrize(
    ("stored", "fast", "decoded"),
    [("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32"),
     ("float32", "bfloat16", "float32")],
)  # fmt: skip
def test_a_cpu_decodes_in_a_dtype_that_it_multiplies_in_hardware(stored, fast, decoded, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "dtype_on", lambda device: fast)
    save_model(saved[0], tmp_path / "model", None, dtype=getattr(torch, stored))
    weight = headstart.load(tmp_path / "model").transformer.trunk.embedding.weight
    assert weight.dtype == getattr(torch, decoded)
    assert torch.equal(weight, load_model(tmp_path / "model").trunk.embedding.weight.to(weight.dtype))
    asked = headstart.load(tmp_path / "model", dtype="bfloat16").transformer.trunk.embedding.weight
    assert asked.dtype == torch.bfloat16
