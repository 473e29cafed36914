"""The search against a made-up model, whose latencies and losses are known: what it finds, in which time, and what it leaves."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest

from vitedge.designs import Design, Found, Goal, Space, Trial, decibels
from vitedge.search import Search, _area

RATES = tuple((rate,) for rate in (2, 4, 8, 12, 16))
SPACE = Space(
    recipes=("fp32", "bf16", "int8", "int8-fast"), quantized=frozenset({"int8", "int8-fast"}), freed=(1, 2, 4, 8),
    floats=("fp32",), merged=RATES, sizes=(192, 160, 128), tokens=196, blocks=12, size=224,
)  # fmt: skip
RATIOS = {"fp32": 1.0, "bf16": 0.6, "int8": 0.4, "int8-fast": 0.4}
LOSSES = {"fp32": 0.0, "bf16": 0.01, "int8": 0.6, "int8-fast": 1.5}
RUNGS = (100, 400, 1600)


@dataclass
class World:
    """What designs really take and lose, and a clock. crossed: how much merging costs more under INT8 than under floats."""

    points: bool = True
    crossed: float = 1.2
    now: float = 0.0

    def truth(self, design: Design) -> tuple[float, float]:
        cut = 1 - SPACE.work(design.merged, 0)
        smaller = 1 - SPACE.work((), design.size)
        ratio = RATIOS[design.recipe] * SPACE.work(design.merged, design.size) ** 0.9 * (1 + 0.015 * design.freed)
        loss = LOSSES[design.recipe] / (1 + design.freed / 3) * (0.5 if design.floats else 1.0)
        worse = self.crossed if design.recipe in SPACE.quantized else 1.0
        loss += worse * (6 * cut**2.5 + 9 * smaller**2)
        return ratio * (1.2 if design.floats else 1.0), loss if self.points else loss / 100

    def seconds(self, trial: Trial) -> float:
        quantizing = {"int8": 40.0, "int8-fast": 8.0}.get(trial.design.recipe, 0.0)
        return 5 + quantizing + trial.images / 400

    def measure(self, trial: Trial) -> Found:
        self.now += self.seconds(trial)
        ratio, loss = self.truth(trial.design)
        return Found(trial.design, ratio, loss, loss * 2 / math.sqrt(trial.images), trial.images)

    def search(self, goal: Goal | None = None) -> Search:
        required = (SPACE.reference, Design("int8"))
        return Search(SPACE, goal or Goal(points=self.points), self.seconds, RUNGS, required)

    def run(self, search: Search, budget: float) -> list[Trial]:
        start, trials = self.now, list[Trial]()
        while (trial := search.next(budget - (self.now - start))) is not None:
            trials.append(trial)
            search.add(self.measure(trial))
        return trials


def area(search: Search, world: World, designs: list[Design]) -> float:
    return _area(search._stairs(world.truth(one) for one in designs))


@pytest.mark.parametrize("points", [True, False])
def test_it_finds_nearly_all_of_the_frontier_in_a_small_part_of_the_grid(points: bool) -> None:
    world = World(points)
    search = world.search()
    trials = world.run(search, 900)
    tried = {trial.design for trial in trials}
    assert len(tried) < 0.25 * len(SPACE.designs())
    assert area(search, world, list(tried)) > 0.95 * area(search, world, SPACE.designs())


def test_it_does_better_than_chance_in_the_same_time() -> None:
    budget = 400
    world = World()
    search = world.search()
    found = area(search, world, [trial.design for trial in world.run(search, budget)])
    by_chance = []
    for seed in range(20):
        shuffled = random.Random(seed).sample(SPACE.designs(), len(SPACE.designs()))
        spent = list(itertools.accumulate(world.seconds(Trial(one, RUNGS[0])) for one in shuffled))
        by_chance.append(area(search, world, [one for one, at in zip(shuffled, spent, strict=True) if at <= budget]))
    assert found > max(by_chance)


@pytest.mark.parametrize("budget", [0, 20, 60, 300])
def test_no_trial_is_begun_that_ends_too_late(budget: float) -> None:
    world = World()
    trials = world.run(world.search(), budget)
    assert world.now <= budget
    assert bool(trials) == (budget > 0)


def test_what_is_required_comes_first_unless_there_is_no_time_for_it() -> None:
    world = World()
    assert [trial.design for trial in world.run(world.search(), 80)][:2] == [Design("fp32"), Design("int8")]
    short = {trial.design for trial in World().run(World().search(), 40)}
    assert Design("int8") not in short and Design("int8-fast") in short


def test_a_guess_is_exact_where_the_parts_do_not_depend_on_each_other() -> None:
    world = World(crossed=1.0)
    search = world.search()
    for design in (Design("fp32"), Design("int8"), Design("bf16"), Design("bf16", merged=(8,)), Design("fp32", size=160)):
        search.add(world.measure(Trial(design, 400)))
    for design in (Design("int8", merged=(8,)), Design("int8", size=160), Design("int8", merged=(8,))):
        assert search.guess(design) == pytest.approx(world.truth(design))
    ratio, loss = search.guess(Design("int8", merged=(8,), size=160)) or (0.0, 0.0)
    assert (ratio, loss) == pytest.approx(world.truth(Design("int8", merged=(8,), size=160)), rel=0.1)
    between = search.guess(Design("int8", merged=(12,))) or (0.0, 0.0)  # along the one rate that is known
    assert between == pytest.approx(world.truth(Design("int8", merged=(12,))), rel=0.2)


def test_things_are_tried_apart_before_they_are_tried_together() -> None:
    world = World()
    seen: set[Design] = set()
    for trial in world.run(world.search(), 900):
        design = trial.design
        assert design == Design(design.recipe) or Design(design.recipe) in seen
        if design.merged and design.size:
            assert any(one.merged and not one.size for one in seen) and any(one.size and not one.merged for one in seen)
        seen.add(design)


def test_only_what_may_be_on_the_frontier_is_judged_on_all_images() -> None:
    world = World()
    search = world.search()
    world.run(search, 700)
    fully = [one for one in search.found.values() if one.images == RUNGS[-1]]
    assert 0 < len(fully) <= 0.6 * len(search.found)
    hopeless = [Design("int8-fast"), Design("fp32", size=128)]
    assert not {one.design for one in fully} & set(hopeless)
    unlimited = Search(replace(SPACE, freed=(), floats=(), sizes=()), Goal(points=True), world.seconds, RUNGS)
    world.run(unlimited, 1e6)
    assert {one.images for one in unlimited.frontier() if one.design != SPACE.reference} == {RUNGS[-1]}


def test_a_refusal_takes_what_goes_further_with_it() -> None:
    search = World().search()
    for refused, gone, kept in (
        (Design("int8", merged=(8,)), Design("bf16", merged=(2,), size=160), Design("bf16", size=160)),
        (Design("bf16", size=160), Design("int8", size=192), Design("int8")),
        (Design("int8", freed=2), Design("int8", freed=4, floats="fp32"), Design("int8", freed=1)),
        (Design("int8", floats="fp32"), Design("int8", freed=1, floats="fp32"), Design("int8-fast", floats="fp32")),
        (Design("int8-fast"), Design("int8-fast", freed=1), Design("int8")),
    ):
        assert gone in search._open and kept in search._open
        search.refuse(refused)
        assert refused not in search._open and gone not in search._open and kept in search._open


def test_where_all_is_refused_the_search_ends() -> None:
    world, refused = World(), list[Design]()
    search = world.search()
    while (trial := search.next(1e6)) is not None:
        if trial.design == SPACE.reference:
            search.add(world.measure(trial))
        else:
            search.refuse(trial.design)
            refused.append(trial.design)
    assert len(refused) == len(set(refused)) <= 5
    assert search.finalists(5) == [search.found[SPACE.reference]]


def test_a_goal_draws_the_search_to_what_meets_it() -> None:
    def share(goal: Goal) -> float:
        world = World()
        search = world.search(goal)
        world.run(search, 400)
        return sum(one.loss <= 0.5 for one in search.found.values()) / len(search.found)

    assert share(Goal(points=True, max_loss=0.5)) > share(Goal(points=True))
    assert Goal(True, max_ratio=0.5).fits(0.5, 99) and not Goal(True, max_ratio=0.5).fits(0.51, 0)
    assert not Goal(True, max_loss=0.5).fits(0.1, 0.6)


@pytest.mark.parametrize(
    ("points", "losses"), [(True, (-1.0, 0.0, 0.2, 1.0, 10.0, 50.0)), (False, (0.0, 1e-5, 1e-3, 0.1, 1.0, 9.0))]
)
def test_worth_falls_from_one_to_nothing(points: bool, losses: tuple[float, ...]) -> None:
    worth = [Goal(points).worth(loss) for loss in losses]
    assert worth[0] == 1 and worth[-1] == 0 and worth == sorted(worth, reverse=True)


def test_finalists_are_what_adds_most_and_what_was_required() -> None:
    world = World()
    search = world.search()
    world.run(search, 900)
    every = search.finalists(100)
    few = search.finalists(5)
    assert few == every[:5] and [one.design for one in few[:2]] == [Design("fp32"), Design("int8")]
    rest = [one for one in search.frontier() if one not in few]
    assert all(search._gain(few[2].ratio, few[2].loss, few[:2]) >= search._gain(one.ratio, one.loss, few[:2]) for one in rest)


def test_a_point_is_left_out_only_where_that_is_sure() -> None:
    search = World().search()
    fast = Found(Design("int8"), 0.4, 0.5, 0.3, 100)
    slow = Found(Design("bf16"), 0.5, 0.4, 0.3, 100)
    for one in (fast, slow):
        search.add(one)
    assert search.frontier() == [fast, slow]
    search.add(replace(slow, loss=0.9, spread=0.1))
    assert search.frontier() == [fast]
    search.add(replace(slow, loss=0.9, spread=0.1, doubt=0.3))  # surely worse, and no faster as far as one knows
    assert search.frontier() == [fast]
    search.add(replace(slow, ratio=0.41, loss=0.6, doubt=0.3))  # as fast and as good, within what was measured
    assert len(search.frontier()) == 2


def test_a_pattern_of_rates_begins_again_after_the_last() -> None:
    assert SPACE.work((0, 0, 24), 0) == pytest.approx((2 * 196 + 3 * 172 + 3 * 148 + 3 * 124 + 100) / 12 / 196)
    assert SPACE.work((), 112) == 0.25 and SPACE.work((150,), 0) == pytest.approx(sum(0.5**k for k in range(1, 13)) / 12)


def test_names_and_decibels_are_for_people() -> None:
    assert Design("int8", 1, "fp32", (8,), 192).name == "int8, 1 Linear in float, floats in fp32, merging 8, 192 px"
    assert Design("int8", 2, merged=(0, 40)).name == "int8, 2 Linears in float, merging 0+40"
    assert decibels(0.001) == pytest.approx(30) and decibels(0.0) == pytest.approx(144.5, abs=0.1)
