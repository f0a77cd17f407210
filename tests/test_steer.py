"""applications/steer.py: planted causes and mere correlates, scores and p-values against slow ones, generation against a
model without a cache, bad input, protein models, and the page in a real browser."""
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from applications import steer
from conftest import random_lm
from evaluation import concepts, generate, intervals, page
from sources import lm, text
from test_evaluate import save
from test_page import Tags, looks_right, started                             # noqa: F401 (a fixture)

CPU = torch.device("cpu")

# --- what a concept is ----------------------------------------------------------------------------

def held(name, line):
    """Which one-letter tokens of a line have a concept."""
    texts = sorted(set(line))
    ids = np.array([[texts.index(c) for c in line]])
    return "".join("x" if t else "." for t in concepts.named(name, texts).true(ids)[0])

@pytest.mark.parametrize("name, line, want", [
    ("comment", "a = 1 # b\nc", "......xxx.."), ("comment", "'#' # '\n", "....xxx."), ("comment", "don't # x", "......xxx"),
    ("string", "f('a', \"b#\")", "..xx...xxx.."), ("string", "don't say", "........."), ("string", "# 'a'", "....."),
    ("string", "f'a'", ".xx."), ("digit", "a1b22", ".x.xx"), ("capital", "aB c", ".x.."), ("bracket", "a[(])", ".xxxx")])
def test_concepts_of_characters_by_hand(name, line, want):
    assert held(name, line) == want

def test_concepts_of_tokens_by_hand():
    texts = [" def", "def", " default", "    ", "\n   ", " Snow", " SELF", "self", "\n", " s"]
    def of(name):
        return [t for t, y in zip(texts, concepts.named(name, texts).true(np.arange(10)[None])[0]) if y]
    assert of("keyword") == of("keyword:def") == [" def", "def"] and of("self") == ["self"]
    assert of("indent") == ["    ", "\n   "] and of("newline") == ["\n   ", "\n"] and of("capital") == [" Snow", " SELF"]
    assert of("upper") == [" SELF"] and of("letter:s") == [" Snow", " SELF", " s"]

def test_token_texts_show_the_space_before_a_word(tmp_path, text):
    from tokenizers import Tokenizer, decoders
    from transformers import PreTrainedTokenizerFast
    plain = Tokenizer.from_file(str(random_lm("gpt2", tmp_path, text) / "tokenizer.json"))
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    found = concepts.token_texts(tokenizer, 300)
    ids = tokenizer("alpha beta gamma", add_special_tokens=False).input_ids
    assert "".join(found[i] for i in ids).strip() == "alpha beta gamma" and " beta" in found

# --- scores and intervals -------------------------------------------------------------------------

def test_scores_of_latents_against_slow_ones():
    """F1 over all thresholds, AUC with ties, correlation; the F1 of the threshold that is given back; a silent latent."""
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(500, 6, generator=g) * 2).relu().round(decimals=0) / 2 + torch.rand(500, 6, generator=g).round() * 0
    z[:, 5] = 0
    z[:, 4] = torch.rand(500, generator=g)
    y = torch.rand(500, generator=g) < 0.1 + 0.5 * (z[:, 0] > 1)
    codes = concepts.Codes(lambda x: z[x[:, 0].long()], torch.arange(500)[:, None].float())
    f1, auc, r = codes.scores(y)
    one = lambda said: 2 * (said & y).sum().item() / max(1, (said.sum() + y.sum()).item())
    for i in range(5):
        tried = [one(z[:, i] > t) for t in [0, *z[:, i].unique().tolist()]]
        assert abs(f1[i] - max(tried)) < 1e-9
        assert abs(one(z[:, i] > codes.threshold(i, y)) - f1[i]) < 1e-9
        assert abs(auc[i] - roc_auc_score(y, z[:, i])) < 1e-9
        assert abs(r[i] - np.corrcoef(z[:, i], y)[0, 1]) < 1e-6
    assert f1[5] == 0 and abs(auc[5] - 0.5) < 1e-12 and r[5] == 0 and codes.count[5] == 0
    assert torch.allclose(codes.rate, (z > 0).double().mean(0)) and torch.allclose(codes.peak.float(), z.amax(0))

