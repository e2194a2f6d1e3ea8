"""The scales that nobody has run: every case comes as far as its training, with the size that its name says and the
paper's batch (Table S13)."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from typing import Any

import pytest

from headstart.training.config import RunConfig
from studies.run import find_study
from studies.study import Scale
from studies.training import SIZES

LITTLE = {"problems": 5, "finetuning_problems": 5, "stories": 5, "tests": 5, "train_bytes": 9000}
LITTLE |= {"first": 9, "second": 9, "names": 20}
"""Data are made before training, and millions of problems take minutes."""
STUDIES = {
    "polynomial": "polynomial",
    "induction": "induction",
    "finetune": "finetune",
    "bytes": "code_models",
    "heads": "code_models",
    "scaling": "code_models",
    "curriculum": "code_models",
}
"""Study: the module from which it trains."""
TOKENS = {"polynomial": 2**18, "induction": 2**18, "finetune": 2**18, "bytes": 12 * 2**20, "scaling": 8 * 2**20}


class Reached(Exception):
    pass


@pytest.mark.parametrize("scale", ["gpu", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_case_reaches_its_training(name: str, scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    study = find_study(name)
    settings: Any = study.scales[scale]
    known = {field.name for field in fields(settings)}
    little = replace(settings, device="cpu", **{key: value for key, value in LITTLE.items() if key in known})
    reached: list[RunConfig] = []

    def train_model(config: RunConfig, *_: Any, **__: Any) -> None:
        reached.append(config)
        raise Reached

    module = importlib.import_module(f"studies.{STUDIES[name]}")
    monkeypatch.setattr(module, "train_model", train_model)
    monkeypatch.setattr(module, "stream_of", lambda *_: None)  # rows are longer than what little there is
    cases = [case for case in study.cases(settings) if case.seed == settings.first_seed]
    for case in cases:
        with pytest.raises(Reached):
            study.run(little, case, lambda **_: None)
        config, size = reached[-1], case.conditions.get("size", getattr(settings, "size", None))
        assert config.dtype == "bfloat16" and config.batch.length == settings.training.length
        assert config.optimizer.warmup_steps < config.steps == settings.training.steps
        shallow = "shallow" in f"{case.conditions.get('depth')} {case.conditions.get('kind')}"
        fewer = 0 if not shallow else int(case.conditions.get("n", 4)) - 1
        assert config.model.dim == SIZES[str(size)].dim
        assert config.model.layers == SIZES[str(size)].layers - fewer
        assert config.optimizer.clip == config.model.heads or "never clipped" in case.name.replace("_", " ")
        if scale == "paper" and name in TOKENS:
            assert config.tokens_per_step == TOKENS[name]
    assert len(reached) == len(cases)
    if name != "curriculum":  # which compares schedules of one model
        # A next-token model has as many blocks as each model with several heads has on the path to head 1.
        depths = [(c.model.heads > 1, (c.model.dim, c.model.next_token_layers)) for c in reached]
        assert {depth for several, depth in depths if several} <= {depth for several, depth in depths if not several}
