"""Passes through graphs, with a stand-in that runs what it captured again: it proves that nothing but the device's
state decides what a captured pass computes. Real graphs: tests/test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from shapes import packed

from headstart.data.tokenizers import ByteTokenizer, Tokenizer
from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import DynamicTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.graphs import MOST, GraphedPass, Replay
from headstart.decoding.settings import Penalties, Request, Sampling
from headstart.errors import UsageError

PROMPTS = [tuple(b"the cat that is "), tuple(b"then a dog "), tuple(b"end. the cat end. then")]


class Recorder:
    """Stands in for CUDA graphs: counts captures and replays, computes by running again."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Replay) -> Replay:
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay


def graphed(shape: str, slots: int, tokenizer: Tokenizer | None = None, **settings) -> tuple[Engine, Recorder]:
    config, recorder = EngineConfig(slots=slots, **settings), Recorder()
    engine = Engine(packed(shape, torch.float32), config, tokenizer=tokenizer)
    engine.decode_pass = GraphedPass(engine.model, engine.state, recorder)
    return engine, recorder


@pytest.mark.parametrize(
    ("shape", "tree"),
    [
        *((shape, None) for shape in ("transformer-parallel", "transformer-causal", "replicated", "eagle3")),
        ("eagle3", DynamicTree(3, 3, 8)),
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=5), Sampling(0.7, top_k=5, min_p=0.05, seed=1)])
def test_graphs_change_no_output(shape: str, tree: DynamicTree | None, sampling: Sampling) -> None:
    requests = [Request(prompt, 40 + 7 * i, sampling) for i, prompt in enumerate(PROMPTS)]
    wanted = [g.tokens for g in generate_all(Engine(packed(shape, torch.float32), EngineConfig(slots=2)), requests)]
    engine, recorder = graphed(shape, 2, tree=tree)
    assert [g.tokens for g in generate_all(engine, requests)] == wanted
    assert recorder.captured and recorder.replayed > 2 * recorder.captured


@pytest.mark.parametrize(
    "request_",
    [
        Request(PROMPTS[0], 12, Sampling(0.8, top_p=0.9)),
        Request(PROMPTS[0], 12, penalties=Penalties(presence=0.5)),
        Request(PROMPTS[0], 12, logprobs=1),
        Request(PROMPTS[0], 12, constraint=Constraint.regex("[a-e ]*")),
    ],
    ids=["top-p", "penalties", "logprobs", "constraint"],
)
def test_what_needs_the_host_is_not_captured(request_: Request) -> None:
    if request_.constraint is not None:
        pytest.importorskip("llguidance", reason="llguidance is not installed")
    engine, recorder = graphed("replicated", 1, tokenizer=ByteTokenizer())
    plain = Engine(packed("replicated", torch.float32), tokenizer=ByteTokenizer())
    wanted = generate_all(plain, [request_])[0].tokens
    assert generate_all(engine, [request_])[0].tokens == wanted
    assert recorder.captured == 0


def test_each_shape_and_transform_has_a_graph_of_its_own() -> None:
    engine, recorder = graphed("replicated", 1)
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_k=4), Sampling(0.5, top_k=4)):
        generate_all(engine, [Request(PROMPTS[0], 30, sampling, heads=1)])
    assert recorder.captured == 4  # the last differs in a value that lies on the device


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST >= 64
    monkeypatch.setattr("headstart.decoding.graphs.MOST", 1)
    engine, recorder = graphed("replicated", 1)
    for sampling in (Sampling(), Sampling(1.0)):
        wanted = generate_all(
            Engine(packed("replicated", torch.float32)), [Request(PROMPTS[0], 30, sampling, heads=1)]
        )[0]
        assert generate_all(engine, [Request(PROMPTS[0], 30, sampling, heads=1)])[0].tokens == wanted.tokens
    assert recorder.captured == 1


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(UsageError, match="CUDA"):
        Engine(packed("replicated", torch.float32), EngineConfig(graphs=True))
