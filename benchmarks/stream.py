"""--stream beside stored activations: how fast, and does it learn the same?

    python benchmarks/stream.py --runs runs/all/stream --out benchmarks/results/stream.md     # resumable

topk_sae.py on smollm2, layer 6, with its defaults (2M tokens), stored (1M tokens, two passes) and streamed, seeds 0 to
2. Tokens per second, wall time: of the harvest alone (the first ring), of training alone (the stored runs), and of both
together (the streamed runs, after the first ring). The two have other held-out contexts, each partly in the training
text of the other, so both are measured on Python that neither has seen: the sources of torch, 200,000 tokens of them,
of which evaluate.py takes the held-out 5 %.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch

import data, runs, topk_sae
from speed import machine

SEEDS = 0, 1, 2
KINDS = {"stored": ["--cache-tokens", "1000000"], "streamed": ["--stream"]}

def train(out, flags):
    """A run, unless it is there; its log beside it."""
    if not (out / "cfg.json").exists():
        with open(f"{out}.log", "w") as log:
            subprocess.run([sys.executable, ROOT / "topk_sae.py", "--layer", "6", *flags, "--out", out], check=True,
                           stdout=log, stderr=log)

def rates(out):
    """Tokens a second between the log lines of a run, but for the first, which has the set-up."""
    return [json.loads(line)["tok_s"] for line in open(out / "metrics.jsonl")][1:]

def harvest(pieces=12):
    """Tokens a second of the model alone."""
    args = topk_sae.parse_args(["--layer", "6", "--stream"])
    stream = data.open_source(args, runs.setup(args)).open()
    stream.next()
    began = time.perf_counter()
    tokens = sum(stream.next()[1].numel() for _ in range(pieces))
    return tokens / (time.perf_counter() - began)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories; finished ones are kept")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    found = {kind: [args.runs.absolute() / f"{kind}-s{seed}" for seed in SEEDS] for kind in KINDS}
    for i, seed in enumerate(SEEDS):
        for kind, flags in KINDS.items():
            train(found[kind][i], [*flags, "--seed", str(seed)])
    unseen = ["--model", "smollm2", "--layer", "6", "--text", str(Path(torch.__file__).parent), "--cache-tokens", "200000"]
    everything = [out for outs in found.values() for out in outs]
    subprocess.run([sys.executable, ROOT / "evaluate.py", *everything, *unseen], check=True,
                   env={**os.environ, "TQDM_DISABLE": "1"})
    rows = {kind: [json.loads((out / "evaluation.json").read_text()) for out in outs] for kind, outs in found.items()}
    lines = [f"{machine()}; TopK, k = 32, smollm2, layer 6, 2M tokens, seeds {SEEDS}; the model alone harvests "
             f"{harvest():,.0f} tokens/s", "",
             "| | tokens/s | FVU on unseen Python, by seed | mean | KL |", "|---|--:|---|--:|--:|"]
    for kind, results in rows.items():
        speed = median(r for out in found[kind] for r in rates(out))
        fvu = [r["fvu"] for r in results]
        lines.append(f"| {kind} | {speed:,.0f} | {' '.join(f'{f:.4f}' for f in fvu)} | {mean(fvu):.4f} | "
                     f"{mean(r['language']['kl'] for r in results):.4f} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