def test_intervals_and_p_values():
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([]) == [] and intervals.holm([0.5, 0.9]) == [1.0, 1.0]
    d = np.array([0.3, 0.1, -0.2, 0.4, 0.5, 0.2])
    exact = np.mean([abs(np.dot(s, d)) >= d.sum() - 1e-9 for s in itertools.product((-1, 1), repeat=6)])
    assert abs(intervals.sign_flip(d) - exact) < 0.015 and intervals.sign_flip(np.zeros(9)) == 1
    rng = np.random.default_rng(1)
    covered = np.mean([lo < 0.3 < hi for lo, hi in (intervals.bootstrap(rng.normal(0.3, 1, 40)) for _ in range(300))])
    assert 0.9 < covered < 0.98
    small = np.mean([intervals.sign_flip(rng.normal(0, 1, 20), seed=i) < 0.05 for i in range(200)])
    assert small < 0.1

# --- generation -----------------------------------------------------------------------------------

def test_generation_equals_one_without_a_cache(tiny_lm):
    """Paired noise, a change at the positions that tokens are drawn from alone, price by the unchanged model, the end."""
    model, _, blocks = lm.load(tiny_lm, "tiny", CPU, torch.float32)
    prompts = torch.randint(1, 300, (8, 5), generator=torch.Generator().manual_seed(0))
    writer = generate.Writer(model, blocks[2], prompts, 3, 6, 7, 1e9, seed=4, keep=True)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
    for change in (None, lambda x: x + v):
        ids, out = prompts.repeat_interleave(3, 0), writer.write(change)
        for position in range(6):
            def put(module, inputs, named):
                h = (inputs[0] if inputs else named["hidden_states"]).clone()
                h[:, 4:] += v
                return ((h, *inputs[1:]), named) if inputs else (inputs, dict(named, hidden_states=h))
            hook = blocks[2].register_forward_pre_hook(put, with_kwargs=True) if change else None
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            if hook:
                hook.remove()
            ids = torch.cat([ids, (logits + generate.gumbel(writer.seed, position, *logits.shape)).argmax(1, keepdim=True)], 1)
        assert torch.equal(out.ids.flatten(0, 1), ids[:, 5:])
        with torch.no_grad():
            ce = -model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, 4:-1].gather(2, ids[:, 5:, None])[..., 0]
        assert torch.allclose(out.ce.flatten(0, 1), ce, atol=1e-4)
        x = lm.residual_stream(model, blocks[2], ids.numpy())[:, 5:]
        assert torch.allclose(out.x.flatten(0, 1), x, atol=1e-4)
        assert torch.equal(out.ids, writer.write(change).ids)
    end = int(out.ids[0, 0, 2])
    writer.end = end
    row, live = out.ids[0, 0].tolist(), writer.write(change).live[0, 0].tolist()
    first = row.index(end)
    assert live == [True] * (first + 1) + [False] * (5 - first)
    quiet = generate.Writer(model, blocks[2], prompts, 3, 6, 7, 0.0, seed=4)      # all norms are above this: no token changes
    assert torch.equal(quiet.write(lambda x: x + v).ids, quiet.write().ids)

def test_shares_of_different_pairs_by_hand():
    ids = torch.tensor([[[1, 2, 1, 2], [5, 5, 5, 5]]])
    assert generate.distinct(ids, torch.ones(1, 2, 4, dtype=torch.bool)) == [(2 / 3 + 1 / 3) / 2]
    assert generate.distinct(ids, torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]]]).bool()) == [1.0]

# --- a planted cause ------------------------------------------------------------------------------

D, WORDS = 32, ["<|endoftext|>", *"0123456789", *(f"w{c}" for c in "abcdefghijklmnopqrstuvwxyzabcdefghijklmn")]

