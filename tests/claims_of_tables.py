"""The rows of docs/CLAIMS.md that committed tables show, and the papers; tests/claims.py makes the page.

Numbers are read from docs/results.md and benchmarks/results; a row's `holds`, of these numbers, makes its verdict true.
"""
import json
import math
import re
from collections import namedtuple
from functools import cache, partial
from pathlib import Path
from statistics import mean

import numpy as np

ROOT = Path(__file__).parents[1]
Row = namedtuple("Row", "paper claim figure ours shown verdict")

def arxiv(who, number, read=""):
    """A paper as the page names it; `read` says what was read of it where its text was not at hand."""
    return f"{who}, [{number}](https://arxiv.org/abs/{number})" + f" ({read})" * bool(read)

PAPERS = {                                          # in the order of the page
    "coordinated": arxiv("Keshtkaran and Pandarinath 2019", "1908.07896", "abstract and notes read, not the text"),
    "bricken": "Sharkey et al. 2022 (replications by others read, not the text), Bricken et al. 2023 (a translation read)",
    "cunningham": arxiv("Cunningham et al. 2023", "2309.08600"),
    "gated": arxiv("Rajamanoharan et al. 2024", "2404.16014"),
    "gao": arxiv("Gao et al. 2024", "2406.04093", "code and notes read, not the text"),
    "nanda": arxiv("Nanda et al. 2023", "2309.00941"),
    "karvonen": arxiv("Karvonen et al. 2024", "2408.00113", "code and notes read, not the text"),
    "absorption": arxiv("Chanin et al. 2024", "2409.14507"),
    "batchtopk": arxiv("Bussmann et al. 2024", "2412.06410"),
    "matryoshka": arxiv("Bussmann et al. 2025", "2503.17547", "a text without its formulas read"),
    "pach": arxiv("Pach et al. 2025", "2504.02821", "code and notes read, not the text"),
    "hedging": arxiv("Chanin et al. 2025", "2505.11756", "code read, not the text"),
    "song": arxiv("Song et al. 2025", "2505.20254", "code and abstract read, not the text"),
    "gba": arxiv("Chen et al. 2025", "2506.14002", "project page, notes and reviews read, not the text"),
    "sarm": arxiv("SARM, 2025", "2508.08746", "code and notes read, not the text"),
    "wrong-l0": arxiv("Chanin and Garriga-Alonso 2025", "2508.16560"),
    "sage": arxiv("SAGE, 2025", "2511.20820", "code and notes read, not the text"),
    "ordered": arxiv("Wang et al. 2025", "2512.02194"),
    "antibodies": arxiv("Haque et al. 2025", "2512.05794", "abstract and notes read, not the text"),
    "cones": arxiv("Rocchi, Fel and Franchi 2025", "2512.07355", "abstract read, not the text; the measure is ours"),
}

class Numbers(list):
    """Formats as its range, 'lo to hi', or as one number where both look alike."""
    def __format__(self, spec):
        lo, hi = format(min(self), spec), format(max(self), spec)
        lo, hi = (re.sub(r"^-([0.]+%?)$", r"\1", end) for end in (lo, hi))             # no -0.00
        return lo if lo == hi else f"{lo} to {hi}"

# --- numbers in committed tables ------------------------------------------------------------------

def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]

def table(file, column, *words, section=""):
    """A cell of a committed Markdown table, as it stands there: of the only row after the line
    **section** that has all these words as cells, in the (first) column with this heading."""
    text = (ROOT / file).read_text()
    header, found = [], []
    for line in text[text.index(f"**{section}**") if section else 0:].splitlines():
        if section and line.startswith("**") and line != f"**{section}**":
            break
        if line.startswith("|") and not set(line) <= set("|-: "):
            header = header or cells(line)
            if set(words) <= set(cells(line)) and column in header:
                found.append(cells(line)[header.index(column)])
        elif not line.startswith("|"):
            header = []
    assert len(found) == 1, (file, column, words, found)
    return found[0]

order = lambda column, *words: table("benchmarks/results/order.md", column, *words).split()[0]
bias = lambda toy, column, *words: table("benchmarks/results/bias.md", column, *words, section=toy).split()[0]
uniform = partial(bias, "gba")
uneven = partial(bias, "gba-imbalanced")
smollm2 = lambda column, *words: table("docs/results.md", column, *words)
ORDERED = "**Ordered** (k from 40, uniform law, full share .5)"
by = lambda script, file: f"`benchmarks/{script}.py`, [{file}](../benchmarks/results/{file})"
LM = "smollm2, [results](results.md#smollm2-other-settings)"
COMPARED = "smollm2, " + by("compare", "compare.md")
HIDDEN = by("choose_l0", "choose-l0.md")
REWARD = "smollm2, " + by("reward", "reward.md")
LETTERS = "smollm2, " + by("ground_truth", "ground-truth.md")

