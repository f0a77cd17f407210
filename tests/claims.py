"""docs/CLAIMS.md: a row for each claim of the papers, from what tests measure and from committed tables.

A test that holds a claim calls the fixture `claim` after its asserts, which make the verdict true:

    claim("gated", "what it says", "the paper's figure", "ours, {fvu:.2f}", "reproduced", fvu=values)

`fvu` is a number or several; those of all calls (seeds) become one range; tol=dict(fvu=.1) says how far it
may be from the page's, where the rule in `differs` does not fit. `pytest -m claims --claims=docs/CLAIMS.md`
writes the page, if every such test ran; any other session compares what it measured with the page.
`python tests/claims.py` writes it with the rows of tables alone made anew: extra() in tests/claims_of_tables.py.
"""
import ast
import math
import os
import platform
import re
from datetime import date
from pathlib import Path
from string import Formatter

import torch
from claims_of_tables import PAPERS, ROOT, Numbers, Row, cells, extra

PAGE = ROOT / "docs/CLAIMS.md"
COMMAND = "pytest -m claims --claims=docs/CLAIMS.md"
MARK = "<!-- Above: written by pytest --claims. Below: written by hand, and left as it is. -->"
COLUMNS = "paper", "claim", "the paper's figure", "ours", "shown by", "verdict"
NUMBER = r"[-+]?\d[\d.]*%?"

# --- what tests measured --------------------------------------------------------------------------

class Measured:
    """What the calls of one claim said, in one session."""
    def __init__(self, row):
        self.row, self.values, self.tol = row, {}, {}                  # row.ours is the template

    def ours(self):
        return self.row.ours.format(**self.values)

    def add(self, row, values, tol):
        """What one more call says, {name: [number]}."""
        assert self.row == row, f"{row.shown} says different things of one claim"
        self.tol.update(tol)
        for name, numbers in values.items():
            self.values.setdefault(name, Numbers()).extend(numbers)

MEASURED, RAN, VARIANTS = {}, {}, {}                # (test, claim) -> Measured; test -> node names; -> how many

def record(node, paper, claim, figure, ours, verdict, /, tol=(), **values):
    assert verdict in ("reproduced", "partly", "not"), verdict
    test = f"{node.path.name}::{node.originalname}"
    RAN.setdefault(test, set()).add(node.name)
    VARIANTS[test] = math.prod(len(mark.args[1]) for mark in node.iter_markers("parametrize"))
    row = Row(PAPERS[paper], claim, figure, ours, test, verdict)
    values = {name: [*map(float, v)] if hasattr(v, "__iter__") else [float(v)] for name, v in values.items()}
    MEASURED.setdefault((test, claim), Measured(row)).add(row, values, dict(tol))

def dump():
    """What this process measured, in lists and dicts alone (JSON), for the process that started it: with several
    workers (pytest -n) each measures a part, and the first process merges them all."""
    calls = [(list(m.row), {name: list(v) for name, v in m.values.items()}, dict(m.tol)) for m in MEASURED.values()]
    return dict(calls=calls, ran={test: sorted(names) for test, names in RAN.items()}, variants=dict(VARIANTS))

def merge(dumped):
    """Add what another process measured, as its dump() gave it."""
    for row, values, tol in dumped["calls"]:
        row = Row(*row)
        MEASURED.setdefault((row.shown, row.claim), Measured(row)).add(row, values, tol)
    for test, names in dumped["ran"].items():
        RAN.setdefault(test, set()).update(names)
    VARIANTS.update(dumped["variants"])

def complete(test):
    return len(RAN.get(test, ())) == VARIANTS.get(test)

def calls():
    """[Row] of all calls of claim() in tests/, read from the sources; ours is the template."""
    rows = []
    for path in sorted(ROOT.glob("tests/test_*.py")):
        for test in ast.parse(path.read_text()).body:
            for call in ast.walk(test) if isinstance(test, ast.FunctionDef) else ():
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "claim":
                    paper, claim, figure, ours, verdict = map(ast.literal_eval, call.args)
                    rows.append(Row(PAPERS[paper], claim, figure, ours, f"{path.name}::{test.name}", verdict))
    return rows

# --- the page -------------------------------------------------------------------------------------

def ranges(template, text):
    """{field: (lo, hi, tolerance)} of a cell written from the template; None if it was not."""
    pattern, names = "", []
    for literal, name, spec, _ in Formatter().parse(template):
        pattern += re.escape(literal)
        if name:
            names.append(name)
            pattern += f"({NUMBER})(?: to ({NUMBER}))?"
    found = re.fullmatch(pattern, text)
    if not found:
        return None
    result = {}
    for name, lo, hi in zip(names, found.groups()[::2], found.groups()[1::2]):
        value = lambda s: float(s.rstrip("%")) / (100 if s.endswith("%") else 1)
        digits = len(lo.rstrip("%").partition(".")[2]) + 2 * lo.endswith("%")
        result[name] = value(lo), value(hi or lo), min(0.05, 5 * 10.0 ** -digits)
    return result

