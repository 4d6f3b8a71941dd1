"""Translation of earlier versions, in which the setting ``model.stage`` named both stages of one run."""

from typing import Any

__all__ = ["translate_entry", "translate_settings"]

_OLD = "model.stage."
# What lightning's Trainer does without a number of epochs.
_EPOCHS = 1000


def translate_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's entry of an earlier version in today's form."""
    settings = {name: entry[name] for name in ("network", "postprocess")}
    return {"stage": entry["part"], "settings": settings, "facts": entry["data"]}


def translate_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with ``model.stage`` as a list of stages, or the same dictionary where nothing is old.

    Args:
        settings: Dotted key to value, of a recipe with its overrides. Where an old override meets a recipe with stages,
            the override changes these.

    Example:
        >>> old = {"model.stage.name": "both", "model.stage.detector_epochs": 20, "trainer.max_epochs": 25}
        >>> [(stage["name"], stage["epochs"]) for stage in translate_settings(old)["stages"]]
        [('detector', 20), ('masks', 5)]
    """
    old = {key.removeprefix(_OLD): value for key, value in settings.items() if key.startswith(_OLD)}
    if not old:
        return settings
    now = {key: value for key, value in settings.items() if not key.startswith(_OLD) and key != "trainer.max_epochs"}
    for name in ("batchformer", "start"):
        if name in old:
            now[f"model.masks.{name}"] = old[name]
    listed = {stage["name"]: dict(stage) for stage in settings.get("stages") or ()}
    epochs: Any = settings.get("trainer.max_epochs")
    if epochs is None:
        epochs = sum(stage["epochs"] for stage in listed.values()) or _EPOCHS
    first: Any = old.get("detector_epochs", listed.get("detector", {}).get("epochs", 1))
    detector = {**listed.get("detector", {"name": "detector"}), "epochs": first}
    masks = {**listed.get("masks", {"name": "masks"}), "epochs": epochs - first}
    before = masks.get("settings") or {"model.optimizer.lr": 1e-4, "model.optimizer.milestones": []}
    given = {f"model.optimizer.{name}": old[name] for name in ("lr", "milestones") if name in old}
    masks["settings"] = {**before, "model.optimizer.warmup_epochs": 0.0, **given}
    kind = old.get("name", "both")
    if kind == "both" and not 0 < first < epochs:
        raise ValueError(
            f"Expected model.stage.detector_epochs between 0 and trainer.max_epochs={epochs}, which both stages share, "
            f"got {first}. Give the epochs of each stage: --stages.detector.epochs and --stages.masks.epochs."
        )
    if kind == "detector":
        stages = [{**detector, "epochs": epochs}]
    elif kind == "masks":
        stages = [{**masks, "epochs": epochs, "start_from": old.get("start_from")}]
    else:
        stages = [detector, masks]
    return {**now, "stages": stages}
