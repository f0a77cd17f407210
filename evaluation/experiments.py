"""Texts to test programs on (evaluation/programs.py), and what latents do on them: a laboratory.

    read      real tokens of training contexts, the pool, and held-out ones, from the harvest
    edits     a real text that ends with a firing token, changed: its last token, the one before it
              or two before it another one; its line behind a # or an open quote, or in a call; the
              lines before it gone
    write     a text in which a program holds at the end, from a small grammar of Python: functions
              with names of their own, cut anywhere, with the tokens that the program asks for
    run       the model on such texts: a latent's code at the end, and its largest one

A text is (ids, the triple quotes that it begins in, or ''); what is asked of it is asked of its
last token. Made-up texts have at most WINDOW tokens; as in a harvest nothing is said of position 0
and of tokens whose norm is above the cut: there the code counts as 0. All draws are those of a
generator that is given.
"""
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import runs
from evaluation import concepts
from evaluation.programs import REGIONS, SETS, TRIPLE, Language, begins_inside
from sources import lm
from sources.text import Contexts

POOL, HELD_OUT = 2 ** 17, 2 ** 16       # tokens of training contexts, and held-out ones, at most
WINDOW = 32                             # tokens of a text that is run
LIBRARY = 200                           # texts of the grammar
DOCSTRING = 1 << REGIONS.index("docstring")
MOVES = {"in a comment": " #", "in a string": ' x = "', "in a call": " print("}

# --- a grammar of Python --------------------------------------------------------------------------

NOUNS = """name value key item data path line text count index size node result state total file
start end mode flag words table parent buffer message error level width color""".split()
VERBS = "get set read write make find parse load add check send build update remove open".split()

def grammar(rng):
    """A function of random names, as text: signature, docstring, comments, calls, strings."""
    pick = lambda *from_: str(rng.choice(from_))
    noun = lambda: pick(*NOUNS)
    name = lambda: pick(noun(), f"{noun()}_{noun()}", f"self.{noun()}", noun().capitalize())
    phrase = lambda: f"{pick(*VERBS)} the {noun()} {pick('of', 'in', 'for', 'and')} the {noun()}"
    def value(deep=0):
        kinds = [name, lambda: str(rng.integers(1000)), lambda: repr(phrase()),
                 lambda: pick("None", "True", "False"), lambda: f'"{noun()}"']
        if deep < 2:
            inner = lambda: ", ".join(value(deep + 1) for _ in range(rng.integers(1, 4)))
            kinds += [lambda: f"{pick(*VERBS)}_{noun()}({inner()})", lambda: f"[{inner()}]",
                      lambda: f"{{{noun()!r}: {value(deep + 1)}}}",
                      lambda: f"{name()}.{pick(*VERBS)}({inner()})",
                      lambda: f"{value(2)} {pick('+', '-', '*', '==', 'and', 'in')} {value(2)}"]
        return kinds[rng.integers(len(kinds))]()
    def statement(pad):
        body = lambda: statement(pad + "    ")
        kinds = [lambda: f"{name()} = {value()}", lambda: f"# {phrase()}", lambda: f"{value(1)}",
                 lambda: f"return {value()}", lambda: f"{name()} += {value(1)}  # {phrase()}",
                 lambda: f"for {noun()} in {value(1)}:\n{body()}", lambda: f"raise ValueError("
                 f"{phrase()!r})", lambda: f"import {noun()}", lambda: f"{name()}({value(1)})",
                 lambda: f"if {value(1)}:\n{body()}", lambda: f"with open({name()}) as {noun()}:\n"
                 f"{body()}"]
        return pad + kinds[rng.integers(len(kinds))]()
    parameters = ", ".join(["self"] * (rng.random() < 0.5) + [
        noun() + pick("", "=None", f"={rng.integers(10)}") for _ in range(rng.integers(1, 4))])
    lines = [f"class {noun().capitalize()}:"] * (rng.random() < 0.2)
    pad = "    " * len(lines)
    lines.append(f"{pad}def {pick(*VERBS)}_{noun()}({parameters}):")
    if rng.random() < 0.6:
        lines.append(f'{pad}    """{phrase().capitalize()}.\n\n{pad}    {phrase()}.\n{pad}    """')
    return "\n".join([*lines, *(statement(pad + "    ") for _ in range(rng.integers(1, 5))), ""])