@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A language model in which coordinate 0 of the residual stream makes digits likely, and digits have coordinate 1;
    and a text of its words, a tenth of them digits. -> (folder, flags of a run)"""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder, words = tmp_path_factory.mktemp("planted"), list(dict.fromkeys(WORDS))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(
        num_hidden_layers=2, hidden_size=D, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(words), tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    digits = torch.tensor([t.isdigit() for t in words])
    embed, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    embed.copy_(torch.randn(embed.shape)), head.copy_(0.3 * torch.randn(head.shape))
    embed[:, :3], head[:, :3] = 0, 0
    embed[digits, 1], head[digits, 0] = 4, 1
    model.save_pretrained(folder / "model")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    some = np.where(rng.random(12_000) < 0.1, rng.choice(words[1:11], 12_000), rng.choice(words[11:], 12_000))
    (folder / "t.txt").write_text(" ".join(some))
    (folder / "cache").mkdir()
    return folder, dict(model=str(folder / "model"), text=str(folder / "t.txt"), layer=1, context=24,
                        cache_dir=str(folder / "cache"))

def dictionary(path, flags, cause=0):
    """Latents 0 and 1 both fire on digits alone; the row of 0 is coordinate `cause`, that of 1 coordinate 2, which the
    model does not use. Latent 2 is dead, the other 20 are random."""
    g = torch.Generator().manual_seed(3)
    W_enc, W_dec = torch.randn(D, 23, generator=g) / 3, torch.nn.functional.normalize(torch.randn(23, D, generator=g), dim=1)
    b, eye = torch.full((23,), -1.0), torch.eye(D)
    W_enc[:, 0], W_enc[:, 1], W_dec[0], W_dec[1] = eye[1], 0.9 * eye[1], eye[cause], eye[2]
    b[2] = -1e6
    return save(path, W_enc, W_dec, b, flags=flags)

SMALL = "--prompts", "24", "--prompt-length", "8", "--length", "8"

def test_a_planted_cause_steers_and_a_correlate_does_not(planted, tmp_path, capsys):
    """Both latents tell digits perfectly. The one whose row raises the digits' logits steers; the other, the random
    latents and a random direction do not. Control: with the cause taken out of its row, neither does. Same seed, same numbers."""
    folder, flags = planted
    run = dictionary(tmp_path / "run", flags)
    latents = "--latents", "0", "1"
    steer.main([str(run), "--concept", "digit", *latents, *SMALL, "--html", str(tmp_path / "p.html")])
    said, found = capsys.readouterr().out, json.loads((run / "steering.json").read_text())
    scores, ways = {s["latent"]: s for s in found["latents"]}, found["ways"]
    assert scores.keys() == {0, 1} and min(min(s["f1"], s["f1_train"], s["auc"]) for s in scores.values()) > 0.99
    cause, correlate = ways["latent 0"], ways["latent 1"]
    assert cause["steers"] and cause["p_holm"] < 0.01 and cause["low"] > 0.1 and cause["reached"]
    assert not correlate["steers"] and abs(correlate["effect"]) < 0.05
    assert abs(ways["random latents for 0"]["effect"]) < 0.1 and "random latents for 1" in ways and ways["latent 0 clamped"]["low"] > 0.1
    assert ways["random direction"]["effect"] < cause["effect"] / 2
    removed = ways["latent 0 clamped"]["doses"][0]
    assert removed["alpha"] == 0 and removed["rate"] < 0.25   # of a latent that the unsteered text does not use
    rates = [d["rate"] for d in cause["doses"]]
    assert [d["alpha"] for d in cause["doses"]] == sorted(d["alpha"] for d in cause["doses"]) and min(
        d["alpha"] for d in cause["doses"]) < 0 and rates[0] <= rates[-1] and "steers" in said
    steer.main([str(run), "--concept", "digit", *latents, *SMALL])
    assert json.loads((run / "steering.json").read_text())["ways"] == ways
    other = dictionary(tmp_path / "other", flags, cause=2)
    steer.main([str(other), "--regex", "^ ?[0-9]$", *latents, *SMALL])
    ways = json.loads((other / "steering.json").read_text())["ways"]
    assert not ways["latent 0"]["steers"] and not ways["latent 1"]["steers"]
    Tags((tmp_path / "p.html").read_text())

def test_effects_are_compared_at_equal_price():
    """Half way between two doses; the first dose from the unsteered text; a way that never costs as much."""
    e = SimpleNamespace(args=SimpleNamespace(price=1.0), none=SimpleNamespace(
        price=0.0, alpha=0, rate=torch.tensor([0.1, 0.1]), distinct=1.0))
    dose = lambda alpha, price, rate: SimpleNamespace(price=price, alpha=alpha, rate=torch.tensor(rate), distinct=0.5)
    first, second = dose(1, 0.5, [0.2, 0.3]), dose(2, 1.5, [0.4, 0.5])
    e.at_price = lambda *of: steer.Experiment.at_price(e, *of)
    got = e.at_price([first, second], 1.0)
    assert got.reached and got.dose == 1.5 and torch.allclose(got.effect, torch.tensor([0.2, 0.3]))
    got = e.at_price([dose(1, 2.0, [0.5, 0.3])], 1.0)
    assert got.reached and got.dose == 0.5 and torch.allclose(got.effect, torch.tensor([0.2, 0.1]))
    got = e.at_price([first], 1.0)
    assert not got.reached and (got.dose, got.price) == (1, 0.5) and torch.allclose(got.effect, torch.tensor([0.1, 0.2]))
    more = lambda *of: steer.Experiment.more(e, *of)
    cheap, half = [dose(1, 0.25, [0.1, 0.1])], torch.tensor([0.05, 0.1])            # at .25, where `first` has half its effect
    assert torch.allclose(more([first, second], cheap), half) and torch.allclose(more(cheap, [first, second]), -half)
    assert more([first, second], [dose(1, -0.1, [0.1, 0.1])]) is None

def test_labels_are_judged_by_a_probe(planted, tmp_path, one_line):
    """Of new text there are no labels: the linear probe, trained on the labels, finds the digits in it."""
    folder, flags = planted
    run = dictionary(tmp_path / "run", flags)
    words, rng, lines = list(dict.fromkeys(WORDS)), np.random.default_rng(1), []
    for _ in range(60):
        row, at, spans = rng.choice(words[1:], 48).tolist(), 0, []
        for word in row:
            spans += [[at, at + len(word), "number" if word.isdigit() else "name"]]
            at += len(word) + 1
        lines.append(json.dumps(dict(text=" ".join(row), labels=dict(kind=spans))))
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    steer.main([str(run), "--labels", str(tmp_path / "l.jsonl"), "--concept", "kind=number", *SMALL])
    found = json.loads((run / "steering.json").read_text())
    assert found["ways"]["latent 0"]["steers"] and found["ways"]["latent 0"]["low"] > 0.1
    assert not found["ways"]["latent 1"]["steers"] and found["concept"] == "kind=number"
    (tmp_path / "s.jsonl").write_text(json.dumps(dict(text="a 1", labels=dict(kind=[[2, 3, "number"]]))))
    one_line(lambda: steer.main([str(run), "--labels", str(tmp_path / "s.jsonl"), "--concept", "kind=number", *SMALL]), "s.jsonl", "longer")

@pytest.mark.parametrize("argv, words", [
    (["--concept", "digits"], ["--concept digits", "digit", "letter:X"]), (["--concept", ""], ["--concept", "unknown"]), ([], ["--concept", "--regex"]),
    (["--regex", "("], ["--regex (", "regular expression"]), (["--regex", "a{99999999999}"], ["--regex a", "regular expression"]), (["--regex", "^zzz"], ["--regex ^zzz", "0 of", "another"]),
    (["--so-far", ".*"], ["--so-far .*", "holds for"]), (["--concept", "digit", "--latents", "23"], ["--latents 23", "0 to 22"]),
    (["--concept", "digit", "--latents", "2"], ["--latents 2", "dead"]),
    (["--concept", "digit", "--regex", "a"], ["give one"]), (["--concept", "digit", "--labels", "x"], ["--labels", "role=argument"]),
    (["--concept", "a=b", "--labels", "none.jsonl"], ["--labels none.jsonl", "No such file"]),
    (["--concept", "digit", "--length", "99999"], ["--length 99999", "less"]),
    (["--concept", "digit", "--layer", "0"], ["trained on another", "--layer"])])
def test_bad_input_costs_one_line(planted, tmp_path, one_line, argv, words):
    folder, flags = planted
    run = dictionary(tmp_path / "run", flags)
    cfg = json.loads((run / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.1.hook_resid_pre"
    (run / "cfg.json").write_text(json.dumps(cfg))
    one_line(lambda: steer.main([str(run), *argv]), *words)

def test_other_runs_are_refused(tmp_path, one_line, array):
    path, _ = array
    g = torch.Generator().manual_seed(0)
    W = torch.randn(16, 40, generator=g)
    for flags, words in ((dict(activations=str(path)), ["arrays", "language model"]), (dict(model="toy", toy="song"), ["toy"]),
                         (dict(model="othello", layer=6), ["othello/steer.py"]), (None, ["records no data"])):
        run = save(tmp_path / str(len(words[0])), W, W.T, flags=flags)
        one_line(lambda: steer.main([str(run), "--concept", "digit"]), str(run), *words)
    one_line(lambda: steer.main([str(tmp_path / "none"), "--concept", "digit"]), "no saved SAE")

def test_models_without_a_head_and_normalised_inputs_are_refused(planted, tmp_path, one_line):
    """A model whose files lack the head: transformers would put a random one in its place."""
    import transformers as tf
    folder, flags = planted
    tf.AutoModel.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    run = dictionary(tmp_path / "run", dict(flags, model=str(tmp_path / "model")))
    one_line(lambda: steer.main([str(run), "--concept", "digit"]), "--model", "no head", "causal")
    run = dictionary(tmp_path / "normed", flags)
    cfg = json.loads((run / "cfg.json").read_text())
    (run / "cfg.json").write_text(json.dumps(dict(cfg, normalize_activations="layer_norm")))
    one_line(lambda: steer.main([str(run), "--concept", "digit"]), str(run), "normalised")

def test_a_run_on_a_stream(planted, tmp_path):
    """There only held-out contexts are on disk: half to rank on, the others to report on and to write on from."""
    folder, flags = planted
    (tmp_path / "t.txt").write_text("\n".join([(folder / "t.txt").read_text()] * 20))
    run = dictionary(tmp_path / "run", dict(flags, stream=True, buffer=2000, text=str(tmp_path / "t.txt")))
    steer.main([str(run), "--concept", "digit", "--latents", "0", *SMALL])
    found = json.loads((run / "steering.json").read_text())
    assert found["ways"]["latent 0"]["steers"] and found["latents"][0]["f1"] > 0.99

# --- protein models -------------------------------------------------------------------------------

PROTEIN = ["<pad>", *"ARNDCQEGHILKMFPSTWYV", "X", "B", "1", "2", "Z"]       # 26: arginine is 2, the sentinels are 23 and 24

def protein_tokenizer():
    """One word a residue, as p-IgGen's: it puts no sentinels, and knows no end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(PROTEIN)}, unk_token="X"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")

