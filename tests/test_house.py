"""The house: which way imports go, shared spans, sizes of files and texts, and commands that stand in them."""
import ast
import difflib
import importlib
import re
import shlex
import subprocess
import sys

import pytest

import claims
import shared
from conftest import ROOT, run_script

SCRIPTS = shared.SCRIPTS
OURS = sorted(p for p in ROOT.rglob("*.py") if "tests" not in p.parts and ".venv" not in p.parts
              and not {"build", "runs"} & set(p.relative_to(ROOT).parts))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("othello/*.md")])

# --- imports --------------------------------------------------------------------------------------

def module(path):
    """'sources.lm' for sources/lm.py; what stands in benchmarks/ is imported by its bare name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "benchmarks" else parts).removesuffix(".__init__")

MODULES = {module(path): path for path in OURS}

def imported(node):
    """The modules of ours that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return {name if name in MODULES else node.module for name in names} & MODULES.keys()
    return {alias.name for alias in node.names} & MODULES.keys()

def imports(text):
    """Of a file: the modules of ours that it imports, and those that a function imports."""
    def find(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                found.update(imported(child))
                hidden.update(imported(child) if inside else ())
            find(child, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))
    found, hidden = set(), set()
    find(ast.parse(text), False)
    return found, hidden

def circle(graph):
    """Modules of which each imports the next, and the last the first; [] if there are none."""
    done = set()
    def walk(name, path):
        if name in path:
            return [*path[path.index(name):], name]
        if name in done:
            return []
        found = next(filter(None, (walk(other, [*path, name]) for other in sorted(graph[name]))), [])
        done.add(name)
        return found
    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])

def test_imports_go_one_way():
    """No circle, and no import of ours inside a function; the layers are those of CONTRIBUTING.md."""
    found = {name: imports(path.read_text()) for name, path in MODULES.items()}
    graph = {name: there for name, (there, _) in found.items()}
    assert not {name: hidden for name, (_, hidden) in found.items() if hidden}
    assert circle(graph) == []
    assert graph["runs"] == graph["sparse"] == set()
    for path in SCRIPTS:
        assert graph[path.stem] == {"data", "runs", "sparse"}, path.name
    for name in graph:
        if name.startswith("sources"):
            rooms = {other.partition(".")[0] for other in graph[name]}
            assert rooms <= {"sources", "runs", "othello"}, name
        if name.startswith("applications."):
            rooms = {other.partition(".")[0] for other in graph[name]}
            assert rooms <= {"evaluation", "data", "sources", "runs", *(path.stem for path in SCRIPTS)}, name
        knows_a_method = {path.stem for path in SCRIPTS} & graph[name]
        assert not knows_a_method or MODULES[name].parent.name in ("benchmarks", "applications"), name

def test_the_finders_of_bad_imports_find_them():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    text = "import torch\nfrom sources import lm\ndef f():\n    import runs\n    import scipy\n"
    assert imports(text) == ({"sources.lm", "runs"}, {"runs"})
    assert imports("from sources.lm import load\nimport evaluation.metrics")[0] == {"sources.lm", "evaluation.metrics"}

def test_scripts_need_little():
    """What a script imports beside ours; its class and its textbook loss: test_losses.py."""
    for path in SCRIPTS:
        names = set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
        assert names <= {"argparse", "math", "pathlib", "torch", "data", "runs", "sparse"}, path.name

def test_importing_does_nothing():
    for name in [path.stem for path in SCRIPTS] + ["evaluate"]:
        code = f"import {name}, sys; print([m for m in ('transformers', 'scipy', 'matplotlib') if m in sys.modules])"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
        if name != SCRIPTS[0].stem:
            break                                             # one script and evaluate.py: for time

def test_nothing_of_ours_can_be_installed():
    """`pip install .` must not put modules named data or runs among a user's packages."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "\npy-modules = []\n" in text and "\npackages = []\n" in text

def test_decisions_change_lines_that_are_there():
    """Each alternative of benchmarks/decisions.py is a change of text that stands once in a file."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    decisions = importlib.import_module("decisions")
    changes = [change for tasks in decisions.POINTS.values() for task in tasks for alternative in task.changes.values()
               for change in alternative]
    assert len(changes) > 20 and all((ROOT / name).read_text().count(old) == 1 for name, old, _ in changes)

# --- spans, sizes, docstrings ---------------------------------------------------------------------

def test_shared_spans_are_identical():
    different, having = shared.differing()
    assert not different, f"{different}; python tests/shared.py --sync SCRIPT copies them"
    assert {"flags", "state", "schedule", "step", "start", "loop"} <= {
        name for name, have in having.items() if len(have) == len(SCRIPTS)}
    assert all(len(have) > 1 for have in having.values())

