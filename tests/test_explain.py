"""applications/explain.py: planted programs found by the loop, the language by hand, scores against slow ones, a language
model on the loopback address with good and bad answers, bad input, and the page in a real browser."""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from applications import explain
from evaluation import evidence, experiments, llm, programs
from evaluation.programs import Literal, Program

# --- a toy language -------------------------------------------------------------------------------

class Toy:
    """Texts of the grammar in tokens by a regular expression, and latents that are programs."""
    def __init__(self, contexts=500, T=64, seed=0):
        rng, cut = np.random.default_rng(seed), re.compile(r"\n *| ?\w+| ?[^\w\s]|\s")
        text = "".join(experiments.grammar(rng) for _ in range(contexts * 2))
        words = cut.findall(text)[:contexts * T]
        assert len(words) == contexts * T
        more = cut.findall("".join([*experiments.MOVES.values(), *(experiments.grammar(rng) for _ in range(300))]))
        self.texts = sorted({*words, *more})
        self.number = {t: i for i, t in enumerate(self.texts)}
        self.language = programs.Language(self.texts)
        ids = np.array([self.number[w] for w in words]).reshape(contexts, T)
        held = contexts // 4
        parts = [experiments.tokens(self.language, None, ids, np.arange(lo * T, hi * T))
                 for lo, hi in ((held, contexts), (0, held))]
        unknown = self.number[" the"]
        self.lab = experiments.Lab(self.language, *parts,
                                   lambda text: [self.number.get(w, unknown) for w in cut.findall(text)])

    def latent(self, number, program):
        """A latent that is 5 where the program holds, give or take a little; in made-up texts, too."""
        noise = np.random.default_rng(number)
        z = [self.language.true(program, part.read) * (5 + noise.random(len(part.read.token)))
             for part in (self.lab.pool, self.lab.heldout)]
        def run(texts):
            end = 5.5 * self.language.true(program, self.lab.last(texts))
            return end, end
        return SimpleNamespace(number=number, z=z[0], heldout=z[1], rate=(z[0] > 0).mean(), run=run)

def planted(toy, n, seed=0):
    """n programs that fire on 0.2 to 20 % of the tokens, in ten contexts or more, one or two literals each."""
    rng, lang, read, out = np.random.default_rng(seed), toy.language, toy.lab.pool.read, []
    attributes = [l for l in programs.ATTRIBUTES if l.value not in ("blank", "newline")]
    def literal():
        kind = rng.choice(["token", "before", "two before", "attribute"])
        if kind == "attribute":
            return attributes[rng.integers(len(attributes))]
        return Literal(str(kind), lang.set_of(rng.choice(read.token, rng.integers(1, 4))))
    while len(out) < n:
        program = Program(tuple(literal() for _ in range(rng.integers(1, 3))))
        on = lang.true(program, read)
        parts = [lang.holds(l, read) for l in program.literals]
        wide = all(on.sum() < 0.7 * p.sum() for p in parts) if len(parts) > 1 else True
        if 0.002 < on.mean() < 0.2 and len(np.unique(toy.lab.pool.context[on])) >= 10 and wide:
            out.append(program)
    return out

def recovered(toy, program, latent):
    """Does a program hold where the latent fires, on held-out tokens?"""
    says = toy.language.true(program, toy.lab.heldout.read).astype(float)
    return explain.pearson(says, (latent.heldout > 0).astype(float)) >= 0.99

def shares(toy, all_of, rounds=4):
    """How many planted programs the loop finds, and how many the exemplars alone give."""
    found = [], []
    for i, program in enumerate(all_of):
        latent = toy.latent(i, program)
        e, active, _ = explain.explain(toy.lab, latent, explain.Search(), rounds, 0)
        for group, said in zip(found, (active, explain.passive(e))):
            group.append(recovered(toy, said, latent))
    return [float(np.mean(group)) for group in found]
