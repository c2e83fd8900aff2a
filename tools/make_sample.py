"""Make gpuconv/data/sample.jpg, the picture that `gpuconv filter` uses when it is given none.

    python tools/make_sample.py [--out FILE] [--spp 80] [--width 768] [--seed 1]

A small path tracer in NumPy (Pillow writes the file): a ceramic cat, fruit and glass on a wooden
table before a brick wall, lit by the sun through a window. It has what filters are shown on: sharp
and soft edges in all directions, fine texture, smooth gradients, and depth of field. Everything in
it is computed here, so the picture is as free as the rest of the repository. The same seed makes
the same picture on the same NumPy; it takes about ten minutes on two cores.

Vectors are float32 arrays of shape (3, n), one column per ray. x goes right, y up, z to the camera.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]
F32 = np.float32

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "gpuconv" / "data" / "sample.jpg"
FAR = F32(1e6)
MAX_DEPTH = 6

# --------------------------------------------------------------------------------------------
# Small vector helpers
# --------------------------------------------------------------------------------------------


def vec(x: float, y: float, z: float) -> Array:
    return np.array([[x], [y], [z]], dtype=F32)


def dot(a: Array, b: Array) -> Array:
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def normalize(v: Array) -> Array:
    return np.asarray(v / np.sqrt(np.maximum(dot(v, v), F32(1e-20))))


def length(x: Array, y: Array, z: Array) -> Array:
    return np.asarray(np.sqrt(x * x + y * y + z * z))


def smoothstep(lo: float, hi: float, x: Array) -> Array:
    t = np.clip((x - F32(lo)) / F32(hi - lo), F32(0), F32(1))
    return np.asarray(t * t * (F32(3) - F32(2) * t))


def mix(a: Array, b: Array, t: Array) -> Array:
    return np.asarray(a + (b - a) * t)


# --------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------

_LATTICE = np.random.default_rng(20).random((64, 64, 64), dtype=F32)


def noise(x: Array, y: Array, z: Array) -> Array:
    """Value noise in [0, 1]: a random lattice of period 64, smoothly interpolated."""
    corners, weights = [], []
    for c in (x, y, z):
        low = np.floor(c)
        t = (c - low).astype(F32)
        i = low.astype(np.int32) & 63
        corners.append((i, (i + 1) & 63))
        weights.append(t * t * (F32(3) - F32(2) * t))
    (x0, x1), (y0, y1), (z0, z1) = corners
    u, v, w = weights
    table = _LATTICE
    low_z = mix(
        mix(table[x0, y0, z0], table[x1, y0, z0], u),
        mix(table[x0, y1, z0], table[x1, y1, z0], u),
        v,
    )
    high_z = mix(
        mix(table[x0, y0, z1], table[x1, y0, z1], u),
        mix(table[x0, y1, z1], table[x1, y1, z1], u),
        v,
    )
    return mix(low_z, high_z, w)


def fbm(x: Array, y: Array, z: Array, octaves: int) -> Array:
    """Fractal noise, about [0, 1]: octaves of halving size and strength."""
    total = np.zeros_like(x)
    scale, strength, norm = 1.0, 1.0, 0.0
    for k in range(octaves):
        shift = F32(17.3 * k)
        total += F32(strength) * noise(x * F32(scale) + shift, y * F32(scale), z * F32(scale))
        norm += strength
        scale *= 2.03
        strength *= 0.5
    return np.asarray(total / F32(norm))


def hash01(i: Array, j: Array) -> Array:
    """One random number per integer cell (of bricks, planks, …)."""
    a = i.astype(np.int32) & 63
    b = j.astype(np.int32) & 63
    return np.asarray(_LATTICE[a, b, (a * 7 + b * 13) & 63])


# --------------------------------------------------------------------------------------------
# Implicit surfaces: distance bounds of points to the cat, the vase, the apple
# --------------------------------------------------------------------------------------------


def smooth_min(a: Array, b: Array, k: float) -> Array:
    h = np.maximum(F32(k) - np.abs(a - b), F32(0)) / F32(k)
    return np.asarray(np.minimum(a, b) - h * h * F32(k / 4))


def ellipsoid(
    p: Array, center: tuple[float, float, float], radii: tuple[float, float, float]
) -> Array:
    x, y, z = (p[i] - F32(center[i]) for i in range(3))
    k0 = length(x / F32(radii[0]), y / F32(radii[1]), z / F32(radii[2]))
    k1 = length(x / F32(radii[0] ** 2), y / F32(radii[1] ** 2), z / F32(radii[2] ** 2))
    return np.asarray(k0 * (k0 - F32(1)) / np.maximum(k1, F32(1e-6)))


def ball(p: Array, center: tuple[float, float, float], radius: float) -> Array:
    return length(*(p[i] - F32(center[i]) for i in range(3))) - F32(radius)


def capsule(
    p: Array,
    a: tuple[float, float, float],
    b: tuple[float, float, float],
    radius_a: float,
    radius_b: float,
) -> Array:
    """A segment whose radius goes linearly from radius_a to radius_b."""
    ba = [F32(b[i] - a[i]) for i in range(3)]
    pa = [p[i] - F32(a[i]) for i in range(3)]
    norm = F32(sum(float(c) ** 2 for c in ba))
    h = np.clip((pa[0] * ba[0] + pa[1] * ba[1] + pa[2] * ba[2]) / norm, F32(0), F32(1))
    distance = length(*(pa[i] - ba[i] * h for i in range(3)))
    return np.asarray(distance - (F32(radius_a) + F32(radius_b - radius_a) * h))


EYE = (0.225, 2.52, 0.74)
TAIL = [
    ((0.3, 0.3, -1.0), 0.2),
    ((0.95, 0.2, -0.75), 0.19),
    ((1.28, 0.18, -0.2), 0.18),
    ((1.22, 0.17, 0.4), 0.17),
    ((0.85, 0.16, 0.85), 0.16),
    ((0.45, 0.15, 1.15), 0.13),
]


def cat_distance(p: Array) -> Array:
    """A sitting cat, 3.2 high, that looks along +z; the left half mirrors the right."""
    q = np.stack([np.abs(p[0]), p[1], p[2]])
    body = ellipsoid(p, (0.0, 0.95, -0.4), (0.78, 0.95, 0.85))
    body = smooth_min(body, ellipsoid(p, (0.0, 1.35, 0.1), (0.56, 0.95, 0.55)), 0.35)
    body = smooth_min(body, ellipsoid(q, (0.55, 0.55, -0.1), (0.38, 0.58, 0.62)), 0.15)
    body = smooth_min(body, capsule(q, (0.25, 1.3, 0.4), (0.24, 0.2, 0.68), 0.24, 0.17), 0.18)
    body = smooth_min(body, ellipsoid(q, (0.25, 0.13, 0.82), (0.2, 0.15, 0.28)), 0.08)
    body = smooth_min(body, ellipsoid(q, (0.66, 0.13, 0.42), (0.2, 0.15, 0.4)), 0.1)
    head = ellipsoid(p, (0.0, 2.48, 0.32), (0.6, 0.5, 0.52))
    head = smooth_min(head, ball(q, (0.27, 2.32, 0.5), 0.27), 0.15)
    head = smooth_min(head, ball(q, (0.1, 2.27, 0.76), 0.14), 0.08)
    head = smooth_min(head, ball(p, (0.0, 2.18, 0.7), 0.11), 0.1)
    head = smooth_min(head, capsule(p, (0.0, 2.62, 0.72), (0.0, 2.4, 0.86), 0.1, 0.06), 0.12)
    # Ears are flattened cones with a hollow in front.
    ear_p = np.stack([q[0], q[1], (q[2] - F32(0.25)) * F32(1.7)])
    ear = capsule(ear_p, (0.34, 2.72, 0.0), (0.5, 3.22, 0.0), 0.25, 0.035)
    hollow_p = np.stack([q[0], q[1], (q[2] - F32(0.42)) * F32(1.3)])
    hollow = capsule(hollow_p, (0.35, 2.78, 0.0), (0.48, 3.14, 0.0), 0.17, 0.02)
    ear = np.maximum(ear, -hollow) * F32(0.6)
    head = smooth_min(head, ear, 0.08)
    head = smooth_min(head, ball(q, EYE, 0.1), 0.02)
    body = smooth_min(body, capsule(p, (0.0, 1.8, 0.1), (0.0, 2.3, 0.25), 0.45, 0.38), 0.2)
    cat = smooth_min(body, head, 0.12)
    for (a, radius_a), (b, radius_b) in pairwise(TAIL):
        cat = smooth_min(cat, capsule(p, a, b, radius_a, radius_b), 0.06)
    return cat


def vase_distance(p: Array) -> Array:
    """A body of revolution: a thin shell around a curve radius(y), open at the top."""
    r = np.sqrt(p[0] * p[0] + p[2] * p[2])
    y = np.clip(p[1], F32(0), F32(2.6))
    profile = (
        F32(0.52)
        + F32(0.36) * np.sin(y * F32(1.75) + F32(0.15))
        + F32(0.16) * smoothstep(2.1, 2.6, y)
        + F32(0.03) * np.cos(y * F32(12))
    )
    outside = np.maximum(np.abs(p[1] - F32(1.3)) - F32(1.3), F32(0))
    shell = np.maximum(np.abs(r - profile + F32(0.05)) - F32(0.05), F32(0))
    return np.asarray(np.sqrt(shell * shell + outside * outside) * F32(0.75) - F32(0.012))


def apple_distance(p: Array) -> Array:
    """A sphere with dents at both poles, and a stem."""
    r = np.sqrt(p[0] * p[0] + p[2] * p[2])
    flesh = length(r - F32(0.22), (p[1] - F32(0.5)) * F32(0.93), np.zeros_like(r))
    angle = np.arctan2(p[0], p[2])
    lobes = F32(0.006) * np.cos(angle * F32(5)) * smoothstep(0.6, 0.0, p[1])
    apple = flesh - F32(0.4) - F32(0.06) * (p[1] - F32(0.5)) - lobes
    stem = capsule(p, (0.0, 0.7, 0.0), (0.1, 1.08, 0.04), 0.025, 0.035)
    return np.asarray(np.minimum(apple * F32(0.85), stem))


# --------------------------------------------------------------------------------------------
# The scene
# --------------------------------------------------------------------------------------------

(
    SKY,
    TABLE,
    WALL,
    CAT,
    VASE,
    APPLE,
    APPLE2,
    ORANGE,
    ORANGE2,
    GLASS,
    CHROME,
    RULER,
    BOOK,
    MARBLE,
) = range(14)


@dataclass(frozen=True)
class Implicit:
    """A distance function, placed: rotated by yaw about y, moved, bounded by a sphere."""

    material: int
    distance: Callable[[Array], Array]
    position: tuple[float, float, float]
    yaw: float
    bound_center: tuple[float, float, float]
    bound_radius: float
    scale: float = 1.0

    def to_local(self, p: Array) -> Array:
        c, s = F32(np.cos(self.yaw)), F32(np.sin(self.yaw))
        x, y, z = (p[i] - F32(self.position[i]) for i in range(3))
        return np.asarray(np.stack([c * x - s * z, y, s * x + c * z]) / F32(self.scale), F32)

    def to_world_direction(self, v: Array) -> Array:
        c, s = F32(np.cos(self.yaw)), F32(np.sin(self.yaw))
        return np.stack([c * v[0] + s * v[2], v[1], -s * v[0] + c * v[2]])


IMPLICITS = (
    Implicit(CAT, cat_distance, (0.35, 0.0, -0.3), -0.38, (0.05, 1.6, -0.05), 2.05),
    Implicit(VASE, vase_distance, (-2.65, 0.0, -1.25), 0.0, (0.0, 1.3, 0.0), 1.62, 1.12),
    Implicit(APPLE, apple_distance, (2.45, 0.0, 0.05), 0.5, (0.0, 0.55, 0.0), 0.82),
    Implicit(APPLE2, apple_distance, (3.1, 0.0, -1.1), 2.5, (0.0, 0.55, 0.0), 0.82, 1.05),
)

SPHERES = (
    (ORANGE, (-1.28, 0.55, -0.75), 0.55),
    (ORANGE2, (1.75, 0.52, -1.45), 0.52),
    (GLASS, (-1.55, 0.62, 1.1), 0.62),
    (CHROME, (1.62, 0.3, 1.35), 0.3),
    (MARBLE, (-0.55, 0.16, 2.05), 0.16),
    (MARBLE, (0.95, 0.13, 2.3), 0.13),
)


@dataclass(frozen=True)
class Block:
    """A box, rotated by yaw about y."""

    material: int
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float


BLOCKS = (
    Block(RULER, (2.35, 0.04, 2.3), (1.7, 0.04, 0.24), 0.5),
    Block(BOOK, (-3.3, 0.17, 0.75), (0.95, 0.17, 0.7), -0.5),
)

WALL_Z = -3.4
SUN = normalize(vec(-0.66, 0.52, 0.54))
SUN_COLOR = vec(3.15, 2.6, 1.9)
SUN_RADIUS = 0.016


def rotate_y(v: Array, yaw: float) -> Array:
    c, s = F32(np.cos(yaw)), F32(np.sin(yaw))
    return np.stack([c * v[0] - s * v[2], v[1], s * v[0] + c * v[2]])


def hit_sphere(
    o: Array, d: Array, center: tuple[float, float, float], radius: float
) -> tuple[Array, Array]:
    """Near and far distance along the ray; both FAR where it misses."""
    oc = o - np.asarray(center, dtype=F32)[:, None]
    b = dot(oc, d)
    h = b * b - dot(oc, oc) + F32(radius * radius)
    root = np.sqrt(np.maximum(h, F32(0)))
    miss = h < 0
    return np.where(miss, FAR, -b - root), np.where(miss, FAR, -b + root)


def march(item: Implicit, o: Array, d: Array, limit: Array) -> Array:
    """Distance along the rays to an implicit surface, or FAR; limit: no need to look further."""
    result = np.full(o.shape[1], FAR, dtype=F32)
    bound = vec(*item.bound_center) * F32(item.scale)
    center = item.to_world_direction(bound) + vec(*item.position)
    near, far = hit_sphere(o, d, tuple(center[:, 0]), item.bound_radius * item.scale)
    near = np.maximum(near, F32(2e-3))
    alive = np.flatnonzero((far > 0) & (near < limit) & (far < FAR))
    if alive.size == 0:
        return result
    t = near[alive]
    end = np.minimum(far[alive], limit[alive])
    lo = item.to_local(o[:, alive])
    ld = item.to_local(o[:, alive] + d[:, alive]) - lo
    for _ in range(90):
        step = item.distance(lo + ld * t) * F32(item.scale)
        hit = step < F32(7e-4)
        result[alive[hit]] = t[hit]
        t = t + step
        keep = ~hit & (t < end)
        if not keep.any():
            break
        alive, t, end, lo, ld = alive[keep], t[keep], end[keep], lo[:, keep], ld[:, keep]
    return result


def hit_block(block: Block, o: Array, d: Array) -> Array:
    lo = rotate_y(o - vec(*block.center), block.yaw)
    ld = rotate_y(d, block.yaw)
    ld = np.where(np.abs(ld) < F32(1e-7), F32(1e-7), ld)
    half = vec(*block.half)
    a = (-half - lo) / ld
    b = (half - lo) / ld
    near = np.minimum(a, b).max(axis=0)
    far = np.maximum(a, b).min(axis=0)
    return np.where((near < far) & (near > F32(1e-3)), near, FAR)


def intersect(o: Array, d: Array) -> tuple[Array, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """First hit of every ray: distance, material, and which object of the material's kind."""
    n = o.shape[1]
    t = np.full(n, FAR, dtype=F32)
    material = np.zeros(n, dtype=np.int32)
    index = np.zeros(n, dtype=np.int32)

    def take(candidate: Array, kind: int, which: int) -> None:
        closer = candidate < t
        t[closer] = candidate[closer]
        material[closer] = kind
        index[closer] = which

    with np.errstate(divide="ignore", invalid="ignore"):
        table = np.where(d[1] < 0, -o[1] / d[1], FAR)
        wall = np.where(d[2] < 0, (F32(WALL_Z) - o[2]) / d[2], FAR)
    take(np.where(table > F32(1e-3), table, FAR), TABLE, 0)
    take(np.where(wall > F32(1e-3), wall, FAR), WALL, 0)
    for i, (kind, center, radius) in enumerate(SPHERES):
        near, far = hit_sphere(o, d, center, radius)
        take(np.where(near > F32(1e-3), near, np.where(far > F32(1e-3), far, FAR)), kind, i)
    for i, block in enumerate(BLOCKS):
        take(hit_block(block, o, d), block.material, i)
    for i, item in enumerate(IMPLICITS):
        take(march(item, o, d, t), item.material, i)
    return t, material, index


