"""Masked FVU: the error of an SAE on coordinates that its encoder does not see.

    u = (x - mean) Q, with a random orthonormal basis Q [D, D], as activations have no basis of
    their own; m ~ Bernoulli(p) for each token and coordinate. The encoder sees mean + (m u / p) Q^T
    masked FVU = sum |(1 - m) (u - u_hat)|^2 / sum |(1 - m) u|^2

What is hidden can only be predicted through features that it shares with what is seen; further
latents fit the noise that hiding adds. docs/choosing_l0.md: the derivation, a mean over bases, and
its limits. After the sample validation and, in training, the coordinated dropout of Keshtkaran and
Pandarinath 2019 (arXiv 1908.07896; its abstract and notes on it were read). A rotated basis, and
choosing k by it, are ours.
"""
import numpy as np
import torch

BLOCK = 2048                            # tokens that have one basis
MASK, TRAIN_MASK, BASIS, TRAIN_BASIS = 1, 2, 3, 4   # the first integer of a key: what is drawn

def drawn(key):
    """A generator of random numbers, a function of the key: integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)

def basis(D, device, *key):
    """A random orthonormal basis [D, D], a function of the key."""
    return torch.linalg.qr(torch.randn(D, D, generator=drawn(key))).Q.to(device)

def seen(u, p, *key):
    """Which of the coordinates u [B, D] the encoder sees: bool [B, D], a function of the key."""
    return (torch.rand(u.shape, generator=drawn(key)) < p).to(u.device)

@torch.no_grad()
def masked_fvu(reconstruct, x, mean, p):
    """Masked FVU of a function reconstruct, [B, D] -> [B, D], on x [M, D] with mean [D]. Each block
    of rows has a basis of its own; bases and masks are the same at every call. NaN if all rows are
    the mean."""
    error = power = 0.0
    for i, part in enumerate(x.split(BLOCK)):
        Q = basis(x.shape[1], x.device, BASIS, i)                                    # (D, D)
        u = (part - mean) @ Q                                                        # (B, D)
        m = seen(u, p, MASK, i)
        u_hat = (reconstruct(mean + (m * u / p) @ Q.T) - mean) @ Q
        error += (~m * (u - u_hat)).double().pow(2).sum().item()
        power += (~m * u).double().pow(2).sum().item()
    return error / power if power else float("nan")
