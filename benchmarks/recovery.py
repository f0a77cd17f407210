"""Which libraries find the true features? Ours beside the peers, on toy models, over three seeds.

    python benchmarks/recovery.py --out benchmarks/results/recovery.md     # the peers' environment
    python benchmarks/recovery.py --sweep --out benchmarks/results/lr.md   # our rule for --lr
    python benchmarks/recovery.py --variant vanilla --lrs 3e-3 1e-2 --l1s 0.4 0.8 1.6 \\
        --out benchmarks/results/recovery-vanilla.md
    python benchmarks/recovery.py --variant gated --out benchmarks/results/recovery-gated.md
    python benchmarks/recovery.py --variant batchtopk --tasks flat --lrs 3e-3 1e-2 \\
        --out benchmarks/results/recovery-batchtopk.md                # and matryoshka, ordered, gba

The data: 'flat' (256 features in 64 dimensions, about 5 active, F = 256, k = 5) and 'song' (Song et
al. 2025: 32 features in 16 dimensions, exactly 3 active, F = 32, k = 3), 3000 steps of 1024 fresh
samples, centred and scaled for all alike as data.py does, in float32. Ours runs through its own
train_step with its default learning rate and AuxK; each peer through its own training step, set up
as peers.py says, at its default rate and at those of LRS, of which the best mean is kept.
dictionary-learning and sae-lens also run with a latent called dead after 30,000 tokens, as ours
does, since by default they would call one dead late (1000 steps) or never (10M tokens).

With an L1 penalty (--variant vanilla, gated; 'flat' alone) sparsity is not set but swept: each peer
runs at every rate of --lrs with every coefficient of --l1s on the first seed, and its two best
settings on the other seeds; the better mean is kept. Ours then runs told by --target-l0 to end at
the L0 of each peer's best, at its default rate and at the best of the same rates on the first seed.

--keep-peers runs ours alone: the peers' rows stay those of the table at --out, since their steps
do not depend on our code.

MCC is the mean signed cosine of true and learned features under the best one-to-one matching;
chance is that of random directions. L0, FVU and dead latents are of 65,536 held-out samples; with a
threshold (BatchTopK, Matryoshka) each library uses the one that it saves, and ours is set on half of them.
"""
import argparse, contextlib, io, json, os, sys, types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from scipy.optimize import linear_sum_assignment

import peers, runs
from sources.toy import ToySource
from speed import in_process, machine

TASKS = {"flat": (64, 256, 5), "song": (16, 32, 3)}                              # D, F, k
STEPS, BATCH, SEEDS = 3000, 1024, (0, 1, 2)
LRS = (None, 3e-3, 1e-2)
L1_LRS, L1S = (1e-3, 3e-3, 1e-2), (0.4, 0.8, 1.6, 2.4, 3.6)
EARLY = {"dead_after": STEPS * BATCH // 100}
ROWS = [("ours", {}), ("sae-lens", {}), ("dictionary-learning", {}), ("sparsify", {}),
        ("overcomplete", {}), ("sae-lens", EARLY), ("dictionary-learning", EARLY)]

def measure(name, options, task, lr, seed, variant="topk"):
    """Train and score one run; in a fresh process."""
    torch.set_num_threads(1)
    d, F, k = TASKS[task]
    args = types.SimpleNamespace(toy=f"{task}:{seed}", seed=seed, batch_size=BATCH)
    source = ToySource(args, torch.device("cpu"))
    unit = lambda W: torch.nn.functional.normalize(W.float(), dim=1)
    def mcc(W):
        cosine = (unit(source.truth.features) @ unit(W).T).nan_to_num().numpy()
        matched = cosine[linear_sum_assignment(-cosine)]
        return float(matched.mean()), float((matched > 0.95).mean())
    sae = peers.make(name, variant, d, F, k, lr, STEPS, seed, BATCH, False, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        for step in range(STEPS):
            sae.step(source.batch(step))
    score, above = mcc(sae.decoder())
    x = source.heldout()
    if name == "ours" and hasattr(sae.sae, "set_threshold"):
        sae.sae.set_threshold(x[::2])
        x = x[1::2]
    metrics = runs.heldout_metrics(sae, x)
    chance = mcc(torch.randn(F, d, generator=torch.Generator().manual_seed(seed + 100)))[0]
    return dict(mcc=score, above=above, chance=chance, **metrics)

DONE, KEEP = {}, None               # the peers' finished runs, by job, and the file of --runs
FAILED = []                         # jobs

def run_all(jobs):
    """Results of the jobs, each in a process of its own, two at a time."""
    def one(job):
        key = json.dumps(job, sort_keys=True)
        if key in DONE:
            return DONE[key]
        answer = in_process(__file__, job)
        if not answer:
            FAILED.append(job)
            return None
        print(job, answer, flush=True)
        if KEEP and job["name"] != "ours":
            with open(KEEP, "a") as f:
                f.write(json.dumps([key, answer]) + "\n")
        return answer
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, jobs))

