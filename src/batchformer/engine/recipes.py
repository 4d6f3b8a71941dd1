"""The list of recipes, read without parsing them. Standard library only, since ``batchformer ls`` must not wait."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .tasks import recipe_folders


@dataclass(frozen=True)
class Recipe:
    """A YAML file of hyper-parameters.

    Attributes:
        name: ``task/data-model``, or the path of a file of the user's own.
        path: The file.
    """

    name: str
    path: Path

    @property
    def header(self) -> list[str]:
        """Comment block on top, without its hashes: content, command, hardware, hours, expected result."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())
        return lines

    def value(self, key: str) -> str | None:
        """Return the value of the first line ``key: value``, however deep; ``ls`` shows the data set by it."""
        for line in self.path.read_text(encoding="utf-8").splitlines():
            name, colon, value = line.strip().partition(":")
            if colon and name == key:
                return value.partition("#")[0].strip().strip("'\"") or None
        return None


def recipes() -> list[Recipe]:
    """Return all recipes, by name: those of this package, and those of packages that bring a task."""
    return [
        Recipe(f"{prefix}{path.relative_to(root).with_suffix('').as_posix()}", path)
        for prefix, root in recipe_folders()
        for path in sorted(root.rglob("*.yaml"))
    ]


def find_recipe(name: str) -> Recipe:
    """Find a recipe by name, or a YAML file, or the config of a run folder.

    Raises:
        FileNotFoundError: With the nearest names.
    """
    known = {recipe.name: recipe for recipe in recipes()}
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        return Recipe(name, path / "config.yaml")
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return Recipe(path.with_suffix("").as_posix(), path)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
    raise FileNotFoundError(
        f"Expected the name of a recipe, a .yaml file or a run folder, got {name!r}. Near to it: {', '.join(near)}. "
        "All of them: batchformer ls."
    )


def run_name(recipe: str, overrides: Sequence[str]) -> str:
    """Return the name of the folder of a run that the user gives no name.

    Example:
        >>> run_name("longtail/folder", ["--seed=3", "--model.batchformer.arm=plain"])
        'longtail-folder-plain-seed3'
    """
    given = dict(word.removeprefix("--").split("=", 1) for word in overrides if "=" in word)
    return f"{folder_name(recipe)}-{given.get('model.batchformer.arm', 'batchformer')}-seed{given.get('seed', '0')}"


def folder_name(recipe: str) -> str:
    """Return the name of a recipe as it stands in the names of folders."""
    return recipe.replace("/", "-").strip(".-")
