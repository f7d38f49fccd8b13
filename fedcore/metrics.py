"""Every metric that fedcore offers, and functions that make others: ``from fedcore.metrics``."""

from __future__ import annotations

from fedcore.task.class_metrics import (
    AUC,
    DICE,
    F1,
    MEAN_IOU,
    PRECISION,
    RECALL,
    accuracy,
    auc,
    dice,
    f1,
    from_confusion,
    mean_iou,
    precision,
    recall,
    top_k,
)
from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric, perplexity
from fedcore.task.statistics import Statistics

__all__ = [
    "ACCURACY",
    "AUC",
    "DICE",
    "F1",
    "MAE",
    "MEAN_IOU",
    "PERPLEXITY",
    "PRECISION",
    "RECALL",
    "RMSE",
    "Metric",
    "Statistics",
    "accuracy",
    "auc",
    "dice",
    "f1",
    "from_confusion",
    "mean_iou",
    "perplexity",
    "precision",
    "recall",
    "top_k",
]
