# SPDX-License-Identifier: Apache-2.0
"""The classes that `architectures.py` goes through: what Transformers' auto classes list, by task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name


TASKS: dict[str, dict[str, Any]] = {
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "seq2seq LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Text, and one label for each image: also tried with other libraries."""

KINDS: dict[str, dict[str, Any]] = {
    "CTC": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "transducer": modeling_auto.MODEL_FOR_RNNT_MAPPING_NAMES | modeling_auto.MODEL_FOR_TDT_MAPPING_NAMES,
    "speech seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "object detection": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
    "semantic segmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "instance segmentation": modeling_auto.MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    "masked image modeling": modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES
    | {name: modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES[name] for name in ("hiera", "videomae", "vit_mae")},
    "multiple choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "MoE with router loss": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    | {
        name: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[name]
        for name in ("nllb-moe", "switch_transformers")
    },
    "image-text contrast": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text to text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "visual question answering": modeling_auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
    "time series": {
        "autoformer": "AutoformerForPrediction",  # the auto classes list these without a head
        "informer": "InformerForPrediction",
        "patchtsmixer": ("PatchTSMixerForPrediction", "PatchTSMixerForPretraining"),
        "patchtst": ("PatchTSTForPrediction", "PatchTSTForPretraining"),
        "time_series_transformer": "TimeSeriesTransformerForPrediction",
    },
    "time series prediction": modeling_auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES,
    "time series classification": modeling_auto.MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES,
    "time series regression": modeling_auto.MODEL_FOR_TIME_SERIES_REGRESSION_MAPPING_NAMES,
}
"""Speech, boxes and masks, images with text, series, router losses: tried with this package alone."""


@dataclass(frozen=True)
class Case:
    """One class that an auto class lists."""

    task: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.task}: {self.model_type}, {self.class_name}"


def all_cases() -> Iterator[Case]:
    """Every class of every list, once; a model type may stand for several."""
    for task, listed in {**TASKS, **KINDS}.items():
        seen = set()
        for model_type, names in listed.items():
            for name in [names] if isinstance(names, str) else names:
                routed = task != "MoE with router loss" or has_router_loss(model_type, name)
                if routed and (task in TASKS or name not in seen):
                    seen.add(name)
                    yield Case(task, model_type, name)


def has_router_loss(model_type: str, class_name: str) -> bool:
    """Return whether a class adds the loss of its router where `output_router_logits` is on, by its source."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    for file in folder.glob("modeling_*.py"):
        _, _, rest = file.read_text().partition(f"class {class_name}(")
        if "aux_loss" in rest.partition("\nclass ")[0]:
            return True
    return False
