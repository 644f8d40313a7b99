"""Figures of the statistics line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_magicpig.stats import (
    HIGH_ERROR_BAR,
    LEAST_ERROR_BARS,
    LayerStats,
    PageUse,
    percentiles,
    summarise,
)


def test_layers_are_added_up() -> None:
    stats = LayerStats(
        decode_steps=1,
        sampled_heads=2,
        exact_heads=2,
        sampled_rows=40,
        middle_rows=2000,
        recent_rows=np.array([10, 30], np.int32),
    )
    summary = summarise(
        [stats, stats],
        [PageUse(7, 70, 5, 2, 3, 1)] * 2,
        dense_layers=1,
        key_centers=2,
        threads=4,
        isa="avx2",
        idle_index_bytes=3 << 20,
    )
    assert (summary.sampled_heads, summary.exact_heads, summary.decode_steps) == (4, 4, 1)
    assert summary.sampled_fraction == pytest.approx(40 / 2000)
    assert summary.sampled_rows_mean == summary.sampled_rows_p50 == 20
    assert summary.page_tokens == 7, "every layer holds the same tokens"
    assert (summary.page_bytes, summary.index_bytes, summary.segments_built) == (140, 10, 6)
    assert summary.builds_refused == 2
    assert "2.00 % of the middle" in summary.line()
    assert "3.0 MiB idle" in summary.line()
    assert "2 refused for lack of room" in summary.line()


def with_bars(layer_index: int, mean: float, count: int = LEAST_ERROR_BARS) -> LayerStats:
    return LayerStats(layer_index=layer_index, error_bars=count, error_bar_sum=mean * count)


def test_signatures_speak_of_groups_and_error_bars() -> None:
    summary = summarise(
        [with_bars(3, 0.1), LayerStats(layer_index=4), with_bars(7, 0.4)],
        [PageUse(7, 70, 2 << 20)] * 3,
        dense_layers=1,
        key_centers=0,
        threads=4,
        isa="avx2",
        index="signatures",
    )
    assert summary.error_bars == 2 * LEAST_ERROR_BARS
    assert (summary.error_bar, summary.worst_layer_error_bar) == pytest.approx((0.25, 0.4))
    line = summary.line()
    assert "signatures 6.0 MiB; sampled rows per kv head, for its whole group" in line
    assert "error bar 0.250 on average, 0.400 in layer 7" in line
    assert "segments" not in line


def test_a_layer_errs_much_once_it_was_measured_often() -> None:
    assert with_bars(3, HIGH_ERROR_BAR + 0.01).errs_much
    assert not with_bars(3, HIGH_ERROR_BAR).errs_much
    assert not with_bars(3, 1.0, LEAST_ERROR_BARS - 1).errs_much
    assert not LayerStats().errs_much


def test_nothing_served_yet() -> None:
    summary = summarise(
        [LayerStats()],
        [PageUse(0, 0)],
        dense_layers=0,
        key_centers=0,
        threads=1,
        isa="portable",
    )
    assert summary.sampled_rows_p99 == summary.sampled_fraction == 0
    assert "refused" not in summary.line()


@given(
    st.lists(st.lists(st.integers(0, 3000), max_size=40), max_size=4).filter(any),
    st.lists(st.integers(0, 100), min_size=1, max_size=3),
)
def test_percentiles_are_numpys(parts: list[list[int]], percents: list[int]) -> None:
    """Up to the rounding of one product in float64."""
    arrays = [np.array(part, dtype=np.int32) for part in parts]
    expected = np.percentile(np.concatenate(arrays), percents)
    assert percentiles(arrays, percents) == pytest.approx(expected, abs=3000 * 2**-48)
