"""What jax's Mosaic GPU interpreter (0.11.2) does not watch, watched: the reads of wgmma, and every kernel of a call.

The interpreter's race detector compares vector clocks, so whether it sees a race does not depend on who ran first. But
it takes no note of what wgmma reads, and it forgets its verdict when the next kernel starts. A product without the
wait for its operand's copy was then caught only where a thread happened to be late. Here a product is what it is on
the GPU: an access by the async proxy, under way until its accumulator is read. So it must come after the copy's
barrier (or after `commit_smem`, for what threads stored), and the slot may be released only after the product.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState
from jax.experimental.pallas import mosaic_gpu as plgpu

# A copy is known by its place in the clocks; places are dealt in turn, and of two copies in one place the later counts
# as done with the earlier. So there are more of them than copies in any proof.
COPIES = 2048
REGISTERS = shared_memory.get_memory_space_idx(plgpu.MemorySpace.REGS)


class Products:
    """The products each warpgroup of one kernel has under way, and their accesses' clocks."""

    def __init__(self):
        self.lock = threading.Lock()
        self.count = collections.Counter()
        self.running = collections.defaultdict(collections.deque)

    def issue(self, thread, clock):
        """The clock of a new product: later than all that its warpgroup knows, and known to nobody yet."""
        # A place in the clocks of its own: that of a warp, which no warpgroup that multiplies runs by itself.
        place = gpu_callbacks._get_shared_memory().thread_to_vc_position(thread.warp(0))
        with self.lock:
            self.count[thread] += 1
            for part in (clock.generic_clock, clock.async_smem_clock):
                part.clock[place] = self.count[thread]
            self.running[thread].append(clock)
        return clock.async_smem_clock

    def finish(self, thread, still_running: int) -> None:
        """All but the last products are done: their warpgroup knows."""
        memory = gpu_callbacks._get_shared_memory()
        with self.lock:
            while len(self.running[thread]) > still_running:
                clock = self.running[thread].popleft()
                with memory.lock:
                    memory.clocks[thread].update(clock)


@contextmanager
def watched() -> Iterator[list[GPURaceDetectionState]]:
    """The interpreter, watching races; yields the verdicts of the kernels run so far, one each."""
    verdicts: list[GPURaceDetectionState] = []
    products: dict[int, Products] = collections.defaultdict(Products)
    multiply, load = gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref
    next_place = shared_memory.GPUSharedMemory.get_next_tma_thread_id

    def verdict(**fields):
        verdicts.append(GPURaceDetectionState(**fields))
        return verdicts[-1]

    def wgmma(*, thread, source_info=None, **rest):
        memory, races = gpu_callbacks._get_shared_memory(), gpu_callbacks.get_races()
        clock = products[id(races)].issue(thread, memory.incr_clock(thread))
        for operand in "ab":
            key = shared_memory.HostAllocationKey.from_array(rest[f"{operand}_allocation_key_as_array"])
            if key.memory_space_id != REGISTERS:
                transforms = gpu_callbacks._remove_noop_transforms(rest[f"{operand}_transforms"])
                access = memory.access(key, jax.tree.map(int, transforms))
                races.check_read(thread, clock.copy(), key, access, source_info=source_info)
        return multiply(thread=thread, source_info=source_info, **rest)

    def deref(*, thread, wait_n=None, **rest):
        products[id(gpu_callbacks.get_races())].finish(thread, int(wait_n or 0))
        return load(thread=thread, wait_n=wait_n, **rest)

    def place(memory):
        here = next_place(memory)
        assert memory.next_tma_thread_id, f"more than {COPIES} copies: raise COPIES"
        return here

    replaced = {"GPURaceDetectionState": verdict, "wgmma": wgmma, "wgmma_accumulator_deref": deref}
    with (
        mock.patch.multiple(gpu_callbacks, **replaced),
        mock.patch.object(shared_memory.GPUSharedMemory, "get_next_tma_thread_id", place),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=COPIES)),
    ):
        yield verdicts
