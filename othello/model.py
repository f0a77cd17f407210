"""A small GPT that reads Othello games, one token a move (its square, 0 to 63; see game.py).

The architecture of Li et al. 2022 (arXiv 2210.13382), pre-norm blocks and learned positions, made
narrow, and the MLP's GELU a squared ReLU (ours). Called like a causal language model of
transformers: model(input_ids).logits.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

import runs
from othello import game

VERSION = b"1"              # to be raised when the same weights or games come to mean another thing
WIDTH = 192
CONTEXT = 59                                                  # moves read: the 60th is the last

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.past = nn.Buffer(torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1), persistent=False)

    def forward(self, x):
        T, qkv = x.shape[1], self.qkv(self.norm_attn(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (n, heads, T, ...)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + self.past[:T, :T]
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.neurons(self.up(self.norm_mlp(x))))

    @staticmethod
    def neurons(up):
        """The MLP's activations: ReLU squared (So et al. 2021, arXiv 2109.08668)."""
        return F.relu(up).square()

class GPT(nn.Module):
    """Token ids [n, T], T <= 59, to logits [n, T, 64] of the next move's square."""
    def __init__(self, width=WIDTH, heads=4, layers=8):
        super().__init__()
        self.embed, self.position = nn.Embedding(64, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)
        self.config = SimpleNamespace(hidden_size=width, max_position_embeddings=CONTEXT,
                                      num_hidden_layers=layers)
        self.config.get_text_config = lambda: self.config
        for name, p in self.named_parameters():
            if p.dim() > 1:                                   # as in GPT-2
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
            elif "bias" in name:
                nn.init.zeros_(p)

    @property
    def device(self):
        return self.embed.weight.device

    def get_output_embeddings(self):
        return self.unembed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids) + self.position.weight[:input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.unembed(self.norm(x)))

class Tokenizer:
    """What shows tokens: squares by name, 'D3 ' for 19."""
    def decode(self, ids):
        return "".join(f"{game.name(i)} " for i in ids)

def folder(name="othello", cache=None):
    """Where weights.safetensors is: of 'othello' here, of 'othello-untrained' in cache, where they
    are put, as training starts from them; else in the folder of that name."""
    if name != "othello-untrained":
        return Path(__file__).parent if name == "othello" else Path(name)
    path = cache / f"othello-untrained-{WIDTH}"
    if not (path / "weights.safetensors").exists():
        with torch.random.fork_rng(), \
             runs.replacing(path / "weights.safetensors", "--cache-dir") as tmp:
            torch.manual_seed(0)
            tmp.write_bytes(save(GPT().state_dict()))
    return path

def load(path):
    """The model with the weights in this folder, as float32, on the CPU."""
    weights = load_file(path / "weights.safetensors")
    model = GPT(width=weights["embed.weight"].shape[1])
    model.load_state_dict({name: t.float() for name, t in weights.items()})
    return model.eval()
