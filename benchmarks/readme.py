"""Measurements in, the tables of README.md and docs/ out.

    results/*.json  ->  one function a table  ->  the lines between <!-- table: NAME --> and <!-- /table -->

    python benchmarks/readme.py [--check] [--root .] [--results results]

With --check nothing is written: the exit status is 1 where a document says something else than the measurements. Blocks
of a name that is not in TABLES are left alone. Measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitedge.bench.document import Document, rows_of
from vitedge.errors import VitEdgeError
from vitedge.specs import from_dict, to_dict
from vitedge.workspace import read_json, write_file

ROOT = Path(__file__).resolve().parents[1]
Columns = Mapping[tuple[str, str], tuple[str, str]]  # (section, figure) of quantizers.json -> head and format
SECTIONS = {"focus": "ViT-S/14", "fashion": "Fashion ViT"}
PEER_MODELS = {
    "vit-ti16": "ViT-Ti/16 (random)",
    "vit-s16": "ViT-S/16 (random)",
    "vit-b16": "ViT-B/16 (random)",
    "focus": "ViT-S/14 (trained)",
}
MERGING_MODELS = {"fashion": "Fashion ViT", "focus": "ViT-S/14, saliency", "vit-s16": "ViT-S/16, random weights"}
QUALITY: Columns = {
    ("focus", "sqnr_db"): ("ViT-S/14 tokens, dB", ".1f"),
    ("focus", "class_sqnr_db"): ("class token, dB", ".1f"),
    ("focus", "top1"): ("top-1, %", ".1f"),
    ("focus", "agreement"): ("agreement, %", ".1f"),
    ("fashion", "sqnr_db"): ("Fashion ViT logits, dB", ".1f"),
    ("fashion", "top1"): ("top-1, %", ".2f"),
    ("fashion", "agreement"): ("agreement, %", ".2f"),
}
COST: Columns = {("focus", "seconds"): ("ViT-S/14, s", ".0f"), ("focus", "peak_mib"): ("peak, MiB", ".0f")}
PROJECTED = (2, 16, 64, 256)  # workers
PLAIN, INT8 = ("plain", "exact"), ("int8", "exact")  # the first and the last step of the ablation
BLOCK = re.compile(r"(?<=<!-- table: )(?P<name>\w+)(?P<mark> -->\n)(?P<body>.*?)(?=<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Table:
    """What results/NAME.json is shown as, and in which document of the root."""

    results: str
    render: Callable[[dict[str, Any]], str]
    document: str = "README.md"


def main() -> None:
    """Rewrite the documents, or with --check only look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a document is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    measured = {name: table for name, table in TABLES.items() if (arguments.results / f"{table.results}.json").is_file()}
    stale = False
    for document in dict.fromkeys(table.document for table in measured.values()):
        bodies = {
            name: table.render(read_json(arguments.results / f"{table.results}.json"))
            for name, table in measured.items()
            if table.document == document
        }
        stale |= update(arguments.root / document, bodies, arguments.check)
    if stale:
        sys.exit("hint: python benchmarks/readme.py")


def update(path: Path, tables: Mapping[str, str], check: bool) -> bool:
    """Write one document, or with `check` only say whether it is out of date."""
    if not path.is_file():
        raise VitEdgeError(f"there is no {path}", hint=f"it wants blocks for the tables {', '.join(tables)}")
    old = path.read_text("utf-8")
    new = rewrite(old, tables, path.name)
    if old == new:
        print(f"{path}: up to date")
    elif check:
        print(f"error: {path} is out of date", file=sys.stderr)
    else:
        write_file(path, new)
        print(f"{path}: written")
    return check and old != new


def rewrite(text: str, tables: Mapping[str, str], document: str = "README.md") -> str:
    """`text` with the block of each table filled in; a table without exactly one block is a VitEdgeError."""
    blocks = [match["name"] for match in BLOCK.finditer(text)]
    for name in tables:
        if blocks.count(name) != 1:
            hint = f"it wants one, of the lines <!-- table: {name} --> and <!-- /table -->"
            raise VitEdgeError(f"{document} has {blocks.count(name)} blocks for the table {name!r}", hint=hint)
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


