"""A small transformer trained on the spot, so that methods meet heads that were learnt.

    model, facts = train(seed=0)
    capture(model, corpus(16384, seed=1), decode_tokens=16)

Its texts mix what attention of language models is known to do:
  words     follow a Markov chain; other tokens stand between, so that a head must find the last word
  facts     each text settles on one of 4 items for each topic; an item's token names topic and choice
  questions a topic is asked for, and the item that this text settled on must follow: associative
            recall of one of many facts, wherever in the text they stand
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import Phi3Config, Phi3ForCausalLM

WORDS, TOPICS, CHOICES = 64, 64, 4  # token ids: words, then questions, then items
QUESTIONS, ITEMS = WORDS, WORDS + TOPICS
VOCABULARY = WORDS + TOPICS + TOPICS * CHOICES
SUCCESSORS, LIKELY = 3, 0.9  # likely next words of a word, and their share
FACT_SHARE, QUESTION_SHARE = 0.25, 0.15  # of what is drawn; the rest are words
TOKENS_PER_TOPIC = 16  # of the text, for each topic that it knows: about 5 places of each, or more
TRAIN_TOKENS, BATCH = 128, 16
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class TrainingFacts:
    """loss: nats per token of the last tenth of the steps; recall: share of the questions answered of
    whose topic the text had spoken, in texts of train_tokens and of long_tokens; 0.25 is chance."""

    steps: int
    seconds: float
    loss: float
    train_tokens: int
    recall: float
    long_tokens: int
    long_recall: float


def corpus(num_tokens: int, seed: int) -> torch.Tensor:
    """One text: int64 [num_tokens]. All share the Markov chain; each settles on items of its own."""
    chain = torch.randint(WORDS, (WORDS, SUCCESSORS), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, num: int) -> list[int]:
        return torch.randint(high, (num,), generator=generator).tolist()

    known = min(max(num_tokens // TOKENS_PER_TOPIC, 1), TOPICS)
    topics = torch.randperm(TOPICS, generator=generator)[:known].tolist()
    items = [ITEMS + CHOICES * t + c for t, c in zip(topics, draw(CHOICES, known), strict=True)]
    kinds, likely = (torch.rand(num_tokens, generator=generator).tolist() for _ in range(2))
    which, successor, other = (draw(n, num_tokens) for n in (known, SUCCESSORS, WORDS))
    table = chain.tolist()
    text: list[int] = []
    word = other[0]
    for place in range(num_tokens):
        if kinds[place] < FACT_SHARE:
            text.append(items[which[place]])
        elif kinds[place] < FACT_SHARE + QUESTION_SHARE:
            text += [QUESTIONS + topics[which[place]], items[which[place]]]
        else:
            word = table[word][successor[place]] if likely[place] < LIKELY else other[place]
            text.append(word)
    return torch.tensor(text[:num_tokens])


def new_model(seed: int) -> Any:
    """Untrained: 2 layers of 4 query heads of size 64 over 2 kv heads. 48 of the 64 dims of a head do
    not see positions, and the others turn fast enough for training to see all of their phases, so that
    texts may be much longer than those of training."""
    torch.manual_seed(seed)
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCABULARY,
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
    """Share of the questions answered of whose topic the text had spoken; nan without any."""
    guesses = model(tokens[None], use_cache=False).logits[0].argmax(-1).tolist()
    known: set[int] = set()
    right = []
    text = tokens.tolist()
    for place, token in enumerate(text[:-1]):
        if QUESTIONS <= token < ITEMS and token - QUESTIONS in known:
            right.append(guesses[place] == text[place + 1])
        if token >= ITEMS:
            known.add((token - ITEMS) // CHOICES)
    return sum(right) / len(right) if right else float("nan")


def train(
    seed: int = 0, steps: int = 700, long_tokens: int = 4096, quiet: bool = False
) -> tuple[Any, TrainingFacts]:
    """The same seed and number of threads give the same weights."""
    model = new_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    started, losses = time.monotonic(), []
    for step in tqdm(range(steps), desc="training", unit="step", disable=quiet):
        first = 1_000_000 * (seed + 1) + step * BATCH
        batch = torch.stack([corpus(TRAIN_TOKENS, first + i) for i in range(BATCH)])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(steps // 10, 1) :]
    short = [recall(model, corpus(TRAIN_TOKENS, seed=i)) for i in range(20)]
    return model, TrainingFacts(
        steps,
        round(time.monotonic() - started, 1),
        sum(last) / len(last),
        TRAIN_TOKENS,
        sum(short) / len(short),
        long_tokens,
        recall(model, corpus(long_tokens, seed=0)),
    )
