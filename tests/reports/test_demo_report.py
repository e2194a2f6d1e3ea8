"""The demo's report: well-formed, complete, safe to open, honest when something is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headstart.errors import UsageError
from headstart.reports.demo import PAPER_BYTES, Decoded, DecodingRow, DemoReport, Sample, write_report

pytest.importorskip("matplotlib")

ACCEPTANCE = [0.62, 0.37, 0.214, 0.118, 0.061, 0.032, 0.014]
VOID = {"meta", "br", "link", "img"}


def decoding_rows(scale: float = 1.0) -> list[DecodingRow]:
    rows = []
    for heads in (1, 2, 4, 8):
        accepted = [scale * share for share in ACCEPTANCE[: heads - 1]]
        per_pass = 1 + sum(accepted)
        rows.append(DecodingRow(heads, 913.4 * per_pass * 0.95 ** (heads > 1), per_pass, per_pass * 0.95 ** (heads > 1),
                                True, accepted))  # fmt: skip
    return rows


def made_report() -> DemoReport:
    training, validation = [], []
    for step in range(1, 601):
        line = {"step": step, "tokens": step * 8192, "tokens_per_second": 21_345.0 + step % 7}
        for k in range(1, 9):
            line[f"loss/head{k}"] = 1.25 + 0.28 * math.log(k) + 4 * math.exp(-step / 30) + 0.08 * math.sin(step * k)
            if step % 150 == 0:
                bits = (1.31 + 0.27 * math.log(k) + 4 * math.exp(-step / 30)) / math.log(2)
                validation.append({"step": step, f"validation/bits_per_byte/head{k}": bits,
                                   f"validation/top1/head{k}": 0.55 / k**0.5})  # fmt: skip
        training.append(line)
    merged: dict[int, dict[str, float]] = {}
    for record in validation:
        merged.setdefault(int(record["step"]), {}).update(record)
    pieces = [("T", 1), ("he", 2), (" <script>alert(1)</script>", 3), ("\n\t& then\x00", 1), ("\ud800 on", 4)]
    pieces += [(letter, k % 8 + 1) for k, letter in enumerate("and the king said to the young lord, fear not " * 6)]
    return DemoReport(
        machine={"CPU": "Intel Xeon <2.7 GHz>", "cores": 2, "threads": 2, "torch": "2.11.0"},
        settings={"parameters": 3_412_992, "dim": 256, "layers": 4, "optimiser": "adamw", "steps": 600,
                  "bytes seen": 4_915_200, "minutes": 3.87, "seed": 1234},
        training=training,
        validation=list(merged.values()),
        decoding=decoding_rows(),
        fastest_plain=DecodingRow(1, 1342.2, 1.0, 1.47, False, []),
        sampled=decoding_rows(0.8),
        repeated={"greedy": 0.25, "sampled": 0.0625},
        boxed=Decoded(
            decoding=decoding_rows(1.2), sampled=decoding_rows(1.1),
            fastest_plain=DecodingRow(1, 999.0, 1.0, 1.1, True, []),
            samples=[Sample("import ", [("os", 1), ("\nimport sys", 6)])], repeated={"greedy": 0.5},
        ),
        samples=[Sample("\nKING HENRY:\n", pieces), Sample("To be ", [("or not", 1), (" to be", 5)])],
    )  # fmt: skip


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order; gathers ids and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(path: Path) -> tuple[str, Balanced]:
    page = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    return page, parser


def test_report_is_whole_and_self_contained(tmp_path: Path) -> None:
    report = made_report()
    write_report(tmp_path / "deep" / "report.html", report)
    page, parser = parsed(tmp_path / "deep" / "report.html")
    text = "".join(parser.text)
    for row in report.decoding + report.sampled:
        assert f"{row.tokens_per_second:,.0f}" in text
        assert f"{row.tokens_per_pass:.2f}" in text
        assert f"{row.speedup:.2f}×" in text
    assert report.fastest_plain is not None
    for row in report.decoding:
        assert f"{row.tokens_per_second / report.fastest_plain.tokens_per_second:.2f}×" in text
    for speedup, per_pass in PAPER_BYTES.values():
        assert f"{speedup:.2f}" in text and f"{per_pass:.2f}" in text
    for share in ("62", "37", "21", "12", "6.1", "3.2", "1.4"):
        assert f">{share}<" in page
    for known in ("3,412,992", "4,915,200", "3.87", "1234", "Intel Xeon <2.7 GHz>", "2.11.0", "55.0%", "make demo"):
        assert known in text
    assert "identical to plain decoding: yes" in text and 'class="alarm"' not in page
    assert not parser.seen & {"script", "link", "img", "iframe"}
    assert set(re.findall(r"https?://[^\"' <]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "#0101" not in page and "#0202" not in page  # every stand-in colour became a variable
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_order_of_the_parts(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", made_report())
    headings = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "r.html").read_text())
    assert headings == ["Summary", "Decoding", "Plots", "What it wrote", "How to read this", "Settings and machine",
                        "Reproduce"]  # fmt: skip


def test_samples_are_escaped_and_keep_their_space(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", made_report())
    page, _ = parsed(tmp_path / "r.html")
    assert '<span class="h3"> &lt;script&gt;alert(1)&lt;/script&gt;</span>' in page
    assert '<span class="h1">\n\t&amp; then\u2400</span>' in page
    assert '<span class="prompt">\nKING HENRY:\n</span>' in page
    assert '<span class="h4">? on</span>' in page


def test_output_that_differs_is_said_first_and_in_red(tmp_path: Path) -> None:
    report = made_report()
    rows = [dataclasses.replace(row, identical=row.heads != 4) for row in report.sampled]
    write_report(tmp_path / "r.html", dataclasses.replace(report, sampled=rows))
    page, parser = parsed(tmp_path / "r.html")
    assert '<h2>Summary</h2><p class="alarm"' in page
    assert "4 heads (temperature 0.8) differed" in page
    assert "identical to plain decoding: no" in "".join(parser.text)


def test_the_model_in_the_box_stands_beside_it(tmp_path: Path) -> None:
    report = made_report()
    write_report(tmp_path / "r.html", report)
    page, parser = parsed(tmp_path / "r.html")
    text = "".join(parser.text)
    assert "Model in the box, greedy; 50% of the 8-grams repeat themselves" in text
    assert "Model just trained, greedy; 25% of the 8-grams repeat themselves" in text
    assert "<h3>Model in the box</h3>" in page and '<span class="h6">\nimport sys</span>' in page
    rows = [dataclasses.replace(row, identical=row.heads != 2) for row in report.boxed.sampled]
    wrong = dataclasses.replace(report, boxed=dataclasses.replace(report.boxed, sampled=rows))
    write_report(tmp_path / "r.html", wrong)
    assert "2 heads (model in the box, temperature 0.8) differed" in parsed(tmp_path / "r.html")[0]
    write_report(tmp_path / "r.html", dataclasses.replace(report, boxed=None))
    assert "odel in the box" not in parsed(tmp_path / "r.html")[0]


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    plain = DecodingRow(1, 900.0, 1.0, 1.0, True, [])
    write_report(tmp_path / "r.html", DemoReport(machine={}, settings={}, decoding=[plain]))
    page, _ = parsed(tmp_path / "r.html")
    for absent in (
        "What it wrote",
        "Validation",
        "temperature 0.8",
        "Loss of each",
        "Drafts accepted",
        "fastest plain",
    ):
        assert absent not in page
    assert "did not decode faster" in page


def test_slower_than_the_fastest_plain_path_is_said(tmp_path: Path) -> None:
    fast = DecodingRow(1, 99_999.0, 1.0, 100.0, True, [])
    write_report(tmp_path / "r.html", dataclasses.replace(made_report(), fastest_plain=fast))
    assert "but only 0.02 times as fast as the fastest plain path" in (tmp_path / "r.html").read_text()


def test_values_that_are_not_numbers_are_skipped(tmp_path: Path) -> None:
    report = made_report()
    report.training[5]["loss/head3"] = float("nan")
    report.training[6]["loss/head3"] = None
    write_report(tmp_path / "r.html", report)
    parsed(tmp_path / "r.html")


def test_same_data_same_file(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, made_report())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_without_matplotlib_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("before")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'headstart\[report\]'"):
        write_report(tmp_path / "r.html", made_report())
    assert (tmp_path / "r.html").read_text() == "before"


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headstart.fileio.os.replace", full)
    with pytest.raises(UsageError, match="disk is full"):
        write_report(tmp_path / "r.html", made_report())
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("r.html", "before")]
