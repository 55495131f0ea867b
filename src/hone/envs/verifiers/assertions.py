"""Test code made ready to be run piece by piece: its assertions are numbered, and what it needs of a program is named."""

import ast
import builtins
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreparedTests:
    """Test code whose assertions report their numbers.

    setup: with imports of the standard library's modules that the code uses and forgets to import, as it would get them
    from the program otherwise. names: what it uses and neither it nor Python defines.
    """

    setup: str
    tests: list[str]
    names: list[str]
    num_tests: int


def prepare(tests: Sequence[str], setup: str) -> PreparedTests:
    """Number the assertions, and let the code go on after one that fails, so that a share of them can pass.

    A piece of code without assertions counts as one test, which passes when the code ends. An assertion inside of a
    `try` body stays as it is, because the test waits for what it raises. `ValueError` for what is not Python.
    """
    try:
        trees = [ast.parse(test) for test in tests]
        needed = _free_names([ast.parse(setup), *trees])
        modules = sorted(needed & _used_as_modules(trees))
    except SyntaxError as error:
        raise ValueError(f"these tests are not Python: {error}") from error
    numbering = _Numbering()
    imports = "".join(f"import {module}\n" for module in modules)
    return PreparedTests(
        setup=imports + setup,
        tests=[numbering.apply(tree) for tree in trees],
        names=sorted(needed.difference(modules)),
        num_tests=numbering.num_tests,
    )


class _Numbering(ast.NodeTransformer):
    def __init__(self) -> None:
        self.num_tests = 0

    def apply(self, tree: ast.Module) -> str:
        before = self.num_tests
        self.visit(tree)
        if self.num_tests == before:
            tree.body.append(ast.parse(f"__passed__({self._next()})").body[0])
        return ast.unparse(ast.fix_missing_locations(tree))

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        number = self._next()
        wrapped = ast.parse(
            "try:\n"
            "    pass\n"
            "except Exception as __problem__:\n"
            f"    __failed__({number}, {ast.unparse(node)[:200]!r}, __problem__)\n"
            "else:\n"
            f"    __passed__({number})"
        ).body[0]
        assert isinstance(wrapped, ast.Try)
        wrapped.body = [node]
        return wrapped

    def visit_Try(self, node: ast.Try) -> ast.AST:
        for name in ("handlers", "orelse", "finalbody"):
            setattr(node, name, [self.visit(part) for part in getattr(node, name)])
        return node

    def _next(self) -> int:
        self.num_tests += 1
        return self.num_tests - 1


def _free_names(trees: Iterable[ast.Module]) -> set[str]:
    """A built-in of Python is never the program's to define: `abs` in a test is Python's."""
    used: set[str] = set()
    bound = set(dir(builtins))
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound.add(name)
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.alias(name=name, asname=alias):
                bound.add((alias or name).partition(".")[0])
    return used - bound


def _used_as_modules(trees: Iterable[ast.Module]) -> set[str]:
    """Names of the standard library's modules of which only attributes are used; a call `copy(x)` is the program's."""
    bases: list[ast.expr] = []
    names: list[ast.Name] = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            bases.append(node.value)
        elif isinstance(node, ast.Name):
            names.append(node)
    as_base = {id(base) for base in bases}
    otherwise = {name.id for name in names if id(name) not in as_base}
    return {name.id for name in names if name.id in sys.stdlib_module_names} - otherwise
