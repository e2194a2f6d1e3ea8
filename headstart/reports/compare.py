"""Write the page of `headstart compare`: training runs over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headstart.console import duration, format_table
from headstart.errors import UsageError
from headstart.fileio import write_text
from headstart.reports import html
from headstart.reports.runs import Run, common_heads, differences, fade, read_runs, summary

STYLES = ("-", "--", ":")
"""Styles of lines: if there are more runs than colours, they begin again with the next style."""

ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("steps", html.number),
    "tokens": ("tokens", html.number),
    "training_seconds": ("time in steps", duration),
    "loss/head1": ("loss of head 1 (nats), smoothed", "{:.4f}".format),
    "validation/bits_per_byte/head1": ("validation bits per byte, head 1", "{:.4f}".format),
    "validation/top1/head1": ("validation top-1, head 1", "{:.1%}".format),
    "expected_tokens_per_pass": ("expected tokens per pass, smoothed", "{:.3f}".format),
    "sample/tokens_per_pass": ("tokens per pass of the sample", "{:.2f}".format),
    "tokens_per_second": ("tokens per second (median)", html.number),
    "mfu": ("model FLOPs utilisation (median)", "{:.1%}".format),
    "memory_gib": ("memory (GiB, most)", "{:.2f}".format),
    "clip_rate": ("steps whose gradient was clipped", "{:.1%}".format),
    "skipped": ("steps skipped", html.number),
}
"""Final numbers: name in the summary -> title and format."""


Frame = Literal["tail", "all", "log", "zero", "logged"]
"""Range of the y axis. tail: fits all but the first tenth of a run; all; log; zero: from 0 up; logged: all, and the
curve is not smoothed."""


@dataclass(frozen=True)
class Line:
    """A curve to draw; `name` is that of metrics.jsonl."""

    run: Run
    name: str
    colour: str
    style: str = "-"
    label: str = ""


def compare(paths: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """Read the runs, write the page to `out` (None: no page), and return final numbers and differing settings.

    Raises UsageError for a folder that is no run, for no folder at all, and without matplotlib.
    """
    if not paths:
        raise UsageError("compare needs run folders: headstart compare runs/a runs/b")
    if out is not None:
        html.need_matplotlib("the page of a comparison")
    runs = read_runs(paths)
    if out is not None:
        write_text(out, _page(runs))
    changed = differences(runs)
    return {
        "runs": [{"name": run.name, "heads": run.heads, **summary(run, fade(runs))} for run in runs],
        "compared_heads": common_heads(runs),
        "smoothing_tokens": fade(runs),
        "settings": {name: dict(zip((run.name for run in runs), values)) for name, values in changed.items()},
    }


def format_comparison(result: dict[str, Any]) -> str:
    """Format the result of `compare` for a terminal."""
    names = [run["name"] for run in result["runs"]]
    text = format_table(["", *names], _cells(result["runs"]))
    if result["settings"]:
        rows = [[name, *map(_setting, values.values())] for name, values in result["settings"].items()]
        text += "\n\n" + format_table(["setting", *names], rows)
    return text


def _cells(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row for each final number that any run has."""
    rows = []
    for name, (title, form) in ROWS.items():
        values = [each[name] for each in summaries]
        if any(value is not None for value in values):
            rows.append([title, *("-" if value is None else form(value) for value in values)])
    return rows


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)