def sunlight(p: Array, d: Array) -> Array:
    """How much sun arrives at p from direction d: window, objects, the glass ball's caustic."""
    # The window is in a plane at x = -7; u, v run over it, in panes with bars between.
    s = (F32(-7) - p[0]) / np.minimum(d[0], F32(-1e-3))
    v = p[1] + d[1] * s
    u = p[2] + d[2] * s
    inside = (u > F32(0.9)) & (u < F32(7.6)) & (v > F32(4.6)) & (v < F32(9.4))
    bars = (np.abs((u - F32(0.9)) / F32(2.233) % F32(1) - F32(0.5)) > F32(0.44)) | (
        np.abs((v - F32(4.6)) / F32(2.4) % F32(1) - F32(0.5)) > F32(0.45)
    )
    light: Array = np.asarray(inside & ~bars, dtype=F32)
    lit = np.flatnonzero(light)
    if lit.size == 0:
        return light
    o, d = p[:, lit], d[:, lit]
    value = np.ones(lit.size, dtype=F32)
    for kind, center, radius in SPHERES:
        near, far = hit_sphere(o, d, center, radius)
        blocked = (far > F32(1e-3)) & (far < FAR)
        if kind == GLASS:
            # No light path reaches the sun through the ball, so what it focuses is modelled:
            # rays that pass near its centre come out concentrated, those near its rim don't.
            oc = o - vec(*center)
            along = dot(oc, d)
            off = np.sqrt(np.maximum(dot(oc, oc) - along * along, F32(0))) / F32(radius)
            value *= np.where(
                blocked, F32(0.12) + F32(2.6) * np.exp(-((off / F32(0.33)) ** 2)), F32(1)
            )
        else:
            value[blocked & (near > F32(-0.5) * F32(radius))] = 0
    for block in BLOCKS:
        value[hit_block(block, o, d) < FAR] = 0
    for item in IMPLICITS:
        rest = np.flatnonzero(value)
        t = march(item, o[:, rest], d[:, rest], np.full(rest.size, FAR, dtype=F32))
        value[rest[t < FAR]] = 0
    light[lit] = value
    return light


