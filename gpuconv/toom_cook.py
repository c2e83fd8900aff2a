"""The matrices of Winograd's short convolutions F(m x m, 3x3), and what rounding makes of them.

A tile of m x m outputs of a 3x3 filter g sees n x n inputs d, n = m + 2. It is

    Y = A [ (G g G') * (B d B') ] A'        *: element by element, summed over channels

with n*n products where the sum has 9 m*m. The matrices follow from n - 1 points and infinity
(Toom and Cook): B evaluates the polynomials that vanish at all points but one.

Rounding. To first order in the unit roundoff u, with absolute values taken element by element and L
roundings on the way of a product through the sum over C channels, t on its way through the
transforms (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1),

    |Y - Y_ref| <= (L + t) u  sum over c of  |A| [ (|G||g||G'|) * (|B||d||B'|) ] |A'|
                <= (L + t) u kappa  sum over c of  max|d_c| max|g_c|

kappa is ``amplification``, 64 for m = 2 and 564 for m = 4; the direct sum's is 9, and its L is 9 C.
So the method gains on the direct sum in accuracy, too, as the channels grow in number: most of all
where the sum over channels is made in two levels, L = chunk + C/chunk.

The points of m = 4 are 0, +-5/8, +-3/2: with the usual 0, +-1, +-2 kappa is 2304. Their squares and
cubes, and with them A and B, are exact in float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from gpuconv.arrays import HostArray

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}


def matrices(outputs: int) -> tuple[HostArray, HostArray, HostArray]:
    """A (m, n), B (n, n) and G (n, 3) of F(m x m, 3x3), in float64."""
    points, size = POINTS[outputs], outputs + 2
    a, b, g = np.zeros((outputs, size)), np.zeros((size, size)), np.zeros((size, 3))
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        a[:, i] = [p**n for n in range(outputs)]
        b[i, : size - 1] = np.polynomial.polynomial.polyfromroots(others)
        g[i] = np.array([1, p, p * p]) / math.prod(p - q for q in others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.polynomial.polynomial.polyfromroots(points)
    return a, b, g


@lru_cache(maxsize=4)
def amplification(outputs: int) -> float:
    """kappa: the largest sum of magnitudes behind an output, for inputs and taps of at most 1."""
    a, b, g = matrices(outputs)
    along_one_axis = np.abs(a) @ (np.abs(b).sum(axis=1) * np.abs(g).sum(axis=1))
    return float(along_one_axis.max()) ** 2
