"""Sums over the active latents alone: what makes a training step fast. Of ours it imports nothing.

An entry is one latent on one token. Of the B F entries of the codes Z [B, F] (B tokens, F latents)
most are 0. Values and gradients are computed from the n entries that may differ from 0, at a cost
of n D in place of B F D (D: dimension of x), so no [B, F] gradient exists. The exception is the
class Dense: until the codes of ReLU, gated and GBA SAEs are sparse, plain autograd is faster. The
docstring of each function is the dense formula that it equals; the tests check each.

The product x @ W_enc stays dense, since it decides which latents are active. Except with Dense it
runs without autograd, and Encode computes the gradients of the active entries.
"""
import copy

import torch
from torch import nn

# --- where codes are active -----------------------------------------------------------------------

class Active:
    """Where codes Z [B, F] may be non-zero: entry j is of token row[j] and latent col[j]. Rows
    ascend. Z itself is never built; z [n] holds its entries."""
    complete = 1              # 0 where encode_fixed had no room for all active entries. Losses are
                              # multiplied by it, so such a batch gives no gradient.

    def __init__(self, row, col, batch, d_sae):
        self.row, self.col, self.d_sae = row, col, d_sae
        self.row_starts = torch.searchsorted(row, torch.arange(batch, device=row.device))
        ascending, self.by_col = col.sort()
        self.col_starts = torch.searchsorted(ascending, torch.arange(d_sae, device=row.device))

    def matmul(self, z, W):
        """Z @ W: [B, D]"""
        return nn.functional.embedding_bag(self.col, W, self.row_starts, mode="sum",
                                           per_sample_weights=z)

    def t_matmul(self, z, X):
        """Z.T @ X: [F, D]"""
        return nn.functional.embedding_bag(self.row[self.by_col], X, self.col_starts, mode="sum",
                                           per_sample_weights=z[self.by_col])

    def t_sum(self, z):
        """Z.sum(0): [F]"""
        return torch.zeros(self.d_sae, dtype=z.dtype, device=z.device).index_add_(0, self.col, z)

    def t_max(self, z):
        """Z.amax(0), or 0 where that is negative: [F]"""
        return z.new_zeros(self.d_sae).scatter_reduce(0, self.col, z, "amax")

    def lookup(self, b):
        """b.expand(B, F)[row, col]: [n], for b [F]"""
        return b.index_select(0, self.col)

    def entries(self, X, W):
        """(X @ W.T)[row, col]: [n]. PyTorch has this product as the gradient of embedding_bag with
        respect to its weights z, in a private operation."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            X, W, self.col, self.row_starts, self.row, 0)

    def decode(self, z, W):
        """Z @ W: [B, D], with gradients for z and W"""
        return Decode.apply(z, self, W)

    def in_rows(self, row, batch):
        """The same entries, as codes [batch, F] with other rows, which must ascend, too."""
        other = copy.copy(self)
        other.row = row
        other.row_starts = torch.searchsorted(row, torch.arange(batch, device=row.device))
        return other

class Dense:
    """Active's methods where codes are not a list of entries but all of Z [B, F]: plain torch."""
    complete = 1

    def t_sum(self, Z):
        return Z.sum(0)

    def t_max(self, Z):
        return Z.amax(0).relu().to(torch.promote_types(Z.dtype, torch.float32))

    def lookup(self, b):
        return b

    def decode(self, Z, W):
        return Z @ W

class Encode(torch.autograd.Function):
    """((x - b_dec) @ W_enc + b_enc)[row, col]: [n], whose values `pre` are known already; x gets no
    gradient."""
    @staticmethod
    def forward(ctx, pre, active, x, W_enc, b_enc, b_dec):
        ctx.active = active
        ctx.save_for_backward(x, W_enc, b_dec)
        return pre.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        x, W_enc, b_dec = ctx.saved_tensors
        grad_b = ctx.active.t_sum(grad)
        grad_W = ctx.active.t_matmul(grad, x - b_dec).T
        return None, None, None, grad_W, grad_b, -(W_enc @ grad_b)

class Decode(torch.autograd.Function):
    """Z @ W_dec: [B, D], from the entries z [n] of Z."""
    @staticmethod
    def forward(ctx, z, active, W_dec):
        ctx.active = active
        ctx.save_for_backward(z, W_dec)
        return active.matmul(z, W_dec)

    @staticmethod
    def backward(ctx, grad):
        z, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_W = ctx.active.t_matmul(z, grad) if ctx.needs_input_grad[2] else None
        return ctx.active.entries(grad, W_dec), None, grad_W

