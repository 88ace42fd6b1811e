"""The replay's server: what it hands to a kernel is what a server would, page by page and slot by slot."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fuzz.models import MODELS
from fuzz.serve import Limits, Scale, Scheduler, Step
from fuzz.trace import BLOCK_TOKENS, Request
from fuzz.traffic import PagedCache, case_of, twice
from oracle import attend
from oracle.poison import seen_slots

TINY = MODELS["tiny"]
STEADY = settings(deadline=None)  # a busy machine is no failure


@st.composite
def servers(draw):
    """A small server and requests that press on every limit of it; some share prompt blocks, some do not fit."""
    page = draw(st.sampled_from([1, 4, 16]))
    wide = draw(st.integers(2, 12))
    limits = Limits(
        tokens=draw(st.integers(1, 24)),
        seqs=draw(st.integers(1, 5)),
        pages=draw(st.integers(wide, 2 * wide)),
        pages_per_seq=wide,
        page_size=page,
    )
    shrink = BLOCK_TOKENS // draw(st.sampled_from([page, 2 * page]))
    chains = draw(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8))
    requests, clock = [], 0.0
    for chain in chains:
        ids = tuple(int("1" + "".join(map(str, chain[: i + 1]))) for i in range(len(chain)))  # equal prefix, equal id
        prompt = draw(st.integers(1, max(1, len(ids)) * BLOCK_TOKENS + 5 * shrink))
        requests.append(Request(clock, prompt, draw(st.integers(1, 10)), ids))
        clock += draw(st.sampled_from([0.0, 1.0, 7.0]))
    return limits, Scale(shrink, 1), requests


def scheduler_of(server, seed=0) -> Scheduler:
    limits, scale, requests = server
    return Scheduler(requests, limits, scale, 1.0, seed)


def steps_of(scheduler: Scheduler) -> list[Step]:
    return list(scheduler.steps())


@STEADY
@given(servers())
def test_a_step_keeps_within_the_static_shapes(server):
    limits = server[0]
    for step in scheduler_of(server).steps():
        assert 0 < step.rows <= limits.tokens
        assert 0 < len(step.spans) <= limits.seqs
        assert len({span.request for span in step.spans}) == len(step.spans)
        for span in step.spans:
            assert 0 <= span.start < span.stop <= limits.capacity
            assert len(span.pages) == math.ceil(span.stop / limits.page_size) <= limits.pages_per_seq
            assert len(set(span.pages)) == len(span.pages)


@STEADY
@given(servers())
def test_the_pool_neither_loses_nor_invents_pages(server):
    scheduler = scheduler_of(server)
    pool = scheduler.pool
    for _ in scheduler.steps():
        holders = defaultdict(int)
        for sequence in scheduler.running:
            for page in sequence.pages:
                holders[page] += 1
        assert [holders[page] for page in range(server[0].pages)] == pool.references
        assert sorted(pool.free) == [page for page, count in enumerate(pool.references) if count == 0]
    assert len(pool.free) == server[0].pages


@STEADY
@given(servers())
def test_every_request_that_fits_is_served_whole(server):
    limits, scale, requests = server
    scheduler = scheduler_of(server)
    last = {}
    for step in scheduler.steps():
        for span in step.spans:
            before = last.get(span.request)
            # A sequence goes on where it stopped; only one that was preempted starts over.
            if before is None:
                assert span.start % limits.page_size == 0, "a new sequence starts behind whole shared pages"
            else:
                assert span.start == before.stop or span.resumed
            last[span.request] = span
    shrunk = [scale.apply(request) for request in requests]
    fitting = {i: r for i, r in enumerate(shrunk) if r.prompt + r.output <= limits.capacity}
    assert {i: span.stop for i, span in last.items()} == {i: r.prompt + r.output - 1 for i, r in fitting.items()}
    assert scheduler.counts["finished"] == len(fitting)
    assert scheduler.skipped.total() == len(requests) - len(fitting)


@STEADY
@given(servers())
def test_every_slot_a_row_sees_holds_what_was_written_for_it(server):
    """A shadow of the cache: after the step's writes, each sequence finds its own tokens, and nothing unwritten."""
    limits, scale, requests = server
    shadow = {}
    for step in scheduler_of(server).steps():
        for page in step.freed:
            shadow = {slot: content for slot, content in shadow.items() if slot[0] != page}
        for write in step.writes:
            for slot in range(write.lo, write.hi):
                assert shadow.get((write.page, slot), write.content) == write.content, "a live slot was overwritten"
                shadow[write.page, slot] = write.content
        for span in step.spans:
            blocks = requests[span.request].blocks
            for token in range(span.stop):
                i, slot = divmod(token, limits.page_size)
                end = (i + 1) * limits.page_size
                block = (end * scale.prompt - 1) // BLOCK_TOKENS
                shared = end <= span.prompt and block < len(blocks)
                expected = ("block", i, blocks[block]) if shared else ("own", span.request, i)
                assert shadow[span.pages[i], slot] == expected


@STEADY
@given(servers(), st.integers(0, 3))
def test_the_same_seed_gives_the_same_steps(server, seed):
    assert steps_of(scheduler_of(server, seed)) == steps_of(scheduler_of(server, seed))


@pytest.mark.parametrize("what", ["shared pages", "preempted", "waited for pages"])
def test_the_servers_above_come_to_all_that_the_properties_are_about(what):
    def reached(server) -> bool:
        scheduler = scheduler_of(server)
        return bool(steps_of(scheduler)) and scheduler.counts[what] > 0

    find(servers(), reached, settings=settings(phases=[Phase.generate], max_examples=1000, deadline=None))


