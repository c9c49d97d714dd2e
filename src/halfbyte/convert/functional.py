"""Which modules of a user's multiply matrices themselves, found by reading their source without running it.

A layer that is called as a module converts; a product that a module computes in its own `forward` does not, and nothing
else would say so. The reader follows methods of the module and functions that it calls. It is a reader, not a proof:
what it cannot read it does not report, unless the module holds a matrix of its own.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..stash import StashedForward

__all__ = ["why_not_converted"]

_LAYERS = {
    name: f"torch.nn.{cure}"
    for name, cure in {
        "linear": "Linear",
        "bilinear": "Linear",
        "multi_head_attention_forward": "MultiheadAttention",
        **{f"conv{d}d": f"Conv{d}d" for d in (1, 2, 3)},
        **{f"conv_transpose{d}d": f"ConvTranspose{d}d" for d in (1, 2, 3)},
    }.items()
}
_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "tensordot", "scaled_dot_product_attention")
_METHODS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "__matmul__", "__rmatmul__")
"""Of a tensor: what may follow a dot behind anything."""

_KNOWN = {
    function: name
    for name in (*_LAYERS, *_PRODUCTS)
    for namespace in (F, torch)
    if (function := getattr(namespace, name, None)) is not None
}


def why_not_converted(module: nn.Module) -> str | None:
    """What a module of a user's multiplies in its own code, and the cure; None if nothing was found.

    Args:
        module: any module; those of torch and of this library are not read.
    """
    forward = vars(module).get("forward", type(module).forward)
    if isinstance(forward, StashedForward):
        forward = forward.plain
    if _is_library(forward):
        return None
    calls: list[str] = []
    readable = _read(forward, module, calls, set())
    if calls:
        found = sorted(dict.fromkeys(calls), key=lambda call: call not in _LAYERS)
        cures = dict.fromkeys(_LAYERS.get(call, "halfbyte.ops.matmul under a Plan") for call in found)
        shown = ", ".join("@" if call == "@" else f"{call}()" for call in found)
        return f"not converted: {shown} in its forward; use {' or '.join(cures)}"
    matrices = [name for name, p in module.named_parameters(recurse=False) if p.dim() >= 2]
    if matrices and not readable:
        return (
            f"not converted: holds {matrices[0]}, and its source cannot be read; use torch.nn layers if it multiplies"
        )
    return None


def _read(function: Any, module: nn.Module, calls: list[str], seen: set[Any]) -> bool:
    """Adds the products of one function, and of what it calls, to `calls`; returns whether its source was there."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if plain in seen:
        return True
    seen.add(plain)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        outside = inspect.getclosurevars(plain).nonlocals
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    names = {**getattr(plain, "__globals__", {}), **outside, "self": module}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            calls.append("@")
        elif isinstance(node, ast.Call):
            _judge(node.func, names, module, calls, seen)
    return True


def _judge(called: ast.expr, names: dict[str, Any], module: nn.Module, calls: list[str], seen: set[Any]) -> None:
    """Adds one call to `calls` if it is a product, or reads on in the function that is called."""
    path = list(_path(called))
    target = _resolve(path, names)
    if isinstance(target, nn.Module):
        return
    if _hashable(target) and target in _KNOWN:
        calls.append(_KNOWN[target])
    elif target is None and path[:1] in (["F"], ["torch"]) and path[-1] in (*_LAYERS, *_PRODUCTS):
        calls.append(path[-1])  # imported inside the function
    elif (target is None or not _is_python(target)) and isinstance(called, ast.Attribute) and called.attr in _METHODS:
        calls.append(called.attr)
    elif _is_python(target):
        _read(target, module, calls, seen)


def _path(node: ast.expr) -> Iterator[str]:
    """The names of ``a.b.c``; empty first where it begins with something else than a name."""
    if isinstance(node, ast.Attribute):
        yield from _path(node.value)
        yield node.attr
    else:
        yield node.id if isinstance(node, ast.Name) else ""


def _resolve(path: list[str], names: dict[str, Any]) -> Any:
    """The object that a dotted name stands for, or None; properties are not run."""
    if not path or path[0] not in names:
        return None
    found = names[path[0]]
    for name in path[1:]:
        if isinstance(found, ModuleType):
            found = getattr(found, name, None)
        elif isinstance(inspect.getattr_static(type(found), name, None), property):
            return None
        elif isinstance(found, nn.Module | torch.Tensor | type):
            found = getattr(found, name, None)
        else:
            return None
    return found


def _is_python(target: Any) -> bool:
    """Whether it is a function or method in somebody's source, and not torch's."""
    return inspect.isfunction(getattr(target, "__func__", target)) and not _is_library(target)


def _is_library(target: Any) -> bool:
    """Whether it is torch's or ours; what torch.fx wrote out is a user's."""
    home = getattr(target, "__module__", None) or ""
    return home.split(".")[0] in ("torch", "halfbyte") and not home.startswith("torch.fx")


def _hashable(target: Any) -> bool:
    return callable(target) and getattr(type(target), "__hash__", None) is not None
