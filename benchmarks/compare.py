"""All six beside the peers on one language model: the same activations, tokens and width, one evaluation.

    python benchmarks/compare.py train --runs runs/compare              # resumable: finished runs are kept
    python benchmarks/compare.py train --runs runs/compare --only topk  # those with 'topk' in their name
    python benchmarks/compare.py evaluate --runs runs/compare           # evaluate.py on all of them
    python benchmarks/compare.py report --runs runs/compare             # tables, frontier and raw figures

smollm2, layer 6, 1M tokens harvested, 2M trained on in batches of 2048, 8 D = 4608 latents. Ours: each script with its
defaults at an L0 of 16, 32 and 64 (seeds 0, 1, 2 at 32; BatchTopK and p-annealed L1: seed 0 alone, the latter at
32), and the settings of OTHER, seed 0. Peers (SAELens 6.54.12, dictionary-learning 0.1.0, eai-sparsify 1.3.3), seed 0, at about 32: each library's own
training step on the very batches that ours see, already centred and scaled, in bf16. 'tuned': with our learning
rate (2.3e-3), warm-up (97 steps) and decay (linear, over the last fifth; sparsify's own decays from the start),
and our rule, dead after 1 % of the tokens, with AuxK where a library has it. 'default', for TopK: each library's
own, of which none is made for so short a run. L1 coefficients (below) were chosen for an L0 between 16 and 64,
where ours can be compared. dictionary-learning collects its BatchTopK threshold from step 488 on: its default,
step 1000, is after the last. Peers need benchmarks/requirements.txt.
"""
import argparse, json, os, shutil, subprocess, sys, time
from pathlib import Path

