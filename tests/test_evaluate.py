"""evaluate.py and evaluation/metrics.py: definitions on random data, cases worked by hand, perfect and useless SAEs,
SAELens' own directories, the command as a user runs it, and bad input."""
import itertools
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

import evaluate
import runs
from evaluation import latents, metrics, saved
from sources import lm
from sources import toy as toys
from conftest import ROOT, run_script
from test_runs import VARIANTS, run, script, toy_flags
from sources.toy import Toy

SAELENS = ROOT / "tests/saelens"                   # made by benchmarks/saelens_check.py --fixtures

def save(path, W_enc, W_dec, b_enc=None, b_dec=None, threshold=None, flags=None):
    """Write an SAE as a run directory; flags: what it says about its data."""
    path.mkdir(parents=True, exist_ok=True)
    D, N = W_enc.shape
    tensors = dict(W_enc=W_enc, W_dec=W_dec, b_dec=torch.zeros(D) if b_dec is None else b_dec,
                   b_enc=torch.zeros(N) if b_enc is None else b_enc)
    if threshold is not None:
        tensors["threshold"] = torch.full((N,), threshold)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path / "sae_weights.safetensors")
    cfg = dict(architecture="standard" if threshold is None else "jumprelu", d_in=D, d_sae=N,
               metadata=dict(flags=flags or {}))
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path

@pytest.fixture
def random_sae(tmp_path):
    g = torch.Generator().manual_seed(0)
    D, N = 12, 40
    return saved.SAE(save(tmp_path / "random", torch.randn(D, N, generator=g) / 3,
                            torch.randn(N, D, generator=g) / 3, torch.randn(N, generator=g) - 2,
                            torch.randn(D, generator=g)))

# --- definitions ----------------------------------------------------------------------------------

def test_reconstruction_equals_its_definitions(random_sae):
    """On 5000 random tokens with a large mean, against a few lines each, to 1e-6."""
    t, x = random_sae.t, torch.randn(5000, 12, generator=torch.Generator().manual_seed(1)) * 2 + 3
    got, (rate, peak, total) = metrics.reconstruction(random_sae, x, x.double().mean(0))
    z = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    x_hat = (z @ t["W_dec"] + t["b_dec"]).double()
    x = x.double()
    m = x.mean(0)
    want = dict(l0=(z > 0).double().sum(1).mean(), l0_std=(z > 0).double().sum(1).std(unbiased=False),
                fvu=((x - x_hat) ** 2).sum() / ((x - m) ** 2).sum(),
                gamma=(x_hat ** 2).sum() / (x * x_hat).sum(),
                gamma_centred=((x_hat - m) ** 2).sum() / ((x - m) * (x_hat - m)).sum(),
                dead=((z > 0).sum(0) == 0).double().mean())
    for name, value in want.items():
        assert abs(got[name] - value.item()) < 1e-6 * max(1, abs(value.item())), name
    assert torch.allclose(rate, (z > 0).float().mean(0)) and torch.equal(peak, z.amax(0))
    assert torch.allclose(total, z.double().sum(0))
    density = got["density"]
    assert sum(density["count"]) + density["dead"] == 40
    log = rate[rate > 0].log10()
    assert density["count"][-1] == ((log >= -0.5) & (log <= 0)).sum()

def test_geometry_equals_its_definitions(random_sae):
    W, x = random_sae.t["W_dec"], torch.randn(300, 12, generator=torch.Generator().manual_seed(2))
    cosine = [[(a @ b / a.norm() / b.norm()).item() for b in W] for a in W]
    pairs = [abs(cosine[i][j]) for i, j in itertools.combinations(range(40), 2)]
    nearest = [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(cosine)]
    got = metrics.geometry(W, x, scale=2.0)
    assert abs(got["c_dec"] - np.mean(pairs)) < 1e-6 and abs(got["nearest"] - np.mean(nearest)) < 1e-6
    Z = (2 * x @ (W / W.norm(dim=1, keepdim=True)).T).flatten().sort(descending=True).values
    assert got["n"] == 15 and abs(got["s_n"] - Z[15 * 300].item()) < 1e-5
    assert metrics.geometry(W, x, n=7)["n"] == 7
    twins = torch.cat([W, W[:10]])                             # ten latents twice
    assert metrics.geometry(twins, x)["nearest_09"] == 20 / 50
    orthogonal = metrics.geometry(torch.eye(12)[:5], x)
    assert abs(orthogonal["c_dec"]) < 1e-9 and abs(orthogonal["nearest"]) < 1e-9

