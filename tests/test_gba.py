"""gba_sae.py: its loss, Algorithm 2 as printed against the erratum, statistics, targets."""
import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import gba_sae
import runs
from gba_sae import GBASAE, adapt, init_state, rule_defaults, sparse_loss, train_step
from sources.toy import Toy

# --- the loss -------------------------------------------------------------------------------------

def random_case(relu, train_b_dec=False, dtype=torch.float64):
    """An SAE [12 -> 40] in the middle of training, one scale negative, and a batch [20, 12]."""
    torch.manual_seed(0)
    sae = GBASAE(12, 40, relu, train_b_dec).to(dtype)
    with torch.no_grad():
        sae.a += 0.3 * torch.randn(40)
        sae.a[3] = -0.5
        sae.b_enc -= 2 * torch.rand(40)
        sae.b_dec += 0.3 * torch.randn(12)
    return sae, torch.randn(20, 12, dtype=dtype) * 3 + 1

def explicit_loss(sae, x):
    """The docstring's loss, token by token and latent by latent; how often each fired; its peak."""
    losses, count, peak = [], torch.zeros(40, dtype=x.dtype), torch.zeros(40, dtype=x.dtype)
    for token in x:
        x_hat = sae.b_dec
        for m in range(40):
            u = ((token - sae.b_dec) * sae.W_dec[m]).sum()
            y = u + sae.b_enc[m]
            if y > 0:
                x_hat = x_hat + sae.a[m] * (y if sae.relu else u) * sae.W_dec[m]
                count[m] += 1
                peak[m] = max(peak[m], y.item())
        losses.append((token - x_hat).pow(2).sum())
    return sum(losses) / len(x), count, peak

@pytest.mark.parametrize("relu, train_b_dec", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sparse, room", [(False, 0), (True, 0), (True, 500)])
def test_loss_and_gradients_equal_an_explicit_loop(relu, train_b_dec, sparse, room):
    """Dense, sparse, and sparse with a fixed number of entries (as on a GPU): value, the gradient of
    every parameter (the tied rows get one from the encoder and one from the decoder), counts, peaks."""
    sae, x = random_case(relu, train_b_dec)
    loss, terms, fired = sparse_loss(sae, x, dict(sparse=sparse, room=room), None)
    loss.backward()
    got = {n: q.grad.clone() for n, q in sae.named_parameters()}
    sae.zero_grad()
    expected, count, peak = explicit_loss(sae, x)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-12) and torch.equal(loss, terms["mse"])
    assert set(got) == {"W_dec", "a"} | ({"b_dec"} if train_b_dec else set())      # never b_enc
    for n, q in sae.named_parameters():
        assert torch.allclose(got[n], q.grad, rtol=1e-9, atol=1e-12), n
    assert torch.equal(fired.to(count), count) and terms["l0"] == pytest.approx(count.sum() / 20)
    assert torch.allclose(terms["max_y"].to(peak), peak, rtol=1e-6)
    assert torch.allclose(sae(x), sae.decode(sae.encode(x)))
    assert torch.allclose(F.mse_loss(sae(x), x, reduction="sum") / 20, expected, rtol=1e-12)

def test_a_batch_that_outgrows_its_room_has_no_gradient():
    sae, x = random_case(False)
    loss, *_ = sparse_loss(sae, x, dict(sparse=True, room=50), None)
    loss.backward()
    assert loss == 0 and all((q.grad == 0).all() for q in sae.parameters())

@pytest.mark.parametrize("relu", [False, True])
def test_untied_tensors_are_the_same_function(relu):
    """What is saved, read as SAELens reads 'jumprelu' and 'standard': equal codes, which are >= 0
    (a latent with a < 0 decodes as -row), and reconstructions; rows of W_dec have norm 1."""
    sae, x = random_case(relu)
    t = sae.tensors()
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    z = pre.relu() * (pre > t.get("threshold", 0))
    assert ("threshold" in t) != relu and z.count_nonzero() > 50 and z[:, 3].count_nonzero() > 1
    assert torch.allclose(z, sae.encode(x), atol=1e-12)
    assert torch.allclose(z @ t["W_dec"] + t["b_dec"], sae(x), atol=1e-12)
    assert torch.allclose(t["W_dec"].norm(dim=1), torch.ones(40, dtype=x.dtype))

# --- Algorithm 2 ----------------------------------------------------------------------------------

def algorithm_2(buffer, b, p, groups, gamma_minus, gamma_plus, eps, last):
    """As the paper prints it, over a stored buffer of pre-activations y [N][F]; `last` ends the second
    step: max, as printed, or min, the erratum's."""
    new = list(b)
    for members, p_k in zip(groups, p):
        q = {m: sum(row[m] > 0 for row in buffer) / len(buffer) for m in members}
        r = {m: max(max(row[m] for row in buffer), 0) for m in members}
        alive = sum(r[m] > 0 for m in members)
        r_bar = sum(r.values()) / alive if alive else 0.0
        for m in members:
            if q[m] > p_k:
                new[m] = max(b[m] - gamma_minus * r[m], -1)
            if q[m] < eps:
                new[m] = last(b[m] + gamma_plus * r_bar, 0)
    return new

