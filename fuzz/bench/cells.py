"""The shape list: which ragged batches are timed, and the work that each cannot avoid."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fuzz.models import MODELS, Layer, Model

K = 1024
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


@dataclass(frozen=True)
class Cell:
    """One ragged batch of one model's layer: query and context lengths, page size, dtype."""

    kind: str  # "decode", "prefill", "chunk" or "mixed"
    model: Model
    layer: Layer
    label: str
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    page_size: int
    families: tuple[str, ...] = ()  # growth curves join the cells of one family

    @property
    def name(self) -> str:
        """The key of a cell in every record: stable and readable."""
        return f"{self.kind}/{self.model.name}.{self.layer.name}/{self.label}/p{self.page_size}/{self.layer.dtype}"

    @cached_property
    def read_tokens(self) -> int:
        """KV tokens that some row sees: each must be read at least once."""
        window = self.layer.sliding_window
        pairs = zip(self.queries, self.contexts, strict=True)
        return sum(n if window is None else min(n, window + q - 1) for q, n in pairs)

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read at least once."""
        return self.read_tokens * self._token_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of every token in the cache, seen or not."""
        return sum(self.contexts) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        return 2 * self.model.num_kv_heads * self.model.head_dim * _BYTES[self.layer.pages_dtype]

    @property
    def bytes(self) -> int:
        """The floor of memory traffic: visible keys and values once, queries once, output once."""
        rows = sum(self.queries) * self.model.num_q_heads * self.model.head_dim * _BYTES[self.layer.dtype]
        return self.kv_bytes + 2 * rows

    @cached_property
    def flops(self) -> int:
        """The floor of arithmetic: two dot products over every visible (row, key) pair of every query head."""
        window = self.layer.sliding_window
        pairs = 0
        for q, n in zip(self.queries, self.contexts, strict=True):
            seen = np.arange(n - q + 1, n + 1, dtype=np.int64)
            pairs += int(np.minimum(seen, window).sum() if window else seen.sum())
        return 4 * self.model.head_dim * self.model.num_q_heads * pairs


def _cell(kind: str, model: str, layer: str, label: str, queries, contexts, page: int, **more) -> Cell:
    preset = MODELS[model]
    chosen = next(entry for entry in preset.layers if entry.name == layer)
    return Cell(kind, preset, chosen, label, tuple(queries), tuple(contexts), page, **more)


def decode(model: str, layer: str, batch: int, context: int, page: int = 16, families: tuple[str, ...] = ()) -> Cell:
    """`batch` sequences of one query row each on `context` keys."""
    label = f"b{batch}x{_short(context)}"
    return _cell("decode", model, layer, label, (1,) * batch, (context,) * batch, page, families=families)


def prefill(model: str, layer: str, batch: int, rows: int, on: int = 0, page: int = 16) -> Cell:
    """`batch` sequences of `rows` query rows each, on `on` keys that are in the cache already."""
    label = f"{batch}x{_short(rows)}" + (f"on{_short(on)}" if on else "")
    kind = "chunk" if on else "prefill"
    return _cell(kind, model, layer, label, (rows,) * batch, (rows + on,) * batch, page)


