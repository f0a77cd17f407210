"""Operations of one training step that launch work: on a GPU each of them is a kernel or more.

    python benchmarks/launches.py --out benchmarks/results/launches.md

Counted on the CPU with torch's profiler: operations of torch that are no views and call no other operation.
ordered_sae.py takes its prefixes in pieces of MEMORY floats, 2^24 on a CPU and 2^28 on a GPU; both are
counted. The large shape is B 16384, k 256, D 768, counted with B, D and MEMORY divided by 8, 8 and 64, which leaves
the number of pieces, and so of operations, as it is.
"""
import argparse, importlib, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch.profiler import ProfilerActivity, profile

import ordered_sae, runs
from speed import machine

NO_WORK = set("""view t transpose unbind unflatten slice select expand as_strided split split_with_sizes detach alias unsqueeze
    squeeze permute empty to lift_fresh numpy_T unsafe_split chunk empty_strided empty_like _unsafe_view reshape
    _reshape_alias new_empty new_empty_strided resize_ is_pinned _to_copy narrow result_type item _local_scalar_dense
    is_nonzero""".split())
SHAPES = {"B 2048, k 32, D 576, F 4608": (2048, 576, 4608, 32, 1),         # B, D, F, k; MEMORY is divided by the last
          "B 16384, k 256, D 768, F 6144": (2048, 96, 768, 256, 64)}
SCRIPTS = "topk", "vanilla", "gated", "matryoshka", "ordered", "gba"

def works(event):
    return event.name.startswith("aten::") and event.name[6:] not in NO_WORK

def count(script, B, D, F, k):
    """Of the second step of a script; of those without --k the dense start."""
    torch.manual_seed(0)
    m = importlib.import_module(f"{script}_sae")
    args = m.parse_args(["--d-sae", str(F), "--batch-size", str(B), "--no-bf16", "--lr", "1e-4"])
    args.steps, args.warmup, args.auxk, args.l1_warmup = 1000, 100, D // 2, 100
    if hasattr(args, "k"):
        args.k, args.k_start, args.widths = k, k, [F * i // 32 for i in (1, 3, 7, 15, 32)]
    if script == "gba":
        m.rule_defaults(args)
    cls = next(v for n, v in vars(m).items() if n.lower() == f"{script}sae")
    sae = cls(D, F, k) if hasattr(args, "k") else cls(D, F)
    opt, state, x = runs.adam(sae, args.lr, m.BETAS), m.init_state(args, "cpu"), torch.randn(B, D)
    m.train_step(sae, opt, x, state, 500, args)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        m.train_step(sae, opt, x, state, 501, args)
    return sum(works(e) and not any(map(works, e.cpu_children)) for e in prof.events())

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [machine(), "", "| | " + " | ".join(SHAPES) + " |", "|---|" + "--:|" * len(SHAPES)]
    pieces, small = ordered_sae.MEMORY, next(iter(SHAPES.values()))
    for name in SCRIPTS:
        for on in ("cpu", "cuda") if name == "ordered" else (None,):
            cells = []
            for *shape, divided in SHAPES.values() if on else [small]:
                ordered_sae.MEMORY = dict(cpu=pieces[on or "cpu"] // divided)
                cells.append(f"{count(name, *shape):,}")
            label = f"{name}, pieces of {pieces[on]:,} floats" if on else name
            lines.append(f"| {label} | " + " | ".join(cells + [""] * (len(SHAPES) - len(cells))) + " |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
