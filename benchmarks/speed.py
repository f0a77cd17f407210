"""Tokens per second of a whole training step: ours beside the peers, in one run.

In the peers' environment (requirements.txt beside this file):

    python benchmarks/speed.py --out benchmarks/results/speed.md
    python benchmarks/speed.py --variants topk --shapes small       # one variant, one shape

Each library runs its own training step on the same batches, set up as peers.py says, in a process
of its own, on one thread, measured in CPU time (which other work on the machine disturbs less than
wall time). They take turns, so that a change in the machine's speed meets all of them; the figure
is the median over all turns. float32 is that of oneDNN for all, our setting on most CPUs (torch's
default is slower here); bf16 is autocast: that of ours, sae-lens and overcomplete, one put around
dictionary-learning's update; sparsify always runs so. Ours sets glibc's allocator when it starts
(runs.keep_freed_memory), and here the peers are given the same setting, but with --own-allocator.
Memory is the peak resident set during the steps above what the process held before the first one,
weights included in neither; the least of the turns.

The first rows of 'topk' have no dead latents, as the step mostly is; in the others 5 % of the
latents count as dead at every step, which puts AuxK to work (overcomplete's loop has none).

With an L1 penalty the cost of our step hangs on L0. In the rows 'trained' every library holds the
same planted solution: the features that generated the data as W_dec and W_enc, and the encoder bias
at which 32 latents fire per token; the rate is 1e-7, so that it stays there. In the rows 'dense'
nothing is planted: the random weights of each library's start, of which about half fire.

Nobody but us has 'ordered' (k not annealed, as it is after the first fifth of a run): it stands
beside our own topk_sae.py. Nor 'gba': beside our vanilla_sae.py, planted like it; its biases adapt in
every step (by nothing), where the default is every fifth here, and the share of the step that peaks,
running sums and the update take is printed (the count of firings is in every script's step).
"""
import argparse, datetime, itertools, json, os, platform, re, subprocess, sys, time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import peers, runs, sparse


SHAPES = {"small": (512, 4096, 32, 2048), "large": (768, 12288, 32, 4096)}        # D, F, k, B
PRECISIONS = {"small": ("float32", "bf16"), "large": ("bf16",)}
NAMES = ("ours", "sae-lens", "dictionary-learning", "sparsify", "overcomplete")
ROWS = [(name, {}) for name in NAMES] + [(name, {"dead": 0.05}) for name in NAMES[:4]]
K_ROWS = {"batchtopk": [(n, {}) for n in NAMES if n != "sparsify"],
          "matryoshka": [(n, {}) for n in NAMES[:3]],
          "ordered": [("ours", {"flags": ["--k-start", "32"]}), ("ours", {"as": "topk"})]}
L1_NAMES = {"vanilla": ("ours", "sae-lens", "dictionary-learning", "overcomplete"),
            "gated": ("ours", "sae-lens", "dictionary-learning")}
L1_ROWS = {v: [(name, {"planted": planted}) for planted in (True, False) for name in names]
           for v, names in L1_NAMES.items()}
STILL = ["--bias-every", "1", "--gamma-down", "1e-9", "--gamma-up", "0"]
L1_ROWS["gba"] = [("ours", {"planted": planted, **kind}) for planted in (True, False)
                  for kind in ({"flags": STILL}, {"as": "vanilla"})]
VARIANTS = ["topk", *K_ROWS, *L1_ROWS]

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024

def measure(name, variant, options, shape, precision, n, own_allocator):
    """CPU seconds of n steps after two more, and peak memory in MB; runs in a fresh process."""
    torch.set_num_threads(1)
    if name == "ours" or not own_allocator:
        runs.keep_freed_memory()
    torch.set_float32_matmul_precision("medium")
    d, F, k, B = SHAPES[shape]
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(F, d), dim=1)
    batches = [torch.nn.functional.embedding_bag(
        torch.randint(F, (B, k)), features, mode="sum", per_sample_weights=0.5 + torch.rand(B, k))
        for _ in range(4)]
    planted, variant = options.pop("planted", None), options.pop("as", variant)
    lr = None if planted is None else 1e-7
    sae = peers.make(name, variant, d, F, k, lr, 100_000, 0, B, precision == "bf16", **options)
    if planted:
        pre = batches[0][:512] @ features.T
        sae.plant(features, -pre.flatten().kthvalue(pre.numel() - 512 * 32).values)
    del features
    l0 = None if planted is None else (sae.encode(batches[0][:512]) > 0).sum().item() / 512
    before, times, update = memory("VmRSS"), [], []
    if variant == "gba":
        sae.m.track = timed(sae.m.track, update)
        for form in (sparse.Active, sparse.Dense):
            form.t_max = timed(form.t_max, update)
    for i in range(n + 2):
        start = time.process_time()
        sae.step(batches[i % 4])
        times.append(time.process_time() - start)
    return dict(times=times[2:], memory=memory("VmHWM") - before, l0=l0,
                update=sum(update[4:]) / sum(times[2:]))

