"""What does a latent stand for? Explanations that predict, and experiments that test them.

    python applications/explain.py runs/topk-smollm2-L6 --html explain.html      # ten latents
    python applications/explain.py RUN --latents 1485 940
    python applications/explain.py RUN --llm http://localhost:8000/v1 --llm-model NAME

An explanation is a program of evaluation/programs.py: 'token in {' self'} and inside signature'. It
says of each token whether the latent fires there, and how strongly. The loop is that of SAGE (arXiv
2511.20820; its code was read, not the text), with a search in the place of its language model:

exemplars    the ten pool contexts of the largest peaks, 32 tokens of each; BACKGROUND random ones
hypotheses   programs that differ on the pool, the best by r on the exemplars, later by the score
             below; and a control: a program that should be silent
experiments  for each: FOUND random real tokens where it holds; TESTS texts of experiments.py on
             which it and the others differ most, edited exemplars and new ones, run on the model
verdict      fires: at least a quarter of the mean of the ten peaks. confirmed: 3 of 4 tests come
             out as the program says, of those where it says yes two or more; refuted: fewer than
             half do; else refined: what the next round proposes has seen its tests
review       the REVIEWED best so far are tested on FOUND more real tokens; then the next round,
             with all that has been read, --rounds in all; conclusion: of the hypotheses that were
             tested and not refuted the one of the best score; then its strengths
score        cor(program, code) on the pool, estimated from what was read, less a little for each
             literal and text that it needs (evaluation/evidence.py)

Scores, on held-out tokens: r and AUC over all of them, silent ones included; r10: SAGE's r over ten
exemplars: 4 from the eleventh rank to 40 %, 3 to 70 %, 3 to 100 %; written: of at most ten texts
of the grammar in which the program holds, the share with a peak of half the mean of the ten.
Beside it  passive: the program of the best r on the exemplars, no experiments; reading: the one of
           the best score on as many random tokens as the loop has read or run; frequent: the token
           at most of the exemplars' firing tokens; chance: the passive program of another latent.
Writes RUN/explanations.json, with every test. Bad input costs one line and the exit code 2.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
from evaluation import llm, page
from evaluation.concepts import Codes
from evaluation.evidence import EXEMPLARS, Evidence
from evaluation.experiments import open_lab
from evaluation.intervals import bootstrap, holm, sign_flip
from evaluation.predicting import frequent, passive, reading, scores
from evaluation.programs import Program
from evaluation.saved import open_language_run, page_path, write_page, write_result
from evaluation.tables import print_table

BACKGROUND, FOUND, TESTS = 200, 12, 8
HYPOTHESES, REVIEWED = 3, 3             # of a round, beside the control in the first
WAYS = "active", "passive", "reading", "frequent", "chance"
FIGURES = "r", "auc", "r10", "written"

# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    add = parser.add_argument_group("explaining").add_argument
    add("--latents", type=int, nargs="+", help="these; default: --count of all firing rates")
    add("--count", type=runs.count, default=10, help="latents, if none are named; default 10")
    add("--rounds", type=runs.count, default=4, help="of experiments, at most; default 4")
    add("--seed", type=runs.at_least(0), default=0, help="of all draws; default 0")
    add("--llm", metavar="URL", help="an OpenAI-compatible endpoint that proposes and judges")
    add("--llm-model", metavar="NAME", help="its model")
    add("--llm-key", metavar="VARIABLE", default="OPENAI_API_KEY", help="the environment variable "
        "that holds the key; default OPENAI_API_KEY")
    add("--llm-calls", type=runs.count, default=500, help="at most; default 500")
    add("--llm-timeout", type=runs.at_least(0.1, float), default=60, help="seconds; default 60")
    add("--html", type=page_path, help="write the page there")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    if (args.llm is None) != (args.llm_model is None):
        parser.error("--llm, --llm-model: give both, as in --llm http://localhost:8000/v1 "
                     "--llm-model NAME")
    args.torch_device = runs.open_device(args.device)
    return args

# --- who proposes and judges ----------------------------------------------------------------------

class Search:
    """Hypotheses, tests and verdicts without a language model; llm.Mind has the same methods."""
    notes = []                                                # of what went wrong

    def hypotheses(self, e, tested, n):
        """Programs (literals) to test next. tested: [hypothesis, ...] so far."""
        before = [h.literals for h in tested]
        first = e.distinct(e.ranked(e.own), before, n) if not before else []
        found = first or e.distinct(e.ranked(), before, n)
        return found or ([] if before else [frequent(e).literals])

    def tests(self, e, literals, rivals):
        """[(kind, text)]: half of the texts where it says yes, the other half where it says no, as
        far as there are such, and among them those on which most rivals differ."""
        program, texts = Program(literals), []
        for row in e.rng.permutation(e.peaks)[:3]:
            texts += e.lab.edits(e.lab.real(row), e.rng, program)
        for kind, other in [("new text", program), *(("rival's text", Program(r)) for r in rivals)]:
            texts += [(kind, text) for text in e.lab.write(other, 2, e.rng)]
        read = e.lab.last([text for _, text in texts])
        says = e.lang.true(program, read)
        differ = sum((e.lang.true(Program(r), read) != says for r in rivals), np.zeros(len(says)))
        differ += 0.5 * e.rng.random(len(says))               # ties at random
        chosen = [i for yes in (True, False) for i in sorted(
            np.flatnonzero(says == yes), key=lambda i: -differ[i])[:TESTS // 2]]
        return [texts[i] for i in chosen]

    def verdict(self, e, h):
        good = [t["says"] == t["fires"] for t in h.tests]
        right = sum(g for g, t in zip(good, h.tests) if t["says"])
        if sum(good) < len(good) / 2:
            return "refuted"
        sure = good and sum(good) >= 0.75 * len(good) and (right >= 2 or h.control)
        return "confirmed" if sure else "refined"

def control(e):
    """A literal of the exemplars' silent tokens that holds at none where the latent fires strongly:
    the first that 2 % of the pool have, else the most usual."""
    read, z, _ = e.natural()
    quiet = read.take(np.flatnonzero((z < e.fires)[:len(e.own)]))
    found = [(l,) for l in e.lang.literals(quiet, np.ones(len(quiet[0])), 1) if l.holds]
    strong = read.take(np.flatnonzero(z[:len(e.own)] >= e.level))
    found = [l for l in found if not e.lang.holds(l[0], strong).any() and e.where(l).any()]
    return max(found, key=lambda l: min(0.02, e.where(l).mean()), default=None)

def test(e, h, texts):
    """Run the texts, ask for real tokens, write down what comes out; a control says no to all."""
    if texts:
        read = e.lab.last([text for _, text in texts])
        codes, _ = e.latent.run([text for _, text in texts])
        e.made.append((read, codes))
        says = e.lang.true(Program(h.literals), read) & (not h.control)
        h.tests += [record(e, kind, text, *of) for (kind, text), *of in zip(texts, says, codes)]
    for row in e.ask(e.where(h.literals), FOUND // (4 if h.control else 1)):
        h.tests.append(record(e, "found", e.lab.real(row), not h.control, e.latent.z[row]))

def record(e, kind, text, says, code):
    return dict(kind=kind, text=e.lab.show(text), says=bool(says), code=round(float(code), 4),
                fires=bool(code >= e.fires))

def explain(lab, latent, mind, rounds, seed):
    """The loop: (Evidence, Program, transcript)."""
    e, tested, passed = Evidence(lab, latent, seed), [], []
    e.ask(np.ones(len(latent.z), bool), BACKGROUND)
    for i in range(rounds):
        new = [SimpleNamespace(literals=l, control=False, tests=[])
               for l in mind.hypotheses(e, tested, HYPOTHESES)]
        if i == 0 and (silent := control(e)):
            new.append(SimpleNamespace(literals=silent, control=True, tests=[]))
        if not new:
            break
        for h in new:
            rivals = [o.literals for o in [*tested, *new] if o is not h and not o.control][-4:]
            test(e, h, [("new text", t) for t in lab.write(Program(h.literals), 3, e.rng)]
                 if h.control else mind.tests(e, h.literals, rivals))
            h.verdict = mind.verdict(e, h)
        tested += new
        for h in sorted((h for h in tested if not h.control), key=lambda h: -e.score(h.literals))[
                :REVIEWED]:                                   # more tests of those that lead
            test(e, h, [])
            h.verdict = mind.verdict(e, h)
        passed.append((conclusion(e, tested).literals, new))
    best = Program(conclusion(e, tested).literals)
    transcript = [dict(leading=e.lang.say(Program(leading)), hypotheses=[dict(
        program=e.lang.say(Program(h.literals)), control=h.control, verdict=h.verdict,
        score=e.score(h.literals), tests=h.tests) for h in new]) for leading, new in passed]
    return e, e.lang.fit(best, *e.natural()), transcript

def conclusion(e, tested):
    """The hypothesis of the best score, a refuted one only if all are."""
    real = [h for h in tested if not h.control]
    return max([h for h in real if h.verdict != "refuted"] or real,
               key=lambda h: e.score(h.literals))

# --- the command ---------------------------------------------------------------------------------

class Run:
    """The latents of one SAE in a laboratory."""
    def __init__(self, lab, sae):
        self.lab, self.sae = lab, sae
        self.pool, self.heldout = (Codes(sae.encode, part.x) for part in (lab.pool, lab.heldout))
        context = lab.pool.context[self.pool.row.cpu().numpy()]
        pairs = np.unique(self.pool.latent.cpu().numpy() * (int(context.max()) + 1) + context)
        n = np.bincount(pairs // (int(context.max()) + 1), minlength=self.pool.F)
        live = np.flatnonzero(n >= EXEMPLARS)                 # latents, the rarest first
        self.live = live[np.argsort(self.pool.count.cpu().numpy()[live], kind="stable")]

    def chosen(self, n):
        """n live latents over all firing rates."""
        at = np.linspace(0, len(self.live) - 1, min(n, len(self.live)))
        return [int(i) for i in dict.fromkeys(self.live[at.round().astype(int)])]

    def latent(self, i):
        """number, rate, codes z [N] on the pool and [M] held out, run(texts)."""
        def column(codes):
            z, own = np.zeros(codes.N), slice(int(codes.before[i]),
                                              int(codes.before[i] + codes.count[i]))
            z[codes.row[own].cpu().numpy()] = codes.value[own].cpu().numpy()
            return z
        return SimpleNamespace(number=i, z=column(self.pool), heldout=column(self.heldout),
                               rate=float(self.pool.rate[i]),
                               run=lambda texts: self.lab.run(self.sae, i, texts))

    def explained(self, i, mind, rounds, seed):
        """All about latent i: explanations with their scores, transcript."""
        latent = self.latent(i)
        e, active, transcript = explain(self.lab, latent, mind, rounds, seed)
        others = self.live[self.live != i]
        other = np.random.default_rng((seed, i, 3)).choice(others) if len(others) else i
        made = sum(len(read.token) for read, _ in e.made)
        read = reading(self.lab, latent, seed, len(e.asked) + made)
        ways = dict(active=active, passive=passive(e), reading=read, frequent=frequent(e),
                    chance=passive(Evidence(self.lab, self.latent(int(other)), seed)))
        notes, mind.notes = mind.notes, []
        return dict(latent=i, rate=latent.rate, mean_of_ten=e.mean, read=len(e.asked), run=made,
                    rounds=transcript, notes=notes, ways={
                        name: scores(self.lab, latent, e, p, seed) for name, p in ways.items()})

def nanmean(values):
    """The mean of those that are known; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

