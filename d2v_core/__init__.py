"""d2v_core: data2vec for any modality, as parts.

The names below are what plugin authors and library users import. They load on first use, so that
`import d2v_core` and the command line stay quick: only what touches tensors imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from d2v_core.contract import (
        BadSample,
        Batch,
        Batching,
        Dataset,
        FeatureEncoder,
        LabelledPart,
        Layout,
        Masks,
        Modality,
        Predictor,
        ProbeTask,
        Raw,
        RawEncoder,
        RawValues,
        Task,
        Tokens,
    )
    from d2v_core.data2vec import Data2Vec, LinearPredictor
    from d2v_core.decoder import ConvDecoder
    from d2v_core.errors import UserError
    from d2v_core.finetune import load_classifier, load_finetuned
    from d2v_core.loss import RegressionLoss
    from d2v_core.masking import BlockMasking, SpanMasking, span_mask
    from d2v_core.positions import ConvPositions
    from d2v_core.run import load
    from d2v_core.targets import TopKTargets
    from d2v_core.teacher import EMATeacher
    from d2v_core.transformer import Transformer
    from d2v_core.visible import Alibi, Prenet

_HOME = {
    "BadSample": "contract",
    "Batch": "contract",
    "Batching": "contract",
    "Dataset": "contract",
    "FeatureEncoder": "contract",
    "LabelledPart": "contract",
    "Layout": "contract",
    "Masks": "contract",
    "Modality": "contract",
    "Predictor": "contract",
    "ProbeTask": "contract",
    "Raw": "contract",
    "RawEncoder": "contract",
    "RawValues": "contract",
    "Task": "contract",
    "Tokens": "contract",
    "Data2Vec": "data2vec",
    "LinearPredictor": "data2vec",
    "ConvDecoder": "decoder",
    "UserError": "errors",
    "RegressionLoss": "loss",
    "BlockMasking": "masking",
    "SpanMasking": "masking",
    "span_mask": "masking",
    "ConvPositions": "positions",
    "load": "run",
    "load_classifier": "finetune",
    "load_finetuned": "finetune",
    "TopKTargets": "targets",
    "EMATeacher": "teacher",
    "Transformer": "transformer",
    "Alibi": "visible",
    "Prenet": "visible",
}

__all__ = [
    "Alibi",
    "BadSample",
    "Batch",
    "Batching",
    "BlockMasking",
    "ConvDecoder",
    "ConvPositions",
    "Data2Vec",
    "Dataset",
    "EMATeacher",
    "FeatureEncoder",
    "LabelledPart",
    "Layout",
    "LinearPredictor",
    "Masks",
    "Modality",
    "Predictor",
    "Prenet",
    "ProbeTask",
    "Raw",
    "RawEncoder",
    "RawValues",
    "RegressionLoss",
    "SpanMasking",
    "Task",
    "Tokens",
    "TopKTargets",
    "Transformer",
    "UserError",
    "__version__",
    "load",
    "load_classifier",
    "load_finetuned",
    "span_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'd2v_core' has no attribute {name!r}")
    return getattr(import_module(f"d2v_core.{_HOME[name]}"), name)
