"""Seconds of CPU time until the held-out error first falls below a mark: ours and each tuned peer, on a language model.

    python benchmarks/time_to_fvu.py --out benchmarks/results/time-to-fvu.md     # resumable: finished runs are kept
    python benchmarks/time_to_fvu.py --variants topk gated --seeds 0 --tokens 2e5

In the peers' environment (requirements.txt beside this file). smollm2, layer 6, 4608 latents, batches of 2048, bf16,
peers 'tuned', all as in compare.py: the same batches, centred and scaled, our allocator setting and float32 matmul
for all. Ours goes through its own train_step with its defaults (peers.py). Each run has a process of its own, on one
thread; what counts is the CPU time of its training steps alone, neither reading batches nor evaluation. The libraries
take turns, a seed at a time, so that a change in the machine's speed meets all of them.

Some 60 times in a run FVU and L0 are measured on 8192 held-out tokens, for all libraries by the same lines; between
two such points the logarithms of FVU and L0 are taken as linear in time. BatchTopK and Matryoshka select the k B
largest codes of every 2048 of these tokens, as in training: so L0 is 32 for all, and no library's way to find a
threshold is compared.

The mark, for each variant and seed: 1.1 times the FVU with which the best peer (the one with the lowest) ends its run
of the same length. A run has reached it where its own FVU is below that and its L0 is at most 1.1 times that with
which this peer ends. Why so:
  - The mark is of a peer, so that ours is not measured by its own strength, and of the best, which is the hardest.
  - Learning rates fall to 0 at the end of a run, and the last per cents of error come with that, for everybody. A mark
    at the final error itself would be met in the last step, and would compare whole runs whatever they learn.
  - L1 and gated SAEs begin dense, with an error that is low only because thousands of latents fire: so the bound on
    L0. Peers have the coefficients of compare.py; ours is steered (--target-l0) to the L0 at which the best peer of
    the same seed ended, and runs after it. Elsewhere k is 32 for all.
A peer that never gets there has no time; its ratio is then a bound, from the time of its whole run.

Columns: seconds and tokens to the mark, medians over seeds (range); ratio: seconds over those of ours with the same
seed, median (range); whole run, final FVU, final L0: medians.
"""
import argparse, json, math, os, sys, time
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import torch

import compare, peers, runs
from speed import in_process, machine

VARIANTS = "topk", "batchtopk", "matryoshka", "vanilla", "gated"
MARGIN, POINTS, HELD_OUT = 1.1, 60, 8192

def libraries(variant):
    return [library for library, of, how in compare.PEERS.values() if (of, how) == (variant, "tuned")]

