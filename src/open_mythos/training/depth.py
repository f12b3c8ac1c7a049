"""How many loops each sequence of a training batch runs, and through how many of them gradients flow.

Main entries: `DepthPlan` and its classes; `plan_from_dict`. A plan draws a `LoopPlan`, the model executes it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoopPlan:
    """One batch's depths: loops per sequence, (batch,) int32, and how many of the last ones have gradients.

    No tuple: FSDP moves the tensors of tuples to the accelerator, and loops are counted on the CPU.
    """

    n_loops: Tensor
    grad_loops: int | None = None


class Asked(NamedTuple):
    """What a plan may know of the batch: its size, how far training is, from 0 to 1, and the data's difficulty."""

    batch: int
    progress: float
    difficulty: Tensor | None
    """(batch,): loops that each sequence needs; None where the data cannot tell."""


class DepthPlan(Protocol):
    """Draws the loops of a batch."""

    name: ClassVar[str]

    @property
    def typical(self) -> float:
        """Mean loops at the end of training; what sweeps are measured in multiples of."""
        ...

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        """The loops of one batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always the same. Depths other than the trained one are then worse: overthinking (open-mythos issue 28)."""

    name: ClassVar[str] = "fixed"
    loops: int = 8
    grad_loops: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "loops", "grad_loops")

    @property
    def typical(self) -> float:
        return self.loops

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        return LoopPlan(_integers(torch.full((asked.batch,), self.loops)), self.grad_loops)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every number from `least` to `most` equally likely, drawn per sequence or once per batch."""

    name: ClassVar[str] = "uniform"
    least: int = 1
    most: int = 8
    per_sequence: bool = True
    grad_loops: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "least", "most", "grad_loops")
        if self.least > self.most:
            raise ValueError(f"least is {self.least}; it must be at most most ({self.most})")

    @property
    def typical(self) -> float:
        return (self.least + self.most) / 2

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        shape = (asked.batch if self.per_sequence else 1,)
        drawn = torch.randint(self.least, self.most + 1, shape, generator=random)
        return LoopPlan(_integers(drawn.expand(asked.batch)), self.grad_loops)


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """1 + Poisson(mean - 1) loops: the total is drawn first, then truncated (Parcae, arXiv 2604.12946, section 4.2)."""

    name: ClassVar[str] = "poisson"
    mean: float = 8.0
    most: int | None = None
    """No sequence runs more; None means four times the mean."""
    per_sequence: bool = True
    grad_loops: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "mean", "most", "grad_loops")

    @property
    def typical(self) -> float:
        return self.mean

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        rates = self._rates(asked.batch if self.per_sequence else 1, random)
        drawn = 1 + torch.poisson(rates.double(), generator=random)
        most = self.most or math.ceil(4 * self.mean)
        return LoopPlan(_integers(drawn.clamp_max(most).expand(asked.batch)), self.grad_loops)

    def _rates(self, n: int, random: torch.Generator) -> Tensor:
        """(n,): the mean of each draw, less one."""
        return torch.full((n,), self.mean - 1)


@dataclass(frozen=True, kw_only=True)
class LogNormalPoisson(Poisson):
    """1 + Poisson with a log-normal rate of mean `mean - 1` and spread `sigma`: a heavier tail (Huginn, 2502.05171)."""

    name: ClassVar[str] = "log_normal_poisson"
    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise ValueError(f"sigma is {self.sigma}; it must be a number of at least 0")

    def _rates(self, n: int, random: torch.Generator) -> Tensor:
        spread = torch.randn(n, generator=random) * self.sigma
        return (self.mean - 1) * torch.exp(spread - self.sigma**2 / 2)


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """As many loops as the data says that a sequence needs, times `factor`, and up to `extra` more at random."""

    name: ClassVar[str] = "difficulty"
    factor: float = 1.0
    extra: int = 0
    most: int | None = None
    """No sequence runs more, whatever it needs."""
    grad_loops: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "most", "grad_loops")
        for field in ("factor", "extra"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be a number of at least 0")

    @property
    def typical(self) -> float:
        return math.nan

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        if asked.difficulty is None:
            raise ValueError("depth plan 'difficulty' needs data that knows how many loops it takes; text does not")
        needed = torch.ceil(asked.difficulty.double() * self.factor)
        extra = torch.randint(0, self.extra + 1, (asked.batch,), generator=random)
        return LoopPlan(_integers((needed + extra).clamp(1, self.most)), self.grad_loops)


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """With probability `share`, n loops without and then k with gradient, n below `most`, k up to `most - n`; else all.

    The loss of Bansal et al. 2022 (arXiv 2202.05826) weighs two passes by `share`; drawing one of them has the same
    mean gradient and half the cost.
    """

    name: ClassVar[str] = "progressive"
    most: int = 30
    share: float = 1.0

    def __post_init__(self) -> None:
        _at_least_one(self, "most")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be a number in [0, 1]")

    @property
    def typical(self) -> float:
        return self.most

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        constant = int(torch.randint(0, self.most, (), generator=random))
        learned = int(torch.randint(1, self.most - constant + 1, (), generator=random))
        if float(torch.rand((), generator=random)) >= self.share:
            constant, learned = 0, self.most
        return LoopPlan(_integers(torch.full((asked.batch,), constant + learned)), learned)


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Another plan whose `mean` rises linearly from `start` over the first `share` of training (arXiv 2511.07384)."""

    name: ClassVar[str] = "ramp"
    plan: Poisson
    start: float = 1.0
    share: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Poisson):
            raise ValueError(f"ramp is of {self.plan!r}; it must be of a plan with a mean: poisson, log_normal_poisson")
        _at_least_one(self, "start")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be a number in (0, 1]")

    @property
    def typical(self) -> float:
        return self.plan.mean

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        risen = min(1.0, asked.progress / self.share)
        return replace(self.plan, mean=self.start + (self.plan.mean - self.start) * risen).draw(asked, random)


