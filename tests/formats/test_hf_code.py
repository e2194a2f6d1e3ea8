"""The code that goes with a model: transformers alone decodes with all heads, and writes what it writes with one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.hf_code_export import GENERATE_FILE, MODELING_FILE, save_hf_code, template, written_code
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer
from tests.models import random_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")

TINY = ModelConfig(vocab_size=31, dim=32, layers=4, attention_heads=4, kv_heads=2, context=96, heads=3)
CAUSAL, ANTICAUSAL = replace(TINY, wiring="causal"), replace(TINY, wiring="anticausal")
KINDS = {
    "parallel": TINY,
    "causal": CAUSAL,
    "anticausal": ANTICAUSAL,
    "linear": replace(CAUSAL, head_kind="linear"),
    "replicated, tied, llama3": replace(
        TINY, head_kind="replicated", tied=True, rope_scaling=RopeScaling("llama3", 8, 24)
    ),
    "medusa": replace(TINY, head_kind="medusa"),
    "stern, mistral": replace(TINY, head_kind="stern", family="mistral"),
    "qwen3": replace(TINY, family="qwen3", qk_norm="head", head_dim=16),
    "sequential": replace(CAUSAL, head_kind="sequential", attention_bias=True),
    "sequential, own": replace(CAUSAL, head_kind="sequential", shared=False, heads=4, qkv_bias=True),
    "one head": replace(TINY, heads=1),
    "draft vocabulary": replace(TINY, tied=True, draft_vocab=9),
    "medusa, own, draft vocabulary": replace(TINY, head_kind="medusa", shared=False, draft_vocab=9),
    "sequential, draft vocabulary": replace(CAUSAL, head_kind="sequential", draft_vocab=9),
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_all_heads_write_what_one_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = KINDS[name]
    model = random_model(config)
    if not config.tied:
        model.unembedding.weights[0][3:] *= 0.1  # few tokens, so that some drafts are right
    if config.draft_vocab is not None:
        model.unembedding.d2t.copy_(torch.tensor([0, 1, 2, 5, 7, 11, 13, 17, 30]))
    save_hf_code(model, tmp_path)
    code, decoding = written_code(tmp_path, MODELING_FILE), written_code(tmp_path, GENERATE_FILE)
    theirs, info = code.HeadstartForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    again = load_model(tmp_path)
    assert again.config == config

    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    mine, found = model(ids, heads=config.heads), theirs.head_logits(ids)
    assert torch.equal(mine.isnan(), found.isnan()) and torch.equal(mine.isfinite(), found.isfinite())
    assert (mine - found).nan_to_num().abs().max() < 1e-4 * mine[mine.isfinite()].abs().max()

    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    drawn = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2}
    ways: list[dict[str, Any]] = [{"do_sample": False}, drawn]
    for way in ways:
        settings = way | {"attention_mask": padded, "max_new_tokens": 10, "pad_token_id": 0}
        torch.manual_seed(5)
        plain = transformers.LlamaForCausalLM.generate(theirs, ids, **settings)
        torch.manual_seed(5)
        out = decoding.generate(ids, model=theirs, return_dict_in_generate=True, **settings)
        assert torch.equal(out.sequences, plain), way

    # Drafts are what our heads say of the text so far, and as many of them are right as in our own decoding.
    drafts: list[tuple[int, int]] = []
    draft = decoding._Batch.draft

    def watched(batch: Any) -> None:
        draft(batch)
        end = batch.ends[0]  # the last token stands before it, and heads have read the one before that
        for k in range(2, batch.n + 1):
            said = model(batch.text[:1, : end - 2 + k], heads=k)[0, end - 2, -1]
            drafts.append((int(batch.text[0, end - 2 + k]), int(said.argmax())))

    monkeypatch.setattr(decoding._Batch, "draft", watched)
    out = decoding.generate(ids[:1], model=theirs, max_new_tokens=24, pad_token_id=0, return_dict_in_generate=True)
    assert all(fed == said for fed, said in drafts) and len(drafts) == out.passes * (config.heads - 1)
    ours = generate_all(Engine(pack(model), EngineConfig(context=96)), [Request(tuple(ids[0].tolist()), 24)])[0]
    assert out.sequences[0, 12:].tolist() == ours.tokens
    assert out.passes < 23 or config.heads == 1 or config.tied
    assert abs(out.passes - ours.stats.passes) <= 1  # the last pass of one may write past the end


PROGRAM = """
import sys, tempfile, torch
sys.modules["headstart"] = None  # importing it fails
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder = sys.argv[1]
ids = torch.tensor([list(b"def f(x):")])
settings = dict(max_new_tokens=30, pad_token_id=255)
llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert type(llama).__module__.startswith("transformers.models.llama"), type(llama)
plain = llama.generate(ids, **settings)
torch.manual_seed(1)
sampled = llama.generate(ids, do_sample=True, top_k=20, **settings)

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(model).__name__ == "HeadstartForCausalLM"
# As the folder brings its own generate, it is the model's; it can be named too.
assert torch.equal(model.generate(ids, **settings), plain)
named = model.generate(ids, custom_generate=folder, trust_remote_code=True, return_dict_in_generate=True, **settings)
assert torch.equal(named.sequences, plain) and 0 < named.passes < 29, named.passes
torch.manual_seed(1)
assert torch.equal(model.generate(ids, do_sample=True, top_k=20, **settings), sampled)
assert torch.equal(model.generate(ids, heads=1, **settings), plain)

