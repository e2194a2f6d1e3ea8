"""Write the report of `headstart demo`: one self-contained HTML file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from headstart.fileio import write_text
from headstart.reports import html
from headstart.reports.runs import running_mean

# arXiv 2404.19737, Table S3, column n = 8: heads used -> (speed-up, bytes per pass). 7B parameters, 314B bytes.
PAPER_BYTES = {1: (1.00, 1.00), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}

BOXED = "model in the box"
Settings = dict[str, "str | int | float"]


@dataclass(frozen=True)
class DecodingRow:
    """One way of decoding the same prompts."""

    heads: int
    """Heads used; 1 is plain decoding."""
    tokens_per_second: float
    tokens_per_pass: float
    """Committed tokens per pass of the trunk: 1 + accepted drafts."""
    speedup: float
    """Tokens per second relative to plain exact decoding."""
    identical: bool
    """True if every output token equals plain decoding."""
    acceptance: list[float]
    """Share of passes in which head k's draft was accepted, at k - 2, for k = 2 .. heads."""


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    prompt: str
    pieces: list[tuple[str, int]]
    """Output in order, each piece with the head that proposed it: 1, or k >= 2 for an accepted draft of head k."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The output of one model. A part that is empty or None is left out of the report."""

    decoding: list[DecodingRow]
    """Greedy decoding, by heads used; the first row is plain exact decoding (heads = 1)."""
    fastest_plain: DecodingRow | None = None
    """Plain decoding with exact=False, equal at least up to rounding."""
    sampled: list[DecodingRow] = field(default_factory=list)
    """Rows like `decoding`, at temperature 0.8."""
    samples: list[Sample] = field(default_factory=list)
    repeated: dict[str, float] = field(default_factory=dict)
    """Share of 8-grams that occurred before in the same text, for "greedy" and "sampled"."""


@dataclass(frozen=True, kw_only=True)
class DemoReport(Decoded):
    """The demo's measurements: the output of the model just trained, and that of the model in the box."""

    machine: Settings
    """CPU, cores, threads, versions, by name."""
    settings: Settings
    """Parameters, layers, optimiser, steps, "bytes seen", "minutes", "seed" ..., by name."""
    training: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl: step, tokens, "loss/headK" (nats per byte), tokens_per_second."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Lines with step, "validation/bits_per_byte/headK" and "validation/top1/headK" (share)."""
    boxed: Decoded | None = None
    """Output of the model in the box for the same prompts; None if that model is not there."""


def write_report(path: Path, report: DemoReport) -> None:
    """Write `report` to `path` as HTML, atomically. Raises UsageError without matplotlib or if it cannot write."""
    if not report.decoding:
        raise ValueError("DemoReport.decoding is empty; its first row is plain decoding")
    html.need_matplotlib("the demo's report")
    write_text(path, _page(report))


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"


