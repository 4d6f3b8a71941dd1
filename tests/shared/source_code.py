"""The source of the project as data: what each file imports, circles among files, and lines that stand twice."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

PACKAGE = "batchformer"
NAME_OF_A_MODULE = re.compile(rf"{PACKAGE}(\.\w+)+")


def module_name(path: Path, source: Path) -> str:
    """Return the dotted name of a file of the package; that of a package is the name of its folder."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_for_types_alone(node: ast.AST) -> bool:
    """Tell whether a node is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Walk over all nodes of a file, or over all but those that only type checkers read."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not types and is_for_types_alone(node):
            assert isinstance(node, ast.If)
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def docstrings(tree: ast.AST) -> list[ast.Constant]:
    """Return all strings that are statements of their own: docstrings, and those below attributes."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def strings(path: Path) -> list[str]:
    """Return the string literals of a file, and the fixed parts of f-strings; no docstrings."""
    tree = parsed(path)
    prose = {id(node) for node in docstrings(tree)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose)
    return [node.value for node in found if isinstance(node.value, str)]


def named_in_strings(path: Path, package: Sequence[str]) -> set[str]:
    """Return the modules that string literals name: ``"batchformer.core"``, also with ``:Name``, and ``".core"``.

    A string with a leading dot counts only as the first argument of ``import_module``. The packages around the file
    do not count: they are loaded before it, and ``PackageLoader`` and the like need their names.
    """
    around = {".".join(package[: i + 1]) for i in range(len(package))}
    found = {match.group() for text in strings(path) if (match := NAME_OF_A_MODULE.match(text))} - around
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            text = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(text, str) and text.startswith("."):
                level = len(text) - len(text.lstrip("."))
                found.add(".".join([*package[: len(package) - level + 1], *text.strip(".").split(".")]))
    return found


def imports(path: Path, source: Path, *, types: bool = True) -> set[str]:
    """Return the absolute names of the project's modules that a file imports, at any depth, or names in strings.

    ``from package import name`` counts as the module ``package.name`` where there is one, and else as the package.

    Args:
        path: The file.
        source: Folder of the package.
        types: Whether imports under ``if TYPE_CHECKING:`` count.
    """
    package = [PACKAGE, *path.relative_to(source).parent.parts]
    found = named_in_strings(path, package)
    for node in nodes(parsed(path), types=types):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inside = f"{module}.{alias.name}"
                found.add(inside if file_of(inside, source) else module)
    return {name for name in found if name.split(".")[0] == PACKAGE}


def file_of(module: str, source: Path) -> Path | None:
    """Return the file of a module of the package; ``None`` where there is none."""
    place = source.joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if module != PACKAGE and path.is_file():
            return path
    return place / "__init__.py" if (place / "__init__.py").is_file() else None


def circles(source: Path) -> list[list[str]]:
    """Return circles among the files of a package, each as the names of its modules; imports for types alone aside.

    That a module imports the packages around it before itself is no import that a file asks for, and does not count.
    """
    graph: dict[str, set[str]] = {}
    for path in source.rglob("*.py"):
        targets = (file_of(name, source) for name in imports(path, source, types=False))
        graph[module_name(path, source)] = {module_name(target, source) for target in targets if target}
    found, seen = [], set[str]()
    for start in sorted(graph):
        if start in seen:
            continue
        if way := way_back(graph, start):
            found.append(way)
            seen.update(way)
    return found


def way_back(graph: dict[str, set[str]], start: str) -> list[str] | None:
    """Return the shortest way from a node to itself."""
    ways, known = [[start]], set[str]()
    while ways:
        way = ways.pop(0)
        for follower in sorted(graph[way[-1]]):
            if follower == start:
                return [*way, start]
            if follower not in known:
                known.add(follower)
                ways.append([*way, follower])
    return None


def lines_of_code(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a file that say something, with their numbers: stripped, spaces made one, comments cut off.

    Blank lines, comments, docstrings and imports are left out. Lines with nothing but a bracket count, since a copy
    has them too.
    """
    text = path.read_text(encoding="utf-8")
    tree, skipped = ast.parse(text), set[int]()
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in [*docstrings(tree), *imported]:
        skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    stripped = ((number, " ".join(line.split())) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line and number not in skipped]


def equal_lines(one: Sequence[Path], other: Sequence[Path], count: int) -> list[str]:
    """Return the places where so many lines of code in a row are equal in files of two groups."""
    places: dict[tuple[str, ...], str] = {}
    found = []
    for path, number, run in runs_of_lines(one, count):
        places.setdefault(run, f"{path}:{number}")
    for path, number, run in runs_of_lines(other, count):
        if run in places:
            found.append(f"{places[run]} = {path}:{number}")
    return found


def runs_of_lines(paths: Sequence[Path], count: int) -> Iterator[tuple[Path, int, tuple[str, ...]]]:
    for path in paths:
        lines = lines_of_code(path)
        for start in range(len(lines) - count + 1):
            run = lines[start : start + count]
            yield path, run[0][0], tuple(line for _, line in run)


def lines_twice(tasks: Path, shared: set[str], count: int = 8) -> list[str]:
    """Return the places of equal lines in two folders below ``tasks``, of which one at least is a task.

    Args:
        tasks: Folder of the tasks and of the rooms that they share.
        shared: Names of those rooms: two of them are not compared with one another, nor is a folder with itself.
        count: Number of lines in a row.
    """
    folders = {folder.name: sorted(folder.rglob("*.py")) for folder in sorted(tasks.iterdir()) if folder.is_dir()}
    return [
        place
        for one, other in combinations(folders, 2)
        if not {one, other} <= shared
        for place in equal_lines(folders[one], folders[other], count)
    ]