class Rows(torch.autograd.Function):
    """W and W[rows], for W [F, D]; the rows differ. The gradient of W[rows] is added to that of W
    in place, as autograd would make another [F, D] of it; so that must be a tensor of its own."""
    @staticmethod
    def forward(ctx, W, rows):
        ctx.rows = rows
        return W.view_as(W), W[rows]

    @staticmethod
    def backward(ctx, grad, grad_rows):
        return grad.index_add_(0, ctx.rows, grad_rows), None

# --- the largest entries: TopK, BatchTopK ---------------------------------------------------------

def top(pre, k):
    """pre.topk(k), of each row, exactly; but faster, because the k largest of a row lie in the k
    chunks with the largest maxima. Chunk j consists of the columns j, j + n, j + 2 n, j + 3 n."""
    n, rest = divmod(pre.shape[1], 4)                                        # n chunks
    if rest or n < 2 * k:
        return pre.topk(k, sorted=False)
    _, chunks = top(pre.unflatten(1, (4, n)).amax(1), k)                     # (B, k)
    cols = torch.cat([chunks + i * n for i in range(4)], dim=1)              # (B, 4 k)
    vals, which = pre.gather(1, cols).topk(k, sorted=False)
    return vals, cols.gather(1, which)

def flat_top(pre, n):
    """pre.topk(n).indices.sort().values, for pre [N], exactly. The n largest are sought above a
    threshold that a sample sets; among all entries on CUDA, and where the sample misleads."""
    sample, found = pre[::61], pre.new_empty(0)               # 61 is prime: it meets most latents
    rank = int(n / 61 + 4 * (n / 61) ** 0.5) + 4              # 4 standard deviations to be safe
    if rank < len(sample) and not pre.is_cuda:
        found = (pre > sample.topk(rank, sorted=False).values.min()).nonzero()[:, 0]
    if len(found) < n:
        return pre.topk(n, sorted=False).indices.sort().values
    return found[pre[found].topk(n, sorted=False).indices].sort().values

# --- the positive entries: ReLU, gated, JumpReLU --------------------------------------------------

def encode(x, W_enc, bias, b_dec, few, room):
    """pre = (x - b_dec) @ W_enc + bias, and the Active or Dense that says which entries it has:
      not few       all of them, [B, F]: the fastest while many are positive
      few, room 0   the positive ones, [n]: the host waits to learn n
      few, room n   the positive ones and zeros up to n, [n]: the host need not wait (CUDA)"""
    if not few:
        return encode_dense(x, W_enc, bias, b_dec)
    if not room:
        return encode_sparse(x, W_enc, bias, b_dec)
    return encode_fixed(x, W_enc, bias, b_dec, room)

def encode_dense(x, W_enc, bias, b_dec):
    """(x - b_dec) @ W_enc + bias: [B, F]

    Autograd would compute the gradient of x - b_dec, [B, D], only to sum it for b_dec: a product as
    large as the encoder's own. To move b_dec is to move the bias by -b_dec @ W_enc. So b_dec is a
    constant in x - b_dec, and `zero`, a term of the bias whose value is 0, carries its gradient."""
    zero = (b_dec.detach() - b_dec) @ W_enc.detach()                         # (F,)
    return nn.functional.linear(x - b_dec.detach(), W_enc.T, bias + zero), Dense()

