"""Modules on fake tensors."""

from __future__ import annotations

import torch
from fmedge_converters.fakes import unchanged_buffers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class Moving(torch.nn.Module):
    """Puts its table where its input is at every call, as ctrl does in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0).reshape(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.table.to(x.dtype)
        return x @ self.table


def test_a_buffer_that_code_replaces_keeps_its_values() -> None:
    model = torch.nn.Sequential(Moving())
    with FakeTensorMode(allow_non_fake_inputs=True), unchanged_buffers(model):
        y = model(torch.ones(1, 3, dtype=torch.float16))
        assert isinstance(y, FakeTensor) and y.dtype == torch.float16
    (table,) = model.buffers()
    assert not isinstance(table, FakeTensor)
    assert table.dtype == torch.float32 and table.tolist() == [[0, 1], [2, 3], [4, 5]]
