"""Public names of any package in words: signature and contract, read from the source and written as Markdown."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LINE_LENGTH = 100
FORMATTED_LENGTH = 120
HIDDEN_BASES = ("msgspec.Struct", "ABC")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Part:
    """What an author wants, and what there is for it.

    names: of the page's package, or dotted where they are elsewhere. modules: those of which every class and function counts.
    """

    title: str
    text: str
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Member:
    """A method, a property, a field or a value of a class, as it is used. doc: empty where nothing is said."""

    signature: str
    doc: str
    is_field: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One public name. code: its definition without what is inside. parameters: the names that its text may explain."""

    name: str
    code: str
    doc: str
    parameters: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the reference. package: where names without a module are imported from. introduction: its beginning."""

    name: str
    package: str
    introduction: str
    parts: tuple[Part, ...]

    def entries(self, part: Part) -> list[Entry]:
        """What a part consists of, in its order; the names of a module in that of its source."""
        defined = [
            f"{module}.{node.name}"
            for module in part.modules
            for node in _source(module).tree.body
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")
        ]
        return [_entry(name, self.package) for name in dict.fromkeys([*part.names, *defined])]

    def text(self) -> str:
        """It in Markdown."""
        parts = [
            f"\n## {part.title}\n\n{part.text}\n" + "".join(map(_section, self.entries(part))) for part in self.parts
        ]
        return self.introduction + "".join(parts)

    def write(self, folder: Path) -> None:
        """Into a folder, under its name."""
        (folder / self.name).write_text(self.text())


# --- read from the source ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    module: str
    text: str
    tree: ast.Module

    def of(self, node: ast.expr) -> str:
        """An expression as it is written, on one line."""
        return " ".join((ast.get_source_segment(self.text, node) or "").split())

    def annotation(self, node: ast.expr) -> str:
        """As it is written; without the quotes that it has where what it names is defined further below."""
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else self.of(node)

    def default(self, node: ast.expr) -> str:
        """As it is written, and the value of a constant instead of its name."""
        text = self.of(node)
        is_constant = text.isidentifier() and text.isupper()
        return repr(getattr(importlib.import_module(self.module), text)) if is_constant else text


@cache
def _source(module: str) -> _Source:
    file = importlib.import_module(module).__file__
    assert file is not None, f"{module} has no source"
    text = Path(file).read_text()
    return _Source(module, text, ast.parse(text))


def _entry(name: str, package: str) -> Entry:
    module, _, own_name = name.rpartition(".")
    found = getattr(importlib.import_module(module or package), own_name)
    is_defined = isinstance(found, type) or inspect.isroutine(found)
    source = _source(found.__module__) if is_defined else _assigning(module or package, own_name)
    nodes = [node for node in source.tree.body if own_name in _bound(node)]
    last = nodes[-1]
    if isinstance(last, ast.ClassDef):
        return _class(name, last, source)
    if isinstance(last, Function):
        return _function(name, nodes, source)
    place = source.tree.body.index(last)
    if isinstance(last, ast.AnnAssign):
        code = f"{own_name}: {source.annotation(last.annotation)}"
    else:
        assert isinstance(last, ast.Assign)
        code = f"{own_name} = {source.of(last.value)}"
    return Entry(name, code, _text_below(source.tree.body, place))


def _assigning(module: str, name: str) -> _Source:
    """The module that gives a name its value, of those that one imports it from."""
    source = _source(module)
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _assigning(node.module, name)
    return source


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _function(name: str, nodes: Sequence[ast.stmt], source: _Source) -> Entry:
    """A function; one with overloads is shown by them, and has the docstring of its implementation."""
    functions = [node for node in nodes if isinstance(node, Function)]
    overloads = [node for node in functions if "overload" in _decorators(node)]
    code = "\n".join(_signature(node, source, is_shown_whole=True) for node in overloads or functions)
    return Entry(name, code, ast.get_docstring(functions[-1]) or "", _parameter_names(functions))


def _class(name: str, node: ast.ClassDef, source: _Source) -> Entry:
    bases = [base for base in map(source.of, node.bases) if base not in HIDDEN_BASES]
    title = f"class {node.name}" + (f"({', '.join(bases)})" if bases else "")
    members = [*_fields(node, source), *_methods(node, source)]
    fields = [member for member in members if member.is_field]
    constructor = [inner for inner in node.body if isinstance(inner, Function) and inner.name == "__init__"]
    code = title
    if fields:
        code += ":\n" + "\n".join(map(_field_line, fields))
    elif constructor and _parameters(constructor[0].args, source, is_method=True):
        code += "\n\n" + _signature(constructor[0], source, called=node.name, is_shown_whole=True, is_method=True)
    known = {field.signature.partition(":")[0]: None for field in fields}
    known |= dict.fromkeys([*_parameter_names(constructor), *_assigned(constructor)])
    others = tuple(member for member in members if not member.is_field)
    return Entry(name, code, ast.get_docstring(node) or "", tuple(known), others)


def _field_line(field: Member) -> str:
    """With its text behind it, or above where the formatter of code would break the line."""
    line = f"    {field.signature}" + (f"  # {field.doc}" if field.doc else "")
    return line if len(line) <= FORMATTED_LENGTH else f"    # {field.doc}\n    {field.signature}"


def _assigned(constructor: Sequence[Function]) -> list[str]:
    """The public attributes that a constructor sets."""
    return [
        node.attr
        for function in constructor
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not node.attr.startswith("_")
    ]


def _fields(node: ast.ClassDef, source: _Source) -> Iterator[Member]:
    """Fields of data classes and structs, values of enums."""
    for place, inner in enumerate(node.body):
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            if inner.target.id.startswith("_"):
                continue
            default = "" if inner.value is None else f" = {source.default(inner.value)}"
            text = f"{inner.target.id}: {source.annotation(inner.annotation)}{default}"
        elif isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name) and _bound(inner)[0][0] != "_":
            text = f"{inner.targets[0].id} = {source.of(inner.value)}"
        else:
            continue
        yield Member(text, _text_below(node.body, place), is_field=True)


def _methods(node: ast.ClassDef, source: _Source) -> Iterator[Member]:
    for inner in node.body:
        if not isinstance(inner, Function) or inner.name.startswith("_"):
            continue
        doc = ast.get_docstring(inner) or ""
        if _decorators(inner) & {"property", "cached_property"}:
            assert inner.returns is not None
            yield Member(f"{inner.name}: {source.annotation(inner.returns)}", doc)
        else:
            is_static = "staticmethod" in _decorators(inner)
            yield Member(_signature(inner, source, is_method=not is_static), doc)


def _decorators(node: Function) -> set[str]:
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}


def _text_below(body: Sequence[ast.stmt], place: int) -> str:
    """The text under an assignment that explains it."""
    match body[place + 1 : place + 2]:
        case [ast.Expr(value=ast.Constant(value=str() as text))]:
            return _on_one_line(text)
    return ""


def _signature(
    node: Function, source: _Source, *, called: str = "", is_shown_whole: bool = False, is_method: bool = False
) -> str:
    """As it is called; is_shown_whole: in a block, with a line for each parameter where one line is too long."""
    is_context = "asynccontextmanager" in _decorators(node)
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) and not is_context else ""
    returns = "" if called or node.returns is None else f" -> {source.annotation(node.returns)}"
    if is_context:
        returns = returns.replace("AsyncIterator[", "AbstractAsyncContextManager[")
    parameters = _parameters(node.args, source, is_method=is_method)
    line = f"{prefix}{called or node.name}({', '.join(parameters)}){returns}"
    if not is_shown_whole or len(line) <= LINE_LENGTH:
        return line
    rows = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{prefix}{called or node.name}(\n{rows}){returns}"


def _parameters(arguments: ast.arguments, source: _Source, *, is_method: bool) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    shown = [_parameter(one, default, source) for one, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        shown.insert(len(arguments.posonlyargs), "/")
    if is_method:
        shown = shown[1:]
    if arguments.vararg:
        shown.append("*" + _parameter(arguments.vararg, None, source))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [
        _parameter(one, default, source)
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return shown + (["**" + _parameter(arguments.kwarg, None, source)] if arguments.kwarg else [])


def _parameter(argument: ast.arg, default: ast.expr | None, source: _Source) -> str:
    annotation = "" if argument.annotation is None else f": {source.annotation(argument.annotation)}"
    return argument.arg + annotation + ("" if default is None else f" = {source.default(default)}")


def _parameter_names(functions: Sequence[Function]) -> tuple[str, ...]:
    every = [
        argument for node in functions for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    ]
    return tuple(dict.fromkeys(argument.arg for argument in every if argument.arg != "self"))


# --- written as Markdown -------------------------------------------------------------------------------------------

EXAMPLE = re.compile(r"::\n\n((?:    .*(?:\n|$)|\n(?=    ))+)")


def _section(entry: Entry) -> str:
    text = f"\n### `{entry.name}`\n\n```python\n{entry.code}\n```\n"
    if entry.doc:
        text += f"\n{_prose(entry.doc, entry.parameters)}\n"
    if entry.members:
        text += "\nMethods and properties:\n\n"
        text += "".join(f"- `{member.signature}`: {_on_one_line(member.doc)}\n" for member in entry.members)
    return text


def _prose(doc: str, known: Sequence[str]) -> str:
    """A docstring with its examples as blocks of code, and what it says of parameters as a list."""
    pieces: list[str] = []
    end = 0
    for found in EXAMPLE.finditer(doc):
        code = textwrap.dedent(found[1]).strip()
        pieces += _paragraphs(doc[end : found.start()] + ":", known)
        pieces.append(f"```{'toml' if code.startswith('[') else 'python'}\n{code}\n```")
        end = found.end()
    return "\n\n".join([*pieces, *_paragraphs(doc[end:], known)])


def _paragraphs(text: str, known: Sequence[str]) -> list[str]:
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    return [_listed(paragraph, known) for paragraph in paragraphs]


def _listed(paragraph: str, known: Sequence[str]) -> str:
    """A paragraph; what begins with the names of parameters, `name: ` or `name, other: `, as a list of them."""
    if not known:
        return paragraph
    names = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    entry = re.compile(rf"(?:^|(?<=[.;] )|(?<=[.;]\n)|(?<=\n))((?:{names})(?:,\s+(?:{names}))*):\s")
    starts = list(entry.finditer(paragraph))
    if not starts:
        return paragraph
    before = paragraph[: starts[0].start()].strip()
    ends = [start.start() for start in starts[1:]] + [len(paragraph)]
    rows = [
        f"- {_as_code(start[1])}: {_sentence(paragraph[start.end() : end])}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return "\n".join([*([before, ""] if before else []), *rows])


def _as_code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in re.split(r",\s+", names))


def _sentence(text: str) -> str:
    line = _on_one_line(text)
    return line.removesuffix(";") + "." if line.endswith(";") else line


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