def runs(method):
    """{(L0 aimed at, seed): evaluation.json} of our runs in benchmarks/compare.py."""
    names = ROOT.glob(f"benchmarks/results/compare/ours-{method}-[0-9]*.json")
    keys = {path: re.search(r"-(\d+)-s(\d)$", path.stem).groups() for path in names}
    return {(int(l0), int(seed)): json.loads(path.read_text()) for path, (l0, seed) in sorted(keys.items())}

def over(method, base):
    """FVU of our runs over that of another method at the same L0 (between its runs of seed 0, all logarithmic)."""
    others = [(math.log(r["l0"]), math.log(r["fvu"])) for (_, seed), r in runs(base).items() if seed == 0]
    others = np.array(sorted(others)).T
    inside = [r for r in runs(method).values() if others[0, 0] - 0.1 < math.log(r["l0"]) < others[0, -1] + 0.1]
    return Numbers(r["fvu"] / math.exp(np.interp(math.log(r["l0"]), *others)) for r in inside)

def shared(method, t):
    """Of the .3 % of latents with the largest activations, the part that another seed has at a cosine above t."""
    return runs(method)[32, 0]["consistency"]["alike"][0][t]

def digits(words):
    """'n of m' after these words, by pixels and by class, in the table of benchmarks/monosemanticity.py."""
    return re.findall(rf"{words} in (\d+ of \d+)", (ROOT / "benchmarks/results/monosemanticity.md").read_text())

@cache
def results(name):
    """{run: its row} of benchmarks/results/NAME.json."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["runs"]

def absorbed(method, layer=6, of=lambda letters: letters["absorption"]):
    """Of first letters, by the runs of a method at an L0 of 32 in benchmarks/ground_truth.py."""
    return Numbers(of(row["first_letter"]) for name, row in results("ground-truth").items()
                   if re.fullmatch(rf"{layer}-{method}-32-s\d", name))

def by_k(of):
    """{k: of(row) of every seed} in benchmarks/which_l0.py."""
    found = sorted((int(name.split("-")[0]), name) for name in results("which-l0"))
    return {k: Numbers(of(results("which-l0")[name]) for other, name in found if other == k) for k, _ in found}

def falls(of):
    """Does its mean fall at each doubling of k, from 8 to 128?"""
    means = [mean(v) for k, v in by_k(of).items() if 8 <= k <= 128]
    return all(a > b for a, b in zip(means, means[1:]))

def over_k(of, form=".2f"):
    return ", ".join(f"{v:{form}}" for v in by_k(of).values())

def hedges(method, key="h"):
    """Hedging degrees of a method by benchmarks/hedging.py: of 2 D latents, of 8 D latents; 'null': without new latents."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/hedging.jsonl").open()]
    return [Numbers(row[key] for row in rows if row["name"][:2] == [method, width] and key in row) for width in (2, 8)]

def contained(k, expansion):
    """Of the board's directions, what four latents contain above as many random ones, in benchmarks/cones.py."""
    found = [r["cones"]["board probes"] for name, r in results("cones").items() if re.fullmatch(rf"{k}-{expansion}-s\d", name)]
    return Numbers(c["containment"][3] - c["controls"]["random"]["containment"][3] for c in found)

@cache
def over_hidden(task, curve="masked"):
    """{k: [value of each seed]} of benchmarks/choose_l0.py, p = 0.9."""
    tasks = json.loads((ROOT / "benchmarks/results/choose-l0.json").read_text())["tasks"]
    values = tasks[task]["coverage"] if curve == "coverage" else tasks[task]["curves"]["0.9"][curve]
    return {int(k): v for k, v in values.items()}

def best_k(task, curve="masked", end=min):
    """The k at which a mean over seeds is lowest, or highest, and that of each seed."""
    of = over_hidden(task, curve)
    return end(of, key=lambda k: mean(of[k])), [end(of, key=lambda k: of[k][i]) for i in range(len(next(iter(of.values()))))]

TOYS = {"flat": 5.0, "wrong": 11.0, "wrong-superposed": 11.0, "tree-24": 2.0, "song": 3.0}         # and their L0
rewards = lambda column, row: float(table("benchmarks/results/reward.md", column, row).split()[0])
HEADS = "topk", "vanilla", "gated", "matryoshka", "ordered", "gba"
ATTRIBUTES = "documented", "commented", "closed", "indented", "named"
steering = lambda column, method: table("benchmarks/results/steering.md", column, method).split()[0]

def explained(way, figure="r"):
    """{method: mean over latents} of explanations, in benchmarks/explaining.py."""
    by = {}
    for name, latents in results("explaining").items():
        by.setdefault(name.rsplit("-", 1)[0], []).extend(row["ways"][way][figure] for row in latents)
    return {method: mean(values) for method, values in by.items()}

OTHELLO = "othello, " + by("othello", "othello.md")
KARVONEN = "gated-p-annealed", "gated", "topk", "p-annealed", "vanilla"             # the methods of that paper, and TopK

@cache
def othello(part):
    """'runs' or 'steering' of benchmarks/othello.py."""
    return json.loads((ROOT / "benchmarks/results/othello.json").read_text())[part]