def environment(d: Array, sharp: npt.NDArray[np.bool_]) -> Array:
    """Light from the room behind the camera. sharp: seen in a mirror, so the window has panes."""
    up = F32(0.5) + F32(0.5) * d[1]
    room = vec(0.30, 0.25, 0.21) + vec(0.26, 0.29, 0.33) * up
    side = np.maximum(-d[0] * F32(0.8) + d[1] * F32(0.35) + d[2] * F32(0.45), F32(0))
    soft = room + vec(1.25, 1.42, 1.7) * (side ** F32(3))
    # In mirrors: a window at x = -7, seen from about the middle of the table.
    s = F32(7) / np.maximum(-d[0], F32(1e-3))
    u, v = d[2] * s, d[1] * s
    pane = (d[0] < 0) & (u > F32(-1.0)) & (u < F32(6.0)) & (v > F32(1.2)) & (v < F32(7.2))
    pane &= np.abs((u + F32(1)) / F32(2.333) % F32(1) - F32(0.5)) < F32(0.45)
    pane &= np.abs((v - F32(1.2)) / F32(3.0) % F32(1) - F32(0.5)) < F32(0.46)
    window = np.where(pane, vec(5.5, 6.0, 6.8), room * F32(0.9))
    return np.where(sharp, window, soft)