os.environ.update(TQDM_DISABLE="1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import numpy as np
import torch
from safetensors.torch import save_file

import data, peers, runs, topk_sae
from evaluation import tables
from evaluation.saved import SAE
from speed import machine

RESULTS = ROOT / "benchmarks/results/compare"
BATCH = 2048

DATA = "--layer 6 --cache-tokens 1000000"
STEERED = {16: "--target-l0 16", 32: "--target-l0 32", 64: "--target-l0 64"}
K = {16: "--k 16", 32: "--k 32", 64: "--k 64"}
METHODS = {                                       # name: script, flags for an L0 of 16, 32 and 64
    "topk": ("topk", K), "vanilla": ("vanilla", STEERED), "gated": ("gated", STEERED),
    "matryoshka": ("matryoshka", K), "ordered": ("ordered", K),
    "gba": ("gba", {16: "--high 0.018", 32: "--high 0.04", 64: "--high 0.088"}),
    "batchtopk": ("matryoshka", {n: f"--balance 0 {flags}" for n, flags in K.items()}),
    "p-annealed": ("vanilla", {n: f"--p-end 0.2 {flags}" for n, flags in STEERED.items()})}
OURS = {f"ours-{name}-{l0}-s{seed}": f"{script}_sae.py {DATA} {flags[l0]} --seed {seed}"
        for l0, seeds in ((32, (0, 1, 2)), (16, (0,)), (64, (0,)))
        for seed in seeds for name, (script, flags) in METHODS.items()
        if name not in ("batchtopk", "p-annealed") or (seed, l0) == (0, 32) or (name, seed) == ("batchtopk", 0)}
OTHER = {f"other-{name}": f"{command} {DATA} --seed 0" for name, command in {    # settings beside those above
    "tied": "vanilla_sae.py --target-l0 32 --tied", "vanilla-72": "vanilla_sae.py --target-l0 72",
    "ordered-k-start-32": "ordered_sae.py --k-start 32", "ordered-k-anneal-0.5": "ordered_sae.py --k-anneal 0.5",
    "gba-default": "gba_sae.py", "gba-one-group": "gba_sae.py --high 0.0135 --groups 1",
    "gba-relu": "gba_sae.py --relu --high 0.04",
    "gba-8M": "gba_sae.py --high 0.04 --tokens 8e6", "topk-8M": "topk_sae.py --tokens 8e6"}.items()}
COMMANDS = OURS | OTHER

def at_32(methods, seeds):
    """{METHOD-sSEED: words of a command} of other benchmarks of ours at an L0 of 32, with these settings."""
    return {f"{name}-s{seed}": f"{METHODS[name][0]}_sae.py {DATA} {METHODS[name][1][32]} --seed {seed} --log-every 500".split()
            for name in methods for seed in seeds}

def finished(folder, name):
    """Where a benchmark beside this folder has the run that at_32 calls so, finished; None if nowhere."""
    at = name.replace("-s", "-32-s")
    same = f"compare/ours-{at}", f"ground-truth/6-{at}", *(f"{other}/{name}" for other in ("steering", "explaining", "reward"))
    return next((path for path in map(folder.parent.joinpath, same) if (path / "cfg.json").exists()), None)

K_VARIANTS = "topk", "batchtopk", "matryoshka"
L1 = {("sae-lens", "vanilla"): 1.0, ("dictionary-learning", "vanilla"): 1.8,
      ("sae-lens", "gated"): 1.2, ("dictionary-learning", "gated"): 8.0}
PEERS = {f"{library}-{variant}-{how}": (library, variant, how)
         for how in ("tuned", "default")
         for variant in ("topk", "vanilla", "gated", "batchtopk", "matryoshka")
         for library in ("sae-lens", "dictionary-learning", "sparsify")
         if (library != "sparsify" or variant == "topk")
         and (how == "tuned" or variant == "topk")}

def tensors_of(library, variant, peer):
    """(architecture, tensors, extra cfg) of a trained peer, in SAELens' layout, for scaled inputs."""
    if library == "sae-lens":
        tensors = dict(peer.sae.state_dict())
        peer.sae.process_state_dict_for_saving_inference(tensors)
        cfg = peer.sae.cfg.get_inference_sae_cfg_dict()
        extra = {n: cfg[n] for n in ("k", "rescale_acts_by_decoder_norm") if n in cfg}
        return cfg["architecture"], tensors, extra
    if library == "sparsify":
        sae = peer.sae
        return "topk", dict(W_enc=sae.encoder.weight.T, b_enc=sae.encoder.bias, W_dec=peer.decoder(),
                            b_dec=sae.b_dec), dict(k=32, rescale_acts_by_decoder_norm=False)
    ae = peer.trainer.ae
    if variant == "matryoshka":
        t = dict(W_enc=ae.W_enc, b_enc=ae.b_enc, W_dec=ae.W_dec, b_dec=ae.b_dec)
    else:
        b_dec = ae.b_dec if hasattr(ae, "b_dec") else ae.decoder_bias if variant == "gated" else ae.bias
        t = dict(W_enc=ae.encoder.weight.T, W_dec=ae.decoder.weight.T, b_dec=b_dec)
        t |= dict(b_gate=ae.gate_bias, b_mag=ae.mag_bias, r_mag=ae.r_mag) if variant == "gated" else \
            dict(b_enc=ae.encoder.bias)
    if variant == "topk":
        return "topk", t, dict(k=32, rescale_acts_by_decoder_norm=False)
    if variant in K_VARIANTS:
        return "jumprelu", t | dict(threshold=ae.threshold.expand(len(t["b_enc"]))), {}
    return "gated" if variant == "gated" else "standard", t, {}

def open_layer(steps, seed):
    """smollm2, layer 6, in the batches that ours see, with our settings of the machine; and its flags."""
    args = data.ArgumentParser(__doc__).parse_args(["--model", "smollm2", *DATA.split()])
    names = list(vars(args))
    vars(args).update(batch_size=BATCH, seed=seed, tokens=steps * BATCH)
    runs.keep_freed_memory()
    torch.set_float32_matmul_precision("medium")
    source = data.open_source(args, torch.device("cpu"))
    return source, {name: value for name, value in runs.flags(args).items() if name in names}

def make_peer(library, variant, how, D, steps, seed):
    """(peer, its rate, its options), as the docstring says."""
    F = 8 * D
    options = dict(l1=L1[library, variant]) if variant not in K_VARIANTS else {}
    if how == "tuned":
        options.update(ours=True, dead_after=steps * BATCH // 100)
    lr = topk_sae.default_lr(F, steps) if how == "tuned" else None
    if library == "sparsify" and how == "default":
        options["optimizer"] = "signum"
    peer = peers.make(library, variant, D, F, 32, lr, steps, seed, BATCH, True, **options)
    if library == "dictionary-learning" and variant in ("batchtopk", "matryoshka"):
        peer.trainer.threshold_start_step = steps // 2
    return peer, lr, options

def train_peer(name, out, steps=976, seed=0):
    """Train one peer and write its run directory."""
    library, variant, how = PEERS[name]
    source, flags = open_layer(steps, seed)
    D, F, B = source.d_in, 8 * source.d_in, BATCH
    peer, lr, options = make_peer(library, variant, how, D, steps, seed)
    began = time.perf_counter()
    for step in range(steps):
        peer.step(source.batch(step))
        if (step + 1) % 100 == 0:
            x = source.batch(step)
            z, x_hat = peer.encode(x), peer.reconstruct(x)
            print(f"{name} step {step + 1} l0 {(z != 0).sum() / B:.1f} "
                  f"fvu {(x - x_hat).pow(2).sum() / x.pow(2).sum():.4f} "
                  f"{(step + 1) * B / (time.perf_counter() - began):,.0f} tok/s", flush=True)
    architecture, tensors, extra = tensors_of(library, variant, peer)
    x = source.heldout()[:256]
    want = peer.encode(x) / source.scale
    tensors = {n: t.detach().float().contiguous() for n, t in runs.fold(tensors, source).items()}
    cfg = dict(extra, architecture=architecture, d_in=D, d_sae=F, dtype="float32", device="cpu",
               apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
               metadata=dict(source.meta, sae_lens_version="6.54.12", flags=flags,
                             training_architecture=f"{library} {variant}", peer=dict(
                   library=library, variant=variant, how=how, lr=lr, steps=steps, batch=B, **options)))
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(tensors, tmp / "sae_weights.safetensors")
    (tmp / "cfg.json").write_text(json.dumps(cfg, indent=1))
    written = SAE(tmp)
    with torch.no_grad():
        z = written.encode(x / source.scale + source.mean)
    differ = (z - want).norm() / want.norm()
    print(f"saved codes differ from the library's by {differ:.1e} (relative), held-out L0 "
          f"{(z != 0).sum() / len(z):.1f}", flush=True)
    assert differ < 0.01, "the layout is wrong"
    os.replace(tmp, out)

def train(args):
    failed = []
    for name in [*PEERS, *COMMANDS]:
        out = args.runs / name
        if not any(part in name for part in args.only or [""]) or (out / "cfg.json").exists():
            continue
        print(name, flush=True)
        command = COMMANDS[name].split() + ["--out", str(out), "--log-every", "200"] if name in COMMANDS else \
            [__file__, "train", "--runs", str(args.runs), "--one", name]
        shutil.rmtree(out, ignore_errors=True)
        args.runs.mkdir(parents=True, exist_ok=True)
        with open(args.runs / f"{name}.log", "w") as log:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            failed.append(name)
            print(f"{name} failed; see {args.runs / name}.log", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")

def evaluate(args):
    """evaluate.py on all finished runs, in one go."""
    names = [n for n in [*COMMANDS, *PEERS] if (args.runs / n / "cfg.json").exists()]
    subprocess.run([sys.executable, ROOT / "evaluate.py", *names, "--consistency", *DATA.split()], cwd=args.runs, check=True)

def at_l0(rows, l0, value):
    """value of our runs at this L0: between neighbours, its logarithm is linear in that of L0."""
    if not rows:
        return float("nan")
    points = sorted((row["l0"], value(row)) for row in rows)
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    inside = x[0] - 0.02 <= np.log(l0) <= x[-1] + 0.02
    return float(np.exp(np.interp(np.log(l0), x, y))) if inside else float("nan")

def method(name):
    """'p-annealed' of 'ours-p-annealed-32-s0'; of a peer 'sae-lens topk'."""
    return " ".join(PEERS[name][:2]) if name in PEERS else name[len("ours-"):].rsplit("-", 2)[0]

def report(args):
    """compare.md, compare.png, and the evaluation.json of every run, into RESULTS. A peer without a run
    keeps its row: its training step does not depend on our code."""
    found = {n: args.runs / n / "evaluation.json" for n in [*COMMANDS, *PEERS]}
    kept = {n: path for n in PEERS if not found[n].exists() and (path := RESULTS / f"{n}.json").exists()}
    rows = {n: json.loads(path.read_text()) | dict(run=n) for n, path in (found | kept).items() if path.exists()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, row in rows.items():
        (RESULTS / f"{name}.json").write_text(json.dumps(row) + "\n")
    first = next(iter(rows.values()))
    about, c = first["data"], first["language"]
    lines = [f"{machine()}; {about['model_name']} (sha256 {about['model_hash'][:8]}), layer 6, text: {about['dataset_path']} "
             f"({about['text_hash'][:8]}). FVU and L0 on {first['tokens']:,} held-out tokens, cross-entropy on {c['tokens']:,} "
             f"of them, in nats: {c['ce']:.4f} as it is, {c['ce_zero']:.3f} ablated to zero, {c['ce_mean']:.3f} to the mean. "
             "Made by benchmarks/compare.py.", "", "**Ours**", "",
             "| | seed | L0 | FVU | gamma | dead | cross-entropy recovered (of the mean's) | increase | KL | c_dec |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name in sorted((n for n in rows if n in OURS), key=lambda n: (list(METHODS).index(method(n)), rows[n]["l0"] // 12, n)):
        r, la = rows[name], rows[name]["language"]
        lines.append(f"| {method(name)} | {name[-1]} | {r['l0']:.2f} | {r['fvu']:.4f} | {r['gamma_centred']:.3f} | "
                     f"{r['dead']:.2%} | {la['recovered_mean']:.4f} \u00b1 {la['recovered_mean_se']:.4f} | "
                     f"{la['increase']:.4f} | {la['kl']:.4f} | {r['c_dec']:.4f} |")
    lines += ["", "**Peers, and ours at their L0** (between our three runs of seed 0; logarithms are linear in that of L0)", "",
              *(["Made earlier, and kept: " + ", ".join(kept) + ".", ""] if kept else []),
              "| | setting | L0 | dead | FVU | ours | cross-entropy recovered | ours | KL | ours |",
              "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name in sorted((n for n in rows if n in PEERS), key=lambda n: (list(METHODS).index(PEERS[n][1]), n)):
        r, la, variant = rows[name], rows[name]["language"], PEERS[name][1]
        own = [rows[n] for n in rows if n in OURS and method(n) == variant and n.endswith("s0")]
        fvu, kl = (tables.number(at_l0(own, r["l0"], f)) for f in (lambda q: q["fvu"], lambda q: q["language"]["kl"]))
        lost = at_l0(own, r["l0"], lambda q: max(1e-9, 1 - q["language"]["recovered_mean"]))
        lines.append(f"| {method(name)} | {PEERS[name][2]} | {r['l0']:.2f} | {r['dead']:.2%} | {r['fvu']:.4f} | {fvu} | "
                     f"{la['recovered_mean']:.4f} \u00b1 {la['recovered_mean_se']:.4f} | {tables.number(1 - lost)} | "
                     f"{la['kl']:.4f} | {kl} |")
    lines += ["", "**Other settings**, ours, seed 0", "", "| script | flags | l0 | fvu | dead |", "|---|---|--:|--:|--:|"]
    for name, command in OTHER.items():
        if name in rows:
            script, flags = command.replace(f" {DATA} --seed 0", "").partition(" ")[::2]
            lines.append(f"| {script} | {f'`{flags}`' if flags else ''} | {rows[name]['l0']:.2f} | {rows[name]['fvu']:.4f} | "
                         f"{rows[name]['dead']:.2%} |")
    lines += ["", "**Agreement of three seeds** (L0 32): mean cosine of latents matched one to one, order; of the latents with the "
              "largest activations, how many have one of another seed at a cosine above", "",
              "| | matched | order | share | 0.7 | 0.8 | 0.9 |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name in rows:
        if "consistency" in rows[name] and name.endswith("32-s0"):
            r = rows[name]["consistency"]
            lines += [f"| {method(name)} | {r['matched_cosine']:.3f} | {r['order']:.3f} | {a['share']:.1%} | "
                      + " | ".join(f"{a[t]:.3f}" for t in tables.ALIKE) + " |" for a in r["alike"]]
    if missing := [n for n in found if n not in rows]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    (RESULTS.parent / "compare.md").write_text("\n".join(lines) + "\n")
    shown = [row | dict(variant=method(name)) for name, row in rows.items() if name not in OTHER and "default" not in name]
    tables.plot([dict(data="", rows=shown)], RESULTS.parent / "compare.png")
    print("\n".join(lines))

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate", "report"])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--only", nargs="+", help="names of runs contain one of these")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    if args.one:
        return train_peer(args.one, args.runs / args.one)
    globals()[args.what](args)

if __name__ == "__main__":
    main()
