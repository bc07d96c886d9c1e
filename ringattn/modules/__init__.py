"""Attention modules of the literature, ordinary torch over the public functions: one file a family.

Each takes this rank's part of a sequence and its sharding, and gives this rank's part. Their parameters are replicated;
what a rank gets is its part of their gradients, to be added up over the ranks as for any replicated parameter.
"""

from ringattn.modules.channel import ChannelAttention, SqueezeExcitation
from ringattn.modules.coattention import DCN, BiDAF, DCNPlus
from ringattn.modules.deformable import DeformableConvolution
from ringattn.modules.hybrid import AttentionInAttention, HybridAttention
from ringattn.modules.images import Convolution, Rows
from ringattn.modules.scores import Cosine, General, LocalM, LocalP, Location
from ringattn.modules.spatial import SpatialAttention
from ringattn.modules.tri import TriAttention

__all__ = [
    "DCN",
    "AttentionInAttention",
    "BiDAF",
    "ChannelAttention",
    "Convolution",
    "Cosine",
    "DCNPlus",
    "DeformableConvolution",
    "General",
    "HybridAttention",
    "LocalM",
    "LocalP",
    "Location",
    "Rows",
    "SpatialAttention",
    "SqueezeExcitation",
    "TriAttention",
]
