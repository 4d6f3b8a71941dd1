"""The rules of the house that a machine can check."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_code import circles, imports, lines_of_code, lines_twice, strings

import batchformer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "batchformer"
FILES = sorted(SOURCE.rglob("*.py"))

# Who may import whom inside the project; the package itself (the public names of core) is open to examples only.
ARROWS = {
    "core": {"core"},
    "insertion": {"insertion", "core"},
    "data": {"data"},
    "tasks": {"tasks", "insertion", "core", "data"},
    "engine": {"engine", "tasks", "insertion", "core", "data"},
    "report": {"report"},
    "analysis": {"analysis", "insertion", "core"},
    "cli": {"engine", "report", "data", "analysis", "root"},
    "root": {"core", "insertion", "cli", "root"},
}
# Single modules that are open beyond the arrows.
ALSO_OPEN = {
    "report": {"batchformer.data.atomic"},  # there is one way to write a file that is whole or not there
    "cli": {"batchformer.tasks.set_prediction.published.convert"},  # the verb `convert`
}

# What tasks share, below tasks/: no task themselves, open to every task and to nothing of one.
SHARED = {"training", "pretrained", "image_classification", "set_prediction"}
TASKS = sorted(
    path for path in (SOURCE / "tasks").iterdir() if (path / "__init__.py").exists() and path.name not in SHARED
)


def part_of(module: str) -> str:
    names = module.split(".")
    if len(names) == 1 or names[1] in ("__init__", "__main__"):
        return "root"
    return names[1]


def wrong_arrows(path: Path, source: Path = SOURCE) -> set[str]:
    relative = path.relative_to(source)
    own = relative.parts[0] if len(relative.parts) > 1 else relative.stem.strip("_")
    own = "root" if own in ("init", "main") else own
    closed = {name for name in imports(path, source) if part_of(name) not in ARROWS[own]}
    # A name in a string that is no part of the package is an attribute of it: "batchformer.insert".
    return {name for name in closed - ALSO_OPEN.get(own, set()) if part_of(name) in ARROWS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    assert not wrong_arrows(path), f"not open to {path.relative_to(SOURCE)}"


@pytest.mark.parametrize(
    ("where", "code", "wrong"),
    [
        ("core/a.py", "from batchformer.tasks.longtail import task", "batchformer.tasks.longtail"),
        ("core/a.py", "from ..tasks.longtail.task import LongTailTask", "batchformer.tasks.longtail.task"),
        ("core/a.py", "from .. import tasks", "batchformer.tasks"),
        ("data/a.py", "def late():\n    import batchformer.core.modules", "batchformer.core.modules"),
        ("report/a.py", "import batchformer.engine.run as run", "batchformer.engine.run"),
        ("report/a.py", "from batchformer.data import fetch", "batchformer.data"),
        ("tasks/longtail/a.py", "from ...engine import run", "batchformer.engine"),
        ("cli.py", "from .tasks.longtail import task", "batchformer.tasks.longtail"),
        ("core/a.py", "import_module('batchformer.insertion.adapters')", "batchformer.insertion.adapters"),
        ("core/a.py", "importlib.import_module('..insertion', __package__)", "batchformer.insertion"),
        ("core/a.py", "KNOWN = {'timm': 'batchformer.insertion.timm:Timm'}", "batchformer.insertion.timm"),
        ("core/a.py", "import_module(f'batchformer.tasks.{name}.task')", "batchformer.tasks"),
        ("core/a.py", "from .modules import BatchFormer\nimport torch, json", ""),
        ("core/a.py", "raise ValueError('batchformer.insert(model) expects a model')", ""),
        ("report/a.py", "from batchformer.data.atomic import write_text", ""),
    ],
)
def test_the_arrow_check_sees_a_wrong_arrow(where: str, code: str, wrong: str, tmp_path: Path) -> None:
    for folder in ("tasks", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "data" / "atomic.py").touch()
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    found = wrong_arrows(path, tmp_path)
    assert wrong in found if wrong else not found


def test_core_never_reaches_up_by_a_string() -> None:
    """Not even in the middle of one: registries and lazy imports of what is above core belong above core."""
    above = re.compile(rf"batchformer\.({'|'.join(sorted(ARROWS.keys() - {'core', 'root'}))})\b")
    found = {
        path.name: text for path in (SOURCE / "core").rglob("*.py") for text in strings(path) if above.search(text)
    }
    assert not found


def test_no_task_imports_a_task() -> None:
    for path in (SOURCE / "tasks").rglob("*.py"):
        own = path.relative_to(SOURCE / "tasks").parts[0]
        found = {n.split(".")[2] for n in imports(path, SOURCE) if n.startswith("batchformer.tasks.")}
        others = found & {task.name for task in TASKS} - {own}
        assert not others, f"{path} imports {others}"


# ------------------------------------------------------------------ circles


def test_no_circle_among_the_files() -> None:
    assert [" -> ".join(circle) for circle in circles(SOURCE)] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": "from .b import f", "b.py": "from batchformer.a import g"}, [["a", "b", "a"]]),
        ({"a.py": "def f():\n    from . import b", "b.py": "from . import c", "c.py": "import batchformer.a"},
         [["a", "b", "c", "a"]]),
        ({"p/__init__.py": "from .x import f", "p/x.py": "from batchformer.p import g"}, [["p", "p.x", "p"]]),
        ({"a.py": "import_module('batchformer.b')", "b.py": "from .a import f"}, [["a", "b", "a"]]),
        ({"a.py": "from .b import f\nif TYPE_CHECKING:\n    from .b import F\nelse:\n    import torch",
          "b.py": "if typing.TYPE_CHECKING:\n    from .a import G"}, []),
        ({"p/__init__.py": "from .x import f", "p/x.py": "from . import y", "p/y.py": "from ..a import g", "a.py": ""},
         []),
    ],
)  # fmt: skip
def test_a_circle_is_seen(files: dict[str, str], expected: list[list[str]], tmp_path: Path) -> None:
    for name, code in {"__init__.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    assert circles(tmp_path) == [[f"batchformer.{name}" for name in circle] for circle in expected]


# ------------------------------------------------------------------ one shape for every task


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.name)
def test_a_task_is_what_is_peculiar_to_it(task: Path) -> None:
    for name, most in (("task.py", 150), ("restore.py", 70)):
        lines = len((task / name).read_text(encoding="utf-8").splitlines())
        assert lines <= most, f"{task.name}/{name} has {lines} lines: what other tasks need too belongs to training/"


def test_nothing_stands_in_two_tasks() -> None:
    """No eight lines in a row are equal in two tasks, or in a task and a room that tasks share.

    Lines are compared without indentation and comments; blank lines, docstrings and imports are left out. Lines with
    nothing but a bracket count: the copy of a call has them too.
    """
    assert lines_twice(SOURCE / "tasks", SHARED) == []


def test_equal_lines_are_seen(tmp_path: Path) -> None:
    lines = [f"value_{i} = {i}" for i in range(8)]
    copied = [*lines[:3], "", "# in other words", "import torch", *(f"{line}  # here" for line in lines[3:])]
    texts = {"one": ["start = 0", *lines], "two": ["'''Read.'''", "if True:", *(f"    {line}" for line in copied)]}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.py").write_text("\n".join(text), encoding="utf-8")
    one, two = (tmp_path / name / "task.py" for name in texts)
    assert [line for _, line in lines_of_code(two)] == ["if True:", *lines]
    assert lines_twice(tmp_path, set()) == [f"{one}:2 = {two}:3"]
    assert lines_twice(tmp_path, {"one"}) and not lines_twice(tmp_path, {"one", "two"})
    one.write_text("\n".join([*lines[:7], "pass"]), encoding="utf-8")
    assert not lines_twice(tmp_path, set())


def test_core_is_read_in_one_sitting() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (SOURCE / "core").rglob("*.py"))
    assert lines <= 1000, f"core/ has {lines} lines: what puts the method into a model belongs to insertion/"


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.name)
def test_every_task_has_the_same_files(task: Path) -> None:
    expected = {"README.md", "data.py", "model.py", "loss.py", "metrics.py", "task.py", "restore.py", "predict.py"}
    assert not expected - {path.name for path in task.iterdir()}


def test_file_names_are_nouns_and_files_are_short() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc"), path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path} has more than 400 lines"


def test_functions_are_short() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                doc = node.body[0] if ast.get_docstring(node) else None
                signature = node.body[0].lineno - node.lineno
                lines = (
                    (node.end_lineno or 0)
                    - node.lineno
                    - signature
                    - ((doc.end_lineno or 0) - doc.lineno if doc else 0)
                )
                if lines > 60:
                    long.append(f"{path.relative_to(SOURCE)}:{node.name} ({lines})")
    assert not long


RELATIVE = re.compile(r"(What|Who|Whether|Which|How|When|Where|That|If|The same|Its|Of)\b")
VERBLESS = re.compile(r"^\s+\w+: (Of|The same)\b.*", re.MULTILINE)


def unclear(docstring: str) -> bool:
    """Whether a docstring begins with a relative clause, or describes an argument by "Of ..." alone."""
    return bool(RELATIVE.match(docstring) or VERBLESS.search(docstring))


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and unclear(ast.get_docstring(node) or ""):
                found.append(f"{path.relative_to(SOURCE)}: {getattr(node, 'name', 'module')}")
    assert not found


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("What a run leaves.", True),
        ("Whether it trains.", True),
        ("Return it.\n\nArgs:\n    lr: Of the network.", True),
        ("Return whether it trains.\n\nArgs:\n    lr: Learning rate of the network.", False),
        ("Whatever.", False),
    ],
)
def test_an_unclear_docstring_is_seen(docstring: str, expected: bool) -> None:
    assert unclear(docstring) is expected


def test_core_and_import_need_torch_alone() -> None:
    code = (
        "import sys, batchformer\n"
        "assert 'torch' not in sys.modules, 'the bare import loads torch'\n"
        "batchformer.insert\n"
        "extra = {'lightning', 'timm', 'torchvision', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not extra, extra\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_public_names_are_a_promise() -> None:
    """A name that disappears is a breaking change: edit api_surface.json and the changelog knowingly."""
    promised = json.loads((Path(__file__).parent / "api_surface.json").read_text(encoding="utf-8"))
    assert sorted(batchformer.__all__) == promised
    for name in promised:
        assert getattr(batchformer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        batchformer.nothing  # noqa: B018


def test_every_version_bound_has_a_reason() -> None:
    inside, bare = False, []
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        inside = (inside or line.startswith(("dependencies", "[project.optional"))) and not line.startswith("[tool")
        if inside and re.search(r'"[A-Za-z].*[>=<]=?\d', line) and "#" not in line:
            bare.append(line.strip())
    assert not bare


def own_files() -> list[Path]:
    """What git tracks; in an archive without git what lies in the project's folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if listed:
        return [ROOT / name for name in listed.split("\0") if name]
    folders = [ROOT / name for name in ("src", "tests", "examples", "benchmarks", ".ci")]
    return [
        *ROOT.glob("*"),
        *(path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts),
    ]


def names_a_place(path: Path) -> str | None:
    pattern = "|".join(("pypi" + r"\.org", "python" + "hosted", "npmjs" + r"\.", "debian" + r"\.org", "/ro" + "ot/"))
    if not path.is_file() or path.suffix not in (".py", ".md", ".toml", ".yaml", ".cff", ""):
        return None
    found = re.search(pattern, path.read_text(encoding="utf-8", errors="ignore"))
    return found.group() if found else None


def test_nothing_names_an_index_or_a_machine() -> None:
    files = own_files()
    assert {ROOT / "README.md", SOURCE / "cli.py", Path(__file__)} <= set(files)
    assert {str(path): name for path in files if (name := names_a_place(path))} == {}


def test_a_name_of_an_index_or_a_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https://pypi" + ".org/simple", "/ro" + "ot/project"):
        (tmp_path / "page.md").write_text(f"Fetched from {name}.", encoding="utf-8")
        assert names_a_place(tmp_path / "page.md")
    (tmp_path / "page.md").write_text("Fetched from a package index.", encoding="utf-8")
    assert names_a_place(tmp_path / "page.md") is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))  # as in an archive
    assert {ROOT / "README.md", SOURCE / "cli.py"} <= set(own_files())
