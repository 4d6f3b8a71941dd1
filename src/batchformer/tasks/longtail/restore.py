"""The way from a long-tailed run, or from an exported network, back to a network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from batchformer.tasks.image_classification.restore import ImageFacts, exportable_classifier, load_exported
from batchformer.tasks.training.checkpoint import CheckpointFormat, Restored
from batchformer.tasks.training.contract import Exportable

from .model import Logits, build_network, build_stage, without_keys
from .older_versions import translate_entry
from .settings import NetworkSettings


@dataclass(frozen=True)
class LongTailFacts(ImageFacts):
    """Facts about long-tailed data; ``groups`` are class indices under "many", "medium" and "few"."""

    groups: dict[str, list[int]]


FORMAT = CheckpointFormat("longtail", LongTailFacts, translate_entry)


def load_network(run: str | Path) -> Restored:
    """Load the plain network of a run folder or checkpoint file, in ``eval()``; BatchFormer's weights are left out.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a long-tailed run.
    """
    stored = FORMAT.read(run)
    settings = NetworkSettings(**{**stored.settings["network"], "pretrained": False})  # nothing is downloaded
    network = build_stage(build_network(settings, len(stored.facts.classes), stored.facts.in_channels), stored.stage)
    network.load_state_dict(stored.plain)
    return Restored(network.eval(), stored.facts, settings, stored.stage)


def load_export(folder: str | Path) -> nn.Module:
    """Load the network that ``batchformer export`` wrote, in ``eval()``: it maps images (N, C, H, W) to its outputs.

    Raises:
        FileNotFoundError: When ``model.json`` or ``model.safetensors`` is not in the folder.
        ImportError: When safetensors is missing.
    """

    def build(written: dict[str, Any]) -> Any:
        network = build_network(NetworkSettings(**written["network"]), len(written["classes"]), written["in_channels"])
        return without_keys(build_stage(network, written.get("stage") or written["second_stage"] or "train"))

    return load_exported(folder, build)


def exportable(run: Path) -> Exportable:
    """Describe the plain network of a run for safetensors and ONNX; of PaCo, the encoder and classifier it tests."""
    restored = load_network(run)
    network, settings = without_keys(restored.network), asdict(restored.settings)
    if restored.settings.kind != "ride":
        del settings["experts"], settings["reduced"]
    more, refusal = {"network": settings, "stage": restored.stage}, getattr(network, "onnx_refusal", None)
    return exportable_classifier(network, Logits(network), restored.facts, more, onnx_refusal=refusal)
