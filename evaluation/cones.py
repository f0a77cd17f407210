"""Concept cones: do few latents, added up, give the direction of a known property?

After Rocchi, Fel and Franchi 2025, arXiv 2512.07355, of which we had the abstract alone; so these
measures are ours. An SAE's decoder rows d_i (unit) span a cone, all sums z D with z >= 0; the
references r_j (unit) are directions of known properties.

    containment  of r_j at a budget m: 1 - min |r_j - z D|^2 over z >= 0 with at most m latents, the
                 squared cosine of r_j and its nearest point of the cone, 0 if there is none.
                 Found by non-negative orthogonal matching pursuit: Lawson and Hanson's active-set
                 least squares, stopped after m additions; greedy, so a lower bound where m > 1.
                 Mean over references, and a standard error
    coverage     share of references with a containment of at least t
    cosine       signed cosine of the best one-to-one matching of r to d, mean (metrics.match)

Without a budget all of this is empty: with F > 2 D or so any cone holds nearly every direction. And
m latents of many fit by chance, so beside it stand, as means over DRAWS:
    random       as many random directions: also the decoder of an untrained SAE, which starts so
    activations  as many held-out x - mean, of rows at random: a dictionary that was copied
    shuffled     the references with their coordinates permuted, all alike: angles among them stay
    negated      the references turned round: what a latent and its opposite would contain as well
Latents that are silent on the held-out rows are left out, here and in the count of the controls.
"""
import torch
from torch.nn.functional import normalize

import runs
from evaluation import metrics, probes

BUDGET, DRAWS = 16, 3
THRESHOLDS = 0.5, 0.9

@torch.no_grad()
def containment(R, W, budget=BUDGET):
    """Of references R [n, D] in the cone of rows W [F, D] with 1 ... budget of them: [budget, n] in
    float64. All references at once; n F D steps for each of the budget.

    Each round adds the row with the largest product with what is left, and solves least squares on
    the rows in use. Where that makes a weight negative, it goes from the last weights towards them
    until a first one is 0, which leaves, and solves again: weights stay positive, and the error
    falls in every round."""
    R, W = normalize(R.double(), dim=1), normalize(W.double(), dim=1)
    rows = R.new_zeros(len(R), budget, R.shape[1])            # in use, where `used` says so
    used = torch.zeros(len(R), budget, dtype=torch.bool, device=R.device)
    z, left, found = R.new_zeros(len(R), budget), R, []
    for m in range(budget):
        product, best = (left @ W.T).max(1)
        rows[:, m], used[:, m] = W[best], product > 1e-9      # else nothing helps any more
        while True:
            A = rows * used[..., None]
            gram = A @ A.mT + torch.diag_embed((~used).double())
            new = torch.linalg.solve(gram, A @ R[..., None])[..., 0]               # (n, budget)
            down = used & (new <= 0)
            ratio = (z / (z - new).clamp_min(1e-30)).masked_fill(~down, torch.inf)
            step = ratio.amin(1, keepdim=True).clamp_max(1)
            z = (z + step * (new - z)).masked_fill(ratio <= step, 0)
            if not down.any():
                break
            used &= ratio > step
        left = R - (z[:, None] @ A)[:, 0]
        found.append(1 - left.square().sum(1))
    return torch.stack(found)

def measure(R, W):
    """The numbers of the module's docstring for references R [n, D] and rows W [F, D]; those with a
    budget are lists, for 1 ... BUDGET."""
    c = containment(R, W)
    se = c.std(1) / len(R) ** 0.5 if len(R) > 1 else c.new_full((len(c),), float("nan"))
    i, j, cosine = metrics.match(R, W)
    return dict(containment=c.mean(1).tolist(), se=se.tolist(),
                coverage={str(t): (c >= t).double().mean(1).tolist() for t in THRESHOLDS},
                cosine=cosine[i, j].mean().item())

def controls(R, W, x, mean):
    """The same of random rows, of activations x [M, D] as rows, and of shuffled and of negated
    references."""
    g = torch.Generator().manual_seed(0)
    draws = [dict(random=measure(R, torch.randn(W.shape, generator=g).to(W)),
                  activations=measure(R, x[torch.randint(len(x), W.shape[:1], generator=g)] - mean),
                  shuffled=measure(R[:, torch.randperm(R.shape[1], generator=g)], W))
             for _ in range(DRAWS)]
    found = {name: average([d[name] for d in draws]) for name in draws[0]}
    return found | dict(negated=measure(-R, W))

def average(values):
    """The mean of numbers, or of lists or dicts of them, one by one."""
    if isinstance(values[0], dict):
        return {k: average([v[k] for v in values]) for k in values[0]}
    if isinstance(values[0], list):
        return [average(v) for v in zip(*values)]
    return sum(values) / len(values)

def report(measured, x, mean, references, facts, *code):
    """Adds to the row of each (SAE, row, (rate, ...)) the measures of its live latents, from its
    probes.json if that has them. references() gives {name: [n, D]}; x [M, D] is raw; facts and the
    files of code say what both depend on."""
    mean, known = mean.float(), None
    for sae, row, (rate, *_) in runs.Bar(measured, desc="cones", unit="run"):
        stored = probes.Stored("cones", sae, facts, __file__, metrics.__file__, *code)
        if not stored.result:
            W, known = sae.t["W_dec"][rate > 0], known or references()
            stored.put({name: dict(measure(R, W), references=len(R), latents=len(W),
                                   controls=controls(R, W, x, mean))
                        for name, R in known.items() if len(W)})
        row["cones"] = stored.result
