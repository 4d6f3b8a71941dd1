"""The decoder's last norm on copies of the layers' outputs, as published; transformers puts it between the layers.

With ``auxiliary_loss=True``, DETR and Conditional DETR of transformers (4.57 to 5.24) hand the normalised output of
each decoder layer to the next one, and normalise the last one twice. This is a different network from the one with
``auxiliary_loss=False``. In the published code only the outputs that the heads see are normalised, so that the loss of
all layers changes nothing in the network.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["normalize_copies"]


def normalize_copies(detector: Any) -> None:
    """Make a detector of transformers with ``auxiliary_loss=True`` compute the same as with ``auxiliary_loss=False``.

    Its outputs, in training and in evaluation, then equal those of the same weights with ``auxiliary_loss=False``, and
    the auxiliary outputs are the published ones. Other detectors, such as Deformable DETR, do not have this fault and
    stay as they are.

    The change consists of hooks, which no file stores: save the model with ``config.auxiliary_loss = False``, or call
    this function again after loading it.

    Args:
        detector: Detector or network with a mask head, changed in place.

    Raises:
        ValueError: From the model, when it is called with ``return_dict=False``.

    Source:
        DETR, section 3.2, auxiliary decoding losses: a shared norm before the heads of every layer.

    Example:
        >>> import torch
        >>> from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
        >>> tiny = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], out_features=["stage1"])
        >>> own = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=tiny)
        >>> size = dict(d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
        >>> model = DetrForObjectDetection(DetrConfig(**own, **size, auxiliary_loss=True)).eval()
        >>> normalize_copies(model)
        >>> logits = model(torch.ones(1, 3, 32, 32)).logits
        >>> plain = DetrForObjectDetection(DetrConfig(**own, **size, auxiliary_loss=False)).eval()
        >>> _ = plain.load_state_dict(model.state_dict())
        >>> torch.allclose(logits, plain(torch.ones(1, 3, 32, 32)).logits, atol=1e-6)
        True
    """
    kind = detector.config.model_type
    if kind in ("detr", "conditional_detr"):
        inside = getattr(detector, kind, detector)  # of a network with a mask head
        _Copies(inside.get_submodule("model.decoder"))


class _Copies:
    """Hooks that pass over a decoder's norm while the layers run, and then apply it to all of their outputs."""

    def __init__(self, decoder: Any) -> None:
        self.passed_over = False
        decoder.register_forward_pre_hook(self.start)
        decoder.layernorm.register_forward_hook(self.norm)
        decoder.register_forward_hook(self.end)

    def start(self, decoder: Any, args: Any) -> None:
        self.passed_over = bool(decoder.config.auxiliary_loss)

    def norm(self, layernorm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] if self.passed_over else output

    def end(self, decoder: Any, args: Any, output: Any) -> None:
        passed_over, self.passed_over = self.passed_over, False
        if not passed_over:
            return
        if isinstance(output, tuple):
            raise ValueError(
                "Expected return_dict=True, with which the decoder names its outputs, got return_dict=False. Leave "
                "return_dict out."
            )
        output.intermediate_hidden_states = decoder.layernorm(output.intermediate_hidden_states)
        output.last_hidden_state = output.intermediate_hidden_states[-1]
        if output.hidden_states is not None:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