class Fixed:
    """An SAE that answers with given reconstructions."""
    d_sae = 3
    def __init__(self, x_hat): self.x_hat, self.at = x_hat, 0
    def both(self, x):
        self.at += len(x)
        return torch.zeros(len(x), 3), self.x_hat[self.at - len(x):self.at]

def test_hand_computed():
    """FVU is about the mean: errors of norm 1 around 100 are not small. Sums come before the ratio: one
    token of large norm counts for more, where a mean of ratios is another number."""
    x = torch.tensor([[101.0, 0], [99, 0]])
    score = lambda x, x_hat: metrics.reconstruction(Fixed(x_hat), x, x.double().mean(0))[0]
    assert score(x, torch.tensor([[100.0, 0], [100, 0]]))["fvu"] == 1           # the mean itself
    assert score(x, torch.tensor([[101.0, 1], [99, 1]]))["fvu"] == 1            # 2 / 2; a var has 0
    x = torch.tensor([[1.0, 0], [-1, 0], [3, 0], [-3, 0]])
    x_hat = torch.tensor([[0.0, 0], [0, 0], [3, 0], [-3, 0]])
    assert score(x, x_hat)["fvu"] == 2 / 20                    # the mean of ratios has 1 / 2
    assert math.isnan(score(x, x * 0 + 7)["gamma_centred"])    # of a constant there is none
    half = score(x, x / 2)                                     # 5 / 10: all shrunk to a half
    assert half["gamma"] == half["gamma_centred"] == 0.5 and half["fvu"] == 0.25
    moved = score(x + 10, x / 2 + 10)                          # shrinkage shows when centred
    assert abs(moved["gamma_centred"] - 0.5) < 1e-9 and moved["gamma"] > 0.97

def test_matching_and_mmcs():
    """The assignment against all permutations; the two directions of MMCS differ; cosines are signed."""
    g = torch.Generator().manual_seed(3)
    V, W = torch.randn(4, 6, generator=g), torch.randn(6, 6, generator=g)
    i, j, cosine = metrics.match(V, W)
    best = max(sum(cosine[a, b].item() for a, b in enumerate(p)) for p in itertools.permutations(range(6), 4))
    assert abs(cosine[i, j].sum().item() - best) < 1e-5
    toy = Toy(d=3, probs=torch.full((2,), 0.5), orthogonal=True)
    V = toy.features
    W = torch.stack([V[0], -V[1], (V[0] + V[1]) / 2 ** 0.5])
    codes = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    got = metrics.ground_truth(W, codes, toy, torch.zeros(4, 3))
    assert abs(got["mcc"] - (1 + 0.5 ** 0.5) / 2) < 1e-6 and got["found"] == 0.5
    assert abs(got["mmcs_truth"] - (1 + 0.5 ** 0.5) / 2) < 1e-6
    assert abs(got["mmcs_learned"] - (1 + 0 + 0.5 ** 0.5) / 3) < 1e-6 and got["f1"] == 0
    assert got["absorbed"] is None and got["hedging"] is None              # no pairs; nothing missing

def test_f1_equals_a_loop_over_thresholds():
    g = torch.Generator().manual_seed(4)
    for _ in range(20):
        z = (torch.randn(60, generator=g).relu() * 3).round()           # many ties
        on = torch.rand(60, generator=g) < 0.3
        def f1(t):
            said = z > t
            return 2 * (said & on).sum().item() / max(1, (said.sum() + on.sum()).item())
        assert abs(metrics.best_f1(z, on) - max(f1(t) for t in [0, 1, 2, 3, 4, 5, 6, 7])) < 1e-9
    assert metrics.best_f1(torch.tensor([2.0, 1, 0]), torch.tensor([True, True, False])) == 1

def test_absorption_and_hedging_by_hand():
    """Parent 0 fires at tokens 0 to 3, its child 1 at 0 and 1: the parent's latent is silent at 0 of the
    two, and at 2 of the other two. One latent, v0 + 0.5 v1 at norm 1, for two orthogonal features: q is
    its part along v1, 0.5 / sqrt(1.25), q0 a random direction's."""
    toy = Toy(d=8, probs=torch.tensor([0.5, 0, 0]), orthogonal=True,       # child 2 never fires
              parents={1: (0, 0.5, 0.0), 2: (0, 0.0, 0.0)})
    codes = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    z = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    got = metrics.ground_truth(toy.features, codes, toy, z)
    assert got["absorbed"] == 0.5 and got["absorbed_alone"] == 0.5 and got["mcc"] > 0.9999
    V = toy.features[:2]
    W = (V[0] + 0.5 * V[1])[None]
    i, j, _ = metrics.match(V, W)
    delta = V[0] - W[0] / W[0].norm()
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(20_000, 8, generator=g), dim=1)
    q, q0 = 0.5 / 1.25 ** 0.5, (directions @ delta).abs().mean().item()
    got = metrics.hedging(W, V, i, j, torch.Generator().manual_seed(1))
    assert abs(got - (q - q0) / (1 - q0)) < 0.03 and 0.3 < got < 0.4
    assert metrics.hedging(V[:1], V, torch.tensor([0]), torch.tensor([0])) == 0          # pure
    assert metrics.hedging(V, V, torch.arange(2), torch.arange(2)) is None               # all found
    many = torch.randn(20, 8, generator=g)                     # those without a latent span all of R^8
    assert metrics.hedging(many[:5], many, torch.arange(5), torch.arange(5)) is None

