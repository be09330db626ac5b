"""Faults of the back ends' parts, and of the optimizer's messages, seeds and pictures."""

from __future__ import annotations

from tests.faults import QN, Fault

CPU = f"{QN}/backends/cpu"
BACK_ENDS = ("tests/backends/test_backends.py",)
TRITON = ("tests/backends/test_triton.py",)
HESSIAN = ("tests/test_hessian.py",)
WRAPPERS = ("tests/test_wrappers.py",)
ROUNDING = ("tests/test_rounding.py",)

FAULTS = [
    # the CPU kernel
    Fault(
        "the kernel rounds bfloat16 towards zero",
        f"{CPU}/numbers.h",
        "const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;",
        "const uint32_t rounded = bits >> 16;",
        ROUNDING,
    ),
    Fault(
        "the kernel's random bits are not those of the other back ends",
        f"{CPU}/numbers.h",
        "x = (x ^ x >> 15) * 0xd35a2d97u;",
        "x = (x ^ x >> 16) * 0xd35a2d97u;",
        ROUNDING,
    ),
    Fault(
        "a small tensor ignores the sums over its shards",
        f"{CPU}/schedule.h",
        "if (t.sums && !out) total = from_shard(*t.sums);",
        "if (false) total = from_shard(*t.sums);",
        ("tests/backends/test_shards.py",),
    ),
    Fault(
        "the last portion of small tensors is left out",
        f"{CPU}/schedule.h",
        "if (elements) portions_.push_back(items.size());",
        "if (elements && portions_.empty()) portions_.push_back(items.size());",
        ("tests/backends/test_cpu.py",),
    ),
    Fault(
        "the kernel takes a state of another type",
        f"{CPU}/tensor_lists.h",
        "&& g == of<typename K::G>() && m == of<typename K::M>())",
        "&& g == of<typename K::G>())",
        ("tests/backends/test_operators.py",),
    ),
    Fault(
        "a missing list is not filled for the tensors without it",
        f"{CPU}/__init__.py",
        "nothing if x is None else x",
        "nothing",
        ROUNDING,
    ),
    # other back ends
    Fault(
        "the sum of a tensor is its largest row",
        f"{QN}/backends/layout.py",
        'self.wide), "sum")',
        'self.wide), "max")',
        BACK_ENDS,
    ),
    Fault(
        "each row of a matrix draws the same random bits",
        f"{QN}/backends/layout.py",
        "firsts[self.tensor_of_row]) * ROW",
        "firsts[self.tensor_of_row]) * 0",
        ROUNDING,
    ),
    Fault(
        "the reference rounds the parameter alone at random",
        f"{QN}/backends/reference.py",
        "if random is not None and m.dtype in rounding.DROPPED:",
        "if False:",
        ROUNDING,
    ),
    Fault(
        "the kernels take decoupled decay for L2",
        f"{QN}/backends/base.py",
        "(0.0, h.weight_decay) if h.decoupled_weight_decay else (h.weight_decay, 0.0)",
        "(h.weight_decay, 0.0)",
        BACK_ENDS,
    ),
    Fault(
        "a run of elements is updated a second time",
        f"{QN}/backends/triton/launch_schedule.py",
        "start = number * self.length[i]",
        "start = 0 * number",
        TRITON,
    ),
    Fault(
        "a window of large tensors is not updated",
        f"{QN}/backends/triton/launch_schedule.py",
        "(kernel.APPLY, reversed(before)),",
        "(kernel.APPLY, ()),",
        TRITON,
    ),
    # settings, messages, seeds
    Fault(
        "the shape of a state is not checked",
        f"{QN}/validation.py",
        "if x.shape == p.shape and x.device == p.device:",
        "if True:",
        ("tests/test_validation.py",),
    ),
    Fault(
        "a list of another length is taken",
        f"{QN}/validation.py",
        "if len(column) != len(params):",
        "if False:",
        ("tests/test_functional.py",),
    ),
    Fault(
        "a parameter whose elements share memory is updated",
        f"{QN}/validation.py",
        "if 0 in p.stride() and any(",
        "if False and any(",
        ("tests/test_validation.py",),
    ),
    Fault(
        "a saved number of steps may be negative",
        f"{QN}/saved_entries.py",
        'if not 0 <= float(state["step"]) < math.inf:',
        "if False:",
        ("tests/test_checkpoint.py",),
    ),
    Fault(
        "a saved state may lack an entry that its settings need",
        f"{QN}/checkpoint.py",
        "if name not in state and group.get(setting) == value:",
        "if False:",
        ("tests/test_checkpoint.py",),
    ),
    Fault(
        "all optimizers have one seed",
        f"{QN}/seeds.py",
        'return int(torch.randint(1 << 62, (), device="cpu"))',
        "return 0",
        WRAPPERS,
    ),
    Fault(
        "batches and dropout are not those of a run with another optimizer",
        f"{QN}/seeds.py",
        "with torch.random.fork_rng(devices=[]):",
        "if True:",
        WRAPPERS,
    ),
    Fault(
        "repr does not show first what differs",
        f"{QN}/summary.py",
        "return name not in expected or bool(group[name] != expected[name])",
        "return False",
        ("tests/test_advice.py",),
    ),
    Fault(
        "a transform of torch.func is not noticed",
        f"{QN}/tracing.py",
        "        or torch._C._functorch.peek_interpreter_stack() is not None\n",
        "",
        ("tests/test_tracing.py",),
    ),
    # pictures
    Fault(
        "the Hessian is drawn over B",
        f"{QN}/diagnostics/picture.py",
        "for v in (one.hessian, one.B, one.standard_error)",
        "for v in (one.B, one.hessian, one.standard_error)",
        HESSIAN,
    ),
    Fault(
        "all elements of a large tensor are drawn",
        f"{QN}/diagnostics/picture.py",
        "step = math.ceil(one.B.numel() / _MAX_POINTS)",
        "step = 1",
        HESSIAN,
    ),
]
