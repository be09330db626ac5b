"""The CPU kernel as a torch operator: its operands, and bit-identical results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = Path(str(find_spec("apollo_qn").origin)).parent / "backends/cpu"  # type: ignore[union-attr]
LIBRARY = FOLDER / "_kernel.so"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
# what driver.cpp prints on every processor; on x86-64 it is written with
# `g++ -std=c++17 -O1 -ffp-contract=off -Isrc/apollo_qn/backends/cpu tests/cpp/driver.cpp`
HASHES = (ROOT / "tests/cpp/driver.txt").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernel is not built")

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
KINDS = [
    (f32, f32, f32),
    (f32, bf16, f32),
    (bf16, bf16, f32),
    (bf16, f32, f32),
    (f64, f64, f64),
    (f32, f32, bf16),
    (bf16, bf16, bf16),
]
SCALARS = torch.tensor(
    [[0.1, 0.01, 0, 1, 0, 1, 0, 1, 1e-4, 1, 0, 0, 0, 0, 0, 5]], dtype=torch.float64
)
NONE: list[list[Tensor]] = [[], [], []]  # thresholds, compensations and previous_lrs
Quadruple = list[Tensor]  # parameter, gradient, m and B


@pytest.fixture(scope="module")
def ops() -> Any:
    torch.ops.load_library(str(LIBRARY))
    return torch.ops.apollo_qn


def make(*shape: int, kind: int = 0) -> Quadruple:
    p, g, m = KINDS[kind]
    return [torch.randn(shape).to(dtype) for dtype in (p, g, m, m)]


def replaced(place: int, x: Tensor) -> Quadruple:
    """Return a quadruple of the shape of ``x``, with ``x`` at ``place``."""
    tensors = [torch.randn(x.shape) for _ in range(4)]
    tensors[place] = x
    return tensors


def lists(*quadruples: Quadruple) -> list[list[Tensor]]:
    """Return the columns of the tensors, and their counters at the step of SCALARS."""
    steps = [torch.tensor(5.0) for _ in quadruples]
    return [*(list(column) for column in zip(*quadruples, strict=True)), steps]


def bits(columns: list[list[Tensor]]) -> list[bytes]:
    return [
        x.detach().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for column in columns
        for x in column
        if x.device.type == "cpu" and x.layout is torch.strided and not x.is_neg()
    ]


def negated(n: int) -> Tensor:
    x = torch.complex(torch.randn(n), torch.randn(n)).conj().imag
    assert x.is_neg()
    return x


def freed(n: int) -> Tensor:
    whole = torch.randn(2 * n)
    view = whole[n:]
    whole.untyped_storage().resize_(0)
    return view


GOOD = {
    "number": lambda: make(),
    "transposed": lambda: [x.t() for x in make(3, 4)],
    "channels last": lambda: [x.to(memory_format=torch.channels_last) for x in make(2, 3, 4, 5)],
    "size 1": lambda: [x.as_strided((3, 1), (1, 7)) for x in make(3)],
}
BAD = {
    "strides": lambda: [x.t() if i else x.t().contiguous() for i, x in enumerate(make(3, 4))],
    "gaps": lambda: [x[:, ::2] for x in make(3, 4)],
    "expanded": lambda: replaced(1, torch.randn(1).expand(5)),
    "empty": lambda: make(0),
    "float16": lambda: [x.half() for x in make(5)],
    "integers": lambda: replaced(1, torch.ones(5, dtype=torch.int64)),
    "shape": lambda: [*make(5)[:3], torch.randn(6)],
    "meta": lambda: [x.to("meta") for x in make(5)],
    "sparse": lambda: replaced(1, torch.randn(5).to_sparse()),
    "negated gradient": lambda: replaced(1, negated(5)),
    "negated parameter": lambda: replaced(0, negated(5)),
    "complex": lambda: [torch.randn(5, dtype=torch.complex64).conj() for _ in range(4)],
}


def refused(ops: Any, columns: list[list[Tensor]], *kept: list[Tensor]) -> list[int]:
    """Return the answer of ``check`` for tensors that ``step_`` refuses."""
    before = bits(columns)
    kinds: list[int] = ops.check(*columns, *(kept or NONE)).tolist()
    assert ops.step_(*columns, *(kept or NONE), None, None, SCALARS, None) is False
    assert bits(columns) == before
    return kinds


@pytest.mark.parametrize("case", GOOD)
def test_takes(ops: Any, case: str) -> None:
    columns = lists(GOOD[case](), make(7))
    assert ops.check(*columns, *NONE).tolist() == [0, 0]
    before = [x.clone() for x in columns[0]]
    assert ops.step_(*columns, *NONE, None, None, SCALARS, None) is True
    assert all((x != y).all() for x, y in zip(before, columns[0], strict=True))


@pytest.mark.parametrize("case", BAD)
def test_leaves(ops: Any, case: str) -> None:
    assert refused(ops, lists(BAD[case](), make(7))) == [-1, 0]


def test_leaves_what_has_no_memory(ops: Any) -> None:
    columns = lists(replaced(0, torch.randn(5)), make(7))
    columns[0][0] = freed(5)
    assert ops.check(*columns, *NONE).tolist() == [-1, 0]
    assert ops.step_(*columns, *NONE, None, None, SCALARS, None) is False


def test_overlaps(ops: Any) -> None:
    memory = torch.randn(20)
    apart = lists(replaced(0, memory[:10]), replaced(2, memory[10:]))
    assert ops.check(*apart, *NONE).tolist() == [0, 0]
    assert refused(ops, lists(replaced(0, memory[:11]), replaced(2, memory[10:]), make(3))) == [
        *(-1, -1),
        0,
    ]
    twice = torch.randn(4)
    same = lists([twice, torch.randn(4), twice, torch.randn(4)], make(3))
    assert refused(ops, same) == [-1, 0]
    # a gradient that another tensor's step would change: the order of all tensors matters
    others = make(4)
    assert refused(ops, lists(replaced(1, others[2]), others, make(3))) == [-1, -1, -1]


def test_thresholds_and_compensations(ops: Any) -> None:
    none = torch.empty(0)
    columns = lists(make(9, kind=2), make(9, kind=2))
    low = torch.zeros(9, dtype=bf16)
    assert ops.check(*columns, [torch.tensor(1.0), none], [low, none], []).tolist() == [2, 2]
    wrong = torch.tensor(1.0, dtype=torch.float64)
    assert refused(ops, columns, [wrong, none], [], []) == [-1, 2]
    assert refused(ops, columns, [], [low.float(), none], []) == [-1, 2]
    assert refused(ops, columns, [], [low[:8], none], []) == [-1, 2]
    assert refused(ops, columns, [], [low, low], []) == [-1, -1]


def test_errors(ops: Any) -> None:
    columns = lists(make(3))
    with pytest.raises(RuntimeError, match="different lengths"):
        ops.check(columns[0], [], *columns[2:], *NONE)
    with pytest.raises(RuntimeError, match="a row that scalars do not have"):
        ops.step_(*columns, *NONE, torch.tensor([1]), None, SCALARS, None)
    belief = SCALARS.clone()
    belief[0, 13] = 1
    with pytest.raises(RuntimeError, match="belief needs a threshold"):
        ops.step_(*columns, *NONE, None, None, belief, None)


def rates_of(columns: list[list[Tensor]]) -> list[Tensor]:
    return [torch.tensor(0.1, dtype=torch.float64) for _ in columns[0]]


def test_the_step_is_counted_and_its_rate_recorded(ops: Any) -> None:
    """Each row of scalars has its own counter, rate and rate of the step before."""
    columns = lists(make(3), make(4), make(5))
    rates = [*rates_of(columns)[:2], torch.tensor(0.3, dtype=torch.float64)]
    columns[4][2].fill_(9)
    scalars = SCALARS.repeat(2, 1)
    scalars[1, 1], scalars[1, 15] = 0.02, 9
    rows = torch.tensor([0, 0, 1])
    assert ops.step_(*columns, [], [], rates, rows, None, scalars, None) is True
    assert torch.stack(columns[4]).tolist() == [6, 6, 10]
    assert torch.stack(rates).tolist() == [0.01, 0.01, 0.02]


def test_a_rate_is_recorded_only_where_there_is_one(ops: Any) -> None:
    columns = lists(make(3), make(4), make(5))
    rates = rates_of(columns)
    rates[1] = torch.empty(0)
    scalars, rows = SCALARS.repeat(2, 1), torch.tensor([0, 1, 0])
    assert ops.step_(*columns, [], [], rates, rows, None, scalars, None) is True
    assert [x.tolist() for x in rates] == [0.01, [], 0.01]


UNEQUAL = {
    "steps": (4, torch.tensor(4.0)),
    "no number": (4, torch.tensor(float("nan"))),
    "rate": (5, torch.tensor(0.2, dtype=torch.float64)),
}
UNKNOWN = {
    "steps in float64": (4, torch.tensor(5.0, dtype=torch.float64)),
    "two counters": (4, torch.full((2,), 5.0)),
    "a counter elsewhere": (4, torch.tensor(5.0, device="meta")),
    "rate in float32": (5, torch.tensor(0.1)),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("case", [*UNEQUAL, *UNKNOWN])
def test_unequal_counters_change_nothing(ops: Any, case: str, place: int) -> None:
    columns = lists(make(3), make(4), make(5))
    columns.append(rates_of(columns))
    which, wrong = {**UNEQUAL, **UNKNOWN}[case]
    columns[which][place] = wrong.clone()
    before = bits(columns)
    given = (*columns[:5], [], [], columns[5])
    assert ops.step_(*given, None, None, SCALARS, None) is False
    assert bits(columns) == before
    fits = [0, 0, 0]
    if case in UNKNOWN:
        fits[place] = -1
    assert ops.check(*given).tolist() == fits


BITS = """
import hashlib, sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.apollo_qn
from tests.backends.test_operators import KINDS, bits, lists, make
def stepped(threads, mode):
    torch.set_num_threads(threads)
    torch.manual_seed(mode)
    counts = (1, 15, 129, 1025, 33000, 70001, 140000)
    sizes = [(n, kind) for n in counts for kind in range(len(KINDS))]
    columns = lists(*(make(n, kind=kind) for n, kind in sizes))
    none = torch.empty(0)
    decay, belief, stochastic, kahan = (mode >> i & 1 for i in range(4))
    types = [torch.float64 if kind == 4 else torch.float32 for _, kind in sizes]
    thresholds = [torch.tensor(0.5, dtype=dtype) for dtype in types]
    low = [torch.zeros_like(p) if kahan and p.dtype is torch.bfloat16 else none for p in columns[0]]
    scalars = torch.tensor([[0.1, 0.01, 0.1, 0.01, 0.1, 1.001, 0.01 * decay, 0.01, 1e-4, -1,
        0.01 * decay, 0.02 * decay, decay, belief, stochastic, 5]], dtype=torch.float64)
    rng_keys = torch.arange(len(sizes)) * 1000003
    given = (*columns, thresholds, low, [], None, rng_keys, scalars)
    sums = ops.measure(*given)
    sums[::2, 0] = -1
    assert ops.step_(*given, sums) is True
    return bits([*columns, thresholds, low])
