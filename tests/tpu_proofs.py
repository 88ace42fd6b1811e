"""The proofs a broken TPU kernel must fail, cheap enough to run on each of dozens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

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
    # e4m3 of another exponent bias, with zeros of both signs among keys and values.
    "narrow": lambda: negative_zeros(
        build(*LAYOUT, Shape(seqs=7, page=2, pages_per_seq=12, pages=80), dtype="bfloat16", kv_dtype="float8_e4m3fn",
              compute_dtype="bfloat16", k_scale=0.5, v_scale=1.7)
    ),
    # Nothing asked of the numbers that the others do not ask: which pages are fetched, and on which semaphore.
    "visible": lambda: build(*LAYOUT, Shape(seqs=7, page=2, pages_per_seq=12, pages=80)),
}  # fmt: skip
# Block sizes where the interpreter's own are too small to show it.
CONFIGS = {"pieces": {"num_kv_pages_per_block": 64}}


def negative_zeros(case: Case) -> Case:
    """The case with -0 in a column of every key and value."""
    pages = np.array(case.kv_pages)
    pages[..., 3] = -0.0
    return case.replace(kv_pages=pages)


def prove(name: str, mode: str) -> None:
    """Raise where the kernel is wrong, leaves a semaphore, races, or fetches a page that no row sees."""
    case = nan_fill(PROOFS[name]())
    fetched: list[int] = []
    cfg = tpu.config_of(case, **CONFIGS[name]) if name in CONFIGS else None
    with watched(fetched) if name == "visible" else contextlib.nullcontext():
        output, lse = tpu.run(case, mode, cfg=cfg, detect_races=mode == "eager")
    verdict = judge(case, output, tpu.claim_of(case), lse)
    assert verdict.status == "pass", verdict.text
    if name == "visible":
        assert sorted(fetched) == visible_pages(case), "a page that no row sees was fetched"


@contextlib.contextmanager
def watched(fetched: list[int]) -> Iterator[None]:
    """Within it every page that the kernel asks for is noted, and every semaphore looked at; not after it."""
    patches = (
        mock.patch.object(transfers, "page_copy", recording(transfers.page_copy, fetched)),
        mock.patch.object(pltpu, "make_async_copy", checking(pltpu.make_async_copy)),
    )
    with patches[0], patches[1]:
        jax.clear_caches()
        yield
        jax.effects_barrier()  # a page is noted by a callback, which the outputs do not wait for
    jax.clear_caches()


def recording(original: Callable, fetched: list[int]) -> Callable:
    """`page_copy` that notes the page."""

    def recorded(refs, source, slot, page):
        jax.debug.callback(lambda s: fetched.append(int(s)), source)
        return original(refs, source, slot, page)

    return recorded


def checking(original: Callable) -> Callable:
    """Make every transfer into or out of a ring of buffers use the semaphore of the buffer it touches.

    Looked at while the kernel is traced: with a semaphore for all of them the interpreter's numbers stay right, since
    it completes transfers in the order they were started, which a TPU does not promise.
    """

    def checked(source, target, semaphore):
        slot = semaphore.transforms[0].indices[0]
        buffers = [
            ref for ref in (source, target) if len(ref.ref.shape) > 2 and ref.ref.shape[0] == semaphore.ref.shape[0]
        ]
        for ref in buffers:
            place = ref.transforms[0].indices[0]
            assert place is slot or str(place) == str(slot), f"buffer {place} waits on semaphore {slot}"
        return original(source, target, semaphore)

    return checked


def visible_pages(case: Case) -> list[int]:
    """The pages that some row sees, once for each sequence that does."""
    return sorted(
        int(page)
        for sequence in case.sequences()
        for page in np.asarray(sequence.pages)[
            sequence.keys[0] // case.page_size : -(-sequence.keys[1] // case.page_size)
        ]
    )
