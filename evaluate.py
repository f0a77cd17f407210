"""Finished runs side by side: which SAE is better, and in what sense?

    python evaluate.py RUN [RUN ...]                     a row for each; evaluation.json in each RUN
    python evaluate.py runs/* --html report.html         one page: tables, plots, what latents mean
    python evaluate.py RUN --features 12,57              where these latents fire (or: top); on
                                                         othello, what they say of the board
    python evaluate.py RUN RUN RUN --consistency         do the seeds of one setting agree?
    python evaluate.py RUN --cones                       do few latents give a known direction?
    python evaluate.py RUN --embeddings E.npy            are inputs that a latent fires on alike?
    python evaluate.py runs/* --probes                   in a language model: absorption of first
                                                         letters, and what latents know of tokens
    python evaluate.py DIR --model smollm2 --layer 6     somebody else's SAELens directory

A RUN is what our scripts write, or any SAELens directory (standard, gated, topk, jumprelu). All are
measured alike on the held-out part, at most 65,536 tokens, of the data that they record, or of the
data that the flags name. Nothing was trained on it, but matryoshka_sae.py sets its threshold on
half. evaluation/metrics.py says what each number is, othello/boards.py those of Othello. A run that
cannot be measured costs one line and the exit code 2; the others are measured all the same. Runs
record paths as they were given: evaluate them from the folder where they were trained, or name the
data.
"""
from pathlib import Path

import numpy as np
import torch

import data
import runs
from evaluation import cones, metrics, monosemanticity, page
from evaluation.known import Known
from evaluation.latents import chosen, detects, features, print_features
from evaluation.saved import SAE, data_flags, open_data, page_path, write_page, write_result
from evaluation.tables import agreement, plot, print_table, tables
from othello import boards
from sources import lm, toy

# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    add = parser.add_argument_group("evaluation").add_argument
    add("--contexts", type=runs.at_least(0), default=100,
        help="held-out contexts for cross-entropy and kl; default 100; 0: neither")
    add("--features", help="latents to show: 12,57 or top (the ten with the largest sums; on "
        "othello, that say most about the board)")
    add("--consistency", action="store_true", help="compare runs that differ in --seed alone")
    add("--cones", action="store_true", help="do few latents add up to the directions of known "
        "properties (boards, toys' features, first letters, roles of tokens)? Kept as --probes")
    add("--embeddings", type=Path, help="monosemanticity by these: .npy or .safetensors, a row for "
        "each row of --activations (on othello: always, by the boards)")
    add("--probes", action="store_true", help="first letters of words, roles of tokens in Python: "
        "evaluation/first_letter.py and probing.py; minutes for the first run, 1 for each further, "
        "2 at another L0; kept in its probes.json")
    add("--labels", type=Path, help="with --probes or --cones: lines {\"text\": ..., \"labels\": "
        "{\"task\": [[start, end, \"class\"], ...]}}, in characters, in the place of Python; of "
        "each text the whole contexts count")
    add("--html", type=page_path, help="write the page there")
    add("--html-features", type=runs.at_least(0), default=60,
        help="latents of each run on the page, evenly spaced by firing rate; default 60")
    add("--plot", type=Path, help="write the L0-FVU frontier there, as .png, .svg or .pdf")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    args.runs = list({path.resolve(): path for path in args.runs}.values())
    if args.features is not None and args.features != "top":
        try:
            args.features = [int(i) for i in args.features.split(",")]
        except ValueError:
            parser.error(f"--features {args.features}: use numbers as in 12,57, or top")
    if args.labels and not (args.probes or args.cones):
        parser.error("--labels: is for --probes and --cones; add one")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: name it .png, .svg or .pdf")
    return args

# --- main -----------------------------------------------------------------------------------------

FAILED = []                                                   # what could not be measured

def attempt(function, *rest):
    """function(*rest); where the input is bad, its one line is printed and None comes back."""
    try:
        return function(*rest)
    except runs.BadInput as err:
        runs.print_error(err)
        FAILED.append(rest)

def measure(sae, x, mean, source):
    """The row of an SAE on raw activations x [M, D], and (rate, peak, total) of its latents."""
    if sae.d_in != source.d_in:
        runs.fail(f"{sae.path}: takes D = {sae.d_in}, but {source.meta['model_name']} has "
                  f"{source.d_in}; evaluate it on its own data")
    differs = [name for name in ("model_hash", "hook_name", "text_hash", "context_size",
                                 "n_train_rows") if sae.meta.get(name) is not None
               and sae.meta[name] != source.meta.get(name)]
    if differs:
        print(f"note: {sae.path} was trained on other data ({', '.join(differs)} differ), perhaps "
              "on rows that are held out here")
    if sae.flags.get("activations") and not source.flags.activations:
        print(f"note: {sae.path} was trained on {sae.flags['activations']}, perhaps on this text")
    variant = sae.meta.get("training_architecture") or sae.kind
    row = dict(run=str(sae.path), variant=str(variant), architecture=sae.kind, d_in=sae.d_in,
               d_sae=sae.d_sae)
    result, latents = metrics.reconstruction(sae.to(source.device), x, mean)
    scale = source.scale if sae.norm == "none" else 1.0
    row |= result | metrics.geometry(sae.t["W_dec"], sae.inputs(sae.normed(x[:4096])[0]), scale)
    if sae.widths:
        row["levels"] = metrics.prefixes(sae, x, mean, sae.widths)
    if source.truth:
        row["truth"] = metrics.recovery(sae, source.truth, source.mean.cpu())
    return row, latents

