"""The tuner: judged before timed, duplicates dropped, a margin asked for, time kept to; on fake programs and clocks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest
import small_call

from fuzz import verifier
from rpa import (
    AutotunePolicy,
    ConfigCache,
    ConfigSelectorChain,
    RaggedPageAttentionv2Config,
    Tuner,
    api,
    kernel_registry,
    ragged_page_attention_v2,
    select,
)
from rpa.device import current
from rpa.tune import TuningFailed, why_not


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Fake:
    """A program that looks like a jitted one, costs what it says, and counts its calls."""

    clock: Clock
    seconds: float
    text: str = ""
    output: float = 1.0
    error: str = ""
    compile_seconds: float = 0.0
    jitter: tuple[float, ...] = (0.0,)
    calls: int = 0
    samples: list[float] = field(default_factory=list)

    def lower(self, *args, **kwargs):
        return self

    def as_text(self):
        return self.text or str(id(self))

    def compile(self):
        self.clock.now += self.compile_seconds
        if self.error:
            raise RuntimeError(self.error)
        return self

    def __call__(self, *args, **kwargs):
        self.clock.now += self.seconds + self.jitter[self.calls % len(self.jitter)]
        self.calls += 1
        return self.output


def _tune(programs: dict, clock: Clock, **changes):
    tuner = Tuner(**{"warmup": 1, "iters": 20, "clock": clock, **changes})
    return tuner.autotune(programs.__getitem__, (), {}, list(programs)), tuner.history[-1]


def test_the_fastest_wins_when_it_is_clearly_faster():
    clock = Clock()
    winner, report = _tune(
        {"first": Fake(clock, 2.0), "fast": Fake(clock, 1.0), "slow": Fake(clock, 3.0)}, clock, budget=1e9
    )
    assert winner == "fast"
    assert "100.0% faster than the heuristic" in report.reason


def test_a_gain_within_the_margin_keeps_the_first():
    clock = Clock()
    winner, report = _tune({"first": Fake(clock, 1.01), "other": Fake(clock, 1.0)}, clock, budget=1e9)
    assert winner == "first"
    assert "are needed past the noise" in report.reason


def test_a_gain_within_the_noise_keeps_the_first():
    clock = Clock()
    one, other = (tuple(np.random.default_rng(seed).uniform(0, 1.0, 61)) for seed in (0, 1))
    programs = {"first": Fake(clock, 1.1, jitter=one), "other": Fake(clock, 1.0, jitter=other)}
    assert _tune(programs, clock, iters=10, budget=1e9)[0] == "first"


@pytest.mark.parametrize("moves", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_a_clock_that_stands_still_or_goes_wrong_keeps_the_first(moves):
    clock = Clock()
    assert _tune({"first": Fake(clock, moves), "other": Fake(clock, moves)}, clock, budget=1e9)[0] == "first"


def test_rounds_go_through_all_candidates_so_that_drift_hits_all_alike():
    clock = Clock()
    # A machine that gets slower all the time: timed one after the other, the first would look fastest.
    programs = {"first": Fake(clock, 1.0), "other": Fake(clock, 0.5)}
    tuner = Tuner(warmup=0, iters=10, clock=lambda: clock.now**2, budget=1e18)
    assert tuner.autotune(programs.__getitem__, (), {}, ["first", "other"]) == "other"


def test_calls_are_warmup_and_iters():
    clock = Clock()
    program = Fake(clock, 1.0)
    _tune({"only": program}, clock, warmup=3, iters=20, budget=1e9)
    assert program.calls == 1 + 3 + 20


def test_a_wrong_candidate_is_never_timed_however_fast():
    clock = Clock()
    programs = {"first": Fake(clock, 2.0), "wrong": Fake(clock, 0.1, output=9.0)}
    winner, report = _tune(
        programs, clock, budget=1e9, verify=lambda fn, args, output: "it is 9" if output == 9.0 else None
    )
    assert winner == "first"
    assert [(t.status, t.detail, t.seconds == []) for t in report.trials][1] == ("wrong", "it is 9", True)


def test_equal_lowered_texts_are_timed_once():
    clock = Clock()
    programs = {
        "first": Fake(clock, 1.0, text="a"),
        "same": Fake(clock, 0.1, text="a"),
        "other": Fake(clock, 1.0),
    }
    winner, report = _tune(programs, clock, budget=1e9)
    assert winner == "first"
    assert report.counts() == {"timed": 2, "duplicate": 1}
    assert programs["same"].calls == 0


def test_failures_are_counted_and_shown():
    clock = Clock()
    programs = {
        "first": Fake(clock, 1.0),
        "broken": Fake(clock, 1.0, error="no such instruction"),
        "big": Fake(clock, 1.0, error="RESOURCE_EXHAUSTED: 300000 bytes of shared memory"),
    }
    _, report = _tune(programs, clock, budget=1e9)
    assert report.counts() == {"timed": 1, "failed": 1, "out of resources": 1}
    assert report.trials[1].detail == "RuntimeError: no such instruction"


def test_when_all_fail_the_error_holds_each_ones_own():
    clock = Clock()
    programs = {"a": Fake(clock, 1.0, error="first trouble"), "b": Fake(clock, 1.0, error="second trouble")}
    with pytest.raises(TuningFailed, match=r"(?s)first trouble.*second trouble"):
        _tune(programs, clock)
    with pytest.raises(TuningFailed, match="no candidates"):
        _tune({}, clock)


def test_the_budget_ends_compiling_and_timing():
    clock = Clock()
    programs = {name: Fake(clock, 1.0, compile_seconds=40.0) for name in range(5)}
    _, report = _tune(programs, clock, budget=100.0)
    assert report.counts() == {"timed": 2, "out of budget": 3}
    assert clock.now < 200


def test_hopeless_candidates_are_dropped_early():
    clock = Clock()
    programs = {"first": Fake(clock, 1.0), "hopeless": Fake(clock, 50.0)}
    _tune(programs, clock, warmup=0, iters=20, budget=1e9)
    assert programs["hopeless"].calls == 1 + 2  # judged, and one round of two


def test_a_candidate_ten_times_slower_is_not_even_timed():
    clock = Clock()
    programs = {"first": Fake(clock, 1.0), "hopeless": Fake(clock, 11.0), "slow": Fake(clock, 9.0)}
    _, report = _tune(programs, clock, warmup=3, budget=1e9)
    assert report.counts() == {"timed": 2, "hopeless": 1}
    assert programs["hopeless"].calls == 2
    assert "11 s" in report.trials[1].detail


def test_one_wall_time_condemns_no_short_call():
    """Twenty times as long, but microseconds: that is the host's doing, and both are timed."""
    clock = Clock()
    _, report = _tune({"first": Fake(clock, 1e-5), "held up": Fake(clock, 2e-4)}, clock, warmup=3, budget=1e9)
    assert report.counts() == {"timed": 2}


