"""Recipes on two ranks: real processes, every image counted once, the same metrics as one process finds.

One recipe is launched by torchrun; the others are forked with the variables that torchrun sets.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from ranks import processes, torchrun
from recipe_runs import result_of, rows, settings_of
from tiny_recipes import epochs_of, tiny

from batchformer.engine import run as engine
from batchformer.engine.recipes import find_recipe

pytestmark = processes
MakeData = Callable[..., Path]
GATHERED = ["--model.batchformer.gather=all"]
TWO_RANKS = {
    "detection/folder": GATHERED,
    "longtail/fashion-mnist-lt": GATHERED,
    "longtail/cifar100-lt-paco": [],
    "panoptic/folder": [*GATHERED, "--data.batch_size=2"],  # two stages
}
TORCHRUN = "longtail/fashion-mnist-lt"


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, make_data: MakeData, command: Command, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    settings, stages = settings_of(recipe), epochs_of(recipe)
    words = [*tiny(recipe, make_data(settings["data"]["dataset"], settings["task"])), *TWO_RANKS[name]]
    words += [f"--out={tmp_path}", "--name=run", "--trainer.devices=2", "--trainer.strategy=ddp"]
    if name == TORCHRUN:
        done = torchrun("-m", "batchformer", "fit", name, *words)
        status, said = [done.returncode], done.stdout + done.stderr
    else:
        data = {"BATCHFORMER_DATA": str(tmp_path / "cache")}
        ranks = command.run_on_ranks(2, "fit", name, *words, environment=data)
        status, said = [status for status, _ in ranks], "".join(said for _, said in ranks)
    assert not any(status), said
    assert said.count("Run: ") == 1, "one rank speaks for both"
    assert "Warning" not in said
    result = result_of(tmp_path / "run")
    assert [entry["name"] for entry in result["stages"]] == list(stages)
    assert [row["step"] for row in rows(tmp_path / "run")] == [str(2 * e + 2) for e in range(sum(stages.values()))]
    # Counted over both ranks, every test image once: one process alone finds the same.
    assert result["metrics"] == pytest.approx(engine.test(tmp_path / "run"), abs=1e-6, nan_ok=True)
