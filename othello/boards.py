"""What a dictionary knows of the board: coverage and board reconstruction, and linear probes.

Karvonen et al. 2024, 'Measuring Progress in Dictionary Learning for Language Model Interpretability
with Board Game Models', arXiv 2408.00113 (of which we had notes and the code SAE_BoardGameEval).

A property is 'square s holds a disc of mine' or '... of yours' of the side to move, 64 times 2. A
classifier is latent i above t times its maximum, z_i > t max z_i, t = 0, .1 ... .9.

    coverage        mean over properties of the best F1 of any classifier (the paper's Eq. 3: t may
                    differ between properties), and with one t for all, as their code has it. Theirs
                    divide the sum by 192, counting empty squares which they mask: times 2/3 to
                    compare with their published figures.
    reconstruction  on one half of the games a classifier stands for a property where its precision
                    is at least .95 and it has at least 10 true positives (their code); on the other
                    half a square is what any classifier for it says. F1, counts pooled over boards
                    and squares, at the best t (their code; Eq. 5 has a mean over boards).
"""
import torch

from othello import game

THRESHOLDS = [t / 10 for t in range(10)]
PRECISION, TRUE_POSITIVES = 0.95, 10
PUBLISHED = 2 / 3                                             # their coverage is ours times this

def properties(boards):
    """bool [..., 128] of boards uint64 [..., 2 or 3]: mine on squares 0 to 63, yours on them."""
    return torch.from_numpy(game.squares(boards[..., :2])).bool().flatten(-2)

def measure(z, truth, first):
    """z [M, F] codes; truth bool [M, 128]; first bool [M]: rows of the half on which classifiers
    are chosen. -> coverage, coverage_one_t, reconstruction, its t, latents that stand for one;
    and the best classifier of each property: latent, t, f1, precision, recall [128] (on that half).
    Coverage, too, is of the first half. Latents silent there are no classifiers."""
    peak = z[first].amax(0)
    z = (z / peak.clamp_min(1e-30))[:, peak > 0]              # a classifier is z > t now
    alive = (peak > 0).nonzero()[:, 0]
    a, b, g = z[first], z[~first], truth[first].float()
    best = dict(f1=torch.zeros(len(THRESHOLDS), g.shape[1]))
    latent, precisions, recalls = (torch.zeros_like(best["f1"]) for _ in range(3))
    rebuilt, stands = [], []
    for k, t in enumerate(THRESHOLDS):
        on = (a > t).float()
        tp, n = on.T @ g, on.sum(0)[:, None]                                     # (F, 128), (F, 1)
        f1 = 2 * tp / (n + g.sum(0)).clamp_min(1)
        best["f1"][k], at = f1.max(0)
        latent[k] = alive[at]
        precisions[k] = (tp / n.clamp_min(1)).gather(0, at[None])[0]
        recalls[k] = (tp / g.sum(0).clamp_min(1)).gather(0, at[None])[0]
        good = (tp >= PRECISION * n) & (tp >= TRUE_POSITIVES)
        said = (b > t).float() @ good.float() > 0                                # (M / 2, 128)
        both = said.sum() + truth[~first].sum()
        rebuilt.append((2 * (said & truth[~first]).sum() / both).item())
        stands.append(good.any(1).sum().item())
    f1, k = best["f1"].max(0)
    take = lambda v: v.gather(0, k[None])[0]
    top = max(range(len(THRESHOLDS)), key=rebuilt.__getitem__)
    return dict(coverage=f1.mean().item(), coverage_one_t=best["f1"].mean(1).max().item(),
                reconstruction=rebuilt[top], t=THRESHOLDS[top], latents=stands[top]), dict(
                latent=take(latent).long(), t=torch.tensor(THRESHOLDS)[k], f1=f1,
                precision=take(precisions), recall=take(recalls))
