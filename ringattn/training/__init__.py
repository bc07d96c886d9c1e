"""What a training loop imports: batches, losses, gradients, checkpoints that are right on any mesh."""

from ringattn.training.activations import save_attention

__all__ = ["save_attention"]
