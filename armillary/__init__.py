"""Armillary: a training engine for galaxy foundation models.

The sub-packages are the top-level folders of the repository, reached through links: `armillary.engine` (training,
data, evaluation), `armillary.models` (encoders and objectives), `armillary.kernels` (Triton kernels with their
float64-capable oracles) and the compiled `armillary._C` (the shard codec and keyed noise, from csrc/).
"""

__version__ = "0.1.0"
