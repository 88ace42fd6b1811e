"""Model shapes: the one list that the replay, the search and the benchmarks draw from.

A model is what the attention of one decoder looks like to a kernel: heads, head size, and the distinct kinds
of layer it has. Figures come from the published configuration files (`config.json`) of the models named.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One kind of attention layer: the options that reach the kernel, and the dtypes it runs in."""

    name: str
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    dtype: str = "bfloat16"  # of queries, and of pages unless `kv_dtype` says otherwise
    kv_dtype: str | None = None  # a quantised cache: needs scales
    compute_dtype: str = "bfloat16"

    @property
    def pages_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def quantised(self) -> bool:
        return self.kv_dtype is not None


@dataclass(frozen=True)
class Model:
    """The attention of one decoder: heads, head size, page size and its kinds of layer."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    page_size: int = 16
    softmax_scale: float | None = None  # None: head_dim ** -0.5

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads


_FULL = Layer("full")
_GEMMA = (
    Layer("local", sliding_window=4096, logits_soft_cap=50.0),
    Layer("global", logits_soft_cap=50.0),
)
_GPT_OSS = (Layer("local", sliding_window=128, sinks=True), Layer("global", sinks=True))

# Small enough for two cores, and between its layers every option of the operation: two are f32 throughout,
# where the bound is a thousand times tighter than in bf16 and so sees the smallest slip.
_TINY = (
    Layer("full", dtype="float32", compute_dtype="float32"),
    Layer("window f32", sliding_window=24, sinks=True, dtype="float32", compute_dtype="float32"),
    Layer("window bf16", sliding_window=128, logits_soft_cap=20.0),
    Layer("full int8", logits_soft_cap=30.0, sinks=True, kv_dtype="int8"),
)

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("tiny", 4, 2, 32, _TINY),
        Model("llama3-8b", 32, 8, 128, (_FULL,)),
        Model("llama3-70b-tp8", 8, 1, 128, (_FULL,)),  # one of eight tensor-parallel shards
        Model("qwen2-7b", 28, 4, 128, (_FULL,)),  # a group that no power of two divides
        Model("qwen3-14b", 40, 8, 128, (_FULL,)),
        Model("mistral-7b", 32, 8, 128, (Layer("local", sliding_window=4096),)),
        Model("gemma2", 16, 8, 256, _GEMMA),  # Gemma 2 9B
        Model("gpt-oss", 64, 8, 64, _GPT_OSS),  # both sizes share these shapes
    )
}


def model_named(name: str) -> Model:
    """The preset called `name`; a `ValueError` that lists them otherwise."""
    try:
        return MODELS[name]
    except KeyError:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(MODELS)}") from None