def peers_cpu(document: dict[str, Any]) -> str:
    """The table of peers_cpu.py: an engine a row, its time and SQNR on each model, marked where no other beats it in both."""
    sections, ours = document["sections"], document["ratio_to"]
    names = dict.fromkeys(one["name"] for part in sections.values() for one in part["document"]["candidates"])
    head = ["engine", *(text for name in sections for text in (f"{PEER_MODELS[name]}, ms", f"× {ours}", "SQNR, dB"))]
    rows = []
    for name in names:
        cells = [name, *(cell for part in sections.values() for cell in peer_cells(part, name))]
        rows.append([f"**{cell}**" if cell else "" for cell in cells] if name == ours else cells)
    return f"{markdown([head, *rows])}\n{peers_caption(document)}\n"


def peer_cells(section: dict[str, Any], name: str) -> list[str]:
    """Milliseconds, ratio and SQNR of one engine on one model; why, where it failed."""
    one = next((one for one in section["document"]["candidates"] if one["name"] == name), None)
    if one is None or one["failed"]:
        return [f"failed: {one['failed']}" if one else "", "", ""]
    ratio = section["ratios"].get(name)
    beside = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "1.00"
    mark = " ●" if name in section["frontier"] else ""
    sqnr = one["judged"]["sqnr_db"]
    return [f"{one['timings'][0]['centiles_ms'][50]:.2f}{mark}", beside, "reference" if sqnr is None else f"{sqnr:.1f}"]


def peers_caption(document: dict[str, Any]) -> str:
    """What, where, with what and how it was measured."""
    where, sections = document["environment"], document["sections"]
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    judged = [one["judged"] for part in sections.values() for one in part["document"]["candidates"] if one["judged"]]
    images = max(one["images"] for one in judged)
    return (
        f"● no other is as fast and as accurate. Medians at batch {document['batch']}, {document['seconds']:g} s an engine, in "
        f"turns, one run a model; in brackets the {document['interval']} interval of the ratio by its rounds. SQNR: of {images} "
        f"images that calibration never saw, against torch in FP32; of random weights it tells of the arithmetic alone. "
        f"{where['machine']}, {where['cores']} cores ({where['int8']}), {where['date']}; {packages}. "
        f"The last run: `{where['command']}`"
    )


def bench_table(document: dict[str, Any]) -> str:
    """The table of `vitedge bench --json`, or of the plain rows that it wrote before there were documents."""
    if "rows" not in document:
        document = {**document, "rows": [to_dict(row) for row in rows_of(from_dict(Document, document))]}
    measures = {"top1": ("top-1, %", ".2f"), "agreement": ("agreement, %", ".2f"), "sqnr_db": ("SQNR, dB", ".1f")}
    measured = {key: measure for key, measure in measures.items() if any(row[key] is not None for row in document["rows"])}
    head = ["engine", "backend", "p50, ms", "p99, ms", "images/s", "size, MiB", *(name for name, _ in measured.values())]
    rows = [
        [row["variant"], row["backend"], f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['images_per_s']:.0f}",
         f"{row['size_mib']:.1f}", *(cell(row[key], form) for key, (_, form) in measured.items())]
        for row in document["rows"]
    ]  # fmt: skip
    first = document["rows"][0]
    return f"{markdown([head, *rows])}\nBatch {first['batch']}, {first['images']} images. {place(document['environment'])}\n"


def quantizers(document: dict[str, Any]) -> str:
    """The table of quantizers.py: FP32, and every quantizer that one may choose."""
    columns = columns_of(document, {**QUALITY, **COST})
    head = ["quantizer", "judged", *(head for head, _ in columns.values())]
    rows = [quantizer_row(document, name, judged, columns) for name, judged in judgements(document, ("recipe", "peer"))]
    skipped = [[name, f"skipped: {reason}", *[""] * len(columns)] for name, reason in unable(document).items()]
    return f"{markdown([head, float_row(document, columns), *rows, *skipped])}\n{quantizers_caption(document)}\n"


