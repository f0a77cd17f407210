"""sae-bench and ours on the same tensors: do they agree? (Where sae-bench 0.6.0 is installed.)

    pip install torch==2.13.0 -r requirements.txt -r benchmarks/requirements.txt
    pip install --no-deps sae-bench==0.6.0              # its functions below need no more than the peers do
    python benchmarks/saebench_check.py --out benchmarks/results/saebench.md

Words of 26 classes are planted in D = 64 dimensions: a latent for each class, which on a third of its words fires
weakly or not at all; on half of these a latent of the word itself, in part along the class's direction, fires more. What is
compared: absorption fractions and flags; the probe with an L1 penalty and the latents that it selects; logistic
regressions on k of them; masks of the largest differences of means, and the accuracy of a k-sparse probe.

Switched off in ours or theirs for the comparison, since they are our choices:
  rows of W_dec       ours takes z_i (d_i . p), theirs z_i cos(d_i, p): equal for unit rows, which are used here; the
                      last line has what rows of norm 1/4 to 4 make of theirs and of ours
  parts               ours chooses latents on other words than those scored; here both see the same words
  start, batches      theirs starts a probe at torch's random weights, ours at 0: both at 0 here, with whole batches,
                      since the order of the words is drawn in other ways
  precision           all in float64; scikit-learn's logistic regression, which stops at 1e-4, at 1e-10
"""
import argparse, contextlib, io, sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import numpy as np
import torch
from sae_bench.evals.absorption import k_sparse_probing, probing as letter_probing
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.sparse_probing import probe_training
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize, one_hot

from evaluation import first_letter, probes, probing
from speed import machine

W, D, F, C = 3000, 64, 512, 26

def planted(seed):
    """Words' codes z [W, F], activations a [W, D], classes [W], unit rows W_dec [F, D]."""
    g = torch.Generator().manual_seed(seed)
    W_dec, letter = normalize(torch.randn(F, D, generator=g), dim=1), torch.randint(C, (W,), generator=g)
    own = C + torch.randint(F - C, (W,), generator=g)           # the latent of a word
    W_dec[C:] = normalize(W_dec[C:] + W_dec[torch.arange(F - C) % C], dim=1)
    own = own - (own - C) % C + letter                          # ... leans to its letter's direction
    own = torch.where(own < F, own, own - C)
    z = torch.zeros(W, F)
    less, chance = torch.rand(W, generator=g) < 1 / 3, torch.rand(2, W, generator=g)
    z[torch.arange(W), letter] = torch.where(less, (chance[0] - 0.5).clamp(min=0), 1 + chance[0])
    z[torch.arange(W), own] = torch.where(less & (chance[1] > 0.5), 2.0, 0.3)
    z, W_dec = z.double() * (1 + 0.01 * torch.rand(W, F, generator=g)), W_dec.double()       # no ties
    return z, z @ W_dec + 0.05 * torch.randn(W, D, generator=g), letter, W_dec

class Exact(LogisticRegression):
    def fit(self, X, y):
        self.tol = 1e-10
        return super().fit(X.astype(np.float64), y)

class Stub:
    """What the reference asks of a model and of an SAE: stored activations for stored words."""
    def __init__(self, z, a, W_dec):
        self.z, self.a, self.W_dec, self.at, self.device, self.dtype = z, a, W_dec, 0, z.device, z.dtype
    def to_tokens(self, prompt):
        return torch.zeros(1, 6)
    def run_with_cache(self, prompts, names_filter):
        self.rows = slice(self.at, self.at + len(prompts))
        self.at += len(prompts)
        return None, {names_filter[0]: self.a[self.rows][:, None]}
    def encode(self, a):
        return self.z[self.rows]

def reference(z, a, p, W_dec, main):
    """Absorption fractions and flags [n] of the reference."""
    stub = Stub(z, a, W_dec)
    calculator = FeatureAbsorptionCalculator(stub, ["none"], max_icl_examples=0, word_token_pos=-1)
    found = calculator.calculate_absorption(stub, ["none"] * len(z), p, main.tolist(), 0, show_progress=False)
    return (torch.tensor([r.absorption_fraction for r in found.word_results]),
            torch.tensor([r.is_full_absorption for r in found.word_results]))

