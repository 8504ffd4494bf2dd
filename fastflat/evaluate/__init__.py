# SPDX-License-Identifier: Apache-2.0
"""What a trained network is worth: accuracy by class and by bits, calibration, corrupted images, attacks.

Whatever is measured, the model's modes, buffers and gradients are afterwards as before.
"""

from fastflat.evaluate._ball import data_range, project
from fastflat.evaluate.accuracy import (
    Evaluation,
    confusion_matrix,
    evaluate,
    group_accuracy,
    per_class_accuracy,
    topk_accuracy,
)
from fastflat.evaluate.attacks import fgsm, pgd
from fastflat.evaluate.calibration import (
    Reliability,
    brier_score,
    calibration_error,
    negative_log_likelihood,
    reliability,
)
from fastflat.evaluate.corruptions import CORRUPTIONS, corrupt
from fastflat.evaluate.ptq import post_training_accuracy
from fastflat.evaluate.robustness import CorruptionTable, corruption_accuracy
from fastflat.evaluate.weights import WeightAttack, weight_attack

__all__ = [
    "CORRUPTIONS",
    "CorruptionTable",
    "Evaluation",
    "Reliability",
    "WeightAttack",
    "brier_score",
    "calibration_error",
    "confusion_matrix",
    "corrupt",
    "corruption_accuracy",
    "data_range",
    "evaluate",
    "fgsm",
    "group_accuracy",
    "negative_log_likelihood",
    "per_class_accuracy",
    "pgd",
    "post_training_accuracy",
    "project",
    "reliability",
    "topk_accuracy",
    "weight_attack",
]
