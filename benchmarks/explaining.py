"""Do experiments explain latents better than reading does, and does that depend on the method? smollm2, layer 6.

    python benchmarks/explaining.py train --runs runs/explaining       # resumable; finished runs are kept
    python benchmarks/explaining.py evaluate --runs runs/explaining    # resumable; into benchmarks/results/explaining.json
    python benchmarks/explaining.py report                             # tables and picture: benchmarks/results/explaining.{md,png}

SAGE (arXiv 2511.20820; read: its code and notes on it, not the text) says that experiments explain latents better than passive
reading of exemplars. Here six methods at an L0 of 32 with the settings of compare.py (finished runs of it beside --runs, in
../compare, are taken over), seeds 0 to 2, LATENTS latents of each run over all firing rates, and applications/explain.py with its
defaults, the search in the place of a language model.

Stated before any of it was measured: the claim counts as reproduced if the mean over latents of r (over all held-out tokens) of
the active form is larger than that of the passive one by at least 0.02, and its p by sign flips over latents is below 0.05 after
Holm's correction over the six methods, for each of at least four methods; as turned round, if that holds with the two
exchanged; else as not reproduced. The same rule tells active from 'reading', which takes the program of
the best score on as many random tokens as the active one has read or run: is it the choice of experiments, or only their number?
"""
import json, os, sys, time
from pathlib import Path