def test_sequences_are_documents(tmp_path, one_line):
    """FASTA, also over several lines, and one sequence a line; other text stays whole. Tokens: sentinels and residues,
    whatever the configuration says of BOS and EOS. Contexts begin where sequences do. Other letters are refused."""
    assert text.sequences(">a b\nEVQL\nVES\n>c\n\nQVQ\n") == ["EVQLVES", "QVQ"] and text.sequences("EVQ\nQVR\n\n") == ["EVQ", "QVR"]
    assert not any(map(text.sequences, ("Evq\nQV\n", "AB CD\n", "> a quote\nof words\n", "", ">a\n")))
    (tmp_path / "s.fasta").write_text(">a\nEVRL\nV\n>b\nQR\n")
    assert list(text.parts(str(tmp_path / "s.fasta"))) == [("EVRLV", True), ("QR", True)]
    form = text.Contexts(protein_tokenizer(), 5)
    ids = [i for part in text.parts(str(tmp_path / "s.fasta")) for i in form.tokens(*part)]
    assert "".join(PROTEIN[i] for i in ids) == "1EVRLV21QR2" and form.eot == 24 and form.bos == []
    cut = form.cut([*ids, *ids, *ids])
    assert ["".join(PROTEIN[i] for i in row) for row in cut] == ["1EVRL", "1QR21", "1QR21"]
    assert form.cut(ids[:3]).shape == (0, 5)
    one_line(lambda: form.tokens("EVO", True), "--text", "'O'")
    assert concepts.token_texts(protein_tokenizer(), 26) == PROTEIN

