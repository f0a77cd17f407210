"""The generators before any SAE: each preset has the statistics that its paper states."""
import pytest
import torch

from sources.toy import PRESETS, Toy

N = 100_000

def draw(name, n=N, seed=0):
    toy = Toy.preset(name)
    x, codes = toy.sample(n, torch.Generator().manual_seed(seed))
    return toy, x, codes, (codes > 0).float()

def close(measured, p, n=N):
    """Is a measured frequency within five standard errors of p?"""
    p = torch.as_tensor(p)
    return bool(((torch.as_tensor(measured) - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all())

@pytest.mark.parametrize("name", PRESETS)
def test_is_a_pure_sparse_sum_of_unit_features(name):
    toy, x, codes, on = draw(name, 2000)
    assert torch.allclose(toy.features.norm(dim=1), torch.ones(toy.n))
    assert torch.allclose(codes @ toy.features, x, atol=1e-5) and (codes >= 0).all()
    assert torch.equal(x, draw(name, 2000)[1]) and not torch.equal(x, draw(name, 2000, seed=1)[1])
    if toy.orthogonal:
        assert torch.allclose(toy.features @ toy.features.T, torch.eye(toy.n), atol=1e-5)
    assert not torch.equal(toy.features, Toy.preset(name + ":1").features)

def test_flat():
    toy, x, codes, on = draw("flat")
    assert (toy.n, toy.d) == (256, 64) and close(on.mean(0), 5 / 256)
    fired = codes[codes > 0]
    assert 0.5 <= fired.min() and fired.max() <= 1.5 and abs(fired.mean() - 1) < 0.01

@pytest.mark.parametrize("name", ["sharkey", "sharkey-independent"])
def test_sharkey_rates_decay_and_sum_to_five(name):
    toy, x, codes, on = draw(name, 20_000)
    assert (toy.n, toy.d) == (512, 256) and abs(on.sum(1).mean() - 5) < 0.1
    rate = on.mean(0)
    assert 100 < rate[:20].mean() / rate[-20:].mean() < 300                # 0.99^492 = 1 / 140
    assert codes.max() < 1

def test_sharkey_is_weakly_correlated_within_a_batch_of_rates_that_differ():
    """Rates are drawn per sample: 'on' of two features correlates, which one shared rate forbids."""
    correlated = torch.corrcoef(draw("sharkey", 50_000)[3][:, :30].T)
    independent = torch.corrcoef(draw("sharkey-independent", 50_000)[3][:, :30].T)
    off = lambda C: C[~torch.eye(30, dtype=bool)].std()
    assert abs(off(independent) - 50_000 ** -0.5) < 1e-3 < off(correlated)

def test_exactly_k():
    for name, n, d, k in [("song", 32, 16, 3), ("zipf", 100, 80, 5), ("song-zipf", 32, 16, 3),
                          ("gba", 128, 42, 3)]:
        toy, x, codes, on = draw(name)
        assert (toy.n, toy.d) == (n, d) and (on.sum(1) == k).all()
    for name in ("song", "gba"):
        assert close(draw(name)[3].mean(0), draw(name)[3].sum(1).mean() / Toy.preset(name).n)
    assert abs(draw("song")[2].sum(1).mean() - 3 * (2 / torch.pi) ** 0.5) < 0.02       # |N(0, 1)|

def test_zipf_draws_without_replacement():
    """Single draws follow Zipf: with k = 1 the rates are the probabilities."""
    toy = Toy.preset("zipf")
    toy.exactly = (1,)
    p = toy.probs / toy.probs.sum()
    on = (toy.sample(N, torch.Generator().manual_seed(0))[1] > 0).float()
    assert close(on.mean(0), p)
    assert (draw("zipf")[3].mean(0).diff() < 0.005).all()                  # and with 5 they decrease

def test_gba():
    toy, x, codes, on = draw("gba-imbalanced")
    assert torch.allclose(x.norm(dim=1), torch.ones(N), atol=1e-4)
    assert close((on.sum(1) == 3).float().mean(), 0.5) and close((on.sum(1) == 20).float().mean(), 0.5)

@pytest.mark.parametrize("name, given, alone, rate", [
    ("hedging-independent", 0.2, 0.2, 0.2), ("hedging-hierarchical", 0.2, 0.0, 0.05),
    ("hedging-correlated", 0.2, 0.1, 0.125), ("hedging-anticorrelated", 0.1, 0.2, 0.175),
    ("absorption-independent", 0.05, 0.05, 0.05), ("absorption", 0.2, 0.0, 0.05),
    ("absorption-partial", 0.2, 0.0, 0.05), ("absorption-leaky", 0.19, 0.00333, 0.05),
    ("absorption-12", 0.6, 0.0, 0.24), ("balanced", 0.15, 0.0, 0.0375),
    ("balanced-uneven", 0.02, 0.0, 0.005)])
def test_parent_gates_child(name, given, alone, rate):
    toy, x, codes, on = draw(name)
    parent, child = on[:, 0] > 0, on[:, 1]
    assert close(on[:, 0].mean(), 0.4 if name == "absorption-12" else 0.25)
    assert close(child.mean(), rate) and close(child[parent].mean(), given, parent.sum())
    assert close(child[~parent].mean(), alone, (~parent).sum())
    if name == "balanced":                                             # children independent
        assert close((on[parent][:, 1:].sum(1) == 3).float().mean(), 0.15 ** 3, parent.sum())
    if name == "absorption-partial":
        assert abs(codes[:, 0][parent].std() - 0.1) < 0.01 and codes[:, 1].unique().numel() == 2

@pytest.mark.parametrize("name, parents, p, l0", [("tree", 3, 0.15, 1.12), ("tree-24", 4, 0.25, 2.0)])
def test_tree(name, parents, p, l0):
    toy, x, codes, on = draw(name)
    assert abs(on.sum(1).mean() - l0) < 0.02 and close(on[:, :parents].mean(0), p)
    children = on[:, parents:4 * parents].view(N, parents, 3)
    assert (children.sum(2) <= on[:, :parents]).all()                  # exclusive, and only under one
    assert close(children.mean(0), p * 0.2) and close(on[:, 4 * parents:].mean(0), 0.05)

def test_three_atoms():
    toy, x, codes, on = draw("three-atoms")
    assert close(on.mean(0), torch.tensor([0.5, 0.3, 0.2]))
    residual = x - codes[:, :1] @ toy.features[:1]
    assert abs(residual.pow(2).sum(1).mean() - 0.5) < 0.02               # .3 + .2: the rest's energy

@pytest.mark.parametrize("name, rho", [("wrong-small", 0.4), ("wrong-small-negative", -0.4)])
def test_copula(name, rho):
    toy, x, codes, on = draw(name)
    assert close(on.mean(0), 0.4)
    C = torch.corrcoef(on.T)
    normal = torch.randn(10 ** 6, 2, generator=torch.Generator().manual_seed(1))
    normal[:, 1] = rho * normal[:, 0] + (1 - rho ** 2) ** 0.5 * normal[:, 1]
    expected = torch.corrcoef((normal > torch.special.ndtri(torch.tensor(0.6))).float().T)[0, 1]
    assert (C[0, 1:] - expected).abs().max() < 0.02 and C[1:, 1:].fill_diagonal_(0).abs().max() < 0.02

@pytest.mark.parametrize("name, d", [("wrong", 100), ("wrong-superposed", 40)])
def test_sparse_but_wrong(name, d):
    toy, x, codes, on = draw(name)
    assert (toy.n, toy.d) == (50, d) and abs(on.sum(1).mean() - 10.95) < 0.05
    assert abs(toy.probs[0] - 0.3881) < 1e-4 and abs(toy.probs[-1] - 0.05) < 1e-6
    assert close(on.mean(0), toy.probs)
    C = toy.corr[~torch.eye(50, dtype=bool)]
    assert 0.4 < (C > 0.02).float().mean() / (C.abs() > 0.02).float().mean() < 0.6
    assert torch.allclose(toy.corr.diag(), torch.ones(50), atol=1e-5)

def test_noise():
    toy = Toy(d=8, probs=torch.full((4,), 0.5), noise=0.3)
    x, codes = toy.sample(N, torch.Generator().manual_seed(0))
    assert abs((x - codes @ toy.features).std() - 0.3) < 0.01
