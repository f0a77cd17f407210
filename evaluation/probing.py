"""k-sparse probing: how well do the k best latents tell what a token is in a Python program?

Gurnee et al. 2023 (arXiv 2305.01610), as in SAEBench (Karvonen et al. 2025, arXiv 2503.09532), with
labels that are known for sure in the place of its data sets: evaluation/roles.py, or --labels. The
choice of tasks is ours.

Examples  tokens of fresh contexts of files, less position 0 and outliers. A token has the label of
          all its characters that are not blank; if they differ, none. `package`: whole contexts,
          their codes averaged. Each class against the others, drawn evenly, as many together
Split     by file: 3/5 fitted, 1/5 to choose a penalty, 1/5 scored; per class at most 2000, 500, 500
          and at least FEWEST; `scored` says how many. Files of a package may be much alike, as
          those of encodings are, so `package` is easier than it would be on new code
Latents   the k = 1, 2, 5, 16 with the largest |mean of the class - mean of the others|; on them a
          logistic regression. `signed`: with the largest difference itself, at k = 1
Scores    accuracy (chance 1/2), F1, AUC; means over the classes of a task, then over tasks; _se by
          the spread over the classes of each task, as if independent; none if a task has one class
Beside    token      by the token's id alone, without context: naive Bayes, from all labelled tokens
                     of the files fitted
          full       logistic regression on all D activations, penalty chosen among PENALTIES
          residual   k-sparse probing of the activations themselves
          all        of a run: logistic regression on all its latents, penalty chosen
          untrained  a random dictionary about as sparse as the run
A task counts in the mean only where `full` is more accurate than `token` by MARGIN: others need no
context, and a latent for a token is all that they ask for.
"""
import platform
from statistics import variance
from types import SimpleNamespace

import numpy as np
import torch

import runs
from evaluation import probes, roles
from sources import lm
from sources.text import Contexts, text_hash

K, MARGIN, PENALTIES = (1, 2, 5, 16), 0.05, (1e-3, 1e-2, 1e-1)
TOKENS, PER_FILE = 2 ** 17, 512                              # at most, in whole contexts
MOST, FEWEST = (2000, 500, 500), (50, 10, 20)                # examples of a class in each part
TUNED = 60                                                   # steps of L-BFGS on all D or F

# --- examples -------------------------------------------------------------------------------------

def token_labels(text, offsets, spans, names):
    """The class [T] of each token, -1 for none; offsets: where it begins and ends in text.

    Of 'a bb' with a class on 'a' alone: solid is 1 0 1 1; there, of the solid characters, 0 -1 -1
    and, at the end, -1; before 0 1 1 2 3; changes 0 1 1 1. The token ' bb', 1 to 4, is solid
    characters 1 and 2, without a change between them: it has one class, -1."""
    there = np.full(len(text), -1)
    for lo, hi, name in spans:
        there[lo:hi] = names.setdefault(name, len(names))
    solid = np.array([not char.isspace() for char in text], bool)
    there = np.append(there[solid], -1)                       # of the characters that are not blank
    before = np.append(0, solid.cumsum())                     # how many of these before a character
    changes = np.append(0, (there[1:] != there[:-1]).cumsum())
    lo, hi = before[np.array(offsets, int).reshape(-1, 2).T]
    one = (hi > lo) & (changes[lo] == changes[np.maximum(hi - 1, 0)])
    return np.where(one, there[lo], -1)

