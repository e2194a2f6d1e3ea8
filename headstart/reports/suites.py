"""Show suites of prompts: tokens per pass, acceptance and speed-up by category, next to published results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headstart.fileio import replacing_file
from headstart.reports import html


class Heading(str):
    """The heading of the parts that follow, such as the name of a suite."""


Part = str | tuple[list[str], list[list[str]]]
"""A line of text or a `Heading`, or a table: its columns, its rows."""
OVERALL = "overall"


def parts(found: dict[str, Any]) -> list[Part]:
    """Return the lines and tables of all suites of an evaluation."""
    shown: list[Part] = []
    for task, suite in found["suites"].items():
        shown += [Heading(task), _how(suite, found.get("heads_of_model"))]
        for temperature, way in suite["temperatures"].items():
            shown += [
                f"Temperature {temperature}: {_outcome(way, suite['against'])}",
                _categories(way, suite["published"]),
            ]
        shown += _details(suite["temperatures"])
        if suite["published"]:
            shown += ["Published results, by their authors, on other models and machines:", _published(suite)]
    machine = "Machine" if "heads_of_model" in found else "Machine of the client"
    shown.append(f"{machine}: {found['machine_line']}; threads: {found['machine']['threads']}")
    return shown


def _how(suite: dict[str, Any], heads: int | None) -> str:
    """Say how the questions were decoded; `heads` are those of the model, None for a server's."""
    settings = suite["settings"]
    rule = f"acceptance rule {settings['acceptance']}"
    if heads is None:
        how = "drafts as the server makes them"
    else:
        fed = f"up to {heads} heads, by the policy" if settings["heads"] is None else f"{settings['heads']} heads"
        drafts = [] if heads == 1 else [fed]
        drafts += [f"lookup of up to {settings['lookup']} drafts"] if settings["lookup"] else []
        drafts += [f"trees {settings['tree']}"] if settings["tree"] is not None else []
        how = f"{', '.join(drafts)}; {rule}"
    template = "as text, without chat template" if settings["raw"] else "with the chat template"
    return (
        f"{suite['questions']} of {suite['of']} questions {template}, at most {settings['new_tokens']} tokens an "
        f"answer, one at a time; {how}. Intervals: 90 %, from resampled prompts."
    )


def _outcome(way: dict[str, Any], against: str | None) -> str:
    overall = _overall(way)
    said = f"{overall['answers']} answers, {overall['tokens']:,} tokens"
    if "speedup_over_other" in overall:
        said += f"; compared with {against}, with reading {_interval(overall['speedup_over_other_with_prompt'])}"
    if "equal" in overall:
        said += f"; {overall['equal']} of {overall['compared']} outputs equal those of plain decoding"
    if way["skipped_prompts"]:
        said += f"; {way['skipped_prompts']} turns left out, too long for the context"
    if way["cut_prompts"]:
        said += f"; {way['cut_prompts']} prompts cut in their middle"
    return said


def _overall(way: Mapping[str, Any]) -> dict[str, Any]:
    return next(part for part in way["parts"] if part["name"] == OVERALL)


def _rows(way: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts in the order of a table: groups before their categories, and what holds for all last."""
    kinds = [part for part in way["parts"] if part["name"] != OVERALL]
    return [*(kinds if len(kinds) > 1 else []), _overall(way)]


def _label(part: Mapping[str, Any]) -> str:
    return f"· {part['name']}" if part["group"] else part["name"]


def _categories(way: dict[str, Any], published: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the table by category; columns for which nothing was measured are left out."""
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "category": _label,
        "prompts": lambda part: str(part["prompts"]),
        "tokens per pass": lambda part: _interval(part.get("tokens_per_pass")),
        "speed-up": lambda part: _interval(part.get("speedup")),
        "with reading": lambda part: _interval(part.get("speedup_with_prompt"), bare=True),
        "over other run": lambda part: _interval(part.get("speedup_over_other")),
        "to first token": lambda part: "" if "speedup" in part else f"{part['prompt_seconds'] / part['answers']:.2f} s",
        "tokens/s": lambda part: f"{part['tokens_per_second']:.1f}",
        "plain": lambda part: f"{part['plain_tokens_per_second']:.1f}" if "plain_tokens_per_second" in part else "",
        "repeated 8-grams": lambda part: f"{part['repeated_8_grams']:.1%}",
        "equal": lambda part: f"{part['equal']}/{part['compared']}" if "equal" in part else "",
        "published": lambda part: _references(published) if part["name"] == OVERALL else "",
    }
    rows = _rows(way)
    table = {name: [cell(row) for row in rows] for name, cell in cells.items()}
    kept = {name: column for name, column in table.items() if any(column)}
    return list(kept), [list(row) for row in zip(*kept.values())]


def _references(published: Sequence[dict[str, Any]]) -> str:
    """Return the first published results as tau and speed-up, numbered as in the table of `_published`."""
    return ", ".join(f"[{i}] {_both(each)}" for i, each in enumerate(published[:2], start=1))


def _both(each: Mapping[str, Any]) -> str:
    numbers = [f"{each['tau']:.2f}"] if each["tau"] is not None else []
    return " / ".join([*numbers, f"{each['speedup']:.2f}x"] if each["speedup"] is not None else numbers)