def compare(seed):
    """[(what, largest difference, largest value or count)] of one planted problem; and what rows of other norms do."""
    z, a, letter, W_dec = planted(seed)
    Y, lines = one_hot(letter, C).double(), []
    add = lambda name, ours, theirs: lines.append((name, (ours - theirs).abs().max().item(), theirs.abs().max().item()))
    ours, _ = first_letter.linear_probe(z, Y, W, 1e-6, l1=0.01)
    theirs = k_sparse_probing.train_sparse_multi_probe(z, Y, device=z.device, batch_size=W, show_progress=False)
    add("weights of the probe with an L1 penalty", ours, theirs.weights.detach())
    top, top_theirs = ours.topk(5).indices, theirs.weights.topk(5).indices
    lines.append(("latents selected by it that differ", (top != top_theirs).sum().item(), top.numel()))
    sae_like = Stub(z, a, W_dec)
    sae_like.rows = slice(None)
    sae_like.cfg = argparse.Namespace(d_sae=F)
    found = k_sparse_probing.train_k_sparse_probes(sae_like, [("", i) for i in letter.tolist()], z, ks=(1, 2, 5),
                                                   batch_size=W, precalc_sae_acts=True)
    for k, by_letter in found.items():
        w, b = zip(*(probes.logistic(z[:, top[c, :k]], Y[:, c], balanced=True) for c in range(C)))
        add(f"logistic regressions on {k}", torch.stack([torch.cat([v, c[None]]) for v, c in zip(w, b)]),
            torch.stack([torch.cat([by_letter[c].weight, by_letter[c].bias[None]]) for c in range(C)]))
    P = normalize(first_letter.linear_probe(a, Y, W, 1e-4)[0], dim=1)
    parts, fulls, wrong = [], [], []
    scale = 16 ** torch.rand(F, 1, generator=torch.Generator().manual_seed(seed)) / 4      # rows of norm 1/4 to 4
    for c in range(C):
        rows = letter == c
        part, full = first_letter.absorption(z[rows], a[rows], P[c], W_dec, top[c, :2])
        part_theirs, full_theirs = reference(z[rows], a[rows], P[c], W_dec, top[c, :2])
        parts.append(torch.stack([part, part_theirs]))
        fulls.append(torch.stack([full, full_theirs]))
        other = z[rows] / scale.T, a[rows], P[c], W_dec * scale, top[c, :2]                # the same reconstruction
        wrong.append(torch.stack([first_letter.absorption(*other)[0], reference(*other)[0]]))
    (part, part_theirs), (full, full_theirs) = torch.cat(parts, 1), torch.cat(fulls, 1)
    add("absorption of each word", part, part_theirs)
    lines.append(("full absorption: words that differ", (full != full_theirs).sum().item(), full_theirs.sum().item()))
    y = torch.arange(200) < 100
    rows = torch.cat([(letter == 0).nonzero()[:100, 0], (letter != 0).nonzero()[:100, 0]])
    differ = accuracy = 0
    for k in probing.K:
        mask = probe_training.get_top_k_mean_diff_mask(z[rows], y.int(), k)
        sign = torch.where(y, 1.0, -1.0)
        mine = (sign.double() @ z[rows]).abs().topk(k).indices
        differ += mask[mine].sum().item()
        theirs, _ = probe_training.train_sklearn_probe(z[rows][:, ~mask], y.int(), z[rows][:, ~mask], y.int())
        accuracy = max(accuracy, abs(theirs.score(z[rows][:, ~mask].numpy(), y.numpy())
                                     - probing.sparse_probes(z.float(), [(rows, y)] * 3)[k]["accuracy"]))
    lines += [("latents of the largest differences of means that differ", differ, sum(probing.K)),
              ("accuracy of k-sparse probes", accuracy, 1.0)]
    shifted = torch.cat(wrong, 1)
    return lines, [part.mean().item(), *shifted.mean(1).tolist()]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    init = letter_probing.LinearProbe.__init__
    def zeros(self, *shape, **named):
        init(self, *shape, **named)
        torch.nn.init.zeros_(self.fc.weight), torch.nn.init.zeros_(self.fc.bias)
    letter_probing.LinearProbe.__init__ = zeros
    k_sparse_probing.LogisticRegression = probe_training.LogisticRegression = Exact
    with contextlib.redirect_stderr(io.StringIO()):             # its bars and scikit-learn's warnings
        found = [compare(seed) for seed in (0, 1, 2)]
    lines = [f"{machine()}; sae-bench 0.6.0; {W} words, {F} latents, seeds 0 to 2. Made by "
             "benchmarks/saebench_check.py.", "", "| | largest difference, by seed | of |", "|---|---|--:|"]
    for rows in zip(*(lines for lines, _ in found)):
        lines.append(f"| {rows[0][0]} | {', '.join(f'{row[1]:.1g}' for row in rows)} | {max(row[2] for row in rows):.3g} |")
    lines += ["", "Mean absorption of unit rows, and of the same reconstructions with rows of norm 1/4 to 4, ours and "
              "theirs: " + "; ".join(", ".join(f"{v:.3f}" for v in values) for _, values in found) + "."]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