def line(label, lr, results):
    if not results:
        return f"| {label} | {lr} | failed | | | | | |"
    mean = lambda key: sum(r[key] for r in results) / len(results)
    scores = " ".join(f"{r['mcc']:.3f}" for r in results)
    return (f"| {label} | {lr} | {mean('mcc'):.4f} | {scores} | {mean('above'):.3f} | "
            f"{mean('l0'):.2f} | {mean('fvu'):.4f} | {max(r['dead'] for r in results):.1%} |")

KEPT = {}                           # --keep-peers: the peers' rows, by the last word of their section's title

def keep(path):
    """Fill KEPT from a table; returns the first line that says on what machine it was made."""
    lines = path.read_text().splitlines()
    for line in lines:
        if line.startswith("**"):
            section = KEPT.setdefault(line.split("**")[1].split()[-1], [])
        elif line.startswith(tuple(f"| {name}" for name in peers.LIBRARIES if name != "ours")):
            section.append(line)
    return next(line for line in lines if ", commit " in line).split(";")[0]

HEAD = ["| | lr | MCC, mean | MCC by seed | share > .95 | L0 | FVU | dead, worst |",
        "|---|--:|--:|---|--:|--:|--:|--:|"]

def compare(variant, only, tasks, lrs, seeds):
    rows = [row for row in ROWS if row[0] in only and row[0] in peers.VARIANTS[variant]]
    if variant == "gba":                      # whose one group has a target just above the frequency, 5 / 256
        rows.append(("ours", {"flags": ["--groups", "1", "--high", "0.03"]}))
    jobs = [dict(name=name, options=options, task=task, lr=lr, seed=seed, variant=variant)
            for task in tasks for name, options in rows
            for lr in (lrs if name != "ours" else (None,)) for seed in seeds]
    results = run_all(jobs)
    lines = []
    for task, (d, F, k) in [(task, TASKS[task]) for task in tasks]:
        lines += [f"**{variant}, {task}**: D={d}, F={F}, k={k}", "", *HEAD]
        table = []
        for name, options in rows:
            best = None
            for lr in (None, *(lr for lr in lrs if lr)):
                got = [r for j, r in zip(jobs, results) if r and j["lr"] == lr and
                       (j["task"], j["name"], j["options"]) == (task, name, options)]
                if got and (best is None or score(got) > score(best[1])):
                    best = lr, got
            if best:
                label = name + (", dead after 30k tokens" if options == EARLY else "")
                label += ", " + " ".join(options["flags"]) if "flags" in options else ""
                table.append((score(best[1]), line(label, best[0] or "default", best[1])))
        table += [(float(row.split("|")[3]), row) for row in KEPT.get(task, [])]
        chance = [r["chance"] for j, r in zip(jobs, results) if r and j["task"] == task]
        lines += [row for _, row in sorted(table, reverse=True)]
        lines += [f"| random directions | | {sum(chance) / len(chance):.4f} | | | | | |", ""]
    return lines

def score(results):
    return sum(r["mcc"] for r in results) / len(results)

