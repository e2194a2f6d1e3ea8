"""Models of other families: transformers computes the same from what they are loaded from and saved to."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.cpu_backend import CompiledBlock
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer
from tests.models import random_model

transformers = pytest.importorskip("transformers", reason="parity is with transformers; install headstart[hf]")

T = 40
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 400.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.5,
    "beta_slow": 0.3,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
DEFAULT = {"rope_type": "default", "rope_theta": 700.0}
GEMMA3 = {"sliding_attention": {"rope_type": "default", "rope_theta": 77.0}, "full_attention": LINEAR}
ORIGINAL = "original_max_position_embeddings"
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 7, "rope_parameters": LINEAR}),
    "mistral-wide": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 7, "layer_types": MIXED, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen3": ("Qwen3", {"rope_parameters": DEFAULT}),
    "qwen3-windows": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 1, "layer_types": MIXED, "attention_bias": True},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": DEFAULT, "tie_word_embeddings": False}),
    "smollm3-windows": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 8,
            "layer_types": MIXED,
            "rope_parameters": GEMMA3,
            "query_pre_attn_scalar": 50,
            "attention_bias": True,
        },
    ),
}


def reference_model(case: str, **changes: object) -> Any:
    """A model of transformers' with no parameter, norms and biases included, at what it usually begins with."""
    name, fields = CASES[case]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(SIZES | json.loads(json.dumps(fields)) | changes)))
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            mean = float(parameter.ndim == 1 and parameter.mean() == 1)
            parameter.normal_(mean, 0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return model.eval()


def tokens(shape: tuple[int, int] = (2, T)) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def edit(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_logits_as_transformers_and_back(case: str, tmp_path: Path) -> None:
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    assert sum(p.numel() for p in ours.parameters()) == ours.config.parameters()["total"]
    expected = theirs(tokens()).logits
    assert expected.std() > 0.3
    assert (ours(tokens()) - expected).abs().max() < 1e-5

    # With further heads it is still an ordinary directory of its family.
    more = Transformer(replace(ours.config, heads=3, head_kind="linear"))
    state = {name.replace("heads.0.", "trunk.blocks.3."): x for name, x in ours.state_dict().items()}
    more.load_state_dict(state, strict=False)
    save_model(more, tmp_path / "again")
    content = json.loads((tmp_path / "again/config.json").read_text())
    assert content["model_type"] == theirs.config.model_type
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is type(theirs) and not any(info.values()), info
    assert torch.equal(again(tokens()).logits, expected)
    assert load_config(tmp_path / "again") == more.config
    alone = json.loads((tmp_path / "again/config.json").read_text())
    del alone["headstart"]
    (tmp_path / "again/config.json").write_text(json.dumps(alone))
    assert load_config(tmp_path / "again") == ours.config


def with_heads(directory: Path, heads: int) -> Transformer:
    """The model in a directory with further heads that are random, each a block of its family."""
    base = load_model(directory)
    model = random_model(replace(base.config, layers=3 + heads, heads=heads))
    model.load_state_dict(base.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decoding_is_that_of_transformers_whatever_the_heads(case: str, tmp_path: Path) -> None:
    """One head against `generate`, beyond every window. With six tokens random heads are right often enough, so that
    what was accepted of chains and of trees is read by later rows."""
    theirs = reference_model(case, vocab_size=6)
    theirs.save_pretrained(tmp_path / "hf")
    prompt = tokens((1, 9)) % 6
    cached = case != "qwen3-windows"  # for a window of 1 the cache of transformers keeps everything
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, use_cache=cached)[0, 9:].tolist()
    request = Request(tuple(prompt[0].tolist()), 24)
    assert generate_all(Engine(pack(with_heads(tmp_path / "hf", 1))), [request])[0].tokens == expected

    model = pack(with_heads(tmp_path / "hf", 3))
    other = Request(tuple((tokens((1, 30))[0] % 6).tolist()), 20)
    requests = [replace(request, logprobs=0), replace(other, logprobs=0)]
    tree = DraftTree.parse("0,1,2,0.0,0.1,1.0,1.1,1.2,2.0,2.1,2.2")
    plain = generate_all(Engine(model, EngineConfig(slots=2, tree=tree)), [replace(each, heads=1) for each in requests])
    assert plain[0].tokens == expected
    kept = 0
    for tree_or_none in (None, tree):
        got = generate_all(Engine(model, EngineConfig(slots=2, tree=tree_or_none)), requests)
        assert [g.tokens for g in got] == [g.tokens for g in plain]
        if (
            tree_or_none is not None or backend_of(model).row_exact
        ):  # to the last bit, where shapes are the same or do not matter
            assert [g.logprobs for g in got] == [g.logprobs for g in plain]
        kept += sum(sum(g.stats.accepted) for g in got)
    assert kept > 0
    loose = generate_all(
        Engine(model, EngineConfig(slots=2, exact=False, tree=tree)), requests
    )  # a tree's rows all at once
    assert [g.tokens for g in loose] == [g.tokens for g in plain]


@pytest.mark.skipif(cpu.kernels(torch.float32) is None, reason="no compiled kernels here")
def test_which_models_the_compiled_kernels_compute_exactly(tmp_path: Path) -> None:
    blocks, exact = [], []
    for case in CASES:
        reference_model(case).save_pretrained(tmp_path / case)
        model = pack(load_model(tmp_path / case))
        blocks += [case] if isinstance(model.trunk.blocks[0], CompiledBlock) else []
        exact += [case] if backend_of(model).row_exact else []
    assert blocks == ["llama3", "llama-yarn", "mistral-wide", "qwen2-yarn"]
    assert exact == [*blocks[:3], "qwen2-yarn", "qwen3", "smollm3", "olmo2"]


ODD_ROPES: dict[str, dict[str, Any]] = {
    "the context before next to yarn": {"rope_scaling": _without(YARN, ORIGINAL), ORIGINAL: 16},
    "another context before next to llama3": {"rope_scaling": LLAMA3, ORIGINAL: 48},
    "the context before where it says nothing": {"rope_scaling": LINEAR, ORIGINAL: 16},
    "an empty rope_scaling": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "rope_scaling in place of rope_parameters": {
        "rope_scaling": _without(YARN, "rope_theta"),
        "rope_parameters": DEFAULT,
    },
    "with rope_theta": {"rope_scaling": _without(YARN, "rope_theta"), "rope_parameters": DEFAULT, "rope_theta": 99.0},
    "rope_scaling default": {"rope_scaling": {"type": "default"}, "rope_parameters": LINEAR, "rope_theta": 99.0},
}


@pytest.mark.parametrize("name", ODD_ROPES)
@torch.no_grad()
def test_rotary_fields_that_contradict_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    reference_model("olmo2").save_pretrained(tmp_path)
    content = _without(json.loads((tmp_path / "config.json").read_text()), "rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(content | ODD_ROPES[name]))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    assert (load_model(tmp_path)(tokens()) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_mistral_with_types_of_layers_is_a_ministral(tmp_path: Path) -> None:
    reference_model("ministral").save_pretrained(tmp_path)
    edit(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"])
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    ours = load_model(tmp_path)
    assert (ours.config.family, ours.config.window_layers) == ("ministral", (0, 2))
    assert (ours(tokens()) - expected).abs().max() < 1e-5


def refusal(directory: Path, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message and "; " in message, message
    for word in words:
        assert word in message, message


def test_what_a_family_does_not_compute_is_refused(tmp_path: Path) -> None:
    for case, changes, words in (
        ("mistral", {"sliding_window": "wide"}, ["sliding_window", "whole number"]),
        ("mistral", {"num_hidden_layers": 10**5}, ["num_hidden_layers", "10,000"]),
        ("mistral", {"rms_norm_eps": float("inf")}, ["rms_norm_eps", "larger"]),
        ("mistral", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ("qwen3-windows", {"layer_types": ["chunked"] * 4}, ["layer_types", "chunked", "full_attention"]),
        ("qwen3", {"quantization_config": {"bits": 4}}, ["quantization_config", "qwen3 without"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers", "2 of 4"]),
        ("smollm3", {"no_rope_layers": "all"}, ["no_rope_layers", "a list"]),
        ("olmo2", {"sliding_window": 3}, ["sliding_window", "without"]),
        ("llama3", {"layer_types": MIXED}, ["layer_types", "full_attention", "no sliding_window"]),
        ("mistral", {"sliding_window": None, "layer_types": MIXED}, ["layer_types", "no sliding_window"]),
        ("qwen2", {"use_sliding_window": False}, ["layer_types", "no sliding_window"]),
        ("smollm3-windows", {"use_sliding_window": False}, ["layer_types", "no sliding_window"]),
        ("gemma3", {"sliding_window": None}, ["layer_types", "no sliding_window"]),
        ("qwen3-windows", {"layer_types": MIXED * 2}, ["layer_types", "4 layers"]),
        ("qwen3", {"per_layer_config": {"1": {"rope_theta": 3.0}}}, ["per_layer_config"]),
        ("llama3", {"is_causal": False}, ["is_causal"]),
        ("llama3", {"rope_parameters": GEMMA3}, ["rope_parameters", "one object"]),
        ("olmo2", {"rope_scaling": {"full_attention": LINEAR}}, ["rope_scaling", "one object"]),
        ("gemma3", {"rope_parameters": LINEAR}, ["rope_parameters", "an object each"]),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "rope_type"]),
        ("gemma3", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, ["truncate"]),
        ("gemma3", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "gemma3_text without"]),
        ("gemma3", {"hidden_activation": "relu"}, ["hidden_activation", "gelu_pytorch_tanh"]),
        (
            "qwen2",
            {"model_type": "llama", "use_sliding_window": False, "sliding_window": None, "layer_types": None},
            ["holds", "bias"],
        ),
        ("olmo2", {"attention_bias": False}, ["holds", "model.layers.0.self_attn.k_proj.bias, ", "13 more"]),
        ("llama3", {"attention_bias": True}, ["lacks", "q_proj.bias, ", "13 more"]),
        ("qwen3", {"head_dim": 8}, ["q_proj", "[64, 32]", "[32, 32]"]),
    ):
        reference_model(case).save_pretrained(tmp_path / case)
        edit(tmp_path / case, **changes)
        refusal(tmp_path / case, *words)


def test_whatever_a_configuration_holds_it_is_one_line(tmp_path: Path) -> None:
    """Each field, those of rotary positions too, with values that nobody expects: read, or refused; never another
    error."""
    odd = (None, 0, -1, 1.5, "x", [], {}, True, [1], [["x"]], {"rope_type": "yarn"}, float("inf"), 10**400)
    refused = 0
    for case in ("qwen2-yarn", "smollm3-windows", "gemma3"):
        reference_model(case, vocab_size=3).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        changed = [content | {name: value} for name in (*content, "rope_scaling", "no_rope_layers") for value in odd]
        ropes = content["rope_parameters"]
        for name, of in (
            (("full_attention", ropes["full_attention"]), (None, None)) if case == "gemma3" else ((None, ropes),)
        ):
            for key in of or ():
                for value in odd:
                    inner = of | {key: value}
                    changed.append(content | {"rope_parameters": ropes | {name: inner} if name else inner})
        for each in changed:
            (tmp_path / "config.json").write_text(json.dumps(each))
            try:
                load_config(tmp_path)
            except UsageError as error:
                refused += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert refused > 300


def test_code_that_comes_along_is_not_run(tmp_path: Path) -> None:
    reference_model("qwen3").save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (tmp_path / "hf/modeling.py").write_text("raise SystemExit('was run')")
    assert load_model(tmp_path / "hf").config.family == "qwen3"


BASE = ModelConfig(vocab_size=61, dim=32, layers=4, attention_heads=4, context=64)


@pytest.mark.parametrize(
    ("changes", "family", "words"),
    [
        ({"qk_norm": "full"}, None, ["qk_norm", "no family"]),
        ({"norm_placement": "post", "qk_norm": "head"}, None, ["olmo2", "qk_norm"]),
        ({"qkv_bias": True, "window": 9, "window_layers": (1, 3)}, "qwen2", []),
        ({"qkv_bias": True, "nope_layers": (1,)}, None, ["no_rope_layers"]),
        ({"window": 9}, "mistral", []),
        ({"window": 9, "attention_bias": True}, "smollm3", []),
        ({"window": 9, "window_layers": (0,), "local_rope_theta": 3.0}, None, ["rope_local_base_freq"]),
        ({"nope_layers": (1, 2), "rope_scaling": RopeScaling("linear", 3.0)}, "smollm3", []),
        ({"family": "mistral", "attention_bias": True}, None, ["mistral", "attention_bias"]),
        ({"family": "qwen2"}, None, ["qwen2", "qkv_bias"]),
        ({"family": "phi"}, None, ["phi", "llama, mistral"]),
    ],
    ids=str,
)
def test_fields_may_be_combined_where_a_family_can_hold_them(
    changes: dict[str, Any], family: str | None, words: list[str], tmp_path: Path
) -> None:
    model = random_model(replace(BASE, heads=2, wiring="causal", **changes))
    if family is not None:
        save_model(model, tmp_path / "model")
        assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == family
        assert load_config(tmp_path / "model") == model.config
        return
    with pytest.raises(UsageError) as caught:
        save_model(model, tmp_path / "model")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    for word in words:
        assert word in str(caught.value)


def test_the_fields_of_the_family_and_ours_must_agree(tmp_path: Path) -> None:
    for case, changes, words in (
        ("mistral", {"sliding_window": 8}, ["sliding_window", "7"]),
        ("qwen3", {"model_type": "qwen2"}, ["model_type", "qwen2", "qwen3"]),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, ["no_rope_layers"]),
        ("gemma3", {"query_pre_attn_scalar": 16}, ["query_pre_attn_scalar", "50"]),
        ("llama3", {"rope_scaling": LLAMA3 | {"factor": 5.0}}, ["rope_scaling", "5.0", "4.0"]),
    ):
        reference_model(case).save_pretrained(tmp_path / case)
        save_model(load_model(tmp_path / case), tmp_path / "ours")
        edit(tmp_path / "ours", **changes)
        refusal(tmp_path / "ours", "headstart", *words)
    content = json.loads((tmp_path / "ours/config.json").read_text())["headstart"]["model"]
    for change, word in (({"window_layers": [True]}, "window_layers"), ({"rope_scaling": 3}, "rope_scaling")):
        edit(tmp_path / "ours", headstart={"format": 1, "model": content | change})
        refusal(tmp_path / "ours", word)
    edit(tmp_path / "ours", headstart={"format": 1, "model": content | {"rope_scaling": {"kind": "linear"}}})
    refusal(tmp_path / "ours", "rope_scaling")


def test_parameters_and_flops_of_every_kind_of_head(tmp_path: Path) -> None:
    for family, changes in {
        "qwen2": {"qkv_bias": True},
        "gemma": {"qk_norm": "head", "norm_placement": "both"},
        "olmo2": {"qk_norm": "full", "norm_placement": "post", "kv_heads": 2, "attention_bias": True},
    }.items():
        for kind in ("transformer", "medusa", "sequential"):
            wiring = "causal" if kind == "sequential" else "parallel"
            config = replace(BASE, heads=3, head_kind=kind, wiring=wiring, **changes)
            total = sum(p.numel() for p in Transformer(config).parameters())
            assert total == config.parameters()["total"], (family, kind)
    windows = replace(BASE, window=8, window_layers=(0, 3))
    assert windows.flops_per_token(4) == BASE.flops_per_token(4)
    assert BASE.flops_per_token(20) - windows.flops_per_token(20) == 12 * 2 * 32 * (20 - 8)


def test_files_written_before_there_were_families_keep_their_digests() -> None:
    assert list(BASE.to_dict())[-1] == "rope_theta"
    assert replace(BASE, qk_norm="head").to_dict().keys() - BASE.to_dict().keys() == {"qk_norm"}


def origins_in_text(logits_TnV: Tensor, text: list[int], prompt: int) -> list[int]:
    """Return the head that drafts each token that greedy decoding writes behind the prompt, by the logits that training
    computes over the whole of it."""
    best, n = logits_TnV.argmax(-1), logits_TnV.shape[1]
    origins, at = [1], prompt - 1  # the first window has no drafts
    while len(origins) < len(text) - prompt:
        first, right = at + 2, 0  # behind the root, which head 1 said at this row
        while right < n - 1 and first + right < len(text) and best[at, right + 1] == text[first + right]:
            right += 1
        origins += [*range(2, right + 2), 1]
        at += right + 1
    return origins[: len(text) - prompt]


@pytest.mark.parametrize(("case", "window"), [("qwen3-windows", 6), ("smollm3-windows", 9), ("gemma3", 8)])
@pytest.mark.parametrize("head_kind", ["transformer", "sequential"])
@torch.no_grad()
def test_drafts_in_decoding_are_those_of_training(case: str, window: int, head_kind: str, tmp_path: Path) -> None:
    """Windows, bases and layers without positions in the caches of heads too."""
    reference_model(case, vocab_size=4, sliding_window=window).save_pretrained(tmp_path)
    wiring = "causal" if head_kind == "sequential" else "anticausal"
    config = replace(load_config(tmp_path), layers=6, heads=3, head_kind=head_kind, wiring=wiring)
    model = random_model(config, seed=3)
    request = Request(tuple((tokens((1, 20))[0] % 4).tolist()), 36)
    (got,) = generate_all(Engine(pack(copy.deepcopy(model)), EngineConfig(context=64)), [request])
    text = [*request.prompt, *got.tokens]
    assert len(text) == 56
    assert got.origins == origins_in_text(model(torch.tensor([text]), heads=3)[0], text, 20)
    assert max(got.origins) > 1