def tables(found):
    """What is printed and shown: the explanations, and the means over latents."""
    of = lambda way, figure: np.array([f["ways"][way][figure] for f in found], float)
    three = lambda value: "–" if value is None or value != value else f"{value:.3f}"
    latents = [[str(f["latent"]), f"{f['rate']:.2%}", *(three(f["ways"]["active"][k])
               for k in FIGURES), f["ways"]["active"]["program"]] for f in found]
    more = {way: of("active", "r") - of(way, "r") for way in WAYS[1:]}
    p, means = dict(zip(more, holm([sign_flip(d) for d in more.values()]))), []
    for way in WAYS:
        interval = " [{:.3f}, {:.3f}]".format(*bootstrap(of(way, "r"))) if len(found) > 1 else ""
        means.append([way, f"{of(way, 'r').mean():.3f}{interval}",
                      *(three(nanmean(of(way, k))) for k in FIGURES[1:]),
                      *([f"{more[way].mean():+.3f}", f"{p[way]:.4f}"] if way in p else ["", ""])])
    return [("Explanations", "of the active form, on held-out tokens",
             ["latent", "fires", *FIGURES, "explanation"], latents),
            ("Means over latents", "r with its interval over latents (bootstrap, 95 %); r of the "
             "active form less that of the others, p by sign flips over latents, after Holm",
             ["way", *FIGURES, "active less this", "p"], means)]

