"""What gives latents an order, and what makes them the same from seed to seed? Toy A of the Ordered SAE.

    python benchmarks/order.py --out benchmarks/results/order.md

Wang et al. 2025 (2512.02194), 'zipf' here: 100 features in 80 dimensions, exactly 5 active in each
sample, drawn in proportion to j^-1.2. Every method trains with F = 100 and k = 5 on the same features,
with ten seeds for weights and samples (10 to 19; settings were chosen on 0 to 4), for 2000 steps of 512
in float32, and is otherwise as its script's defaults say; nothing is tuned per method. The first
rows are the paper's methods, with TopK; then the Ordered SAE with one thing changed at a time: the
annealing of k, the law of the prefixes, the share of the full width, unit sweeping. The fair baseline
of its rows is TopK with the same annealing of k, which is the full width alone in its loss; the fair
Matryoshka is that with the 'groups' law alone, since matryoshka_sae.py selects over the batch, and in
this toy every sample has the same number of features. Annealing k from 40 over a fifth of the run makes
1.7 times as many latents active, on average over the run; nothing here is matched by cost.

  stability        mean signed cosine of true features and latents, matched one to one (std over seeds)
  between seeds    the same for the latents of two seeds, over all pairs of seeds
  order            Spearman correlation of a feature's rank by frequency and the index of the latent that
                   it is matched with (std over seeds); between seeds: of the indices of matched latents
  first 10, 25     the order among the first 10 or 25 latents only
  start            mean cosine of the first and of the last quarter of the latents with where they began
"""
import argparse, contextlib, importlib, io, itertools, json, os, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev

os.environ.update(TQDM_DISABLE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from sources.toy import Toy
from speed import machine

TOY = "zipf:10"
METHODS = {
    "L1": ("vanilla", "--target-l0 5"),
    "TopK": ("topk", "--k 5"),
    "BatchTopK": ("matryoshka", "--k 5 --balance 0"),
    "Matryoshka (BatchTopK, five levels)": ("matryoshka", "--k 5"),
    "Matryoshka, random levels": ("matryoshka", "--k 5 --random-widths"),
    "Matryoshka, k from 40": ("matryoshka", "--k 5 --k-start 40"),
    "Matryoshka, random levels, k from 40": ("matryoshka", "--k 5 --random-widths --k-start 40"),
    "TopK, k from 40": ("ordered", "--k 5 --full-share 1"),
    "TopK, k from 100": ("ordered", "--k 5 --full-share 1 --k-start 100"),
    "TopK, k from 40 over half of the run": ("ordered", "--k 5 --full-share 1 --k-anneal 0.5"),
    "TopK, five levels": ("ordered", "--k 5 --prefix-law groups --full-share 0 --k-start 5"),
    "TopK, five levels, k from 40": ("ordered", "--k 5 --prefix-law groups --full-share 0"),
    "**Ordered** (k from 40, uniform law, full share .5)": ("ordered", "--k 5"),
    "Ordered, k not annealed": ("ordered", "--k 5 --k-start 5"),
    "Ordered, k from F = 100": ("ordered", "--k 5 --k-start 100"),
    "Ordered, k from 40 over half of the run": ("ordered", "--k 5 --k-anneal 0.5"),
    "Ordered, law zipf": ("ordered", "--k 5 --prefix-law zipf"),
    "Ordered, law zipf, full share 0": ("ordered", "--k 5 --prefix-law zipf --full-share 0"),
    "Ordered, law groups": ("ordered", "--k 5 --prefix-law groups"),
    "Ordered, full share 0": ("ordered", "--k 5 --full-share 0"),
    "Ordered, full share .25": ("ordered", "--k 5 --full-share 0.25"),
    "Ordered, sweep from half of the run on": ("ordered", "--k 5 --sweep 0.5"),
    "Ordered, k from 100, full share 0, sweep": (
        "ordered", "--k 5 --k-start 100 --full-share 0 --sweep 0.5")}

def matched(a, b):
    """Of rows a and b: mean matched cosine; Spearman correlation of the matched indices, all, and those
    of the first 10 and the first 25 rows of b."""
    cosine = (normalize(a, dim=1) @ normalize(b, dim=1).T).numpy()
    i, j = linear_sum_assignment(-cosine)
    orders = [float(spearmanr(i[j < n], j[j < n]).statistic) for n in (len(b), 10, 25)]
    return float(cosine[i, j].mean()), *orders

def train(job):
    """(W_dec at the end, at the start, held-out metrics) of one run."""
    torch.set_num_threads(1)
    (script, flags), seed, steps = job
    m = importlib.import_module(script + "_sae")
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        sae = m.train(m.parse_args(f"--model toy --toy {TOY} --d-sae 100 --batch-size 512 --no-bf16 --tokens "
                                   f"{steps * 512} --seed {seed} --out {tmp}/run {flags}".split()))
        results = json.loads(Path(tmp, "run/cfg.json").read_text())["metadata"]["results"]
    torch.manual_seed(seed)
    start = torch.nn.functional.normalize(torch.randn(100, 80), dim=1)     # as the classes begin
    return sae.W_dec.detach(), start, results

def row(name, runs, truth):
    stability, order, first10, first25 = zip(*(matched(truth, W) for W, *_ in runs))
    agree, same, *_ = zip(*(matched(a[0], b[0]) for a, b in itertools.combinations(runs, 2)))
    start = [mean((W[part] * W0[part]).sum(1).mean().item() for W, W0, _ in runs)
             for part in (slice(25), slice(75, 100))]
    r = {key: mean(run[2][key] for run in runs) for key in ("l0", "fvu", "dead")}
    return (f"| {name} | {mean(stability):.3f} ({stdev(stability):.3f}) | {mean(agree):.3f} | "
            f"{mean(order):.3f} ({stdev(order):.3f}) | {mean(same):.3f} | {mean(first10):.2f} | "
            f"{mean(first25):.2f} | {r['l0']:.2f} | {r['fvu']:.4f} | {r['dead']:.1%} | "
            f"{start[0]:.2f}, {start[1]:.2f} |")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10, 20)),
                        help="two or more; default 10 to 19")
    parser.add_argument("--steps", type=int, default=2000, help="of 512 samples; default 2000")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    truth = Toy.preset(TOY).features
    lines = [f"{machine()}; float32, {args.steps} steps of 512, seeds {args.seeds}", "",
             "| | stability | between seeds | order | between seeds | first 10 | first 25 | L0 | FVU | dead | "
             "start |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    with ProcessPoolExecutor(args.jobs) as pool:
        for name, method in METHODS.items():
            jobs = [(method, seed, args.steps) for seed in args.seeds]
            lines.append(row(name, list(pool.map(train, jobs)), truth))
            print(lines[-1], flush=True)
    lines += ["| paper: vanilla | .479 (.010) | .572 | .016 (.13) | | | | | | | |",
              "| paper: fixed Matryoshka | .502 | .538 | .119 (.67) | | | | | | | |",
              "| paper: random Matryoshka | .480 | .531 | .054 | | | | | | | |",
              "| paper: OSAE | .814 (.020) | .664 | .734 (.076) | | | | | | | |"]
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