def _series(records: list[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Return steps and scaled values of the lines that have a finite number under `key`."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
    return [float(step) for step, _ in found], [value * scale for _, value in found]


def _logged_heads(records: list[dict[str, Any]], prefix: str) -> list[int]:
    return sorted({int(m[1]) for r in records for key in r if (m := re.fullmatch(re.escape(prefix) + r"(\d+)", key))})


def _spread(values: list[float], gap: float) -> list[float]:
    """Move values apart, upwards, so that labels at them do not overlap."""
    out = list(values)
    for below, above in pairwise(sorted(range(len(values)), key=values.__getitem__)):
        out[above] = max(out[above], out[below] + gap)
    return out


def _loss_plot(report: DemoReport) -> str:
    heads = _logged_heads(report.training, "loss/head")
    curves = {k: c for k in heads if (c := _series(report.training, f"loss/head{k}", 1 / math.log(2)))[0]}
    if not curves:
        return ""
    plot = html.axes("training step", "loss (bits per byte)")
    smooth = {k: running_mean(steps, values, max(3.0, len(values) / 50)) for k, (steps, values) in curves.items()}
    for k, (steps, values) in curves.items():
        html.draw_curve(plot, steps, smooth[k], values, colour=html.head_colour(k))
        points = _series(report.validation, f"validation/bits_per_byte/head{k}")
        plot.plot(*points, "o", color=html.STAND_IN[html.head_colour(k)], markersize=4)
    # The first steps fall from 8 bits; shown in full they would flatten the part in which heads differ.
    top = 1.03 * max(max(s[len(s) // 10 :]) for s in smooth.values())
    plot.set_ylim(low := 0.93 * min(min(s) for s in smooth.values()), top)
    for k, y in zip(curves, _spread([smooth[k][-1] for k in curves], (top - low) * 0.052)):
        label, colour = f"head {k}" if k == min(curves) else str(k), html.STAND_IN[html.head_colour(k)]
        plot.annotate(
            label, (curves[k][0][-1], y), (6, -4), textcoords="offset points", color=colour, annotation_clip=False
        )
    caption = "Line: training, smoothed; faint: as logged." + (" Dots: validation." if report.validation else "")
    if max(values[0] for _, values in curves.values()) > top:
        caption += " The first steps lie above the frame."
    if speeds := _series(report.training, "tokens_per_second")[1]:
        caption += f" Training ran at {html.number(median(speeds))} bytes per second (median)."
    return html.figure(plot, "loss", "Loss of each head", caption)


def _acceptance_plot(report: DemoReport) -> str:
    groups = [("series1", "greedy", report.decoding), ("series3", "temperature 0.8", report.sampled)]
    if report.boxed:
        groups += [("series4", f"{BOXED}, greedy", report.boxed.decoding)]
    best = [(name, label, max(rows, key=lambda row: row.heads)) for name, label, rows in groups if rows]
    rows = [(name, label, row.acceptance) for name, label, row in best if row.acceptance]
    if not rows:
        return ""
    plot = html.axes("head", "passes in which its draft was accepted (%)")
    width = 0.84 / len(rows)
    for i, (name, label, shares) in enumerate(rows):
        x = [k + 2 + (i - (len(rows) - 1) / 2) * width for k in range(len(shares))]
        bars = plot.bar(x, [100 * s for s in shares], width * 0.94, color=html.STAND_IN[name], label=label)
        plot.bar_label(bars, [f"{100 * s:.{int(0 < s < 0.0995)}f}" for s in shares], padding=2, fontsize=9.5)
    plot.set_xticks(range(2, 2 + max(len(shares) for _, _, shares in rows)))
    plot.legend()
    caption = "A draft is accepted only with all before it. Tokens per pass: 1 + the sum of the bars, as shares."
    return html.figure(plot, "acceptance", "Drafts accepted, by head", caption)


def _paper_plot(report: DemoReport, name: str, title: str, caption: str) -> str:
    column = ("speedup", "tokens_per_pass").index(name)
    ours = sorted((row.heads, float(getattr(row, name))) for row in report.decoding)
    boxed = sorted((row.heads, float(getattr(row, name))) for row in (report.boxed.decoding if report.boxed else []))
    paper = [(heads, values[column]) for heads, values in PAPER_BYTES.items()]
    plot = html.axes("heads used", {"speedup": "times plain decoding"}.get(name, "tokens (bytes) per pass"))
    series = [(paper, html.STAND_IN["series2"], "s--", "paper: 7B parameters, 314B bytes", (0, 8))]
    if boxed:
        series.append((boxed, html.STAND_IN["series4"], "^-", BOXED, (0, 7)))
    series.append((ours, html.STAND_IN["series1"], "o-", "just trained", (0, -14)))
    for points, colour, style, label, offset in series:
        plot.plot(*zip(*points), style, color=colour, markersize=6, label=label)
        for point in points[1:]:  # plain decoding is 1.00 by definition, in both
            plot.annotate(f"{point[1]:.2f}", point, offset, textcoords="offset points", ha="center", color=colour)
    plot.set_xticks(sorted({heads for heads, _ in ours + boxed + paper}))
    plot.set_ylim(0, max(value for _, value in ours + boxed + paper) * 1.12)
    plot.legend(loc="upper left")
    return html.figure(plot, name, title, caption)


def _plots(report: DemoReport) -> str:
    source = "Paper: arXiv 2404.19737, Table S3, n = 8."
    with html.figure_style():
        figures = _loss_plot(report) + _acceptance_plot(report)
        figures += _paper_plot(report, "tokens_per_pass", "Tokens per pass", f"Bytes, greedy. {source}")
        figures += _paper_plot(report, "speedup", "Speed-up", f"Over exact plain decoding, greedy. {source}")
    return html.section("Plots", html.grid(figures) + _validation_table(report))


def _decoding_table(caption: str, rows: list[DecodingRow], fastest: DecodingRow | None) -> str:
    head = ["decoding", "tokens per second", "tokens per pass", "speed-up vs exact plain", "speed-up vs fastest plain"]
    lines = []
    for row in [*rows[:1], *([fastest] if fastest else []), *rows[1:]]:
        name, same = "plain" if row.heads == 1 else _heads(row.heads), '<strong class="alarm">no</strong>'
        if row is fastest:  # it is not meant to be exact, so a difference is no fault
            name, same = "fastest plain", "up to rounding"
        line = [name, html.number(row.tokens_per_second), f"{row.tokens_per_pass:.2f}", f"{row.speedup:.2f}×"]
        if fastest:
            line.append(f"{row.tokens_per_second / fastest.tokens_per_second:.2f}×")
        lines.append([*line, "yes" if row.identical else same])
    note = "Fastest plain (exact=False) may round differently; all others give the same bits for every number of heads."
    note = f'<p class="note">{note}</p>'
    return html.table(caption, [*head[: 5 if fastest else 4], "output identical"], lines) + (note if fastest else "")


def _validation_table(report: DemoReport) -> str:
    if not report.validation:
        return ""
    last, rows = report.validation[-1], []
    for k in _logged_heads([last], "validation/bits_per_byte/head"):
        top1 = last.get(f"validation/top1/head{k}", math.nan)
        rows.append([f"head {k}", f"{last[f'validation/bits_per_byte/head{k}']:.3f}", f"{top1:.1%}"])
    return html.table(f"Validation at step {last['step']:,}", ["head", "bits per byte", "top-1 right"], rows)


def _summary(report: DemoReport) -> str:
    greedy, fastest = report.decoding, report.fastest_plain
    both = [("greedy", greedy), ("temperature 0.8", report.sampled)]
    if report.boxed:
        both += [(f"{BOXED}, greedy", report.boxed.decoding), (f"{BOXED}, temperature 0.8", report.boxed.sampled)]
    wrong = [f"{_heads(row.heads)} ({how})" for how, rows in both for row in rows if not row.identical]
    alarm = (
        f'<p class="alarm" role="alert"><strong>Output not identical:</strong> {", ".join(wrong)} differed from plain '
        "decoding. That must not happen; do not rely on the speeds below.</p>"
    )
    most, best = max(greedy, key=lambda row: row.tokens_per_pass), max(greedy, key=lambda row: row.speedup)
    words = [
        "This demo trained a small language model on bytes, with one head per byte ahead, and let it write text "
        "several bytes per pass: heads 2 and up draft, head 1 checks, and only right drafts stay.",
        f"All outputs identical to plain decoding: <b>{'no' if wrong else 'yes'}</b>.",
        f"The most was <b>{most.tokens_per_pass:.2f} tokens (bytes) per pass</b>, with {_heads(most.heads)}.",
    ]
    if best.heads > 1 and best.speedup > 1:
        ratio = best.tokens_per_second / (fastest or best).tokens_per_second
        against = f", {'and' if ratio > 1 else 'but only'} {ratio:.2f} times as fast as the fastest plain path"
        words.append(
            f"The fastest, {_heads(best.heads)}, decoded <b>{html.number(best.tokens_per_second)} tokens per second, "
            f"{best.speedup:.2f} times as fast</b> as plain exact decoding{against if fastest else ''}."
        )
    else:
        words.append("On this machine, more heads did not decode faster than plain exact decoding.")
    if report.sampled:
        row = max(report.sampled, key=lambda row: row.speedup)
        how = f"{row.speedup:.2f} times as fast, with {_heads(row.heads)} and {row.tokens_per_pass:.2f} tokens per pass"
        words.append(f"Sampled at temperature 0.8, the best was {how}.")
    if report.boxed:
        row = max(report.boxed.decoding, key=lambda row: row.speedup)
        words.append(
            f"The {BOXED}, trained longer, takes the same prompts {row.speedup:.2f} times as fast, with "
            f"<b>{row.tokens_per_pass:.2f} bytes per pass</b>."
        )
    return html.section("Summary", f"{alarm if wrong else ''}<p>{' '.join(words)}</p>")


def _samples(report: DemoReport) -> str:
    groups = [
        ("Model just trained", report.samples),
        (BOXED.capitalize(), report.boxed.samples if report.boxed else []),
    ]
    if not any(group for _, group in groups):
        return ""
    used = sorted({head for _, group in groups for sample in group for _, head in sample.pieces} | {1})
    legend, samples = "".join(f'<span class="{html.head_colour(k)}">head {k}</span>' for k in used), ""
    for name, group in groups:
        samples += f"<h3>{name}</h3>" if group and report.boxed else ""
        for sample in group:
            pieces = "".join(
                f'<span class="{html.head_colour(head)}">{html.escaped(text)}</span>' for text, head in sample.pieces
            )
            # A div, not a pre: HTML drops the first line break of a pre.
            samples += f'<div class="sample"><span class="prompt">{html.escaped(sample.prompt)}</span>{pieces}</div>'
    legend = f'<p class="legend"><span class="prompt">prompt</span>{legend}</p>'
    words = "Each byte has the colour of the head that proposed it (head 1: none). The stronger, the further ahead."
    return html.section("What it wrote", f"<p>{words}</p>{legend}{samples}")


def _honesty(report: DemoReport) -> str:
    minutes, seen = report.settings.get("minutes"), report.settings.get("bytes seen")
    trained = "for minutes" if minutes is None else f"for {html.number(minutes)} minutes"
    trained += " on a few million bytes" if seen is None else f" on {html.number(seen)} bytes"
    row = max(report.decoding, key=lambda row: row.heads)
    papers, measured = PAPER_BYTES.get(row.heads, (1.0, 1.0))[1], ""
    if papers > row.tokens_per_pass:
        ours = f"{row.tokens_per_pass:.2f} bytes per pass with {_heads(row.heads)}"
        measured = f" So few drafts are accepted here: {ours}, where the paper has {papers:.2f}."
    return html.section(
        "How to read this",
        f"<p>This model was trained {trained}; the paper's has 7B parameters and saw 314 billion bytes.{measured} Nor "
        "do more heads make a model this small better: in the paper (section 3.1) they help large models, not small "
        "ones. What this demo shows at any size is whether the output stays the same, and what each pass yields.</p>",
    )


def _page(report: DemoReport) -> str:
    css = ""
    for k in range(2, 9):  # the tint grows with the head: the order shows without telling colours apart
        tint = f"color-mix(in srgb,var(--h{k}) {8 + 6 * k}%,var(--page))"
        css += f".h{k}{{background:{tint};box-shadow:inset 0 -2px var(--h{k})}}"
    tables = ""
    for name, decoded in (("Model just trained", report), (BOXED.capitalize(), report.boxed)):
        if decoded is None:
            continue
        loops = {how: f"; {share:.0%} of the 8-grams repeat themselves" for how, share in decoded.repeated.items()}
        tables += _decoding_table(f"{name}, greedy{loops.get('greedy', '')}", decoded.decoding, decoded.fastest_plain)
        if decoded.sampled:
            tables += _decoding_table(
                f"{name}, sampled at temperature 0.8{loops.get('sampled', '')}", decoded.sampled, None
            )
    facts = ""
    for caption, values in (("Settings", report.settings), ("Machine", report.machine)):
        # A seed is typed in again as it is shown, so it gets no thousands separators.
        rows = [
            [html.escaped(key), html.escaped(str(value)) if key == "seed" else html.number(value)]
            for key, value in values.items()
        ]
        facts += html.table(caption, ["", ""], rows)
    facts = f'<div class="grid facts">{facts}</div>'
    seed = f" with seed {html.escaped(str(report.settings['seed']))}" if "seed" in report.settings else ""
    reproduce = (
        f"<p><code>make demo</code>{seed}. The same seed, steps and threads on the same machine give the same losses "
        "and text; the speeds vary with what else the machine does.</p>"
    )
    body = (
        f"<h1>Headstart demo</h1>{_summary(report)}{html.section('Decoding', tables)}{_plots(report)}{_samples(report)}"
        f"{_honesty(report)}{html.section('Settings and machine', facts)}"
        f"{html.section('Reproduce', reproduce)}"
    )
    return html.document("Headstart demo", body, css)