# --------------------------------------------------------------------------------------------
# Surfaces: colour, gloss and bumps
# --------------------------------------------------------------------------------------------


def wood(x: Array, z: Array) -> tuple[Array, Array]:
    """Colour and height of the table: planks along x, with grain and gaps."""
    plank = np.floor(z / F32(1.15))
    across = z / F32(1.15) - plank
    seed = hash01(plank, plank * 3 + 5)
    gap = smoothstep(0.0, 0.018, np.minimum(across, F32(1) - across))
    px = x + seed * F32(37)
    bend = fbm(px * F32(0.35), z * F32(1.1), seed * F32(50), 3)
    rings = np.abs(((z * F32(2.2) + bend * F32(4.5) + seed * F32(9)) * F32(2.6)) % F32(2) - F32(1))
    streaks = fbm(px * F32(1.4), z * F32(34), seed * F32(20), 3)
    pores = smoothstep(0.66, 0.8, noise(px * F32(5), z * F32(110), seed * F32(11)))
    tone = F32(0.5) * rings ** F32(1.5) + F32(0.55) * streaks
    color = mix(vec(0.60, 0.37, 0.19), vec(0.25, 0.125, 0.055), tone)
    color = color * (F32(0.72) + F32(0.5) * seed) * (F32(1) - F32(0.35) * pores)
    color = color * (F32(0.18) + F32(0.82) * gap)
    return color, gap * F32(0.02) - pores * F32(0.0006) - streaks * F32(0.001)


BRICK_W, BRICK_H, MORTAR = 1.34, 0.44, 0.035


def bricks(x: Array, y: Array) -> tuple[Array, Array]:
    """Colour and height of the wall."""
    wobble_x = x + (noise(x * F32(2.5), y * F32(2.5), x * 0) - F32(0.5)) * F32(0.03)
    wobble_y = y + (noise(x * F32(2.1), y * F32(2.1), x * 0 + F32(9)) - F32(0.5)) * F32(0.03)
    row = np.floor(wobble_y / F32(BRICK_H))
    shifted = wobble_x / F32(BRICK_W) + F32(0.5) * (row % 2)
    column = np.floor(shifted)
    edge_x = np.minimum(shifted - column, column + 1 - shifted) * F32(BRICK_W)
    edge_y = wobble_y - row * F32(BRICK_H)
    edge_y = np.minimum(edge_y, F32(BRICK_H) - edge_y)
    edge = np.minimum(edge_x, edge_y) + (noise(x * F32(14), y * F32(14), x * 0) - F32(0.5)) * F32(
        0.02
    )
    brick = smoothstep(MORTAR * 0.6, MORTAR * 1.5, edge)
    seed = hash01(column, row)
    rough = fbm(x * F32(5), y * F32(5), seed * F32(40), 4)
    pits = smoothstep(0.62, 0.72, noise(x * F32(17), y * F32(17), seed * F32(60)))
    red = mix(vec(0.50, 0.19, 0.115), vec(0.30, 0.115, 0.085), seed)
    red = mix(red, vec(0.60, 0.33, 0.22), smoothstep(0.5, 0.75, rough) * F32(0.6))
    red = red * (F32(0.8) + F32(0.4) * hash01(row, column)) * (F32(1) - F32(0.35) * pits)
    mortar = vec(0.46, 0.43, 0.39) * (F32(0.7) + F32(0.5) * rough)
    height = brick * (F32(0.06) + F32(0.03) * seed) + rough * F32(0.03) - brick * pits * F32(0.012)
    return mix(mortar, red, brick), height


