"""All recipes in one table, the kinds of network, loss and source that each has, and its run made tiny.

Every recipe is parsed, and its header's commands too. A recipe that has ``STANDS_FOR`` beside it is also started,
broken and resumed; the others have no kind that one of these has not, which
``test_every_kind_is_started`` checks. The networks as published are started by ``-m slow``, those of all recipes.
"""

from pathlib import Path
from typing import Any

from recipe_runs import settings_of

from batchformer.engine.recipes import Recipe

RECIPES = [
    "detection/coco-conditional-detr-r50",
    "detection/coco-deformable-detr-r50",
    "detection/coco-detr-r50",
    "detection/coco-smca-r50",
    "detection/folder",
    "detection/scenes",
    "longtail/cifar10-lt-balanced-softmax",
    "longtail/cifar100-lt-balanced-softmax",
    "longtail/cifar100-lt-paco",
    "longtail/cifar100-lt-ride",
    "longtail/fashion-mnist-lt",
    "longtail/fashion-mnist-lt-paco",
    "longtail/fashion-mnist-lt-ride",
    "longtail/folder",
    "longtail/imagenet-lt-r10-balanced-softmax",
    "longtail/imagenet-lt-r10-ride",
    "longtail/imagenet-lt-r50-balanced-softmax",
    "longtail/imagenet-lt-r50-paco",
    "longtail/imagenet-lt-r50-ride",
    "longtail/imagenet-lt-x50-ride",
    "longtail/inat18-r50-ride",
    "longtail/places-lt-r152-balanced-softmax",
    "panoptic/coco-detr-r50",
    "panoptic/folder",
    "panoptic/scenes",
]
"""All recipes of the package."""

STANDS_FOR = {
    "detection/coco-detr-r50": "DETR on one map; COCO with DETR's augmentation; a backbone that trains",
    "detection/coco-deformable-detr-r50": "Deformable DETR on four maps; focal loss",
    "detection/coco-smca-r50": "SMCA",
    "detection/folder": "Deformable DETR on one map; a folder of one's own; cached features",
    "detection/scenes": "Conditional DETR (also coco-conditional-detr-r50); the scenes",
    "longtail/cifar10-lt-balanced-softmax": "CIFAR-10",
    "longtail/cifar100-lt-paco": "ResNet-32 with PaCo; CIFAR-100 in two views, the published augmentations",
    "longtail/cifar100-lt-ride": "ResNet-32 with RIDE; the augmentation with rotations",
    "longtail/fashion-mnist-lt": "the small ResNet; Balanced Softmax; Fashion-MNIST",
    "longtail/folder": "ResNet-10; a folder of one's own",
    "longtail/imagenet-lt-r50-paco": "lists of ImageNet-LT; PaCo on images from files, in two views",
    "longtail/inat18-r50-ride": "lists of iNaturalist 2018, its augmentation; RIDE in a single stream",
    "longtail/places-lt-r152-balanced-softmax": "lists of Places-LT; a network of which a part trains",
    "panoptic/coco-detr-r50": "DETR with its mask head; a backbone that trains; COCO; the published start of the head",
    "panoptic/folder": "Conditional DETR with a mask head on cached features; a folder of one's own; a balanced start",
    "panoptic/scenes": "the scenes in panoptic form",
}
"""Recipes that are started, broken and resumed: recipe -> the kinds that it stands for."""

BROKEN_IN = {
    "panoptic/coco-detr-r50": [3],  # DETR's own stage is broken in detection/coco-detr-r50
    "panoptic/folder": [1, 2, 3],  # in either stage, and where the second has saved nothing yet
    "panoptic/scenes": [1],
}
"""Epochs, counted over all stages, in which a run of several stages is broken."""

ARRAYS = ("fashion-mnist", "cifar10", "cifar100")
RESNETS = ("resnet10", "resnet50", "resnext50", "resnet152")