def encode_sparse(x, W_enc, bias, b_dec):
    """pre[pre > 0]: [n], of pre = (x - b_dec) @ W_enc + bias. The host learns n, so it waits."""
    with torch.no_grad():
        pre = nn.functional.linear(x - b_dec, W_enc.T, bias).flatten()       # may be bf16
        flat = (pre > 0).nonzero()[:, 0]
        active = Active(flat // len(bias), flat % len(bias), len(x), len(bias))
    return Encode.apply(pre[flat], active, x, W_enc, bias, b_dec), active

def encode_fixed(x, W_enc, bias, b_dec, room):
    """pre[pre > 0], and then zeros: [room], of pre = (x - b_dec) @ W_enc + bias.

    The length does not depend on the data, so the host need not wait to learn it. If more entries
    are positive than there is room for, some are missing, and `complete` of the Active is 0."""
    with torch.no_grad():
        pre = nn.functional.linear(x - b_dec, W_enc.T, bias).flatten()       # may be bf16
        on = pre > 0
        # The unused places repeat the last entry, so that rows ascend; their values are 0.
        flat = torch.nonzero_static(on, size=room, fill_value=len(pre) - 1)[:, 0]
        vals = pre[flat] * (torch.arange(room, device=x.device) < on.sum())
        active = Active(flat // len(bias), flat % len(bias), len(x), len(bias))
        active.complete = on.sum() <= room
    return Encode.apply(vals, active, x, W_enc, bias, b_dec), active

# --- nested dictionaries: Matryoshka, Ordered -----------------------------------------------------

class Nested(torch.autograd.Function):
    """sum_b sum_t w[b, t] |x[b] - x_hat[b, t]|^2, where x_hat[b, t] is the reconstruction of token
    b from the latents of its t-th prefix, t = 0 .. T; prefix 0 is empty, prefix T holds them all.

    All T + 1 errors and the gradients of their sum come from one pass over the entries z of Z. Let
    d be the row of W_dec that belongs to an entry z. Let P_t [B, D] be the sum of z d over the
    entries that prefix t adds to prefix t - 1. The errors are r_T = e, which is given, and then
    r_{t-1} = r_t + P_t, down to r_0 = x - b_dec. With R_t = w_t r_t + ... + w_T r_T, the gradient
    of z is -2 <d, R_t>, that of d is -2 z R_t, and that of b_dec is -2 R_0. The value of the sum is
    <r_0, R_0> - sum z <d, R_t>.

    The batch comes in `pieces`: one Active for some tokens each. In a piece the entries of token b
    that prefix t adds have the row b T + t - 1, so that one matmul gives the P_t of all t: T D
    floats a token. They exist for one piece at a time; only gradients are kept for backward."""
    @staticmethod
    def forward(ctx, z, W_dec, b_dec, e, w, pieces):
        T, value, grad_z, grad_W, grad_b = w.shape[1] - 1, 0, [], 0, 0
        entries = z.split([len(active.col) for active in pieces])
        tokens = [len(active.row_starts) // T for active in pieces]
        for active, v, r, weight in zip(pieces, entries, e.clone().split(tokens), w.split(tokens)):
            P = active.matmul(v, W_dec)                                      # (tokens T, D)
            R, P_t = torch.zeros_like(r), P.unflatten(0, (-1, T)).unbind(1)
            for t in range(T, 0, -1):
                R.addcmul_(r, weight[:, t, None])                            # R_t
                r += P_t[t - 1]                                              # r_{t-1}
                P_t[t - 1].copy_(R)               # P_t has served; from here on its place holds R_t
            R.addcmul_(r, weight[:, :1])                                     # R_0
            grad_z.append(active.entries(P, W_dec))
            grad_W, grad_b = active.t_matmul(v, P).add_(grad_W), R.sum(0) + grad_b
            value = (r * R).sum() - (v * grad_z[-1]).sum() + value
        ctx.save_for_backward(torch.cat(grad_z), grad_W, grad_b)
        return value

    @staticmethod
    def backward(ctx, grad):
        return *(-2 * grad * known for known in ctx.saved_tensors), None, None, None

# --- a batch in blocks: every script --------------------------------------------------------------

def backward(loss_fn, sae, x, state, args):
    """loss_fn(sae, x, state, args), and the gradients of the loss, its first result; in as many
    blocks of tokens as state["blocks"] says, one after another, since all of [B, F], several times
    over, may not fit into memory. Terms are means over tokens, those named max_... maxima."""
    results = []
    for part in x.chunk(state.get("blocks", 1)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            total, terms, fired = loss_fn(sae, part, state, args)
        share = len(part) / len(x)
        (total * share).backward()
        results.append((share, total.detach(), {n: t.detach() for n, t in terms.items()}, fired))
    shares, totals, terms, counts = zip(*results)
    mean = lambda values: sum(share * value for share, value in zip(shares, values))
    join = lambda name, values: torch.stack(values).amax(0) if name[:4] == "max_" else mean(values)
    return mean(totals), {n: join(n, [t[n] for t in terms]) for n in terms[0]}, sum(counts)
