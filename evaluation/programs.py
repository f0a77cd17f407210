"""Programs that say on which tokens of a text something happens: the explanations of explain.py.

A literal is one of these, or its negation; a program is one literal, or two that both must hold:
    token, before, two before    the token, the one before it, the one before that: one of a set
    class                        of the token's text, CLASSES
    inside                       comment, docstring, string, signature (brackets behind def NAME or
                                 class NAME), call (brackets behind another name or bracket)
    place                        tokens before it in its line, blank ones not counted: 0, 1, 2, 3+
    depth                        open brackets around it: 0, 1, 2+
and its strength: what it predicts where it holds, one number or, of a set of tokens, one for each.

Where a token stands is read off the text by a small scanner, since a context begins and ends
anywhere, where tokenize and ast need a whole file. Delimiters are inside what they delimit; a token
of several characters is where the last one that is not blank is. Whether a context begins inside
triple quotes is guessed from the first ones in it: those that close. What has none is code.

The forms of a program: `say` for people; `to_json` and `from_json`, which takes what anybody may
have written and raises ValueError for what is not in the language.
"""
import keyword, re
from typing import NamedTuple

import numpy as np

from evaluation.concepts import BUILT_IN

CLASSES = dict(BUILT_IN) | {
    "leading space": r"^ \S", "punctuation": r"^\s*[^\w\s]+\s*$", "word": r"^\s*[A-Za-z]{2,}$",
    "middle of a word": r"^[a-z]", "blank": r"^\s*$"}
REGIONS = "comment", "docstring", "string", "signature", "call"
LEVELS = dict(place=("0", "1", "2", "3+"), depth=("0", "1", "2+"))
SETS = {"token": "token", "before": "before", "two before": "before2"}     # and their columns
MOST = 32                                           # texts in a set
STRING_PREFIX = {"r", "b", "f", "u", "rb", "br", "rf", "fr"}
TRIPLE = re.compile(r"\"\"\"|'''")

# --- the language ---------------------------------------------------------------------------------

class Literal(NamedTuple):
    kind: str
    value: tuple | str                              # texts of a set, sorted; or a name
    holds: bool = True                              # False: negated

class Program(NamedTuple):
    literals: tuple                                 # one Literal or two
    strength: float | dict = 1.0                    # or {text of the token: strength}

class Read(NamedTuple):
    """N tokens as programs see them, int arrays [N]; tokens before the first one are number V."""
    token: np.ndarray
    before: np.ndarray
    before2: np.ndarray
    inside: np.ndarray                              # bits, in the order of REGIONS
    place: np.ndarray
    depth: np.ndarray

    def take(self, rows):
        return Read(*(column[rows] for column in self))

def join(reads):
    return type(reads[0])(*map(np.concatenate, zip(*reads)))

