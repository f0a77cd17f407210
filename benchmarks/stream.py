"""--stream beside stored activations: how fast, and does it learn the same?

    python benchmarks/stream.py --runs runs/all/stream --out benchmarks/results/stream.md     # resumable

topk_sae.py on smollm2, layer 6, with its defaults (2M tokens): stored, two passes over 1M tokens; stored, one over 2.1M, of
which 5 % are held out; and streamed, which is one pass, too. Seeds 0 to 2. Tokens per second of CPU time, one thread, from
the start of a run: of the harvest alone, of training alone, and of both together, over four refills of a smaller ring.
Stored and streamed runs have other held-out contexts, each partly in the training text of the other, so all are measured on
Python that none has seen: the sources of torch, 200,000 tokens of them, of which evaluate.py takes the held-out 5 %.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch

import data, runs, topk_sae, trained
from speed import machine

SEEDS = 0, 1, 2
KINDS = {"stored, 1M": ["--cache-tokens", "1000000"], "stored, 2.1M": ["--cache-tokens", "2100000"], "streamed": ["--stream"]}
RING = ["--stream", "--buffer", "65536"]

def opened(*flags):
    torch.set_num_threads(1)
    args = topk_sae.parse_args(["--layer", "6", *flags])
    return args, data.open_source(args, runs.setup(args))

def harvest(pieces=12):
    """Tokens a second of CPU time of the model alone."""
    stream = opened(*RING)[1].open()
    stream.next()
    began = time.process_time()
    tokens = sum(stream.next()[1].numel() for _ in range(pieces))
    return tokens / (time.process_time() - began)

def training(*flags):
    """Tokens a second of CPU time of training steps, with what they wait for: those between the first refill and
    the fifth, the same steps if there are none."""
    args, source = opened(*flags)
    steps = int(RING[2]) // 2 // args.batch_size
    args.steps, args.d_sae, args.warmup, args.dead_after, args.auxk = 976, 8 * source.d_in, 97, 20_000, source.d_in // 2
    args.lr = topk_sae.default_lr(args.d_sae, args.steps)
    sae = topk_sae.TopKSAE(source.d_in, args.d_sae, args.k)
    opt, state = runs.adam(sae, args.lr, topk_sae.BETAS), topk_sae.init_state(args, source.device)
    for step in range(5 * steps):
        if step == steps:
            began = time.process_time()
        topk_sae.train_step(sae, opt, source.batch(step), state, step, args)
    return 4 * steps * args.batch_size / (time.process_time() - began)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories; finished ones are kept")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    folder = lambda kind, seed: f"{kind.replace(', ', '-')}-s{seed}"
    found = {kind: [args.runs.absolute() / folder(kind, seed) for seed in SEEDS] for kind in KINDS}
    trained.train(args.runs, {folder(kind, seed): ["topk_sae.py", "--layer", "6", *flags, "--seed", str(seed)]
                              for seed in SEEDS for kind, flags in KINDS.items()})
    unseen = ["--model", "smollm2", "--layer", "6", "--text", str(Path(torch.__file__).parent), "--cache-tokens", "200000"]
    everything = [out for outs in found.values() for out in outs]
    subprocess.run([sys.executable, ROOT / "evaluate.py", *everything, *unseen], check=True,
                   env={**os.environ, "TQDM_DISABLE": "1"})
    rows = {kind: [json.loads((out / "evaluation.json").read_text()) for out in outs] for kind, outs in found.items()}
    lines = [f"{machine()}; TopK, k = 32, smollm2, layer 6, 2M tokens, seeds {SEEDS}; tokens per second of CPU time, one "
             f"thread; the model alone harvests {harvest():,.0f}", "",
             "| | tokens/s | FVU on unseen Python, by seed | mean | KL |", "|---|--:|---|--:|--:|"]
    for kind, results in rows.items():
        speed = training(*(RING if kind == "streamed" else KINDS[kind]))
        fvu = [r["fvu"] for r in results]
        lines.append(f"| {kind} | {speed:,.0f} | {' '.join(f'{f:.4f}' for f in fvu)} | {mean(fvu):.4f} | "
                     f"{mean(r['language']['kl'] for r in results):.4f} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
