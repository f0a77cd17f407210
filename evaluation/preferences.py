"""Preferences: pairs of answers of which one was chosen, from a file or made with a known reason.

A file has a pair a line: {"prompt": "...", "chosen": "...", "rejected": "..."}, and perhaps
    attribute    a string: the reason of the choice, by which figures are then given, too
    group        a string: where the pair is from. Pairs with the same prompt, or of one group, are
                 never on both sides of a split
Made pairs are functions of Python's standard library, or of another --text of Python files. The
prompt is the line of the def, chosen the body as it stands, rejected the body with one change:
    documented   without its docstring
    commented    without its comments
    closed       without about half of the closing brackets
    indented     about half of the statements indented by a width that is no multiple of 4
    named        its own names shuffled over the places where any of them stands
'documented+closed' is a mixture, half of it of each. Both bodies are cut behind a statement, at
lengths that are drawn independently from the same range. So length tells little; most of 'closed',
where the longer answer is the chosen one in two thirds of the pairs. They come from the last two
thirds of the files in the order of the harvest; the default harvest ends before. A group is a file.
The same seed makes the same pairs.
"""
import ast, io, json, random, textwrap, tokenize
from types import SimpleNamespace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit

import runs
from sources.text import is_hub_dataset, text_files

FEWEST, FEWEST_PARTS = 50, 10           # pairs of a file; prompts or groups that they come from
HELD_OUT = 1 / 3                        # share of these whose pairs are held out,
LEAST = 10, 20                          # and how many pairs must then be there, and be left
FIELDS = "prompt", "chosen", "rejected"
LINES = 3, 100                          # of a function
SHORTEST, LONGEST = 40, 400             # characters of an answer that is made

# What a latent of an attribute would detect, as kind=class: of evaluation/roles.py, as evaluate.py
# --probes has it (blanks have no role), and of evaluation/programs.py (blanks are somewhere, too).
ROLES = {"documented": "kind=docstring", "commented": "(kind|lexical)=comment", "indented": "(?!)",
         "closed": r"lexical=operator|depth=(1|2\+)", "named": "lexical=identifier|role=.*"}
PLACES = {"documented": "inside=docstring", "commented": "inside=comment",
          "indented": "class=(indent|newline|blank)", "closed": r"depth=(1|2\+)|class=bracket",
          "named": "class=(word|middle of a word|underscore)"}

# --- pairs of a file ------------------------------------------------------------------------------