@pytest.mark.parametrize("seed", range(5))
def test_algorithm_2_on_random_statistics(seed):
    """Inputs and rows of norm 1, as the paper's: the same biases as its loop with its floor of -1, which
    never acts. Busy, in-between and dead latents occur, some at the upper end 0, and a group of which
    all are dead."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, W = F.normalize(draw(200, 6), dim=1), F.normalize(draw(45, 6), dim=1)
    args = Namespace(groups=4, d_sae=45, high=0.3, low=0.01, gamma_down=0.9, gamma_up=0.25)
    args.batch_size, args.steps, args.bias_every = 1, 1, 1
    state = init_state(args, "cpu")
    p, group = state["target"], state["group"]
    b = -1.2 * torch.rand(45, generator=g, dtype=torch.float64).clamp(max=1 / 1.2)
    b[group == 2] = -1.0
    y = x @ W.T + b
    b[5], y[:, 5] = -1e-3, -1e-3                       # dead, and one step from 0
    q, r = (y > 0).double().mean(0), y.amax(0).relu()
    members = [torch.nonzero(group == k)[:, 0].tolist() for k in range(4)]
    loop = lambda last: torch.tensor(algorithm_2(y.tolist(), b.tolist(), p.tolist(), members, 0.9, 0.25,
                                                 1e-6, last), dtype=torch.float64)
    new, dead = adapt(b, q, r, p.double()[group], group, args), q == 0
    assert torch.allclose(new, loop(min), atol=1e-12)
    lower, same = new < b, new == b
    assert lower.any() and (same & ~dead).any() and (dead & (new > b)).any() and same[group == 2].all()
    as_printed = loop(max)                             # a dead latent's bias would jump to 0 or above
    assert (as_printed[dead] >= 0).all() and (new[dead] < 0).any() and new[5] == 0
    assert new.min() >= -1

def test_dead_means_never():
    """A latent that fires once in 10,000 tokens is not lifted; p itself is not too often."""
    args = Namespace(groups=1, gamma_down=0.1, gamma_up=0.5)
    b, q, r = torch.tensor([-1.0] * 4), torch.tensor([1e-4, 0.0, 0.25, 0.26]), torch.tensor([1.0, 0, 1, 1])
    new = adapt(b, q, r, torch.full((4,), 0.25), torch.zeros(4, dtype=torch.int64), args)
    assert new.tolist() == pytest.approx([-1, -0.5, -1, -1.1])

def test_step_down_never_passes_the_largest_input():
    """b - gamma_down (b + max u) lies between b and -max u, so b_enc >= -max |x - b_dec| of all x ever
    seen, for a fixed b_dec and gamma_down <= 1: the paper's floor (-1, with |x| = 1) would not act."""
    torch.manual_seed(0)
    b, args, largest = torch.zeros(30), Namespace(groups=1, gamma_down=1.0, gamma_up=0.0), torch.zeros(())
    for _ in range(50):
        x, W = torch.randn(64, 8) * 5, F.normalize(torch.randn(30, 8), dim=1)
        y, largest = x @ W.T + b, torch.maximum(largest, x.norm(dim=1).max())
        b = adapt(b, (y > 0).float().mean(0), y.amax(0).relu(), torch.zeros(30),
                  torch.zeros(30, dtype=torch.int64), args)
        assert b.min() >= -largest
    assert b.max() < -5

@pytest.mark.parametrize("groups, high, low, d_sae", [(10, 0.1, 1e-3, 4608), (4, 0.5, 0.5, 10), (1, 0.03, 1e-3, 7)])
def test_targets_fall_geometrically(groups, high, low, d_sae):
    args = gba_sae.parse_args(f"--groups {groups} --high {high} --low {low} --d-sae {d_sae}".split())
    args.steps = 976
    state = init_state(args, "cpu")
    assert state["target"].tolist() == pytest.approx([high * (low / high) ** (k / (groups - 1)) if k else high
                                                      for k in range(groups)])
    size, group = state["size"], state["group"]
    assert size.max() - size.min() <= 1 and size.sum() == d_sae and torch.equal(group, group.sort().values)

@pytest.mark.parametrize("tokens, low, every, gamma", [(2e6, 1e-3, 5, 40 / 976), (2e6, 1e-4, 9, 72 / 976),
                                                       (2e6, 0.1, 1, 0.01), (2e8, 1e-3, 5, 0.01)])
def test_defaults_follow_the_length(tokens, low, every, gamma):
    """An update when the lowest target means ten firings, but at least 100 updates; 8 gammas in all."""
    args = gba_sae.parse_args(["--low", str(low), "--high", "0.1", "--d-sae", "100", "--gamma-up", "0"])
    args.steps = int(tokens) // args.batch_size
    rule_defaults(args)
    assert (args.bias_every, args.gamma_down, args.gamma_up) == (every, pytest.approx(gamma), 0)

# --- the step -------------------------------------------------------------------------------------

