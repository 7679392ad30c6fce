"""The on-disk layouts of the real data sets, filled with synthetic brains; one module per data set;
`tissue` is nnU-Net's own."""

from nnunet_ssl.phantom.layouts.atlas import write_atlas
from nnunet_ssl.phantom.layouts.atlas3 import write_atlas3
from nnunet_ssl.phantom.layouts.fcd import write_fcd
from nnunet_ssl.phantom.layouts.fomo import write_fomo
from nnunet_ssl.phantom.layouts.isles import write_isles
from nnunet_ssl.phantom.layouts.tissue import write_tissue

__all__ = ["write_atlas", "write_atlas3", "write_fcd", "write_fomo", "write_isles", "write_tissue"]
