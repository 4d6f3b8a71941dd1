"""Configuration of SMCA, whose defaults are the paper's."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig, ResNetConfig
from transformers.models.auto import CONFIG_MAPPING

PRIOR_SCALES = ("fixed", "single", "width_height")
PRIOR_HEADS = ("independent", "shared")
ENCODER_ATTENTION = ("intra_scale", "multi_scale")


class SmcaConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of `SmcaModel` and `SmcaForObjectDetection`.

    ``SmcaConfig()`` is the paper's single-scale model on ResNet-50, ``SmcaConfig(num_feature_levels=3)`` its
    multi-scale model: strides 16, 32 and 64, five encoder layers (2 intra-scale, 1 multi-scale, 2 intra-scale).

    Source:
        SMCA (arXiv 2101.07448), section 3.2 and the settings in section 4; ``prior_beta`` from the authors' code.

    Args:
        backbone_config: Configuration (or its dict) of a backbone that ``AutoBackbone`` knows, with its maps in
            ``out_features`` or ``out_indices``. ``None``: ResNet-50 of transformers with random weights.
        dilation: Take a ResNet-50 of timm with a dilated last stage (DC5, stride 16), where ``backbone_config`` is
            ``None``.
        freeze_backbone_at: Number of leading parts of the backbone that do not train: 0 none, 1 the stem, 2 also the
            first stage, and so on; stages are counted by the names of the parameters. Batch norms are always frozen.
        num_feature_levels: L, number of levels. The last L maps of the backbone are used; convolutions of stride 2 make
            the maps that it lacks.
        num_queries: Q, number of object queries, and so the largest number of objects in an image.
        d_model: C, width of the transformer; a multiple of 4 and of the heads.
        encoder_layers: Number of encoder layers; ``None``: 6 with one feature level, 5 with several.
        encoder_attention: Attention of each encoder layer: "intra_scale" (tokens attend within their level) or
            "multi_scale" (to all tokens). ``None``: with several levels "multi_scale" for the middle layer alone.
        encoder_ffn_dim: Width of the encoder's feed-forward layers; ``None``: 2048, with several levels 1024.
        decoder_ffn_dim: Width of the decoder's feed-forward layers; ``None``: 2048, with several levels 1024.
        encoder_attention_heads: Number of heads in the encoder.
        decoder_layers: Number of decoder layers.
        decoder_attention_heads: H, number of heads in the decoder.
        dropout: Dropout rate after each attention and feed-forward layer, in 0..1.
        attention_dropout: Dropout rate of the attention weights.
        activation_dropout: Dropout rate inside the feed-forward layers.
        activation_function: Activation of the feed-forward layers, by a name that transformers knows.
        prior_scale: Extent of the Gaussian: "fixed" (1 cell), "single" (one predicted number), "width_height" (one for
            each axis).
        prior_heads: "independent": each head has its own offset from the query's center and its own extent (multi-head
            modulation). "shared": one Gaussian for all heads.
        prior_beta: Bandwidth of the Gaussian, larger than 0.
        auxiliary_loss: Put the loss on the outputs of all decoder layers instead of the last one alone.
        class_cost: Weight of the class in the matching.
        bbox_cost: Weight of the L1 distance of the boxes in the matching.
        giou_cost: Weight of the generalised IoU of the boxes in the matching.
        cls_loss_coefficient: Weight of the class term for criteria that read it. The default, the loss of transformers,
            takes 1 instead, for all of SMCA's siblings too.
        bbox_loss_coefficient: Weight of the L1 term.
        giou_loss_coefficient: Weight of the GIoU term.
        focal_alpha: Weight of a hit in the focal loss, in 0..1.
        **kwargs: Arguments of every configuration of transformers (``num_labels``, ``id2label``, ...).

    Raises:
        ValueError: When a word is unknown or the numbers do not fit together.

    Example:
        >>> config = SmcaConfig(num_feature_levels=3, num_labels=91)
        >>> config.encoder_attention
        ['intra_scale', 'intra_scale', 'multi_scale', 'intra_scale', 'intra_scale']
    """

    model_type = "smca"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        dilation: bool = False,
        freeze_backbone_at: int = 2,
        num_feature_levels: int = 1,
        num_queries: int = 300,
        d_model: int = 256,
        encoder_layers: int | None = None,
        encoder_attention: Sequence[str] | None = None,
        encoder_ffn_dim: int | None = None,
        encoder_attention_heads: int = 8,
        decoder_layers: int = 6,
        decoder_ffn_dim: int | None = None,
        decoder_attention_heads: int = 8,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.1,
        activation_function: str = "relu",
        prior_scale: str = "width_height",
        prior_heads: str = "independent",
        prior_beta: float = 8.0,
        auxiliary_loss: bool = True,
        class_cost: float = 2,
        bbox_cost: float = 5,
        giou_cost: float = 2,
        cls_loss_coefficient: float = 2,
        bbox_loss_coefficient: float = 5,
        giou_loss_coefficient: float = 2,
        focal_alpha: float = 0.25,
        **kwargs: Any,
    ) -> None:
        single = num_feature_levels == 1
        self.backbone_config = _backbone_config(backbone_config, dilation, single)
        self.dilation = dilation
        self.freeze_backbone_at = freeze_backbone_at
        self.num_feature_levels = num_feature_levels
        self.num_queries = num_queries
        self.d_model = d_model
        default_layers = len(encoder_attention) if encoder_attention is not None else 6 if single else 5
        self.encoder_layers = default_layers if encoder_layers is None else encoder_layers
        self.encoder_attention = list(encoder_attention or _encoder_attention(self.encoder_layers, single))
        self.encoder_ffn_dim = encoder_ffn_dim or (2048 if single else 1024)
        self.encoder_attention_heads = encoder_attention_heads
        self.decoder_layers = decoder_layers
        self.decoder_ffn_dim = decoder_ffn_dim or (2048 if single else 1024)
        self.decoder_attention_heads = decoder_attention_heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.activation_function = activation_function
        self.prior_scale = prior_scale
        self.prior_heads = prior_heads
        self.prior_beta = prior_beta
        self.auxiliary_loss = auxiliary_loss
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.cls_loss_coefficient = cls_loss_coefficient
        self.bbox_loss_coefficient = bbox_loss_coefficient
        self.giou_loss_coefficient = giou_loss_coefficient
        self.focal_alpha = focal_alpha
        super().__init__(**{"is_encoder_decoder": True, **kwargs})
        self._check()

    def _check(self) -> None:
        words = {"prior_scale": PRIOR_SCALES, "prior_heads": PRIOR_HEADS}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {known}, got {getattr(self, name)!r}.")
        if unknown := set(self.encoder_attention) - set(ENCODER_ATTENTION):
            raise ValueError(f"Expected words of {ENCODER_ATTENTION} in encoder_attention, got {sorted(unknown)}.")
        if len(self.encoder_attention) != self.encoder_layers:
            raise ValueError(
                f"Expected one word in encoder_attention for each of {self.encoder_layers} encoder_layers, got "
                f"{self.encoder_attention}. Give one of the two and leave the other out."
            )
        heads = {self.encoder_attention_heads, self.decoder_attention_heads}
        if any(self.d_model % divisor for divisor in {4, *heads}):
            raise ValueError(f"Expected d_model to be a multiple of 4 and of the heads {heads}, got {self.d_model}.")
        if self.prior_beta <= 0:
            raise ValueError(f"Expected prior_beta > 0, got {self.prior_beta}.")
        if self.num_feature_levels < 1:
            raise ValueError(f"Expected at least one feature level, got num_feature_levels={self.num_feature_levels}.")


def _backbone_config(given: PretrainedConfig | dict[str, Any] | None, dilation: bool, single: bool) -> PretrainedConfig:
    if isinstance(given, dict):
        # A saved configuration has a dict; `from_dict` reads out_features as well.
        return CONFIG_MAPPING[given["model_type"]].from_dict(given)
    if given is not None:
        return given
    if dilation:
        return CONFIG_MAPPING["timm_backbone"](
            backbone="resnet50", use_pretrained_backbone=False, out_indices=[4], output_stride=16
        )
    return ResNetConfig(out_features=["stage4"] if single else ["stage3", "stage4"])


def _encoder_attention(layers: int, single: bool) -> list[str]:
    return ["multi_scale" if not single and i == layers // 2 else "intra_scale" for i in range(layers)]
