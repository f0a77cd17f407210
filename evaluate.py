"""Finished runs side by side: which SAE is better, and in what sense?

    python evaluate.py RUN [RUN ...]                     a row for each; evaluation.json in each RUN
    python evaluate.py runs/* --html report.html         one page: tables, plots, what latents mean
    python evaluate.py RUN --features 12,57              where these latents fire (or: top); on
                                                         othello, what they say of the board
    python evaluate.py RUN RUN RUN --consistency         do the seeds of one setting agree?
    python evaluate.py DIR --model smollm2 --layer 6     somebody else's SAELens directory

A RUN is what our scripts write, or any SAELens directory (standard, gated, topk, jumprelu). All are
measured alike on the held-out part, at most 65,536 tokens, of the data that they record, or of the
data that the flags name. Nothing was trained on it, but matryoshka_sae.py sets its threshold on
half. metrics.py says what each number is (of Othello: othello/boards.py). A run that cannot be
measured costs one line and the exit code 2; the others are measured all the same. Runs record paths
as they were given: evaluate them from the folder where they were trained, or name the data.
"""
import argparse, datetime, json, sys, textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data, lm, metrics

DATA_FLAGS = "model", "layer", "text", "context", "cache_tokens", "activations", "toy"
SHOWN, WINDOW = 10, (24, 12)        # contexts of a latent; tokens before and after its peak
ALIKE = "0.7", "0.8", "0.9"

# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    add = parser.add_argument_group("evaluation").add_argument
    add("--contexts", type=data.at_least(0), default=100,
        help="held-out contexts for cross-entropy and kl; default 100; 0: neither")
    add("--features", help="latents to show: 12,57 or top (the ten with the largest sums; on "
        "othello, that say most about the board)")
    add("--consistency", action="store_true", help="compare runs that differ in --seed alone")
    add("--html", type=Path, help="write the page there")
    add("--html-features", type=data.at_least(0), default=60,
        help="latents of each run on the page, evenly spaced by firing rate; default 60")
    add("--plot", type=Path, help="write the L0-FVU frontier there, as .png, .svg or .pdf")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    args.runs = list({path.resolve(): path for path in args.runs}.values())
    if args.html and args.html.is_dir():
        parser.error(f"--html {args.html}: a folder; name a file")
    if args.features is not None and args.features != "top":
        try:
            args.features = [int(i) for i in args.features.split(",")]
        except ValueError:
            parser.error(f"--features {args.features}: use numbers as in 12,57, or top")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: name it .png, .svg or .pdf")
    return args

# --- what latents mean ----------------------------------------------------------------------------

