"""applications/reward.py: pairs made with a reason, split and refused; a planted latent that a head finds; attribution and
edits against plain sums; answers read in batches against one by one; the command and its page in a real browser."""
import importlib
import json
import re
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from applications import reward
from conftest import random_lm
from evaluation import answers, deciding, preferences, probing
from sources import lm
from test_evaluate import save
from test_page import ODD, Tags, looks_right, started                        # noqa: F401 (a fixture)
from test_steer import D, WORDS, planted as planted_model                   # noqa: F401 (a fixture)

CPU = torch.device("cpu")

# --- pairs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A folder of a few files of the standard library."""
    folder = tmp_path_factory.mktemp("some")
    for name in ("argparse bdb calendar cmd code codeop configparser copy csv dis fileinput fractions ftplib gzip imaplib "
                 "mailbox pdb shelve shutil statistics tarfile textwrap trace zipfile").split():
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", folder)
    return str(folder)

@pytest.mark.parametrize("attribute", preferences.ATTRIBUTES)
def test_made_pairs_differ_in_their_attribute_alone(attribute, some):
    make = lambda seed: preferences.make("--make", [attribute], 10, some, seed)
    made = make(3)
    assert made == make(3) != make(4)
    assert len({p["prompt"] for p in made}) == 10 and len({p["group"] for p in made}) >= 2
    files = preferences.python_files(some)
    assert len(files) > 20 and not {"/".join(p.parts[-3:]) for p in files[:len(files) // 3]} & {p["group"] for p in made}
    for p in made:
        chosen, rejected = p["chosen"].split("\n"), p["rejected"].split("\n")
        assert min(map(len, (p["chosen"], p["rejected"]))) >= 40 and p["chosen"][-1] == p["rejected"][-1] == "\n"
        n = min(len(chosen), len(rejected)) - 1
        chosen, rejected = chosen[:n], rejected[:n]
        if attribute == "documented":
            assert chosen[0].strip()[0] in "\"'r" and chosen[0] != rejected[0]
        elif attribute == "commented":
            assert "#" in p["chosen"] and "# " not in p["rejected"]
        elif attribute == "closed":
            short = [b for a, b in zip(chosen, rejected) if a != b]
            assert short and all(len(a) >= len(b) for a, b in zip(chosen, rejected))
        elif attribute == "indented":
            assert [l.strip() for l in chosen] == [l.strip() for l in rejected] and chosen != rejected
        else:
            assert [len(re.findall(r"\w+", l)) for l in chosen] == [len(re.findall(r"\w+", l)) for l in rejected]
            assert chosen != rejected

@pytest.mark.claims
@pytest.mark.parametrize("attribute", preferences.ATTRIBUTES)
def test_length_hardly_tells_and_there_are_enough(attribute):
    """600 pairs of each attribute; of the chosen answers a third to three quarters are the longer ones."""
    made = preferences.make("--make", [attribute], 600)
    assert len({p["group"] for p in made}) > 60
    assert 0.33 < np.mean([len(p["chosen"]) > len(p["rejected"]) for p in made]) < 0.75

def test_a_change_by_hand():
    """What each change leaves of one function, but for the places that are drawn."""
    code = ('def f(a, b):\n    """Of a\n    and b."""\n    # first\n    c = [a, "#"]  # second\n    d = g(c, (b))\n'
            '    return h(a, d)\n')
    always = SimpleNamespace(random=lambda: 0, choice=lambda found: found[0], shuffle=list.reverse,
                             uniform=lambda low, high: high)
    of = {name: preferences.answers(code, change, always) for name, change in preferences.ATTRIBUTES.items()}
    body = code.partition("\n")[2]
    assert of["documented"][1] == body[body.index("    # first"):]
    assert of["commented"][1] == body.replace("    # first\n", "").replace("  # second", "")
    assert of["closed"][1].endswith('    c = [a, "#"  # second\n    d = g(c, (b\n    return h(a, d\n')
    assert of["indented"][1].endswith('\n # first\n c = [a, "#"]  # second\n d = g(c, (b))\n return h(a, d)\n'.replace(
        "\n # first", "\n    # first"))
    assert of["named"][1].endswith('    d = [a, "#"]  # second\n    b = g(c, (d))\n    return h(a, c)\n')
    assert preferences.answers("def f():\n    return 1\n", preferences.documented, always) is None

def test_a_mixture_has_as_many_of_each(some):
    made = preferences.make("--make", ["documented", "closed", "named"], 31, some)
    assert len({p["group"] for p in made}) >= 10
    assert sorted(sum(p["attribute"] == n for p in made) for n in ("documented", "closed", "named")) == [10, 10, 11]

def lines(n, **changed):
    rows = [dict(prompt=f"p{i}", chosen="yes", rejected="no") for i in range(n)]
    rows[3] |= changed
    return [json.dumps({k: v for k, v in row.items() if v is not ...}) for row in rows]

@pytest.mark.parametrize("text, words", [
    (lines(60, chosen=...), ["line 4", "chosen"]), (lines(60, rejected=5), ["line 4", '"rejected" is not a string']),
    (lines(60, chosen=" \n"), ["line 4", "empty"]), (lines(60, rejected="yes"), ["line 4", "same"]),
    (lines(60, attribute=["a"]), ["line 4", "attribute"]), (lines(60, attribute="all"), ["line 4", '"attribute" is "all"']),
    (lines(60, attribute="(none)"), ["line 4", '"attribute" is "(none)"']), (lines(60, prompt="\ud800"), ["line 4", "surrogate"]),
    ([*lines(60), "{"], ["line 61", "not JSON"]), ([*lines(60), "[]"], ["line 61", "object"]),
    ([*lines(60), b"\xff\xfe"], ["line 61", "not JSON"]), (lines(49), ["line 49", "49 pairs", "50"]), ([], ["line 1", "0 pairs"]),
    ([*lines(60), "[" * 100_000], ["line 61", "not JSON"]), (None, ["No such file", "--make"])])
def test_bad_pairs_cost_one_line(tmp_path, one_line, text, words):
    path = tmp_path / "p.jsonl"
    if text is not None:
        path.write_bytes(b"\n".join(t if isinstance(t, bytes) else t.encode() for t in text))
    one_line(lambda: preferences.read(path), str(path), *words)

def test_pairs_are_read(tmp_path):
    (tmp_path / "p").write_text("\n\n".join(lines(60, attribute="a", group="g")) + "\n")
    pairs = preferences.read(tmp_path / "p")
    assert [p.line for p in pairs] == list(range(1, 120, 2)) and pairs[3].attribute == "a" and pairs[2].group is None

def test_no_prompt_and_no_group_in_both_parts(one_line):
    rng = np.random.default_rng(0)
    pairs = [SimpleNamespace(prompt=f"p{rng.integers(200)}", group=f"g{rng.integers(60)}" if i % 3 == 0 else None)
             for i in range(400)]
    part, held = preferences.split("x", pairs, 0)
    for key in ("prompt", "group"):
        for value in {getattr(p, key) for p in pairs} - {None}:
            same = [i for i, p in enumerate(pairs) if getattr(p, key) == value]
            assert len(set(held[same])) == len(set(part[same])) == 1
    assert 0.1 < held.mean() < 0.6 and (preferences.split("x", pairs, 1)[1] != held).any()
    chain = [SimpleNamespace(prompt=f"p{i // 2}", group=f"g{(i + 1) // 2}") for i in range(100)]
    one_line(lambda: preferences.split("x", chain, 0), "x", "1 part")

def test_a_group_that_is_too_large_is_refused(one_line):
    """Held out, it leaves too few pairs to train on; trained on, too few are held out: which is drawn by the seed."""
    pairs = [SimpleNamespace(line=i + 1, prompt=f"p{i}", group="big" if i > 8 else None) for i in range(60)]
    for seed in range(4):
        one_line(lambda: preferences.split("x", pairs, seed), "x", "of 60 pairs are held out", "51 hang together", "line 10",
                 "(group big)")

# --- heads ----------------------------------------------------------------------------------------

def codes(n=300, F=40, seed=0):
    """z [2, n, F], sparse; every part of its own."""
    g = np.random.default_rng(seed)
    return g.exponential(1, (2, n, F)) * (g.random((2, n, F)) < 0.2), np.arange(n)

def test_a_head_minimises_bradley_terry():
    """Its w has the smallest -log sigmoid(margin) plus penalty: no small step is better; and turning a pair round, with its
    preference, changes nothing. L1 leaves weights out, and the others are fitted as without it."""
    z, _ = codes()
    d = z[0] - z[1] + 0.1
    loss = lambda w: (w ** 2).sum() / 2 + 3 * np.logaddexp(0, -d @ w).sum()
    w, g = reward.fitted(d, "L2", 3), np.random.default_rng(1)
    assert all(loss(w + 0.02 * g.standard_normal(w.shape)) > loss(w) for _ in range(200)) and loss(w) < loss(0 * w)
    assert np.allclose(reward.fitted(d[::-1], "L2", 3), w, atol=1e-3)
    assert not np.allclose(reward.fitted(d * np.where(np.arange(len(d)) % 2, 1, -1)[:, None], "L2", 3), w, atol=1e-2)
    w = reward.fitted(d, "L1", 0.3)
    on = np.flatnonzero(w)
    assert 0 < len(on) < 40 and np.allclose(w[on], reward.fitted(d[:, on], "L2", reward.REFIT))

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_latent_is_found_and_nothing_else(seed):
    """One latent decides, but for a tenth of the pairs, which are turned round: the head has this weight alone, positive.
    Control: of preferences at random it is not oftener right than wrong."""
    z, part = codes(900, seed=seed)
    z, g = z[:, z[0][:, 7] != z[1][:, 7]], np.random.default_rng(seed)
    part = np.arange(z.shape[1])
    better, held = (z[0] > z[1])[:, 7] ^ (g.random(len(part)) < 0.1), part % 3 == 0
    planted = np.where(better[:, None], z, z[::-1])
    head = reward.heads({"SAE": {"mean": planted}}, part, held)["SAE", "mean"]
    assert np.flatnonzero(head.w).tolist() == [7] and head.w[7] > 0 and head.penalty == "L1"
    assert 0.8 < deciding.accuracy(head.margin[held])[0] < 0.97
    low, high = deciding.accuracy(reward.heads({"SAE": {"mean": z}}, part, held)["SAE", "mean"].margin[held])[1:]
    assert low < 0.5 < high

@pytest.mark.parametrize("sparse, penalty, C", [(True, "L1", 0.03), (False, "L2", 1000)])
def test_only_a_sparse_head_pays_for_few_weights(monkeypatch, sparse, penalty, C):
    """Where more of L2 is right a little oftener, a dense input gets it; the sparse head the strongest penalty that is near."""
    d = np.ones((100, 2))
    d[:10, 0], d[:9, 1] = -1, -1
    monkeypatch.setattr(reward, "fitted", lambda d, penalty, c: np.array([c < 1000, c >= 1000], float))
    head = reward.bradley_terry(d, np.arange(100), sparse)
    assert (head.penalty, head.C) == (penalty, C)

def test_nothing_differs():
    head = reward.bradley_terry(np.zeros((60, 5)), np.arange(60), True)
    assert not head.w.any() and deciding.accuracy(np.zeros(10))[0] == 0.5
    a = deciding.Attribution(SimpleNamespace(w=head.w, margin=np.zeros(60)), np.zeros((2, 60, 5)), np.ones(60, bool), [None] * 60)
    assert a.carry() == 0 and a.of_pair(0) == [] and a.top("all", 3) == []
    said = reward.notes(head, [(3, 0.0)])
    assert len(said) == 2 and "no latents" in said[0] and "--edit 3=..." in said[1]
    head.w[:2] = 1
    assert reward.notes(head, [(1, 0.0)]) == []

def test_attribution_sums_to_the_margin():
    z, _ = codes()
    w, held = np.random.default_rng(2).standard_normal(40) * (np.arange(40) % 3 > 0), np.arange(300) % 2 == 0
    head = SimpleNamespace(w=w, margin=(z[0] - z[1]) @ w)
    a = deciding.Attribution(head, z, held, ["a" if i % 4 else None for i in range(300)])
    for i in range(300):
        assert abs(sum(v for _, v in a.of_pair(i)) - (z[0, i] @ w - z[1, i] @ w)) < 1e-6
    assert list(a.rows) == ["all", "(none)", "a"] and a.rows["a"].sum() == 75 + 75 - a.rows["(none)"].sum() + 0
    share = np.abs((z[0] - z[1]) * w)[held].mean(0)
    order = np.argsort(-share)
    assert a.top("all", 5) == order[:5].tolist() and np.allclose(a.share["all"].sum(), 1)
    n = a.carry()
    assert share[order[:n]].sum() >= 0.9 * share.sum() > share[order[:n - 1]].sum()
    every = a.kept(len(a.on), np.ones(300, bool))
    assert np.allclose(every, head.margin)

def test_edits_move_what_has_the_latent_and_nothing_else():
    z, _ = codes()
    w = np.random.default_rng(2).standard_normal(40)
    new = deciding.edited(w, [(3, 0.0), (5, 2.5)])
    before, after = z @ w, z @ new
    untouched = (z[:, :, 3] == 0) & (z[:, :, 5] == 0)
    assert untouched.any() and np.allclose(before[untouched], after[untouched], atol=1e-12)
    assert np.allclose(after - before, -w[3] * z[:, :, 3] + 1.5 * w[5] * z[:, :, 5])
    rows = dict(all=np.ones(300, bool), a=np.arange(300) < 150, b=np.arange(300) >= 150)
    z[:, 150:, 3] = 0
    moved = deciding.moves(w, deciding.edited(w, [(3, 0.0)]), z, rows)
    assert moved["b"]["rewards"] == moved["b"]["margins"] == 0 and moved["a"]["factor"] == [None, None]
    assert moved["b"]["factor"] == [0, 0] and "factor" not in moved["all"]
    assert [reward.times(moved[name]) for name in ("all", "a", "b")] == [["", ""], ["> 1e6"] * 2, ["0.00"] * 2]
    assert reward.times(deciding.moves(w, w, z, rows)["a"]) == ["–", "–"]
    z[:, 150:, 3] = 1
    both = deciding.moves(w, deciding.edited(w, [(3, 0.0)]), z, rows)
    ratio = z[:, :150, 3].mean()
    assert np.isclose(both["a"]["factor"][0], ratio) and np.isclose(both["b"]["factor"][0], 1 / ratio)
    moved = deciding.moves(w, deciding.edited(w, [(3, 0.0)]), z, rows)
    assert np.isclose(moved["a"]["rewards"], np.abs(w[3] * z[:, :150, 3]).mean())
    assert np.isclose(moved["a"]["after"] - moved["a"]["before"], -(w[3] * (z[0] - z[1])[:150, 3]).mean())

def test_latents_of_an_attribute():
    """By hand: one fires on docstrings alone, one on all tokens, one never; of tokens a quarter are in docstrings."""
    places = object.__new__(deciding.Places)
    places.x, inside = torch.arange(4000).float()[:, None], np.arange(4000) % 4 == 0
    places.y = {"inside=docstring": inside, "inside=comment": np.zeros(4000, bool)}
    def encode(x):
        doc = x[:, 0] % 4 == 0
        return torch.stack([doc.float(), torch.ones(len(x)), torch.zeros(len(x)), (doc & (x[:, 0] > 2000)).float()], 1)
    n, hits = places.hits(encode, [inside])
    assert n.tolist() == [1000, 4000, 0, 499] and hits[:, 0].tolist() == [1000, 1000, 0, 499]
    of = places.of_attributes(encode, ["documented", "commented"])
    assert of["documented"].tolist() == [True, False, False, True] and not of["commented"].any()
    assert all(re.fullmatch(preferences.ROLES[a], label) for a, label in [
        ("documented", "kind=docstring"), ("commented", "lexical=comment"), ("closed", "depth=2+"), ("named", "role=argument")])
    assert not re.fullmatch(preferences.ROLES["indented"], "") and not re.fullmatch(preferences.ROLES["closed"], "depth=0")

# --- answers --------------------------------------------------------------------------------------

def test_answers_read_in_batches_equal_those_read_alone(tiny_lm, monkeypatch):
    """Means and last tokens over the answer alone, without position 0 and without what a harvest drops; long texts lose
    their beginning."""
    model, tokenizer, blocks = lm.load(tiny_lm, "tiny", CPU, torch.float32)
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, 50, generator=g)
    encode, g = lambda x: (x @ W).relu(), torch.Generator().manual_seed(0)
    source = SimpleNamespace(meta=dict(norm_cut=1e9), mean=torch.zeros(32), heldout_raw=lambda: torch.randn(99, 32, generator=g))
    words = "alpha beta gamma delta one two three sleep run stone".split()
    rng = np.random.default_rng(0)
    text = lambda n: " ".join(rng.choice(words, n))
    pairs = [SimpleNamespace(line=i, prompt=text(i % 4), chosen=text(3 + i % 5) + " a", rejected=text(4)) for i in range(20)]
    reader = answers.Reader(dict(SAE=encode), source, model, tokenizer, blocks[2], 24)
    inputs = reader.read("x", pairs)
    inputs["products"] = answers.linear(inputs["residual"], W)
    random, rows = answers.untrained(SimpleNamespace(encode=encode, d_sae=50), source)
    k = (random(torch.randn(7, 32)) > 0).sum(1)
    assert rows.shape == (50, 32) and 15 < k.max() <= 35
    for i in (0, 1, 7, 19):
        for side, name in enumerate(("chosen", "rejected")):
            ids = [tokenizer(t, add_special_tokens=False).input_ids for t in (pairs[i].prompt, getattr(pairs[i], name))]
            whole = reader.bos + (ids[0] + ids[1])[-24 + len(reader.bos):]
            start = max(1, len(whole) - len(ids[1]))
            x = lm.residual_stream(model, blocks[2], np.array([whole]))[0, start:]
            for way, v in dict(residual=x, SAE=(x @ W).relu(), products=x @ W).items():
                assert np.allclose(inputs[way]["mean"][side, i], v.mean(0), atol=1e-3), way
                assert np.allclose(inputs[way]["last"][side, i], v[-1], atol=1e-3), way
            assert inputs["length"]["mean"][side, i] == min(len(ids[1]), 24 - len(reader.bos))
    with pytest.raises(reward.runs.BadInput, match='line [0-9]+: no token of "[a-z]+" counts'):
        reader.cut = 0
        reader.read("x", pairs)

# --- the command ----------------------------------------------------------------------------------

def dictionary(path, flags):
    """Latent 4 fires on digits alone; the others are random and do not see what digits have in common; latent 2 is dead."""
    g = torch.Generator().manual_seed(3)
    W_enc, W_dec = torch.randn(D, 23, generator=g) / 3, torch.nn.functional.normalize(torch.randn(23, D, generator=g), dim=1)
    b = torch.full((23,), -1.0)
    W_enc[1], b[2] = 0, -1e6
    W_enc[:, 4] = torch.eye(D)[1]
    return save(path, W_enc, W_dec, b, flags=flags)

@pytest.fixture(scope="module")
def preferred(planted_model, tmp_path_factory):
    """A run, and pairs: chosen are answers with a digit ('digit'), or with the word that the prompt ends with ('echo')."""
    folder, flags = planted_model
    tmp = tmp_path_factory.mktemp("reward")
    rng, words, rows = np.random.default_rng(0), [w for w in dict.fromkeys(WORDS) if len(w) == 2], []
    for i in range(120):
        prompt, answer = rng.choice(words, 6).tolist(), rng.choice(words, 7).tolist()
        other, at = list(answer), rng.integers(7)
        answer[at] = str(rng.integers(10))
        rows.append(dict(prompt=f"{' '.join(prompt)}", chosen=" ".join(answer), rejected=" ".join(other), attribute="digit"))
    for i in range(40):
        rows[i] |= dict(attribute="wa", chosen=rows[i]["rejected"] + " wa", rejected=rows[i]["rejected"] + " wb")
    (tmp / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dictionary(tmp / "run", flags), tmp / "p.jsonl"

def quick(patch):
    """Fewer penalties and folds, for time; the tests of heads above have all."""
    patch.setattr(reward, "GRID", dict(L2=(1, 100), L1=(0.1, 1, 10)))
    patch.setattr(reward, "FOLDS", 3)

def test_the_command_finds_the_planted_latent(preferred, tmp_path, capsys, monkeypatch):
    """Of pairs by digits alone the latent for digits decides, alone; with others among them it comes first, and an edit of it
    moves these pairs alone. The saved head gives the rewards in reward.json."""
    quick(monkeypatch)
    run, path = preferred
    (tmp_path / "digits").write_text("".join(l for l in path.open() if '"digit"' in l))
    reward.main([str(run), str(tmp_path / "digits")])
    assert load_file(run / "reward_head.safetensors")["w"].nonzero().flatten().tolist() == [4]
    assert json.loads((run / "reward.json").read_text())["carry"] == {"all": 1, "digit": 1}
    argv = [str(run), str(path), "--edit", "4=0", "--edit", "2=3", "--pair", "100", "--top", "3"]
    reward.main(argv)
    said, found = capsys.readouterr().out, json.loads((run / "reward.json").read_text())
    first = found["latents"][0]
    assert first["latent"] == 4 and first["weight"] > 0 and first["share"]["digit"] > 0.5 > first["share"]["wa"]
    assert ["class", "digit"] in [d[:2] for d in first["detects"]]
    assert {d[0] for f in found["latents"] for d in f["detects"]} == {"class"}           # the text is no Python
    moved = found["edits"]["digit"]
    assert moved["factor"][1] is None and "> 1e6" in said and moved["accuracy"][0] == 1 and moved["accuracy"][1] <= 0.7
    assert found["edits"]["wa"]["margins"] < 1e-9 and "What decided the pair of line 100" in said
    assert "note: --edit 2=...: the weight of latent 2 is 0" in said
    heads = {(h["way"], h["read"]): h["accuracy"][0] for h in found["heads"]}
    assert len(heads) == 11 and heads["SAE", "mean"] > 0.6 and heads["residual", "mean"] > 0.8 and heads["length", "mean"] == 0.5
    tensors = load_file(run / "reward_head.safetensors")
    assert tensors["w"].shape == (23,) and tensors["w_edited"][4] == 0 and tensors["w"].dtype == torch.float64
    for p in found["pairs"]:
        assert abs(sum(v for _, v in p["latents"]) + p["rest"] - p["margin"]) < 1e-6
        assert abs(p["rewards"][0] - p["rewards"][1] - p["margin"]) < 1e-6

@pytest.fixture(scope="module")
def written(preferred, tmp_path_factory):
    """The page of pairs whose prompts and attributes are pieces of HTML, and how many were held out."""
    (run, path), tmp = preferred, tmp_path_factory.mktemp("page")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:80]]
    for i, row in enumerate(rows):
        row |= dict(attribute=ODD[i // 40], prompt=row["prompt"] + ODD[i % 3] + f"\n{i}")
    (tmp / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        reward.main([str(run), str(tmp / "p.jsonl"), "--edit", "4=2.5", "--html", str(tmp / "p.html")])
    return tmp / "p.html", sum(p["held"] for p in json.loads((run / "reward.json").read_text())["pairs"])

@pytest.mark.parametrize("width, mobile", [(1280, False), (390, True)])
def test_the_page_in_a_browser(written, started, width, mobile):
    """Tables, figure, every held-out pair, folded, and the latents; nothing fetched or run, nothing outside a phone's screen."""
    path, held = written
    tags = Tags(path.read_text()).tags
    assert not [a for _, a in tags if "src" in a or any(name.startswith("on") for name in a)]
    started.screen(width, 900, mobile=mobile)
    started.get(path.as_uri())
    assert started.title == "Reward" and not started.all("img")
    assert started.texts("h3") == ["Accuracy on held-out pairs", "By attribute", "Latents that decide", "What the edits move",
                                   "Held-out pairs", "Latents"]
    assert len(started.shown("svg")) == 1 and started.shown("svg .run")
    folded = [d for d in started.shown("details") if d.text.startswith("line")]
    assert len(folded) == held and not started.shown("details ol li")
    folded[0].find_element("css selector", "summary").click()
    assert "all others" in folded[0].text and "rejected" in folded[0].text and "latent" in folded[0].text
    looks_right(started, mobile)
    assert started.get_log("browser") == []

@pytest.mark.parametrize("argv, words", [
    (["--edit", "23=0"], ["--edit 23=...", "0 to 22"]), (["--edit", "4"], ["--edit", "LATENT=FACTOR"]),
    (["--edit", "4=x"], ["--edit"]), (["--edit", "4=1e400"], ["--edit", "at most 1e9"]),
    (["--edit", "4=1", "--edit", "4=2"], ["--edit 4=...", "twice"]),
    (["--pair", "500"], ["--pair 500", "line"]), (["--pairs", "60"], ["--pairs", "--make"]),
    (["--make", "documented"], ["--make", "exists"]), (["--make", "docs"], ["--make docs", "documented"]),
    (["--html", "."], ["--html", "folder"]), (["--layer", "0"], ["trained on another"])])
def test_bad_flags_cost_one_line(preferred, tmp_path, one_line, argv, words):
    run, path = preferred
    cfg = json.loads((run / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.1.hook_resid_pre"
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "cfg.json").write_text(json.dumps(cfg))
    (copy / "sae_weights.safetensors").write_bytes((run / "sae_weights.safetensors").read_bytes())
    one_line(lambda: reward.main([str(copy), str(path), *argv]), *words)

def test_pairs_of_text_that_is_no_python_are_not_made(preferred, tmp_path, one_line):
    one_line(lambda: reward.main([str(preferred[0]), str(tmp_path / "new.jsonl"), "--make", "closed"]), "--make closed",
             "0 such pairs")
    assert not (tmp_path / "new.jsonl").exists()

def test_runs_without_text_are_refused(tmp_path, array, preferred, one_line):
    W = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    run = save(tmp_path / "run", W, W.T, flags=dict(activations=str(array[0])))
    one_line(lambda: reward.main([str(run), str(preferred[1])]), str(run), "arrays")

@pytest.mark.claims
def test_a_run_on_a_stream(planted_model, preferred, tmp_path):
    """There only held-out contexts are on disk. The same command again gives the same."""
    folder, flags = planted_model
    (tmp_path / "t.txt").write_text("\n".join([(folder / "t.txt").read_text()] * 20))
    run = dictionary(tmp_path / "run", dict(flags, stream=True, buffer=2000, text=str(tmp_path / "t.txt")))
    reward.main([str(run), str(preferred[1]), "--at", "last"])
    found = json.loads((run / "reward.json").read_text())
    assert len(found["heads"]) == 11 and found["latents"]
    reward.main([str(run), str(preferred[1]), "--at", "last"])
    assert json.loads((run / "reward.json").read_text()) == found

@pytest.mark.claims
def test_pairs_are_made_and_used(text, some, tmp_path, capsys, monkeypatch):
    """On a random model that reads Python, from --make to the page; the roles of latents are those of evaluate.py."""
    monkeypatch.setattr(probing, "TOKENS", 2 ** 14)
    tiny_lm = random_lm("gpt2", tmp_path, text)
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, 64, generator=g)
    (tmp_path / "cache").mkdir()
    run = save(tmp_path / "run", W, W.T, torch.full((64,), -2.0), flags=dict(
        model=str(tiny_lm), text=some, layer=2, context=32, cache_dir=str(tmp_path / "cache")))
    argv = [str(run), str(tmp_path / "p.jsonl"), "--html", str(tmp_path / "p.html")]
    reward.main([*argv, "--make", "documented+closed", "--pairs", "100", "--seed", "1"])
    pairs = preferences.read(tmp_path / "p.jsonl")
    assert len(pairs) == 100 and {p.attribute for p in pairs} == {"documented", "closed"} and "By attribute" in capsys.readouterr().out
    found = json.loads((run / "reward.json").read_text())
    assert set(found["carry"]) == {"all", "documented", "closed"}
    heads = {(h["way"], h["read"]): h for h in found["heads"]}
    assert heads["residual", "mean"]["accuracy"][0] > 0.6
    sae, source, *model = reward.open_language_run(run, reward.parse_args(argv[:2]))
    roles = deciding.roles_of(sae, source, *model)
    assert "lexical" in roles
    for f in found["latents"]:
        for kind, name, p, r in f["detects"]:
            assert kind not in roles or roles[kind][str(f["latent"])] == [name, p, r]
    Tags((tmp_path / "p.html").read_text())

# --- benchmarks/reward.py -------------------------------------------------------------------------

def test_verdicts_of_the_benchmark():
    """Rows of hand: all claims hold; and each fails alone where its number is changed."""
    bench = importlib.import_module("benchmarks.reward")
    def rows(sae=0.97, last=0.95, place=(0.6, 0.2), role=(0.7, 0.1), after=(0.3, 0.9), margins=4.0, random=1.0):
        both, out = ["documented", "commented", "closed", "indented", "named"], []
        labels = dict(place=list(place), role=list(role))
        edit = dict(before=[0.97, 0.97], after=list(after), margins=[margins, 1.0], rewards=[1.0, 1.0], random=dict(margins=[random, 1.0]))
        for seed in "012":
            every = [f"none-s{seed}", *(f"{m}-s{seed}" for m in bench.METHODS)]
            for run in every:
                accuracy = {"SAE mean": sae, "SAE last": last, "residual mean": 0.98, "residual last": 0.96, "untrained last": 0.9,
                            "random encoder last": 0.95}
                out.append(dict(mixture="x", run=run, accuracy={k: dict(all=v) for k, v in accuracy.items()},
                                shares=dict.fromkeys(both, labels), edits=dict.fromkeys(both, edit)))
        return out
    said = lambda **changed: ["not" not in line.split(";")[0] for line in bench.verdicts(rows(**changed))
                               if "no rule stated" not in line]
    assert said() == [True] * 6
    for changed, wrong in (dict(sae=0.955), 0), (dict(last=0.935), 1), (dict(place=(0.4, 0.1)), 3), (dict(place=(0.6, 0.35)), 3), (
            dict(role=(0.4, 0.1)), 4), (dict(after=(0.55, 0.9)), 5), (dict(after=(0.3, 0.8)), 5), (dict(margins=2.5), 5), (
            dict(random=2.5), 5):
        assert said(**changed) == [i != wrong for i in range(6)], changed
    assert said(last=0.91) == [True, False, False, True, True, True]
