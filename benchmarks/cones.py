"""Is there a sweet spot in sparsity and expansion, where few latents contain most of a known property's direction?

    python benchmarks/cones.py train --runs runs/cones       # resumable: finished runs are kept
    python benchmarks/cones.py evaluate --runs runs/cones    # into benchmarks/results/cones.json
    python benchmarks/cones.py report                        # its tables and picture: benchmarks/results/cones.{md,png}

Rocchi, Fel and Franchi 2025 (arXiv 2512.07355) report one in both; their measures and figures could not be had. Ours:
evaluation/cones.py, on --model othello, layer 6, with 188 directions of the board. TopK with its defaults, 2M tokens in
batches of 2048, k = 4 ... 128 active of F = 2 D ... 32 D latents, seeds 0 and 1. Containment grows with F by chance: as
many random directions stand beside it, and the table has what is above them. A highest value inside the range tried counts as
told from its edge if the lowest seed there is above the highest of every setting on the edge.
"""
import json, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import trained

RESULTS = ROOT / "benchmarks/results"
K, EXPANSIONS, SEEDS, D, M = (4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32), (0, 1), 192, 4
RUNS = {f"{k}-{e}-s{seed}": f"topk_sae.py --model othello --layer 6 --k {k} --d-sae {e * D} --tokens 2e6 --seed {seed}".split()
        for seed in SEEDS for k in K for e in EXPANSIONS}
KINDS = "board probes", "board means"
SHOWN = {"containment at m = 4": lambda c: c["containment"][M - 1],
         "above random directions": lambda c: c["containment"][M - 1] - c["controls"]["random"]["containment"][M - 1],
         "cosine one to one": lambda c: c["cosine"]}

def train(args):
    left = trained.left(args, RUNS, RESULTS / "cones.json")
    trained.train(args.runs, {name: [*argv, "--log-every", "500"] for name, argv in left.items()}, args.part)

def evaluate(args):
    rows = trained.evaluate(args.runs, trained.left(args, RUNS, RESULTS / "cones.json"), "--cones", "--contexts", "0")
    rows = {name: dict(fvu=row["fvu"], dead=row["dead"], coverage=row["boards"]["coverage"], cones=trained.cones(row),
                       monosemanticity=row["monosemanticity"]) for name, row in rows.items()}
    trained.write(args, rows, RESULTS / "cones.json")

def report(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = json.loads((RESULTS / "cones.json").read_text())
    values = lambda k, e, f: [f(found["runs"][name]) for s in SEEDS if (name := f"{k}-{e}-s{s}") in found["runs"]]
    def cell(k, e, f):
        low, high = (format(g(values(k, e, f)), ".3f") for g in (min, max))
        return low if low == high else f"{low} to {high}"
    panels = {f"{kind}: {name}": lambda r, kind=kind, f=f: f(r["cones"][kind]) for kind in KINDS for name, f in SHOWN.items()}
    panels |= {"coverage of board properties (F1)": lambda r: r["coverage"],
               "monosemanticity above a random dictionary": lambda r: r["monosemanticity"]["mean_10"]
               - r["monosemanticity"]["random"]["mean_10"]}
    lines = [f"{found['machine']}; {len(found['runs'])} TopK runs on --model othello, layer 6; ranges over seeds "
             f"{', '.join(map(str, SEEDS))}. Made by benchmarks/cones.py"]
    fig, axes = plt.subplots(2, 4, figsize=(15, 6.5))
    order = [0, 1, 2, 6, 3, 4, 5, 7]                          # of the panels, by rows of the picture
    for ax, (title, f) in zip(axes.flat, [list(panels.items())[i] for i in order]):
        mean = [[sum(v) / len(v) if (v := values(k, e, f)) else float("nan") for e in EXPANSIONS] for k in K]
        ax.imshow(mean, aspect="auto", cmap="viridis")
        ax.set_xticks(range(len(EXPANSIONS)), [f"{e} D" for e in EXPANSIONS])
        ax.set_yticks(range(len(K)), K)
        ax.set(title=title, xlabel="F", ylabel="k")
        ax.title.set_fontsize(9)
        for i, row in enumerate(mean):
            for j, v in enumerate(row):
                ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="white", bbox=dict(
                    facecolor="black", alpha=0.35, linewidth=0, pad=1))
        best, k, e = max((v, k, e) for k, row in zip(K, mean) for e, v in zip(EXPANSIONS, row) if v == v)
        tried = [(k, e) for k in K for e in EXPANSIONS if values(k, e, f)]
        ends = [{end(side) for end in (min, max)} for side in zip(*tried)]
        edge = lambda k, e: k in ends[0] or e in ends[1]
        outside = [v for k in K for e in EXPANSIONS if edge(k, e) for v in values(k, e, f)]
        where = "on the edge of the range tried" if edge(k, e) else "inside the range tried" if min(values(k, e, f)) > max(
            outside) else "inside the range tried, but not told from its edge"
        lines += ["", f"**{title[0].upper() + title[1:]}**: highest, {best:.3f}, at k = {k}, F = {e} D, {where}", "",
                  "| | " + " | ".join(f"F = {e} D" for e in EXPANSIONS) + " |", "|---|" + "--:|" * len(EXPANSIONS)]
        lines += [f"| k = {k} | " + " | ".join(cell(k, e, f) if values(k, e, f) else "" for e in EXPANSIONS) + " |" for k in K]
    trained.publish(RESULTS / "cones", lines, fig)

if __name__ == "__main__":
    trained.main(__doc__, "cones", keeps=True, train=train, evaluate=evaluate, report=report)
