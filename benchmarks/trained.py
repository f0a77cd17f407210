"""What benchmarks share that compare finished runs of our scripts."""
import argparse, json, os, shutil, subprocess, sys
from pathlib import Path

from speed import machine

ROOT = Path(__file__).parents[1]

def train(folder, commands, part="0/1", made=lambda name: None):
    """Run each of {name: words of a command, a script first} into folder / name, unless that has finished; what it prints
    goes into a .log beside. One that fails stops no other; all of these are named at the end. part: as --part. made(name):
    where the same run may have finished before, or None; then it is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    first, step = map(int, part.split("/"))
    failed = []
    for name, argv in list(commands.items())[first::step]:
        if not (folder / name / "cfg.json").exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            if (before := made(name)) and (before / "cfg.json").exists():
                draft = folder / f"{name}.tmp"
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(before, draft, ignore=shutil.ignore_patterns("state*", "evaluation.json", "probes.json"))
                draft.rename(folder / name)
                continue
            with open(folder / f"{name}.log", "w") as log:
                code = subprocess.run([sys.executable, *argv, "--out", str((folder / name).absolute())], cwd=ROOT, stdout=log,
                                      stderr=subprocess.STDOUT).returncode
            print(f"{name}: {'failed; see its .log' if code else 'done'}", flush=True)
            failed += [name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")

def evaluate(folder, names, *flags):
    """{name: its evaluation.json} of evaluate.py with these flags on the finished runs among names; those that it could not
    measure are named and left out."""
    names = [name for name in names if (folder / name / "cfg.json").exists()]
    if not names:
        return {}
    found = {name: folder / name / "evaluation.json" for name in names}
    for path in found.values():
        path.unlink(missing_ok=True)
    subprocess.run([sys.executable, ROOT / "evaluate.py", *names, *flags], cwd=folder, env={**os.environ, "TQDM_DISABLE": "1"})
    if missing := [name for name, path in found.items() if not path.exists()]:
        print(f"not measured: {', '.join(missing)}", flush=True)
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}

def before(args, path):
    """What --keep keeps: the results at path, {machine: text, runs: {name: row}}."""
    return json.loads(path.read_text()) if args.keep and path.exists() else dict(machine="", runs={})

def left(args, runs, path):
    """The part of {name: ...} that is to be made; with --keep what the results at path lack, else all."""
    made = before(args, path)["runs"]
    return {name: run for name, run in runs.items() if name not in made}

def cones(row):
    """Of a row of evaluate.py --cones, the part that tables show: {kind: containment, cosine, those of controls}."""
    of = lambda c: dict(containment=c["containment"], cosine=c["cosine"])
    return {kind: of(c) | dict(controls={name: of(control) for name, control in c["controls"].items()})
            for kind, c in row["cones"].items()}

def save(data, path):
    """Write data to path as JSON, its numbers to six digits."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.6g}"))) + "\n")
    draft.replace(path)

def write(args, rows, path):
    """Write {name: row} as results to path, with --keep beside those that it has; and the machines that made them."""
    if not rows:
        print(f"nothing new was measured; {path.name} is left as it was")
        return
    old = before(args, path)
    machines = [m for m in (*old["machine"].split("; "), machine()) if m]
    save(dict(machine="; ".join(dict.fromkeys(machines)), runs=old["runs"] | rows), path)

def publish(path, lines, fig):
    """Write the lines of a table to path.md, its picture to path.png; print the lines."""
    fig.tight_layout()
    fig.savefig(path.with_suffix(".png"), dpi=120)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

def main(doc, name, keeps=False, **steps):
    """The command line of such a benchmark: a step by its name, {name: function(flags)}. keeps: it has --keep."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(steps))
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="folder of the run directories")
    if keeps:
        parser.add_argument("--keep", action="store_true", help="do not make again what benchmarks/results has")
    parser.add_argument("--part", default="0/1", help="train every second run, from the first: 0/2; the others: 1/2")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    steps[args.what](args)
