"""A reward made of latents: which of two answers is preferred, and which latents say so?

    python applications/reward.py RUN pairs.jsonl --html reward.html
    python applications/reward.py RUN new.jsonl --make documented+closed --pairs 600
    python applications/reward.py RUN pairs.jsonl --edit 1176=0 --edit 88=2.0
    python applications/reward.py RUN pairs.jsonl --pair 12            # a line of the file

SARM (arXiv 2508.08746; notes on text and code were read): r = sum_i w_i z_i, z: codes of a trained
SAE at the last token of the answer, w by Bradley-Terry: -log sigmoid(r_chosen - r_rejected). That
is logistic regression without intercept on z_chosen - z_rejected. The released recipe has its head
on the pre-activations: a linear probe of the residual in disguise. Here z keeps its sparsity.

Pairs     evaluation/preferences.py: their file, and --make. A third of the groups (of made pairs:
          of the files) is held out; no prompt is on both sides, nor in two folds
Read at   last: the last token of the answer. mean: z averaged over the answer; ours, and what all
          but the first table show unless --at last: there latents speak of all tokens, whose
          roles are known
Fit       Accuracy in 5-fold cross-validation takes L1, unless L2 is better by more than 0.02, then
          the strongest penalty within a standard error of the best. Dense inputs, which gain
          nothing by few weights, have the best L2. C: as in scikit-learn, small is strong
Beside    residual: the activations. pre-activations: W_enc without the rule that makes z sparse.
          untrained: a random dictionary as sparse as the run. random encoder: its products alone
          (the paper's ablation, as we understand it). length: tokens of the answer
Sure?     accuracy, ties half, with Wilson's interval; minus residual: bootstrap over pairs; 95 %
Deciding  latent i adds w_i (z_chosen - z_rejected)_i to a margin; these sum to it exactly. share:
          |that|, averaged over held-out pairs, of all latents'. What they detect, with an F1 of
          0.2 or, if they are rarer than that, at least precisely: class of evaluation/programs.py;
          of Python also inside, place, level of that, and roles as in evaluate.py --probes
--edit    I=FACTOR multiplies w_I. How far rewards and margins move: the mean |change|; and how many
          times as far as those of all pairs of other attributes
Writes RUN/reward.json and RUN/reward_head.safetensors (w [F] for raw codes, and w_edited). Bad
input costs one line, which names the line of the file, and the exit code 2.
"""
import argparse, json, re, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
from evaluation import page, preferences
from evaluation.answers import READS, Reader, linear, untrained
from evaluation.deciding import CARRIED, Attribution, about, accuracy, edited, moves, right
from evaluation.intervals import bootstrap
from evaluation.saved import open_language_run, page_path, write_page, write_result
from evaluation.tables import print_table

GRID = dict(L2=(0.1, 1, 10, 100, 1e3, 1e4, 1e5), L1=(0.03, 0.1, 0.3, 1, 3, 10, 30))
REFIT, FOLDS, PRICE = 100, 5, 0.02     # PRICE: accuracy that few weights may cost
WAYS = "SAE", "residual", "pre-activations", "untrained", "random encoder", "length"
SHOWN, OF_PAIR = 200, 8                 # held-out pairs on the page; latents of each
COUNTS = 1, 2, 3, 5, 8, 12, 16, 24, 32  # latents kept, in the figure
OLD = LogisticRegression().penalty == "l2"        # before scikit-learn 1.8: Python 3.10 has that

# --- arguments ------------------------------------------------------------------------------------

