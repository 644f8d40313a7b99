"""A small LlamaForCausalLM whose right answers are known at any length, computed in closed form.

    python examples/recall_model.py OUT_DIR

Nothing is trained and nothing is downloaded: every weight follows from a formula and a seed, so a
wrong answer at 64K tokens is the fault of the attention under test. The checkpoint is an ordinary
one (config.json, model.safetensors, tokenizer.json), which `vllm serve` and transformers load as
they load any Llama.

What it does, in two layers of 4 query heads and 2 kv heads (head_dim 128):
  layer 0  head 0 attends to the previous token and writes that token's identity into the residual;
           run it dense.
  layer 1  heads 0, 1 (kv head 0) RECALL: they look for the token that once followed the current
           one, and repeat it. Notes such as "amber walnut ." and "walnut river ." far apart
           are followed from one to the next: STOP ends what a note says of its last word.
           heads 2, 3 (kv head 1) COUNT: at the token COUNT they meet all content words alike and
           average their identities, so the most frequent word wins; elsewhere they rest on
           the sink.
Its keys are made as awkward as those of trained models: noise (the needle's cosine is about 0.8,
not 1), one direction shared by all keys (the cone), its opposite at the first token (the sink), and
queries that lean towards the sink. A sampler that hashes keys without centring them finds next to
nothing here; that is intended.

The first generated token comes from the prefill, which is dense everywhere, and says nothing about
sampled decode: score `answer[1:]`. Prompts are English words, one token each, separated by single
spaces; the tokenizer adds `<s>`.

Source: induction heads as in arXiv 2209.11895; cone and sink as in arXiv 2410.16179, section 3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

# --------------------------------------------------------------------------------------- vocabulary

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
# Reads "and the most frequent word is". Upper case, so that no filler can be taken for it.
COUNT = "COUNT"
# After a tally word the model always says "again": the LM head, not attention, knows that.
AGAIN = "again"
# Ends a note: a STOP keeps no memory of the word before it, so that nothing follows that word there.
STOP = "."
FUNCTION_WORDS = (
    "the", "of", "and", "a", "to", "in", "that", "it", "is", "was", "he", "for", "on", "are",
    "as", "with", "his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had",
    "not", "but", "what", "all", "were", "when", "we", "there", "an", "your", "which", "she",
    "do", "how", "their", "if", "will", "up", "other", "about", "many", "then", "them", "these",
    "so", "some", "her", "would", "recall", "follows",
)  # fmt: skip
# Two kinds of content words, the first ones of the list, which only `loop_prompt` uses:
TALLY_WORDS = 32  # may be the answer to COUNT there; AGAIN follows them
LOUD_WORDS = 32  # to the counting heads one of them weighs as much as about 15 others
QUESTION = ("now", "recall", "what", "follows")
CONTENT_SHARE = 0.4  # of the filler; the rest are function words, as in English prose
# Tokens at either end without a planted word: a needle in the sink or in the window proves nothing.
EDGE = 96


@cache
def content_words() -> tuple[str, ...]:
    """The nouns, verbs and adjectives of recall_words.txt, in the order of the file."""
    return tuple(Path(__file__).with_name("recall_words.txt").read_text("utf-8").split())


@cache
def vocabulary() -> tuple[str, ...]:
    """All tokens; the place in the tuple is the token id."""
    return (UNK, BOS, EOS, COUNT, AGAIN, "now", *FUNCTION_WORDS, *content_words(), STOP)


def _tally_words() -> tuple[str, ...]:
    return content_words()[:TALLY_WORDS]


def loud_words() -> tuple[str, ...]:
    return content_words()[TALLY_WORDS : TALLY_WORDS + LOUD_WORDS]


# -------------------------------------------------------------------------------------------- model

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 128
MAX_LENGTH = 262_144
INTERMEDIATE = 64  # the MLP is zero; 64 is the least that every GEMM kernel takes
SEED = 20241016

# The residual stream: three blocks of identities, each D random signs, then flags. D is all the
# position-independent dims of a head but two, which the cone and COUNT use.
D = 96
CURRENT, PREVIOUS, OUTPUT = slice(0, D), slice(D, 2 * D), slice(2 * D, 3 * D)
ONE, AT_BOS, CONTENT, LOUD, AT_COUNT, TALLY, AT_STOP, PAD = range(3 * D, 3 * D + 8)
HIDDEN = 320
FLAG = 4.0  # size of a flag that is set
# Squared norm of every embedding: room for an identity and four flags; PAD takes what is left over.
NORM2 = 160.0

# RoPE. With this base the pairs 0..11 turn fast enough to tell neighbours apart, and the pairs from
# 15 up turn by less than 0.03 rad over MAX_LENGTH tokens: 98 dims that do not see positions. 1e30
# still fits fp32.
ROPE_THETA = 1e30
NEIGHBOUR_PAIRS = 12
FIRST_STILL_PAIR = 15
# Score of the previous token in layer 0. At 400 its own neighbours come next, 17 nats below; every
# other token up to MAX_LENGTH away is at least 55 nats below.
NEIGHBOUR_SCORE = 400.0

# Layer 1. "Score" is scale * q.k in nats; lengths are relative to the key of a needle without
# noise.
KEY_UNIT = 8.0  # norm of that key
CONE = 2.5  # length of the direction that all keys share
RECALL_SCORE = 48.0  # of a needle: 64K rows with cosine noise add up to exp(30)
RECALL_NOISE = (
    0.7  # of the current token, in every key: the needle's cosine is 0.82, 1 / |(1, 0.7)|
)
RECALL_STRAY = 0.2  # part of the query that no needle answers, another one in each head
# Score that the cone takes from every key; the sink gets about as much. Needle 34, sink 14, all the
# rest together 16 at 64K.
RECALL_LEAN = 14.0
COUNT_SCORE = 4.0  # of a content word above a function word
COUNT_LOUD_SCORE = 2.7  # of a loud word above other content words: exp(2.7) = 15
# Length of "is a content word" in the key. 0.6 of it survive centring: cosine 0.18, u = 0.07.
COUNT_KEY = 0.33
# Noise in the keys of the counting heads. One part follows from the word before; the other turns
# with the position, in the fastest pairs, where the query is zero. Without the latter the copies of
# a word in a repeated phrase would have one key, would be sampled all together or not at all, and a
# loop of a thousand tokens would be counted by a single coin.
COUNT_NOISE = 0.45
COUNT_TURN = 0.9
TURNING_PAIRS = 5
COUNT_STRAY = 0.4  # part of COUNT's query in each head's own direction: 0.2 nats of spread
# Score of the sink at all other tokens: 28 nats above each of the rest, at most exp(12.5) keys.
COUNT_REST = 14.0
COUNT_LEAN = 1.0  # score of the sink at COUNT
LOGIT = 40.0  # of a word recalled with certainty


def _embeddings() -> torch.Tensor:
    """Embedding table [vocabulary padded to 64, HIDDEN] float32; every row has squared norm NORM2.

    <s> has no identity: heads that rest on the sink must add nothing to the output.
    """
    words = vocabulary()
    table = torch.zeros(math.ceil(len(words) / 64) * 64, HIDDEN)
    generator = torch.Generator().manual_seed(SEED)
    table[:, CURRENT] = torch.randint(0, 2, (len(table), D), generator=generator) * 2.0 - 1.0
    table[:, ONE] = FLAG
    row = {word: index for index, word in enumerate(words)}
    content = [row[word] for word in content_words()]
    table[content, CONTENT] = FLAG
    table[[row[word] for word in loud_words()], LOUD] = FLAG
    table[[row[word] for word in _tally_words()], TALLY] = FLAG
    table[row[COUNT], AT_COUNT] = FLAG
    table[row[STOP], AT_STOP] = FLAG
    table[row[BOS], CURRENT] = 0.0
    table[row[BOS], AT_BOS] = 2 * FLAG
    table[:, PAD] = (NORM2 - table.square().sum(1)).sqrt()
    return table


def _still_dims() -> list[int]:
    """The dims of a head that RoPE leaves alone; its pairs are (j, j + HEAD_DIM / 2)."""
    half = HEAD_DIM // 2
    return [*range(FIRST_STILL_PAIR, half), *range(half + FIRST_STILL_PAIR, HEAD_DIM)]


def _previous_token_layer() -> dict[str, torch.Tensor]:
    """Layer 0: head 0 writes the previous token's CURRENT into PREVIOUS, other heads nothing.

    Query and key depend on the flag ONE alone. In each of the fast pairs the query is turned back
    by one step, so that after RoPE the score sum_j a^2 cos((m - n - 1) w_j) is largest at distance
    m - n = 1. The query of STOP is zero: it averages all tokens before it, which comes to nothing.
    """
    q, k, v, o = _zero_projections()
    half = HEAD_DIM // 2
    a = math.sqrt(NEIGHBOUR_SCORE / NEIGHBOUR_PAIRS * math.sqrt(HEAD_DIM)) / FLAG
    for pair in range(NEIGHBOUR_PAIRS):
        step = ROPE_THETA ** (-pair / half)
        q[pair, ONE] = a * math.cos(step)
        q[pair + half, ONE] = -a * math.sin(step)
        q[[pair, pair + half], AT_STOP] = -q[[pair, pair + half], ONE]
        k[pair, ONE] = a
    v[:D, CURRENT] = torch.eye(D)
    o[PREVIOUS, :D] = torch.eye(D)
    return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}


def _recall_and_count_layer() -> dict[str, torch.Tensor]:
    """Layer 1: kv head 0 recalls, kv head 1 counts; both read CURRENT and write OUTPUT."""
    q, k, v, o = _zero_projections()
    still = torch.tensor(_still_dims())
    space, cone, counted = still[:D], still[D], still[D + 1]
    eye = torch.eye(D)
    unit = KEY_UNIT / math.sqrt(D)  # an identity in a key then has norm KEY_UNIT
    nats = math.sqrt(HEAD_DIM) / KEY_UNIT  # length of a query that scores 1 with such a key

    # Keys. The cone is common to all tokens and reversed at <s>, whose flag is 2 FLAG and which
    # layer 1 sees sqrt(1.6) times as large (it has no previous token): CONE * (1 - 2) * 1.26.
    for head in range(NUM_KV_HEADS):
        k[head * HEAD_DIM + cone, ONE] = CONE * KEY_UNIT / FLAG
        k[head * HEAD_DIM + cone, AT_BOS] = -CONE * KEY_UNIT / FLAG
        v[head * HEAD_DIM : head * HEAD_DIM + D, CURRENT] = eye
    k[space, PREVIOUS] = unit * eye
    # Noise: random signs, rolled by any number of places, are as good as fresh ones.
    k[space, CURRENT] = RECALL_NOISE * unit * eye.roll(31, 0)
    k[HEAD_DIM + space, PREVIOUS] = COUNT_NOISE * unit * eye.roll(17, 0)
    turn = COUNT_TURN * KEY_UNIT / math.sqrt(TURNING_PAIRS)
    k[HEAD_DIM : HEAD_DIM + TURNING_PAIRS, ONE] = turn / FLAG
    k[HEAD_DIM + counted, CONTENT] = COUNT_KEY * KEY_UNIT / FLAG
    k[HEAD_DIM + counted, LOUD] = COUNT_KEY * COUNT_LOUD_SCORE / COUNT_SCORE * KEY_UNIT / FLAG

    # Queries.
    generator = torch.Generator().manual_seed(SEED + 1)
    for head in (0, 1):
        at = head * HEAD_DIM
        seek = eye + RECALL_STRAY * eye.roll(47 + 9 * head, 0)
        q[at + space, CURRENT] = RECALL_SCORE * nats / math.sqrt(D) * seek
        q[at + cone, ONE] = -RECALL_LEAN * nats / CONE / FLAG
        # What followed an earlier COUNT must not be recalled: lean on the sink all the more.
        q[at + cone, AT_COUNT] = -RECALL_SCORE * nats / CONE / FLAG
    for head in (2, 3):
        at = head * HEAD_DIM
        length = COUNT_SCORE * nats / COUNT_KEY
        stray = (torch.randint(0, 2, (D,), generator=generator) * 2.0 - 1.0) / math.sqrt(D)
        q[at + counted, AT_COUNT] = length / FLAG
        q[at + space, AT_COUNT] = COUNT_STRAY * length / FLAG * stray
        q[at + cone, ONE] = -COUNT_REST * nats / CONE / FLAG
        q[at + cone, AT_COUNT] = (COUNT_REST - COUNT_LEAN) * nats / CONE / FLAG
    for head in range(NUM_HEADS):
        o[OUTPUT, head * HEAD_DIM : head * HEAD_DIM + D] = eye / (NUM_HEADS // NUM_KV_HEADS)
    return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}


def _zero_projections() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [heads * HEAD_DIM, HIDDEN] and o [HIDDEN, heads * HEAD_DIM], float32."""
    return (
        torch.zeros(NUM_HEADS * HEAD_DIM, HIDDEN),
        torch.zeros(NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        torch.zeros(NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        torch.zeros(HIDDEN, NUM_HEADS * HEAD_DIM),
    )


def state_dict() -> dict[str, torch.Tensor]:
    """All weights under their transformers names, bfloat16."""
    table = _embeddings()
    lm_head = torch.zeros_like(table)
    spoken = slice(vocabulary().index(COUNT), len(vocabulary()))
    lm_head[spoken, OUTPUT] = LOGIT / D * table[spoken, CURRENT]
    lm_head[vocabulary().index(AGAIN), TALLY] = 3 * LOGIT / FLAG
    tensors = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": lm_head,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer, attention in enumerate((_previous_token_layer(), _recall_and_count_layer())):
        name = f"model.layers.{layer}"
        for projection, weight in attention.items():
            tensors[f"{name}.self_attn.{projection}.weight"] = weight
        # The norm's weight undoes the division by the root mean square, which is known: layer 0
        # adds D to NORM2.
        norm = math.sqrt((NORM2 + layer * D) / HIDDEN)
        tensors[f"{name}.input_layernorm.weight"] = torch.full((HIDDEN,), norm)
        tensors[f"{name}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[f"{name}.mlp.gate_proj.weight"] = torch.zeros(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.mlp.up_proj.weight"] = torch.zeros(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = torch.zeros(HIDDEN, INTERMEDIATE)
    return {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(tensors.items())
    }


def _config(num_embeddings: int) -> dict[str, Any]:
    ids = {"bos_token_id": vocabulary().index(BOS), "eos_token_id": vocabulary().index(EOS)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": num_embeddings,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        # The first is read by transformers 4, the second by 5.
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **ids,
    }


def _tokenizer() -> Tokenizer:
    """One word, one token; `<s>` is added in front."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    return tokenizer


STAMP = "recall_model.json"


def _stamp() -> str:
    """Digests of this file and of the word list, so that no edit leaves an old model in use."""
    here = Path(__file__)
    files = (here, here.with_name("recall_words.txt"))
    return json.dumps(
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}, indent=2
    )


def build(out_dir: str | os.PathLike[str]) -> Path:
    """Write the checkpoint to `out_dir`, unless this version is there; returns the directory.

    The files are written beside `out_dir` and moved into place in one rename, so that a killed
    build leaves nothing that a later one could take for complete. An older version is replaced; a
    directory that is neither empty nor one of ours is refused with FileExistsError.
    """
    out = Path(out_dir).absolute()
    stamp = out / STAMP
    if stamp.is_file() and stamp.read_text("utf-8") == _stamp():
        return out
    if out.exists() and not stamp.is_file() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} holds files that are no recall model; name an empty or a new directory"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        tensors = state_dict()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        config = _config(len(tensors["lm_head.weight"]))
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        tokenizer = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNK,
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
        }
        _tokenizer().save(str(new / "tokenizer.json"))
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokenizer),
        ):
            (new / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (new / STAMP).write_text(_stamp(), "utf-8")
        try:
            if out.exists():
                out.rename(Path(scratch) / "old")
            new.rename(out)
        except OSError:  # another process built it in the meantime
            if not (stamp.is_file() and stamp.read_text("utf-8") == _stamp()):
                raise
    return out


# ------------------------------------------------------------------------------------------ prompts


class Question(NamedTuple):
    """A prompt and the words that greedy decoding must produce.

    The first word comes from prefill: score the others.
    """

    prompt: str
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with planted chains of words; all its questions share it as a literal prefix.

    num_tokens counts `<s>`. chains: (key, word 1, word 2, ...) each.
    """

    text: str
    num_tokens: int
    chains: tuple[tuple[str, ...], ...]

    def question(self, index: int) -> Question:
        """Ask for chain `index`: the text, then five tokens that end in the chain's key."""
        key, *words = self.chains[index]
        return Question(" ".join((self.text, *QUESTION, key)), tuple(words))


def haystack(num_tokens: int, num_chains: int, chain_words: int = 6, seed: int = 0) -> Haystack:
    """A text of exactly `num_tokens` tokens, `<s>` included, with `num_chains` planted chains.

    A chain is a key and `chain_words` words, which occur nowhere else. Chains lie at random places,
    chain 0 first, never across one another and never in the first or last EDGE tokens.
    """
    rng = random.Random(seed)
    words = plain_words(rng)
    length = chain_words + 1
    if num_chains * length > len(words) // 2:
        raise ValueError(
            f"{num_chains} chains of {length} words need more than half of the {len(words)} words; "
            "ask for fewer or shorter chains"
        )
    chains = tuple(tuple(words[i * length : (i + 1) * length]) for i in range(num_chains))
    filler = draw_filler(rng, num_tokens - 1, words[num_chains * length :])
    return Haystack(" ".join(plant(rng, filler, chains)), num_tokens, chains)


def count_prompt(num_tokens: int, seed: int = 0) -> Question:
    """A prompt of `num_tokens` tokens in which one word is about 5 times as frequent as others.

    It holds one chain, whose recital ends in COUNT: the answer reads "w1 .. w6 COUNT word". So the
    most frequent word is said by a decode step. It makes up 6 % of the tokens.
    """
    rng = random.Random(seed)
    words = plain_words(rng)
    key, *answer = words[:7]
    top, runners_up, rest = words[7], words[8:20], words[20:]
    weights = [0.15, *[0.032] * 12, *[0.466 / len(rest)] * len(rest)]
    question = [*QUESTION, key]
    filler = draw_filler(rng, num_tokens - 1 - len(question), [top, *runners_up, *rest], weights)
    text = plant(rng, filler, ((key, *answer, COUNT),))
    return Question(" ".join((*text, *question)), (*answer, COUNT, top))


@dataclass(frozen=True)
class Loop:
    """A prompt that greedy decoding continues in a cycle for ever (pass ignore_eos).

    The continuation first repeats `cycle` + (tally, AGAIN): x d1 .. d12 COUNT tally again. `tally`
    is the most frequent word of the prompt. Each round says the loud word x once more, which counts
    about 15-fold, until x outweighs `tally`: from then on COUNT is answered by x, and the rounds
    are `cycle` alone. The prompt holds x once, so a server whose counting heads cannot see the
    GENERATED tokens never gets there. Dense attention changes over after 20 to 24 rounds. A sample
    of 3 % says so earlier or later (8 to 38 rounds were seen), but once x has won it stays.
    """

    prompt: str
    cycle: tuple[str, ...]
    tally: str

    def continuation(self, num_words: int, tally_rounds: int) -> tuple[str, ...]:
        """The first `num_words` words if COUNT is answered by `tally` `tally_rounds` times."""
        words = (*self.cycle, self.tally, AGAIN) * tally_rounds
        rounds = max(0, -(-(num_words - len(words)) // len(self.cycle)))
        return (words + self.cycle * rounds)[:num_words]

    def tally_rounds(self, words: Sequence[str]) -> int:
        """How many answers to COUNT in `words` precede the first one that is not `tally`."""
        answers = [after for word, after in pairwise(words) if word == COUNT]
        return next((i for i, answer in enumerate(answers) if answer != self.tally), len(answers))


# Occurrences of `tally` in the prompt: x draws level after about 240 / (15 - 1) rounds of 16 words.
LOOP_TALLY = 240


def loop_prompt(num_tokens: int, seed: int = 0) -> Loop:
    """A `Loop` whose prompt has exactly `num_tokens` tokens, `<s>` included; at least 2,048."""
    if num_tokens < 2048:
        raise ValueError(
            f"num_tokens is {num_tokens}; fewer than 2048 cannot hold {LOOP_TALLY} tally words"
        )
    rng = random.Random(seed)
    tally, loud = rng.choice(_tally_words()), rng.choice(loud_words())
    words = plain_words(rng)
    cycle = (loud, *words[:12], COUNT)
    filler = draw_filler(rng, num_tokens - 2, words[12:])
    for place in rng.sample(range(len(filler)), LOOP_TALLY):
        filler[place] = tally
    text = plant(rng, filler, ((AGAIN, *cycle),))
    return Loop(" ".join((*text, AGAIN)), cycle, tally)


def plain_words(rng: random.Random) -> list[str]:
    """The content words that are neither tally nor loud words, shuffled."""
    plain = content_words()[TALLY_WORDS + LOUD_WORDS :]
    return rng.sample(plain, len(plain))


def draw_filler(
    rng: random.Random, num_words: int, words: Sequence[str], weights: Sequence[float] | None = None
) -> list[str]:
    """Noise like prose: function words, and a CONTENT_SHARE of `words` drawn by `weights`."""
    if num_words <= 0:
        raise ValueError(f"a prompt with {num_words} words of text is empty; ask for more tokens")
    content = rng.choices(words, weights, k=num_words)
    zipf = [1 / (rank + 3) for rank in range(len(FUNCTION_WORDS))]
    function = rng.choices(FUNCTION_WORDS, zipf, k=num_words)
    return [
        c if rng.random() < CONTENT_SHARE else f for c, f in zip(content, function, strict=True)
    ]


def plant(rng: random.Random, filler: list[str], chains: Sequence[Sequence[str]]) -> list[str]:
    """`filler` with each chain written over it at a random place, EDGE words from either end."""
    spare = len(filler) - 2 * EDGE - sum(len(chain) for chain in chains)
    if spare < len(chains):
        raise ValueError(
            f"{len(filler)} words cannot hold {len(chains)} chains {EDGE} words from either end"
        )
    text = list(filler)
    # Draw the places in the text without its chains: chains cannot overlap then, and every
    # arrangement is equally likely.
    start = EDGE
    before = 0
    for gap, chain in zip(sorted(rng.sample(range(spare), len(chains))), chains, strict=True):
        start += gap - before
        before = gap
        text[start : start + len(chain)] = chain
        start += len(chain)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the closed-form recall model.")
    parser.add_argument("out_dir", type=Path)
    print(build(parser.parse_args().out_dir))


if __name__ == "__main__":
    main()
