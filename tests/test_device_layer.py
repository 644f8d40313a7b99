"""A sampled layer of the device path fed with steps as vLLM makes them, against the reference on what
each request logically holds; on a fake device, and on a GPU where there is one."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice

from vllm_magicpig import _C, device_buffers, reference
from vllm_magicpig.capacity import content_bytes
from vllm_magicpig.config import MagicPigOptions
from vllm_magicpig.device import CudaDevice
from vllm_magicpig.device_buffers import DeviceBuffers, LayerShape
from vllm_magicpig.device_layer import DeviceLayer
from vllm_magicpig.device_step import DeviceStep, make_device_step
from vllm_magicpig.host_pages import HostPages
from vllm_magicpig.host_pool import HostPool
from vllm_magicpig.key_center import KeyCenter
from vllm_magicpig.layer_signatures import LayerSignatures
from vllm_magicpig.projection import Projection

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS, MAX_REQS = 4, 2, 64, 128, 64, 8
SCALE = HEAD_SIZE**-0.5
FIRST_KV_HEAD = 2
OPTIONS = MagicPigOptions(index="buckets", K=6, L=40, exact_below=256)
SIGNATURES = MagicPigOptions(index="signatures", row_budget=0.1, exact_below=256, seed=3)
each_index = pytest.mark.parametrize("options", [OPTIONS, SIGNATURES], ids=lambda o: o.index)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Outputs are of size 4 at most and are rounded once by the kernel's own dtype and once at the end;
float32: the kernels' sums over a few thousand tokens."""


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "fake":
        return FakeDevice()
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return CudaDevice(torch.device("cuda:0"))


