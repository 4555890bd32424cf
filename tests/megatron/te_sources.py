"""The Python sources of real releases of Transformer Engine, which can't be imported without a GPU."""

import ast
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A wheel, which holds all of the Python sources."""

    wheel: Path

    def module(self, path: str) -> ast.Module:
        """The syntax of one of its files, such as ``pytorch/attention/rope.py``."""
        return _parsed(self.wheel, path)

    def has(self, path: str) -> bool:
        with zipfile.ZipFile(self.wheel) as files:
            return f"transformer_engine/{path}" in files.namelist()

    def function(self, path: str, name: str) -> ast.FunctionDef:
        """``function("pytorch/module/linear.py", "Linear.__init__")``."""
        return definition(self.module(path), name)


@cache
def _parsed(wheel: Path, path: str) -> ast.Module:
    with zipfile.ZipFile(wheel) as files:
        return ast.parse(files.read(f"transformer_engine/{path}"))


def definition(module: ast.Module, name: str) -> ast.FunctionDef:
    """A function or a method by its name."""
    scope: ast.AST = module
    for part in name.split("."):
        found = [
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part
        ]
        assert found, f"no {name}"
        scope = found[-1]
    assert isinstance(scope, ast.FunctionDef)
    return scope


def parameters(function: ast.FunctionDef) -> dict[str, str | None]:
    """Names of all parameters in order, each with its default; ``**kwargs`` stands as itself."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults: list[str | None] = [ast.unparse(default) for default in arguments.defaults]
    found = dict(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))
    if arguments.vararg is not None:
        found[f"*{arguments.vararg.arg}"] = ""
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = None if default is None else ast.unparse(default)
    if arguments.kwarg is not None:
        found[f"**{arguments.kwarg.arg}"] = ""
    return found


def assertions(function: ast.FunctionDef) -> set[str]:
    """What a function asserts."""
    return {ast.unparse(node.test) for node in ast.walk(function) if isinstance(node, ast.Assert)}


def uses(tree: ast.AST, attribute: str) -> list[ast.Attribute]:
    """Every place where an attribute is read or set."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == attribute]
