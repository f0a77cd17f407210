"""--activations on a large array: time until the first batch can be made, memory, and what each process reads.

    python benchmarks/large_array.py --out benchmarks/results/large-array.md
    python benchmarks/large_array.py --rows 2000000 --d 2304 --out large-array.md

Writes --rows rows of float16 in 20 files into --dir (20 GB by default), starts the script's source twice as one
process, and a third time as two under torchrun, and deletes the files. Each process makes the batches of three
buffers. Seconds count from the start of Python. The files may still be in the system's memory: with a disk below
that speed the first start takes as long as reading the files. Bytes are those that the process asked files for.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

import data, runs, topk_sae
from speed import machine

def write(folder, rows, d):
    """Files of `rows` / 20 rows each: 50,000 random ones again and again, rolled by one column each time."""
    rng = np.random.default_rng(0)
    base = (rng.normal(size=(50_000, d)) * 2 + rng.normal(size=d)).astype(np.float16)
    for shard in range(20):
        part = np.lib.format.open_memmap(folder / f"{shard:02d}.npy", "w+", np.float16, (rows // 20, d))
        for i in range(0, len(part), len(base)):
            part[i:i + len(base)] = np.roll(base, shard + i // len(base), axis=1)[:len(part) - i]

def serve(argv):
    """One process: open the source, make batches, say what that took."""
    args = topk_sae.parse_args(argv)
    source = data.open_source(args, runs.setup(args))
    print("ready", flush=True)
    read = lambda: int(Path("/proc/self/io").read_text().split()[1])
    before, steps = read(), 3 * source.per_epoch // source.buffers
    for step in range(steps):
        source.batch(step)
    buffers = -(-steps * source.buffers // source.per_epoch)
    every = buffers * source.per_epoch // source.buffers * args.batch_size * source.d_in * 2
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(dict(read=read() - before, every=every, peak=peak)), flush=True)

def start(processes, folder):
    """(seconds until the last process is ready, what each says) of a start with so many."""
    began, ready, said = time.perf_counter(), 0.0, []
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    argv = ["--serve", "--activations", str(folder), "--cache-dir", f"{folder}-cache"]
    with subprocess.Popen([sys.executable, *launch, __file__, *argv], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as job:
        for line in job.stdout:
            ready = time.perf_counter() - began if line == "ready\n" else ready
            said += [json.loads(line)] if line.startswith("{") else []
    return ready, said

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=tempfile.gettempdir(), help="where there is room")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as tmp:
        folder = Path(tmp, "rows")
        folder.mkdir()
        write(folder, args.rows, args.d)
        lines = [machine(), "", f"{args.rows:,} rows x {args.d}, float16, {args.rows * args.d * 2 / 1e9:.1f} GB", "",
                 "| start | processes | seconds | peak memory of one, GB | of its buffers a process read |",
                 "|---|--:|--:|--:|--:|"]
        for name, processes in ("first", 1), ("second", 1), ("third", 2):
            seconds, said = start(processes, folder)
            lines.append(f"| {name} | {processes} | {seconds:.1f} | {max(s['peak'] for s in said) / 1e9:.2f} | "
                         + ", ".join(f"{s['read'] / s['every']:.1%}" for s in said) + " |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
