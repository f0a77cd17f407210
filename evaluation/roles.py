"""What is true of every character of a Python file, by the standard library's tokenize and ast; and
the same for any text, from --labels.

A document is (text, group, spans, topic): spans {task: [(start, end, class)]} in characters, topic
None or the class of the whole text. Documents of one group never stand on both sides of a split.
    lexical    keyword, identifier, string, comment, operator, number
    kind       comment, docstring, string, code
    role       of a name: variable, argument, attribute, called, imported, keyword argument, def
               name, class name, decorator
    depth      brackets around a name, keyword, number or operator: 0, 1, 2+
    package    of the file, for the PACKAGES folders of the standard library with most files
"""
import ast, io, json, keyword, sysconfig, tokenize
from collections import Counter
from pathlib import Path

import runs
from sources.text import text_files

PACKAGES = 5

def python_spans(text):
    """The spans of a Python source; SyntaxError and its like where it is none."""
    tree, tokens = ast.parse(text), list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    at = lambda row, byte: starts[row - 1] + (byte if lines[row - 1].isascii() else len(
        lines[row - 1].encode()[:byte].decode()))                            # ast counts bytes
    begin = lambda node: at(node.lineno, node.col_offset)
    end = lambda node: at(node.end_lineno, node.end_col_offset)
    role, inside, docstrings = {}, [], set()      # by start of the name; (start, end, role); starts
    for node in ast.walk(tree):                   # outer nodes first
        match node:
            case ast.Name():
                role.setdefault(begin(node), "variable")
            case ast.Attribute():
                role.setdefault(end(node) - len(node.attr), "attribute")
            case ast.Call(func=ast.Name() as name):
                role.setdefault(begin(name), "called")
            case ast.Call(func=ast.Attribute() as name):
                role.setdefault(end(name) - len(name.attr), "called")
            case ast.keyword(arg=str()):
                role[begin(node)] = "keyword argument"
            case ast.arg():
                role[begin(node)] = "argument"
            case ast.Import() | ast.ImportFrom():
                inside.append((begin(node), end(node), "imported"))
        for name in getattr(node, "decorator_list", []):
            name = name.func if isinstance(name, ast.Call) else name
            inside.append((begin(name), end(name), "decorator"))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                docstrings.add(begin(node.body[0]))
    for lo, hi, name in inside:
        role.update(dict.fromkeys(range(lo, hi), name))
    spans, depth, before = dict(lexical=[], kind=[], role=[], depth=[]), 0, ""
    for token in tokens:
        kind, word = tokenize.tok_name[token.type], token.string
        lo, hi = (starts[row - 1] + column for row, column in (token.start, token.end))
        string = "STRING" in kind                 # also of f-strings, from Python 3.12 on
        lexical = "string" if string else dict(
            NAME="keyword" if keyword.iskeyword(word) else "identifier", COMMENT="comment",
            OP="operator", NUMBER="number").get(kind)
        if lexical:
            spans["lexical"].append((lo, hi, lexical))
            spans["kind"].append((lo, hi, "docstring" if lo in docstrings else lexical
                                  if lexical in ("comment", "string") else "code"))
        named = {"def": "def name", "class": "class name"}.get(before) or role.get(lo)
        if lexical == "identifier" and named:
            spans["role"].append((lo, hi, named))
        if lexical == "operator" and word in "([{)]}":
            depth += 1 if word in "([{" else -1
        elif lexical in ("keyword", "identifier", "operator", "number"):
            spans["depth"].append((lo, hi, ("0", "1", "2+")[min(depth, 2)]))
        before = word
    return spans

def standard_library():
    """Yields the documents of the standard library without its tests, last in the order of
    sources/text.py first: training reads from the other end, and seldom all."""
    files, root = text_files(None), Path(sysconfig.get_paths()["stdlib"])
    package = lambda path: path.relative_to(root).parts[0] if path.parent != root else None
    topics = [name for name, _ in Counter(filter(None, map(package, files))).most_common(PACKAGES)]
    for path in reversed(files):
        try:
            text = path.read_text(encoding="utf-8")
            spans = python_spans(text)
        except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
            continue
        topic = package(path)
        yield text, str(path), spans, topic if topic in topics else None

def labelled(path):
    """Yields the documents of --labels, a file of lines
    {"text": "...", "labels": {"task": [[start, end, "class"], ...]}}, in characters, end excluded.
    Fails on labels that overlap in a task or lie outside the text."""
    bad = lambda what: runs.fail(f"--labels {path}, line {n}: {what}")
    try:
        file = open(path, "rb")
    except OSError as err:
        runs.fail(f"--labels {path}: {runs.first_line(err)}; name a .jsonl file")
    with file:
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                text, tasks = row["text"], row["labels"]
                spans = {str(task): sorted((int(lo), int(hi), str(name)) for lo, hi, name in found)
                         for task, found in tasks.items()}
                length = len(text + "")
            except (ValueError, KeyError, TypeError, AttributeError):
                bad('not {"text": "...", "labels": {"task": [[start, end, "class"], ...]}}')
            for task, found in spans.items():
                for (lo, hi, _), (after, *_) in zip(found, [*found[1:], (length, length)]):
                    if not 0 <= lo < hi <= length:
                        bad(f"task {task}: [{lo}, {hi}] lies outside the text of {length} "
                            "characters, or is empty; mend it")
                    if hi > after:
                        bad(f"task {task}: [{lo}, {hi}] overlaps the label that starts at {after}; "
                            "keep one of them")
            yield text, str(n), spans, None