def quantizers_ablation(document: dict[str, Any]) -> str:
    """The table of single steps: FP32, from plain step by step to int8 and away from it, and what drawing the images changes."""
    columns = columns_of(document, QUALITY)
    head = ["recipe", "judged", *(head for head, _ in columns.values())]
    ends = [(name, judged) for name, judged in judgements(document, ("recipe",)) if (name, judged) in (PLAIN, INT8)]
    steps = sorted([*ends, *judgements(document, ("ablation",))], key=rung)
    rows = [quantizer_row(document, name, judged, columns) for name, judged in steps]
    draws = [draws_row(document, word, columns) for word in ("min", "median", "max")]
    return f"{markdown([head, float_row(document, columns), *rows, *draws])}\n{quantizers_caption(document)}\n"


def rung(judgement: tuple[str, str]) -> int:
    """Where a row stands in the table of single steps: plain, what is added to it, int8, what is changed in that."""
    if judgement in (PLAIN, INT8):
        return 0 if judgement == PLAIN else 2
    return 3 if judgement[0].startswith("int8 with ") else 1


def columns_of(document: dict[str, Any], columns: Columns) -> Columns:
    """Those of the sections that were measured."""
    return {(section, key): column for (section, key), column in columns.items() if section in document["sections"]}


def judgements(document: dict[str, Any], groups: Sequence[str]) -> list[tuple[str, str]]:
    """The (name, way of judging) of every row of `groups`, each once, in the order of the sections."""
    rows = [row for section in document["sections"].values() for row in section["rows"]]
    return list(dict.fromkeys((row["name"], row["judged"]) for row in rows if row["group"] in groups))


def float_row(document: dict[str, Any], columns: Columns) -> list[str]:
    """What the others are held against."""
    values = dict.fromkeys(QUALITY) | {(name, "top1"): section["top1"] for name, section in document["sections"].items()}
    return ["FP32", "torch", *figures(values, columns)]


def quantizer_row(document: dict[str, Any], name: str, judged: str, columns: Columns) -> list[str]:
    """One quantizer's cells, empty where it could not be run; those of our default are bold."""
    rows = {
        section: row
        for section, part in document["sections"].items()
        for row in part["rows"]
        if (row["name"], row["judged"]) == (name, judged)
    }
    ours = any(row["group"] == "recipe" for row in rows.values())
    values = {(section, key): value for section, row in rows.items() for key, value in row.items()}
    cells = [f"vitedge {name}" if ours else name, judged, *figures(values, columns)]
    return [f"**{cell}**" if cell else "" for cell in cells] if (name, judged) == INT8 else cells


def draws_row(document: dict[str, Any], word: str, columns: Columns) -> list[str]:
    """The smallest, median or largest figures of one recipe over several drawings of calibration images."""
    seeds = {name: section["seeds"] for name, section in document["sections"].items()}
    values = {(name, key): spread[word] for name, found in seeds.items() for key, spread in found.items()}
    return [f"int8, {word} of the draws", "exact", *figures(values, columns)]


def figures(values: Mapping[tuple[str, str], float | None], columns: Columns) -> list[str]:
    """The values of the columns as cells."""
    return [cell(values[key], form) if key in values else "" for key, (_, form) in columns.items()]


def unable(document: dict[str, Any]) -> dict[str, str]:
    """Name and reason of every candidate that could be run nowhere."""
    sections = document["sections"].values()
    ran = {row["name"] for section in sections for row in section["rows"]}
    return {name: why for section in sections for name, why in section["skipped"].items() if name not in ran}


