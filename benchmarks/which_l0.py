"""Which L0? What is known of an SAE without the truth, beside what it knows of letters and tokens, over k.

    python benchmarks/which_l0.py train --runs runs/which-l0       # resumable: finished runs are kept
    python benchmarks/which_l0.py evaluate --runs runs/which-l0    # into benchmarks/results/which-l0.json
    python benchmarks/which_l0.py report                           # its table and picture: benchmarks/results/which-l0.{md,png}

Chanin and Garriga-Alonso 2025 ('Sparse but wrong', arXiv 2508.16560): with a wrong L0 latents mix features, c_dec and s_n
(evaluation/metrics.py) are lowest at the right one, and k-sparse probing peaks there. Here TopK with its defaults on smollm2,
layer 6, 2M tokens, 8 D latents, k = 4 ... 256, seeds 0 to 2; probing and absorption: evaluation/probing.py, first_letter.py.

Stated before any of it was seen:
    absorption    falls from k = 8 to 128 at each doubling of k, as a mean over seeds
    peak          probing with one latent is highest inside the range, and c_dec is lowest within a factor of 2 of there, each in
                  most seeds
"""
import json, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import trained
from evaluation.tables import number

RESULTS = ROOT / "benchmarks/results"
K, SEEDS = (4, 8, 16, 32, 64, 128, 256), (0, 1, 2)
RUNS = {f"{k}-s{seed}": f"topk_sae.py --layer 6 --cache-tokens 1000000 --k {k} --seed {seed} --log-every 500".split()
        for seed in SEEDS for k in K}
COLUMNS = {                                          # name: value of a row, format, which end the claim is about
    "FVU": (lambda r: r["fvu"], ".4f", min), "c_dec": (lambda r: r["c_dec"], ".4f", min),
    "s_n": (lambda r: r["s_n"], ".3f", min), "dead": (lambda r: r["dead"], ".2%", None),
    "probing, k = 1": (lambda r: r["probing"]["1"]["accuracy"], ".3f", max),
    "k = 5": (lambda r: r["probing"]["5"]["accuracy"], ".3f", max),
    "all": (lambda r: r["probing"]["all"]["accuracy"], ".3f", max),
    "letters, F1 of the first latent": (lambda r: r["first_letter"]["f1_first"], ".3f", max),
    "absorption": (lambda r: r["first_letter"]["absorption"], ".3f", None),
    "full": (lambda r: r["first_letter"]["full"], ".3f", None),
    "by attribution": (lambda r: r["first_letter"]["attribution"], ".3f", None),
    "as in SAEBench": (lambda r: r["first_letter"]["absorption_raw"], ".3f", None),
    "absorption, untrained": (lambda r: r["first_letter"]["controls"]["untrained"]["absorption"], ".3f", None)}

def train(args):
    trained.train(args.runs, trained.left(args, RUNS, RESULTS / "which-l0.json"), args.part)

def evaluate(args):
    rows = trained.evaluate(args.runs, trained.left(args, RUNS, RESULTS / "which-l0.json"), "--probes", "--contexts", "0")
    kept = {name: {key: row[key] for key in ("l0", "fvu", "c_dec", "s_n", "dead")} | {
        kind: {k: v for k, v in row[kind].items() if k not in ("letters", "latents", "classes")}
        for kind in ("first_letter", "probing")} for name, row in rows.items()}
    trained.write(args, kept, RESULTS / "which-l0.json")

def report(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = json.loads((RESULTS / "which-l0.json").read_text())
    values = {name: {k: v for k in K if (v := {s: f(found["runs"][run]) for s in SEEDS if (run := f"{k}-s{s}") in found["runs"]})}
              for name, (f, *_) in COLUMNS.items()}              # {column: {k: {seed: value, or None where there is none}}}
    lines = [f"{found['machine']}; {len(found['runs'])} runs of topk_sae.py on smollm2, layer 6; means over seeds (largest less "
             "smallest). Made by benchmarks/which_l0.py.", "", "| k | " + " | ".join(COLUMNS) + " |", "|--:|" + "--:|" * len(COLUMNS)]
    def cell(by, form):
        by = [v for v in by.values() if v is not None]
        spread = f" ({number(max(by) - min(by), form)})" if len(by) > 1 else ""
        return number(sum(by) / len(by), form) + spread if by else number(None)
    for k in next(iter(values.values())):
        lines.append(f"| {k} | " + " | ".join(cell(values[name][k], form) for name, (_, form, _) in COLUMNS.items()) + " |")
    seeds = [s for s in SEEDS if sum(f"{k}-s{s}" in found["runs"] for k in K) > 2]     # of one run nothing is lowest
    ends = []
    for name, (_, _, end) in COLUMNS.items():
        if end:
            at = []
            for s in seeds:
                by = {k: of[s] for k, of in values[name].items() if of.get(s) is not None}
                if by:
                    best = end(by, key=by.get)
                    at.append(f"{best}{' (at the edge)' if best in (min(by), max(by)) else ''}")
            ends.append(f"{name}: {'lowest' if end is min else 'highest'} at k = {', '.join(at)}")
    lines += ["", f"By seed, {', '.join(map(str, seeds))}: " + "; ".join(ends) + "."]
    fig, axes = plt.subplots(2, 4, figsize=(15, 6.5))
    for ax, name in zip(axes.flat, [n for n, (*_, end) in COLUMNS.items() if end] + ["absorption"]):
        for i, s in enumerate(SEEDS):
            by = {k: of[s] for k, of in values[name].items() if of.get(s) is not None}
            ax.plot(by.keys(), by.values(), "o-", lw=0.8, ms=4, color=f"C{i}", label=f"seed {s}")
        ax.set(xscale="log", xlabel="k", title=name)
        ax.set_xticks(K, K)
        ax.minorticks_off()
    axes.flat[0].legend(fontsize=7)
    trained.publish(RESULTS / "which-l0", lines, fig)

if __name__ == "__main__":
    trained.main(__doc__, "which-l0", keeps=True, train=train, evaluate=evaluate, report=report)