def contexts(documents, tokenizer, T, bos, seed=0):
    """Contexts of T tokens, as many as each document fills: ids [n, T], the part of each [n]
    (0, 1, 2), and {task: (its classes, the class of every token [n, T] or, of whole contexts,
    [n])}; -1: none."""
    if not tokenizer.is_fast:
        runs.fail("--probes: this tokenizer gives no offsets of its tokens in the text; leave "
                  "--probes out for this model, or give it a fast tokenizer (tokenizer.json)")
    rng, body, ids, parts, whole, rows = np.random.default_rng(seed), T - len(bos), [], {}, [], []
    names, part, n = {}, [], max(1, TOKENS // T)
    with runs.Bar(total=n, desc="label", unit="context") as bar:
        for text, group, spans, topic in documents:
            if len(ids) >= n:
                break
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            labels = {task: token_labels(text, coded.offset_mapping, found, names.setdefault(
                task, {})) for task, found in spans.items()}
            cuts = rng.permutation(len(coded.input_ids) // body)[:max(1, PER_FILE // T)]
            for lo in cuts * body:
                ids.append(bos + coded.input_ids[lo:lo + body])
                part.append(parts.setdefault(group, (0, 1, 0, 2, 0)[len(parts) % 5]))
                rows.append({task: np.concatenate([[-1] * len(bos), v[lo:lo + body]])
                             for task, v in labels.items()})
                whole.append(topic)
            bar.update(len(cuts))
    none = np.full(T, -1)
    tasks = {task: (list(found), np.array([row.get(task, none) for row in rows]))
             for task, found in names.items()}
    topics = sorted(set(filter(None, whole)))
    if topics:
        tasks["package"] = topics, np.array([topics.index(t) if t else -1 for t in whole])
    return np.array(ids, np.int32).reshape(-1, T), np.array(part), tasks

def examples(label, part, C, seed=0):
    """Of each class with enough examples (rows, y) of every part; label [N], part [N]. Half of them
    are of the class, and of every other class as many (each) as together make the other half."""
    rng, out = np.random.default_rng(seed), {}
    rows = lambda c, p: rng.permutation(np.flatnonzero((label == c) & (part == p)))
    for c in range(C):
        sets = []
        for p in range(3):
            yes, no = rows(c, p)[:MOST[p]], [rows(o, p) for o in range(C) if o != c]
            each = -(-len(yes) // max(1, C - 1))
            no = rng.permutation(np.concatenate([o[:each] for o in no] or [yes[:0]]))
            n = min(len(yes), len(no))
            sets.append((torch.from_numpy(np.concatenate([yes[:n], no[:n]])),
                         torch.arange(2 * n) < n))
        if all(len(y) >= 2 * fewest for (_, y), fewest in zip(sets, FEWEST)):
            out[c] = sets
    return out

def log_odds(ids, label, C):
    """[C, V]: of each class, against the others evenly, at each id; from examples with tokens
    ids [N, t] and label [N]. Each id is seen once more in both than it was."""
    count = np.array([np.bincount(ids[label == c].ravel(), minlength=ids.max() + 1)
                      for c in range(C)], float)                             # (C, V)
    total = count.sum(1, keepdims=True)
    even = count / total.clip(1)
    others = (even.sum(0) - even) / max(1, C - 1) * total
    return torch.from_numpy(np.log((count + 1) / (others + 1)))

def prepare(documents, model, tokenizer, block, cut, T):
    """x [N, D] float16 of all tokens but position 0 and outliers, and {task: its names of classes;
    their examples (classes) as rows of x or, where there is `share` [n, N], each token's in the
    mean, of contexts; label of all rows or contexts; ids of their tokens, [N, 1] or [n, T], and the
    log odds of these}."""
    ids, part, tasks = contexts(documents, tokenizer, T, Contexts(tokenizer, T).bos)
    n, x, made = len(ids), [], {}
    with runs.Bar(total=ids.size, desc="activations", unit="tok", unit_scale=True) as bar:
        for piece in np.split(ids, range(max(1, 4096 // T), n, max(1, 4096 // T))):
            x.append(lm.residual_stream(model, block, piece).half() if n else torch.zeros(0, T, 1))
            bar.update(piece.size)
    x = torch.cat(x)
    keep = ~(x.float().norm(dim=-1) > cut)                                   # (n, T)
    keep[:, 0] = False
    context, kept = keep.nonzero()[:, 0], keep.cpu().numpy()
    share = torch.sparse_coo_tensor(
        torch.stack([context, torch.arange(len(context), device=x.device)]),
        1 / keep.sum(1)[context], (n, len(context)), is_coalesced=True, check_invariants=False)
    for task, (names, label) in tasks.items():
        whole = label.ndim == 1
        label, own, seen = (label, part, ids) if whole else (
            label[kept], part.repeat(T).reshape(-1, T)[kept], ids[kept][:, None])
        if found := examples(label, own, len(names)):
            made[task] = SimpleNamespace(
                names=names, classes=found, share=share if whole else None,
                label=torch.from_numpy(label), ids=torch.from_numpy(seen).long(),
                odds=log_odds(seen, np.where(own == 0, label, -1), len(names)))
    if not made:
        runs.fail("--probes: no class that has another one beside it in its task has "
                  f"{FEWEST[0]} tokens to fit, {FEWEST[1]} to choose and {FEWEST[2]} to score on, "
                  f"in documents of their own, in whole contexts of {T} tokens; give more or "
                  "longer ones, and two classes or more, by --labels")
    return x[keep], made

# --- probes ---------------------------------------------------------------------------------------

def score(logit, y):
    """Accuracy, F1 and AUC of logits [N] for y [N] bool; ties count half."""
    logit, y = logit.double().cpu(), y.cpu()
    _, rank = logit.unique(return_inverse=True)
    count = torch.bincount(rank).double()
    rank = (count.cumsum(0) - (count - 1) / 2)[rank]                         # mean rank of ties
    n, m = y.sum().item(), (~y).sum().item()
    return dict(accuracy=((logit > 0) == y).double().mean().item(),
                f1=probes.scores(logit > 0, y)[2].item(),
                auc=((rank[y].sum() - n * (n + 1) / 2) / (n * m)).item())

def sparse_probes(Z, sets):
    """{k: scores} of one class on codes Z [N, F], sparse or dense; sets: examples of 3 parts."""
    (fit, y), _, (test, y_test) = sets
    sign = torch.where(y, 1.0, -1.0).to(Z.device) * 2 / len(y)
    weight = torch.zeros(len(Z), device=Z.device).index_add_(0, fit.to(Z.device), sign)
    difference, out = Z.mT @ weight, {}                                      # (F,)
    for k, by in [(k, difference.abs()) for k in K] + [("signed", difference)]:
        best = by.topk(min(1 if k == "signed" else k, len(by))).indices
        X = Z.index_select(1, best).to_dense().double()
        w, b = probes.logistic(X[fit], y.to(Z.device))
        out[k] = score(X[test] @ w + b, y_test)
    return out

def full_probe(Z, sets):
    """Scores of one class by all columns of Z, with the penalty that does best on the 2nd part; and
    the probe's weights, [F]."""
    (fit, y), (choose, y_choose), (test, y_test) = [(r.to(Z.device), y.to(Z.device))
                                                    for r, y in sets]
    X, best = Z.index_select(0, fit), (-1,)
    for C in PENALTIES:
        w, b = probes.logistic(X, y, C, steps=TUNED)
        logit = lambda rows: Z.index_select(0, rows).double() @ w + b
        best = max(best, (score(logit(choose), y_choose)["accuracy"], w, logit(test)),
                   key=lambda found: found[0])
    return score(best[2], y_test), best[1]

def token_probe(task, c, sets):
    """Scores of class c by the ids of an example's tokens alone: their log odds, averaged."""
    test, y = sets[2]
    return score(task.odds[c][task.ids[test]].mean(1), y)

def averaged(Z, share):
    """Means [n, F] over contexts of codes Z [N, F]; share [n, N]: the weight of each row."""
    if not Z.is_sparse:
        return share @ Z
    context, (i, j) = share.indices()[0], Z.indices()          # a row stands in one context
    out = torch.zeros(len(share), Z.shape[1], device=Z.device)
    return out.index_put_((context[i], j), Z.values() * share.values()[i], accumulate=True)

def by_task(tasks, function):
    """{task: {class: function(task, number of the class, its examples)}}."""
    return {name: {task.names[c]: function(name, c, sets) for c, sets in task.classes.items()}
            for name, task in tasks.items()}

def measure(encode, x, tasks):
    """{task: {class: {k: scores}}} of codes encode(x), k = "all" with all of them; what each latent
    detects best, by task of tokens; and the codes' L0."""
    Z = probes.codes(lambda part: encode(part.float()), x)
    whole = {t: averaged(Z, task.share) for t, task in tasks.items() if task.share is not None}
    def probe(task, c, sets):
        own = whole.get(task, Z)
        return sparse_probes(own, sets) | {"all": full_probe(own, sets)[0]}
    l0 = (Z.values() if Z.is_sparse else Z).count_nonzero().item() / len(Z)
    best = {name: probes.best_classes(Z, t.label, t.names) for name, t in tasks.items()
            if t.share is None}
    return by_task(tasks, probe), best, l0

def summary(found, counted):
    """{k: means over classes, then over the tasks counted; "tasks": the mean accuracy of each}."""
    out, mean = {}, lambda values: float(np.mean(list(values))) if len(values) else float("nan")
    for k in next(iter(next(iter(found.values())).values())):
        of = lambda task, name: [by[k][name] for by in found[task].values()]
        row = {name: mean([mean(of(t, name)) for t in counted])
               for name in ("accuracy", "f1", "auc")}
        spread = [variance(v) / len(v) if len(v := of(t, "accuracy")) > 2 else float("nan")
                  for t in counted]                 # two classes are one question, asked twice
        out[str(k)] = row | dict(
            accuracy_se=sum(spread) ** 0.5 / len(counted) if counted else float("nan"),
            tasks={t: mean(of(t, "accuracy")) for t in found})
    return out

def besides(x, tasks):
    """Summaries of what the docstring has beside every run; the tasks counted; {task: examples that
    the class with fewest is scored on}."""
    rows = dict(token=by_task(tasks, lambda t, *rest: {"all": token_probe(tasks[t], *rest)}))
    residual, *_ = measure(lambda v: v, x, tasks)
    rows["full"] = {t: {c: dict(all=by.pop("all")) for c, by in classes.items()}
                    for t, classes in residual.items()}
    rows["residual"] = residual
    accuracy = {name: summary(rows[name], tasks)["all"]["tasks"] for name in ("token", "full")}
    counted = [t for t in tasks if accuracy["full"][t] > accuracy["token"][t] + MARGIN]
    return {name: summary(found, counted) for name, found in rows.items()} | dict(
        counted=counted, scored={t: min(len(sets[2][1]) for sets in task.classes.values())
                                 for t, task in tasks.items()})

def directions(x, tasks):
    """[n, D]: the full probe of every class of the tasks of tokens, for evaluation/cones.py."""
    x = x.float()
    return torch.stack([full_probe(x, sets)[1].float() for task in tasks.values()
                        if task.share is None for sets in task.classes.values()])

def facts(source):
    """What the activations of examples depend on."""
    return [source.meta[k] for k in ("model_hash", "hook_name", "dtype", "norm_cut",
                                     "context_size")]

def documents(labels):
    """The file of --labels, or Python's standard library for None: what to know it by, and its
    documents."""
    if labels:
        found = list(roles.labelled(labels))
        return found, found
    return [platform.python_version(), text_hash(None)], roles.standard_library()

def report(saes, depends, prepared):
    """The result of each SAE, with what stands beside it, from its probes.json if that has it;
    prepared() gives x and tasks, of prepare(), and `depends` says what these depend on."""
    stored = [probes.Stored("probing", sae, depends, __file__, roles.__file__) for sae in saes]
    if all(s.result for s in stored):
        return [s.result for s in stored]
    x, tasks = prepared()
    beside, random = next((s.result["beside"] for s in stored if s.result), None), {}
    for sae, s in zip(runs.Bar(saes, desc="probing", unit="run"), stored):
        if s.result:
            continue
        found, best, l0 = measure(sae.encode, x, tasks)
        beside = beside or besides(x, tasks)
        counted, key = beside["counted"], probes.alike(sae.d_sae, l0)
        if key not in random:
            control, _ = probes.untrained(*key, x.float().mean(0))
            random[key] = summary(measure(control, x, tasks)[0], counted)
        s.put(summary(found, counted) | dict(classes={
            t: {c: {str(k): v for k, v in by.items()} for c, by in rows.items()}
            for t, rows in found.items()}, latents=best,
            beside=dict(beside, untrained=random[key])))
    return [s.result for s in stored]
