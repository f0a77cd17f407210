"""Absorption by its first definition: which latent makes the model give a word's first letter?

Chanin et al. 2024, arXiv 2409.14507, by its code (lasr-spelling/sae-spelling), not by the text.
After the examples of first_letter.py the model is asked: '{word} has the first letter:'. A word of
a letter counts as absorbed if

    the letter's main latents are silent on it, and their logistic regression says no; and
    of all latents the one with the largest |effect| helps (effect > 0), has a lead of 1.0 on the
    second |effect|, and a cosine with the letter's probe of 0.025 at least

    metric  the logit of the right letter less the mean of those of the 25 others
    effect  of latent i at the word's last token: z_i (d_i . g), g the gradient of the metric by the
            activation there, mean of STEPS points between a - z W_dec and a: integrated gradients
            of codes from 0 to z. Points in the middle of equal parts are ours, and that the error
            a - z W_dec stays as it is: there it goes to 0 with the codes
    rate    absorbed words / words to which the probe says yes, per letter; mean over letters

Of the words of a letter with silent main latents TRIED are asked about, the first in random order
(200 there), and their share stands for all. This asks what the model computes with, where
SAEBench's score asks what can be read; it needs a model that spells (`answered`: on how many of
these words the right letter's logit is the largest of the 26, so it differs between SAEs), and a
layer below which letters have not moved on.
"""
import copy
from types import SimpleNamespace

import torch
from torch.nn.functional import cosine_similarity

LEAD, COS, STEPS, TRIED, OFF = 1.0, 0.025, 6, 10, 1e-8
TOGETHER = 64                                                # words in one pass of the model

class Speller:
    """Asks the model for first letters. ids of its examples: prefix; of ' has the first letter:'
    suffix; of the 26 answers, one token each: answers [26]."""
    def __init__(self, model, block, prefix, suffix, answers):
        from transformers import DynamicCache
        self.model, self.block, self.cache = model.requires_grad_(False), block, DynamicCache()
        self.start, self.suffix = len(prefix), torch.tensor(suffix, device=model.device)
        self.head = model.get_output_embeddings()
        self.small = copy.deepcopy(self.head)                      # the rows of the answers alone
        for name, p in self.head.named_parameters():
            setattr(self.small, name, torch.nn.Parameter(p[answers].clone(), requires_grad=False))
        with torch.no_grad():
            model(input_ids=torch.tensor([prefix], device=model.device), use_cache=True,
                  past_key_values=self.cache)

    def logits(self, ids, x):
        """Logits [n, 26] of the answers for words ids [n] with activations x [n, D] at `block`."""
        def put(module, inputs, named):
            h = inputs[0] if inputs else named["hidden_states"]
            h = torch.cat([x[:, None].to(h.dtype), h[:, 1:]], 1)
            return ((h, *inputs[1:]), named) if inputs else (inputs, dict(named, hidden_states=h))
        mine, n = copy.deepcopy(self.cache), len(ids)
        mine.batch_repeat_interleave(n)
        tokens = torch.cat([ids.to(x.device)[:, None], self.suffix.expand(n, -1)], 1)
        place = torch.arange(self.start, self.start + tokens.shape[1], device=x.device)
        hook = self.block.register_forward_pre_hook(put, with_kwargs=True)
        self.model.set_output_embeddings(self.small)
        try:
            return self.model(input_ids=tokens, past_key_values=mine, use_cache=True,
                              position_ids=place.expand(n, -1)).logits[:, -1].float()
        finally:
            hook.remove()
            self.model.set_output_embeddings(self.head)

    def gradient(self, ids, x, change, letter):
        """g [n, D] of the docstring for words ids [n] of letters letter [n], whose codes add
        change [n, D]; is the answer right [n]?"""
        found = [self.part(*rows) for rows in zip(*(v.split(TOGETHER) for v in (
            ids, x, change, letter.to(x.device))))]
        return (torch.cat(of) for of in zip(*found))

    def part(self, ids, x, change, letter):
        with torch.no_grad():
            right = self.logits(ids, x).argmax(1) == letter
        total = torch.zeros_like(x)
        for step in range(STEPS):
            point = (x - change * (1 - (step + 0.5) / STEPS)).requires_grad_()
            with torch.enable_grad():
                logits = self.logits(ids, point)
                own = logits.gather(1, letter[:, None]).sum()
                metric = (26 * own - logits.sum()) / 25
            total += torch.autograd.grad(metric, point)[0] / STEPS
        return total, right

def absorbed(z, g, p, W_dec):
    """Is each word with codes z [n, F], gradient g [n, D] and its letter's probe p [n, D] absorbed?
    By the second condition."""
    effect = z * (g @ W_dec.T)                                               # (n, F)
    size, best = effect.abs().topk(2)                                        # (n, 2)
    helps = effect.gather(1, best[:, :1])[:, 0] > 0
    cosine = cosine_similarity(W_dec[best[:, 0]], p)
    return helps & (size[:, 0] - size[:, 1] >= LEAD) & (cosine >= COS)

def asked(letter, ids, x, z, main, says_no):
    """Which words of one letter are asked about, of those to which its probe says yes: ids [n],
    activations x [n, D], codes z [n, F]; says_no: what the regression on silent main latents says.
    share: how many of the n words these stand for."""
    silent = (z[:, main] < OFF).all(1) & says_no
    rows = silent.nonzero()[:TRIED, 0]
    return SimpleNamespace(letter=torch.full_like(rows, letter), ids=ids[rows.cpu()], x=x[rows],
                           z=z[rows], share=silent.double().mean().item())

def rates(speller, found, p, W_dec):
    """[(rate, answered, words asked about)] of letters as asked() gives them; p: probes [26, D]."""
    ids, x, z, letter = (torch.cat([getattr(f, name) for f in found])
                         for name in ("ids", "x", "z", "letter"))
    yes = right = torch.zeros(len(ids), dtype=torch.bool)
    if len(ids) and len(W_dec) > 1:
        g, right = speller.gradient(ids, x, z @ W_dec, letter)
        yes = absorbed(z, g, p[letter], W_dec)
    sizes = [len(f.ids) for f in found]
    return [((a.double().mean().item() if n else 0.0) * f.share, b.double().mean().item(), n)
            for f, a, b, n in zip(found, yes.split(sizes), right.split(sizes), sizes)]
