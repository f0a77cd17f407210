"""Which k? TopK SAEs at several k, and where the error on coordinates they do not see is lowest.

    python applications/choose_l0.py --model toy --toy wrong --d-sae 50 --ks 4 6 8 10 12 16 24
    python applications/choose_l0.py --layer 6 --ks 8 16 32 64 128 --tokens 2e6 --html l0.html
    python applications/choose_l0.py runs/which-l0/*/        # finished runs, of any k and seeds
    python applications/choose_l0.py ... --mask-train 0.75   # with hidden coordinates in training

FVU falls with k for ever, and cannot say which k is right. Curves over k that might:
masked FVU   A random part of the coordinates, in random orthonormal bases, is hidden from the
             encoder, and the error is taken on these (evaluation/masked.py). What is hidden must be
             predicted through features; further latents fit the noise that hiding adds. p, the
             share that it sees, is --mask. docs/choosing_l0.md: derivation, and where it fails
c_dec, s_n   Chanin and Garriga-Alonso 2025 (evaluation/metrics.py); on their toys lowest near the
             true L0. MCC: with the true features, on toys
active       latents that fire on a token, at most k. With --mask-train P the loss is the masked one
             with p = P: a latent that fits noise learns to be silent, and this should stop growing

The rule is ours. Best is the k of --ks with the lowest mean over seeds of the masked FVU; beside it
stand the smallest and the largest k that is best for a single seed. It is recommended unless it is
the first or the last k; or the curve on one side of it never rises by more than the seeds differ at
the best k, largest less smallest; or there is only one seed. Then no k is recommended.

Runs and choose_l0.json are written to --out, whose name is printed. The same command with that
--out keeps its finished runs, and goes on. Bad input costs one line and the exit code 2.
"""
import argparse, contextlib, io, math, sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
import topk_sae
from evaluation import metrics, page
from evaluation.intervals import lowest
from evaluation.masked import TRAIN_BASIS, TRAIN_MASK, basis, masked_fvu, seen
from evaluation.saved import (DATA_FLAGS, SAE, data_flags, fits, open_data, page_path,
                              write_page, write_result)
from evaluation.tables import print_table

ROWS = 16384                            # held-out tokens, evenly spaced, that are measured
MEASURES = dict(masked="masked FVU", fvu="FVU", c_dec="c_dec", s_n="s_n", mcc="MCC")
FREE = runs.FREE_TO_CHANGE | {"k", "seed", "dense", "bf16"}     # in which runs here may differ
KNOWN = "model_name", "model_hash", "hook_name", "text_hash", "context_size", "n_train_rows"

# --- arguments ------------------------------------------------------------------------------------

