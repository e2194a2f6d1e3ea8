"""The pool of threads of the compiled kernels: each iteration once, the same bits, whoever calls and whoever waits."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.blocks import Quantize, in_blocks
from headstart.decoding.kernels.cpu.stalls import StallReport
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.sampling import position_noise

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
FORKING = """
import ctypes, os, threading, torch
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.cpu_backend import CompiledLinear

torch.set_num_threads(1)
linear, x = CompiledLinear(torch.randn(512, 640), None), torch.randn(8, 640)
want = linear(x)
torch.set_num_threads(3)
assert torch.equal(linear(x), want)

# Fork while another thread is in the middle of a loop: it does not exist in the child.
begun, end = threading.Event(), threading.Event()
wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)(lambda *_: (begun.set(), end.wait()))
busy = threading.Thread(target=lambda: cpu.thread_pool().parallel(wait, None, 2, 2))
busy.start()
begun.wait()
if (child := os.fork()) == 0:
    threads = set()
    note = type(wait)(lambda *_: (threads.add(threading.get_native_id()), end.wait(0.05)))
    cpu.thread_pool().parallel(note, None, 16, 2)
    os._exit(0 if torch.equal(linear(x), want) and len(threads) == 2 else 3)
end.set()
busy.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(linear(x), want)
"""


@pytest.fixture(autouse=True, scope="module")
def pool() -> ctypes.CDLL:
    pool = cpu.thread_pool()
    if pool is None:
        pytest.skip("no compiled kernels here: no C compiler")
    return pool


def run(pool: ctypes.CDLL, count: int, threads: int, body: Callable[[range], None]) -> None:
    pool.parallel(BODY(lambda _, begin, end: body(range(begin, end))), None, count, threads)


def at_threads(threads: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.set_num_threads(threads)
    try:
        return compute()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 9, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 33, 1000])
def test_each_iteration_runs_once(pool: ctypes.CDLL, count: int, threads: int) -> None:
    seen: Counter[int] = Counter()
    run(pool, count, threads, seen.update)  # a piece holds Python's lock for the whole of `update`
    assert seen == Counter(range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    if cpu.kernels(dtype) is None:
        pytest.skip(f"no compiled kernels for {dtype} here: another processor")
    quantizations: tuple[Quantize | None, ...] = (None, "q4", "q8") if dtype == torch.float32 else (None,)
    for quantize in quantizations:
        linear = CompiledLinear(in_blocks(torch.randn(1000, 640).to(dtype), quantize), None)
        for rows in (1, 2, 9):
            x = torch.randn(rows, 640).to(dtype)
            want = linear(x)
            for threads in (2, 3, 4):
                for _ in range(20):
                    assert torch.equal(at_threads(threads, partial(linear, x)), want)


def test_noise_has_the_same_bits_with_any_number_of_threads() -> None:
    seeds, positions = torch.arange(7), torch.arange(7) * 3
    want = position_noise(seeds, positions, 5000)
    for threads in (2, 3, 4):
        assert torch.equal(at_threads(threads, partial(position_noise, seeds, positions, 5000)), want)


def test_two_callers_at_once_compute_what_each_computes_alone(pool: ctypes.CDLL) -> None:
    """The second computes its loop itself, without waiting for the first."""
    first_runs, second_done = threading.Event(), threading.Event()

    def first(pieces: range) -> None:
        first_runs.set()
        assert second_done.wait(30)

    caller = threading.Thread(target=lambda: run(pool, 4, 2, first))
    caller.start()
    assert first_runs.wait(30)
    ranges: list[range] = []
    run(pool, 100, 2, ranges.append)
    second_done.set()
    caller.join()
    assert ranges == [range(100)]


def test_kernels_called_from_several_threads() -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor")
    linear, wrong = CompiledLinear(torch.randn(512, 640), None), []
    inputs = [torch.randn(3, 640) for _ in range(3)]
    wants = [linear(x) for x in inputs]

    def repeat(x: torch.Tensor, want: torch.Tensor) -> None:
        torch.set_num_threads(2)
        wrong.extend(i for i in range(200) if not torch.equal(linear(x), want))

    callers = [threading.Thread(target=repeat, args=pair) for pair in zip(inputs, wants)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(1)
    assert not wrong


def test_a_loop_inside_a_loop(pool: ctypes.CDLL) -> None:
    seen: Counter[int] = Counter()
    run(pool, 8, 3, lambda outer: run(pool, 5, 3, lambda inner: seen.update(list(inner) * len(outer))))
    assert seen == {i: 8 for i in range(5)}


def test_a_thread_that_is_not_scheduled_loses_its_part_for_a_while(pool: ctypes.CDLL) -> None:
    """A piece that takes long on another thread is what a descheduled thread looks like."""

    def threads_of_a_loop(delay: float) -> set[int]:
        mine, seen = threading.get_ident(), set()

        def piece(_: range) -> None:
            seen.add(threading.get_ident())
            time.sleep(0.0005 if threading.get_ident() == mine else delay)

        run(pool, 64, 2, piece)
        return seen

    def wait_for(threads: int) -> None:
        ends = time.monotonic() + 20
        while len(threads_of_a_loop(0.0005)) != threads:
            assert time.monotonic() < ends, f"the pool never used {threads} threads"

    wait_for(2)
    stalls = pool.stall_count()
    for _ in range(20):
        if pool.stall_count() == stalls:
            threads_of_a_loop(0.15)
    assert pool.stall_count() > stalls and pool.thread_limit() == 1
    assert threads_of_a_loop(0.15) == {threading.get_ident()}
    wait_for(2)  # it tries again, and keeps the second thread if that one is in time


def test_a_forked_process_starts_threads_of_its_own(forks, tmp_path) -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor")
    assert forks.run(tmp_path / "said.txt", tmp_path, program=FORKING) == (0, "")


@pytest.mark.parametrize(("limited", "lines"), [(0.0, 0), (0.5, 0), (1.0, 1)])
def test_a_lasting_limit_is_reported_once(limited: float, lines: int) -> None:
    now = [0.0]
    report = StallReport(lambda: int(now[0] % 1 < limited), lambda: now[0])
    said = []
    for _ in range(2000):
        now[0] += 0.01
        said.append(report.after_pass(threads=2))
    assert len([line for line in said if line]) == lines


def test_a_limit_above_the_threads_of_a_pass_is_not_reported() -> None:
    now = iter(range(1000))
    report = StallReport(lambda: 3, lambda: float(next(now)))
    assert not any(report.after_pass(threads=2) for _ in range(100))
