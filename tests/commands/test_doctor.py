from __future__ import annotations

import json

import pytest
import torch

from headstart import hardware
from headstart.commands import doctor_checks
from headstart.commands.doctor import format_diagnosis
from headstart.commands.doctor_checks import Sizes, diagnose
from headstart.decoding.kernels.pack import multiplies_blocks
from headstart.decoding.policy.timing import Decoded
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.models import random_model

SMALL = Sizes(product=64, stream_mebibytes=1, decoder=ModelConfig(dim=32, layers=2, attention_heads=2), passes=2)
MACHINE = ["processor", "kernels", "matrix products", "windows", "threads", "bandwidth"]
MODEL = ["transformers", "weights", "speculation, greedy", "speculation, temperature 0.8"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads next to other programs are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("doctor") / "model"
    config = ModelConfig(dim=32, layers=5, attention_heads=2, heads=4, context=128)
    save_model(Transformer(config), path, dtype=torch.bfloat16)
    return path


def of(diagnosis, name):
    return next(finding for finding in diagnosis["findings"] if finding["name"] == name)


def test_the_machine_alone():
    threads = torch.get_num_threads()
    diagnosis = diagnose(sizes=SMALL)
    assert [f["name"] for f in diagnosis["findings"] if f["name"] != "gpu"] == MACHINE
    assert all(f["status"] in ("ok", "warn", "fail") and "\n" not in f["sentence"] for f in diagnosis["findings"])
    assert diagnosis["machine"]["torch"] == torch.__version__ and diagnosis["model"] is None
    assert of(diagnosis, "threads")["values"]["use"] >= 1
    assert torch.get_num_threads() == threads  # left as it was
    text = format_diagnosis(diagnosis)
    assert all(name in text for name in MACHINE)
    json.dumps(diagnosis)


def test_a_model_decodes_with_all_heads_as_with_one(model_directory):
    diagnosis = diagnose(model_directory, sizes=SMALL)
    assert [f["name"] for f in diagnosis["findings"] if f["name"] != "gpu"] == MACHINE + MODEL
    for name in MODEL[2:]:
        finding = of(diagnosis, name)
        assert finding["status"] == "ok" and finding["values"]["identical"] is True
        assert len(finding["values"]["acceptance"]) == 3 and finding["values"]["tokens_per_pass"] >= 1
    json.dumps(diagnosis)


def test_transformers_gives_the_same_next_tokens(model_directory):
    pytest.importorskip("transformers")
    finding = of(diagnose(model_directory, sizes=SMALL), "transformers")
    assert finding["status"] == "ok" and finding["values"]["compared"]
    assert finding["values"]["disagreeing_positions"] == 0 and finding["values"]["largest_logit_difference"] < 1e-4


def test_a_difference_is_a_failure_that_says_where(model_directory, monkeypatch):
    calls = []

    def lossy(model, requests, batch=1, exact=True) -> Decoded:
        decoded = real(model, requests, batch, exact)
        calls.append(requests[0].heads)
        if requests[0].heads == 4:
            decoded.generations[1].tokens[2] += 1
        return decoded

    real = doctor_checks.timing.decode
    monkeypatch.setattr(doctor_checks.timing, "decode", lossy)
    diagnosis = diagnose(model_directory, sizes=SMALL)
    assert diagnosis["verdict"] == "fail" and 4 in calls
    finding = of(diagnosis, "speculation, greedy")
    assert finding["status"] == "fail" and finding["values"]["first_difference"] == (1, 2)
    assert "fail" in format_diagnosis(diagnosis)


def test_a_missing_model_is_reported_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "matmul_peak", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(UsageError, match="no such directory"):
        diagnose(tmp_path / "gone")


def test_large_models_are_compared_on_a_few_tokens_and_not_where_memory_is_short(model_directory, monkeypatch):
    pytest.importorskip("transformers")
    config = doctor_checks.load_config(model_directory)
    finding = doctor_checks.compare_with_transformers(model_directory, config, (1, 2, 3, 4, 5, 6), most_parameters=10)
    assert finding.status == "ok" and "at 4 of 4 positions" in finding.sentence
    monkeypatch.setattr(hardware, "available_memory", lambda: 1000)
    finding = doctor_checks.compare_with_transformers(model_directory, config, (1, 2, 3))
    assert finding.status == "warn" and "are free" in finding.sentence and not finding.values["compared"]


def test_blocks_of_a_gguf_file_are_decoded_as_they_are(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    from tests.formats.test_gguf_blocks import write_quantized
    from tests.gguf_models import CONFIGS

    path = write_quantized(tmp_path / "m.gguf", "llama", random_model(CONFIGS["llama"]))
    finding = of(diagnose(path, sizes=SMALL), "weights")
    if multiplies_blocks("cpu"):
        assert finding["status"] == "ok" and "in blocks, as the file stores them" in finding["sentence"]
        assert finding["values"]["form"] == "blocks" and 0.9 < finding["values"]["bytes"] / path.stat().st_size < 1.3
    dense = write_quantized(tmp_path / "n.gguf", "llama", random_model(CONFIGS["llama"]), keep=("token_embd",))
    finding = of(diagnose(dense, sizes=SMALL), "weights")
    assert finding["status"] == "warn" and "dequantized" in finding["sentence"]