def quantizers_caption(document: dict[str, Any]) -> str:
    """What was measured, on which images, where and with what."""
    where, sections = document["environment"], document["sections"]
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    images = "; ".join(
        f"{SECTIONS[name]}: {part['judge_images']} images, calibrated on {part['calibration_images']}"
        + (f", top-1 by a linear probe on FP32's features of {part['probe_images']}" if part["probe_images"] else "")
        for name, part in sections.items()
    )
    return (
        f"SQNR against FP32 on images that calibration never saw; exact: what the Q/DQ graph says, node by node. {images}. "
        f"{where['machine']}, {where['cores']} cores, {where['date']}; {packages}. `{where['command']}`"
    )


def rtx_builds(document: dict[str, Any]) -> str:
    """The trained models of rtx_builds.py."""
    trained = [row for row in document["rows"] if row["weights"] == "trained"]
    return rtx_table({**document, "rows": trained})


def rtx_table(document: dict[str, Any]) -> str:
    """A row for every model and type of rtx_builds.py, over all capabilities the worst."""
    head = ["model", "type", "weights, MiB", "engine, MiB", "of FP32", "processor, s", "wall, s", "peak, MiB"]
    cells = [
        rtx_row(document["rows"], *which) for which in dict.fromkeys((row["model"], row["type"]) for row in document["rows"])
    ]
    return f"{markdown([head, *cells])}\n{rtx_caption(document)}\n"


def rtx_row(rows: Sequence[dict[str, Any]], model: str, kind: str) -> list[str]:
    """One model in one type, or why there is none."""
    found = [row for row in rows if (row["model"], row["type"]) == (model, kind)]
    errors = [row["error"] for row in found if "error" in row]
    if errors:
        return [model, f"{kind}: {errors[0].removeprefix(f'{kind}: ')}", *[""] * 6]
    figures = ("size_mib", "cpu_seconds", "seconds", "peak_mib")
    size, busy, wall, peak = (max(row[key] for row in found) for key in figures)
    whole = max(
        (row["size_mib"] for row in rows if (row["model"], row["type"]) == (model, "fp32") and "size_mib" in row), default=0
    )
    part = f"{size / whole:.2f}" if whole and kind != "fp32" else ""
    return [model, kind, f"{found[0]['weights_mib']:.1f}", f"{size:.1f}", part, f"{busy:.1f}", f"{wall:.1f}", f"{peak:.0f}"]


def rtx_caption(document: dict[str, Any]) -> str:
    """For what, where and how it was built."""
    where, built = document["environment"], [row for row in document["rows"] if "error" not in row]
    capabilities = ", ".join(dict.fromkeys(row["capability"] for row in built))
    low, best, high = document["batch"]
    share = sum(row["cpu_seconds"] for row in built) / (sum(row["seconds"] for row in built) or 1.0)
    return (
        f"int8 has its floats in FP16. {len(built)} builds for compute capabilities {capabilities}, batches {low} to {high} "
        f"(best {best}); of each type the largest figures. No GPU was there and nothing was run. {where['machine']}, "
        f"{where['cores']} cores, of which a build had {share:.2f} on average beside other processes: the seconds are rough. "
        f"{where['date']}; TensorRT-RTX {where['tensorrt-rtx-cu13-bindings']}. `{where['command']}`"
    )


def preprocess(document: dict[str, Any]) -> str:
    """The table of preprocess.py: every candidate, on the frames of all sizes side by side."""
    sections, ours = document["sections"], document["ratio_to"]
    head = [
        "by",
        "makes",
        *(text for name in sections for text in (f"{name}, ms", f"× {ours}")),
        "worst difference from Pillow, levels",
    ]
    beside = [{row["name"]: row for row in section["candidates"]} for section in sections.values()]
    rows = [preprocess_row([rows.get(name) for rows in beside], ours) for name in beside[0]]
    skipped = {name: why for section in sections.values() for name, why in section["skipped"].items()}
    reasons = [[name, f"skipped: {why}", *[""] * (len(head) - 2)] for name, why in skipped.items()]
    return f"{markdown([head, *rows, *reasons])}\n{preprocess_caption(document)}\n"


