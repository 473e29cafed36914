"""The tables of the documents are what results/*.json say, and rewriting them touches nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import (
    BLOCK,
    TABLES,
    batching,
    bench_table,
    cpu_latency,
    markdown,
    overhead,
    preprocess,
    quantizers,
    quantizers_ablation,
    rewrite,
    rtx_table,
    scale,
    trust,
    viewers,
)
from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed, rows_of
from vitedge.errors import VitEdgeError
from vitedge.specs import to_dict
from vitedge.workspace import read_json

ROOT = Path(__file__).parents[2]
README = """# A project

<!-- table: first -->
old
<!-- /table -->
between \\1 \\g<name>
<!-- table: second -->
<!-- /table -->
the end
"""
ROW = {"precision": "fp32", "median_ms": 80.04, "p90_ms": 90.0, "min_ms": 70.0, "ratio": 4.0, "ratio_low": 3.9, "ratio_high": 4.2}
OURS = {**ROW, "name": "vitedge int8", "median_ms": 20.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "sqnr_db": 19.04}
SECTION = {"judge_images": 32, "candidates": [{**ROW, "name": "torch eager"}, OURS], "skipped": {"NNCF": "not installed"}}
DOCUMENT = {
    "environment": {"machine": "Cortex-A78", "cores": "6", "int8": "asimddp", "date": "2026-11-23", "command": "python x.py"},
    "versions": {"torch": "2.13.0", "nncf": None},
    "batch": 1,
    "rounds": 40,
    "calls_per_round": 4,
    "ratio_to": "vitedge int8",
    "interval": "95 %",
    "sections": {"features": SECTION, "whole": SECTION},
}  # fmt: skip

FRAME = {"median_ms": 6.871, "ratio": 9.61, "ratio_low": 9.5, "ratio_high": 9.8, "makes": "float32", "worst_levels": 0.0}
LOOPS = {**FRAME, "name": "vitedge", "makes": "int8 patches", "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
FRAMES = {"candidates": [LOOPS, {**FRAME, "name": "Pillow"}], "skipped": {"torchvision": "no"}, "turns": 40, "turns_disturbed": 3}
PREPROCESS = {**DOCUMENT, "ratio_to": "vitedge", "sections": {"1080p": FRAMES, "4K": FRAMES}}

OVERHEAD = {
    "environment": {**DOCUMENT["environment"], "openvino": "2026.4"}, "model": "ViT-S/14", "frame": [1080, 1920], "rounds": 60,  # type: ignore[dict-item]
    "engine_ms": 10.0, "frame_to_answer_ms": 10.6, "ratio": 1.06, "ratio_low": 1.05, "ratio_high": 1.07,
    "stages_ms": {"preprocess": 0.5, "infer": 10.0, "postprocess": 0.1},
    "memory": {"calls": 400, "kept_bytes_per_call": 0.0, "peak_bytes": 20480},
}  # fmt: skip
LOADED = {"callers": 4, "load": 0.7, "offered": 420, "rejected": 3, "wrong": 1, "lost": 2, "batch": 1.5, "p50_ms": 14.0,
          "p99_ms": 30.0, "ideal_p99_ms": 28.0, "grown_mib": 1.0, "shares": 0.999}  # fmt: skip
SERVED = {"model": "ViT-S/14", "capacity_per_s": 118.0, "best_batch": 8, "streams": 2, "capacity_of_static": 0.98,
          "unloaded_p50_ms": 18.0, "unloaded_p99_ms": 20.0, "loads": [LOADED]}  # fmt: skip
BATCHING = {"environment": OVERHEAD["environment"], "max_delay_ms": 2.0, "queue": 64, "models": [SERVED]}

QUANTIZED = {"sqnr_db": 20.04, "class_sqnr_db": 18.0, "top1": 91.0, "agreement": 97.26, "seconds": 12.3, "peak_mib": 900.0}
SPREAD = {"min": 19.0, "median": 20.0, "max": 21.0}
PHOTOGRAPHS = {
    "calibration_images": 64,
    "probe_images": 3000,
    "judge_images": 1000,
    "top1": 92.34,
    "rows": [
        {"name": "int8", "group": "recipe", "judged": "exact", **QUANTIZED},
        {"name": "int8", "group": "recipe", "judged": "engine, bf16", **QUANTIZED, "sqnr_db": 19.5},
        {"name": "plain", "group": "recipe", "judged": "exact", **QUANTIZED},
        {"name": "NNCF", "group": "peer", "judged": "OpenVINO, fp32", **QUANTIZED},
        {"name": "int8 with percentile", "group": "ablation", "judged": "exact", **QUANTIZED},
        {"name": "smoothing", "group": "ablation", "judged": "exact", **QUANTIZED},
    ],
    "seeds": {"sqnr_db": SPREAD},
    "skipped": {"ModelOpt": "no wheel"},
}
CLOTHES = {
    "calibration_images": 256,
    "probe_images": 0,
    "judge_images": 10000,
    "top1": 90.06,
    "rows": [{"name": "int8", "group": "recipe", "judged": "exact", "sqnr_db": 34.0, "top1": 90.0, "agreement": 99.5}],
    "seeds": {},
    "skipped": {"NNCF": "broke here"},
}
QUANTIZERS = {**DOCUMENT, "sections": {"focus": PHOTOGRAPHS, "fashion": CLOTHES}}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run readme.py as a user does."""
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def readme_and_results(folder: Path, document: dict[str, Any]) -> list[object]:
    """A README with an empty block and the measurements beside it, as options."""
    (folder / "README.md").write_text("# Größe\n<!-- table: cpu_latency -->\n<!-- /table -->\n", "utf-8")
    (folder / "cpu_latency.json").write_text(json.dumps(document), "utf-8")
    return ["--root", folder, "--results", folder]


