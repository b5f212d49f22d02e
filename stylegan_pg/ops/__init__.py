"""The operators upfirdn2d, bias_act and filtered_lrelu, with several implementations that give the same result,
bfloat16 3x3 convolutions for CPUs without bfloat16 instructions, and convolutions in groups."""

from stylegan_pg.ops.bias_act import bias_act
from stylegan_pg.ops.conv3x3 import conv3x3, conv3x3_is_faster
from stylegan_pg.ops.decomposed import plain_operations
from stylegan_pg.ops.filtered_lrelu import filtered_lrelu
from stylegan_pg.ops.grouped_conv import grouped_conv
from stylegan_pg.ops.pool import converted
from stylegan_pg.ops.reference import ACTIVATIONS
from stylegan_pg.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "ACTIVATIONS",
    "bias_act",
    "conv3x3",
    "conv3x3_is_faster",
    "converted",
    "downsample2d",
    "filter2d",
    "filtered_lrelu",
    "grouped_conv",
    "plain_operations",
    "setup_filter",
    "upfirdn2d",
    "upsample2d",
]
