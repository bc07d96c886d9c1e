"""The dense oracles: exact attention and its gradients in float64 NumPy, straight from the formulas.

Everything else in the package is measured against this folder, so it imports nothing of the package but the type of
its errors, knows no ranks, plans or tiles, and never merges partial softmaxes: a block of rows sees all its keys at
once. Only one block of the score matrix exists at any time, so long sequences need time but little memory.

Arrays are anything `numpy.asarray` takes (NumPy has no bfloat16: convert such tensors to float32 first).

Shapes:  B batch, Hq query heads, Hkv key heads (Hq a multiple of Hkv; key head g serves the query heads
g·Hq/Hkv to (g+1)·Hq/Hkv − 1), Sq queries, Sk keys, D size of a query and key, Dv size of a value.
"""

from ringattn.reference.gated import gated
from ringattn.reference.measure import Evaluation, Gradients, Magnitudes, error
from ringattn.reference.ordered import monotonic
from ringattn.reference.others import hard, linear, sampled
from ringattn.reference.scoring import Scores
from ringattn.reference.softmax import attention, evaluate, gradients, kept, magnitudes
from ringattn.reference.sparse import entmax

__all__ = [
    "Evaluation",
    "Gradients",
    "Magnitudes",
    "Scores",
    "attention",
    "entmax",
    "error",
    "evaluate",
    "gated",
    "gradients",
    "hard",
    "kept",
    "linear",
    "magnitudes",
    "monotonic",
    "sampled",
]
