"""How good is a program as the explanation of a latent? Scores on held-out tokens, and baselines.

    scores     of a program: r and auc over all held-out tokens; r10, SAGE's form; written
    passive    the program of the best r on the exemplars
    reading    the program of the best score, of evidence.py, of exemplars and random tokens
    frequent   the token that is most often where the exemplars fire

A latent has number, codes z [N] on the pool, heldout [M], and run(texts), as explain.py makes them.
"""
import numpy as np

from evaluation.evidence import Evidence, around
from evaluation.programs import Literal, Program, to_json

def leading(e, ranked):
    """The first program of a ranking that holds somewhere in the pool."""
    return Program((e.distinct(ranked, [], 1) or [(Literal("class", "word"),)])[0])

def passive(e):
    """The program of the best r on the exemplars."""
    return e.lang.fit(leading(e, e.ranked(e.own)), e.lab.pool.read.take(e.own), e.latent.z[e.own],
                      np.ones(len(e.own)))

def reading(lab, latent, seed, n):
    """The program of the best score when n random tokens have been read, and nothing was tried."""
    e = Evidence(lab, latent, seed)
    e.ask(np.ones(len(latent.z), bool), n)
    return e.lang.fit(leading(e, e.ranked()), *e.natural())

def frequent(e):
    """The token that is most often where the exemplars fire."""
    strong = e.own[e.latent.z[e.own] >= e.fires]
    tokens, count = np.unique(e.lab.pool.read.token[strong], return_counts=True)
    literal = Literal("token", e.lang.set_of(tokens[[count.argmax()]]))
    return e.lang.fit(Program((literal,)), e.lab.pool.read.take(e.own), e.latent.z[e.own],
                      np.ones(len(e.own)))

def pearson(p, z):
    """0 where either is the same everywhere."""
    p, z = p - p.mean(), z - z.mean()
    return float(p @ z / max(np.sqrt((p @ p) * (z @ z)), 1e-30))

def auc(p, y):
    """P(p of a token with y > p of one without), ties half; NaN if there is but one kind."""
    _, group = np.unique(p, return_inverse=True)
    good, bad = (np.bincount(group, weight) for weight in (y, ~y))
    pairs = good.sum() * bad.sum()
    return float(good @ (bad.cumsum() - bad / 2) / pairs) if pairs else float("nan")

def ten_exemplars(heldout, z, rng):
    """Rows of SAGE's ten windows around the peaks of contexts."""
    order = np.argsort(-z, kind="stable")[:int((z > 0).sum())]
    _, first = np.unique(heldout.context[order], return_index=True)
    peaks, n, rows = order[np.sort(first)], len(first), []
    cuts = min(10, n // 4), int(0.4 * n), int(0.7 * n), n     # few contexts: fewer than ten are out
    for lo, hi, k in zip(cuts, cuts[1:], (4, 3, 3)):
        for row in rng.permutation(peaks[lo:hi])[:k]:
            rows.append(around(heldout, row))
    return np.concatenate(rows) if rows else np.zeros(0, int)

def scores(lab, latent, e, program, seed):
    """{figure: value} of a program as an explanation of a latent, on held-out tokens."""
    rng = np.random.default_rng((seed, latent.number, 2))
    p, z = lab.language.predict(program, lab.heldout.read), latent.heldout
    rows = ten_exemplars(lab.heldout, z, rng)
    texts = lab.write(program, 10, rng)
    return dict(program=lab.language.say(program), json=to_json(program), r=pearson(p, z),
                auc=auc(p, z > 0), r10=pearson(p[rows], z[rows]) if len(rows) else None,
                written=float((latent.run(texts)[1] >= e.level).mean()) if texts else None)