def test_requests_with_equal_blocks_share_pages_until_the_last_one_ends():
    limits = Limits(tokens=64, seqs=4, pages=64, pages_per_seq=32, page_size=16)
    blocks = 512 // 16
    requests = [
        Request(0.0, 8 * 512, 40, (*range(7), 100)),
        Request(20.0, 8 * 512, 2, (*range(7), 200)),  # arrives when the first has prefilled
    ]
    assert blocks * 16 == 512
    steps = steps_of(Scheduler(requests, limits, Scale(32, 1), 1.0))
    both = [{span.request: span for span in step.spans} for step in steps if len(step.spans) == 2]
    assert both
    for spans in both:
        # 512 / 32 tokens a block is one page: seven equal blocks are seven shared pages, the eighth is apart.
        assert spans[0].pages[:7] == spans[1].pages[:7]
        assert not set(spans[0].pages[7:]) & set(spans[1].pages[7:])
    first = both[0][1]
    assert first.start == 7 * 16, "shared tokens are not computed again"
    assert not {write.page for step in steps if step.clock >= 20.0 for write in step.writes} & set(first.pages[:7])
    ends = [step.index for step in steps if any(span.request == 1 for span in step.spans)][-1]
    after = [step for step in steps if step.index > ends]
    assert not set(both[0][0].pages[:7]) & {page for step in after for page in step.freed}, "the first still owns them"
    assert all(step.shared() == 7 for step in steps if len(step.spans) == 2)


def test_one_token_is_left_to_query_with_when_the_whole_prompt_is_shared():
    limits = Limits(tokens=16, seqs=2, pages=16, pages_per_seq=8, page_size=16)
    twins = [Request(0.0, 1024, 9, (1, 2)), Request(5.0, 1024, 1, (1, 2))]
    steps = steps_of(Scheduler(twins, limits, Scale(32, 1), 1.0))
    second = next(span for step in steps for span in step.spans if span.request == 1)
    assert (second.start, second.stop) == (16, 28), "page 0 is shared; page 1 holds the last prompt token"


def test_a_full_pool_preempts_the_latest_and_resumes_it():
    limits = Limits(tokens=8, seqs=4, pages=6, pages_per_seq=6, page_size=4)
    requests = [Request(0.0, 6, 14, ()), Request(0.0, 6, 14, ())]
    scheduler = Scheduler(requests, limits, Scale(), 1.0)
    steps = steps_of(scheduler)
    assert scheduler.counts["preempted"] > 0
    assert scheduler.counts["finished"] == 2
    resumed = [span for step in steps for span in step.spans if span.resumed]
    assert {span.request for span in resumed} == {1}
    assert resumed[0].start == 0


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_chunks():
    limits = Limits(tokens=16, seqs=4, pages=64, pages_per_seq=32, page_size=4)
    requests = [Request(0.0, 4, 20, ()), Request(3.0, 100, 1, ())]
    kinds = [[span.kind for span in step.spans] for step in Scheduler(requests, limits, Scale(), 1.0).steps()]
    assert kinds[0] == ["prefill"]
    assert kinds.count(["decode", "chunk"]) > 5


@pytest.mark.parametrize("layer", TINY.layers, ids=lambda layer: layer.name)
@settings(max_examples=8, deadline=None)
@given(server=servers())
def test_pages_nobody_owns_and_tails_of_live_pages_are_poison(layer, server):
    limits = server[0]
    cache = PagedCache(TINY, layer, limits, 0)
    for step, _ in zip(scheduler_of(server).steps(), range(12), strict=False):
        cache.apply(step)
        live = np.zeros((limits.pages, limits.page_size), bool)
        for span in step.spans:
            token = np.arange(span.stop)
            live[np.asarray(span.pages)[token // limits.page_size], token % limits.page_size] = True
        freed = [page for page in range(limits.pages) if cache_is_dead(cache, page)]
        assert set(step.freed) - {write.page for write in step.writes} <= set(freed)
        assert np.isfinite(cache.pages[live].astype(np.float32)).all()
        case, refilled = twice(case_of(step, layer, cache, limits))
        unseen = ~seen_slots(case)
        assert (unseen | live).all(), "no row may see a slot that nobody wrote"
        nan = np.isnan(case.kv_pages[unseen].astype(np.float32))
        assert nan.all() or layer.pages_dtype == "int8"
        assert np.isfinite(refilled.kv_pages.astype(np.float32)).all()
        for one, other in zip(attend(case), attend(refilled), strict=True):
            np.testing.assert_array_equal(one, other)


def cache_is_dead(cache: PagedCache, page: int) -> bool:
    return cache.pages[page].tobytes() == np.full_like(cache.pages[page], cache.dead).tobytes()


def test_a_preempted_sequence_computes_the_same_bits_again():
    limits = Limits(tokens=8, seqs=4, pages=6, pages_per_seq=6, page_size=4)
    requests = [Request(0.0, 6, 14, ()), Request(0.0, 6, 14, ())]
    cache, seen, again = PagedCache(TINY, TINY.layers[0], limits, 0), {}, 0
    for step in Scheduler(requests, limits, Scale(), 1.0).steps():
        cache.apply(step)
        for span in step.spans:
            for i, page in enumerate(span.pages[: span.stop // limits.page_size]):
                bits = cache.pages[page].tobytes()
                again += (span.request, i) in seen and span.resumed
                assert seen.setdefault((span.request, i), bits) == bits
    assert again
