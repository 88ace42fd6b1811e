"""Block sizes for a chip, from what the chip is: VMEM, bandwidth, cores; each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from rpa.backends.pallas_tpu import plan as plans
from rpa.backends.pallas_tpu.plan import LANES, SUBLANES, Plan, power_of_two_below, round_up
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device
from rpa.signature import Signature

MIB = 1 << 20


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; figures a core."""

    name: str
    vmem: int  # bytes
    bandwidth: float  # HBM bytes a second
    clock: float  # hertz, derived from the peak rates
    cores: int  # TensorCores that one program's parallel grid axis is spread over
    e4m3_bias_11: bool  # converts e4m3 of that exponent bias, and not the e4m3fn of the pages


# From the public specifications, as JAX's own table of chips has them.
CHIPS = {
    "TPU v4": Chip("v4", 16 * MIB, 0.61e12, 1.05e9, 2, False),
    "TPU v5 lite": Chip("v5e", 128 * MIB, 0.82e12, 1.5e9, 1, True),
    "TPU v5e": Chip("v5e", 128 * MIB, 0.82e12, 1.5e9, 1, True),
    "TPU v5": Chip("v5p", 64 * MIB, 1.23e12, 1.75e9, 2, True),
    "TPU v5p": Chip("v5p", 64 * MIB, 1.23e12, 1.75e9, 2, True),
    "TPU v6 lite": Chip("v6e", 128 * MIB, 1.64e12, 1.75e9, 1, True),
    "TPU v6e": Chip("v6e", 128 * MIB, 1.64e12, 1.75e9, 1, True),
    "TPU7": Chip("tpu7x", 64 * MIB, 3.7e12, 2.2e9, 1, False),
    "TPU7x": Chip("tpu7x", 64 * MIB, 3.7e12, 2.2e9, 1, False),
}
TOO_OLD = ("TPU v2", "TPU v3", "TPU v4 lite")
# A chip nobody described: the smallest of the known ones is safe.
UNKNOWN = Chip("an unknown TPU", 16 * MIB, 1.0e12, 1.5e9, 1, False)
# From asking for a page to its last byte, assumed; buffers must cover it at full bandwidth.
LATENCY = 1.5e-6
# What the kernel takes when the caller sets no limit, the rest being XLA's, to prefetch weights into; and what it may
# take where its smallest blocks need more.
VMEM_SHARE, VMEM_MOST = 0.5, 0.9
# SMEM is 1 MiB on every chip listed; the work list may take half.
SMEM_BYTES = MIB // 2
# An interpreter pays for every store it plays, a compiled program does not.
INTERPRETED_TOKENS = 16


def of(device: Device) -> Chip:
    """The chip behind a device."""
    return CHIPS.get(device.kind, UNKNOWN)


def vmem_limit(signature: Signature, device: Device, share: float = VMEM_SHARE) -> int:
    """Bytes of VMEM the kernel may use: the caller's limit where the chip has as much, or a share of the chip's."""
    chip, asked = of(device), signature.vmem_limit_bytes
    if asked is None:
        return int(chip.vmem * share)
    return asked if chip is UNKNOWN else min(asked, int(chip.vmem * VMEM_MOST))


def vmem_granted(signature: Signature, device: Device, plan: Plan) -> int:
    """The limit that the compiler is given: the usual one, raised for a plan that needs more.

    Raises:
        ValueError: the plan of an explicit config needs more than there is.
    """
    reason = too_large(signature, device, plan)
    if reason:
        raise ValueError(reason)
    return max(vmem_limit(signature, device), plan.vmem_bytes)


def too_large(signature: Signature, device: Device, plan: Plan) -> str | None:
    """Why a plan does not fit into VMEM, or None."""
    limit = vmem_limit(signature, device, VMEM_MOST)
    if plan.vmem_bytes <= limit:
        return None
    source = "vmem_limit_bytes" if limit == signature.vmem_limit_bytes else f"what {of(device).name} can spare"
    return (
        f"a block of {plan.block_pages} pages of {plan.page} tokens with {plan.block_q} query rows, "
        f"{plan.q_heads} query and {plan.heads} kv heads of size {plan.head_dim} needs about "
        f"{plan.vmem_bytes / MIB:.1f} MiB of VMEM, and {source} is {limit / MIB:.1f} MiB"
    )


def token_bytes(signature: Signature) -> int:
    """Bytes of one token's keys and values in HBM, lanes padded as they lie there."""
    return 2 * signature.num_kv_heads * round_up(signature.head_dim, LANES) * plans.ITEMSIZE[signature.kv_dtype]