def share(text):
    """An argparse type: a number in (0, 1)."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and below 1")
    return float(text)

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="finished TopK runs")
    add = parser.add_argument_group("training, without RUN").add_argument
    add("--ks", type=runs.count, nargs="+", help="three or more; default 4 8 16 32 64 128")
    add("--seeds", type=runs.count, help="how many seeds for each k: 0, 1, ...; default 3")
    add("--mask-train", type=share, help="train with masks; the share seen, as 0.75")
    add("--d-sae", type=runs.count, help="F, the number of latents; default 8 D")
    add("--tokens", type=runs.count, help="training tokens of a run; default 1e6")
    add("--batch-size", type=runs.count, help="tokens a step; default 1024")
    add = parser.add_argument_group("measuring").add_argument
    add("--mask", type=share, default=0.9, help="p, the share of coordinates that the encoder "
        "sees; default 0.9, which hides a tenth")
    add("--out", type=Path, help="folder of the runs; default runs/choose-l0-...")
    add("--html", type=page_path, help="write the page there")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    given = [f for f in ("ks", "seeds", "mask_train", "d_sae", "tokens", "batch_size")
             if getattr(args, f) is not None]
    if args.runs and given:
        parser.error(f"--{given[0].replace('_', '-')}: is for training; leave it out with RUN")
    ks = sorted(args.ks or (4, 8, 16, 32, 64, 128))
    args.ks = None if args.runs else ks
    if len({*ks}) < max(3, len(ks)):
        parser.error(f"--ks {' '.join(map(str, ks))}: give three or more, and none twice, as a "
                     "minimum lies in between")
    args.torch_device = runs.open_device(args.device)
    return args

# --- training -------------------------------------------------------------------------------------

def masked_loss(sae, x, state, args, m, Q):
    """topk_sae.loss with masks m [B, D], in the basis Q, for x of mean 0: the encoder sees the one
    part, errors are those of the other, in mse times 1 / (1 - p) as if all were. The textbook."""
    p, u, dead = args.mask_train, x @ Q, state["dead"]
    x_seen = (m * u / p) @ Q.T
    z = sae.encode(x_seen)                                                           # (B, F)
    e = (x - sae.decode(z)) @ Q                                                      # (B, D)
    mse, e = (~m * e).pow(2).sum(1).mean() / (1 - p), e.detach()
    aux = torch.zeros_like(mse)
    if len(dead) and args.auxk_alpha:
        pre = (x_seen - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        vals, idx = pre.topk(min(args.auxk, len(dead)))
        e_hat = torch.zeros_like(pre).scatter(1, idx, vals.relu()) @ sae.W_dec[dead]
        variance = (~m * (e - e.mean(0))).pow(2).sum().clamp_min(1e-8 * len(e))
        aux = (~m * (e - e_hat @ Q)).pow(2).sum() / variance
    total = mse + args.auxk_alpha * x.shape[1] * aux
    terms = dict(loss=total, mse=mse, aux=aux, l0=(z > 0).sum() / len(x))
    return total, terms, (z > 1e-3).float().sum(0)

def training_flags(args, k, seed):
    """The flags of topk_sae.py for one run, checked by its own parser."""
    given = {name: getattr(args, name) for name in (*DATA_FLAGS, "cache_dir", "epochs", "d_sae")}
    given |= dict(k=k, seed=seed, tokens=args.tokens or 10 ** 6, device=args.device,
                  batch_size=args.batch_size or 1024, out=args.out and args.out / f"k{k}-s{seed}")
    words = [[f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
             for name, value in given.items() if value is not None]
    flags = topk_sae.parse_args(sum(words, []))
    if args.mask_train:
        flags.mask_train, flags.dense = args.mask_train, True
    return flags

def train_masked(args):
    """topk_sae.train, with masked_loss and fresh masks at every step."""
    device = runs.setup(args)
    source = data.open_source(args, device)
    D, args.steps = source.d_in, args.tokens // args.batch_size
    args.d_sae, args.auxk = args.d_sae or 8 * D, args.auxk or D // 2
    args.warmup = args.warmup or max(1, min(1000, args.steps // 10))
    args.dead_after = args.dead_after or min(10_000_000, max(1, args.tokens // 100))
    args.lr = args.lr or topk_sae.default_lr(args.d_sae, args.steps)
    torch.manual_seed(args.seed)
    sae = topk_sae.TopKSAE(D, args.d_sae, args.k).to(device)
    loss = partial(masked_loss, Q=basis(D, device, TRAIN_BASIS, args.seed))
    opt, state = runs.adam(sae, args.lr, topk_sae.BETAS), topk_sae.init_state(args, device)
    with runs.Run(args, "topk", source, sae, opt, state) as run:
        for step in run.steps:
            x = source.batch(step)
            m = seen(x, args.mask_train, TRAIN_MASK, args.seed, step)
            terms = topk_sae.train_step(sae, opt, x, state, step, args, partial(loss, m=m))
            if (step + 1) % runs.CHECK_EVERY == 0 or step + 1 == args.steps:
                state["dead"] = (state["tokens_since_fired"] > args.dead_after).nonzero()[:, 0]
            run.end_step(step, x, terms, topk_sae.lr_at(step, args))
    found = runs.heldout_metrics(sae, source.heldout())
    sae.load_state_dict(runs.fold(sae.state_dict(), source))
    run.save_sae("topk", sae.state_dict(), found, k=args.k, rescale_acts_by_decoder_norm=False)

def finished(flags):
    """Whether a run of these flags is there; fails if it is one of others."""
    if not (flags.out / "cfg.json").exists():
        return False
    there, want = SAE(flags.out).flags, dict(mask_train=None) | runs.flags(flags)
    for name in sorted(want.keys() - FREE | {"k", "seed"}):
        default = want[name] is None and name not in (*DATA_FLAGS, "mask_train")
        if not default and there.get(name) != want[name]:
            runs.fail(f"--out {flags.out}: a run with --{name.replace('_', '-')} {there.get(name)} "
                      f"is there, not {want[name]}; choose another")
    return True

def train(args):
    """Train what is not finished yet; the run directories of all ks and seeds."""
    first = training_flags(args, args.ks[-1], 0)
    source = data.open_source(first, args.torch_device)
    for name in DATA_FLAGS:                                   # with the defaults, spelled out now
        setattr(args, name, getattr(first, name))
    args.d_sae = args.d_sae or 8 * source.d_in
    if args.ks[-1] > args.d_sae:
        runs.fail(f"--ks {args.ks[-1]}: larger than --d-sae {args.d_sae}; give smaller ones")
    first.variant = "choose-l0"
    args.out = args.out or runs.default_dir(first)
    every = [training_flags(args, k, seed) for seed in range(args.seeds or 3) for k in args.ks]
    for flags in runs.Bar([f for f in every if not finished(f)], desc="train all", unit="run"):
        flags.resume = (flags.out / "state.pt").is_file()
        try:
            with contextlib.redirect_stdout(io.StringIO()):   # metrics.jsonl has what it prints
                (train_masked if args.mask_train else topk_sae.train)(flags)
        except SystemExit:
            print(f"stopped; the same command with --out {args.out} goes on", file=sys.stderr)
            raise
        (flags.out / "state.pt").unlink(missing_ok=True)
    return [flags.out for flags in every]

# --- measuring ------------------------------------------------------------------------------------

def checked_runs(paths, args):
    """{(k, seed): path} of finished runs, by k, and what they have in common. Fails unless they are
    TopK runs that differ in k and seed alone, of the same seeds at each of three k or more."""
    found, first = {}, None
    for path in paths:
        sae = SAE(path)
        if {sae.kind, str(sae.meta.get("training_architecture") or "topk")} != {"topk"}:
            runs.fail(f"{path}: is not a run of topk_sae.py; leave it out")
        if sae.norm != "none":
            runs.fail(f"{path}: takes normalised inputs, which hiding changes; leave it out")
        about = {n: v for n, v in sae.flags.items() if n not in FREE | {*DATA_FLAGS}}
        about |= dict(data=data_flags(sae, args, None), d_in=sae.d_in, d_sae=sae.d_sae)
        about |= {n: sae.meta.get(n) for n in KNOWN}          # of the data that it was trained on
        first = first or about
        for name in [n for n in [*about, *first] if first.get(n) != about.get(n)]:
            runs.fail(f"{path}: differs from {paths[0]} in {name.replace('_', '-')}, not only in k "
                      "and seed; leave it out")
        spot = sae.k, sae.flags.get("seed", 0)
        if spot in found:
            runs.fail(f"{path}: has the k and the seed of {found[spot]}; leave it out")
        found[spot] = path
    ks, seeds = ({spot[i] for spot in found} for i in (0, 1))
    if len(ks) < 3:
        runs.fail(f"{paths[0]} ...: {len(ks)} k have no minimum in between; give three or more")
    if gaps := sorted((k, s) for k in ks for s in seeds if (k, s) not in found):
        runs.fail(f"{paths[0]} ...: none has k {gaps[0][0]} and seed {gaps[0][1]}; add that run")
    return dict(sorted(found.items())), first

def measure(found, key, args):
    """({measure: {k: [value of each seed]}}, source, the truth of a toy or None)."""
    source, curves = open_data(key, [SAE(next(iter(found.values())))], args), {}
    x, toy = source.heldout_raw(), source.truth
    x = x[::math.ceil(len(x) / ROWS)]
    for (k, _), path in runs.Bar(found.items(), desc="measure", unit="run"):
        sae = SAE(path).to(source.device)
        if sae.d_in != source.d_in:
            runs.fail(f"{path}: takes D = {sae.d_in}, not {source.d_in}; name the data it is of")
        if not fits(sae, source):
            runs.fail(f"{path}: trained on another model or layer; give the ones of its training")
        row, _ = metrics.reconstruction(sae, x, x.double().mean(0))
        row |= metrics.geometry(sae.t["W_dec"], sae.inputs(x[:4096]), source.scale)
        row |= dict(active=row["l0"], masked=masked_fvu(sae, x, source.mean, args.mask))
        row |= dict(mcc=mcc(toy, sae.t["W_dec"].cpu())) if toy else {}
        for name in ("active", *(name for name in MEASURES if name in row)):
            curves.setdefault(name, {}).setdefault(k, []).append(row[name])
    if not toy:
        return curves, source, None
    g = torch.Generator().manual_seed(0)
    on = (toy.sample(ROWS, g)[1] > 0).sum(1).double()
    chance = [mcc(toy, torch.randn(sae.d_sae, sae.d_in, generator=g)) for _ in range(5)]
    return curves, source, dict(l0=on.mean().item(), std=on.std().item(), chance=sum(chance) / 5)

def mcc(toy, W_dec):
    i, j, cosine = metrics.match(toy.features, W_dec)
    return cosine[i, j].mean().item()

# --- what comes out -------------------------------------------------------------------------------

def conclusion(end, active, p, truth):
    """What the masked FVU says, in a sentence or two; active: latents a token at the best k."""
    said = f"Recommended k: {end['at']}, by single seeds {min(end['by_seed'])} to " \
        f"{max(end['by_seed'])}, where the masked FVU (p = {p:g}) is lowest; {active:.2f} of its " \
        "latents are active on a token."
    if not end["sure"]:
        said = f"No k recommended: the masked FVU (p = {p:g}) is lowest at k = {end['at']} " \
            f"({end['verdict']})."
    return said + (f" True L0: {truth['l0']:.2f}, with a standard deviation of {truth['std']:.2f} "
                   "over tokens." if truth else "")

def tables(curves, ends, truth):
    spread = lambda v, form: f"{np.mean(v):{form}}" + (f" ({np.ptp(v):{form}})" if v[1:] else "")
    rows = [[str(k), *(spread(curve[k], ".2f" if name == "active" else ".4f")
                       for name, curve in curves.items())] for k in curves["fvu"]]
    best = [[MEASURES[name] + ", highest" * (name == "mcc"), str(end["at"]),
             *(" ".join(map(str, end[part])) for part in ("by_seed", "alike")), end["verdict"]]
            for name, end in ends.items()]
    chance = f"; MCC of random rows {truth['chance']:.3f}" if truth else ""
    return [("Curves over k", "means over seeds (largest less smallest)" + chance,
             ["k", *(MEASURES.get(name, name) for name in curves)], rows),
            ("Where each is lowest", "by its mean; by each seed; all k that are as low within the "
             "spread", ["curve", "k", "seeds", "as low", "verdict"], best)]

def render(curves, shown, said, about, truth):
    """The page: a panel for each curve; in it the true L0, where it is known, as a bar."""
    figures = []
    for name, title in [(name, MEASURES[name]) for name in MEASURES if name in curves]:
        points = [(k, float(np.mean(v)), min(v), max(v)) for k, v in curves[name].items()]
        low, high = min(p[2] for p in points), max(p[3] for p in points)
        lines = {"mean and range of seeds": points}
        lines |= {"true L0": [(truth["l0"], low, low, high)]} if truth else {}
        svg = page.dose_svg(title, "k (log scale)", title, lines, log=True)
        figures.append((svg, f"{title} over k"))
    return page.document("Choosing k", "".join([
        f'<p class="note">{page.cell(about)}</p><p>{page.cell(said)}</p>',
        page.figures_html(figures), *(page.table_html(*table) for table in shown)]))

def main(argv=None):
    args = parse_args(argv)
    found, common = checked_runs(args.runs or train(args), args)
    curves, source, truth = measure(found, common["data"], args)
    ends = {name: lowest(curves[name], name == "mcc") for name in MEASURES if name in curves}
    best = ends["masked"]
    said = conclusion(best, np.mean(curves["active"][best["at"]]), args.mask, truth)
    for table in (shown := tables(curves, ends, truth)):
        print_table(*table)
    print(f"\n{said}")
    if args.out:
        result = dict(recommended=best["at"] if best["sure"] else None, lowest=ends, curves=curves,
                      truth=truth, runs=list(map(str, found.values())))
        write_result(args.out / "choose_l0.json", result, source, args, "--out")
        print(f"runs and choose_l0.json: {args.out}")
    if args.html:
        about = f"{source.meta['model_name']} {source.meta.get('hook_name', '')}, " \
            f"F = {common['d_sae']}, {len(found)} runs"
        write_page(args.html, render(curves, shown, said, about, truth))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
