"""The native extension: pages, LSH index and decode attention on the CPU.

Arrays are NumPy arrays over the caller's memory (`tensor.numpy()`, zero copies). Where rows are
concerned, `row dtype` is float32, or uint16 holding the bits of bfloat16 or float16 values. Wrong
dtypes, shapes, strides or ids raise ValueError in a sentence before anything is read or written.
Every function that does work releases the GIL.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Rows: TypeAlias = npt.NDArray[Any]  # of row dtype

class Isa:
    """Instruction set of the kernels."""

    portable: Isa
    avx2: Isa
    avx512: Isa
    avx512_vpopcnt: Isa
    @property
    def name(self) -> str: ...

def resolve_isa(name: str) -> Isa:
    """"auto" gives the best one that is built and that this CPU has; a name forces that one.

    Raises ValueError naming the choices of this machine when a forced one is missing here.
    """

class ThreadPool:
    """Worker threads, one pinned to each CPU of `cpus`; the calling thread stands in for the first.

    spin_us: how long after a job they look for the next one before they sleep, at most 10,000,000; a
    job that comes within it wakes nobody. While a SegmentBuilder that gives way to the pool builds,
    they spin for 40 us at most.
    An empty or failing pin (a CPU that the process may not use) raises ValueError.
    """

    def __init__(self, cpus: Sequence[int], spin_us: int = 40) -> None: ...
    @staticmethod
    def of_openmp(num_threads: int) -> ThreadPool:
        """Of the threads of the process's OpenMP runtime, which are wherever that has bound them: the
        calling thread's team, as in torch's own operations. RuntimeError where there is none."""
    @property
    def num_threads(self) -> int: ...
    @property
    def spin_us(self) -> int:
        """0 on OpenMP's threads, which wait as their runtime does."""
    @property
    def num_sleeping(self) -> int:
        """Threads that sleep now."""
    @property
    def num_wakes(self) -> int:
        """Jobs that had to wake threads."""

class Pages:
    """The host pages of one sparse layer: rows, codes and write epochs.

    memory: uint8 [num_blocks, num_kv_heads, chunk_bytes], C-contiguous, kept alive by this object.
    A chunk holds rows [block_size][K | V][head_size] and then codes [block_size / 32][num_tables][32]
    uint16. row_dtype: "float32", "bfloat16" or "float16". block_size: a multiple of 32.
    num_tables: L; 0 for pages without codes.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        row_dtype: str,
        block_size: int,
        head_size: int,
        num_tables: int,
    ) -> None: ...
    @staticmethod
    def chunk_bytes(row_dtype: str, block_size: int, head_size: int, num_tables: int) -> int:
        """Smallest chunk that holds such a page of one kv head."""
    def store_rows(
        self, key: Rows, value: Rows, slots: npt.NDArray[np.int64], pool: ThreadPool
    ) -> None:
        """Writes rows; a write to offset 0 of a block starts a new write epoch of that block.

        key, value: row dtype [num_tokens, num_kv_heads, head_size], last dimension contiguous,
        any other strides; slots: int64 [num_tokens], block * block_size + offset, -1 skips.
        """
    def store_codes(
        self, codes: npt.NDArray[np.uint16], slots: npt.NDArray[np.int64], pool: ThreadPool
    ) -> None:
        """codes: uint16 [num_tokens, num_kv_heads, num_tables]."""
    def load_codes(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """uint16 [num_tokens, num_kv_heads, num_tables]."""
    def note_writes(self, slots: npt.NDArray[np.int64]) -> None:
        """The bookkeeping of `store_rows` for tokens that something else writes to the pages.

        slots as in store_rows, in the order of the tokens. A write to offset 0 of a block starts a
        new epoch; a block fills from its start, so that after a write at offset o it holds o + 1
        tokens. Safe to call from several threads at once.
        """
    def forget(self) -> None:
        """Every block is empty, in a new epoch; nothing may be writing meanwhile."""
    def epoch(self, block: int) -> int: ...
    def written_blocks(self) -> npt.NDArray[np.int32]:
        """Blocks that hold tokens, ascending. A freed block counts until its next owner's writes."""
    @property
    def num_tokens(self) -> int:
        """Tokens held in all blocks."""
    @property
    def num_used_blocks(self) -> int:
        """Blocks that hold tokens."""

def pack_codes(
    projections: npt.NDArray[np.float32], num_bits: int, isa: Isa, pool: ThreadPool
) -> npt.NDArray[np.uint16]:
    """Sign bits to codes: float32 [n, L * K] -> uint16 [n, L]; bit k of code l is x[l * K + k] > 0."""

