"""Text in, contexts of tokens out: the documents of --text, and how they are joined and cut."""
import hashlib, json, sysconfig
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from runs import fail, first_line

def is_hub_dataset(text):
    return text is not None and not Path(text).exists() and find_spec("datasets") is not None

def text_files(text):
    """Files of --text (None: the standard library without its tests), in a fixed mixed order."""
    if text is not None and not (text and Path(text).exists()):
        fail(f"--text {text or '(empty)'}: no such file or folder (for a data set of the "
             "HuggingFace hub, `pip install datasets` first)")
    root = Path(text or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    files = [p for p in root.rglob("*" if text else "*.py") if p.is_file()]
    if not text:
        skip = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}
        files = [p for p in files if not skip & set(p.relative_to(root).parts)]
    name = {p: p.relative_to(root).as_posix().encode() for p in files}
    return sorted(files, key=lambda p: hashlib.sha256(name[p]).digest())

def documents(text):
    """Yields the documents of --text. Files of a folder that are not UTF-8 are passed over."""
    if is_hub_dataset(text):
        import datasets
        try:
            for row in datasets.load_dataset(text, split="train", streaming=True):
                yield as_text(row)
        except Exception as err:
            fail(f"--text {text}: no file, and not readable as a hub data set with a field 'text' "
                 f"({type(err).__name__}: {first_line(err)}); check the name and the network")
        return
    for path in text_files(text):
        if path.suffix == ".jsonl":
            with open(path, "rb") as f:
                for i, line in enumerate(f, 1):
                    try:
                        yield as_text(json.loads(line))
                    except (ValueError, KeyError, TypeError):
                        fail(f"--text {path}, line {i}: not a JSON object with a string 'text'")
        else:
            try:
                whole = path.read_text(encoding="utf-8")
                yield from sequences(whole) or [whole]
            except UnicodeDecodeError:
                if text and Path(text).is_file():
                    fail(f"--text {path}: not UTF-8 text")

def sequences(text):
    """The sequences of a FASTA file, or of a file of lines that are all capital letters, one
    sequence a line; [] for any other text. Each is a document."""
    fasta, found = text.startswith(">"), []
    for line in text.splitlines():
        if fasta and line.startswith(">"):
            found.append("")
        elif line := line.strip():
            if not (line.isascii() and line.isalpha() and line.isupper()):
                return []
            if fasta:
                found[-1] += line
            else:
                found.append(line)
    return [sequence for sequence in found if sequence]

def as_text(row):
    if not isinstance(row["text"], str):
        raise TypeError("its 'text' is not a string")
    return row["text"]

def text_hash(text):
    """Identity of the text: sha256 of its files, or of its name for a hub data set."""
    h = hashlib.sha256(text.encode() if is_hub_dataset(text) else b"")
    for path in [] if is_hub_dataset(text) else text_files(text):
        h.update(f"{path.suffix} {path.stat().st_size} ".encode())
        add_file(h, path)
    return h.hexdigest()

def add_file(h, path):
    """Add the bytes of a file to a hash, never all of them in memory."""
    with open(path, "rb") as f:
        while piece := f.read(1 << 24):
            h.update(piece)

def text_size(text):
    """Bytes of the files of --text; None for a hub data set."""
    if not is_hub_dataset(text):
        return sum(path.stat().st_size for path in text_files(text))

def parts(text):
    """Yields (part, whether a document ends with it): documents in parts of 100,000 characters."""
    for doc in documents(text):
        for i in range(0, max(1, len(doc)), 100_000):
            yield doc[i:i + 100_000], i + 100_000 >= len(doc)

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"     # the amino acids, by their letters

class Contexts:
    """Cuts parts of documents into contexts: ids int32 [n, --context].

    Documents are joined by the end-of-text token. Contexts begin with BOS where the tokenizer
    itself begins a text so (Gemma, Llama); position 0 is dropped later in any case.

    A protein model, whose few tokens are the letters of RESIDUES and some more, reads a document as
    one sequence: a token a residue, between the sentinels '1' and '2' if it has them (p-IgGen,
    ProGen2). Its contexts begin where a sequence does, and what is left of the last one in a
    context is left out. BOS and EOS of its configuration are not looked at: those of p-IgGen are
    padding and arginine.
    """
    def __init__(self, tokenizer, context):
        vocabulary = tokenizer.get_vocab()
        self.tokenizer, self.context = tokenizer, context
        self.letters = vocabulary if set(RESIDUES) <= vocabulary.keys() and (
            len(vocabulary) <= 64) else None
        self.eot = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
        probe, self.start, self.bos = tokenizer("a").input_ids, None, []
        if self.letters:
            self.start, self.eot = vocabulary.get("1"), vocabulary.get("2")
        elif probe and probe[0] == tokenizer.bos_token_id:
            self.bos = probe[:1]

    def tokens(self, part, ends):
        if self.letters:
            return self.residues(part)
        ids = self.tokenizer(part, add_special_tokens=False).input_ids
        return ids + [self.eot] if ends and self.eot is not None else ids

    def residues(self, sequence):
        if wrong := sorted(set(sequence) - self.letters.keys()):
            fail(f"--text: {wrong[0]!r} is no residue that this protein model knows; give a FASTA "
                 "file, or one sequence a line, in capital letters")
        return [i for i in (self.start, *map(self.letters.get, sequence), self.eot)
                if i is not None]

    def cut(self, ids):
        body = self.context - len(self.bos)
        if self.start is not None:
            return self.cut_sequences(np.array(ids, np.int32))
        n = len(ids) // body
        cut = np.array(ids[:n * body], np.int32).reshape(n, body)
        return np.concatenate([np.full((n, len(self.bos)), self.bos, np.int32), cut], axis=1)

    def cut_sequences(self, ids):
        rows, free = [], 0                                    # free: the first token not taken yet
        for at in np.flatnonzero(ids == self.start):
            if free <= at <= len(ids) - self.context:
                rows.append(ids[at:at + self.context])
                free = at + self.context
        return np.array(rows, np.int32).reshape(-1, self.context)