class Model:
    """Two layers over one pool, and the keys and values that each request has stored in them."""

    def __init__(
        self,
        device: Any,
        dtype: torch.dtype = torch.float32,
        options: MagicPigOptions = OPTIONS,
        num_layers: int = 2,
        is_fixed: bool = True,
    ) -> None:
        """is_fixed: whether the layers have their key centres."""
        torch.manual_seed(0)
        self.device, self.dtype, self.options = device, dtype, options
        shape = LayerShape(HEADS, KV_HEADS, HEAD_SIZE, dtype)
        self.buffers = DeviceBuffers(device, options, {shape}, max_reqs=MAX_REQS, max_tokens=4096)
        self.buffers.make_step_buffers(NUM_BLOCKS)
        token_bytes = content_bytes(HEAD_SIZE, dtype.itemsize, options.num_tables)
        layer_bytes = NUM_BLOCKS * KV_HEADS * BLOCK_SIZE * token_bytes
        self.pool = HostPool(device, [layer_bytes] * num_layers, [0], lambda done, total: None)
        for i in range(num_layers):
            # Rows that no request has stored are no numbers, as those of an overflow would be.
            self.pool.layer(i).view(dtype).fill_(torch.nan)
        isa, threads = _C.resolve_isa("auto"), _C.ThreadPool([0, 0])
        self.builder = _C.SegmentBuilder([0])
        self.layers = []
        centers = [KeyCenter("passage", i, 0, KV_HEADS) for i in range(num_layers)]
        self.centers = centers if options.has_buckets else []
        if is_fixed:
            self.fix_centers()
        for i in range(num_layers):
            center = self.centers[i] if self.centers else None
            region = self.pool.layer(i).view(dtype).view(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, -1)
            self.layers.append(
                DeviceLayer(
                    options, i, shape, SCALE, FIRST_KV_HEAD, region, center, device, self.buffers,
                    isa, threads, self.builder if options.has_buckets else None, 0,
                )
            )  # fmt: skip
        self.blocks: dict[str, list[int]] = {}
        self._free = list(range(NUM_BLOCKS - 1, 0, -1))
        empty = torch.zeros(0, KV_HEADS, HEAD_SIZE, dtype=dtype)
        self.keys = [dict[str, torch.Tensor]() for _ in range(num_layers)]
        self.values = [dict[str, torch.Tensor]() for _ in range(num_layers)]
        self._empty = empty

    def fix_centers(self) -> None:
        for center in self.centers:
            center.observe(torch.randn(512, KV_HEADS, HEAD_SIZE) + 3.0)
            assert center.fix(HEAD_SIZE)

    def step(self, **new_tokens: int) -> list[dict[str, torch.Tensor]]:
        """Runs one engine step; returns what each layer must answer, per request [n, heads, size].

        new_tokens: how many tokens each request gets; one is a decode step unless it is the first.
        """
        assert all(n > 0 for n in new_tokens.values())
        query, key, value = self._random_rows(sum(new_tokens.values()))
        step = self._metadata(new_tokens)
        outs = []
        for layer in self.layers:
            out = torch.full_like(query[0], torch.nan)
            i = len(outs)
            layer.forward(query[i], key[i], value[i], out, step)
            outs.append(out)
        self.device.synchronize()
        self.device.callbacks.raise_error()
        return self._compare(new_tokens, query, key, value, outs)

    def _random_rows(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        sizes = (HEADS, KV_HEADS, KV_HEADS)
        rows = [torch.randn(len(self.layers), num_tokens, h, HEAD_SIZE) for h in sizes]
        rows[1] += 3.0  # keys share a large mean, as a model's do
        return tuple(x.to(self.dtype).to(self.device.torch_device) for x in rows)

    def _metadata(self, new_tokens: dict[str, int], dummy: bool = False) -> DeviceStep:
        contexts = [len(self.keys[0].get(name, self._empty)) for name in new_tokens]
        lens = np.array(contexts) + list(new_tokens.values())
        table = np.zeros((len(lens), NUM_BLOCKS), dtype=np.int32)
        slots = []
        for row, (name, context) in enumerate(zip(new_tokens, contexts, strict=True)):
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * BLOCK_SIZE < lens[row]:
                blocks.append(self._free.pop())
            table[row, : len(blocks)] = blocks
            positions = np.arange(context, lens[row])
            held = np.array(blocks)[positions // BLOCK_SIZE]
            slots.append(held * BLOCK_SIZE + positions % BLOCK_SIZE)
            if dummy:
                slots[-1].fill(-1)
        starts = torch.tensor([0, *new_tokens.values()]).cumsum(0).to(torch.int32)
        on_device = self.device.torch_device
        prefilling = [n > 1 or c == 0 for n, c in zip(new_tokens.values(), contexts, strict=True)]
        metadata = SimpleNamespace(
            query_start_loc=starts.to(on_device),
            query_start_loc_cpu=starts,
            num_reqs=len(lens),
            num_actual_tokens=int(starts[-1]),
            seq_lens=torch.from_numpy(lens).to(torch.int32).to(on_device),
            seq_lens_cpu_upper_bound=torch.from_numpy(lens),
            is_prefilling=torch.tensor(prefilling),
            causal=True,
            slot_mapping=torch.from_numpy(np.concatenate(slots)).to(on_device),
            block_table_tensor=torch.from_numpy(table).to(on_device),
        )
        return make_device_step(metadata, self.device, self.buffers.step)

    def _compare(
        self, new_tokens: dict[str, int], query: Any, key: Any, value: Any, outs: Any
    ) -> list[dict[str, torch.Tensor]]:
        errors: list[dict[str, torch.Tensor]] = []
        for i, out in enumerate(outs):
            start = 0
            errors.append({})
            for name, n in new_tokens.items():
                rows = slice(start, start + n)
                start += n
                before = self.keys[i].get(name, self._empty)
                self.keys[i][name] = torch.cat([before, key[i][rows].cpu()])
                self.values[i][name] = torch.cat(
                    [self.values[i].get(name, self._empty), value[i][rows].cpu()]
                )
                decoding = n == 1 and len(before) > 0
                wanted = self._expected(i, name, query[i][rows].cpu(), decoding)
                errors[-1][name] = (out[rows].cpu().double() - wanted).abs().max()
        return errors

    def _expected(self, i: int, name: str, query: torch.Tensor, decoding: bool) -> torch.Tensor:
        keys, values = (x[i][name].transpose(0, 1) for x in (self.keys, self.values))
        if decoding and self._samples(i, keys.shape[1]):
            sampled = self._drawn if self.options.has_signatures else self._sampled
            return sampled(i, query[0], keys, values)[None]
        context = keys.shape[1] - len(query)
        outs = []
        for j in range(len(query)):
            seen = slice(0, context + j + 1)
            out, _ = reference.exact_attention(query[j], keys[:, seen], values[:, seen], SCALE)
            outs.append(out)
        return torch.stack(outs)

    def _samples(self, i: int, num_tokens: int) -> bool:
        if self.options.has_buckets:
            index = self.layers[i].index
            assert index is not None
            if index.center.value is None:
                return False
        return self.options.samples(num_tokens)

    def _sampled(
        self, i: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        options, index = self.options, self.layers[i].index
        assert index is not None
        center = index.center.value
        assert center is not None
        directions = index.projection.directions
        key_codes = reference.hash_codes(keys.float() - center[:, None], directions, options.K)
        query_codes = reference.hash_codes(query.float(), directions, options.K)
        window = options.sink_tokens, options.window_tokens
        mask = reference.sample(query_codes, key_codes, options.min_matches, *window)
        out, _ = reference.sampled_attention(
            query, keys, values, SCALE, mask, center, options.K, options.L,
            [(options.min_matches, 1.0)] * len(mask),
            *window,
        )  # fmt: skip
        return out

    def _drawn(
        self, i: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """What the same rule draws from pages that hold this request alone, in the caller's time."""
        options, n = self.options, keys.shape[1]
        blocks = -(-n // BLOCK_SIZE)
        memory = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=self.dtype)
        pages, pool = HostPages(memory, HEAD_SIZE, 0), _C.ThreadPool([0])
        rows = (x.transpose(0, 1).contiguous() for x in (keys, values))
        pages.store_rows(*rows, np.arange(n), pool)
        signatures = LayerSignatures(options, pages, i, FIRST_KV_HEAD, _C.Isa.portable, pool)
        layer = _C.DecodeLayer.of_signatures(
            signatures.native,
            signatures.rule,
            scale=SCALE,
            exact_below=options.exact_below,
            isa=_C.Isa.portable,
            pool=pool,
        )
        table = np.arange(blocks, dtype=np.int32)[None]
        batch = _C.DecodeBatch(pages.native, table, np.array([n], np.int32))
        out = torch.empty(1, *query.shape)
        layer.attend(query[None].float(), batch, out)
        return out[0].double()


def worst(errors: list[dict[str, torch.Tensor]]) -> float:
    return max(float(error) for layer in errors for error in layer.values())


@each_index
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_and_decode_steps_of_several_requests(
    device: Any, dtype: torch.dtype, options: MagicPigOptions
) -> None:
    model = Model(device, dtype, options)
    bound = ROUNDING[dtype] * (1 if dtype == torch.float32 else 4)
    assert worst(model.step(a=600)) < bound
    assert worst(model.step(a=300, b=40)) < bound
    assert worst(model.step(b=1, a=200)) < bound
    assert worst(model.step(b=1, c=700, a=1)) < bound
    for _ in range(3):
        assert worst(model.step(a=1, b=1, c=1)) < bound
    stats = model.layers[0].stats()
    assert stats.sampled_heads > 0
    assert stats.exact_heads > 0


def test_a_context_longer_than_the_staging_buffers(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_buffers, "STAGING_TOKENS", 200)
    model = Model(device, options=replace(OPTIONS, K=0))
    for tokens in (500, 77, 333):
        assert worst(model.step(a=tokens, b=150)) < 1e-5
    assert worst(model.step(a=1, b=1)) < 1e-5


def test_segments_built_behind_the_decode_steps_do_not_change_them(device: Any) -> None:
    model = Model(device)
    model.step(a=3000)
    assert worst(model.step(a=1)) < 1e-5
    model.builder.drain()
    assert model.layers[0].index is not None
    # The best cover of 3,001 tokens is one segment of 2,048.
    assert model.layers[0].index.native.num_segments == 1
    assert worst(model.step(a=1)) < 1e-5


@each_index
def test_steps_launched_back_to_back_without_waiting(
    device: Any, options: MagicPigOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with asynchronous scheduling: a step is launched while the one before it still runs, and
    its metadata takes the place of the other's."""
    model = Model(device, options=options)
    model.step(a=900, b=400)
    if isinstance(device, FakeDevice):
        monkeypatch.setattr(device, "settle", lambda: None)
    steps = []
    for name in ("a", "b", "a", "a"):
        rows = model._random_rows(1)
        step = model._metadata({name: 1})
        outs = [torch.full_like(rows[0][0], torch.nan) for _ in model.layers]
        for i, layer in enumerate(model.layers):
            layer.forward(*(x[i] for x in rows), outs[i], step)
            for held, x in ((model.keys[i], rows[1]), (model.values[i], rows[2])):
                held[name] = torch.cat([held[name], x[i].cpu()])
        expected = [
            model._expected(i, name, rows[0][i].cpu(), True) for i in range(len(model.layers))
        ]
        steps.append((outs, expected))
    device.synchronize()
    device.callbacks.raise_error()
    for outs, expected in steps:
        for out, wanted in zip(outs, expected, strict=True):
            assert (out.cpu().double() - wanted).abs().max() < 1e-5


def test_python_never_waits_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed step is launched while the device has not begun it."""
    device = FakeDevice()
    model = Model(device, num_layers=1)
    model.step(a=900, b=700)
    monkeypatch.setattr(device, "settle", lambda: None)
    gate = threading.Event()
    device.launch(gate.wait)
    new_tokens = {"a": 1, "b": 500, "c": 40}
    step = model._metadata(new_tokens)
    query, key, value = model._random_rows(541)
    out = torch.full_like(query[0], torch.nan)
    model.layers[0].forward(query[0], key[0], value[0], out, step)
    assert device.callbacks.pending == 2, "what was stored is noted, and a decode"
    assert out.isnan().all()
    gate.set()
    device.synchronize()
    device.callbacks.raise_error()
    assert worst(model._compare(new_tokens, query, key, value, [out])) < 1e-5


def test_signatures_are_the_hosts_own(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hashed; chunks are encoded behind their layer, and after warm-up is forgotten anew."""
    model = Model(device, options=SIGNATURES, num_layers=1)
    layer = model.layers[0]
    monkeypatch.setattr(device.kernels, "simhash", None)
    layer.warm_up()
    model.step(a=700)
    model.step(a=1)
    assert layer.index is None
    assert layer.signatures is not None
    assert layer.signatures.native.num_encoded == 5
    layer.forget()
    assert layer.stats().decode_steps == 0
    assert layer.signatures.used_bytes == 0
    model.step(b=900, a=1)
    assert layer.signatures.native.num_encoded == 5 + 7 + 5, "the request's own, and a's anew"
    assert worst(model.step(b=1, a=1)) < 1e-5
    assert layer.signatures.native.num_encoded == 17
    assert layer.stats().sampled_heads == 3 * HEADS


def test_blocks_are_written_after_the_layer_before_has_encoded_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the next layer's chunks wait for it."""
    device = FakeDevice()
    model = Model(device, options=SIGNATURES, num_layers=1)
    waits: list[tuple[int, int]] = []
    wait_for = device.wait_for

    def record(stream: int) -> None:
        waits.append((device.current_stream(), stream))
        wait_for(stream)

    monkeypatch.setattr(device, "wait_for", record)
    model.step(a=700)
    buffers = model.buffers
    assert (buffers.store_stream, buffers.encode_stream) in waits
    assert (buffers.encode_stream, buffers.store_stream) in waits
    others = [waiting for waiting, on in waits if on == buffers.encode_stream]
    assert others == [buffers.store_stream]


def test_dummy_steps_store_nothing(device: Any) -> None:
    model = Model(device)
    step = model._metadata({"a": 700, "b": 1}, dummy=True)
    query, key, value = (x[0] for x in model._random_rows(701))
    model.layers[0].forward(query, key, value, torch.empty_like(query), step)
    device.synchronize()
    device.callbacks.raise_error()
    assert model.layers[0].pages.native.num_tokens == 0


def test_until_the_centre_is_fixed_decode_is_exact(device: Any) -> None:
    """As while vLLM warms up with scheduled requests of made-up tokens, and the passage runs."""
    model = Model(device, is_fixed=False)
    model.layers[0].warm_up()
    assert worst(model.step(a=700)) < 1e-5
    assert worst(model.step(a=1)) < 1e-5
    assert model.layers[0].stats().sampled_heads == 0
    model.fix_centers()
    for layer in model.layers:
        layer.take_center()
        layer.forget()
    model.step(b=600)
    assert worst(model.step(b=1)) < 1e-5
    assert model.layers[0].stats().sampled_heads == HEADS


def test_the_first_long_prompt_hashes_nothing_but_its_own_blocks(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where steps of made-up tokens have filled other blocks before."""
    model = Model(device, num_layers=1)
    hashed = count_hashed_keys(model, monkeypatch)
    layer = model.layers[0]
    model.step(a=700, b=200)
    model.step(a=1, b=1)
    model.builder.drain()
    layer.forget()
    assert layer.pages.native.num_tokens == 0
    assert layer.stats().decode_steps == 0
    hashed.clear()
    model.step(c=600)
    assert 600 <= sum(hashed) <= 5 * BLOCK_SIZE
    assert layer.pages.native.num_tokens == 600
    hashed.clear()
    assert worst(model.step(c=1)) < 1e-5
    assert sum(hashed) == 1
    assert layer.stats().decode_steps == 1


def count_hashed_keys(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call that hashes keys is given, on the device or on the host."""
    hashed: list[int] = []
    on_device, on_host = model.device.kernels.simhash, Projection.hash_keys

    def simhash(vectors: torch.Tensor, planes: Any, words: int, center: Any, codes: Any) -> None:
        if center is not None:  # queries have none
            hashed.append(len(vectors))
        on_device(vectors, planes, words, center, codes)

    def hash_keys(self: Projection, keys: torch.Tensor, *rest: Any) -> Any:
        hashed.append(len(keys))
        return on_host(self, keys, *rest)

    monkeypatch.setattr(model.device.kernels, "simhash", simhash)
    monkeypatch.setattr(Projection, "hash_keys", hash_keys)
    return hashed


def test_what_the_pages_hold_is_counted(device: Any) -> None:
    model = Model(device)
    model.step(a=700, b=30)
    model.step(a=1, b=1)
    assert model.layers[1].pages.native.num_tokens == 732
    assert model.layers[1].pages.native.num_used_blocks == 7