def test_sync_copies_spans(tmp_path, monkeypatch):
    one, two = tmp_path / "a_sae.py", tmp_path / "b_sae.py"
    one.write_text("# [shared: x]\n1\n# [/shared: x]\ndef f():\n    # [shared: y]\n    2\n    # [/shared: y]\n")
    two.write_text("before\n# [shared: x]\n# [/shared: x]\nafter\n# [shared: z]\n3\n# [/shared: z]\n")
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    monkeypatch.setattr(shared, "SCRIPTS", [one, two])
    assert list(shared.differing()[0]) == ["x"]
    shared.sync("a_sae.py")
    assert two.read_text() == "before\n# [shared: x]\n1\n# [/shared: x]\nafter\n# [shared: z]\n3\n# [/shared: z]\n"
    assert not shared.differing()[0]

def verbatim(lines, base):
    """Which of the lines also stand in base, in the same order."""
    blocks = difflib.SequenceMatcher(None, base, lines, autojunk=False).get_matching_blocks()
    return {i for block in blocks for i in range(block.b, block.b + block.size)}

def test_most_lines_stand_verbatim_elsewhere():
    """At least 70 % of a script's lines stand in another one, in its order (matryoshka_sae.py 60 %, whose
    codes compete in the batch; gba_sae.py 50 %, whose weights are tied and which has a rule instead of a
    term). Prints how many."""
    text = {path.name: path.read_text().splitlines() for path in SCRIPTS}
    for name, lines in text.items():
        same = {other: verbatim(lines, base) for other, base in text.items() if other != name}
        anywhere = set().union(*same.values())
        print(f"{name}: {len(lines)} lines, {len(anywhere) / len(lines):.0%} in another script; "
              + ", ".join(f"{len(found) / len(lines):.0%} in {other}" for other, found in same.items()))
        least = {"matryoshka_sae.py": 0.6, "gba_sae.py": 0.5}.get(name, 0.7)
        assert len(anywhere) >= least * len(lines), name

def test_files_keep_their_size():
    """Ceilings, with room below them: a comment more must not fail here."""
    limits = {"topk_sae.py": 260, "vanilla_sae.py": 290, "gated_sae.py": 290, "ordered_sae.py": 310,
              "matryoshka_sae.py": 335, "gba_sae.py": 335, "data.py": 150}
    for path in OURS:
        lines = path.read_text().splitlines()
        most = limits.get(path.name, 300 if path.parent.name == "applications" else 500)
        assert len(lines) <= most, f"{path.name}: {len(lines)} lines"
        if path.parent.name != "benchmarks":
            assert max(map(len, lines), default=0) <= 100, path.name

def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (
        ast.FunctionDef, ast.ClassDef, ast.Module))]

def test_docstrings_are_short():
    for path in OURS:
        for node in functions(path):
            text = ast.get_docstring(node, clean=False) or ""
            limit = 45 if path.parent.name == "benchmarks" else 35         # there commands stand, too
            assert len(text.splitlines()) <= limit, f"{path.name}, {getattr(node, 'name', 'module')}"

def test_the_harvest_is_in_short_functions():
    for node in functions(ROOT / "sources/lm.py"):
        if isinstance(node, ast.FunctionDef) and node.name in (
                "harvest", "model_below", "check_room", "write_shards", "write_manifest"):
            assert node.end_lineno - node.lineno < 40, node.name

# --- texts and their commands ---------------------------------------------------------------------

def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000 and len(text.split()) <= 1800
    assert sum(c.isdigit() for c in text) / len(text) < 0.045
    for path in SCRIPTS:                                      # its column of lines, roughly
        stated = int(re.search(rf"^\| \[{path.name}\].*\| (\d+) \|$", text, re.M)[1])
        assert abs(stated - len(path.read_text().splitlines())) <= 15, path.name

def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python topk_sae.py --layer 6\n" in text
    assert "pip install -r requirements.txt && pytest\n" in text

COMMAND = re.compile(r"(?:python|torchrun(?: --\S+ \d+)*) +(\S+\.py)\b")

def commands(page):
    """The commands of a page that run a file of ours, without comments."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.S)
    lines = [line.split(" #")[0].replace("$k", "16") for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    parts = [part.strip().removeprefix("do ") for line in lines for part in re.split("&&|;", line)]
    return [part for part in parts if COMMAND.match(part)]

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(page):
    """Every command of a page: its file exists, its flags are real, and, of scripts and evaluate.py, it parses."""
    for command in commands(page):
        script = COMMAND.match(command)[1]
        assert (ROOT / script).is_file(), command
        argv = shlex.split(command[COMMAND.match(command).end():])
        if script.endswith("_sae.py") or script == "evaluate.py":
            __import__(script[:-3]).parse_args(argv)
        else:
            text = "".join((ROOT / name).read_text() for name in (script, "data.py", "benchmarks/trained.py"))
            assert all(f'"{word}"' in text for word in argv if word.startswith("--")), command

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files that a page links exist; links to lines of the code name what stands there, or near by."""
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for name, path, line in shared.LINK.findall(page.read_text()):
        there = shared.line_of(name, ROOT / path)
        assert abs(there - int(line)) <= 20, f"{name} is at {path}:{there}; python tests/shared.py --links"