def differs(measured, row):
    """Why what was measured does not fit the page's row; '' if it does. Both ends of a range may move
    by 20 % of their distance from 0 or 1, the nearer one, or by .05 (less where more than two digits are
    shown), whichever is larger; where some seeds did not run, the others must lie within."""
    for name in ("paper", "figure", "verdict"):
        if getattr(measured.row, name) != getattr(row, name):
            return f"{name} is '{getattr(measured.row, name)}'"
    page = ranges(measured.row.ours, row.ours)
    if page is None or len(page) < len(measured.values):
        return f"ours reads '{measured.row.ours}'"
    for name, values in measured.values.items():
        lo, hi, least = page[name]
        margin = lambda bound: measured.tol.get(name, max(least, 0.2 * min(abs(bound), abs(1 - bound))))
        inside = lo - margin(lo) <= min(values) and max(values) <= hi + margin(hi)
        ends = min(values) <= lo + margin(lo) and max(values) >= hi - margin(hi)
        if not inside or complete(row.shown) and not ends:
            return f"{name} is {min(values):.4g} to {max(values):.4g}"
    return ""

def shown(test):
    return f"`tests/{test}`"

def page_rows(path=PAGE):
    """{(shown by, claim): Row} of the generated part; of a test without `tests/` and quotes."""
    if not path.exists():
        return {}
    lines = path.read_text().partition(MARK)[0].splitlines()
    rows = [Row(*cells(line)) for line in lines if line.startswith("|")][2:]
    rows = [row._replace(shown=re.sub(r"^`tests/(\S+)`$", r"\1", row.shown)) for row in rows]
    return {(row.shown, row.claim): row for row in rows}

def compare():
    """Lines, one for each claim of this session that does not fit the page."""
    page, wrong = page_rows(), []
    for key, measured in MEASURED.items():
        why = differs(measured, page[key]) if key in page else "it has no row"
        if why:
            wrong.append(f"docs/CLAIMS.md is not what {key[0]} says of '{key[1]}': {why}; run {COMMAND}")
    return wrong

def machine():
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return (f"{name[1].strip() if name else platform.processor()}, {os.cpu_count()} cores, torch "
            f"{torch.__version__}, Python {platform.python_version()}, {date.today()}")

def page_text(rows, written, by_hand):
    rows = sorted(rows, key=lambda row: list(PAPERS.values()).index(row.paper))
    verdicts = [row.verdict for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    assert all(line.count("|") == 7 for line in lines), "a cell has a |"
    count = ", ".join(f"{verdicts.count(v)} {v}" for v in ("reproduced", "partly", "not"))
    return f"""# Claims of the papers, and what we found

{len(rows)} claims: {count}. The papers speak mostly of large language models; ours are toys whose
true features are known, smollm2 (SmolLM2-135M, layer 6, 2M tokens), or a small GPT that plays Othello (layer 6, 4M
tokens), as the last column but one says. The verdict is of the claim as it stands here. Papers' figures are as their
texts, code or project pages have them; 'secondary', 'by eye' and 'unverified' say where we have less. Where a paper's text
was not at hand, the first cell of the row says what was read instead. Ranges of tests are over seeds that no setting was
chosen on; their docstrings have margins and controls, and what was changed after a first look.

Written by {written}.
Numbers of benchmarks are read from their tables (`python tests/claims.py` reads them again). Every `pytest` compares
what it measures with this page: words exactly; numbers to 20 % of their distance from 0 or 1, or to .05 (less where
more than two digits are shown), whichever is larger; to more where a test says so.

| {' | '.join(COLUMNS)} |
|{'---|' * len(COLUMNS)}
""" + "\n".join(lines) + f"\n\n{MARK}{by_hand}", f"{len(rows)} claims ({count})"

def replace(path, text):
    draft = Path(f"{path}.tmp")
    draft.write_text(text)
    os.replace(draft, path)

def write(path, command, failed):
    """Write the page, if all claims were measured and nothing failed. -> (was it written, a line)"""
    missing = sorted({row.shown for row in calls() if not complete(row.shown)})
    if missing or failed:
        return False, f"{path} is left as it was: {failed} failed; not run in full: {', '.join(missing) or 'none'}"
    assert {(row.shown, row.claim) for row in calls()} == set(MEASURED)
    rows = [m.row._replace(ours=m.ours(), shown=shown(test)) for (test, _), m in MEASURED.items()]
    by_hand = Path(path).read_text().partition(MARK)[2] if Path(path).exists() else "\n"
    text, count = page_text(rows + extra(), f"`{command}` ({machine()})", by_hand)
    replace(path, text)
    return True, f"{path}: {count}"

def refresh():
    """Write the page with the rows of tables read again, those of tests as they stand there."""
    old = PAGE.read_text()
    rows = [row._replace(shown=shown(row.shown)) for row in page_rows().values() if "::" in row.shown]
    text, count = page_text(rows + extra(), re.search(r"^Written by (.*)\.$", old, re.M)[1], old.partition(MARK)[2])
    replace(PAGE, text)
    print(f"{PAGE.relative_to(ROOT)}: {count}")

if __name__ == "__main__":
    refresh()