def factor(text):
    """An argparse type: LATENT=FACTOR, the latter for its weight."""
    found = re.fullmatch(r"(\d+)=([-+]?[\d.]+(?:e[-+]?\d+)?)", text)
    if not found or abs(float(found[2])) > 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not LATENT=FACTOR, as in 1176=0 or 88=2.0, "
                                         "with a factor of at most 1e9")
    return int(found[1]), float(found[2])

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("file", type=Path, metavar="FILE", help="a .jsonl file of pairs")
    add = parser.add_argument_group("reward").add_argument
    add("--make", metavar="ATTRIBUTES", help="write the file first: "
        f"{', '.join(preferences.ATTRIBUTES)}, or several joined by +")
    add("--pairs", type=runs.at_least(preferences.FEWEST), metavar="N",
        help="how many --make writes; default 600")
    add("--at", choices=READS, default=READS[0], help="where the head reads that is saved, "
        "explained and edited; default mean")
    add("--edit", type=factor, action="append", default=[], metavar="LATENT=FACTOR",
        help="multiply the weight of a latent; may be repeated")
    add("--pair", type=runs.count, metavar="LINE", help="print what decided the pair of this line")
    add("--top", type=runs.count, default=10, help="latents that are shown; default 10")
    add("--length", type=runs.at_least(2), default=512, help="tokens of prompt and answer "
        "that are read, the last ones; default 512")
    add("--seed", type=runs.at_least(0), default=0, help="of the split, and of --make; default 0")
    add("--html", type=page_path, help="write the page there")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    latents = [i for i, _ in args.edit]
    if again := [i for i in latents if latents.count(i) > 1]:
        parser.error(f"--edit {again[0]}=...: given twice; give one factor for each latent")
    if args.make:
        args.make = preferences.checked("--make", args.make)
        if args.file.exists():
            parser.error(f"--make: {args.file} exists; name a new file, or leave --make out")
    elif args.pairs:
        parser.error("--pairs: is for --make; the pairs of a file are all read")
    args.torch_device = runs.open_device(args.device)
    return args

# --- heads ----------------------------------------------------------------------------------------

def fitted(d, penalty, C):
    """w of Bradley-Terry for differences d [n, width]. To turn a pair round changes nothing in the
    loss, and with every second one turned there are two classes, as the solver wants. L1 chooses
    the weights that are not 0; these are then fitted with a weak L2, or all would be too small."""
    sign = np.where(np.arange(len(d)) % 2, 1, -1)
    kind = dict(penalty=penalty.lower()) if OLD else dict(l1_ratio=float(penalty == "L1"))
    solver = dict(solver="liblinear" if penalty == "L1" else "lbfgs", random_state=0, max_iter=1000)
    model = LogisticRegression(C=C, fit_intercept=False, **kind, **solver)
    w = model.fit(d * sign[:, None], sign).coef_[0]
    if penalty == "L1" and (on := np.flatnonzero(w)).size:
        w[on] = fitted(d[:, on], "L2", REFIT)
    return w

def bradley_terry(d, part, sparse):
    """w [width], penalty and C of a head on differences d [n, width] of pairs; part [n]: numbers of
    groups that stay together in cross-validation. By its accuracy L1 if sparse, unless that costs
    more than PRICE, and the strongest penalty within a standard error of its best; else the best
    L2."""
    used, w = np.flatnonzero(d.any(0)), np.zeros(d.shape[1])
    if not len(used):
        return SimpleNamespace(w=w, penalty="", C=0.0)
    scale, n = np.sqrt((d ** 2).sum(1).mean()), len(d)
    d = d[:, used] / scale
    folds, good = list(GroupKFold(FOLDS).split(d, groups=part)), {}
    for penalty in ("L2", "L1") if sparse else ("L2",):
        good[penalty] = {c: sum(right(d[test] @ fitted(d[train], penalty, c)).sum()
                                for train, test in folds) / n for c in GRID[penalty]}
    best = {penalty: max(of.values()) for penalty, of in good.items()}
    penalty = "L1" if sparse and best["L1"] >= best["L2"] - PRICE else "L2"
    least = best[penalty] - sparse * np.sqrt(best[penalty] * (1 - best[penalty]) / n)
    c = min(c for c, share in good[penalty].items() if share >= least)
    w[used] = fitted(d, penalty, c) / scale
    return SimpleNamespace(w=w, penalty=penalty, C=c)

def heads(inputs, part, held):
    """{(way, read): a head, with its margins of all pairs [n]}."""
    out, every = {}, [(way, read) for way, reads in inputs.items() for read in reads]
    for way, read in runs.Bar(every, desc="fit heads", unit="head"):
        d = inputs[way][read][0] - inputs[way][read][1]
        head = bradley_terry(d[~held], part[~held], sparse=way in ("SAE", "untrained"))
        head.margin = d @ head.w
        out[way, read] = head
    return out

# --- what comes out -------------------------------------------------------------------------------

def interval(values, sign=""):
    return "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*values, s=sign)