tokenizer = AutoTokenizer.from_pretrained(folder)
new = plain[0, ids.shape[1]:].tolist()
stop = dict(stop_strings=[tokenizer.decode(new[9:11])], tokenizer=tokenizer)
assert torch.equal(model.generate(ids, **stop, **settings), llama.generate(ids, **stop, **settings))

class Pieces:
    def __init__(self): self.put_, self.ended = [], False
    def put(self, value): self.put_ += value.flatten().tolist()
    def end(self): self.ended = True
pieces = Pieces()
model.generate(ids, streamer=pieces, **settings)
assert pieces.put_ == plain[0].tolist() and pieces.ended

for bad in (dict(num_beams=2), dict(heads=9), dict(output_scores=True, return_dict_in_generate=True)):
    try:
        model.generate(ids, **bad, **settings)
    except ValueError as error:
        assert str(error)
    else:
        raise AssertionError(bad)
try:
    llama.generate(ids, custom_generate=folder, trust_remote_code=True, **settings)
except ValueError as error:
    assert "trust_remote_code" in str(error)

with tempfile.TemporaryDirectory() as copy:
    model.save_pretrained(copy)
    again, info = type(model).from_pretrained(copy, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.head_logits(ids), model.head_logits(ids))
print("fine")
"""


@pytest.mark.slow
def test_without_headstart(tmp_path: Path) -> None:
    config = replace(TINY, vocab_size=256, heads=4, layers=6)
    model = random_model(config)
    with torch.no_grad():
        model.unembedding.weights[0][12:] *= 0.05  # few tokens, so that some drafts are right
    save_hf_code(model, tmp_path / "model", ByteTokenizer())
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")


def test_what_is_written_depends_on_nothing_else_and_is_short(tmp_path: Path) -> None:
    for file in (MODELING_FILE, GENERATE_FILE):
        text = template(file)
        imports = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))}
        assert imports <= {"__future__", "dataclasses", "functools", "os", "sys", "types", "typing"} | {
            "torch",
            "transformers",
            "safetensors",
        }
        assert len(text.splitlines()) < 350
    with pytest.raises(UsageError, match="anticausally"):
        save_hf_code(Transformer(replace(ANTICAUSAL, head_kind="linear")), tmp_path)
    for change, words in (({"window": 8}, "with window"), ({"qk_norm": "full", "norm_placement": "post"}, "olmo2")):
        with pytest.raises(UsageError, match=words):
            save_hf_code(Transformer(replace(TINY, **change)), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generates with the code of a small model."""
    folder = tmp_path_factory.mktemp("coded")
    save_hf_code(random_model(TINY), folder)
    model = written_code(folder, MODELING_FILE).HeadstartForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generating = written_code(folder, GENERATE_FILE)

    def generate(ids: Any, plain: bool = False, **settings: Any) -> list[list[int]]:
        settings = {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}
        decode = transformers.LlamaForCausalLM.generate if plain else generating.generate
        found: list[list[int]] = (
            decode(model, ids, **settings) if plain else decode(ids, model=model, **settings)
        ).tolist()
        return found

    return generate


