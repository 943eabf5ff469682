"""Tables over positions are read where each row is, and graphs that take all rows to be equally long are refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from fmedge_converters.position_tables import PositionTables, require_own_positions
from fmedge_converters.recording import PROBE_CAPACITY, Recording
from fmedge_runtimes.errors import SourceError

POSITIONS = torch.tensor([[0, 1, 2], [7, 8, 9]])  # [B, S]
TABLE = torch.arange(64 * 64).reshape(1, 1, 64, 64)  # [1, 1, M, M]


def test_the_rows_of_queries_are_those_of_their_positions() -> None:
    with PositionTables(Recording(POSITIONS)):
        found = TABLE[:, :, PROBE_CAPACITY - 3 : PROBE_CAPACITY, :PROBE_CAPACITY]
    assert found.shape == (2, 1, 3, PROBE_CAPACITY)
    for row, positions in enumerate(POSITIONS):
        assert torch.equal(found[row, 0], TABLE[0, 0, positions, :PROBE_CAPACITY])


@pytest.mark.parametrize(
    "cut",
    [
        lambda table: table[:, :, :3, :PROBE_CAPACITY],
        lambda table: table[:, :, PROBE_CAPACITY - 4 : PROBE_CAPACITY],
        lambda table: table[:, :, PROBE_CAPACITY - 3 : PROBE_CAPACITY - 1],
        lambda table: table.expand(2, 1, 64, 64)[:, :, PROBE_CAPACITY - 3 : PROBE_CAPACITY],
        lambda table: table[0, 0],
    ],
    ids=["first rows", "more rows", "fewer rows", "no table but a batch", "no range"],
)
def test_other_cuts_are_left_alone(cut) -> None:
    with PositionTables(Recording(POSITIONS)):
        found = cut(TABLE)
    assert torch.equal(found, cut(TABLE))


def graph(first: str, second: str | int, use: str = "Range") -> ir.Model:
    """One that computes the difference of a dimension, and of another one or a number, and uses it."""
    past = ir.Value(name="past", shape=ir.Shape(["batch", 2, "capacity", 16]), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    nodes: list[ir.Node] = []

    def dimension(name: str | int) -> ir.Value:
        if isinstance(name, int):
            return ir.Value(name="one", const_value=ir.tensor([name]))
        owner = past if name == "capacity" else ids
        assert owner.shape is not None
        axis = [str(dim) if isinstance(dim, int) else dim.value for dim in owner.shape].index(name)
        nodes.append(ir.node("Shape", [owner], {"start": axis, "end": axis + 1}))
        nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0]]))
        return nodes[-1].outputs[0]

    length, zero, one = dimension("sequence"), *(ir.Value(name=f"{i}", const_value=ir.tensor(i)) for i in (0, 1))
    nodes.append(ir.node("Sub", [dimension(first), dimension(second)]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], ir.Value(name="shape")]))
    start = nodes[-1].outputs[0]
    start.shape = ir.Shape([])
    if use == "Range":
        nodes.append(ir.node("Range", [start, ir.Value(name="stop"), one]))
    elif use == "Slice":
        nodes.append(ir.node("Slice", [ids, start, ir.Value(name="stop")]))
    elif use == "Add":
        nodes.append(ir.node("Range", [zero, length, one]))
        nodes[-1].outputs[0].shape = ir.Shape(["sequence"])
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], start]))
    else:  # a number of zeros
        nodes.append(ir.node("Concat", [start], {"axis": 0}))
        nodes.append(ir.node("Expand", [zero, nodes[-1].outputs[0]]))
    whole = ir.Graph([past, ids], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 21})
    return ir.Model(whole, ir_version=10)


@pytest.mark.parametrize("use", ["Range", "Slice", "Add"])
@pytest.mark.parametrize("second", ["sequence", 1])
def test_positions_counted_from_the_length_of_the_cache_are_refused(second: str | int, use: str) -> None:
    with pytest.raises(SourceError, match="numbers its tokens by the length of its cache"):
        require_own_positions(graph("capacity", second, use))


@pytest.mark.parametrize(
    ("first", "second", "use"),
    [
        ("sequence", 1, "Range"),
        ("sequence", "capacity", "Range"),
        ("capacity", 2, "Range"),
        ("capacity", "sequence", "Expand"),  # of the cache only what is not new (git)
    ],
)
def test_other_differences_are_not(first: str, second: str | int, use: str) -> None:
    require_own_positions(graph(first, second, use))
