"""The house: shared spans, layout, file sizes, README commands."""
import difflib
import re
import shlex

import pytest

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
    for path in ROOT.glob("*.py"):
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
    return [part for part in parts if "_sae.py" in part]

def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python topk_sae.py --layer 6\n" in text
    assert "pip install -r requirements.txt && pytest\n" in text

@pytest.mark.parametrize("command", readme_commands())
def test_readme_flags_exist(command):
    """Every command of the README parses; those on toys also run, shortened."""
    argv = shlex.split(command)
    script = next(i for i, word in enumerate(argv) if word.endswith("_sae.py"))
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
