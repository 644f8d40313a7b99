"""How many blocks two budgets hold, the sentences about it, and that vLLM's own planner agrees."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import Layer, best_cover, pool

from vllm_magicpig import _C, capacity
from vllm_magicpig.capacity import GIB
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.cost_model import MODELS

LLAMA = MODELS["llama-3.1-8b"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "kv_capacity.py"


def plan(host_bytes: int, device_bytes: int, **sizes: int) -> capacity.Capacity:
    per_block = {"host_block_bytes": 70, "index_bytes_per_block": 30, "device_block_bytes": 10}
    return capacity.plan_blocks(host_bytes, device_bytes, **(per_block | sizes))


# ------------------------------------------------------------------------------------ bytes a block


@pytest.mark.parametrize("num_tables", [0, 1, 7, 150, 255])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("head_size", [16, 128, 256])
def test_a_page_is_what_the_plugin_and_the_kernels_take_it_for(
    dtype: str, itemsize: int, head_size: int, num_tables: int
) -> None:
    content = capacity.content_bytes(head_size, itemsize, num_tables)
    assert 32 * content >= _C.Pages.chunk_bytes(dtype, 32, head_size, num_tables)
    assert content % itemsize == 0


def test_host_bytes_of_a_block() -> None:
    # 30 layers x 8 kv heads x 128 tokens x (2 x 128 x 2 bytes of rows + 150 x 2 of codes).
    assert capacity.host_block_bytes(30, 8, 128, 2, 150, 128) == 30 * 8 * 128 * 812


@pytest.mark.parametrize(
    ("block_size", "levels"),
    [
        (32, [1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        (96, [1056, 2112, 4224, 8448, 16896, 33792]),
        (128, [1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        (2048, [2048, 4096, 8192, 16384, 32768, 65536]),
        (3072, [3072, 6144, 12288, 24576, 49152]),
        (65536, [65536]),
    ],
)
def test_levels(block_size: int, levels: list[int]) -> None:
    assert capacity.segment_levels(block_size) == levels


@pytest.mark.parametrize("block_size", range(32, 65537, 32 * 37))
def test_levels_are_such_as_the_index_takes(block_size: int) -> None:
    layer = Layer(1, block_size=block_size, levels=capacity.segment_levels(block_size))
    assert layer.index.num_segments == 0


@pytest.mark.parametrize(
    ("num_kv_heads", "num_bits", "num_tables", "segment_tokens"),
    [
        (2, 3, 8, 64),  # far below a huge page
        (1, 10, 150, 2048),  # one head of the default, still below
        (8, 10, 150, 1024),  # the default of eight: in pages of its own
        (2, 6, 9, 65536),  # the largest segment
    ],
)
def test_bytes_of_a_segment_are_those_of_a_native_one(
    num_kv_heads: int, num_bits: int, num_tables: int, segment_tokens: int
) -> None:
    block_size = 64
    num_blocks = segment_tokens // block_size
    layer = Layer(
        num_blocks,
        num_kv_heads=num_kv_heads,
        num_tables=num_tables,
        num_bits=num_bits,
        block_size=block_size,
        levels=[segment_tokens],
    )
    blocks = np.arange(num_blocks)
    codes = torch.zeros(num_kv_heads, segment_tokens, num_tables, dtype=torch.int32)
    layer.store_codes(blocks, 0, codes)
    table = blocks.astype(np.int32)[None]
    assert layer.index.seal(table, np.array([segment_tokens], np.int32), pool()) == 1
    assert layer.index.num_bytes == capacity.segment_bytes(
        num_kv_heads, num_bits, num_tables, block_size, segment_tokens
    )


def test_index_bytes_by_hand() -> None:
    # Segments of 1,024 tokens: 8 heads x 150 tables x (ids + 1,026 offsets) x 2 bytes, in pages of
    # 4 KiB, and 8 sources.
    segment = -(-8 * 150 * (1024 + 1026) * 2 // 4096) * 4096 + 8 * 16
    assert capacity.index_bytes_per_block(30, 8, 10, 150, 128) == 30 * segment / 8


@pytest.mark.parametrize("max_model_len", [1023, 1024, 4095, 4096, 20_000, 65_536, 1 << 30])
@pytest.mark.parametrize("block_size", [96, 128, 2048])
def test_growth_of_a_request_fits_beside_requests_of_the_worst_case(
    block_size: int, max_model_len: int
) -> None:
    """At each merge of a request that fills all blocks."""
    layer = (8, 10, 150, block_size)
    levels = capacity.segment_levels(block_size)
    sizes = {tokens: capacity.segment_bytes(*layer, tokens) for tokens in levels}
    most = 0
    for length in range(levels[0], min(max_model_len, 140_000) + 1, levels[0]):
        before, now = (
            [end - begin for begin, end in best_cover(n, levels)]
            for n in (length - levels[0], length)
        )
        if length > levels[0]:
            new = now[-1]
            held = sum(sizes[tokens] for tokens in before) + sizes[new]
            bound = capacity.max_index_bytes(length // block_size, *layer, max_model_len)
            assert held <= bound
            most = max(
                most, held - length // block_size * capacity.index_bytes_per_block(1, *layer)
            )
    assert capacity.index_spare_bytes(1, *layer, max_model_len) >= most


def test_spare_bytes_by_hand() -> None:
    sizes = [capacity.segment_bytes(8, 10, 150, 128, 1024 << i) for i in range(7)]
    assert capacity.index_spare_bytes(1, 8, 10, 150, 128, 2047) == 0
    # Segments of 1,024 tokens are planned for; the last of each merge never exists.
    assert (
        capacity.index_spare_bytes(1, 8, 10, 150, 128, 2048) == sizes[1] + sizes[0] - 2 * sizes[0]
    )
    most = sum(sizes) - 64 * sizes[0]
    assert capacity.index_spare_bytes(30, 8, 10, 150, 128, 1 << 30) == 30 * most


def test_what_is_planned_for_is_what_the_index_may_take() -> None:
    per_block = capacity.index_bytes_per_block(30, 8, 10, 150, 128)
    spare = capacity.index_spare_bytes(30, 8, 10, 150, 128, 131072)
    found = plan(100 << 30, 1 << 40, index_bytes_per_block=per_block, index_spare_bytes=spare)
    may_take = 30 * capacity.max_index_bytes(found.num_blocks, 8, 10, 150, 128, 131072)
    assert 0 <= may_take - (found.used_host_bytes - found.page_bytes) < 30 * found.num_blocks


def test_exact_attention_has_no_index() -> None:
    assert capacity.index_bytes_per_block(30, 8, 0, 0, 128) == 0
    assert capacity.index_spare_bytes(30, 8, 0, 0, 128, 131072) == 0


def test_host_bytes_of_signatures() -> None:
    # Two tiles of 64 tokens x (2 bits of 128 dimensions + 2 bytes), a mean of bfloat16, two floats.
    of_128_tokens = 128 * (2 * 128 // 8 + 2) + 2 * 128 + 8
    found = capacity.signature_block_bytes(30, 8, 128, 2, 256)
    assert found == 30 * 8 * 2 * (-(-of_128_tokens // 64) * 64)
    assert capacity.signature_block_bytes(30, 8, 128, 0, 256) == 0


# ----------------------------------------------------------------------------------------- planning


def test_pages_and_index_share_the_host_budget() -> None:
    found = plan(host_bytes=1099, device_bytes=1000)
    assert (found.host_blocks, found.device_blocks, found.num_blocks) == (10, 100, 10)
    assert found.limited_by == "host memory"
    assert (found.page_bytes, found.used_host_bytes) == (700, 1000)


def test_pages_and_signatures_share_the_host_budget() -> None:
    found = plan(1099, 1000, index_bytes_per_block=0, signature_block_bytes=40)
    assert (found.num_blocks, found.page_bytes, found.used_host_bytes) == (9, 630, 990)


def test_the_spare_bytes_come_first() -> None:
    found = plan(host_bytes=1099, device_bytes=1000, index_spare_bytes=300)
    assert (found.num_blocks, found.used_host_bytes) == (7, 1000)
    assert plan(host_bytes=299, device_bytes=1000, index_spare_bytes=300).num_blocks == 0


def test_the_device_limits() -> None:
    found = plan(host_bytes=1000, device_bytes=99)
    assert (found.num_blocks, found.limited_by) == (9, "device memory")
    assert found.used_host_bytes == 900


def test_without_sparse_layers_the_host_does_not_limit() -> None:
    found = plan(0, 100, host_block_bytes=0, index_bytes_per_block=0)
    assert (found.host_blocks, found.num_blocks, found.limited_by) == (None, 10, "device memory")


@settings(deadline=None, derandomize=True, database=None)
@given(
    host_bytes=st.integers(0, 10**13),
    device_bytes=st.integers(0, 10**12),
    pages=st.integers(1, 10**9),
    index=st.integers(0, 10**9),
    device=st.integers(1, 10**7),
)
def test_all_blocks_fit_and_one_more_does_not(
    host_bytes: int, device_bytes: int, pages: int, index: int, device: int
) -> None:
    found = capacity.plan_blocks(host_bytes, device_bytes, pages, index, device)
    used, more = found.num_blocks, found.num_blocks + 1
    assert used * (pages + index) <= host_bytes
    assert used * device <= device_bytes
    assert more * (pages + index) > host_bytes or more * device > device_bytes
    limit = (
        (pages + index, host_bytes)
        if found.limited_by == "host memory"
        else (
            device,
            device_bytes,
        )
    )
    assert more * limit[0] > limit[1], "the side that is named is the one that limits"


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "requests"),
    [(0, 1, 0), (1, 1, 0), (2, 128, 1), (2, 129, 0), (3, 129, 1), (9, 256, 4), (1025, 131072, 1)],
)
def test_blocks_are_whole_and_one_is_vllms_own(
    num_blocks: int, max_model_len: int, requests: int
) -> None:
    found = plan(num_blocks * 100, 10**9)
    assert found.requests(128, max_model_len) == requests
    assert found.tokens(128) == 128 * max(num_blocks - 1, 0)


def test_device_memory_left_for_kv() -> None:
    left = capacity.device_kv_bytes(24 * GIB, LLAMA.weight_bytes)
    assert left == int(0.92 * 24 * GIB) - 16_060_522_496 - 2 * GIB
    assert capacity.device_kv_bytes(16 * GIB, LLAMA.weight_bytes) == 0


# --------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_divide_the_default_share_of_free_ram(ranks: int) -> None:
    free = 128 * GIB
    each = capacity.default_host_bytes(free, ranks)
    assert free * 0.7 - ranks < each * ranks <= free * 0.7
    capacity.check_host_bytes(each, free, ranks)


def test_a_pool_beyond_the_free_ram() -> None:
    with pytest.raises(ValueError) as error:
        capacity.check_host_bytes(96 * GIB, 100 * GIB, 1)
    assert str(error.value) == (
        "magicpig option host_kv_cache_gib is 96.0, but this machine has 100.0 GiB of free RAM, of "
        "which 90% may be pinned; set it to at most 90.0, or where this machine's RAM grows as it is "
        "used, check_host_memory to false."
    )


@pytest.mark.parametrize(
    ("ranks", "each"),
    [(1, "70.0 GiB of host memory"), (2, "35.0 GiB of host memory for each of 2 ranks")],
)
def test_the_default_says_what_it_takes_for_free(ranks: int, each: str) -> None:
    assert capacity.default_host_report(100 * GIB, ranks) == (
        f"magicpig: {each}, 70% of the 100.0 GiB of RAM that are free now; host_kv_cache_gib sets "
        "another size"
    )


@settings(deadline=None, derandomize=True, database=None)
@given(free=st.integers(GIB // 5, 1 << 45), ranks=st.integers(1, 16))
def test_the_named_pool_size_is_accepted(free: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="set it to at most") as error:
        capacity.check_host_bytes(free, free, ranks)
    most = re.search(r"at most (\d+\.\d), or", str(error.value))
    assert most is not None
    capacity.check_host_bytes(int(float(most[1]) * GIB), free, ranks)
    assert (f"each of {ranks} ranks" in str(error.value)) == (ranks > 1)


# ----------------------------------------------------------------------------- less than one request


def small(
    host_gib: float = 1000.0, device_gib: float = 1000.0, index: int = 20
) -> capacity.Capacity:
    """Blocks of 40 MiB of pages, 20 MiB of index and 1 MiB of device memory."""
    mib = 1 << 20
    return capacity.plan_blocks(
        int(host_gib * GIB), int(device_gib * GIB), 40 * mib, index * mib, mib
    )


def refusal(found: capacity.Capacity, max_model_len: int = 131_072) -> str:
    with pytest.raises(ValueError) as error:
        capacity.check_one_request(found, block_size=128, max_model_len=max_model_len)
    return str(error.value)


def test_one_request_that_fits_is_no_error() -> None:
    capacity.check_one_request(small(), block_size=128, max_model_len=131_072)


def test_too_little_host_memory() -> None:
    # 1,024 blocks and vLLM's own at 60 MiB are 60.06 GiB; 30 GiB are 512 blocks.
    assert refusal(small(host_gib=30)) == (
        "magicpig holds 65,408 tokens, but one request of max_model_len = 131,072 needs 60.1 GiB of "
        "host memory for pages and index (there are 30.0); raise host_kv_cache_gib to at least 60.1 "
        "or lower --max-model-len to at most 65,408 or use fewer tables (L)."
    )


def test_too_little_device_memory() -> None:
    assert refusal(small(device_gib=0.5)) == (
        "magicpig holds 65,408 tokens, but one request of max_model_len = 131,072 needs 1.1 GiB of "
        "device memory (there are 0.5); lower --max-model-len to at most 65,408 or name fewer "
        "dense_layers or raise --gpu-memory-utilization."
    )


def test_too_little_of_both() -> None:
    text = refusal(small(host_gib=30, device_gib=0.5))
    assert "60.1 GiB of host memory" in text
    assert "1.1 GiB of device memory" in text
    assert "host_kv_cache_gib" in text
    assert "dense_layers" in text


def test_nothing_fits_at_all() -> None:
    text = refusal(small(device_gib=0))
    assert text.startswith("magicpig holds 0 tokens, ")
    assert "max-model-len to" not in text, "no length would help"


def test_signatures_are_named_where_they_are_what_needs_memory() -> None:
    mib = 1 << 20
    found = capacity.plan_blocks(
        30 * GIB, 1000 * GIB, 40 * mib, 0, mib, signature_block_bytes=20 * mib
    )
    text = refusal(found)
    assert "60.1 GiB of host memory for pages and signatures (there are 30.0)" in text
    assert "tables" not in text
    assert "(30.0 GiB for pages and signatures)" in report(found)


def test_exact_attention_has_no_tables_to_save() -> None:
    assert "tables" not in refusal(small(host_gib=30, index=0))


@settings(deadline=None, derandomize=True, database=None)
@given(host_gib=st.floats(0.2, 60), device_gib=st.floats(1.1, 2))
def test_the_named_remedies_help(host_gib: float, device_gib: float) -> None:
    text = refusal(small(host_gib, device_gib))
    enough = re.search(r"host_kv_cache_gib to at least (\d+\.\d) ", text)
    length = re.search(r"max-model-len to at most ([\d,]+)", text)
    assert enough is not None
    assert length is not None
    raised = small(float(enough[1]), device_gib)
    capacity.check_one_request(raised, block_size=128, max_model_len=131_072)
    tokens = int(length[1].replace(",", ""))
    found = small(host_gib, device_gib)
    capacity.check_one_request(found, block_size=128, max_model_len=tokens)
    refusal(found, tokens + 1)


# ------------------------------------------------------------------------------------------- report


def report(found: capacity.Capacity) -> str:
    return capacity.report(found, block_size=128, max_model_len=131_072, dense_block_bytes=16 << 20)


def test_the_report_where_the_host_limits() -> None:
    # 96 GiB / 60 MiB = 1,638 blocks; 18.9 GiB / 16 MiB = 1,209 blocks.
    assert report(small(host_gib=96, device_gib=18.9)) == (
        "magicpig: 209,536 tokens (1 request of 131,072), limited by host memory (96.0 GiB for pages "
        "and index); the same 18.9 GiB of device memory would hold 154,624 tokens (1 request) with "
        "FLASH_ATTN"
    )


def test_the_report_where_the_device_limits() -> None:
    # 8 GiB / 1 MiB = 8,192 blocks, which take 480 GiB of the host; 512 dense blocks.
    assert report(small(host_gib=500, device_gib=8)) == (
        "magicpig: 1,048,448 tokens (7 requests of 131,072), limited by device memory, with 480.0 of "
        "500.0 GiB of host memory for pages and index; the same 8.0 GiB of device memory would hold "
        "65,408 tokens (0 requests) with FLASH_ATTN"
    )


# ---------------------------------------------------------------------------------- vLLM's planner


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_capacity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_capacity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_planner_makes_one_group_of_dense_and_sparse_layers(script: ModuleType) -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    options = MagicPigOptions()
    specs = script.layer_specs(LLAMA, options, 128)
    for layout in script.LAYOUTS:
        config = script.plan(specs, 20 * GIB, layout)
        assert len(config.kv_cache_groups) == 1, "one group, hence one block table"
        spec = config.kv_cache_groups[0].kv_cache_spec
        assert isinstance(spec, UniformTypeKVCacheSpecs)
        assert spec.block_size == 128
        # 2 dense layers of 8 heads x 128 tokens x 512 bytes, 30 sparse ones of 128 x 2 bytes.
        assert spec.page_size_bytes == 2 * 8 * 128 * 512 + 30 * 128 * 2
        assert spec.page_size_bytes == script.block_bytes(LLAMA, options, 128)
        assert config.num_blocks == 20 * GIB // spec.page_size_bytes


@pytest.mark.parametrize("dense_layers", [None, (), (1, 16), tuple(range(32))])
@pytest.mark.parametrize("block_size", [32, 128])
def test_every_layer_finds_its_pages(
    script: ModuleType, dense_layers: tuple[int, ...] | None, block_size: int
) -> None:
    options = MagicPigOptions(dense_layers=dense_layers)
    for layout in script.LAYOUTS:
        script.check_layout(LLAMA, options, block_size, layout)


def test_layers_that_do_not_share_a_block_table_are_noticed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = script.layer_specs

    def two_block_sizes(*arguments: object) -> object:
        specs = right(*arguments)
        first = next(iter(specs))
        return specs | {first: replace(specs[first], block_size=64)}

    monkeypatch.setattr(script, "layer_specs", two_block_sizes)
    with pytest.raises(AssertionError, match="groups, and each has a block table"):
        script.check_layout(LLAMA, MagicPigOptions(), 128, script.LAYOUTS[0])


@pytest.mark.parametrize("host_gib", [64, 4096])
@pytest.mark.parametrize("card_gib", [24, 40, 80])
def test_the_planner_finds_the_blocks_that_capacity_plans(
    script: ModuleType, card_gib: int, host_gib: int
) -> None:
    row = script.capacity_row(LLAMA, MagicPigOptions(), 128, card_gib, host_gib, 1)
    assert row.plan.limited_by == ("host memory" if host_gib == 64 else "device memory")
    dense = capacity.dense_block_bytes(32, 8, 128, 2, 128)
    assert row.dense_tokens == (row.plan.device_bytes // dense - 1) * 128
    if card_gib == 24:
        assert row.dense_requests == 0, "FLASH_ATTN cannot hold one request of 128K on such a card"
        assert row.requests > 0


def test_other_blocks_than_planned_are_noticed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "device_block_bytes", lambda *sizes: 1_000_000)
    with pytest.raises(AssertionError):
        script.capacity_row(LLAMA, MagicPigOptions(), 128, 24, 4096, 1)


def test_signatures_hold_twice_the_tokens_of_buckets(script: ModuleType) -> None:
    """On a 24 GiB card beside 64 GiB of host memory."""
    tokens = {
        index: script.capacity_row(LLAMA, MagicPigOptions(index=index), 128, 24, 64, 1).tokens
        for index in ("buckets", "signatures")
    }
    assert tokens["signatures"] >= 300_000
    assert tokens["signatures"] > 2 * tokens["buckets"]


@pytest.mark.parametrize(
    ("index", "words"), [("buckets", "in the index; "), ("signatures", "in signatures.")]
)
def test_the_heading_says_what_lies_beside_the_pages(
    script: ModuleType, capsys: pytest.CaptureFixture[str], index: str, words: str
) -> None:
    script.main(["--index", index, "--cards", "24", "--host-memory", "64"])
    assert words in capsys.readouterr().out


def test_the_table(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "16.06 GB of weights" in lines[0]
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + 3 * 4
    assert len({line.count("|") for line in rows}) == 1
    script.main(["--model", "llama-3.1-70b", "--tp", "8", "--cards", "80"])
    assert "each of 8 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt-2"], "model 'gpt-2' is unknown; choose from llama-3.1-8b, "),
        (
            ["--index", "signatures", "--block-size", "192"],
            "block size is 192, but must be a multiple of 128 with signatures; choose another.",
        ),
        (["--tp", "5"], "tensor parallel size is 5, but must divide the 32 query heads"),
    ],
)
def test_wrong_arguments(script: ModuleType, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert str(error.value).startswith(f"kv_capacity: {sentence}")


def test_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    code = (
        "import sys; from vllm_magicpig import capacity, cost_model; "
        "sys.exit(', '.join({'torch', 'vllm'} & set(sys.modules)) or None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr.strip()) == (0, ""), result.stderr