def test_readme_toy_commands_run(tmp_path):
    found = [c for c in commands(ROOT / "README.md") if "--model toy" in c]
    assert found
    for i, command in enumerate(found):
        run = run_script(*shlex.split(command)[1:], "--tokens", 20480, "--out", tmp_path / str(i))
        assert run.returncode == 0 and "held out" in run.stdout, run.stderr

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_is_complete(script, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(script.stem).parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.count("  --") >= 20 and "arXiv" in out

# --- benchmarks/all.py ----------------------------------------------------------------------------

tables = importlib.import_module("benchmarks.all")

def test_every_table_has_one_command():
    """benchmarks/all.py makes each file in benchmarks/results, by one entry; and it runs all commands of docs/results.md
    that make tables."""
    results = tables.RECORD.parent
    for path in results.rglob("*"):
        name = path.relative_to(results)
        writers = [e.name for e in tables.ENTRIES for pattern in e.writes if name.match("/" + pattern) or name.match(pattern)]
        assert path.is_dir() or path == tables.RECORD or len(writers) == 1, (name, writers)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/results.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if re.match("python (benchmarks|tests)/|pytest", line)]
    assert len(lines) > 16 and set(lines) <= {c for e in tables.ENTRIES for c in e.commands}
    assert len(set(tables.NAMES)) == len(tables.NAMES)

@pytest.mark.claims
@pytest.mark.parametrize("command", ["bias.py --toys two-rates --steps 20 --seeds 40 41", "order.py --steps 20 --seeds 10 11"])
def test_tables_of_toys_can_be_made(command, tmp_path):
    """With few steps: such a command takes an hour, and should not fail at its end for a name that has changed since."""
    script, *flags = shlex.split(command)
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *flags, "--out", tmp_path / "table.md"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if re.match(r"\| [^|]+\| -?\d", line)]
    assert len(rows) > 5 and all(row.count("|") == rows[0].count("|") for row in rows)

