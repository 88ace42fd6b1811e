"""A small decoder served with continuous batching on `ragged_page_attention_v2`: start your own server from here.

    uv run python tests/examples/serving.py

Random weights, real code path: embedding, RoPE, grouped queries, a paged cache that is written in place, pages that
requests with the same beginning share, local and global layers, greedy decoding. Every step is one call of one
compiled program, whatever requests are in it.
`dense_generate` is the same decoder with plain causal attention, one request at a time; the tokens are equal.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpa import ragged_page_attention_v2


@dataclass(frozen=True)
class Config:
    """The decoder, and the static shapes its server runs at."""

    vocab: int = 101
    width: int = 64
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    windows: tuple[int | None, ...] = (None, 12)  # one entry a layer; None sees the whole context
    page_size: int = 8
    num_pages: int = 24  # of each layer
    pages_per_seq: int = 8
    max_seqs: int = 4
    max_tokens: int = 16  # query rows of a step


# ------------------------------------------------------------------------------------------- the decoder


def init(config: Config, seed: int = 0) -> dict:
    """Random weights."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)

    heads = (config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = [
        {
            "qkv": weight(config.width, heads),
            "out": weight(config.num_q_heads * config.head_dim, config.width),
            "up": weight(config.width, 4 * config.width),
            "down": weight(4 * config.width, config.width),
        }
        for _ in config.windows
    ]
    embedding = jnp.asarray(rng.normal(0, 1, (config.vocab, config.width)), jnp.float32)
    return {"embedding": embedding, "unembedding": weight(config.width, config.vocab), "layers": layers}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rope(x, positions):
    """Rotate `x` [T, H, D] by its position: pairs are channel i and channel i + D / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def decoder(config: Config, params: dict, tokens, positions, attention):
    """Logits [T, vocab]; `attention(layer, q, k, v)` is the one thing that paged and dense serving do apart."""
    hq, hkv, d = config.num_q_heads, config.num_kv_heads, config.head_dim
    x = params["embedding"][tokens]
    for index, layer in enumerate(params["layers"]):
        qkv = (norm(x) @ layer["qkv"]).reshape(-1, hq + 2 * hkv, d)
        q, k, v = jnp.split(qkv, [hq, hq + hkv], axis=1)
        mixed = attention(index, rope(q, positions), rope(k, positions), v)
        x = x + mixed.reshape(len(x), -1) @ layer["out"]
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    return norm(x) @ params["unembedding"]


# --------------------------------------------------------------------------------------- the paged cache


def new_cache(config: Config):
    """One pool of pages a layer: key of kv head h at combined head 2h, its value at 2h + 1."""
    shape = (config.num_pages, config.page_size, 2 * config.num_kv_heads, config.head_dim)
    return [jnp.zeros(shape, jnp.float32) for _ in config.windows]


def write_pages(kv_pages, k, v, pages, slots):
    """Put the keys and values [T, Hkv, D] of new tokens where `pages` [T] and `slots` [T] say.

    Rows whose page lies outside the pool are padding and go nowhere. Inside a jitted function that donates
    `kv_pages` this writes in place: no copy of the cache is made.
    """
    combined = jnp.stack([k, v], axis=2).reshape(len(k), -1, k.shape[-1])  # k0, v0, k1, v1, ...
    return kv_pages.at[pages, slots].set(combined.astype(kv_pages.dtype), mode="drop")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def serve_step(config: Config, params: dict, cache, batch: dict):
    """One step for every sequence in the batch: the next token after each query row, and the cache."""
    cache = list(cache)

    def attention(layer, q, k, v):
        cache[layer] = write_pages(cache[layer], k, v, batch["pages"], batch["slots"])
        return ragged_page_attention_v2(
            q,
            cache[layer],
            batch["context_lens"],
            batch["block_tables"],
            batch["query_start_loc"],
            batch["num_seqs"],
            sliding_window=config.windows[layer],
            compute_dtype=jnp.float32,  # bfloat16, the default, is what a server would take
        )

    logits = decoder(config, params, batch["tokens"], batch["positions"], attention)
    return jnp.argmax(logits, axis=-1), cache


# -------------------------------------------------------------------------------------------- the server


@dataclass
class Request:
    """A prompt, and the tokens generated so far."""

    prompt: list[int]
    max_new: int
    generated: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated


@dataclass
class Pool:
    """Who uses which page, and which pages hold the beginning of a prompt that another request may have too."""

    free: list[int]
    users: Counter = field(default_factory=Counter)
    known: dict[tuple[int, ...], int] = field(default_factory=dict)  # all tokens up to a page's end -> the page

    def shared(self, prompt: list[int], page_size: int) -> list[int]:
        """Pages whose keys and values a prompt need not compute; its last token is always left to compute."""
        pages = []
        for stop in range(page_size, len(prompt), page_size):
            page = self.known.get(tuple(prompt[:stop]))
            if page is None:
                break
            pages.append(page)
        return pages

    def take(self, shared: list[int], fresh: int) -> list[int]:
        pages = shared + [self.free.pop() for _ in range(fresh)]
        self.users.update(pages)
        return pages

    def learn(self, request: Request, page_size: int) -> None:
        """Offer the prompt's full pages that are computed; a page is written once, so it can be read by all."""
        for index in range(min(request.computed, len(request.prompt)) // page_size):
            self.known.setdefault(tuple(request.prompt[: (index + 1) * page_size]), request.pages[index])

    def give_back(self, pages: list[int]) -> None:
        self.users.subtract(pages)
        gone = {page for page in pages if not self.users[page]}
        self.known = {tokens: page for tokens, page in self.known.items() if page not in gone}
        self.free += gone


def serve(config: Config, params: dict, requests: list[Request]) -> list[list[int]]:
    """Generate for all requests, as many at a time as rows, slots and pages allow."""
    cache, pool = new_cache(config), Pool(list(range(config.num_pages)))
    waiting, running = deque(requests), []
    while waiting or running:
        _admit(config, waiting, running, pool)
        rows = _rows_of_step(config, running)
        following, cache = serve_step(config, params, cache, _batch(config, running, rows))
        _advance(config, running, rows, np.asarray(following), pool)
    return [request.generated for request in requests]


def _admit(config: Config, waiting: deque, running: list, pool: Pool) -> None:
    """Take waiting requests while there is a slot, and pages for all that the request may ever hold."""
    while waiting and len(running) < config.max_seqs:
        need = -(-(len(waiting[0].prompt) + waiting[0].max_new) // config.page_size)
        if need > min(config.pages_per_seq, config.num_pages):
            raise ValueError(f"a request needs {need} pages, a table row has {config.pages_per_seq}")
        shared = pool.shared(waiting[0].prompt, config.page_size)
        if need - len(shared) > len(pool.free):
            return
        request = waiting.popleft()
        request.pages = pool.take(shared, need - len(shared))
        request.computed = len(shared) * config.page_size
        running.append(request)


def _rows_of_step(config: Config, running: list) -> list[int]:
    """Query rows of each sequence: decoding ones take their one, a long prompt takes what the budget leaves."""
    budget, rows = config.max_tokens, []
    for position, request in enumerate(running):
        others = len(running) - position - 1  # keep a row for each
        rows.append(min(len(request.tokens) - request.computed, budget - others))
        budget -= rows[-1]
    return rows


def _batch(config: Config, running: list, rows: list[int]) -> dict:
    """The step's arrays, padded to the static shapes; what lies past the live part is never looked at."""
    tokens = np.zeros(config.max_tokens, np.int32)
    positions = np.zeros(config.max_tokens, np.int32)
    pages = np.full(config.max_tokens, config.num_pages, np.int32)  # outside the pool: dropped
    slots = np.zeros(config.max_tokens, np.int32)
    context_lens = np.zeros(config.max_seqs, np.int32)
    block_tables = np.zeros((config.max_seqs, config.pages_per_seq), np.int32)
    query_start_loc = np.zeros(config.max_seqs + 1, np.int32)
    start = 0
    for s, (request, count) in enumerate(zip(running, rows, strict=True)):
        where = np.arange(request.computed, request.computed + count)
        stop = start + count
        tokens[start:stop] = request.tokens[request.computed : request.computed + count]
        positions[start:stop] = where
        pages[start:stop] = np.asarray(request.pages)[where // config.page_size]
        slots[start:stop] = where % config.page_size
        context_lens[s] = request.computed + count
        block_tables[s, : len(request.pages)] = request.pages
        query_start_loc[s + 1 :] = stop
        start = stop
    return {
        "tokens": tokens,
        "positions": positions,
        "pages": pages,
        "slots": slots,
        "context_lens": context_lens,
        "block_tables": block_tables,
        "query_start_loc": query_start_loc,
        "num_seqs": np.array([len(running)], np.int32),
    }


def _advance(config: Config, running: list, rows: list[int], following: np.ndarray, pool: Pool) -> None:
    """Note what was computed; a sequence whose last token was a query gets its next one."""
    last = np.cumsum(rows) - 1
    for request, count, row in zip(list(running), rows, last, strict=True):
        request.computed += count
        pool.learn(request, config.page_size)
        if request.computed < len(request.tokens):
            continue
        request.generated.append(int(following[row]))
        if len(request.generated) == request.max_new:
            running.remove(request)
            pool.give_back(request.pages)


# ---------------------------------------------------------------------------------- the same, without pages


def dense_generate(config: Config, params: dict, prompt: list[int], max_new: int) -> list[int]:
    """The same decoder on one request with plain causal attention over all tokens so far."""
    tokens = list(prompt)
    for _ in range(max_new):
        padded = np.zeros(config.page_size * config.pages_per_seq, np.int32)  # one shape, one compilation
        padded[: len(tokens)] = tokens
        following = _dense_step(config, params, padded)
        tokens.append(int(following[len(tokens) - 1]))
    return tokens[len(prompt) :]


@partial(jax.jit, static_argnums=0)
def _dense_step(config: Config, params: dict, tokens):
    position = jnp.arange(len(tokens))

    def attention(layer, q, k, v):
        group = config.num_q_heads // config.num_kv_heads
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        logits = jnp.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
        behind = position[:, None] - position[None, :]
        window = config.windows[layer] or len(tokens)
        logits = jnp.where((behind >= 0) & (behind < window), logits, -jnp.inf)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, axis=-1), v)

    return jnp.argmax(decoder(config, params, tokens, position, attention), axis=-1)


def requests_of(config: Config, count: int, seed: int = 0) -> list[Request]:
    """Random prompts, some longer than a step's budget; every other one begins with the same 20 tokens."""
    rng = np.random.default_rng(seed)
    system = rng.integers(0, config.vocab, 20).tolist()
    prompts = [rng.integers(0, config.vocab, rng.integers(1, 25)).tolist() for _ in range(count)]
    return [Request(system * (i % 2) + prompt, int(rng.integers(1, 20))) for i, prompt in enumerate(prompts)]


def main() -> None:
    """Serve a batch of requests both ways and show the tokens."""
    config = Config()
    params, requests = init(config), requests_of(Config(), 8)
    served = serve(config, params, requests)
    for request, tokens in zip(requests, served, strict=True):
        dense = dense_generate(config, params, request.prompt, request.max_new)
        print(f"prompt of {len(request.prompt):2} -> {tokens}  {'same as dense' if tokens == dense else dense}")


if __name__ == "__main__":
    main()
