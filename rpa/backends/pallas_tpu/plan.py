"""What the kernel is compiled for: block sizes, padded extents, buffers; and the VMEM they take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rpa.config import RaggedPageAttentionv2Config
from rpa.signature import Signature

LANES = 128
SUBLANES = 8
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}
# e4m3fn over e4m3 of the same bits with an exponent bias of 11.
E4M3_UNIT = 16.0
# What a config's options may hold: tokens unpacked by one piece of code, cores that share the tiles.
OPTIONS = ("unpack_tokens", "cores")
# Table entries that one transfer brings to SMEM; a block's entries never straddle two transfers.
TABLE_ENTRIES = 128
# Blocks that the table transfers run ahead of the page transfers, to hide their latency.
TABLE_LEAD = 4
# The next transfer starts before the ids of the current one are read.
TABLE_SLOTS = TABLE_LEAD + 1


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def power_of_two_below(value: int) -> int:
    """The largest power of two that is at most `value`, at least 1."""
    return 1 << (max(value, 1).bit_length() - 1)


def table_entries(block_pages: int) -> int:
    """Page ids a transfer brings."""
    return max(TABLE_ENTRIES, block_pages)


@dataclass(frozen=True)
class Plan:
    """The static part of one kernel. Rows are query rows, tokens are keys; `heads` are kv heads."""

    q_heads: int
    heads: int
    head_dim: int
    page: int
    q_dtype: str  # what queries and output are stored in: float32 or bfloat16
    kv_dtype: str
    dots: str  # what dot operands are rounded to: bfloat16, float16 or float32
    scale: float  # of the dots of queries and keys as `operands` gives them
    cap: float | None
    window: int | None
    sinks: bool
    k_scaled: bool
    v_scaled: bool
    lse: bool
    block_q: int  # query rows a tile, a multiple of 16
    block_pages: int  # pages a block, a power of two
    buffers: int  # KV blocks in VMEM: one computed on, the others on their way
    unpack_tokens: int  # tokens unpacked by one straight-line piece of code
    cores: int  # TensorCores that share the tiles
    unit: float  # what 1 among the keys and values that `operands` gives is worth
    slices: int  # table transfers a sequence's row is cut into

    @property
    def group(self) -> int:
        return self.q_heads // self.heads

    @property
    def f32_dots(self) -> bool:
        """Whether operands travel as f32; only bf16 has a matrix unit of its own."""
        return self.dots != "bfloat16"

    @property
    def tokens(self) -> int:
        """Keys a block."""
        return self.block_pages * self.page

    @property
    def keys(self) -> int:
        """Keys a block, padded to whole lanes; the padding is masked."""
        return round_up(self.tokens, LANES)

    @property
    def lane_tiles(self) -> int:
        return -(-self.head_dim // LANES)

    @property
    def dim(self) -> int:
        """Head size padded to whole lanes; the padding holds zeros."""
        return self.lane_tiles * LANES

    @property
    def paired(self) -> bool:
        """Whether a word holds a 16-bit key and its 16-bit value, rather than one f32."""
        return not (self.f32_dots and self.kv_dtype == "float32")

    @property
    def word_rows(self) -> int:
        """Rows of words a token has in VMEM."""
        return self.heads if self.paired else 2 * self.heads

    @property
    def word_pitch(self) -> int:
        """Rows from a token to the next one."""
        return conflict_free(self.word_rows)

    @property
    def head_pitch(self) -> int:
        """Rows from a query row to the next one in the staging buffer."""
        return conflict_free(self.q_heads)

    @property
    def decode_rows(self) -> int:
        """Rows that hold the query heads of one kv head."""
        return round_up(self.group, SUBLANES)

    @property
    def packed_rows(self) -> int:
        """Lanes that hold a tile's rows times the query heads of one kv head."""
        return round_up(self.block_q * self.group, LANES)

    @property
    def stage_rows(self) -> int:
        return round_up(max(self.block_q * self.head_pitch, self.q_heads + self.decode_rows), SUBLANES)

    @property
    def table_entries(self) -> int:
        return table_entries(self.block_pages)

    @cached_property
    def vmem_bytes(self) -> int:
        """An upper estimate of the VMEM that the scratch buffers and the compiler's spills take."""
        size = ITEMSIZE[self.kv_dtype]
        rows = round_up(2 * self.heads, SUBLANES * 4 // size) if 2 * self.heads > SUBLANES else 2 * self.heads
        pages = self.buffers * self.tokens * rows * self.dim * size
        words = self.keys * self.word_pitch * self.dim * 4
        stage = self.stage_rows * self.dim * 4
        tiles = 4 * self.block_q * round_up(self.q_heads, 16) * self.dim * ITEMSIZE[self.q_dtype]
        operand = self.heads * self.packed_rows * self.dim * (4 if self.f32_dots else 2)
        accumulators = self.heads * self.packed_rows * (self.dim + 2 * SUBLANES) * 4
        decode = self.heads * self.decode_rows * (self.dim + 2 * LANES) * 4
        small = 4 * self.heads * (SUBLANES * self.packed_rows + self.decode_rows * LANES)
        # Scores, weights and operands of about three heads are alive at once.
        live = 3 * (3 * self.keys * self.packed_rows + 4 * self.keys * self.dim) * 4
        return pages + words + stage + tiles + operand + accumulators + decode + small + live


def tile_capacity(signature: Signature, plan: Plan) -> int:
    """Tiles that any layout of these static shapes can have."""
    rows = signature.num_tokens
    return max(1, min(rows, rows // plan.block_q + signature.max_seqs))


def list_size(signature: Signature, plan: Plan) -> int:
    """Entries of the work list: the cursor of the page tables runs this many tiles past the last live one."""
    return tile_capacity(signature, plan) + (TABLE_LEAD + plan.buffers + 1) * plan.cores


def conflict_free(rows: int) -> int:
    """A pitch at which a strided load reads eight rows at once: strides of whole tiles hit one bank and split."""
    return rows + 1 if rows % SUBLANES == 0 else rows


def make(signature: Signature, config: RaggedPageAttentionv2Config, cores: int, e4m3_bias_11: bool) -> Plan:
    """The plan of a call; every field of `config` that this kernel knows must be set.

    Raises:
        ValueError: naming a block size that this kernel cannot take.
    """
    rows, pages = config.num_queries_per_block, config.num_kv_pages_per_block
    buffers = config.num_stages
    if rows is None or pages is None or buffers is None:
        raise ValueError(f"config {config}: num_queries_per_block, num_kv_pages_per_block and num_stages are needed")
    if rows % 16:
        raise ValueError(f"num_queries_per_block={rows}: the TPU kernel takes multiples of 16, whole packed tiles")
    if pages & (pages - 1):
        raise ValueError(
            f"num_kv_pages_per_block={pages}: the TPU kernel takes powers of two, so that the page ids of a block "
            "never straddle two transfers"
        )
    if buffers < 2:
        raise ValueError(f"num_stages={buffers}: the TPU kernel needs two buffers or more, one computes, one fills")
    unknown = [name for name, _ in config.options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"option {unknown[0]!r}: the TPU kernel knows {' and '.join(OPTIONS)}")
    # By hand only where a token's rows fill whole words; Mosaic transfers no 6 rows into 8.
    by_hand = e4m3_bias_11 and signature.kv_dtype == "float8_e4m3fn" and signature.num_kv_heads % 2 == 0
    unit = E4M3_UNIT if by_hand else 1.0
    return Plan(
        q_heads=signature.num_q_heads,
        heads=signature.num_kv_heads,
        head_dim=signature.head_dim,
        page=signature.page_size,
        q_dtype="float32" if signature.q_dtype == "float16" else signature.q_dtype,
        kv_dtype=signature.kv_dtype,
        dots=signature.compute_dtype,
        scale=signature.softmax_scale * unit,
        cap=signature.logits_soft_cap,
        window=signature.sliding_window,
        sinks=signature.sinks,
        k_scaled=signature.k_scale,
        v_scaled=signature.v_scale,
        lse=signature.return_lse,
        block_q=rows,
        block_pages=pages,
        buffers=buffers,
        unpack_tokens=config.option("unpack_tokens", pages * signature.page_size),
        cores=config.option("cores", cores),
        unit=unit,
        slices=-(-signature.pages_per_seq // table_entries(pages)),
    )
