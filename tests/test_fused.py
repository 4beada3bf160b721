"""Rotations in one compiled pass are the rotations they stand for."""

import pytest
import torch

from so8t import fused
from so8t.errors import GroupError
from so8t.fused import fused_rotations
from so8t.so8 import exp_map, rotate


def turned_and_gradients(x, coords, up):
    a, b = coords.clone().requires_grad_(), x.clone().requires_grad_()
    y = rotate(b * 1.0, exp_map(a), in_place=True)
    y.backward(up)
    return y.detach(), b.grad, a.grad


def test_compiled_rotations_are_the_plain_ones_forward_and_backward(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for one small kernel
    torch.manual_seed(0)
    coords = torch.randn(3, 28, dtype=torch.float64)
    for length in (5, 17):
        x, up = torch.randn(2, length, 24), torch.randn(2, length, 24)
        with fused_rotations():
            compiled = turned_and_gradients(x, coords, up)
            assert not torch.equal(fused.turned(x, exp_map(coords)), torch.zeros_like(x))  # it is in use
        for ours, plain in zip(compiled, turned_and_gradients(x, coords, up), strict=True):
            assert torch.allclose(ours, plain, atol=1e-5)


def test_fused_rotations_compute_in_float32_and_leave_float64_and_tensors_without_storage_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    x, rotation = torch.randn(2, 7, 24), exp_map(torch.randn(3, 28))
    low = x.bfloat16()
    with fused_rotations():
        assert torch.equal(rotate(low, rotation), rotate(low.float(), rotation).bfloat16())
        assert torch.allclose(rotate(x, rotation[:1]), rotate(x, rotation[:1].expand(3, 8, 8)))
        assert fused.turned(x.double(), rotation) is None
        assert fused.turned(x.to("meta"), rotation) is None
    assert fused.turned(x, rotation) is None


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    torch._dynamo.reset()
    with pytest.raises(GroupError, match=r"needs a C\+\+ compiler.*compile=false"), fused_rotations():
        rotate(torch.ones(3, 16), exp_map(torch.ones(2, 28)))
    assert fused._kernel is None
