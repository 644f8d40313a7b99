"""Memory that another library has zeroed, renewed on huge pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_magicpig.huge_pages import HUGE_PAGE_BYTES, huge_page_bytes, renew_on_huge_pages

CPUS = sorted(os.sched_getaffinity(0))


def test_whole_huge_pages_inside_are_renewed_and_what_lies_around_them_is_not() -> None:
    tensor = torch.ones(8 * HUGE_PAGE_BYTES, dtype=torch.uint8)
    around = HUGE_PAGE_BYTES // 2
    # The whole number of pages inside does not depend on where the tensor starts.
    first = -tensor.data_ptr() % HUGE_PAGE_BYTES + around
    start, size = tensor.data_ptr() + first, 5 * HUGE_PAGE_BYTES
    assert renew_on_huge_pages(start, size, CPUS) == 4 * HUGE_PAGE_BYTES
    renewed = slice(first + around, first + around + 4 * HUGE_PAGE_BYTES)
    assert not tensor[renewed].any()
    assert tensor[: renewed.start].all()
    assert tensor[renewed.stop :].all()


def test_huge_pages_are_granted_where_the_system_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has transparent huge pages switched off")
    tensor = torch.zeros(34 * HUGE_PAGE_BYTES, dtype=torch.uint8)
    span = (tensor.data_ptr(), tensor.nbytes)
    renewed = renew_on_huge_pages(*span, CPUS)
    assert renewed >= 33 * HUGE_PAGE_BYTES
    # The kernel may be out of them; of these 66 MiB some are there on any machine that can run this.
    assert 0 < huge_page_bytes([span]) <= tensor.nbytes
    assert huge_page_bytes([span, span]) <= 2 * tensor.nbytes


def test_less_than_a_huge_page_is_left_alone() -> None:
    tensor = torch.ones(HUGE_PAGE_BYTES // 2, dtype=torch.uint8)
    assert renew_on_huge_pages(tensor.data_ptr(), tensor.nbytes, CPUS) == 0
    assert tensor.all()
