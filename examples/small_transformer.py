"""A small Llama trained on the spot, so that estimators meet heads that were learnt and not designed.

    model, facts = train(seed=0)                  # 3 to 4 minutes on one core
    capture(model, corpus(16384, seed=1), decode_tokens=16)

The text is a mixture that needs what language models are known to do: most tokens follow a Markov
chain (local statistics, the previous token), and among them stand pairs, a key and the value that
this text gives it; a pair comes back several times, and its value can only be recalled (induction:
arXiv 2209.11895). Longer texts hold more pairs, so that a pair's places stay few.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import Phi3Config, Phi3ForCausalLM

WORDS, KEYS = 64, 128  # token ids: words first, then keys; values are words
SUCCESSORS = 3  # likely next words of a word
LIKELY = 0.9
PAIR_SHARE = 0.25  # of the positions begin a pair
TOKENS_PER_PAIR = 24  # of the text, for each pair that it knows: about 5 places of each
TRAIN_TOKENS, BATCH = 256, 8
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class TrainingFacts:
    """loss: nats per token of the last steps; recall: share of values foretold where their pair came
    before, at the length of training and at `long_tokens`; chance is 1 / 128."""

    steps: int
    seconds: float
    loss: float
    recall: float
    long_tokens: int
    long_recall: float


def corpus(num_tokens: int, seed: int) -> torch.Tensor:
    """One text: int64 [num_tokens]. All texts share the Markov chain; each has pairs of its own."""
    chain = torch.randint(WORDS, (WORDS, SUCCESSORS), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, num: int) -> list[int]:
        return torch.randint(high, (num,), generator=generator).tolist()

    def coins(chance: float) -> list[bool]:
        return (torch.rand(num_tokens, generator=generator) < chance).tolist()

    num_pairs = max(min(num_tokens // TOKENS_PER_PAIR, KEYS), 1)
    keys = (WORDS + torch.randperm(KEYS, generator=generator)[:num_pairs]).tolist()
    values = draw(WORDS, num_pairs)
    pairs, likely = coins(PAIR_SHARE), coins(LIKELY)
    which, successor = draw(num_pairs, num_tokens), draw(SUCCESSORS, num_tokens)
    words = draw(WORDS, num_tokens)
    table = chain.tolist()
    text, word = [], words[0]
    while len(text) < num_tokens + 1:
        place = len(text) % num_tokens
        if pairs[place]:
            word = values[which[place]]
            text += [keys[which[place]], word]
            continue
        word = table[word][successor[place]] if likely[place] else words[place]
        text.append(word)
    return torch.tensor(text[:num_tokens])


def new_model(seed: int) -> Any:
    """8 query heads of size 64 over 2 kv heads in each of 3 layers; untrained."""
    torch.manual_seed(seed)
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=WORDS + KEYS,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1 << 17,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.25,
            },
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )


@torch.inference_mode()
def recall(model: Any, tokens: torch.Tensor) -> float:
    """Share of the values that are foretold where their key was seen before."""
    logits = model(tokens[None], use_cache=False).logits[0]
    keys = tokens[:-1] >= WORDS
    seen: set[int] = set()
    again = []
    for token in tokens[:-1].tolist():
        again.append(token in seen)
        seen.add(token)
    places = (keys & torch.tensor(again)).nonzero().flatten()
    return float((logits[places].argmax(-1) == tokens[places + 1]).double().mean())


def train(
    seed: int = 0, steps: int = 700, long_tokens: int = 4096, quiet: bool = False
) -> tuple[Any, TrainingFacts]:
    """The same seed and number of threads give the same weights."""
    model = new_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    started, losses = time.monotonic(), []
    for step in tqdm(range(steps), desc="training", unit="step", disable=quiet):
        texts = [corpus(TRAIN_TOKENS, seed=1000 + step * BATCH + i) for i in range(BATCH)]
        batch = torch.stack(texts)
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
    model.eval()
    last = losses[-max(steps // 10, 1) :]
    return model, TrainingFacts(
        steps,
        round(time.monotonic() - started, 1),
        sum(last) / len(last),
        recall(model, torch.cat([corpus(TRAIN_TOKENS, seed=1)])),
        long_tokens,
        recall(model, corpus(long_tokens, seed=2)),
    )