def test_hedging_degree_of_a_planted_mixture():
    """Old latents that let go of what the new ones take; that move elsewhere; that do not move."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(60, 60, generator=g)).Q
    pure, new, other = Q[:20], Q[20:24], Q[24:44]
    mixed = normalize(pure + 0.5 * new.repeat(5, 1), dim=1)
    got = metrics.hedging_degree(torch.cat([pure, new * 3]), mixed * 2, 4, generator=g)
    assert got["q"] == pytest.approx(0.5 / 1.25 ** 0.5, abs=1e-6) and got["h"] > 0.3 and 0.1 < got["q0"] < 0.15
    elsewhere = metrics.hedging_degree(torch.cat([normalize(pure + 0.5 * other, dim=1), new]), pure, 4, generator=g)
    assert elsewhere["h"] == 0 and elsewhere["q"] == pytest.approx(0, abs=1e-6)
    assert metrics.hedging_degree(torch.cat([pure, new]), pure, 4, generator=g)["h"] == 0

def test_consistency_by_hand():
    """A dictionary and its reversal agree perfectly, in the opposite order; random ones do not."""
    W, peak = torch.randn(50, 20, generator=torch.Generator().manual_seed(5)), torch.arange(50.0)
    same = metrics.consistency([(W, peak), (W.flip(0) * 3, peak)])
    assert abs(same["matched_cosine"] - 1) < 1e-6 and abs(same["order"] + 1) < 1e-9
    assert all(abs(row["0.9"] - 1) < 1e-9 for row in same["alike"])
    other = torch.randn(50, 20, generator=torch.Generator().manual_seed(6))
    other = metrics.consistency([(W, peak), (other, peak)])
    assert other["matched_cosine"] < 0.7 and other["alike"][-1]["0.9"] == 0

def test_matching_of_many_latents(monkeypatch):
    """Above EXACT rows: the greedy matching, nearest pair first, by a loop over all pairs in order of their cosine; then
    the exact one of the last EXACT. It is one to one, and its sum between 95 % of the best one's and that. Blocks
    change nothing; nor do rows that are all equal."""
    g = torch.Generator().manual_seed(7)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, 12, generator=g), dim=1)
    a, b = unit(300), unit(300)
    best = metrics.one_to_one(a, b, None)
    monkeypatch.setattr(metrics, "EXACT", 0)
    monkeypatch.setattr(metrics, "BLOCK", 64)
    monkeypatch.setattr(metrics, "match", lambda a, b: (torch.arange(0), torch.arange(0), a @ b.T))
    i, j, c = metrics.one_to_one(a, b, metrics.nearest(a, b))
    pairs, free = {}, [set(range(300)), set(range(300))]
    for flat in (a @ b.T).flatten().argsort(descending=True).tolist():
        m, n = divmod(flat, 300)
        if m in free[0] and n in free[1]:
            pairs[m] = n
            free[0].remove(m), free[1].remove(n)
    assert dict(zip(i.tolist(), j.tolist())) == pairs and len(pairs) == 300
    assert torch.allclose(c, (a * b[[pairs[m] for m in range(300)]]).sum(1)[i], atol=1e-6)
    assert 0.95 * best[2].sum() < c.sum() <= best[2].sum()
    i, j, _ = metrics.one_to_one(a[:1].expand(9, 12), a[:1].expand(9, 12), metrics.nearest(*2 * [a[:1].expand(9, 12)]))
    assert sorted(i.tolist()) == sorted(j.tolist()) == list(range(9))
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "EXACT", 50)
    i, j, c = metrics.one_to_one(a, b, metrics.nearest(a, b))
    assert len(i.unique()) == len(j.unique()) == 300 and 0.95 * best[2].sum() < c.sum() <= best[2].sum()
    assert not metrics.consistency([(a, torch.ones(300)), (b, torch.ones(300))])["exact"]

def test_fvu_of_prefixes(random_sae):
    x = torch.randn(5000, 12, generator=torch.Generator().manual_seed(1)) + 3
    got = metrics.prefixes(random_sae, x, x.double().mean(0), [5, 17, 40])
    for m, fvu in got.items():
        x_hat = random_sae.codes(x)[:, :m] @ random_sae.t["W_dec"][:m] + random_sae.t["b_dec"]
        assert abs(fvu - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()) < 1e-5
    assert abs(got[40] - metrics.reconstruction(random_sae, x, x.double().mean(0))[0]["fvu"]) < 1e-6

# --- saved SAEs -----------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_every_script_as_it_reads_itself(variant, tmp_path):
    run(variant, *toy_flags(variant), "--out", tmp_path / "run")
    ours, theirs = saved.SAE(tmp_path / "run"), script(variant).load(tmp_path / "run")
    x = Toy.preset("song").sample(400, torch.Generator().manual_seed(9))[0]
    with torch.no_grad():
        z, x_hat = ours.both(x)
        assert torch.allclose(z, theirs.encode(x), atol=1e-5) and torch.allclose(x_hat, theirs(x), atol=1e-5)
        assert torch.equal(z, ours.encode(x)) and torch.equal(x_hat, ours(x)) and (z > 0).any()
    names = {"gba-relu": "gba", "vanilla": "p-annealed"}       # VARIANTS' vanilla is annealed
    assert ours.flags["variant"] == names.get(variant, variant)

@pytest.mark.parametrize("name", sorted(p.name for p in SAELENS.iterdir() if p.is_dir()))
def test_scores_saelens_directories_as_saelens_does(name, tmp_path):
    """Directories that SAELens wrote: L0 and FVU are what SAELens says on the same held-out rows."""
    expected = json.loads((SAELENS / "expected.json").read_text())[name]
    shutil.copytree(SAELENS / name, tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path / name), "--activations", str(SAELENS / "X.npy")])
    got = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert stop.value.code == 0 and got["tokens"] == 100
    assert abs(got["l0"] - expected["l0"]) < 1e-5 and abs(got["fvu"] / expected["fvu"] - 1) < 1e-5

# --- perfect and useless SAEs ---------------------------------------------------------------------

def toy_scores(W_enc, W_dec, path, name, b_dec=None):
    """The row of an SAE on a toy whose features are 0 or near 1."""
    source = toys.ToySource(Namespace(toy=name, seed=0, batch_size=1), torch.device("cpu"))
    sae = saved.SAE(save(path, W_enc, W_dec, b_dec=b_dec, threshold=1e-3))
    x = source.heldout_raw()
    row, _ = evaluate.measure(sae, x, x.double().mean(0), source)
    return row

def test_perfect_and_useless_saes_on_a_toy(tmp_path):
    """The true features as dictionary: nothing lost, everything found. The mean as every answer: FVU 1.
    The decoder's coordinates shuffled: chance."""
    V, name = Toy.preset("absorption").features, "absorption"
    row = toy_scores(V.T, V, tmp_path / "perfect", name)
    truth = row["truth"]
    assert row["fvu"] < 1e-10 and abs(row["gamma"] - 1) < 1e-6 and abs(row["gamma_centred"] - 1) < 1e-6
    for key in ("mcc", "mmcs_truth", "mmcs_learned", "found", "f1"):
        assert abs(truth[key] - 1) < 1e-5, key
    assert truth["absorbed"] == truth["absorbed_alone"] == 0 and truth["hedging"] is None
    assert truth["chance"]["mcc"] < 0.4 and truth["chance"]["f1"] < 0.8
    assert abs(truth["true_l0"] - row["l0"]) < 0.02
    source = toys.ToySource(Namespace(toy=name, seed=0, batch_size=1), torch.device("cpu"))
    mean = (source.heldout() / source.scale + source.mean).mean(0)
    zero = toy_scores(V.T * 0, V, tmp_path / "zero", name, b_dec=mean)
    assert abs(zero["fvu"] - 1) < 1e-5 and zero["l0"] == 0 and zero["dead"] == 1
    assert zero["truth"]["f1"] == 0 and zero["truth"]["absorbed"] == 1
    assert math.isnan(zero["gamma_centred"])
    alone = toy_scores(V[:1].T, V[:1], tmp_path / "alone", name)           # one latent of four, pure
    assert alone["truth"]["mcc"] > 0.9999 and abs(alone["truth"]["f1"] - 0.25) < 1e-5
    assert alone["truth"]["hedging"] < 1e-3 and math.isnan(alone["nearest"])
    mixed = toy_scores((V[0] + V[1])[:, None], (V[0] + V[1])[None], tmp_path / "mixed", name)
    assert mixed["truth"]["hedging"] > 0.4
    g = torch.Generator().manual_seed(0)
    scores = [toy_scores(V.T, V[:, torch.randperm(50, generator=g)], tmp_path / f"s{i}", name)["truth"]
              for i in range(5)]
    chance = np.mean([s["chance"]["mcc"] for s in scores])
    assert abs(np.mean([s["mcc"] for s in scores]) - chance) < 0.1 and chance < 0.4