def kinds(recipe: Recipe) -> set[str]:
    """Return the kinds of network, loss, source, augmentation and stage that a recipe has."""
    settings = settings_of(recipe)
    task, data, model = settings["task"], settings["data"], settings["model"]
    network = model["network"]
    found = {f"source {data['dataset']}", f"cached features {data.get('cache_features', False)}"}
    found |= {f"stage {stage['name']}" for stage in settings.get("stages", ())}
    if task == "longtail":
        backbone = "a ResNet for large images" if network["backbone"] in RESNETS else network["backbone"]
        found |= {f"backbone {backbone}", f"network {network.get('kind', 'plain')}", f"loss {model['loss']['name']}"}
        found |= {f"streams {model['batchformer'].get('mode')}" if "batchformer" in model else "streams None"}
        found |= {f"a part trains {'train_only' in network}", f"two views {data.get('two_views', False)}"}
        for augment in (data.get("augment"), data.get("augment_second")):
            steps = augment if isinstance(augment, list) else [f"as for {augment}"]
            found |= {f"augmentation {step.partition('=')[0]}" for step in steps}
    else:
        detector = network.get("detector", "detr")
        levels = f" on {network['feature_levels']} maps" if detector == "deformable_detr" else ""
        found |= {f"network {detector}{levels}"}
        found |= {f"backbone trains {network['backbone']['trains']}", f"augmentation {data['augment']}"}
        found |= {f"start of the mask head {model.get('masks', {}).get('start', 'balanced')}"}
    return {f"{task}: {kind}" for kind in found}


def epochs_of(recipe: Recipe) -> dict[str, int]:
    """Return the epochs of each stage of a tiny run; of a recipe that lists no stages those of the one it has."""
    return {stage["name"]: 2 for stage in settings_of(recipe).get("stages", ())} or {"train": 2}


def broken_in(recipe: Recipe) -> list[int]:
    """Return the epochs in which a tiny run is broken, counted over all stages; the second of a single stage."""
    return BROKEN_IN.get(recipe.name, [1])


def epoch_words(recipe: Recipe, epochs: dict[str, int]) -> list[str]:
    if epochs and "stages" not in settings_of(recipe):
        return [f"--trainer.max_epochs={sum(epochs.values())}"]
    return [f"--stages.{stage}.epochs={number}" for stage, number in epochs.items()]


def tiny(recipe: Recipe, root: Path, *, own_network: bool = False, epochs: dict[str, int] | None = None) -> list[str]:
    """Return overrides that make a run of any recipe last a second: two steps of four images in every epoch.

    Args:
        recipe: One of the table.
        root: Data in the recipe's real format.
        own_network: Keep the published network.
        epochs: Epochs of each stage; ``None`` for :func:`epochs_of`, none for those of other words.
    """
    settings = settings_of(recipe)
    words = [f"--data.root={root}", "--data.batch_size=4", "--data.num_workers=0"]
    words += ["--trainer.limit_train_batches=2", "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu"]
    words += ["--precision=32-true", *epoch_words(recipe, epochs_of(recipe) if epochs is None else epochs)]
    task = {"longtail": tiny_classifier, "detection": tiny_detector, "panoptic": tiny_segmenter}[settings["task"]]
    return words + task(settings, own_network)


def tiny_classifier(settings: dict[str, Any], own_network: bool) -> list[str]:
    data, network = settings["data"], settings["model"]["network"]
    words = ["--data.eval_batch_size=8", "--data.many_over=5", "--data.few_under=3"]
    if data["dataset"] in ARRAYS:
        words += ["--data.n_max=5", "--data.imbalance_factor=2"]
    else:
        # Read through the loader of large images, as the real data is.
        words += ["--data.image_size=32", "--data.memory_gib=0"]
    if network["backbone"] in RESNETS and not own_network:
        words.append("--model.network.backbone=resnet10")
    if "train_only" in network and not own_network:
        words.append("--model.network.train_only=[backbone.layer4, classifier]")
    if network.get("pretrained"):
        words.append("--model.network.pretrained=false")
    if network.get("kind") == "paco":
        words.append("--model.network.settings.queue_size=16")
    if network.get("kind") == "ride":
        words.append("--model.loss.settings.reweight_epoch=1")
    return words


def tiny_detector(settings: dict[str, Any], own_network: bool, backbone: str = "resnet18") -> list[str]:
    words = ["--data.size=64", "--data.eval_batch_size=8"]
    words += ["--data.train_images=8"] if "train_images" in settings["data"] else []
    words += ["--model.network.backbone.pretrained=false", "--model.network.num_queries=8"]
    if own_network:
        return words
    sizes = {"backbone.name": backbone, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 32}
    return words + [f"--model.network.{name}={value}" for name, value in sizes.items()]


def tiny_segmenter(settings: dict[str, Any], own_network: bool) -> list[str]:
    words = tiny_detector(settings, own_network, backbone="efficientnet_lite0")
    return [*words, "--data.eval_batch_size=4", "--model.pictures=2"]
