"""Drives each library's own training step on batches that we hand it, for speed.py and recovery.py.

    make(name, d, F, k, lr, steps, seed, batch, bf16) -> object with
        step(x)         one training step of that library on x [B, D]
        decoder()       [F, D]
        encode(x)       [B, F], as at inference
        reconstruct(x)  [B, D]

lr None means the library's own default. dead=share: that share of the latents counts as dead at
every step, so that AuxK is at work. Libraries that only have a training loop run that loop in a
thread, which takes one batch per step. Only one library per process: some need stand-ins for
packages that they import and that their training step does not use.
"""
import importlib.util, os, queue, sys, tempfile, threading
from pathlib import Path
from unittest.mock import MagicMock

os.environ.update(TQDM_DISABLE="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")
import torch

def stand_in(*names):
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            found = None
        if not found:
            sys.modules[name] = MagicMock(name=name)

class Loop:
    """Runs target(iterator of batches) in a thread, one batch for each call of step."""
    def __init__(self, target):
        self.batches, self.ready, self.error = queue.Queue(), queue.Queue(), None
        def run():
            try:
                target(self)
            except BaseException as err:
                self.error = err
            self.ready.put(None)
        threading.Thread(target=run, daemon=True).start()
        self.wait()

    def __iter__(self):
        return self

    def __next__(self):
        self.ready.put(None)
        return self.batches.get()

    def wait(self):
        self.ready.get()
        if self.error:
            raise RuntimeError("the library's loop failed") from self.error

    def step(self, x):
        self.batches.put(x)
        self.wait()

class Peer:
    @torch.no_grad()
    def reconstruct(self, x):
        return self.decode(self.encode(x))