def started(d_sae, *flags):
    """SAE, Adam, state and args of train(), for steps by hand."""
    args = gba_sae.parse_args(["--batch-size", "64", "--no-bf16", "--groups", "2", "--bias-every", "4",
                               "--gamma-down", "0.2", "--gamma-up", "0.1", *flags])
    args.steps, args.warmup, args.d_sae, args.lr = 100, 1, d_sae, 1e-2
    torch.manual_seed(0)
    rule_defaults(args)
    sae, state = GBASAE(16, d_sae, args.relu), init_state(args, "cpu")
    return sae, runs.adam(sae, args.lr, gba_sae.BETAS), state, args

@pytest.mark.parametrize("relu", [[], ["--relu"]])
def test_streamed_statistics_equal_a_stored_buffer(relu):
    """Over 40 steps with an update every 4, dense at first and sparse later: each new bias is that of
    Algorithm 2 on the pre-activations of the last 4 batches; nothing else moves it. Some fall, some
    stay, and some are revived when the inputs get smaller. Weights move; the statistics are of those
    before each step."""
    sae, opt, state, args = started(60, "--high", "0.1", "--low", "0.02", *relu)
    g, buffer, sparse, moves = torch.Generator().manual_seed(1), [], set(), set()
    for step in range(40):
        x, b = torch.randn(64, 16, generator=g) * (1 + 0.5 * (step < 8)), sae.b_enc.clone()
        buffer.append(F.linear(x, sae.W_dec.detach(), b))
        train_step(sae, opt, x, state, step, args)
        sparse.add(state["sparse"])
        assert sae.b_enc.max() <= 0
        if (step + 1) % 4:
            assert torch.equal(sae.b_enc, b)
            continue
        rows, p, group = torch.cat(buffer), state["target"], state["group"]
        expected = adapt(b, (rows > 0).float().mean(0), rows.amax(0).relu(), p[group], group, args)
        assert torch.allclose(sae.b_enc, expected, atol=1e-5)
        moves |= set((sae.b_enc - b).sign().tolist())
        assert state["count"].sum() == state["peak"].sum() == 0
        buffer = []
    assert sparse == {False, True} and moves == {-1, 0, 1}

def test_frequencies_leave_out_what_was_bad():
    """Two good batches of four: the same biases as from those two alone."""
    x, new = [torch.randn(64, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)], []
    for batches in ([x[0], x[0] * torch.nan, x[1], x[1] * torch.nan], [x[0], x[0], x[1], x[1]]):
        sae, opt, state, args = started(60)
        args.lr = 1e-12
        for step, batch in enumerate(batches):
            train_step(sae, opt, batch, state, step, args)
        new.append(sae.b_enc.clone())
    assert torch.allclose(*new, atol=1e-6) and new[0].min() < 0

def test_groups_in_the_log_and_in_cfg(tmp_path):
    """Every line of metrics.jsonl has target and frequency of each group; cfg.json those of held-out
    data, with the share of latents above the target."""
    argv = "--model toy --toy song --d-sae 90 --batch-size 64 --tokens 6400 --groups 3 --high 0.2 --low 0.02"
    sae = gba_sae.train(gba_sae.parse_args([*argv.split(), "--out", str(tmp_path / "run"), "--log-every", "10"]))
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    for line in lines:
        assert line["target"] == pytest.approx([0.2, 0.2 * 0.1 ** 0.5, 0.02])
        assert 30 * sum(line["freq"]) == pytest.approx(line["l0"], rel=1e-3)
    results = json.loads((tmp_path / "run/cfg.json").read_text())["metadata"]["results"]
    assert 30 * sum(g["freq"] for g in results["groups"]) == pytest.approx(results["l0"], rel=1e-3)
    assert [g["target"] for g in results["groups"]] == pytest.approx(lines[0]["target"])
    x = Toy.preset("song").sample(65536, torch.Generator().manual_seed(3))[0]
    q = (sae.encode(x) > 0).float().mean(0).unflatten(0, (3, 30))
    p = torch.tensor(lines[0]["target"])[:, None]
    over = (q > p + 3 * (p * (1 - p) / len(x)).sqrt()).float().mean(1)
    for g, freq, share in zip(results["groups"], q.mean(1), over):
        assert g["freq"] == pytest.approx(float(freq), rel=0.02) and abs(g["over"] - share) < 0.1
    assert over.max() > 0                                    # the biases have had 100 steps only

@pytest.mark.parametrize("flag, value, word", [
    ("--low", "0.2", "--high"), ("--low", "0", "above 0"), ("--high", "1.5", "at most 1"),
    ("--groups", "0", "at least 1"), ("--groups", "999", "--d-sae"), ("--gamma-down", "0", "above 0"),
    ("--gamma-down", "1.1", "at most 1"), ("--gamma-up", "-1", "at least 0"), ("--gamma-up", "nan", "at least"),
    ("--bias-every", "0", "at least 1"), ("--bias-every", "1000", "--tokens"),
    ("--high", "nan", "at most 1")])
def test_bad_values(flag, value, word, tmp_path, one_line):
    argv = ["--model", "toy", "--d-sae", "90", "--out", str(tmp_path / "run"), flag, value]
    one_line(lambda: gba_sae.train(gba_sae.parse_args(argv)), flag, word)
    assert not (tmp_path / "run").exists()