# --- the laboratory -------------------------------------------------------------------------------

def tokens(language, x, ids, where):
    """Harvested tokens: x [N, D], their context and place [N], the read of them, and ids [n, T]
    of all contexts."""
    context, place = where // ids.shape[1], where % ids.shape[1]
    used, at = np.unique(context, return_inverse=True)
    read = language.read(ids[used]).take(at * ids.shape[1] + place)
    return SimpleNamespace(x=x, ids=ids, context=context, place=place, read=read)

class Lab:
    """A language, pool and held-out tokens as tokens() gives them, and what makes texts of them;
    encode(text) -> ids, begin: ids that contexts begin with. run(sae, latent, texts) -> (code at
    the end, largest code) of each text, float arrays."""
    def __init__(self, language, pool, heldout, encode, begin=(), run=None, seed=0):
        self.language, self.pool, self.heldout, self.run = language, pool, heldout, run
        self.begin, self.encode, V = list(begin), encode, len(language.texts)
        self.frequency = np.bincount(pool.read.token, minlength=V) / len(pool.read.token)
        rng = np.random.default_rng((seed, 1))
        self.library = [encode(grammar(rng)) for _ in range(LIBRARY)]
        self.library_read = language.read(self.library, [""] * LIBRARY)
        lengths = np.array(list(map(len, self.library)))
        self.library_text = np.repeat(np.arange(LIBRARY), lengths)
        self.library_at = np.concatenate(list(map(np.arange, lengths)))
        self.moves = {name: list(encode(text)) for name, text in MOVES.items()}
        self.newline = language.tables["newline"]

    def real(self, row):
        """The text that ends with this token of the pool."""
        ids, end = self.pool.ids[self.pool.context[row]].tolist(), self.pool.place[row] + 1
        begin = begins_inside("".join(self.language.texts[i] for i in ids))   # as the pool's read
        return self.cut(ids[:end], begin, max(0, end - WINDOW))

    def cut(self, ids, begin, at):
        """What is left of a text from token `at` on; where both sides of the cut are inside triple
        quotes, it begins in these."""
        if at:
            inside = self.language.read([ids], [begin]).inside[at - 1:at + 1] & DOCSTRING
            open_ = TRIPLE.findall("".join(self.language.texts[i] for i in ids[:at])) or [begin]
            begin = open_[-1] if inside.all() else ""
        return list(ids[at:]), begin

    def marked(self, row, z):
        """The text around a token of the pool, with the codes z [N] that are not 0 in [[ ]]."""
        pool, at = self.pool, self.pool.place[row]
        mine = np.flatnonzero(pool.context == pool.context[row])
        code = {p: f"[[{v:.2g}]]" for p, v in zip(pool.place[mine], z[mine]) if v > 0}
        ids = pool.ids[pool.context[row]]
        return "".join(self.language.texts[ids[p]] + code.get(p, "")
                       for p in range(max(0, at - 20), min(len(ids), at + 12)))

    def some_token(self, rng, table=None):
        """A token as often as the pool has it, among those of a table [V + 1] if there is one."""
        p = self.frequency if table is None else self.frequency * table[:-1]
        if not p.sum():
            return int(rng.choice(np.flatnonzero(table[:-1])))
        return int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"))

    def edits(self, text, rng, program):
        """[(what was done, text)] of changes of a text; also to tokens that the program names."""
        (ids, begin), out = text, [("as it is", text)]
        named = [self.language.table(l) for l in program.literals if l.kind in ("token", "class")]
        for back, name in enumerate(("token", "token before", "token two before")):
            for table in [None, *named] if not back else [None]:
                if len(ids) > back + 1:
                    new, place = list(ids), len(ids) - 1 - back
                    new[place] = self.some_token(rng, table)
                    out.append((f"{name} changed", (tuple(new), begin)))
        line = max((i for i in range(len(ids) - 1) if self.newline[ids[i]]), default=-1)
        for name, more in self.moves.items():
            out.append((name, ((*ids[:line + 1], *more, *ids[line + 1:]), begin)))
        if 0 < line < len(ids) - 2:
            out.append(("its line alone", self.cut(ids, begin, line)))
        return [(name, self.whole(*new)) for name, new in out]

    def whole(self, ids, begin):
        """A text that begins as contexts do, and is not too long."""
        ids, begin = self.cut(ids, begin, max(0, len(ids) - WINDOW))
        return ids if ids[:len(self.begin)] == self.begin else self.begin + ids, begin

    def write(self, program, n, rng):
        """At most n texts of the grammar in which the program holds at the end."""
        lang, read, made = self.language, self.library_read, []
        wanted = {l.kind: lang.members(l.value) for l in program.literals
                  if l.kind in SETS and l.holds}
        for l in program.literals:
            if l.kind == "class" or l.kind == "token" and not l.holds:
                wanted["token"] = lang.table(l) & wanted.get("token", True)
        where = np.logical_and.reduce([lang.holds(l, read) for l in program.literals if l.kind in (
            "inside", "place", "depth")] or [np.ones(len(read.token), bool)])
        rows = np.flatnonzero(where & (self.library_at >= 4))
        if not len(rows) or not all(table.any() for table in wanted.values()):
            return []
        for _ in range(8):
            texts = []
            for row in rng.choice(rows, 2 * n):
                at = self.library_at[row]
                ids = self.library[self.library_text[row]][:at + 1]
                for back, kind in enumerate(SETS):
                    if kind in wanted or kind == "token":
                        ids[at - back] = self.some_token(rng, wanted.get(kind))
                texts.append(self.whole(ids, ""))
            good = lang.true(program, self.last(texts))
            made += [text for text, yes in zip(texts, good) if yes]
            if len(made) >= n:
                break
        return made[:n]

    def last(self, texts):
        """The read of the last tokens of texts."""
        ends = np.cumsum([len(ids) for ids, _ in texts]) - 1
        return self.language.read([ids for ids, _ in texts], [b for _, b in texts]).take(ends)

    def show(self, text):
        return "".join(self.language.texts[i] for i in text[0])

