"""evaluation/cones.py: cases worked by hand, scipy's non-negative least squares, planted cones, controls, the command."""
import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

import evaluate
from evaluation import cones
from sources.toy import Toy
from test_evaluate import save

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def test_worked_example():
    """In the cone of the axes, of any length, a direction has its largest positive coordinates, squared; the negative
    one is out of reach. A second direction lies on an axis, a third opposite to all."""
    R = torch.tensor([[3.0, 2, 1, -4], [0, 5, 0, 0], [-1, -1, -1, -1]])
    got = cones.containment(R, torch.diag(torch.tensor([1.0, 2, 3, 4])), 5)
    want = torch.tensor([[9, 13, 14, 14, 14], [30] * 5, [0] * 5]).T / 30
    assert torch.allclose(got, want.double(), rtol=0, atol=1e-7)

def test_without_a_budget_it_is_nonnegative_least_squares():
    """With room for every row, and rounds for those that leave again: scipy's answer to 1e-12, for references that a
    cone holds in part, all references at once or each alone."""
    for F, D in ((12, 30), (40, 10), (9, 9)):
        R, W = normal(50, D).double(), normal(F, D, seed=1).double()
        got = cones.containment(R, W, 3 * F)
        unit = lambda X: (X / X.norm(dim=1, keepdim=True)).numpy()
        want = [1 - nnls(unit(W).T, r)[1] ** 2 for r in unit(R)]
        assert np.abs(got[-1].numpy() - want).max() < 1e-12
        assert (got.diff(dim=0) > -1e-12).all()                # more latents never contain less
        alone = torch.cat([cones.containment(r[None], W, 5) for r in R], 1)
        assert torch.allclose(got[:5], alone, rtol=0, atol=1e-12)

def test_greedy_is_below_the_best_subset():
    """Of one row it is the best, the squared cosine; of two and three, near the best of all subsets, and not above."""
    R, W = normal(20, 8).double(), normal(12, 8, seed=1).double()
    R, W = R / R.norm(dim=1, keepdim=True), W / W.norm(dim=1, keepdim=True)
    got = cones.containment(R, W, 3).numpy()
    for m in (1, 2, 3):
        best = np.array([max(1 - nnls(W[list(rows)].T.numpy(), r)[1] ** 2
                             for rows in itertools.combinations(range(12), m)) for r in R.numpy()])
        assert (got[m - 1] <= best + 1e-12).all() and got[m - 1].mean() > 0.9 * best.mean()
        assert m > 1 or np.allclose(got[0], best, rtol=0, atol=1e-12)
    assert np.allclose(got[0], (R @ W.T).amax(1).clamp_min(0).square(), rtol=0, atol=1e-12)

def test_planted_cone():
    """Sums of three of 100 near-orthogonal rows: contained by three, not by one; their negation, and that of the rows,
    is no more so than by chance; in orthogonal rows it is not at all. Twins and rows of zeros do no harm."""
    W = normal(100, 400)
    three = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(i))[:3] for i in range(30)])
    R = W[three].sum(1)
    got = cones.containment(R, W)
    assert (got[2:] > 1 - 1e-9).all() and (got[0] < 0.6).all()
    for r, w in ((-R, W), (R, -W)):
        assert cones.containment(r, w)[2].mean() < 0.1
    Q = torch.linalg.qr(W.T)[0].T
    assert (cones.containment(Q[three].sum(1), Q)[2] > 1 - 1e-9).all() and (cones.containment(-Q[three].sum(1), Q) < 1e-9).all()
    odd = cones.containment(R, torch.cat([W, W, W + 1e-7 * normal(100, 400, seed=1), torch.zeros(5, 400)]))
    assert torch.allclose(odd, got, atol=1e-5)

