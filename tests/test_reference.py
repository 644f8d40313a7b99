"""The oracle itself, against what can be known without it."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_magicpig import reference


def test_codes_are_the_signs_of_the_projections() -> None:
    directions = torch.eye(4)  # 2 tables of 2 bits: the codes of x are its signs
    vectors = torch.tensor([[1.0, -1.0, -1.0, 2.0], [0.0, 3.0, -0.0, -5.0]])
    assert reference.hash_codes(vectors, directions, 2).tolist() == [[0b01, 0b10], [0b10, 0b00]]


def test_hyperplanes_depend_on_the_seed_alone() -> None:
    a, b = (reference.hyperplanes(16, 5, 3, seed) for seed in (1, 2))
    assert torch.equal(a, reference.hyperplanes(16, 5, 3, 1))
    assert not torch.equal(a, b)
    assert a.shape == (16, 15)


def test_one_bit_collides_with_one_minus_the_angle_over_pi() -> None:
    """Equation 6, by counting over seeds, which alone are independent: within four standard errors."""
    query = torch.zeros(1, 8)
    query[0, 0] = 1
    draws = [reference.hyperplanes(8, 256, 1, seed) for seed in range(200)]
    for angle in (0.1, 0.8, math.pi / 2, 2.5):
        key = torch.zeros(1, 1, 8)
        key[0, 0, :2] = torch.tensor([math.cos(angle), math.sin(angle)])
        p = reference.collision_probability(query, key).item()
        assert p == pytest.approx(1 - angle / math.pi, abs=1e-7)
        shares = torch.stack([((query @ r > 0) == (key[0] @ r > 0)).double().mean() for r in draws])
        error = shares.std().item() / math.sqrt(len(shares))
        assert error < 0.004
        assert shares.mean().item() == pytest.approx(p, abs=4 * error)


def test_inclusion_probability_is_the_papers_closed_form() -> None:
    p = torch.linspace(0.3, 1, 200, dtype=torch.float64)
    x = p**10
    paper = 1 - (1 - x) ** 150 - 150 * x * (1 - x) ** 149
    ours = reference.log_inclusion_probability(p, 10, 150, 2).exp()
    # The paper's form cancels: its absolute error is of the order of the double's epsilon.
    assert torch.allclose(ours, paper, rtol=1e-9, atol=1e-13)


def test_inclusion_probability_keeps_its_precision_at_both_ends() -> None:
    p = torch.tensor([0.05], dtype=torch.float64)
    x = (p**10).item()
    leading = math.log(math.comb(150, 2)) + 2 * math.log(x)
    assert reference.log_inclusion_probability(p, 10, 150, 2).item() == pytest.approx(
        leading, abs=1e-9
    )
    ends = reference.log_inclusion_probability(torch.tensor([0.0, 1.0]), 10, 150, 2)
    assert ends.tolist() == [reference.LOG_U_FLOOR, 0.0]
    assert torch.all(reference.log_inclusion_probability(torch.rand(50), 4, 30, 3) <= 0)


def test_all_tokens_sampled_with_certainty_is_exact_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    everything = torch.ones(4, 50, dtype=torch.bool)
    weighted = reference.attention_over(q, k, v, 0.25, everything, torch.zeros(4, 50))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None, :, None].double(), k[None].double(), v[None].double(), scale=0.25, enable_gqa=True
    )[0, :, 0]
    out, lse = reference.exact_attention(q, k, v, 0.25)
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.equal(out, weighted[0])
    assert torch.equal(lse, weighted[1])


def test_sink_and_window_are_not_sampled() -> None:
    codes = torch.zeros(1, 20, 3, dtype=torch.int32)
    mask = reference.sample(codes[:, 0], codes, min_matches=2, sink_tokens=4, window_tokens=6)
    assert mask[0].nonzero().flatten().tolist() == list(range(4, 14))
    assert list(reference.middle(5, 4, 6)) == []


def test_merging_halves_gives_the_whole_in_any_order() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 8), torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    parts = [
        reference.exact_attention(q, k[:, s], v[:, s], 0.3)
        for s in (slice(0, 7), slice(7, 8), slice(8, 30), slice(30, 30))
    ]
    whole_out, whole_lse = reference.exact_attention(q, k, v, 0.3)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        out, lse = parts[order[0]]
        for i in order[1:]:
            out, lse = reference.merge(out, lse, *parts[i])
        assert torch.allclose(out, whole_out, atol=1e-12)
        assert torch.allclose(lse, whole_lse, atol=1e-12)


def test_the_estimate_is_unbiased_over_seeds() -> None:
    """The weighted sum over the sample estimates the sum over the middle: mean over 400 seeds within
    4.5 standard errors (two-sided probability 7e-6) for each of 8 coordinates and the normaliser."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(1, 16, generator=generator)
    k = torch.randn(1, 300, 16, generator=generator) + 0.1 * q
    v = torch.randn(1, 300, 8, generator=generator)
    num_bits, num_tables, t = 4, 12, 2
    logits = 0.25 * torch.einsum("hd,hnd->hn", q.double(), k.double())
    u = reference.log_inclusion_probability(
        reference.collision_probability(q, k), num_bits, num_tables, t
    ).exp()
    features = torch.cat([v[0].double(), torch.ones(300, 1, dtype=torch.float64)], dim=1)
    truth = logits[0].exp() @ features
    sums = []
    for seed in range(400):
        directions = reference.hyperplanes(16, num_tables, num_bits, seed)
        query_codes, key_codes = (reference.hash_codes(x, directions, num_bits) for x in (q, k))
        mask = reference.sample(query_codes, key_codes, t, 0, 0)
        sums.append((mask * logits.exp() / u)[0] @ features)
    estimates = torch.stack(sums)
    error = (estimates.mean(0) - truth) / (estimates.std(0) / 400**0.5)
    assert error.abs().max() < 4.5
