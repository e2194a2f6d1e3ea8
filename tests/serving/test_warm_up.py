"""Check that a server is warm when it is ready."""

from __future__ import annotations

import pytest
import torch
from serving.conftest import HTTP, metric, running

from headstart import api
from headstart.data.tokenizers import Tokenizer
from headstart.decoding import constraints
from headstart.decoding.constraints import Constraint, Matcher
from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation
from headstart.decoding.policy import online
from headstart.decoding.policy.online import AcceptanceCounts, OnlineCalibration
from headstart.decoding.settings import Request
from headstart.formats.bundled import boxed_model
from headstart.model.transformer import Transformer
from headstart.serving.server import make_service
from headstart.serving.settings import ServeSettings


def test_warm_up_times_passes_and_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, int]] = []
    written: list[Request] = []
    grammars: list[Constraint] = []

    def made_up(model: Transformer, slots: int, sampled: bool) -> tuple[float, tuple[float, ...]]:
        timed.append((slots, torch.get_num_threads()))
        return 1.0, tuple(1.0 + 0.1 * i for i in range(model.config.heads))

    submit, compile_constraint = Engine.submit, constraints.compile_constraint

    def watched(engine: Engine, request: Request) -> Generation:
        written.append(request)
        return submit(engine, request)

    def recorded(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
        grammars.append(constraint)
        return compile_constraint(constraint, tokenizer, vocab_size)

    monkeypatch.setattr(api, "read_tuning", lambda directory, model: None)  # somebody may have tuned it here
    monkeypatch.setattr(online, "quick_pass_costs", made_up)
    monkeypatch.setattr(constraints, "compile_constraint", recorded)
    monkeypatch.setattr(Engine, "submit", watched)
    with running(ServeSettings(port=0, slots=3, threads=1)) as server:
        before = list(timed)
        # Without the compiled kernels there is no policy, and nothing to time.
        assert before in ([], [(1, 1), (2, 1), (4, 1)] * 2)  # greedy and sampled
        assert len(written) == 1 and metric(server, "headstart_tokens_total") == 0
        assert len(grammars) == 1
        policy = server.service.model.engine().policy  # learns from what all engines of the model observe
        if policy is not None:  # nothing of an output that nobody requested
            fresh = AcceptanceCounts(server.service.model.config.heads).table()
            assert isinstance(policy.calibration, OnlineCalibration)
            assert all(counts.table() == fresh for counts in policy.calibration.observations.counts.values())
        asked = {"prompt": "x", "max_tokens": 4, "n": 3}
        assert HTTP.post(f"{server.url}/v1/completions", json=asked).status_code == 200
        assert timed == before


def test_a_server_with_a_failing_engine_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_service(boxed_model(), ServeSettings(slots=1))


def test_a_short_context_skips_the_warm_up() -> None:
    with running(ServeSettings(port=0, slots=1, context=3)) as server:
        assert HTTP.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
