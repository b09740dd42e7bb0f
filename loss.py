"""Symmetric InfoNCE, the one loss of ImageBind (paper, equation 1), with negatives from every process.

van den Oord et al., 2018 (https://arxiv.org/abs/1807.03748); the learnable temperature is CLIP's
(https://arxiv.org/abs/2103.00020, section 2.5).

    python loss.py            # losses of small batches beside the plain form's, and the gradient by finite differences
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

MAX_LOGIT_SCALE = 100.0
BLOCK = 2**22  # logits held at once: 16 MB in float32


def info_nce(q, k, logit_scale):
    """Equation 1 in its plain form, L(q, k) + L(k, q) of q, k (B, E) in one process: what InfoNCE computes in blocks."""
    logits = logit_scale * q @ k.T  # (B, B)
    target = torch.arange(len(q), device=q.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


class InfoNCE(nn.Module):
    """The contrastive loss of one pair of modalities, with its temperature.

    temperature: its start when learnable (CLIP: 0.07), its value when not (the paper's choice for
    all pairs but image-text). The logit scale, 1 / temperature, is learned as its logarithm and
    kept at 100 or below.
    """

    def __init__(self, temperature=0.07, learnable=True):
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learnable)

    @property
    def logit_scale(self):
        return self.log_logit_scale.exp()

    def forward(self, q, k):
        """Unit-length embeddings q, k (B, E) of B pairs -> loss, in-batch accuracy (both scalars).

        Accuracy: the share of k to which, of all q of the batch, their own is the nearest.
        With several processes, each brings its own part of the global batch, the negatives are all
        of it, and each gets its share of the global loss: the sum over processes is the loss that
        one process would have with the whole batch, and so is the sum of the gradients.
        """
        with torch.no_grad():  # the parameter itself is cut back: a cut output would have no gradient to return
            self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        all_q, start = gather(q)
        with torch.autocast(q.device.type, enabled=False):  # sums over a batch need all the digits
            return BlockedInfoNCE.apply(all_q, k, self.logit_scale, start)


class BlockedInfoNCE(torch.autograd.Function):
    """L(q, k) + L(k, q) of all q (N, E) and this process's k (B, E), without ever holding the logits (B, N) whole.

    logits_ij = logit_scale * k_i.q_j serve both directions: k_i's softmax goes along row i, q_j's down
    column j. Forward keeps their logsumexps alone; backward makes each block of rows again, where
    d loss / d logits_ij = (exp(logits_ij - row_i) + exp(logits_ij - column_j) - 2 [i = j]) / N.
    """

    @staticmethod
    def forward(ctx, q, k, logit_scale, start):
        scaled, own = logit_scale * k, slice(start, start + len(k))
        target = torch.arange(start, start + len(k), device=k.device)
        rows, columns, hits = k.new_empty(len(k)), k.new_full((len(q),), -math.inf), 0
        for block in blocks(len(k), len(q)):
            logits = scaled[block] @ q.T  # (b, N)
            rows[block] = logits.logsumexp(dim=1)
            columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
            hits = hits + (logits.argmax(dim=1) == target[block]).sum()
        if processes() > 1:
            parts = [torch.empty_like(columns) for _ in range(processes())]
            dist.all_gather(parts, columns)
            columns = torch.stack(parts).logsumexp(dim=0)
        ctx.save_for_backward(q, k, logit_scale, rows, columns, target)
        positives, accuracy = (scaled * q[own]).sum(dim=1), hits / len(q)
        ctx.mark_non_differentiable(accuracy)
        return (rows + columns[own] - 2 * positives).sum() / len(q), accuracy  # averaged over the global batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        q, k, logit_scale, rows, columns, target = ctx.saved_tensors
        scaled, factor = logit_scale * k, grad / len(q)
        k_grad, q_grad = torch.empty_like(k), torch.zeros_like(q) if ctx.needs_input_grad[0] else None
        for block in blocks(len(k), len(q)):
            logits = scaled[block] @ q.T
            slope = (logits - rows[block, None]).exp_()
            slope += logits.sub_(columns).exp_()
            slope[torch.arange(len(slope), device=k.device), target[block]] -= 2
            k_grad[block] = slope @ q
            if q_grad is not None:  # not for a frozen anchor
                q_grad.addmm_(slope.T, scaled[block])
        scale_grad = factor * (k_grad * k).sum()
        if q_grad is not None:
            q_grad *= factor
        return q_grad, k_grad.mul_(factor * logit_scale), scale_grad, None


def blocks(rows, columns):
    """Slices of the rows, of at most BLOCK logits each."""
    step = max(1, BLOCK // columns)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def gather(z):
    """(B, E) of this process -> (N, E) of all, in order of rank, and where this one's rows begin.

    Differentiable. Processes may bring different numbers of rows.
    """
    if processes() == 1:
        return z, 0
    sizes = [torch.zeros(1, dtype=torch.long, device=z.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([len(z)], device=z.device))
    sizes = [int(s) for s in sizes]
    return Gather.apply(z, sizes), sum(sizes[: rank()])


class Gather(torch.autograd.Function):
    """Forward: all processes' rows. Backward: the sum of all processes' gradients for this one's rows."""

    @staticmethod
    def forward(ctx, z, sizes):
        ctx.sizes = sizes
        padded = F.pad(z, (0, 0, 0, max(sizes) - len(z)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[rank()], None


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(8, 16, dtype=torch.double), dim=-1).requires_grad_() for _ in range(2))
    criterion = InfoNCE().double()
    one = q[:1].expand(8, -1)
    for name, a, b in (("unrelated", q, k), ("equal", q, q), ("all in one place", one, one)):
        (loss, accuracy), plain = criterion(a, b), info_nce(a, b, criterion.logit_scale)
        print(f"8 pairs, {name}, at temperature 0.07: loss {loss.item():.4f} (plain form: {plain.item():.4f}), "
              f"in-batch accuracy {accuracy.item():.0%}")
    print(f"2 ln 8 = {2 * math.log(8):.4f} is the loss of a model that cannot tell them apart")
    print("gradient equals finite differences:", torch.autograd.gradcheck(lambda q, k: criterion(q, k)[0], (q, k)))