def cat_color(p: Array) -> tuple[Array, Array]:
    """Colour and gloss of the cat at points in its own coordinates."""
    x, y, z = p
    ax = np.abs(x)
    warp = fbm(x * F32(2.2) + F32(3), y * F32(2.2), z * F32(2.2), 3)
    # Stripes: rings around the body by height, around the head by distance from the nose.
    body_phase = (y * F32(0.9) + np.abs(z - F32(0.2)) * F32(0.45)) * F32(3.4) + warp * F32(1.9)
    # On the forehead they run up and down, on the cheeks across.
    forehead = smoothstep(2.56, 2.64, y + ax * F32(0.1))
    head_phase = mix(y * F32(6.5) - ax * F32(2.0), ax * F32(5.2) + F32(0.5), forehead)
    is_head = smoothstep(2.0, 2.2, y)
    phase = mix(body_phase, head_phase + warp * F32(0.7), is_head)
    stripe = smoothstep(0.05, 0.4, np.sin(phase * F32(2 * np.pi)) - F32(0.05))
    fur = fbm(x * F32(14), y * F32(14), z * F32(14), 2)
    color = mix(vec(0.66, 0.35, 0.13), vec(0.27, 0.105, 0.035), stripe)
    color = color * (F32(0.85) + F32(0.3) * fur)
    # White: chest, muzzle, paws, the tail's tip.
    white = (
        smoothstep(0.42, 0.3, ax + (warp - F32(0.5)) * F32(0.4))
        * smoothstep(0.12, 0.35, z)
        * smoothstep(2.15, 1.95, y)
    )
    white = np.maximum(
        white, smoothstep(0.3, 0.22, length(ax * F32(0.85), y - F32(2.22), z - F32(0.85)))
    )
    blaze = smoothstep(0.075, 0.035, ax + (y - F32(2.4)) * F32(0.09))
    white = np.maximum(
        white,
        blaze * smoothstep(2.3, 2.35, y) * smoothstep(2.85, 2.75, y) * smoothstep(0.5, 0.6, z),
    )
    white = np.maximum(white, smoothstep(0.3, 0.2, y + warp * F32(0.15)) * smoothstep(0.35, 0.5, z))
    color = mix(color, vec(0.68, 0.64, 0.57) * (F32(0.9) + F32(0.15) * fur), white)
    # Ears: pink inside.
    inner = (
        smoothstep(0.13, 0.07, np.abs(ax - F32(0.4) - (y - F32(2.9)) * F32(0.3)))
        * smoothstep(2.8, 2.9, y)
        * smoothstep(0.3, 0.33, z)
    )
    color = mix(color, vec(0.75, 0.42, 0.36), inner)
    # Nose and mouth.
    nose = smoothstep(
        0.085, 0.07, length(ax * F32(0.85), (y - F32(2.375)) * F32(1.35), z - F32(0.93))
    )
    color = mix(color, vec(0.72, 0.30, 0.27), nose)
    lip = np.minimum(
        np.abs(ax) + smoothstep(2.31, 2.33, y) + smoothstep(2.2, 2.18, y),
        np.abs(y - F32(2.2) + F32(0.9) * (ax - F32(0.1)) ** 2 - ax * F32(0.12) + F32(0.02))
        + smoothstep(0.17, 0.2, ax),
    )
    mouth = F32(0.75) * smoothstep(0.015, 0.005, lip) * smoothstep(0.66, 0.7, z)
    color = mix(color, vec(0.10, 0.045, 0.03), mouth)
    # Eyes: green, with a slit and a dark rim.
    ex, ey, ez = ax - F32(EYE[0]), y - F32(EYE[1]), z - F32(EYE[2])
    from_eye = length(ex, ey, ez)
    rim = smoothstep(0.135, 0.12, from_eye) * smoothstep(-0.02, 0.02, ez)
    color = mix(color, vec(0.05, 0.03, 0.02), rim)
    iris = smoothstep(0.098, 0.09, np.sqrt(ex * ex + ey * ey)) * rim
    radial = np.sqrt(ex * ex + ey * ey) * F32(9)
    color = mix(color, mix(vec(0.55, 0.62, 0.12), vec(0.16, 0.36, 0.10), radial), iris)
    slit = smoothstep(1.05, 0.9, np.sqrt((ex / F32(0.036)) ** 2 + (ey / F32(0.085)) ** 2)) * iris
    color = mix(color, vec(0.006, 0.006, 0.006), slit)
    lid = smoothstep(0.035, 0.05, ey - ex * F32(0.35)) * rim
    color = mix(color, vec(0.30, 0.13, 0.05), lid)
    return color, mix(np.full_like(x, 0.05), np.full_like(x, 0.08), rim)


@dataclass
class Surface:
    """What the tracer needs to know where a ray hit."""

    normal: Array
    color: Array
    gloss: Array  # reflectance at normal incidence; Fresnel does the rest
    roughness: Array
    metal: npt.NDArray[np.bool_]
    glass: npt.NDArray[np.bool_]


