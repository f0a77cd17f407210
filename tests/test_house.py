"""The house: shared spans, layout, file sizes, README commands."""
import difflib
import re
import shlex

import pytest

import claims
from conftest import ROOT, run_script

SCRIPTS = sorted(ROOT.glob("*_sae.py"))

def spans(path):
    text = path.read_text()
    found = re.findall(r"^( *)# \[shared: (\w+)\]\n(.*?)^\1# \[/shared: \2\]$", text, re.M | re.S)
    assert len(found) == text.count("# [shared: ") == text.count("# [/shared: "), path.name
    return {name: body for _, name, body in found}

def test_shared_spans_are_identical():
    first = {}
    for path in SCRIPTS:
        for name, body in spans(path).items():
            assert first.setdefault(name, body) == body, f"[shared: {name}] differs in {path.name}"
    assert {"flags", "sparse", "positive", "penalty", "schedule", "step", "start", "loop"} <= set(first)

def verbatim(lines, base):
    """Which of the lines also stand in base, in the same order."""
    blocks = difflib.SequenceMatcher(None, base, lines, autojunk=False).get_matching_blocks()
    return {i for block in blocks for i in range(block.b, block.b + block.size)}

def test_most_lines_stand_verbatim_elsewhere():
    """At least 70 % of the lines of gated_sae.py and topk_sae.py are vanilla_sae.py's, in its order; of
    each later script's lines, vanilla_sae.py's, topk_sae.py's or its other neighbours' (60 % of
    gba_sae.py's, whose weights are tied and which has its statistics instead of a term). Prints them."""
    text = {path.name: path.read_text().splitlines() for path in SCRIPTS}
    for name, lines in text.items():
        same = {other: verbatim(lines, base) for other, base in text.items() if other != name}
        anywhere = set().union(*same.values())
        print(f"{name}: {len(lines)} lines, {len(anywhere) / len(lines):.0%} in another script; "
              + ", ".join(f"{len(found) / len(lines):.0%} in {other}" for other, found in same.items()))
        if name in ("gated_sae.py", "topk_sae.py"):
            assert len(same["vanilla_sae.py"]) >= 0.7 * len(lines), name
        assert len(anywhere) >= (0.6 if name == "gba_sae.py" else 0.7) * len(lines), name

def test_files_keep_their_size():
    limits = {"vanilla_sae.py": 350, "gated_sae.py": 350, "topk_sae.py": 300, "toy.py": 202,
              "ordered_sae.py": 380, "matryoshka_sae.py": 390, "gba_sae.py": 405}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("othello/*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= limits.get(path.name, 450), path.name
        assert max(map(len, lines)) <= 100, path.name

def test_scripts_import_only_data_of_ours():
    ours = {p.stem for p in ROOT.glob("*.py")} - {"data"}
    for path in SCRIPTS:
        imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M)
        assert not ours & set(imported) and set(imported) <= {
            "argparse", "copy", "math", "pathlib", "torch", "tqdm", "safetensors", "numpy", "data"}

def readme_commands():
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].replace("$k", "16") for b in blocks for line in b.splitlines()]
    parts = [part.strip().removeprefix("do ") for line in lines for part in re.split("&&|;", line)]
    return [part for part in parts if "_sae.py" in part or "evaluate.py" in part]

def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python topk_sae.py --layer 6\n" in text
    assert "pip install -r requirements.txt && pytest\n" in text

@pytest.mark.parametrize("command", readme_commands())
def test_readme_flags_exist(command):
    """Every command of the README parses; those on toys also run, shortened."""
    argv = shlex.split(command)
    script = next(i for i, word in enumerate(argv) if word.endswith(("_sae.py", "evaluate.py")))
    module = __import__(argv[script][:-3])
    module.parse_args(argv[script + 1:])

def test_readme_toy_commands_run(tmp_path):
    commands = [c for c in readme_commands() if "--model toy" in c]
    assert commands
    for i, command in enumerate(commands):
        argv = shlex.split(command)[1:]
        run = run_script(*argv, "--tokens", 20480, "--out", tmp_path / str(i))
        assert run.returncode == 0 and "held out" in run.stdout, run.stderr

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_is_complete(script):
    run = run_script(script.name, "--help")
    assert run.returncode == 0 and run.stdout.count("  --") >= 20 and "arXiv" in run.stdout

def test_claims_page_is_that_of_the_tests():
    """CLAIMS.md has a row for each call of claim() in the tests, with its words, and for each of those that
    a committed table shows, with its numbers; and no other row. Numbers of the first kind are compared
    when their test runs."""
    page = claims.page_rows()
    for row in claims.extra():
        assert page.pop((row.shown, row.claim), None) == row, f"{row}; run python tests/claims.py"
    for row in claims.calls():
        there = page.pop((row.shown, row.claim), None)
        assert there and there._replace(ours=row.ours) == row, f"{row}; run pytest --claims CLAIMS.md"
        assert claims.ranges(row.ours, there.ours) is not None, f"{row}; run pytest --claims CLAIMS.md"
    assert not page, f"nothing shows {list(page)}; run pytest --claims CLAIMS.md"

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
