"""Warnings and errors for users who come from another optimizer."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch

import apollo_qn
from apollo_qn import Apollo, ApolloW, ApolloWarning, LearningRateWarning, advice
from tests.helpers import parameters, run_steps, same, snapshot


def small_rate_warnings(recorded: pytest.WarningsRecorder) -> list[warnings.WarningMessage]:
    return [w for w in recorded if issubclass(w.category, LearningRateWarning)]


# a rate for Adam


@pytest.mark.parametrize("kind", [Apollo, ApolloW])
@pytest.mark.parametrize("lr", [3e-4, torch.tensor(3e-4)], ids=["number", "tensor"])
def test_the_warning_of_a_rate_for_adam_points_at_the_caller(kind: type[Apollo], lr: Any) -> None:
    with pytest.warns(
        LearningRateWarning, match=r"lr=0\.0003 is a rate for Adam.*group 0.*usual rates are 0\.5"
    ) as told:
        kind(parameters([(3,)]), lr=lr)
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.01},
        {"lr": 0.0},  # schedulers and tests may begin with 0
        {"lr": 0.005, "sigma": 0.01},  # the authors' third release
        {"lr": 0.0009, "sigma": 0.09},
        {"lr": 1e-3, "rebound": "belief"},
        {"lr": 0.5, "warmup_init_lr": 1e-5},
    ],
    ids=str,
)
def test_other_rates_give_no_warning(
    settings: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    Apollo(parameters([(3,)]), **settings)
    assert not small_rate_warnings(recwarn)


def test_the_rate_is_judged_by_sigma() -> None:
    with pytest.warns(LearningRateWarning, match=r"lr=0\.5 .*sigma=100\)"):
        Apollo(parameters([(3,)]), lr=0.5, sigma=100)


def test_once_per_optimizer_and_its_group_is_named(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    a, b, c, d = parameters([(3,), (4,), (5,), (6,)])
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 1e-3}]
    optimizer = Apollo([*groups, {"params": [c], "lr": 1e-4}], lr=0.5)
    optimizer.add_param_group({"params": [d], "lr": 1e-5})
    (told,) = small_rate_warnings(recwarn)
    assert "lr=0.001" in str(told.message)
    assert "group 1" in str(told.message)


def test_a_small_rate_of_a_later_group_gives_a_warning() -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([a])
    with pytest.warns(LearningRateWarning, match="group 1") as told:
        optimizer.add_param_group({"params": [b], "lr": 1e-3})
    assert told[0].filename == __file__


def test_no_warning_for_a_rate_that_a_schedule_has_lowered(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Loading, copying and reused groups of a finished run give no warning."""
    p = parameters([(3,)])
    optimizer = Apollo(p, lr=0.5)
    torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4)
    run_steps(optimizer, range(1))
    assert optimizer.param_groups[0]["lr"] < 1e-3
    Apollo(parameters([(3,)])).load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer))
    Apollo([dict(group) for group in optimizer.param_groups])
    assert not small_rate_warnings(recwarn)


def test_the_warning_has_a_category_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    assert issubclass(LearningRateWarning, ApolloWarning)
    assert apollo_qn.LearningRateWarning is LearningRateWarning
    warnings.filterwarnings("ignore", category=LearningRateWarning)
    Apollo(parameters([(3,)]), lr=3e-4)
    assert not small_rate_warnings(recwarn)


def test_a_warning_as_an_error_leaves_the_group_out() -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = Apollo([a])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LearningRateWarning):
            optimizer.add_param_group({"params": [b], "lr": 1e-3})
    assert len(optimizer.param_groups) == 1


# keywords of other optimizers

KEYWORDS = [
    ("betas", (0.9, 0.999), r"got betas=\(0\.9, 0\.999\): use beta for the first"),
    ("momentum", 0.9, "got momentum=0.9: use beta, and start at ten times the lr of SGD"),
    ("dampening", 0.1, "leave it out"),
    ("nesterov", True, "leave it out"),
    ("amsgrad", False, "leave it out"),
    ("warmup", 100, "use warmup_steps"),
    ("init_lr", 0.01, "use warmup_init_lr"),
    ("weight_decay_type", "L2", "use Apollo for 'L2' and ApolloW for 'decoupled'"),
    ("learning_rate", 0.5, "use lr"),
]


@pytest.mark.parametrize(("name", "value", "message"), KEYWORDS, ids=[x[0] for x in KEYWORDS])
def test_keywords_of_other_optimizers_get_advice(name: str, value: Any, message: str) -> None:
    a, b = parameters([(3,), (4,)])
    given: dict[str, Any] = {name: value}
    for kind in (Apollo, ApolloW):
        with pytest.raises(TypeError, match=f"Apollo has no argument {name}, .*{message}"):
            kind([a], **given)
        with pytest.raises(TypeError, match=message):
            kind([{"params": [a]}, {"params": [b], **given}])
    optimizer = Apollo([a])
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [b], **given})
    assert len(optimizer.param_groups) == 1
    assert same(before, snapshot(optimizer))


def test_no_keyword_of_apollo_is_taken_for_another_s() -> None:
    ours = set(inspect.signature(Apollo).parameters)
    assert not ours & (advice._KEYWORDS.keys() | advice._SETTINGS_OF_STATES)
    for name in ("betas", "amsgrad"):
        assert name in inspect.signature(torch.optim.AdamW).parameters
    for name in ("momentum", "dampening", "nesterov"):
        assert name in inspect.signature(torch.optim.SGD).parameters


def test_a_misspelled_keyword_is_python_s_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmaa'"):
        Apollo(parameters([(3,)]), sigmaa=1.0)  # type: ignore[call-arg]


