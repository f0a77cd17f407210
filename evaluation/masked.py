"""Masked FVU: the error of an SAE on coordinates that its encoder does not see.

    u = (x - mean) Q, with a random orthonormal basis Q [D, D], as activations have no basis of
    their own; m ~ Bernoulli(p) for each token and coordinate. The encoder sees mean + (m u / p) Q^T
    masked FVU = sum |(1 - m) (u - u_hat)|^2 / sum |(1 - m) u|^2

What is hidden can only be predicted through features that it shares with what is seen; latents
more than these fit the noise that hiding adds. docs/choosing_l0.md: the derivation, and its limits.
The method is coordinated dropout (Keshtkaran and Pandarinath 2019, arXiv 1908.07896; its abstract
and notes on it were read). The 'SAE' of that paper is a sequential autoencoder of spike counts, not
a sparse one: the method alone carries over. A rotated basis, and choosing k by it, are ours.
"""
import numpy as np
import torch

def basis(D, device):
    """A random orthonormal basis [D, D]: the same one for all data of this dimension."""
    g = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(D, D, generator=g)).Q.to(device)

def seen(u, p, *key):
    """Which of the coordinates u [B, D] the encoder sees: bool [B, D], a function of the key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return (torch.rand(u.shape, generator=torch.Generator().manual_seed(seed)) < p).to(u.device)

@torch.no_grad()
def masked_fvu(reconstruct, x, mean, p):
    """That of a function reconstruct, [B, D] -> [B, D], on x [M, D] with mean [D]; masks are the
    same at every call. NaN if all rows are the mean."""
    Q, error, power = basis(x.shape[1], x.device), 0.0, 0.0
    for i, part in enumerate(x.split(2048)):
        u = (part - mean) @ Q                                                        # (B, D)
        m = seen(u, p, 1, i)
        u_hat = (reconstruct(mean + (m * u / p) @ Q.T) - mean) @ Q
        error += (~m * (u - u_hat)).double().pow(2).sum().item()
        power += (~m * u).double().pow(2).sum().item()
    return error / power if power else float("nan")
