"""All six beside the peers on one language model: the same activations, tokens and width, one evaluation.

    python benchmarks/compare.py train --runs runs/compare              # resumable: finished runs are kept
    python benchmarks/compare.py train --runs runs/compare --only topk  # those with 'topk' in their name
    python benchmarks/compare.py evaluate --runs runs/compare           # evaluate.py on all of them
    python benchmarks/compare.py report --runs runs/compare             # tables, frontier and raw figures

smollm2, layer 6, 2M tokens in batches of 2048, 8 D = 4608 latents, data seed 0. Ours: each script with its
defaults at an L0 of 16, 32 and 64 (seeds 0, 1, 2 at 32). Peers (SAELens 6.54.12, dictionary-learning 0.1.0,
eai-sparsify 1.3.3), at 32: each library's own training step on the very batches that ours see, already centred
and scaled, in bf16; twice: 'default' with its own learning rate and rule for dead latents, 'tuned' with our rate
(2.3e-3), and with our rule, dead after 1 % of the tokens, where a library has that setting. Two favours: L1
coefficients are those that give an L0 near 32 here (PEERS below), and dictionary-learning collects its BatchTopK
threshold from step 488 on, as its own default, step 1000, is after the last. Peers need benchmarks/requirements.txt.
"""
import argparse, json, os, shutil, subprocess, sys, time
from pathlib import Path

