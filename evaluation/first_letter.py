"""First letters: does a latent say 'begins with s', or do latents of single words say it for it?

Absorption (Chanin et al. 2024, arXiv 2409.14507), by the algorithm and the constants of SAEBench
(Karvonen et al. 2025, arXiv 2503.09532, version 0.6.0). Spelling is known exactly, so this needs no
data set and no judge.

Words     every token of the tokenizer that is [A-Za-z]+ after at most one space; 26 classes. Its
          activation a [D] is taken at the SAE's own hook, after ten examples of '{word} has the
          first letter: X'. What follows the word cannot change it, and all words share the
          examples: one pass over these, then one token a word
Probe     p_l [D] of each letter, on the activations: binary cross-entropy, classes balanced. The
          letters count whose F1 is above 0.6 on words not fitted
Latents   those of the k largest weights, signed, of a probe with an L1 penalty on the codes z [F].
          On them a logistic regression for k = 1, 2, ...; as long as its F1 grows by 0.03, the
          letter's main latents are these k
Score     on words of letter l to which p_l says yes, with A = (a - b_dec) . p_l,
          proj_i = z_i (d_i . p_l), cosines of d_i and p_l, M the sum of proj of the main latents, B
          that of the three largest others with cosine >= 0.1; a as the SAE's own normalisation, if
          any, has it:
            absorption  0 if M >= A, B < 0.4 A or A <= 0; 1 if M <= 0; else b / (b + M) with
                        b = min(B, A - M)
            full        1 if no main latent fires and the largest of all proj is >= 0.4 A > 0,
                        with cosine >= 0.025
          means over the words of a letter, then over letters; _se as if letters were independent.
          The paper's own definition, by what the model answers: evaluation/attribution.py
Controls  a random dictionary about as sparse (untrained); the D coordinates of a less its mean; one
          SAE with letters shuffled among the words. Averages of all are over the same letters
Ours      A: SAEBench takes that of all of a (here _raw), also of the part along b_dec, which no
          latent can carry; by it a random dictionary absorbs, too. The hook (SAEBench: after the
          block). One set of examples for all words. Three parts of the words: fitted, latents
          chosen, scored (SAEBench scores those it chose on, and may fit on 'dog' and score ' Dog').
          proj, right for rows of any norm. SAEBench refuses fewer than 20 letters. Scores near 0
          may also mean that nothing was learned: see the F1 of the first latent, that with the
          largest weight. l0 is that on the words.
"""
import copy, re
from functools import partial
from itertools import pairwise
from string import ascii_lowercase as LETTERS
from types import SimpleNamespace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, normalize
from torch.nn.functional import one_hot

import runs
from evaluation import attribution, probes
from sources import lm
from sources.text import Contexts

FEWEST, EXAMPLES, GOOD_F1, MANY = 1000, 10, 0.6, 20     # words; in the prompt; of a letter; letters
PARTS = 0.6, 0.8                                        # ends: fitted, latents chosen; scored
JUMP, MOST = 0.03, 10                                   # of F1 by another main latent; main latents
COS_FULL, COS, SHARE, ABSORBERS, OFF = 0.025, 0.1, 0.4, 3, 1e-8
QUESTION = " has the first letter:"
STEPS = dict(lr=0.01, end=1e-5, epochs=50)              # of both probes

# --- words and their activations ------------------------------------------------------------------

def alphabetic(tokenizer):
    """Ids [W] of the tokens that are words, their first letters [W], 0 to 25, and the word [W] that
    each is, as a number: 'dog', ' dog' and 'Dog' are one."""
    special = set(tokenizer.all_special_ids)
    text = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    found = {i: word.strip().lower() for i, word in enumerate(text)
             if i not in special and re.fullmatch(" ?[A-Za-z]+", word)}
    if len(found) < FEWEST:
        runs.fail(f"--probes: the tokenizer has {len(found)} tokens of letters alone, and first "
                  f"letters need {FEWEST:,}; leave --probes out for this model")
    number = {word: n for n, word in enumerate(dict.fromkeys(found.values()))}
    return (torch.tensor(list(found)), torch.tensor([LETTERS.index(w[0]) for w in found.values()]),
            torch.tensor([number[w] for w in found.values()]))

