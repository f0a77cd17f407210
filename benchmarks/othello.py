"""Which SAE is better where the true features are known: all methods on the Othello model.

    python benchmarks/othello.py train --runs runs/othello       # resumable: finished runs are kept
    python benchmarks/othello.py evaluate --runs runs/othello    # into benchmarks/results/othello.json
    python benchmarks/othello.py report                          # its tables: benchmarks/results/othello.md

--model othello, layer 6, 4M tokens in batches of 2048 (four passes), 8 D = 1536 latents: each script with
its defaults at an L0 of 32 (seeds 0, 1, 2) and 64 (seed 0), p-annealed L1 and gated among them (--p-end 0.2).
TopK also on the untrained model, and at layers 1 to 7 (L0 32), where steer.py edits boards through its latents; at layer 6 it
does so for all methods (seed 0), also along sums of SEVERAL latents.
The published figures are those of papers on models and SAEs of other sizes; only their order is compared.
"""
import json, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from othello import steer as steering
import trained
from speed import machine

RESULTS = ROOT / "benchmarks/results"

STEERED = {32: "--target-l0 32", 64: "--target-l0 64"}
K = {32: "--k 32", 64: "--k 64"}
METHODS = {                                       # name: script, flags for an L0 of 32 and 64
    "vanilla": ("vanilla", STEERED),
    "p-annealed": ("vanilla", {n: f"--p-end 0.2 {flags}" for n, flags in STEERED.items()}),
    "gated": ("gated", STEERED),
    "gated, p-annealed": ("gated", {n: f"--p-end 0.2 {flags}" for n, flags in STEERED.items()}),
    "topk": ("topk", K),
    "batchtopk": ("matryoshka", {n: f"--balance 0 {flags}" for n, flags in K.items()}),
    "matryoshka": ("matryoshka", K), "ordered": ("ordered", K),
    "gba": ("gba", {32: "--high 0.182", 64: "--high 0.33"})}
# Karvonen et al. 2024: means over runs at an L0 of 50 to 80, F = 8 D, in the result files of its code. TopK is not
# in the paper.
PUBLISHED = {"coverage": ["gated, p-annealed", "gated", "topk", "p-annealed", "vanilla"],
             "reconstruction": ["p-annealed", "gated", "topk", "vanilla", "gated, p-annealed"]}
KNOWN = "coverage", "coverage_one_t", "reconstruction"
LAYERS = 1, 2, 3, 4, 5, 6, 7
SEVERAL = 1, 2, 4, 8
DATA = "--tokens 4e6"

def command(name, script, flags, seed=0, model="othello", layer=6):
    return name, f"{script}_sae.py --model {model} --layer {layer} {flags} {DATA} --seed {seed}".split()

RUNS = dict(
    [command(f"{name.replace(', ', '-')}-{l0}-s{seed}", script, flags[l0], seed)
     for l0, seeds in ((32, (0, 1, 2)), (64, (0,))) for seed in seeds for name, (script, flags) in METHODS.items()]
    + [command(f"untrained-{l0}-s0", "topk", K[l0], model="othello-untrained") for l0 in K]
    + [command(f"layer-{layer}", "topk", K[32], layer=layer) for layer in LAYERS if layer != 6])

STEERED_RUNS = {name: f"{name.replace(', ', '-')}-32-s0" for name in METHODS}

def train(args):
    trained.train(args.runs, {name: [*argv, "--log-every", "500"] for name, argv in RUNS.items()}, args.part)

def evaluate(args):
    """evaluate.py on all finished runs; then steer: steer.py on TopK's of every layer."""
    rows = trained.evaluate(args.runs, RUNS)
    for row in rows.values():
        del row["density"], row["run"]
    write(runs=rows)
    steer(args)

def steer(args):
    of = lambda name, several: steering.steer(*steering.load(args.runs / name, steering.parse_args([name])), several)
    write(steering={name: of(name, ()) for name in map(of_layer, LAYERS) if name not in STEERED_RUNS.values()}
          | {name: of(name, SEVERAL) for name in STEERED_RUNS.values()})

def of_layer(layer):
    """TopK's run at this layer."""
    return STEERED_RUNS["topk"] if layer == 6 else f"layer-{layer}"

def write(**part):
    path = RESULTS / "othello.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | part | dict(machine=machine()), indent=1) + "\n")