os.environ.update(TQDM_DISABLE="1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
RESULTS = ROOT / "benchmarks/results/compare"

STEERED = {16: "--target-l0 16", 32: "--target-l0 32", 64: "--target-l0 64"}
K = {16: "--k 16", 32: "--k 32", 64: "--k 64"}
METHODS = {                                       # name: script, flags for an L0 of 16, 32 and 64
    "topk": ("topk", K), "vanilla": ("vanilla", STEERED), "gated": ("gated", STEERED),
    "matryoshka": ("matryoshka", K), "ordered": ("ordered", K),
    "gba": ("gba", {16: "--high 0.018", 32: "--high 0.04", 64: "--high 0.088"}),
    "batchtopk": ("matryoshka", {n: f"--balance 0 {flags}" for n, flags in K.items()}),
    "p-annealed": ("vanilla", {n: f"--p-end 0.2 {flags}" for n, flags in STEERED.items()})}
OURS = {f"ours-{name}-{l0}-s{seed}": f"{script}_sae.py --layer 6 {flags[l0]} --seed {seed}"
        for l0, seeds in ((32, (0, 1, 2)), (16, (0,)), (64, (0,)))
        for seed in seeds for name, (script, flags) in METHODS.items()}

K_VARIANTS = "topk", "batchtopk", "matryoshka"
L1 = {("sae-lens", "vanilla"): 1.0, ("dictionary-learning", "vanilla"): 1.8,
      ("sae-lens", "gated"): 2.0, ("dictionary-learning", "gated"): 3.0}
PEERS = {f"{library}-{variant}-{how}": (library, variant, how)
         for variant in ("topk", "vanilla", "gated", "batchtopk", "matryoshka")
         for how in ("tuned", "default")
         for library in ("sae-lens", "dictionary-learning", "sparsify")
         if library != "sparsify" or variant == "topk"}

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

def train_peer(name, out, steps=976):
    """Train one peer and write its run directory."""
    import torch
    import data, peers, topk_sae
    from safetensors.torch import save_file
    library, variant, how = PEERS[name]
    B, seed = 2048, 0
    args = data.ArgumentParser(__doc__).parse_args(["--model", "smollm2", "--layer", "6"])
    flags = data.flags(args)
    vars(args).update(batch_size=B, seed=seed, tokens=steps * B)
    data.keep_freed_memory()
    torch.set_float32_matmul_precision("medium")
    source = data.open_source(args, torch.device("cpu"))
    D, F = source.d_in, 8 * source.d_in
    options = dict(l1=L1[library, variant]) if variant not in K_VARIANTS else {}
    if how == "tuned" and library != "sparsify":
        options["dead_after"] = steps * B // 100
    lr = topk_sae.default_lr(F, steps) if how == "tuned" else None
    if library == "sparsify" and how == "default":
        options["optimizer"] = "signum"
    peer = peers.make(library, variant, D, F, 32, lr, steps, seed, B, True, **options)
    if library == "dictionary-learning" and variant in ("batchtopk", "matryoshka"):
        peer.trainer.threshold_start_step = steps // 2
    began = time.perf_counter()
    for step in range(steps):
        peer.step(source.batch(step))
        if (step + 1) % 100 == 0:
            x = source.batch(step)
            z, x_hat = peer.encode(x), peer.reconstruct(x)
            print(f"{name} step {step + 1} l0 {(z != 0).sum() / B:.1f} "
                  f"fvu {(x - x_hat).pow(2).sum() / x.pow(2).sum():.4f} "
                  f"{(step + 1) * B / (time.perf_counter() - began):,.0f} tok/s", flush=True)
    seconds = time.perf_counter() - began
    architecture, tensors, extra = tensors_of(library, variant, peer)
    x = source.heldout()[:256]
    want = peer.encode(x) / source.scale
    tensors = {n: t.detach().float().contiguous() for n, t in data.fold(tensors, source).items()}
    cfg = dict(extra, architecture=architecture, d_in=D, d_sae=F, dtype="float32", device="cpu",
               apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
               metadata=dict(source.meta, sae_lens_version="6.54.12", flags=flags,
                             training_architecture=f"{library} {variant}", peer=dict(
                   library=library, variant=variant, how=how, lr=lr, steps=steps, batch=B, seconds=seconds,
                   **options)))
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(tensors, tmp / "sae_weights.safetensors")
    (tmp / "cfg.json").write_text(json.dumps(cfg, indent=1))
    torch.save(want, tmp / "want.pt")
    os.replace(tmp, out)

def train(args):
    for name in [*PEERS, *OURS]:
        out = args.runs / name
        if not any(part in name for part in args.only or [""]) or (out / "cfg.json").exists():
            continue
        print(name, flush=True)
        command = OURS[name].split() + ["--out", str(out), "--log-every", "200"] if name in OURS else \
            [__file__, "train", "--runs", str(args.runs), "--one", name]
        shutil.rmtree(out, ignore_errors=True)
        args.runs.mkdir(parents=True, exist_ok=True)
        with open(args.runs / f"{name}.log", "w") as log:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            print(f"{name} failed; see {args.runs / name}.log", flush=True)

def evaluate(args):
    """evaluate.py on all finished runs, method by method; those that have an evaluation.json are kept."""
    for method in METHODS:
        names = [n for n in OURS if n.startswith(f"ours-{method}-")]
        names += [n for n, (_, variant, _) in PEERS.items() if variant == method]
        names = [n for n in names if (args.runs / n / "cfg.json").exists()]
        if not any(part in method for part in args.only or [""]) or not names or all(
                (args.runs / n / "evaluation.json").exists() for n in names):
            continue
        command = [sys.executable, ROOT / "evaluate.py", *names]
        seeds = [n for n in names if n.startswith(f"ours-{method}-32-s")]
        subprocess.run(command + (["--consistency"] if len(seeds) > 1 else []), cwd=args.runs, check=True)

def at_l0(rows, l0, value):
    """value of our runs at this L0: between neighbours, its logarithm is linear in that of L0."""
    import numpy as np
    points = sorted((row["l0"], value(row)) for row in rows)
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    inside = x[0] - 0.02 <= np.log(l0) <= x[-1] + 0.02
    return float(np.exp(np.interp(np.log(l0), x, y))) if inside else float("nan")

def report(args):
    """compare.md, frontier.png and the evaluation.json of every run, into RESULTS."""
    sys.path.insert(0, str(ROOT))
    import evaluate as ev
    from speed import machine
    rows = {}
    for name in [*OURS, *PEERS]:
        path = args.runs / name / "evaluation.json"
        if path.exists():
            rows[name] = json.loads(path.read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, row in rows.items():
        row["run"] = name
        (RESULTS / f"{name}.json").write_text(json.dumps(row) + "\n")
    first = next(iter(rows.values()))
    c = first["language"]
    lines = [machine() + f"; {first['data']['model_name']} ({first['data']['model_hash'][:8]}), layer 6, text "
             f"{first['data']['dataset_path']} ({first['data']['text_hash'][:8]}); FVU and L0 on {first['tokens']:,} "
             f"held-out tokens, cross-entropy on {c['tokens']:,}: {c['ce']:.4f} as it is, {c['ce_zero']:.3f} ablated to "
             f"zero, {c['ce_mean']:.3f} to the mean. Made by benchmarks/compare.py.", "", "**Ours**", "",
             "| | seed | L0 | FVU | gamma | dead | CE recovered (mean ablation) | CE increase | KL | c_dec | seeds agree |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    def cells(row):
        la = row["language"]
        return (f"{row['l0']:.2f} | {row['fvu']:.4f} | {row['gamma_centred']:.3f} | {row['dead']:.2%} | "
                f"{la['recovered_mean']:.4f} \u00b1 {la['recovered_mean_se']:.4f} | {la['increase']:.4f} | "
                f"{la['kl']:.4f} | {row['c_dec']:.4f}")
    for method in METHODS:
        for name in sorted((n for n in rows if n.startswith(f"ours-{method}-")), key=lambda n: (rows[n]["l0"] // 8, n)):
            agree = rows[name].get("consistency", {}).get("matched_cosine")
            lines.append(f"| {method} | {name[-1]} | {cells(rows[name])} | {f'{agree:.3f}' if agree else ''} |")
    lines += ["", "**Peers, and ours at their L0** (between our runs at 16, 32 and 64, seed 0; log in log)", "",
              "| variant | library | setting | L0 | FVU | ours there | CE increase | ours there | KL | ours there | dead | minutes |",
              "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name, (library, variant, how) in PEERS.items():
        if name not in rows:
            continue
        row, own = rows[name], [rows[n] for n in rows if n.startswith(f"ours-{variant}-") and n.endswith("s0")]
        there = [at_l0(own, row["l0"], f) for f in (lambda r: r["fvu"], lambda r: max(1e-9, r["language"]["increase"]),
                                                    lambda r: r["language"]["kl"])]
        there = [ev.number(v) for v in there]
        seconds = json.loads((args.runs / name / "cfg.json").read_text())["metadata"]["peer"]["seconds"]
        la = row["language"]
        lines.append(f"| {variant} | {library} | {how} | {row['l0']:.2f} | {row['fvu']:.4f} | {there[0]} | "
                     f"{la['increase']:.4f} \u00b1 {la['increase_se']:.4f} | {there[1]} | {la['kl']:.4f} | {there[2]} | "
                     f"{row['dead']:.2%} | {seconds / 60:.1f} |")
    (RESULTS.parent / "compare.md").write_text("\n".join(lines) + "\n")
    for name, row in rows.items():                            # for the plot
        row["variant"] = " ".join(PEERS[name][:2]) if name in PEERS else name.split("-")[1].replace("p", "p-annealed") \
            if name.startswith("ours-p-") else name.split("-")[1]
    ev.plot([dict(data="", rows=list(rows.values()))], RESULTS.parent / "compare.png")
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
