"""The measures of evaluate.py, each with its definition. (Those of Othello boards are in
othello/boards.py, the reader of saved SAEs in saved.py.)

Reconstruction, over all M tokens x with e = x - x_hat; sums come first, then one division
  l0         non-zero codes per token; mean, standard deviation, 5 % and 95 % quantile over tokens
  fvu        sum |e|^2 / sum |x - mean x|^2, one global mean: x_hat = mean x has 1
  gamma      sum |x_hat|^2 / sum <x, x_hat> (Rajamanoharan et al. 2024, eq. 10), less than 1 by
             shrinkage. On raw activations, and 'centred': with mean x taken off both
             `prefixes`: the same of the first m latents alone
  dead       share of latents silent on all M tokens; density: how many latents fire how often
Geometry, of the decoder's rows d_i at norm 1 (Chanin and Garriga-Alonso 2025, 'Sparse but Wrong')
  c_dec      mean of |cos(d_i, d_j)| over i < j
  s_n        the product of an input, as the encoder sees it, and a row d_i that stands at place n B
             in the descending order of all B F of them; n = 3 F / 8 (the paper has 18 of 50 and
             12000 of 32768); in scaled units, where E|x'| = sqrt(D)
             On toys both are lowest near the true L0
  nearest    largest cosine with another latent: mean and median over latents, share above 0.9
Ground truth, of toys with features v_j [n, D]; chance: 5 random dictionaries, as many active
  mcc        mean signed cosine of the min(n, F) pairs of the best one-to-one matching
  mmcs_truth, mmcs_learned    mean over features of the best latent's cosine; the other way round
  found      share of features with a latent at a cosine of at least 0.9
  f1         best F1, over thresholds, of the matched latent as a detector of its feature; mean
             over all n features, 0 for one without a latent
  absorbed   P(parent's latent silent | parent and child on), mean over the pairs of a tree; the
             parent's latent is the one nearest in cosine. absorbed_alone: where the child is off; a
             small k silences it there, too. Absorption is the difference (after Chanin et al. 2024)
  hedging    max(0, (q - q0) / (1 - q0)); q = mean |P (v - d)| over features v and their matched
             latents d, P projecting on the span of the features that have no latent; q0: on as many
             random directions. Chanin et al. 2025 (2505.11756) train a wider SAE to find these
             features; here they are known. Only where F < n, and fewer than D have none
Language models: `language`. Agreement of seeds: `consistency`.
"""
import itertools

import numpy as np
import torch
from torch.nn.functional import normalize

import runs
from sources import lm

BLOCK, EXACT = 2048, 8192      # rows of a matrix of cosines at once; that are matched exactly
EDGES = [e / 2 for e in range(-12, 1)]                        # of the density histogram, log10

# --- reconstruction and geometry ------------------------------------------------------------------

@torch.no_grad()
def reconstruction(sae, x, mean):
    """Metrics of an SAE on x [M, D] with mean [D] in float64; and of each latent [F]: how often it
    fires (rate), its largest activation (peak), the sum of its activations (total)."""
    error = power = hh = xh = raw_hh = raw_xh = 0.0           # hh: |x_hat|^2, xh: <x, x_hat>
    l0, fired, peak, total = [], 0, 0, 0
    for part in x.split(2048):
        z, x_hat = sae.both(part)
        x_hat, part = x_hat.double(), part.double()
        error += (part - x_hat).pow(2).sum().item()
        raw_hh, raw_xh = raw_hh + x_hat.pow(2).sum().item(), raw_xh + (part * x_hat).sum().item()
        part, x_hat = part - mean, x_hat - mean
        power += part.pow(2).sum().item()
        hh, xh = hh + x_hat.pow(2).sum().item(), xh + (part * x_hat).sum().item()
        l0.append((z != 0).sum(1).double())
        fired, total = fired + (z > 0).sum(0), total + z.sum(0, dtype=torch.double)
        peak = torch.maximum(z.amax(0), torch.as_tensor(peak, device=z.device))
    nan, constant = float("nan"), abs(xh) <= 1e-9 * (hh * power) ** 0.5      # x_hat is, then
    l0, rate = torch.cat(l0), fired / len(x)
    density = np.histogram(rate[rate > 0].double().log10().cpu(), EDGES)[0].tolist()
    return dict(tokens=len(x), l0=l0.mean().item(), l0_std=l0.std(unbiased=False).item(),
                l0_5=l0.quantile(0.05).item(), l0_95=l0.quantile(0.95).item(),
                fvu=error / power if power else nan, gamma=raw_hh / raw_xh if raw_xh else nan,
                gamma_centred=nan if constant else hh / xh,
                dead=(rate == 0).double().mean().item(),
                density=dict(edges=EDGES, count=density, dead=int((rate == 0).sum()))
                ), (rate, peak, total)