@pytest.mark.parametrize("name", TABLES)
def test_the_table_in_the_document_is_what_was_measured(name: str) -> None:
    table = TABLES[name]
    results = ROOT / "results" / f"{table.results}.json"
    blocks = {match["name"]: match["body"] for match in BLOCK.finditer((ROOT / table.document).read_text("utf-8"))}
    assert name in blocks, f"{table.document} has no block <!-- table: {name} -->"
    assert blocks[name] == table.render(read_json(results)), "run: python benchmarks/readme.py"


def test_blocks_are_replaced_and_nothing_else() -> None:
    new = rewrite(README, {"first": "\\1 new\n", "second": "more\n"})
    assert new == README.replace("old\n", "\\1 new\n").replace("second -->\n", "second -->\nmore\n")


def test_rewriting_twice_is_rewriting_once() -> None:
    once = rewrite(README, {"first": "new\n"})
    assert rewrite(once, {"first": "new\n"}) == once


def test_blocks_of_unknown_tables_stay() -> None:
    assert rewrite(README, {}) == README


@pytest.mark.parametrize(("text", "count"), [("", 0), (README + README, 2), (README.replace("<!-- /table -->", ""), 0)])
def test_a_table_without_one_block_is_an_error(text: str, count: int) -> None:
    with pytest.raises(VitEdgeError, match=f"{count} blocks for the table 'first'"):
        rewrite(text, {"first": "new\n"})


def test_every_row_of_a_table_has_all_columns() -> None:
    lines = cpu_latency(DOCUMENT).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 2 + 1  # head and rule, candidates, skipped
    assert {row.count("|") for row in rows} == {8}


def test_a_table_shows_the_figures_and_where_they_come_from() -> None:
    text = cpu_latency(DOCUMENT)
    assert "| torch eager | fp32 | 80.0 | 4.00 (3.90 - 4.20) | reference | 80.0 | 4.00 (3.90 - 4.20) |" in text
    assert "| **vitedge int8** | **fp32** | **20.0** | **1.00** | **19.0** | **20.0** | **1.00** |" in text
    assert "| NNCF | skipped: not installed |" in text
    for fact in ("160 calls", "32 images", "Cortex-A78, 6 cores (asimddp)", "torch 2.13.0.", "`python x.py`"):
        assert fact in text
    assert "None" not in text


def test_a_candidate_of_one_section_alone_is_shown() -> None:
    document = {**DOCUMENT, "sections": {"features": SECTION, "whole": {**SECTION, "candidates": []}}}
    assert "| 80.0 | 4.00 (3.90 - 4.20) | reference |  |  |" in cpu_latency(document)


@pytest.mark.parametrize("sections", [["focus", "fashion"], ["focus"], ["fashion"]])
@pytest.mark.parametrize("render", [quantizers, quantizers_ablation])
def test_every_row_of_the_quantizers_has_all_columns(render: Callable[[dict[str, Any]], str], sections: list[str]) -> None:
    text = render({**QUANTIZERS, "sections": {name: QUANTIZERS["sections"][name] for name in sections}})
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "None" not in text