os.environ.update(TQDM_DISABLE="1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import numpy as np

import compare, trained
from applications import explain
from evaluation.experiments import open_lab
from evaluation.intervals import bootstrap, holm, sign_flip
from evaluation.probes import without_nan
from evaluation.saved import SAE, open_language_run
from speed import machine

RESULTS = ROOT / "benchmarks/results"
METHODS = "topk", "batchtopk", "matryoshka", "ordered", "p-annealed", "gba"
SEEDS, LATENTS = (0, 1, 2), 34                        # about 100 of each method
RUNS = compare.at_32(METHODS, SEEDS)
LEAST, ENOUGH = 0.02, 4                               # of the rule above

# --- measuring ------------------------------------------------------------------------------------

def train(args):
    trained.train(args.runs, RUNS, args.part, lambda name: compare.finished(args.runs, name))

def kept(f):
    """What the tables need of one latent; the transcript is left out."""
    return dict(latent=f["latent"], rate=f["rate"], read=f["read"], run=f["run"], rounds=len(f["rounds"]),
                confirmed=any(h["verdict"] == "confirmed" and not h["control"] for r in f["rounds"] for h in r["hypotheses"]),
                ways={name: {k: w[k] for k in ("program", *explain.FIGURES)} for name, w in f["ways"].items()})

def evaluate(args):
    names = [name for name in RUNS if (args.runs / name / "cfg.json").exists()]
    if not names:
        raise SystemExit(f"{args.runs}: no finished runs; train first")
    path, lab, mind = args.runs / "explaining.jsonl", None, explain.Search()
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    done = {(line["run_name"], line["latent"]): line for line in lines}
    for name in names:
        if sum(run == name for run, _ in done) >= LATENTS:
            continue                                          # its codes need not be computed again
        flags = explain.parse_args([str(args.runs / name), *compare.DATA.split()])
        opened = (None,) if lab else open_language_run(flags.run, flags)
        lab = lab or open_lab(*opened[1:])
        run = explain.Run(lab, SAE(flags.run).to(flags.torch_device))
        for i in run.chosen(LATENTS):
            if (name, i) not in done:
                began = time.process_time()
                row = dict(kept(run.explained(i, mind, flags.rounds, flags.seed)), run_name=name)
                done[name, i] = without_nan(dict(row, seconds=time.process_time() - began))
                with path.open("a") as f:
                    f.write(json.dumps(done[name, i]) + "\n")
        print(f"{name}: {sum(run == name for run, _ in done)} latents", flush=True)
    rows = {name: [row for (run, _), row in done.items() if run == name] for name in names}
    trained.save(dict(machine=machine(), runs=rows), RESULTS / "explaining.json")

# --- tables ---------------------------------------------------------------------------------------

def of(rows, way, figure="r"):
    return np.array([row["ways"][way][figure] for row in rows], float)

def verdict(rows, against):
    """By the docstring's rule, of {method: its latents}; active against another way."""
    more = {name: of(group, "active") - of(group, against) for name, group in rows.items()}
    p = dict(zip(more, holm([sign_flip(d) for d in more.values()])))
    wide = {name: p[name] < 0.05 and abs(d.mean()) >= LEAST for name, d in more.items()}
    up, down = (sum(wide[name] and sign * d.mean() > 0 for name, d in more.items()) for sign in (1, -1))
    said = "reproduced" if up >= ENOUGH else "turned round" if down >= ENOUGH else "not reproduced"
    return f"{said}: " + ", ".join(f"{name} {d.mean():+.3f} (p {p[name]:.4f})" for name, d in more.items())

def cell(values):
    low, high = bootstrap(values[~np.isnan(values)])
    return f"{np.nanmean(values):.3f} [{low:.3f}, {high:.3f}]" if (~np.isnan(values)).any() else ""

def report(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = json.loads((RESULTS / "explaining.json").read_text())
    rows = {name: [row for s in SEEDS for row in found["runs"].get(f"{name}-s{s}", [])] for name in METHODS}
    rows = {name: group for name, group in rows.items() if group}
    everything = [row for group in rows.values() for row in group]
    lines = [f"{found['machine']}; smollm2, layer 6, L0 32; {len(found['runs'])} runs, {len(everything)} latents, "
             f"{np.mean([row['seconds'] for row in everything]):.1f} CPU seconds a latent, {np.mean([row['read'] for row in everything]):.0f} "
             f"tokens read and {np.mean([row['run'] for row in everything]):.0f} texts run. Means over latents, 95 % intervals "
             "by the bootstrap over latents. Made by benchmarks/explaining.py.", ""]
    for figure, title in zip(explain.FIGURES, ("r over all held-out tokens", "AUC", "r over ten exemplars, SAGE's form",
                                               "share of written texts that reach half of the mean peak")):
        lines += [f"**{title}**", "", "| | " + " | ".join(explain.WAYS) + " |", "|---|" + "--:|" * len(explain.WAYS)]
        lines += [f"| {name} | " + " | ".join(cell(of(group, way, figure)) for way in explain.WAYS) + " |"
                  for name, group in [*rows.items(), ("all", everything)]] + [""]
    thirds = np.quantile([row["rate"] for row in everything], (1 / 3, 2 / 3))
    lines += ["**r by firing rate, all methods**", "", "| | " + " | ".join(explain.WAYS) + " |", "|---|" + "--:|" * len(explain.WAYS)]
    for k, name in enumerate((f"below {thirds[0]:.2%}", "between", f"above {thirds[1]:.2%}")):
        part = [row for row in everything if np.searchsorted(thirds, row["rate"]) == k]
        lines.append(f"| {name} | " + " | ".join(cell(of(part, way)) for way in explain.WAYS if part) + " |")
    lines += ["", f"Experiments against reading the exemplars, by the rule of the docstring: {verdict(rows, 'passive')}.", "",
              f"Against reading as many random tokens: {verdict(rows, 'reading')}."]
    fig, axes = plt.subplots(1, len(rows), figsize=(3 * len(rows), 3.2), sharey=True, squeeze=False)
    for ax, (name, group) in zip(axes[0], rows.items()):
        ax.scatter(of(group, "passive"), of(group, "active"), s=8, alpha=0.5)
        ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        ax.set(title=name, xlabel="r, passive", xlim=(-0.05, 1), ylim=(-0.05, 1))
    axes[0, 0].set_ylabel("r, active")
    trained.publish(RESULTS / "explaining", lines, fig)

if __name__ == "__main__":
    trained.main(__doc__, "explaining", train=train, evaluate=evaluate, report=report)