class Language:
    """The programs over tokens whose texts are [V] strings."""
    def __init__(self, texts):
        self.texts, self.tables, self.ids = texts, {}, {}
        for i, text in enumerate(texts):
            self.ids.setdefault(text, []).append(i)
        self.first = np.array([*(self.ids[t][0] for t in texts), len(texts)])    # of equal texts
        for name, pattern in CLASSES.items():
            found = re.compile(pattern)
            self.tables[name] = np.array([*(bool(found.search(t)) for t in texts), False])

    def read(self, contexts, inside=None):
        """Of all tokens of contexts, lists of ids, one after another; inside: for each context, the
        triple quotes that it begins in, or ''; None: guessed."""
        V, columns = len(self.texts), []
        for i, ids in enumerate(contexts):
            ids = [int(t) for t in ids]
            texts = [self.texts[t] for t in ids]
            begin = begins_inside("".join(texts)) if inside is None else inside[i]
            columns.append(np.array([ids, [V, *ids][:len(ids)], [V, V, *ids][:len(ids)],
                                     *scan(texts, begin)]))
        return Read(*np.concatenate(columns, 1)) if columns else Read(*np.zeros((6, 0), int))

    def members(self, value):
        """bool [V + 1]: which tokens have one of these texts."""
        table = np.zeros(len(self.texts) + 1, bool)
        table[[i for text in value for i in self.ids.get(text, [])]] = True
        return table

    def table(self, literal):
        """bool [V + 1]: the tokens of which a literal of the kind token or class holds."""
        found = self.members(literal.value) if literal.kind == "token" else self.tables[
            literal.value]
        return found == literal.holds

    def holds(self, literal, read):
        """bool [N]"""
        kind, value, positive = literal
        if kind in SETS:
            found = self.members(value)[getattr(read, SETS[kind])]
        elif kind == "class":
            found = self.tables[value][read.token]
        elif kind == "inside":
            found = read.inside >> REGIONS.index(value) & 1 > 0
        else:
            levels = LEVELS[kind]
            found = np.minimum(getattr(read, kind), len(levels) - 1) == levels.index(value)
        return found if positive else ~found

    def true(self, program, read):
        """Where the program holds, bool [N]."""
        return np.logical_and.reduce([self.holds(literal, read) for literal in program.literals])

    def predict(self, program, read):
        """float [N]"""
        strength = program.strength
        if isinstance(strength, dict):
            table = np.full(len(self.texts) + 1, np.mean(list(strength.values())))
            for text, value in strength.items():
                table[self.ids.get(text, [])] = value
            strength = table[read.token]
        return self.true(program, read) * strength

    def fit(self, program, read, z, weight):
        """The program with the strengths that codes z [N] of weights [N] say; those of single
        tokens are drawn to their mean as if by two more tokens of it."""
        on = self.true(program, read)
        if not (weight * on).sum():
            return program._replace(strength=1.0)
        mean = float(np.average(z[on], weights=weight[on]))
        sets = [l.value for l in program.literals if l.kind == "token" and l.holds]
        if not sets or len(sets[0]) < 2:
            return program._replace(strength=mean)
        strength = {}
        for text in sets[0]:
            mine = on & self.members((text,))[read.token]
            own = np.average(z[mine], weights=weight[mine]) if (weight * mine).sum() else mean
            strength[text] = float((own * mine.sum() + 2 * mean) / (mine.sum() + 2))
        return program._replace(strength=strength)

    def literals(self, read, z, level):
        """Literals worth a thought for codes z [N] on tokens that have been read, the firing ones
        those of at least `level`: sets of what stands there, what half of them have in common, and
        the negation of what hardly any has."""
        strong, found = z >= level, []
        for kind, column in SETS.items():
            ids = self.first[getattr(read, column)]                          # (N,)
            here, count = np.unique(ids[strong & (ids < len(self.texts))], return_counts=True)
            here = here[np.argsort(-count, kind="stable")]
            mean = {i: z[ids == i].mean() for i in here}
            for chosen in (here, [i for i in here if mean[i] >= level / 2],
                           [i for i in here if mean[i] >= level], *([i] for i in here[:6])):
                if len(chosen):
                    found.append(Literal(kind, self.set_of(chosen)))
            for i in here[:3]:                                # of any case, with a space or without
                alike = [t for form in (str.lower, str.capitalize, str.upper, str)
                         for t in (form(self.texts[i].strip()), " " + form(self.texts[i].strip()))]
                found.append(Literal(kind, tuple(sorted({t for t in alike if t in self.ids}
                                                        | {self.texts[i]}))))
        for literal in ATTRIBUTES:
            share = self.holds(literal, read)[strong].mean() if strong.any() else 0.3
            if share >= 0.5 or share <= 0.2:
                found.append(literal._replace(holds=bool(share >= 0.5)))
        return list(dict.fromkeys(found))

    def set_of(self, ids):
        return tuple(sorted({self.texts[i] for i in ids[:MOST]}))

    # --- its forms --------------------------------------------------------------------------------

    def say(self, program):
        return " and ".join(map(say, program.literals))

    def from_json(self, value):
        """The program in {"all": [{"kind": ..., "value": ..., "not": true or false}, one more]}."""
        rows = value.get("all") if isinstance(value, dict) else None
        if not isinstance(rows, list) or not 1 <= len(rows) <= 2:
            raise ValueError('a program is {"all": [one or two literals]}')
        return Program(tuple(self.literal(row) for row in rows))

    def literal(self, row):
        kind, value = (row.get("kind"), row.get("value")) if isinstance(row, dict) else (None, None)
        if isinstance(kind, str) and kind in SETS:
            if isinstance(value, str):
                value = [value]
            if not isinstance(value, list) or not all(isinstance(t, str) for t in value):
                raise ValueError(f"the value of {kind} is a list of texts")
            value = tuple(sorted({t for t in value if t in self.ids}))[:MOST]
            good = len(value) > 0
        else:
            good = isinstance(kind, str) and isinstance(value, str) and value in NAMES.get(kind, ())
        if not good:
            raise ValueError(f"{str(kind)[:40]} {str(value)[:80]}: not in the language")
        return Literal(kind, value, row.get("not") is not True)

def to_json(program):
    rows = [dict(kind=l.kind, value=list(l.value) if isinstance(l.value, tuple) else l.value,
                 **({} if l.holds else {"not": True})) for l in program.literals]
    return dict(all=rows, strength=program.strength)

