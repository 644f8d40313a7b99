"""How many blocks host memory and device memory hold, and the sentence that tells a user so.

Pure arithmetic: imports neither torch nor vLLM. On CUDA a block of a sparse layer is a page in a
pinned host pool and a few placeholder bytes in vLLM's own cache; a block of a dense layer is vLLM's
ordinary page. One block table serves both, so the number of blocks is the smaller of two budgets.
All sizes are per rank: its kv heads, its layers, its share of the machine's RAM.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30

DEFAULT_RAM_SHARE = 0.7
"""Share of free RAM that all ranks of a machine take for pages and what lies beside them by default.

Pinned pages can neither be swapped nor reclaimed, so what is left must hold everything else, even
at its peak: the page cache through which weights are read, each rank's own Python, CUDA context and
staging buffers (4 to 10 GiB), and index memory that shared prefixes take beyond the plan (see
index_bytes_per_block). Not measured: a cautious choice, to be raised by host_kv_cache_gib."""

MAX_RAM_SHARE = 0.9
"""Share of free RAM beyond which a pool is refused: Linux would end some process instead."""

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM 0.32's default, config/cache.py."""

DEVICE_RESERVE_BYTES = 2 * GIB
"""Activations, CUDA graphs and prefill staging. An assumption: vLLM measures it at start-up."""

MAX_SEGMENT_TOKENS = 65536
"""Of the LSH index: ids are uint16."""

_CODE_BYTES = 2  # uint16, in pages and in the index
_HUGE_PAGE = 2 << 20  # a segment of this size or more has memory of its own, in whole _SMALL_PAGEs
_SMALL_PAGE = 4096
_SOURCE_BYTES = 16  # sizeof(Segment::Source)
_MIN_SEGMENT_TOKENS = 1024  # below it, offsets outweigh ids at K = 10
_LEVEL_FACTOR = 2  # a token is sorted seven times in all as its request grows to 65,536 tokens


def content_bytes(head_size: int, itemsize: int, num_tables: int) -> int:
    """Bytes of one token and kv head in a host page: K, V and codes, padded to whole elements."""
    codes = _divide_up(num_tables * _CODE_BYTES, itemsize) * itemsize
    return 2 * head_size * itemsize + codes


def host_block_bytes(
    num_sparse_layers: int,
    num_kv_heads: int,
    head_size: int,
    itemsize: int,
    num_tables: int,
    block_size: int,
) -> int:
    """Bytes of one block in the host pools of all sparse layers; num_tables 0 = exact attention."""
    content = content_bytes(head_size, itemsize, num_tables)
    return num_sparse_layers * num_kv_heads * block_size * content


