"""What is known to be true of a language model's tokens: first letters of words, roles of tokens in
Python or by --labels. Found when first asked for, and shared by what evaluate.py asks.
"""
from functools import cached_property

from evaluation import first_letter, probing, roles

class Known:
    """Of the model and the block that a source was harvested from; fails on bad labels."""
    code = first_letter.__file__, probing.__file__, roles.__file__            # for probes.Stored

    def __init__(self, source, labels, model, tokenizer, block):
        text, self.documents = probing.documents(labels)
        self.of, self.facts = (model, tokenizer, block), [*probing.facts(source), text]
        self.below = [source.meta[k] for k in ("model_hash", "hook_name", "dtype")]
        self.cut, self.context = source.meta["norm_cut"], source.meta["context_size"]

    @cached_property
    def words(self):
        return first_letter.prepare(*self.of)

    @cached_property
    def tokens(self):
        return probing.prepare(self.documents, *self.of, self.cut, self.context)

    def letters(self, saes):
        """The result of first_letter.py for each SAE."""
        return first_letter.report(saes, self.below, lambda: self.words)

    def probes(self, saes):
        """The result of probing.py for each SAE."""
        return probing.report(saes, self.facts, lambda: self.tokens)

    def directions(self):
        """{name: [n, D]} of the probes of both, for evaluation/cones.py."""
        return {"first letters": self.words.p[self.words.passed],
                "roles of tokens": probing.directions(*self.tokens)}
