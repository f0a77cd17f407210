"""Concepts: yes-or-no properties of tokens, and the latents that correlate with them.

A concept is one of
    built in     a name of BUILT_IN, keyword:NAME (a Python keyword) or letter:X (a word's first
                 letter, after a space, of either case): a regular expression over the token's text
    comment, string   the same over the line so far: behind a #, or in quotes that end in the line
                 where they begin (of triple quotes a context does not show which it starts between)
    --regex      searched in the text of the token
    --so-far     searched in the text from the context's start up to and with the token
    --labels     tokens of a class in a file of labels (evaluation/roles.py). Of other text there
                 are no labels: there the linear probe of the activations judges

A token's text is what it adds behind another one, so that a space before a word is seen. Latents
are scored on tokens [N], by their codes z and by what is true, y:
    f1           the largest F1 of 'z > t', over all t >= 0
    auc          P(z of a token with y > z of one without), ties half
    correlation  of z and y, over all tokens
Tokens of one context are no independent draws, so no p-value of these is given.
"""
import keyword, re
from types import SimpleNamespace

import numpy as np
import torch

import runs
from evaluation import probes, probing, roles
from sources import lm
from sources.text import Contexts

KEYWORDS = "|".join(keyword.kwlist)
BUILT_IN = {
    "digit": r"\d", "capital": r"^\s*[A-Z]", "upper": r"^\s*[A-Z]{2,}$", "bracket": r"[()\[\]{}]",
    "indent": r"^[ \t]{2,}$|\n[ \t]+$", "newline": r"\n", "quote": "[\"']", "underscore": "_",
    "operator": r"[-+*/%=<>&|^~]", "keyword": rf"^\s*(?:{KEYWORDS})$", "self": r"^\s*self$"}
# In a line: what opens no string, or a string that also ends. A quote behind two letters, as in
# "don't", is an apostrophe; behind one, as in f'...', it opens a string.
CODE = r"(?:[^#'\"]|(?<=\w\w)'|(?<!\w\w)'[^']*'|\"[^\"]*\")*?"
LINE = {"comment": rf"^{CODE}#", "string": rf"^{CODE}(?:(?<!\w\w)'[^']*|\"[^\"]*)\Z"}
FEWEST = 20                                         # tokens with the concept, and without it
TRAINING, HELD_OUT = 2 ** 15, 2 ** 14               # tokens to rank on, and to report on, at most
PROBE_ROWS = 2 ** 14                                # of them, that a linear probe is trained on
NEAR = 50                                           # latents that random ones are drawn from

# --- what a concept is ----------------------------------------------------------------------------

def token_texts(tokenizer, n):
    """What each of n tokens adds to a text, [n] strings."""
    if Contexts(tokenizer, 2).letters:                        # of proteins: no spaces between
        return [t or "" for t in tokenizer.convert_ids_to_tokens(list(range(n)))]
    first = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    before = tokenizer.decode(first)
    both = tokenizer.batch_decode([first + [i] for i in range(n)])
    alone = tokenizer.batch_decode([[i] for i in range(n)])
    return [b[len(before):] if b.startswith(before) else a for a, b in zip(alone, both)]

def compiled(flag, pattern):
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as err:
        runs.fail(f"{flag} {pattern}: no regular expression ({err}); mend it, or quote it")

class Concept:
    """name, and true(ids [n, T]) -> bool [n, T]. kind: 'token', 'line' or 'text', what the
    expression is searched in; 'probe' for --labels, whose judge is a probe (w [D], b) of x."""
    def __init__(self, name, kind, pattern, texts):
        self.name, self.kind, self.pattern, self.texts = name, kind, pattern, texts
        self.judge = None
        if kind == "token":
            self.table = np.array([bool(pattern.search(text)) for text in texts])

    def true(self, ids):
        if self.kind == "token":
            return self.table[ids]
        found, memory = np.zeros(ids.shape, bool), {}
        for i, row in enumerate(ids):
            so_far = ""
            for j, token in enumerate(row):
                so_far += self.texts[token]
                if self.kind == "line":
                    so_far = so_far.rpartition("\n")[2]
                    if so_far not in memory:
                        memory[so_far] = bool(self.pattern.search(so_far))
                    found[i, j] = memory[so_far]
                else:
                    found[i, j] = bool(self.pattern.search(so_far))
        return found

