"""Doubles of TensorRT's and CUDA's modules that have exactly the names of an inventory, and record what is called.

    module = StrictModule(read_inventory("tensorrt-10.3.0"), implementations)

A class, function, member, property, enumerator or argument that the real module of that version does not have raises
AttributeError or TypeError, as it would there; setting a property that is read-only, too. What a double proves is that
our code speaks a language that the real module understands, in an order that the implementation beside it finds
sensible. It does not prove that TensorRT accepts a graph, that numbers are right on a GPU, or anything about time.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "inventories"
TENSORRT = tuple(sorted(path.stem for path in FOLDER.glob("tensorrt-*.json")))
RTX = tuple(sorted(path.stem for path in FOLDER.glob("tensorrt_rtx-*.json")))
CUDA = tuple(sorted(path.stem for path in FOLDER.glob("cuda-*.json")))


@functools.cache
def read_inventory(name: str) -> dict[str, Any]:
    """An inventory by the name of its file."""
    return {"name": name, **json.loads((FOLDER / f"{name}.json").read_text("utf-8"))}


class StrictModule:
    """A module with the names of an inventory; `implementations` are classes and functions by name."""

    def __init__(self, inventory: dict[str, Any], implementations: Mapping[str, Any]) -> None:
        self._inventory = inventory
        self._made: dict[str, Any] = {}
        self.__version__ = inventory["version"]
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        """Function, or Class.method, and its arguments."""
        unknown = set(implementations) - set(inventory["classes"]) - set(inventory["functions"])
        assert not unknown, f"{inventory['name']} has no {unknown}"
        for name, facts in inventory["classes"].items():
            if "values" in facts:
                self._made[name] = enum.IntEnum(name.rpartition(".")[2], facts["values"])
        for name, made in implementations.items():
            facts = inventory["classes"].get(name)
            if facts is None:
                signatures = inventory["functions"][name]
                self._made[name] = checked(inventory["name"], name, signatures, made, self._calls)
            else:
                self._made[name] = self._strict_class(name, facts, made)

    def __getattr__(self, name: str) -> Any:
        made = self.__dict__["_made"].get(name)
        if made is not None:
            return made
        inventory = self.__dict__["_inventory"]
        if name in inventory["constants"]:
            return inventory["constants"][name]
        if name in inventory["functions"] or name in inventory["classes"]:
            raise NotImplementedError(f"the double of {inventory['name']} does not play {name}")
        raise AttributeError(f"{inventory['name']} has no {name}")

    def _strict_class(self, name: str, facts: dict[str, Any], made: type) -> type:
        label, calls = self._inventory["name"], self._calls
        methods, properties = facts["methods"], set(facts["properties"])

        def read(self: Any, attribute: str) -> Any:
            if attribute.startswith("_"):
                return object.__getattribute__(self, attribute)
            if attribute not in methods and attribute not in properties:
                if type(self) is strict or (not hasattr(type(self), attribute) and attribute not in vars(self)):
                    raise AttributeError(f"{name} of {label} has no {attribute}")
                return object.__getattribute__(self, attribute)  # of a subclass of our own
            value = object.__getattribute__(self, attribute)
            if attribute in methods:
                return checked(label, f"{name}.{attribute}", methods[attribute], value, calls, bound=True)
            return value

        def write(self: Any, attribute: str, value: Any) -> None:
            if not attribute.startswith("_") and type(self) is strict and attribute not in facts["writable"]:
                raise AttributeError(f"{name}.{attribute} of {label} cannot be set")
            object.__setattr__(self, attribute, value)

        def derive(cls: type, **_: Any) -> None:
            for attribute, value in vars(cls).items():
                if not attribute.startswith("_") and callable(value):
                    assert attribute in methods, f"{name} of {label} never calls {attribute}"
                    # TensorRT calls it by position.
                    taken = value.__code__.co_varnames[: value.__code__.co_argcount]
                    assert [len(taken)] == [len(known) for known in methods[attribute]], f"{name}.{attribute}"

        nested = {key.partition(".")[2]: value for key, value in self._made.items() if key.startswith(f"{name}.")}
        space = {"__getattribute__": read, "__setattr__": write, "__init_subclass__": classmethod(derive), **nested}
        if "__init__" in vars(made) or "__init__" not in methods:
            pass
        strict = type(name, (made,), space)
        return strict


def checked(
    label: str, name: str, signatures: list[list[str]], function: Any, calls: list[Any], bound: bool = False
) -> Any:
    """A function that takes the arguments of one of the signatures only."""
    known = [signature for signature in signatures if "*args" not in signature]

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if known and not any(_fits(signature[bound:], given, named) for signature in known):
            raise TypeError(f"{name} of {label} takes {known}, not {len(given)} arguments and {sorted(named)}")
        calls.append((name, given))
        return function(*given, **named)

    return call


def _fits(signature: list[str], given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    names = [argument.rstrip("=") for argument in signature]
    if len(given) > len(names) or not set(named) <= set(names[len(given) :]):
        return False
    left = [argument for argument in signature[len(given) :] if argument.rstrip("=") not in named]
    return all(argument.endswith("=") for argument in left)