@pytest.fixture(scope="module")
def lm_run(tiny_lm, text, tmp_path_factory):
    """Flags of a tiny language model's activations, and a folder for run directories."""
    tmp = tmp_path_factory.mktemp("runs")
    (tmp / "cache").mkdir()
    flags = dict(model=str(tiny_lm), layer=2, text=str(text), context=16, cache_dir=str(tmp / "cache"))
    return flags, tmp

def evaluate_lm(*argv):
    with pytest.raises(SystemExit) as stop, runs.one_line_errors():
        evaluate.main([str(a) for a in argv])
    return stop.value.code

def test_perfect_and_useless_saes_in_a_language_model(lm_run, capsys):
    """The identity as an SAE recovers all of the cross-entropy; zeros and the mean recover nothing,
    each of its own ablation."""
    flags, tmp = lm_run
    eye, none = torch.eye(32), torch.zeros(32, 32)
    perfect = save(tmp / "perfect", torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), flags=flags)
    zero = save(tmp / "zero", none, eye, flags=flags)
    assert evaluate_lm(perfect, zero, "--contexts", 40) == 0
    out = capsys.readouterr().out
    assert "40 held-out contexts, 640 tokens" in out and "dropped positions and outliers" in out
    mean = np.load(next((tmp / "cache").glob("*/mean.npy")))
    mean = save(tmp / "mean", none, eye, b_dec=torch.from_numpy(mean), flags=flags)
    assert evaluate_lm(mean, "--contexts", 40) == 0
    row = {p.name: json.loads((p / "evaluation.json").read_text()) for p in (perfect, zero, mean)}
    for key in ("recovered_zero", "recovered_mean"):
        assert row["perfect"]["language"][key] == 1 and row["perfect"]["language"][key + "_se"] == 0
    assert row["perfect"]["fvu"] < 1e-10 and row["perfect"]["language"]["kl"] == 0
    assert row["perfect"]["language"]["increase"] == 0
    assert row["zero"]["language"]["recovered_zero"] == 0 and row["zero"]["language"]["kl"] > 0
    assert abs(row["mean"]["language"]["recovered_mean"]) < 1e-6
    assert abs(row["mean"]["fvu"] - 1) < 0.01                  # of held-out data, not exactly theirs

