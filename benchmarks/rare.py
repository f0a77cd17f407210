"""Does the eps of Adam stall rare latents? 65,536 features whose frequencies fall as 1 / rank.

    python benchmarks/rare.py --out benchmarks/results/rare.md

Adam divides the mean of a gradient by sqrt(v) + eps, v its mean square. Our gradients have norm 1 over all 2 D F
weights, so those of a latent that hardly ever fires are tiny; where sqrt(v) is not far above eps, it learns
too slowly. The data: 16 features of 65,536 in each sample, drawn by Zipf's law (the last one in 2 of 100,000
samples), strengths uniform in [.5, 1.5], in 256 dimensions. topk_sae.py learns them with F = 65,536, k = 16
and its defaults, but no AuxK (which could revive what had stalled), 500 steps of 1024 fresh samples, with our eps,
1e-8, and with one of 1e-15.

By rank of the features: mean cosine with the latent that is nearest. Of the latents: sqrt(v) at the end,
corrected for Adam's start, as the root mean square over a row of W_enc; those that fired at all.
"""
import argparse, os, sys, tempfile
from pathlib import Path

os.environ.update(TQDM_DISABLE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from torch.nn.functional import embedding_bag, normalize

import runs, topk_sae
from speed import machine

N, D, ACTIVE, STEPS, BATCH = 65536, 256, 16, 500, 1024
RANKS = 0, 64, 512, 4096, 16384, N

def sample(n, features, generator):
    p = 1 / torch.arange(1, N + 1, dtype=torch.float64)
    chosen = torch.searchsorted((p / p.sum()).cumsum(0), torch.rand(n, ACTIVE, generator=generator, dtype=torch.float64))
    return embedding_bag(chosen.clamp(max=N - 1), features, mode="sum",
                         per_sample_weights=0.5 + torch.rand(n, ACTIVE, generator=generator))

def learn(path, eps, seed, tmp):
    """W_dec, sqrt(v) of each latent [F], results."""
    adam = runs.adam
    def with_eps(*args):
        opt = adam(*args)
        opt.param_groups[0]["eps"] = eps
        return opt
    runs.adam = with_eps
    try:
        topk_sae.train(topk_sae.parse_args(
            f"--activations {path} --d-sae {N} --k {ACTIVE} --tokens {STEPS * BATCH} --batch-size {BATCH} --seed {seed} "
            "--auxk-alpha 0 "
            f"--out {tmp}/{eps}".split()))
    finally:
        runs.adam = adam
    state = torch.load(f"{tmp}/{eps}/state.pt", weights_only=True)
    names = [name for name in state["sae"] if name != "threshold"]
    v = state["opt"]["state"][names.index("W_enc")]["exp_avg_sq"] / (1 - topk_sae.BETAS[1] ** STEPS)
    cfg, tensors = runs.load_sae(f"{tmp}/{eps}")
    return tensors["W_dec"], v.mean(1).sqrt(), cfg["metadata"]["results"]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(10 ** 6 + args.seed)    # not the numbers that W_dec starts from
    features = normalize(torch.randn(N, D, generator=generator), dim=1)
    head = " | ".join(f"{a + 1:,} to {b:,}" for a, b in zip(RANKS, RANKS[1:]))
    lines = [f"{machine()}; seed {args.seed}", "", f"| eps | FVU | dead | sqrt(v) of latents: least, 1 %, median | {head} |",
             "|---|--:|--:|--:|" + "--:|" * (len(RANKS) - 1)]
    with tempfile.TemporaryDirectory() as tmp:
        np.save(f"{tmp}/X.npy", sample(int(STEPS * BATCH * 1.06), features, generator).half().numpy())
        for eps in (1e-8, 1e-15):
            W, root, results = learn(f"{tmp}/X.npy", eps, args.seed, tmp)
            best = torch.cat([(part @ normalize(W, dim=1).T).amax(1) for part in features.split(2048)])
            root = root[root > 0].double().quantile(torch.tensor([0, 0.01, 0.5], dtype=torch.float64))
            cosines = " | ".join(f"{best[a:b].mean():.3f}" for a, b in zip(RANKS, RANKS[1:]))
            lines.append(f"| {eps:g} | {results['fvu']:.4f} | {results['dead']:.2%} | "
                         f"{', '.join(f'{r:.1e}' for r in root)} | {cosines} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
