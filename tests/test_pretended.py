"""The pretended GPU refuses what a real one refuses, and computes what the CPU computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def test_tensors_are_where_they_were_made(gpu):
    there = torch.arange(6.0, device="cuda").view(2, 3)
    assert there.device == torch.device("cuda", 0)
    assert there.is_cuda
    assert not there.is_cpu
    for derived in (
        there[0],
        there.T,
        there + 1,
        there.sum(),
        torch.zeros_like(there),
        there.new_ones(2),
        there.half(),
    ):
        assert derived.device.type == "cuda"
    assert there.cpu().device.type == "cpu"
    assert there.to("cuda") is there
    layer = nn.Linear(3, 3)
    assert layer.to("cuda").weight.device.type == "cuda"
    assert torch.equal((there + 1).cpu(), torch.arange(1.0, 7.0).view(2, 3))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: here.add_(there),
        lambda here, there: here + there.sum(),  # a scalar of the GPU cannot come to the CPU
        lambda here, there: here.sum().add_(there.sum()),
        lambda here, there: here[there.long()],
        lambda here, there: torch.where(there > 0, here, there),
        torch.equal,
        nn.functional.linear,
        torch.ops.aten.mul,
    ],
)
def test_two_memories_are_refused(gpu, mistake):
    with pytest.raises(RuntimeError, match="same device"):
        mistake(torch.ones(2, 2), torch.ones(2, 2, device="cuda"))


def test_what_crosses_is_let_through(gpu):
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
    assert (there * torch.tensor(2.0)).device.type == "cuda"
    assert there[torch.tensor([0])].device.type == "cuda"
    there.copy_(2 * here)
    here.copy_(there)
    assert here.device.type == "cpu"
    assert here.sum() == 8
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_gradients_are_there_too(gpu):
    weight = torch.ones(3, device="cuda", requires_grad=True)
    torch.autograd.backward((weight * weight.detach()).sum())
    assert weight.grad.device.type == "cuda"
    torch.optim.AdamW([weight]).step()
    assert weight.device.type == "cuda"


def test_it_has_its_own_random_numbers(gpu):
    torch.manual_seed(0)
    here, there = torch.randn(4), torch.randn(4, device="cuda")
    assert not torch.equal(here, there.cpu())
    generators = torch.Generator().manual_seed(3), torch.Generator("cuda").manual_seed(3)
    drawn = [torch.rand(4, generator=each, device=each.device).cpu() for each in generators]
    assert not torch.equal(*drawn)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(4, generator=generators[0], device="cuda")


def test_its_memory_is_counted_and_can_be_full(gpu):
    gpu.capacity = 4000
    here = torch.zeros(500)
    there = here.to("cuda")
    assert (gpu.used, gpu.uploaded, torch.cuda.mem_get_info()[0]) == (2000, 2000, 2000)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 4000 bytes"):
        torch.cat([there, there])
    del there
    assert gpu.used == 0
    assert torch.ones(900, device="cuda").sum() == 900


def test_it_is_gone_afterwards(gpu):
    there = torch.ones(2, device="cuda")
    gpu.__exit__(None, None, None)
    assert there.device.type == "cpu"
    gpu.__enter__()
