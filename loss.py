"""Symmetric InfoNCE, the one loss of ImageBind (paper, equation 1), with negatives from every process.

van den Oord et al., 2018 (https://arxiv.org/abs/1807.03748); the learnable temperature is CLIP's
(https://arxiv.org/abs/2103.00020, section 2.5).

The contract of a loss, for whoever writes another: it is an nn.Module that make_loss returns.
  forward(q, k)   unit-length float32 embeddings (B, E) of B pairs -> loss, in-batch accuracy
                  (scalar tensors); q is of the first modality of the pair
  logit_scale     what a cosine is multiplied by: it is logged, and kept in model.pairs
  processes       each brings its own part of the global batch and returns its share of the global loss:
                  the sum over processes is the loss, accuracy and gradient of one process with the
                  whole batch; gather() brings all processes' embeddings
Its parameters are trained with the encoders, without weight decay unless they are matrices.

    python loss.py            # the loss of a small batch in both forms, its gradient by finite differences
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce

MAX_LOGIT_SCALE = 100.0  # CLIP's cap
LOGITS_AT_ONCE = 2**22  # of the similarity matrix: 16 MB in float32


def info_nce(q, k, logit_scale):
    """Equation 1 in its plain form, L(q, k) + L(k, q) of q, k (B, E) in one process.

    InfoNCE computes the same in blocks. The paper adds both directions up, CLIP halves the sum.
    """
    logits = logit_scale * q @ k.T  # (B, B)
    target = torch.arange(len(q), device=q.device)  # the pairs are on the diagonal
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def make_loss(settings):
    """The loss that a row of train.py's SETTINGS asks for.

    A temperature of None is learned: from 0.07 on, or from the logit_scale that the pair has already.
    """
    if settings["temperature"] is None:
        return InfoNCE(1 / (settings.get("logit_scale") or 1 / 0.07), learnable=True)
    return InfoNCE(settings["temperature"], learnable=False)


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

        Accuracy: the share of k whose own q is the nearest among all q of the batch.
        """
        # Clamp the parameter, not the output: a clamped output passes no gradient back.
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        all_q, start = gather(q)
        with torch.autocast(q.device.type, enabled=False):  # sums over the batch need float32
            return BlockedInfoNCE.apply(all_q, k, self.logit_scale, start)


# ---------------------------------------------------------------------------------------------
# The same in blocks: memory for rows of the similarity matrix, never for all of it


def row_slices(rows, columns, at_once):
    """Slices of the rows of a matrix (rows, columns), each of at most `at_once` numbers."""
    step = max(1, at_once // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


class BlockedInfoNCE(torch.autograd.Function):
    """L(q, k) + L(k, q) of all processes' q (N, E) and this one's k (B, E), without the whole logits (B, N).

    logits_ij = logit_scale * k_i.q_j serve both directions: k_i's softmax goes along row i, q_j's down
    column j. Forward keeps their logsumexps alone. Backward makes each block of rows again, where
    d loss / d logits_ij = (exp(logits_ij - row_i) + exp(logits_ij - column_j) - 2 [i = j]) / N.
    """

    @staticmethod
    def forward(ctx, all_q, k, logit_scale, start):
        N = len(all_q)
        scaled = logit_scale * k
        own = slice(start, start + len(k))  # this process's rows of all_q
        target = torch.arange(start, start + len(k), device=k.device)
        rows = k.new_empty(len(k))  # logsumexp of each row
        columns = k.new_full((N,), -math.inf)  # and of each column, so far
        hits = 0
        for part in row_slices(len(k), N, LOGITS_AT_ONCE):
            logits = scaled[part] @ all_q.T  # (b, N)
            rows[part] = logits.logsumexp(dim=1)
            columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
            hits = hits + (logits.argmax(dim=1) == target[part]).sum()
        if processes() > 1:  # a column goes through every process's rows
            parts = [torch.empty_like(columns) for _ in range(processes())]
            dist.all_gather(parts, columns)
            columns = torch.stack(parts).logsumexp(dim=0)
        ctx.save_for_backward(all_q, k, logit_scale, rows, columns, target)
        # Each pair is in one row and one column; what is taken off both is the pair's own logit.
        positives = (scaled * all_q[own]).sum(dim=1)  # (B,)
        loss = (rows + columns[own] - 2 * positives).sum() / N  # averaged over the global batch
        accuracy = hits / N
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        all_q, k, logit_scale, rows, columns, target = ctx.saved_tensors
        scaled = logit_scale * k
        factor = grad / len(all_q)
        k_grad = torch.empty_like(k)
        q_grad = torch.zeros_like(all_q) if ctx.needs_input_grad[0] else None  # not for a frozen anchor
        for part in row_slices(len(k), len(all_q), LOGITS_AT_ONCE):
            logits = scaled[part] @ all_q.T
            dlogits = (logits - rows[part, None]).exp_()  # softmax along the row
            dlogits += logits.sub_(columns).exp_()  # and down the column
            dlogits[torch.arange(len(dlogits), device=k.device), target[part]] -= 2
            k_grad[part] = dlogits @ all_q
            if q_grad is not None:
                q_grad.addmm_(dlogits.T, scaled[part])
        # k_grad still lacks its factors: with k it adds up to the gradient of the scale.
        scale_grad = factor * (k_grad * k).sum()
        if q_grad is not None:
            q_grad *= factor
        return q_grad, k_grad.mul_(factor * logit_scale), scale_grad, None


# ---------------------------------------------------------------------------------------------
# Over several processes: negatives are the whole global batch


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
    sizes = torch.zeros(processes(), dtype=torch.long)  # not on the device, which the host would wait for
    sizes[rank()] = len(z)
    dist.all_reduce(sizes)
    start = int(sizes[: rank()].sum())
    # Each process's rows among zeros add up to all rows; the gradient of a sum is summed over processes, too.
    among_zeros = F.pad(z, (0, 0, start, int(sizes.sum()) - start - len(z)))
    return all_reduce(among_zeros), start


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 8, 16, dtype=torch.double), dim=-1).requires_grad_()
    criterion = InfoNCE().double()
    print(f"8 unrelated pairs: loss {criterion(q, k)[0].item():.4f} in blocks, "
          f"{info_nce(q, k, criterion.logit_scale).item():.4f} in the plain form")
    equal = torch.autograd.gradcheck(lambda q, k: criterion(q, k)[0], (q, k))
    print("gradient equals finite differences:", equal)