def preprocess_row(sizes: Sequence[dict[str, Any] | None], ours: str) -> list[str]:
    """One candidate's cells, empty for a size that it was left out of; those of `ours` are bold."""
    measured = [row for row in sizes if row]
    speeds = [text for row in sizes for text in ((f"{row['median_ms']:.2f}", speed(row)[1]) if row else ("", ""))]
    cells = [measured[0]["name"], measured[0]["makes"], *speeds, f"{max(row['worst_levels'] for row in measured):.0f}"]
    return [f"**{cell}**" for cell in cells] if measured[0]["name"] == ours else cells


def preprocess_caption(document: dict[str, Any]) -> str:
    """What, where, with what and how busy a machine it was measured."""
    where, sections = document["environment"], document["sections"].values()
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    calls = document["rounds"] * document["calls_per_round"]
    disturbed, turns = (sum(section[key] for section in sections) for key in ("turns_disturbed", "turns"))
    return (
        f"Medians of {calls} calls, {document['rounds']} rounds in turns, of which other processes disturbed {disturbed} of "
        f"{turns}; in brackets the {document['interval']} bootstrap interval of the ratio. {where['machine']}, {where['cores']} "
        f"cores ({where['int8']}), {where['date']}; {packages}. `{where['command']}`"
    )


def scale(document: dict[str, Any]) -> str:
    """The table of scale.py: one process, and so many workers, for each task and model."""
    head = ["", "workers", "images", "s", "images/s", "× one worker", "× one process", "sent, bytes an image", "received", "same"]
    rows, where = document["rows"], document["environment"]
    speeds = {(row["task"], row["model"], row["workers"]): row["images_per_s"] for row in rows}
    cells = [[f"{row['task']} {row['model']}", *scale_row(row, speeds)] for row in rows]
    starts = [row["start_s"] for row in rows if row["workers"]]
    return (
        f"{markdown([head, *cells])}\n{where['machine']}, {where['cores']} cores, {where['date']}; the workers start in "
        f"{min(starts):.0f} to {max(starts):.0f} s, which is not in the times. `{where['command']}`\n\n{projection(rows)}"
    )


def projection(rows: Sequence[dict[str, Any]]) -> str:
    """How long a million images would take more workers at the rate of each of two, and what the last of them would read."""
    head = ["a million images, computed", *(f"{workers} workers" for workers in PROJECTED), "read at the last"]
    cells = []
    for row in rows:
        if row["task"] == "judge" and row["workers"] == 2:
            rate = row["images_per_s"] / row["workers"]
            times = [f"{1e6 / (rate * workers) / 60:.1f} min" for workers in PROJECTED]
            cells.append([f"judge {row['model']}", *times, f"{rate * PROJECTED[-1] * row['image_bytes'] / 1e6:.1f} MB/s"])
    return markdown([head, *cells])


def scale_row(row: dict[str, Any], speeds: Mapping[tuple[str, str, int], float]) -> list[str]:
    """The cells behind the name of what was done; workers 0 is one process without any."""
    ratios = [speeds.get((row["task"], row["model"], workers)) for workers in (1, 0)]
    moved = [f"{row[key] / row['images']:.0f}" if row["workers"] else "" for key in ("sent_bytes", "received_bytes")]
    return [
        str(row["workers"] or "one process"),
        str(row["images"]),
        f"{row['seconds']:.1f}",
        f"{row['images_per_s']:.1f}",
        *(f"{row['images_per_s'] / ratio:.2f}" if ratio else "" for ratio in ratios),
        *moved,
        "yes" if row["same"] else "**no**",
    ]


