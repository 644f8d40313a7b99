"""A logits processor of vLLM that makes a request's first tokens those of the question.

So the question goes through decode steps, one token each, on an ordinary engine: the prompt is the
context, and what the model would have said in place of the question's tokens is overruled. Give the
engine `logits_processors=["ruler_forced:ForcedTokens"]` and the request's SamplingParams
`extra_args={"forced_tokens": [...]}`. Written for the processors of vLLM's V1 model runner (0.32).
"""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

QUALIFIED_NAME = "ruler_forced:ForcedTokens"
FORCED_TOKENS = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        forced: list[int] | None = (params.extra_args or {}).get(FORCED_TOKENS)
        if not forced:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            """logits: [vocabulary], of the token after output_ids."""
            if len(output_ids) >= len(forced):
                return logits
            only = torch.full_like(logits, -torch.inf)
            only[forced[len(output_ids)]] = 0.0
            return only

        return force