def shade_surface(
    p: Array, material: npt.NDArray[np.int32], index: npt.NDArray[np.int32], bumps: bool
) -> Surface:
    """The surface at every hit. Without bumps it is faster, for light that bounced already."""
    n = p.shape[1]
    normal = np.zeros((3, n), dtype=F32)
    normal[1] = 1
    color = np.zeros((3, n), dtype=F32)
    gloss = np.full(n, 0.04, dtype=F32)
    roughness = np.zeros(n, dtype=F32)
    delta = F32(0.004)

    m = np.flatnonzero(material == TABLE)
    if m.size:
        x, z = p[0, m], p[2, m]
        color[:, m], h = wood(x, z)
        if bumps:
            slope_x = (wood(x + delta, z)[1] - h) / delta
            slope_z = (wood(x, z + delta)[1] - h) / delta
            normal[:, m] = normalize(np.stack([-slope_x, np.ones_like(x), -slope_z]))
        gloss[m] = 0.045
        roughness[m] = 0.12
    m = np.flatnonzero(material == WALL)
    if m.size:
        x, y = p[0, m], p[1, m]
        color[:, m], h = bricks(x, y)
        normal[:, m] = vec(0, 0, 1)
        if bumps:
            slope_x = (bricks(x + delta, y)[1] - h) / delta
            slope_y = (bricks(x, y + delta)[1] - h) / delta
            normal[:, m] = normalize(np.stack([-slope_x, -slope_y, np.ones_like(x)]))
        gloss[m] = 0.0
    for i, (kind, center, radius) in enumerate(SPHERES):
        m = np.flatnonzero((material == kind) & (index == i))
        if not m.size:
            continue
        nrm = (p[:, m] - vec(*center)) / F32(radius)
        if kind in (ORANGE, ORANGE2):
            q = nrm * F32(13)
            cells = [
                noise(q[0] + a, q[1] + b, q[2] + c)
                for a, b, c in ((0, 0, 0), (0.12, 0, 0), (0, 0.12, 0), (0, 0, 0.12))
            ]
            gradient: Array = np.stack(
                [cells[1] - cells[0], cells[2] - cells[0], cells[3] - cells[0]]
            )
            nrm = normalize(np.asarray(nrm - gradient * F32(1.1), dtype=F32))
            patch = fbm(q[0] * F32(0.2), q[1] * F32(0.2), q[2] * F32(0.2), 3)
            color[:, m] = mix(vec(0.92, 0.40, 0.03), vec(0.80, 0.26, 0.02), patch) * (
                F32(0.78) + F32(0.34) * cells[0]
            )
            roughness[m] = 0.12
        elif kind == MARBLE:
            swirl = np.sin(nrm[0] * F32(6) + fbm(nrm[0] * 2, nrm[1] * 2, nrm[2] * 2, 3) * F32(14))
            blue, red = vec(0.03, 0.12, 0.5), vec(0.6, 0.04, 0.05)
            color[:, m] = mix(
                blue if i % 2 == 0 else red, vec(0.85, 0.85, 0.82), smoothstep(0.2, 0.5, swirl)
            )
            gloss[m] = 0.06
        elif kind == CHROME:
            color[:, m] = vec(0.88, 0.87, 0.85)
        normal[:, m] = nrm
    for i, block in enumerate(BLOCKS):
        m = np.flatnonzero((material == block.material) & (index == i))
        if not m.size:
            continue
        q = rotate_y(p[:, m] - vec(*block.center), block.yaw)
        scaled = q / vec(*block.half)
        axis = np.abs(scaled).argmax(axis=0)
        face = np.zeros_like(q)
        face[axis, np.arange(m.size)] = np.sign(scaled[axis, np.arange(m.size)])
        normal[:, m] = rotate_y(face, -block.yaw)
        if block.material == RULER:
            along = (q[0] + F32(block.half[0])) / F32(0.12)
            tick = np.abs(along - np.round(along))
            number = np.round(along).astype(np.int32)
            reach = np.where(number % 10 == 0, 0.26, np.where(number % 5 == 0, 0.19, 0.12))
            mark = (tick < F32(0.17)) & (q[2] > F32(block.half[2]) - reach) & (axis == 1)
            grain = fbm(q[0] * F32(2), q[1] * F32(30), q[2] * F32(50), 3)
            base = mix(vec(0.85, 0.62, 0.22), vec(0.66, 0.42, 0.12), grain)
            color[:, m] = np.where(mark, vec(0.03, 0.02, 0.015), base)
        else:
            pages = (axis != 1) & (np.abs(q[1]) < F32(0.13))
            lines = F32(0.7) + F32(0.3) * noise(q[0] * 3, q[1] * F32(120), q[2] * 3)
            frame = np.maximum(np.abs(scaled[0]) * F32(1.0), np.abs(scaled[2]))
            gilt = (axis == 1) & (np.abs(frame - F32(0.84)) < F32(0.018))
            linen = F32(0.8) + F32(0.2) * np.sin(q[0] * F32(170)) * np.sin(q[2] * F32(170))
            cover = vec(0.04, 0.13, 0.17) * linen
            color[:, m] = np.where(
                pages, vec(0.78, 0.72, 0.60) * lines, np.where(gilt, vec(0.75, 0.55, 0.2), cover)
            )
            roughness[m] = 0.25
    for i, item in enumerate(IMPLICITS):
        m = np.flatnonzero((material == item.material) & (index == i))
        if not m.size:
            continue
        q = item.to_local(p[:, m])
        e = F32(1.5e-3)
        offsets = ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1))
        local = np.zeros_like(q)
        for offset in offsets:
            local += vec(*offset) * item.distance(q + vec(*offset) * e)
        local = normalize(local)
        if item.material == CAT:
            color[:, m], gloss[m] = cat_color(q)
            roughness[m] = 0.05
        elif item.material == VASE:
            ring = q[1] * F32(7.5)
            band = np.floor(ring)
            angle = np.arctan2(q[0], q[2]) * F32(18 / (2 * np.pi))
            zigzag = np.abs((angle % F32(1)) * F32(2) - F32(1))
            pattern = np.where(
                band % 4 == 1,
                zigzag > (ring - band),
                np.where(band % 4 == 3, (angle % F32(1)) > F32(0.5), band % 4 == 0),
            )
            glaze = fbm(q[0] * F32(6), q[1] * F32(6), q[2] * F32(6), 3)
            color[:, m] = np.where(pattern, vec(0.03, 0.10, 0.34), vec(0.80, 0.80, 0.76)) * (
                F32(0.85) + F32(0.25) * glaze
            )
            gloss[m] = 0.06
        else:
            angle = np.arctan2(q[0], q[2])
            streak = fbm(np.cos(angle) * F32(7), q[1] * F32(2), np.sin(angle) * F32(7), 4)
            dots = smoothstep(0.8, 0.86, noise(q[0] * F32(22), q[1] * F32(22), q[2] * F32(22)))
            red = mix(
                vec(0.46, 0.015, 0.02),
                vec(0.72, 0.34, 0.07),
                smoothstep(0.35, 1.1, streak * F32(0.7) + F32(0.45) * (q[1] - F32(0.35))),
            )
            red = mix(red, vec(0.85, 0.65, 0.4), dots * F32(0.55))
            stem = length(q[0] * F32(0.9), np.zeros_like(q[1]), q[2]) < F32(0.12)
            color[:, m] = np.where(stem & (q[1] > F32(0.82)), vec(0.16, 0.09, 0.04), red)
            roughness[m] = 0.06
        normal[:, m] = item.to_world_direction(local)
    metal = material == CHROME
    return Surface(normal, color, gloss, roughness, metal, material == GLASS)