def _page(runs: list[Run]) -> str:
    alone, heads = len(runs) == 1, common_heads(runs)
    looks = [(html.SERIES[i % len(html.SERIES)], STYLES[i // len(html.SERIES) % len(STYLES)]) for i in range(len(runs))]

    def lines(name: str) -> list[Line]:
        return [Line(run, name, *look, "" if alone else run.name) for run, look in zip(runs, looks)]

    def head_lines(prefix: str) -> list[Line]:
        """Return the lines of all heads of the only run."""
        spread = 7 / max(1, len(heads) - 1)  # two heads take the two ends of the colours
        colours = [html.head_colour(1 + round((k - 1) * spread)) for k in heads]
        return [Line(runs[0], f"{prefix}{k}", colours[k - 1], "-", f"head {k}") for k in heads]

    drawing = Drawing(runs)
    with html.figure_style():
        nats, bits, losses, more = "loss (nats per token)", "validation/bits_per_byte/head", "", ""
        ways: tuple[tuple[Literal["tokens", "seconds"], str], ...] = (("tokens", "tokens"), ("seconds", "time"))
        first = "each head" if alone else "head 1"
        for by, word in ways:
            shown = head_lines("loss/head") if alone else lines("loss/head1")
            losses += drawing.curves(f"Loss of {first} over {word}", shown, nats, by=by)
        for k in [] if alone else heads[1:]:
            for by, word in ways:
                more += drawing.curves(f"Loss of head {k} over {word}", lines(f"loss/head{k}"), nats, by=by)
        losses += drawing.points(
            f"Validation, {first}", head_lines(bits) if alone else lines(f"{bits}1"), "bits per byte"
        )
        expected, measured = "expected_tokens_per_pass", "sample/tokens_per_pass"
        losses += drawing.curves("Expected tokens per pass", lines(expected), "tokens per pass", "all", dots=measured)
        course = drawing.curves("Learning rate", lines("lr"), "learning rate", "logged")
        course += drawing.curves("Gradient norm, before clipping", lines("grad_norm"), "norm", "log")
        course += drawing.curves("Clipped steps", lines("clipped"), "share of steps", "zero")
        course += drawing.curves("Speed", lines("tokens_per_second"), "tokens per second", "zero")
    if more:
        more = f"<details><summary>The other heads</summary>{html.grid(more)}</details>"
    names = [html.escaped(run.name) for run in runs]
    numbers = _cells([summary(run, drawing.fade) for run in runs])
    body = f"<h1>{', '.join(names) if len(names) < 4 else f'{len(names)} runs'}</h1>{_notes(runs, drawing.fade)}"
    body += html.section("Final numbers", html.table("", ["", *names], numbers) + _skips(runs))
    body += html.section("Loss and decoding", html.grid(losses) + more)
    body += html.section("Course of training", html.grid(course))
    body += f"{_samples(runs)}{_settings(runs, names)}"
    return html.document("Runs compared" if len(runs) > 1 else names[0], body, CSS)


class Drawing:
    """Figures of one page, with the same axes and the same smoothing."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.fade = fade(runs)
        tokens, seconds = max(run.tokens for run in runs), max(run.seconds for run in runs)
        scales = [(1e9, "billions of tokens"), (1e6, "millions of tokens"), (1e3, "thousands of tokens"), (1, "tokens")]
        times = [(3600, "hours in training steps"), (60, "minutes in training steps"), (1, "seconds in training steps")]
        self.units = {
            "tokens": next((scale, name) for scale, name in scales if tokens >= 2 * scale or scale == 1),
            "seconds": next((scale, name) for scale, name in times if seconds >= 2 * scale or scale == 1),
        }
        self.count = 0

    def curves(
        self,
        title: str,
        lines: Sequence[Line],
        ylabel: str,
        frame: Frame = "tail",
        *,
        by: Literal["tokens", "seconds"] = "tokens",
        dots: str = "",
    ) -> str:
        """Return a figure of smoothed curves over tokens or seconds, "" if no run has one.

        Values of the name `dots` of metrics.jsonl are drawn as points.
        """
        lines = [line for line in lines if line.run.curve(line.name).values]
        if not lines:
            return ""
        scale, unit = self.units[by]
        plot, smooth, measured = html.axes(unit, ylabel), [], False
        for line in lines:
            curve = line.run.curve(line.name)
            values = list(curve.values) if frame == "logged" else curve.smoothed(self.fade)
            raw = curve.values if frame in ("tail", "log") else ()
            x = [value / scale for value in getattr(curve, by)]
            html.draw_curve(plot, x, values, raw, colour=line.colour, style=line.style)
            if dots and (points := line.run.curve(dots)).values:
                x = [value / scale for value in getattr(points, by)]
                plot.plot(x, points.values, "o", color=html.STAND_IN[line.colour], markersize=4)
                measured = True
            smooth.append(values)
        highest = max(max(values) for values in smooth)
        notes = ["As logged." if frame == "logged" else f"Smoothed over {html.number(round(self.fade))} tokens."]
        if frame == "tail":
            low, top = min(map(min, smooth)), max(max(values[len(values) // 10 :]) for values in smooth)
            margin = 0.06 * (top - low) or 0.1
            plot.set_ylim(low - margin, top + margin)
            notes += ["The first steps lie above the frame."] if highest > top + margin else []
        elif frame == "log":
            plot.set_yscale("log")
            for which in ("major", "minor"):  # 0.6 instead of 6 x 10^-1
                getattr(plot.yaxis, f"set_{which}_formatter")("{x:g}")
        elif frame == "zero":
            plot.set_ylim(0, 1.08 * highest or 1)
        notes += ["Faint: as logged."] if frame in ("tail", "log") else []
        notes += ["Dots: measured on the decoded sample."] if measured else []
        return self._figure(plot, title, lines, " ".join(notes))

    def points(self, title: str, lines: Sequence[Line], ylabel: str) -> str:
        """Return a figure of a few values, each marked; "" if no run has any."""
        lines = [line for line in lines if line.run.curve(line.name).values]
        if not lines:
            return ""
        scale, unit = self.units["tokens"]
        plot = html.axes(unit, ylabel)
        for line in lines:
            curve = line.run.curve(line.name)
            x = [value / scale for value in curve.tokens]
            plot.plot(x, curve.values, line.style, marker="o", markersize=4, color=html.STAND_IN[line.colour])
        return self._figure(plot, title, lines, "Held-out documents.")

    def _figure(self, plot: Any, title: str, lines: Sequence[Line], caption: str) -> str:
        self.count += 1
        dashes = {"-": "solid", "--": "dashed", ":": "dotted"}
        legend = ""
        for line in lines:
            mark = f'<i style="border-top:3px {dashes[line.style]} var(--{line.colour})"></i>'
            legend += f"<span>{mark}{html.escaped(line.label)}</span>" if line.label else ""
        return html.figure(plot, f"f{self.count}", title, f'<span class="key">{legend}</span>{caption}')


def _notes(runs: Sequence[Run], tokens: float) -> str:
    words = [
        f"Smoothed curves are running means whose weights fall to 1/e over {html.number(round(tokens))} tokens, the "
        "same for all runs. Time counts training steps only, not validation, saving or pauses."
    ]
    if len({run.heads for run in runs}) > 1:
        counts = ", ".join(f"{html.escaped(run.name)} {run.heads}" for run in runs)
        words.append(f"The runs have different numbers of heads ({counts}): only head 1, which all have, is compared.")
    ours = [(run.settings.get("data.tokenizer"), run.settings.get("model.vocab_size")) for run in runs]
    if len(set(map(str, ours))) > 1:
        words.append("Their tokenizers differ: compare bits per byte, not losses per token.")
    return "".join(f"<p>{text}</p>" for text in words)


def _skips(runs: Sequence[Run]) -> str:
    notes = [
        f"{html.escaped(run.name)}: skipped at step {', '.join(f'{step:,}' for step in run.skipped[:12])}"
        + (f" and {len(run.skipped) - 12} more" if len(run.skipped) > 12 else "")
        for run in runs
        if run.skipped
    ]
    return f'<p class="note">{"; ".join(notes)} (loss or gradient not finite, or a loss spike).</p>' if notes else ""


def _samples(runs: Sequence[Run]) -> str:
    samples = ""
    for run in runs:
        if run.sample is not None:
            step, text = run.sample["step"], html.escaped(run.sample["text"])
            samples += f'<h3>{html.escaped(run.name)}, step {step:,}</h3><div class="sample">{text}</div>'
    return html.section("What they wrote last", samples) if samples else ""


def _settings(runs: Sequence[Run], names: list[str]) -> str:
    if len(runs) == 1:
        return ""
    rows = [
        [html.escaped(name), *(html.escaped(_setting(v)) for v in values)] for name, values in differences(runs).items()
    ]
    inner = html.table("", ["setting", *names], rows) if rows else "<p>The runs have the same settings.</p>"
    return html.section("Settings that differ", inner)


CSS = """
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem}.key i{display:inline-block;width:1.6rem;margin-right:.4rem;
vertical-align:middle}.key span{color:var(--ink);overflow-wrap:anywhere}
details{margin-top:1.8rem}summary{cursor:pointer;font-weight:600;margin-bottom:1rem}
"""