def test_cross_entropies_equal_a_loop(lm_run):
    """Against transformers' own loss with the activations replaced by hand, context by context; dropped
    positions stay; the standard error of the recovered share against a jackknife."""
    flags, tmp = lm_run
    path = flags["model"]
    model, _, blocks = lm.load(path, path, torch.device("cpu"), torch.float32)
    model.get_output_embeddings().weight.data *= 30            # sure of what it says, and the text is
    g = torch.Generator().manual_seed(0)                       # what it says: there is much to lose
    ids = torch.randint(0, 300, (12, 16), generator=g)
    with torch.no_grad():
        for t in range(1, 16):
            ids[:, t] = model(ids).logits[:, t - 1].argmax(-1)
    ids = ids.int().numpy()
    h = lm.residual_stream(model, blocks[2], ids)
    cut = h.norm(dim=-1).flatten().quantile(0.9).item()
    mean, add = h.mean((0, 1)), torch.randn(32, generator=g) / 4
    sae = lambda x: x * 0.7 + add
    keep = ~(h.norm(dim=-1) > cut)
    keep[:, 0] = False
    assert 0.05 < (~keep[:, 1:]).float().mean() < 0.2
    def by_hand(replace):
        def hook(module, inputs, named):
            x = inputs[0].clone() if inputs else named["hidden_states"].clone()
            for b, t in keep.nonzero().tolist():
                x[b, t] = replace(x[b, t])
            return ((x, *inputs[1:]), named) if inputs else (inputs, dict(named, hidden_states=x))
        handle = blocks[2].register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            logp = model(torch.from_numpy(ids).long()).logits.log_softmax(-1)
        handle.remove()
        ce = [[-logp[b, t, ids[b, t + 1]].item() for t in range(1, 15)] for b in range(12)]
        return np.mean(ce, 1), logp[:, 1:]
    (ce, p), (zero, _), (mean_ce, _), (got, q) = (by_hand(f) for f in (
        lambda v: v, torch.zeros_like, lambda v: mean, sae))
    kl = (p.exp() * (p - q)).sum(-1).mean(1).numpy()
    row = next(metrics.language([sae], model, blocks[2], cut, mean, ids))
    assert abs(row["ce"] - ce.mean()) < 1e-5 and abs(row["ce_spliced"] - got.mean()) < 1e-5
    assert abs(row["kl"] - kl.mean()) < 1e-5 and row["tokens"] == 192
    for name, ablated in (("zero", zero), ("mean", mean_ce)):
        share = lambda i: (ablated - got)[i].mean() / (ablated - ce)[i].mean()
        assert abs(row[f"recovered_{name}"] - share(slice(None))) < 1e-4
        left_out = [share(np.arange(12) != i) for i in range(12)]
        jackknife = math.sqrt(11 / 12 * sum((s - np.mean(left_out)) ** 2 for s in left_out))
        assert abs(row[f"recovered_{name}_se"] / jackknife - 1) < 0.3

