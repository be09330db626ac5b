"""The one table of tolerances, each with its reason.

All are relative to the largest value that the quantity of that tensor has had so far in the run
(see :func:`tests.helpers.distance`): m and B are sums of terms that cancel, so that their rounding
is a share of the terms, not of the result.
"""

from __future__ import annotations

import torch

# Unit roundoffs: float64 1.1e-16, float32 6e-8, float16 4.9e-4, bfloat16 3.9e-3.

# theta and m of a trajectory of 20 steps against the float64 reference. A step is some 10 roundings
# in a row and they add up over the steps.
TRAJECTORY = {torch.float64: 4e-15, torch.float32: 2e-6}

# B of the same: its update multiplies the relative error of d by 4, takes the difference of two
# sums and feeds on its own error of the step before: some hundred roundoffs.
TRAJECTORY_B = {torch.float64: 1e-12, torch.float32: 3e-5}

# With capturable, alpha and the rate come from a float32 step, whatever the parameter's type. The
# relative error of alpha is about 3e-7: beta is rounded, and 1 - beta^(t+1) cancels.
CAPTURABLE = {torch.float64: 5e-6, torch.float32: 5e-6}
CAPTURABLE_B = {torch.float64: 3e-4, torch.float32: 3e-4}

# A 16-bit parameter after one step from the same parameter: half an ulp for its rounding, and one
# more where the float32 results straddle a rounding boundary. In units of torch.finfo(dtype).eps.
ROUNDED_PARAMETER = 1.01

# m and B (float32) of a 16-bit parameter: as float32, since the reference sees the same rounded
# gradient and parameter.
STATE_OF_16_BIT = {False: (2e-6, 3e-5), True: (5e-6, 3e-4)}  # by capturable: m, B

# B with decoupled decay of a 16-bit parameter: the displacement is rebuilt from the rounded
# parameter, which is wrong by weight_decay (here 0.05) times half an ulp, against d of order 1, and
# the update of B multiplies that by 4. In units of torch.finfo(dtype).eps.
REBUILT_FROM_16_BIT = 0.5

# Parameter and compensation together, after one step from the same two. The low number is half
# a unit in the last place of the high one at most, eps / 2 of its power of 2, and loses half a
# unit of its own: eps^2 / 8; of float16 at least half its smallest number, 2^-25. And float32's
# roundings.
COMPENSATED = {torch.bfloat16: 2**-17 + 5e-7, torch.float16: 2**-23 + 2**-25 + 5e-7}

# A bfloat16 state after one step from the same bits: m to the nearest, B to one of both neighbors,
# in units of torch.finfo(dtype).eps; and float32's roundings, which may straddle a boundary.
STORED_STATE = {"exp_avg": 0.502, "hessian_diag": 1.01}

# Theorem 1 with c not a power of two: both sides round differently, so a trajectory's tolerance.
THEOREM_1 = 1e-9  # float64, over shapes and scales that hypothesis makes as ill as it can

# The secant identity <d, B' d> = -<d, y> in float64: B' is a difference of terms of the size of
# sum |d| |B d| and sum |d y|, to which it is relative.
SECANT = 1e-12

# One step at gradients of 1e20 or 1e-30 in float32.
EXTREME = 3e-5

# eager against torch.compile on float32 numbers of order 1: the same operations, scalars rounded in
# float32 (as with capturable).
COMPILED = 1e-5

# The released state carries over in float64; what is recovered (threshold) costs a few roundings
# that D's minimum inherits.
RELEASED = 1e-9

# Numbers recovered from a release's float32 state. A rate of 1 is a share of wd = 0.05 of the
# update: one roundoff over 0.05. The threshold is a mean of such elements.
RECOVERED_FROM_FLOAT32 = 1.2e-6

# Golden trajectories (12 steps of 6 elements whose noise is as large as their mean, so that d
# nearly cancels in some): theta and m, B. Ten times what well-conditioned trajectories have.
GOLDEN = {torch.float64: (4e-14, 1e-11), torch.float32: (2e-5, 3e-4)}

# The rate of a step read off a parameter of order 1: one subtraction's rounding.
RATE = 1e-9
# The same with capturable, where the warmup is computed in float32.
CAPTURED_RATE = 1e-6

# A learning rate as a float64 tensor: the same numbers as a float, other order of roundings in
# capturable's float32 scalars.
TENSOR_LR = 1e-4

# 16 M elements in float32 against float64, three steps: what the issue of the fused kernel asks.
SIXTEEN_MILLION = 1e-6

# One step on some 100,000 elements from one and the same state: a dozen roundings.
LARGE = {torch.float64: 2e-15, torch.float32: 1e-6}

# Sharded against whole over 50 steps with the same gradients: only the order in which the sums of
# float64 (the kernel's: of 128 float32 terms at a time) are added differs. B as in a trajectory.
SHARDED = {torch.float32: 1e-6, torch.float64: 1e-13}
SHARDED_B = {torch.float32: 3e-5, torch.float64: 1e-11}

# 50 steps of training on several ranks against one process: the gradient is a mean of the ranks'
# means, and its roundings pass through the loss.
TRAINED_APART = 1e-5

# alpha in JAX's float32: one rounding of a tabulated value (half of 1.2e-7); without a table log,
# expm1 and a division, each of a rounding or two. An injected beta is rounded itself.
JAX_ALPHA = {True: 6e-8, False: 4e-7}  # by whether it is tabulated

# A derivative through five steps in float64 against central differences with h = 1e-6: their error
# is h^2 times the third derivative, and 1e-16 / h for the rounding of the loss.
DERIVATIVE = (1e-5, 1e-7)  # relative, absolute

# Parameters of order 1 after four steps of two compiled programs with the same numbers: a rounding
# here and there. In bfloat16 (3.9e-3) of a mean of gradients too, which B feels some tenfold.
OTHER_PROGRAM = {torch.float32: 1e-6, torch.bfloat16: 5e-2}

# A number of a tensor's diagnostics in float64, after 10 steps: as B is, a few hundred roundoffs
# (see TRAJECTORY_B), and the step's length is read off two parameters of order 1.
DIAGNOSTICS = 1e-11
# A correction of float32 B's against the difference of two of them.
DIAGNOSTICS_OF_FLOAT32 = 1e-5

# B of a quadratic in one element: two steps, of which the secant condition takes a difference of
# gradients that agree to a digit.
QUADRATIC = 1e-13

# A batch in parts against the whole of it, float64, 6 steps of a network of two layers: the sums of
# the gradients are added in another order, some tens of roundings.
ACCUMULATED = 1e-12

# Gradients of torch.func.vmap against those of one model, float32, 5 steps of rate 0.5: another
# matrix product with other roundings, which pass through the loss.
BATCHED = 1e-5

# A central difference of step 1e-6 in float64: its error is about 1e-16 / 1e-6 of the value.
DIFFERENCE = 1e-6
