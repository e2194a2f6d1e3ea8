"""Show the result of an evaluation: as tables for a terminal and as a page for a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from headstart.console import format_table
from headstart.reports import html, suites
from headstart.reports.suites import Heading, Part


def format_evaluation(found: dict[str, Any]) -> str:
    """Format the result of `evaluate` as tables for a terminal."""
    parts = [part if isinstance(part, str) else format_table(*part) for part in _parts(found)]
    return "\n\n".join([_subject(found), *parts])


def markdown_of(found: dict[str, Any], pictures: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the same tables in Markdown, with the pictures of suites, given as {task: file}."""
    lines = [f"# Evaluation of {_subject(found)}"]
    for part in _parts(found):
        if isinstance(part, Heading):
            lines.append(f"## {part}")
            if part in pictures:
                lines.append(f"![Tokens per pass and speed-up by category]({pictures[part]})")
        elif isinstance(part, str):
            lines.append(part)
        else:
            cells = [part[0], ["---"] * len(part[0]), *part[1]]
            lines.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells))
    return "\n\n".join(lines)


def page_of(found: dict[str, Any], figures: bool = False) -> str:
    """Return the same tables as one HTML page, with `figures` of the suites (they need matplotlib)."""
    title = f"Evaluation of {html.escaped(_subject(found))}"
    body = f"<h1>{title}</h1>"
    for part in _parts(found):
        if isinstance(part, Heading):
            body += f"<h2>{html.escaped(part)}</h2>"
            if figures and part in found.get("suites", {}):
                body += suites.draw_figure(part, found["suites"][part])
        elif isinstance(part, str):
            body += f"<p>{html.escaped(part)}</p>"
        else:
            columns, rows = ([[html.escaped(cell) for cell in row] for row in rows] for rows in ([part[0]], part[1]))
            body += html.table("", columns[0], rows)
    return html.document(title, body)


def _subject(found: dict[str, Any]) -> str:
    return found["model"] + (f", {found['quantize']}" if "quantize" in found else "")


def _parts(found: dict[str, Any]) -> list[Part]:
    parts: list[Part] = []
    if "heads" in found:
        heads = found["heads"]
        parts.append(
            f"{heads['documents']:,} documents, {heads['bytes']:,} bytes, {heads['tokens']:,} tokens, read with "
            "teacher forcing"
        )
        columns, rows = head_table(heads["top1"], heads["prefix"], heads["tokens_per_pass"])
        columns.insert(1, "bits per byte")
        for row, bits in zip(rows, heads["bits_per_byte"]):
            row.insert(1, f"{bits:.3f}")
        parts.append((columns, rows))
    if "acceptance" in found:
        acceptance = found["acceptance"]
        ways = {name: way for name, way in acceptance.items() if isinstance(way, dict)}
        parts.append(
            f"{acceptance['prompts']} prompts of at most {acceptance['prompt_tokens']} tokens, "
            f"{acceptance['new_tokens']} tokens written after each{left_out(acceptance)}"
        )
        columns = ["free running", "tokens per pass", "repeated 8-grams"]
        columns += [f"head {k}" for k in range(2, found["heads_of_model"] + 1)]
        parts.append((columns, [_row(name, way) for name, way in ways.items()]))
        parts.append("A loop is easily drafted: if many 8-grams repeat, tokens per pass flatter the model.")
    if "suites" in found:
        parts += suites.parts(found)
    if "lm_eval" in found:
        parts += _lm_eval_parts(found["lm_eval"])
    for task, code in found.get("code", {}).items():
        parts += [_code_line(task, code), _code_table(code)]
    for task, scored in found.get("summaries", {}).items():
        parts += [_summaries_line(task, scored), _summaries_table(scored)]
    return parts