def test_one_hopeless_config_of_a_platform_speaks_for_the_others():
    clock = Clock()
    configs = [RaggedPageAttentionv2Config(num_warps=n, platform=name) for name in ("triton", "xla") for n in (1, 2)]
    programs = {cfg: Fake(clock, 1.0 if cfg.platform == "triton" else 11.0) for cfg in configs}
    _, report = _tune(programs, clock, budget=1e9)
    assert report.counts() == {"timed": 2, "hopeless": 2}
    assert programs[configs[3]].calls == 0


def test_a_run_cut_short_before_it_compared_anything_decides_nothing():
    clock = Clock()
    programs = {name: Fake(clock, 1.0, compile_seconds=60.0) for name in range(3)}
    assert not _tune(programs, clock, budget=100.0)[1].decided
    assert _tune(programs, clock, budget=1e9)[1].decided
    assert _tune({"only": Fake(clock, 1.0)}, clock, budget=1e9)[1].decided


def test_batches_are_timed_in_turn():
    seen = []

    class Program(Fake):
        def __call__(self, *args, **kwargs):
            seen.append(args)
            return super().__call__()

    clock, turns = Clock(), [("a",), ("b",), ("c",)]
    tuner = Tuner(warmup=0, iters=20, clock=clock, turns=turns, budget=1e9)
    tuner.autotune({"only": Program(clock, 1.0)}.__getitem__, ("a",), {}, ["only"])
    assert seen == [("a",), *[turns[i % 3] for i in range(20)]]


