"""Measure decoding: against peers, against the memory bandwidth, and several tokens per pass against one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.decode_model import model
from bench.decode_passes import bandwidth, deferred, merged, rows, window
from bench.decode_peers import peers, plain
from bench.decode_settings import QUICK, DecodeSettings
from bench.decode_sweep import sweep
from bench.report import Findings, run_parts
from headstart.formats.bundled import boxed_model
from headstart.hardware import dtype_on

PARTS: dict[str, Callable[[DecodeSettings], Findings]] = {
    "plain": plain,
    "bandwidth": bandwidth,
    "window": window,
    "merged": merged,
    "deferred": deferred,
    "sweep": sweep,
    "peers": peers,
    "rows": rows,
    "model": model,
}


def run(settings: DecodeSettings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    if "model" in settings.parts and settings.model is None:
        settings = replace(settings, model=boxed_model())
    if settings.quick:
        settings = replace(settings, **QUICK)
    settings.check()
    settings = replace(settings, dtype=dtype_on(settings.device, settings.dtype))
    chosen = {*settings.parts, *(["model"] if settings.model is not None else [])}
    return run_parts("decode", settings, {name: part for name, part in PARTS.items() if name in chosen})
