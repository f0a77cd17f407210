"""Every table of docs/, made anew by one command.

    python benchmarks/all.py --list                                   # each table, its command, its state
    python benchmarks/all.py --jobs 2 --peers PEERS/bin/python        # what is not finished, in order; resumable
    python benchmarks/all.py --keep-peers ...                         # other libraries' figures of before stay
    python benchmarks/all.py --only othello order                     # of these
    python benchmarks/all.py --again othello                          # these anew, though they are finished

PEERS is the environment of benchmarks/requirements.txt; the others run in the one of requirements.txt, by the Python
that runs this. The peers' training costs most of the time and does not depend on our code, so --keep-peers leaves
their rows as they are in compare.md and the tables of recovery. --jobs 2 runs two at a time, each on one thread;
those that time something run alone. What is finished is recorded in benchmarks/results/all.jsonl with its date and commit. Interrupted (Ctrl-C), the same command goes on:
run directories are in runs/all/NAME, and are deleted only when NAME begins anew. What a command prints is in --logs.
A command that fails, or leaves a file unwritten, does not stop the others; it is named at the end, exit code 1.

The figures in the texts of docs/ are then written by hand from these tables; `python tests/claims.py` reads
them into docs/CLAIMS.md once more.
"""
import argparse, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import runs
from speed import commit

RECORD = ROOT / "benchmarks/results/all.jsonl"
RUNS = ROOT / "runs/all"

class Entry(NamedTuple):
    name: str
    commands: list                  # one after the other
    writes: list                    # files in benchmarks/results, or from the root: docs/...
    minutes: int                    # of one core, an estimate
    peers: bool = False             # in the peers' environment
    cores: int = 1
    alone: bool = False             # it measures time

def recovery(name, flags, minutes):
    return Entry(name, [f"python benchmarks/recovery.py {flags} --out benchmarks/results/{name}.md".replace("  ", " ")],
                 [f"{name}.md"], minutes, peers=True, cores=2)

def three(name, minutes, files, peers):
    command = f"python benchmarks/{name.replace('-', '_')}.py"
    return Entry(name, [f"{command} {what} --runs runs/all/{name}" for what in ("train", "evaluate", "report")], files,
                 minutes, peers)