@torch.no_grad()
def geometry(W_dec, inputs, scale=1.0, n=None):
    """c_dec, s_n (times scale) and nearest-neighbour cosines of W_dec [F, D]; inputs [B, D]: what
    the encoder sees of some hundreds of tokens at least."""
    U, N = normalize(W_dec, dim=1), len(W_dec)
    total, nearest = 0.0, []
    for i in range(0, N, 2048):
        c = U[i:i + 2048] @ U.T                                              # (2048, F)
        c.diagonal(i).zero_()
        total += c.abs().sum(dtype=torch.double).item()
        c.diagonal(i).fill_(-1)
        nearest.append(c.amax(1))
    nearest, n = torch.cat(nearest) if N > 1 else W_dec.new_full((1,), torch.nan), n or 3 * N // 8
    Z = inputs[:max(1, min(4096, 2 ** 25 // N))] @ U.T * scale
    s_n = Z.flatten().kthvalue(Z.numel() - n * len(Z)).values.item()
    return dict(c_dec=total / max(1, N * (N - 1)), s_n=s_n, n=n, nearest=nearest.mean().item(),
                nearest_median=nearest.median().item(),
                nearest_09=(nearest > 0.9).double().mean().item())

@torch.no_grad()
def prefixes(sae, x, mean, widths):
    """{m: fvu} of the first m latents alone, for each m of widths, ascending: what the levels of a
    Matryoshka SAE reconstruct. x [M, D]; mean [D] in float64."""
    error, power = torch.zeros(len(widths)).double(), 0.0
    for part in x.split(2048):
        inner, undo = sae.normed(part)
        z, x_hat = sae.codes(inner), sae.t["b_dec"]
        for g, (lo, hi) in enumerate(zip([0, *widths], widths)):
            x_hat = x_hat + z[:, lo:hi] @ sae.t["W_dec"][lo:hi]
            error[g] += (part - undo(x_hat)).double().pow(2).sum().item()
        power += (part - mean).pow(2).sum().item()
    return {m: e / power if power else float("nan") for m, e in zip(widths, error.tolist())}

# --- ground truth ---------------------------------------------------------------------------------

def match(truth, learned):
    """Indices (i, j) of the one-to-one matching of rows with the largest sum of signed cosines, and
    the cosines [n, F]. Rows of the smaller set are all matched."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        runs.fail("matching needs scipy; pip install scipy")
    cosine = normalize(truth.float(), dim=1) @ normalize(learned.float(), dim=1).T
    i, j = linear_sum_assignment(-cosine.cpu().numpy())
    return torch.as_tensor(i), torch.as_tensor(j), cosine.cpu()

def best_f1(z, on):
    """The largest F1 over thresholds t of 'z > t' as a detector of on; z [M], bool on [M]."""
    z, order = z.sort(descending=True)
    hits, said = on[order].double().cumsum(0), torch.arange(1, len(z) + 1, device=z.device)
    f1 = 2 * hits / (said + on.sum())
    ends = torch.cat([z[:-1] > z[1:], z.new_ones(1, dtype=bool)]) & (z > 0)      # of ties
    return f1[ends].max().item() if ends.any() else 0.0

def hedging(W_dec, V, i, j, generator=None):
    """Hedging degree of W_dec [F, D] for features V [n, D], latents j matched to features i."""
    missing = np.setdiff1d(np.arange(len(V)), i)
    if not 0 < len(missing) < V.shape[1]:
        return None
    delta = V[i] - normalize(W_dec, dim=1)[j]
    def q(rows):                                              # the projector on the span of rows
        Q = torch.linalg.qr(rows.T).Q
        return (delta @ Q).norm(dim=1).mean().item()
    random = [q(torch.randn(len(missing), V.shape[1], generator=generator)) for _ in range(50)]
    q0 = sum(random) / 50
    return max(0.0, (q(V[missing]) - q0) / (1 - q0))

@torch.no_grad()
def hedging_degree(widened, control, n, draws=50, generator=None):
    """How far the old latents of an SAE leave the span of n new ones once it has these: h, as in
    the code of Chanin et al. 2025 (arXiv 2505.11756). widened [F + n, D] and control [F, D] are
    W_dec of one SAE, trained on with n more latents and as it was. P: the projector on the new
    rows; delta_i = widened_i - control_i, of unit rows; q = mean_i |P delta_i|, q0 the same with n
    random directions, mean of draws: h = max(0, (q - q0) / (1 - q0))."""
    widened, control = (normalize(W.double().cpu(), dim=1) for W in (widened, control))
    delta = widened[:-n] - control
    q = lambda rows: (delta @ torch.linalg.qr(rows.T).Q).norm(dim=1).mean().item()
    random = [q(torch.randn(n, delta.shape[1], generator=generator, dtype=torch.double))
              for _ in range(draws)]
    q0 = sum(random) / draws
    return dict(h=max(0.0, (q(widened[-n:]) - q0) / (1 - q0)), q=q(widened[-n:]), q0=q0)

@torch.no_grad()
def ground_truth(W_dec, codes, toy, z, generator=None):
    """Recovery of the features of a Toy by W_dec [F, D], whose codes z [M, F] stand beside the true
    codes [M, n]."""
    i, j, cosine = match(toy.features, W_dec)
    on, z = codes > 0, z.cpu()
    f1 = sum(best_f1(z[:, b], on[:, a]) for a, b in zip(i.tolist(), j.tolist())) / toy.n
    off, alone, best = [], [], cosine.argmax(1)
    for child, (parent, *_) in toy.parents.items():
        silent, parent, child = (z[:, best[parent]] <= 0).double(), on[:, parent], on[:, child]
        off += [silent[parent & child].mean().item()] if (parent & child).any() else []
        alone += [silent[parent & ~child].mean().item()] if (parent & ~child).any() else []
    mean = lambda values: sum(values) / len(values) if values else None
    return dict(mcc=cosine[i, j].mean().item(), mmcs_truth=cosine.amax(1).mean().item(),
                mmcs_learned=cosine.amax(0).mean().item(), f1=f1,
                found=(cosine.amax(1) >= 0.9).double().mean().item(),
                absorbed=mean(off), absorbed_alone=mean(alone),
                hedging=hedging(W_dec.cpu(), toy.features, i, j, generator))

def recovery(sae, toy, mean):
    """ground_truth of an SAE on 16,384 fresh samples of its toy, of 5 random dictionaries with as
    many active latents (chance, means), and the true L0. mean [D] of the data, on the CPU."""
    g = torch.Generator().manual_seed(0)
    x, codes = toy.sample(16384, g)
    W_dec = sae.t["W_dec"]
    z = torch.cat([sae.encode(part.to(W_dec.device)).cpu() for part in x.split(2048)])
    result = ground_truth(W_dec.cpu(), codes, toy, z, g)
    k, chance = min(sae.d_sae, max(1, round((z != 0).sum().item() / len(z)))), []
    for _ in range(5):
        R = normalize(torch.randn(sae.d_sae, sae.d_in, generator=g), dim=1)
        pre = (x - mean) @ R.T
        vals, idx = pre.topk(k)
        z = torch.zeros_like(pre).scatter_(1, idx, vals.relu())
        chance.append(ground_truth(R, codes, toy, z, g))
    return dict(result, true_l0=(codes > 0).sum().item() / len(codes), chance={
        name: None if value is None else sum(c[name] for c in chance) / 5
        for name, value in chance[0].items()})

# --- language models ------------------------------------------------------------------------------

@torch.no_grad()
def cross_entropies(model, block, cut, ids, replacements):
    """Cross-entropy of each context with each function of x [m, D] in the place of x, and its KL
    from the first: [2, functions, n]. Means over predictions of positions 1 to T - 2; kl: T - 1."""
    out, first = torch.zeros(2, len(replacements), len(ids), dtype=torch.double), None
    target = torch.from_numpy(ids[:, 2:]).long().to(model.device)
    for i, replace in enumerate(replacements):
        logp = lm.spliced(model, block, ids, cut, replace)[:, 1:].float().log_softmax(-1)
        first = logp if first is None else first
        ce = -logp[:, :-1].gather(-1, target[..., None])[..., 0]
        out[0, i] = ce.double().mean(1)
        out[1, i] = (first.exp() * (first - logp)).sum(-1).double().mean(1)
    return out

def language(saes, model, block, cut, mean, ids):
    """Yields, of each SAE on token ids [n, T] of held-out contexts, with x_hat put in at `block`:
      ce         cross-entropy in nats a token: as it is, ablated to zero or to mean [D], with x_hat
      recovered  (ce ablated - ce spliced) / (ce ablated - ce), of sums; from zero and from the mean
      kl         KL(as it is || spliced), nats a token
      increase   ce spliced - ce
      _se        a standard error, as if contexts were independent; of the ratio, by linearisation
    Position 0 and outliers, of norms above `cut`, which no SAE was trained on, stay as they are,
    under ablation too; predictions made at position 0 do not count."""
    ways = [lambda x: x, torch.zeros_like, mean.expand_as, *saes]
    results, per_pass = [], max(1, 1024 // ids.shape[1])
    with runs.Bar(total=ids.size, desc="language model", unit="tok") as bar:
        for i in range(0, len(ids), per_pass):
            results.append(cross_entropies(model, block, cut, ids[i:i + per_pass], ways))
            bar.update(ids[i:i + per_pass].size)
    (ce, ce_zero, ce_mean, *spliced), kl = torch.cat(results, 2)
    n = len(ids)
    se = lambda v: (v.std() / n ** 0.5).item() if n > 1 else float("nan")
    def recovered(s, ablated):                                # a ratio of means: by linearisation
        gap = (ablated - ce).mean()
        if gap.abs() < 1e-6:
            return float("nan"), float("nan")
        r = (ablated - s).mean() / gap
        return r.item(), se((ablated - s - r * (ablated - ce)) / gap)
    for s, k in zip(spliced, kl[3:]):
        (zero, zero_se), (mean, mean_se) = recovered(s, ce_zero), recovered(s, ce_mean)
        yield dict(tokens=ids.size, contexts=n, ce=ce.mean().item(), ce_zero=ce_zero.mean().item(),
                   ce_mean=ce_mean.mean().item(), ce_spliced=s.mean().item(),
                   increase=(s - ce).mean().item(), increase_se=se(s - ce),
                   recovered_zero=zero, recovered_zero_se=zero_se, recovered_mean=mean,
                   recovered_mean_se=mean_se, kl=k.mean().item(), kl_se=se(k))

# --- agreement between seeds ----------------------------------------------------------------------

def nearest(a, b):
    """The cosine of each unit row of a with the nearest of b, and which that is; and the same of
    each row of b. In blocks."""
    found, back = [], None
    for first in range(0, len(a), BLOCK):
        c = a[first:first + BLOCK] @ b.T                                     # (BLOCK, F)
        found.append(c.max(1))
        value, i = c.max(0)
        i += first
        back = (value, i) if back is None else (back[0].maximum(value),
                                                torch.where(value > back[0], i, back[1]))
    return *(torch.cat(part) for part in zip(*found)), *back

def one_to_one(a, b, first):
    """A matching of unit rows a, b [F, D], i and j, and the cosines of its pairs. Up to EXACT rows
    that with the largest sum. Of more, pairs that are nearest to each other are taken first, among
    what they leave again, and so on until EXACT are left; the sum is less then, never more. first:
    nearest(a, b)."""
    (i, j), found = (torch.arange(len(m), device=m.device) for m in (a, b)), []
    while len(i) > EXACT:
        value, best, _, back = first if not found else nearest(a[i], b[j])
        mutual = back[best] == torch.arange(len(i), device=i.device)
        if not mutual.any():                                  # many are equal: one at a time
            mutual[value.argmax()] = True
        found.append((i[mutual], j[best[mutual]], value[mutual]))
        taken = torch.zeros_like(j, dtype=torch.bool).index_fill_(0, best[mutual], True)
        i, j = i[~mutual], j[~taken]
    m, n, c = match(a[i], b[j])
    found.append((i.cpu()[m], j.cpu()[n], c[m, n]))
    return [torch.cat([part.cpu() for part in parts]) for parts in zip(*found)]

def alike(cosine, peak, share, t):
    """Of the share of live latents with the largest activations, the part that another dictionary
    has at a cosine above t (Chen et al. 2025, fig. 5). cosine, peak [F]: nearest there; here."""
    best = peak.topk(max(1, int((peak > 0).sum() * share))).indices
    return (cosine[best] > t).double().mean().item()

def consistency(seeds):
    """Of seeds [(W_dec [F, D], peak [F])] of one setting, means over pairs: mean signed cosine
    of a one-to-one matching of latents (PW-MCC of Song et al. 2025, stability of Wang et al. 2025;
    there the best one, here if F is at most EXACT: `one_to_one`), rank correlation of matched
    indices (order, Wang et al.), and `alike`. Dead latents count in the first two. Memory beside
    the dictionaries: 20 min(F, EXACT)^2 + 4 BLOCK F bytes, 1.9 GB at F = 65,536."""
    seeds = [(normalize(W, dim=1), peak.to(W.device)) for W, peak in seeds]
    cosine, order, near = [], [], []
    for (a, peak_a), (b, peak_b) in runs.Bar(list(itertools.combinations(seeds, 2)),
                                             desc="agreement", unit="pair"):
        first = nearest(a, b)
        near += [(first[0], peak_a), (first[2], peak_b)]
        i, j, c = one_to_one(a, b, first)
        cosine.append(c.mean().item())
        order.append(np.corrcoef(i, j)[0, 1])
    table = [dict(share=share, **{f"{t}": float(np.mean([alike(c, peak, share, t)
                                                         for c, peak in near]))
                                  for t in (0.7, 0.8, 0.9)}) for share in (0.003, 0.05, 0.25, 1.0)]
    return dict(matched_cosine=float(np.mean(cosine)), cosine_of_pairs=cosine,
                exact=len(seeds[0][0]) <= EXACT, order=float(np.mean(order)), alike=table)
