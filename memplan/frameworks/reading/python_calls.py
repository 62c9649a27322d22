"""The calls of a Python script or notebook, and the values of their arguments. Nothing is executed or imported.

A value is told if it is a literal, a name or attribute that the script sets to one, a default of its command line, or
arithmetic on such numbers.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.notebook import MOST_BYTES, code_cells
from memplan.spec.file import read_text

_MAGICS = ("%", "!")
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
}
# Functions that say whether a GPU has bf16, which is assumed.
_HAS_BF16 = ("is_bfloat16_supported", "is_bf16_supported")
_LARGEST = 2**53


class UNKNOWN:
    """The value of an expression that cannot be told without running the script."""


class PythonCall(NamedTuple):
    """A call.

    name       last name of what is called: `from_pretrained` of `AutoModel.from_pretrained`
    of         the name before it; empty if there is none
    line       its line
    arguments  its arguments by name; `0` and so on for those without a name
    lines      line of each argument
    variables  the variable that an argument is, by its name
    targets    the variables that are set to what it returns
    """

    name: str
    of: str
    line: int
    arguments: Mapping[str, Any]
    lines: Mapping[str, int]
    variables: Mapping[str, str] = {}
    targets: tuple[str, ...] = ()


class CallsOfScript(NamedTuple):
    """A script's calls in the order of their lines.

    places     where a line is, as `cell 2, line 3` of a notebook
    arguments  arguments that the script itself defines: of its command line, or fields of its classes
    skipped    where cells of a notebook are that are not Python
    """

    name: str
    path: Path
    calls: tuple[PythonCall, ...]
    places: Mapping[int, str]
    arguments: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()


def read_script(name: str, flags: Mapping[str, Any] | None = None) -> CallsOfScript:
    """Return the calls of a file. Raises SpecError with its line.

    flags  values of its command line, which replace the defaults
    """
    shown = printable(Path(name).name, 60)
    is_notebook = name.lower().endswith(".ipynb")
    skipped: list[str] = []
    text, places = _notebook(read_text(name, MOST_BYTES), shown, skipped) if is_notebook else (read_text(name), {})
    try:
        tree = _parsed(text)
        names = _Names(tree, flags or {})
        calls = sorted(_calls(tree, names), key=lambda call: call.line)
    except SyntaxError as error:
        line = error.lineno or 0
        raise SpecError(f"{shown}:{places.get(line, line)}: is not Python ({error.msg})") from None
    except (ValueError, RecursionError, MemoryError):
        raise SpecError(f"{shown} is nested too deeply, or has characters that Python does not") from None
    return CallsOfScript(shown, Path(name), tuple(calls), places, frozenset(names.attributes), tuple(skipped))


def _parsed(text: str) -> ast.Module:
    """Return the syntax tree of a script. Raises SyntaxError, ValueError, RecursionError or MemoryError."""
    with warnings.catch_warnings(action="ignore"):  # Python prints its own about 0for and "\d"
        return ast.parse(text)


def _notebook(text: str, shown: str, skipped: list[str]) -> tuple[str, dict[int, str]]:
    """Return the code of a notebook, without its magics, and the cell and line of each line. Where cells are not Python
    is added to `skipped`; if none is, the first one raises SpecError."""
    lines: list[str] = []
    places: dict[int, str] = {}
    for number, code in code_cells(text, shown):
        if code.lstrip().startswith("%%"):
            continue
        plain = _without_magics(code)
        try:
            _parsed("\n".join(plain))
        except SyntaxError as error:
            skipped.append(f"cell {number}, line {error.lineno or 1}")
            continue
        except (ValueError, RecursionError, MemoryError):  # the whole is refused for it
            pass
        places |= {len(lines) + line: f"cell {number}, line {line}" for line in range(1, len(plain) + 1)}
        lines += plain
    if not lines:
        raise SpecError(f"{shown}:{skipped[0]}: is not Python" if skipped else f"{shown} has no code")
    return "\n".join(lines), places


def _without_magics(code: str) -> list[str]:
    """Return the lines of a cell with `pass` for its magics, which a backslash continues."""
    lines: list[str] = []
    continues = False
    for line in code.splitlines():
        is_magic = continues or line.lstrip().startswith(_MAGICS)
        indent = line[: len(line) - len(line.lstrip())]
        lines.append("" if continues else f"{indent}pass" if is_magic else line)
        continues = is_magic and line.rstrip().endswith("\\")
    return lines


class _Names:
    """The values that names and attributes are set to."""

    def __init__(self, tree: ast.Module, flags: Mapping[str, Any]) -> None:
        self.flags = flags
        self.assigned: dict[str, list[tuple[int, ast.expr]]] = {}
        self.attributes: dict[str, ast.expr] = {}
        self.depth = 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, ast.ClassDef):
                self._attributes(node)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for arg, value in zip(reversed(node.args.args), reversed(node.args.defaults), strict=False):
                    self.assigned.setdefault(arg.arg, []).append((node.lineno, value))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                self._argument(node)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.assigned.setdefault(target.id, []).append((target.lineno, value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for inner, part in zip(target.elts, value.elts, strict=True):
                self._assign(inner, part)
        elif isinstance(target, ast.Tuple):  # model, tokenizer = FastLanguageModel.from_pretrained(...)
            self._assign(target.elts[0], value) if target.elts else None

    def _attributes(self, node: ast.ClassDef) -> None:
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                self.attributes[line.target.id] = line.value
            elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                self.attributes[line.targets[0].id] = line.value

    def _argument(self, node: ast.Call) -> None:
        """Note the default of an argument of the command line."""
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        long = next((name for name in names if name.startswith("--")), names[0] if names else "")
        action = getattr(given.get("action"), "value", "")
        default = ast.Constant(action == "store_false") if action in ("store_true", "store_false") else None
        if long:
            name = long.lstrip("-").replace("-", "_")
            self.attributes[name] = given.get("default", default or ast.Name(""))  # unknown

    def value(self, node: ast.expr | None, line: int) -> Any:  # noqa: PLR0911 (a return for each kind of expression)
        """Return the value of an expression at a line; UNKNOWN if it cannot be told."""
        if self.depth > 64:  # a name that is set to itself
            return UNKNOWN
        self.depth += 1
        try:
            match node:
                case ast.Constant():
                    return node.value
                case ast.List() | ast.Tuple() | ast.Set():
                    parts = [self.value(part, line) for part in node.elts]
                    return UNKNOWN if UNKNOWN in parts else parts
                case ast.Dict():
                    return self._mapping(node, line)
                case ast.UnaryOp(op=ast.Not()):
                    inner = self.value(node.operand, line)
                    return UNKNOWN if inner is UNKNOWN else not inner
                case ast.UnaryOp(op=ast.USub()):
                    inner = self.value(node.operand, line)
                    return -inner if isinstance(inner, (int, float)) else UNKNOWN
                case ast.BinOp():
                    return self._arithmetic(node, line)
                case ast.Name():
                    return self._name(node.id, line)
                case ast.Attribute():
                    return self._attribute(node, line)
                case ast.IfExp():
                    test = self.value(node.test, line)
                    return UNKNOWN if test is UNKNOWN else self.value(node.body if test else node.orelse, line)
                case ast.Call():
                    return self._called(node, line)
                case _:
                    return UNKNOWN
        finally:
            self.depth -= 1

    def _mapping(self, node: ast.Dict, line: int) -> Any:
        out: dict[str, Any] = {}
        for key, each in zip(node.keys, node.values, strict=True):
            name, value = self.value(key, line), self.value(each, line)
            if key is None:  # **more
                out |= value if isinstance(value, dict) else {_spread(each): UNKNOWN}
            elif isinstance(name, str):
                out[name] = value
        return out

    def _arithmetic(self, node: ast.BinOp, line: int) -> Any:
        left, right = self.value(node.left, line), self.value(node.right, line)
        apply = _OPERATORS.get(type(node.op))
        numbers = [part for part in (left, right) if isinstance(part, (int, float)) and abs(part) < _LARGEST]
        if apply is None or len(numbers) < 2:
            return UNKNOWN
        try:
            return apply(*numbers)
        except ArithmeticError:
            return UNKNOWN

    def _name(self, name: str, line: int) -> Any:
        if name in self.flags:
            return self.flags[name]
        before = [entry for entry in self.assigned.get(name, ()) if entry[0] <= line] or self.assigned.get(name, ())
        return self.value(max(before, key=lambda entry: entry[0])[1], line) if before else UNKNOWN

    def _attribute(self, node: ast.Attribute, line: int) -> Any:
        of = getattr(node.value, "id", "")
        if of == "torch":  # torch.bfloat16
            return node.attr
        if isinstance(node.value, ast.Name) and node.attr in self.flags:
            return self.flags[node.attr]
        return self.value(self.attributes[node.attr], line) if of and node.attr in self.attributes else UNKNOWN

    def _called(self, node: ast.Call, line: int) -> Any:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        of = getattr(getattr(node.func, "value", None), "attr", "")
        if name in _HAS_BF16 or (name, of) == ("is_available", "cuda"):
            return True
        if name == "dict" and not node.args:
            keys: list[ast.expr | None] = [ast.Constant(each.arg) if each.arg else None for each in node.keywords]
            return self._mapping(ast.Dict(keys, [each.value for each in node.keywords]), line)
        if name == "field":  # of a dataclass
            return self.value(next((each.value for each in node.keywords if each.arg == "default"), None), line)
        if name in ("get", "getenv") and len(node.args) == 2:  # os.environ.get("LEN", 2048)
            return self.value(node.args[1], line)
        if name in ("int", "float", "str", "bool", "list", "tuple") and len(node.args) == 1:
            inner = self.value(node.args[0], line)
            try:
                return {"int": int, "float": float, "str": str, "bool": bool}.get(name, list)(inner)
            except (TypeError, ValueError):
                return UNKNOWN
        return UNKNOWN


def arithmetic(text: str, numbers: Mapping[str, int]) -> int | None:
    """Return the whole number that an expression of numbers and names is; None if it cannot be told."""
    try:
        value = _Names(ast.Module([], []), numbers).value(ast.parse(text.strip(), mode="eval").body, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _spread(node: ast.expr) -> str:
    """Return the name of arguments that are in a mapping, as `**more`."""
    return f"**{printable(ast.unparse(node), 40)}"


def _calls(tree: ast.Module, names: _Names) -> Iterator[PythonCall]:
    targets: dict[int, tuple[str, ...]] = {}  # by the identity of what is assigned
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found = (inner for target in node.targets for inner in ast.walk(target))
            targets[id(node.value)] = tuple(inner.id for inner in found if isinstance(inner, ast.Name))
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            inner = getattr(node.func, "value", None)
            arguments: dict[str, Any] = {}
            lines: dict[str, int] = {}
            for index, arg in enumerate(node.args):
                arguments[str(index)], lines[str(index)] = names.value(arg, node.lineno), arg.lineno
            for keyword in node.keywords:
                value = names.value(keyword.value, node.lineno)
                more: dict[str, Any] = {keyword.arg: value} if keyword.arg else {_spread(keyword.value): UNKNOWN}
                if not keyword.arg and isinstance(value, dict):  # **{...}
                    more = cast("dict[str, Any]", value)
                arguments |= more
                lines |= dict.fromkeys(more, keyword.value.lineno)
            given = {str(index): arg for index, arg in enumerate(node.args)}
            given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            variables = {key: value.id for key, value in given.items() if isinstance(value, ast.Name)}
            of = getattr(inner, "id", getattr(inner, "attr", ""))
            yield PythonCall(name, of, node.lineno, arguments, lines, variables, targets.get(id(node), ()))
