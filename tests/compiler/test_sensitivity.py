"""What each Linear costs, held against graphs that were quantized another way, and bounds held against measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from tests.compiler.conftest import Tiny
from tests.engines import sqnr_db
from tests.models import DEPTH, TOKENS, WIDTH, operators, run_graph
from vitedge.compiler import graph
from vitedge.compiler.activations import read_inputs
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.quantize import prepare, quantize
from vitedge.compiler.sensitivity import (
    Cost,
    Judge,
    Point,
    Rows,
    Sensitivity,
    costs_path,
    free,
    frontier,
    leave_out,
    meet,
    names_of,
    quantized,
    recipe_of,
    sensitivity,
)
from vitedge.errors import VitEdgeError
from vitedge.specs import Recipe, ScaleTable

RECIPE = Recipe(min_images=4, smoothing="fixed")
BAD = "blocks.1.fc1"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """An INT8 graph, the float graph that it was made from, and images for both."""

    model: Path
    table: ScaleTable
    int8: ModelProto
    prepared: ModelProto
    rows: Rows

    @property
    def names(self) -> list[str]:
        return [linear.name for linear in quantized(self.int8, self.prepared)]

    def judge(self) -> Judge:
        return Judge(self.prepared, self.rows)


def make_pair(tiny: Tiny, model: Path, folder: Path, recipe: Recipe) -> Pair:
    table = calibrate(model, tiny.files, recipe).table
    quantize(model, table, folder / "int8.onnx", tiny.files)
    prepared = prepare(graph.load(model), recipe, table.smoothing)
    return Pair(model, table, graph.load(folder / "int8.onnx"), prepared, read_inputs(prepared, tiny.files, 6))


@pytest.fixture(scope="module")
def pair(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tiny, tiny.onnx, tmp_path_factory.mktemp("pair"), RECIPE)


@pytest.fixture(scope="module")
def spoilt(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of the same function with one input channel of one Linear 500 times as large, which nothing smooths away."""
    folder = tmp_path_factory.mktemp("spoilt")
    model = graph.load(tiny.onnx)
    linear = next(found for found in graph.linears(model) if found.name == BAD)
    norm, gain = graph.producers(model)[linear.input], np.ones(WIDTH)
    gain[3] = 500
    for index in (1, 2):
        value = graph.constant(model, norm.input[index])
        assert value is not None
        norm.input[index] = graph.put_constant(model, f"spoilt.{index}", (value * gain).astype(np.float32))
    graph.set_linear(model, linear, graph.linear_weight(model, linear) / gain[:, None])
    graph.save(model, folder / "fp32.onnx")
    recipe = dataclasses.replace(RECIPE, smoothing="none", rounding="nearest", bias_correction=False)
    return make_pair(tiny, folder / "fp32.onnx", folder, recipe)


# Graphs


def test_to_free_all_is_the_float_graph_and_to_free_none_the_int8_graph(tiny: Tiny, pair: Pair) -> None:
    assert free(pair.int8, pair.prepared, ()).graph.node == pair.int8.graph.node
    float_again = free(pair.int8, pair.prepared, pair.names)
    assert len(pair.names) == 6 * DEPTH + 2 and "QuantizeLinear" not in operators(float_again)
    assert operators(float_again).count("DequantizeLinear") == 1  # of the patches
    for wanted in (pair.prepared, graph.load(tiny.onnx)):
        assert sqnr_db(run_graph(wanted, pair.rows)[0], run_graph(float_again, pair.rows)[0]) > 80


def test_freeing_gives_what_a_recipe_that_skips_gives(tiny: Tiny, pair: Pair, tmp_path: Path) -> None:
    names = ["blocks.0.attention.k", "blocks.0.attention.proj", "blocks.1.fc2", "head"]
    before = pair.int8.SerializeToString()
    freed = leave_out(pair.int8, pair.prepared, names)
    assert pair.int8.SerializeToString() == before
    table = dataclasses.replace(pair.table, recipe=dataclasses.replace(RECIPE, skip=tuple(names)))
    quantize(tiny.onnx, table, tmp_path / "skip.onnx", tiny.files)
    skipped = graph.load(tmp_path / "skip.onnx")
    assert recipe_of(freed).skip == recipe_of(skipped).skip == tuple(names)
    np.testing.assert_array_equal(run_graph(freed, pair.rows)[0], run_graph(skipped, pair.rows)[0])
    assert sorted(operators(freed)) == sorted(operators(skipped))


def test_a_bias_that_quantizing_brought_goes_again(pair: Pair) -> None:
    """The patch product has no bias of its own, or has one; either way the freed graph has the prepared graph's nodes."""
    freed = free(pair.int8, pair.prepared, pair.names)
    assert operators(freed) == operators(pair.prepared)


# Costs


def test_a_cost_is_what_one_linear_alone_does(pair: Pair, tmp_path: Path) -> None:
    found = sensitivity(pair.int8, pair.prepared, pair.rows, tmp_path / "costs.json")
    assert [cost.name for cost in found.costs] == pair.names and found.rest < 1e-12
    macs = {cost.name: cost.macs for cost in found.costs}
    assert macs["blocks.0.attention.q"] == (TOKENS + 1) * WIDTH * WIDTH
    assert macs["blocks.0.fc1"] == (TOKENS + 1) * WIDTH * 2 * WIDTH
    assert macs["head"] == WIDTH * 5
    others = set(pair.names) - {"head"}
    by_hand = sqnr_db(run_graph(pair.prepared, pair.rows)[0], run_graph(free(pair.int8, pair.prepared, others), pair.rows)[0])
    assert found.costs[-1].sqnr_db == pytest.approx(by_hand, abs=0.1)
    whole = pair.judge().sqnr_db(pair.int8)
    assert frontier(found)[0].predicted_db == pytest.approx(whole, abs=6) and all(cost.sqnr_db > whole for cost in found.costs)


