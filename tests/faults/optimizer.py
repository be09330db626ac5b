"""Faults of the optimizer."""

from __future__ import annotations

from tests.faults import Fault

QN = "src/apollo_qn"
RULE = ("tests/test_algorithm.py", "tests/test_golden.py")
BACK_ENDS = ("tests/backends/test_backends.py", "tests/backends/test_device_waits.py")
CPU = tuple(f"tests/backends/test_cpu{part}.py" for part in ("", "_changes", "_operands"))
OPERATORS = ("tests/backends/test_operators.py",)
OPTAX = ("tests/test_optax.py", "tests/test_optax_interface.py")
ROUNDING = ("tests/test_rounding.py",)
DIAGNOSTICS = ("tests/test_diagnostics.py", "tests/test_hessian.py")
ADVICE = ("tests/test_advice.py",)
RANGE_TEST = ("tests/test_range_test.py",)

FAULTS = [
    # the rule
    Fault(
        "eps is not divided by sigma",
        QN,
        "return self.eps if self.belief else self.eps / self.sigma",
        "return self.eps",
        RULE,
    ),
    Fault(
        "warmup is one step ahead",
        QN,
        "self.warmup_start, t / self.warmup_steps",
        "self.warmup_start, (t + 1) / self.warmup_steps",
        RULE,
    ),
    Fault(
        "the bias of m is not corrected",
        QN,
        "(1 - self.beta) / (1 - self.beta ** (t + 1))",
        "1 - self.beta",
        RULE,
    ),
    Fault(
        "belief's offset is not divided by alpha",
        QN,
        "return self.eps / self.alpha(t) if self.belief else 0.0",
        "return self.eps if self.belief else 0.0",
        BACK_ENDS,
    ),
    Fault(
        "B learns from the wrong sign of y",
        QN,
        "(u * (y + B * d)).sum()",
        "(u * (B * d - y)).sum()",
        RULE,
    ),
    Fault("the norm is a 2-norm", QN, "(u**4).sum()", "(u**2).sum()", RULE),
    Fault(
        "belief's threshold has a sign",
        QN,
        "delta.abs().amax() if",
        "delta.amax() if",
        BACK_ENDS,
    ),
    Fault(
        "L2 decay has the wrong sign",
        QN,
        "g = g + h.weight_decay * theta",
        "g = g - h.weight_decay * theta",
        RULE,
    ),
    Fault("maximize does nothing", QN, "        g = -g\n", "        g = +g\n", RULE),
    Fault(
        "decoupled decay is applied twice",
        QN,
        "d = d + h.weight_decay * theta",
        "d = d + 2 * h.weight_decay * theta",
        RULE,
    ),
    Fault(
        "the displacement is not rebuilt from the decayed parameter",
        QN,
        "return 1 / kept, weight_decay / kept",
        "return 1.0, weight_decay",
        RULE,
    ),
    Fault(
        "D is not the absolute value of B",
        QN,
        "D = B.abs().clamp(min=threshold)",
        "D = B.clamp(min=threshold)",
        RULE,
    ),
    # sums over parts
    Fault(
        "each shard has sums of its own scale",
        QN,
        "(self.q4 * share**4).sum(0), (self.k * share).sum(0)",
        "self.q4.sum(0), self.k.sum(0)",
        (*BACK_ENDS, "tests/backends/test_shards.py"),
    ),
    Fault(
        "shards are not added up",
        QN,
        "_all_reduced(buffer, self.mesh, self.group)",
        "buffer",
        ("tests/distributed/test_sharded.py",),
    ),
    # faster forms
    Fault(
        "foreach: the decay's part of d has the wrong sign",
        QN,
        "d.add_(work.theta, alpha=omega)",
        "d.sub_(work.theta, alpha=omega)",
        BACK_ENDS,
    ),
    Fault(
        "foreach: maximize negates m",
        QN,
        "torch.add(work.m, work.g).neg_() if h.maximize",
        "torch.sub(work.m, work.g) if h.maximize",
        BACK_ENDS,
    ),
    Fault(
        "foreach: m and B are stored in each other's place",
        QN,
        "hessian_diags, views[2])",
        "hessian_diags, views[1])",
        BACK_ENDS,
    ),
    Fault(
        "Triton: B learns from the wrong sign of y",
        QN,
        "tl.sum(u * (alpha * delta + b * d), 0)",
        "tl.sum(u * (b * d - alpha * delta), 0)",
        ("tests/backends/test_triton.py", "tests/backends/test_triton_dtypes.py"),
    ),
    Fault(
        "Triton: a gradient in memory that another tensor writes is not noticed",
        QN,
        "(ends[before - 1] > first)",
        "(ends[before - 1] > last)",
        ("tests/backends/test_triton_operands.py",),
    ),
    Fault(
        "Triton: the second of two halves is not looked at",
        QN,
        "[flag for half in halves for flag in _have_its_layout(half)]",
        "_have_its_layout(halves[0]) * 2",
        ("tests/backends/test_triton_operands.py",),
    ),
    Fault(
        "a list of indices is sent to the device",
        QN,
        "torch.stack([x[i] for i in which]) if isinstance(which, list) else x[which]",
        "x[which]",
        ("tests/backends/test_device_waits.py",),
    ),
    Fault(
        "the kernel: the coefficient lacks a factor",
        f"{QN}/backends/cpu",
        "c = share * share * share *",
        "c = share * share *",
        BACK_ENDS,
    ),
    Fault(
        "a counter unlike that of the first tensor is not noticed",
        f"{QN}/backends/cpu",
        "if (*counters[i].step != (float)items[i].scalars->t) return false;",
        "",
        OPERATORS,
    ),
    Fault(
        "a previous rate unlike that of the first tensor is not noticed",
        f"{QN}/backends/cpu",
        "if (same_row && previous_lr(i) != previous_lr(i - 1)) return false;",
        "(void)same_row;",
        OPERATORS,
    ),
    Fault(
        "counters are counted before they are compared",
        f"{QN}/backends/cpu",
        "bool taken = tensors.all_fit();",
        "bool taken = tensors.all_fit();\n    if (taken) *tensors.counters[0].step += 1;",
        OPERATORS,
    ),
    Fault(
        "unequal counters are not read after the operator has refused them",
        f"{QN}/plan.py",
        "_batches(batch.tensors, batch.h)]",
        "_batches(batch.tensors, batch.h, True)]",
        CPU,
    ),
    Fault(
        "the plan counts what the operator has counted",
        f"{QN}/plan.py",
        "if part.backend is None or not part.backend.counts:",
        "if True:",
        CPU,
    ),
    # 16 bits
    Fault(
        "stochastic rounding always rounds down",
        QN,
        "random >> (32 - DROPPED[dtype])",
        "random >> 32",
        ROUNDING,
    ),
    Fault(
        "the compensation is lost",
        QN,
        "low = torch.where(rounded.isfinite(), x - rounded, 0)",
        "low = torch.zeros_like(x)",
        ROUNDING,
    ),
    Fault(
        "all steps draw the same random bits",
        QN,
        "first = mix(step ^ rng_key)",
        "first = mix(rng_key)",
        ROUNDING,
    ),
    # the class
    Fault("a step counts twice", QN, "steps, 1.0)", "steps, 2.0)", BACK_ENDS),
    Fault(
        "a schedule's warmup rises from 0",
        QN,
        "lambda step: min((step + 1) / warmup_steps,",
        "lambda step: min(step / warmup_steps,",
        ("tests/test_schedules.py",),
    ),
    Fault(
        "sigma of the authors' release",
        QN,
        "    if first:\n        return _SIGMAS[0]",
        "    if first:\n        return _SIGMAS[1]",
        ("tests/test_checkpoint.py", "tests/test_migrate.py"),
    ),
    Fault(
        "a state of the authors' release before its first step is taken for one of Apollo",
        QN,
        '_FOREIGN & set(saved) and "warmup_init_lr" not in saved',
        "False",
        ("tests/test_checkpoint.py", "tests/test_migrate.py"),
    ),
    Fault(
        "a loaded state shares the saved tensors",
        QN,
        "kept = value.detach().clone(memory_format=torch.preserve_format)",
        "kept = value.detach()",
        ("tests/test_checkpoint.py", "tests/test_migrate.py"),
    ),
    Fault(
        "the authors' D is taken without its offset",
        QN,
        "(D.min() - offset).clamp(min=0)",
        "D.min().clamp(min=0)",
        ("tests/test_checkpoint.py", "tests/test_migrate.py"),
    ),
    Fault(
        "a released gradient's step is taken twice",
        QN,
        "        self._released.add(p)\n",
        "",
        ("tests/test_gradient_release.py", "tests/test_gradient_release_errors.py"),
    ),
    # JAX
    Fault(
        "optax: eps is not divided by sigma",
        QN,
        "secant_eps=eps if belief else eps / sigma",
        "secant_eps=eps",
        OPTAX,
    ),
    Fault(
        "optax: B learns from the wrong sign of y",
        QN,
        "_secant_coefficient(scale, u, y + B * d, s.secant_eps)",
        "_secant_coefficient(scale, u, B * d - y, s.secant_eps)",
        OPTAX,
    ),
    Fault(
        "optax: the warmup is one step ahead",
        QN,
        "(1 - w) * _real(count) /",
        "(1 - w) * _real(count + 1) /",
        OPTAX,
    ),
    # diagnostics
    Fault(
        "the share of rectified elements counts those above the threshold",
        QN,
        "(size < s.previous_threshold).sum()",
        "(size > s.previous_threshold).sum()",
        DIAGNOSTICS,
    ),
    Fault(
        "a tensor's secant correction has the wrong sign",
        QN,
        "(-c * size).reshape(())",
        "(c * size).reshape(())",
        DIAGNOSTICS,
    ),
    Fault(
        "the root mean square of several tensors is their mean",
        QN,
        "t.numel * getattr(t, field) ** 2 for t in tensors",
        "t.numel * getattr(t, field) for t in tensors",
        DIAGNOSTICS,
    ),
    Fault(
        "the diagonal's standard error does not shrink",
        QN,
        "(x / (probes * (probes - 1))).sqrt()",
        "(x / (probes - 1)).sqrt()",
        DIAGNOSTICS,
    ),
    Fault(
        "B is not divided by the learning rate",
        QN,
        "_vector(B) / last_rate(optimizer, p, group)",
        "_vector(B)",
        DIAGNOSTICS,
    ),
    Fault(
        "a recorder is one step late",
        QN,
        "(self.step + 1) % self.every == 0",
        "self.step % self.every == 0",
        DIAGNOSTICS,
    ),
    # advice
    Fault(
        "a small rate is judged without sigma",
        QN,
        "0 < lr < _SMALLEST_RATE * sigma",
        "0 < lr < _SMALLEST_RATE",
        ADVICE,
    ),
    Fault("a rate of 0 is told", QN, "not 0 < lr < _SMALLEST", "not 0 <= lr < _SMALLEST", ADVICE),
    Fault(
        "the rate of the next step is that of the parameters with the fewest steps",
        QN,
        "done = max((float(step.max()) for",
        "done = min((float(step.min()) for",
        ADVICE,
    ),
    Fault(
        "a state of another optimizer is loaded",
        QN,
        "if not found or",
        "if True or",
        ADVICE,
    ),
    Fault(
        "a group's keywords of other optimizers are kept",
        QN,
        "            advice.check_keywords(param_group)\n",
        "",
        ADVICE,
    ),
    Fault(
        "the functional form gives no advice",
        QN,
        '@partial(advice.advises, advice=advice.FUNCTIONAL, name="apollo")\n',
        "",
        ("tests/test_functional.py",),
    ),
    Fault(
        "optax: lr is not known",
        QN,
        '    "lr": "use learning_rate",\n',
        "",
        OPTAX,
    ),
    # the range test
    Fault(
        "a range test on a plateau proposes a rate without a warning",
        QN,
        "elif progress < statistics.stdev(last):",
        "elif False:",
        RANGE_TEST,
    ),
    Fault(
        "a range test does not restore the buffers that a module replaced",
        QN,
        "            module._buffers.update(buffers)\n",
        "            pass\n",
        RANGE_TEST,
    ),
    Fault(
        "the runs of a range test see other random numbers",
        QN,
        "            set_state(state)\n",
        "            pass\n",
        RANGE_TEST,
    ),
    Fault(
        "the proposal is the arithmetic mean",
        QN,
        "math.exp(sum(map(math.log, near)) / len(near))",
        "sum(near) / len(near)",
        RANGE_TEST,
    ),
    Fault(
        "a run that is not finite counts with its last losses",
        QN,
        "    if not math.isfinite(curve[-1]):\n        return math.inf\n",
        "",
        RANGE_TEST,
    ),
    Fault(
        "the rate of a short run does not fall",
        QN,
        "min(1.0, (steps - t) / (steps - warmup_steps))",
        "1.0",
        RANGE_TEST,
    ),
]