ENTRIES = [
    three("compare", 150, ["compare.md", "compare.png", "compare/*.json"], True),
    Entry("saelens", ["python benchmarks/saelens_check.py runs/all/compare/ours-{topk,vanilla,gated,matryoshka,ordered,gba,"
                      "batchtopk,p-annealed}-32-s0 runs/all/compare/other-{tied,gba-relu} "
                      "--out benchmarks/results/saelens.txt"], ["saelens.txt"], 5, peers=True),
    three("othello", 100, ["othello.md", "othello.json"], False),
    Entry("decisions", ["python benchmarks/decisions.py run", "python benchmarks/decisions.py report"],
          ["decisions.md", "decisions.jsonl"], 340),
    recovery("recovery", "", 60),
    recovery("recovery-fresh-seeds", "--only ours sae-lens --lrs 1e-2 --seeds 10 11 12 13 14", 15),
    recovery("lr", "--sweep", 15),
    recovery("recovery-batchtopk", "--variant batchtopk --tasks flat --lrs 3e-3 1e-2", 25),
    recovery("recovery-matryoshka", "--variant matryoshka --tasks flat --lrs 3e-3 1e-2", 25),
    recovery("recovery-ordered", "--variant ordered --tasks flat", 3),
    recovery("recovery-gba", "--variant gba --tasks flat", 4),
    recovery("recovery-vanilla", "--variant vanilla --lrs 3e-3 1e-2 --l1s 0.4 0.8 1.6", 30),
    recovery("recovery-gated", "--variant gated", 35),
    Entry("order", ["python benchmarks/order.py --out benchmarks/results/order.md"], ["order.md"], 60, cores=2),
    Entry("bias", ["python benchmarks/bias.py --runs runs/all/bias/rows.jsonl --out benchmarks/results/bias.md"], ["bias.md"], 150, cores=2),
    Entry("launches", ["python benchmarks/launches.py --out benchmarks/results/launches.md"], ["launches.md"], 2),
    Entry("rare", ["python benchmarks/rare.py --out benchmarks/results/rare.md"], ["rare.md"], 25),
    Entry("memory", ["python benchmarks/memory.py --out benchmarks/results/memory.md"], ["memory.md"], 20),
    Entry("time-to-fvu", ["python benchmarks/time_to_fvu.py --runs benchmarks/results/time-to-fvu.jsonl "
                          "--out benchmarks/results/time-to-fvu.md"], ["time-to-fvu.md", "time-to-fvu.jsonl"], 200,
          peers=True, alone=True),
    Entry("speed", ["python benchmarks/speed.py --out benchmarks/results/speed.md"], ["speed.md"], 75, peers=True, alone=True),
    Entry("stream", ["python benchmarks/stream.py --runs runs/all/stream --out benchmarks/results/stream.md"], ["stream.md"],
          60, alone=True),
    Entry("cache-tokens", ["python benchmarks/cache_tokens.py --runs runs/all/cache-tokens "
                           "--out benchmarks/results/cache-tokens.md"], ["cache-tokens.md"], 50),
    Entry("large-array", ["python benchmarks/large_array.py --out benchmarks/results/large-array.md"], ["large-array.md"], 4,
          alone=True),                                           # 20 GB in the folder of temporary files
    three("cones", 150, ["cones.md", "cones.png", "cones.json"], False),
    three("which-l0", 80, ["which-l0.md", "which-l0.png", "which-l0.json"], False),
    three("choose-l0", 170, ["choose-l0.md", "choose-l0.png", "choose-l0.json"], False),
    three("ground-truth", 360, ["ground-truth.md", "ground-truth.json"], False),
    three("steering", 200, ["steering.md", "steering.png", "steering.json"], False),
    three("reward", 80, ["reward.md", "reward.png", "reward.json"], False),
    three("explaining", 40, ["explaining.md", "explaining.png", "explaining.json"], False),
    Entry("hedging", ["python benchmarks/hedging.py --runs benchmarks/results/hedging.jsonl "
                      "--out benchmarks/results/hedging.md"], ["hedging.md", "hedging.jsonl"], 90),
    Entry("saebench", ["python benchmarks/saebench_check.py --out benchmarks/results/saebench.md"], ["saebench.md"], 2, peers=True),
    Entry("monosemanticity", ["python benchmarks/monosemanticity.py --out benchmarks/results/monosemanticity.md"],
          ["monosemanticity.md"], 5),
    Entry("run-times", ["python benchmarks/run_times.py --out benchmarks/results/run-times.md"], ["run-times.md"], 40, alone=True),
    Entry("claims", ["pytest -m claims --claims=docs/CLAIMS.md", "python tests/claims.py"], ["docs/CLAIMS.md"], 80, alone=True)]
NAMES = [entry.name for entry in ENTRIES]

# --- what is done ---------------------------------------------------------------------------------

def finished():
    """{name: its last record}"""
    return {line["name"]: line for line in map(json.loads, RECORD.open())} if RECORD.exists() else {}

def begun(entry):
    """The file that holds the commit at which an unfinished entry began."""
    return RUNS / f"{entry.name}.begun"

def files(entry):
    """{pattern: the files that it names} of what an entry writes."""
    return {pattern: list((ROOT if pattern.startswith("docs/") else RECORD.parent).glob(pattern)) for pattern in entry.writes}

def show():
    done = finished()
    for entry in ENTRIES:
        state = f"under way, begun at {begun(entry).read_text()}" if begun(entry).exists() else \
            "{date}, commit {commit}".format(**done[entry.name]) if entry.name in done else "not run"
        how = "alone" if entry.alone else "two processes" if entry.cores == 2 else "one thread"
        print(f"{entry.name}: {state}; {entry.minutes} core-minutes, {how}, {'peers' if entry.peers else 'our'} environment\n"
              f"    writes {', '.join(entry.writes)}", *(f"    {command}" for command in entry.commands), sep="\n")
    left = sum(entry.minutes for entry in ENTRIES if entry.name not in done or begun(entry).exists())
    print(f"{left} of {sum(entry.minutes for entry in ENTRIES)} core-minutes are left")

# --- running --------------------------------------------------------------------------------------

def keeping(command):
    """The command that trains ours alone and keeps the peers' rows."""
    return command + (" --only ours- other-" if "compare.py train" in command else
                      " --keep-peers" if "recovery.py" in command and "--sweep" not in command else "")

