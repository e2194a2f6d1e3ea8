from __future__ import annotations

import os

import pytest
import torch

from headstart.machine import data_sheet, matmul_peak, peak_flops, resident_memory


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", (989, 67)),
        ("NVIDIA H100 PCIe", (756, 51)),
        ("NVIDIA A100-SXM4-80GB", (312, 19.5)),
        ("NVIDIA L40S", (362, 91.6)),
        ("NVIDIA L4", (121, 30)),
        ("NVIDIA L40", None),  # no L4
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_found_by_whole_words(name, teraflops) -> None:
    assert data_sheet(name) == teraflops


def test_the_peak_of_a_cpu_is_measured_once_and_leaves_no_trace() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    matmul_peak.cache_clear()
    peak, source = peak_flops("float32", threads=1)
    assert source == "measured" and peak > 1e8
    assert peak_flops("float32", threads=1) == (peak, source)
    assert matmul_peak.cache_info().misses == 1
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell")
def test_resident_memory_grows_with_what_is_written_to() -> None:
    before = resident_memory()
    block = torch.ones(2**24)
    after = resident_memory()
    assert before is not None and after is not None
    assert after - before > 0.9 * block.nbytes