def read(path):
    """[pair]: line, prompt, chosen, rejected, attribute and group (None if not given). Fails with
    one line that names the line of the file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as err:
        runs.fail(f"{path}: {runs.first_line(err)}; name a .jsonl file of pairs, or have it made: "
                  "--make documented+closed")
    pairs = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            pairs.append(pair(line, n, lambda what: runs.fail(f"{path}, line {n}: {what}")))
    if len(pairs) < FEWEST:
        runs.fail(f"{path}, line {pairs[-1].line if pairs else 1}: ends with {len(pairs)} pairs, "
                  f"and at least {FEWEST} are needed; give more")
    return pairs

def pair(line, n, bad):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        bad(f"not JSON ({runs.first_line(err)}); mend it")
    if not isinstance(row, dict):
        bad('not an object {"prompt": "...", "chosen": "...", "rejected": "..."}')
    for name in (*FIELDS, "attribute", "group"):
        if name in FIELDS and name not in row:
            bad(f'has no "{name}"; a pair has "prompt", "chosen" and "rejected"')
        value = row.get(name)
        if not isinstance(value, str) and not (value is None and name not in FIELDS):
            bad(f'"{name}" is not a string')
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            bad(f'"{name}" holds half a character (a lone surrogate), which is no text; mend it')
    if row.get("attribute") in ("all", "(none)"):
        bad(f'"attribute" is "{row["attribute"]}", a row of the tables already; use another word')
    for name in FIELDS[1:]:
        if not row[name].strip():
            bad(f'"{name}" is empty; leave the pair out')
    if row["chosen"] == row["rejected"]:
        bad('"chosen" and "rejected" are the same; leave the pair out')
    return SimpleNamespace(line=n, attribute=row.get("attribute"), group=row.get("group"),
                           **{name: row[name] for name in FIELDS})

def split(path, pairs, seed):
    """(part [n]: numbers of groups of pairs that stay together, as they share a prompt or a group,
    also over others; held [n] bool: those of a third of the parts)."""
    names = {}
    number = lambda *key: names.setdefault(key, len(names))
    one = [number("prompt", p.prompt) for p in pairs]
    other = [i if p.group is None else number("group", p.group) for i, p in zip(one, pairs)]
    graph = coo_matrix((np.ones(len(pairs)), (one, other)), (len(names), len(names)))
    part = connected_components(graph, directed=False)[1][one]               # (n,)
    if (n := len(np.unique(part))) < FEWEST_PARTS:
        runs.fail(f"{path}: its pairs hang together in {n} parts by prompt and group, and no part "
                  f"may be both trained on and held out; at least {FEWEST_PARTS} are needed")
    held = np.zeros(len(pairs), bool)
    draw = GroupShuffleSplit(1, test_size=HELD_OUT, random_state=seed)
    held[next(draw.split(part, groups=part))[1]] = True
    if not LEAST[0] <= (n := held.sum()) <= len(pairs) - LEAST[1]:
        size = np.bincount(part)
        most = pairs[np.flatnonzero(part == size.argmax())[0]]
        runs.fail(f"{path}: {n} of {len(pairs)} pairs are held out, as {size.max()} hang together, "
                  f"that of line {most.line} (group {most.group}) among them; at least {LEAST[0]} "
                  f"must be, and {LEAST[1]} not: give smaller groups, or another --seed")
    return part, held

# --- pairs with a known reason --------------------------------------------------------------------

def checked(flag, names):
    """The attributes in 'documented+closed'."""
    names = names.split("+")
    if wrong := [name for name in names if name not in ATTRIBUTES]:
        runs.fail(f"{flag} {wrong[0] or '(empty)'}: unknown; use {', '.join(ATTRIBUTES)}, or "
                  "several joined by +")
    return list(dict.fromkeys(names))

def python_files(text):
    """The files of --text (None: the standard library) in the order of the harvest, if all are
    Python; else []."""
    files = [] if is_hub_dataset(text) else [p for p in text_files(text) if p.suffix != ".pyc"]
    return files if all(p.suffix == ".py" for p in files) else []

def make(flag, names, n, text=None, seed=0):
    """n pairs as dicts, as many of each of these attributes. Fails if the text gives fewer."""
    files = python_files(text)
    files, pairs, prompts = files[len(files) // 3:], [], set()
    left = {name: n // len(names) + (i < n % len(names)) for i, name in enumerate(names)}
    rng = random.Random(seed)
    rng.shuffle(files)
    with runs.Bar(total=n, desc="make pairs", unit="pair") as bar:
        for path, most in [(path, most) for most in (max(2, n // 50), n) for path in files]:
            of_file = 0                           # a few of each file; only if need be, all of it
            for code in rng.sample(found := list(functions(path)), len(found)):
                prompt = code.partition("\n")[0] + "\n"
                if of_file == most or prompt in prompts:
                    continue
                for name in sorted(left, key=left.get, reverse=True):
                    if left[name] and (both := answers(code, ATTRIBUTES[name], rng)):
                        prompts.add(prompt)
                        pairs.append(dict(prompt=prompt, chosen=both[0], rejected=both[1],
                                          attribute=name, group="/".join(path.parts[-3:])))
                        left[name], of_file = left[name] - 1, of_file + 1
                        bar.update()
                        break
            if not any(left.values()):
                break
    if len(pairs) < n:
        runs.fail(f"{flag} {'+'.join(names)}: the text of this run gives {len(pairs)} such pairs; "
                  "use fewer --pairs, another attribute, or a run on Python files")
    return pairs

def functions(path):
    """Yields the functions of a Python file whose def is one line, each moved to the margin."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and lines[node.lineno - 1].rstrip().endswith(":") and (
                LINES[0] <= node.end_lineno - node.lineno <= LINES[1]):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
            if code.startswith("def "):           # not where a string goes back to the margin
                yield code