def test_the_device_is_held_while_it_runs_and_not_while_others_compile():
    held, log = [], []

    @contextlib.contextmanager
    def exclusive():
        held.append(True)
        yield
        held.pop()

    class Program(Fake):
        def compile(self):
            log.append(("compile", bool(held)))
            return self

        def __call__(self, *args, **kwargs):
            log.append(("run", bool(held)))
            return super().__call__()

    clock = Clock()
    programs = {"one": Program(clock, 1.0), "two": Program(clock, 1.0)}
    _tune(programs, clock, exclusive=exclusive, budget=1e9, verify=lambda *_: log.append(("judge", bool(held))))
    assert set(log) == {("compile", False), ("run", True), ("judge", False)}


@pytest.mark.parametrize("changes", [{"warmup": -1}, {"iters": 0}])
def test_impossible_counts_are_refused(changes):
    with pytest.raises(ValueError, match="at least 0 and 1"):
        Tuner(**changes)


def test_measure_times_a_real_program():
    assert 0 < Tuner(warmup=1, iters=10).measure(lambda x: x + 1, jnp.ones(8)) < 1


def test_a_tuner_without_judge_says_so(monkeypatch):
    monkeypatch.setattr("rpa.tune.installed_verifier", lambda: None)
    assert "rpa.verifier" in str(why_not(Tuner()))
    assert why_not(Tuner(verify=lambda *_: None)) is None
    assert why_not(object()) is None  # somebody else's tuner answers for itself


def test_the_oracle_is_declared_as_the_verifier():
    tomllib = pytest.importorskip("tomllib")
    with open("pyproject.toml", "rb") as file:
        points = tomllib.load(file)["project"]["entry-points"]
    assert points["rpa.verifier"] == {"oracle": "fuzz.verifier:verify"}
    assert callable(verifier.verify)


# ------------------------------------------------------------------ with the oracle as judge


def _call():
    call = small_call.arguments()
    arrays = (*call.values(), None, None, None)
    return api.prepare(arrays, (None, None, jnp.float32, False, None, None, None, True), False)


@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("what", ["output", "lse", "nobody"])
def test_the_verifier_sees_a_wrong_row(row, what):
    inputs, signature = _call()
    program = select.Attention(signature, current(), "xla").program(
        RaggedPageAttentionv2Config(num_queries_per_block=8, platform="xla")
    )
    output, lse = (np.array(array) for array in program(inputs))
    assert verifier.verify(program, (inputs,), (output, lse)) is None
    if what == "nobody":
        inputs = inputs._replace(num_seqs=np.array([1 if row == 0 else 2], np.int32))
        assert "belong to nobody" in str(verifier.verify(program, (inputs,), (output, lse)))
        return
    (output if what == "output" else lse)[row] += np.float32(0.001)
    assert "judged by the oracle" in str(verifier.verify(program, (inputs,), (output, lse)))


def test_the_verifier_keeps_to_its_work(monkeypatch):
    inputs, signature = _call()
    whole, _ = verifier.sample(inputs, signature)
    assert set(whole) == set(range(6))
    monkeypatch.setattr(verifier, "_WORK", 1.0)
    assert len(verifier.sample(inputs, signature)[0]) == 1
    idle = inputs._replace(num_seqs=np.array([0], np.int32))
    assert verifier.sample(idle, signature)[1] is None


def test_autotune_never_crowns_a_kernel_that_is_wrong():
    def shortcut(queries, *, num_warps=None, return_lse=False, **_):
        return (queries * 0, jnp.zeros(queries.shape[:2])) if return_lse else queries * 0  # fast, and wrong

    chain = ConfigSelectorChain(
        ConfigCache(),
        AutotunePolicy(cache_miss_fallback="autotune"),
        Tuner(warmup=0, iters=4, verify=verifier.verify, budget=300),
    )
    inputs, signature = _call()
    wide = RaggedPageAttentionv2Config(num_warps=8)
    kernel_registry.register("ragged_page_attention_v2", "cuda", "any", candidates=lambda signature, device: (wide,))(
        shortcut
    )
    try:
        choice = chain.find(select.Attention(signature, current(), inputs=inputs))
        report = chain.tuner.history[-1]
    finally:
        kernel_registry.unregister(shortcut)
    assert (choice.source, choice.config.platform) == ("autotune", "xla")
    fates = {(trial.config.platform, trial.status) for trial in report.trials}
    assert {status for platform, status in fates if platform == "cuda"} <= {"wrong", "duplicate"}
    assert ("cuda", "wrong") in fates
    answer = ragged_page_attention_v2(*inputs[:6], compute_dtype=jnp.float32, cfg=choice.config)
    assert np.isfinite(answer).all()
