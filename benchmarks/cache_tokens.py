"""How many tokens must be harvested? The error after 2M training tokens, by how many of them are distinct.

    python benchmarks/cache_tokens.py --runs runs/all/cache-tokens --out benchmarks/results/cache-tokens.md

topk_sae.py with its defaults on the first N activations of the cache of smollm2, layer 6, of 1M tokens, whose
contexts are in random order; evaluate.py then measures all runs on the held-out contexts of that cache, which
none has seen. N tokens of --cache-tokens give about .985 N activations, of which 95 % are trained on, here as there.
"""
import argparse, json, os, subprocess, sys
from pathlib import Path
from statistics import mean

os.environ.update(TQDM_DISABLE="1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import numpy as np
import torch

import data, runs, topk_sae, trained
from speed import machine

TOKENS, SEEDS = (1_000_000, 850_000, 750_000, 700_000, 500_000), (0, 1, 2)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories; finished ones are kept")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    shared = ["--layer", "6", "--cache-tokens", "1000000"]
    source = data.open_source(topk_sae.parse_args(shared), torch.device("cpu"))
    lines = [f"{machine()}; TopK, k = 32, smollm2, layer 6, 2M training tokens, FVU on {len(source.heldout()):,} held-out "
             f"tokens, seeds {SEEDS}", "", "| tokens harvested | FVU by seed | mean, to that of 1M |", "|--:|---|--:|"]
    first = None
    for tokens in TOKENS:
        rows = round(tokens / TOKENS[0] * source.meta["n_train_rows"])
        array, fvu = args.runs / f"{tokens}.npy", []
        for seed in SEEDS:
            out = args.runs / f"{tokens}-s{seed}"
            if not (out / "cfg.json").exists() and not array.exists():
                np.save(array, source.shards.read(np.arange(rows)).numpy())
            trained.train(args.runs, {out.name: ["topk_sae.py", "--activations", str(array.absolute()), "--seed", str(seed)]})
            if not (out / "evaluation.json").exists():
                subprocess.run([sys.executable, ROOT / "evaluate.py", out, "--model", "smollm2", *shared, "--contexts", "0"],
                               check=True, stdout=subprocess.DEVNULL)
            fvu.append(json.loads((out / "evaluation.json").read_text())["fvu"])
        array.unlink(missing_ok=True)
        first = first or mean(fvu)
        lines.append(f"| {tokens:,} | {' '.join(f'{f:.4f}' for f in fvu)} | {mean(fvu) / first:.4f} |")
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
