"""The catalogue of kernel bugs: each a switch of the model kernel or a source patch of a real one.

A new bug is one line here and one switch in `model.py`, or one file in `patches/`. What no correct judge can see is
listed too, with the reason, so that the mutation score has an honest denominator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fuzz.mutants import model
from fuzz.mutants.model import Launch
from fuzz.targets import Target, TargetError, from_callable

# The tile sizes mutants run at. Unlike the ones `fuzz.diagnose` explains failures with, on purpose.
TILES = Launch(block_q=4, block_k=4)


@dataclass(frozen=True)
class Mutant:
    """One bug: where it lives, what it does in a line, and how it is switched on."""

    id: str
    group: str
    line: str
    splits: int = 1
    shards: int = 1
    block_k: int = TILES.block_k
    equivalent: str | None = None  # why nothing can tell it from the right kernel

    @property
    def launch(self) -> Launch:
        return Launch(TILES.block_q, self.block_k, self.splits, self.shards, frozenset({self.id}))


def _group(group: str, *lines: str, splits: int = 1, shards: int = 1, block_k: int = TILES.block_k) -> list[Mutant]:
    pairs = (line.split(" ", 1) for line in lines)
    return [Mutant(name, group, text.strip(), splits, shards, block_k) for name, text in pairs]


MUTANTS: tuple[Mutant, ...] = (
    *_group(
        "masking",
        "causal_strict        a token does not see itself",
        "causal_plus1         a token sees one future token",
        "causal_ignored       every token sees the whole context",
        "causal_by_tile       all rows of a tile see what its last row sees",
        "no_context_offset    the causal position is counted inside the chunk",
        "next_len             the context length of the next sequence",
        "window_wide          one key too many",
        "window_narrow        one key too few",
        "window_from_block    the tile's first row decides the window of all its rows",
        "window_from_context  the window is measured from the end of the context",
        "window_no_token_mask blocks before the window are skipped, the edge block is not masked",
        "window_block_skip_off the first block is skipped when the window starts in its second half",
        "window_ignored_decode the window is dropped on the one-query path",
        "klen_missing         slots past the context are attended to",
        "klen_page_rounded    the context is rounded up to whole pages",
        "first_key_dropped    key 0 is never seen",
        "last_key_dropped     the last key is lost when the context fills its block",
    ),
    *_group(
        "paging",
        "identity             the block table is ignored",
        "col_off              table column off by one",
        "row_next             the next sequence's table row",
        "row0                 the first sequence's table row for all",
        "slot_roll            slot in the page off by one",
        "pages_floor          the last partial page is dropped",
        "slice_clamp          a table slice past its end is clamped and reads earlier pages",
        "minus_one            a padding entry of the table is dereferenced",
        "int32_offset         the element offset wraps (here at a small size)",
        "page_pow2            the page size is taken for a power of two",
        "table_width_as_seqs  the table's row stride is the number of sequences",
    ),
    *_group(
        "ragged",
        "q_start_off          the first row is off by one after sequence 0",
        "last_seq_skipped     the last sequence is not computed",
        "uniform_qlen         query lengths are taken as equal",
        "num_seqs_ignored     dead metadata rows are processed",
        "dead_rows_garbage    rows that nobody owns are not cleared",
        "sees_none_mean       a row that sees no key gets a mean of values",
    ),
    *_group(
        "softmax",
        "no_max               no running maximum",
        "acc_not_rescaled     the numerator is not rescaled when the maximum grows",
        "l_not_rescaled       the denominator is not rescaled when the maximum grows",
        "mask_after_max       the maximum is taken over masked scores, and the seen ones underflow",
        "inf_minus_inf        a first block that is fully masked gives NaN",
        "log2e_missing        exp2 without the factor log2(e)",
        "scale_missing        the softmax scale is dropped",
        "scale_twice          the softmax scale is applied twice",
        "scale_after_cap      the scale comes after the cap",
        "scale_padded_dim     the scale of the padded head size",
        "eps_in_division      an epsilon in the denominator",
    ),
    *_group(
        "heads",
        "mod_map              query head h reads kv head h % Hkv",
        "head0                all query heads read kv head 0",
        "kv_swapped           keys and values swapped",
        "blocked_layout       [K..., V...] for interleaved heads",
        "group_transposed     output heads stored in transposed order",
        "head_dim_truncated   elements past a multiple of 32 are dropped from q.k",
    ),
    *_group(
        "dtype",
        "p_bf16               weights rounded to bfloat16 where more is claimed",
        "p_fp8                weights rounded to fp8",
        "q_bf16               the scaled query rounded to bfloat16",
        "dot_bf16             scores accumulated in bfloat16",
        "dot_f16              scores accumulated in float16",
        "acc_bf16             the output accumulator in bfloat16",
        "int16_pos            positions wrap past 32767",
        "k_scale_ignored      quantised keys are not scaled",
        "v_scale_ignored      quantised values are not scaled",
        "kv_scale_head0       the first head's quantisation scales for all",
        "kv_scale_swapped     the two quantisation scales swapped",
    ),
    *_group(
        "sinks and cap",
        "sink_ignored         sinks are dropped",
        "sink_per_block       the sink is counted once a block",
        "sink_scaled          the sink is multiplied by the softmax scale",
        "sink_capped          the sink is capped like a logit",
        "sink_head0           the first head's sink for all",
        "sink_kvhead          sinks indexed by kv head",
        "sink_max_only        the sink enters the maximum only",
        "sink_dropped_if_window sinks are dropped when there is a window",
        "cap_ignored          the soft cap is dropped",
        "cap_before_scale     capped before it is scaled",
        "cap_no_outer         tanh is not multiplied by the cap",
        "cap_no_inner         the logit is not divided by the cap",
    ),
    *_group(
        "pipelining",
        "stale_k              the key buffer is one block behind",
        "stale_v              the value buffer is one block behind",
        "acc_not_reset        state is kept between query tiles",
        "last_block_dropped   the pipeline is not drained",
        "wait_removed         the second half of a block has not arrived",
        "wrong_slot           every other block is read from the other buffer",
        "sem_shared           the wait for values is satisfied by the copy of keys",
        "empty_seq_prefetch   an empty sequence leaves the next one waiting on its buffer",
    ),
    *_group(
        "tails",
        "q_tail_dropped       the last partial query tile is not computed",
        "q_tile_clamped       the last query tile is clamped back into the batch",
        "kv_tail_floor        the last partial KV block is dropped",
        "v_not_sanitised      0 x NaN from slots nobody owns",
        "k_additive_mask      the mask is added, so NaN leaks",
    ),
    *_group(
        "split-KV",
        "no_lse               partial outputs are averaged",
        "empty_nan            an empty split gives NaN",
        "overlap              one block in two splits",
        "sink_every_split     the sink enters every split",
        splits=3,
    ),
    *_group(
        "lse",
        "lse_base2            the lse is a logarithm to base 2",
        "lse_without_sink     the sink is left out of the lse",
        "lse_without_max      the running maximum is not added back",
        "lse_dead_rows        rows that nobody owns have lse 0, not -inf",
    ),
    *_group("lse", "lse_of_first_split   the first split's lse for the whole row", splits=3, block_k=2),
    *_group("split-KV", "split_last_missing   the last split is not combined", splits=3, block_k=2),
    *_group(
        "sharding",
        "sink_shard0          every head shard uses shard 0's sinks",
        "kv_replicated        every shard reads shard 0's kv heads",
        "double_psum          the output is summed over shards that all hold it",
        shards=2,
    ),
    *_group(
        "selection",
        "config_dead          the config that was asked for never reaches the kernel",
        "silent_fallback      another backend answered",
        "accepts_bad          validation lets an illegal value pass",
    ),
    *_group(
        "hygiene",
        "writes_input         the kernel writes into its queries",
        "cached_by_shape      an answer is kept and returned for the next call of the same shape",
        "nondeterministic     the order of a reduction changes from call to call",
        "batch_dependent      the split depends on what else is in the batch",
    ),
)  # fmt: skip

EQUIVALENT: tuple[Mutant, ...] = (
    Mutant("block_order_reversed", "softmax", "blocks are folded from the last to the first",
           equivalent="the bound assumes no order of summation; within it every order is right"),
    Mutant("exact_p", "dtype", "weights keep float32 where bfloat16 is claimed",
           equivalent="more precision than claimed is no error"),
)  # fmt: skip

BY_ID = {mutant.id: mutant for mutant in (*MUTANTS, *EQUIVALENT)}


def target_of(name: str) -> Target:
    """The model kernel with mutant `name` switched on, as a target."""
    if name in BY_ID:
        return model_target(BY_ID[name])
    raise TargetError(f"mutant {name!r} is unknown; `rpa fuzz mutants --list` names them all")


def model_target(mutant: Mutant) -> Target:
    """The model kernel with one bug, declaring what the right one would."""
    kernel = model.launched(mutant.launch)
    return dataclasses.replace(from_callable(kernel, f"mutant:{mutant.id}"), **declared(kernel))


def right_target(launch: Launch, name: str = "model") -> Target:
    """The right model kernel at any tile sizes."""
    kernel = model.launched(launch)
    return dataclasses.replace(from_callable(kernel, name), **declared(kernel))


def declared(kernel: Any) -> dict[str, Any]:
    """What the model kernel promises, whatever bug it has."""
    return {
        "batch_invariant": True,
        "validates": True,
        "returns_lse": True,
        "ran": lambda case: kernel.ran,
        "expects": kernel.expects,
    }