def test_the_quantizers_are_shown_beside_fp32() -> None:
    text = quantizers(QUANTIZERS)
    assert "| FP32 | torch | reference | reference | 92.3 | reference | reference | 90.06 | reference |  |  |" in text
    assert "| **vitedge int8** | **exact** | **20.0** | **18.0** | **91.0** | **97.3** | **34.0** | **90.00** |" in text
    assert "| vitedge int8 | engine, bf16 | 19.5 | 18.0 | 91.0 | 97.3 |  |  |  | 12 | 900 |" in text
    assert "| NNCF | OpenVINO, fp32 | 20.0 |" in text
    assert "| ModelOpt | skipped: no wheel |" in text
    assert "broke here" not in text  # it ran on the other model
    assert "percentile" not in text
    for fact in ("1000 images, calibrated on 64", "features of 3000", "10000 images, calibrated on 256", "`python x.py`"):
        assert fact in text


def test_the_ablation_has_the_single_steps_and_the_draws() -> None:
    text = quantizers_ablation(QUANTIZERS)
    first_cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert first_cells[3:7] == ["vitedge plain", "smoothing", "**vitedge int8**", "int8 with percentile"]
    assert "| smoothing | exact | 20.0 |" in text and "engine, bf16" not in text
    assert "| int8, median of the draws | exact | 20.0 |  |" in text
    assert "NNCF |" not in text


def test_preprocessing_is_shown_for_all_sizes_of_frames() -> None:
    text = preprocess(PREPROCESS)
    assert "| **vitedge** | **int8 patches** | **6.87** | **1.00** | **6.87** | **1.00** | **0** |" in text
    assert "| Pillow | float32 | 6.87 | 9.61 (9.50 - 9.80) | 6.87 | 9.61 (9.50 - 9.80) | 0 |" in text
    assert "| torchvision | skipped: no |" in text
    assert "160 calls" in text and "disturbed 6 of 80" in text and "None" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_table_may_belong_to_another_document(tmp_path: Path) -> None:
    (tmp_path / "quantizers.json").write_text(json.dumps(QUANTIZERS), "utf-8")
    (tmp_path / "README.md").write_text("<!-- table: quantizers -->\n<!-- /table -->\n", "utf-8")
    options = ["--root", tmp_path, "--results", tmp_path]
    assert "there is no " in run(*options).stderr
    page = tmp_path / "docs" / "quantization.md"
    page.parent.mkdir()
    page.write_text("# Why\n<!-- table: quantizers_ablation -->\n<!-- /table -->\n", "utf-8")
    assert run(*options).returncode == 0
    assert page.read_text("utf-8").startswith("# Why\n<!-- table: quantizers_ablation -->\n| recipe |")
    assert run("--check", *options).returncode == 0


def test_markdown() -> None:
    assert markdown([["a", "b", "c"], ["1", "2", "3"]]) == "| a | b | c |\n|---|---|---:|\n| 1 | 2 | 3 |\n"


def test_check_writes_nothing_and_fails_until_it_is_written(tmp_path: Path) -> None:
    options = readme_and_results(tmp_path, DOCUMENT)
    before = (tmp_path / "README.md").read_bytes()
    checked = run("--check", *options)
    assert (checked.returncode, checked.stderr.count("\n")) == (1, 2)
    assert "out of date" in checked.stderr
    assert (tmp_path / "README.md").read_bytes() == before
    assert run(*options).returncode == 0
    assert (tmp_path / "README.md").read_text("utf-8").startswith("# Größe\n<!-- table: cpu_latency -->\n| engine |")
    assert run("--check", *options).returncode == 0


