"""The benchmarks' own promises: a wrong kernel has no number, a slowdown past the noise is told, a page is a page."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz.bench import arrays, ceilings, cells, clock, page, peers, record, run, session, watch, work
from fuzz.bench.clock import Timing
from oracle import Case, attend, judge
from rpa import ragged_page_attention_v2
from tests import bench_children

CEILINGS = ceilings.Ceilings("test", 0, 1e9, {"float32": 1e9, "bfloat16": 1e9}, {})
CELL = cells.decode("tiny", "full", 2, 40, page=8)
HERE = functools.partial(session.Options, patience=0.0)  # in this process


def oracle_kernel(wrong: float = 0.0, pause: float = 0.0):
    """A contender that answers by the oracle, `wrong` too large, `pause` seconds late."""

    def prepare(batch):
        case = Case(*[None if a is None else np.asarray(a) for a in batch.arguments()], **batch.options)

        def call(*_):
            time.sleep(pause)
            return attend(case)[0].astype(np.float32) + np.float32(wrong)

        return call, [()]

    return run.Contender("model", prepare, lambda batch: None, lambda batch: None)


@pytest.fixture(scope="module")
def batch():
    return arrays.make(CELL, cache_bytes=0)


def test_right_kernel_has_a_number(batch):
    result = run.one(batch, oracle_kernel(), CEILINGS, "cpu")
    assert result.status == "pass", result.reason
    assert result.time > 0
    assert result.fraction == result.floor / result.time


def test_wrong_kernel_has_no_number(batch):
    result = run.one(batch, oracle_kernel(wrong=1e-3), CEILINGS, "cpu")
    assert (result.status, result.seconds, result.samples) == ("fail", None, 0)
    assert "row" in result.reason


def test_crashing_kernel_is_a_line_of_the_record(batch):
    def prepare(batch):
        raise RuntimeError("out of memory")

    result = run.one(batch, dataclasses.replace(oracle_kernel(), prepare=prepare), CEILINGS, "cpu")
    assert (result.status, result.seconds) == ("error", None)
    assert "out of memory" in result.reason


def test_sampled_rows_are_the_batch_rows():
    """The small cases that judge a big batch have the big batch's answers: the oracle itself says so."""
    mixed = cells.mixed("tiny", "window f32", 3, 20, 40, ((9, 9), (5, 30)), page=4)
    batch = arrays.make(mixed, cache_bytes=0)
    whole, _ = attend(Case(*[None if a is None else np.asarray(a) for a in batch.arguments()], **batch.options))
    sampled = list(arrays.samples(batch, 12))
    assert len(sampled) >= 6
    assert len({heads.start for (_, heads), _ in sampled}) == 2, "every kv head has its turn"
    for (rows, heads), case in sampled:
        verdict = judge(case, whole[rows, heads].astype(np.float32))
        assert verdict.status == "pass", verdict.text


_DECODE, _WINDOW = cells.decode("llama3-8b", "full", 1, 512), cells.decode("gpt-oss", "local", 1, 512)
_MIXED = cells.mixed("llama3-8b", "full", 2, 60, 90, ((12, 12), (9, 50)))