# --------------------------------------------------------------------------------------------
# Light transport
# --------------------------------------------------------------------------------------------


def around(axis: Array, u: Array, v: Array, cosine: Array) -> Array:
    """A direction at the given cosine to axis, turned by the angle of (u, v) on the circle."""
    sine = np.sqrt(np.maximum(F32(1) - cosine * cosine, F32(0)))
    helper = np.where(np.abs(axis[0]) > F32(0.7), vec(0, 1, 0), vec(1, 0, 0))
    t = normalize(np.cross(axis, helper, axis=0))
    b = np.cross(axis, t, axis=0)
    return normalize(t * (u * sine) + b * (v * sine) + axis * cosine)


def radiance(o: Array, d: Array, first: Array, rng: np.random.Generator) -> Array:
    """Path tracing: the sun is sampled at every hit, everything else by the paths themselves.

    first: 5 rows of evenly spread numbers for the first hit, where evenness matters most.
    Returns 9 rows: light, then colour and normal of the first hit (which guide the denoiser).
    """
    total = np.zeros_like(o)
    features = np.zeros((6, o.shape[1]), dtype=F32)
    weight = np.ones_like(o)
    ids = np.arange(o.shape[1])
    mirror = np.ones(o.shape[1], dtype=bool)
    for depth in range(MAX_DEPTH):
        t, material, index = intersect(o, d)
        missed = t >= FAR
        if missed.any():
            total[:, ids[missed]] += weight[:, missed] * environment(d[:, missed], mirror[missed])
        hit = np.flatnonzero(~missed)
        if hit.size == 0:
            break
        ids, weight, mirror = ids[hit], weight[:, hit], mirror[hit]
        o, d, t = o[:, hit], d[:, hit], t[hit]
        p = o + d * t
        r = rng.random((6, ids.size), dtype=F32)
        s = shade_surface(p, material[hit], index[hit], bumps=depth < 2)
        if depth == 0:
            r[:5] = first[:, hit]
            features[:3, ids], features[3:, ids] = s.color, s.normal
        entering = dot(s.normal, d) < 0
        facing = np.where(entering, s.normal, -s.normal)
        cosine = np.clip(-dot(facing, d), F32(0), F32(1))

        # Which way on: Fresnel decides between mirror and what lies below the surface.
        schlick = (F32(1) - cosine) ** F32(5)
        gloss = np.where(s.glass, F32(0.04), s.gloss)
        reflect_p = np.where(gloss > 0, gloss + (F32(1) - gloss) * schlick * F32(0.8), F32(0))
        eta = np.where(entering, F32(1 / 1.5), F32(1.5))
        k = F32(1) - eta * eta * (F32(1) - cosine * cosine)
        reflect_p = np.where(s.glass & (k < 0), F32(1), reflect_p)
        # Highlights are bright and rare: more paths than Fresnel's share look for them, at less
        # weight each.
        glossy = (gloss > 0) & ~s.glass & ~s.metal
        chosen_p = np.where(glossy, np.maximum(reflect_p, F32(0.3)), reflect_p)
        reflects = (r[0] < chosen_p) | s.metal
        fair = np.where(reflects, reflect_p, F32(1) - reflect_p)
        tried = np.where(reflects, chosen_p, F32(1) - chosen_p)
        weight *= np.where(glossy, fair / np.maximum(tried, F32(1e-6)), F32(1))

        angle = F32(2 * np.pi) * r[1]
        circle_u, circle_v = np.cos(angle), np.sin(angle)
        mirrored = d + facing * (F32(2) * cosine)
        spread = F32(1) - s.roughness**2 * r[2]
        mirrored = around(normalize(mirrored), circle_u, circle_v, spread)
        diffuse = around(facing, circle_u, circle_v, np.sqrt(F32(1) - r[2]))
        refracted = normalize(d * eta + facing * (eta * cosine - np.sqrt(np.maximum(k, F32(0)))))
        is_diffuse = ~reflects & ~s.glass

        # The sun, for the diffuse share and for soft highlights.
        m = np.flatnonzero(is_diffuse)
        if m.size:
            sun = np.repeat(SUN, m.size, axis=1)
            sun = around(
                sun,
                np.cos(r[3, m] * F32(2 * np.pi)),
                np.sin(r[3, m] * F32(2 * np.pi)),
                F32(1) - F32(SUN_RADIUS**2 / 2) * r[4, m],
            )
            slope = dot(facing[:, m], sun)
            lit = m[slope > 0]
            if lit.size:
                seen = sunlight(p[:, lit] + facing[:, lit] * F32(2e-3), sun[:, slope > 0])
                direct = SUN_COLOR * (seen * slope[slope > 0])
                half = normalize(sun[:, slope > 0] - d[:, lit])
                shine = np.maximum(dot(half, facing[:, lit]), F32(0)) ** F32(220)
                shine = shine * F32(4) * (s.gloss[lit] > 0)
                total[:, ids[lit]] += (
                    weight[:, lit] * direct * (s.color[:, lit] + F32(0.35) * shine)
                )
            weight[:, m] *= s.color[:, m]
        weight[:, s.metal] *= s.color[:, s.metal]
        weight[:, s.glass] *= vec(0.97, 0.985, 0.98)

        d = np.where(reflects, mirrored, np.where(s.glass, refracted, diffuse))
        below = s.glass & ~reflects
        o = p + np.where(below, -facing, facing) * F32(2e-3)
        mirror = reflects | s.glass
        if depth >= 2:
            # Russian roulette keeps the expectation and ends dark paths.
            chance = np.clip(weight.max(axis=0) * F32(1.3), F32(0.05), F32(1))
            keep = r[5] < chance
            weight = weight / chance
            ids, weight, mirror = ids[keep], weight[:, keep], mirror[keep]
            o, d = o[:, keep], d[:, keep]
    return np.concatenate([total, features])