@torch.inference_mode()
def activations(model, block, prefix, ids):
    """Input of `block` at each token of ids [W], alone after the tokens of prefix: [W, D]."""
    from transformers import DynamicCache
    def take(module, inputs, named):
        take.x = inputs[0] if inputs else named["hidden_states"]
        raise lm.Reached
    def run(tokens, cache, position):                         # tokens (n, T)
        try:
            model(input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True,
                  position_ids=position.expand(tokens.shape).to(model.device))
        except lm.Reached:
            return take.x[:, -1].float()
    hook, cache, found = block.register_forward_pre_hook(take, with_kwargs=True), DynamicCache(), []
    try:
        run(torch.tensor([prefix]), cache, torch.arange(len(prefix)))
        with runs.Bar(total=len(ids), desc="words", unit="tok", unit_scale=True) as bar:
            for part in ids.split(256):
                mine = copy.deepcopy(cache)
                mine.batch_repeat_interleave(len(part))
                found.append(run(part[:, None], mine, torch.tensor(len(prefix))))
                bar.update(len(part))
    finally:
        hook.remove()
    return torch.cat(found)

def harvest(model, tokenizer, block, seed=0):
    """Words in random order, without those of the examples: activations [W, D]; letters, words and
    ids [W]; and the ids of the examples."""
    ids, letter, word = alphabetic(tokenizer)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    shown, rest = order[:EXAMPLES], order[EXAMPLES:]
    prefix = Contexts(tokenizer, 2).bos.copy()
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    for i in shown.tolist():
        answer = LETTERS[letter[i]].upper()
        prefix += encode("\n") + [int(ids[i])] + encode(f"{QUESTION} {answer}")
    prefix += encode("\n")
    x = activations(model, block, prefix, ids[rest])
    return x, letter[rest], word[rest], ids[rest], prefix

# --- probes ---------------------------------------------------------------------------------------

