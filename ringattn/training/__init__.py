"""What a training loop imports: batches, losses, gradients, checkpoints that are right on any mesh."""

from ringattn.training.activations import save_attention, tiled
from ringattn.training.batch import Batch, accumulate
from ringattn.training.finite import check_finite
from ringattn.training.gradients import clip_grad_norm, gradient_factor, scale_gradients, sum_gradients, total
from ringattn.training.loader import Loader
from ringattn.training.loss import linear_cross_entropy, token_loss
from ringattn.training.sample import IGNORED, Sample

__all__ = [
    "IGNORED",
    "Batch",
    "Loader",
    "Sample",
    "accumulate",
    "check_finite",
    "clip_grad_norm",
    "gradient_factor",
    "linear_cross_entropy",
    "save_attention",
    "scale_gradients",
    "sum_gradients",
    "tiled",
    "token_loss",
    "total",
]