def mixed(
    model: str, layer: str, decodes: int, median: int, longest: int, chunks, page: int = 16, seed: int = 0
) -> Cell:
    """Decodes of log-normal lengths beside prefill chunks `(rows, context)`: what a serving step looks like."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median), 1.0, decodes))
    lengths = [int(n) for n in np.clip(drawn, 16, longest)]
    queries = (1,) * decodes + tuple(q for q, _ in chunks)
    label = f"{decodes}d{_short(median)}+" + "+".join(f"{_short(q)}of{_short(n)}" for q, n in chunks)
    return _cell("mixed", model, layer, label, queries, (*lengths, *(n for _, n in chunks)), page)


def _short(n: int) -> str:
    return f"{n // K}k" if n % K == 0 and n else str(n)


def cpu_cells() -> list[Cell]:
    """What two cores do in about two minutes, growth curves included."""
    cells = [
        decode("llama3-8b", "full", 1, 2 * K),
        decode("llama3-8b", "full", 8, 2 * K),
        decode("gpt-oss", "local", 8, 2 * K),
        decode("gemma2", "local", 4, K),
        prefill("llama3-8b", "full", 1, 512),
        prefill("llama3-8b", "full", 1, 256, K),
        prefill("gpt-oss", "local", 1, 512),
        mixed("llama3-8b", "full", 8, 512, 2 * K, ((128, 128), (128, 1024))),
        mixed("tiny", "full", 16, 512, 2 * K, ((64, 64), (64, 512))),
    ]
    return cells + growth("tiny", "full", (512, K, 2 * K, 4 * K, 8 * K), (1, 2, 4, 8, 16), (4, 16, 64, 256), K, 4)


def gpu_cells() -> list[Cell]:
    """The cells in which GPU kernels are compared, those first that a short budget should reach."""
    cells = [*_compared(16), *_others(16), *_compared(64), *_compared(128)]
    cells += growth("llama3-8b", "full", (2 * K, 8 * K, 32 * K), (4, 16, 64), (16, 32, 128), 8 * K, 16)
    cells += [*_others(64), *_others(128)]
    for page in (32, 256, 16, 64, 128):
        cells += _odd(page)
    return [*cells, *_compared(32), *_compared(256)]


def _odd(page: int) -> list[Cell]:
    """Heads and lengths that nobody tunes for."""
    few, many = ("qwen2-7b", "full"), ("qwen3-14b", "full")
    return [
        mixed(*many, 48, K, 8 * K, ((1500, 3 * K),), page),
        prefill(*few, 2, 3 * K, page=page),
        prefill(*many, 3, 700, 5 * K, page=page),
        *(decode(*model, batch, n, page) for model, batch, n in ((many, 24, 5 * K), (few, 5, 3000), (few, 96, 1500))),
    ]


def _compared(page: int) -> list[Cell]:
    """One or two cells of each kind: mixed, prefill, short and long decode, windows, sinks, caps."""
    llama, small = ("llama3-8b", "full"), ("llama3-70b-tp8", "full")
    chunks = ((2 * K, 2 * K), (2 * K, 8 * K))
    cells = [mixed(*model, 128, 2 * K, 16 * K, chunks, page) for model in (llama, small)]
    cells += [prefill(*llama, *shape, page=page) for shape in ((1, 8 * K), (4, 4 * K), (16, 2 * K), (4, 512, 16 * K))]
    cells += [decode(*llama, batch, n, page) for batch, n in ((64, 8 * K), (8, 8 * K), (1, 8 * K), (8, K), (1, K))]
    cells += [decode("gpt-oss", "local", batch, 8 * K, page) for batch in (64, 256)]
    cells += [prefill(model, layer, 1, 8 * K, page=page)
              for model, layer in (("gpt-oss", "local"), ("gpt-oss", "global"), ("gemma2", "local"))]  # fmt: skip
    cells += [decode(*small, 64, 8 * K, page), decode("gpt-oss", "global", 64, 8 * K, page)]
    return [*cells, decode("gemma2", "local", 64, 8 * K, page)]


def _others(page: int) -> list[Cell]:
    """What fills the table: lengths and batches between those of `_compared`."""
    llama, small = ("llama3-8b", "full"), ("llama3-70b-tp8", "full")
    sizes = ((1, 32 * K), (1, 128 * K), (8, 32 * K), (64, K), (64, 32 * K), (256, K), (256, 8 * K))
    cells = [decode(*llama, batch, n, page) for batch, n in sizes]
    cells += [decode(*small, b, 8 * K, page) for b in (1, 8, 256)] + [decode(*small, 64, 32 * K, page)]
    cells += [decode("gpt-oss", "local", 8, 8 * K, page), decode("gpt-oss", "global", 8, 8 * K, page)]
    return [*cells, decode("gemma2", "local", 8, 8 * K, page), prefill(*small, 1, 8 * K, page=page)]


def growth(model: str, layer: str, contexts, batches, pages, context: int, batch: int) -> list[Cell]:
    """Three curves around one point: the cost must follow live tokens, and hardly the page size."""
    points = [("context", (batch, n, 16)) for n in contexts] + [("batch", (b, context, 16)) for b in batches]
    points += [("page size", (batch, context, page)) for page in pages]
    families: dict[tuple[int, int, int], tuple[str, ...]] = {}
    for family, point in points:
        families[point] = (*families.get(point, ()), family)
    return [decode(model, layer, b, n, page, families=names) for (b, n, page), names in families.items()]


def cells_for(platform: str) -> list[Cell]:
    """The shape list of a device: `cpu`, `gpu` or `tpu`."""
    cells = cpu_cells() if platform == "cpu" else gpu_cells()
    # A point of a growth curve may be a cell of its own as well: it keeps its place, and learns its curves.
    unique: dict[str, Cell] = {}
    for cell in cells:
        known = unique.get(cell.name)
        unique[cell.name] = cell if known is None else replace(known, families=known.families + cell.families)
    return list(unique.values())


def named(every: list[Cell], only: str) -> list[Cell]:
    """The cells whose name contains `only`, or in which that regular expression is found.

    Raises:
        ValueError: there is none.
    """
    try:
        pattern = re.compile(only)
    except re.error:
        pattern = re.compile(re.escape(only))
    chosen = [cell for cell in every if only in cell.name or pattern.search(cell.name)]
    if not chosen:
        kinds = ", ".join(dict.fromkeys("/".join(cell.name.split("/")[:2]) for cell in every))
        raise ValueError(f"--only {only!r}: no cell's name contains or matches it; they begin with {kinds}")
    return chosen
