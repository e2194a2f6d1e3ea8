"""Write pages for a browser: one self-contained HTML file, no scripts, figures as inline SVG, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from headstart.errors import needs_extra

# name: light, dark. The series are Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = {
    "page": ("#ffffff", "#15181d"), "ink": ("#1b1f24", "#e6e8eb"), "muted": ("#59616b", "#a2aab4"),
    "line": ("#d9dde2", "#343a43"), "panel": ("#f6f7f9", "#1d2127"), "alarm": ("#b3001b", "#ff7b85"),
    "series1": ("#0072b2", "#56b4e9"), "series2": ("#c65102", "#e69f00"), "series3": ("#009e73", "#2fc79a"),
    "series4": ("#a8447f", "#e39ac4"), "series5": ("#7a6a00", "#e5d84a"), "series6": ("#4b5563", "#c3cad3"),
}  # fmt: skip
SERIES = [name for name in COLOURS if name.startswith("series")]
# Heads 1 .. 8: the plasma colour map, from the end that stands out most against the page. Later heads share the last.
LIGHT = ("#0d0887", "#3f049c", "#6600a7", "#8a09a5", "#aa2395", "#c43e7f", "#da5a6a", "#eb7655")
DARK = ("#f7e425", "#fdc328", "#fca338", "#f48849", "#e76f5a", "#d8576b", "#c6417d", "#b12a90")
COLOURS.update({f"h{k}": pair for k, pair in enumerate(zip(LIGHT, DARK), start=1)})
# Matplotlib knows no CSS variables: it draws in a stand-in colour, which `figure` replaces by the variable.
STAND_IN = {name: f"#0101{i:02x}" for i, name in enumerate(COLOURS)}
PRINTED = {name: light for name, (light, _) in COLOURS.items()}
"""Colours of a picture outside a page."""
POINTS = 400
"""Most points drawn of a curve: all of them would be megabytes and look the same."""


def head_colour(k: int) -> str:
    """Return the name of head k's colour, which is also a CSS class of text."""
    return f"h{min(k, 8)}"


def escaped(text: str) -> str:
    """Escape text for HTML. A byte model may write anything: control characters become their Unicode pictures."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written to the file
    return escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def number(value: str | int | float) -> str:
    """Format a number for people; text is escaped."""
    if isinstance(value, (bool, str)):
        return escaped(str(value))
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.4g}"


def need_matplotlib(what: str) -> None:
    """Raise UsageError if matplotlib is not installed; `what` needs it."""
    with needs_extra(what, "report"):
        import matplotlib  # noqa: F401


def figure_style(colours: Mapping[str, str] = STAND_IN) -> AbstractContextManager[None]:
    """Return a context with the settings of matplotlib in which axes are made and drawn.

    `colours` are those of the page, or for a picture `PRINTED`.
    """
    import matplotlib

    ink, muted, line = (colours[name] for name in ("ink", "muted", "line"))
    style: Any = {
        "font.size": 11, "text.color": ink, "axes.labelcolor": ink, "xtick.color": muted, "ytick.color": muted,
        "axes.edgecolor": muted, "grid.color": line, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "xtick.major.size": 0,
        "ytick.major.size": 0, "legend.frameon": False, "legend.labelcolor": ink, "lines.linewidth": 1.8,
        "svg.fonttype": "none", "svg.hashsalt": "headstart",  # the salt: same data, same file
    }  # fmt: skip
    return matplotlib.rc_context(style)


def axes(xlabel: str, ylabel: str) -> Any:
    """Return matplotlib axes of the size of a figure; draw on them with the colours of `STAND_IN`."""
    # Without pyplot the canvas is Agg, which needs no display, and a caller's own pyplot backend stays as it is.
    from matplotlib.figure import Figure

    return Figure(figsize=(5.4, 4.0), layout="constrained").add_subplot(xlabel=xlabel, ylabel=ylabel)


def draw_curve(
    plot: Any, x: list[float], smooth: list[float], raw: Sequence[float] = (), *, colour: str, style: str = "-"
) -> None:
    """Draw a smooth curve over x, thinned to `POINTS`, and the faint curve of the raw values below it."""
    thin = max(1, len(x) // POINTS)
    if raw:
        plot.plot(x[::thin], raw[::thin], color=STAND_IN[colour], alpha=0.22, linewidth=0.6)
    plot.plot(x[::thin] + x[-1:], smooth[::thin] + smooth[-1:], style, color=STAND_IN[colour])


def figure(axes: Any, name: str, title: str, caption: str) -> str:
    """Return the axes as inline SVG. Text stays text: it can be searched, and takes the page's font and colours.

    The `name` must differ from that of every other figure of the page; `title` and `caption` are HTML.
    """
    axes.figure.savefig(buffer := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|^.*?(?=<svg )", "", buffer.getvalue(), flags=re.DOTALL)
    # Ids are unique in a page: two figures must not both have "axes_1".
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    for colour, stand_in in STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a table whose cells are HTML; if it is wider than the screen, it scrolls alone."""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    content = f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def section(title: str, body: str) -> str:
    """Return a part of the page with a heading."""
    return f"<section><h2>{title}</h2>{body}</section>"


def grid(figures: str) -> str:
    """Return figures next to each other, as far as the screen has room."""
    return f'<div class="grid">{figures}</div>'


def document(title: str, body: str, css: str = "") -> str:
    """Return the whole page; `css` is added to its own."""
    light, dark = (
        f"color-scheme:{scheme};" + "".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items())
        for i, scheme in enumerate(("light", "dark"))
    )
    css = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{CSS}{css}"
    head = f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    head = f'<head><meta charset="utf-8">{head}<style>{css}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body><main>{body}</main></body></html>\n'


CSS = """
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1020px;margin:0 auto;padding:1.5rem 1rem 3rem}p{max-width:46rem;margin:.5rem 0}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .3rem}
.alarm{color:var(--alarm)}p.alarm{border-left:4px solid;padding-left:.8rem}.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}caption{text-align:left;font-weight:600}
th,td{padding:.35rem .9rem .35rem 0;text-align:right;vertical-align:bottom;border-bottom:1px solid var(--line)}
th{font-weight:400;color:var(--muted);font-size:.88rem;line-height:1.3}th:first-child,td:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.8rem 2rem}
.facts table{width:100%}.facts thead{display:none}.facts td{overflow-wrap:anywhere}.grid+.wide{margin-top:1.8rem}
figure{margin:0;break-inside:avoid}figure svg{display:block;width:100%;height:auto;overflow:visible}
figcaption,.note{color:var(--muted);font-size:.88rem;line-height:1.4;margin-top:.3rem}
.sample{font:.88rem/1.65 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
background:var(--panel);border-radius:6px;padding:.8rem 1rem;margin:.8rem 0;break-inside:avoid}
.prompt{color:var(--muted)}.legend{display:flex;flex-wrap:wrap;gap:.3rem .5rem;font-size:.88rem}
.legend span{padding:0 .4rem}.sample,.legend span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
@media(max-width:600px){th,td{padding-right:.6rem;font-size:.85rem}}
@media print{main{padding:0;max-width:none}body{font-size:11pt}.grid{grid-template-columns:1fr 1fr}}
"""
