"""Symmetric InfoNCE, the one loss of ImageBind (paper, equation 1), with negatives from every process.

van den Oord et al., 2018 (https://arxiv.org/abs/1807.03748); the learnable temperature is CLIP's
(https://arxiv.org/abs/2103.00020, section 2.5).

    python loss.py            # the loss of a small batch, and its gradient against finite differences
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

MAX_LOGIT_SCALE = 100.0


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

        With several processes, each brings its own part of the global batch, the negatives are all
        of it, and each gets its share of the global loss: the sum over processes is the loss that
        one process would have with the whole batch, and so is the sum of the gradients.
        """
        with torch.no_grad():  # the parameter itself is cut back: a cut output would have no gradient to return
            self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        all_q, start = gather(q)
        all_k, _ = gather(k)
        target = torch.arange(start, start + len(q), device=q.device)
        q_logits = self.logit_scale * q @ all_k.T  # (B, N), row i: which of all k belongs to q_i
        k_logits = self.logit_scale * k @ all_q.T
        # L(I,M) + L(M,I), each averaged over the global batch
        loss = F.cross_entropy(q_logits, target, reduction="sum") + F.cross_entropy(k_logits, target, reduction="sum")
        hits = (k_logits.argmax(dim=1) == target).sum()
        return loss / len(all_q), hits / len(all_q)


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(z):
    """(B, E) of this process -> (N, E) of all, in order of rank, and where this one's rows begin.

    Differentiable. Processes may bring different numbers of rows.
    """
    if processes() == 1:
        return z, 0
    sizes = [torch.zeros(1, dtype=torch.long, device=z.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([len(z)], device=z.device))
    sizes = [int(s) for s in sizes]
    return Gather.apply(z, sizes), sum(sizes[: dist.get_rank()])


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
        return grad.split(ctx.sizes)[dist.get_rank()], None


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(8, 16, dtype=torch.double), dim=-1).requires_grad_() for _ in range(2))
    criterion = InfoNCE().double()
    for name, other in (("unrelated", k), ("equal", q)):
        loss, accuracy = criterion(q, other)
        print(f"8 {name} pairs at temperature 0.07: loss {loss.item():.4f}, in-batch accuracy {accuracy.item():.0%}")
    print(f"2 ln 8 = {2 * math.log(8):.4f} is the loss of a model that cannot tell them apart")
    print("gradient equals finite differences:", torch.autograd.gradcheck(lambda q, k: criterion(q, k)[0], (q, k)))