class Ours(Peer):
    """topk_sae.py: its train_step, as its train() calls it."""
    def __init__(self, d, F, k, lr, steps, seed, batch, bf16, dead=0.0):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import topk_sae
        self.m, self.steps, self.i = topk_sae, steps, 0
        flags = ["--k", k, "--batch-size", batch, "--auxk", d // 2, "--d-sae", F]
        self.args = topk_sae.parse_args([*map(str, flags), "--bf16" if bf16 else "--no-bf16"])
        self.args.lr = lr or topk_sae.default_lr(F, steps)
        self.args.warmup = max(1, min(1000, steps // 10))
        self.args.dead_after = max(1, steps * batch // 100)
        torch.manual_seed(seed)
        self.sae = topk_sae.TopKSAE(d, F, k)
        self.opt = topk_sae.data.adam(self.sae, self.args.lr)
        self.since = torch.zeros(F, dtype=torch.int64)
        self.dead = torch.arange(F)[:: round(1 / dead)] if dead else self.since.nonzero()[:, 0]
        self.forced = dead > 0

    def step(self, x):
        lr = self.m.lr_at(self.i, self.steps, self.args)
        self.m.train_step(self.sae, self.opt, x, self.since, self.dead, lr, self.args)
        self.i += 1
        if self.i % self.m.CHECK_EVERY == 0 and not self.forced:
            self.dead = (self.since > self.args.dead_after).nonzero()[:, 0]

    def decoder(self):
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        return self.sae.encode(x)

    def decode(self, z):
        return self.sae.decode(z)

class DictionaryLearning(Peer):
    """dictionary-learning 0.1.0: TopKTrainer.update; bf16 by an autocast of ours around it."""
    def __init__(self, d, F, k, lr, steps, seed, batch, bf16, dead_after=None, dead=0.0):
        stand_in("nnsight", "circuitsvis", "circuitsvis.activations", "umap", "zstandard")
        from dictionary_learning.trainers import TopKTrainer
        self.trainer = TopKTrainer(
            steps=steps, activation_dim=d, dict_size=F, k=k, layer=0, lm_name="none", seed=seed,
            device="cpu", warmup_steps=min(1000, max(steps // 3, 1)), **({"lr": lr} if lr else {}))
        if dead_after:
            self.trainer.dead_feature_threshold = dead_after
        self.i, self.bf16, self.dead = 0, bf16, dead

    def step(self, x):
        if self.dead:
            self.trainer.num_tokens_since_fired[::round(1 / self.dead)] = 10 ** 9
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.trainer.update(self.i, x)
        self.i += 1

    def decoder(self):
        return self.trainer.ae.decoder.weight.T.detach()

    @torch.no_grad()
    def encode(self, x):
        return self.trainer.ae.encode(x)

    def decode(self, z):
        return self.trainer.ae.decode(z)

class SAELens(Peer):
    """sae-lens 6.54: SAETrainer.fit with TopKTrainingSAE; bf16 is its own autocast."""
    def __init__(self, d, F, k, lr, steps, seed, batch, bf16, dead_after=None, dead=0.0):
        import sae_lens
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        torch.manual_seed(seed)
        self.sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(
            d_in=d, d_sae=F, k=k, device="cpu", dtype="float32"))
        cfg = SAETrainerConfig(
            total_training_samples=(steps + 1) * batch, train_batch_size_samples=batch,
            lr=lr or 3e-4, lr_end=lr or 3e-4, device="cpu", autocast=bf16,
            save_final_checkpoint=False,
            dead_feature_window=dead_after // batch if dead_after else 1000,
            logger=LoggingConfig(log_to_wandb=False))
        self.dead = dead
        def fit(batches):
            self.trainer = SAETrainer(cfg=cfg, sae=self.sae, data_provider=batches)
            self.trainer.fit()
        self.loop = Loop(fit)

    def step(self, x):
        if self.dead:
            self.trainer.n_forward_passes_since_fired[::round(1 / self.dead)] = 10 ** 9
        self.loop.step(x)

    def decoder(self):
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        self.sae.eval()
        z = self.sae.encode(x)
        return z.to_dense() if z.is_sparse else z

    def decode(self, z):
        return self.sae.decode(z)

class Sparsify(Peer):
    """eai-sparsify 1.3.3: Trainer.fit over a dummy model that emits our batch; Adam, bf16."""
    def __init__(self, d, F, k, lr, steps, seed, batch, bf16, optimizer="adam", dead=0.0):
        from sparsify import SparseCoderConfig, TrainConfig, Trainer
        peer = self
        class Layer(torch.nn.Module):
            def forward(self, x):
                return peer.x
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.p = Layer(), torch.nn.Parameter(torch.zeros(1))
            base_model = property(lambda self: self)
            device = property(lambda self: torch.device("cpu"))
            dummy_inputs = property(lambda self: dict(x=torch.zeros(1, 1)))
            def forward(self, x):
                return self.layer(x)
        class Batches:
            def __len__(self):
                return steps + 1
            def __getitem__(self, i):
                x = next(peer.loop)
                peer.x = x.unsqueeze(0)
                return dict(input_ids=torch.zeros(len(x), dtype=torch.long))
        self.x = torch.zeros(1, 1, d)
        cfg = TrainConfig(
            sae=SparseCoderConfig(activation="topk", num_latents=F, k=k), batch_size=1, lr=lr,
            optimizer=optimizer, hookpoints=["layer"], init_seeds=[seed], save_every=10 ** 9,
            log_to_wandb=False, save_dir=tempfile.mkdtemp(), auxk_alpha=1 / 32 if dead else 0.0,
            lr_warmup_steps=min(1000, max(steps // 3, 1)))
        self.trainer = Trainer(cfg, Batches(), Model())
        self.sae = self.trainer.saes["layer"]
        self.loop = Loop.__new__(Loop)
        self.loop.__init__(lambda batches: self.trainer.fit())
        self.dead = dead

    def step(self, x):
        if self.dead:
            self.trainer.num_tokens_since_fired["layer"][::round(1 / self.dead)] = 10 ** 9
        self.loop.step(x)

    def decoder(self):
        for opt in self.trainer.optimizers:                  # schedule-free ones average weights
            getattr(opt, "eval", lambda: None)()
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        vals, idx, _ = self.sae.encode(x)
        return torch.zeros(len(x), self.sae.num_latents).scatter_(-1, idx, vals.float())

    def decode(self, z):
        return z @ self.sae.W_dec + self.sae.b_dec

class Overcomplete(Peer):
    """overcomplete 0.3.0: train_sae or, for bf16, train_sae_amp; without its auxiliary loss."""
    def __init__(self, d, F, k, lr, steps, seed, batch, bf16):
        stand_in("PIL", "torchvision", "timm", "cv2", "skimage", "matplotlib", "matplotlib.pyplot",
                 "matplotlib.colors")
        import overcomplete.sae
        from overcomplete.sae.train import train_sae, train_sae_amp
        torch.manual_seed(seed)
        self.sae = overcomplete.sae.TopKSAE(d, F, top_k=k)
        mse = lambda x, x_hat, pre, z, D: (x - x_hat).square().mean()
        opt = torch.optim.Adam(self.sae.parameters(), lr=lr or 5e-4)
        train = train_sae_amp if bf16 else train_sae
        self.loop = Loop(lambda batches: train(self.sae, batches, mse, opt, nb_epochs=1,
                                               monitoring=0, device="cpu"))
        self.step = self.loop.step

    def decoder(self):
        self.sae.eval()
        return self.sae.get_dictionary().detach()

    @torch.no_grad()
    def encode(self, x):
        self.sae.eval()
        return self.sae.encode(x)[1]

    def decode(self, z):
        return self.sae.decode(z)

LIBRARIES = {"ours": Ours, "dictionary-learning": DictionaryLearning, "sae-lens": SAELens,
             "sparsify": Sparsify, "overcomplete": Overcomplete}

def make(name, *args, **kw):
    return LIBRARIES[name](*args, **kw)