@pytest.mark.parametrize(
    ("cell", "mutant"),
    [
        (_DECODE, "first_key_dropped"),
        (_WINDOW, "window_wide"),
        (_WINDOW, "window_narrow"),
        (_WINDOW, "sink_ignored"),
        (_MIXED, "causal_plus1"),
        (_MIXED, "klen_missing"),
        (_MIXED, "kv_tail_floor"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.label,
)
def test_slip_by_one_key_of_hundreds_has_no_number(cell, mutant):
    """In plain random data one key of 512 would vanish in the rounding of 16 bits."""
    found = run.one(_batch_of(cell), work._target(f"mutant:{mutant}"), CEILINGS, "cpu")
    assert (found.status, found.seconds) == ("fail", None), found


@functools.cache
def _batch_of(cell: cells.Cell) -> arrays.Batch:
    return arrays.make(cell, cache_bytes=0)


# ------------------------------------------------------------------ peers


def a_peer(wrong: float = 0.0):
    """Somebody's kernel in JAX, through an adapter as the search's are."""

    def adapter(q, kv, lens, tables, starts, num_seqs, sinks=None, **options) -> Any:
        output: Any = ragged_page_attention_v2(q, kv, lens, tables, starts, num_seqs, sinks, **options)
        return output + wrong

    adapter.supports = lambda case: "it takes no windows" if case.sliding_window else None  # type: ignore[attr-defined]
    return peers._contender("somebody", dataclasses.replace(peers.PEERS["ejkernel"]), adapter)


def test_peer_is_judged_like_ours(batch):
    right, wrong = (run.one(batch, a_peer(by), CEILINGS, "cpu") for by in (0.0, 0.01))
    assert (right.status, right.backend) == ("pass", "peer:somebody"), right.reason
    assert right.time > 0
    assert (wrong.status, wrong.seconds) == ("fail", None)


def test_peer_that_cannot_says_why():
    batch = arrays.make(cells.decode("tiny", "window f32", 1, 40, page=8), cache_bytes=0)
    assert run.one(batch, a_peer(), CEILINGS, "cpu").reason == "it takes no windows"


@pytest.mark.parametrize(
    ("cell", "able"),
    [
        (cells.decode("llama3-8b", "full", 1, 8), {"flashinfer fa2", "flashinfer decode", "fa3", "jax paged"}),
        (cells.decode("gpt-oss", "local", 1, 8), {"flashinfer fa2", "fa3"}),
        (cells.decode("gpt-oss", "global", 1, 8), {"fa3"}),
        (cells.mixed("llama3-8b", "full", 2, 8, 16, ((4, 4),)), {"flashinfer fa2", "fa3", "fa3 two calls"}),
        (cells.decode("tiny", "full", 1, 8), {"jax paged"}),
    ],
)
def test_peers_are_timed_where_they_can(cell, able):
    batch = arrays.make(cell, cache_bytes=0)
    asked = ("flashinfer fa2", "flashinfer decode", "fa3", "fa3 two calls", "jax paged")
    assert {name for name in asked if peers.PEERS[name].gap(None, batch) is None} == able


# ------------------------------------------------------------------ floors


def test_floors_count_what_is_seen():
    cell = cells.prefill("tiny", "full", 1, 4)  # 4 query heads, 2 kv heads, D 32, f32
    assert cell.flops == 4 * 32 * 4 * (1 + 2 + 3 + 4)
    assert cell.kv_bytes == 4 * 2 * 2 * 32 * 4
    assert cell.bytes == cell.kv_bytes + 2 * 4 * 4 * 32 * 4


def test_floors_follow_the_window():
    cell = cells.decode("gpt-oss", "local", 2, 1000)
    assert cell.read_tokens == 2 * 128
    assert cell.flops == 4 * 64 * 64 * 2 * 128


def test_names_are_unique():
    for chip in ("cpu", "gpu"):
        names = [cell.name for cell in cells.cells_for(chip)]
        assert len(names) == len(set(names))


# ------------------------------------------------------------------ comparison


def result(seconds: float | None = 1.0, spread: float = 0.01, **changes) -> run.Result:
    known = {"cell": CELL.name, "backend": "xla", "status": "pass" if seconds else "fail", "ratio": 0.5, "floor": 0.5,
             "bytes": 10, "flops": 10, "tags": run._tags(CELL)}  # fmt: skip
    return run.Result(**(known | {"seconds": seconds, "spread": spread} | changes))


def made(*results: run.Result) -> record.Record:
    return record.of(list(results), CEILINGS)


@pytest.mark.parametrize(
    ("seconds", "spread", "told"),
    [(1.10, 0.01, True), (1.04, 0.01, False), (1.10, 0.08, False), (1.30, 0.08, True), (0.8, 0.01, False)],
)
def test_slower_past_threshold_and_noise(seconds, spread, told):
    comparison = record.compare(made(result(1.0, spread)), made(result(seconds, spread)))
    assert comparison.failed is told


def test_slower_peer_is_no_regression_of_ours():
    before, after = (made(result(), result(s, backend="peer:somebody")) for s in (1.0, 2.0))
    assert not record.compare(before, after).failed


def test_cell_that_lost_its_number_fails():
    assert record.compare(made(result()), made(result(None))).failed


def test_records_of_two_devices_are_not_compared():
    other = dataclasses.replace(made(result()), ceilings=dataclasses.replace(CEILINGS, device="another"))
    with pytest.raises(record.RecordError, match="two devices: test and another"):
        record.compare(made(result()), other)


def test_noise_is_told_by_the_samples():
    calm, busy = [1.0, 1.001, 1.002, 1.003], [1.0, 1.3, 1.6, 1.9]
    for of in (Timing.least, Timing.middle):
        assert of(calm).spread < 0.05 < of(busy).spread


def busy_machine(monkeypatch, seed: int, slower: float = 1.0) -> run.Result:
    """A result timed where the machine's pace wanders by half, every sample by 5 %, and one in eight is disturbed."""
    random = np.random.default_rng(seed)
    pace = random.uniform(1, 3) * np.exp(np.cumsum(random.normal(0, 0.02, 5000)))
    drawn = iter(range(5000))

    def sample(call, turn: int, repeats: int) -> tuple[float, float]:
        own = call(turn) * pace[next(drawn)] * random.lognormal(0, 0.05)
        return own * (1 + (random.random() < 0.125) * random.exponential(1.0)), own * 1.7

    monkeypatch.setattr(clock, "_sample", sample)
    monkeypatch.setattr(clock, "_repeats", lambda call: 1)
    timing = clock.paired(lambda turn: 1e-3 * slower, lambda turn: 3e-3, budget=0.0, at_least=1200)
    return result(timing.seconds, timing.spread, beside=timing.beside)


def test_slowdown_of_a_cell_is_told_on_a_busy_machine_and_nothing_else(monkeypatch):
    """Plain times of these runs differ by up to three times; beside the yardstick, 15 % are seen in one cell alone."""
    honest = [busy_machine(monkeypatch, seed) for seed in range(12)]
    slow = [busy_machine(monkeypatch, seed, 1.15) for seed in range(12, 24)]
    assert max(r.time for r in honest) > 1.5 * min(r.time for r in honest)
    for base, same, worse in zip(honest, honest[1:] + honest[:1], slow, strict=True):
        assert not record.compare(made(base), made(same)).failed
        assert record.compare(made(base), made(worse)).failed
        noise = {change.clock: change.noise for change in record.compare(made(base), made(worse)).changes}
        assert noise["cpu"] < 0.12 > noise["wall"] - record.BETWEEN["wall"]


def test_kernel_that_waits_is_told_by_the_wall_alone():
    def beside(wall: float, cpu: float) -> run.Result:
        each = {"yardstick": 1.0, "noise": 0.01, "version": 1}
        return result(wall, beside={"wall": each | {"seconds": wall}, "cpu": each | {"seconds": cpu}})

    asleep = record.compare(made(beside(1.0, 1.0)), made(beside(1.2, 1.0)))
    assert [change.clock for change in asleep.regressions] == ["wall"]
    assert [c.clock for c in record.compare(made(beside(1.0, 1.0)), made(beside(1.0, 1.1))).regressions] == ["cpu"]
    # More threads at once: more CPU time, and done sooner.
    assert not record.compare(made(beside(1.0, 1.0)), made(beside(0.8, 1.1))).failed


def test_records_of_two_yardsticks_compare_plain_times():
    then, now = ({"wall": {"seconds": 1.0, "yardstick": 1.0, "noise": 0.0, "version": v}} for v in (1, 2))
    (change,) = record.compare(made(result(beside=then)), made(result(1.2, beside=now))).changes
    assert (change.clock, change.ratio, change.noise) == ("time", 1.2, 0.02)


def test_what_looks_slower_is_measured_again(monkeypatch, capsys):
    """A disturbance does not come twice: the second measurement counts, unless it is the slower one."""
    base, slow, fast = made(result(1.0)), made(result(1.5)), made(result(1.01))
    runs = iter([fast, slow])
    monkeypatch.setattr(session, "_measure", lambda *asked: next(runs))
    console = session.Console()
    assert session._confirmed(console, session.Options(), base, slow).results == fast.results
    assert session._confirmed(console, session.Options(), base, slow).results == slow.results
    assert session._confirmed(console, session.Options(), base, fast) == fast
    assert "measured again" in capsys.readouterr().out


def test_one_lucky_kernel_is_no_speed():
    lucky = [0.5, *[1.0] * 9]
    assert Timing.middle(lucky).seconds == Timing.least(lucky).seconds == 1.0


def test_slowdown_that_hides_in_the_noise_of_each_cell_is_told_by_their_mean():
    names = [f"cell {i}" for i in range(20)]
    before, after = (made(*(result(s, 0.08, cell=name) for name in names)) for s in (1.0, 1.1))
    comparison = record.compare(before, after)
    assert not any(change.regressed for change in comparison.changes)
    assert comparison.failed
    assert [change.cell for change in comparison.regressions] == ["geometric mean of 20 cells"]


def test_killed_run_resumes(tmp_path, monkeypatch):
    """What the record holds is not measured again; what it lacks is."""
    other, counted = cells.decode("tiny", "full", 1, 24, page=8), []
    monkeypatch.setattr(ceilings, "measure", lambda: CEILINGS)
    monkeypatch.setattr(cells, "cells_for", lambda chip: [CELL, other])
    monkeypatch.setattr(work, "contenders_on", lambda *asked: [oracle_kernel()])
    one = run.one
    monkeypatch.setattr(run, "one", lambda batch, *rest: counted.append(batch.cell.name) or one(batch, *rest))
    path = tmp_path / "a.json"
    path.write_text(made(result(backend="model")).to_json())
    assert session.main(HERE(json=path, resume=True)) == session.PASS
    assert counted == [other.name]
    assert {r.cell for r in record.load(path).results} == {CELL.name, other.name}


def test_accelerators_prepare_a_group_of_cells_before_they_time_one(monkeypatch):
    """Compiling takes every core; timing wants a quiet machine. No group holds more pools than fit."""
    cells_here = [cells.decode("tiny", "full", 1, 8 * n, page=8) for n in (1, 2, 3)]
    said = []
    kernel = oracle_kernel()
    prepare, time = kernel.prepare, run._time
    told = dataclasses.replace(kernel, prepare=lambda b: said.append(f"compile {b.cell.label}") or prepare(b))
    monkeypatch.setattr(run, "_AT_ONCE", 2)
    monkeypatch.setattr(run, "_time", lambda b, *rest: said.append(f"time {b.cell.label}") or time(b, *rest))
    events = list(run.run([(cell, [told]) for cell in cells_here], CEILINGS, "tpu"))
    assert [what.status for kind, what in events if kind == "result"] == ["pass"] * 3
    assert sorted(said[:2]) == ["compile b1x16", "compile b1x8"]
    assert said[2:] == ["time b1x8", "time b1x16", "compile b1x24", "time b1x24"]
    monkeypatch.setattr(run, "_HELD_BYTES", 0)
    assert [len(group) for group in run._groups([(cell, []) for cell in cells_here], 8)] == [1, 1, 1]


def test_what_crashes_or_hangs_costs_its_own_line_only(monkeypatch):
    """Each child ends at its first bad contender; the next goes on behind it, and measures no ceilings again."""
    monkeypatch.setattr(watch, "serve", bench_children.serve)
    events: list[Any] = []

    def heard(child, seconds: float) -> bool:  # no clock: a child is silent when it says that it will be
        return events[-1:] != [("tick", bench_children.HANGS)] and child.pipe.poll(None)

    monkeypatch.setattr(watch, "_heard", heard)
    for event in watch.watched(work.Settings(), patience=3.0):
        events.append(event)
    lines = {(r.cell, r.backend): r for kind, r in events if kind == "result"}
    assert [lines[cell, name].status for cell in ("one", "two") for name in "abc"] == ["pass", "error", "error"] * 2
    assert "SIGABRT" in lines["one", "b"].reason
    assert "hung: silent for 3 s" in lines["two", "c"].reason
    assert len(lines) == sum(kind == "result" for kind, _ in events)


def test_child_that_cannot_begin_is_told(monkeypatch):
    monkeypatch.setattr(watch, "serve", bench_children.broken)
    ((kind, what),) = watch.watched(work.Settings(), 10.0)
    assert (kind, what.partition(":")[0]) == ("broken", "exit code 1")


def test_record_of_other_versions_is_not_resumed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(dataclasses.replace(made(result()), versions={"jax": "0.1"}).to_json())
    with pytest.raises(record.RecordError, match=r"jax 0\.1 then"):
        record.resumed(path)


def test_few_rows_of_long_contexts_are_judged():
    batch = arrays.make(cells.prefill("tiny", "full", 1, 64, on=arrays.JUDGED_KEYS // 4), cache_bytes=0)
    assert 1 <= len(batch.judged) <= 4


# ------------------------------------------------------------------ files and page


def test_record_survives_its_file(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(made(result()).to_json())
    assert record.load(path) == made(result())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_foreign_file_is_named(tmp_path, text):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(record.RecordError, match=r"foreign\.json"):
        record.load(path)


def test_missing_compare_file_is_a_usage_error(tmp_path, capsys):
    assert session.main(HERE(compare=tmp_path / "none.json")) == session.USAGE
    assert "none.json" in capsys.readouterr().out.replace("\n", "")


def test_unknown_platform_is_a_usage_error(capsys):
    assert session.main(HERE(platforms=("tritn",))) == session.USAGE
    assert "tritn" in capsys.readouterr().out


def test_page_is_self_contained():
    peer = result(0.9, backend="peer:other")
    before, after = made(result(), peer), made(result(1.5), peer, result(None, cell="lost <cell>"))
    text = page.render(after, record.compare(before, after), [before], session._static())
    for word in (
        "Roofline",
        "Against the peers",
        "History",
        "No number",
        "lost &lt;cell&gt;",
        "1.500",
        "static estimates",
    ):
        assert word in text
    fetched = [url for url in re.findall(r"""(?:src|href)=["'](.+?)["']""", text) if not url.startswith("#")]
    assert not fetched, "the page must fetch nothing"
    assert "<script" not in text


def test_session_writes_record_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda: CEILINGS)
    monkeypatch.setattr(cells, "cells_for", lambda chip: [CELL])
    monkeypatch.setattr(work, "contenders_on", lambda *asked: [oracle_kernel()])
    json_path, html_path = tmp_path / "a.json", tmp_path / "a.html"
    assert session.main(HERE(json=json_path, html=html_path)) == session.PASS
    assert json.loads(json_path.read_text())["results"][0]["status"] == "pass"
    monkeypatch.setattr(work, "contenders_on", lambda *asked: [oracle_kernel(wrong=1.0)])
    assert session.main(HERE(compare=json_path)) == session.FAIL


# ------------------------------------------------------------------ from a record to the README


@pytest.fixture
def figures(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("figures", Path(__file__).parent / "bench" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    return module


def test_new_record_ships_under_its_device(figures, tmp_path):
    """One command from `rpa bench --json` to the README: its block is then that record's."""
    ours, peer = result(1e-5, backend="triton"), result(2e-5, backend="peer:fa3 scheduled")
    limits = dataclasses.replace(CEILINGS, device="NVIDIA H200")
    new = tmp_path / "new.json"
    new.write_text(dataclasses.replace(made(ours, peer, result(None, backend="pallas_gpu")), ceilings=limits).to_json())
    assert figures.ship(new) == tmp_path / "h200.json"
    text = figures.filled("<!-- figures:h200 -->\nold\n<!-- /figures -->")
    assert f"| `{CELL.name}` | 500,000.0 | - | 10.0 (0.50) | 20.0 |\n" in text
    assert "old" not in text


def test_other_pages_have_a_table_of_their_own(figures, tmp_path):
    """One row a batch: page 16 beside every peer, then our kernels at the other page sizes."""
    small, large = (dataclasses.replace(CELL, page_size=size) for size in (16, 64))
    limits = dataclasses.replace(CEILINGS, device="NVIDIA H200")
    lines = [dataclasses.replace(result(t, backend=name), cell=cell.name)
             for cell, t in ((small, 1e-5), (large, 3e-5)) for name in ("triton", "peer:vllm")]  # fmt: skip
    new = tmp_path / "new.json"
    new.write_text(dataclasses.replace(made(*lines), ceilings=limits).to_json())
    figures.ship(new)
    text = figures.h200()
    assert "| cell | Mosaic GPU, page 64 | Triton, page 64 |" in text
    assert f"| `{small.name.replace('/p16', '')}` | - | 30.0 (1.00) |" in text
    assert text.count(f"`{large.name}`") == 0


@pytest.mark.parametrize(("results", "why"), [((result(None),), "no line of it"), ((result(),), "a record of test")])
def test_record_without_a_place_does_not_ship(figures, tmp_path, results, why):
    new = tmp_path / "new.json"
    new.write_text(made(*results).to_json())
    with pytest.raises(record.RecordError, match=why):
        figures.ship(new)
    assert not (tmp_path / "cpu.json").exists()
