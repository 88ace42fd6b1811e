"""Plans are values: they read back, stay in their shape, and come from a stream that covers what it should."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import stream
from fuzz.ahead import Ahead
from fuzz.build import _eight_bits, build, layout_of, refill
from fuzz.coverage import STATIC, Coverage, features, pairs, possible, static_features, valid_pairs
from fuzz.draws import plans
from fuzz.plan import SIZES, SMALLEST, Plan, Shape
from fuzz.related import RECOMPILED_ROWS, pick, recompiled
from fuzz.strategies import (
    CHECKS,
    FAR,
    MODES,
    STYLES,
    expand,
    far_of,
    first_plans,
    styled,
)
from fuzz.stream import Stream, first_shapes
from fuzz.targets import signature_of
from fuzz.worker import AHEAD, FRESH, wanted_shapes

ROOT = Path(__file__).parents[1]
POOL = first_shapes(3, 24)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FEW
@given(plans(POOL))
def test_a_plan_reads_back_from_its_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["", "{}", '{"shape": {}}', '{"shape": {"tokens": 1}, "lengths": []}', "[1]"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json(text)


def test_lengths_outside_the_shape_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"lengths .* capacity of 1"):
        SMALLEST.replace(lengths=((1, 2),))
    with pytest.raises(ValueError, match=r"lengths .* do not fit 1 tokens"):
        SMALLEST.replace(lengths=((2, 1),))


@FEW
@given(plans(POOL))
def test_every_plan_builds_the_same_legal_case_twice(plan: Plan) -> None:
    case = build(plan)
    assert case.hash == build(plan).hash
    assert not list(case.invalid_rows())
    assert case.queries.shape == (plan.shape.tokens, plan.shape.q_heads, plan.shape.head_dim)


@FEW
@given(plans(POOL))
def test_poison_lies_exactly_where_no_row_may_look(plan: Plan) -> None:
    case, seen = build(plan), layout_of(plan).seen
    expected = np.zeros_like(seen)
    for sequence in case.sequences():
        keys = np.arange(*sequence.keys)
        expected[sequence.pages[keys // case.page_size], keys % case.page_size] = True
    assert np.array_equal(seen, expected)
    if case.kv_pages.dtype != np.int8:
        blank = np.isnan(case.kv_pages.astype(np.float32)).all(axis=(2, 3))
        assert np.array_equal(blank, ~seen)


@FEW
@given(plans(POOL))
def test_the_second_fill_changes_nothing_a_row_sees(plan: Plan) -> None:
    case, seen = build(plan), layout_of(plan).seen
    other = refill(plan, case, "huge")
    assert case.kv_pages[seen].tobytes() == other.kv_pages[seen].tobytes()
    assert np.isfinite(other.kv_pages[~seen].astype(np.float32)).all()
    if (~seen).any():
        assert case.kv_pages.tobytes() != other.kv_pages.tobytes()


DRAW = """
import hashlib, sys
for name in sys.argv[1:]:
    __import__(name)
