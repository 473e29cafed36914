"""Measurements in, README tables out.

    results/NAME.json  ->  one function a table  ->  the lines between <!-- table: NAME --> and <!-- /table -->

    python benchmarks/readme.py [--check] [--readme README.md] [--results results]

With --check nothing is written: the exit status is 1 where the README says something else than the measurements. Blocks
of a name that is not in TABLES are left alone. Measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitedge.errors import VitEdgeError
from vitedge.workspace import read_json, write_file

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=<!-- table: )(?P<name>\w+)(?P<mark> -->\n)(?P<body>.*?)(?=<!-- /table -->)", re.DOTALL)


def main() -> None:
    """Rewrite the README, or with --check only look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    old = arguments.readme.read_text("utf-8")
    measured = {name: path for name in TABLES if (path := arguments.results / f"{name}.json").is_file()}
    new = rewrite(old, {name: TABLES[name](read_json(path)) for name, path in measured.items()})
    if old == new:
        print(f"{arguments.readme}: up to date")
    elif arguments.check:
        sys.exit(f"error: {arguments.readme} is out of date\nhint: python benchmarks/readme.py")
    else:
        write_file(arguments.readme, new)
        print(f"{arguments.readme}: written")


def rewrite(text: str, tables: Mapping[str, str]) -> str:
    """`text` with the block of each table filled in; a table without exactly one block is a VitEdgeError."""
    blocks = [match["name"] for match in BLOCK.finditer(text)]
    for name in tables:
        if blocks.count(name) != 1:
            hint = f"it wants one, of the lines <!-- table: {name} --> and <!-- /table -->"
            raise VitEdgeError(f"the README has {blocks.count(name)} blocks for the table {name!r}", hint=hint)
    return BLOCK.sub(lambda match: f"{match['name']}{match['mark']}{tables.get(match['name'], match['body'])}", text)


def cpu_latency(document: dict[str, Any]) -> str:
    """The table of cpu_latency.py: the features with their quality, and beside them the whole model."""
    features, whole = (document["sections"][name] for name in ("features", "whole"))
    beside = {row["name"]: row for row in whole["candidates"]}
    ours = document["ratio_to"]
    head = ["engine", "computes in", "features, ms", f"× {ours}", "SQNR, dB", "whole model, ms", f"× {ours}"]
    rows = [latency_row(row, beside.get(row["name"]), ours) for row in features["candidates"]]
    skipped = [[name, f"skipped: {reason}", "", "", "", "", ""] for name, reason in features["skipped"].items()]
    return f"{markdown([head, *rows, *skipped])}\n{caption(document)}\n"


def bench_table(document: dict[str, Any]) -> str:
    """The table of `vitedge bench --json`."""
    measures = {"top1": ("top-1, %", ".2f"), "agreement": ("agreement, %", ".2f"), "sqnr_db": ("SQNR, dB", ".1f")}
    measured = {key: measure for key, measure in measures.items() if any(row[key] is not None for row in document["rows"])}
    head = ["engine", "backend", "p50, ms", "p99, ms", "images/s", "size, MiB", *(name for name, _ in measured.values())]
    rows = [
        [row["variant"], row["backend"], f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['images_per_s']:.0f}",
         f"{row['size_mib']:.1f}", *(cell(row[key], form) for key, (_, form) in measured.items())]
        for row in document["rows"]
    ]  # fmt: skip
    where, first = document["environment"], document["rows"][0]
    machine = f"{where['machine']}, {where['cores']} cores ({where['int8']}), {where['date']}; OpenVINO {where['openvino']}"
    return f"{markdown([head, *rows])}\nBatch {first['batch']}, {first['images']} images. {machine}. `{where['command']}`\n"


def cell(value: float | None, form: str) -> str:
    """A measurement; the row that the others are held against has none."""
    return "reference" if value is None else f"{value:{form}}"


def latency_row(features: dict[str, Any], whole: dict[str, Any] | None, ours: str) -> list[str]:
    """One engine's cells; those of `ours` are bold."""
    cells = [features["name"], features["precision"], *speed(features)]
    cells.append(f"{features['sqnr_db']:.1f}" if "sqnr_db" in features else "reference")
    cells += speed(whole) if whole else ["", ""]
    return [f"**{cell}**" for cell in cells] if features["name"] == ours else cells


def speed(row: dict[str, Any]) -> list[str]:
    """The median, and how many times ours that is, with its interval where it has one."""
    spread = f" ({row['ratio_low']:.2f} - {row['ratio_high']:.2f})" if row["ratio_low"] < row["ratio_high"] else ""
    return [f"{row['median_ms']:.1f}", f"{row['ratio']:.2f}{spread}"]


def caption(document: dict[str, Any]) -> str:
    """What, where, with what and how it was measured."""
    where, section = document["environment"], document["sections"]["features"]
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    calls = document["rounds"] * document["calls_per_round"]
    return (
        f"Medians of {calls} calls at batch {document['batch']}, {document['rounds']} rounds in turns; in brackets the "
        f"{document['interval']} bootstrap interval of the ratio. SQNR: features of {section['judge_images']} images that "
        f"calibration never saw, against torch. {where['machine']}, {where['cores']} cores ({where['int8']}), {where['date']}; "
        f"{packages}. `{where['command']}`"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, and all columns but the first two are numbers."""
    head, *body = (f"| {' | '.join(cells)} |\n" for cells in rows)
    rule = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return f"{head}|{'|'.join(rule)}|\n{''.join(body)}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "fashion_vit": bench_table,
    "focus_vits14": bench_table,
    "cpu_latency": cpu_latency,
}


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
