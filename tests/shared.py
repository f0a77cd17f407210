"""Shared spans: text that is the same, byte for byte, in every script that has it.

A span stands between `# [shared: NAME]` and `# [/shared: NAME]`. tests/test_house.py holds all spans
of one name equal.

    python tests/shared.py                          # the spans, who has them, which differ
    python tests/shared.py --sync topk_sae.py       # copy that script's spans into the others
    python tests/shared.py --links                  # set the line numbers of links in docs/ anew
"""
import ast
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*_sae.py"))
SPAN = re.compile(r"^( *)# \[shared: (\w+)\]\n(.*?)^\1# \[/shared: \2\]$", re.M | re.S)
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")

def spans(path):
    """{name: text} of the spans of a script."""
    text = path.read_text()
    found = {name: body for _, name, body in SPAN.findall(text)}
    assert len(found) == text.count("# [shared: ") == text.count("# [/shared: "), \
        f"{path.name}: a span that is open, closed or named twice"
    return found

def differing():
    """{name: [scripts that have the span]} of the spans that are not the same in all of them."""
    texts = {path.name: spans(path) for path in SCRIPTS}
    names = sorted({name for found in texts.values() for name in found})
    having = {name: [script for script in texts if name in texts[script]] for name in names}
    return {name: have for name, have in having.items()
            if len({texts[script][name] for script in have}) > 1}, having

def write(path, text):
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text)
    os.replace(draft, path)

def sync(script):
    """Copy the spans of a script into the others that have them."""
    source = spans(ROOT / script)
    for path in SCRIPTS:
        old = path.read_text()
        new = SPAN.sub(lambda m: f"{m[1]}# [shared: {m[2]}]\n{source.get(m[2], m[3])}"
                                 f"{m[1]}# [/shared: {m[2]}]", old)
        if new != old:
            write(path, new)
            print(f"{path.name}: written")

def line_of(name, path):
    """The line where a function, class, method ('Class.method') or constant is defined."""
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part or any(
            getattr(target, "id", None) == part for target in getattr(node, "targets", []))]
        assert len(found) == 1, f"{name} is not defined in {path.name}"
        body = getattr(found[0], "body", [])
    return found[0].lineno

def links(page):
    """The text of a page of docs/ with the line numbers that its links should have."""
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{line_of(m[1], ROOT / m[2])})", page.read_text())

if __name__ == "__main__":
    if sys.argv[1:2] == ["--sync"] and len(sys.argv) == 3:
        sync(sys.argv[2])
    elif sys.argv[1:] == ["--links"]:
        for page in sorted(ROOT.glob("docs/*.md")):
            if (text := links(page)) != page.read_text():
                write(page, text)
                print(f"{page.name}: written")
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    different, having = differing()
    for name, have in having.items():
        print(f"{name}: {'DIFFERS, ' if name in different else ''}{', '.join(have)}")
    raise SystemExit(bool(different))