def test_all_tables_are_made_once(tmp_path, monkeypatch, capsys):
    """One that fails or writes nothing is named and stops no other; a finished one is recorded, with date and commit,
    and is left alone; an interrupted one goes on with what it had, and --again begins anew."""
    make = lambda name, command: tables.Entry(name, [command, f"cp runs/{name}/steps results/{name}.md"], [f"{name}.md"], 1)
    step = lambda name: f"mkdir -p runs/{name} && echo x >> runs/{name}/steps"
    entries = [make("a", step("a")), make("b", step("b") + " && [ -e good ]"),
               tables.Entry("c", ["true"], ["c.md"], 1), make("d", step("d"))._replace(alone=True)]
    (tmp_path / "results").mkdir()
    for name, value in dict(ROOT=tmp_path, RUNS=tmp_path / "runs", RECORD=tmp_path / "results/all.jsonl", ENTRIES=entries,
                            NAMES=list("abcd")).items():
        monkeypatch.setattr(tables, name, value)
    monkeypatch.setattr(tables.signal, "signal", lambda *args: None)
    argv = ["--jobs", "2", "--logs", str(tmp_path / "runs/logs")]
    written = lambda: {p.stem: p.read_text() for p in (tmp_path / "results").glob("*.md")}
    with pytest.raises(SystemExit) as stop:
        tables.main(argv)
    assert [line.split(",")[0] for line in str(stop.value).splitlines()] == ["failed: b", "failed: c"]
    assert written() == {"a": "x\n", "d": "x\n"} and sorted(tables.finished()) == ["a", "d"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", tables.finished()["a"]["date"]) and tables.finished()["a"]["commit"]
    (tmp_path / "good").touch()
    tables.main([*argv, "--only", "a", "b"])
    assert written() == {"a": "x\n", "b": "x\nx\n", "d": "x\n"}
    tables.main([*argv, "--again", "b"])
    assert written()["b"] == "x\n" and len(tables.RECORD.read_text().splitlines()) == 4
    capsys.readouterr()
    tables.main(["--list"])
    assert capsys.readouterr().out.count(", commit ") == 3

def test_tables_that_time_something_run_alone():
    one, two, alone = (tables.Entry(name, [], [], 1, cores=n, alone=name == "c") for name, n in zip("abc", (1, 2, 1)))
    assert tables.fits(one, [one], 2) and tables.fits(alone, [], 2) and tables.fits(two, [], 1)
    assert not any(tables.fits(*pair, 2) for pair in ((one, [one, one]), (two, [one]), (one, [alone]), (alone, [one])))

def test_time_to_a_mark():
    """benchmarks/time_to_fvu.py: the mark is 1.1 times the best peer's end; a dense start does not reach it."""
    time_to_fvu = importlib.import_module("benchmarks.time_to_fvu")
    points = [(10, 1.0, 0.05, 2000), (20, 2.0, 0.4, 64), (30, 4.0, 0.1, 32), (40, 5.0, 0.05, 32)]
    assert time_to_fvu.reached(points, 0.2, 32) == (30, 4.0)
    tokens, seconds = time_to_fvu.reached(points, 0.2, 64)
    assert abs(tokens - 25) < 1e-9 and abs(seconds - 3) < 1e-9          # .2 is half way from .4 to .1
    assert time_to_fvu.reached(points, 0.2, 31) is None
    slow = [(tokens, 3 * seconds, fvu, l0) for tokens, seconds, fvu, l0 in points]
    bad = [(40, 20.0, 0.06, 32)]
    rows = time_to_fvu.table("vanilla", [{"sae-lens": slow, "dictionary-learning": bad, "ours": points}])
    assert "an FVU of 0.0550 at an L0 of at most 35.2" in rows[0]
    cells = {row.split(" | ")[0]: row.split(" | ")[1:4] for row in rows if row.startswith("|")}
    assert cells["| ours"][0] == "4.9" and cells["| sae-lens"] == ["14.6", "39", "3.00"]
    assert cells["| dictionary-learning"] == ["not reached", "", "above 4.11"]

# --- docs/CLAIMS.md -------------------------------------------------------------------------------

def test_claims_page_is_that_of_the_tests():
    """docs/CLAIMS.md has a row for each call of claim() in the tests, with its words, and for each of those that
    a committed table shows, with its numbers; and no other row. Numbers of the first kind are compared
    when their test runs."""
    page = claims.page_rows()
    for row in claims.extra():
        assert page.pop((row.shown, row.claim), None) == row, f"{row}; run python tests/claims.py"
    for row in claims.calls():
        there = page.pop((row.shown, row.claim), None)
        assert there and there._replace(ours=row.ours) == row, f"{row}; run pytest -m claims --claims=docs/CLAIMS.md"
        assert claims.ranges(row.ours, there.ours) is not None, f"{row}; run pytest -m claims --claims=docs/CLAIMS.md"
    assert not page, f"nothing shows {list(page)}; run pytest -m claims --claims=docs/CLAIMS.md"

def test_claims_page_is_compared():
    """What a test measures fits its row, or the difference is named: other words, other numbers, and
    where all seeds ran also a range that has become narrower."""
    row = claims.Row("A", "it holds", ".9", "MCC {mcc:.2f}, dead {dead:.0%}", "test_x.py::test_x", "reproduced")
    def why(mcc, dead=(0.02,), ours="MCC 0.40 to 0.90, dead 2%", variants=2, **changed):
        measured = claims.Measured(row._replace(**changed))
        measured.values.update(mcc=claims.Numbers(mcc), dead=claims.Numbers(dead))
        claims.RAN[row.shown], claims.VARIANTS[row.shown] = {"[10]", "[11]"}, variants
        try:
            return claims.differs(measured, row._replace(ours=ours))
        finally:
            del claims.RAN[row.shown], claims.VARIANTS[row.shown]
    written = claims.Numbers([0.404, 0.9, 0.5]), claims.Numbers([0.02])
    assert row.ours.format(mcc=written[0], dead=written[1]) == "MCC 0.40 to 0.90, dead 2%"
    assert f"{claims.Numbers([-0.001, 0.001]):.2f}" == "0.00" and f"{claims.Numbers([-0.2]):.1f}" == "-0.2"
    assert why([0.4, 0.9]) == why([0.47, 0.86]) == why([0.33, 0.94], [0.06]) == ""
    assert "mcc is 0.3 to 0.9" in why([0.3, 0.9]) and "mcc" in why([0.4, 0.97]) and "dead" in why([0.4, 0.9], [0.08])
    assert "mcc is 0.6 to 0.7" in why([0.6, 0.7]) and why([0.6, 0.7], variants=3) == ""
    assert "verdict" in why([0.4, 0.9], verdict="not") and "figure" in why([0.4, 0.9], figure=".8")
    assert "ours reads" in why([0.4, 0.9], ours="MCC 0.40 to 0.90")