def test_a_readme_without_the_block_is_one_sentence(tmp_path: Path) -> None:
    options = readme_and_results(tmp_path, DOCUMENT)
    (tmp_path / "README.md").write_text("# Nothing here\n", "utf-8")
    done = run(*options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: README.md has 0 blocks for the table 'cpu_latency'\nhint: ")


def test_a_type_that_could_not_be_built_is_a_row_with_its_reason() -> None:
    cost = {"weights_mib": 4.0, "seconds": 2.0, "cpu_seconds": 1.0, "peak_mib": 300.0}
    built = {"model": "vit", "weights": "random", **cost}
    rows = [
        {**built, "type": "fp32", "capability": "8.6", "size_mib": 8.0},
        {**built, "type": "int8", "capability": "8.6", "size_mib": 2.0},
        {**built, "type": "int8", "capability": "8.9", "size_mib": 3.0},
        {"model": "swin", "weights": "trained", "type": "int8", "error": "int8: too few images"},
    ]
    where = {**DOCUMENT["environment"], "tensorrt-rtx-cu13-bindings": "1.7.1"}
    text = rtx_table({"environment": where, "batch": [1, 1, 16], "rows": rows})
    assert "| vit | fp32 | 4.0 | 8.0 |  | 1.0 | 2.0 | 300 |" in text
    assert "| vit | int8 | 4.0 | 3.0 | 0.38 | 1.0 | 2.0 | 300 |" in text  # the larger of the two
    assert "| swin | int8: too few images |" in text
    assert "3 builds for compute capabilities 8.6, 8.9, batches 1 to 16 (best 1)" in text and "a build had 0.50" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_runtime_s_tables_show_what_was_measured() -> None:
    assert "| `Predictor(engine)(frame)` | the same, from frame to labels | 10.60 | 1.060 (1.050 - 1.070) |" in overhead(OVERHEAD)
    assert "20 KiB at a time. Cortex-A78, 6 cores" in overhead(OVERHEAD)
    table = batching(BATCHING)
    assert "| ViT-S/14 | 4 | 70 | 420 | 3 | 3 | 1.5 | 14.0 | 30.0 | 28.0 |" in table
    assert "capacity 118 frames a second, 98 % of static batches of 8 without a queue, on 2 streams" in table


def test_the_live_view_s_table_shows_what_viewers_cost() -> None:
    turn = {"fps": 80.0, "ratio": 0.98, "ratio_low": 0.97, "ratio_high": 1.01, "cores": 0.0271}
    document = {
        "environment": OVERHEAD["environment"], "model": "focus", "variant": "int8", "rounds": 5,
        "frame": [272, 640], "bad_viewers": 50, "turns": dict.fromkeys(("none", "bad", "good", "both"), turn),
    }  # fmt: skip
    assert "| 50 slow, dead or malicious viewers | 80.0 | 0.980 (0.970 - 1.010) | 0.027 |" in viewers(document)
    assert "focus in INT8 on frames of 640 x 272" in viewers(document)


def test_scale_divides_by_one_worker_and_by_one_process() -> None:
    row = {"task": "judge", "model": "vit", "images": 1000, "image_bytes": 1000, "seconds": 10.0, "same": True}
    none = {**row, "workers": 0, "images_per_s": 100.0, "start_s": 0.0, "sent_bytes": 0, "received_bytes": 0}
    one = {**row, "workers": 1, "images_per_s": 60.0, "start_s": 4.0, "sent_bytes": 80_000, "received_bytes": 1000}
    rows = [none, one, {**one, "workers": 2, "images_per_s": 120.0, "same": False}]
    table = scale({"environment": DOCUMENT["environment"], "rows": rows})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[2] == ["judge vit", "one process", "1000", "10.0", "100.0", "1.67", "1.00", "", "", "yes"]
    assert lines[4] == ["judge vit", "2", "1000", "10.0", "120.0", "2.00", "1.20", "80", "1", "**no**"]
    assert "4 to 4 s" in table
    assert lines[-1] == ["judge vit", "138.9 min", "17.4 min", "4.3 min", "1.1 min", "15.4 MB/s"]  # at 60 images a second each


def test_trust_is_shown_with_what_was_promised() -> None:
    found = {
        "environment": OVERHEAD["environment"],
        "command": "vitedge bench a b",
        "pairs": {"pairs": 10, "held": 9, "interval_percent": 2.345},
        "false_alarms": {"runs": 20, "alarms": 0},
        "slowed": {"percent": 5.0, "runs": 10, "caught": 10},
        "outside": [{"engine": "vit/int8", "bench_to_outside": 1.00072}],
        "independent": [{"engine": "vit/int8", "bench": 90.03, "script": 90.03}],
    }
    table = trust(found)
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 and {len(row) for row in rows} == {2}
    assert "9 of 10 pairs, intervals of ±2.3 %" in table and "0 in 20 runs" in table and "`vitedge bench a b`" in table


def test_a_document_of_bench_gives_the_table_that_its_rows_do() -> None:
    centiles = tuple(float(number) for number in range(101))
    timed = Timed(1, None, 1, 20, (50.0,) * 5, 0, centiles, 0.0, Interval(49, 51), 20.0)
    one = Candidate("vit/fp32@openvino", "vit", "fp32", "openvino", size_mib=3.0, judged=Judged(40, top1=90.0), timings=(timed,))
    failed = Candidate("vit/int8@openvino", "vit", "int8", "openvino", failed="opening: no memory")
    where: dict[str, str] = {**DOCUMENT["environment"], "openvino": "2026.4"}  # type: ignore[dict-item]
    document = Document(where, (one, failed), one.name)
    rows = {"environment": where, "rows": [to_dict(row) for row in rows_of(document)]}
    assert bench_table(to_dict(document)) == bench_table(rows)
    table = bench_table(rows).partition("Batch")[0]
    assert "| fp32 | openvino | 50.00 | 99.00 | 20 | 3.0 | 90.00 |" in table and "int8" not in table
