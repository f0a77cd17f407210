"""Which latents decide a preference: attribution of the margins of a head, what these latents stand
for, and what editing their weights moves.

A head gives the reward r = w z to an answer of codes z [F], and a pair the margin w (z_chosen -
z_rejected). Latent i adds w_i (z_chosen - z_rejected)_i to it; these sum to the margin exactly.
"""
import numpy as np
import torch
from scipy.stats import binomtest

from evaluation import concepts, latents, preferences, probes, probing, roles
from sources import lm

CARRIED = 0.9                           # the share of the margins in 'so many latents carry it'
LEAST = 0.2                             # F1 of what a latent detects, as in probes.best_classes

def right(margin):
    """1 where the chosen answer has the larger reward, ties 1/2."""
    return (margin > 0) + 0.5 * (margin == 0)

def accuracy(margin):
    """(share, low, high)."""
    y = right(margin)
    low, high = binomtest(int(y.sum()), len(y)).proportion_ci(method="wilson")
    return float(y.mean()), float(low), float(high)

class Attribution:
    """What every latent of a head adds to margins. z [2, n, F]; held [n] bool; attributes [n]."""
    def __init__(self, head, z, held, attributes):
        self.on = np.flatnonzero(head.w)
        self.adds = (z[0][:, self.on] - z[1][:, self.on]) * head.w[self.on]          # (n, on)
        self.held, self.margin = held, head.margin
        names = sorted({a or "(none)" for a in attributes}) if any(attributes) else []
        self.rows = {"all": held} | {a: held & np.array([(b or "(none)") == a for b in attributes])
                                     for a in names}
        self.rows = {name: rows for name, rows in self.rows.items() if rows.any()}
        size = {name: np.abs(self.adds[rows]).mean(0) for name, rows in self.rows.items()}
        self.share = {name: s / max(s.sum(), 1e-300) for name, s in size.items()}
        self.order = np.argsort(-self.share["all"], kind="stable")
        self.mostly = [max((n for n in size if n != "all"), key=lambda n: size[n][j], default="")
                       for j in range(len(self.on))]          # of each latent, an attribute

    def carry(self, name="all"):
        """How many latents carry CARRIED of the margins of these pairs."""
        total = np.sort(self.share[name])[::-1].cumsum()
        return int((total < CARRIED).sum()) + 1 if len(total) else 0

    def top(self, name, n):
        """The n latents that add most to the margins of these pairs."""
        return self.on[np.argsort(-self.share[name], kind="stable")[:n]].tolist()

    def kept(self, n, rows):
        """Margins of pairs by the n latents of the largest share alone."""
        return self.adds[rows][:, self.order[:n]].sum(1)

    def of_pair(self, i):
        """[(latent, what it adds)], the largest first; they sum to the margin."""
        row = self.adds[i]
        order = [j for j in np.argsort(-np.abs(row), kind="stable") if row[j]]
        return [(int(self.on[j]), float(row[j])) for j in order]

@torch.no_grad()
def about(sae, source, model, tokenizer, block, chosen):
    """Of these latents what evaluation/latents.py says, and what they detect, the best F1 first."""
    x, (ids, where) = source.heldout_raw(), lm.heldout_tokens(source)
    on = torch.cat([(sae.encode(part)[:, chosen] > 0).cpu() for part in x.split(2048)])   # (M, n)
    rate = torch.zeros(sae.d_sae)
    rate[chosen] = on.float().mean(0)
    found = {}
    if preferences.python_files(source.flags.text):
        text, documents = probing.documents(None)
        found = (probes.Stored("probing", sae, [*probing.facts(source), text], probing.__file__,
                               roles.__file__).result or {}).get("latents")
        if not found:
            x_roles, tasks = probing.prepare(documents, model, tokenizer, block,
                                             source.meta["norm_cut"], source.meta["context_size"])
            Z = probes.codes(lambda part: sae.encode(part.float())[:, chosen], x_roles)
            found = {task: {str(chosen[int(i)]): best for i, best in probes.best_classes(
                Z, t.label, t.names).items()} for task, t in tasks.items() if t.share is None}
    texts = concepts.token_texts(tokenizer, model.get_output_embeddings().out_features)
    found["token"] = {}
    for name in concepts.BUILT_IN:
        y = torch.from_numpy(concepts.named(name, texts).true(ids.ravel()[where]))
        for i, p, r, f1 in zip(chosen, *(v.tolist() for v in probes.scores(on.T, y))):
            before = found["token"].get(str(i), ("", 0, 0))
            if f1 >= LEAST and f1 > latents.f1(before):
                found["token"][str(i)] = name, p, r
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)
                  and any(child is block for child in m))
    detects = latents.detects(dict(probing=dict(latents=found)))
    return [f | dict(detects=detects.get(f["latent"], [])) for f in latents.features(
        sae, x, chosen, rate, source, model, tokenizer, blocks)]

def edited(w, edits):
    w = w.copy()
    for i, c in edits:
        w[i] *= c
    return w

def moves(w, new, z, rows):
    """{attribute: how rewards and margins of its pairs move} from weights w to `new`, and of the
    attribute whose margins move most, by which factors it moves more than all other pairs."""
    before, after = z @ w, z @ new                                           # (2, n)
    size = np.abs(after - before).mean(0), np.abs((after - before)[0] - (after - before)[1])
    out = {}
    for name, own in rows.items():
        margins = (before[0] - before[1])[own], (after[0] - after[1])[own]
        out[name] = dict(pairs=int(own.sum()), rewards=float(size[0][own].mean()),
                         margins=float(size[1][own].mean()), before=float(margins[0].mean()),
                         after=float(margins[1].mean()),
                         accuracy=[float(right(m).mean()) for m in margins])
    names = [name for name in rows if name != "all"]
    if len(names) > 1:
        most = max(names, key=lambda name: out[name]["margins"])
        others = rows["all"] & ~rows[most]
        out[most]["factor"] = [float(s[rows[most]].mean() / max(s[others].mean(), 1e-300))
                               for s in size]
    return out