@pytest.mark.claims
def test_a_protein_model_from_harvest_to_steering(tmp_path, capsys):
    """A GPT-NeoX of p-IgGen's kind, trained for a minute on sequences that now and then have a stretch of acidic residues;
    a TopK SAE on it. The latent that best tells 'three acidic residues in a row' raises their share at equal price, by a
    tenth at least; random latents do not, by half of that; and arginine, the configuration's EOS, ends nothing."""
    import topk_sae
    import transformers as tf
    rng, lines = np.random.default_rng(0), []
    for _ in range(4000):
        acidic, row = False, ""
        for _ in range(rng.integers(60, 90)):
            acidic = rng.random() > 0.12 if acidic else rng.random() < 0.03
            row += rng.choice(list("DE" if acidic else "ARNCQGHILKMFPSTWYV"))
        lines.append(row)
    (tmp_path / "t.fasta").write_text("\n".join(f">{i}\n{row}" for i, row in enumerate(lines)))
    tokenizer = protein_tokenizer()
    torch.manual_seed(0)
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(
        vocab_size=26, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, rotary_pct=0.5,
        max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=2, bos_token_id=0, pad_token_id=0))
    form = text.Contexts(tokenizer, 64)
    ids = torch.from_numpy(form.cut([i for row in lines for i in form.tokens(row, True)])).long()
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(400):
        part = ids[torch.randint(len(ids), (32,))]
        loss = model(input_ids=part, labels=part).loss
        opt.zero_grad(), loss.backward(), opt.step()
        for group in opt.param_groups:
            group["lr"] = 3e-3 * min(1, (400 - step) / 200)
    assert loss < 2.8                                         # of independent residues 2.95, at best 2.63
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    argv = ["--model", tmp_path / "model", "--text", tmp_path / "t.fasta", "--layer", 2, "--context", 64, "--cache-dir",
            tmp_path / "cache", "--out", tmp_path / "run", "--d-sae", 384, "--k", 8, "--tokens", 600_000, "--batch-size", 1024]
    topk_sae.train(topk_sae.parse_args([str(a) for a in argv]))
    steer.main([str(tmp_path / "run"), "--so-far", r"[DE]{3}\Z", "--top", "1", "--prompts", "64", "--length", "20",
                "--prompt-length", "24", "--html", str(tmp_path / "p.html")])
    print(capsys.readouterr().out)
    found = json.loads((tmp_path / "run/steering.json").read_text())
    best, random = found["ways"][f"latent {(i := found['latents'][0]['latent'])}"], found["ways"][f"random latents for {i}"]
    assert found["latents"][0]["f1"] > 0.6
    assert best["steers"] and best["low"] > 0 and best["effect"] > 0.1 and abs(random["effect"]) < best["effect"] / 2
    args = steer.parse_args([str(tmp_path / "run"), "--so-far", "[DE]{3}"])
    _, source, model, tokenizer, block = steer.open_language_run(args.run, args)
    out = steer.Experiment(args, source, model, tokenizer, block).none
    behind = out.live[..., 1:][out.ids[..., :-1] == 2]        # what follows an arginine
    assert len(behind) > 5 and behind.all()
    ends = out.ids[..., :-1] == 24
    assert not out.live[..., 1:][ends].any()

