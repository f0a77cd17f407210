"""The tables and the plot of evaluate.py, made from the rows that it measured, one dict a run."""
import json

import runs
from evaluation import first_letter, metrics, probing
from evaluation.page import to_the_right

ALIKE = "0.7", "0.8", "0.9"
CONES = 1, 2, 4, 8, 16                # budgets that are shown
COVERED = (4, 0.5), (16, 0.9)         # with these, the share of directions above a containment

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
    if nested := [r for r in rows if r.get("levels")]:
        cells = [[r["run"], *(f"{m}: {number(e)}" for m, e in r["levels"].items())] for r in nested]
        levels = max(map(len, cells))
        out.append(("FVU of the first latents alone", "m: fvu, of the levels that a run was "
            "trained with", ["run", *(f"level {g}" for g in range(1, levels))],
            [row + [""] * (levels - len(row)) for row in cells]))
    if language := [r for r in rows if r.get("language")]:
        c = language[0]["language"]
        out.append(("Language model with the reconstruction spliced in",
            f"{c['contexts']} held-out contexts, {c['tokens']:,} tokens; cross-entropy as it is "
            f"{c['ce']:.4f}, ablated to zero {c['ce_zero']:.4f}, to the mean {c['ce_mean']:.4f}; "
            "dropped positions and outliers left as they are",
            ["run", "ce", "increase", "recovered of zero", "of mean", "kl"],
            [[r["run"], number(r["language"]["ce_spliced"]), *(pair(r["language"], name, ".4f")
              for name in ("increase", "recovered_zero", "recovered_mean", "kl"))]
             for r in language]))
    if found := [r for r in rows if r.get("first_letter")]:
        out.append(letters_table(found))
    if found := [r for r in rows if r.get("probing")]:
        out += probing_tables(found)
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
    out += cone_tables([r for r in rows if r.get("cones")])
    if scored := [r for r in rows if r.get("monosemanticity")]:
        beside = scored[0]["monosemanticity"]
        every = [(r["run"], r["monosemanticity"]) for r in scored] + [
            ("random, as many and as sparse", beside["random"]),
            ("coordinates of the activations", beside["neurons"])]
        out.append(("Monosemanticity score", f"chance {beside['chance']:.4f}, the mean cosine of "
            "all pairs; 10+: of those active on at least ten inputs; random: for the first run",
            "run mean \u00b1 best worst 10+ dead".split(),
            [[n, *(number(m[k]) for k in ("mean", "std", "best", "worst", "mean_10")),
              f"{m['dead']:,} of {m['of']:,}"] for n, m in every]))
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

def cone_tables(rows):
    """A table for each kind of references that the rows have containments of."""
    middle = CONES[2]
    for name in rows[0]["cones"] if rows else ():
        every = [(r["run"], r["cones"][name]) for r in rows]
        beside = every[0][1]
        def cells(c):
            by = c["controls"]["random"]["containment"] if "controls" in c else None
            return [*(f"{c['containment'][m - 1]:.3f}" + (f" ({by[m - 1]:.2f})" if by else "")
                      for m in CONES), number(c["se"][middle - 1], ".3f"),
                    *(f"{c['coverage'][str(t)][m - 1]:.2f}" for m, t in COVERED),
                    f"{c['cosine']:.3f}"]
        yield (f"Concept cones: {name}", f"containment of {beside['references']} directions by m "
               f"latents (by m of as many random ones), its standard error at m = {middle}, and "
               "the share above a value; cosine one to one; below, controls for the first run",
               ["run", *(f"m = {m}" for m in CONES), "\u00b1",
                *(f"> {t}, m = {m}" for m, t in COVERED), "cosine"],
               [[n, *cells(c)] for n, c in every + list(beside["controls"].items())])