digest = hashlib.sha256()
for mode in range(16):
    one, three = stepped(1, mode), stepped(3, mode)
    assert one == three, mode
    for x in one:
        digest.update(x)
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_same_bits_with_every_instruction_set_and_thread_count() -> None:
    found = set()
    for name in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", BITS, str(LIBRARY)],
            cwd=ROOT,
            env={**os.environ, "APOLLO_QN_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """The arithmetic and its schedule without torch; a report ends the process with an error."""
    program = tmp_path / "driver"
    command = [str(COMPILER), "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-DNO_DISPATCH"]
    command += ["-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}"]
    command += ["-fno-sanitize-recover=all", f"-I{ROOT / 'src/apollo_qn/backends/cpu'}"]
    command += [str(ROOT / "tests/cpp/driver.cpp"), "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler comes without this sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == HASHES
    if sanitizer.startswith("address"):  # the sanitizer sees a deliberate error
        done = subprocess.run([str(program), "beyond"], capture_output=True, text=True, check=False)
        assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(CROSS_COMPILER is None, reason="no compiler for arm64 here")
@pytest.mark.skipif(EMULATOR is None, reason="no emulator of arm64 here (qemu-user)")
def test_arm64_gives_the_same_bits(tmp_path: Path) -> None:
    """Denormal numbers included; the flags are those of setup.py."""
    program = tmp_path / "driver"
    command = [str(CROSS_COMPILER), "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"]
    command += ["-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-static"]
    command += [f"-I{ROOT / 'src/apollo_qn/backends/cpu'}", str(ROOT / "tests/cpp/driver.cpp")]
    subprocess.run([*command, "-o", str(program), "-lpthread"], check=True)
    done = subprocess.run([str(EMULATOR), str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == HASHES
