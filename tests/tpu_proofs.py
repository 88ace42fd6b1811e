"""The proofs a broken TPU kernel must fail, cheap enough to run on each of dozens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import tpu_interpret as tpu
from contract_cases import Shape, build
from jax.experimental.pallas import tpu as pltpu

from oracle import Case, judge
from oracle.poison import nan_fill
from rpa.backends.pallas_tpu import transfers

LAYOUT = ((2, 1, 0, 5, 1, 1), (21, 24, 6, 23, 7, 20))
PROOFS: dict[str, Callable[[], Case]] = {
    # Every option, several blocks a tile, decode between tiles of different sizes, an empty sequence.
    "rich": lambda: build(
        *LAYOUT, Shape(seqs=7, page=2, pages_per_seq=12, pages=80),
        sliding_window=19, sinks=True, logits_soft_cap=3.0, amplitude=3.0,
    ),
    "plain": lambda: build(*LAYOUT, Shape(seqs=7, page=2, pages_per_seq=12, pages=80)),
    # A work list without a spare entry: the cursors run past its last live one.
    "full": lambda: build((1, 1, 1), (5, 9, 3), Shape(rows=3, seqs=3)),
    # Blocks of two pieces, bf16 keys and values in one word.
    "pieces": lambda: build(
        (3, 1), (150, 140), Shape(page=4, pages_per_seq=40, pages=80), dtype="bfloat16", compute_dtype="bfloat16",
    ),
    "wide": lambda: build((3,), (150,), Shape(pages_per_seq=160, page=1, pages=170)),
    # Nothing asked of the numbers that the others do not ask: which pages are fetched, and on which semaphore.
    "visible": lambda: build(*LAYOUT, Shape(seqs=7, page=2, pages_per_seq=12, pages=80)),
}  # fmt: skip
# Block sizes where the interpreter's own are too small to show it.
CONFIGS = {"pieces": {"num_kv_pages_per_block": 64}}


def prove(name: str, mode: str) -> None:
    """Raise where the kernel is wrong, leaves a semaphore, races, or fetches a page that no row sees."""
    case = nan_fill(PROOFS[name]())
    fetched: list[int] = []
    if name == "visible":
        record_pages(fetched)
        check_semaphores()
    cfg = tpu.config_of(case, **CONFIGS[name]) if name in CONFIGS else None
    output, lse = tpu.run(case, mode, cfg=cfg, detect_races=mode == "eager")
    verdict = judge(case, output, tpu.claim_of(case), lse)
    assert verdict.status == "pass", verdict.text
    if name == "visible":
        assert sorted(fetched) == visible_pages(case), "a page that no row sees was fetched"


def record_pages(fetched: list[int]) -> None:
    """Make the kernel note every page it asks for."""
    original = transfers.page_copy

    def recorded(refs, source, slot, page):
        jax.debug.callback(lambda s: fetched.append(int(s)), source)
        return original(refs, source, slot, page)

    transfers.page_copy = recorded
    jax.clear_caches()


def check_semaphores() -> None:
    """Make every transfer into or out of a ring of buffers use the semaphore of the buffer it touches.

    Looked at while the kernel is traced: with a semaphore for all of them the interpreter's numbers stay right, since
    it completes transfers in the order they were started, which a TPU does not promise.
    """
    original = pltpu.make_async_copy

    def checked(source, target, semaphore):
        slot = semaphore.transforms[0].indices[0]
        buffers = [
            ref for ref in (source, target) if len(ref.ref.shape) > 2 and ref.ref.shape[0] == semaphore.ref.shape[0]
        ]
        for ref in buffers:
            place = ref.transforms[0].indices[0]
            assert place is slot or str(place) == str(slot), f"buffer {place} waits on semaphore {slot}"
        return original(source, target, semaphore)

    pltpu.make_async_copy = checked


def visible_pages(case: Case) -> list[int]:
    """The pages that some row sees, once for each sequence that does."""
    return sorted(
        int(page)
        for sequence in case.sequences()
        for page in np.asarray(sequence.pages)[
            sequence.keys[0] // case.page_size : -(-sequence.keys[1] // case.page_size)
        ]
    )
