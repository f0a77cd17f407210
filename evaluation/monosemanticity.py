"""Monosemanticity score: do the inputs that activate a latent look alike to another encoder?

Pach et al. 2025, 'Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models', arXiv
2504.02821, in the form of its code (ExplainableML/sae-for-vlm, metric.py). A neuron k has
activations a_n on N inputs; e_n is the embedding of input n by an encoder that is not the model.

    w_n  = (a_n - min a) / (max a - min a)         of each neuron, over all inputs
    MS_k = sum_{n<m} w_n w_m cos(e_n, e_m) / sum_{n<m} w_n w_m
         = (|sum_n w_n u_n|^2 - q) / ((sum_n w_n)^2 - q),  u_n = e_n / |e_n|,  q = sum_n w_n^2

The second form is exact and takes N P steps for P numbers in an embedding, not N^2 P (derived also
in MonoLoss, arXiv 2602.12403). The first version of the paper divided by the number of pairs; its
code never did. Embeddings are not centred: the score of a neuron that tells nothing is `chance`,
the mean cosine of all pairs, not 0.

    mean, std    over the neurons that are not dead; best, worst: the highest and the lowest score
    dead         neurons without a score: those above their minimum on fewer than two inputs (or,
                 ours, on all but one by less than float64 can tell, 1e-12)
    mean_10      mean over those above their minimum on at least ten (ours: a score of two inputs
                 alone is the cosine of a pair, which is 1 for twins)

Beside the latents: the coordinates of the activations themselves, the paper's neurons; and a random
dictionary with as many latents and as many of them active (ours): latents that fire seldom score
far from chance in both directions, whatever they mean.

The embeddings: --embeddings, a row for each row of --activations; on --model othello the boards,
one-hot in mine, yours or empty on 64 squares, whose cosine is the share of squares that agree.
"""
import torch
from torch.nn.functional import normalize

import runs
from evaluation.probes import untrained
from sources.shards import Shards

def embeddings(path, source):
    """E [M, P] of the held-out rows of a source of --activations, from the file of --embeddings.
    Fails if it has another number of rows, or any that is no direction."""
    if not source.flags.activations:
        runs.fail(f"--embeddings {path}: its rows are those of --activations; leave it out for "
                  f"{source.meta['model_name']}")
    shards, rows = Shards([path], "--embeddings"), source.shards.numbers(source.heldout_rows())
    if shards.n != source.shards.shards.n:
        runs.fail(f"--embeddings {path}: {shards.n} rows, but --activations has "
                  f"{source.shards.shards.n}; give one for each, in the same order")
    E = shards.read(rows).to(source.device).float()
    norm = E.norm(dim=1)
    if bad := rows[~(norm.isfinite() & (norm > 0)).cpu().numpy()].tolist():
        runs.fail(f"--embeddings {path}: {len(bad)} of {len(E)} rows hold NaN, inf or only zeros "
                  f"(rows {', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}); these "
                  "have no cosine")
    return E

def chance(E):
    """Mean cosine of all pairs of the rows of E [N, P]."""
    total = sum(normalize(part.double(), dim=1).sum(0) for part in E.split(2048))
    return ((total.square().sum() - len(E)) / (len(E) * (len(E) - 1))).item()

@torch.no_grad()
def scores(encode, x, E):
    """Of neurons [N, K] = encode(x [N, D]), a function of each row alone: MS [K] in float64, NaN
    where dead, by embeddings E [N, P]; and on how many inputs each is above its minimum [K]."""
    low, high = torch.inf, -torch.inf
    for part in x.split(2048):
        a = encode(part).double()
        low, high = a.amin(0).clamp_max(low), a.amax(0).clamp_min(high)
    total = weight = squares = rows = 0
    for part, e in zip(x.split(2048), E.split(2048)):
        w = (encode(part).double() - low) / (high - low).clamp_min(1e-300)             # (2048, K)
        total = total + w.T @ normalize(e.double(), dim=1)                             # (K, P)
        weight, squares = weight + w.sum(0), squares + w.square().sum(0)
        rows = rows + (w > 0).sum(0)
    pairs = weight.square() - squares                         # twice the sum over pairs
    score = (total.square().sum(1) - squares) / pairs
    return score.masked_fill(pairs <= 1e-12 * weight.square(), torch.nan), rows

def summary(score, rows):
    """The numbers of the module's docstring from scores() [K]."""
    dead = score.isnan()
    live = score if dead.all() else score[~dead]
    return dict(mean=live.mean().item(), std=live.std(unbiased=False).item(),
                best=live.max().item(), worst=live.min().item(),
                mean_10=score[rows >= 10].nanmean().item(), dead=int(dead.sum()), of=len(score))

def report(saes, rows, x, mean, E):
    """Adds the scores of each SAE on raw x [M, D], with mean [D], to its row, and the baselines."""
    base, neurons = chance(E), summary(*scores(lambda part: part, x, E))
    for sae, row in zip(runs.Bar(saes, desc="monosemanticity", unit="run"), rows):
        k = min(sae.d_sae, max(1, round(row["l0"])))
        random, _ = untrained(sae.d_sae, k, mean.float())
        row["monosemanticity"] = dict(summary(*scores(sae.encode, x, E)), chance=base,
                                      random=summary(*scores(random, x, E)), neurons=neurons)
