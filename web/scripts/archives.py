"""Compiles /stdlib and /site in the browser's own interpreter, and writes what the page needs of them into archives.

Nothing in an archive is compressed: it is compressed as one, which is smaller.
"""

import ast
import json
import marshal
import re
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import CodeType

KEPT = re.compile(r".*(\.pyc|\.toml|\.json|\.css|\.js|wasm32-emscripten\.so|native\.c|\.lib)")
# Of the standard library, what serves, asks, tests, documents or reads mail; of the packages, what draws on a terminal
# or is of an older interface; of memplan, what needs torch or is of commands that the page has not, and the page.
LEFT_OUT = re.compile(
    r"(__pycache__|.*\.dist-info|.*/__pycache__|xml|unittest|pydoc_data|idlelib|http|xmlrpc|wsgiref|multiprocessing"
    r"|curses|dbm|sqlite3|venv|ensurepip|tkinter|lib2to3|turtledemo|profiling|_pyrepl|rich|pygments|markdown_it|mdurl"
    r"|pydantic/v1|pydantic/deprecated|memplan/(web|probe/script|probe/fake|gate|report/gate|report/emit|serve))/.*"
    r"|memplan/explain/(guard|history)\.pyc|memplan/report/(snapshot|measurement|schema|model_card|trace)\.pyc"
    r"|memplan/planning/(many|placement|sweep)\.pyc|memplan/probe/(gradients|difference)\.pyc|memplan/core/workers\.pyc"
    r"|memplan/probe/run/(child|cuda|process|rows|suite|training_device)\.pyc"
    r"|memplan/cli/(check|lock|calibrate|card|serve|web|schema|probe)\.pyc"
    r"|(pdb|bdb|doctest|pydoc|turtle|_pyio|_pydecimal|pickletools|statistics|imaplib|smtplib|ftplib|poplib|mailbox|tarfile"
    r"|cProfile|profile|pstats|trace|optparse|netrc|ssl|urllib/request|zipapp|webbrowser|socketserver"
    r"|_pydatetime|plistlib|wave|modulefinder|cmd|fileinput|compileall|runpy|asyncio/(tools|__main__)|argparse|configparser"
    r"|tabnanny|symtable|pyclbr|filecmp|timeit|tracemalloc|shelve|sched|rlcompleter|getopt|ctypes/_aix|pty"
    r"|urllib/robotparser|html/parser|_markupbase|antigravity|this|nturl2path|colorsys|sre_(compile|constants|parse)"
    r"|_(android|apple|ios)_support|ctypes/(wintypes|macholib/.*)|concurrent/(interpreters/.*|futures/interpreter))\.pyc"
    r"|encodings/(?!__init__|aliases|ascii|latin_1|utf_|cp437|idna|punycode|unicode_escape|raw_unicode).*"
    r"|asyncio/(proactor|windows)_\w+\.pyc|concurrent/futures/process\.pyc|logging/(handlers|config)\.pyc|pyodide/console\.pyc"
    r"|pydantic/(mypy|color|networks|dataclasses|root_model|validate_call_decorator|experimental/pipeline)\.pyc"
    r"|typer/(testing|cli|rich_utils|_click/(_winconsole|_termui_impl))\.pyc|annotated_types/test_cases\.pyc"
)


HEADER = MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)  # of a .pyc whose source is not looked for
NO_LINES = b"\xff"  # eight instructions without a line, in the format of Objects/locations.md of CPython


def take_annotations_off(node: ast.AST) -> None:
    """Take the annotations off functions: code of its own each. A decorator may read those of what it decorates."""
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    for statements in ("body", "orelse", "handlers", "finalbody", "cases"):  # no expression has a function's statement
        for statement in getattr(node, statements, ()):
            take_annotations_off(statement)


def without_lines(code: CodeType) -> CodeType:
    """Return code without its line numbers, two fifths of its size compressed; a page shows no traceback."""
    constants = tuple(without_lines(part) if isinstance(part, CodeType) else part for part in code.co_consts)
    return code.replace(co_consts=constants, co_linetable=NO_LINES * (len(code.co_code) // 16 + 1))


def compiled(path: Path, name: str) -> bytes:
    source = path.read_bytes()
    if re.match(r"memplan/(?!cli/)", name):  # typer reads those of commands
        source = ast.parse(source)
        take_annotations_off(source)
    return HEADER + marshal.dumps(without_lines(compile(source, name, "exec", dont_inherit=True, optimize=2)))


def chosen(folder: str, pattern: str = "") -> dict[str, bytes]:
    """Return the files of a folder whose names match, in the order of their names."""
    found = ((path.relative_to(folder).as_posix(), path) for path in Path(folder).rglob("*") if path.is_file())
    paths = dict(sorted((f"{name}c" if name.endswith(".py") else name, path) for name, path in found))
    kept = (name for name in paths if KEPT.fullmatch(name) and not LEFT_OUT.fullmatch(name) and re.match(pattern, name))
    return {name: compiled(paths[name], name) if name.endswith(".pyc") else paths[name].read_bytes() for name in kept}


def write(name: str, files: dict[str, bytes]) -> None:
    """Write a line with the sizes of files by name, as JSON, and the files: what JavaScript reads without a library."""
    sizes = json.dumps({inside: len(content) for inside, content in files.items()}, separators=(",", ":"))
    Path(f"/{name}").write_bytes(b"\n".join((sizes.encode(), b"".join(files.values()))))


with zipfile.ZipFile("/stdlib.archive", "w") as archive:
    for name, content in chosen("/stdlib").items():
        archive.writestr(zipfile.ZipInfo(name), content)
write("memplan.archive", chosen("/site", r"memplan/"))
write("others.archive", chosen("/site", r"(?!memplan/)"))
