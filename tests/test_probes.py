"""evaluate.py --probes: planted truths and controls, the definitions worked by hand, the command, and bad input."""
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import evaluate
from conftest import random_lm
from evaluation import first_letter, probes
from sources import lm
from test_evaluate import save

# --- tools ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regressions_are_those_of_scikit_learn(balanced):
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 400, 4, generator=g) * torch.tensor([1.0, 30, 0.1, 5]) + 7
    y = (X[..., 0] + X[..., 2] * 8 + torch.randn(3, 400, generator=g) * 3 > torch.tensor([[7.0], [9], [12]]) + 56).float()
    w, b = probes.logistic(X, y, C=0.5, balanced=balanced)
    for i in range(3):
        want = LogisticRegression(C=0.5, class_weight="balanced" if balanced else None, solver="newton-cholesky",
                                  tol=1e-10, max_iter=1000).fit(X[i].double().numpy(), y[i].numpy())
        assert np.allclose(w[i], want.coef_[0], atol=1e-5) and abs(b[i] - want.intercept_[0]) < 1e-4

def test_scores_by_hand():
    said, y = (torch.tensor(v) > 0 for v in ([[1, 1, 0, 0, 1], [0] * 5], [[1, 0, 0, 1, 1], [1] * 5]))
    precision, recall, f1 = probes.scores(said, y)
    assert torch.allclose(f1, torch.tensor([2 / 3, 0]).double()) and precision.tolist() == [2 / 3, 0]
    assert recall.tolist() == [2 / 3, 0]

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
    return first_letter.task(x, letter), x, letter

def test_planted_absorption_is_found(planted):
    """A latent for each letter and child: nothing absorbed. The same where a letter's latent is silent beside a child,
    and a latent for each pair has the letter in its direction: 40 % absorbed, fully. Rows have norms other than 1."""
    words, x, letter = planted
    assert len(words.passed) == 26 and words.f1.min() > 0.95
    eye = torch.eye(26 + CHILDREN)
    honest = first_letter.measure(lambda x: x * (x > 0.5) / 3, 3 * eye, words, words.passed)
    pairs = torch.cat([eye[:26], (eye[:26, None] + eye[26:]).flatten(0, 1)])                     # (26 + 520, 46)
    def absorbing(x):
        on = (x > 0.5).float()
        alone = on[:, :26] * (1 - on[:, 26:].sum(1, keepdim=True))
        return torch.cat([alone, (on[:, :26, None] * on[:, None, 26:]).flatten(1)], 1) / 2
    absorbed = first_letter.measure(absorbing, 2 * pairs, words, words.passed)
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
    result = first_letter.measure(split, torch.eye(46)[:26].repeat(2, 1), words, words.passed)
    assert result["split"] == 2 and result["absorption"] < 0.02 and result["f1_main"] > 0.99

def test_controls_know_nothing(planted):
    """Shuffled letters: no letter passes, latents that are the letters say nothing. A random dictionary, as sparse."""
    words, x, letter = planted
    shuffled = first_letter.task(x, letter[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))])
    assert not shuffled.passed
    nothing = first_letter.measure(lambda x: x * (x > 0.5), torch.eye(46), shuffled, words.passed)
    assert nothing["f1_first"] < 0.12
    random = first_letter.measure(*probes.untrained(46, 2, x.mean(0)), words, words.passed)
    assert random["f1_first"] < 0.8 and random["l0"] <= 2      # the letters themselves: above 0.99

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

def run(*argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    return stop.value.code

def test_the_command(spelling_lm, capsys, monkeypatch, tmp_path):
    """An SAE that reads each letter's coordinate: the tables, evaluation.json, probes.json; a second call computes
    nothing, a changed SAE all anew, and another run takes the controls that are there."""
    flags = dict(model=str(spelling_lm / "model"), text=str(spelling_lm / "t.txt"), layer=1, context=16,
                 cache_dir=str(tmp_path / "cache"))
    eye = torch.eye(48)[:, :26].contiguous()
    path = save(tmp_path / "letters", eye, eye.T, b_enc=torch.full((26,), -0.2), flags=flags)
    other = save(tmp_path / "other", eye, eye.T, flags=flags)
    assert run(path, "--probes", "--contexts", 0) == 0
    out = capsys.readouterr().out
    row = json.loads((path / "evaluation.json").read_text())["first_letter"]
    assert "First letters: absorption" in out and "a b c d e f g h i j k l" in out
    assert row["f1_first"] > 0.9 and row["absorption"] < 0.1 and len(row["letters"]) == 26
    assert row["controls"]["shuffled"]["f1_first"] < 0.3
    assert row["controls"]["untrained"]["f1_first"] < row["f1_first"]
    assert row["letters"]["q"]["latents"][0] == first_letter.LETTERS.index("q")
    harvest = first_letter.harvest
    monkeypatch.setattr(first_letter, "harvest", None)
    assert run(path, "--probes", "--contexts", 0) == 0
    assert json.loads((path / "evaluation.json").read_text())["first_letter"] == row
    calls = []
    monkeypatch.setattr(first_letter, "harvest", lambda *rest: calls.append(1) or harvest(*rest))
    task = first_letter.task
    monkeypatch.setattr(first_letter, "task", lambda *rest: calls.append(2) or task(*rest))
    assert run(path, other, "--probes", "--contexts", 0) == 0
    assert calls == [1, 2]                                     # no task of shuffled letters
    (path / "probes.json").write_text("{")
    assert run(path, "--probes", "--contexts", 0) == 0 and calls == [1, 2, 1, 2, 2]
    assert json.loads((path / "evaluation.json").read_text())["first_letter"] == row

@pytest.mark.parametrize("tiny_lm", ["gpt2"], indirect=True)
def test_models_without_words(tiny_lm, text, one_line, capsys, tmp_path):
    flags = dict(model=str(tiny_lm), text=str(text), layer=2, context=16, cache_tokens=2000,
                 cache_dir=str(tmp_path / "cache"))
    path = save(tmp_path / "few", torch.eye(32), torch.eye(32), flags=flags)
    one_line(lambda: evaluate.main([str(path), "--probes", "--contexts", "0"]), "--probes", "1,000", "leave --probes out")
    assert "first_letter" not in json.loads((path / "evaluation.json").read_text())      # all else is measured
    toy = save(tmp_path / "toy", torch.eye(16), torch.eye(16), flags=dict(model="toy", toy="song"))
    one_line(lambda: evaluate.main([str(toy), "--probes"]), "--probes", "toy", "has no words")
    assert (toy / "evaluation.json").exists()