def signature_block_bytes(
    num_sparse_layers: int, num_kv_heads: int, head_size: int, bits: int, block_size: int
) -> int:
    """Bytes of one block in the signature pools of all sparse layers; block_size: a multiple of 128;
    bits 0 = no signatures.

    From the layout of signature_blocks.py: per kv head and 128 tokens, 2 tiles of 64 tokens of bits and
    a 16-bit factor, a bfloat16 mean and two floats, in whole cache lines.
    """
    if bits == 0:
        return 0
    size = 1 << (head_size - 1).bit_length()
    tiles = 128 * (bits * size // 8 + 2)
    of_128_tokens = _divide_up(tiles + 2 * head_size + 8, 64) * 64
    return num_sparse_layers * num_kv_heads * block_size // 128 * of_128_tokens


def segment_levels(block_size: int) -> list[int]:
    """Tokens of a segment of each level, ascending: the tail that is compared by code stays below the
    first, and few segments of the last cover a long context."""
    level = _divide_up(_MIN_SEGMENT_TOKENS, block_size) * block_size
    levels = [level]
    while (factor := min(_LEVEL_FACTOR, MAX_SEGMENT_TOKENS // level)) > 1:
        level *= factor
        levels.append(level)
    return levels


def segment_bytes(
    num_kv_heads: int, num_bits: int, num_tables: int, block_size: int, segment_tokens: int
) -> int:
    """Bytes of one segment, all kv heads of a layer.

    From the Segment layout of cpu_kernels/magicpig.h: per kv head, ids uint16 [L, segment_tokens] and
    offsets uint16 [L, 2**K + 2]; one Source a block; large ones in whole pages.
    """
    storage = num_kv_heads * num_tables * (segment_tokens + (1 << num_bits) + 2) * _CODE_BYTES
    if storage >= _HUGE_PAGE:
        storage = _divide_up(storage, _SMALL_PAGE) * _SMALL_PAGE
    return storage + segment_tokens // block_size * _SOURCE_BYTES


def index_bytes_per_block(
    num_sparse_layers: int, num_kv_heads: int, num_bits: int, num_tables: int, block_size: int
) -> int:
    """Bytes of LSH index per block once it is sealed, all sparse layers, rounded up.

    The worst case, which is segments of the first level: the smaller, the more of it is offsets.
    num_tables 0 has no index: exact attention.

    This is the use of requests that share no block. A segment belongs to its LAST block, so
    requests whose common prefix ends inside a segment each hold one over the same earlier blocks.
    """
    if num_tables == 0:
        return 0
    return max(
        _divide_up(
            num_sparse_layers
            * segment_bytes(num_kv_heads, num_bits, num_tables, block_size, tokens),
            tokens // block_size,
        )
        for tokens in segment_levels(block_size)
    )


def index_spare_bytes(
    num_sparse_layers: int,
    num_kv_heads: int,
    num_bits: int,
    num_tables: int,
    block_size: int,
    max_model_len: int,
) -> int:
    """Bytes of LSH index beside those of the blocks, all sparse layers: while a segment is built, the
    smaller ones that it replaces still serve. Most of those are not of the first level, so that
    their blocks take less than is planned for: this is no whole segment of the last level.
    """
    if num_tables == 0:
        return 0
    worst = index_bytes_per_block(1, num_kv_heads, num_bits, num_tables, block_size)
    levels = [tokens for tokens in segment_levels(block_size) if tokens <= max_model_len]
    sizes = [
        segment_bytes(num_kv_heads, num_bits, num_tables, block_size, tokens) for tokens in levels
    ]
    spare = replaced = 0
    for i in range(1, len(levels)):
        # As many as fit without making the next larger one. The tail that completes the new segment
        # has none: it is not built twice.
        replaced += (levels[i] // levels[i - 1] - 1) * sizes[i - 1]
        spare = max(spare, sizes[i] + replaced - levels[i] // block_size * worst)
    return num_sparse_layers * spare


def max_index_bytes(
    num_blocks: int,
    num_kv_heads: int,
    num_bits: int,
    num_tables: int,
    block_size: int,
    max_model_len: int,
) -> int:
    """Bytes that the index of one layer may take over this many blocks: what the capacity is planned
    for. Where shared prefixes would take more, segments are not built."""
    layer = (1, num_kv_heads, num_bits, num_tables, block_size)
    return num_blocks * index_bytes_per_block(*layer) + index_spare_bytes(*layer, max_model_len)


def dense_block_bytes(
    num_layers: int, num_kv_heads: int, head_size: int, itemsize: int, block_size: int
) -> int:
    """Device bytes of one block of ordinary pages in this many layers."""
    return num_layers * num_kv_heads * block_size * 2 * head_size * itemsize


def device_block_bytes(
    num_dense_layers: int,
    num_sparse_layers: int,
    num_kv_heads: int,
    head_size: int,
    itemsize: int,
    block_size: int,
) -> int:
    """Device bytes of one block: dense layers' pages, one element a token for each sparse layer.

    vLLM asserts that a page has bytes, and zeroes pages of a mixed dtype, so one element it is.
    """
    dense = dense_block_bytes(num_dense_layers, num_kv_heads, head_size, itemsize, block_size)
    return dense + num_sparse_layers * block_size * itemsize


def device_kv_bytes(card_bytes: int, weight_bytes: int) -> int:
    """Device bytes left for the KV cache at vLLM's default utilisation; 0 if weights do not fit."""
    left = int(card_bytes * GPU_MEMORY_UTILIZATION) - weight_bytes - DEVICE_RESERVE_BYTES
    return max(left, 0)


def default_host_bytes(free_ram_bytes: int, local_ranks: int) -> int:
    """Bytes of host memory that one rank takes unless host_kv_cache_gib is set.

    free_ram_bytes: what this machine can give, MemAvailable or less where a cgroup limits it.
    """
    return int(free_ram_bytes * DEFAULT_RAM_SHARE) // local_ranks


def default_host_report(free_ram_bytes: int, local_ranks: int) -> str:
    """Says what `default_host_bytes` is made of."""
    ranks = "" if local_ranks == 1 else f" for each of {local_ranks} ranks"
    return (
        f"magicpig: {_gib(default_host_bytes(free_ram_bytes, local_ranks))} GiB of host memory{ranks}, "
        f"{DEFAULT_RAM_SHARE:.0%} of the {_gib(free_ram_bytes)} GiB of RAM that are free now; "
        "host_kv_cache_gib sets another size"
    )


def check_host_bytes(host_bytes: int, free_ram_bytes: int, local_ranks: int) -> None:
    """Raises ValueError when the ranks of this machine together ask for more RAM than is safe."""
    most = int(free_ram_bytes * MAX_RAM_SHARE) // local_ranks
    if host_bytes > most:
        ranks = "" if local_ranks == 1 else f" for each of {local_ranks} ranks"
        raise ValueError(
            f"magicpig option host_kv_cache_gib is {_gib(host_bytes)}{ranks}, but this machine has "
            f"{_gib_down(free_ram_bytes)} GiB of free RAM, of which {MAX_RAM_SHARE:.0%} may be pinned; "
            f"set it to at most {_gib_down(most)}, or where this machine's RAM grows as it is used, "
            "check_host_memory to false."
        )


@dataclass(frozen=True)
class Capacity:
    """Blocks that fit both budgets. The byte figures are per block, but the two budgets and the spare
    bytes."""

    host_bytes: int
    device_bytes: int
    host_block_bytes: int
    index_bytes_per_block: int
    device_block_bytes: int
    index_spare_bytes: int
    signature_block_bytes: int

    @property
    def _bytes_per_block(self) -> int:
        return self.host_block_bytes + self.index_bytes_per_block + self.signature_block_bytes

    @property
    def host_blocks(self) -> int | None:
        """Blocks that the host budget holds, and all that lies beside their pages; None without a
        sparse layer."""
        per_block = self._bytes_per_block
        return max(self.host_bytes - self.index_spare_bytes, 0) // per_block if per_block else None

    def host_bytes_for(self, num_blocks: int) -> int:
        """Pages with their signatures, or with the index once every block is sealed."""
        return num_blocks * self._bytes_per_block + self.index_spare_bytes

    @property
    def host_contents(self) -> str:
        """What the host budget is for."""
        return "pages and signatures" if self.signature_block_bytes else "pages and index"

    @property
    def device_blocks(self) -> int:
        return self.device_bytes // self.device_block_bytes

    @property
    def num_blocks(self) -> int:
        """What vLLM may allocate, its null block included."""
        host = self.host_blocks
        return self.device_blocks if host is None else min(host, self.device_blocks)

    @property
    def limited_by(self) -> str:
        host = self.host_blocks
        return "host memory" if host is not None and host < self.device_blocks else "device memory"

    @property
    def page_bytes(self) -> int:
        """Size of the pinned pools of all sparse layers."""
        return self.num_blocks * self.host_block_bytes

    @property
    def used_host_bytes(self) -> int:
        return self.host_bytes_for(self.num_blocks)

    def tokens(self, block_size: int) -> int:
        return usable_tokens(self.num_blocks, block_size)

    def requests(self, block_size: int, max_model_len: int) -> int:
        """Requests of max_model_len that run at once; they share no block."""
        return concurrent_requests(self.num_blocks, block_size, max_model_len)


def plan_blocks(
    host_bytes: int,
    device_bytes: int,
    host_block_bytes: int,
    index_bytes_per_block: int,
    device_block_bytes: int,
    *,
    index_spare_bytes: int = 0,
    signature_block_bytes: int = 0,
) -> Capacity:
    """The smaller of what host_bytes holds (pages AND index or signatures) and what device_bytes
    holds."""
    return Capacity(
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        host_block_bytes=host_block_bytes,
        index_bytes_per_block=index_bytes_per_block,
        device_block_bytes=device_block_bytes,
        index_spare_bytes=index_spare_bytes,
        signature_block_bytes=signature_block_bytes,
    )


def usable_tokens(num_blocks: int, block_size: int) -> int:
    """vLLM's BlockPool keeps block 0 for itself (the null block)."""
    return max(num_blocks - 1, 0) * block_size


def concurrent_requests(num_blocks: int, block_size: int, max_model_len: int) -> int:
    """Blocks are whole: a request of 129 tokens takes two of 128."""
    return max(num_blocks - 1, 0) // _divide_up(max_model_len, block_size)


def check_one_request(capacity: Capacity, *, block_size: int, max_model_len: int) -> None:
    """Raises ValueError when not even one request of max_model_len fits.

    Names what fits and only such remedies as help against the budget that is too small.
    """
    if capacity.requests(block_size, max_model_len) > 0:
        return
    needed = _divide_up(max_model_len, block_size) + 1
    fits = capacity.tokens(block_size)
    remedies = [f"lower --max-model-len to at most {fits:,}"] if fits else []
    budgets = []
    host_blocks = capacity.host_blocks
    if host_blocks is not None and host_blocks < needed:
        needed_bytes = capacity.host_bytes_for(needed)
        budgets.append(
            f"{_gib_up(needed_bytes)} GiB of host memory for {capacity.host_contents} (there "
            f"are {_gib_down(capacity.host_bytes)})"
        )
        remedies.insert(0, f"raise host_kv_cache_gib to at least {_gib_up(needed_bytes)}")
        if capacity.index_bytes_per_block:
            remedies.append("use fewer tables (L)")
    if capacity.device_blocks < needed:
        needed_bytes = needed * capacity.device_block_bytes
        budgets.append(
            f"{_gib_up(needed_bytes)} GiB of device memory (there are "
            f"{_gib_down(capacity.device_bytes)})"
        )
        remedies += ["name fewer dense_layers", "raise --gpu-memory-utilization"]
    raise ValueError(
        f"magicpig holds {fits:,} tokens, but one request of max_model_len = {max_model_len:,} "
        f"needs {' and '.join(budgets)}; {' or '.join(remedies)}."
    )


def report(
    capacity: Capacity,
    *,
    block_size: int,
    max_model_len: int,
    dense_block_bytes: int,
    dense_backend: str = "FLASH_ATTN",
) -> str:
    """The start-up line. dense_block_bytes: of one block where every layer is dense."""
    tokens = capacity.tokens(block_size)
    requests = _requests(capacity.requests(block_size, max_model_len))
    if capacity.limited_by == "host memory":
        limit = f"host memory ({_gib(capacity.host_bytes)} GiB for {capacity.host_contents})"
    else:
        limit = (
            f"device memory, with {_gib(capacity.used_host_bytes)} of "
            f"{_gib(capacity.host_bytes)} GiB of host memory for {capacity.host_contents}"
        )
    dense_blocks = capacity.device_bytes // dense_block_bytes
    dense_requests = _requests(concurrent_requests(dense_blocks, block_size, max_model_len))
    return (
        f"magicpig: {tokens:,} tokens ({requests} of {max_model_len:,}), limited by {limit}; the "
        f"same {_gib(capacity.device_bytes)} GiB of device memory would hold "
        f"{usable_tokens(dense_blocks, block_size):,} tokens ({dense_requests}) with "
        f"{dense_backend}"
    )


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number:,} requests"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _gib_up(num_bytes: int) -> str:
    """Rounded up to a tenth: that much is enough."""
    return f"{_divide_up(num_bytes * 10, GIB) / 10:.1f}"


def _gib_down(num_bytes: int) -> str:
    return f"{num_bytes * 10 // GIB / 10:.1f}"
