"""Peak memory of one training step of each variant, in bytes per entry of B F and of F D.

    python benchmarks/memory.py                                 # 2 minutes; writes benchmarks/results/memory.md
    python benchmarks/memory.py --variants gated --precisions bf16 --out gated.md

A run needs 32 F D bytes for weights (8), gradients (8) and Adam's moments (16), and its step what is measured
here on top of them: a B F + b F D bytes, or 4 F D (ordered: 12) if that is more. It is the peak of the resident
set during the script's own train_step, less the resident set before it and less the gradients, which are freed
between steps. Where b is negative the peak comes before the gradients are there; 4 F D is needed once they are.
Each case runs in a process of its own, on one thread, after a first step that makes the moments; glibc is told
to give freed buffers back at once, so that none hides another.

F is 8 D and 128 k, so what the step holds of [B, D] and of active entries counts in a. a and b are fitted to
B = 4 D and B = 8 D; the last column says what is missing from the formula, or too much in it, at B = 2 D, as a
share of all the memory that the run needs there.

'trained': k latents fire per token. 'dense': the random start, where half of them fire, in 8 blocks of tokens, as
train_step has them where B is at least 4096 and B F at least 2^26. Both as in speed.py.
p < 1: the last phase of --p-end 0.2. '5 % dead': of the latents, which puts AuxK to work. Ordered holds the
prefixes in pieces of 8 F D bytes here; it takes larger ones, 64 MB on a CPU and 1 GB on a GPU, if that is more.
"""
import argparse, ctypes, multiprocessing, sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch._dynamo      # torch.optim does so, in every child

import peers
from speed import machine, memory

D, K = 384, 24
F, BATCHES = 8 * D, (2 * D, 4 * D, 8 * D)
P = ["--p-end", "0.2"]
PENALISED = {f"{name}, {start}{power}": (name, dict(planted=start == "trained", flags=flags))
             for name in ("vanilla", "gated") for power, flags in (("", []), (", p < 1", P))
             for start in ("trained", "dense")}
CASES = {"topk": ("topk", {}), "topk, 5 % dead": ("topk", dict(dead=0.05)),
         "topk, 85 % dead": ("topk", dict(dead=0.85)), "batchtopk": ("batchtopk", {}),
         "matryoshka": ("matryoshka", {}), "ordered": ("ordered", {}), **PENALISED,
         "gba, trained": ("gba", dict(planted=True)), "gba, dense": ("gba", dict(planted=False))}
EXAMPLE = 16384, 131072, 4096                      # B, F, D

def measure(variant, B, bf16, planted=None, flags=(), dead=0):
    """Peak bytes of a step above weights, gradients and moments; for a process of its own."""
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(F, D), dim=1)
    x = torch.nn.functional.embedding_bag(torch.randint(F, (B, K)), features, mode="sum",
                                          per_sample_weights=0.5 + torch.rand(B, K))
    sae = peers.make("ours", variant, D, F, K, 1e-7, 100_000, 0, B, bf16, flags=flags)
    if planted:
        pre = x[:512] @ features.T
        sae.plant(features, -pre.flatten().kthvalue(pre.numel() - 512 * K).values)
        del pre
    if dead:
        sae.state["dead"], sae.forced = torch.randperm(F)[:int(dead * F)].sort().values, True
    if variant == "ordered":
        sae.m.MEMORY = dict(cpu=0)
    del features
    sae.i = 90_000                                 # of 100,000: nothing is annealed any more
    sae.step(x)
    if planted is False:
        sae.state["blocks"] = 8                    # until the next check
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    sae.step(x)
    return (memory("VmHWM") - before) * 2 ** 20 - sum(p.numel() * 4 for p in sae.sae.parameters())

def in_child(*case, **options):
    """What measure returns, from a process of its own; nan, after its traceback, if it fails."""
    context = multiprocessing.get_context("fork")  # spares each of them the imports
    out, into = context.Pipe(False)
    child = context.Process(target=lambda: into.send(measure(*case, **options)))
    child.start()
    child.join()
    return out.recv() if child.exitcode == 0 else float("nan")

def row(name, precision):
    variant, options = CASES[name]
    peak = {B: in_child(variant, B, precision == "bf16", **options) for B in BATCHES}
    low, B, top = BATCHES
    a = (peak[top] - peak[B]) / (top - B) / F
    b = (peak[B] - a * B * F) / (F * D)
    needed = lambda B, F, D: max(a * B * F + b * F * D, (12 if name == "ordered" else 4) * F * D)
    missing = (peak[low] - needed(low, F, D)) / (32 * F * D + peak[low])
    return (f"| {name} | {precision} | {a:.1f} B F {'-' if b < 0 else '+'} {abs(b):.1f} F D | "
            f"{peak[B] / B / F:.1f} | {needed(*EXAMPLE) / 1e9:.0f} | {missing:+.0%} |")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(CASES), help="those whose names start so; default all")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/memory.md")
    args = parser.parse_args()
    names = [name for name in CASES if name.startswith(tuple(args.variants))]
    if not names or not Path("/proc/self/clear_refs").exists():
        parser.error(f"--variants: none of {', '.join(CASES)}" if not names else "needs Linux, and its /proc")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2 ** 16), libc.mallopt(-1, 2 ** 16)       # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    B, n, d = EXAMPLE
    lines = [f"{machine()}; F = {F}, D = {D}, k = {K}, B = {', '.join(map(str, BATCHES))}", "",
             f"Beside 32 F D bytes for weights, gradients and moments, at B {B}, F {n}, D {d} {32 * n * d / 1e9:.0f} "
             "GB, a step needs:", "", f"| | | bytes | per entry of B F, at B = 4 D | GB, at B {B}, F {n}, D {d} | "
             "missing at B = 2 D |", "|---|---|--:|--:|--:|--:|"]
    print("\n".join(lines), flush=True)
    for name, precision in product(names, args.precisions):
        lines.append(row(name, precision))
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")
    sys.exit("nan" in "".join(lines))

if __name__ == "__main__":
    main()
