"""evaluate.py --probes: planted truths and controls, the definitions worked by hand, the command, and bad input."""
import argparse
import importlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import evaluate
from evaluation import attribution, first_letter, latents, probes, probing, roles
from evaluation.saved import SAE
from sources import lm
from test_evaluate import save

# --- tools ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regressions_are_those_of_scikit_learn(balanced):
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 400, 4, generator=g) * torch.tensor([1.0, 30, 0.1, 5]) + 7
    y = (X[..., 0] + X[..., 2] * 8 + torch.randn(3, 400, generator=g) * 3 > torch.tensor([[7.0], [9], [12]]) + 56).float()
    for i in range(3):
        w, b = probes.logistic(X[i].to_sparse() if i == 1 else X[i], y[i], C=0.5, balanced=balanced)
        want = LogisticRegression(C=0.5, class_weight="balanced" if balanced else None, solver="newton-cholesky",
                                  tol=1e-10, max_iter=1000).fit(X[i].double().numpy(), y[i].numpy())
        assert np.allclose(w, want.coef_[0], atol=1e-5) and abs(b - want.intercept_[0]) < 1e-3

def test_scores_by_hand():
    said, y = (torch.tensor(v) > 0 for v in ([[1, 1, 0, 0, 1], [0] * 5], [[1, 0, 0, 1, 1], [1] * 5]))
    precision, recall, f1 = probes.scores(said, y)
    assert torch.allclose(f1, torch.tensor([2 / 3, 0]).double()) and precision.tolist() == [2 / 3, 0]
    assert recall.tolist() == [2 / 3, 0]

def test_what_a_latent_detects_by_hand():
    """Tokens without a class count against precision."""
    Z = torch.tensor([[1, 0, 0], [2, 0, 0], [3, 1, 0], [0, 5, 0], [1, 0, 0], [0, 0, 0]]).float()
    label = torch.tensor([0, 0, 1, 1, -1, 0])
    want = {"0": ["x", 2 / 4, 2 / 3], "1": ["y", 1, 1]}
    for codes in (Z, Z.to_sparse().coalesce()):
        got = probes.best_classes(codes, label, ["x", "y"])
        assert {k: [c, round(p, 6), round(r, 6)] for k, (c, p, r) in got.items()} == {
            k: [c, round(p, 6), round(r, 6)] for k, (c, p, r) in want.items()}

# --- first letters --------------------------------------------------------------------------------

def test_absorption_by_hand():
    """Main latent 0, along p; 1 and 2 with cosines 0.8 and 0.6, 3 with 0.05; 4 is opposite. Rows of any norm."""
    p = torch.tensor([1.0, 0, 0])
    W = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0.05, 0, 0.99875], [-1, 0, 0]])
    z = torch.tensor([[2.0, 0, 0, 0, 0],        # all by the main latent
                      [0, 2, 0, 0, 0],          # the main latent off, another has 1.6 of 2
                      [1, 1, 0, 0, 0],          # half: b = min(0.8, 2 - 1), 0.8 / 1.8
                      [1, 5, 0, 0, 0],          # no more than what is missing: 1 / 2
                      [0, 0.5, 0.5, 0, 0],      # 0.4 + 0.3 of 2: below 0.4
                      [0, 0, 0, 90, 0],         # 4.5 of 2, but at a cosine below 0.1: full alone counts it
                      [0, 1, 0.5, 0, 0]])       # three together 1.1 of 2; the largest has exactly 0.4 of it
    a = torch.tensor([[2.0, 5, -5]]).expand(7, 3)
    want, wanted_full = [0, 1, 0.8 / 1.8, 0.5, 0, 0, 1], [0, 1, 0, 0, 0, 1, 1]
    for norm in (torch.ones(5), torch.tensor([3.0, 0.2, 1, 7, 0.5])):
        part, full = first_letter.absorption(z / norm, a, p, W * norm[:, None], torch.tensor([0]))
        assert torch.allclose(part, torch.tensor(want)) and full.int().tolist() == wanted_full
    part, full = first_letter.absorption(z, -a, p, W, torch.tensor([0]))        # nothing to explain
    assert part.sum() == 0 and full.sum() == 0

CHILDREN = 20

@pytest.fixture(scope="module")
def planted():
    """Words of dimension 26 + 20: a coordinate is 1 for the letter and, for 40 % of the words, one for a child, of which
    20 occur with every letter."""
    g = torch.Generator().manual_seed(0)
    letter = torch.randint(0, 26, (5200,), generator=g)
    child = torch.where(torch.rand(5200, generator=g) < 0.4, torch.randint(0, CHILDREN, (5200,), generator=g), CHILDREN)
    x = torch.cat([one_hot(letter, 26), one_hot(child, CHILDREN + 1)[:, :-1]], 1).float()
    x += torch.randn(x.shape, generator=g) / 50
    return first_letter.task(x, letter, torch.arange(len(x))), x, letter