def block_tokens(signature: Signature, device: Device) -> int:
    """Keys a block: 256, at which a block's fixed costs (cursors, the dots' latency) are a fifth of its bundles.

    Twice that where tokens are small (up to four rows of words) and fixed costs weigh more. Half where the code of a
    block would grow past what compiles in seconds: a token takes several registers, or f32 dots six passes.
    """
    if device.interpreted:
        return INTERPRETED_TOKENS
    half = signature.compute_dtype == "bfloat16"
    rows = signature.num_kv_heads * (1 if half else 2)
    registers = -(-rows // SUBLANES) * -(-signature.head_dim // LANES)
    if registers > (2 if half else 1):
        return 128
    return 512 if registers == 1 and rows <= SUBLANES // 2 else 256


def block_queries(signature: Signature, device: Device) -> int:
    """Query rows a tile: enough that rows times group fill the 128 lanes scores are laid out in, 16 at least."""
    if device.interpreted:
        return 16
    filling = round_up(-(-LANES // signature.group), 16)
    return max(16, min(filling, LANES, round_up(signature.num_tokens, 16)))


def buffers(signature: Signature, device: Device, block_pages: int) -> int:
    """KV blocks in VMEM: the ones on their way must cover the latency at full bandwidth; three at least."""
    block = block_pages * signature.page_size * token_bytes(signature)
    return min(8, max(3, 1 + -(-int(of(device).bandwidth * LATENCY) // block)))


def heuristic(signature: Signature, device: Device) -> RaggedPageAttentionv2Config:
    """The block sizes for a call; shrunk until the plan fits: buffers first, then keys, then query rows.

    What is shrunk last (a third buffer, blocks of fewer than 128 keys) costs more than VMEM that XLA could have used.
    """
    wanted = max(1, min(block_tokens(signature, device) // signature.page_size, signature.pages_per_seq))
    pages, rows = power_of_two_below(wanted), block_queries(signature, device)
    count = 3 if device.interpreted else buffers(signature, device, pages)
    usual, most = vmem_limit(signature, device), vmem_limit(signature, device, VMEM_MOST)
    while True:
        config = RaggedPageAttentionv2Config(
            num_kv_pages_per_block=pages,
            num_queries_per_block=rows,
            num_stages=count,
            platform="pallas",
            backend="tpu",
        )
        needed = plan_of(signature, device, config).vmem_bytes
        if needed <= usual:
            return config
        if count > 3:
            count -= 1
        elif pages > 1 and pages * signature.page_size > LANES:
            pages //= 2
        elif rows > 16:
            rows = max(16, rows // 2 // 16 * 16)
        elif needed <= most:
            return config
        elif count > 2:
            count -= 1
        elif pages > 1:
            pages //= 2
        else:
            return config  # `supports` says that it does not fit


def candidates(signature: Signature, device: Device) -> tuple[RaggedPageAttentionv2Config, ...]:
    """The heuristic's config and its neighbours that fit, for the tuner to time."""
    first = heuristic(signature, device)
    pages, rows = first.num_kv_pages_per_block, first.num_queries_per_block
    assert pages is not None
    assert rows is not None
    tried = [first]
    for more_pages in (pages, pages // 2, pages * 2):
        for more_rows in (rows, rows * 2, rows // 2):
            if not 1 <= more_pages <= power_of_two_below(signature.pages_per_seq) or more_rows % 16 or more_rows < 16:
                continue
            config = first.replace(num_kv_pages_per_block=more_pages, num_queries_per_block=more_rows)
            fits = plan_of(signature, device, config).vmem_bytes <= vmem_limit(signature, device)
            if fits and config not in tried:
                tried.append(config)
    return tuple(tried)


def plan_of(signature: Signature, device: Device, config: RaggedPageAttentionv2Config) -> Plan:
    """The plan of a config on a chip; fields the config leaves open are the heuristic's."""
    if None in (config.num_kv_pages_per_block, config.num_queries_per_block, config.num_stages):
        known = heuristic(signature, device)
        config = config.replace(
            num_kv_pages_per_block=config.num_kv_pages_per_block or known.num_kv_pages_per_block,
            num_queries_per_block=config.num_queries_per_block or known.num_queries_per_block,
            num_stages=config.num_stages or known.num_stages,
        )
    chip = of(device)
    return plans.make(signature, config, chip.cores, chip.e4m3_bias_11)


def refusal(signature: Signature, device: Device) -> str | None:
    """Why this chip cannot take the call, or None."""
    if device.kind in TOO_OLD:
        return f"{device.kind} has no room for it: the work list needs SMEM that starts with TPU v4"
    plan = plan_of(signature, device, heuristic(signature, device))  # the smallest blocks, where little fits
    reason = too_large(signature, device, plan)
    if reason:
        return reason
    tiles = plans.list_size(signature, plan)
    if tiles * 32 > SMEM_BYTES:
        return (
            f"num_tokens={signature.num_tokens} and max_seqs={signature.max_seqs} make up to {tiles} tiles, whose list "
            f"takes {tiles * 32} bytes of SMEM; {SMEM_BYTES} are there"
        )
    return None
