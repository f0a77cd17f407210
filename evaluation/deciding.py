"""Which latents decide a preference: attribution of the margins of a head, what these latents stand
for, and what editing their weights moves.

A head gives the reward r = w z to an answer of codes z [F], and a pair the margin w (z_chosen -
z_rejected). Latent i adds w_i (z_chosen - z_rejected)_i to it; these sum to the margin exactly.
"""
import re

import numpy as np
import torch

from evaluation import concepts, latents, preferences, probes, probing, programs, roles
from sources import lm

CARRIED = 0.9                           # the share of the margins in 'so many latents carry it'
LEAST = 0.2                             # F1 of what a latent detects, as in probes.best_classes
ODDS = 4                                # see Places.of_attributes, about

def right(margin):
    """1 where the chosen answer has the larger reward, ties 1/2."""
    return (margin > 0) + 0.5 * (margin == 0)

def accuracy(margin):
    """(share, low, high): with Wilson's interval, 95 %, of a share in which ties count half."""
    p, n, z = float(right(margin).mean()), len(margin), 1.959964
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, *((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))

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
                       if self.share["all"][j] else "" for j in range(len(self.on))]

    def carry(self, name="all"):
        """How many latents carry CARRIED of the margins of these pairs."""
        total = np.sort(self.share[name])[::-1].cumsum()
        return int((total < CARRIED).sum()) + 1 if total.any() else 0

    def top(self, name, n):
        """The n latents that add most to the margins of these pairs."""
        return self.on[np.argsort(-self.share[name], kind="stable")[:n]].tolist()

    def shares_of(self, latent):
        """{attribute: the share of a latent of the head}."""
        j = np.searchsorted(self.on, latent)
        return {name: float(share[j]) for name, share in self.share.items()}

    def kept(self, n, rows):
        """Margins of pairs by the n latents of the largest share alone."""
        return self.adds[rows][:, self.order[:n]].sum(1)

    def of_pair(self, i):
        """[(latent, what it adds)], the largest first; they sum to the margin."""
        row = self.adds[i]
        order = [j for j in np.argsort(-np.abs(row), kind="stable") if row[j]]
        return [(int(self.on[j]), float(row[j])) for j in order]

# --- what latents stand for -----------------------------------------------------------------------