def named(name, texts):
    """The built-in concept of this name."""
    kind, _, of = name.partition(":")
    if name in BUILT_IN:
        return Concept(name, "token", re.compile(BUILT_IN[name]), texts)
    if name in LINE:
        return Concept(name, "line", re.compile(LINE[name]), texts)
    if kind == "keyword" and of in keyword.kwlist:
        return Concept(name, "token", re.compile(rf"^\s*{of}$"), texts)
    if kind == "letter" and len(of) == 1 and of.isalpha():
        return Concept(name, "token", re.compile(rf"^\s+{of}", re.I), texts)
    runs.fail(f"--concept {name}: unknown; use {', '.join([*BUILT_IN, *LINE])}, keyword:NAME, "
              "letter:X, a --regex, or TASK=CLASS with --labels")

# --- tokens with and without it -------------------------------------------------------------------

def heldout_contexts(source):
    """The numbers of the contexts of a harvest that are held out, ascending."""
    ids, where = lm.heldout_tokens(source)
    return np.unique(where // ids.shape[1])

def harvested(source, training=TRAINING, held_out=HELD_OUT):
    """(x [N, D] fp16, ids [n, T], where [N]) of tokens of training contexts, and of held-out ones,
    from the activations on disk, so many at most; where: context * T + position. A run with
    --stream keeps held-out contexts alone: there the later half stands for those of training."""
    ids, _ = lm.heldout_tokens(source)
    where = np.concatenate([np.load(p) for p in sorted(source.folder.glob("where-*.npy"))])
    context, held = where // ids.shape[1], heldout_contexts(source)
    if np.isin(context, held).all():
        held = held[:len(held) // 2]
    mine = np.isin(context, held)
    return [(source.shards.read(rows).to(source.device), ids, where[rows]) for rows in (
        np.flatnonzero(~mine)[:training], np.flatnonzero(mine)[:held_out])]

def labelled(args, source, model, tokenizer, block):
    """The same of the documents of --labels, and what is true of the tokens, [N] bool each. Three
    fifths and one fifth of the documents to train on, the rest held out."""
    task, _, of = args.concept.partition("=")
    if Contexts(tokenizer, 2).letters:
        runs.fail("--labels: not for a protein model; use --regex or --so-far")
    if not tokenizer.is_fast:
        runs.fail("--labels: this tokenizer gives no offsets of its tokens in the text; give the "
                  "model a fast tokenizer (tokenizer.json)")
    T = source.meta["context_size"]
    ids, part, tasks = probing.contexts(roles.labelled(args.labels), tokenizer, T,
                                        Contexts(tokenizer, T).bos)
    if not len(ids):
        runs.fail(f"--labels {args.labels}: no text fills a context of {T} tokens; give longer "
                  "ones")
    names, label = tasks.get(task, ([], None))
    if of not in names:
        there = ", ".join(f"{t}={n}" for t, (found, _) in tasks.items() for n in found)
        runs.fail(f"--concept {args.concept}: {args.labels} has no such class in contexts of {T} "
                  f"tokens; it has {there or 'none'}")
    out, n = [], TRAINING // T
    for chosen, most in ((part < 2, n), (part == 2, n // 2)):
        mine, yes = ids[chosen][:most], label[chosen][:most] == names.index(of)
        x = torch.cat([lm.residual_stream(model, block, mine[i:i + 32]).half()
                       for i in range(0, len(mine), 32)] or [torch.zeros(0, T, source.d_in)])
        keep = ~(x.float().norm(dim=-1) > source.meta["norm_cut"]).cpu()
        keep[:, 0] = False
        out.append((x[keep], torch.from_numpy(yes)[keep]))
    return out

def prepare(args, source, model, tokenizer, block, texts):
    """(concept, tokens to rank on, tokens to report on), of --concept, --regex, --so-far or
    --labels; tokens have x [N, D] and y [N] bool. Fails where too few have the concept, or lack
    it."""
    if args.labels:
        flag, concept = f"--concept {args.concept}", Concept(args.concept, "probe", None, texts)
        parts = labelled(args, source, model, tokenizer, block)
    else:
        if args.concept is not None:
            flag, concept = f"--concept {args.concept}", named(args.concept, texts)
        elif args.regex is not None:
            flag, kind, pattern = f"--regex {args.regex}", "token", compiled("--regex", args.regex)
            concept = Concept(args.regex, kind, pattern, texts)
        else:
            flag, pattern = f"--so-far {args.so_far}", compiled("--so-far", args.so_far)
            concept = Concept(args.so_far, "text", pattern, texts)
        if concept.kind == "token":                           # '<|endoftext|>' is no operator
            concept.table[[i for i in tokenizer.all_special_ids if i < len(texts)]] = False
        parts = []
        for x, ids, where in harvested(source):
            context, place = where // ids.shape[1], where % ids.shape[1]
            used, at = np.unique(context, return_inverse=True)
            parts.append((x, torch.from_numpy(concept.true(ids[used])[at, place])))
    for kind, (x, y) in zip(("training", "held-out"), parts):
        if min(n := int(y.sum()), len(y) - n) < FEWEST:
            runs.fail(f"{flag}: holds for {n:,} of {len(y):,} tokens of {kind} contexts; at least "
                      f"{FEWEST} must have it and {FEWEST} not: use another, or a longer text")
    tokens = [SimpleNamespace(x=x, y=y) for x, y in parts]
    if concept.kind == "probe":
        concept.judge = linear_probe(*parts[0])
    return concept, *tokens

def linear_probe(x, y):
    """(w [D], b) in float64 of a logistic regression on x [N, D], both classes of one weight."""
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:PROBE_ROWS]
    return probes.logistic(x[rows].float(), y.to(x.device)[rows], balanced=True, steps=60)

# --- which latents correlate ----------------------------------------------------------------------

class Codes:
    """Of latents on N tokens, sorted once for any number of concepts: encode(x [n, D]) -> [n, F]
    for x [N, D]. rate, peak [F]: how often each fires, and its largest code."""
    @torch.no_grad()
    def __init__(self, encode, x):
        rows, latents, values, first = [], [], [], 0
        for part in x.split(2048):
            z = encode(part.float())
            i, j = (z > 0).nonzero().T
            rows.append(i + first), latents.append(j), values.append(z[i, j])
            first += len(part)
        self.N, self.F = len(x), z.shape[1]
        row, latent, value = map(torch.cat, (rows, latents, values))
        order = value.argsort(descending=True)
        order = order[latent[order].argsort(stable=True)]     # by latent, the largest code first
        self.row, self.latent, self.value = row[order], latent[order], value[order].double()
        self.count = torch.bincount(self.latent, minlength=self.F)                       # (F,)
        self.rate = self.count.double() / self.N
        self.peak = torch.zeros(self.F, device=x.device).double().scatter_reduce_(
            0, self.latent, self.value, "amax")
        self.before = self.count.cumsum(0) - self.count       # where each latent's codes begin

    def sums(self, values):
        """Of values, one a code that is not 0: their sums by latent, [F]."""
        return torch.zeros(self.F, dtype=torch.double, device=values.device).index_add_(
            0, self.latent, values.double())

    def scores(self, y):
        """(f1, auc, correlation) [F] of all latents for y [N] bool; silent ones 0, 1/2 and 0."""
        y = y.to(self.row.device)
        hit, P = y[self.row].double(), y.sum().double()
        rank = torch.arange(len(hit), device=hit.device) - self.before[self.latent] + 1.0
        total = torch.cat([hit.new_zeros(1), hit.cumsum(0)])
        hits = total[1:] - total[self.before[self.latent]]    # with a code at least this large
        same = (self.latent[1:] == self.latent[:-1]) & (self.value[1:] == self.value[:-1])
        last = torch.cat([~same, same.new_ones(1)])[:len(hit)]       # of equal codes, the last
        f1 = torch.zeros(self.F, dtype=torch.double, device=hit.device).scatter_reduce_(
            0, self.latent, torch.where(last, 2 * hits / (rank + P), 0), "amax")
        # AUC by the mean rank of ties: each run of equal codes is one step of the curve.
        group = torch.cat([same.new_zeros(1), ~same]).cumsum(0)[:len(hit)]
        size, good = torch.bincount(group).double(), torch.bincount(group, hit)
        end = last.nonzero()[:, 0]
        worse = (self.N - P) - (rank - hits)[end]             # tokens without y, with smaller codes
        wins = torch.zeros(self.F, dtype=torch.double, device=hit.device).index_add_(
            0, self.latent[end], good * (worse + (size - good) / 2))
        on = self.sums(hit)
        silent = (P - on) * ((self.N - P) - (self.count - on)) / 2
        auc = (wins + silent) / (P * (self.N - P))
        mean, share = self.sums(self.value) / self.N, P / self.N
        var = self.sums(self.value ** 2) / self.N - mean ** 2
        cov = self.sums(self.value * hit) / self.N - mean * share
        correlation = cov / (var * share * (1 - share)).clamp(min=1e-30).sqrt()
        return f1, auc, torch.where(self.count > 0, correlation, 0)

    def of(self, latent):
        """The tokens on which one latent fires, and its codes there, the largest first."""
        own = slice(int(self.before[latent]), int(self.before[latent] + self.count[latent]))
        return self.row[own], self.value[own]

    def threshold(self, latent, y):
        """The t of the best F1 of one latent: 'z > t'."""
        row, value = self.of(latent)
        hit = y.to(row.device)[row].double().cumsum(0)
        f1 = 2 * hit / (torch.arange(len(hit), device=hit.device) + 1 + y.sum().item())
        f1[:-1][value[:-1] == value[1:]] = 0
        at = int(f1.argmax())
        return value[at + 1].item() if at + 1 < len(value) else 0.0

class Ranked:
    """The latents of a saved SAE as detectors of a concept, on tokens as prepare() gives them.
    codes: those of `train` and of `heldout`, where they are known already."""
    def __init__(self, sae, train, heldout, codes=None):
        self.sae, self.y, self.heldout = sae, train.y, heldout
        self.codes, self.unseen = codes or [Codes(sae.encode, part.x) for part in (train, heldout)]
        self.f1, self.auc, self.correlation = self.codes.scores(train.y)

    def best(self, n):
        return self.f1.topk(min(n, int((self.codes.count > 0).sum()))).indices.tolist()

    def scores(self, i):
        """dict of how well latent i tells the concept; F1 on held-out tokens at the threshold that
        is best in training."""
        (row, value), said = self.unseen.of(i), torch.zeros(self.unseen.N, dtype=torch.bool)
        said[row[value > self.codes.threshold(i, self.y)].cpu()] = True
        f1 = probes.scores(said, self.heldout.y.cpu())[2].item()
        _, auc, correlation = self.unseen.scores(self.heldout.y)
        return dict(latent=i, rate=self.codes.rate[i].item(), peak=self.codes.peak[i].item(),
                    f1_train=self.f1[i].item(), f1=f1, auc=auc[i].item(),
                    correlation=correlation[i].item())

    def row(self, i):
        """What alpha = 1 adds, [D]."""
        return self.codes.peak[i].float() * self.sae.t["W_dec"][i]

    def clamp(self, i):
        W, peak = self.sae.t["W_dec"][i], self.codes.peak[i].float()
        return lambda a: lambda x: x + (a * peak - self.sae.encode(x)[:, i])[:, None] * W

    def random(self, i, tested, n, seed):
        """n random latents as frequent as i, their rows as long as row(i): [n, D]."""
        far = (self.codes.rate.log() - self.codes.rate[i].log()).abs()
        far[[*tested]] = torch.inf
        near = far.argsort()[:min(NEAR, int(far.isfinite().sum()))]
        if not len(near):
            runs.fail(f"{self.sae.path}: has no other latent that fires; there is no control")
        g = torch.Generator().manual_seed(seed + 1)
        W = self.sae.t["W_dec"][near[torch.randint(len(near), (n,), generator=g).to(near.device)]]
        return W / W.norm(dim=1, keepdim=True) * self.row(i).norm()
