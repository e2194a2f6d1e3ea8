from __future__ import annotations

import os

import pytest
import torch

from headstart import hardware
from headstart.hardware import data_sheet, matmul_peak, peak_flops, resident_memory


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


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fma avx2", "float32"), ("avx2 avx512f avx512_vnni", "float32"), ("avx512f avx512_bf16", "bfloat16"),
     ("avx512f amx_bf16", "bfloat16"), ("asimd i8mm bf16", "bfloat16"), ("", "float32")],
)  # fmt: skip
def test_bfloat16_is_fast_where_the_processor_has_instructions_for_it(flags, dtype, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "processor", lambda: ("a processor", set(flags.split())))
    assert hardware.dtype_on("cpu") == dtype
    assert hardware.dtype_on("mps") == "float32"
    assert hardware.dtype_on("cpu", "bfloat16") == "bfloat16" and hardware.dtype_on("cpu", "float32") == "float32"


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_says_itself_whether_it_has_bfloat16(supported, dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert hardware.dtype_on("cuda:1") == dtype


def test_a_dtype_in_software_is_timed_on_small_products(monkeypatch) -> None:
    sizes = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: sizes.append(len(a)) or real(a, b))
    matmul_peak.cache_clear()
    assert matmul_peak(1, "float32", seconds=1e-9) > 0  # nothing is fast enough for that
    assert max(sizes) == 128
    matmul_peak.cache_clear()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell")
def test_resident_memory_grows_with_what_is_written_to() -> None:
    before = resident_memory()
    block = torch.ones(2**24)
    after = resident_memory()
    assert before is not None and after is not None
    assert after - before > 0.9 * block.nbytes


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="a kernel without huge pages")
def test_huge_pages_are_asked_for_where_there_is_room_for_one() -> None:
    def advised(address: int) -> bool:
        inside = False
        with open("/proc/self/smaps") as lines:
            for line in lines:
                first = line.split()[0]
                if not first.endswith(":"):
                    begin, end = (int(part, 16) for part in first.split("-"))
                    inside = begin <= address < end
                elif inside and first == "VmFlags:":
                    return "hg" in line.split()
        raise AssertionError("no such mapping")

    x = torch.empty(64 << 20, dtype=torch.uint8)  # a mapping of its own, whatever was freed before
    middle = x.data_ptr() + x.nbytes // 2
    assert not advised(middle)
    assert hardware.huge_pages(x) is x and advised(middle)
    assert hardware.huge_pages(torch.ones(4)).tolist() == [1.0] * 4  # less than a page: nothing to ask for
