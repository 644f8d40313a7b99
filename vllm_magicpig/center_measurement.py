"""Key centres at start-up: every worker runs a passage of text through its model, and no request does.

The steps are those that vLLM's scheduler would make for one prompt, as in its own
v1/worker/gpu/warmup.py; the scheduler itself never hears of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_magicpig.backend import MagicPigImpl
from vllm_magicpig.passage import PASSAGE_TOKENS, Passage, make_passage

logger = init_logger("vllm.magicpig.center")

REQUEST_ID = "_magicpig_passage_"


def measure_centers(
    impls: Sequence[MagicPigImpl],
    vllm_config: Any,
    kv_cache_config: Any,
    run_step: Callable[[SchedulerOutput], None],
) -> None:
    """Fixes the key centres that no file gives, as the mean key of the passage.

    run_step: runs a step of the worker and waits for it. All ranks call this at the same time and run
    the same steps, as they do for a request; what these store is the caller's to forget.
    """
    impls = [impl for impl in impls if impl.needs_center]
    if not impls:
        return
    started = time.monotonic()
    model = vllm_config.model_config
    block_sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    num_tokens = num_passage_tokens(model, kv_cache_config.num_blocks, block_sizes)
    tokenizer = cached_tokenizer_from_config(model)
    special = _special_ids(model.hf_text_config, tokenizer)
    passage = make_passage(tokenizer, model.get_vocab_size(), special, num_tokens)
    for impl in impls:
        impl.observes_keys = True
    max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    for step in passage_steps(passage.token_ids, max_tokens, block_sizes):
        run_step(step)
    without = [impl.layer_index for impl in impls if not impl.fix_center()]
    seconds = time.monotonic() - started
    _report(passage, len(impls), without, seconds)


def num_passage_tokens(model_config: Any, num_blocks: int, block_sizes: Sequence[int]) -> int:
    """PASSAGE_TOKENS, or as many as fit a request and the cache; 0 where nothing is generated.

    block_sizes: of each KV cache group; all take their blocks from one pool of num_blocks, whose block
    0 is vLLM's null block.
    """
    if model_config.runner_type != "generate":
        return 0
    most: int = min(PASSAGE_TOKENS, model_config.max_model_len - 1)  # the runner samples one more
    while most > 0 and sum(-(-most // size) for size in block_sizes) > num_blocks - 1:
        most -= 1
    return most


def passage_steps(
    token_ids: list[int], max_tokens: int, block_sizes: Sequence[int]
) -> Iterator[SchedulerOutput]:
    """One request in chunks of at most max_tokens, through the pool's first blocks, and its end."""
    if not token_ids:
        return
    block_ids: list[list[int]] = []
    first = 1
    for size in block_sizes:
        count = -(-len(token_ids) // size)
        block_ids.append(list(range(first, first + count)))
        first += count
    for start in range(0, len(token_ids), max_tokens):
        step = SchedulerOutput.make_empty()
        if start == 0:
            step.scheduled_new_reqs = [
                NewRequestData(
                    req_id=REQUEST_ID,
                    prompt_token_ids=token_ids,
                    mm_features=[],
                    sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
                    pooling_params=None,
                    block_ids=tuple(block_ids),
                    num_computed_tokens=0,
                    lora_request=None,
                    prefill_token_ids=token_ids,
                )
            ]
        else:
            cached = CachedRequestData.make_empty()
            cached.req_ids = [REQUEST_ID]
            cached.num_computed_tokens = [start]
            cached.num_output_tokens = [0]
            cached.new_block_ids = [None]
            step.scheduled_cached_reqs = cached
        count = min(max_tokens, len(token_ids) - start)
        step.num_scheduled_tokens = {REQUEST_ID: count}
        step.total_num_scheduled_tokens = count
        yield step
    finish = SchedulerOutput.make_empty()
    finish.finished_req_ids = {REQUEST_ID}
    yield finish


def _special_ids(hf_config: Any, tokenizer: Any) -> set[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(hf_config, name, None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _report(passage: Passage, num_layers: int, without: list[int], seconds: float) -> None:
    if not passage.token_ids:
        return  # nothing will be sampled
    logger.info(
        "magicpig: key centres of %d layers measured over %s in %.1f s",
        num_layers - len(without),
        passage,
        seconds,
    )
    if not passage.is_text:
        logger.warning(
            "magicpig: the key centres are means over random tokens, which makes sampling less "
            "accurate, since the model has no tokenizer here or one that reads no English; write a "
            "calibration file with `vllm-magicpig tune` and pass its path as center."
        )
    if without:
        logger.warning(
            "magicpig: the keys of layers %s are not finite over %s, so that these layers go without a "
            "key centre, which makes sampling less accurate; write a calibration file with "
            '`vllm-magicpig tune` and pass its path as center, or pass "none".',
            ", ".join(map(str, without)),
            passage,
        )