def _published(suite: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["", "method", "model", "setting", "tokens per pass / speed-up", "source"]
    return columns, [
        [f"[{i}]", each["method"], each["model"], each["setting"], _both(each), each["source"]]
        for i, each in enumerate(suite["published"], start=1)
    ]


def _details(ways: Mapping[str, Any]) -> Iterator[Part]:
    """Yield acceptance by position in the pass, by accepted drafts and by place in the output, over all questions."""
    overall = {f"T = {temperature}": _overall(way) for temperature, way in ways.items()}
    tables = (
        ("Acceptance by position of a draft in its pass. Unconditional: of the passes that fed such a draft; "
         "conditional: of those that accepted all drafts before it.", _positions),
        ("Passes by the number of drafts accepted (passes without drafts are left out).", _histogram),
        ("Tokens per pass by place in the output.", _places),
    )  # fmt: skip
    for title, rows_of in tables:
        columns = {
            f"{way}{name}": cells for way, part in overall.items() for name, cells in rows_of(part).items() if cells
        }
        names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
        if names:
            yield title
            yield ["", *columns], [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]


def _positions(part: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    rows = part.get("acceptance_by_position", ())
    return {
        f", {kind}": {f"draft {row['position']}": f"{row[kind]:.1%}" for row in rows}
        for kind in ("unconditional", "conditional")
    }


def _histogram(part: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    counts = part.get("speculative_decoding", {}).get("acceptance_histogram", ())
    while counts and not counts[-1]:
        counts = counts[:-1]
    return {"": {f"{i} accepted": f"{count / sum(counts):.1%}" for i, count in enumerate(counts)}}


def _places(part: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    rows = part.get("acceptance_by_place", ())
    return {
        "": {
            f"tokens {row['from']} to {row['to']}" if row["to"] else f"from token {row['from']}": (
                f"{row['tokens_per_pass']:.2f}"
            )
            for row in rows
        }
    }


def _interval(estimate: Mapping[str, float] | None, bare: bool = False) -> str:
    if estimate is None:
        return ""
    value = f"{estimate['value']:.2f}"
    return (
        value
        if bare or estimate["low"] == estimate["high"]
        else f"{value} ({estimate['low']:.2f} to {estimate['high']:.2f})"
    )


def has_matplotlib() -> bool:
    """Return whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def draw_png(task: str, suite: dict[str, Any], path: Path) -> None:
    """Write the figure of a suite as a picture."""
    with html.figure_style(html.PRINTED), replacing_file(path) as temporary:
        plot = _draw(task, suite, html.PRINTED)
        plot.savefig(temporary, format="png", dpi=160, facecolor="white")


def draw_figure(task: str, suite: dict[str, Any]) -> str:
    """Return the figure of a suite for a page."""
    with html.figure_style():
        plot = _draw(task, suite, html.STAND_IN)
        caption = "Lines: 90 % intervals from resampled prompts. Dashed: plain decoding."
        return html.figure(plot.axes[0], html.escaped(task), "Tokens per pass and speed-up by category", caption)


def _draw(task: str, suite: dict[str, Any], colours: Mapping[str, str]) -> Any:
    """Return a figure with a row for each category: tokens per pass, and the speed-up if it was measured."""
    from matplotlib.figure import Figure

    ways = suite["temperatures"]
    rows = _rows(next(iter(ways.values())))[::-1]
    fields = {"tokens_per_pass": "tokens per pass", "speedup": "speed-up over plain decoding"}
    measured = [name for name in fields if any(name in part for part in rows)] or ["tokens_per_pass"]
    figure = Figure(figsize=(1.8 + 3.6 * len(measured), 1.5 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    shift = 0.24 / max(1, len(ways) - 1)
    for panel, name in zip(panels, measured):
        for i, (temperature, way) in enumerate(ways.items()):
            colour = colours[html.SERIES[i % len(html.SERIES)]]
            by_name = {part["name"]: part for part in way["parts"]}
            points = [(y, by_name[row["name"]].get(name)) for y, row in enumerate(rows) if row["name"] in by_name]
            places = [y + shift * ((len(ways) - 1) / 2 - i) for y, point in points if point]
            found = [point for _, point in points if point]
            low, value, high = ([point[end] for point in found] for end in ("low", "value", "high"))
            panel.hlines(places, low, high, color=colour, linewidth=1.6, alpha=0.55)
            panel.plot(value, places, "o", color=colour, markersize=5, label=f"T = {temperature}")
        panel.axvline(1, color=colours["muted"], linestyle="--", linewidth=1)
        panel.set_xlabel(fields[name])
        panel.grid(axis="x")
        panel.grid(visible=False, axis="y")
        panel.axhspan(-0.5, 0.5, color=colours["line"], alpha=0.35, linewidth=0)
        panel.set_ylim(-0.5, len(rows) - 0.5)
    panels[0].set_yticks(range(len(rows)), [_label(row).replace("· ", "") for row in rows])
    for row, label in zip(rows, panels[0].get_yticklabels()):
        label.set_color(colours["muted" if row["group"] else "ink"])
        label.set_size(10 if row["group"] else 11)
    figure.suptitle(f"{task}, {suite['questions']} questions", fontsize=12, x=0.01, ha="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(ways))
    return figure
