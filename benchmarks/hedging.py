"""Does a dictionary hedge on a language model? Give it more latents, and see what the old ones let go.

    python benchmarks/hedging.py --runs benchmarks/results/hedging.jsonl --out benchmarks/results/hedging.md   # resumable

An SAE too narrow for its data mixes features that occur together (Chanin et al. 2025, arXiv 2505.11756; we read its
code, not the text). Its measure, evaluation/metrics.py `hedging_degree`: an SAE is trained on twice from the same
weights, as it is (control) and with 64 more latents (widened); what the old latents differ by, in the span of the new
ones, was mixed into them for want of these. 0: no more than in the span of random directions.

smollm2, layer 6; 1M tokens to begin with, and again 1M, each with a whole schedule of rates (warm-up and decay, both SAEs at
the rate of the narrow one) and fresh moments of Adam; k = 32, all other settings the defaults. Widths 2 D and 8 D. As in the
code: new rows of W_enc are .1 times those of W_dec, which are random, and b_enc is 0 there. Other than there: rows of W_dec
have unit norm throughout (.1 there); 250M tokens and Gemma-2-2B there. Matryoshka's new latents join its last level.

  h              the degree; q, q0: before chance is taken off, and chance
  null           h without new latents: of a second control, trained on other batches, in the span of the same new rows. An
                 upper bound of what two trainings differ by, since control and widened have the same batches
  FVU            held out, of the control and of the widened SAE
  new alive      share of the new latents that fire on held-out data
"""
import argparse, json, os, sys
from pathlib import Path
from statistics import mean

os.environ.update(TQDM_DISABLE="1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import torch

import data, matryoshka_sae, runs, topk_sae
from evaluation import metrics
from speed import machine

METHODS = {"topk": (topk_sae, []), "batchtopk": (matryoshka_sae, ["--balance", "0"]), "matryoshka": (matryoshka_sae, []),
           "balanced matryoshka": (matryoshka_sae, ["--balance", "0.75"])}
WIDTHS, SEEDS, NEW, TOKENS = (2, 8), (0, 1, 2), 64, 1_000_000

def settings(script, flags, width, seed):
    """(args, source) of a script for a width in D, as its train() makes them."""
    args = script.parse_args(["--layer", "6", "--cache-tokens", "1000000", "--tokens", str(TOKENS), "--seed", str(seed), *flags])
    source = data.open_source(args, runs.setup(args))
    args.steps, args.auxk, args.dead_after = args.tokens // args.batch_size, source.d_in // 2, args.tokens // 100
    args.warmup, args.k_start = max(1, args.steps // 10), args.k
    args.d_sae = width * source.d_in
    args.lr = script.default_lr(args.d_sae, args.steps)
    if script is matryoshka_sae:
        args.widths = sorted({args.d_sae * i // 32 for i in (1, 3, 7, 15, 32)}) if args.balance else [args.d_sae]
    return args, source

def build(script, args, D):
    return topk_sae.TopKSAE(D, args.d_sae, args.k) if script is topk_sae else matryoshka_sae.MatryoshkaSAE(D, args.d_sae, args.k)

def train(script, args, source, sae, first):
    """Trains sae for args.steps on the batches from `first` on, in place."""
    sae.train()
    opt, state = runs.adam(sae, args.lr, script.BETAS), script.init_state(args, source.device)
    for step in range(args.steps):
        script.train_step(sae, opt, source.batch(first + step), state, step, args)
        if (step + 1) % runs.CHECK_EVERY == 0:
            state["dead"] = (state["tokens_since_fired"] > args.dead_after).nonzero()[:, 0]
    return sae

def widened(script, args, sae, D, seed):
    """sae with NEW latents more, and the settings with that width; the rate stays, as the control has it."""
    args = argparse.Namespace(**vars(args) | dict(d_sae=args.d_sae + NEW))
    if hasattr(args, "widths"):
        args.widths = [*args.widths[:-1], args.d_sae]
    torch.manual_seed(seed)
    wide, old = build(script, args, D), sae.state_dict()
    with torch.no_grad():
        wide.W_enc.copy_(0.1 * wide.W_dec.T)
        for name, t in wide.state_dict().items():
            (t[:, :-NEW] if name == "W_enc" else t if name == "b_dec" else t[:-NEW]).copy_(old[name])
    return wide, args

@torch.no_grad()
def fvu(sae, x):
    """Held-out FVU, and which latents fire: for Matryoshka every second row sets the threshold."""
    if hasattr(sae, "set_threshold"):
        sae.set_threshold(x[::2])
    fires, error = False, 0.0
    for part in x[1::2].split(2048):
        z = sae.encode(part)
        fires, error = fires | (z > 0).any(0), error + (part - sae.decode(z)).pow(2).sum().item()
    return error / x[1::2].pow(2).sum().item(), fires

def measure(method, width, seed):
    script, flags = METHODS[method]
    args, source = settings(script, flags, width, seed)
    D = source.d_in
    torch.manual_seed(seed)
    start = train(script, args, source, build(script, args, D), 0)
    wide, wide_args = widened(script, args, start, D, seed)
    control, other = (build(script, args, D) for _ in range(2))
    for sae, first in ((control, args.steps), (other, 2 * args.steps)):
        sae.load_state_dict(start.state_dict())
        train(script, args, source, sae, first)
    train(script, wide_args, source, wide, args.steps)
    x, W = source.heldout(), wide.W_dec.detach()
    g = lambda: torch.Generator().manual_seed(seed)
    found = metrics.hedging_degree(W, control.W_dec.detach(), NEW, generator=g())
    null = metrics.hedging_degree(torch.cat([other.W_dec.detach(), W[-NEW:]]), control.W_dec.detach(), NEW, generator=g())
    (narrow, _), (wider, fires) = fvu(control, x), fvu(wide, x)
    return found | dict(null=null["h"], fvu=[narrow, wider], alive=fires[-NEW:].double().mean().item())

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="finished ones, a line each; they are kept")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    names = [(method, width, seed, TOKENS, NEW) for seed in SEEDS for width in WIDTHS for method in METHODS]
    found = {tuple(line["name"]): line for line in map(json.loads, args.runs.open())} if args.runs.exists() else {}
    for name in names:
        if name not in found:
            found[name] = dict(name=name) | measure(*name[:3])
            with open(args.runs, "a") as out:
                out.write(json.dumps(found[name]) + "\n")
            print(found[name], flush=True)
    lines = [f"{machine()}; smollm2, layer 6, k = 32, {TOKENS:,} tokens twice, {NEW} new latents, seeds {SEEDS}. Made by "
             "benchmarks/hedging.py.", "", "| | width | h by seed | h, mean | q | q0 | null by seed | FVU | widened | new alive |",
             "|---|--:|---|--:|--:|--:|---|--:|--:|--:|"]
    for width in WIDTHS:
        for method in METHODS:
            rows = [found[method, width, seed, TOKENS, NEW] for seed in SEEDS]
            of = lambda f: mean(map(f, rows))
            lines.append(f"| {method} | {width} D | {', '.join(format(r['h'], '.3f') for r in rows)} | {of(lambda r: r['h']):.3f} "
                         f"| {of(lambda r: r['q']):.3f} | {of(lambda r: r['q0']):.3f} | {', '.join(format(r['null'], '.3f') for r in rows)} | "
                         f"{of(lambda r: r['fvu'][0]):.4f} | {of(lambda r: r['fvu'][1]):.4f} | {of(lambda r: r['alive']):.0%} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
