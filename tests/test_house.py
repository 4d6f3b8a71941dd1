"""The rules of the house that a machine can check."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def part_of(module: str) -> str:
    names = module.split(".")
    if len(names) == 1 or names[1] in ("__init__", "__main__"):
        return "root"
    return names[1]


def imports_of(path: Path, source: Path = SOURCE) -> set[str]:
    """Absolute names of the project's modules that a file imports, at any depth of its code."""
    package = ["batchformer", *path.relative_to(source).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found.add(module)
            # `from . import x` and `from batchformer import x` may name modules.
            if node.level or module == "batchformer":
                found.update(f"{module}.{alias.name}" for alias in node.names if (SOURCE / alias.name).exists())
    return {name for name in found if name.split(".")[0] == "batchformer"}


def wrong_arrows(path: Path, source: Path = SOURCE) -> set[str]:
    relative = path.relative_to(source)
    own = relative.parts[0] if len(relative.parts) > 1 else relative.stem.strip("_")
    own = "root" if own in ("init", "main") else own
    return {name for name in imports_of(path, source) if part_of(name) not in ARROWS[own]}


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
        ("tasks/longtail/a.py", "from ...engine import run", "batchformer.engine"),
        ("cli.py", "from .tasks.longtail import task", "batchformer.tasks.longtail"),
        ("core/a.py", "from .modules import BatchFormer\nimport torch, json", ""),
    ],
)
def test_the_arrow_check_sees_a_wrong_arrow(where: str, code: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    found = wrong_arrows(path, tmp_path)
    assert wrong in found if wrong else not found


# What tasks share, below tasks/: no task themselves, open to every task and to nothing of one.
SHARED = {"training", "image_classification", "set_prediction"}


def test_no_task_imports_a_task() -> None:
    for path in (SOURCE / "tasks").rglob("*.py"):
        own = path.relative_to(SOURCE / "tasks").parts[0]
        others = {n.split(".")[2] for n in imports_of(path) if n.startswith("batchformer.tasks.")} - {own} - SHARED
        assert not others, f"{path} imports {others}"


def test_every_task_has_the_same_files() -> None:
    folders = {p for p in (SOURCE / "tasks").iterdir() if p.is_dir() and p.name != "__pycache__"}
    for folder in folders - {SOURCE / "tasks" / name for name in SHARED}:
        missing = {"README.md", "data.py", "model.py", "loss.py", "metrics.py", "task.py"} - {
            p.name for p in folder.iterdir()
        }
        assert not missing, f"{folder.name} lacks {missing}"


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
