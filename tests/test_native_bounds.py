"""Nothing past an array's end is read or written: each ends where a page without access begins.

Head sizes that are no multiple of the lanes end within a vector. A failure here is a crash.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from native_helpers import Layer, Rule, decode_attention, each_isa, inclusion_table, pool

from vllm_magicpig import _C, reference

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def at_the_edge(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last one of its mapping."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(address + size, mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [16, 24, 40, 80, 248])
@pytest.mark.parametrize("group", [1, 4])
def test_rows_and_queries(isa: _C.Isa, dtype: str, head_size: int, group: int) -> None:
    """Pages without codes end with their last row."""
    memory = np.zeros((1, 1, _C.Pages.chunk_bytes(dtype, 32, head_size, 0)), np.uint8)
    pages = _C.Pages(at_the_edge(memory), dtype, 32, head_size, 0)
    query = at_the_edge(np.ones((1, group, head_size), np.float32))
    out = at_the_edge(np.full((1, group, head_size), np.nan, np.float32))
    lse = at_the_edge(np.full((1, group), np.nan, np.float32))
    decode_attention(
        pages,
        None,
        None,
        query,
        None,
        None,
        np.zeros((1, 1), np.int32),
        np.array([32], np.int32),
        out,
        lse,
        scale=1.0,
        exact_below=0,
        isa=isa,
        pool=pool(),
    )
    assert np.abs(out).max() == 0
    np.testing.assert_allclose(lse, np.log(32), rtol=1e-6)


@each_isa
@pytest.mark.parametrize("head_size", [16, 24, 40, 80, 248])
def test_center_and_codes(isa: _C.Isa, head_size: int) -> None:
    """All sampled, and the last tile is the end of the memory."""
    layer = Layer(1, num_tables=3, head_size=head_size)
    layer.memory[...] = 0
    memory = at_the_edge(layer.memory[..., :-2])
    pages = _C.Pages(memory, "float32", 32, head_size, 3)
    index = _C.LshIndex(pages, 3, [32])
    pages.note_writes(np.arange(32))
    out, lse = np.full((1, 1, head_size), np.nan, np.float32), np.full((1, 1), np.nan, np.float32)
    rows, *_ = decode_attention(
        pages,
        Rule(2, 0, 0).native(3, 3),
        index,
        at_the_edge(np.ones((1, 1, head_size), np.float32)),
        at_the_edge(np.zeros((1, 1, 3), np.uint16)),
        at_the_edge(np.ones((1, head_size), np.float32)),
        np.zeros((1, 1), np.int32),
        np.array([32], np.int32),
        out,
        lse,
        scale=1.0,
        exact_below=0,
        isa=isa,
        pool=pool(),
    )
    assert rows.tolist() == [[32]]
    assert np.abs(out).max() == 0


@each_isa
def test_projections(isa: _C.Isa) -> None:
    for num_signs in (1, 7, 8, 9, 15, 16, 17, 150):
        x = at_the_edge(np.ones((3, num_signs), np.float32))
        assert (_C.pack_codes(x, 1, isa, pool()) == 1).all()
        cosine = at_the_edge(np.ones(num_signs, np.float32))
        assert np.abs(inclusion_table(3, 3).log_u(cosine, 2, 1.0, isa)).max() < 1e-5


@each_isa
@pytest.mark.parametrize("head_size", [16, 24, 40, 80, 248])
@pytest.mark.parametrize("setting", [(10, 150), (2, 255)], ids=str)
def test_hashed_vectors(isa: _C.Isa, head_size: int, setting: tuple[int, int]) -> None:
    num_bits, num_tables = setting
    signs = reference.hadamard_signs(head_size, num_tables, num_bits, seed=0).numpy()
    simhash = _C.SimHash(at_the_edge(signs), head_size, num_bits, num_tables)
    vectors = at_the_edge(np.ones((3, 7, head_size), np.float32))
    center = at_the_edge(np.ones((7, head_size), np.float32))
    assert (simhash.hash(vectors, center, isa, pool()) == 0).all()
