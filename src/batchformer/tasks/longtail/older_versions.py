"""Translation of earlier versions, in which the setting ``model.stage`` named a second stage."""

from typing import Any

__all__ = ["translate_entry", "translate_names", "translate_settings"]

_OLD = ("second", "start_from", "tau", "teacher")
# What lightning's Trainer does without a number of epochs.
_EPOCHS = 1000
# Names of PaCo's state and today's; an ending dot stands for all names that begin so.
_NAMES = {
    "queue": "queue.keys",
    "queue_targets": "queue.targets",
    "queue_at": "queue.position",
    "key_backbone.": "key_encoder.0.",
    "key_mlp.": "key_encoder.1.",
}


def translate_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's entry of an earlier version in today's form."""
    return {"stage": entry["second"] or "train", "settings": {"network": entry["network"]}, "facts": entry["data"]}


def translate_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with ``model.stage`` as a list of stages, or equal settings where nothing is old.

    Args:
        settings: Dotted key to value, of a recipe with its overrides.

    Example:
        >>> old = {"model.stage.second": "crt", "model.stage.start_from": "runs/a", "trainer.max_epochs": 5}
        >>> translate_settings(old)
        {'stages': [{'name': 'crt', 'epochs': 5, 'start_from': 'runs/a'}]}
    """
    old = {name: settings[f"model.stage.{name}"] for name in _OLD if f"model.stage.{name}" in settings}
    now = {key: value for key, value in settings.items() if key not in {f"model.stage.{name}" for name in old}}
    now |= {f"model.{name}": old[name] for name in ("tau", "teacher") if name in old}
    if old.get("second") is not None:
        epochs = now.pop("trainer.max_epochs", None)
        stage = {"name": old["second"], "epochs": _EPOCHS if epochs is None else epochs}
        now["stages"] = [{**stage, "start_from": old.get("start_from")}]
    return now


def translate_names(state: dict[str, Any], prefix: str) -> None:
    """Give PaCo's state of an earlier version its names of today.

    Args:
        state: State dict, changed in place.
        prefix: Beginning of the names of the network in it.

    Example:
        >>> state = {"network.queue_at": 0, "network.key_mlp.0.bias": 1, "network.queue.keys": 2}
        >>> translate_names(state, "network.")
        >>> sorted(state)
        ['network.key_encoder.1.0.bias', 'network.queue.keys', 'network.queue.position']
    """
    for old, new in _NAMES.items():
        for name in list(state):
            if name == prefix + old or (old.endswith(".") and name.startswith(prefix + old)):
                state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)