# --- the command ----------------------------------------------------------------------------------

def test_contexts_and_values_of_a_latent(lm_run, capsys):
    """A latent that reads one coordinate: its top contexts are those of the largest values, the peak
    marked, and each value stands at the token that it belongs to."""
    flags, tmp = lm_run
    eye = torch.eye(32)
    path = save(tmp / "coordinates", eye, eye, flags=flags)
    assert evaluate_lm(path, "--contexts", 0, "--features", "3,7") == 0
    out = capsys.readouterr().out
    assert f"{path}, latent 3: fires on" in out and f"{path}, latent 7" in out and "raises [" in out
    sae = saved.SAE(path)
    args = evaluate.parse_args([str(path)])
    args.torch_device = torch.device("cpu")
    source = evaluate.open_data(evaluate.data_flags(sae, args, None), [sae], args)
    x = source.heldout_raw()
    name = flags["model"]
    model, tokenizer, blocks = lm.load(name, name, source.device, torch.float32)
    rate = (x > 0).float().mean(0)
    (found,) = evaluate.features(sae, x, [3], rate, source, model, tokenizer, blocks)
    ids, where = lm.heldout_tokens(source)
    best, tops = x[:, 3], [c["values"][c["at"]] for c in found["contexts"]]
    assert tops == sorted(tops, reverse=True) and abs(tops[0] - best.max().item()) < 1e-3
    assert abs(found["rate"] - (best > 0).float().mean().item()) < 1e-6
    row = best.argmax().item()
    c, at = divmod(int(where[row]), 16)
    lo = max(0, at - latents.WINDOW[0])
    window = ids[c, lo:at + latents.WINDOW[1] + 1]
    assert found["contexts"][0]["tokens"] == [tokenizer.decode([i]) for i in window]
    h = lm.residual_stream(model, blocks[2], ids[c:c + 1])[0]
    for t, value in zip(range(lo, 16), found["contexts"][0]["values"]):
        if t > 0 and h[t].norm() <= source.meta["norm_cut"]:
            assert abs(value - h[t, 3].relu().item()) < 0.01, t
        else:
            assert value == 0
    norm = {"gpt2": "ln_f", "llama": "norm", "neox": "final_layer_norm"}[Path(name).name]
    norm = getattr(model.base_model, norm)
    with torch.no_grad():
        d = sae.t["W_dec"][3]
        logits = model.get_output_embeddings()(norm(d)) - model.get_output_embeddings()(norm(d * 0))
    assert found["raises"][0] == tokenizer.decode([logits.argmax().item()])
    assert found["lowers"][0] == tokenizer.decode([logits.argmin().item()])

@pytest.mark.parametrize("tiny_lm", ["llama"], indirect=True)
def test_command_with_everything(lm_run, text, tiny_lm, tmp_path):
    """Two seeds of one setting and a run of another script: tables, evaluation.json, page, plot."""
    for name, variant, seed in (("a", "topk", 0), ("b", "topk", 1), ("c", "vanilla", 0)):
        argv = ["--model", tiny_lm, "--text", text, "--context", 16, "--cache-dir", tmp_path / "cache",
                "--layer", 2, "--batch-size", 256, "--tokens", 4096, "--d-sae", 64, "--seed", seed,
                *(["--k", 4] if variant == "topk" else [])]
        run(variant, *argv, "--out", tmp_path / "runs" / name)
    done = run_script("evaluate.py", *(f"runs/{n}" for n in "abc"), "--contexts", 10, "--consistency",
                      "--html", "page.html", "--html-features", 5, "--plot", "frontier.png",
                      "--features", "top", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Reconstruction and geometry", "Language model with", "Agreement between seeds",
                  "runs/a, latent"):
        assert words in done.stdout
    row = json.loads((tmp_path / "runs/a/evaluation.json").read_text())
    results = json.loads((tmp_path / "runs/a/cfg.json").read_text())["metadata"]["results"]
    assert row["l0"] == results["l0"] == 4 and abs(row["fvu"] / results["fvu"] - 1) < 1e-4
    assert row["variant"] == "topk" and row["language"]["contexts"] == 10
    assert 0 < row["consistency"]["matched_cosine"] < 0.9 and "features" not in row
    page = (tmp_path / "page.html").read_text()
    assert "runs/c" in page and "<svg" in page
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")