def references(source, x, probe, known):
    """{name: [n, D]}, directions of what is known to be true of raw activations x, for --cones:
    by the probe of boards, of letters and roles of tokens (a Known), or a toy's features."""
    if probe:
        return boards.directions(probe, boards.HeldOut(source), x)
    if known:
        return known.directions()
    if source.truth:
        return {"true features": source.truth.features.to(x)}
    runs.fail(f"--cones: of {source.meta['model_name']} no true directions are known; leave it out "
              "for these runs")

def evaluate_group(key, saes, args):
    """Measure SAEs on one data set: print tables, write evaluation.json; a group for the page."""
    source = open_data(key, saes, args)
    name, layer, text = source.meta["model_name"], source.flags.layer, source.meta.get("text_hash")
    if args.features and not text:
        attempt(runs.fail, f"--features: {name} has no tokens to show; leave it out for these runs")
    x = source.heldout_raw()
    mean, measured = x.double().mean(0), []
    for sae in runs.Bar(saes, desc="measure", unit="run"):
        if result := attempt(measure, sae, x, mean, source):
            measured.append((sae, *result))
    if not measured:
        return None
    saes, rows, _ = zip(*measured)
    games = text and lm.is_othello(name)                        # whose true features are known
    if args.probes and (games or not text):
        attempt(runs.fail, f"--probes: {name} has no words; leave it out for these runs")
    probe, known = (args.probes or args.cones) and text and not games, None
    if text and (args.contexts or args.features or args.html or games or probe):
        model, tokenizer, blocks = lm.load(lm.model_dir(name, source.flags.cache_dir), name,
                                           source.device, getattr(torch, source.meta["dtype"]))
        ids, where = lm.heldout_tokens(source)
        ids = ids[np.unique(where // ids.shape[1])[:args.contexts]]
        if ids.size and ids.shape[1] > 2:
            results = metrics.language(saes, model, blocks[layer], source.meta["norm_cut"],
                                       source.mean, ids)
            for row, result in zip(rows, results):
                row["language"] = result
    if probe and (known := attempt(Known, source, args.labels, model, tokenizer, blocks[layer])):
        for kind, of in (("first_letter", known.letters), ("probing", known.probes)):
            for row, result in zip(rows, args.probes and attempt(of, saes) or []):
                row[kind] = result
    if games:
        games = attempt(boards.report, saes, x, source, model, blocks, layer)
    if games:
        for row, (result, _) in zip(rows, games[0]):
            row["boards"] = dict(result, baselines=games[1])
        measured = [(sae, row, (rate, peak, f1)) for (sae, row, (rate, peak, _)), (_, f1)
                    in zip(measured, games[0])]               # 'top' sorts by F1, not by sums
    E = boards.one_hot(boards.HeldOut(source).truth) if games else None
    if args.embeddings:
        found = attempt(monosemanticity.embeddings, args.embeddings, source)
        E = E if found is None else found
    if E is not None:
        monosemanticity.report(saes, rows, x, mean, E)
    if args.cones and (known or not probe):
        attempt(cones.report, measured, x, mean,
                lambda: references(source, x, games and games[2], known),
                [source.meta, known and known.facts], *(
                    Known.code if known else [(boards if games else toy).__file__]))
    shown = tables(rows)
    if args.consistency and (table := agreement(measured)):
        shown.append(table)
    for table in shown:
        print_table(*table)
    for sae, row, (rate, _, total) in measured:
        attempt(write_result, sae.path / "evaluation.json", row, source)
        detected = detects(row)
        if text and (latents := attempt(chosen, sae, args, rate, total, detected)):
            row["features"] = list(features(sae, x, latents, rate, source, model, tokenizer,
                                            blocks))
            for f in row["features"]:
                f["detects"] = detected.get(f["latent"], [])
            if games:
                for f, board in zip(row["features"], boards.describe(sae, x, latents, source)):
                    f["board"] = board
            if args.features:
                print_features(sae, row["features"])
    where = f"{name}, layer {layer}, text sha256 {text[:8]}" if text else name
    return dict(data=f"{where}, {len(x):,} held-out tokens", tables=shown, rows=rows)

def main(argv=None):
    FAILED.clear()
    args = parse_args(argv)
    args.torch_device = runs.open_device(args.device)
    saes = [sae for path in args.runs if (sae := attempt(SAE, path))]
    default, groups = next((sae.flags for sae in saes if sae.flags), None), {}
    for sae in saes:
        if key := attempt(data_flags, sae, args, default):
            groups.setdefault(key, []).append(sae)
    done = [attempt(evaluate_group, key, group, args) for key, group in groups.items()]
    done = [group for group in done if group]
    rows = [row for group in done for row in group["rows"]]
    if args.consistency and not any("consistency" in row for row in rows):
        attempt(runs.fail, "--consistency: no two of these runs differ in --seed alone; add some")
    if args.html and done:
        attempt(write_page, args.html, page.render(done))
    if args.plot and done and attempt(plot, done, args.plot):
        print(f"plot: {args.plot}")
    raise SystemExit(2 if FAILED else 0)

if __name__ == "__main__":
    with runs.one_line_errors("stopped; what the tables show is written, the rest is not"):
        main()