def say(literal):
    kind, value, positive = literal
    if isinstance(value, tuple):
        names = ", ".join(map(repr, value[:8])) + f", {len(value) - 8} more" * (len(value) > 8)
        return f"{kind} {'in' if positive else 'not in'} {{{names}}}"
    if kind == "class":
        return f"{'' if positive else 'not '}{value}"
    return f"{'' if positive else 'not '}{kind} {value}"

NAMES = {"class": tuple(CLASSES), "inside": REGIONS, **LEVELS}
ATTRIBUTES = [Literal(kind, value) for kind, values in NAMES.items() for value in values]

# --- where a token stands -------------------------------------------------------------------------

def begins_inside(text):
    """The triple quotes that a context seems to begin in, or ''."""
    if not (found := TRIPLE.search(text)):
        return ""
    line = text[:found.start()].rpartition("\n")[2].strip()
    after = text[found.end():found.end() + 1]
    if line:
        opens = line[-1] in "=(,[{:+%" or line.lower() in STRING_PREFIX or line.endswith("return")
    elif after and not after.isspace():
        opens = True
    else:
        above = text[:found.start()].rstrip()
        opens = not above or above.endswith(":")
    return "" if opens else found[0]

PIECE = re.compile(r"""
    (?P<comment> \#[^\n]* )
  | (?P<string> (?<!\w) (?:rb|br|rf|fr|[rbfu])? (?:
        \"{3} (?:\\.|[^\\])*? (?:\"{3}|\\?\Z) | '{3} (?:\\.|[^\\])*? (?:'{3}|\\?\Z)
      | \" (?:\\.|[^"\\\n])* \"? | ' (?:\\.|[^'\\\n])* '? ) )
  | (?P<name> \w+ )
  | (?P<bracket> [()\[\]{}] )""", re.X | re.S | re.I)

def regions(text, begin=""):
    """Of each character of a text: its region bits and how many brackets are open, int arrays."""
    bits, depth = np.zeros((2, len(text) + 1), int)
    at = 0
    if begin:
        end = text.find(begin)
        at = len(text) if end < 0 else end + 3
        bits[:at] = 2
    stack, drawn, names, last, brackets = [], at, ("", ""), at, 0

    def draw(to):
        bits[drawn:to] |= brackets
        depth[drawn:to] = len(stack)
    for piece in PIECE.finditer(text, at):
        kind, lo, hi = piece.lastgroup, *piece.span()
        if kind == "name":
            names = names[1], piece[0]
        elif kind == "bracket":
            opens = piece[0] in "([{"
            draw(lo + (not opens))
            drawn = lo + (not opens)
            if opens:
                between = text[last:lo]             # a new line is a new statement, but in brackets
                touches = lo > 0 and not between.strip() and (stack or "\n" not in between)
                stack.append(bracket(piece[0], names, text[last - 1:last] if touches else ""))
            elif stack:
                stack.pop()
            brackets = 8 * ("signature" in stack) | 16 * ("call" in stack)
        elif kind == "comment":
            bits[lo:hi] |= 1
        else:
            line = text[text.rfind("\n", 0, lo) + 1:lo]
            doc = piece[0].lstrip("rbfuRBFU").startswith(('"""', "'''"))
            bits[lo:hi] |= 2 if doc and not stack and not line.strip() else 4
        last = hi
    draw(len(text) + 1)
    return bits, depth

def bracket(c, names, before):
    """What an opening bracket opens, behind these names and this character ('': something else)."""
    if c != "(" or not before:
        return "bracket"
    of_name = ("x" + before).isidentifier()             # a name may end in a digit
    if names[0] in ("def", "class") and of_name:
        return "signature"
    called = before in (")", "]") or (
        of_name and not keyword.iskeyword(names[1]) and not names[1].isdigit())
    return "call" if called else "bracket"

def scan(texts, begin=""):
    """(inside, place, depth) of the tokens with these texts, lists of ints; begin: as `inside` of
    Language.read."""
    bits, depth = regions("".join(texts), begin)
    at, before, out = 0, 0, []
    for text in texts:
        last, line = len(text.rstrip()) - 1, text.rfind("\n")
        here = at + (last if last >= 0 else max(0, len(text) - 1))
        new = 0 <= line < last                      # its last word begins a line
        out.append((bits[here], 0 if new else before, depth[here]))
        before = (0 if line >= 0 else before) + (line < last)
        at += len(text)
    return [list(column) for column in zip(*out)] or [[], [], []]