PLANS: dict[str, type[Any]] = {
    plan.name: plan for plan in (Fixed, Uniform, Poisson, LogNormalPoisson, Difficulty, Progressive, Ramp)
}


def plan_from_dict(data: Any) -> DepthPlan:
    """The plan that `{"name": ..., field: value, ...}` describes; `ValueError` names what does not belong."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or data["name"] not in PLANS:
        raise ValueError(f"depth plan is {data!r}; it must have a name, one of {', '.join(PLANS)}")
    kind = PLANS[data["name"]]
    values = {key: value for key, value in data.items() if key != "name"}
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"depth plan {data['name']!r} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if "plan" in known:
        values["plan"] = plan_from_dict(values.get("plan"))
    return kind(**values)


def plan_to_dict(plan: DepthPlan) -> dict[str, Any]:
    """The inverse of `plan_from_dict`."""
    assert is_dataclass(plan)
    inner = getattr(plan, "plan", None)
    nested = {} if inner is None else {"plan": plan_to_dict(inner)}
    return {"name": plan.name, **asdict(plan), **nested}  # type: ignore[call-overload]


def _integers(loops: Tensor) -> Tensor:
    return loops.to(torch.int32).contiguous()


def _at_least_one(plan: Any, *names: str) -> None:
    """Every field is of its type, and those named are at least 1."""
    for field in fields(plan):
        value, kind = getattr(plan, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        low = " of at least 1" if field.name in names else ""
        if kind.startswith("int") and not (number and isinstance(value, int) and (not low or value >= 1)):
            raise ValueError(f"{field.name} is {value!r}; it must be an integer{low}")
        if kind.startswith("float") and not (number and math.isfinite(value) and (not low or value >= 1)):
            raise ValueError(f"{field.name} is {value!r}; it must be a finite number{low}")
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} is {value!r}; it must be true or false")