def timed(function, seconds):
    def call(*args):
        start = time.process_time()
        value = function(*args)
        seconds.append(time.process_time() - start)
        return value
    return call

def in_process(script, job):
    """What `script --one JOB` gives after RESULT, from a process of its own on one thread; None if it failed."""
    run = subprocess.run([sys.executable, script, "--one", json.dumps(job)], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    answer = [line[6:] for line in run.stdout.splitlines() if line.startswith("RESULT")]
    if not answer:
        print(f"{job} failed:\n{run.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(answer[0])

def commit():
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True,
                                    cwd=Path(__file__).parent).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "..", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")

def machine():
    try:
        cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if "model name" in l)
    except (OSError, StopIteration):
        cpu = platform.processor()
    return (f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"Python {platform.python_version()}, {datetime.date.today()}, commit {commit()}")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--turns", type=int, default=2, help="turns of each library; default 2")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a turn; default 4")
    parser.add_argument("--own-allocator", action="store_true", help="the peers keep glibc's settings")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT" + json.dumps(measure(**json.loads(args.one))), flush=True)
        os._exit(0)                                         # the peers' loops wait for more batches
    head = [f"{machine()}; one thread, CPU time, median of {args.turns} turns of {args.steps} steps"
            f"{', the peers with their own allocator settings' if args.own_allocator else ''}", ""]
    lines, summary, failed = [], {}, 0
    for variant, shape in itertools.product(args.variants, args.shapes):
        for precision in PRECISIONS[shape]:
            rows = (K_ROWS | L1_ROWS).get(variant) or [r for r in ROWS if precision == "bf16" or r[0] != "sparsify"]
            results = [[] for _ in rows]
            for _ in range(args.turns):
                for (name, options), result in zip(rows, results):
                    job = dict(name=name, variant=variant, options=options, shape=shape,
                               precision=precision, n=args.steps, own_allocator=args.own_allocator)
                    answer = in_process(__file__, job)
                    result += [answer] if answer else []
                    failed += not answer
            lines += table(variant, shape, precision, rows, results, summary)
            print("\n".join(lines[-len(rows) - 5:]), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text("\n".join([*head, *shortly(summary), *lines]) + "\n")
    print("\n".join([*head, *shortly(summary)]))
    if failed:
        raise SystemExit(f"{failed} processes failed")

def shortly(summary):
    """A table of ours alone: tokens per second, and how many times those of the fastest peer."""
    cases = list(dict.fromkeys(case for row in summary.values() for case in row))
    return ["**Ours**: tokens/s (to the fastest peer; Ordered's to our TopK, GBA's to our L1)", "",
            "| | " + " | ".join(cases) + " |", "|---|" + "--:|" * len(cases),
            *(f"| {label} | " + " | ".join(row.get(case, "") for case in cases) + " |"
              for label, row in summary.items()), ""]

def table(variant, shape, precision, rows, results, summary):
    """The lines of one table; ours goes into `summary`, {label: {case: text}}."""
    d, F, k, B = SHAPES[shape]
    speed = [B / median([t for r in result for t in r["times"]]) if result else float("nan")
             for result in results]
    memory = [min(r["memory"] for r in result) if result else float("nan") for result in results]
    fastest = lambda same: max([s for (name, options), s in zip(rows, speed)
                                if (name != "ours" and options == same or "as" in options
                                    and options.get("planted") == same.get("planted"))
                                and s == s] or [float("nan")])
    lines = [f"**{variant}, {shape}**: D={d}, F={F}, k={k}, B={B}, {precision}", "",
             "| | tokens/s | to the fastest peer | peak memory, MB |", "|---|--:|--:|--:|"]
    for (name, options), result, s, m in zip(rows, results, speed, memory):
        label = name + (", AuxK at work" if "dead" in options else "")
        label += f", {options['as']}" if "as" in options else ""
        if "planted" in options and result:
            label += f", {'trained' if options['planted'] else 'dense'} (L0 {result[0]['l0']:,.0f})"
        if result and result[0]["update"]:
            label += f", of which bias update {median([r['update'] for r in result]):.1%}"
        lines.append(f"| {label} | {s:,.0f} | {s / fastest(options):.2f} x | {m:,.0f} |")
        if name == "ours" and "as" not in options:
            short = variant + re.sub(r"^ours|, of which.*| \(.*", "", label)
            summary.setdefault(short, {})[f"{shape}, {precision}"] = f"{s:,.0f} ({s / fastest(options):.2f} x)"
    return lines + [""]

if __name__ == "__main__":
    main()