def test_keys_of_tools_stay_in_a_group() -> None:
    (p,) = parameters([(3,)])
    optimizer = Apollo([{"params": [p], "name": "head", "lr_scale": 0.5}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


# states of other optimizers

OTHERS: dict[str, tuple[Any, str]] = {
    "AdamW": (torch.optim.AdamW, "of Adam or AdamW .*amsgrad, betas"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "of SGD .*momentum"),
    "RMSprop": (torch.optim.RMSprop, "of another optimizer .*alpha"),
    "Adagrad": (torch.optim.Adagrad, "of another optimizer .*lr_decay"),
    "Adadelta": (torch.optim.Adadelta, "of another optimizer .*rho"),
    "Rprop": (torch.optim.Rprop, "of another optimizer .*etas"),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    OTHERS["Muon"] = (torch.optim.Muon, "of another optimizer .*momentum")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_state_of_another_optimizer_changes_nothing(make: Any, message: str, steps: int) -> None:
    other = make(parameters([(3, 2), (4, 2)]))
    run_steps(other, range(steps))
    optimizer = Apollo([{"params": [p]} for p in parameters([(3, 2), (4, 2)])])
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=f"must be one of Apollo, got one {message}.*new Apollo"):
        optimizer.load_state_dict(other.state_dict())
    assert same(before, snapshot(optimizer))
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        assert group.keys() == kept.keys()
        assert group["lr"] == kept["lr"] == 1.0


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_is_no_state_of_an_optimizer_changes_nothing(checkpoint: bool) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Apollo(model.parameters())
    run_steps(optimizer, range(2))
    before = snapshot(optimizer)
    state: dict[str, Any] = model.state_dict()
    if checkpoint:
        state = {"model": state, "optimizer": optimizer.state_dict()}
    keys = "'model', 'optimizer'" if checkpoint else "'weight', 'bias'"
    with pytest.raises(ValueError, match=rf"that of an optimizer.*got the keys \[{keys}\].*take"):
        optimizer.load_state_dict(state)
    assert same(before, snapshot(optimizer))


def test_a_hook_may_translate_a_state() -> None:
    """The check runs after the user's own hooks."""
    other = torch.optim.SGD(parameters([(3,)]), lr=0.1, momentum=0.9)
    run_steps(other, range(2))
    optimizer = Apollo(parameters([(3,)]))
    own = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda *_: own)
    optimizer.load_state_dict(other.state_dict())


# the rate of the next step


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("lr", [0.5, torch.tensor([0.5])], ids=["number", "tensor"])
def test_effective_lrs_are_those_of_the_next_step(lr: Any, capturable: bool) -> None:
    a, b = parameters([(3,), (4,)])
    optimizer = ApolloW(
        [{"params": [a]}, {"params": [b], "warmup_steps": 0}], lr=lr, warmup_steps=4,
        capturable=capturable,
    )  # fmt: skip
    for t in range(6):
        told = optimizer.effective_lrs()
        assert all(type(rate) is float for rate in told)
        assert told == pytest.approx([0.5 * min(1, 1e-3 + 0.999 * t / 4), 0.5], rel=1e-6)
        run_steps(optimizer, range(t, t + 1))
        # ApolloW keeps the rate that a step has used
        used = [float(optimizer.state[p]["previous_lr"]) for p in (a, b)]
        assert told == pytest.approx(used, rel=1e-6)


def test_effective_lrs_follow_a_schedule() -> None:
    optimizer = Apollo(parameters([(3,)]), lr=0.5, warmup_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run_steps(optimizer, range(1))
    scheduler.step()
    assert optimizer.effective_lrs() == pytest.approx([0.25 * (1e-3 + 0.999 / 2)])


def test_effective_lrs_are_of_the_parameters_with_the_most_steps() -> None:
    a, b, c = parameters([(3,), (4,), (5,)])
    optimizer = Apollo([a, b, c], lr=1.0, warmup_steps=10, warmup_init_lr=0.0)
    for steps, p in ((3, a), (5, b)):
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
            p.grad = None
    known = set(optimizer.state)
    assert optimizer.effective_lrs() == pytest.approx([0.5])
    assert set(optimizer.state) == known  # reading the rate creates no state


# repr


def lines(optimizer: Apollo) -> list[str]:
    return [line.strip() for line in repr(optimizer).splitlines()]


def test_repr_shows_first_what_differs_from_the_defaults() -> None:
    a, b = parameters([(3,), (4,)])
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "beta": 0.5}]
    optimizer = Apollo(groups, lr=2.0, warmup_steps=7, seed=3)
    found = lines(optimizer)
    assert found[:5] == ["Apollo (", "Parameter Group 0", "lr: 2.0", "seed: 3", "warmup_steps: 7"]
    assert found[5].startswith("defaults: beta=0.9, ")
    assert "sigma=1.0" in found[5]
    assert found[6:11] == [
        "Parameter Group 1", "lr: 2.0", "beta: 0.5", "seed: 3", "warmup_steps: 7",
    ]  # fmt: skip
    assert found[-1] == ")"
    for group in optimizer.param_groups:
        for name in set(group) - {"params", "param_names"}:
            assert name in repr(optimizer)


def test_repr_of_apollow_and_of_a_changed_rate() -> None:
    optimizer = ApolloW(parameters([(3,)]), seed=3)
    assert lines(optimizer)[2:4] == ["lr: 1.0", "seed: 3"]
    assert "decoupled_weight_decay=True" in lines(optimizer)[4]
    optimizer.param_groups[0].update(lr=torch.tensor([0.5]), decoupled_weight_decay=False)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    found = lines(optimizer)
    assert found[2].startswith("lr: tensor(")
    assert "decoupled_weight_decay: False" in found
    assert "warmup_base_lr: 1.0" in found
    assert any(line.startswith("initial_lr: ") for line in found)
