"""Text that a model writes on while its residual stream is changed, and what that text costs.

Sampling  at temperature 1, by the Gumbel trick: the token with the largest logit + noise. The noise
          is drawn once for each [prompt, sample, position, token of the vocabulary] and is the same
          for every change, so that differences between changes are paired
Change    change(x [B, D] float32) -> x [B, D], at `block`, at each position from which a token is
          drawn: the last token of the prompt, and each new one but the last. Tokens that a harvest
          drops (norm above cut) stay as they are
Price     the unchanged model reads what was written: the cross-entropy of each new token, in nats
End       after the token `end` (of a document, of a sequence) nothing counts any more: `live`
Prompts are of one length, so nothing is padded. A prompt is read once, without its last token, and
its keys and values are kept for all that follows.
"""
import contextlib, copy, functools
from types import SimpleNamespace

import numpy as np
import torch

import runs
from sources import lm

LEAST = 8                               # prompts

def prompts(source, model, count, length, new):
    """ids [P, T]: the first tokens of held-out contexts of a harvest, P <= count, T <= length.
    Fails if they are too few, or too long for `new` more tokens."""
    ids, where = lm.heldout_tokens(source)
    here = np.unique(where // ids.shape[1])[:count]
    T = min(length, ids.shape[1])
    if len(here) < LEAST:
        runs.fail(f"--text: only {len(here)} contexts of it are held out, and {LEAST} prompts are "
                  "needed; give a longer one, or more --cache-tokens")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10 ** 9
    if T + new > limit:
        runs.fail(f"--length {new}: {T} tokens of a prompt and these are more than the {limit} "
                  "that the model takes; use less, or a smaller --prompt-length")
    return torch.from_numpy(ids[here, :T]).long()

@functools.lru_cache(maxsize=16)
def gumbel(seed, position, B, V):
    """Gumbel noise [B, V] of one position, kept: every change is given the same."""
    g = torch.Generator().manual_seed(seed * 100_003 + position)
    return -torch.empty(B, V).exponential_(generator=g).log()

class Writer:
    """Of prompts ids [P, T] int64, S samples each, N new tokens. write(change) -> ids [P, S, N],
    ce [P, S, N], live [P, S, N] bool and, if keep, the activations x [P, S, N, D] at `block`."""
    @torch.inference_mode()
    def __init__(self, model, block, ids, samples, length, end, cut, seed, keep=False):
        self.model, self.block, self.end, self.cut, self.seed = model, block, end, cut, seed
        self.P, self.S, self.N, self.keep = len(ids), samples, length, keep
        ids = ids.to(model.device)
        read = model(input_ids=ids[:, :-1], use_cache=True)
        self.cache = getattr(read, "past_key_values", None)
        if self.cache is None:
            runs.fail("--model: keeps no keys and values of what it has read; use another model")
        self.cache.batch_repeat_interleave(samples)
        self.last = ids[:, -1:].repeat_interleave(samples, 0)                # (B, 1)

    @contextlib.contextmanager
    def hooked(self, put):
        """While put(h [B, t, D]) -> h stands before `block`."""
        def hook(module, inputs, named):
            h = put(inputs[0] if inputs else named["hidden_states"])
            return ((h, *inputs[1:]), named) if inputs else (inputs, dict(named, hidden_states=h))
        handle = self.block.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def write(self, change=None):
        def put(h):
            x = h[:, -1].float()
            kept = (x.norm(dim=1) <= self.cut)[:, None]
            return torch.cat([h[:, :-1], torch.where(kept, change(x), x)[:, None].to(h.dtype)], 1)
        cache, token, new = copy.deepcopy(self.cache), self.last, []
        with self.hooked(put) if change else contextlib.nullcontext():
            for position in range(self.N):
                logits = self.model(input_ids=token, past_key_values=cache,
                                    use_cache=True).logits[:, -1].float()
                noise = gumbel(self.seed, position, *logits.shape).to(logits.device)
                token = (logits + noise).argmax(1, keepdim=True)
                new.append(token)
        ids = torch.cat(new, 1)                                              # (B, N)
        ce, x = self.read(ids)
        ended = ids == (-1 if self.end is None else self.end)
        live = ended.cumsum(1) - ended.long() == 0
        shape = self.P, self.S, self.N
        return SimpleNamespace(ids=ids.view(shape).cpu(), ce=ce.view(shape).cpu(),
                               live=live.view(shape).cpu(),
                               x=None if x is None else x.view(*shape, -1))

    def read(self, ids):
        """(cross-entropy [B, N], activations [B, N, D] or None) of new tokens, unchanged model."""
        seen = []
        def look(h):
            seen.append(h[:, 1:].float())
            return h
        tokens = torch.cat([self.last, ids if self.keep else ids[:, :-1]], 1)
        with self.hooked(look) if self.keep else contextlib.nullcontext():
            logits = self.model(input_ids=tokens, past_key_values=copy.deepcopy(self.cache),
                                use_cache=True).logits[:, :self.N]
        pairs = zip(logits.split(8), ids.split(8))                   # float32 of a few at a time
        ce = [torch.nn.functional.cross_entropy(a.float().flatten(0, 1), b.flatten(),
                                                reduction="none").view(b.shape) for a, b in pairs]
        return torch.cat(ce), seen[0] if seen else None

def distinct(ids, live, n=2):
    """The share of different n-grams among those of each continuation, [P]; ids, live [P, S, N]."""
    out = []
    for prompt, alive in zip(ids.tolist(), live.tolist()):
        shares = []
        for row, on in zip(prompt, alive):
            row = row[:sum(on)]
            grams = [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]
            shares += [len(set(grams)) / len(grams)] if grams else []
        out.append(sum(shares) / len(shares) if shares else float("nan"))
    return out

def by_prompt(values, live):
    """Means [P] over the live tokens of each prompt; values, live [P, S, N]."""
    return (values * live).flatten(1).sum(1).double() / live.flatten(1).sum(1).clamp(min=1)