def boards(method, key, l0=32):
    """Of the runs of a method at this L0: what they know of the board."""
    found = [r for name, r in othello("runs").items() if re.fullmatch(rf"{method}-{l0}-s\d", name)]
    return Numbers(r["boards"].get(key, r.get(key)) for r in found)

def ranked(key):
    """Methods at an L0 of 32, and at 64, by the mean of key over seeds, best first; and that in words, with ranges."""
    texts, names = [], []
    for l0 in (32, 64):
        means = {m: mean(boards(m, key, l0)) for m in KARVONEN}
        names.append(sorted(means, key=means.get, reverse=True))
        texts.append(f"at {l0} " + ", ".join(f"{m.replace('gated-p-annealed', 'p-annealed gated')} {boards(m, key, l0):.2f}"
                                             for m in names[-1]))
    return names, "; ".join(texts)

# --- the rows -------------------------------------------------------------------------------------

def extra():
    """-> [Row]: the claims that a benchmark or a table of docs/results.md shows. Numbers are read there, and
    `holds`, of these numbers, is what makes the verdict true."""
    def row(paper, *rest, holds):
        assert holds, f"the numbers no longer support '{rest[0]}': {rest[-1]}"
        return Row(PAPERS[paper], *rest)
    gated, annealed, annealed_gated, batch, nested, gba, gba_l1 = (over(*pair) for pair in (
        ("gated", "vanilla"), ("p-annealed", "vanilla"), ("p-annealed", "gated"), ("batchtopk", "topk"),
        ("matryoshka", "batchtopk"), ("gba", "topk"), ("gba", "vanilla")))
    more = runs("matryoshka")[32, 0]["fvu"] - runs("batchtopk")[32, 0]["fvu"]
    order_lm = runs("ordered")[32, 0]["consistency"]["order"]
    topk_lm = runs("topk")[32, 0]["consistency"]["order"]
    fvu = {name: over(name, "topk") for name in ("batchtopk", "gated", "matryoshka", "p-annealed", "vanilla")}
    ranking = sorted(fvu, key=lambda name: min(fvu[name]))
    one_group = float(smollm2("fvu", "`--high 0.0135 --groups 1` (one group, Bias Adaptation)"))
    ten = Numbers(runs("gba")[32, seed]["fvu"] for seed in range(3))
    long = Numbers(runs("ordered")[32, seed]["fvu"] for seed in range(3))
    short = float(smollm2("fvu", "`--k-start 32` (not annealed)"))
    names = "vanilla", "p-annealed", "gated", "gated-p-annealed", "topk", "batchtopk", "matryoshka", "ordered", "gba"
    best = {k: max(max(boards(m, k, l0)) for m in names for l0 in (32, 64)) for k in ("coverage", "reconstruction")}
    topk = {k: max(max(boards("topk", k, l0)) for l0 in (32, 64)) for k in best}
    random = {k: max(max(boards("untrained", k, l0)) for l0 in (32, 64)) for k in best}
    base = othello("runs")["topk-32-s0"]["boards"]["baselines"]
    probe, neurons = base["linear probe"], base["768 neurons of block 5"]
    fourth = othello("runs")["layer-4"]["boards"]
    neurons_4 = fourth["baselines"]["768 neurons of block 3"]["coverage"]
    by_layer = [ways for name, (ways, _) in othello("steering").items() if name.startswith(("layer", "topk"))]
    steered = min(by_layer, key=lambda ways: ways["probe"]["errors"])
    at_random = lambda m, layer: absorbed(m, layer, lambda letters: letters["controls"]["untrained"]["absorption"])
    best_mcc = {toy: max(map(mean, over_hidden(toy, "mcc").values())) for toy in TOYS}
    short_of_best = {toy: best - mean(over_hidden(toy, "mcc")[best_k(toy)[0]]) for toy, best in best_mcc.items()}
    head = lambda column: Numbers(rewards(column, method) for method in HEADS)
    untrained = [rewards(column, "*untrained*") for column in ("mean over the answer", "last token")]
    moved, other = (partial(rewards, column) for column in ("margins move", "the other's"))
    pair = lambda of, layer: f"TopK {of('topk', layer):.2f}, BatchTopK {of('batchtopk', layer):.2f}"
    raw = lambda letters: letters["absorption_raw"]
    ours = lambda letters: letters["absorption"]
    nested_by = lambda of, layer: ", ".join(f"{m} {absorbed(m, layer, of):.2f}" for m in ("matryoshka", "batchtopk", "topk"))
    absorbs = lambda of, layer: [mean(absorbed(m, layer, of)) for m in ("matryoshka", "batchtopk", "topk")]
    probed = lambda r: r["probing"]["1"]["accuracy"]
    letters = lambda key: lambda r: r["first_letter"][key]
    of_others = Numbers(float(steering("steer", name)) for name in ("batchtopk", "matryoshka", "p-annealed", "gba"))
    hedge = {name: (hedges(name), hedges(name, "null")) for name in ("topk", "batchtopk", "matryoshka")}
    by_coverage, coverages = ranked("coverage")
    by_boards, reconstructions = ranked("reconstruction")
    neuron, random_codes, wider, sparser = map(digits, ("above neurons", "above random dictionaries", "scores higher",
                                                        "next sparser"))
    share = lambda found: Numbers(int(a) / int(b) for a, b in (text.split(" of ") for text in found))
    DIGITS = "handwritten digits, " + by("monosemanticity", "monosemanticity.md")
    gammas = {m: boards(m, "gamma_centred") for m in ("vanilla", "p-annealed", "gated")}
    active, passive = explained("active"), explained("passive")
    K, WIDTHS = (4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32)
    over_random = {w: {k: mean(contained(k, w)) for k in K} for w in WIDTHS}
    return [
        row("nanda", "a linear probe reads mine, yours and empty from the residual stream",
            "99.4 to 99.6 % of squares at this layer (width 512, 20M games)",
            f"{probe['accuracy']:.1%} (width 192, 1.6M games), and F1 {probe['coverage']:.2f} of mine and yours", OTHELLO,
            "partly", holds=0.9 < probe["accuracy"] < 0.99),
        row("nanda", "to add its direction changes the moves to those of the edited board",
            "errors 2.72, edited .10 (in many layers)",
            f"at the best one layer {steered['none']['errors']:.2f}, edited {steered['probe']['errors']:.2f}; TopK's latents "
            f"of the best F1 {steered['SAE latent']['fewer']:.2f} fewer, the one nearest to the probe {steered['1 latents']['fewer']:.2f}",
            OTHELLO, "partly", holds=1 < steered["none"]["errors"] - steered["probe"]["errors"] and steered["probe"]["errors"] > 0.5),
        row("karvonen", "SAEs of a trained model know far more of the board than those of a random one",
            "best coverage .52 and .27, best reconstruction .95 and .08 (coverage is of a possible 2/3)",
            f"TopK's best coverage times 2/3 {topk['coverage'] * 2 / 3:.2f} and {random['coverage'] * 2 / 3:.2f}, "
            f"reconstruction {topk['reconstruction']:.2f} and {random['reconstruction']:.2f}; of all methods "
            f"{best['coverage'] * 2 / 3:.2f} and {best['reconstruction']:.2f}", OTHELLO, "reproduced",
            holds=topk["coverage"] > 1.3 * random["coverage"] and topk["reconstruction"] > 2 * random["reconstruction"]),
        row("karvonen", "at equal L0 coverage ranks p-annealed gated, gated, TopK, p-annealed L1, L1 (its code's result files)",
            "so, .50, .42, .38, .34, .29 (L0 50 to 80, of a possible 2/3)", coverages, OTHELLO, "partly",
            holds=all(o[0] == KARVONEN[0] and o[-1] == KARVONEN[-1] and o != [*KARVONEN] for o in by_coverage)),
        row("karvonen", "at equal L0 reconstruction ranks p-annealed L1, gated, TopK, L1, p-annealed gated (its code's result files)",
            "so, .95, .87, .84, .81, .80 (L0 50 to 80; the last three about level)",
            reconstructions + "; at 64 (one seed) p-annealed L1 is first, as there", OTHELLO, "partly",
            holds=by_boards[0][0] == "gated-p-annealed" and by_boards[1][0] == "p-annealed" and by_boards[1][1] != "gated"),
        row("karvonen", "the MLP's neurons have a higher coverage than any SAE (its code's result files)",
            ".549 (layer 4) and .519 (of a possible 2/3)", f"times 2/3, at layer 6 {neurons['coverage'] * 2 / 3:.2f}, "
            f"best SAE {best['coverage'] * 2 / 3:.2f}; at layer 4 {neurons_4 * 2 / 3:.2f}, TopK {fourth['coverage'] * 2 / 3:.2f}", OTHELLO,
            "partly", holds=neurons["coverage"] > best["coverage"] + 0.02 and abs(neurons_4 - fourth["coverage"]) < 0.02),
        row("karvonen", "on Othello L1 shrinks, p-annealed L1 and gated do not", "gamma about .80; about 1",
            f"at an L0 of 32 {gammas['vanilla']:.2f}; {gammas['p-annealed']:.2f}, {gammas['gated']:.2f}", OTHELLO, "reproduced",
            holds=max(gammas["vanilla"]) < 0.9 and min(*gammas["p-annealed"], *gammas["gated"]) > 0.95),
        row("absorption", "in a language model latents of words take over from that of their first letter",
            "so in L1, TopK and JumpReLU SAEs",
            f"absorption at an L0 of 32, layer 6: {pair(absorbed, 6)}; layer 18: {pair(absorbed, 18)}; untrained dictionaries "
            f"{pair(at_random, 6)}; {pair(at_random, 18)}", LETTERS, "reproduced",
            holds=all(min(absorbed(m, layer)) > max(at_random(m, layer)) + 0.05 for m in ("topk", "batchtopk") for layer in (6, 18))),
        row("absorption", "the lower the L0, the more absorption, on a language model", "so, figures",
            f"TopK, k = {', '.join(map(str, by_k(letters('l0'))))}: by attribution {over_k(letters('attribution'))}; full "
            f"{over_k(letters('full'))}; but the mean share is highest about k = 16 to 32: {over_k(letters('absorption'))}",
            "smollm2, " + by("which_l0", "which-l0.md"), "partly", holds=falls(letters("attribution")) and falls(letters("full"))
            and not falls(letters("absorption"))),
        row("gated", "a gated SAE has a lower error than L1 at equal L0, on a language model",
            "Pareto better at nearly all sites (loss recovered)",
            f"FVU {gated:.2f} of that of L1 at the same L0, {len(gated)} runs", COMPARED, "reproduced",
            holds=max(gated) < 1),
        row("karvonen", "annealing p to .2 lowers the error of L1 at equal L0, on a language model",
            "level with gated, on board games (of language models none known to us)",
            f"FVU {annealed:.2f} of that of L1 and {annealed_gated:.2f} of that of gated at the same L0, one run", COMPARED,
            "reproduced", holds=max(annealed) < 1),
        row("batchtopk", "BatchTopK has a lower error than TopK at equal L0",
            "at all widths, L0 32, GPT-2 and Gemma-2-2B (its figures 1 and 2)",
            f"FVU {batch:.2f} of that of TopK at the same L0, {len(batch)} runs", COMPARED, "reproduced",
            holds=max(batch) < 1),
        row("batchtopk", "errors at an L0 below 100 rank BatchTopK, TopK, gated, Matryoshka, p-annealed L1, L1",
            "so in SAEBench, Gemma-2-2B, 65k latents (with JumpReLU, which we have not)",
            "FVU over that of TopK at the same L0: " + ", ".join(f"{name} {fvu[name]:.2f}" for name in ranking), COMPARED,
            "partly", holds=ranking[0] == "batchtopk" and ranking != ["batchtopk", "gated", "matryoshka", "p-annealed", "vanilla"]),
        row("matryoshka", "nesting costs a little reconstruction",
            "variance explained .70, BatchTopK .72: .02 of FVU, 7 % more error (Gemma-2-2B, L0 40, 65k latents)",
            f"{more:.3f} of FVU, as there, but of a smaller one: {nested:.2f} times that of BatchTopK at the same L0, "
            f"{len(nested)} runs", COMPARED, "partly", holds=min(nested) > 1.07 and 0.01 < more < 0.03),
        row("matryoshka", "Matryoshka absorbs less than BatchTopK, on a language model", ".05, BatchTopK .49 (Gemma-2-2B)",
            "at an L0 of 32 a little less at layer 6 in SAEBench's form, where random dictionaries absorb, too: " + nested_by(raw, 6)
            + "; more at layer 18: " + nested_by(raw, 18) + "; and more where b_dec is taken off, our form: " + nested_by(ours, 6)
            + "; " + nested_by(ours, 18), LETTERS, "partly", holds=[absorbs(of, layer)[0] < min(absorbs(of, layer)[1:]) for of in (raw, ours)
                                                                 for layer in (6, 18)] == [True, False, False, False]),
        row("pach", "an SAE's latents are more monosemantic than the neurons of its layer",
            "best neuron .50, best latent .82 (F = D) to 1.00 (64 D), CLIP ViT-L on ImageNet (secondary)",
            f"so by pixels in {neuron[0]} runs, by class in {neuron[1]}; but so are random dictionaries, as sparse: latents are "
            f"above those in {random_codes[0]} and {random_codes[1]}", DIGITS, "partly",
            holds=min(share(neuron)) == 1 and max(share(random_codes)) < 0.6),
        row("pach", "wider SAEs are more monosemantic", "best latent .82, .89, .93, 1.00 for F = 1, 4, 16, 64 D (secondary)",
            f"by pixels and by class the next wider one has a higher mean in {wider[0]} and {wider[1]} pairs, F = 1, 4, 16 D; "
            "but of the widest most latents fire on no held-out image, so the width is hardly used", DIGITS, "partly", holds=0.5 < min(share(wider)) and max(share(wider)) < 0.9),
        row("pach", "sparser SAEs are more monosemantic", "k = 1 highest, k = 20 lower (secondary)",
            f"by pixels and by class the next sparser one has a higher mean in {sparser[0]} and {sparser[1]} pairs, k = 2 to 16; "
            "random dictionaries, too, score higher when sparser", DIGITS, "partly", holds=max(share(sparser)) > 0.9 > min(share(sparser)) > 0.6),
        row("hedging", "the narrower an SAE, the more it hedges, on a language model", "no figures read",
            "h at 2 D and 8 D latents, and without new latents: " + "; ".join(
                f"{name} {h[0]:.3f} ({null[0]:.3f}), {h[1]:.3f} ({null[1]:.3f})" for name, (h, null) in hedge.items())
            + "; so above the null in TopK and BatchTopK at 2 D alone", "smollm2, " + by("hedging", "hedging.md"), "partly",
            holds=all(min(h[0]) > 2 * max(null[0]) and max(h[1]) < 1.5 * min(null[1]) for h, null in map(hedge.get, ("topk", "batchtopk")))
            and max(hedge["matryoshka"][0][0]) < 1.5 * min(hedge["matryoshka"][1][0])),
        row("wrong-l0", "k-sparse probing is best at a middle L0, on a language model", "so, figures",
            f"so: one latent, k = {', '.join(map(str, by_k(probed)))}: {over_k(probed, '.3f')}", by("which_l0", "which-l0.md"),
            "reproduced", holds=min(by_k(probed)) < max(by_k(probed), key=lambda k: mean(by_k(probed)[k]))
            < max(by_k(probed))),
        row("wrong-l0", "c_dec and s_n are least where probing is best, on a language model", "near there, of c_dec the bend before it rises at low L0; figures",
            f"both fall from k = 8 on to the last k: c_dec {over_k(lambda r: r['c_dec'], '.4f')}; s_n {over_k(lambda r: r['s_n'])}",
            by("which_l0", "which-l0.md"), "not", holds=all(min(by_k(of), key=lambda k: min(by_k(of)[k])) == max(by_k(of)) for of in (
                lambda r: r["c_dec"], lambda r: r["s_n"]))),
        row("coordinated", "the error on hidden inputs is lowest at the right hyperparameters; of an SAE: near the true L0, where the plain "
            "one falls on (this claim is ours)", "so, for sequential autoencoders of spike counts (its abstract)",
            "TopK, masked FVU at p = 0.9 lowest at k = " + ", ".join(f"{best_k(toy)[0]} ({toy}, L0 {L0:g})" for toy, L0 in TOYS.items())
            + f"; but Gaussian rows of wrong-superposed have a minimum, too (k = {best_k('wrong-superposed-gaussian')[0]}), so by the "
            "rule stated before it is not; the MCC with the true features is, at these k, within "
            f"{max(short_of_best.values()):.3f} of the highest", HIDDEN, "not",
            holds=best_k("wrong-superposed-gaussian")[1] == [13] * 3 and best_k("wrong", "fvu")[1] != [25] * 5
            and max(short_of_best.values()) < 0.05 < max(best - mean(over_hidden(toy, "mcc")[best_k(toy, "fvu")[0]])
                                                         for toy, best in best_mcc.items())),
        row("coordinated", "the same on a real model, known by its board (this claim is ours)", "none",
            f"masked FVU lowest at k = {best_k('othello')[0]} in each seed, coverage of the board highest at "
            f"{best_k('othello', 'coverage', max)[0]}: within the factor of 2 stated before; the plain FVU is lowest at the last k, "
            f"{best_k('othello', 'fvu')[0]}", "othello, " + HIDDEN, "reproduced",
            holds=set(best_k("othello")[1]) == {32} and set(best_k("othello", "coverage", max)[1]) == {64}),
        row("sarm", "a reward of sparse codes is as accurate as dense ones", "73.6 on RewardBench 2, a dense model of 8B 71.8 (secondary)",
            f"read at the mean over the answer, six methods {head('mean over the answer'):.2f}, residual "
            f"{rewards('mean over the answer', '*residual*'):.2f}, but an untrained dictionary {untrained[0]:.2f}, too; at the last "
            f"token, as in the paper, {head('last token'):.2f}, residual {rewards('last token', '*residual*'):.2f}; pairs of Python "
            "functions with a known reason, only the head trained", REWARD, "partly",
            holds=min(head("mean over the answer")) > rewards("mean over the answer", "*residual*") - 0.02
            and max(head("last token")) < rewards("last token", "*residual*") - 0.02),
        row("sarm", "a trained SAE makes a better reward than a random encoder", "73.6 and 68.4 on RewardBench 2 (secondary)",
            f"at the last token {head('last token'):.2f}, below a random encoder's {rewards('last token', '*random encoder*'):.2f}; an "
            f"untrained dictionary, as sparse, has {untrained[1]:.2f}, and TopK's and Ordered's gain 0.05 on it alone", REWARD, "not",
            holds=max(head("last token")) < rewards("last token", "*random encoder*")
            and sum(v >= untrained[1] + 0.02 for v in head("last token")) == 2),
        row("sarm", "editing the weights of a few latents shifts the preference", "so, for safety (notes)",
            "five attributes, weights of at most five latents times -1: accuracy on theirs falls to "
            + ", ".join(f"{rewards('accuracy edited', n):.2f}" for n in ATTRIBUTES) + ", on the other it stays at "
            + f"{Numbers(map(other, ATTRIBUTES)):.2f}; their margins move {Numbers(map(moved, ATTRIBUTES)):.1f} times as far; but so, in "
            "two of the five, with an untrained dictionary's latents", REWARD, "reproduced",
            holds=max(rewards("accuracy edited", n) for n in ATTRIBUTES) < 0.5 and min(map(moved, ATTRIBUTES)) >= 3
            and sum(rewards("untrained, edited", n) < 0.5 for n in ATTRIBUTES) == 2),
        row("gba", "GBA's error is level with TopK's and below that of L1", "a figure, read by eye, Qwen2.5-1.5B",
            f"above both: FVU {gba:.2f} times that of TopK, {gba_l1:.2f} times that of L1 at the same L0", COMPARED, "not",
            holds=min(gba) > 1.05 and min(gba_l1) > 1.05),
        row("gba", "ten groups have a lower error than one",
            "far below: one group needs 15 to 70 active of 1000 for what ten do with 5 (a figure, by eye)",
            f"a little lower: FVU {ten:.4f} (three seeds) against {one_group:.4f} (one seed), L0 about 32",
            LM + ": `gba_sae.py --layer 6 --high 0.0135 --groups 1`", "partly", holds=max(ten) < one_group),
        row("gba", "seeds agree on more of GBA's latents with the largest activations than of TopK's",
            "top .3 %: at a cosine above .9 ~.34 and .24 (the first by eye), at .8 ahead, too, at .7 level or behind",
            "top .3 %, " + ", ".join(f"at {t[1:]} {shared('gba', t):.2f} and {shared('topk', t):.2f}" for t in ("0.7", "0.8"))
            + f", but at .9 {shared('gba', '0.9'):.2f} and {shared('topk', '0.9'):.2f}", COMPARED, "partly",
            holds=all((shared("gba", t) > shared("topk", t)) == (t != "0.9") for t in ("0.7", "0.8", "0.9"))),
        row("gba", "seeds agree on more of L1's latents than of GBA's, in most settings",
            "top .3 %, at .9: ~.55 and ~.34 (by eye)",
            f"{shared('vanilla', '0.9'):.2f} and {shared('gba', '0.9'):.2f}", COMPARED, "reproduced",
            holds=shared("vanilla", "0.9") > shared("gba", "0.9")),
        row("gba", "targets a little above the frequency f of the features suit best ('resonance', second version)",
            "recovery at least .9 for targets of 1.5 to 4.5 f, .1 to .7 at f (a figure, n = 65,536; cosine not given)",
            "no best target: on the uniform toy found at .9 "
            + ", ".join(f"{uniform('FRR@.9', f'gba --groups 1 --high {p}')} at {name}" for p, name in (
                (0.002, "f / 12"), (0.0047, "f / 5"), (0.02, ".9 f"), (0.03, "1.3 f"), (0.05, "2 f"), (0.1, "4 f"))),
            by("bias", "bias.md"), "not", holds=float(uniform("FRR@.9", "gba --groups 1 --high 0.0047")) >= float(
                uniform("FRR@.9", "gba --groups 1 --high 0.05"))),
        row("gba", "groups of the full range of targets recover an imbalanced toy",
            "share found at .8 and .9: 1.00, 1.00 (secondary; its widths and steps unknown)",
            "at .9 " + ", ".join(f"{uneven('FRR@.9', f'gba --high {p} --low 0.001 --d-sae {n}')} with "
                                 f"targets {p} to .001, {n} latents" for p, n in ((0.5, 128), (0.5, 512), (0.1, 256))),
            by("bias", "bias.md"), "not", holds=max(float(uneven("FRR@.9", f"gba --high {p} --low 0.001 --d-sae {n}"))
                                                    for p in (0.5, 0.1) for n in (128, 256, 512, 1024)) < 0.95),
        row("gba", "TopK recovers the imbalanced toy with k = 20, and at .8 with k = 30 and 50",
            "at .8 and .9: 1.00, .984; .984, .242; .945, .234 (secondary)",
            "; ".join(f"{uneven('FRR@.8', f'topk --k {k} --d-sae 512')}, "
                      f"{uneven('FRR@.9', f'topk --k {k} --d-sae 512')}" for k in (20, 30, 50))
            + f"; it does with k = 10: {uneven('FRR@.9', 'topk --k 10 --d-sae 512')} at .9 (its widths, steps unknown)",
            by("bias", "bias.md"), "partly", holds=float(uneven("FRR@.8", "topk --k 20 --d-sae 512")) > 0.5 > float(
                uneven("FRR@.8", "topk --k 30 --d-sae 512"))),
        row("ordered", "baselines recover about half of toy A, the Ordered SAE most of it",
            "stability with the truth .814; L1 .479, Matryoshka .502, with random levels .480",
            f"all recover it: {order('stability', ORDERED)}; {order('stability', 'L1')}, "
            f"{order('stability', 'Matryoshka (BatchTopK, five levels)')}, "
            f"{order('stability', 'Matryoshka, random levels')}; TopK {order('stability', 'TopK')}",
            by("order", "order.md"), "not", holds=min(float(order("stability", m)) for m in (
                "L1", "TopK", "Matryoshka (BatchTopK, five levels)")) > 0.85),
        row("ordered", "seeds agree on more of its latents than of the baselines'",
            ".664; L1 .572, Matryoshka .538",
            f"hardly more, and about as many as of annealed TopK's: {order('between seeds', ORDERED)}; "
            f"{order('between seeds', 'L1')}, {order('between seeds', 'Matryoshka (BatchTopK, five levels)')}; "
            f"TopK {order('between seeds', 'TopK')}, annealed {order('between seeds', 'TopK, k from 40')}",
            by("order", "order.md"), "partly", holds=0 < float(order("between seeds", ORDERED)) - float(
                order("between seeds", "L1")) < 0.05),
        row("ordered", "seeds agree on the order of its latents, on a language model",
            "about .8; Matryoshka about 0 for the first group, then about .5 (Gemma-2-2B, k = 80, figures)",
            f"{order_lm:.2f}; TopK {topk_lm:.2f}", COMPARED, "reproduced" if order_lm > 0.7 else "partly" if order_lm > 0.2
            else "not", holds=order_lm > topk_lm + 0.1 or order_lm <= 0.2),
        row("ordered", "a few levels (Matryoshka) bring no order",
            "order .119, with random levels .054",
            f"they do: {order('order', 'Matryoshka (BatchTopK, five levels)')}, "
            f"{order('order', 'Matryoshka, random levels')}; the Ordered SAE {order('order', ORDERED)}",
            by("order", "order.md"), "not", holds=float(order("order", "Matryoshka (BatchTopK, five levels)")) > 0.5),
        row("ordered", "its error is below that of L1 and Matryoshka (toy A), above that of TopK (its toy B)",
            "toy A: .00725, .0257, .0339; toy B: no numbers",
            f"all on toy A, FVU: {order('FVU', ORDERED)}, {order('FVU', 'L1')}, "
            f"{order('FVU', 'Matryoshka (BatchTopK, five levels)')}; TopK {order('FVU', 'TopK')}",
            by("order", "order.md"), "reproduced", holds=float(order("FVU", "TopK")) < float(order("FVU", ORDERED)) < min(
                float(order("FVU", m)) for m in ("L1", "Matryoshka (BatchTopK, five levels)"))),
        row("ordered", "letting k fall from high to its value helps training",
            "'significantly improves convergence', no numbers",
            f"toy A: FVU {order('FVU', ORDERED)} against {order('FVU', 'Ordered, k not annealed')}, but on smollm2 {long:.4f} "
            f"(three seeds) against {short:.4f} (one)", by("order", "order.md") + "; " + LM, "partly",
            holds=float(order("FVU", ORDERED)) < float(order("FVU", "Ordered, k not annealed")) and min(long) > short),
        row("sage", "experiments explain latents better than passive reading of exemplars", "so, with a language model as the judge",
            f"so by r over all held-out tokens, six methods: {Numbers(active.values()):.2f} with experiments, "
            f"{Numbers(passive.values()):.2f} without; hardly by its own form, ten exemplars, {mean(explained('active', 'r10').values()):.2f} "
            f"and {mean(explained('passive', 'r10').values()):.2f}; a search through small programs in the place of a language model",
            "smollm2, " + by("explaining", "explaining.md"), "reproduced", holds=sum(active[m] > passive[m] + 0.02 for m in passive) >= 4
            and mean(explained("active", "r10").values()) < mean(explained("passive", "r10").values()) + 0.05),
        row("antibodies", "latents of a TopK SAE map concepts well but often do not steer towards them; an Ordered SAE's do",
            "so, on antibody models (its abstract)",
            f"twelve concepts of Python text, three seeds: the best latent of TopK (F1 {steering('F1', 'topk')}) steers "
            f"{float(steering('steer', 'topk')):.0%}, of the Ordered SAE ({steering('F1', 'ordered')}) "
            f"{float(steering('steer', 'ordered')):.0%}, of four other methods {of_others:.0%}; so the first half in every method; "
            "the difference is below the margin set before (20 points, two standard errors)",
            "smollm2, " + by("steering", "steering.md"), "not", holds=float(steering("steer", "ordered")) < 0.5
            and float(steering("steer", "ordered")) - float(steering("steer", "topk")) < 0.2),
        row("cones", "a sweet spot in sparsity and expansion, where latents contain known concepts best", "so, in both (its abstract)",
            "in sparsity, TopK (2M tokens): of the board's directions four latents contain, above as many random ones, at 8 D latents "
            f"and k = {', '.join(map(str, K))}: {', '.join(f'{v:.2f}' for v in over_random[8].values())}; not in expansion, k = 32 "
            f"and {', '.join(map(str, WIDTHS))} D: {', '.join(f'{over_random[w][32]:.2f}' for w in WIDTHS)}",
            "othello, " + by("cones", "cones.md"), "partly", holds=all(max(by, key=by.get) == 32 for by in over_random.values())
            and max(WIDTHS, key=lambda w: over_random[w][32]) == max(WIDTHS)),
    ]
