"""Answers to prompts as numbers: the activations at a block, and codes of them.

Text      prompt and answer are tokenised one by one and joined, behind BOS where the tokenizer
          itself begins a text so. Too long a text loses its beginning
Counted   the tokens of the answer that a harvest would keep: not position 0 of the text, and none
          of a norm above the cut
Read at   mean: averaged over these. last: at the last of them
"""
import numpy as np
import torch

import runs
from evaluation import probes
from sources import lm
from sources.text import Contexts

READS = "mean", "last"
AT_ONCE = 4096                          # tokens, with those that fill up a batch

class Reader:
    """Reads answers at `block`, by each of {name: encode(x [n, D]) -> [n, F]}; `longest`: tokens of
    prompt and answer."""
    def __init__(self, encoders, source, model, tokenizer, block, longest):
        self.encoders, self.model, self.tokenizer, self.block = encoders, model, tokenizer, block
        self.cut, self.bos = source.meta["norm_cut"], Contexts(tokenizer, 2).bos
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
        self.longest, self.shortened = min(longest, limit), 0

    def ids(self, prompt, answer):
        """(ids, where the answer begins in them)."""
        first, second = (self.tokenizer(text, add_special_tokens=False).input_ids
                         for text in (prompt, answer))
        whole, room = first + second, self.longest - len(self.bos)
        self.shortened += len(whole) > room
        start = max(0, len(first) - max(0, len(whole) - room))
        return self.bos + whole[-room:], len(self.bos) + start

    @torch.no_grad()
    def read(self, path, pairs):
        """{input: {read: [2, n, width]}} of chosen and rejected answers, float64; input:
        residual, the encoders' and length. Fails, by the line of the file, where no token of an
        answer counts."""
        texts = [(p, name) for name in ("chosen", "rejected") for p in pairs]
        coded = [self.ids(p.prompt, getattr(p, name)) for p, name in texts]
        order = sorted(range(len(coded)), key=lambda i: len(coded[i][0]))
        found, batch = [None] * len(coded), []
        with runs.Bar(total=sum(len(ids) for ids, _ in coded), desc="read answers", unit="tok",
                      unit_scale=True) as bar:
            for at, i in enumerate(order):
                batch.append(i)
                T = len(coded[i][0])                          # the longest so far
                last = at + 1 == len(order)
                more = AT_ONCE if last else len(coded[order[at + 1]][0])
                if not last and (len(batch) + 1) * more <= AT_ONCE:
                    continue
                # Filled up at the end, where no token that counts can see it.
                ids = np.array([coded[j][0] + [0] * (T - len(coded[j][0])) for j in batch], int)
                for j, x in zip(batch, lm.residual_stream(self.model, self.block, ids)):
                    found[j] = self.numbers(x[:len(coded[j][0])], coded[j][1])
                    if not found[j]:
                        p, name = texts[j]
                        runs.fail(f'{path}, line {p.line}: no token of "{name}" counts (the first '
                                  "of a text and those of large norm do not); leave the pair out")
                    bar.update(len(coded[j][0]))
                batch = []
        stack = lambda name, read: torch.stack([f[name][read] for f in found]).double().view(
            2, len(pairs), -1).cpu().numpy()
        return {name: {read: stack(name, read) for read in reads}
                for name, reads in found[0].items()}

    def numbers(self, x, start):
        """{input: {read: [width]}} of one answer, which begins at `start` of x [T, D]; None if no
        token of it counts."""
        keep = ~(x.norm(dim=-1) > self.cut)
        keep[:max(1, start)] = False
        tokens, x = len(x) - start, x[keep]
        if not len(x):
            return None
        reads = lambda v: dict(mean=v.mean(0), last=v[-1])
        return {"residual": reads(x), **{name: reads(f(x)) for name, f in self.encoders.items()},
                "length": dict(mean=x.new_tensor([tokens]))}

def linear(reads, W):
    """{read: [2, n, width]} of the products with W [D, width], from those of the residual."""
    return {read: v @ W.double().cpu().numpy() for read, v in reads.items()}

def untrained(sae, source, seed=0):
    """(encode, its rows [F, D]) of a random dictionary as sparse as the SAE is on this data."""
    codes = sae.encode(source.heldout_raw()[:2048])
    k = max(1, round((codes > 0).sum(1).double().mean().item()))
    return probes.untrained(sae.d_sae, k, source.mean, seed)
