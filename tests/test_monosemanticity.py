"""evaluation/monosemanticity.py: the published definition, a worked example, planted neurons, the command, bad input."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
from evaluation import monosemanticity as ms
from test_evaluate import save

same = lambda a: a

def test_closed_form_is_the_sum_over_pairs():
    """Against the double loop of the definition, to 1e-12, over more rows than one part: ReLU codes, neurons of both
    signs, one that is constant, one active on one input, one on two."""
    g = torch.Generator().manual_seed(0)
    a, E = torch.randn(2100, 7, generator=g), torch.randn(2100, 5, generator=g) * 3 + 1
    a[:, :2] = a[:, :2].relu()
    a[:, 4], a[:, 5:] = 2.5, 0
    a[2099, 5] = a[7, 6] = 1
    a[2080, 6] = 3
    score, rows = ms.scores(same, a, E)
    a, u = a.double(), torch.nn.functional.normalize(E.double(), dim=1)
    w = (a - a.amin(0)) / (a.amax(0) - a.amin(0))
    pairs = torch.ones(2100, 2100).double().triu(1)            # n < m
    for k in (0, 1, 2, 3, 6):
        weights = w[:, k, None] * w[:, k] * pairs
        assert abs(score[k] - (weights * (u @ u.T)).sum() / weights.sum()) < 1e-12, k
    assert score[[4, 5]].isnan().all() and rows[[4, 5, 6]].tolist() == [0, 1, 2]
    assert abs(score[6] - u[7] @ u[2080]) < 1e-12 and rows[2] == 2099
    assert abs(ms.chance(E) - ((u @ u.T) * pairs).sum() / pairs.sum()) < 1e-12
    got = ms.summary(score, rows)
    live, ten = score[[0, 1, 2, 3, 6]], score[:4]
    assert got["dead"] == 2 and got["of"] == 7 and abs(got["mean_10"] - ten.mean()) < 1e-12
    assert abs(got["mean"] - live.mean()) < 1e-12 and abs(got["std"] - live.std(unbiased=False)) < 1e-12
    assert got["best"] == live.max() and got["worst"] == live.min()
    nothing = ms.summary(*ms.scores(same, torch.ones(5, 3), E[:5]))
    assert nothing["dead"] == 3 and math.isnan(nothing["mean"]) and math.isnan(nothing["best"])

def test_worked_example():
    """Four images, two alike. Activations 5, 3, 2, 1 are weights 1, 1/2, 1/4, 0: pairs 1/2, 1/4 and 1/8, of which the
    first are alike: 4 / 7. (Divided by the number of pairs, as the paper's first version had it: 1 / 12.)"""
    E = torch.tensor([[2.0, 0], [1, 0], [0, 3], [0, 1]])
    a = torch.tensor([[5.0, 3, 2, 1]]).T
    assert abs(ms.scores(same, a, E)[0].item() - 4 / 7) < 1e-15
    assert abs(ms.scores(same, -10 * a + 3, E)[0].item() - (0.75 * 1) / (0.5 * 0.75 + 0.5 + 0.75)) < 1e-15
    assert abs(ms.chance(E) - 1 / 3) < 1e-15                   # two pairs of six

def test_planted_neurons():
    """One that is active on a class alone scores 1 by class, one that is active anywhere the chance, and one active on
    all but a class less than that; scale and offset of the activations change nothing."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(4, (3000,), generator=g)
    E = torch.eye(4)[label]
    a = torch.stack([(label == 2) * torch.rand(3000, generator=g), torch.rand(3000, generator=g), (label != 2) + 0.0], 1)
    pure, any_, but = ms.scores(same, a, E)[0].tolist()
    chance = ms.chance(E)
    assert abs(pure - 1) < 1e-12 and abs(any_ - chance) < 0.01 and abs(chance - 0.25) < 0.01 and abs(but - 1 / 3) < 0.02
    moved = ms.scores(lambda part: part.double() * 7 - 3, a, E)[0].tolist()
    assert np.allclose(moved, [pure, any_, but], rtol=0, atol=1e-9)

@pytest.fixture
def planted(tmp_path):
    """A run of four latents that fire on a class each, on 2,000 rows in no order, with its array and embeddings by
    class; some rows are far out and dropped."""
    label = np.random.default_rng(0).integers(0, 4, 2000)
    X = np.eye(4, dtype=np.float32)[label] + np.random.default_rng(1).normal(size=(2000, 4)).astype(np.float32) / 20
    X[::7] *= 50
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "E.npy", np.eye(4, dtype=np.float16)[label])
    return save(tmp_path / "run", torch.eye(4), torch.eye(4), torch.full((4,), -0.5),
                flags=dict(activations=str(tmp_path / "X.npy"), drop_norm=5))

def test_rows_of_embeddings_are_those_of_the_activations(planted, tmp_path, capsys):
    """Although rows are held out, and dropped, in another order: by its own classes every latent scores 1, and moved by
    a row they are near chance. The page and the table have it."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(planted), "--embeddings", str(tmp_path / "E.npy"), "--html", str(tmp_path / "p.html")])
    row = lambda: json.loads((planted / "evaluation.json").read_text())["monosemanticity"]
    got = row()
    assert stop.value.code == 0 and got["worst"] == pytest.approx(1, abs=1e-9) and got["dead"] == 0
    assert got["neurons"]["mean"] < 0.9 and got["random"]["of"] == 4 and 0.2 < got["chance"] < 0.3
    assert "Monosemanticity score: chance" in capsys.readouterr().out
    assert "coordinates of the activations" in (tmp_path / "p.html").read_text()
    np.save(tmp_path / "E.npy", np.roll(np.load(tmp_path / "E.npy"), 1, 0))
    with pytest.raises(SystemExit):
        evaluate.main([str(planted), "--embeddings", str(tmp_path / "E.npy")])
    assert row()["best"] < 0.5

@pytest.mark.parametrize("name, words", [("short", "1999 rows, but --activations has 2000"), ("nan", "hold NaN"),
                                         ("zero", "only zeros"), ("text", "not a readable"), ("none", "none.npy")])
def test_bad_embeddings_cost_a_line(planted, tmp_path, one_line, name, words):
    """The run is measured all the same."""
    good = np.load(tmp_path / "E.npy")
    np.save(tmp_path / "short.npy", good[:-1])
    np.save(tmp_path / "nan.npy", good * np.float16("nan"))
    np.save(tmp_path / "zero.npy", good * 0)
    (tmp_path / "text.npy").write_text("x")
    one_line(lambda: evaluate.main([str(planted), "--embeddings", str(tmp_path / f"{name}.npy")]), "--embeddings", words)
    assert (planted / "evaluation.json").exists()

def test_a_toy_has_no_rows_to_embed(tmp_path, one_line):
    toy = save(tmp_path / "toy", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="song"))
    one_line(lambda: evaluate.main([str(toy), "--embeddings", "E.npy"]), "--embeddings E.npy", "leave it out for toy")
    assert (toy / "evaluation.json").exists()