class Places:
    """Where the held-out tokens of a harvest stand, by the literals of evaluation/programs.py (of
    text that is not Python: their classes alone), and how often each latent fires there.
    y {kind=value: bool [M]}, x [M, D]."""
    def __init__(self, source, model, tokenizer):
        ids, where = lm.heldout_tokens(source)
        texts = concepts.token_texts(tokenizer, model.get_output_embeddings().out_features)
        language, self.x = programs.Language(texts), source.heldout_raw()
        used, row = np.unique(where // ids.shape[1], return_inverse=True)
        read = language.read(ids[used]).take(row * ids.shape[1] + where % ids.shape[1])
        python = preferences.python_files(source.flags.text)
        self.y = {f"{literal.kind}={literal.value}": language.holds(literal, read)
                  for literal in programs.ATTRIBUTES if python or literal.kind == "class"}

    def any_of(self, pattern):
        """bool [M]: tokens with a class that the regular expression is about."""
        found = [y for name, y in self.y.items() if re.fullmatch(pattern, name)]
        return np.any(found, 0) if found else np.zeros(len(self.x), bool)

    @torch.no_grad()
    def hits(self, encode, columns):
        """(how often each latent fires [F], on how many of the tokens of each column [F, c]);
        columns: [bool [M], ...]."""
        Y = torch.from_numpy(np.stack([*columns, np.ones(len(self.x), bool)], 1)).float()
        on = sum((encode(x) > 0).float().T @ y.to(x) for x, y in zip(self.x.split(2048),
                                                                     Y.split(2048)))
        return on[:, -1].cpu().numpy(), on[:, :-1].cpu().numpy()

    def of_attributes(self, encode, names):
        """{attribute: bool [F]}: latents of which at least half of the tokens on which they fire
        have a class of PLACES, at odds at least ODDS times those of all tokens."""
        columns = [self.any_of(preferences.PLACES[name]) for name in names]
        n, hits = self.hits(encode, columns)
        out = {}
        for name, y, hit in zip(names, columns, hits.T):
            p, base = hit / np.maximum(n, 1), y.mean()
            out[name] = (p >= 0.5) & (p * (1 - base) >= ODDS * base * (1 - p)) & (n > 0)
        return out

def roles_of(sae, source, model, tokenizer, block):
    """{task: {latent: [class, precision, recall]}} of all latents, as evaluate.py --probes has it,
    from probes.json of the run if it is there; {} if the run's text is no Python."""
    if not preferences.python_files(source.flags.text):
        return {}
    text, documents = probing.documents(None)
    stored = probes.Stored("probing", sae, [*probing.facts(source), text], probing.__file__,
                           roles.__file__).result
    if stored:
        return stored["latents"]
    x, tasks = probing.prepare(documents, model, tokenizer, block, source.meta["norm_cut"],
                               source.meta["context_size"])
    return roles_on(sae.encode, x, tasks)

@torch.no_grad()
def roles_on(encode, x, tasks):
    """{task: {latent: [class, precision, recall]}}, for x and tasks of probing.prepare."""
    Z = probes.codes(lambda part: encode(part.float()), x)
    return {name: probes.best_classes(Z, task.label, task.names) for name, task in tasks.items()
            if task.share is None}

@torch.no_grad()
def about(sae, source, model, tokenizer, block, chosen):
    """Of these latents what evaluation/latents.py says, and what they detect with an F1 of LEAST
    or more, roles and places, the best first; a latent that is too rare for that, or has no such
    class: the place of at least half of its tokens at the largest odds."""
    places = Places(source, model, tokenizer)
    found = {task: dict(best) for task, best in roles_of(
        sae, source, model, tokenizer, block).items()}
    n, hits = places.hits(sae.encode, list(places.y.values()))
    for (name, y), hit in zip(places.y.items(), hits.T):
        kind, _, value = name.partition("=")
        for i in chosen:
            this = value, float(hit[i] / max(n[i], 1)), float(hit[i] / max(y.sum(), 1))
            own = found.setdefault("level" if kind == "depth" else kind, {})
            if latents.f1(this) >= max(LEAST, latents.f1(own.get(str(i), ("", 0, 0)))):
                own[str(i)] = this
    base = np.array([y.mean() for y in places.y.values()])
    for i in chosen:
        if not any(str(i) in of for of in found.values()):
            odds = (hits[i] + 1) / (n[i] - hits[i] + 1) * (1 - base) / np.maximum(base, 1e-9)
            j = int(np.where(hits[i] >= 0.5 * max(n[i], 1), odds, 0).argmax())
            kind, _, value = list(places.y)[j].partition("=")
            if odds[j] >= ODDS and 2 * hits[i][j] >= n[i] > 0:
                found["level" if kind == "depth" else kind][str(i)] = (
                    value, float(hits[i][j] / n[i]), float(hits[i][j] / (base[j] * len(places.x))))
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)
                  and any(child is block for child in m))
    detects = latents.detects(dict(probing=dict(latents=found)))
    return [f | dict(detects=detects.get(f["latent"], [])) for f in latents.features(
        sae, places.x, chosen, torch.from_numpy(n / len(places.x)), source, model, tokenizer,
        blocks)]

# --- editing --------------------------------------------------------------------------------------

def edited(w, edits):
    w = w.copy()
    for i, c in edits:
        w[i] *= c
    return w

def moves(w, new, z, rows):
    """{attribute: how rewards and margins of its pairs move} from weights w to `new`. factor: how
    many times as far as those of all other pairs; None where these do not move."""
    before, after = z @ w, z @ new                                           # (2, n)
    size = np.abs(after - before).mean(0), np.abs((after - before)[0] - (after - before)[1])
    out = {}
    for name, own in rows.items():
        margins = (before[0] - before[1])[own], (after[0] - after[1])[own]
        out[name] = dict(pairs=int(own.sum()), rewards=float(size[0][own].mean()),
                         margins=float(size[1][own].mean()), before=float(margins[0].mean()),
                         after=float(margins[1].mean()),
                         accuracy=[float(right(m).mean()) for m in margins])
        if (others := rows["all"] & ~own).any():
            both = [(float(s[own].mean()), float(s[others].mean())) for s in size]
            out[name]["factor"] = [a / b if b > 1e-6 * a else None for a, b in both]
    return out