def pair(values, form):
    """'0.61 to 0.63', or one number."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"

def report(args):
    found = json.loads((RESULTS / "othello.json").read_text())
    rows, steering = found["runs"], found["steering"]
    group = lambda name, l0: [r for n, r in rows.items() if n.startswith(f"{name.replace(', ', '-')}-{l0}-s")]
    get = {"L0": lambda r: r["l0"], "FVU": lambda r: r["fvu"], "gamma": lambda r: r["gamma_centred"],
           "dead": lambda r: r["dead"], "coverage": lambda r: r["boards"]["coverage"],
           "one t": lambda r: r["boards"]["coverage_one_t"], "reconstruction": lambda r: r["boards"]["reconstruction"],
           "legal": lambda r: r["boards"]["legal"]}
    forms = {"L0": ".1f", "FVU": ".4f", "gamma": ".3f", "dead": ".2%", "legal": ".2%"}
    cells = lambda found: " | ".join(pair([f(r) for r in found], forms.get(k, ".3f")) for k, f in get.items())
    of = lambda b, *names: " | ".join(format(b[k], ".3f") if k in b else "" for k in names)
    first = group("topk", 32)[0]
    about, base = first["data"], first["boards"]["baselines"]
    lines = [f"{found['machine']}; {about['model_name']} (sha256 {about['model_hash'][:8]}), layer 6, "
             f"{base['positions']:,} positions of {base['games']} held-out games; ranges are over three seeds. Made by "
             "benchmarks/othello.py; measures: othello/boards.py. Coverage times 2/3 compares with Karvonen et al.", "",
             "| | " + " | ".join(get) + " |", "|---|" + "--:|" * len(get)]
    lines += [f"| {name}, {l0} | {cells(found)} |" for l0 in (32, 64) for name in (*METHODS, "untrained")
              if (found := group(name, l0))]
    blank = " | | | |"
    for name, b in base.items():
        if isinstance(b, dict):
            title = name + (f" ({b['accuracy']:.2%} of squares right)" if "accuracy" in b else "")
            lines.append(f"| {title} |{blank} {of(b, *KNOWN)} | {b['legal']:.2%} |" if "legal" in b else
                         f"| {title} |{blank} {of(b, *KNOWN)} | |")
    untrained = group("untrained", 32)
    for name, b in untrained[0]["boards"]["baselines"].items() if untrained else ():
        if isinstance(b, dict) and "coverage" in b:
            lines.append(f"| untrained model, {name} |{blank} {of(b, *KNOWN)} | |")
    lines += ["", "**Order** at an L0 of 32 (mean of seeds) and 64, of the methods that Karvonen et al. 2024 have, "
              "best first:", ""]
    for measure, published in PUBLISHED.items():
        for l0 in (32, 64):
            mean = {n: sum(map(get[measure], g)) / len(g) for n in published if (g := group(n, l0))}
            ours = sorted(mean, key=mean.get, reverse=True)
            lines.append(f"- {measure} at {l0}: " + ", ".join(f"{n} ({mean[n]:.3f})" for n in ours))
        lines.append(f"- {measure}, published at 50 to 80: " + ", ".join(published))
    lines += ["", "**Layers** (TopK, k = 32, seed 0; the residual stream that enters the block)", "",
              "| layer | FVU | coverage | reconstruction | legal | probe | its reconstruction | neurons' coverage | "
              "reconstruction |",
              "|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for layer in LAYERS:
        r = rows[of_layer(layer)]
        b, base = r["boards"], r["boards"]["baselines"]
        neurons, = (v for k, v in base.items() if "neurons" in k)
        lines.append(f"| {layer} | {r['fvu']:.4f} | {of(b, 'coverage', 'reconstruction')} | {b['legal']:.2%} | "
                     f"{base['linear probe']['accuracy']:.2%} | {of(base['linear probe'], 'reconstruction')} | "
                     f"{of(neurons, 'coverage', 'reconstruction')} |")
    lines += ["", "**Steering** (the same runs; othello/steer.py says what is changed): "
              "one edited board a game; wrong and missing moves of the model, how many fewer than with no change "
              "(paired), and how often it has all moves of the edited board right, plus or minus a standard error", "",
              "| layer | boards | change | strength | errors | fewer | all right |", "|--:|--:|---|--:|--:|--:|--:|"]
    for layer in LAYERS:
        ways, n = steering[of_layer(layer)]
        lines += [f"| {layer} | {n} | {way} | {r['strength']:g} | {r['errors']:.2f} | {r['fewer']:.2f} \u00b1 {r['fewer_se']:.2f} | "
                  f"{r['right']:.1%} \u00b1 {r['right_se']:.1%} |" for way, r in ways.items() if way[0].isalpha()]
    columns = ["SAE latent", *(f"{n} {kind}" for kind in ("latents", "untrained") for n in SEVERAL), "probe"]
    lines += ["", "**Several latents** (layer 6, L0 32, seed 0): errors fewer than with no change, plus or minus a standard error. "
              "n latents: the nearest sum of n rows to the probe's direction; n untrained: of as many random directions", "",
              "| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{steering[run][0][way]['fewer']:.2f} \u00b1 {steering[run][0][way]['fewer_se']:.2f}"
                                         for way in columns) + " |" for name, run in STEERED_RUNS.items()]
    (RESULTS / "othello.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

if __name__ == "__main__":
    trained.main(__doc__, "othello", train=train, evaluate=evaluate, steer=steer, report=report)
