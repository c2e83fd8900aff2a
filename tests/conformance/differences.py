"""Where gpuconv differs from SciPy on purpose, and what of SciPy's tests is not run: the one table.

tests/conformance/test_scipy.py fails where an unlisted test fails and where a listed one passes.
"""

from __future__ import annotations

from typing import NamedTuple

# The tests of each SciPy module that concern gpuconv's functions.
CONCERNED = {
    "scipy.signal.tests.test_signaltools": (
        "TestConvolve", "TestConvolve2d", "TestFFTConvolve", "TestOAConvolve",
        "TestAllFreqConvolves", "test_convolve_longdtype_input", "TestCorrelateReal",
        "TestCorrelate", "TestCorrelateComplex", "TestCorrelate2d", "test_correlation_lags",
        "test_choose_conv_method", "test_choose_conv_method_2",
    ),
    "scipy.ndimage.tests.test_filters": (
        "TestNdimageFilters", "test_gaussian_truncate", "test_gaussian_radius",
        "test_gaussian_radius_invalid", "test_orders_gauss", "test_valid_origins1",
        "test_bad_convolve_and_correlate_origins", "test_multiple_modes",
        "test_multiple_modes_sequentially",
        "test_multiple_modes_prewitt", "test_multiple_modes_sobel", "test_multiple_modes_laplace",
        "test_multiple_modes_gaussian_laplace",
        "test_multiple_modes_gaussian_gradient_magnitude", "test_multiple_modes_uniform",
        "TestThreading", "test_uniform_filter1d_roundoff_errors", "test_gaussian_filter_float16",
    ),
}  # fmt: skip


class Listed(NamedTuple):
    """Tests whose names, without the module's, match a pattern of ``fnmatch``."""

    pattern: str
    reason: str


# Not run at all.
DESELECTED = [
    Listed(
        "TestConvolve2d::test_large_array*",
        "takes 4 GiB of memory and a minute (SciPy marks it slow)",
    ),
    Listed("test_correlation_lags*1000[01]*", "SciPy marks it slow"),
]

# With array-api-strict, torch and JAX one in so many is run.
SAMPLED_ONE_IN = 32
SAMPLED = [
    Listed("TestOAConvolve::test_real_manylens*", "9730 pairs of lengths, all run with NumPy"),
    Listed("TestFFTConvolve::test_many_sizes*", "604 lengths, all run with NumPy"),
]

# Run, and expected to fail.
DIFFERENT = [
    Listed(
        "test_convolve_longdtype_input*",
        "longdouble is no type of gpuconv's: TypeError, where SciPy computes in it",
    ),
    Listed(
        "test_choose_conv_method*",
        'longdouble again: TypeError, where SciPy answers "direct"',
    ),
    Listed(
        "TestOAConvolve::test_single_element*",
        "the result's type does not depend on the inputs' lengths: oaconvolve of integers is "
        "floating for one element too, where SciPy returns integers",
    ),
    Listed(
        "TestFFTConvolve::test_fft_nan*",
        "no warning of a NaN that method='fft' would spread: it is kept to its windows",
    ),
    Listed(
        "test_gaussian_filter_float16*",
        "float16 images are filtered (summed in float32), where SciPy raises",
    ),
]
