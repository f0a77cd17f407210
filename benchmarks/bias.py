"""Where do ceilings on frequency recover features? A sweep of targets, widths and updates, beside TopK and L1.

    python benchmarks/bias.py --runs runs/all/bias/rows.jsonl --out benchmarks/results/bias.md     # resumable

Three toys of 128 features in 42 dimensions: Chen et al.'s uniform one ('gba': 3 active, each feature in a
share f = .0234 of the samples) and imbalanced one ('gba-imbalanced': 3 active in half of the samples, 20 in
the others, f = .09), and ours with two rates ('two-rates', .04 and .004). Every row is one setting, trained
with three seeds for weights and samples (40 to 42; defaults were chosen on 0 to 2 and smollm2) on the
features of the first, for 4000 steps of 512 samples in float32, all other flags at their defaults.

  FRR@.8, @.9   share of the true features with a latent at a cosine above .8, .9; mean (lowest seed)
  budget        sum of the target frequencies, which L0 cannot exceed if all keep to them; true L0: 3, 11.5, 2.8
  alike@.8, .9  agreement between seeds, after the paper: of the latents with the largest activations (a
                quarter of those that fire; the paper has .3 and .05 % of 66 thousand), the share with a
                latent of another seed at a cosine above .8, .9; mean over ordered pairs of seeds
  over          share of latents that fire more often on held-out data than their target, by more than
                three standard errors
  groups        where features find their best latent: mean number of its group (1 has the highest target)
                for the frequent half, for the rare half; and the share of the frequent (rare) ones that find
                it among targets above (below) .0126, the middle of the two rates
  a < 0         latents with a negative scale, whose decoder's direction is taken as sign(a) w

Agreement between the seeds of finished runs, on a language model: evaluate.py --consistency.
"""
import argparse, contextlib, importlib, io, itertools, json, os, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

