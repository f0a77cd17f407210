"""k-sparse probing: how well do the k best latents tell what a token is in a Python program?

Gurnee et al. 2023 (arXiv 2305.01610), as in SAEBench (Karvonen et al. 2025, arXiv 2503.09532), with
labels that are known for sure in the place of its data sets: evaluation/roles.py, or --labels. The
choice of tasks is ours.

Examples  tokens of fresh contexts of files, less position 0 and outliers. A token has the label of
          all its characters that are not blank; if they differ, none. `package`: whole contexts,
          their codes averaged. Each class against the others, drawn evenly, as many together
Split     by file: 3/5 fitted, 1/5 to choose a penalty, 1/5 scored; per class at most 2000, 500, 500
Latents   the k = 1, 2, 5, 16 with the largest |mean of the class - mean of the others|; on them a
          logistic regression. `signed`: with the largest difference itself, at k = 1
Scores    accuracy (chance 1/2), F1, AUC; means over the classes of a task, then over tasks; _se as
          if classes were independent
Beside    token      by the token's id alone: naive Bayes on the ids, without context
          full       logistic regression on all D activations, penalty chosen among PENALTIES
          residual   k-sparse probing of the activations themselves
          all        of a run: logistic regression on all its latents, penalty chosen
          untrained  a random dictionary, as sparse as the first run
A task counts in the mean only where `full` is more accurate than `token` by MARGIN: others need no
context, and a latent for a token is all that they ask for.
"""
import platform
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
    """The class [T] of each token, -1 for none; offsets: where it begins and ends in text."""
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
    """Contexts of T tokens: ids [n, T], the part of each [n] (0, 1, 2), and {task: (its classes,
    the class of every token [n, T] or, of whole contexts, [n])}; -1: none."""
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
    """Of each class with enough examples (rows, y) of every part, balanced; label [N], part [N]."""
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

def prepare(documents, model, tokenizer, block, cut, T):
    """x [N, D] float16 of all tokens, and {task: its classes, their examples as rows of x or, where
    there is `share` [n, T], each token's in the mean, of contexts; ids of an example's tokens,
    [N, 1] or [n, T]}."""
    ids, part, tasks = contexts(documents, tokenizer, T, Contexts(tokenizer, T).bos)
    n, x, made = len(ids), [], {}
    with runs.Bar(total=ids.size, desc="activations", unit="tok", unit_scale=True) as bar:
        for piece in np.split(ids, range(max(1, 4096 // T), n, max(1, 4096 // T))):
            x.append(lm.residual_stream(model, block, piece).half() if n else torch.zeros(0, T, 1))
            bar.update(piece.size)
    x = torch.cat(x)
    keep = ~(x.float().norm(dim=-1) > cut)                                   # (n, T)
    keep[:, 0] = False
    share = keep / keep.sum(1, keepdim=True).clamp(min=1)
    flat, tokens = keep.flatten().cpu().numpy(), torch.from_numpy(ids).long()
    for task, (names, label) in tasks.items():
        if whole := label.ndim == 1:
            found = examples(label, part, len(names))
        else:
            found = examples(np.where(flat, label.ravel(), -1), part.repeat(T), len(names))
        if found:
            made[task] = SimpleNamespace(names=names, classes=found, share=share if whole else None,
                                         label=None if whole else torch.from_numpy(np.where(
                                             flat, label.ravel(), -1)),
                                         ids=tokens if whole else tokens.view(-1, 1))
    if not made:
        runs.fail(f"--probes: no class has {FEWEST[0]} tokens to fit, {FEWEST[1]} to choose and "
                  f"{FEWEST[2]} to score on, in documents of their own; give more by --labels")
    return x.flatten(0, 1), made

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

def token_probe(ids, sets):
    """Scores of one class by the ids [N, t] of an example's tokens alone: log odds of each, seen
    once more in both classes than it was, averaged."""
    (fit, y), _, (test, y_test) = sets
    yes, no = (torch.bincount(ids[fit[y == v]].flatten(), minlength=ids.max() + 1) + 1
               for v in (True, False))
    return score((yes / no).log()[ids[test]].mean(1), y_test)

def averaged(Z, share):
    """Means [n, F] over contexts of codes Z [n T, F], with weights share [n, T]."""
    if not Z.is_sparse:
        return torch.einsum("ntf,nt->nf", Z.view(*share.shape, -1), share)
    out, (i, j) = torch.zeros(len(share), Z.shape[1], device=Z.device), Z.indices()
    values = Z.values() * share.flatten()[i]
    return out.index_put_((i // share.shape[1], j), values, accumulate=True)

def by_task(tasks, function):
    """{task: {class: function(task, its examples)}}."""
    return {name: {task.names[c]: function(name, sets) for c, sets in task.classes.items()}
            for name, task in tasks.items()}

def measure(encode, x, tasks):
    """{task: {class: {k: scores}}} of codes encode(x), k = "all" with all of them; what each latent
    detects best, by task of tokens; and the codes' L0."""
    Z = probes.codes(lambda part: encode(part.float()), x)
    whole = {t: averaged(Z, task.share) for t, task in tasks.items() if task.share is not None}
    def probe(task, sets):
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
        every = np.concatenate([[], *(of(t, "accuracy") for t in counted)])
        se = every.std(ddof=1) / len(every) ** 0.5 if len(every) > 1 else float("nan")
        out[str(k)] = row | dict(accuracy_se=float(se), tasks={
            t: mean(of(t, "accuracy")) for t in found})
    return out

def besides(sae, l0, x, tasks):
    """Summaries of what the docstring has beside a run, and the tasks counted."""
    rows = dict(token=by_task(tasks, lambda t, sets: {"all": token_probe(tasks[t].ids, sets)}))
    residual, *_ = measure(lambda v: v, x, tasks)
    rows["full"] = {t: {c: dict(all=by.pop("all")) for c, by in classes.items()}
                    for t, classes in residual.items()}
    random, _ = probes.untrained(sae.d_sae, max(1, round(l0)), x.float().mean(0))
    rows.update(residual=residual, untrained=measure(random, x, tasks)[0])
    accuracy = {name: summary(rows[name], tasks)["all"]["tasks"] for name in ("token", "full")}
    counted = [t for t in tasks if accuracy["full"][t] > accuracy["token"][t] + MARGIN]
    return {name: summary(found, counted) for name, found in rows.items()} | dict(counted=counted)

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

def report(saes, facts, examples):
    """The result of each SAE, with what stands beside it, from its probes.json if that has it;
    examples() gives x and tasks, of prepare()."""
    stored = [probes.Stored("probing", sae, facts, __file__, roles.__file__) for sae in saes]
    if all(s.result for s in stored):
        return [s.result for s in stored]
    x, tasks = examples()
    beside = next((s.result["beside"] for s in stored if s.result), None)
    for sae, s in zip(runs.Bar(saes, desc="probing", unit="run"), stored):
        if s.result:
            continue
        found, best, l0 = measure(sae.encode, x, tasks)
        if not beside:
            beside = besides(sae, l0, x, tasks)
        s.put(summary(found, beside["counted"]) | dict(classes={
            t: {c: {str(k): v for k, v in by.items()} for c, by in rows.items()}
            for t, rows in found.items()}, latents=best, beside=beside))
    return [s.result for s in stored]