def linear_probe(X, Y, batch, decay, l1=0.0, seed=0):
    """w [C, D] and b [C] of C yes-or-no probes on X [N, D], dense or sparse, for Y [N, C] of 0 and
    1: Adam on binary cross-entropy, positives weighted up to the negatives, + l1 mean_c |w_c|_1."""
    g, (N, C) = torch.Generator().manual_seed(seed), Y.shape
    w, b = (torch.zeros(*shape, C, dtype=X.dtype, device=X.device) for shape in (X.shape[1:], ()))
    opt = torch.optim.Adam([w.requires_grad_(), b.requires_grad_()], lr=STEPS["lr"],
                           weight_decay=decay, fused=True)
    weight = (N - Y.sum(0)) / Y.sum(0).clamp(min=1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(
        opt, (STEPS["end"] / STEPS["lr"]) ** (1 / STEPS["epochs"]))
    for _ in range(STEPS["epochs"]):
        for rows in torch.randperm(N, generator=g).to(X.device).split(batch):
            logits = X.index_select(0, rows) @ w + b
            loss = binary_cross_entropy_with_logits(logits, Y[rows], pos_weight=weight)
            loss = loss + l1 * w.abs().sum() / C
            opt.zero_grad()
            loss.backward()
            opt.step()
        schedule.step()
    return w.detach().T, b.detach()

def task(x, letter, word):
    """Activations x [W, D] of first letters [W]: parts, probe, letters that pass. Those of one
    `word`, a number [W], stand in one part."""
    Y, n = one_hot(letter, 26).float().to(x.device), int(word.max()) + 1     # (W, 26)
    place = torch.randperm(n, generator=torch.Generator().manual_seed(0))[word].to(x.device)
    ends = [0, *(round(end * n) for end in PARTS), n]
    fit, choose, score = (((lo <= place) & (place < hi)).nonzero()[:, 0]
                          for lo, hi in pairwise(ends))
    p, b = linear_probe(x[fit], Y[fit], batch=64, decay=1e-4)
    yes = x @ p.T + b > 0
    f1 = probes.scores(yes[score].T, Y[score].T > 0)[2]
    return SimpleNamespace(x=x, Y=Y, word=word, fit=fit, choose=choose, score=score,
                           p=normalize(p, dim=1), yes=yes, f1=f1,
                           passed=(f1 > GOOD_F1).nonzero()[:, 0].tolist())

def prepare(model, tokenizer, block):
    """The words of a model, their activations before `block`, and the probes of the letters."""
    x, letter, word, ids, prefix = harvest(model, tokenizer, block)
    words = task(x, letter, word)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    answers = [encode(f" {name.upper()}") for name in LETTERS]
    words.ids, words.speller = ids, attribution.Speller(
        model, block, prefix, encode(QUESTION), [a[0] for a in answers]) if all(
        len(a) == 1 for a in answers) else None
    if not words.passed:
        runs.fail(f"--probes: no first letter can be told from this layer with F1 above {GOOD_F1}, "
                  "so none is absorbed there; choose another --layer")
    return words

def main_latents(Z, words):
    """Of each letter its main latents, the F1 of the first alone and of all, and whether the
    regression says no where all are silent; Z: codes [W, F]. How many latents: by their F1 on the
    words of the part `choose`; the F1 that is told is on those of `score`."""
    w, _ = linear_probe(Z.index_select(0, words.fit), words.Y[words.fit], 4096, 1e-6, l1=0.01)
    top = w.topk(min(MOST, w.shape[1])).indices                              # (26, 10)
    found = []
    for columns, y in zip(top, words.Y.T):
        X, best, f1 = Z.index_select(1, columns).to_dense().double(), -1, []  # (W, 10)
        for k in range(1, len(columns) + 1):
            v, b = probes.logistic(X[words.fit, :k], y[words.fit], balanced=True)
            yes = X[:, :k] @ v + b > 0
            new, scored = (probes.scores(yes[rows], y[rows] > 0)[2].item()
                           for rows in (words.choose, words.score))
            if f1 and new <= best + JUMP:
                break
            best, says_no = new, b.item() <= 0
            f1.append(scored)
        found.append((columns[:len(f1)], f1[0], f1[-1], says_no))
    return zip(*found)

# --- absorption -----------------------------------------------------------------------------------

def absorption(z, a, p, W_dec, main):
    """Absorption and full absorption, [n] each, of words with codes z [n, F] and activations a
    [n, D], less b_dec; p [D]: the letter's unit probe; main: its main latents."""
    cosine, A = cosine_similarity(W_dec, p[None]), a @ p                     # (F,), (n,)
    proj = z * (W_dec @ p)                                                   # (n, F)
    M = proj[:, main].sum(1)
    others = proj * (cosine >= COS)
    others[:, main] = 0
    B = others.clamp(min=0).topk(min(ABSORBERS, len(cosine))).values.sum(1)
    b = torch.minimum(B, A - M)
    part = torch.where(M <= 0, torch.ones_like(M), b / (b + M)).clamp(0, 1)
    part[(M >= A) | (B < SHARE * A) | (A <= 0)] = 0
    most, j = proj.max(1)
    full = (z[:, main] < OFF).all(1) & (cosine[j] >= COS_FULL) & (A > 0) & (most >= SHARE * A)
    return part, full

@torch.no_grad()
def measure(encode, W_dec, b_dec, words, passed, speller=None, inner=lambda a: a):
    """What the docstring says, of one SAE; averages over the letters `passed`. With a speller, also
    absorption by its first definition: evaluation/attribution.py. inner(a): activations a [n, D] in
    the units of W_dec and b_dec."""
    Z = probes.codes(encode, words.x)
    with torch.enable_grad():
        main, first, best, says_no = main_latents(Z, words)
    letters, asked, l0 = {}, [], (Z.values() if Z.is_sparse else Z).count_nonzero().item() / len(Z)
    for i in passed:
        rows = words.score[(words.Y[words.score, i] > 0) & words.yes[words.score, i]]
        z = Z.index_select(0, rows).to_dense()
        a = inner(words.x[rows])
        (part, full), (raw, full_raw) = (absorption(z, v, words.p[i], W_dec, main[i])
                                         for v in (a - b_dec, a))
        letters[LETTERS[i]] = dict(
            probe_f1=words.f1[i].item(), f1_first=first[i], f1_main=best[i],
            latents=main[i].tolist(), words=len(rows), split=len(main[i]),
            absorption=part.mean().item(), full=full.double().mean().item(),
            absorption_raw=raw.mean().item(), full_raw=full_raw.double().mean().item())
        if speller:
            asked.append(attribution.asked(i, words.ids[rows.cpu()], words.x[rows], z, main[i],
                                           says_no[i]))
    if asked:
        found = attribution.rates(speller, asked, words.p, W_dec)
        for letter, (rate, answered, n) in zip(letters.values(), found):
            letter.update(attribution=rate, answered=answered, asked=n)
    return summary(letters) | dict(l0=l0, letters=letters, latents=probes.best_classes(
        Z, words.Y.argmax(1), LETTERS))

def summary(letters):
    """Means over letters, with standard errors; no word of a letter to score: no absorption."""
    out = {}
    for name in ("probe_f1", "f1_first", "f1_main", "split", "absorption", "full", "absorption_raw",
                 "full_raw", "attribution", "answered"):
        v = torch.tensor([letter.get(name, float("nan")) for letter in letters.values()]).double()
        v = v[~v.isnan()]
        out[name] = v.mean().item()
        out[name + "_se"] = (v.std() / len(v) ** 0.5).item() if len(v) > 1 else float("nan")
    return out

def report(saes, depends, prepared):
    """The result of each SAE, with those of the controls, from its probes.json if that has it;
    prepared() gives what prepare() does, and `depends` says what that depends on."""
    stored = [probes.Stored("first_letter", sae, depends, __file__, attribution.__file__)
              for sae in saes]
    if all(s.result for s in stored):
        return [s.result for s in stored]
    words = prepared()
    passed, mean = words.passed, words.x[words.fit].mean(0)
    random, controls = {}, next((s.result["controls"] for s in stored if s.result), None)
    for sae, s in zip(runs.Bar(saes, desc="first letters", unit="run"), stored):
        if s.result:
            continue
        speller = words.speller if sae.norm == "none" else None    # codes of other units
        of_sae = partial(measure, sae.encode, sae.t["W_dec"], sae.t["b_dec"],
                         inner=lambda a: sae.normed(a)[0])
        result = of_sae(words, passed, speller)
        key = probes.alike(sae.d_sae, result["l0"])
        if key not in random:
            random[key] = measure(*probes.untrained(*key, mean), mean, words, passed, words.speller)
        if not controls:
            order = torch.randperm(len(words.x), generator=torch.Generator().manual_seed(1))
            shuffled = task(words.x, words.Y.argmax(1).cpu()[order], words.word)
            controls = dict(
                coordinates=measure(lambda x: x - mean, torch.eye(len(mean), device=mean.device),
                                    mean, words, passed),
                shuffled=of_sae(shuffled, passed))
        controls = dict(controls, untrained=random[key])
        s.put(dict(result, words=len(words.x), controls={
            name: {k: v for k, v in control.items() if k not in ("letters", "latents")}
            for name, control in controls.items()}))
    return [s.result for s in stored]