from fuzz.mutants.score import drawn
from fuzz.plan import SMALLEST
print(hashlib.sha256("".join(plan.to_json() for plan in drawn(7, 1600, (SMALLEST.shape,))).encode()).hexdigest())
"""


def test_a_seed_means_the_same_plans_whatever_the_process_has_imported(tmp_path: Path) -> None:
    """Hypothesis mixes constants of the imported modules into what it draws; plans must not depend on them."""
    (tmp_path / "constants.py").write_text(f"NUMBERS = {sorted(range(64, 500)) + [10**k + 7 for k in range(3, 8)]}")

    def drawn_in(hash_seed: str, *imported: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DRAW, *imported]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert drawn_in("1") == drawn_in("2", "constants", "fuzz.campaign", "fuzz.report")


def test_the_stream_of_shapes_is_the_same_for_a_seed_and_another_for_another() -> None:
    assert first_shapes(1, 40)[:20] == first_shapes(1, 20)
    assert first_shapes(1, 40) != first_shapes(2, 40)


STATIC_PAIRS = frozenset(p for p in valid_pairs() if p[0][0] in STATIC and p[1][0] in STATIC)


def held(shapes) -> set:
    """The pairs of static features that stand in some of these shapes."""
    return set().union(*(pairs(static_features(shape)) for shape in shapes)) & STATIC_PAIRS


@pytest.mark.parametrize("seed", range(3))
def test_fifty_two_shapes_hold_every_pair_of_static_features(seed: int) -> None:
    assert held(first_shapes(seed, 52)) == STATIC_PAIRS


def test_campaigns_of_any_seed_begin_with_the_same_shapes_in_another_order() -> None:
    """What was compiled for one is kept for the next."""
    one, other = first_shapes(0, 52), first_shapes(5, 52)
    assert one != other
    assert set(one) == set(other)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_word_stands_for_is_in_a_campaign_by_each_of_its_numbers_or_the_plainest(seed: int) -> None:
    """Big pages, groups of 5 to 7 and head sizes past 128 are where a kernel may be wrong alone."""
    shapes = first_shapes(seed, 52)
    for (axis, word), numbers in SIZES.items():
        drawn = {getattr(shape, axis) for shape in shapes if (axis, word) in static_features(shape)}
        assert numbers[0] in drawn <= set(numbers), (axis, word)
    assert {shape.page for shape in shapes} >= {64, 128}
    assert {shape.head_dim for shape in shapes} >= {192, 256}
    assert {shape.group for shape in shapes if shape.kv_heads > 1} & {5, 6, 7}


def test_a_kernel_that_takes_only_the_plainest_number_is_given_it() -> None:
    def plain(shape: Shape) -> bool:
        return all(getattr(shape, axis) not in numbers[1:] for (axis, _), numbers in SIZES.items())

    stream = Stream(0, plain)
    shapes = [stream.shape(index) for index in range(60)]
    assert all(shape is not None and plain(shape) for shape in shapes)
    assert stream.barred() == []
    assert held(shapes) == STATIC_PAIRS


def test_without_its_opening_the_stream_still_holds_every_pair_in_sixty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_opening", tuple)
    assert held(itertools.islice(Stream(0).shapes(), 60)) == STATIC_PAIRS


def narrow_pages(shape) -> bool:
    """A kernel of few gifts, as some of ours are."""
    few = shape.page in (8, 16) and shape.head_dim in (64, 128) and shape.types in ("bf16", "int8", "f16")
    return few and not (shape.types == "int8" and shape.head_dim == 128)


def test_a_kernel_that_takes_little_is_given_what_it_takes_in_all_pairs() -> None:
    narrow = Stream(0, narrow_pages)
    shapes = [narrow.shape(index) for index in range(60)]
    assert all(narrow_pages(shape) for shape in shapes)
    barred = set(narrow.barred())
    assert {(("page", 3),), (("types", "e5m2"),), (("types", "int8"), ("head_dim", 128))} <= barred
    wanted = {p for p in STATIC_PAIRS if not {p, p[:1], p[1:]} & barred}
    assert len(wanted) > 400
    assert held(shapes) == wanted


def tensor_cores(shape: Shape) -> bool:
    """A kernel whose products want whole tiles: it takes the second of a word's head sizes, if not beside int8."""
    tile = 64 if shape.types == "int8" else 16
    return shape.types in ("bf16", "f16", "int8") and shape.page % 8 == 0 and shape.head_dim % tile == 0


def powers_of_two(shape: Shape) -> bool:
    """A kernel that takes neither the first nor the second number of some words."""
    return all(n & (n - 1) == 0 for n in (shape.page, shape.kv_heads, shape.group, shape.head_dim))


@pytest.mark.parametrize("taken", [tensor_cores, powers_of_two])
def test_a_kernel_that_takes_some_numbers_of_a_word_is_given_shapes_without_end(taken) -> None:
    picky = Stream(0, taken)
    shapes = [picky.shape(index) for index in range(100)]
    assert all(shape is not None and taken(shape) for shape in shapes)
    assert not picky.ended
    barred = set(picky.barred())
    assert (("head_dim", "72-112"),) in barred if taken is powers_of_two else (("kv_heads", "3-8"),) not in barred
    assert held(shapes) == {p for p in STATIC_PAIRS if not {p, p[:1], p[1:]} & barred}


def test_a_kernel_that_takes_nothing_ends_the_stream_for_good() -> None:
    asked = []
    stream = Stream(0, lambda shape: asked.append(shape) or False)
    assert stream.shape(0) is None
    questions = len(asked)
    assert stream.shape(0) is None
    assert len(asked) == questions


@pytest.mark.parametrize("seed", range(4))
def test_forty_compilations_go_into_any_ten_thousand_cases(seed: int) -> None:
    """A shape is a compilation, and one of `RECOMPILED_ROWS` rows may be three; illegal arguments compile nothing."""
    shapes = first_shapes(seed, wanted_shapes(40_000))
    compiled = [0, *itertools.accumulate(3 if shape.tokens == RECOMPILED_ROWS else 1 for shape in shapes)]
    assert compiled[wanted_shapes(9_999)] > wanted_shapes(9_999)  # from the start, those relations are asked for
    assert compiled[wanted_shapes(9_999)] + AHEAD <= 40
    for first in range(0, 30_000, 100):
        last = first + 10_000
        assert compiled[wanted_shapes(last)] - compiled[wanted_shapes(first)] <= 40, (first, last)


@pytest.mark.parametrize(("cases", "size", "share"), [(16_425, "pairs", 1.0), (180_000, "triples", 0.95)])
def test_pairs_are_complete_within_two_minutes_of_cases_and_triples_nearly_within_fifteen(cases, size, share) -> None:
    """At 134 cases a second, and later 200. Sixty plans of each shape open then stand for all of a campaign."""
    chance, cover = random.Random(0), Coverage()
    for shape in first_shapes(0, wanted_shapes(cases)):
        for _ in range(60):
            cover.add(styled(shape, chance.randrange(STYLES), chance.randrange(2**20)), None)
    seen, valid = cover.share() if size == "pairs" else cover.triple_share()
    assert seen >= share * valid, (seen, valid)


