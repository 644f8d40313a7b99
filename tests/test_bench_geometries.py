"""The synthetic geometries are what they say they are."""

from __future__ import annotations

import bench_geometries as bench
import pytest
import torch

from vllm_magicpig import reference

NUM_TOKENS = 8192


def layer(name: str, **arguments: int) -> bench.AttentionLayer:
    return bench.generate(name, NUM_TOKENS, **{"num_kv_heads": 2, "seed": 3} | arguments)


def weights(of: bench.AttentionLayer) -> torch.Tensor:
    """Softmax weights of 4 steps: float64 [4 * num_q_heads, num_tokens]."""
    return torch.cat([bench.softmax_weights(q, of.keys) for q in of.queries(4, seed=1)])


def top_mass(of: bench.AttentionLayer, num: int) -> torch.Tensor:
    return weights(of).topk(num).values.sum(-1)


@pytest.mark.parametrize("name", [*bench.GEOMETRIES, "mixed"])
def test_shapes_and_determinism(name: str) -> None:
    arguments = {"num_kv_heads": 3, "group": 2, "head_dim": 64}
    one = bench.generate(name, 1000, **arguments, seed=1)
    same = bench.generate(name, 1000, **arguments, seed=1)
    other = bench.generate(name, 1000, **arguments, seed=2)
    assert one.keys.shape == one.values.shape == (3, 1000, 64)
    assert one.keys.dtype == torch.float32
    assert one.center.shape == (3, 64)
    assert torch.equal(one.keys, same.keys)
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.keys, other.keys)
    assert not torch.equal(one.keys[0], one.keys[1])
    assert torch.equal(one.keys, one.keys.bfloat16().float()), "as pages store them"
    queries = one.queries(5, seed=7)
    assert queries.shape == (5, 6, 64)
    assert torch.equal(queries, same.queries(5, seed=7))
    assert not torch.equal(queries, one.queries(5, seed=8))
    assert queries.isfinite().all()


@pytest.mark.parametrize("name", [name for name in bench.GEOMETRIES if name != "clustered"])
def test_queries_of_a_group_are_correlated(name: str) -> None:
    """Two unit vectors of cosine c with a third and independent else have cosine c**2."""
    queries = layer(name).queries(50, seed=1)[:, :4]
    unit = queries / queries.norm(dim=-1, keepdim=True)
    assert 0.5 < (unit[:, 0] * unit[:, 1]).sum(-1).mean() < 0.8
    assert 0.5 < (unit[:-1, 0] * unit[1:, 0]).sum(-1).mean() < 0.8


def test_needle() -> None:
    assert top_mass(layer("needle"), 8).median() > 0.5


def test_heavy_hitters() -> None:
    mass = top_mass(layer("heavy_hitters"), NUM_TOKENS // 50)
    assert mass.median() > 0.5
    assert top_mass(layer("heavy_hitters"), 8).median() < 0.5


def test_flat() -> None:
    assert top_mass(layer("flat"), NUM_TOKENS // 50).max() < 0.1


def test_heavy_tailed() -> None:
    of = layer("heavy_tailed")
    norms = of.keys.norm(dim=-1)
    assert (norms.quantile(0.99, dim=1) > 2.5 * norms.quantile(0.01, dim=1)).all()
    logits = of.queries(1, seed=1)[0, :4] @ of.keys[0].T
    standard = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
    assert (standard.pow(4).mean(-1) > 3.3).all(), "a normal distribution has 3"


def test_clustered() -> None:
    """A query's mass is within one of 64 clusters: twice its share of the tokens is enough."""
    assert top_mass(layer("clustered"), 2 * NUM_TOKENS // 64).median() > 0.5


def test_cone() -> None:
    of = layer("cone")
    spread = (of.keys - of.center[:, None]).norm(dim=-1).mean(dim=1)
    assert (of.center.norm(dim=-1) > 1.5 * spread).all()
    assert ((of.keys[:, 0] * of.center).sum(-1) < 0).all()
    assert 0.2 < weights(of)[:, 0].median() < 0.8


def test_recency() -> None:
    assert weights(layer("recency"))[:, -NUM_TOKENS // 16 :].sum(-1).median() > 0.5


def test_two_scale() -> None:
    variance = layer("two_scale").keys.var(dim=1)
    assert (variance.topk(8).values.sum(-1) > 0.35 * variance.sum(-1)).all()


def test_mixed_has_one_geometry_per_kv_head() -> None:
    mixed = layer("mixed", num_kv_heads=9)
    flat = list(bench.GEOMETRIES).index("flat")
    assert mixed.heads[flat].query_norm == layer("flat").heads[0].query_norm
    assert mixed.heads[8].query_norm == mixed.heads[0].query_norm
    assert not torch.equal(mixed.keys[8], mixed.keys[0])


def test_mixed_samples_what_the_speed_benchmarks_claim() -> None:
    """1.5 to 2.5 % of the rows at K = 10, L = 150 and two matches."""
    of = layer("mixed", num_kv_heads=8)
    directions = reference.hyperplanes(128, 150, 10, seed=0)
    codes = reference.hash_codes(of.keys - of.center[:, None], directions, 10)
    queries = reference.hash_codes(of.queries(1, seed=2)[0], directions, 10)
    sampled = torch.cat(
        [reference.sample(queries[4 * h : 4 * h + 4], codes[h : h + 1], 2, 4, 64) for h in range(8)]
    )
    assert 0.015 < sampled.double().mean() < 0.025


def test_exact_attention_is_the_references() -> None:
    of = layer("mixed", num_kv_heads=8)
    queries = of.queries(1, seed=1)[0]
    expected, _ = reference.exact_attention(queries, of.keys, of.values, 128**-0.5)
    found = bench.exact_attention(queries, of.keys, of.values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        bench.relative_error(1.1 * expected, expected), torch.full((32,), 0.1).double()
    )


def test_an_unknown_geometry_is_named() -> None:
    with pytest.raises(ValueError, match="'needles' is unknown; choose one of needle"):
        bench.generate("needles", 100)
