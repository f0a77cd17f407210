"""What first_letter.py and probing.py share: codes of an SAE, logistic regression, stored results.

    codes        of an SAE on x [N, D], as a sparse tensor [N, F]
    untrained    those of a random dictionary of the same shape and sparsity: the control of both
    logistic     many logistic regressions at once, each with its own few columns
    scores       precision, recall and F1 of yes-or-no answers
    Stored       results in the run directory, by the hash of what they were computed from
"""
import hashlib, json
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

def untrained(F, k, mean):
    """(encode, W_dec [F, D]): random unit rows, of which each x fires the k largest products with
    x - mean [D]."""
    g = torch.Generator().manual_seed(0)
    W_dec = normalize(torch.randn(F, len(mean), generator=g), dim=1).to(mean.device)
    def encode(x):
        value, i = ((x - mean) @ W_dec.T).topk(k)
        return x.new_zeros(len(x), F).scatter_(1, i, value.relu())
    return encode, W_dec

def logistic(X, y, C=1.0, balanced=False, steps=200):
    """w [P, k] and b [P] of P logistic regressions, on X [P, N, k] for y [P, N] of 0 and 1: the
    minimum of |w|^2 / 2 + C sum_n weight_n loss_n that scikit-learn's LogisticRegression has;
    balanced: both classes weigh N / 2 together. By L-BFGS in float64 on columns of variance 1."""
    X, y = X.double(), y.double()
    N, scale = X.shape[1], X.std(1, correction=0)                            # (P, k)
    scale = torch.where(scale > 0, scale, 1)
    share = y.mean(1, keepdim=True).clamp(0.5 / N, 1 - 0.5 / N)              # (P, 1)
    weight = C * (torch.where(y > 0, 0.5 / share, 0.5 / (1 - share)) if balanced else 1 + 0 * y)
    centre = X.mean(1)
    X = (X - centre[:, None]) / scale[:, None]
    v, b = torch.zeros_like(scale), torch.zeros_like(share)
    opt = torch.optim.LBFGS([v.requires_grad_(), b.requires_grad_()], max_iter=steps,
                            tolerance_grad=1e-9, tolerance_change=1e-12, history_size=20,
                            line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        logit = torch.einsum("pnk,pk->pn", X, v) + b
        loss = (weight * (softplus(logit) - y * logit)).sum() + (v / scale).pow(2).sum() / 2
        (loss / N).backward()
        return (loss / N).detach()
    opt.step(closure)
    w = v.detach() / scale
    return w, b.detach()[:, 0] - (w * centre).sum(1)

def scores(said, y):
    """(precision, recall, F1) of answers said [..., N] to y [..., N], both bool; 0 where there is
    nothing to divide by."""
    hits, said, y = ((t).sum(-1).double() for t in (said & y, said, y))
    return hits / said.clamp(min=1), hits / y.clamp(min=1), 2 * hits / (said + y).clamp(min=1)

class Stored:
    """The result of one measure for one run, in probes.json of its directory, by the hash of what
    it depends on: the SAE's files, facts about the data, and the code. None if there is none."""
    def __init__(self, name, sae, facts, *code):
        h = hashlib.sha256(json.dumps(facts).encode())
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
    return None if isinstance(value, float) and value != value else value