def matched(variant, seeds, lrs, l1s):
    """Peers over their coefficients and rates; ours at the L0 of each one's best."""
    job = lambda name, options, lr, seed: dict(name=name, options=options, task="flat", lr=lr,
                                               seed=seed, variant=variant)
    if KEPT:
        best = [(row, float(row.split("|")[6])) for row in KEPT["flat"]]
    else:
        names = [name for name in peers.VARIANTS[variant] if name != "ours"]
        first = [job(name, {"l1": l1}, lr, seeds[0]) for name in names for lr in lrs for l1 in l1s]
        tried = [(j, r) for j, r in zip(first, run_all(first)) if r]
        best = [best_of([t for t in tried if t[0]["name"] == name], seeds) for name in names]
    lines = [f"**{variant}, flat**: D=64, F=256", "", *HEAD]
    for row, l0 in best:
        ours = lambda lr, seed: job("ours", {"flags": ["--target-l0", round(l0, 2)]}, lr, seed)
        at_default = run_all([ours(None, s) for s in seeds])
        trial = run_all([ours(lr, seeds[0]) for lr in lrs])
        i = max(range(len(lrs)), key=lambda i: trial[i]["mcc"])
        more = run_all([ours(lrs[i], s) for s in seeds[1:]])
        lines += [row, line("ours at that L0", "default", at_default),
                  line("ours at that L0", lrs[i], [trial[i], *more])]
    chance = score([dict(mcc=r["chance"]) for r in at_default])
    return lines + [f"| random directions | | {chance:.4f} | | | | | |", ""]

def best_of(tried, seeds):
    """(line, L0) of a peer's best setting: of its two best on the first seed the better on all."""
    best = sorted(tried, key=lambda t: -t[1]["mcc"])[:2]
    found = [(j, [r, *run_all([dict(j, seed=seed) for seed in seeds[1:]])]) for j, r in best]
    j, results = max(found, key=lambda f: score(f[1]))
    return (line(f"{j['name']}, l1 {j['options']['l1']:g}", j["lr"] or "default", results),
            sum(r["l0"] for r in results) / len(seeds))

def sweep(seeds):
    """Our learning rate rule against fixed rates."""
    rates = (1e-3, 1.6e-3, 3e-3, 5e-3, None, 1.5e-2, 2e-2)
    jobs = [dict(name="ours", options={}, task=task, lr=lr, seed=seed)
            for task in TASKS for lr in rates for seed in seeds]
    results, lines = run_all(jobs), []
    for task in TASKS:
        lines += [f"**{task}**", "", *HEAD]
        for lr in rates:
            got = [r for j, r in zip(jobs, results) if r and (j["task"], j["lr"]) == (task, lr)]
            lines.append(line("ours", lr or "default_lr", got))
        lines.append("")
    return lines

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="topk", choices=["topk", "batchtopk", "matryoshka",
                                                              "ordered", "gba", "vanilla", "gated"])
    parser.add_argument("--sweep", action="store_true", help="our learning rates, no peers")
    parser.add_argument("--only", nargs="+", default=[r[0] for r in ROWS], help="these libraries")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--lrs", nargs="+", type=float, help="of the peers; default LRS or L1_LRS")
    parser.add_argument("--l1s", nargs="+", type=float, default=L1S, help="of the peers")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default 0 1 2")
    parser.add_argument("--runs", type=Path, help="keeps the peers' finished runs: not run again")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    parser.add_argument("--keep-peers", action="store_true", help="the peers' rows stay those of --out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT" + json.dumps(measure(**json.loads(args.one))), flush=True)
        os._exit(0)
    if args.runs:
        global KEEP
        KEEP = args.runs
        DONE.update(map(json.loads, open(KEEP)) if KEEP.exists() else ())
    lines = [f"{machine()}; float32, {STEPS} steps of {BATCH}, seeds {args.seeds}", ""]
    if args.keep_peers:
        lines[0] += f". The peers' rows: {keep(args.out)}"
        args.only = ["ours"]
    if args.variant in ("vanilla", "gated"):
        lines += matched(args.variant, args.seeds, args.lrs or L1_LRS, args.l1s)
    elif args.sweep:
        lines += sweep(args.seeds)
    else:
        lines += compare(args.variant, args.only, args.tasks, args.lrs or LRS, args.seeds)
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")
    if FAILED:
        raise SystemExit(f"{len(FAILED)} runs failed")

if __name__ == "__main__":
    main()
