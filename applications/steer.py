"""Are the latents that correlate with a concept also its cause? Steer a language model with them.

    python applications/steer.py runs/topk-smollm2-L6 --concept digit --html steer.html
    python applications/steer.py RUN --regex '^#'               # tokens that begin with a hash
    python applications/steer.py RUN --so-far 'def \\w+\\Z'       # the text so far ends like this
    python applications/steer.py RUN --labels FILE --concept role=argument
    python applications/steer.py RUN --concept digit --latents 12 97

A question of Haque et al. 2025 (antibody language models, arXiv 2512.05794; its abstract and notes
on it were read, not the text); how it is asked is ours. Concepts: evaluation/concepts.py. Latents
are ranked by their best F1 on training contexts, and reported on held-out ones.

Changes   at the run's layer, wherever a token is drawn (evaluation/generate.py):
          latent i          x + alpha peak_i W_dec[i]; peak_i: its largest code in training
          latent i clamped  x + (alpha peak_i - z_i(x)) W_dec[i]: the code is set, the error stays
Controls  random latents for i: for each prompt one of the 50 live latents that fire about as often
          as i, drawn at random, its row as long as that of i. Then the difference of means, the
          linear probe's w and, for each prompt, a random direction: these three of one length
Doses     alpha doubles from ALPHAS[0] until the price is passed, and one dose is added where a
          price that grows like alpha^2 would be met; for the first latent also downwards. Prompts,
          samples and noise are the same for all
Measured  rate: the share of new tokens with the concept. Price: by how much the cross-entropy of
          the continuation under the unsteered model is above that of the unsteered continuation,
          in nats a token. distinct: different pairs of tokens among all of a continuation
Equal     The effect, rate less unsteered rate, is compared at the dose where the price is --price,
price     linearly between the doses on both sides. A way that never costs as much stands with its
          largest dose and '<'. Text that repeats itself may be cheap: look at distinct, too
Sure?     Intervals: bootstrap over prompts (95 %), doses and their weights held fixed. less random:
          the effect less that of the latent's random ones, at --price or, if one of both never
          costs so much, at the highest price that both reach. p of that: sign flips over prompts,
          Holm over the latents of this command. A latent 'steers' if p < 0.05 and it is above 0
Writes RUN/steering.json. Bad input costs one line and the exit code 2.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
from evaluation import concepts, page, probes
from evaluation.generate import Writer, by_prompt, distinct, prompts
from evaluation.intervals import bootstrap, holm, sign_flip
from evaluation.saved import open_language_run, page_path, write_page, write_result
from evaluation.tables import print_table
from sources.text import Contexts

ALPHAS = 0.5, 1, 2, 4, 8, 16            # in peaks of a latent, or lengths of a control
SHOWN = 6                               # prompts on the page

# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    add = parser.add_argument_group("steering").add_argument
    add("--concept", help=f"{', '.join([*concepts.BUILT_IN, *concepts.LINE])}, keyword:NAME, "
        "letter:X, or TASK=CLASS of --labels")
    add("--regex", help="tokens in whose text this is found")
    add("--so-far", help="tokens up to which the text of their context holds this")
    add("--labels", type=Path, help="a file as for evaluate.py --labels; new text has none, there "
        "a linear probe judges")
    add("--latents", type=int, nargs="+", help="steer with these; default: the best of --top")
    add("--top", type=runs.count, default=2, help="latents of the largest F1; default 2")
    add("--prompts", type=runs.at_least(8), default=32, help="held-out contexts; default 32")
    add("--prompt-length", type=runs.at_least(2), default=32, help="tokens of each; default 32")
    add("--samples", type=runs.count, default=2, help="continuations of each; default 2")
    add("--length", type=runs.at_least(2), default=12, help="new tokens of each; default 12")
    add("--price", type=runs.at_least(0.01, float), default=1.0, help="nats a token; default 1")
    add("--seed", type=runs.at_least(0), default=0, help="of all draws; default 0")
    add("--html", type=page_path, help="write the page there")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    args = parser.parse_args(argv)
    given = [f for f in ("concept", "regex", "so_far") if getattr(args, f) is not None]
    if len(given) != 1:
        parser.error("--concept, --regex, --so-far: give one of them, as in --concept digit")
    if args.labels and "=" not in (args.concept or ""):
        parser.error("--labels: name a class in it, as in --concept role=argument")
    args.torch_device = runs.open_device(args.device)
    return args

# --- what is steered ------------------------------------------------------------------------------

class Experiment:
    """One concept in one model, whatever the run: tokens to rank latents on, the unsteered text and
    the directions that need no dictionary. try_(change) measures a change."""
    def __init__(self, args, source, model, tokenizer, block):
        self.args, self.device = args, source.device
        self.texts = concepts.token_texts(tokenizer, model.get_output_embeddings().out_features)
        self.concept, self.train, self.heldout = concepts.prepare(
            args, source, model, tokenizer, block, self.texts)
        self.prompts = prompts(source, model, args.prompts, args.prompt_length, args.length)
        self.writer = Writer(model, block, self.prompts, args.samples, args.length,
                             Contexts(tokenizer, 2).eot, source.meta["norm_cut"], args.seed,
                             keep=self.concept.judge is not None)
        x, y = self.train.x.float(), self.train.y.to(self.device)
        self.means = x[y].mean(0) - x[~y].mean(0)                            # (D,)
        w, _ = self.concept.judge or concepts.linear_probe(x, y)
        self.probe = w.float() / w.norm() * self.means.norm()
        self.none = self.try_(None, 0)

    def judged(self, x):
        """What the probe of --labels says of activations [..., D], bool."""
        w, b = self.concept.judge
        return (x.double() @ w + b > 0).cpu()

    def try_(self, change, alpha):
        """The outcome of a dose: rate and ce [P], price, distinct; of each new token [P, S, N] its
        id, y (has it the concept?) and live."""
        text = self.writer.write(change)
        if self.concept.judge:
            y = self.judged(text.x)
        else:
            P, S, N = text.ids.shape
            both = torch.cat([self.prompts[:, None].expand(-1, S, -1), text.ids], 2)
            y = torch.from_numpy(self.concept.true(both.flatten(0, 1).numpy()))
            y = y[:, -N:].view(P, S, N)
        ce = by_prompt(text.ce, text.live)
        return SimpleNamespace(
            alpha=alpha, rate=by_prompt(y.float(), text.live), ce=ce,
            price=(ce - self.none.ce).mean().item() if change else 0.0,
            distinct=torch.tensor(distinct(text.ids, text.live)).nanmean().item(),
            ids=text.ids, y=y, live=text.live)

    def climb(self, way, sign=1):
        """[outcome of each dose], from the smallest on; way(alpha) -> a change, x -> x."""
        out, before, root = [], self.none, lambda price: max(0.0, price) ** 0.5
        for alpha in ALPHAS:
            now = self.try_(way(sign * alpha), sign * alpha)
            if now.price >= self.args.price:
                t = (root(self.args.price) - root(before.price)) / (
                    root(now.price) - root(before.price))
                middle = before.alpha + t * (now.alpha - before.alpha)
                return [*out, *([self.try_(way(middle), middle)] if t < 1 else []), now]
            out, before = [*out, now], now
        return out

    def along(self, v):
        """The way that adds alpha times v, [D] or a row for each prompt [P, D]."""
        v = v.float().expand(len(self.prompts), -1).repeat_interleave(self.args.samples, 0)
        return lambda alpha: lambda x: x + alpha * v.to(x.device)

    def at_price(self, outcomes, price):
        """dose, price, reached, distinct and effect [P] where the price is first this one."""
        before = self.none
        for after in outcomes:
            if after.price >= price:
                t = (price - before.price) / (after.price - before.price)
                mix = lambda a, b: (1 - t) * a + t * b
                return SimpleNamespace(reached=True, dose=mix(before.alpha, after.alpha),
                                       price=price, shown=after if t > 0.5 else before,
                                       distinct=mix(before.distinct, after.distinct),
                                       effect=mix(before.rate, after.rate) - self.none.rate)
            before = after
        return SimpleNamespace(reached=False, dose=before.alpha, price=before.price, shown=before,
                               distinct=before.distinct, effect=before.rate - self.none.rate)

    def more(self, outcomes, control):
        """The effect less that of a control [P], at --price or the highest price that both reach;
        None where that is not above 0."""
        price = min(self.args.price, *(max(o.price for o in way) for way in (outcomes, control)))
        return None if price <= 0 else (self.at_price(outcomes, price).effect
                                        - self.at_price(control, price).effect)

    def own_controls(self, seed):
        """{name: v} of what needs no dictionary."""
        random = torch.randn(len(self.prompts), len(self.means),
                             generator=torch.Generator().manual_seed(seed)).to(self.device)
        return {"random direction": random / random.norm(dim=1, keepdim=True) * self.means.norm(),
                "difference of means": self.means, "linear probe": self.probe}

def steer(ranked, e, latents, args):
    """{name: outcomes of its doses, ascending, without the unsteered one}, measured one by one."""
    first, ways = latents[0], {}
    controls = {f"random latents for {i}": ranked.random(i, latents, len(e.prompts), args.seed)
                for i in latents} | e.own_controls(args.seed)
    with runs.Bar(total=len(latents) + 2 + len(controls), desc="steer", unit="way") as bar:
        down = e.climb(e.along(ranked.row(first)), sign=-1)
        bar.update()
        for i in latents:
            up = e.climb(e.along(ranked.row(i)))
            ways[f"latent {i}"] = down[::-1] + up if i == first else up
            bar.update()
        ways[f"latent {first} clamped"] = [e.try_(ranked.clamp(first)(0), 0),
                                           *e.climb(ranked.clamp(first))]
        bar.update()
        for name, v in controls.items():
            ways[name] = e.climb(e.along(v))
            bar.update()
    return ways

# --- what comes out -------------------------------------------------------------------------------

def summary(e, ways, latents):
    """{way: what the table and steering.json say of it}, the verdict on each latent among it."""
    up = {name: [o for o in found if o.alpha >= 0] for name, found in ways.items()}
    ends, rows = {name: e.at_price(found, e.args.price) for name, found in up.items()}, {}
    for name, end in ends.items():
        low, high = bootstrap(end.effect)
        i = name.split()[1] if name.startswith("latent") else latents[0]
        more = e.more(up[name], up[f"random latents for {i}"])
        rows[name] = dict(
            dose=end.dose, price=end.price, reached=end.reached, distinct=end.distinct,
            rate=(e.none.rate + end.effect).mean().item(), effect=end.effect.mean().item(),
            low=low, high=high, more=None if more is None else more.mean().item(),
            p=1.0 if more is None else sign_flip(more), doses=[dict(
                alpha=o.alpha, rate=o.rate.mean().item(), price=o.price, distinct=o.distinct,
                interval=bootstrap(o.rate)) for o in with_unsteered(e, ways[name])])
    tested = [f"latent {i}" for i in latents]
    for name, p in zip(tested, holm([rows[name]["p"] for name in tested])):
        rows[name].update(p_holm=p, steers=p < 0.05 and rows[name]["more"] > 0)
    return rows, ends

def with_unsteered(e, outcomes):
    """From the lowest dose on; 0 is the unsteered text, but of a clamped code its removal."""
    doses = {o.alpha: o for o in [e.none, *outcomes]}
    return [doses[alpha] for alpha in sorted(doses)]

def tables(e, scores, rows):
    unsteered = f"unsteered rate {e.none.rate.mean():.3f}, {e.none.ce.mean():.2f} nats a token, " \
        f"distinct {e.none.distinct:.2f}"
    correlates = [[str(s["latent"]), f"{s['rate']:.2%}", f"{s['peak']:.3g}", f"{s['f1_train']:.3f}",
                   f"{s['f1']:.3f}", f"{s['auc']:.3f}", f"{s['correlation']:.3f}"] for s in scores]
    steered = [[name, f"{r['dose']:.2f}", f"{'' if r['reached'] else '<'}{r['price']:.2f}",
                f"{r['rate']:.3f}", f"{r['effect']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]",
                page.number(r["more"], "+.3f"), f"{r['p_holm']:.4f}" if "p_holm" in r else "",
                {True: "steers", False: "does not"}.get(r.get("steers"), ""),
                f"{r['distinct']:.2f}"] for name, r in rows.items()]
    n, held, judge = len(e.train.y), len(e.heldout.y), ""
    if e.concept.judge:
        f1 = probes.scores(e.judged(e.heldout.x), e.heldout.y.cpu())[2]
        judge = f"; the probe that judges new text, which is also a control, has an F1 of {f1:.3f}"
    return [(f"Latents for {e.concept.name}", f"{e.train.y.double().mean():.2%} of {n:,} tokens of "
             f"training contexts have it; f1 with its threshold from these, auc and correlation on "
             f"{held:,} held-out tokens{judge}",
             "latent fires peak f1-train f1 auc correlation".split(), correlates),
            ("Steering at equal price", f"{len(e.prompts)} prompts; {unsteered}",
             ["change", "dose", "price", "rate", "effect", "less random", "p", "verdict",
              "distinct"], steered)]

def render(e, run, shown, rows, ways, ends, first):
    """The page of one command; first: the way that the figures and continuations are about."""
    point = lambda x, values: (x, values.mean().item(), *bootstrap(values))
    random = f"random latents for {first.split()[1]}"
    dose = {name: [point(o.alpha, o.rate) for o in with_unsteered(e, ways[name])]
            for name in (first, f"{first} clamped", random)}
    others = [n for n in ways if not n.startswith(("latent", "random latents"))]
    more = [n for n in ways if n.startswith("latent") and n != first and "clamped" not in n]
    price = {name: sorted(point(o.price, o.rate - e.none.rate) for o in ways[name] if o.alpha > 0)
             for name in [first, random, *others, *more][:6]}
    figures = [
        (page.dose_svg("Rate of the concept over the dose", "alpha", "rate in the continuation",
                       dose), "Dose and response, with intervals over prompts."),
        (page.dose_svg("Effect over the price", "price: nats a token above the unsteered text",
                       "effect: rate less the unsteered rate", price),
         f"What six ways buy, at most; they are compared at a price of {e.args.price:g}.")]
    texts = {"before": e.none, "after": ends[first].shown, "random": ends[random].shown}
    written = [([e.texts[i] for i in e.prompts[p]], {name: [
        (e.texts[i], y) for i, y, live in zip(*(t[p, 0].tolist() for t in (o.ids, o.y, o.live)))
        if live] for name, o in texts.items()}) for p in range(min(SHOWN, len(e.prompts)))]
    return page.document(f"Steering: {e.concept.name}", "".join([
        f'<p class="note">{page.cell(run)}</p>', *(page.table_html(*t) for t in shown),
        page.figures_html(figures), page.written_html(
            "Continuations", f"Before: unsteered. After: {first} at the measured dose next to the "
            "price. Random: random latents, the same. Marked: tokens with the concept.", written)]))

def main(argv=None):
    args = parse_args(argv)
    sae, source, model, tokenizer, block = open_language_run(args.run, args)
    if sae.norm != "none":
        runs.fail(f"{args.run}: takes normalised inputs, so its codes have no fixed length in the "
                  "model; give a run that takes raw activations")
    if wrong := [i for i in args.latents or [] if not 0 <= i < sae.d_sae]:
        runs.fail(f"--latents {wrong[0]}: {args.run} has latents 0 to {sae.d_sae - 1}")
    e = Experiment(args, source, model, tokenizer, block)
    ranked = concepts.Ranked(sae, e.train, e.heldout)
    latents = list(dict.fromkeys(args.latents or ranked.best(args.top)))
    if not latents:
        runs.fail(f"{args.run}: all of its latents are silent here; give a run on this data")
    if dead := [i for i in latents if not ranked.codes.count[i]]:
        runs.fail(f"--latents {dead[0]}: is dead, or fires on none of {ranked.codes.N:,} tokens; "
                  "choose one that fires")
    ways = steer(ranked, e, latents, args)
    rows, ends = summary(e, ways, latents)
    scores = [ranked.scores(i) for i in latents]
    shown = tables(e, scores, rows)
    for table in shown:
        print_table(*table)
    write_result(args.run / "steering.json", dict(
        concept=e.concept.name, latents=scores, ways=rows), source, args)
    if args.html:
        write_page(args.html, render(e, str(args.run), shown, rows, ways, ends,
                                     f"latent {latents[0]}"))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
