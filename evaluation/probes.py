"""What first_letter.py and probing.py share: codes of an SAE, logistic regression, stored results.

    codes        of an SAE on x [N, D], as a sparse tensor [N, F]
    untrained    those of a random dictionary of the same shape and sparsity: a control
    alike        the shape and sparsity of that dictionary, shared by SAEs of nearly the same L0
    logistic     logistic regression
    scores       precision, recall and F1 of yes-or-no answers
    best_classes what each latent detects when it fires, with precision and recall
    Stored       results in the run directory, by the hash of what they were computed from
"""
import hashlib, inspect, json, math, warnings
from pathlib import Path

import torch
from torch.nn.functional import normalize, softplus

import runs

@torch.no_grad()
def codes(encode, x):
    """encode(x) for x [N, D]: [N, F], a sparse tensor if few are not 0."""
    sparse = (encode(x[:256]) != 0).double().mean() < 0.1
    z = torch.cat([encode(p).to_sparse() if sparse else encode(p) for p in x.split(2048)])
    return z.coalesce() if sparse else z

def untrained(F, k, mean, seed=0):
    """(encode, W_dec [F, D]): random unit rows, of which each x fires the k largest products with
    x - mean [D]."""
    g = torch.Generator().manual_seed(seed)
    W_dec = normalize(torch.randn(F, len(mean), generator=g), dim=1).to(mean.device)
    def encode(x):
        value, i = ((x - mean) @ W_dec.T).topk(k)
        return x.new_zeros(len(x), F).scatter_(1, i, value.relu())
    return encode, W_dec

def alike(F, l0):
    """(F, k) of the random dictionary beside an SAE with F latents and this L0. k is a power of
    2^(1/4), rounded: within a tenth of l0 and half a latent, so that like SAEs share one."""
    return F, min(F, round(2 ** (round(4 * math.log2(max(1, l0))) / 4)))

def logistic(X, y, C=1.0, balanced=False, steps=200):
    """w [k] and b of a logistic regression on X [N, k], dense or sparse, for y [N] of 0 and 1: the
    minimum of |w|^2 / 2 + C sum_n weight_n loss_n that scikit-learn's LogisticRegression has;
    balanced: both classes weigh N / 2 together. By L-BFGS in float64, on columns of variance 1."""
    X, y, N = X.double(), y.double(), len(y)
    share, ones = y.mean().clamp(0.5 / N, 1 - 0.5 / N), torch.ones_like(y)
    weight = C * torch.where(y > 0, 0.5 / share, 0.5 / (1 - share)) if balanced else C * ones
    centre, Xt = X.mT @ ones / N, X.mT                                       # (k,), (k, N)
    scale = ((X * X).mT @ ones / N - centre ** 2).clamp(min=0).sqrt()
    scale = torch.where(scale > 1e-6 * centre.abs(), scale, 1)
    if X.is_sparse:                                  # in compressed rows products are fastest
        X, Xt = by_rows(X), by_rows(Xt)
    v, b = torch.zeros_like(scale), torch.zeros_like(share)
    opt = torch.optim.LBFGS([v, b], max_iter=steps, tolerance_grad=1e-11, tolerance_change=1e-14,
                            history_size=20, line_search_fn="strong_wolfe")
    @torch.no_grad()
    def closure():
        w = v / scale
        logit = X @ w - centre @ w + b
        d = weight * (logit.sigmoid() - y) / N                               # of the loss by logit
        v.grad, b.grad = (Xt @ d - centre * d.sum() + w / N) / scale, d.sum()
        return ((weight * (softplus(logit) - y * logit)).sum() + w.pow(2).sum() / 2) / N
    opt.step(closure)
    w = v / scale
    return w, b - centre @ w

def by_rows(X):
    """A sparse X in compressed rows (CSR)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return X.coalesce().to_sparse_csr()

def scores(said, y):
    """(precision, recall, F1) of answers said [..., N] to y [..., N], both bool; 0 where there is
    nothing to divide by."""
    hits, said, y = (t.sum(-1).double() for t in (said & y, said, y))
    return hits / said.clamp(min=1), hits / y.clamp(min=1), 2 * hits / (said + y).clamp(min=1)

def best_classes(Z, label, names, least=0.2):
    """{latent: [class, precision, recall]} of 'it fires' as a detector of the class that it tells
    with the largest F1, if that is at least `least`; Z: codes [N, F]; label [N], -1: no class."""
    on = (Z > 0).float() if not Z.is_sparse else torch.sparse_coo_tensor(
        Z.indices(), (Z.values() > 0).float(), Z.shape, is_coalesced=True, check_invariants=False)
    Y = (label.to(Z.device)[:, None] == torch.arange(len(names), device=Z.device)).float()
    hits, fires = on.mT @ Y, (on.mT @ torch.ones_like(Y[:, :1]))             # (F, C), (F, 1)
    f1, best = (2 * hits / (fires + Y.sum(0)).clamp(min=1)).max(1)
    precision, recall = hits / fires.clamp(min=1), hits / Y.sum(0).clamp(min=1)
    return {str(i): [names[c], precision[i, c].item(), recall[i, c].item()]
            for i, c in enumerate(best.tolist()) if f1[i] >= least}

class Stored:
    """The result of one measure for one run, in probes.json of its directory, by the hash of what
    it depends on: the SAE's files and its class, facts about the data, and the files of code. None
    if there is none."""
    def __init__(self, name, sae, facts, *code):
        h = hashlib.sha256((json.dumps(facts) + inspect.getsource(type(sae))).encode())
        for file in [sae.path / "cfg.json", sae.path / "sae_weights.safetensors", *code, __file__]:
            h.update(Path(file).read_bytes())
        self.name, self.hash, self.path = name, h.hexdigest(), sae.path / "probes.json"
        found = self.read().get(name)
        match = isinstance(found, dict) and found.get("hash") == self.hash
        self.result = found.get("result") if match else None

    def read(self):
        try:
            everything = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return everything if isinstance(everything, dict) else {}

    def put(self, result):
        self.result = without_nan(result)
        with runs.replacing(self.path, "run directory") as tmp:
            tmp.write_text(json.dumps(self.read() | {
                self.name: dict(hash=self.hash, result=self.result)}))

def without_nan(value):
    """value with None in the place of each NaN: JSON has none."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value