def measure(library, variant, steps, seed, target_l0):
    """[(tokens, CPU seconds, held-out FVU, L0)] along one run; in a fresh process."""
    torch.set_num_threads(1)
    source, _ = compare.open_layer(steps, seed)
    D = source.d_in
    if library == "ours":
        flags = ["--target-l0", target_l0] if target_l0 else []
        peer = peers.make("ours", variant, D, 8 * D, 32, None, steps, seed, compare.BATCH, True, flags=flags)
    else:
        peer, *_ = compare.make_peer(library, variant, "tuned", D, steps, seed)
    peer.batchwise = True
    x = source.heldout()
    x, seconds, points = x[::max(1, len(x) // HELD_OUT)][:HELD_OUT], 0.0, []
    for step in range(steps):
        batch = source.batch(step)
        start = time.process_time()
        peer.step(batch)
        seconds += time.process_time() - start
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            found = runs.heldout_metrics(peer, x)
            points.append(((step + 1) * compare.BATCH, seconds, found["fvu"], found["l0"]))
    return points

def reached(points, fvu, l0):
    """(tokens, seconds) at which FVU and L0 are first at or below these; None if they never are."""
    limits, before = {2: fvu, 3: l0}, None
    for now in points:
        if all(now[i] <= limit for i, limit in limits.items()):
            share = max([math.log(before[i] / limit) / math.log(before[i] / now[i])
                         for i, limit in limits.items() if before[i] > limit]) if before else 1
            return tuple(b + share * (n - b) for b, n in zip((before or now)[:2], now[:2]))
        before = now
    return None

def best(points):
    """The last point of the peer whose run ends with the lowest FVU."""
    return min((p[-1] for p in points.values()), key=lambda point: point[2])

def cell(values, form):
    low, high = format(min(values), form), format(max(values), form)
    return format(median(values), form) + (f" ({low} to {high})" if low != high else "")

def table(variant, curves):
    """Of a variant: curves is [{library: points}], a dict for each seed."""
    marks = []
    for of in curves:
        last = best({name: points for name, points in of.items() if name != "ours"})
        marks.append((MARGIN * last[2], MARGIN * last[3]))
    lines = [f"**{variant}**: the mark is an FVU of {cell([m[0] for m in marks], '.4f')} at an L0 of at most "
             f"{cell([m[1] for m in marks], '.1f')}", "",
             "| | seconds to the mark | tokens to the mark | ratio to ours | whole run, seconds | final FVU | final L0 |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    ours = [reached(of["ours"], *mark) for of, mark in zip(curves, marks)]
    for name in ["ours", *libraries(variant)]:
        there = [reached(of[name], *mark) for of, mark in zip(curves, marks)]
        last = [of[name][-1] for of in curves]
        cells = ["not reached" + (f" ({there.count(None)} of {len(there)} seeds)" if any(there) else ""), "", ""]
        if all(there):
            cells[:2] = cell([t[1] for t in there], ".1f"), cell([t[0] for t in there], ",.0f")
        if all(ours) and name != "ours":
            ratios = [(t or end)[1] / o[1] for t, end, o in zip(there, last, ours)]
            cells[2] = cell(ratios, ".2f") if all(there) else f"above {min(ratios):.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | " + " | ".join(
            format(median(point[i] for point in last), form) for i, form in ((1, ".1f"), (2, ".4f"), (3, ".1f"))) + " |")
    return lines + [""]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=runs.count, default=1_000_000, help="of a run; default 1e6")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-fvu.jsonl"), help="keeps the finished runs")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT" + json.dumps(measure(**json.loads(args.one))), flush=True)
        os._exit(0)                                         # the peers' loops wait for more batches
    steps, failed = args.tokens // compare.BATCH, 0
    kept = [json.loads(line) for line in args.runs.open()] if args.runs.exists() else []
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    def get(**job):
        """The points of a run, found or made; None if it failed."""
        for line in kept:
            if line["job"] == job:
                return line["points"]
        if points := in_process(__file__, job):
            kept.append(dict(job=job, points=points, machine=machine()))
            with open(args.runs, "a") as f:
                f.write(json.dumps(kept[-1]) + "\n")
            print(job, f"{points[-1][1]:.0f} s, FVU {points[-1][2]:.4f}, L0 {points[-1][3]:.1f}", flush=True)
        return points
    curves = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            job = dict(variant=variant, steps=steps, seed=seed)
            of = {name: get(library=name, target_l0=None, **job) for name in libraries(variant)}
            if all(of.values()):
                target = round(best(of)[3], 1) if variant in ("vanilla", "gated") else None
                of["ours"] = get(library="ours", target_l0=target, **job)
            if all(of.values()):
                curves[variant].append(of)
            else:
                failed += 1
    made = sorted({line["machine"] for line in kept if line["job"]["steps"] == steps})
    lines = [f"{'; '.join(made)}; one thread, CPU time, {steps} steps of {compare.BATCH}, seeds {args.seeds}, "
             f"{HELD_OUT:,} held-out tokens. Made by benchmarks/time_to_fvu.py.", ""]
    for variant, found in curves.items():
        lines += table(variant, found) if found else []
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))
    if failed:
        raise SystemExit(f"{failed} comparisons failed: they are not in the tables")

if __name__ == "__main__":
    main()
