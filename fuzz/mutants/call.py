"""One call of the model kernel: how it is launched, and its arguments resolved for every step to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 and its like with NumPy
import numpy as np

F32 = np.float32
Bugs = frozenset[str]


@dataclass(frozen=True)
class Launch:
    """How the model runs: tile sizes, splits, and the bugs switched on."""

    block_q: int = 4
    block_k: int = 8
    splits: int = 1
    shards: int = 1
    bugs: Bugs = frozenset()


@dataclass
class Call:
    """One call's arrays and options, resolved; what every step reads."""

    queries: np.ndarray  # [T, Hq, D], as stored
    keys: np.ndarray  # [P, page, Hkv, D], as stored
    values: np.ndarray  # [P, page, Hkv, D]
    context_lens: np.ndarray
    tables: np.ndarray
    starts: np.ndarray
    num_seqs: int
    sinks: np.ndarray | None  # [Hq]
    scale: float
    cap: float | None
    window: int | None
    dtype: np.dtype  # of the dot operands
    k_scale: np.ndarray | None  # [Hkv]
    v_scale: np.ndarray | None
    launch: Launch
    # What an accelerator keeps between blocks and tiles: only a bug reads the past out of it.
    buffer: dict[str, np.ndarray] = field(default_factory=dict)

    def has(self, bug: str) -> bool:
        return bug in self.launch.bugs

    @property
    def page(self) -> int:
        return self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        return self.queries.shape[1] // self.kv_heads

    def round(self, x: np.ndarray) -> np.ndarray:
        """To the operand dtype and back; accumulation stays in float32."""
        return x if self.dtype == F32 else x.astype(self.dtype).astype(F32)


def validate(queries: np.ndarray, pages: np.ndarray, scale: Any, cap: Any, window: Any) -> None:
    if queries.ndim != 3 or pages.ndim != 4:
        raise ValueError(f"queries has {queries.ndim} axes and kv_pages {pages.ndim}: 3 and 4 are expected")
    if pages.shape[2] % 2 or queries.shape[1] % max(pages.shape[2] // 2, 1):
        raise ValueError(f"{queries.shape[1]} query heads over {pages.shape[2]} combined heads do not divide")
    if scale is not None and not np.isfinite(scale):
        raise ValueError(f"softmax_scale={scale}: it must be finite")
    if cap is not None and not cap > 0:
        raise ValueError(f"logits_soft_cap={cap}: it must be positive")
    if window is not None and not window > 0:
        raise ValueError(f"sliding_window={window}: it must be positive")


def split_pages(pages: np.ndarray, bugs: Bugs) -> tuple[np.ndarray, np.ndarray]:
    keys, values = pages[:, :, 0::2], pages[:, :, 1::2]
    if "blocked_layout" in bugs:
        half = pages.shape[2] // 2
        keys, values = pages[:, :, :half], pages[:, :, half:]
    return (values, keys) if "kv_swapped" in bugs else (keys, values)


def per_head(scale: Any, pages: np.ndarray) -> np.ndarray | None:
    return None if scale is None else np.broadcast_to(np.asarray(scale, F32), (pages.shape[2] // 2,))