def trust(document: dict[str, Any]) -> str:
    """The table of trust.py: what a benchmark promises, and how often that held."""
    pairs, alarms, slowed = (document[key] for key in ("pairs", "false_alarms", "slowed"))
    rows = [
        ["what", "found"],
        [
            "of two runs, each one's speed-up lies in the other's interval",
            f"{pairs['held']} of {pairs['pairs']} pairs, intervals of ±{pairs['interval_percent']:.1f} %",
        ],
        [
            f"an engine that a sleep makes {slowed['percent']:g} % slower is caught",
            f"{slowed['caught']} of {slowed['runs']} runs",
        ],
        ["false alarms without it", f"{alarms['alarms']} in {alarms['runs']} runs"],
        *(
            [f"calls of {one['engine']}: their time over that by another clock around them", f"{one['bench_to_outside']:.4f}"]
            for one in document["outside"]
        ),
        *(
            [f"top-1 of {one['engine']}, and by OpenVINO and Pillow alone", f"{one['bench']:.2f}, {one['script']:.2f} %"]
            for one in document["independent"]
        ),
    ]
    return f"{markdown(rows)}\n{place({**document['environment'], 'command': document['command']})}\n"


def overhead(document: dict[str, Any]) -> str:
    """The table of overhead.py: the bare call, and what a frame needs on top of it."""
    stages, memory = document["stages_ms"], document["memory"]
    ratio = f"{document['ratio']:.3f} ({document['ratio_low']:.3f} - {document['ratio_high']:.3f})"
    rows = [
        ["what", "computes", "ms", "× the bare call"],
        ["`engine.run(1)`", f"{document['model']} in INT8", f"{document['engine_ms']:.2f}", "1.000"],
        ["`Predictor(engine)(frame)`", "the same, from frame to labels", f"{document['frame_to_answer_ms']:.2f}", ratio],
    ]
    height, width = document["frame"]
    return (
        f"{markdown(rows)}\nMedians of {document['rounds']} rounds in turns, batch 1, a frame of {width} x {height}; in brackets "
        f"the 95 % interval. Stages: preprocess {stages['preprocess']:.2f}, infer {stages['infer']:.2f}, answer "
        f"{stages['postprocess']:.2f} ms. After {memory['calls']} calls {memory['kept_bytes_per_call']:.2f} bytes a call were "
        f"still allocated, and at most {memory['peak_bytes'] / 1024:.0f} KiB at a time. {place(document['environment'])}\n"
    )


def batching(document: dict[str, Any]) -> str:
    """The table of batching.py: a row for each model, number of callers and load."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "callers": lambda row: str(row["callers"]),
        "load, % of capacity": lambda row: f"{100 * row['load']:.0f}",
        "frames": lambda row: str(row["offered"]),
        "rejected": lambda row: str(row["rejected"]),
        "wrong or lost": lambda row: str(row["wrong"] + row["lost"]),
        "in a batch": lambda row: f"{row['batch']:.1f}",
        "p50, ms": lambda row: f"{row['p50_ms']:.1f}",
        "p99, ms": lambda row: f"{row['p99_ms']:.1f}",
        "ideal p99, ms": lambda row: f"{row['ideal_p99_ms']:.1f}",
    }
    rows = [[model["model"], *(show(row) for show in columns.values())] for model in document["models"] for row in model["loads"]]
    return f"{markdown([['model', *columns], *rows])}\n{batching_caption(document)}\n"


def batching_caption(document: dict[str, Any]) -> str:
    """What 100 % of each model are, and where it was measured."""
    rows = [row for model in document["models"] for row in model["loads"]]
    models = "; ".join(
        f"{model['model']}: capacity {model['capacity_per_s']:.0f} frames a second, {100 * model['capacity_of_static']:.0f} % of "
        f"static batches of {model['best_batch']} without a queue, on {model['streams']} streams; a frame alone "
        f"{model['unloaded_p50_ms']:.2f} ms (p99 {model['unloaded_p99_ms']:.2f})"
        for model in document["models"]
    )
    return (
        f"{models}. max_delay_ms {document['max_delay_ms']:g}, a queue of {document['queue']}, policy reject. In a row memory "
        f"grew by at most {max(row['grown_mib'] for row in rows):.0f} MiB, and Jain's index of the callers' shares was at least "
        f"{min(row['shares'] for row in rows):.3f}. {place(document['environment'])}"
    )


def place(where: dict[str, str]) -> str:
    """Machine, date, engine and command of a measurement."""
    machine = f"{where['machine']}, {where['cores']} cores ({where['int8']}), {where['date']}; OpenVINO {where['openvino']}"
    return f"{machine}. `{where['command']}`"


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


def viewers(document: dict[str, Any]) -> str:
    """The table of viewers.py: what is left of a camera's rate, and what serving takes."""
    watching = {
        "none": "nobody",
        "bad": f"{document['bad_viewers']} slow, dead or malicious viewers",
        "good": "one viewer of the page",
        "both": "that one and the others",
    }
    rows = [["who watches", "frames/s", "× nobody", "cores"]]
    for name, who in watching.items():
        turn = document["turns"][name]
        ratio = f"{turn['ratio']:.3f} ({turn['ratio_low']:.3f} - {turn['ratio_high']:.3f})"
        rows.append([who, f"{turn['fps']:.1f}", ratio, f"{turn['cores']:.3f}"])
    height, width = document["frame"]
    return (
        f"{markdown(rows)}\n{document['model']} in {document['variant'].upper()} on frames of {width} x {height}, one after the "
        f"other. Medians of {document['rounds']} rounds in turns, in brackets the least and the most; cores: busy with serving. "
        f"{place(document['environment'])}\n"
    )