def test_costs_go_on_where_they_were_interrupted(pair: Pair, tmp_path: Path) -> None:
    path, told = tmp_path / "costs.json", list[int]()

    def stop(done: int, total: int) -> None:
        told.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(pair.int8, pair.prepared, pair.rows, path, stop)
    content = json.loads(path.read_text())
    assert [cost["name"] for cost in content["costs"]][1:] == pair.names[:4]
    content["costs"][1]["noise"] = 0.25  # if it is there afterwards, it was not measured again
    path.write_text(json.dumps(content))
    found = sensitivity(pair.int8, pair.prepared, pair.rows, path, lambda done, total: told.append(done))
    assert found.costs[0].noise == 0.25 and len(found.costs) == len(pair.names) == told[-1]
    other_images = sensitivity(pair.int8, pair.prepared, pair.rows[:2], path)
    assert other_images.costs[0].noise != 0.25


@pytest.mark.parametrize("edit", [{"name": "another"}, {"macs": 0}, {"noise": float("nan")}])
def test_costs_that_were_edited_are_measured_anew(pair: Pair, tmp_path: Path, edit: dict[str, object]) -> None:
    path, rows = tmp_path / "costs.json", pair.rows[:1]
    whole = sensitivity(pair.int8, pair.prepared, rows, path)
    content = json.loads(path.read_text())
    content["costs"][1] |= edit
    path.write_text(json.dumps(content))
    assert sensitivity(pair.int8, pair.prepared, rows, path) == whole


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"costs": [{"name": 3}]}'])
def test_a_damaged_file_of_costs_is_made_anew(pair: Pair, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(damage)
    assert len(sensitivity(pair.int8, pair.prepared, pair.rows[:1], path).costs) == len(pair.names)
    assert len(json.loads(path.read_text())["costs"]) == len(pair.names) + 1


def test_the_linear_that_was_spoilt_comes_first(spoilt: Pair, tmp_path: Path) -> None:
    points = frontier(sensitivity(spoilt.int8, spoilt.prepared, spoilt.rows, tmp_path / "costs.json"))
    assert points[1].name == BAD and points[1].predicted_db > points[0].predicted_db + 3
    judge = spoilt.judge()
    assert judge.sqnr_db(free(spoilt.int8, spoilt.prepared, {BAD})) > judge.sqnr_db(spoilt.int8) + 3
    assert [point.latency for point in points] == sorted(point.latency for point in points)
    assert (points[0].latency, points[-1].latency) == (1.0, pytest.approx(2.0)) and points[-1].predicted_db > 100


# Bounds


def points_of(count: int) -> list[Point]:
    return frontier(Sensitivity(tuple(Cost(f"l{i}", 2.0**-i, 10) for i in range(count))))


@pytest.mark.parametrize("count", [1, 2, 3, 17, 50])
def test_the_smallest_number_that_holds_is_found_wherever_the_search_begins(count: int) -> None:
    points = points_of(count)
    for smallest in range(count + 1):
        for wanted_db in (0.0, 20.0, 60.0, 1000.0):
            asked = list[int]()

            def holds(names: frozenset[str], smallest: int = smallest, asked: list[int] = asked) -> bool:
                asked.append(len(names))
                return len(names) >= smallest

            assert meet(points, holds, wanted_db) == smallest
            assert len(asked) == len(set(asked)) <= 2 + 2 * np.log2(count + 1) + 2


def test_a_bound_that_nothing_meets_is_one_sentence() -> None:
    with pytest.raises(VitEdgeError, match=r"missed even with all 3 Linears in floating point$") as caught:
        meet(points_of(3), lambda names: False, 20)
    assert caught.value.hint


def test_a_recipe_with_a_bound_frees_until_it_holds(spoilt: Pair, tiny: Tiny, tmp_path: Path) -> None:
    before = spoilt.judge().sqnr_db(spoilt.int8)
    recipe = dataclasses.replace(spoilt.table.recipe, name="int8-mixed", min_sqnr_db=before + 2)
    table = dataclasses.replace(spoilt.table, recipe=recipe)
    count = quantize(spoilt.model, table, tmp_path / "mixed.onnx", tiny.files)
    mixed = graph.load(tmp_path / "mixed.onnx")
    assert BAD in recipe_of(mixed).skip and count == len(spoilt.names) - len(recipe_of(mixed).skip)
    assert Judge(spoilt.prepared, read_inputs(spoilt.prepared, tiny.files, 32)).sqnr_db(mixed) >= before + 2
    assert costs_path(tmp_path / "mixed.onnx").is_file()
    with pytest.raises(VitEdgeError, match="missed even with all"):
        impossible = dataclasses.replace(recipe, min_sqnr_db=1000.0)
        quantize(spoilt.model, dataclasses.replace(table, recipe=impossible), tmp_path / "none.onnx", tiny.files)
    assert not (tmp_path / "none.onnx").exists()


def test_names_of_a_point() -> None:
    assert names_of(points_of(4), 2) == {"l0", "l1"} and not names_of(points_of(4), 0)