def head_table(
    top1: Sequence[float], prefix: Sequence[float], tokens_per_pass: Sequence[float]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table with a row for each head.

    Args:
        top1: share of right predictions of heads 1, 2, ...
        prefix: share of windows in which heads 2..k are right, for k = 2, 3, ...
        tokens_per_pass: expected tokens per pass with heads 1..k.
    """
    rows = [
        [str(k), f"{right:.1%}", "" if k == 1 else f"{prefix[k - 2]:.1%}", f"{tokens:.2f}"]
        for k, (right, tokens) in enumerate(zip(top1, tokens_per_pass), start=1)
    ]
    return ["head k", "top-1 right", "heads 2..k right", "tokens per pass with k heads"], rows


def left_out(counts: dict[str, Any]) -> str:
    """Say how many prompts of a file were too long, if any was."""
    said = ""
    if counts.get("skipped_prompts"):
        said += f"; {counts['skipped_prompts']} longer prompts were left out"
    if counts.get("cut_prompts"):
        said += f"; {counts['cut_prompts']} prompts were cut"
    return said


def _row(name: str, way: dict[str, Any]) -> list[str]:
    shares = [f"{share:.1%}" for share in way["acceptance"]]
    return [name, f"{way['tokens_per_pass']:.2f}", f"{way['repeated_8_grams']:.1%}", *shares]


def _lm_eval_parts(found: dict[str, Any]) -> list[Part]:
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            if "_stderr" in name or name in ("sample_len", "alias"):
                continue
            metric, _, way = name.partition(",")
            error = values.get(f"{metric}_stderr" + (f",{way}" if way else ""))
            rows.append([task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}"])
    parts: list[Part] = [(["lm-eval task", "metric", "value", "standard error"], rows)]
    if found["cut_requests"]:
        parts.append(f"Of {found['cut_requests']} requests only the end fits the context, which lowers the scores.")
    if "tokens_per_pass" in found:
        parts.append(f"{found['tokens']:,} tokens written, {found['tokens_per_pass']:.2f} a pass.")
    return parts


def _summaries_line(task: str, found: dict[str, Any]) -> str:
    line = f"{task}: {found['documents']:,} documents, at most {found['new_tokens']} tokens a summary"
    if found["cut_documents"]:
        line += f"; {found['cut_documents']:,} documents lost their end to the context"
    if "step" in found:
        scores = ", ".join(f"{score:.4f} at step {step}" for step, score in found["validation"].items())
        line += f"; weights of step {found['step']}, by ROUGE-L on the validation split: {scores}"
    return line


def _summaries_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return ROUGE with 90 % intervals over documents."""
    rows = [
        [name.replace("rouge", "ROUGE-"), _interval(way["f1"]), f"{way['precision']:.1%}", f"{way['recall']:.1%}"]
        for name, way in found.items()
        if name.startswith("rouge")
    ]
    return ["metric", "F1", "precision", "recall"], rows


def _code_line(task: str, code: dict[str, Any]) -> str:
    line = f"{task}: {code['problems']} problems, at most {code['new_tokens']} tokens a program"
    if code["cut_prompts"]:
        line += f"; of {code['cut_prompts']} prompts only the end fits the context, which lowers the scores"
    return line


def _code_table(code: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return pass@k by temperature with 90 % intervals over problems, how programs ended, and their cost."""
    measured = list(code["oracle"])
    columns = ["temperature", *measured, "samples", "programs that", "tokens per pass", "seconds", "over head 1 alone"]
    rows = []
    for temperature, way in code["temperatures"].items():
        ends = ", ".join(f"{status} {count}" for status, count in way["verdicts"].items())
        passes = f"{way['tokens_per_pass']:.2f}" if "tokens_per_pass" in way else ""
        plain = ""
        if "speed_over_plain" in way:
            plain = f"{way['speed_over_plain']:.2f} x"
            plain += f", {way['plain_differs']} differ" if way["plain_differs"] else ", same text"
        numbers = [_interval(way[name]) if name in way else "" for name in measured]
        rows.append([temperature, *numbers, str(way["samples"]), ends, passes, f"{way['seconds']:.0f}", plain])
    if len(rows) > 1:
        best = [f"{_interval(way)} at {way['temperature']:g}" for way in code["oracle"].values()]
        rows.append(["best of them", *best, "", "", "", "", ""])
    return columns, rows


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"