def answers(code, change, rng):
    """(chosen, rejected) of a function, or None if it does not suit the change."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
        new = change(SimpleNamespace(tokens=tokens, lines=code.split("\n"),
                                     node=ast.parse(code).body[0]), rng)
    except (SyntaxError, tokenize.TokenError):
        return None
    if not new:
        return None
    rows = [[l + "\n" for l in code.split("\n")]]                     # of both, a list of lines
    rows.append([new.get(i, l[:-1]) for i, l in enumerate(rows[0], 1)])
    rows[1] = ["" if l is None else l + "\n" for l in rows[1]]
    ends = [t.end[0] for t in tokens if t.type == tokenize.NEWLINE and t.end[0] > 1]
    sizes = [np.cumsum([len(l) for l in version[1:]]) for version in rows]
    most, out = min(LONGEST, *(int(size[-1]) for size in sizes)), []
    for version, size in zip(rows, sizes):
        bound = most * rng.uniform(0.6, 1)
        fits = [row for row in ends if size[row - 2] <= bound]
        out.append(("".join(version[1:fits[-1]]), fits[-1]) if fits else ("", 0))
    (chosen, end), (rejected, other) = out
    good = min(len(chosen), len(rejected)) >= SHORTEST and min(new) <= min(end, other)
    return (chosen, rejected) if good and chosen != rejected else None

# A change takes a function, its lines, tokens and node, and gives {row: its new text, None: none}.

def edited(lines, places):
    """{row: its new text} where in [(row, from, to, new text), ...] stands something new."""
    out = {}
    for row, lo, hi, new in sorted(places, reverse=True):
        line = out.get(row, lines[row - 1])
        out[row] = line[:lo] + new + line[hi:]
    return out

def place(token, new=""):
    return token.start[0], token.start[1], token.end[1], new

def documented(f, rng):
    doc = f.node.body[0]
    if ast.get_docstring(f.node) and len(f.node.body) > 1 and doc.end_lineno - doc.lineno < 7:
        return dict.fromkeys(range(doc.lineno, doc.end_lineno + 1))

def commented(f, rng):
    new = edited(f.lines, [place(t) for t in f.tokens if t.type == tokenize.COMMENT])
    return {row: line.rstrip() or None for row, line in new.items()}

def closed(f, rng):
    ends = [t for t in f.tokens if t.type == tokenize.OP and t.string in ")]}" and t.start[0] > 1]
    found = [place(t) for t in ends if rng.random() < 0.5]
    return edited(f.lines, found) if len(found) > 1 else None

def indented(f, rng):
    blank = tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT
    solid, found = [t for t in f.tokens if t.type not in blank], []
    for before, t in zip(solid, solid[1:]):                   # t: the first token of a statement
        if before.type == tokenize.NEWLINE and t.string and rng.random() < 0.5:
            width = rng.choice([w for w in range(1, 13) if w % 4 and w != t.start[1]])
            found.append((t.start[0], 0, t.start[1], " " * width))
    return edited(f.lines, found) if len(found) > 1 else None

def named(f, rng):
    own = {n.id for n in ast.walk(f.node) if isinstance(n, ast.Name)
           and isinstance(n.ctx, ast.Store)} | {n.arg for n in ast.walk(f.node.args)
                                                if isinstance(n, ast.arg)}
    found = [t for before, t in zip(f.tokens, f.tokens[1:]) if t.type == tokenize.NAME
             and t.string in own and before.string != "." and t.start[0] > 1]
    names = [t.string for t in found]
    rng.shuffle(names)
    if len(names) > 4 and len(set(names)) > 2:
        return edited(f.lines, [place(t, new) for t, new in zip(found, names)])

ATTRIBUTES = {f.__name__: f for f in (documented, commented, closed, indented, named)}
