"""Symmetric InfoNCE is equation 1, and many processes compute what one does."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import loss as loss_file
from loss import InfoNCE, info_nce


def pairs(n=10):
    torch.manual_seed(0)
    return [F.normalize(torch.randn(n, 16, dtype=torch.double), dim=-1).requires_grad_() for _ in range(2)]


def test_the_loss_is_equation_1():
    q, k = (z.detach() for z in pairs(5))
    tau, total = 0.2, 0.0
    for a, b in ((q, k), (k, q)):
        for i in range(5):
            terms = [math.exp(float(a[i] @ b[j]) / tau) for j in range(5)]
            total -= math.log(terms[i] / sum(terms)) / 5
    loss, accuracy = InfoNCE(tau, learnable=False)(q, k)
    assert (
        loss.item() == pytest.approx(total, abs=1e-6)
        and info_nce(q, k, 1 / tau).item() == pytest.approx(total, abs=1e-9)
    )
    assert accuracy.item() == pytest.approx(((k @ q.T).argmax(1) == torch.arange(5)).float().mean().item())


def test_who_cannot_tell_pairs_apart_has_a_loss_of_2_ln_n():
    one = pairs()[0].detach()[:1].expand(8, -1)
    assert InfoNCE()(one, one)[0].item() == pytest.approx(2 * math.log(8), abs=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_have_the_value_and_gradients_of_the_whole_matrix(monkeypatch, frozen):
    q, k = pairs()
    whole, blocked = InfoNCE().double(), InfoNCE().double()
    expected = info_nce(q, k, whole.logit_scale)
    gradients = torch.autograd.grad(expected, (q, k, whole.log_logit_scale))
    monkeypatch.setattr(loss_file, "LOGITS_AT_ONCE", 30)  # four blocks of three rows, the last of one
    loss, _ = blocked(q.detach() if frozen else q, k)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert (q.grad is None) == frozen
    for measured, gradient in zip((q.grad, k.grad, blocked.log_logit_scale.grad), gradients):
        assert measured is None or torch.allclose(measured, 3 * gradient, atol=1e-9)


def test_the_loss_keeps_its_digits_under_autocast():
    q, k = (z.detach().float() for z in pairs(200))
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = InfoNCE(0.01)(q, k)
    assert under.item() == pytest.approx(InfoNCE(0.01)(q.double(), k.double())[0].item(), rel=1e-5)


def test_the_temperature_is_learned_or_fixed():
    q, k = pairs()
    learned, fixed = InfoNCE(), InfoNCE(0.05, learnable=False)
    learned(q, k)[0].backward()
    assert (
        learned.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
        and learned.log_logit_scale.grad != 0
    )
    assert fixed.logit_scale.item() == pytest.approx(20, rel=1e-5) and not fixed.log_logit_scale.requires_grad
    with torch.no_grad():
        learned.log_logit_scale.fill_(9.0)
    learned(q, k)[0].backward()
    assert learned.logit_scale.item() == pytest.approx(100) and learned.log_logit_scale.grad != 0


def share(rank, sizes, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes))
    loss_file.LOGITS_AT_ONCE = 30
    q, k = (z.detach().split(sizes)[rank].clone().requires_grad_() for z in pairs())
    criterion = InfoNCE().double()
    loss, _ = criterion(q, k)
    loss.backward()
    results[rank] = (loss.item(), q.grad, k.grad, criterion.log_logit_scale.grad)
    dist.destroy_process_group()


def test_processes_with_parts_of_a_batch_compute_what_one_does_with_the_whole(free_port):
    q, k = pairs()
    criterion = InfoNCE().double()
    loss, _ = criterion(q, k)
    loss.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(share, args=([7, 3], free_port, results), nprocs=2)
        losses, q_grads, k_grads, scale_grads = zip(*(results[rank] for rank in range(2)))
    assert sum(losses) == pytest.approx(loss.item(), abs=1e-9)
    assert torch.allclose(torch.cat(q_grads), q.grad, atol=1e-9)
    assert torch.allclose(torch.cat(k_grads), k.grad, atol=1e-9)
    assert sum(scale_grads).item() == pytest.approx(criterion.log_logit_scale.grad.item(), abs=1e-9)
