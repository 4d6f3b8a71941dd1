"""SMCA, a detector that transformers lacks, in the style of its siblings there: DETR, Conditional and Deformable DETR.

Source:
    Gao et al., Fast Convergence of DETR with Spatially Modulated Co-Attention, ICCV 2021 (arXiv 2101.07448).
"""

from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from .configuration import SmcaConfig
from .decoder import SmcaModelOutput
from .modeling import SmcaForObjectDetection, SmcaModel, SmcaObjectDetectionOutput

# AutoModelForObjectDetection.from_pretrained finds a saved SMCA once this package is imported.
AutoConfig.register("smca", SmcaConfig, exist_ok=True)
AutoModel.register(SmcaConfig, SmcaModel, exist_ok=True)
AutoModelForObjectDetection.register(SmcaConfig, SmcaForObjectDetection, exist_ok=True)

__all__ = ["SmcaConfig", "SmcaForObjectDetection", "SmcaModel", "SmcaModelOutput", "SmcaObjectDetectionOutput"]