def main(argv=None):
    args, mind = parse_args(argv), Search()
    sae, *opened = open_language_run(args.run, args)
    if wrong := [i for i in args.latents or [] if not 0 <= i < sae.d_sae]:
        runs.fail(f"--latents {wrong[0]}: {args.run} has latents 0 to {sae.d_sae - 1}")
    client = None if args.llm is None else llm.Client(
        args.llm, args.llm_model, args.llm_key, args.llm_timeout, args.llm_calls)
    lab = open_lab(*opened)
    run = Run(lab, sae)
    if not len(run.live):
        runs.fail(f"{args.run}: none of its latents fires in {EXEMPLARS} contexts here; give a run "
                  "on this data, or more --cache-tokens")
    if dead := [i for i in args.latents or [] if i not in run.live]:
        runs.fail(f"--latents {dead[0]}: is dead, or fires in fewer than {EXEMPLARS} of the "
                  "contexts read; choose one that fires more often, or use more --cache-tokens")
    if client:
        mind = llm.Mind(client, lab.encode, mind)
    found = []
    for i in runs.Bar(list(dict.fromkeys(args.latents or run.chosen(args.count))), desc="explain",
                      unit="latent"):
        found.append(run.explained(i, mind, args.rounds, args.seed))
        write_result(args.run / "explanations.json", dict(latents=found), opened[0], args)
    shown = tables(found)
    for table in shown:
        print_table(*table)
    if args.html:
        write_page(args.html, page.document("Explanations", "".join([
            f'<p class="note">{page.cell(args.run)}</p>', *(page.table_html(*t) for t in shown),
            page.explained_html(found)])))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