def minus(one, other):
    """(mean, low, high) of how much oftener the first margins are right."""
    more = right(one) - right(other)
    return more.mean(), *bootstrap(more)

def names_of(f):
    return [f"{task}={name}" for task, name, *_ in f["detects"]]

def tables(found, attribution, features, at, edits, moved):
    """What is printed and shown. found: heads(); attribution: that of the SAE's head."""
    of = lambda way, read=at: found[way, read if way != "length" else READS[0]]
    out, rows, held = [], [], attribution.held
    for (way, read), h in found.items():
        base = found["residual", read].margin[held]
        rows.append([way, read if way != "length" else "", interval(accuracy(h.margin[held])),
                     interval(minus(h.margin[held], base), "+") if way != "residual" else "",
                     f"{h.penalty} {h.C:g}", str(np.count_nonzero(h.w))])
    out.append(("Accuracy on held-out pairs", f"{(~held).sum()} pairs to train on, {held.sum()} "
                f"held out, no prompt in both; below: the head of the SAE read at '{at}'",
                ["head", "read at", "accuracy", "minus residual", "penalty, C", "weights"], rows))
    out.append(("By attribute", f"so many latents carry {CARRIED:.0%} of the margins",
                ["pairs of", "held out", "SAE", "residual", "length", "latents"],
                [[name, str(own.sum()), *(interval(accuracy(of(way).margin[own]))
                  for way in ("SAE", "residual", "length")), str(attribution.carry(name))]
                 for name, own in attribution.rows.items()]))
    w = dict(zip(attribution.on, zip(attribution.share["all"], attribution.mostly)))
    out.append(("Latents that decide", "share: of the margins of held-out pairs",
                ["latent", "weight", "share", "mostly for", "fires", "detects", "peaks on"],
                [[str(f["latent"]), f"{of('SAE').w[f['latent']]:+.3g}", f"{w[f['latent']][0]:.1%}",
                  w[f["latent"]][1], f"{f['rate']:.2%}", ", ".join(names_of(f)[:2]),
                  " ".join(repr(c["tokens"][c["at"]]) for c in f["contexts"][:4])]
                 for f in features]))
    if moved:
        note = "; ".join(f"latent {i}, weight {of('SAE').w[i]:+.3g}, times {c:g}" for i, c in edits)
        out.append(("What the edits move", f"{note}; held-out pairs; accuracy before and after",
                    ["pairs of", "held out", "rewards move", "margins move", "margin before",
                     "margin after", "accuracy before", "accuracy after", "rewards / others",
                     "margins / others"],
                    [[name, str(m["pairs"]), f"{m['rewards']:.3f}", f"{m['margins']:.3f}",
                      f"{m['before']:+.3f}", f"{m['after']:+.3f}",
                      *(f"{v:.3f}" for v in m["accuracy"]), *times(m)]
                     for name, m in moved.items()]))
    return out

def times(m):
    """The two factors of deciding.moves as text."""
    cell = lambda v, own: f"{v:.2f}" if v is not None else "> 1e6" if own else "–"
    return list(map(cell, m["factor"], (m["rewards"], m["margins"]))) if "factor" in m else ["", ""]

def notes(head, edits):
    """Why tables are empty, or have zeros."""
    empty = "the head has no latents: these pairs cannot be told apart by single ones"
    said = [empty] if not head.w.any() else []
    return said + [f"--edit {i}=...: the weight of latent {i} is 0, so that nothing moves"
                   for i, _ in edits if not head.w[i]]

def pair_table(p, i, attribution, detects):
    held = "held out" if attribution.held[i] else "trained on"
    rows = [[str(latent), f"{adds:+.4f}", ", ".join(detects.get(latent, [])[:2])]
            for latent, adds in attribution.of_pair(i)]
    return (f"What decided the pair of line {p.line}", f"{held}; margin "
            f"{attribution.margin[i]:+.4f}, the sum of these", ["latent", "adds", "detects"], rows)

