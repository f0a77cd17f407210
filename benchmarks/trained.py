"""What benchmarks share that compare finished runs of our scripts."""
import shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

def train(folder, commands):
    """Run each of {name: words of a command, a script first} into folder / name, unless that has finished; what it prints
    goes into a .log beside. One that fails stops no other; all of these are named at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, argv in commands.items():
        if not (folder / name / "cfg.json").exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            with open(folder / f"{name}.log", "w") as log:
                code = subprocess.run([sys.executable, *argv, "--out", str((folder / name).absolute())], cwd=ROOT, stdout=log,
                                      stderr=subprocess.STDOUT).returncode
            print(f"{name}: {'failed; see its .log' if code else 'done'}", flush=True)
            failed += [name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