def test_what_is_wanted_is_compiled_once_and_waited_for() -> None:
    compiled = []

    def warm(shape) -> None:
        compiled.append(shape)
        if shape == POOL[1]:
            raise ValueError("its case will show it")

    ahead = Ahead(warm)
    ahead.wait(POOL[0])  # nobody wanted it
    ahead.want(POOL[:3])
    ahead.want(POOL[:4])
    for count, shape in enumerate(POOL[:4], 1):
        ahead.wait(shape)
        assert set(POOL[:count]) <= set(compiled)
    assert sorted(map(POOL.index, compiled)) == [0, 1, 2, 3]
    ahead.end()
    assert not ahead.thread.is_alive()


def test_who_waits_compiles_what_it_waits_for_and_then_what_comes_next() -> None:
    compiled, begun, others = [], threading.Event(), threading.Event()

    def warm(shape) -> None:
        compiled.append((shape, threading.current_thread()))
        if shape == POOL[0]:  # does not end before the others have
            begun.set()
            assert others.wait(60)
        elif len(compiled) == 4:
            others.set()

    ahead = Ahead(warm)
    ahead.want(POOL[:1])
    assert begun.wait(60)
    ahead.want(POOL[1:4])
    ahead.wait(POOL[2])
    ahead.wait(POOL[0])
    me = threading.current_thread()
    assert compiled == [(POOL[0], ahead.thread), (POOL[2], me), (POOL[1], me), (POOL[3], me)]
    ahead.end()


@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"sinks": True}], ids=str)
def test_relations_run_the_programs_that_are_compiled_ahead(changes) -> None:
    shape = dataclasses.replace(POOL[0], tokens=RECOMPILED_ROWS, window=None, sinks=False)
    shape = dataclasses.replace(shape, **changes)
    asked = set()
    for seed in range(100):
        plan = expand(shape, "normal", MODES[seed % len(MODES)], "relation", seed % 8, seed)
        case = build(plan)
        if picked := pick(plan, case):
            asked |= {signature_of(case), signature_of(picked[1].case)}
    assert asked == {signature_of(build(Plan(shape, ((1, 1),)))), *map(signature_of, recompiled(shape))}
    assert recompiled(dataclasses.replace(shape, tokens=RECOMPILED_ROWS - 1)) == []


def test_coverage_counts_a_pair_once_and_only_if_it_can_exist() -> None:
    cover = Coverage()
    plan = expand(POOL[0], "spikes", "mixed", CHECKS[0], 3, 11)
    assert cover.add(plan, 0.25) > 0
    assert cover.add(plan, 0.5) == 0
    assert cover.worst["data", "spikes"] == 0.5
    assert cover.seen <= valid_pairs()
    assert not possible((("page", 1), ("context", "inside")))
    seen, valid = cover.triple_share()
    assert 0 < seen < valid


@FEW
@given(st.sampled_from(POOL), st.sampled_from(MODES), st.integers(0, 7), st.integers(0, 2**20 - 1))
def test_features_of_a_plan_are_those_of_the_table(shape, mode, crowd, seed) -> None:
    from fuzz.coverage import AXES

    found = features(expand(shape, "normal", mode, "plain", crowd, seed))
    assert {axis for axis, _ in found} >= {*AXES} - {"rows", "context"}
    assert all(value in AXES[axis] for axis, value in found)


def test_what_the_stream_never_draws_is_no_feature() -> None:
    odd = SMALLEST.replace(shape=dataclasses.replace(SMALLEST.shape, head_dim=33, page=20))
    assert not {"head_dim", "page"} & {axis for axis, _ in features(odd)}
    assert Coverage().add(odd, None) > 0


@pytest.mark.parametrize("seed", range(20))
def test_the_first_plans_of_a_long_shape_surely_hold_a_long_context_and_few_of_the_others_do(seed: int) -> None:
    for shape in (s for s in first_shapes(0, 52) if s.capacity > FAR):
        first = first_plans(shape, random.Random(seed), FRESH)
        assert any(rows and context >= FAR - 1 for plan in first for rows, context in plan.lengths)
        later = [styled(shape, 17 * i, seed + 40_503 * i) for i in range(64)]
        long = [plan for plan in later if max((c for _, c in plan.lengths), default=0) >= FAR - 1]
        assert len(long) == 64 // far_of(shape)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_those_of_the_cast(name: str) -> None:
    """Every number of the type, every midpoint of two, the float32 beside each, and numbers of any size."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    held = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    held = np.unique(held[np.isfinite(held)])
    middle = ((held[1:].astype(np.float64) + held[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    chance = np.random.default_rng(0)
    anything = chance.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    anything = np.clip(anything[np.isfinite(anything)], held[0], held[-1])
    for numbers in (held, -held, middle, *beside, anything):
        assert np.array_equal(_eight_bits(numbers, dtype).view(np.uint8), numbers.astype(dtype).view(np.uint8))