def render(args, shown, attribution, pairs, of_pairs, features):
    counts = [n for n in COUNTS if n <= max(1, len(attribution.on))]
    lines = {name: [(n, *accuracy(attribution.kept(n, own))) for n in counts]
             for name, own in list(attribution.rows.items())[:6]}
    figure = page.dose_svg("Accuracy of so many latents alone", "latents of the largest share",
                           "accuracy on held-out pairs", lines)
    texts = [dict(of_pairs[i], **vars(pairs[i])) for i in np.flatnonzero(attribution.held)[:SHOWN]]
    return page.document("Reward", "".join([
        f'<p class="note">{page.cell(args.run)}, {page.cell(args.file)}</p>',
        *(page.table_html(*t) for t in shown),
        page.figures_html([(figure, "The head of the SAE, all but its largest latents left out.")]),
        page.decided_html(texts, {f["latent"]: ", ".join(names_of(f)[:2]) for f in features}),
        page.features_html([dict(run=str(args.run), features=features)])]))

def main(argv=None):
    args = parse_args(argv)
    pairs = None if args.make else preferences.read(args.file)
    sae, source, model, tokenizer, block = open_language_run(args.run, args)
    if wrong := [i for i, _ in args.edit if i >= sae.d_sae]:
        runs.fail(f"--edit {wrong[0]}=...: {args.run} has latents 0 to {sae.d_sae - 1}")
    if args.make:
        made = preferences.make("--make", args.make, args.pairs or 600, source.flags.text,
                                args.seed)
        with runs.replacing(args.file, "PAIRS") as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in made))
        pairs = preferences.read(args.file)
    at = {p.line: i for i, p in enumerate(pairs)}
    if args.pair and args.pair not in at:
        runs.fail(f"--pair {args.pair}: {args.file} has no pair in this line")
    part, held = preferences.split(args.file, pairs, args.seed)
    random, rows = untrained(sae, source)
    before = lambda x: sae.inputs(sae.normed(x)[0]) @ sae.t["W_enc"]
    reader = Reader({"SAE": sae.encode, "pre-activations": before, "untrained": random}, source,
                    model, tokenizer, block, args.length)
    inputs = reader.read(args.file, pairs)
    inputs["random encoder"] = linear(inputs["residual"], rows.T)
    if reader.shortened:
        print(f"note: {reader.shortened} of {2 * len(pairs)} texts have more than {reader.longest} "
              "tokens (--length); their beginning is left out")
    found = heads({way: inputs[way] for way in WAYS}, part, held)
    head, z = found["SAE", args.at], inputs["SAE"][args.at]
    for note in notes(head, args.edit):
        print(f"note: {note}")
    attribution = Attribution(head, z, held, [p.attribute for p in pairs])
    features = about(sae, source, model, tokenizer, block, attribution.top("all", args.top))
    new = edited(head.w, args.edit)
    moved = moves(head.w, new, z, attribution.rows) if args.edit else {}
    shown = tables(found, attribution, features, args.at, args.edit, moved)
    detects = {f["latent"]: names_of(f) for f in features}
    if args.pair:
        i = at[args.pair]
        shown.append(pair_table(pairs[i], i, attribution, detects))
    for table in shown:
        print_table(*table)
    of_pairs = []
    for i, p in enumerate(pairs):
        adds = attribution.of_pair(i)
        of_pairs.append(dict(line=p.line, held=bool(held[i]), margin=float(head.margin[i]),
                             rewards=(z[:, i] @ head.w).tolist(), latents=adds[:OF_PAIR],
                             rest=sum(v for _, v in adds[OF_PAIR:])))
    result = dict(
        heads=[dict(way=way, read=read, accuracy=accuracy(h.margin[held]), penalty=h.penalty, C=h.C,
                    weights=int(np.count_nonzero(h.w))) for (way, read), h in found.items()],
        carry={name: attribution.carry(name) for name in attribution.rows},
        latents=[dict(latent=f["latent"], weight=float(head.w[f["latent"]]), rate=f["rate"],
                      share=attribution.shares_of(f["latent"]), detects=f["detects"])
                 for f in features],
        edits=moved, pairs=of_pairs)
    write_result(args.run / "reward.json", result, source, args)
    tensors = dict(w=head.w) | (dict(w_edited=new) if args.edit else {})
    with runs.replacing(args.run / "reward_head.safetensors", "run directory") as tmp:
        about_it = dict(at=args.at, penalty=head.penalty, C=str(head.C), pairs=str(args.file))
        tmp.write_bytes(save({name: torch.from_numpy(w) for name, w in tensors.items()}, about_it))
    if args.html:
        write_page(args.html, render(args, shown, attribution, pairs, of_pairs, features))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