def encode_signatures(
    keys: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    row_dtype: str,
    signs: npt.NDArray[np.int8],
    bits: int,
    isa: Isa,
    pool: ThreadPool,
) -> npt.NDArray[np.uint8]:
    """Blocks of signatures, uint8 [n / 128, block_bytes], byte for byte those of signature_blocks.py.

    keys: [n, head_size], n a multiple of 128, float32 or the bits of row_dtype; signs: int8 [2, size] of
    signature_reference.rotation_signs; bits: 1, 2 or 4.
    """

class SignatureRule:
    """The list of each step (signature_draw.py): which rows of the middle, of what chances.

    row_budget: a fraction of the middle above 0 and up to 1, the rows that a kv head's whole group reads
    on average; seed, layer and first_kv_head, of this rank: what a draw comes from beside its position.
    """

    def __init__(
        self,
        *,
        sink_tokens: int,
        window_tokens: int,
        row_budget: float,
        seed: int,
        layer: int,
        first_kv_head: int,
    ) -> None: ...

class SignaturePool:
    """The signatures of one layer's pages, in the caller's memory.

    Blocks of 128 tokens are encoded where a request's decode step or `encode` first finds them complete,
    and again once they are written anew.
    """

    def __init__(
        self,
        pages: Pages,
        memory: npt.NDArray[np.uint8],
        signs: npt.NDArray[np.int8],
        bits: int,
    ) -> None:
        """pages: whose block size is a multiple of 128; memory: aligned to 64 bytes, [num_blocks *
        num_kv_heads * block_size / 128 * signature_blocks.block_bytes]; signs: as for
        `encode_signatures`."""
    def encode(
        self,
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        *,
        isa: Isa,
        pool: ThreadPool,
    ) -> None:
        """What the requests' first seq_lens tokens complete; their rows are in the pages."""
    def lists(
        self,
        rule: SignatureRule,
        query: torch.Tensor | npt.NDArray[np.generic],
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        *,
        scale: float,
        exact_below: int,
        isa: Isa,
        pool: ThreadPool,
    ) -> list[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]]]:
        """Of each request and kv head (tokens, their log chances), as a decode step draws them; empty
        where the step attends exactly. query: [num_reqs, num_q_heads, head_size]."""
    @property
    def num_encoded(self) -> int:
        """Blocks of 128 tokens, all kv heads of each."""

class SimHash:
    """The hyperplanes of one layer as Walsh-Hadamard transforms between random signs.

    signs: int8 [3 + blocks, size] of reference.hadamard_signs for this head_size, K and L.
    """

    def __init__(
        self, signs: npt.NDArray[np.int8], head_size: int, num_bits: int, num_tables: int
    ) -> None: ...
    def hash(
        self,
        vectors: npt.NDArray[np.float32],
        center: npt.NDArray[np.float32] | None,
        isa: Isa,
        pool: ThreadPool,
    ) -> npt.NDArray[np.uint16]:
        """vectors: float32 [n, num_heads, head_size], less center, float32 [num_heads, head_size],
        where it is given -> uint16 [n, num_heads, num_tables]; a bit is set where its projection
        is > 0."""

class InclusionTable:
    """log u over the collision probability, for one (K, L) and every threshold; source: reference.py.

    num_bits: K; num_tables: L, at most 255. Takes a tenth of a second and L * 33 KB: share it.
    """

    def __init__(self, num_bits: int, num_tables: int) -> None: ...
    def log_u(
        self, cosine: npt.NDArray[np.float32], min_matches: int, fraction: float, isa: Isa
    ) -> npt.NDArray[np.float32]:
        """What the kernel uses for log u at these cosines, any 1-D length, where this fraction of the
        tokens that match in exactly min_matches tables is taken; 1 is the paper's u."""

class SampleRule:
    """Which tokens of the middle a query head samples: those that match in min_matches tables or more.

    row_budget: at most this fraction of the middle (one row at least), best matches first and of equal
    ones an even choice that depends on (seed, query, position, head) alone; 0 for no limit.
    min_matches: 1 to L.
    """

    def __init__(
        self,
        table: InclusionTable,
        *,
        min_matches: int,
        sink_tokens: int,
        window_tokens: int,
        row_budget: float = 0.0,
        seed: int = 0,
    ) -> None: ...

def idle_segment_bytes() -> int:
    """Memory, bytes, that dropped segments of this process left for the next ones of their size: at most
    four times the largest size there was."""