# --- bad input ------------------------------------------------------------------------------------

def test_bad_runs_cost_one_line_each_and_the_others_are_measured(random_sae, tmp_path):
    good = save(tmp_path / "good", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="song"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    copy = lambda name: shutil.copytree(good, tmp_path / name)
    weights = copy("damaged") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    cfg = copy("other-width") / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"d_sae": 16', '"d_sae": 17'))
    cfg = copy("unknown") / "cfg.json"
    cfg.write_text(cfg.read_text().replace("standard", "transcoder"))
    cfg = copy("whitened") / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"d_in"', '"normalize_activations": "covariance_whitening", "d_in"'))
    cfg = copy("no-k") / "cfg.json"
    cfg.write_text(cfg.read_text().replace("standard", "topk"))
    cfg = copy("odd-k") / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"standard"', '"topk", "k": "3"'))
    (copy("list") / "cfg.json").write_text("[]")
    cfg = copy("odd-flags") / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"song"', '5'))
    cfg = copy("odd-metadata") / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"metadata": {', '"metadata": "x", "other": {'))
    save_file(runs.load_sae(good)[1] | dict(scaling_factor=torch.full((16,), 2.0)),
              copy("extra") / "sae_weights.safetensors")
    save(tmp_path / "nan", torch.eye(16) * float("nan"), torch.eye(16), flags=dict(model="toy", toy="song"))
    save(tmp_path / "narrow", torch.eye(12), torch.eye(12), flags=dict(model="toy", toy="song"))
    save(tmp_path / "lm-gone", torch.eye(16), torch.eye(16), flags=dict(
        model=str(tmp_path / "nowhere"), layer=1, cache_dir=str(tmp_path / "cache")))
    save(tmp_path / "toy-gone", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="no-such-toy"))
    bad = dict(empty="no saved SAE", file="no saved SAE", nowhere="no saved SAE", damaged="damaged",
               nan="NaN", unknown="transcoder", whitened="covariance_whitening",
               narrow="takes D = 12", list="none of ours", extra="scaling_factor",
               **{"other-width": "(16, 16), not (16, 17)", "no-k": "k = None", "odd-k": "k = 3",
                  "odd-flags": "toy = 5", "odd-metadata": "none of ours",
                  "lm-gone": "no such directory", "toy-gone": "no-such-toy"})
    done = run_script("evaluate.py", *bad, "good", cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == len(bad), done.stderr
    for name, words in bad.items():
        assert any(words in line and line.startswith(f"evaluate.py: error: {name}: ") for line in lines), name
    assert (tmp_path / "good/evaluation.json").exists() and "\ngood " in done.stdout

@pytest.mark.parametrize("argv, words", [
    ([], "the following arguments are required: RUN"),
    (["a", "--features", "x"], "--features x"),
    (["a", "--plot", "frontier.gif"], "--plot frontier.gif"),
    (["a", "--contexts", "-1"], "--contexts"),
    (["a", "--device", "tpu"], "--device tpu")])
def test_bad_flags(argv, words, one_line):
    one_line(lambda: evaluate.main(argv), words)

def test_what_cannot_be_done_with_these_runs(random_sae, one_line, tmp_path):
    alone = save(tmp_path / "alone", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="song"))
    (alone / "evaluation.json").mkdir()
    one_line(lambda: evaluate.main([str(alone)]), "evaluation.json", "cannot write")
    (alone / "evaluation.json").rmdir()
    one_line(lambda: evaluate.main([str(alone), "--features", "3"]), "--features", "no tokens")
    row = (alone / "evaluation.json").read_text()              # measured all the same, and strict JSON
    assert json.loads(row, parse_constant=pytest.fail)["truth"]["hedging"] is None
    one_line(lambda: evaluate.main([str(alone), "--html", str(tmp_path)]), "--html", "a folder")
    one_line(lambda: evaluate.main([str(alone), "--consistency"]), "--consistency")
    one_line(lambda: evaluate.main([str(random_sae.path)]), "records no data", "--activations")
    flags = dict(model="toy", toy="song", seed=0)
    same = [str(save(tmp_path / name, torch.eye(16), torch.eye(16), flags=flags)) for name in "ab"]
    one_line(lambda: evaluate.main([*same, "--consistency"]), "--consistency")     # of one seed
    one_line(lambda: evaluate.main([str(alone), "--model", "toy", "--layer", "3"]), "--layer")

@pytest.mark.parametrize("tiny_lm", ["gpt2"], indirect=True)
def test_a_flag_replaces_one_of_the_recorded_ones(lm_run, tmp_path, capsys):
    """--layer or --text alone leave the rest as recorded; what is held out may have been trained on,
    which is said. Model code that a directory brings along never runs."""
    flags, tmp = lm_run
    path = save(tmp / "recorded", torch.eye(32), torch.eye(32), flags=flags)
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.2.hook_resid_pre"
    (path / "cfg.json").write_text(json.dumps(cfg))
    assert evaluate_lm(path, "--contexts", 0) == 0 and "note" not in capsys.readouterr().out
    assert evaluate_lm(path, "--contexts", 0, "--layer", 1) == 0
    assert "trained on other data (hook_name differ)" in capsys.readouterr().out
    row = json.loads((path / "evaluation.json").read_text())["data"]
    assert row["hook_name"] == "blocks.1.hook_resid_pre" and row["context_size"] == 16
    other = shutil.copytree(flags["model"], tmp_path / "custom")
    config = json.loads((other / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (other / "config.json").write_text(json.dumps(config))
    (other / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert evaluate_lm(path, "--model", other, "--layer", 1, "--text", flags["text"], "--context", 16,
                       "--cache-dir", tmp_path / "cache") == 2
    assert "cannot load" in capsys.readouterr().err and not (tmp_path / "ran").exists()

def test_a_latent_that_is_not_there(lm_run, one_line):
    flags, tmp = lm_run
    path = save(tmp / "few", torch.eye(32), torch.eye(32), flags=flags)
    one_line(lambda: evaluate.main([str(path), "--features", "32", "--contexts", "0"]), "0 to 31")

def test_a_cache_that_is_gone_is_named(tmp_path, monkeypatch, capsys):
    """A run records its --cache-dir. Where that is no longer there, the default is used, but not without a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "X.npy", np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32))
    for cache, gone in (("gone", True), (".", False)):
        run = save(tmp_path / "run", torch.eye(8), torch.eye(8), flags=dict(
            activations=str(tmp_path / "X.npy"), cache_dir=str(tmp_path / cache)))
        assert evaluate_lm(run) == 0
        assert (f"{tmp_path / cache} is gone; the default is used" in capsys.readouterr().out) == gone

@pytest.mark.parametrize("tiny_lm", ["gpt2"], indirect=True)
def test_runs_of_an_array_in_the_language_model(lm_run, tmp_path, capsys):
    """Two Matryoshka runs of --activations, with dropped rows and whole contexts: on their own data with the same rows
    held out, then, with --model, --layer and --text, cross-entropy, KL, agreement and the FVU of each level."""
    flags, tmp = lm_run
    np.save(tmp_path / "X.npy", np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32))
    np.save(tmp_path / "ids.npy", np.arange(4000) // 20)
    outs = [tmp_path / name for name in "ab"]
    for seed, out in enumerate(outs):
        run("matryoshka", "--activations", tmp_path / "X.npy", "--drop-norm", 1.2, "--context-ids", tmp_path / "ids.npy",
            "--d-sae", 64, "--k", 4, "--tokens", 6400, "--batch-size", 64, "--seed", seed, "--out", out)
    held = json.loads((outs[0] / "cfg.json").read_text())["metadata"]["results"]["heldout_tokens"]
    row = lambda out: json.loads((out / "evaluation.json").read_text())
    assert evaluate_lm(*outs) == 0
    levels = list(row(outs[0])["levels"].values())
    assert len(levels) == 5 and levels[0] > levels[-1]
    assert abs(row(outs[0])["tokens"] - 2 * held) <= 1 and "dropped: " in capsys.readouterr().out
    assert evaluate_lm(*outs, "--model", flags["model"], "--layer", 2, "--text", flags["text"], "--context", 16,
                       "--cache-dir", flags["cache_dir"], "--contexts", 10, "--consistency") == 0
    out = capsys.readouterr().out
    assert "was trained on" in out and "Agreement between seeds" in out and "FVU of the first latents" in out
    for got in map(row, outs):
        assert got["language"]["kl"] > 0 and got["language"]["contexts"] == 10 and got["consistency"]["exact"]
        assert list(got["levels"]) == ["2", "6", "14", "30", "64"]
        assert abs(got["levels"]["64"] - got["fvu"]) < 1e-5