CAMERA = vec(-0.35, 2.75, 9.6)
TARGET = vec(-0.02, 1.28, 0.0)
FOCUS_POINT = vec(0.3, 1.6, 0.6)
LENS = 0.075
FIELD = 0.29  # half the picture's height at distance 1


def render_rows(rows: range, width: int, height: int, spp: int, seed: int) -> Array:
    """Linear light and features of some rows, (9, len(rows), width)."""
    forward = normalize(TARGET - CAMERA)
    right = normalize(np.cross(forward, vec(0, 1, 0), axis=0))
    up = np.cross(right, forward, axis=0)
    focus = F32(dot(FOCUS_POINT - CAMERA, forward)[0])
    yy, xx = np.meshgrid(np.array(rows, dtype=F32), np.arange(width, dtype=F32), indexing="ij")
    x, y = xx.ravel(), yy.ravel()
    total = np.zeros((9, x.size), dtype=F32)
    rng = np.random.default_rng([seed, rows.start])
    shift = rng.random((9, x.size), dtype=F32)
    # An additive lattice, shifted at random per pixel, spreads the samples evenly (its steps are
    # the powers of the root of x^10 = x + 1, which generalises the golden ratio to 9 dimensions).
    lattice = 1.0757661 ** -np.arange(1.0, 10.0)[:, None]
    for k in range(spp):
        r = (shift + (k * lattice % 1).astype(F32)) % F32(1)
        u = (x + r[0] - F32(width / 2)) * F32(2 * FIELD / height)
        v = -(y + r[1] - F32(height / 2)) * F32(2 * FIELD / height)
        d = forward + right * u + up * v
        radius, angle = F32(LENS) * np.sqrt(r[2]), F32(2 * np.pi) * r[3]
        offset = right * (radius * np.cos(angle)) + up * (radius * np.sin(angle))
        sample = radiance(CAMERA + offset, normalize(d * focus - offset), r[4:], rng)
        # A cap on single samples: rare bright paths would leave specks.
        total += np.minimum(sample, F32(3.5))
    return np.asarray(total / F32(spp)).reshape(9, len(rows), width)


def denoise(buffers: Array, radius: int = 4) -> Array:
    """Average each pixel's light with neighbours that show the same surface in similar light."""
    light, features = buffers[:3], buffers[3:]
    # Divided by the first hit's colour, textures leave the light and survive the averaging.
    albedo = np.maximum(features[:3], F32(0.02))
    incident = light / albedo
    tone = light / (light + F32(1))
    _, height, width = light.shape
    reach = ((0, 0), (radius, radius), (radius, radius))
    padded = [np.pad(a, reach, mode="reflect") for a in (incident, tone, features)]
    total, norm = np.zeros_like(light), np.zeros(light.shape[1:], dtype=F32)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            near, near_tone, near_features = (
                a[:, dy : dy + height, dx : dx + width] for a in padded
            )
            distance = ((near_features - features) ** 2 / F32(0.08**2)).sum(axis=0)
            # Against neighbours of another colour the light itself is compared, undivided.
            distance += ((near_tone - tone) ** 2 / F32(0.09**2)).sum(axis=0)
            distance += F32(((dy - radius) ** 2 + (dx - radius) ** 2) / radius**2)
            weight = np.exp(-distance)
            total += near * weight
            norm += weight
    return np.asarray(total / norm * albedo)


def develop(light: Array, seed: int) -> npt.NDArray[np.uint8]:
    """Linear light to an 8-bit picture: vignette, filmic tone curve, a little grain."""
    _, height, width = light.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    seen = light * (1 - 0.13 * (x * x + y * y)) * 0.95
    tone = seen * (2.51 * seen + 0.03) / (seen * (2.43 * seen + 0.59) + 0.14)
    srgb = np.clip(tone, 0, 1) ** (1 / 2.2)
    grain = np.random.default_rng([seed, 99]).normal(0, 0.006, size=(height, width))
    picture = np.clip(srgb + grain, 0, 1) * 255
    return np.moveaxis(np.rint(picture).astype(np.uint8), 0, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--spp", type=int, default=80, help="samples per pixel")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    width, height = args.width, args.width * 2 // 3
    blocks = [range(start, min(start + 32, height)) for start in range(0, height, 32)]
    render = partial(render_rows, width=width, height=height, spp=args.spp, seed=args.seed)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(render, blocks))
    picture = develop(denoise(np.concatenate(parts, axis=1)), args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(args.out, quality=90, optimize=True, progressive=True)
    print(f"{args.out}: {width}x{height}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