# --- of a language model --------------------------------------------------------------------------

def open_lab(source, model, tokenizer, block):
    """The laboratory of a harvest, whatever the run on it."""
    form = Contexts(tokenizer, 2)
    if form.letters:
        runs.fail("--model: a protein model, of whose text these programs say nothing; give a run "
                  "on a model of text")
    texts = concepts.token_texts(tokenizer, model.get_output_embeddings().out_features)
    language = Language(texts)
    pool, heldout = (tokens(language, *part) for part in concepts.harvested(source, POOL, HELD_OUT))
    return Lab(language, pool, heldout,
               lambda text: tokenizer(text, add_special_tokens=False).input_ids, form.bos,
               partial(run, model, block, source.meta["norm_cut"]))

@torch.inference_mode()
def run(model, block, cut, sae, latent, texts):
    """(code at the end, largest code) of each text, float arrays."""
    end, peak = np.zeros((2, len(texts)))
    for i in range(0, len(texts), 64):
        part = [ids for ids, _ in texts[i:i + 64]]
        T = max(map(len, part))
        ids = np.array([[*row, *[row[-1]] * (T - len(row))] for row in part])
        x = lm.residual_stream(model, block, ids)                            # (n, T, D)
        keep = ~(x.norm(dim=-1) > cut)
        keep[:, 0] = False
        keep &= torch.tensor([[t < len(row) for t in range(T)] for row in part], device=x.device)
        z = torch.zeros(keep.shape, device=x.device)
        if keep.any():
            z[keep] = sae.encode(x[keep])[:, latent]
        end[i:i + 64] = z[torch.arange(len(part)), [len(row) - 1 for row in part]].cpu()
        peak[i:i + 64] = z.amax(1).cpu()
    return end, peak
