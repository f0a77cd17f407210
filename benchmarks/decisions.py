"""The settings of the training step that docs/decisions.md settles, each beside what it was compared with.

    python benchmarks/decisions.py run                       # resumable: finished runs are kept
    python benchmarks/decisions.py run --points clip eps     # those alone
                                                             # two such commands at once share the work
    python benchmarks/decisions.py report                    # benchmarks/results/decisions.md

An alternative is a few changed lines: the repository is copied, the lines are replaced in the copy, and the
script runs there by its ordinary command, on one thread. Where an alternative has several options (learning
rates, say), the best mean on the seeds of the choice, 0 to 4, is taken, and the figures are of seeds 10 and up,
on which nothing was chosen. Toys draw their features, too, with the seed. FVU, L0 and dead latents are those
that the script prints, of held-out data; MCC is the mean cosine of true features and latents, matched one to one.

Results are kept in benchmarks/results/decisions.jsonl, a line a run, with its command and changed lines.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time, zlib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import runs
from evaluation.metrics import match
from sources.toy import Toy
from speed import machine

RESULTS = ROOT / "benchmarks/results"

@dataclass
class Task:
    """One command, under several alternatives. `changes`: {alternative: [(file, old, new), ...]}; an
    alternative may have flags of its own, `flags`. `options` are tried on the seeds `choose`, by `best`."""
    name: str
    command: str                                   # {seed} stands for the seed
    changes: dict
    flags: dict = field(default_factory=dict)
    options: tuple = ("",)
    choose: tuple = (0, 1, 2)
    seeds: tuple = (10, 11, 12)
    best: str = "fvu"                              # the lowest; "mcc": the highest

    def score(self, results):
        return mean(r[self.best] for r in results) * (-1 if self.best == "mcc" else 1)

# --- the questions --------------------------------------------------------------------------------

def toy(script, name, d_sae, flags, tokens=3_072_000, batch=1024):
    return (f"{script}_sae.py --model toy --toy {name}:{{seed}} --d-sae {d_sae} {flags} --tokens {tokens} "
            f"--batch-size {batch} --seed {{seed}}")

def smollm2(script, flags, tokens=2_000_000):
    return f"{script}_sae.py --layer 6 --cache-tokens 1000000 {flags} --tokens {tokens} --seed {{seed}}"

def othello(script, flags, tokens=4_000_000):
    return f"{script}_sae.py --model othello --layer 6 {flags} --tokens {tokens} --seed {{seed}}"

def replace(script, *pairs):
    return [(f"{script}_sae.py", old, new) for old, new in pairs]

NORM = "opt.grad_scale = norm.clamp_min(1e-30)"

def clip(script):
    """What Adam divides gradients by: their norm; what clips them to sqrt(D); 1."""
    scale = lambda value: replace(script, (NORM, f"opt.grad_scale = {value}"))
    return {"norm 1": [], "at most sqrt(D)": scale("(norm / x.shape[1] ** 0.5).clamp(min=1)"),
            "as it is": scale("torch.ones_like(norm)")}

def rates(*lrs):
    return tuple(f"--lr {lr:g}" for lr in lrs)

# A start at which few latents fire: at c standard deviations of the pre-activations, as W_enc starts
def start(script, bias):
    zeros = f"self.{bias} = nn.Parameter(torch.zeros(d_sae))"
    at = lambda c: f"self.{bias} = nn.Parameter(torch.full((d_sae,), -{c} * min(1, 2 * d_in / d_sae)))"
    return {"0": [], "-1.65 std": replace(script, (zeros, at(1.65))), "-2.3 std": replace(script, (zeros, at(2.3)))}

GBA_START = {"0": [], "at its target": replace("gba", ("loss_fn = dense_loss if", "sae.b_enc.copy_(torch.special.ndtri("
             "state['target'])[state['group']]); loss_fn = dense_loss if"))}

# Ways to revive latents of the gated SAE
AFTER = "    for name, new in dict(l1=l1, last_l0=l0).items():"
RISE = "    sae.b_gate.data[state['dead']] += 10 * lr_at(step, args)\n"
RESAMPLE = """    if (step + 1) % (args.steps // 20) == 0 and step < args.steps / 2 and len(state["dead"]):
        with torch.no_grad():                                  # Bricken et al. 2023
            dead, error = state["dead"], (x - sae(x)).pow(2).sum(1)
            pick = torch.multinomial(error ** 2, len(dead), True, generator=torch.Generator().manual_seed(step))
            rows = nn.functional.normalize((x - sae.b_dec)[pick], dim=1)
            alive = torch.ones(args.d_sae, dtype=bool).index_fill(0, dead, False)
            sae.W_dec[dead] = rows
            sae.W_enc.T[dead] = 0.2 * sae.W_enc.T[alive].norm(dim=1).mean() * rows
            for p, view in zip(sae.parameters(), opt.param_groups[0]["params"]):
                for name in ("exp_avg", "exp_avg_sq") if p is not sae.b_dec else ():
                    opt.state[view][name][dead] = 0
                if p.shape == (args.d_sae,):
                    p[dead] = 0
            state["tokens_since_fired"][dead], state["dead"] = 0, dead[:0]
"""
AUXK = """    rows = state["dead"]
    if len(rows):
        e = (x - x_hat).detach()
        pre = nn.functional.linear(x - sae.b_dec.detach(), sae.W_enc.T[rows], sae.b_gate[rows])
        vals, idx = pre.topk(min(x.shape[1] // 2, len(rows)), sorted=False)
        e_hat = torch.zeros_like(pre).scatter_(1, idx, vals).relu() @ sae.W_dec[rows]
        aux = aux + x.shape[1] / 32 * (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum().clamp_min(1e-8 * len(e))
"""
PENALTY = "    penalty = sum_of_powers(opened, state[\"p\"], x)\n"
REVIVE = {"nothing": [], "bias of the dead + 10 lr a step": replace("gated", (AFTER, RISE + AFTER)),
          "resampling": replace("gated", (AFTER, RESAMPLE + AFTER)),
          "AuxK": replace("gated", (PENALTY, AUXK + PENALTY)),
          "unfrozen W_dec": replace("gated", ("active.decode(opened, sae.W_dec.detach())", "active.decode(opened, sae.W_dec)"))}

# Weights of encoder and decoder, tied or not, with a scale a for each latent where they are tied
GBA_TIES = {"tied": [], "untied": []}
TOPK_TIES = {"untied": [], "tied": replace(
    "topk", ("self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))", "self.a = nn.Parameter(torch.ones(d_sae))"),
    ("    def pre_acts(self", "    @property\n    def W_enc(self):\n        return self.W_dec.T\n\n    def pre_acts(self"),
    ("return z @ self.W_dec + self.b_dec", "return (z * self.a) @ self.W_dec + self.b_dec"),
    ("active.decode(z, W_dec)", "active.decode(z * active.lookup(sae.a), W_dec)"))}
GBA_HIGH = {"smollm2": {16: 0.018, 32: 0.04, 64: 0.088}, "othello": {16: 0.09, 32: 0.182, 64: 0.33}}

def ties():
    yield Task("smollm2, GBA, --high .052", smollm2("gba", ""), {"untied": []}, flags={"untied": "--untied --high 0.052"},
               seeds=(0, 1, 2))
    yield Task("smollm2, GBA, 8M tokens", smollm2("gba", "--untied --high 0.052", 8_000_000), {"untied": []}, seeds=(0,))
    yield Task("smollm2, TopK, 8M tokens", smollm2("topk", "", 8_000_000), {"untied": []}, seeds=(0,))
    yield Task("smollm2, TopK, 8M tokens, k 50", smollm2("topk", "--k 50", 8_000_000), {"untied": []}, seeds=(0,))
    for l0, seeds in ((32, (0, 1, 2)), (16, (0,)), (64, (0,))):
        for where, data in (("smollm2", smollm2), ("othello", othello)):
            yield Task(f"{where}, GBA, L0 {l0}", data("gba", f"--high {GBA_HIGH[where][l0]}"), GBA_TIES,
                       flags={"untied": "--untied"}, seeds=seeds)
            yield Task(f"{where}, TopK, L0 {l0}", data("topk", f"--k {l0}"), TOPK_TIES, seeds=seeds)

def beta2(script):
    return {"0.999": [], "0.99": replace(script, ("BETAS = 0.9, 0.999", "BETAS = 0.9, 0.99"))}

NARROW = "--widths 512 1536 3584 4608"

POINTS = {
    "clip": [
        Task("flat", toy("topk", "flat", 256, "--k 5"), clip("topk"), options=rates(4.6e-3, 9.2e-3, 1.8e-2), best="mcc"),
        Task("song", toy("topk", "song", 32, "--k 3"), clip("topk"), options=rates(5e-3, 1e-2, 2e-2), best="mcc"),
        Task("flat, L1", toy("vanilla", "flat", 256, "--target-l0 13"), clip("vanilla"),
             options=rates(4.6e-3, 9.2e-3, 1.8e-2), best="mcc", choose=(0,), seeds=(10, 11)),
        Task("smollm2", smollm2("topk", "", 1_000_000), clip("topk"), options=rates(1.1e-3, 2.3e-3, 4.5e-3), choose=(0,))],
    "eps": [
        Task(f"othello, {script}, L0 {l0}", othello(script, f"--p-end 0.2 --target-l0 {l0}", 2_000_000),
             {eps: replace(script, ("EPS = 1e-3 ", f"EPS = {eps} / 192 ** 0.5 ")) for eps in ("1e-4", "1e-2", "1e-1", "0.3")},
             seeds=(0, 1, 2))
        for script in ("gated", "vanilla") for l0 in (32, 64)],
    "start": [
        Task("othello, L1", othello("vanilla", "--target-l0 32"), start("vanilla", "b_enc"), seeds=(0, 1)),
        Task("othello, gated", othello("gated", "--target-l0 32"), start("gated", "b_gate"), seeds=(0, 1)),
        Task("othello, GBA", othello("gba", "--high 0.182"), GBA_START, seeds=(0, 1)),
        Task("smollm2, L1", smollm2("vanilla", "--target-l0 32"), start("vanilla", "b_enc"), seeds=(0,)),
        Task("smollm2, gated", smollm2("gated", "--target-l0 32"), start("gated", "b_gate"), seeds=(0,)),
        Task("smollm2, GBA", smollm2("gba", "--high 0.04"), GBA_START, seeds=(0,))],
    "revive": [
        Task("flat", toy("gated", "flat", 256, "--target-l0 13"), REVIVE, seeds=(0, 1, 2, 3, 4)),
        Task("flat, fresh seeds", toy("gated", "flat", 256, "--target-l0 13"), dict(list(REVIVE.items())[:2]),
             seeds=(10, 11, 12, 13, 14)),
        Task("othello, p-annealed", othello("gated", "--p-end 0.2 --target-l0 32"), REVIVE, seeds=(0,)),
        Task("othello", othello("gated", "--target-l0 32"), REVIVE, seeds=(0,))],
    "ties": list(ties()),
    "beta2": [
        Task("flat, TopK", toy("topk", "flat", 256, "--k 5"), beta2("topk"), seeds=(10, 11, 12, 13, 14)),
        Task("song, TopK", toy("topk", "song", 32, "--k 3"), beta2("topk"), seeds=(10, 11, 12, 13, 14)),
        Task("flat, BatchTopK", toy("matryoshka", "flat", 256, "--k 5 --balance 0"), beta2("matryoshka")),
        Task("flat, Matryoshka", toy("matryoshka", "flat", 256, "--k 5"), beta2("matryoshka")),
        Task("flat, Ordered", toy("ordered", "flat", 256, "--k 5"), beta2("ordered")),
        Task("flat, GBA", toy("gba", "flat", 256, "--groups 1 --high 0.03"), beta2("gba")),
        Task("flat, L1", toy("vanilla", "flat", 256, "--target-l0 13"), beta2("vanilla")),
        Task("flat, gated", toy("gated", "flat", 256, "--target-l0 13"), beta2("gated")),
        *[Task(f"smollm2, {name}", smollm2(script, flags), beta2(script), seeds=(0,)) for name, script, flags in (
            ("TopK", "topk", ""), ("BatchTopK", "matryoshka", "--balance 0"), ("Matryoshka", "matryoshka", ""),
            ("L1", "vanilla", "--target-l0 32"), ("gated", "gated", "--target-l0 32"), ("GBA", "gba", "--high 0.04"),
            ("Ordered", "ordered", ""))],
        *[Task(f"othello, TopK, L0 {k}", othello("topk", f"--k {k}"), beta2("topk"), seeds=(0,)) for k in (16, 32, 64)]],
    "widths": [
        Task("smollm2, 4608", smollm2("matryoshka", ""), {"default": [], NARROW: [], "--balance 0": []},
             flags={NARROW: NARROW, "--balance 0": "--balance 0"}, seeds=(0, 1, 2)),
        Task("smollm2, 16128", smollm2("matryoshka", "--d-sae 16128"), {"default": [], "--balance 0": []},
             flags={"--balance 0": "--balance 0"}, seeds=(0, 1, 2))],
}

# --- runs -----------------------------------------------------------------------------------------

def copy_with(changes, folder):
    """The repository's modules in `folder`, with the changed lines."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("sources/*.py"), *ROOT.glob("othello/*")]:
        if path.is_file():
            there = folder / path.relative_to(ROOT)
            there.parent.mkdir(exist_ok=True)
            shutil.copy(path, there)
    for name, old, new in changes:
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{name}: {text.count(old)} times, and not once: {old}")
        (folder / name).write_text(text.replace(old, new))

def one(command, changes):
    """Run it; what cfg.json says of its results, and MCC on a toy."""
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        copy_with(changes, tmp)
        run = subprocess.run([sys.executable, *command.split(), "--out", "run", "--save-every", "100000"], cwd=tmp,
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
        if run.returncode:
            print(f"{command}: failed\n{run.stderr[-1500:]}", file=sys.stderr, flush=True)
            return dict(failed=run.stderr.strip().splitlines()[-1][:200])
        cfg, tensors = runs.load_sae(tmp / "run")
        results = {k: v for k, v in cfg["metadata"]["results"].items() if k != "groups"}
        if "--toy" in command:
            truth = Toy.preset(cfg["metadata"]["flags"]["toy"]).features
            i, j, cosine = match(truth, tensors["W_dec"])
            results["mcc"] = cosine[i, j].mean().item()
        return results

def finished():
    """Results by (point, task, alternative, option, seed). A line keeps its command, lines and commit."""
    path = RESULTS / "decisions.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {tuple(line["name"]): line["results"] for line in lines}

def do(point, task, alternative, option, seed):
    """The results of one run: found, or made and kept; None if another process is at it."""
    name = point, task.name, alternative, option, seed
    if name in finished():
        return finished()[name]
    path = Path(tempfile.gettempdir(), "decisions", str(zlib.crc32(repr(name).encode())))
    held = runs.lock(path, "TMPDIR", wait=False)              # so that several commands share the work
    if not held or name in finished():
        return finished().get(name)
    with held:
        command = " ".join(f"{task.command} {task.flags.get(alternative, '')} {option}".format(seed=seed).split())
        began, changes = time.time(), task.changes[alternative]
        results = one(command, changes)
        line = dict(name=name, command=command, changes=changes, results=results,
                    seconds=round(time.time() - began), machine=machine())
        with open(RESULTS / "decisions.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
    print(*name, {k: round(v, 4) for k, v in results.items() if k in ("l0", "fvu", "dead", "mcc")}, flush=True)
    return results

def chosen(point, task, alternative, get):
    """The best option of an alternative, by the seeds of the choice; None if one is not there yet."""
    if len(task.options) == 1:
        return task.options[0]
    found = {option: [get(point, task, alternative, option, seed) for seed in task.choose] for option in task.options}
    good = {o: rs for o, rs in found.items() if all(r and "failed" not in r for r in rs)}
    if any(r is None for rs in found.values() for r in rs) or not good:
        return None
    return min(good, key=lambda option: task.score(good[option]))

def run(args):
    for turn in range(2):                                     # what another process was at is there by then
        for point in args.points:
            for task in POINTS[point]:
                for alternative in task.changes if args.only in task.name else ():
                    option = chosen(point, task, alternative, do)
                    for seed in task.seeds if option is not None else ():
                        do(point, task, alternative, option, seed)
        if turn == 0:
            time.sleep(1)

# --- the table ------------------------------------------------------------------------------------

def report(args):
    done = finished()
    get = lambda point, task, alternative, option, seed: done.get((point, task.name, alternative, option, seed))
    machines = dict.fromkeys(json.loads(line)["machine"].split(", commit")[0] for line in (RESULTS / "decisions.jsonl").open())
    lines = [f"{'; '.join(machines)}. Made by benchmarks/decisions.py; its docstring says what each column is.", ""]
    for point in args.points:
        lines += [f"**{point}**", "", "| task | alternative | option | seeds | MCC | FVU | L0 | dead |",
                  "|---|---|---|---|--:|--:|--:|--:|"]
        for task in POINTS[point]:
            for alternative in task.changes:
                option = chosen(point, task, alternative, get)
                found = {seed: r for seed in task.seeds if option is not None
                         and (r := get(point, task, alternative, option, seed)) and "failed" not in r}
                if rows := list(found.values()):
                    cell = lambda name, form: " ".join(format(r[name], form) for r in rows) if name in rows[0] else ""
                    lines.append(f"| {task.name} | {alternative} | {option} | {', '.join(map(str, found))} | "
                                 f"{cell('mcc', '.3f')} | {cell('fvu', '.4f')} | {cell('l0', '.1f')} | {cell('dead', '.1%')} |")
        lines.append("")
    (RESULTS / "decisions.md").write_text("\n".join(lines))
    print("\n".join(lines))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=POINTS, metavar="POINT", help=", ".join(POINTS))
    parser.add_argument("--only", default="", help="run the tasks with this in their name")
    args = parser.parse_args()
    globals()[args.what](args)

if __name__ == "__main__":
    main()
