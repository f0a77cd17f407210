"""Are latents more monosemantic than neurons, and wider and sparser SAEs more so? Handwritten digits.

    python benchmarks/monosemanticity.py --out benchmarks/results/monosemanticity.md

Pach et al. 2025 (arXiv 2504.02821) say so of CLIP on ImageNet. Here the images are the 1,797 digits of 8 x 8 pixels
that scikit-learn brings along. A small classifier (64 - 128 - 64 - 10, ReLU) learns 900 of them, each also moved by a
pixel in eight directions, in seconds; topk_sae.py learns its last hidden layer (D = 64) on the same 8,100 images, F = D
to 16 D latents, k of them active. The score of evaluation/monosemanticity.py is taken on the other 897 images, as
they are, by raw pixels (cosine), and by class (cosine 1 within, else 0). Seeds change the split, the classifier and
the SAE. 'mean' is over all that have a score; '10+' over those active on at least ten images.

Beside each SAE a random dictionary of its size with as many active: what sparsity does without any learning.
"""
import argparse, contextlib, io, os, sys, tempfile
from pathlib import Path

os.environ.update(TQDM_DISABLE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import topk_sae
from evaluation import monosemanticity, probes
from speed import machine

SEEDS, K, EXPANSIONS, D, TRAIN = (0, 1, 2), (2, 4, 8, 16), (1, 4, 16), 64, 900
SHIFTS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]

def moved(images, i, j):
    """Images [n, 8, 8], their content moved by i rows and j columns; what comes in is empty."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    return padded[:, 1 - i:9 - i, 1 - j:9 - j]

def classifier(x, label, seed):
    """The layers up to the last hidden one, ReLU included, and the last; trained on images x [n, 64]."""
    torch.manual_seed(seed)
    below = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, D), nn.ReLU())
    head = nn.Linear(D, 10)
    opt = torch.optim.Adam([*below.parameters(), *head.parameters()], 2e-3)
    for _ in range(600):
        rows = torch.randint(len(x), (256,))
        loss = nn.functional.cross_entropy(head(below(x[rows])), label[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return below.requires_grad_(False), head.requires_grad_(False)

def learn(h, k, expansion, seed, tmp):
    """A TopK SAE on activations h [n, D]."""
    np.save(f"{tmp}/acts.npy", h.numpy())
    with contextlib.redirect_stdout(io.StringIO()):
        return topk_sae.train(topk_sae.parse_args(
            f"--activations {tmp}/acts.npy --k {k} --d-sae {expansion * D} --tokens 3e5 --batch-size 256 --seed {seed} "
            f"--no-bf16 --out {tmp}/{k}-{expansion}-{seed}".split()))

def measure(seed):
    """{(who, k, expansion): {measure: value}} of a seed; who: neurons, latents, random."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, label = torch.tensor(digits.images[order] / 16).float(), torch.tensor(digits.target[order])
    x = torch.cat([moved(images[:TRAIN], *shift) for shift in SHIFTS]).flatten(1)
    below, head = classifier(x, label[:TRAIN].repeat(len(SHIFTS)), seed)
    test, h = images[TRAIN:].flatten(1), below(x)
    by, t = {"pixels": test, "class": torch.eye(10)[label[TRAIN:]]}, below(test)
    def scored(encode):
        found = {name: monosemanticity.summary(*monosemanticity.scores(encode, t, E)) for name, E in by.items()}
        return {f"{name} {m}": found[name][m] for name in by for m in ("mean", "mean_10", "best")} | {
            "live": found["class"]["of"] - found["class"]["dead"]}
    rows = {("neurons", None, None): scored(lambda part: part) | {
        "accuracy": (head(t).argmax(1) == label[TRAIN:]).double().mean().item(),
        **{f"{name} chance": monosemanticity.chance(E) for name, E in by.items()}}}
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        for k in K:
            for expansion in EXPANSIONS:
                with torch.enable_grad():
                    sae = learn(h, k, expansion, seed, tmp)
                fvu = ((t - sae(t)).square().sum() / (t - t.mean(0)).square().sum()).item()
                rows["latents", k, expansion] = scored(sae.encode) | dict(fvu=fvu)
                random = probes.untrained(expansion * D, k, h.mean(0), 100 + seed)[0]
                rows["random", k, expansion] = scored(random)
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(seed) for seed in SEEDS]
    def cell(key, name, form=".3f"):
        values = [rows[key][name] for rows in found]
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"
    neurons, names = ("neurons", None, None), ("mean", "mean_10", "best")
    settings = [(k, e) for k in K for e in EXPANSIONS]
    lines = [f"{machine()}; {len(SEEDS)} seeds, ranges over them; classifier right on {cell(neurons, 'accuracy', '.1%')} of "
             "the 897 images. Made by benchmarks/monosemanticity.py"]
    for by in ("pixels", "class"):
        lines += ["", f"**By {by}** (chance {cell(neurons, f'{by} chance')})", "",
                  "| | FVU | with a score | mean | 10+ | best | random: mean | 10+ |", "|---|" + "--:|" * 7,
                  f"| {D} neurons | | {cell(neurons, 'live', 'd')} of {D} | "
                  + " | ".join(cell(neurons, f"{by} {n}") for n in names) + " | | |"]
        lines += [f"| k = {k}, F = {e} D | {cell(('latents', k, e), 'fvu')} | {cell(('latents', k, e), 'live', 'd')} of "
                  f"{e * D} | " + " | ".join(cell(("latents", k, e), f"{by} {n}") for n in names) + " | "
                  + " | ".join(cell(("random", k, e), f"{by} {n}") for n in names[:2]) + " |" for k, e in settings]
        value = lambda rows, who, k, e: rows[who, k, e][f"{by} mean_10"]
        beats = lambda who, *at: sum(value(rows, "latents", k, e) > value(rows, who, *(at or (k, e)))
                                     for rows in found for k, e in settings)
        pairs = [(rows, (k, e), other) for rows in found for k, e in settings for other in settings]
        wider = [value(r, "latents", *a) < value(r, "latents", *b) for r, a, b in pairs
                 if a[0] == b[0] and EXPANSIONS.index(b[1]) == EXPANSIONS.index(a[1]) + 1]
        sparser = [value(r, "latents", *a) > value(r, "latents", *b) for r, a, b in pairs
                   if a[1] == b[1] and K.index(b[0]) == K.index(a[0]) + 1]
        n = len(found) * len(settings)
        lines += ["", f"Of '10+': latents above neurons in {beats('neurons', None, None)} of {n} runs, above random "
                  f"dictionaries in {beats('random')} of {n}; the next wider SAE scores higher in {sum(wider)} of "
                  f"{len(wider)} pairs, the next sparser in {sum(sparser)} of {len(sparser)}."]
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
