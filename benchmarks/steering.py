"""Do the latents that correlate with a concept also steer it, and does that depend on the method? smollm2, layer 6.

    python benchmarks/steering.py train --runs runs/steering       # resumable; finished runs are kept
    python benchmarks/steering.py evaluate --runs runs/steering    # resumable; into benchmarks/results/steering.json
    python benchmarks/steering.py report                           # tables and picture: benchmarks/results/steering.{md,png}

Haque et al. 2025 (arXiv 2512.05794; read: its abstract and notes on it): in antibody language models the latents of a TopK SAE
correlate with concepts but often do not steer them, those of an Ordered SAE do. Here six methods at an L0 of 32 with the
settings of compare.py (finished runs of it beside --runs, in ../compare, are taken over), seeds 0 to 2, the twelve CONCEPTS,
and applications/steer.py with its defaults: of each run and concept the latent of the largest F1 on training contexts, against
random latents of its frequency and length, at equal price. What needs no dictionary is measured once a concept.

Stated before this table was measured, when trials on digit, comment and bracket with one run of TopK and of Ordered had been seen
(of similar effect for both): a latent steers its concept if its effect less that of the random latents, at 1 nat or the highest
price that both reach, is above 0 and its p, by sign flips over prompts, below 0.05 after Holm's correction over the concepts of
the run. The claim counts as reproduced if the share of concepts that steer is larger for
Ordered than for TopK by at least 0.2, as a mean over seeds, and by more than two standard errors of that mean; as turned round,
if that holds with the two exchanged; else as not reproduced.
"""
import json, sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import numpy as np
from scipy.stats import spearmanr

import compare, trained
from applications import steer
from evaluation import concepts
from evaluation.intervals import holm, sign_flip
from evaluation.saved import SAE, open_language_run
from speed import machine

RESULTS = ROOT / "benchmarks/results"
CONCEPTS = "digit capital comment string indent bracket newline underscore quote keyword operator letter:s".split()
METHODS = "topk", "batchtopk", "matryoshka", "ordered", "p-annealed", "gba"
SEEDS = 0, 1, 2
FLAGS = []                                            # of applications/steer.py, beside those of the data: its defaults
RUNS = compare.at_32(METHODS, SEEDS)
BEST, RANDOM = "best latent", "random latents"
OWN = "difference of means", "linear probe", "random direction"
COLUMNS = {                                           # name: value of {concept: row} of a run, format
    "F1": (lambda c: mean(r["scores"]["f1"] for r in c.values()), ".3f"),
    "steer": (lambda c: mean(steers(c).values()), ".2f"),
    "effect": (lambda c: mean(mean(r["ways"][BEST]["effect"]) for r in c.values()), "+.3f"),
    "of random latents": (lambda c: mean(mean(r["ways"][RANDOM]["effect"]) for r in c.values()), "+.3f"),
    "rank correlation of F1 and effect": (lambda c: ranks(c), "+.2f"),
    "price not reached": (lambda c: mean(not r["ways"][BEST]["reached"] for r in c.values()), ".2f"),
    "distinct": (lambda c: mean(r["ways"][BEST]["distinct"] for r in c.values()), ".2f")}

# --- measuring ------------------------------------------------------------------------------------

def train(args):
    trained.train(args.runs, RUNS, args.part, lambda name: compare.finished(args.runs, name))

def measured(e, ways, control):
    """{way: what is kept of it} at equal price; more: the effect less that of the control, by prompt, as in steer.py."""
    out = {}
    for name, outcomes in ways.items():
        end, more = e.at_price(outcomes, e.args.price), e.more(outcomes, ways[control])
        out[name] = dict(effect=[round(v, 5) for v in end.effect.tolist()], dose=end.dose, price=end.price, reached=end.reached,
                         distinct=end.distinct, more=None if more is None else [round(v, 5) for v in more.tolist()])
    return out

def evaluate(args):
    names = [name for name in RUNS if (args.runs / name / "cfg.json").exists()]
    if not names:
        raise SystemExit(f"{args.runs}: no finished runs; train first")
    path, opened, codes = args.runs / "steering.jsonl", None, {}
    done = {(line["concept"], line["run"]): line for line in map(json.loads, path.open())} if path.exists() else {}
    for concept in CONCEPTS:
        if not (left := [name for name in ["none", *names] if (concept, name) not in done]):
            continue
        flags = steer.parse_args([str(args.runs / names[0]), "--concept", concept, *compare.DATA.split(), *FLAGS])
        opened = opened or open_language_run(flags.run, flags)
        e = steer.Experiment(flags, *opened[1:])
        for name in left:
            if name == "none":                        # what needs no dictionary
                ways = {way: e.climb(e.along(v)) for way, v in e.own_controls(flags.seed).items()}
                row = dict(ways=measured(e, ways, OWN[2]),
                           rate=e.none.rate.mean().item(), ce=e.none.ce.mean().item(), share=e.train.y.double().mean().item())
            else:
                sae = SAE(args.runs / name).to(e.device)
                ranked = concepts.Ranked(sae, e.train, e.heldout, codes.get(name))
                codes[name] = ranked.codes, ranked.unseen
                i, = ranked.best(1)
                random = ranked.random(i, [i], len(e.prompts), flags.seed)
                row = dict(scores=ranked.scores(i), ways=measured(e, {
                    BEST: e.climb(e.along(ranked.row(i))), RANDOM: e.climb(e.along(random))}, RANDOM))
            done[concept, name] = dict(concept=concept, run=name, **row)
            with path.open("a") as f:
                f.write(json.dumps(done[concept, name]) + "\n")
            print(f"{concept}, {name}: done", flush=True)
    rows = {run: {c: done[c, run] for c in CONCEPTS if (c, run) in done} for run in ["none", *names]}
    trained.save(dict(machine=machine(), runs=rows), RESULTS / "steering.json")