def letters_table(rows):
    """The first letters of rows that have them, and the controls of the first."""
    first = rows[0]["first_letter"]
    passed = sorted(first["letters"])
    few = "" if len(passed) >= first_letter.MANY else (
        f", fewer than the {first_letter.MANY} that SAEBench wants")
    note = (f"{first['words']:,} tokens that are words; means over the {len(passed)} letters that "
            f"the activations tell with F1 above {first_letter.GOOD_F1}{few}: {' '.join(passed)}; "
            "F1 of the probe "
            f"{first['probe_f1']:.3f}")
    lines = [(r["run"], r["first_letter"]) for r in rows] + list(first["controls"].items())
    names = dict(f1_first=".3f", f1_main=".3f", split=".2f", absorption=".3f", full=".3f",
                 absorption_raw=".3f", full_raw=".3f", attribution=".3f", answered=".2f")
    return ("First letters: absorption", note,
            ["run", "L0 on words", "F1 of first latent", "of main latents", "main latents",
             "absorption", "full", "as in SAEBench", "full, as in SAEBench", "by attribution",
             "answered, where silent"],
            [[name, number(r["l0"], ".1f"), *(
                f"{number(r.get(k), form)} \u00b1 {number(r.get(k + '_se'), form)}"
                for k, form in names.items())] for name, r in lines])

def probing_tables(rows):
    """k-sparse probing of rows that have it, with what stands beside the first; by task, too."""
    beside = dict(rows[0]["probing"]["beside"])
    counted, scored = beside.pop("counted"), beside.pop("scored")
    lines = [(r["run"], r["probing"]) for r in rows] + list(beside.items())
    cell = lambda r, k, name, se="": number(r[k][name], ".3f") + (
        f" \u00b1 {number(r[k][name + '_se'], '.3f')}" if se else "") if k in r else ""
    ks = [str(k) for k in probing.K]
    note = (f"accuracy, chance 0.5; means over {', '.join(counted) or 'no task'}, which all "
            f"activations tell better than the token alone does, by {probing.MARGIN}")
    first = ("k-sparse probing", note, ["run", *(f"k = {k}" for k in ks), "all", "signed k = 1",
             "F1 k = 1", "F1 k = 5", "AUC k = 1", "AUC k = 5"],
             [[name, *(cell(r, k, "accuracy", "se") for k in (*ks, "all")),
               cell(r, "signed", "accuracy"), *(cell(r, k, name) for name in ("f1", "auc")
                                                for k in ("1", "5"))] for name, r in lines])
    by = lambda r, t: " / ".join(number(r[k]["tasks"][t], ".3f") for k in ("1", "5", "all")
                                 if k in r)
    fewest = ", ".join(f"{t} {n:,}" for t, n in scored.items())
    return [first, ("k-sparse probing by task", "accuracy at k = 1 / 5 / all; in brackets: not in "
            f"the means; a class is scored on at least so many examples: {fewest}",
            ["run", *(t if t in counted else f"({t})" for t in scored)],
            [[name, *(by(r, t) for t in scored)] for name, r in lines])]

def print_table(title, note, header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    right = to_the_right(len(header), rows)
    print(f"\n{title}: {note}")
    for row in [header, *rows]:
        print("  ".join(c.rjust(w) if r else c.ljust(w)
                        for c, w, r in zip(row, widths, right)).rstrip())

def plot(groups, path):
    """The frontier as a picture: L0 against FVU, and against cross-entropy recovered if known."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        runs.fail("--plot needs matplotlib; pip install matplotlib")
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
    with runs.replacing(path, "--plot") as tmp:
        fig.savefig(tmp, format=path.suffix[1:], dpi=150)
    plt.close(fig)
    return path

def agreement(measured):
    """Agreement between the seeds of each setting: added to its rows; a table, if there is any."""
    groups, lines, skip = {}, [], runs.FREE_TO_CHANGE | {"seed", "dense"}
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
    note = (f"cosine of latents matched one to one (exactly, up to F = {metrics.EXACT:,}; of more, "
            "pairs nearest to each other first, which gives less); order; of the share with the "
            "largest activations, how many another seed has at a cosine above")
    header = ["first of", "runs", "matched", "order", "share", *ALIKE]
    return lines and ("Agreement between seeds", note, header, lines)
