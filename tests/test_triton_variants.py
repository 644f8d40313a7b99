"""No Triton kernel is compiled while serving: what steps launch are variants that `warm_up` has run.

A launch is data, and which compiled variant serves it is asked of Triton itself, for a GPU that is not
here; the work is done by the references, over a fake device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import test_device_layer
import torch
from fake_device import FakeDevice
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_magicpig import device_buffers
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.triton_kernels import host_pages, merge, simhash
from vllm_magicpig.triton_kernels.launch import Launch

LAUNCHES: dict[str, Callable[..., Launch]] = {
    "simhash": simhash.simhash_launch,
    "store_pages": partial(host_pages.store_pages_launch, num_programs=host_pages.DEFAULT_PROGRAMS),
    "gather_pages": partial(
        host_pages.gather_pages_launch, num_programs=host_pages.DEFAULT_PROGRAMS
    ),
    "merge_into": merge.merge_into_launch,
}
OPTIONS = {
    "buckets": MagicPigOptions(index="buckets", K=6, L=37, exact_below=256),
    "exact": MagicPigOptions(K=0),
}


def variant(launch: Launch) -> tuple[str, str, str]:
    """What Triton's cache of compiled kernels looks a launch up by."""
    _, specialization, options = _binder(launch.kernel)(**launch.arguments)
    return launch.kernel.__name__, str(specialization), str(options)


@cache
def _binder(kernel: Any) -> Callable[..., Any]:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def record_variants(device: FakeDevice) -> set[tuple[str, str, str]]:
    seen = set()

    def recorded(name: str) -> Callable[..., None]:
        run = getattr(device.kernels, name)

        def call(*arguments: Any) -> None:
            seen.add(variant(LAUNCHES[name](*arguments)))
            run(*arguments)

        return call

    for name in LAUNCHES:
        setattr(device.kernels, name, recorded(name))
    return seen


class Served(test_device_layer.Model):
    """Steps as a model gives them, queries, keys and values being slices of one projection; what is
    answered is another test's concern."""

    def _random_rows(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        sizes = (test_device_layer.HEADS, *[test_device_layer.KV_HEADS] * 2)
        qkv = torch.randn(1, num_tokens, sum(sizes), test_device_layer.HEAD_SIZE)
        return tuple(qkv.to(self.dtype).split(sizes, dim=2))

    def _compare(self, new_tokens: dict[str, int], query: Any, key: Any, *rest: Any) -> list[Any]:
        for name, rows in zip(new_tokens, key[0].split(list(new_tokens.values())), strict=True):
            self.keys[0][name] = torch.cat([self.keys[0].get(name, self._empty), rows])
        return []


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "dtype"),
    [
        (4, 2, 64, torch.bfloat16),
        (3, 1, 72, torch.float16),  # one kv head, as on a rank of many, and an odd head size
        (6, 3, 16, torch.float32),
    ],
)
def test_no_step_launches_a_variant_that_warm_up_has_not_compiled(
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    options: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_SIZE": head_size}
    # 65 blocks: every other row of the block tables begins at an odd address.
    for name, value in (sizes | {"NUM_BLOCKS": 65}).items():
        monkeypatch.setattr(test_device_layer, name, value)
    monkeypatch.setattr(device_buffers, "STAGING_TOKENS", 200)
    device = FakeDevice()
    compiled = record_variants(device)
    served = Served(device, dtype, OPTIONS[options], num_layers=1)
    served.layers[0].warm_up()
    device.synchronize()
    assert {name for name, _, _ in compiled} == {
        f"_{kernel}_kernel"
        for kernel in ("store_pages", "gather_pages", "merge")
        + (("simhash",) if options != "exact" else ())
    }
    warm = frozenset(compiled)
    compiled.clear()
    served.step(a=600)
    served.step(a=301, b=40)
    served.step(b=1, a=203)  # chunks and slots from an odd token on
    served.step(b=1, c=701, d=3, a=1)  # decodes on both sides of chunks
    served.step(c=433, d=17)
    served.step(**{name: 3 + i for i, name in enumerate("efgh")})
    for _ in range(2):
        served.step(**dict.fromkeys("abcdefgh", 1))
    assert {name for name, _, _ in compiled} == {name for name, _, _ in warm}
    assert compiled <= warm