# --- the page -------------------------------------------------------------------------------------

ODD = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'

@pytest.fixture(scope="module")
def steered(planted, tmp_path_factory):
    """The page of a command whose concept is a piece of HTML."""
    folder, flags = planted
    tmp = tmp_path_factory.mktemp("page")
    run = dictionary(tmp / "run", flags)
    steer.main([str(run), "--regex", f"[0-9]|{ODD}", *SMALL, "--html", str(tmp / "p.html")])
    return tmp / "p.html"

@pytest.mark.parametrize("width, mobile", [(1280, False), (390, True)])
def test_the_page_in_a_browser(started, steered, width, mobile):
    """Both tables, both figures with every way and intervals, continuations with the concept marked; nothing fetched,
    nothing run, nothing outside a phone's screen, no labels across each other."""
    tags = Tags(steered.read_text()).tags
    assert not [a for _, a in tags if "src" in a or any(name.startswith("on") for name in a)]
    started.screen(width, 900, mobile=mobile)
    started.get(steered.as_uri())
    assert started.title.startswith("Steering: [0-9]|") and not started.all("img")
    assert started.texts("h3")[0].startswith("Latents for") and started.texts("h3")[1:] == [
        "Steering at equal price", "Continuations"]
    figures = started.shown("svg")
    assert len(figures) == 2 and len(started.all("svg:first-of-type .run")) >= 8
    names = [t.get_attribute("textContent") for t in figures[1].find_elements("css selector", ".run text")]
    assert {"random latents for 1", "random direction", "difference of means", "linear probe"} <= set(names) and len(names) == 6
    assert len(figures[0].find_elements("css selector", "path.mark")) >= 8 and len(started.texts("h4")) == steer.SHOWN
    marked = [m.text for m in started.shown("dd mark")]
    assert marked and all(any(c.isdigit() for c in m) for m in marked)
    assert {"before", "after", "random"} == set(started.texts("dt"))
    looks_right(started, mobile)
    button = started.all("table")[1].find_elements("css selector", "thead button")[3]
    button.click()
    cells = [r.find_elements("css selector", "th, td")[3].text for r in started.all("table")[1].find_elements(
        "css selector", "tbody tr")]
    assert [float(c) for c in cells] == sorted(map(float, cells))
    assert started.get_log("browser") == []

def test_a_figure_of_nothing_and_of_one_point():
    assert page.dose_svg("a", "x", "y", {"a": [(0, None, 1, 2)]}) == "<p>Nothing here has been measured.</p>"
    Tags(page.dose_svg("a <b>", "x", "y", {"<b>": [(1, 2, 1, 3), (float("nan"), 1, 1, 1)]}))
