"""What training takes from this package, and the supporting parts of `launch/train.py`.

The trainer is where to start reading; what sharding asks of a training loop is all in there.
"""

from ringattn.training.checkpointing import save_attention

__all__ = ["save_attention"]
