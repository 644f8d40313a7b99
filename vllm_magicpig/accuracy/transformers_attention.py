"""The methods as the attention function of a Hugging Face model: prefill dense, decode by the method.

    model = AutoModelForCausalLM.from_pretrained(...)
    with use_method(model, MethodSettings("quest", rows=0.02)) as run:
        tokens = generate(model, input_ids, max_new_tokens=32, stop_ids=[2], run=run)
        print(run.mean_fraction)           # of the middle's rows, over layers, steps and heads

For accuracy only: every step reads all rows, and none of it is fast. Written for transformers 5.19.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_magicpig.accuracy.methods import Method, MethodSettings, make_method

ATTENTION_NAME = "magicpig_accuracy"
_OBSERVER = "magicpig_accuracy_run"  # attribute of an attention module while a run is on
_CHANGES_LOGITS = ("softcap", "s_aux", "position_bias")


class Observer(Protocol):
    """What a run does with the attention of one layer."""

    def layer(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor | None:
        """query: [num_q_heads, q, head_size], of the last q positions; key, value: [num_kv_heads, n,
        head_size]. Returns the output [num_q_heads, q, head_size], or None where dense attention is to
        make it."""
        ...


@dataclass(frozen=True)
class RowsRead:
    """Of one decode step of one layer; rows: gathered of the middle, per query head."""

    layer_index: int
    num_tokens: int
    middle_tokens: int
    rows: tuple[int, ...]


class MethodRun:
    """The method's state in every layer, and what it read.

    rows_read: one entry per layer and decode step since the run began, `clear_rows` aside.
    """

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings
        self.methods: dict[int, Method] = {}
        self.rows_read: list[RowsRead] = []

    def reset(self) -> None:
        """Ready for another prompt. magicpig's centre stays that of the first."""
        for method in self.methods.values():
            method.reset()

    def clear_rows(self) -> None:
        self.rows_read.clear()

    @property
    def mean_fraction(self) -> float:
        """Rows gathered as a fraction of the middle, over layers, steps and heads; nan without any."""
        found = [
            sum(step.rows) / (len(step.rows) * step.middle_tokens)
            for step in self.rows_read
            if step.middle_tokens
        ]
        return sum(found) / len(found) if found else float("nan")

    def layer(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor | None:
        if self.settings.options.is_dense(layer_index):
            return None
        if layer_index not in self.methods:
            self.methods[layer_index] = make_method(self.settings, layer_index, scale)
        method = self.methods[layer_index]
        n = key.shape[1]
        if query.shape[1] == n:  # nothing was cached: another prompt
            method.reset()
        if query.shape[1] > 1:
            method.observe(key.to(torch.promote_types(key.dtype, torch.float32)))
            return None
        out, rows = method.attend(query[:, 0], key, value)
        middle = len(method.middle(n))
        self.rows_read.append(RowsRead(layer_index, n, middle, tuple(rows.tolist())))
        return out[:, None]


@dataclass(frozen=True)
class CapturedLayer:
    """q, k and v of one layer after rotary embedding, as attention gets them; float32, on the CPU.

    queries: [num_queries, num_q_heads, head_size], of query_positions; keys, values: [num_kv_heads, n,
    head_size]; scale: of the logits. Query i attends to keys[:, : query_positions[i] + 1].
    """

    layer_index: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    query_positions: torch.Tensor


class CaptureRun:
    """Keeps the q, k and v of a prefill; attention stays dense."""

    def __init__(self, decode_tokens: int, layers: Collection[int] | None) -> None:
        self._decode_tokens, self._layers = decode_tokens, layers
        self.captured: list[CapturedLayer] = []

    def layer(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor | None:
        if self._layers is not None and layer_index not in self._layers:
            return None
        n, last = key.shape[1], min(self._decode_tokens, query.shape[1])
        self.captured.append(
            CapturedLayer(
                layer_index,
                _kept(query[:, -last:].transpose(0, 1)),
                _kept(key),
                _kept(value),
                scale,
                torch.arange(n - last, n),
            )
        )
        return None


def _kept(rows: torch.Tensor) -> torch.Tensor:
    return rows.detach().to("cpu", torch.float32, copy=True).contiguous()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers; query: [batch, num_q_heads, q, head_size], key and
    value: [batch, num_kv_heads, n, head_size]."""
    run: Observer | None = getattr(module, _OBSERVER, None)
    out = None
    if run is not None and sliding_window is None:
        changed = [name for name in _CHANGES_LOGITS if kwargs.get(name) is not None]
        if changed:
            raise ValueError(
                f"attention of {type(module).__name__} takes {changed[0]}, but the accuracy methods "
                "know plain softmax attention only; choose another model."
            )
        if len(query) != 1:
            raise ValueError(
                f"batch size is {len(query)}, but the accuracy methods take one sequence at a time; "
                "pass the prompts one after another."
            )
        if query.shape[2] == 1 and attention_mask is not None and not _sees_all(attention_mask):
            raise ValueError(
                "the attention mask of a decode step hides tokens, but the accuracy methods attend to "
                "all; pass the prompt without padding."
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer_index = int(module.layer_idx)  # type: ignore[arg-type]
        out = run.layer(layer_index, query[0], key[0], value[0], scale)
    if out is not None:
        return out.transpose(0, 1)[None], None
    dense, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return dense, None


def _sees_all(mask: torch.Tensor) -> bool:
    return bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def _observed(model: Any, run: Observer) -> Iterator[None]:
    """Attention of `model` goes through `run` meanwhile."""
    config = model.config
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
    ]
    if (
        getattr(config, "is_encoder_decoder", False)
        or not getattr(model, "_supports_attention_backend", False)
        or not modules
    ):
        raise ValueError(
            f"{type(model).__name__} is not supported: the accuracy methods need a decoder-only model "
            "whose attention goes through transformers' AttentionInterface; choose another model."
        )
    before = config._attn_implementation
    outer = [getattr(module, _OBSERVER, None) for module in modules]
    model.set_attn_implementation(ATTENTION_NAME)
    for module in modules:
        setattr(module, _OBSERVER, run)
    try:
        yield
    finally:
        for module, observer in zip(modules, outer, strict=True):
            setattr(module, _OBSERVER, observer)
        model.set_attn_implementation(before)


@contextmanager
def use_method(model: Any, settings: MethodSettings) -> Iterator[MethodRun]:
    """Decode steps of `model` (a causal language model of transformers) attend by the method meanwhile.

    Layers of options' dense_layers and those with a sliding window stay dense. Raises ValueError for a
    model whose attention cannot be replaced.
    """
    run = MethodRun(settings)
    with _observed(model, run):
        yield run


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: torch.Tensor | Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    run: MethodRun,
    sparse_from: int | None = None,
) -> list[int]:
    """Greedy decoding of one prompt within `use_method`; tokens up to and with the first of stop_ids.

    input_ids: [n] or [1, n]. sparse_from: tokens of the prompt from this position on are fed one at a
    time, so that the method decodes them ("question decoded sparsely"); None prefills all of the prompt
    densely, and then the first token that is generated owes nothing to the method ("question prefilled
    densely").
    """
    ids = torch.as_tensor(input_ids, device=model.device).reshape(1, -1)
    n = ids.shape[1]
    start = n if sparse_from is None else sparse_from
    if not 1 <= start <= n:
        raise ValueError(
            f"sparse_from is {sparse_from}, but must be None or 1 to the prompt's {n} tokens; the "
            "tokens before it are prefilled."
        )
    run.reset()
    cache = DynamicCache(config=model.config)
    fed = [ids[:, :start], *(ids[:, i : i + 1] for i in range(start, n))] if start < n else [ids]
    generated: list[int] = []
    while True:
        for tokens in fed:
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if len(generated) == max_new_tokens:
            return generated
        generated.append(int(logits[0, -1].argmax()))
        if generated[-1] in stop_ids or len(generated) == max_new_tokens:
            return generated
        fed = [ids.new_tensor([[generated[-1]]])]


@torch.inference_mode()
def capture(
    model: Any,
    input_ids: torch.Tensor | Sequence[int],
    decode_tokens: int,
    layers: Collection[int] | None = None,
) -> list[CapturedLayer]:
    """q of the last `decode_tokens` positions and k, v of all, from one dense prefill.

    input_ids: [n] or [1, n]; layers: indices, None for all that have no sliding window.
    """
    ids = torch.as_tensor(input_ids, device=model.device).reshape(1, -1)
    run = CaptureRun(decode_tokens, layers)
    with _observed(model, run):
        model(ids, use_cache=False, logits_to_keep=1)
    return run.captured
