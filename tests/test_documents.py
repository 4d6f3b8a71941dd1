"""README, cards and examples are executed."""

import re
import runpy
import shlex
import struct
import sys
from gzip import compress
from pathlib import Path

import pytest
import torch
from ranks import processes, torchrun

from batchformer import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "src").rglob("README.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path) -> None:
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


def commands(page: Path) -> list[str]:
    """What is said to `batchformer` in the shell blocks of a page, also behind other commands of one line."""
    text = "\n".join(blocks(page, "bash") + blocks(page, "sh")).replace("\\\n", " ").replace("&&", "\n")
    return re.findall(r"^\s*(?:\S*/)?batchformer (.+?)(?:\s+#.*)?$", text, re.MULTILINE)


def test_the_readmes_first_command_is_one_of_them() -> None:
    assert "batchformer compare" in blocks(ROOT / "README.md", "bash")[0]
    assert commands(ROOT / "README.md")[0] == "compare longtail/fashion-mnist-lt"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_parse(page: Path) -> None:
    from batchformer.engine.config import parse
    from batchformer.engine.recipes import find_recipe

    parser, verbs = cli._parsers()
    for line in commands(page):
        words = shlex.split(line)
        overrides: list[str] = []
        if words[0] in ("fit", "compare"):
            words, overrides = cli._take_overrides(words, verbs[words[0]])
        arguments = parser.parse_args(words)
        if words[0] in ("fit", "compare") and "--resume" not in words:
            parse(find_recipe(arguments.recipe or cli.MAIN_RECIPE).path, overrides, logger=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files in their real format, with few random images."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    stream = torch.Generator().manual_seed(0)
    for part, size in (("train", 160), ("t10k", 64)):
        images = torch.randint(0, 256, (size, 28, 28), dtype=torch.uint8, generator=stream)
        labels = (torch.arange(size) % 10).to(torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = b"\0\0\x08" + bytes([array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(compress(header + array.numpy().tobytes()))
    return folder


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*", "ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "two_processes"], ids=lambda p: p.stem)
def test_examples_run(
    path: Path, fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, f"--data={fashion_mnist}", "--images=130"])
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(r"accuracy|plain network", capsys.readouterr().out)


@processes
def test_the_example_with_two_processes_runs(fashion_mnist: Path) -> None:
    done = torchrun(str(ROOT / "examples/two_processes.py"), f"--data={fashion_mnist}", "--images=130")
    assert done.returncode == 0, done.stderr
    assert "2 processes, last loss" in done.stdout


def test_examples_are_short_and_all_there() -> None:
    assert {p.stem for p in EXAMPLES} >= {
        "plain_loop",
        "lightning_module",
        "transformers_trainer",
        "accelerate_loop",
        "two_processes",
    }
    assert all(len(p.read_text(encoding="utf-8").splitlines()) < 80 for p in EXAMPLES)