# --- tables ---------------------------------------------------------------------------------------

def steers(of, way=BEST):
    """{concept: does it steer?} of {concept: row}, Holm over the concepts."""
    more = {c: r["ways"][way]["more"] for c, r in of.items()}
    p = dict(zip(more, holm([sign_flip(d) if d else 1.0 for d in more.values()])))
    return {c: p[c] < 0.05 and mean(more[c]) > 0 for c in more}

def ranks(of):
    """Spearman's correlation of F1 and effect over the concepts of a run."""
    both = [[r["scores"]["f1"] for r in of.values()], [mean(r["ways"][BEST]["effect"]) for r in of.values()]]
    return float(spearmanr(*both).statistic) if len(of) > 1 else float("nan")

def verdict(topk, ordered):
    """By the docstring's rule, of the shares of each seed."""
    d = np.subtract(ordered, topk)
    if len(d) < 2:
        return "too few seeds for a verdict"
    wide = abs(d.mean()) >= 0.2 and abs(d.mean()) > 2 * d.std(ddof=1) / len(d) ** 0.5
    said = "not reproduced" if not wide else "reproduced" if d.mean() > 0 else "turned round"
    return f"{said}: Ordered less TopK {d.mean():+.2f} (by seed: {', '.join(f'{v:+.2f}' for v in d)})"

def cell(values, form):
    values = [v for v in values if v == v]
    spread = f" ± {stdev(values) / len(values) ** 0.5:{form.lstrip('+')}}" if len(values) > 1 else ""
    return format(mean(values), form) + spread if values else ""

def report(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = json.loads((RESULTS / "steering.json").read_text())
    none = found["runs"].pop("none")
    rows = {name: [of for s in SEEDS if (of := found["runs"].get(f"{name}-s{s}"))] for name in METHODS}
    rows = {name: group for name, group in rows.items() if group}
    n = len(next(iter(none.values()))["ways"][OWN[0]]["effect"])
    lines = [f"{found['machine']}; smollm2, layer 6, L0 32; {sum(map(len, rows.values()))} runs, {len(none)} concepts, {n} prompts. "
             "Effects are differences of rates at a price of 1 nat a token; plus or minus a standard error over seeds. Made by "
             "benchmarks/steering.py.", "", "| | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(cell([f(of) for of in group], form) for f, form in COLUMNS.values()) + " |"
              for name, group in rows.items()]
    for way in OWN:
        share = "" if way == OWN[2] else f"{mean(steers(none, way).values()):.2f}"
        effect = mean(mean(r["ways"][way]["effect"]) for r in none.values())
        lines.append(f"| *{way}* | | {share} | {effect:+.3f} | | | | {mean(r['ways'][way]['distinct'] for r in none.values()):.2f} |")
    lines += ["", "steer: share of concepts whose best latent steers (of what needs no dictionary: against the random direction).",
              "", "**Effect by concept** (in brackets: how many of the seeds steer)", "",
              "| concept | share of tokens | unsteered rate | " + " | ".join(rows) + " | " + " | ".join(OWN) + " |",
              "|---|" + "--:|" * (2 + len(rows) + len(OWN))]
    which = {name: [steers(of) for of in group] for name, group in rows.items()}
    for c, r in none.items():
        cells = [f"{mean(mean(of[c]['ways'][BEST]['effect']) for of in group):+.3f} ({sum(w[c] for w in which[name])})"
                 for name, group in rows.items()]
        cells += [f"{mean(r['ways'][way]['effect']):+.3f}" for way in OWN]
        lines.append(f"| {c} | {r['share']:.1%} | {r['rate']:.3f} | " + " | ".join(cells) + " |")
    if {"topk", "ordered"} <= rows.keys():
        shares = [[mean(steers(found["runs"][f"{name}-s{s}"]).values()) for s in SEEDS if all(
            f"{other}-s{s}" in found["runs"] for other in ("topk", "ordered"))] for name in ("topk", "ordered")]
        lines += ["", f"The claim of Haque et al., by the rule of the docstring: {verdict(*shares)}."]
    fig, axes = plt.subplots(1, len(rows), figsize=(3 * len(rows), 3.2), sharey=True, squeeze=False)
    for ax, (name, group) in zip(axes[0], rows.items()):
        for i, (of, good) in enumerate(zip(group, which[name])):
            x, y = zip(*[(r["scores"]["f1"], mean(r["ways"][BEST]["effect"])) for r in of.values()])
            ax.scatter(x, y, s=22, color=f"C{i}", facecolors=[f"C{i}" if g else "none" for g in good.values()])
        ax.axhline(0, color="0.7", lw=0.8)
        ax.set(title=name, xlabel="F1, held out", xlim=(0, 1))
    axes[0, 0].set_ylabel("effect at equal price")
    trained.publish(RESULTS / "steering", lines, fig)

if __name__ == "__main__":
    trained.main(__doc__, "steering", train=train, evaluate=evaluate, report=report)
