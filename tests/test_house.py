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

def test_most_lines_stand_verbatim_in_vanilla():
    """At least 70 % of each script's lines are vanilla_sae.py's, in its order; prints the diffs."""
    base = (ROOT / "vanilla_sae.py").read_text().splitlines()
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        blocks = difflib.SequenceMatcher(None, base, lines, autojunk=False).get_matching_blocks()
        same = sum(block.size for block in blocks)
        print(f"{path.name}: {len(lines)} lines, {same} of vanilla_sae.py's ({same / len(lines):.0%}), "
              f"diff +{len(lines) - same} -{len(base) - same}")
        assert same >= 0.7 * len(lines), path.name

def test_files_keep_their_size():
    limits = {"vanilla_sae.py": 350, "gated_sae.py": 350, "topk_sae.py": 300, "toy.py": 200}
    for path in ROOT.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= limits.get(path.name, 450), path.name
        assert max(map(len, lines)) <= 100, path.name

def test_scripts_import_only_data_of_ours():
    ours = {p.stem for p in ROOT.glob("*.py")} - {"data"}
    for path in SCRIPTS:
        imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M)
        assert not ours & set(imported) and set(imported) <= {
            "argparse", "math", "pathlib", "torch", "tqdm", "safetensors", "numpy", "data"}

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