class LshIndex:
    """Sealed bucket segments over the pages of one layer.

    A segment covers consecutive tokens of a request, as many as one of the levels and aligned to
    that size, and is known by its (block, write epoch)s. A request is best covered by full stretches
    of the largest level, then of the next, and so on. A larger segment takes the place of those that
    it covers.
    num_bits: K, with codes below 2**K. levels: ascending, each a multiple of the one before and of
    the block size, at most 65,536. max_bytes: what the segments together may take, 0 = no limit; a
    build beyond it is refused, and its tokens are compared by code.
    """

    def __init__(
        self, pages: Pages, num_bits: int, levels: Sequence[int], max_bytes: int = 0
    ) -> None: ...
    def seal(
        self,
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        pool: ThreadPool,
    ) -> int:
        """Builds the segments that these requests lack; drops the stale ones.

        block_tables: int32 [num_reqs, max_blocks]; seq_lens: int32 [num_reqs], tokens whose rows
        AND codes are in the pages. Returns the number of segments built.
        """
    def missing(
        self, block_tables: npt.NDArray[np.int32], seq_lens: npt.NDArray[np.int32]
    ) -> list[list[int]]:
        """The stretches, by their blocks, that `seal` would build or a builder be asked for."""
    def find(self, block_table: npt.NDArray[np.int32], num_tokens: int) -> list[tuple[int, int]]:
        """Token ranges (begin, end) of the segments that serve a request; block_table: int32 [n]."""
    def clear(self) -> None: ...
    def forget(self) -> None:
        """`clear`, and the counts of built, dropped and refused segments start again."""
    @property
    def changes(self) -> int:
        """Changes when requests may lack other segments than before, or segments are stale; a
        stretch that was completed counts once any request begins a block."""
    @property
    def max_bytes(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def segments_built(self) -> int: ...
    @property
    def segments_dropped(self) -> int: ...
    @property
    def builds_refused(self) -> int:
        """Builds that max_bytes did not allow."""

def sample(
    pages: Pages,
    rule: SampleRule,
    index: LshIndex | None,
    query_codes: npt.NDArray[np.uint16],
    block_tables: npt.NDArray[np.int32],
    seq_lens: npt.NDArray[np.int32],
    *,
    isa: Isa,
    pool: ThreadPool,
) -> list[list[tuple[npt.NDArray[np.int32], int, float]]]:
    """Per request and query head the sample, by the code that decode runs: ascending positions, and the
    threshold: all that match in more tables than the second value are taken, and of those that match
    in as many the fraction that is the third."""

class DecodeBatch:
    """What one step asks of every layer: requests that decode one token each. Checked and copied once.

    block_tables: int32 [num_reqs, max_blocks]; seq_lens: int32 [num_reqs], the query's own token included;
    tokens: int64 [num_reqs], ascending, the rows of queries and outputs that are the requests', by default
    the first num_reqs. For any layer whose pages have as many blocks of as many tokens as these.
    """

    def __init__(
        self,
        pages: Pages,
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        tokens: npt.NDArray[np.int64] | None = None,
    ) -> None: ...

class DecodeCounters:
    """What one layer did so far; times in nanoseconds, lookup and attention summed over threads."""

    @property
    def decode_steps(self) -> int: ...
    @property
    def sampled_heads(self) -> int: ...
    @property
    def exact_heads(self) -> int: ...
    @property
    def sampled_rows(self) -> int: ...
    @property
    def middle_rows(self) -> int: ...
    @property
    def error_bars(self) -> int:
        """Query heads that had one, over steps."""
    @property
    def error_bar_sum(self) -> float:
        """Of these, each at most 1."""
    @property
    def hash_ns(self) -> int:
        """Hashing of queries; 0 where their codes are given."""
    @property
    def lookup_ns(self) -> int: ...
    @property
    def attend_ns(self) -> int: ...
    @property
    def store_ns(self) -> int:
        """Writing the decoded tokens' rows and codes, where a layer does that itself."""
    @property
    def step_ns(self) -> int:
        """Whole calls, or whole callbacks."""

class DecodeLayer:
    """Decode attention of one layer: one query per request over its pages.

    rule is None for exact attention, and then index and hasher are, too; without an index all tokens
    are compared by code; without a hasher each call brings the queries' codes. A request whose middle is
    shorter than exact_below is attended exactly.
    """

    def __init__(
        self,
        pages: Pages,
        rule: SampleRule | None,
        index: LshIndex | None,
        hasher: SimHash | None,
        *,
        scale: float,
        exact_below: int,
        isa: Isa,
        pool: ThreadPool,
    ) -> None: ...
    @staticmethod
    def of_signatures(
        signatures: SignaturePool,
        rule: SignatureRule,
        *,
        scale: float,
        exact_below: int,
        isa: Isa,
        pool: ThreadPool,
    ) -> DecodeLayer:
        """A layer that samples by signatures, from its first call on, and takes no center."""
    def set_center(self, center: npt.NDArray[np.float32]) -> None:
        """center: float32 [num_kv_heads, head_size], copied; once. Calls before it attend exactly,
        calls after it rely on the codes of all tokens that their requests hold."""
    def attend(
        self,
        query: torch.Tensor | npt.NDArray[np.generic],
        batch: DecodeBatch,
        out: torch.Tensor | npt.NDArray[np.generic],
        lse: npt.NDArray[np.float32] | None = None,
        rows: npt.NDArray[np.int32] | None = None,
        query_codes: npt.NDArray[np.uint16] | None = None,
        error_bars: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """One decode step.

        query: [num_tokens, num_q_heads, head_size], whole rows contiguous, float32 or the pages' row
        dtype (of arrays 16-bit ones as uint16); out: likewise, but with the heads of a token one after
        the other. Written are the batch's tokens of out; lse: float32 [num_reqs, num_q_heads], natural
        logarithm; rows: int32 [num_reqs, num_q_heads], how many the middle's sample has, -1 where exact.
        A request of seq_len 0 gets zeros and -inf. query_codes: uint16 [num_reqs, num_q_heads,
        num_tables], where the layer has a center but no hasher. error_bars: float32 [num_reqs,
        num_q_heads], signature_reference.error_bar in the steps whose position plus kv head is a
        multiple of 16, NaN in others, where exact and without signatures.
        """
    @property
    def counters(self) -> DecodeCounters: ...
    def recent_rows(self) -> npt.NDArray[np.int32]:
        """Rows sampled by the last query heads, at most 16,384, in no particular order."""
    def forget_steps(self) -> None:
        """The counters and the recent rows start again."""

# ------------------------------------------------------------------------ decode in stream order

def find_launch_host_func() -> int:
    """Address of cuLaunchHostFunc in libcuda.so.1; RuntimeError where the driver is missing."""

class HostCallbacks:
    """Host work in stream order, and the errors it runs into.

    launch_host_func: address of a function with cuLaunchHostFunc's signature,
    CUresult(CUstream, void (*)(void *), void *). A launch that it refuses raises RuntimeError at
    once, with its code. Work that fails fills its outputs with NaN, and so does all work after it
    until `raise_error` has raised; host work never touches Python. Each launch runs once, so that
    none may be captured in a CUDA graph.
    """

    def __init__(self, launch_host_func: int) -> None: ...
    def raise_error(self) -> None:
        """Raises RuntimeError with the first error since the last raise; nothing without one."""
    @property
    def pending(self) -> int:
        """Callbacks launched and not yet finished."""

class StreamMetadata:
    """The arrays in host memory that a stream fills with each step's metadata.

    block_tables: int32 [max_reqs, max_blocks]; seq_lens: int32 [max_reqs]; slots: int64
    [max_tokens]. The stream may fill them for the next step once the first host callback of this
    step has run: that one copies what the step needs.
    """

    def __init__(
        self,
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
    ) -> None: ...

class StreamStep:
    """What is known about a step when it is enqueued; the rest is in `metadata` when it runs.

    decode_rows: int32 [num_decodes], rows of requests that decode one token; decode_tokens: int64
    [num_decodes], the tokens' flat positions; chunk_rows: int32 [num_chunks], rows of requests that
    prefill; chunk_starts, chunk_stops: int64 [num_chunks], their flat token ranges. All are copied.
    seq_lens include the step's own tokens. A slot of -1 means a padded or dummy row: nothing of it
    is stored or indexed, its length and blocks are not looked at, and a decode gets zeros.
    Metadata that is out of range is an error of the step's first callback (HostCallbacks).
    """

    def __init__(
        self,
        metadata: StreamMetadata,
        num_reqs: int,
        num_tokens: int,
        decode_rows: npt.NDArray[np.int32],
        decode_tokens: npt.NDArray[np.int64],
        chunk_rows: npt.NDArray[np.int32],
        chunk_starts: npt.NDArray[np.int64],
        chunk_stops: npt.NDArray[np.int64],
    ) -> None: ...

class DecodeExchange:
    """Buffers in host memory through which decodes go; layers in one stream order share them.

    query: float32 [max_decodes, num_q_heads, head_size]; key, value: row dtype [max_decodes,
    num_kv_heads, head_size]; query_codes: uint16 [max_decodes, num_q_heads, num_tables]; key_codes:
    uint16 [max_decodes, num_kv_heads, num_tables]; out: float32 like query. The codes may be None in exact mode.
    """

    def __init__(
        self,
        query: npt.NDArray[np.float32],
        key: Rows,
        value: Rows,
        query_codes: npt.NDArray[np.uint16] | None,
        key_codes: npt.NDArray[np.uint16] | None,
        out: npt.NDArray[np.float32],
    ) -> None: ...
    @property
    def max_decodes(self) -> int: ...

class SegmentBuilder:
    """One background thread, with workers on `cpus`, that builds segments for all layers.

    Nothing waits for it: what lacks a segment is compared by code. Its threads are batch threads,
    niced by 10. A segment is kept only if no block it covers has had a new owner since it was asked for.
    Smaller ones are built before larger ones, equal ones layer by layer. While decode attention runs on
    the pool `gives_way_to`, its threads rest, but for a millisecond after each 200 of waiting, where
    smaller segments serve meanwhile; else but for 100 microseconds after each 2 milliseconds.
    """

    def __init__(self, cpus: Sequence[int], gives_way_to: ThreadPool | None = None) -> None: ...
    def ask(
        self,
        index: LshIndex,
        block_tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
    ) -> None:
        """Asks for what these requests lack, arguments as for LshIndex.seal, and for stale segments
        to be freed. An index has one builder."""
    def drain(self) -> None:
        """Waits until nothing is queued or running."""
    def close(self) -> None:
        """Withdraws everything and ends the threads; to ask for more does nothing then."""
    def raise_error(self) -> None:
        """Raises RuntimeError with the first error since the last raise; nothing without one."""
    @property
    def pending(self) -> int:
        """Layers queued or running."""

class StreamLayer:
    """The host side of one sparse layer: what its stream callbacks do.

    rule is None for exact attention, and then index is, too; without an index all tokens are compared
    by code, without a builder no segments are built. The other arguments are those of DecodeLayer, except
    that a middle of no tokens is always attended exactly.
    """

    def __init__(
        self,
        pages: Pages,
        rule: SampleRule | None,
        index: LshIndex | None,
        exchange: DecodeExchange,
        callbacks: HostCallbacks,
        builder: SegmentBuilder | None,
        *,
        scale: float,
        exact_below: int,
        isa: Isa,
        pool: ThreadPool,
    ) -> None: ...
    @staticmethod
    def of_signatures(
        signatures: SignaturePool,
        rule: SignatureRule,
        exchange: DecodeExchange,
        callbacks: HostCallbacks,
        *,
        scale: float,
        exact_below: int,
        isa: Isa,
        pool: ThreadPool,
    ) -> StreamLayer:
        """A layer that samples by signatures from its first decode on, and takes neither codes nor a
        center."""
    def set_center(self, center: npt.NDArray[np.float32]) -> None:
        """center: float32 [num_kv_heads, head_size], copied; once. What is launched before it
        decodes exactly and stores no codes; what is launched after it relies on the codes of all
        tokens that its requests hold."""
    def launch_stored(self, stream: int, step: StreamStep) -> None:
        """Notes the writes of the step's chunks, whose rows and codes the stream has stored by now,
        and asks the builder for segments. Any decode of these requests, or over their blocks, must
        come after it in stream order. Launches nothing for a step without chunks."""
    def launch_encode(self, stream: int, step: StreamStep) -> None:
        """Encodes what the step's chunks completed, of requests that are long enough to be sampled; comes
        after `launch_stored` in stream order. Only rows of later chunks must wait for it: a decode
        that comes first encodes what it needs. Launches nothing for a step without chunks.

        Raises ValueError for a layer without signatures.
        """
    def launch_decode(self, stream: int, step: StreamStep) -> None:
        """Stores the step's decoded tokens from the exchange and attends: exchange.out[:num_decodes]
        holds the result in stream order. Launches nothing for a step without decodes.

        Raises ValueError when the exchange is too small for the step.
        """
    @property
    def counters(self) -> DecodeCounters: ...
    def recent_rows(self) -> npt.NDArray[np.int32]:
        """Rows sampled by the last query heads, at most 16,384, in no particular order."""
    def forget_steps(self) -> None:
        """The counters and the recent rows start again."""