def start(entry, python, logs, one_thread):
    """The process of an entry, in its environment; anew unless it was interrupted."""
    if begun(entry).exists():
        print(f"{entry.name}: goes on, begun at commit {begun(entry).read_text()}", flush=True)
    else:
        shutil.rmtree(RUNS / entry.name, ignore_errors=True)
        RUNS.mkdir(parents=True, exist_ok=True)
        begun(entry).write_text(commit())
        print(f"{entry.name}: begins", flush=True)
    path = f"{Path(python).absolute().parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1"} if one_thread and not entry.alone else {}
    with open(logs / f"{entry.name}.log", "a") as log:
        return subprocess.Popen(["bash", "-c", " && ".join(entry.commands)], cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, **threads, "PATH": path}, start_new_session=True)

def finish(entry, code, began):
    """Record it; what is wrong with it, or ''."""
    found = files(entry)
    if code or not all(found.values()):
        return f"exit code {code}" if code else f"left unwritten: {', '.join(p for p in found if not found[p])}"
    if max(file.stat().st_mtime for there in found.values() for file in there) < began:
        return "wrote nothing"
    line = dict(name=entry.name, date=time.strftime("%Y-%m-%d"), commit=commit(), begun=begun(entry).read_text(),
                minutes=round((time.time() - began) / 60, 1))
    with open(RECORD, "a") as record:
        record.write(json.dumps(line) + "\n")
    begun(entry).unlink()
    return ""

def fits(entry, going, jobs):
    """Whether it may start beside those that are going."""
    return not going or not entry.alone and not any(other.alone for other in going) and (
        entry.cores + sum(other.cores for other in going) <= jobs)

def run(entries, jobs, pythons, logs):
    """All entries, in this order; {name: what is wrong} of those that failed."""
    waiting, going, failed = list(entries), [], {}
    try:
        while waiting or going:
            while waiting and fits(waiting[0], [entry for entry, *_ in going], jobs):
                entry = waiting.pop(0)
                began = time.time()
                going.append((entry, began, start(entry, pythons[entry.peers], logs, jobs > 1)))
            time.sleep(0.2)
            for item in [item for item in going if item[2].poll() is not None]:
                going.remove(item)
                entry, began, process = item
                if wrong := finish(entry, process.returncode, began):
                    failed[entry.name] = wrong
                print(f"{entry.name}: {wrong or 'finished'}, {(time.time() - began) / 60:.0f} minutes", flush=True)
    finally:
        for *_, process in going:                # interrupted: the scripts save their runs and stop
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return failed

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every table, its command and its state")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="these alone")
    parser.add_argument("--again", nargs="+", choices=NAMES, metavar="NAME", default=[], help="these alone, from the start")
    parser.add_argument("--jobs", type=runs.count, default=1, help="at a time, each on one thread; default 1")
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment; default: this one")
    parser.add_argument("--keep-peers", action="store_true", help="do not train the peers again in compare, recovery")
    parser.add_argument("--logs", type=Path, default=RUNS / "logs", help="folder; default runs/all/logs")
    args = parser.parse_args(argv)
    if args.list:
        return show()
    for entry in ENTRIES:
        if entry.name in args.again:
            begun(entry).unlink(missing_ok=True)
    chosen, done = [*(args.only or []), *args.again] or NAMES, finished()
    entries = [entry for entry in ENTRIES if entry.name in chosen and (
        entry.name not in done or entry.name in args.again or begun(entry).exists())]
    if args.keep_peers:
        entries = [entry._replace(commands=[keeping(command) for command in entry.commands]) for entry in entries]
    if not entries:
        print("all of these are finished: --list has dates, --again NAME makes one anew")
    if any(entry.peers for entry in entries):
        try:
            subprocess.run([args.peers, "-c", "import sae_lens"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            runs.fail(f"--peers {args.peers}: has no sae-lens; name the Python of the environment of "
                      "benchmarks/requirements.txt, or choose tables that need none of it with --only")
    args.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = run(entries, args.jobs, (sys.executable, args.peers), args.logs)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    if failed:
        raise SystemExit("\n".join(f"failed: {name}, {why}; see {args.logs / name}.log" for name, why in failed.items()))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