def chosen(sae, args, rate, total):
    """The latents to show: those of --features or, for the page, some of every firing rate."""
    if args.features == "top":
        return total.topk(min(10, sae.d_sae)).indices.tolist()
    if args.features:
        if wrong := [i for i in args.features if not 0 <= i < sae.d_sae]:
            data.fail(f"--features {wrong[0]}: {sae.path} has latents 0 to {sae.d_sae - 1}")
        return args.features
    alive = rate.argsort(descending=True)[:int((rate > 0).sum())].tolist()
    n = min(args.html_features, len(alive)) if args.html else 0
    return [alive[i * (len(alive) - 1) // max(1, n - 1)] for i in range(n)]

@torch.no_grad()
def features(sae, x, latents, rate, source, model, tokenizer, blocks):
    """Yields, of each latent: firing rate, peak, the SHOWN tokens whose logits its direction raises
    and lowers most, the tokens around its largest activation in each of SHOWN held-out contexts.

    Logits are of the direction alone, through the final norm and the unembedding, less those of 0:
    the direct path, without the layers in between."""
    ids, where = lm.heldout_tokens(source)
    T, text = ids.shape[1], lambda i: tokenizer.decode([int(i)])
    context, place = where // T, where % T
    codes = torch.cat([sae.encode(part)[:, latents].cpu() for part in x.split(2048)])     # (M, n)
    norms = [m for parent in model.modules() if blocks in parent.children()
             for m in parent.children() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    def logits(d):
        d = d.to(next(model.parameters()).dtype)
        return model.get_output_embeddings()(norms[-1](d) if norms else d).float()
    for latent, z in zip(latents, codes.T.numpy()):
        d = sae.t["W_dec"][latent]
        order = (logits(d) - logits(torch.zeros_like(d))).argsort(descending=True)
        contexts = {}                                         # the best place of each
        for row in np.argsort(-z, kind="stable"):
            if z[row] <= 0 or len(contexts) == SHOWN:
                break
            if (c := context[row]) not in contexts:
                values, near = np.zeros(T), context == c
                values[place[near]] = z[near]
                lo, hi = max(0, place[row] - WINDOW[0]), place[row] + WINDOW[1] + 1
                contexts[c] = dict(tokens=[text(i) for i in ids[c, lo:hi]], at=int(place[row] - lo),
                                   values=[round(float(v), 3) for v in values[lo:hi]])
        yield dict(latent=latent, rate=rate[latent].item(), peak=float(z.max()),
                   raises=[text(i) for i in order[:SHOWN]], contexts=list(contexts.values()),
                   lowers=[text(i) for i in order.flip(0)[:SHOWN]])

def print_features(sae, found):
    for f in found:
        print(f"\n{sae.path}, latent {f['latent']}: fires on {f['rate']:.3%} of the tokens, peak "
              f"{f['peak']:.2f}\n  raises {f['raises']}\n  lowers {f['lowers']}")
        if "board" in f:
            print(textwrap.indent(f["board"], "  "))
            continue
        for c in f["contexts"]:
            tokens = [f"\u00ab{t}\u00bb" if i == c["at"] else t for i, t in enumerate(c["tokens"])]
            line = "".join(tokens).replace("\n", "\u23ce")
            line = "".join(char if char.isprintable() else " " for char in line)
            print(f"  {c['values'][c['at']]:8.2f}  {line}")

# --- tables ---------------------------------------------------------------------------------------

def number(value, form=".4f"):
    return "\u2013" if value is None or value != value else format(value, form)

def tables(rows):
    """[(title, note, header, rows of cells)]: what the terminal and the page show of the rows."""
    pair = lambda r, name, form: f"{number(r[name], form)} \u00b1 {number(r[name + '_se'], form)}"
    first = rows[0]
    out = [("Reconstruction and geometry", f"{first['tokens']:,} held-out tokens",
        "run l0 \u00b1 fvu gamma centred dead c_dec s_n nearest >0.9".split(),
        [[r["run"], number(r["l0"], ".2f"), number(r["l0_std"], ".1f"), number(r["fvu"]),
          number(r["gamma"], ".3f"), number(r["gamma_centred"], ".3f"), number(r["dead"], ".2%"),
          number(r["c_dec"]), number(r["s_n"], ".3f"), number(r["nearest"], ".3f"),
          number(r["nearest_09"], ".1%")] for r in rows])]
    if lm := [r for r in rows if r.get("language")]:
        c = lm[0]["language"]
        out.append(("Language model with the reconstruction spliced in",
            f"{c['contexts']} held-out contexts, {c['tokens']:,} tokens; cross-entropy as it is "
            f"{c['ce']:.4f}, ablated to zero {c['ce_zero']:.4f}, to the mean {c['ce_mean']:.4f}; "
            "dropped positions and outliers left as they are",
            ["run", "ce", "increase", "recovered of zero", "of mean", "kl"],
            [[r["run"], number(r["language"]["ce_spliced"]), *(pair(r["language"], name, ".4f")
              for name in ("increase", "recovered_zero", "recovered_mean", "kl"))] for r in lm]))
    if games := [r for r in rows if r.get("boards")]:
        base = dict(games[0]["boards"]["baselines"])
        shown = "coverage coverage_one_t published reconstruction t latents legal".split()
        form = dict(t=".1f", latents="d", legal=".2%")
        published = lambda b: dict(b, published=b["coverage"] * 2 / 3) if "coverage" in b else b
        note = (f"{base.pop('positions'):,} positions of {base.pop('games')} held-out games; "
                f"accuracy of the probe {base['linear probe']['accuracy']:.2%}; x 2/3: to compare "
                "with Karvonen et al. 2024")
        every = [(r["run"], r["boards"]) for r in games] + list(base.items())
        out.append(("Othello: what latents know of the board", note,
            ["run", "coverage", "one t", "x 2/3", "reconstruction", "at t", "latents",
             "legal moves"],
            [[n, *(number(published(b).get(k), form.get(k, ".4f")) for k in shown)]
             for n, b in every]))
    if toy := [r for r in rows if r.get("truth")]:
        names = "mcc mmcs_truth mmcs_learned found f1 absorbed absorbed_alone hedging".split()
        names = [n for n in names if toy[0]["truth"][n] is not None]
        short = dict(mmcs_truth="mmcs truth>", mmcs_learned="mmcs <learned", absorbed_alone="alone")
        out.append(("Recovery of the true features (chance)",
            f"true L0 {toy[0]['truth']['true_l0']:.2f}; chance: random dictionaries, as sparse",
            ["run", *(short.get(n, n) for n in names)], [[r["run"], *(
                f"{number(r['truth'][n], '.3f')} ({number(r['truth']['chance'][n], '.2f')})"
                for n in names)] for r in toy]))
    return out

def print_table(title, note, header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}: {note}")
    for row in [header, *rows]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                        for i, (c, w) in enumerate(zip(row, widths))))

def plot(groups, path):
    """The frontier as a picture: L0 against FVU, and against cross-entropy recovered if known."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        data.fail("--plot needs matplotlib; pip install matplotlib")
    panels = [(g, k) for g in groups for k in ("fvu", "language") if any(k in r for r in g["rows"])]
    fig, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for ax, (group, key) in zip(axes[0], panels):
        by = {}
        for r in group["rows"]:
            y = r.get("fvu") if key == "fvu" else (r.get("language") or {}).get("recovered_mean")
            label = r["variant"].replace("$", r"\$")
            by.setdefault(label, []).append((r["l0"], float("nan") if y is None else y))
        for n, (label, points) in enumerate(by.items()):
            ax.plot(*zip(*sorted(points)), "os^Dv<>PX*"[n % 10] + "-", lw=0.8, ms=5, label=label,
                    color=f"C{n % 10}", mfc="none" if n >= 10 else None)
        ax.set(xscale="log", xlabel="L0", title=group["data"][:70].replace("$", r"\$"),
               ylabel="FVU" if key == "fvu" else "cross-entropy recovered (mean ablation)")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.title.set_fontsize(8)
        ax.legend(fontsize=7)
    fig.tight_layout()
    with data.replacing(path, "--plot") as tmp:
        fig.savefig(tmp, format=path.suffix[1:], dpi=150)
    plt.close(fig)
    return path

# --- main -----------------------------------------------------------------------------------------

FAILED = []                                                   # what could not be measured

def attempt(function, *rest):
    """function(*rest); where that fails, its one line is printed and None comes back."""
    try:
        return function(*rest)
    except SystemExit as err:
        if err.code != 2:
            raise
        FAILED.append(rest)

def data_flags(sae, args, default):
    """Which data an SAE is measured on, as JSON: what its run records, or what the first run that
    records any does, but for the flags given; with --model or --activations these alone."""
    given = {k: getattr(args, k) for k in DATA_FLAGS if getattr(args, k) is not None}
    recorded = {} if given.keys() & {"model", "activations"} else sae.flags or default or {}
    flags = {k: (recorded | given).get(k) for k in DATA_FLAGS}
    if not any(flags[k] for k in ("model", "layer", "activations")):
        data.fail(f"{sae.path}: records no data of ours; name them with --model and --layer, with "
                  "--activations, or with --model toy and --toy")
    numbers = "layer", "context", "cache_tokens"
    if wrong := [k for k, v in flags.items() if v is not None and not isinstance(
            v, int if k in numbers else (str, Path))]:
        data.fail(f"{sae.path}: damaged: its cfg.json has {wrong[0]} = {flags[wrong[0]]}")
    if not flags["activations"] and flags["model"] != "toy":          # the defaults, spelled out
        defaults = dict(model="smollm2", layer=6, context=lm.default_context(flags["model"]))
        flags |= {k: v for k, v in defaults.items() if flags[k] is None}
    return json.dumps(flags, default=str)

def open_data(key, saes, args):
    """The source behind data_flags; its flags as an attribute."""
    flags = argparse.Namespace(**json.loads(key), seed=0, batch_size=1, tokens=0)
    flags.activations = flags.activations and Path(flags.activations)
    cache = Path(str(saes[0].flags.get("cache_dir")))
    cache = args.cache_dir or (cache if cache.is_dir() else None)
    flags.cache_dir = None if flags.activations or flags.model == "toy" else cache
    names = [str(sae.path) for sae in saes[:3]] + ["..."] * (len(saes) > 3)
    data.about = ", ".join(names) + ": "
    try:
        source = data.open_source(flags, args.torch_device)
    finally:
        data.about = ""
    source.flags = flags
    return source

def measure(sae, x, mean, source):
    """The row of an SAE on raw activations x [M, D], and (rate, peak, total) of its latents."""
    if sae.d_in != source.d_in:
        data.fail(f"{sae.path}: takes D = {sae.d_in}, but {source.meta['model_name']} has "
                  f"{source.d_in}; evaluate it on its own data")
    differs = [name for name in ("model_hash", "hook_name", "text_hash", "context_size",
                                 "n_train_rows") if sae.meta.get(name) is not None
               and sae.meta[name] != source.meta.get(name)]
    if differs:
        print(f"note: {sae.path} was trained on other data ({', '.join(differs)} differ), perhaps "
              "on rows that are held out here")
    variant = sae.meta.get("training_architecture") or sae.kind
    row = dict(run=str(sae.path), variant=str(variant), architecture=sae.kind, d_in=sae.d_in,
               d_sae=sae.d_sae)
    result, latents = metrics.reconstruction(sae.to(source.device), x, mean)
    scale = source.scale if sae.norm == "none" else 1.0
    row |= result | metrics.geometry(sae.t["W_dec"], sae.inputs(sae.normed(x[:4096])[0]), scale)
    if source.truth:
        row["truth"] = metrics.recovery(sae, source.truth, source.mean.cpu())
    return row, latents

def agreement(measured):
    """Agreement between the seeds of each setting: added to its rows; a table, if there is any."""
    groups, lines, skip = {}, [], data.FREE_TO_CHANGE | {"seed"}
    for sae, row, (_, peak, _) in measured:
        if "seed" in sae.flags:
            key = json.dumps({k: v for k, v in sae.flags.items() if k not in skip}, sort_keys=True)
            groups.setdefault(key, {})[sae.flags["seed"]] = sae, row, peak
    for group in map(list, map(dict.values, groups.values())):
        if len(group) > 1:
            result = metrics.consistency([(sae.t["W_dec"], peak) for sae, _, peak in group])
            for _, row, _ in group:
                row["consistency"] = result
            lines += [[group[0][1]["run"], str(len(group)), number(result["matched_cosine"], ".3f"),
                       number(result["order"], ".3f"), f"{a['share']:.1%}",
                       *(number(a[t], ".3f") for t in ALIKE)] for a in result["alike"]]
    note = ("cosine of latents matched one to one; order; of the share with the largest "
            "activations, how many another seed has at a cosine above")
    header = ["first of", "runs", "matched", "order", "share", *ALIKE]
    return lines and ("Agreement between seeds", note, header, lines)

def evaluate_group(key, saes, args):
    """Measure SAEs on one data set: print tables, write evaluation.json; a group for the page."""
    source = open_data(key, saes, args)
    name, layer, text = source.meta["model_name"], source.flags.layer, source.meta.get("text_hash")
    if args.features and not text:
        attempt(data.fail, f"--features: {name} has no tokens to show; leave it out for these runs")
    x = source.heldout_raw()
    mean, measured = x.double().mean(0), []
    for sae in tqdm(saes, desc="measure", unit="run", disable=None):
        if result := attempt(measure, sae, x, mean, source):
            measured.append((sae, *result))
    if not measured:
        return None
    saes, rows, _ = zip(*measured)
    games = text and lm.is_othello(name)                        # whose true features are known
    if text and (args.contexts or args.features or args.html or games):
        model, tokenizer, blocks = lm.load(lm.model_dir(name, source.flags.cache_dir), name,
                                           source.device, getattr(torch, source.meta["dtype"]))
        ids, where = lm.heldout_tokens(source)
        ids = ids[np.unique(where // ids.shape[1])[:args.contexts]]
        if ids.size and ids.shape[1] > 2:
            results = metrics.language(saes, model, blocks[layer], source.meta["norm_cut"],
                                       source.mean, ids)
            for row, result in zip(rows, results):
                row["language"] = result
    if games:
        from othello import boards
        games = attempt(boards.report, saes, x, source, model, blocks, layer)
    if games:
        for row, (result, _) in zip(rows, games[0]):
            row["boards"] = dict(result, baselines=games[1])
        measured = [(sae, row, (rate, peak, f1)) for (sae, row, (rate, peak, _)), (_, f1)
                    in zip(measured, games[0])]               # 'top' sorts by F1, not by sums
    shown = tables(rows)
    if args.consistency and (table := agreement(measured)):
        shown.append(table)
    for table in shown:
        print_table(*table)
    for sae, row, (rate, _, total) in measured:
        row.update(data=source.meta, evaluated=str(datetime.date.today()), torch=torch.__version__)
        text_of_row = json.dumps(without_nan(row), indent=1, allow_nan=False)
        attempt(write, sae.path / "evaluation.json", text_of_row, "run directory")
        if text and (latents := attempt(chosen, sae, args, rate, total)):
            row["features"] = list(features(sae, x, latents, rate, source, model, tokenizer,
                                            blocks))
            if games:
                for f, board in zip(row["features"], boards.describe(sae, x, latents, source)):
                    f["board"] = board
            if args.features:
                print_features(sae, row["features"])
    where = f"{name}, layer {layer}, text sha256 {text[:8]}" if text else name
    return dict(data=f"{where}, {len(x):,} held-out tokens", tables=shown, rows=rows)

def open_device(name):
    """The device of that name, set up to measure."""
    device = data.setup(argparse.Namespace(device=name, compile=False, bf16=False, batch_size=1,
                                           tokens=1, out=None, resume=False))
    if device.type == "mps":
        data.fail("--device mps: has no float64, in which sums are made; use --device cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")         # no TF32 in what is printed
    return device

def without_nan(value):
    """value with None in the place of each NaN: JSON has none."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value

def write(path, text, flag):
    with data.replacing(path, flag) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return path

def main(argv=None):
    FAILED.clear()
    args = parse_args(argv)
    args.torch_device = open_device(args.device)
    saes = [sae for path in args.runs if (sae := attempt(metrics.SAE, path))]
    default, groups = next((sae.flags for sae in saes if sae.flags), None), {}
    for sae in saes:
        if key := attempt(data_flags, sae, args, default):
            groups.setdefault(key, []).append(sae)
    done = [attempt(evaluate_group, key, group, args) for key, group in groups.items()]
    done = [group for group in done if group]
    rows = [row for group in done for row in group["rows"]]
    if args.consistency and not any("consistency" in row for row in rows):
        attempt(data.fail, "--consistency: no two of these runs differ in --seed alone; add some")
    if args.html and done:
        import page
        if attempt(write, args.html, page.render(done), "--html"):
            print(f"\npage: {args.html}")
    if args.plot and done and attempt(plot, done, args.plot):
        print(f"plot: {args.plot}")
    raise SystemExit(2 if FAILED else 0)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; what the tables show is written, the rest is not", file=sys.stderr)
        raise SystemExit(130)
