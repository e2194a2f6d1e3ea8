"""Other loss backends against our own, where they are installed; and what is said where they are not."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.objective.backends import LossConfig
from headstart.objective.cross_entropy import CrossEntropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V, D = 301, 32


@pytest.fixture(params=["torch", "liger", "cce"])
def backend(request: pytest.FixtureRequest) -> LossConfig:
    """Those that can run here."""
    if request.param == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy is in torch 2.13 and newer")
    if request.param == "liger":
        pytest.importorskip("liger_kernel", reason="extra kernels is not installed")
        if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("liger needs a GPU, or TRITON_INTERPRET=1 from the start")
    if request.param == "cce":
        pytest.importorskip("cut_cross_entropy", reason="extra kernels is not installed")
    config = LossConfig(backend=request.param)
    config.require(DEVICE)
    return config


def problem(dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 40, D), (V, D)))
    targets = torch.randint(0, V, (3, 40), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return *(v.to(DEVICE, dtype).requires_grad_() for v in (x, weight)), targets.to(DEVICE)  # type: ignore[return-value]


def gradients(out: CrossEntropy, *variables: Tensor) -> tuple[Tensor, ...]:
    """Scale the loss by a quarter, so that a backend that ignores its scale fails."""
    return torch.autograd.grad(out.loss * 0.25, variables)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("dtype", "loss", "gradient"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-3, 2e-2)])
def test_they_agree_with_ours(backend: LossConfig, dtype: torch.dtype, loss: float, gradient: float) -> None:
    if backend.backend == "cce" and DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("the kernels of cut_cross_entropy are for 16 bits")
    x, weight, targets = problem(dtype)
    ours, theirs = LossConfig().function()(x, weight, targets), backend.function()(x, weight, targets)
    assert theirs.loss.dtype == torch.float32 and theirs.correct is None and not theirs.total.requires_grad
    assert relative(theirs.loss, ours.loss) < loss and torch.equal(theirs.total, theirs.loss.detach())
    for mine, right in zip(gradients(theirs, x, weight), gradients(ours, x, weight)):
        assert mine.dtype == dtype and relative(mine, right) < gradient


def test_a_frozen_weight_and_nothing_to_predict(backend: LossConfig) -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x, weight, targets = problem(dtype)
    weight.requires_grad_(False)
    ours, theirs = LossConfig().function()(x, weight, targets), backend.function()(x, weight, targets)
    assert relative(gradients(theirs, x)[0], gradients(ours, x)[0]) < 2e-2
    nothing = backend.function()(x, weight, torch.full_like(targets, IGNORE))
    assert nothing.total == 0 and (gradients(nothing, x)[0] == 0).all()


def test_autocast_sets_the_products_and_keeps_the_rest() -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy is in torch 2.13 and newer")
    x, weight, targets = problem(torch.float32)
    expected = gradients(LossConfig().function()(x, weight, targets), x, weight)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = LossConfig(backend="torch").function()(x, weight, targets)
    assert out.loss.dtype == torch.float32
    for mine, right in zip(gradients(out, x, weight), expected):
        assert mine.dtype == torch.float32 and 0 < relative(mine, right) < 2e-2


@pytest.mark.parametrize(("name", "package"), [("liger", "liger_kernel"), ("cce", "cut_cross_entropy")])
def test_an_absent_backend_names_its_extra(name, package, monkeypatch) -> None:
    monkeypatch.setattr("headstart.objective.backends.find_spec", lambda name: None)
    said = rf"^loss.backend {name} needs {package}, which is not installed; pip install 'headstart\[kernels\]', [^\n]*$"
    with pytest.raises(UsageError, match=said):
        LossConfig(backend=name).require(torch.device("cuda"))


def test_an_older_torch_is_told(monkeypatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(UsageError, match=r"^loss.backend torch needs torch 2.13 or newer, this is [^\n]*$"):
        LossConfig(backend="torch").require(torch.device("cpu"))


def test_liger_without_a_gpu_is_told(monkeypatch) -> None:
    monkeypatch.setattr("headstart.objective.backends.find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"^loss.backend liger needs a GPU, and the device is cpu; [^\n]*$"):
        LossConfig(backend="liger").require(torch.device("cpu"))
    LossConfig(backend="liger").require(torch.device("cuda"))


@pytest.mark.parametrize(
    "settings",
    [{"z_loss": -1e-4}, {"z_loss": float("nan")}, {"z_loss": float("inf")}, {"backend": "apple"},
     {"z_loss": 1e-4, "backend": "liger"}],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings) -> None:
    with pytest.raises(UsageError, match=f"^loss.{next(iter(settings))} [^\n]*$"):
        LossConfig(**settings)
