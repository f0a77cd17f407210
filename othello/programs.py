"""Programs over boards, and a laboratory of games: evaluation/programs.py and experiments.py for
Othello, so that applications/explain.py can be tried where the truth is known.

A literal says of the board after a move that a square is mine or yours (of the side to move next),
empty, or where that move was played; or it is the negation of that. A text is a game so far, a
tuple of moves; what is asked of it is asked of its last position. Edits of a text are games with
other last moves, new texts are of a library of random games: all of them are legal.
"""
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from evaluation.programs import Literal
from othello import game

KINDS = "mine", "yours", "empty", "played"
NAMES = [game.name(square) for square in range(64)]
TOP = 60                                            # literals that are tried in pairs

class Read(NamedTuple):
    """N positions as programs see them, uint64 [N] each; played: the one bit of the last move."""
    mine: np.ndarray
    yours: np.ndarray
    played: np.ndarray

    def take(self, rows):
        return Read(*(column[rows] for column in self))

def read_games(ids):
    """The Read of all positions of games int [n, T] (-1 after the end), one after another."""
    mine, yours, _ = game.replay(ids).reshape(-1, 3).T
    return Read(mine, yours, np.uint64(1) << (ids.reshape(-1) & 63).astype(np.uint64))

class Boards:
    """The language, with the methods of evaluation.programs.Language that the loop calls."""
    def holds(self, literal, read):
        bits = ~(read.mine | read.yours) if literal.kind == "empty" else getattr(read, literal.kind)
        on = bits >> np.uint64(NAMES.index(literal.value)) & np.uint64(1) > 0
        return on == literal.holds

    def true(self, program, read):
        return np.logical_and.reduce([self.holds(literal, read) for literal in program.literals])

    def predict(self, program, read):
        return self.true(program, read) * program.strength

    def fit(self, program, read, z, weight):
        on = self.true(program, read)
        return program._replace(strength=float(np.average(z[on], weights=weight[on]))
                                if on.any() else 1.0)

    def literals(self, read, z, level):
        """Of what holds at nine of ten firing positions or more, what most others lack."""
        strong, found = z >= level, []
        for kind in KINDS:
            for name in NAMES:
                on = self.holds(Literal(kind, name), read)
                share = on[strong].mean() if strong.any() else 0.5
                if share >= 0.9 or share <= 0.1:
                    found.append((share - on.mean(), Literal(kind, name, bool(share >= 0.9))))
        found.sort(key=lambda pair: -abs(pair[0]))
        return [literal for _, literal in found[:TOP]]

    def say(self, program):
        return " and ".join(f"{l.value} is {'' if l.holds else 'not '}{l.kind}"
                            for l in program.literals)

class Lab:
    """Games of random legal moves, half of them held out, with the methods of experiments.Lab."""
    def __init__(self, games=400, seed=0):
        ids = game.full_games(games, seed, 1).astype(int)
        self.library = game.full_games(games, seed, 2).astype(int)
        self.library_read = read_games(self.library)
        self.language, parts = Boards(), []
        for part in (ids[games // 2:], ids[:games // 2]):
            n, T = part.shape
            parts.append(SimpleNamespace(ids=part, read=read_games(part), x=None,
                                         context=np.repeat(np.arange(n), T),
                                         place=np.tile(np.arange(T), n)))
        self.pool, self.heldout = parts

    def real(self, row):
        ids = self.pool.ids[self.pool.context[row], :self.pool.place[row] + 1]
        return tuple(int(move) for move in ids)

    def edits(self, text, rng, program):
        """The same game with another last move, or other last two or four."""
        out, boards = [("as it is", text)], game.replay(np.array([text]))[0]     # (T, 3)
        for back in (1, 1, 2, 2, 4):
            if back < len(text):
                new, sides = list(text[:-back]), boards[-back - 1, :, None]
                while len(new) < len(text) and sides[2]:
                    new.append(int(rng.choice(np.flatnonzero(game.squares(sides[2])[0]))))
                    bit = np.uint64(1) << np.array([new[-1]], np.uint64)
                    sides = game.next_turn(*game.play(sides[0], sides[1], bit))
                if len(new) == len(text):
                    out.append((f"last {back} moves changed", tuple(new)))
        return out

    def write(self, program, n, rng):
        """At most n positions of other games in which the program holds."""
        rows = rng.permutation(np.flatnonzero(self.language.true(program, self.library_read)))[:n]
        return [tuple(self.library[row // game.MOVES, :row % game.MOVES + 1].tolist())
                for row in rows]

    def last(self, texts):
        """The Read of the last positions of texts."""
        ids = np.full((len(texts), max(map(len, texts))), -1)
        for i, text in enumerate(texts):
            ids[i, :len(text)] = text
        ends = np.arange(len(texts)) * ids.shape[1] + [len(text) - 1 for text in texts]
        return read_games(ids).take(ends)

    def show(self, text):
        return " ".join(NAMES[move] for move in text)
