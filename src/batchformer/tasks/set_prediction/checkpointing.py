"""Gradient checkpointing of detectors in all versions of transformers."""

from typing import Any

__all__ = ["checkpoint_gradients"]


def checkpoint_gradients(network: Any) -> None:
    """Have the backward pass compute activations again: less memory, more time, the same numbers.

    Args:
        network: ``PreTrainedModel``, changed in place.

    Raises:
        ValueError: When this version of transformers has no gradient checkpointing for it.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> network = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        >>> checkpoint_gradients(network)
        >>> any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
        True
    """
    if not network.supports_gradient_checkpointing:
        raise ValueError(
            f"Expected model.network.checkpointing=false: {type(network).__name__} has no gradient checkpointing in "
            "this version of transformers. transformers 5 has it."
        )
    # Renamed in transformers 5.
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