def token_merging(document: dict[str, Any]) -> str:
    """The table of token_merging.py: every way of merging the tokens of every model."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "merged in each block": lambda row: ", ".join(map(str, row["merged"])) or "none",
        "operations, %": lambda row: f"{100 * row['part']:.0f}",
        "FP32 top-1, %": lambda row: figure(row["fp32"].get("top1"), ".2f"),
        "INT8 top-1, %": lambda row: figure(row["int8"].get("top1"), ".2f"),
        "FP32, dB": lambda row: figure(row["fp32"].get("sqnr_db") if row["merge"] else None, ".1f"),
        "INT8, dB": lambda row: figure(row["int8"].get("sqnr_db"), ".1f"),
        "one core, ms": lambda row: f"{row['one_core_ms']:.2f} ({row['one_core_speedup']:.2f} x)",
        "all cores, ms": lambda row: f"{row['all_cores_ms']:.2f} ({row['all_cores_speedup']:.2f} x)",
    }
    rows = [[MERGING_MODELS[row["subject"]], *(show(row) for show in columns.values())] for row in document["rows"]]
    return (
        f"{markdown([['model', *columns], *rows])}\nAccuracy against the unmerged FP32 model; latency of INT8 engines, batch 1, "
        f"medians in turns. {place(document['environment'])}\n"
    )


def figure(value: float | None, form: str) -> str:
    """A measurement, or nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


TABLES = {
    "fashion_vit": Table("fashion_vit", bench_table),
    "focus_vits14": Table("focus_vits14", bench_table),
    "cpu_latency": Table("cpu_latency", cpu_latency),
    "peers_cpu": Table("peers_cpu", peers_cpu),
    "preprocess": Table("preprocess", preprocess, "docs/preprocessing.md"),
    "quantizers": Table("quantizers", quantizers),
    "quantizers_ablation": Table("quantizers", quantizers_ablation, "docs/quantization.md"),
    "overhead": Table("overhead", overhead, "docs/runtime.md"),
    "batching": Table("batching", batching, "docs/runtime.md"),
    "scale": Table("scale", scale, "docs/scale.md"),
    "token_merging": Table("token_merging", token_merging, "docs/token-merging.md"),
    "trust": Table("trust", trust, "docs/benchmarks.md"),
    "viewers": Table("viewers", viewers, "docs/web.md"),
    "rtx_builds": Table("rtx_builds", rtx_builds),
    "rtx_builds_all": Table("rtx_builds", rtx_table, "docs/tensorrt.md"),
}


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
