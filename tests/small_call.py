"""One tiny legal call, shared by the tests of selection, registry, class and cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

T, HQ, D, P, PAGE, HKV, S, PPS = 6, 4, 16, 16, 4, 2, 3, 4


def arguments(seed: int = 0) -> dict[str, Any]:
    """The six arrays by name, on the device: lengths 1, 3 and 2 on contexts 13, 9 and 4."""
    random = np.random.default_rng(seed)
    return {
        "queries": jnp.asarray(random.normal(size=(T, HQ, D)), jnp.float32),
        "kv_pages": jnp.asarray(random.normal(size=(P, PAGE, 2 * HKV, D)), jnp.float32),
        "context_lens": jnp.asarray([13, 9, 4], jnp.int32),
        "block_tables": jnp.asarray(random.permutation(P)[: S * PPS].reshape(S, PPS), jnp.int32),
        "query_start_loc": jnp.asarray([0, 1, 4, 6], jnp.int32),
        "num_seqs": jnp.asarray([S], jnp.int32),
    }
