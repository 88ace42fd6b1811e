"""The example a serving engineer starts from does what its page says."""

import subprocess
import sys
from collections import deque
from itertools import pairwise

import jax
import numpy as np
import pytest

from tests.examples import serving
from tests.examples.serving import Config, Request


@pytest.fixture(scope="module")
def params():
    return serving.init(Config())


def test_served_tokens_equal_those_of_dense_attention(params):
    config, requests = Config(), serving.requests_of(Config(), 10)
    before = serving.serve_step._cache_size()
    served = serving.serve(config, params, requests)
    assert serving.serve_step._cache_size() - before <= 1, "one compilation must serve every batch"
    assert sum(map(len, served)) > 50
    assert len({token for tokens in served for token in tokens}) > 10, "random weights that say one thing show nothing"
    for request, tokens in zip(requests, served, strict=True):
        assert tokens == serving.dense_generate(config, params, request.prompt, request.max_new)


def test_batching_really_is_continuous(params, monkeypatch):
    """Prefill and decode meet in one step, and a request starts while another is still going."""
    seen, step = [], serving.serve_step
    monkeypatch.setattr(serving, "serve_step", lambda *args: seen.append(args[3]) or step(*args))
    serving.serve(Config(), params, serving.requests_of(Config(), 10))
    counts = [np.diff(batch["query_start_loc"])[: batch["num_seqs"][0]] for batch in seen]
    tables = [[set(row) - {0} for row in batch["block_tables"][: batch["num_seqs"][0]]] for batch in seen]
    assert any(a & b for rows in tables for a, b in pairwise(rows)), "no two requests shared a page"
    assert any((rows == 1).any() and (rows > 1).any() for rows in counts)
    lens = [batch["context_lens"][: rows.size] for batch, rows in zip(seen, counts, strict=True)]
    assert any((n == rows).any() and (n > rows).any() for n, rows in zip(lens, counts, strict=True))


def test_requests_with_one_beginning_share_its_pages(params):
    """The shared pages are computed once, read by both, and free again when the last of them ends."""
    config, pool = Config(), serving.Pool(list(range(Config().num_pages)))
    prompt = list(range(20))
    first, second = Request([*prompt, 90], 4), Request([*prompt, 91], 4)
    waiting, running = deque([first]), []
    serving._admit(config, waiting, running, pool)
    first.computed = len(first.prompt)
    pool.learn(first, config.page_size)
    waiting.append(second)
    serving._admit(config, waiting, running, pool)
    full = len(prompt) // config.page_size
    assert second.pages[:full] == first.pages[:full]
    assert second.computed == full * config.page_size
    assert not set(second.pages[full:]) & set(first.pages)
    pool.give_back(first.pages)
    assert not set(second.pages) & set(pool.free)
    pool.give_back(second.pages)
    assert sorted(pool.free) == list(range(config.num_pages))
    assert not pool.known


def test_a_prompt_that_is_known_whole_still_computes_a_token(params):
    pool, prompt = serving.Pool(list(range(8))), list(range(16))
    held = Request(prompt, 1, computed=16, pages=pool.take([], 3))
    pool.learn(held, page_size=8)
    assert pool.shared(prompt, page_size=8) == held.pages[:1]


def test_the_cache_is_written_in_place(params):
    """Donation: the pages keep their address, and the program aliases as many bytes as the cache has."""
    config = Config()
    cache = serving.new_cache(config)
    running = [Request([5, 6, 7], 4, pages=[2])]
    batch = serving._batch(config, running, [3])
    size = sum(pages.nbytes for pages in cache)
    analysis = serving.serve_step.lower(config, params, cache, batch).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= size
    addresses = [pages.unsafe_buffer_pointer() for pages in cache]
    _, written = serving.serve_step(config, params, cache, batch)
    assert all(pages.is_deleted() for pages in cache)
    assert [pages.unsafe_buffer_pointer() for pages in written] == addresses
    touched = np.argwhere(np.any(np.asarray(written[0]) != 0, axis=(2, 3)))
    assert touched.tolist() == [[2, 0], [2, 1], [2, 2]]


def test_keys_and_values_interleave():
    k = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3)
    pages = jax.jit(serving.write_pages)(np.zeros((2, 4, 4, 3), np.float32), k, -k, np.array([1, 2]), np.array([3, 0]))
    np.testing.assert_array_equal(pages[1, 3, 0::2], k[0])
    np.testing.assert_array_equal(pages[1, 3, 1::2], -k[0])
    assert np.count_nonzero(pages) == np.count_nonzero(k[0]) * 2, "the row for page 2 of 2 is padding"


@pytest.mark.slow
def test_it_runs_as_a_script():
    done = subprocess.run([sys.executable, serving.__file__], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("same as dense") == 8