def test_controls():
    """References that are rows of the dictionary: 1 throughout; what random directions, activations and shuffled
    coordinates contain is what such are expected to, far below."""
    W = normal(300, 40, seed=2)                                # 0 is that of the controls
    R, x = W[:25], normal(1000, 40, seed=1) + 5
    got = cones.measure(R, W)
    assert got["containment"] == pytest.approx([1] * 16) and got["cosine"] == pytest.approx(1) and max(got["se"]) < 1e-9
    assert got["coverage"]["0.9"] == [1] * 16 and len(got["containment"]) == cones.BUDGET
    others = cones.controls(R, W, x, x.mean(0))
    chance = cones.measure(R, normal(300, 40, seed=9))["containment"]
    assert list(others) == ["random", "activations", "shuffled", "negated"]
    for other in others.values():
        assert np.allclose(other["containment"], chance, atol=0.05) and other["containment"][0] < 0.3
        assert 0 < other["se"][0] < 0.05 and other["coverage"]["0.5"][0] < 0.1

def evaluated(argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    return stop.value.code

def test_true_features_of_a_toy(tmp_path, capsys):
    """A dictionary of the true features contains each by one latent, its negation does not; latents that are silent
    count for nothing; table, page and evaluation.json have it."""
    V = Toy.preset("song:0").features
    good, negated = (save(tmp_path / n, W.T, W, flags=dict(model="toy", toy="song:0")) for n, W in (("good", V), ("neg", -V)))
    dead = save(tmp_path / "dead", torch.cat([-V, V]).T, torch.cat([-V, V]), torch.cat([torch.zeros(len(V)), torch.full(
        (len(V),), -1e9)]), flags=dict(model="toy", toy="song:0"))
    assert evaluated([good, negated, dead, "--cones", "--html", tmp_path / "p.html"]) == 0
    got, neg, silent = (json.loads((path / "evaluation.json").read_text())["cones"]["true features"]
                        for path in (good, negated, dead))
    assert got["containment"][0] == pytest.approx(1) and got["references"] == len(V) == got["latents"]
    assert neg["containment"][0] < 0.5 and neg["cosine"] < 0.5
    assert silent["latents"] <= len(V) and silent["containment"] == pytest.approx(neg["containment"], abs=0.02)
    assert got["controls"]["shuffled"]["containment"][0] < 0.9
    out = capsys.readouterr().out
    assert "Concept cones: true features: containment" in out and "Concept cones" in (tmp_path / "p.html").read_text()

def test_without_true_directions_it_costs_a_line(array, tmp_path, one_line):
    path = save(tmp_path / "run", torch.eye(16), torch.eye(16), flags=dict(activations=str(array[0])))
    one_line(lambda: evaluate.main([str(path), "--cones"]), "--cones", "X.npy", "leave it out")
    assert (path / "evaluation.json").exists()

@pytest.mark.parametrize("seeds, where", [
    ((0, 0), "inside the range tried"), ((0.3, -0.3), "inside the range tried, but not told"),
    ((-0.6, -0.6), "on the edge of the range tried")])
def test_a_sweet_spot_is_told_from_the_edge(seeds, where, monkeypatch, tmp_path, capsys):
    """benchmarks/cones.py, of a highest mean .2 above an edge: by both seeds, by their mean alone, and not at all."""
    bench = importlib.import_module("benchmarks.cones")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    cone = lambda v: dict(containment=[v] * 16, cosine=v, controls=dict(random=dict(containment=[0.0] * 16)))
    rows = {name: dict(coverage=v, monosemanticity=dict(mean_10=v, random=dict(mean_10=0)),
                       cones=dict.fromkeys(bench.KINDS, cone(v)))
            for name in bench.RUNS for k, e, s in [name.split("-")]
            for v in [0.7 + seeds[int(s[1])] if (k, e) == ("16", "8") else 0.5 if k == "4" else 0.1]}
    (tmp_path / "cones.json").write_text(json.dumps(dict(machine="m", runs=rows)))
    monkeypatch.setattr(bench.trained, "publish", lambda path, lines, fig: print("\n".join(lines)))
    bench.report(None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("**")]
    assert len(lines) == 8 and all(where in line for line in lines) and ("not told" in where) == ("not told" in lines[0])