os.environ.update(TQDM_DISABLE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch.nn.functional import normalize

from evaluation.metrics import alike
from sources.toy import Toy
from speed import machine

BA, GBA = "gba --groups 1 --high {}", "gba --high {} --low {}"
METHODS = {
    "gba": [
        *(BA.format(p) for p in (0.002, 0.0047, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1)),
        *(BA.format(0.03) + flags for flags in (
            " --relu", " --train-b-dec", " --relu --train-b-dec", " --gamma-up 0",
            " --bias-every 10", " --bias-every 10 --gamma-down 0.05 --gamma-up 0.05",
            " --d-sae 128", " --d-sae 256", " --d-sae 1024")),
        *(GBA.format(*pair) for pair in ((0.5, 0.001), (0.1, 0.001), (0.03, 0.001))),
        *(f"topk --k {k}" for k in (1, 3, 6, 12)), *(f"vanilla --target-l0 {l0}" for l0 in (3, 6, 12))],
    "gba-imbalanced": [
        *(BA.format(p) for p in (0.001, 0.002, 0.003, 0.006, 0.012, 0.02, 0.03, 0.05, 0.1, 0.3)),
        *(GBA.format(high, 0.001) + f" --d-sae {d}" for high in (0.5, 0.1, 0.02) for d in (128, 256, 512, 1024)),
        *(GBA.format(*pair) + " --d-sae 256" for pair in ((0.5, 0.1), (0.1, 0.01), (0.01, 0.001), (0.02, 0.0001))),
        GBA.format(0.02, 0.001) + " --d-sae 256 --groups 20",
        *(GBA.format(high, 0.001) + " --d-sae 256" + flags for high in (0.5, 0.02) for flags in (
            " --gamma-down 0.003 --gamma-up 0.003", " --gamma-down 0.1 --gamma-up 0.1", " --tokens 6144000")),
        *(f"topk --k {k} --d-sae {d}" for k in (3, 10, 20, 30, 50) for d in (128, 512)),
        *(f"vanilla --target-l0 {l0}" for l0 in (3, 11.5, 20))],
    "two-rates": [
        *(f"gba --groups {K} --high 0.05 --low 0.002 --d-sae 256" for K in (2, 4, 8)),
        "gba --groups 4 --high 0.05 --low 0.05 --d-sae 256", GBA.format(0.1, 0.001), BA.format(0.05), BA.format(0.005),
        "topk --k 3", "vanilla --target-l0 3"]}

def train(job):
    """(W_dec, largest activation of each latent, held-out metrics) of one run."""
    torch.set_num_threads(1)
    toy, (name, *flags), seed, steps = job
    m = importlib.import_module(name + "_sae")
    argv = f"--model toy --toy {toy} --d-sae 512 --batch-size 512 --no-bf16 --seed {seed} --tokens {steps * 512}"
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        sae = m.train(m.parse_args([*argv.split(), *flags, "--out", tmp + "/run"]))
        meta = json.loads(Path(tmp, "run/cfg.json").read_text())["metadata"]
    x = Toy.preset(toy).sample(16384, torch.Generator().manual_seed(1))[0]
    with torch.no_grad():
        W = sae.tensors()["W_dec"] if name == "gba" else sae.W_dec.detach()
        negative = int((sae.a < 0).sum()) if name == "gba" else 0
        return W, sae.encode(x).amax(0), dict(meta["results"], negative=negative)

def row(toy, method, runs):
    features = Toy.preset(toy).features
    cosine = [features @ run[0].T for run in runs]
    score = lambda c, t: (c.amax(1) > t).float().mean().item()
    near = [((normalize(a[0], dim=1) @ normalize(b[0], dim=1).T).amax(1), a[1]) for a, b in itertools.permutations(runs, 2)]
    agree = [mean(alike(c, peak, 0.25, t) for c, peak in near) if near else float("nan") for t in (0.8, 0.9)]
    r = {key: mean(run[2][key] for run in runs) for key in ("l0", "fvu", "dead", "negative")}
    budget = over = groups = ""
    if "groups" in runs[0][2]:
        F, K = len(runs[0][0]), len(runs[0][2]["groups"])
        target = torch.tensor([g["target"] for g in runs[0][2]["groups"]])
        group = torch.arange(F) * K // F
        budget = f"{target[group].sum():.1f}"
        over = f"{mean(g['over'] for run in runs for g in run[2]['groups']):.1%}"
        if toy.startswith("two-rates") and K > 1:
            best = torch.stack([group[c.argmax(1)] for c in cosine]).float()
            high = target[best.long()] > 0.0126
            groups = (f"{best[:, :64].mean() + 1:.1f}, {best[:, 64:].mean() + 1:.1f}; "
                      f"{high[:, :64].float().mean():.0%}, {(~high[:, 64:]).float().mean():.0%}")
    return (f"| {method} | " + " | ".join(f"{mean(s):.3f} ({min(s):.3f})" for s in (
        [score(c, t) for c in cosine] for t in (0.8, 0.9))) + f" | {r['l0']:.2f} | {budget} | {r['fvu']:.4f} | "
        f"{r['dead']:.1%} | {over} | {agree[0]:.3f} | {agree[1]:.3f} | {groups} | "
        f"{round(r['negative']) if budget else ''} |")

PAPER = ["paper: TopK, k = 20 | 1.00 | .984", "paper: TopK, k = 30 | .984 | .242", "paper: TopK, k = 50 | .945 | .234",
         "paper: GBA, full range of targets | 1.00 | 1.00", "paper: GBA, wrong range | .383 | .039"]

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[40, 41, 42], help="default 40 41 42")
    parser.add_argument("--steps", type=int, default=4000, help="of 512 samples; default 4000")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--runs", type=Path, help="finished rows, a line each: those of these steps and seeds are kept")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    args = parser.parse_args()
    head = (f"{machine()}; float32, {args.steps} steps of 512 (where --tokens does not say otherwise), seeds "
            f"{args.seeds}, 512 latents where --d-sae does not say otherwise")
    rows = {}
    if args.runs:
        args.runs.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in args.runs.open()] if args.runs.exists() else []
        rows = {(toy, method): line for *how, toy, method, line in lines if how == [args.steps, args.seeds]}
    left = [(toy, method) for toy in args.toys for method in METHODS[toy] if (toy, method) not in rows]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = pool.map(train, [(f"{toy}:{args.seeds[0]}", method.split(), seed, args.steps)
                                   for toy, method in left for seed in args.seeds])
        try:
            for toy, method in left:
                rows[toy, method] = row(f"{toy}:{args.seeds[0]}", method, [next(results) for _ in args.seeds])
                print(toy, rows[toy, method], flush=True)
                if args.runs:
                    with args.runs.open("a") as out:
                        out.write(json.dumps([args.steps, args.seeds, toy, method, rows[toy, method]]) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)           # else it trains all the others first
            raise
    lines = [head, ""]
    for toy in args.toys:
        lines += [f"**{toy}**", "", "| | FRR@.8 | FRR@.9 | L0 | budget | FVU | dead | over | alike@.8 | @.9 | groups | a < 0 |",
                  "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", *(rows[toy, method] for method in METHODS[toy])]
        lines += ["| " + line + " |" * 10 for line in PAPER if toy == "gba-imbalanced"] + [""]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))

if __name__ == "__main__":
    main()
