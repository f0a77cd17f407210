"""What has been read of a latent, and which programs it speaks for: the scores behind explain.py.

Three kinds of evidence: the tokens around the peaks of EXEMPLARS contexts, those of the largest
peaks; tokens of the pool that were asked for, k at random of those where something holds, with
return; made-up texts.

The score of a program p for codes z is cor(p, z) on the pool but for a factor that all programs
share: (mean of z where p holds - mean of z) sqrt(s / (1 - s)). The share s of tokens on which p
holds is known, since no code is needed for it. The means are estimated from what was read: a token
weighs one over the expected number of times that it was to be read, over all times something was
asked (the balance heuristic of Veach and Guibas 1995); those of exemplars weigh 1, made-up texts
nothing, since nobody knows how natural they are. To propose programs the mean where p holds is
drawn to 0 as if by two more tokens; so what was seen little of is still proposed, and then read.
"""
import numpy as np

from evaluation.programs import Program, join

EXEMPLARS, AROUND = 10, (20, 11)        # of these as many tokens before the peak, and behind it
ALIKE = 0.8                             # shared part of the tokens of two programs that are one

def around(part, row):
    """The rows of a token's window, of tokens as experiments.tokens gives them."""
    far = part.place - part.place[row]
    return np.flatnonzero((part.context == part.context[row]) & (-AROUND[0] <= far)
                          & (far <= AROUND[1]))

def alike(a, b):
    """Do two masks share ALIKE of what either holds? Their sizes often say no, which is quick."""
    n = sorted(map(np.count_nonzero, (a, b)))
    return n[0] >= ALIKE * n[1] and np.count_nonzero(a & b) >= ALIKE * np.count_nonzero(a | b)

def simple(literals):
    """What a score is multiplied by, so that of two programs that say about as well the simpler
    one is taken: 2 % for a second literal, 0.2 % for each text of a set."""
    members = sum(len(l.value) for l in literals if isinstance(l.value, tuple))
    return 0.98 ** (len(literals) - 1) * (1 - 0.002 * members)

class Evidence:
    """Of a latent with codes z [N] on the pool: the tokens of exemplars, tokens that were asked
    for, and made-up texts. It looks at no other code."""
    def __init__(self, lab, latent, seed):
        self.lab, self.latent, self.lang = lab, latent, lab.language
        self.rng = np.random.default_rng((seed, latent.number))
        context, z = lab.pool.context, latent.z
        first = np.argsort(-z, kind="stable")[:int((z > 0).sum())]
        _, at = np.unique(context[first], return_index=True)
        self.peaks = first[np.sort(at)[:EXEMPLARS]]           # rows, the largest code first
        self.mean = float(z[self.peaks].mean())
        self.level, self.fires = self.mean / 2, self.mean / 4           # 'strongly', and 'at all'
        self.own = np.sort(np.concatenate([around(lab.pool, row) for row in self.peaks]))
        self.exemplar = np.isin(np.arange(len(z)), self.own)                 # bool (N,)
        self.asked, self.expected = np.zeros(0, int), np.zeros(len(z))
        self.made, self.memory = [], {}                       # (read, code) of texts; truth on pool

    def where(self, literals):
        """Where a program holds in the pool, bool [N]."""
        for l in literals:
            if l not in self.memory:
                self.memory[l] = self.lang.holds(l, self.lab.pool.read)
        return np.logical_and.reduce([self.memory[l] for l in literals])

    def ask(self, mask, k):
        """Read k random tokens of the pool among those of a mask, without the exemplars, or all of
        them if they are fewer: rows."""
        rows = np.flatnonzero(mask & ~self.exemplar)
        if not len(rows):
            return rows
        new = self.rng.choice(rows, min(k, len(rows)), replace=False)
        self.asked = np.concatenate([self.asked, new])
        self.expected[rows] += len(new) / len(rows)
        return new

    def natural(self):
        """(read, codes, weights) of the real tokens that have been read."""
        rows = np.concatenate([self.own, self.asked])
        weight = np.ones(len(rows))
        weight[len(self.own):] = 1 / self.expected[self.asked]
        return self.lab.pool.read.take(rows), self.latent.z[rows], weight

    def ranked(self, rows=None):
        """[(score, literals)] of all programs of what was read, the best first: by the score; or,
        of rows of the pool, by r on these."""
        natural = rows is None
        if natural:
            read, z, weight = self.natural()
        else:
            read, z, weight = self.lab.pool.read.take(rows), self.latent.z[rows], np.ones(len(rows))
        more = self.made if natural else []
        lits = self.lang.literals(join([read, *(r for r, _ in more)]),
                                  np.concatenate([z, *(c for _, c in more)]), self.level)
        A = np.array([self.lang.holds(l, read) for l in lits], np.float64)   # (m, n)
        count, hit = A @ A.T, (A * weight) @ A.T                             # (m, m): of each pair
        mean = (A * weight * z) @ A.T / np.maximum(hit, 1e-9)
        share = count / len(z)
        if natural:
            P = np.array([self.where([l]) for l in lits], np.float32)
            mean, share = mean * count / (count + 2), (P @ P.T).astype(float) / P.shape[1]
        share = np.clip(share, 1e-9, 1 - 1e-9)
        score = (mean - np.average(z, weights=weight)) * np.sqrt(share / (1 - share)) * (count > 0)
        one = np.array([simple([l]) for l in lits])
        score = np.triu(score * np.where(np.eye(len(lits)) > 0, one, 0.98 * one[:, None] * one))
        pairs = [divmod(o, len(lits)) for o in np.argsort(-score.ravel(), kind="stable")[:500]]
        return [(score[i, j], tuple(dict.fromkeys((lits[i], lits[j])))) for i, j in pairs
                if score[i, j] > 0]

    def score(self, literals):
        """The estimate of cor(program, code) on the pool, but for a factor that all share."""
        read, z, weight = self.natural()
        on, share = self.lang.true(Program(literals), read), self.where(literals).mean()
        if not on.any() or share == 1:
            return 0.0
        mean = np.average(z[on], weights=weight[on]) - np.average(z, weights=weight)
        return float(mean * np.sqrt(share / (1 - share)) * simple(literals))

    def distinct(self, ranked, against, n):
        """The first n programs that differ on the pool from each other and from those before."""
        out, masks = [], [self.where(a) for a in against]
        for _, literals in ranked:
            if len(out) == n:
                break
            mine = self.where(literals)
            if mine.any() and not any(alike(mine, mask) for mask in masks):
                out.append(literals), masks.append(mine)
        return out
