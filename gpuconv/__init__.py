"""gpuconv: convolution on the GPU and, where there is none, on the CPU, with the same results.

``conv1d``, ``conv2d`` and ``conv3d`` do the strided, padded, dilated, grouped convolutions of
neural networks and image stacks, on NumPy, CuPy, torch and JAX arrays. ``plan_conv*`` show how.
"""

from gpuconv import grad, ndimage, signal
from gpuconv.backends import asarray, default_backend, show_config, use_backend, warmup
from gpuconv.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_output_shape,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    plan_conv1d,
    plan_conv2d,
    plan_conv3d,
)
from gpuconv.errors import BackendError
from gpuconv.plan import Plan
from gpuconv.tuning import tune, use_tuned

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Plan",
    "asarray",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_output_shape",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "default_backend",
    "grad",
    "ndimage",
    "plan_conv1d",
    "plan_conv2d",
    "plan_conv3d",
    "show_config",
    "signal",
    "tune",
    "use_backend",
    "use_tuned",
    "warmup",
]