def test_a_word_stands_in_one_part(planted):
    """'dog', ' dog' and 'Dog' are one word; parts are 60, 20 and 20 % of the words."""
    words, x, letter = planted
    class Tokens:
        all_special_ids = [0]
        def __len__(self):
            return 3601
        def batch_decode(self, ids):                           # three forms of 1200 words, and what is none
            name = lambda i: "".join(chr(97 + i // 26 ** k % 26) for k in range(3))
            forms = lambda i: (name(i // 3), " " + name(i // 3), name(i // 3).title())[i % 3]
            return ["<s>"] + [forms(i) for i in range(3597)] + ["a1", "", "-"]
    ids, first, word = first_letter.alphabetic(Tokens())
    assert len(ids) == 3597 and (word == torch.arange(3597) // 3).all() and first[0] == first[2] == 0 and first[3] == 1
    parts = first_letter.task(x[:3597], first, word)
    every = [set(word[rows].tolist()) for rows in (parts.fit, parts.choose, parts.score)]
    assert list(map(len, every)) == [719, 240, 240] and len(set.union(*every)) == 1199
    assert len(parts.fit) + len(parts.choose) + len(parts.score) == 3597

def test_planted_absorption_is_found(planted):
    """A latent for each letter and child: nothing absorbed. The same where a letter's latent is silent beside a child,
    and a latent for each pair has the letter in its direction: 40 % absorbed, fully. Rows have norms other than 1."""
    words, x, letter = planted
    assert len(words.passed) == 26 and words.f1.min() > 0.95
    eye = torch.eye(26 + CHILDREN)
    honest = first_letter.measure(lambda x: x * (x > 0.5) / 3, 3 * eye, 0, words, words.passed)
    pairs = torch.cat([eye[:26], (eye[:26, None] + eye[26:]).flatten(0, 1)])                     # (26 + 520, 46)
    def absorbing(x):
        on = (x > 0.5).float()
        alone = on[:, :26] * (1 - on[:, 26:].sum(1, keepdim=True))
        return torch.cat([alone, (on[:, :26, None] * on[:, None, 26:]).flatten(1)], 1) / 2
    absorbed = first_letter.measure(absorbing, 2 * pairs, 0, words, words.passed)
    assert honest["absorption"] < 0.02 and honest["full"] == 0 and honest["f1_first"] > 0.99
    assert abs(absorbed["absorption"] - 0.4) < 0.05 and abs(absorbed["full"] - 0.4) < 0.05
    assert 0.7 < absorbed["f1_first"] < 0.8 and absorbed["split"] < 1.2
    for i, name in enumerate(first_letter.LETTERS):
        assert honest["letters"][name]["latents"] == [i] and absorbed["letters"][name]["latents"][0] == i

def test_a_letter_of_two_latents_is_split_not_absorbed(planted):
    """A latent for each letter's words with a child, one for those without: two main latents, nothing absorbed."""
    words, x, letter = planted
    def split(x):
        on = (x > 0.5).float()
        child = on[:, 26:].sum(1, keepdim=True)
        return torch.cat([on[:, :26] * (1 - child), on[:, :26] * child], 1)
    result = first_letter.measure(split, torch.eye(46)[:26].repeat(2, 1), 0, words, words.passed)
    assert result["split"] == 2 and result["absorption"] < 0.02 and result["f1_main"] > 0.99

def test_controls_know_nothing(planted):
    """Shuffled letters: no letter passes, latents that are the letters say nothing. A random dictionary, as sparse."""
    words, x, letter = planted
    shuffled = first_letter.task(x, letter[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))], words.word)
    assert not shuffled.passed
    nothing = first_letter.measure(lambda x: x * (x > 0.5), torch.eye(46), 0, shuffled, words.passed)
    assert nothing["f1_first"] < 0.12
    random = first_letter.measure(*probes.untrained(46, 2, x.mean(0)), x.mean(0), words, words.passed)
    assert random["f1_first"] < 0.8 and random["l0"] <= 2      # the letters themselves: above 0.99

def test_absorption_in_the_units_of_the_sae(planted, tmp_path, monkeypatch):
    """An SAE that scales its input: where a letter's latent is silent another has a fifth of the projection, too little for
    absorption; of the raw activation, which is some five times smaller, it would be all."""
    words, x, letter = planted
    monkeypatch.setattr(first_letter, "main_latents", lambda Z, words: (
        [torch.tensor([i]) for i in range(26)], [1.0] * 26, [1.0] * 26, [True] * 26))
    eye = torch.eye(46)
    W = torch.cat([eye[:, :26] - 2 * eye[:, 26:].sum(1, keepdim=True), 0.2 * eye[:, :26]], 1)
    rows, result = torch.cat([eye[:26], eye[:26]]), {}
    for norm in ("none", "constant_norm_rescale"):
        path = save(tmp_path / norm, W, rows)
        cfg = json.loads((path / "cfg.json").read_text()) | dict(normalize_activations=norm)
        (path / "cfg.json").write_text(json.dumps(cfg))
        monkeypatch.setattr(words, "speller", None, raising=False)
        [result[norm]] = first_letter.report([SAE(path)], [], lambda: words)
    full = first_letter.measure(lambda x: SAE(path).encode(x), rows, 0, words, words.passed)
    assert result["none"]["absorption"] < 0.02 and result["constant_norm_rescale"]["absorption"] < 0.02
    assert full["absorption"] > 0.3                            # codes of one unit, activations of another

def test_absorption_is_of_what_latents_can_carry(planted, monkeypatch):
    """Where a letter's latent is silent another has a fifth of the projection: too little of the activation less b_dec. Of
    the whole activation, which b_dec leaves a fifth, it is all, and SAEBench's form calls it absorbed."""
    words, x, letter = planted
    monkeypatch.setattr(first_letter, "main_latents", lambda Z, words: (
        [torch.tensor([i]) for i in range(26)], [1.0] * 26, [1.0] * 26, [True] * 26))
    eye = torch.eye(46)
    b_dec = torch.linalg.lstsq(words.p, -0.8 * words.p.diagonal()[:, None], driver="gelsd").solution[:, 0]
    W = torch.cat([eye[:, :26] - 2 * eye[:, 26:].sum(1, keepdim=True), 0.2 * eye[:, :26]], 1)
    monkeypatch.setattr(words, "x", x + b_dec)
    found = first_letter.measure(lambda x: ((x - b_dec) @ W).relu(), torch.cat([eye[:26], eye[:26]]), b_dec, words, words.passed)
    assert found["absorption"] < 0.02 and found["full"] < 0.02
    assert found["absorption_raw"] > 0.3 and found["full_raw"] > 0.3

class Linear:
    """A model whose logit of a letter is 2 times that letter's coordinate."""
    def gradient(self, ids, x, change, letter):
        g = torch.zeros_like(x)
        g[torch.arange(len(x)), letter] = 2
        return g, torch.arange(len(x)) % 2 == 0

def test_planted_absorption_by_attribution(planted):
    """The first definition finds what SAEBench's does: latents of pairs give the logit where the letter's is silent."""
    words, x, letter = planted
    words.ids = torch.arange(len(x))
    eye = torch.eye(26 + CHILDREN)
    pairs = torch.cat([eye[:26], (eye[:26, None] + eye[26:]).flatten(0, 1)])
    def absorbing(x):
        on = (x > 0.5).float()
        alone = on[:, :26] * (1 - on[:, 26:].sum(1, keepdim=True))
        return torch.cat([alone, (on[:, :26, None] * on[:, None, 26:]).flatten(1)], 1)
    got = first_letter.measure(absorbing, pairs, 0, words, words.passed, Linear())
    assert abs(got["attribution"] - 0.4) < 0.06 and abs(got["answered"] - 0.5) < 0.05
    assert 0 < got["letters"]["s"]["asked"] <= attribution.TRIED
    honest = first_letter.measure(lambda x: x * (x > 0.5), eye, 0, words, words.passed, Linear())
    assert honest["attribution"] == 0
    weak = first_letter.measure(lambda x: absorbing(x) / 3, pairs, 0, words, words.passed, Linear())  # leads by 2 / 3
    assert weak["attribution"] == 0

def test_absorbed_by_hand():
    """The largest |effect| decides: it must help, lead in |effect| by 1, and have a cosine with the probe."""
    p, g = torch.tensor([1.0, 0]), torch.tensor([[1.0, 0]])
    W = torch.tensor([[1.0, 0], [-1, 0], [0.02, 0.9998]])
    for z, want in (([3.0, 0, 0], True), ([3.0, 1.9, 0], True), ([3.0, 2.1, 0], False),      # leads by 1.1, by .9
                    ([3.0, 5, 0], False), ([0, 0, 100], False)):                            # hinders; no cosine
        assert attribution.absorbed(torch.tensor([z]), g, p[None], W).item() == want, z

def test_integrated_gradients_sum_to_the_metric(spelling_lm):
    """Effects of all latents add up to what their codes change in the metric, the logit of the letter less the mean of the
    25 others; logits are those of the model itself."""
    model, tokenizer, blocks = lm.load(spelling_lm / "model", "tiny", torch.device("cpu"), torch.float32)
    prefix, suffix, ids = [5, 9, 30], [7, 8], torch.tensor([40, 41, 42, 43])
    speller = attribution.Speller(model, blocks[1], prefix, suffix, list(range(100, 126)))
    whole = torch.tensor([[*prefix, int(i), *suffix] for i in ids])
    x = lm.residual_stream(model, blocks[1], whole.numpy())[:, len(prefix)]
    with torch.no_grad():
        want = model(input_ids=whole).logits[:, -1, 100:126]
        assert torch.allclose(speller.logits(ids, x), want, atol=1e-5)
        change = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.02
        before = speller.logits(ids, x - change)
    g, right = speller.gradient(ids, x, change, torch.full((4,), 3))
    metric = lambda logits: logits[:, 3] - torch.cat([logits[:, :3], logits[:, 4:]], 1).mean(1)
    assert torch.allclose((g * change).sum(1), metric(want - before), atol=1e-4, rtol=1e-2)
    assert (right == (want.argmax(1) == 3)).all()

# --- what is true of a Python program -------------------------------------------------------------

SOURCE = '''"""Doc."""
import os.path as p  # imp\u00e9
from x import (y, z)
@deco.rator(1)
class A(B):
    "Second."
    def f(self, \u00e9="\u00e9", *a):
        return g(self.h(k=[1, (a)]), "str") + \u00e9.b
'''

def test_spans_of_a_program_by_hand():
    spans = {task: [(SOURCE[lo:hi], name) for lo, hi, name in found]
             for task, found in roles.python_spans(SOURCE).items()}
    assert spans["role"] == [
        ("os", "imported"), ("path", "imported"), ("p", "imported"), ("x", "imported"), ("y", "imported"),
        ("z", "imported"), ("deco", "decorator"), ("rator", "decorator"), ("A", "class name"), ("B", "variable"),
        ("f", "def name"), ("self", "argument"), ("\u00e9", "argument"), ("a", "argument"), ("g", "called"),
        ("self", "variable"), ("h", "called"), ("k", "keyword argument"), ("a", "variable"), ("\u00e9", "variable"),
        ("b", "attribute")]
    kinds = [pair for pair in spans["kind"] if pair[1] != "code"]
    assert kinds == [('"""Doc."""', "docstring"), ("# imp\u00e9", "comment"), ('"Second."', "docstring"),
                     ('"\u00e9"', "string"), ('"str"', "string")]
    lexical = dict(spans["lexical"])
    assert [lexical[word] for word in ("def", "f", '"str"', "1", "+", "@")] == [
        "keyword", "identifier", "string", "number", "operator", "operator"]
    depth = dict(spans["depth"])                               # of a word the last that stands there
    assert [depth[word] for word in ("import", "y", "self", "k", "1", "b")] == ["0", "1", "1", "2+", "2+", "0"]

def test_labels_of_tokens():
    """Those of all their characters that are not blank; of two classes, or of a part alone: none."""
    text, names = "ab  cd e", {}
    offsets = [(0, 2), (0, 3), (2, 4), (2, 6), (1, 5), (5, 8), (4, 5), (7, 7)]
    got = probing.token_labels(text, offsets, [(0, 2, "x"), (4, 6, "y")], names)
    assert got.tolist() == [0, 0, -1, 1, -1, -1, 1, -1] and names == dict(x=0, y=1)
    assert probing.token_labels("", [], [], names).tolist() == []

def test_scores_of_a_probe():
    from sklearn.metrics import roc_auc_score
    g = torch.Generator().manual_seed(0)
    y = torch.rand(300, generator=g) < 0.3
    logit = (torch.randn(300, generator=g) + y).mul(2).round()               # with many ties
    got = probing.score(logit, y)
    assert abs(got["auc"] - roc_auc_score(y, logit)) < 1e-9
    assert abs(got["accuracy"] - ((logit > 0) == y).float().mean().item()) < 1e-6

class Words:
    """A tokenizer of words between spaces; its ids are numbers in the text."""
    is_fast, eos_token_id, bos_token_id = True, None, None
    get_vocab = dict
    def __call__(self, text, **kw):
        ends = np.cumsum([len(word) + 1 for word in text.split(" ")])
        return SimpleNamespace(input_ids=[int(word) if word.isdigit() else 0 for word in text.split(" ")],
                               offset_mapping=[(end - len(word) - 1, end - 1) for word, end in zip(text.split(" "), ends)])

def test_examples_are_balanced_and_split_by_file():
    """40 files of a topic each: no file in two parts, no more of one class than of the others together."""
    rng, documents = np.random.default_rng(0), []
    for f in range(40):
        words = rng.integers(1000 * f, 1000 * f + 10, 300).astype(str)
        ends = np.cumsum([len(w) + 1 for w in words])
        spans = [(e - len(w) - 1, e - 1, "abc"[rng.choice(3, p=[0.1, 0.3, 0.6])]) for w, e in zip(words, ends)]
        documents.append((" ".join(words), str(f), dict(task=spans), f"topic {f % 2}"))
    ids, part, tasks = probing.contexts(documents, Words(), 16, [7])
    assert (ids[:, 0] == 7).all() and ids.shape == (40 * 20, 16) and tasks["package"][0] == ["topic 0", "topic 1"]
    files = [set((ids[part == p, 1:] // 1000).ravel()) for p in range(3)]
    assert list(map(len, files)) == [24, 8, 8] and not files[0] & files[1] and not files[0] & files[2]
    assert ((ids[:, 1] // 1000 % 2) == tasks["package"][1]).all()
    names, label = tasks["task"]
    assert (label[:, 0] == -1).all() and (label[:, 1:] >= 0).all()
    found = probing.examples(label.ravel(), part.repeat(16), 3)
    for c, sets in found.items():
        for p, (rows, y) in enumerate(sets):
            assert y.sum() * 2 == len(y) <= 2 * probing.MOST[p] and (part[rows // 16] == p).all()
            assert ((torch.from_numpy(label.ravel())[rows] == c) == y).all()

@pytest.fixture(scope="module")
def tokens():
    """3000 tokens of three classes: task `context`, which no id tells, and `identity`, which the id is. x [N, 8]: noise
    but for coordinate 0, 1 for the first class of the one, and 1, for that of the other."""
    g = torch.Generator().manual_seed(0)
    context, ids = torch.randint(0, 3, (2, 3000), generator=g)
    x = torch.randn(3000, 8, generator=g)
    x[:, 0], x[:, 1] = (context == 0).float(), (ids == 0).float()
    part = np.arange(3000) // 10 % 3
    return x, {name: SimpleNamespace(names=list("abc"), label=label, classes=probing.examples(label.numpy(), part, 3), share=None,
                                     ids=ids[:, None], odds=probing.log_odds(
                                         ids[:, None].numpy(), np.where(part == 0, label, -1), 3))
               for name, label in dict(context=context, identity=ids).items()}

def test_planted_codes(tokens):
    """A code that is the label scores 1 at k = 1, for that class, and the noise chance. What the id tells is not counted:
    the probe of all activations does not beat it."""
    x, tasks = tokens
    found, best, l0 = probing.measure(lambda x: x * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), x, tasks)
    assert found["context"]["a"][1] == found["identity"]["a"][1] == dict(accuracy=1, f1=1, auc=1)
    assert best["context"]["0"] == ["a", 1, 1] and best["identity"]["1"] == ["a", 1, 1]
    noise, *_ = probing.measure(lambda x: x[:, 2:], x, tasks)
    for by in [*noise["context"].values(), *noise["identity"].values()]:
        assert all(abs(by[k]["accuracy"] - 0.5) < 0.09 for k in (1, 2, 5, "all"))
    token = probing.by_task(tasks, lambda t, *rest: {"all": probing.token_probe(tasks[t], *rest)})
    assert min(c["all"]["accuracy"] for c in token["identity"].values()) == 1
    assert max(c["all"]["accuracy"] for c in token["context"].values()) < 0.6
    beside = probing.besides(x, tasks)
    assert beside["counted"] == ["context"] and set(beside) == {"token", "full", "residual", "counted", "scored"}
    assert beside["scored"]["context"] == min(2 * (label == c).sum() for label in [tasks["context"].label[
        torch.arange(3000) // 10 % 3 == 2]] for c in range(3))
    means = probing.summary(found, beside["counted"])
    assert means["1"]["accuracy"] == means["1"]["tasks"]["context"] < 0.9 and means["1"]["tasks"]["identity"] < 0.9

def test_standard_error_of_a_mean_of_tasks():
    """Of two tasks with three and four classes: by hand, and as draws of the classes scatter. A task of two classes has none:
    each is the other turned round."""
    rng = np.random.default_rng(0)
    draw = lambda: dict(one=rng.normal(0.6, 0.2, 3), two=rng.normal(0.9, 0.01, 4))
    of = lambda d: probing.summary({t: {c: {1: dict(accuracy=float(a), f1=0.0, auc=0.0)} for c, a in enumerate(v)}
                                    for t, v in d.items()}, ["one", "two"])["1"]
    d = draw()
    assert of(d)["accuracy_se"] == pytest.approx(np.sqrt(d["one"].var(ddof=1) / 3 + d["two"].var(ddof=1) / 4) / 2)
    every = [of(draw()) for _ in range(2000)]
    assert np.mean([e["accuracy_se"] ** 2 for e in every]) == pytest.approx(np.var([e["accuracy"] for e in every]), rel=0.15)
    assert np.isnan(of(dict(one=d["one"], two=d["two"][:2]))["accuracy_se"])

def test_odds_of_tokens_by_hand():
    """All labelled tokens count, classes alike: of class 0 id 1 has 2 of 4, of the others 1 / 2 and 0 / 1, their mean of 4: 1."""
    ids, label = np.array([1, 1, 2, 2, 1, 3, 4, 5])[:, None], np.array([0, 0, 0, 0, 1, 1, 2, -1])
    odds = probing.log_odds(ids, label, 3)
    assert odds.shape == (3, 6) and odds[:, 5].tolist() == [0, 0, 0]
    assert torch.allclose(odds[0], torch.tensor([0, np.log(3 / 2), np.log(3 / 1), np.log(1 / 2), np.log(1 / 3), 0]).double())

def test_position_0_and_outliers_stand_nowhere(monkeypatch):
    """Of contexts of 4 tokens, one with an outlier: x has the others alone, as have labels, ids and the means of whole
    contexts, of sparse codes and of dense ones."""
    ids, part = np.arange(60 * 4, dtype=np.int32).reshape(60, 4), np.repeat([0, 1, 2], 20)
    whole, label = np.arange(60) % 2, np.arange(60 * 4).reshape(60, 4) // 3 % 2
    monkeypatch.setattr(probing, "FEWEST", (1, 1, 1))
    tasks = dict(token=(["a", "b"], label), package=(["c", "d"], whole))
    monkeypatch.setattr(probing, "contexts", lambda *rest: (ids, part, tasks))
    def stream(model, block, piece):
        x = torch.from_numpy(piece).float()[..., None] % 7 + torch.tensor([1.0, 0])
        x[:, 0], x[torch.from_numpy(piece) == 2] = 1e4, 1e4
        return x
    monkeypatch.setattr(probing.lm, "residual_stream", stream)
    x, tasks = probing.prepare([], None, Words(), None, 100, 4)
    kept = (ids % 4 > 0) & (ids != 2)
    assert x.shape == (60 * 3 - 1, 2) and x.max() < 10 and (x[:, 1].numpy() == ids[kept] % 7).all()
    assert (tasks["token"].label.numpy() == label[kept]).all() and (tasks["token"].ids[:, 0].numpy() == ids[kept]).all()
    for rows, y in tasks["token"].classes[1]:
        assert ((tasks["token"].label[rows] == 1) == y).all()
    Z = x.float() * (x > 3)
    want = torch.stack([Z[torch.from_numpy(np.nonzero(kept)[0] == c)].mean(0) for c in range(60)])
    for codes in (Z, Z.to_sparse().coalesce()):
        assert torch.allclose(probing.averaged(codes, tasks["package"].share), want)
    assert tasks["package"].label.tolist() == whole.tolist() and tasks["package"].ids.shape == (60, 4)

def test_a_control_is_as_sparse_as_its_run():
    """Within a tenth and half a latent; shared by L0s that are alike, and never above the latents there are."""
    for l0 in np.geomspace(1, 300, 200):
        F, k = probes.alike(1000, l0)
        assert F == 1000 and abs(k - l0) <= 0.1 * l0 + 0.5
    assert probes.alike(1000, 31) == probes.alike(1000, 33.5) == (1000, 32) != probes.alike(1000, 64)
    assert probes.alike(4, 50) == (4, 4) and probes.alike(9, 0)[1] == 1

# --- the language model ---------------------------------------------------------------------------

def test_words_after_a_shared_prefix_are_as_if_run_alone(tiny_lm):
    """The key-value cache changes nothing, at any layer."""
    model, _, blocks = lm.load(tiny_lm, str(tiny_lm), torch.device("cpu"), torch.float32)
    prefix, ids = [5, 9, 200, 31, 7], torch.arange(260, 300)
    for layer in (0, 1, 3):
        got = first_letter.activations(model, blocks[layer], prefix, ids)
        alone = np.array([[*prefix, i] for i in ids.tolist()])
        assert torch.allclose(got, lm.residual_stream(model, blocks[layer], alone)[:, -1], atol=1e-5)

@pytest.fixture(scope="session")
def spelling_lm(tmp_path_factory):
    """A random causal LM whose tokens are words, and whose embeddings have a direction for each first letter; a text."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder, rng = tmp_path_factory.mktemp("spelling"), np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list(first_letter.LETTERS), rng.integers(4, 7))) for _ in range(2600)})
    (folder / "t.txt").write_text(" ".join(rng.choice(words, 4000)))
    tokens = ["<|endoftext|>", "\n", ":", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "has", "the", "first", "letter", *words]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(dict.fromkeys(tokens))}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=2, hidden_size=48, num_attention_heads=4,
                                               num_key_value_heads=2, intermediate_size=64, vocab_size=2700,
                                               bos_token_id=0, eos_token_id=0, pad_token_id=0))
    for i, t in enumerate(dict.fromkeys(tokens)):
        if t in words:
            model.get_input_embeddings().weight.data[i, first_letter.LETTERS.index(t[0])] += 0.5
    model.save_pretrained(folder / "model")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                               bos_token="<|endoftext|>").save_pretrained(folder / "model")
    return folder

@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()                               # a recorded one that is gone is not used
    return str(tmp_path / "cache")

def run(*argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    return stop.value.code

@pytest.fixture
def few(monkeypatch):
    """Little text and one task for k-sparse probing, and shorter training of the probes of letters."""
    files = itertools.islice(roles.standard_library(), 12)
    documents = [(text, group, dict(lexical=spans["lexical"]), None) for text, group, spans, _ in files]
    monkeypatch.setattr(roles, "standard_library", lambda: documents)
    monkeypatch.setattr(probing, "FEWEST", (10, 2, 4))
    monkeypatch.setattr(first_letter, "STEPS", dict(first_letter.STEPS, epochs=8))

def test_the_command(spelling_lm, capsys, monkeypatch, tmp_path, cache, few):
    """An SAE that reads each letter's coordinate: the tables, evaluation.json, probes.json; a second call computes
    nothing, a changed SAE all anew, and another run takes the controls that are there."""
    flags = dict(model=str(spelling_lm / "model"), text=str(spelling_lm / "t.txt"), layer=1, context=16,
                 cache_dir=cache)
    eye = torch.eye(48)[:, :26].contiguous()
    path = save(tmp_path / "letters", eye, eye.T, b_enc=torch.full((26,), -0.2), flags=flags)
    other = save(tmp_path / "other", eye, eye.T, flags=flags)
    assert run(path, "--probes", "--cones", "--contexts", 0) == 0
    out = capsys.readouterr().out
    cones = json.loads((path / "evaluation.json").read_text())["cones"]
    assert cones["first letters"]["references"] == 26 and cones["roles of tokens"]["references"] > 2
    assert "Concept cones: first letters" in out and "Concept cones: roles of tokens" in out
    row = json.loads((path / "evaluation.json").read_text())["first_letter"]
    assert "k-sparse probing by task" in out
    both = json.loads((path / "evaluation.json").read_text())
    assert 0.3 < both["probing"]["1"]["tasks"]["lexical"] <= 1 and "operator" in both["probing"]["classes"]["lexical"]
    assert "First letters: absorption" in out and "a b c d e f g h i j k l" in out
    assert row["f1_first"] > 0.9 and row["absorption"] < 0.1 and len(row["letters"]) == 26
    assert row["controls"]["shuffled"]["f1_first"] < 0.3
    assert row["controls"]["untrained"]["f1_first"] < row["f1_first"]
    assert row["latents"]["16"][0] == "q" and "latents" not in row["controls"]["untrained"]
    assert row["letters"]["q"]["latents"][0] == first_letter.LETTERS.index("q")
    harvest = first_letter.harvest
    with monkeypatch.context() as no:
        no.setattr(first_letter, "harvest", None), no.setattr(probing, "prepare", None)
        assert run(path, "--probes", "--cones", "--contexts", 0) == 0
    assert json.loads((path / "evaluation.json").read_text())["cones"] == cones
    assert json.loads((path / "evaluation.json").read_text())["probing"] == both["probing"]
    assert json.loads((path / "evaluation.json").read_text())["first_letter"] == row
    calls = []
    monkeypatch.setattr(first_letter, "harvest", lambda *rest: calls.append(1) or harvest(*rest))
    task = first_letter.task
    monkeypatch.setattr(first_letter, "task", lambda *rest: calls.append(2) or task(*rest))
    assert run(path, other, "--probes", "--contexts", 0) == 0
    assert calls == [1, 2]                                     # no task of shuffled letters
    dense = json.loads((other / "evaluation.json").read_text())["probing"]["beside"]
    for name in both["probing"]["beside"]:                     # only the random dictionary is that of each L0
        assert (dense[name] == both["probing"]["beside"][name]) == (name != "untrained")
    sae = SAE(path)
    stored = lambda facts=(): probes.Stored("first_letter", sae, [*facts], first_letter.__file__).result
    assert not stored()                                        # other facts
    (path / "probes.json").write_text("{")
    probes.Stored("first_letter", sae, [], first_letter.__file__).put(dict(a=float("nan")))
    assert stored() == dict(a=None) and not stored(["of another model"])
    class Other(SAE):                                          # another encoder
        pass
    assert not probes.Stored("first_letter", Other(path), [], first_letter.__file__).result
    (path / "sae_weights.safetensors").write_bytes(b"another")
    assert not stored()

@pytest.mark.parametrize("tiny_lm", ["gpt2"], indirect=True)
def test_models_without_words(tiny_lm, text, one_line, few, cache, tmp_path):
    flags = dict(model=str(tiny_lm), text=str(text), layer=2, context=16, cache_tokens=2000,
                 cache_dir=cache)
    path = save(tmp_path / "few", torch.eye(32), torch.eye(32), flags=flags)
    one_line(lambda: evaluate.main([str(path), "--probes", "--contexts", "0"]), "--probes", "1,000", "leave --probes out")
    row = json.loads((path / "evaluation.json").read_text())
    assert "first_letter" not in row and row["probing"]["beside"]["token"]    # all else is measured
    toy = save(tmp_path / "toy", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="song"))
    one_line(lambda: evaluate.main([str(toy), "--probes"]), "--probes", "toy", "has no words")
    assert (toy / "evaluation.json").exists()

def test_latents_for_the_page():
    """Some of every firing rate, and the best at each class that any detects, by F1."""
    row = dict(first_letter=dict(latents={"3": ["s", 0.9, 0.5], "5": ["s", 0.7, 0.7]}),
               probing=dict(latents=dict(role={"3": ["argument", 0.9, 0.9]}, kind={"4": ["string", 1.0, 0.2]})))
    known = latents.detects(row)
    assert known == {3: [("role", "argument", 0.9, 0.9), ("letter", "s", 0.9, 0.5)], 5: [("letter", "s", 0.7, 0.7)],
                     4: [("kind", "string", 1.0, 0.2)]} and latents.detects({}) == {}
    args, rate = SimpleNamespace(features=None, html="p.html", html_features=2), torch.tensor([5.0, 4, 3, 2, 1, 0])
    assert latents.chosen(None, args, rate, rate, known) == [0, 4, 3, 5]

def write_labels(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path

def test_labels_of_a_user(spelling_lm, capsys, cache, few, tmp_path):
    """Words of which some are labelled by their first letter: the SAE that reads letters has a latent for each class."""
    flags = dict(model=str(spelling_lm / "model"), text=str(spelling_lm / "t.txt"), layer=1, context=16,
                 cache_dir=cache)
    eye = torch.eye(48)[:, :26].contiguous()
    path = save(tmp_path / "letters", eye, eye.T, b_enc=torch.full((26,), -0.2), flags=flags)
    words, rows = (spelling_lm / "t.txt").read_text().split(), []
    for i in range(0, 4000, 40):
        text = " ".join(words[i:i + 40])
        starts = np.cumsum([0] + [len(w) + 1 for w in words[i:i + 39]])
        rows.append(dict(text=text, labels=dict(letter=[[int(lo), int(lo) + len(w), w[0]] for lo, w in zip(
            starts, words[i:i + 40]) if w[0] in "abc"])))
    labels = write_labels(tmp_path / "l.jsonl", rows)
    assert run(path, "--probes", "--contexts", 0, "--labels", labels) == 0
    result = json.loads((path / "evaluation.json").read_text())["probing"]
    assert set(result["classes"]["letter"]) == set("abc") and result["1"]["tasks"]["letter"] > 0.9
    assert result["beside"]["residual"]["1"]["tasks"]["letter"] > 0.9
    assert "letter" in capsys.readouterr().out
    assert run(path, "--probes", "--contexts", 0, "--labels", tmp_path / "none") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--labels" in error and "No such file" in error

@pytest.mark.parametrize("row, words", [
    (dict(text="one two", labels=dict(t=[[0, 3, "x"], [2, 7, "y"]])), "[0, 3] overlaps the label that starts at 2"),
    (dict(text="one two", labels=dict(t=[[4, 8, "x"]])), "[4, 8] lies outside the text of 7"),
    (dict(text="one two", labels=dict(t=[[-1, 2, "x"]])), "outside"), (dict(text="one", labels=dict(t=[[2, 2, "x"]])), "empty"),
    (dict(text="one", labels=[]), "not {"), (dict(labels={}), "not {"), (dict(text=5, labels={}), "not {")])
def test_bad_labels(row, words, one_line, tmp_path):
    path = write_labels(tmp_path / "l.jsonl", [dict(text="a", labels={}), row])
    one_line(lambda: list(roles.labelled(path)), "--labels", "line 2", words)

def test_bad_flags_of_probes(one_line, tmp_path):
    one_line(lambda: list(roles.labelled(tmp_path / "none")), "--labels", "No such file")
    one_line(lambda: evaluate.parse_args(["a", "--labels", "l"]), "--labels", "--probes", "--cones")
    slow = SimpleNamespace(is_fast=False)
    one_line(lambda: probing.contexts([], slow, 16, []), "--probes", "no offsets")
    one_line(lambda: probing.prepare([], None, Words(), None, 1, 16), "two classes or more")

# --- benchmarks/ground_truth.py and which_l0.py ---------------------------------------------------

def measured(l0, shuffled, absorption=0.1):
    """What a benchmark keeps of a run of this L0; the letters were shuffled for a run with the L0 `shuffled`."""
    letters = lambda l0: dict(l0=l0, absorption=absorption, full=0.2, absorption_raw=0.3, full_raw=0.3, attribution=0.0, f1_first=0.3)
    accuracy = {k: dict(accuracy=0.7) for k in ("1", "5", "all")}
    cone = dict(containment=[0.5] * 16, controls={n: dict(containment=[0.4] * 16) for n in ("random", "activations", "shuffled", "negated")})
    return dict(l0=l0, fvu=0.1, dead=0.0, c_dec=0.1, s_n=1 / l0, cones={"first letters": cone, "roles of tokens": cone},
                first_letter=letters(l0) | dict(letters={"a": {}}, controls=dict(
                    untrained=letters(l0), coordinates=letters(576.0), shuffled=letters(shuffled))),
                probing=accuracy | dict(beside=dict(untrained=accuracy, residual=accuracy, token=dict(all=accuracy["1"]),
                                                    full=dict(all=accuracy["1"]), counted=["role"])))

def test_the_tables_of_ground_truth(monkeypatch, tmp_path, capsys):
    """A number that there is not costs its cell alone; shuffled letters stand in the tables of their L0; controls of letters
    and of cones have names of their own."""
    bench = importlib.import_module("benchmarks.ground_truth")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    runs = {name: measured(l0 := float(name.split("-")[-2]), 32.0, None if name == "6-topk-32-s1" else 0.1 + l0 / 1000)
            for name in bench.RUNS if name.startswith("6-topk-") or name == "6-vanilla-16-s0"}
    runs["6-vanilla-16-s0"]["first_letter"]["absorption"] = None
    (tmp_path / "ground-truth.json").write_text(json.dumps(dict(machine="m", runs=runs)))
    bench.report(None)
    tables = capsys.readouterr().out.split("**Layer ")[1:]
    cells = lambda table, name: next(line for line in table.splitlines() if line.startswith(f"| {name} |")).split(" | ")
    assert [t.split("**")[0] for t in tables] == ["6, L0 32", "6, L0 16", "6, L0 64"]
    assert ["*letters shuffled*" in t for t in tables] == [True, False, False]
    assert all("*references permuted*" in t and "*shuffled*" not in t for t in tables)
    assert cells(tables[0], "topk")[3:5] == ["32.0 \u00b1 0.0", "0.132 \u00b1 0.000"]
    assert cells(tables[1], "vanilla")[4] == "\u2013"
    assert tables[0].splitlines()[2].startswith("| | L0 | FVU | L0 on words | absorption |")

def test_results_of_runs_are_kept(tmp_path, monkeypatch):
    """--keep makes what the results lack, and writes it beside what they have; without it all is made and written anew."""
    trained = importlib.import_module("benchmarks.ground_truth").trained
    path, keep, anew = tmp_path / "found.json", argparse.Namespace(keep=True), argparse.Namespace(keep=False)
    for machine, args, rows in (("one", anew, dict(a=1)), ("two", keep, dict(b=2)), ("two", keep, {})):
        monkeypatch.setattr(trained, "machine", lambda: machine)
        trained.write(args, rows, path)
    trained.write(anew, {}, path)                              # nothing measured: nothing lost
    assert json.loads(path.read_text()) == dict(machine="one; two", runs=dict(a=1, b=2))
    assert [*trained.left(keep, dict(a=0, b=0, c=0), path)] == ["c"] and len(trained.left(anew, dict(a=0, b=0), path)) == 2
    assert trained.evaluate(tmp_path, ["not there"]) == {}
    trained.write(anew, dict(c=3), path)
    assert json.loads(path.read_text()) == dict(machine="two", runs=dict(c=3))

def test_which_l0_without_a_run(monkeypatch, tmp_path, capsys):
    """One run and one number are missing: the others keep their seeds; a lowest value at the first or last k says so."""
    bench = importlib.import_module("benchmarks.which_l0")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    runs = {name: measured(k := float(name.split("-")[0]), k) | dict(
        fvu=1 / k, c_dec=abs(k - (64 if name.endswith("s2") else 32))) for name in bench.RUNS}
    del runs["32-s0"]
    runs["8-s1"]["c_dec"] = None
    (tmp_path / "which-l0.json").write_text(json.dumps(dict(machine="m", runs=runs)))
    bench.report(None)
    out = capsys.readouterr().out
    assert "FVU: lowest at k = 256 (at the edge), 256 (at the edge), 256 (at the edge)" in out
    assert "c_dec: lowest at k = 16, 32, 64;" in out and "| 32 | 0.0312 (0.0000) |" in out and "absorption, untrained" in out
    assert (tmp_path / "which-l0.png").exists()
