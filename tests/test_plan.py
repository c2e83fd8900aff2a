"""Plans: made from shapes alone, cached, explained, and strict about what they are called with."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

import gpuconv
from gpuconv.plan import Candidate, No, choose
from gpuconv.problem import ConvProblem

PLAN = gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3), backend="numpy")
X, W = np.ones((2, 3, 8, 9), np.float32), np.ones((4, 3, 3, 3), np.float32)


def test_the_same_shapes_give_the_same_plan():
    plan = gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3), backend="numpy")
    assert gpuconv.plan_conv2d((2, 3, 8, 9), [4, 3, 3, 3], backend="numpy", stride=[1, 1]) is plan


def test_a_plan_travels():
    dgrad = gpuconv.plan_conv2d(
        (2, 3, 8, 9), (4, 3, 3, 3), operation="dgrad", algorithm="direct", backend="numpy"
    )
    for plan in (PLAN, dgrad):
        for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
            assert other == plan
            assert other.problem.x_dtype is plan.problem.x_dtype
    np.testing.assert_array_equal(copy.deepcopy(PLAN)(X, W), PLAN(X, W))


def test_a_problem_from_another_process_is_the_same():
    # There, hashes of strings differ.
    code = "import pickle, sys, gpuconv; p = gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3)); "
    code += "sys.stdout.buffer.write(pickle.dumps(p.problem))"
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        ).stdout
        assert {pickle.loads(made): 1}[PLAN.problem] == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, (4, 3, 3, 3)), {}, "x_shape takes a sequence of integers, got 5 (int)"),
        (((2, 3, 8, 9), None), {}, "w_shape takes a sequence of integers, got None (NoneType)"),
        (((2, 3, 8, 9), (4, 3, 3, 3)), {"bias": "yes"}, "bias says whether there will be one"),
        (((2, 3, 8, 9), (4, 3, 3, 3)), {"dtype": None}, "x: dtype None is not one that gpuconv"),
    ],
)
def test_what_is_no_description_is_refused(arguments, options, message):
    with pytest.raises(TypeError, match=re.escape(f"plan_conv2d: {message}")):
        gpuconv.plan_conv2d(*arguments, **options)


def test_a_plan_explains_itself():
    text = str(PLAN)
    assert "fprop 2-D NCHW float32 x[2,3,8,9] w[4,3,3,3] -> y[2,4,6,7]" in text
    assert "18.1 kFLOP" in text
    assert "numpy" in text
    assert f"-> {PLAN.algorithm}" in text
    for candidate in PLAN.candidates:
        assert candidate.algorithm in text
        if candidate.rejected:
            assert candidate.rejected in text
    assert PLAN.flops == 2 * 4 * 6 * 7 * 27 * 2
    assert PLAN.bytes_moved == 4 * (X.size + W.size + 2 * 4 * 6 * 7)
    assert PLAN.cost > 0


def test_candidates_are_sorted_and_each_has_a_cost_or_a_reason():
    costs = [c.cost for c in PLAN.candidates if c.cost is not None]
    assert costs == sorted(costs)
    assert all(c.cost is not None or c.rejected for c in PLAN.candidates)
    assert {c.algorithm for c in PLAN.candidates} >= {"direct", "im2col"}


def test_a_workspace_limit_rejects_with_the_reason():
    limited = gpuconv.plan_conv2d((2, 3, 80, 90), (4, 3, 3, 3), backend="numpy", workspace_limit=0)
    assert limited.workspace_bytes == 0
    reasons = [c.rejected for c in limited.candidates if c.rejected]
    assert any("over workspace_limit=0" in reason for reason in reasons)


def test_a_plan_runs_only_what_it_was_made_for():
    with pytest.raises(
        ValueError, match=re.escape("plan: x has shape (2, 3, 8, 8); it takes (2, 3, 8, 9)")
    ):
        PLAN(X[..., :8], W)
    with pytest.raises(
        ValueError, match=re.escape("plan: w has shape (1, 3, 3, 3); it takes (4, 3")
    ):
        PLAN(X, W[:1])
    with pytest.raises(TypeError, match="plan: x is float64; it takes float32"):
        PLAN(X.astype(float), W)
    with pytest.raises(ValueError, match="plan: planned without a bias, called with one"):
        PLAN(X, W, np.ones(4, np.float32))
    with_bias = gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3), bias=True, backend="numpy")
    with pytest.raises(ValueError, match="plan: planned with a bias, called without one"):
        with_bias(X, W)
    np.testing.assert_array_equal(with_bias(X, W, np.ones(4, np.float32)), PLAN(X, W) + 1)


def test_dtypes_of_a_plan():
    plan = gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), dtype=("uint8", "float32"))
    assert plan.problem.y_dtype.name == "float32"
    plan = gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), dtype=("uint8", "uint8", "int32"))
    assert plan.problem.y_dtype.name == "int32"
    with pytest.raises(ValueError, match="plan_conv2d: dtype is one dtype, the pair"):
        gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), dtype=("uint8",))


def test_plans_of_one_and_three_dimensions():
    assert gpuconv.plan_conv1d((1, 2, 9), (3, 2, 3))(
        np.ones((1, 2, 9), "f4"), np.ones((3, 2, 3), "f4")
    ).shape == (1, 3, 7)
    plan = gpuconv.plan_conv3d((1, 4, 5, 6, 2), (3, 2, 3, 3, 3), layout="NDHWC", backend="numpy")
    x, w = np.ones((1, 4, 5, 6, 2), "f4"), np.ones((3, 2, 3, 3, 3), "f4")
    assert plan(x, w).shape == (1, 2, 3, 4, 3)


@pytest.mark.parametrize("operation", ["fprop", "dgrad", "wgrad"])
def test_every_operation_is_served(operation):
    problem = ConvProblem(input=(5, 5), filter=(3, 3), operation=operation)
    plan = choose("grad", problem, "numpy", gpuconv.backends.backend("numpy").device())
    first, second, result = (np.ones(problem.shape_of(role), "f4") for role in problem.roles)
    assert plan(first, second).shape == result.shape


def test_a_refusal_is_false_and_has_a_reason():
    assert not No("because")
    assert "because" in repr(No("because"))
    assert str(Candidate("a", rejected="because")) == "a: rejected: because"
    assert str(Candidate("a", cost=2e-3, workspace_bytes=2048)) == "a: 2 ms, 2 KiB"