IDS = torch.arange(3, 11).reshape(1, 8)


class Counting(transformers.LogitsProcessor):
    def __init__(self) -> None:
        self.calls, self.seen = 0, torch.zeros(31)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores - self.calls * (torch.arange(31) == self.calls % 31)


class Remembering(Counting):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen[scores.argmax()] += 1
        return scores - self.seen


class Drawing(Counting):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores + torch.rand(31)


class Pure(Counting):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores - 3.0 * (torch.arange(31) == input_ids[:, -1:]) + self.seen


def closure() -> Any:
    seen: list[int] = []

    def process(input_ids: Any, scores: Any) -> Any:
        seen.append(1)
        return scores - len(seen) * (torch.arange(31) == 5)

    return process


@pytest.mark.parametrize("make", [Counting, Remembering, Drawing, closure])
def test_a_processor_that_keeps_state_is_refused(make: Any, coded: Any) -> None:
    settings = {"do_sample": False}
    with pytest.raises(ValueError, match=r"keeps state.*heads=1"):
        coded(IDS, logits_processor=[make()], **settings)
    # With one prompt and one head the calls are those of transformers.
    torch.manual_seed(1)
    plain = coded(IDS, plain=True, logits_processor=transformers.LogitsProcessorList([make()]), **settings)
    torch.manual_seed(1)
    assert coded(IDS, heads=1, logits_processor=[make()], **settings) == plain


def test_a_processor_of_the_text_alone_is_taken(coded: Any) -> None:
    two = torch.cat([IDS, IDS.flip(1)])
    listed = transformers.LogitsProcessorList
    for settings in ({"no_repeat_ngram_size": 2}, {"suppress_tokens": [4, 5], "sequence_bias": [[[6], 2.0]]}):
        assert coded(two, **settings) == coded(two, plain=True, **settings)
    assert coded(two, logits_processor=listed([Pure()])) == coded(two, plain=True, logits_processor=listed([Pure()]))
    allowed = {"prefix_allowed_tokens_fn": lambda batch, text: [int(text[-1]) % 30 + 1, 7]}
    assert coded(IDS, **allowed) == coded(IDS, plain=True, **allowed)
    calls: list[int] = []
    with pytest.raises(ValueError, match="keeps state"):
        coded(IDS, prefix_allowed_tokens_fn=lambda batch, text: calls.append(1) or [len(calls) % 31, 7])


class Ends(transformers.StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] > 11)


class Nothing:
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("settings", "prompts", "words"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, 1, "penalty_alpha"),
        ({"penalty_alpha": 0.6, "do_sample": True}, 1, "penalty_alpha"),
        ({"dola_layers": "low"}, 1, "dola_layers"),
        ({"prompt_lookup_num_tokens": 3}, 1, "prompt_lookup_num_tokens"),
        ({"num_beams": 2}, 1, "num_beams"),
        ({"guidance_scale": 1.5}, 1, "UnbatchedClassifierFreeGuidance.*keeps state"),
        ({"token_healing": True}, 1, "token_healing"),
        ({"position_ids": torch.arange(8)[None]}, 1, "position_ids"),
        ({"stopping_criteria": [Ends()]}, 2, "Ends: .*one prompt at a time"),
        ({"streamer": Nothing()}, 2, "streamer"),
    ],
)
def test_settings_that_are_not_honoured_are_refused(settings: Any, prompts: int, words: str, coded: Any) -> None:
    with pytest.raises(ValueError, match=words):
        coded(IDS.repeat(prompts, 1), **settings)


def test_stopping_criteria_of_ones_own_with_one_prompt(coded: Any) -> None:
    listed = transformers.StoppingCriteriaList
    found = coded(IDS, stopping_criteria=listed([Ends()]))
    assert found == coded(IDS, plain=True, stopping_criteria=listed([Ends()])) and len(found[0]) == 12
