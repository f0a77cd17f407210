"""Shared by the tests: short runs through the scripts' own train(), the recovery score, and claims."""
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import claims

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
import runs
from sources import lm
from sources.toy import Toy

os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"                 # pytest -n 2: one core for each worker
os.environ["HF_HUB_OFFLINE"] = "1"                  # nothing here may need the network

def mcc(truth, learned):
    """Mean signed cosine of true features [n, D] and learned rows [F, D] under the best matching."""
    unit = lambda W: torch.nn.functional.normalize(W.detach().float(), dim=1)
    cosine = (unit(truth) @ unit(learned).T).numpy()
    return float(cosine[linear_sum_assignment(-cosine)].mean())

@cache
def trained(script, toy, seed, *flags):
    """(SAE, held-out metrics) of a run on toy:seed, or on toy if that has a seed; 1000 steps of 512,
    in float32, as many latents as features, everything else default, unless flags say otherwise."""
    toy = toy if ":" in toy else f"{toy}:{seed}"
    argv = ["--model", "toy", "--toy", toy, "--seed", seed, "--d-sae", Toy.preset(toy).n, "--tokens",
            1000 * 512, "--batch-size", 512, "--no-bf16", "--log-every", 1000, *flags]
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        out = Path(tmp) / "run"
        sae = script.train(script.parse_args([str(a) for a in argv] + ["--out", str(out)]))
        return sae, json.loads((out / "cfg.json").read_text())["metadata"]["results"]

def run_script(*argv, env=None, cwd=ROOT, **kw):
    """A script as a user runs it; argv[0] is its name."""
    return subprocess.run([sys.executable, ROOT / argv[0], *map(str, argv[1:])], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, **(env or {})}, **kw)

@pytest.fixture
def one_line(capsys):
    """Call a function that must refuse its input: exit code 2 and one line holding these words."""
    def check(function, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, runs.one_line_errors():
            function()
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and "error: " in lines[0], lines
        for word in words:
            assert word in lines[0], (word, lines[0])
    return check

@pytest.fixture(scope="session")
def array(tmp_path_factory):
    """20,000 samples of the toy 'song', moved and stretched: a user's array. -> (path, Toy)."""
    toy = Toy.preset("song:5")
    x = toy.sample(20_000, torch.Generator().manual_seed(0))[0] * 7 + 30
    path = tmp_path_factory.mktemp("array") / "X.npy"
    np.save(path, x.numpy())
    return path, toy

@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "sleep", "run", "stone"]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(1200)))
    return path

def random_lm(kind, folder, text):
    """A random causal LM with 4 blocks of width 32 and its own tokenizer, saved to a directory."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(text.read_text().splitlines(), trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"]))
    torch.manual_seed(0)
    size = dict(vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=4, n_embd=32, n_head=4, **size))
    else:
        cls = getattr(tf, dict(llama="LlamaForCausalLM", neox="GPTNeoXForCausalLM", gemma2="Gemma2ForCausalLM",
                               qwen2="Qwen2ForCausalLM", mistral="MistralForCausalLM", bert="BertForMaskedLM")[kind])
        heads = {} if kind in ("neox", "bert") else dict(num_key_value_heads=2, head_dim=8)
        model = cls(cls.config_class(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=64,
                                     **heads, **size))
    path = folder / kind
    model.save_pretrained(path)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                               bos_token="<|endoftext|>").save_pretrained(path)
    return path

KINDS = "gpt2", "llama", "neox", "gemma2", "qwen2", "mistral"

@pytest.fixture(scope="session", params=KINDS)
def every_lm(request, tmp_path_factory, text):
    """The directory of a random causal LM, of six architectures."""
    return random_lm(request.param, tmp_path_factory.mktemp("lm"), text)

@pytest.fixture(scope="session", params=[KINDS[0], *(pytest.param(k, marks=pytest.mark.claims) for k in KINDS[1:3])])
def tiny_lm(request, tmp_path_factory, text):
    """The same; in the quick run of the first architecture alone."""
    return random_lm(request.param, tmp_path_factory.mktemp("lm"), text)

@pytest.fixture
def loud(monkeypatch):
    """A token at which every model has ten times the activation that it would have. -> its id"""
    real, rare = lm.residual_stream, 33
    def residual_stream(model, block, ids):
        x = real(model, block, ids).clone()
        x[torch.from_numpy(ids) == rare] *= 10
        return x
    monkeypatch.setattr(lm, "residual_stream", residual_stream)
    return rare

# --- CLAIMS.md: tests/claims.py -------------------------------------------------------------------

@pytest.fixture
def claim(request):
    """Call it once per claim of a paper, after the asserts: claim(paper, claim, figure, ours, verdict, **values)."""
    return partial(claims.record, request.node)

def pytest_addoption(parser):
    parser.addoption("--claims", metavar="CLAIMS.md", help="write the table of the papers' claims into this file")

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of pytest -n has ended: what it measured becomes this process's."""
    if hasattr(node, "workeroutput"):
        claims.merge(node.workeroutput["claims"])

def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workeroutput"):                       # a worker: see above
        config.workeroutput["claims"] = claims.dump()
        return
    if path := config.getoption("--claims"):
        command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
        good, line = claims.write(path, command, session.testsfailed)
        config.claims_lines = [line]
    else:
        config.claims_lines = claims.compare()
        good = not config.claims_lines
    if not good and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

def pytest_terminal_summary(terminalreporter, config):
    for line in getattr(config, "claims_lines", []):
        terminalreporter.write_line(line)
