"""Run and comparison folders in the on-disk format of today and of earlier versions, made up from a seed; for tests."""

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("Sneaker", "Bag", "Trouser", "Pullover", "Ankle boot", "Dress", "Coat", "Sandal", "T-shirt/top", "Shirt")
COUNTS = (2000, 1199, 718, 430, 258, 154, 92, 55, 33, 20)
GROUPS = {"many": range(0, 6), "medium": range(6, 9), "few": range(9, 10)}
# Arm -> shift of the accuracy in the head and in the tail.
EFFECTS = {
    "plain": (0.0, 0.0),
    "batchformer": (-0.006, 0.05),
    "frozen": (-0.006, 0.04),
    "self_only": (-0.004, 0.045),
    "duplicate": (0.0, -0.02),
    "single_stream": (-0.05, -0.06),
}
MEASURES = [
    {"name": "top1", "label": "top-1", "unit": "%", "higher_is_better": True},
    {"name": "top5", "label": "top-5", "unit": "%", "higher_is_better": True},
    *(
        {"name": name, "label": name, "unit": "%", "higher_is_better": True, "part": f"{name}-shot classes"}
        for name in GROUPS
    ),
    {"name": "macro_f1", "label": "macro F1", "unit": "%", "higher_is_better": True},
    {"name": "ece", "label": "ECE", "unit": "%", "higher_is_better": False},
    {"name": "accuracy", "label": "accuracy", "unit": "%", "higher_is_better": True},
]
# A task whose error has its own unit, lies above 1 and is better when it is low.
ERROR = {"name": "mae", "label": "mean error", "unit": "years", "higher_is_better": False}
ENVIRONMENT: dict[str, Any] = {
    "versions": {"batchformer": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
    "hardware": {"cpu": "Example CPU @ 2.00GHz", "cores": 2, "memory_gb": 8, "gpu": None},
    "precision": "32-true",
    "git": "0123abc",
    "command": "batchformer compare longtail/fashion-mnist-lt",
    "date": "2026-01-02T03:04:05+00:00",
}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def config_text(arm: str, seed: int, *more: str) -> str:
    """A resolved config; ``more`` are lines at its end."""
    head = f"seed_everything: false\nmodel:\n  batchformer:\n    arm: {arm}\n  optimizer:\n    lr: 0.1\n"
    data = "data:\n  subset_seed: 0\n  augment:\n  - crop=4\n  - flip\n"
    return "\n".join([f"{head}{data}task: longtail\nseed: {seed}", *more, ""])


def write_curves(folder: Path, epochs: int, noise: random.Random, final: float, primary: str = "top1") -> None:
    """Sparse rows as Lightning's CSVLogger writes them: the loss in one row, the validation in another."""
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train_loss", f"val_{primary}"], restval="")
        writer.writeheader()
        for epoch in range(epochs):
            step = 38 * (epoch + 1) - 1
            progress = 1 - math.exp(-(epoch + 1) / 4)
            loss = 2.3 - 1.7 * progress + noise.gauss(0, 0.03)
            writer.writerow({"epoch": epoch, "step": step, f"val_{primary}": final * progress + noise.gauss(0, 0.01)})
            writer.writerow({"epoch": epoch, "step": step, "train_loss": loss})


def write_run(
    folder: Path,
    arm: str = "plain",
    seed: int = 0,
    *,
    unit: str = "",
    older: bool = False,
    recipe: str = "longtail/fashion-mnist-lt",
    metrics: Mapping[str, float | None] | None = None,
    names: Sequence[str] = NAMES,
    counts: Sequence[int] = COUNTS,
    result: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    config: str | None = None,
    done: bool = True,
    epochs: int = 15,
) -> Path:
    """One run folder; ``metrics``, ``result`` and ``environment`` replace single entries.

    An ``older`` one is without what results have since they describe themselves: measures, unit, stages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared, own = random.Random(f"seed {seed}{unit}"), random.Random(f"{arm} {seed}{unit}")
    head, tail = EFFECTS.get(arm, (0.0, 0.0))
    accuracy = []
    for rank in range(len(names)):
        place = rank / max(1, len(names) - 1)
        value = 0.92 - 0.14 * place + (1 - place) * head + place * tail
        accuracy.append(min(1.0, max(0.0, value + shared.gauss(0, 0.012) + own.gauss(0, 0.008))))
    groups = {name: [accuracy[i] for i in ranks if i < len(accuracy)] for name, ranks in GROUPS.items()}
    top1 = sum(accuracy) / len(accuracy)
    values: dict[str, float | None] = {"top1": top1, "top5": min(1.0, top1 + 0.16)}
    values |= {name: sum(group) / len(group) if group else None for name, group in groups.items()}
    values |= {"macro_f1": top1 - 0.004, "ece": 0.05 + own.gauss(0, 0.004), **(metrics or {})}
    content: dict[str, Any] = {
        "recipe": recipe,
        "arm": arm,
        "seed": seed,
        "metrics": values,
        "per_class": [{"name": n, "count": c, "value": a} for n, c, a in zip(names, counts, accuracy, strict=True)],
        "cost": {
            "step_ms": 41.0 * (1.0 if arm == "plain" else 1.06) + own.gauss(0, 0.5),
            "peak_memory_mb": 812.0 if arm == "plain" else 861.0,
            "parameters_train": 391_498 if arm == "plain" else 416_650,
            "parameters_test": 391_498,
            "train_seconds": 26.1 + own.gauss(0, 0.4),
            "test_ms_per_image": 0.121 + own.gauss(0, 0.001),
        },
        "selection": "last epoch",
        "split": "test",
        "date": f"2026-01-02T03:{4 + seed:02d}:05+00:00",
        "host": {"cpu": "Example CPU @ 2.00GHz", "cores": 2},
    }
    if not older:
        times = {name: content["cost"][name] for name in ("step_ms", "train_seconds")}
        content |= {
            "measures": MEASURES,
            "unit": {"name": unit} if unit else None,
            "stages": [{"name": "main", "epochs": epochs, **times}],
        }
    content |= result or {}
    text = config_text(arm, seed) if config is None else config
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    write_json(folder / "environment.json", {**ENVIRONMENT, **(environment or {})})
    write_curves(folder, epochs, own, top1)
    if done:
        write_json(folder / "result.json", content)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
        (folder / "done").touch()
    return folder


def write_comparison(
    folder: Path,
    arms: Sequence[str] = ("plain", "batchformer"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    top1: Mapping[str, Sequence[float | None]] | None = None,
    units: Sequence[str] = (),
    plan: Mapping[str, Any] | None = None,
    **run: Any,
) -> Path:
    """A comparison folder; ``top1`` sets arm -> one value per seed, ``plan`` replaces entries of compare.json."""
    for arm in arms:
        for index, seed in enumerate(seeds):
            metrics = {"top1": top1[arm][index]} if top1 else None
            for unit in units or ("",):
                path = folder / arm / (f"seed{seed}-{unit}" if unit else f"seed{seed}")
                write_run(path, arm, seed, unit=unit, metrics=metrics, **run)
    content = {
        "recipe": run.get("recipe", "longtail/fashion-mnist-lt"),
        "command": f"batchformer compare longtail/fashion-mnist-lt --seeds {len(seeds)}",
        "arms": list(arms),
        "seeds": list(seeds),
        "primary": "top1",
        "date": "2026-01-02T03:04:05+00:00",
        **({"units": [{"name": unit, "label": unit.title()} for unit in units]} if units else {}),
        **(plan or {}),
    }
    write_json(folder / "compare.json", content)
    return folder


class Folders:
    """The writers, handed to tests as one fixture."""

    run = staticmethod(write_run)
    comparison = staticmethod(write_comparison)
    json = staticmethod(write_json)
    config = staticmethod(config_text)
    all_arms = tuple(EFFECTS)
    error = ERROR


@pytest.fixture
def folders() -> type[Folders]:
    return Folders
