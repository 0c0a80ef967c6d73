"""Learning-rate schedules as data: each is a closed form of the step, so that a resumed run and every framework use one number.

Frameworks' own schedulers update the rate from the last one, so that its rounding depends on the path, and they differ from one another.
Keys are those of the Cerebras FC-MNIST runner (`optimizer.learning_rate`, and `trainer.init.schedulers` of its newer files).
"""

from __future__ import annotations

import ast
import bisect
import functools
import itertools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal, cast, get_args

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails

from octavo.names import nearest

__all__ = ["LearningRate", "Schedule", "parse", "rate"]

_LONGEST_EXPRESSION = 200
_WORDS = "numbers, + - * / // % **, step, pi, sqrt(a), exp(a), cos(a), min(a, b), max(a, b)"
_NotNegative = Annotated[float, Field(ge=0)]
_Steps = Annotated[int, Field(ge=1)]


def _increasing(steps: tuple[int, ...]) -> tuple[int, ...]:
    if any(left >= right for left, right in itertools.pairwise(steps)):
        raise ValueError(f"must increase, got {list(steps)}; sort them and leave out repeats")
    return steps


# A file has lists and no tuples; the numbers inside stay strict.
_Boundaries = Annotated[tuple[_Steps, ...], Field(strict=False), pydantic.AfterValidator(_increasing)]
_Rates = Annotated[tuple[_NotNegative, ...], Field(strict=False, min_length=1)]


class _Closed(pydantic.BaseModel):
    """What the schedules share; each gives by `at` the rate at a step counted from 0, before `rate` finds it finite and not negative."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    decay_steps: _Steps | None = None

    @property
    def length(self) -> int | None:
        """For how many steps it runs in a list; None where nothing says."""
        return self.decay_steps


class _Decaying(_Closed):
    initial_learning_rate: _NotNegative


class Constant(_Closed):
    """`learning_rate` at every step."""

    scheduler: Literal["Constant"] = "Constant"
    learning_rate: _NotNegative

    def at(self, step: int) -> float:
        return self.learning_rate


class Exponential(_Decaying):
    """`initial_learning_rate * decay_rate ** (step / decay_steps)`; the exponent is rounded down where `staircase`."""

    scheduler: Literal["Exponential"] = "Exponential"
    decay_rate: _NotNegative
    decay_steps: _Steps
    staircase: bool = False

    def at(self, step: int) -> float:
        exponent = step // self.decay_steps if self.staircase else step / self.decay_steps
        return self.initial_learning_rate * math.pow(self.decay_rate, exponent)


class PiecewiseConstant(_Closed):
    """`values[i]` from step `boundaries[i - 1]` up to, not including, `boundaries[i]`; `decay_steps` counts in a list alone."""

    scheduler: Literal["PiecewiseConstant"] = "PiecewiseConstant"
    values: _Rates
    boundaries: _Boundaries

    @pydantic.model_validator(mode="after")
    def _one_more_value(self) -> PiecewiseConstant:
        if len(self.values) != len(self.boundaries) + 1:
            counts = f"{len(self.values)} values and {len(self.boundaries)} boundaries"
            raise ValueError(
                f"needs one value more than boundaries, got {counts}; give {len(self.boundaries) + 1} values"
            )
        return self

    def at(self, step: int) -> float:
        return self.values[bisect.bisect_right(self.boundaries, step)]


def _between(initial: float, end: float, share: float) -> float:
    """`share` of `initial` and the rest of `end`; exact at both ends, which `end + share * (initial - end)` is not."""
    return initial * share + end * (1 - share)


class _Falling(_Decaying):
    end_learning_rate: _NotNegative
    decay_steps: _Steps
    cycle: bool = False

    def _left(self, step: int) -> float:
        """The share of the steps that are left, 1 ... 0."""
        end = self.decay_steps * max(1, -(-step // self.decay_steps)) if self.cycle else self.decay_steps
        return 1 - min(step, end) / end


class Linear(_Falling):
    """A straight line from `initial_learning_rate` to `end_learning_rate` over `decay_steps`, and then `end_learning_rate`.

    cycle: past its end the line is drawn to the next multiple of `decay_steps`, always from `initial_learning_rate` at step 0.
    """

    scheduler: Literal["Linear"] = "Linear"

    def at(self, step: int) -> float:
        return _between(self.initial_learning_rate, self.end_learning_rate, self._left(step))


class Polynomial(_Falling):
    """As `Linear`, with the share of the steps that are left raised to `power`."""

    scheduler: Literal["Polynomial"] = "Polynomial"
    power: Annotated[float, Field(gt=0)] = 1.0

    def at(self, step: int) -> float:
        return _between(self.initial_learning_rate, self.end_learning_rate, math.pow(self._left(step), self.power))


class InverseExponentialTimeDecay(_Decaying):
    """`initial_learning_rate / (1 + decay_rate * step ** step_exponent / decay_steps)`; the quotient is rounded down where `staircase`."""

    scheduler: Literal["InverseExponentialTimeDecay"] = "InverseExponentialTimeDecay"
    step_exponent: _NotNegative
    decay_steps: _Steps
    decay_rate: _NotNegative
    staircase: bool = False

    def at(self, step: int) -> float:
        time = math.pow(step, self.step_exponent) / self.decay_steps
        return self.initial_learning_rate / (1 + self.decay_rate * (math.floor(time) if self.staircase else time))


class CosineDecay(_Decaying):
    """Half a cosine from `initial_learning_rate` to `end_learning_rate` over `decay_steps`, and then `end_learning_rate`."""

    scheduler: Literal["CosineDecay"] = "CosineDecay"
    end_learning_rate: _NotNegative = 0.0
    decay_steps: _Steps

    def at(self, step: int) -> float:
        share = (1 + math.cos(math.pi * min(step, self.decay_steps) / self.decay_steps)) / 2
        return _between(self.initial_learning_rate, self.end_learning_rate, share)


class CosineAnnealing(_Decaying):
    """A cosine that falls from `initial_learning_rate` to `eta_min` in `T_max` steps and rises again; a list runs it for `T_max`."""

    scheduler: Literal["CosineAnnealing"] = "CosineAnnealing"
    T_max: _Steps
    eta_min: _NotNegative = 0.0

    @property
    def length(self) -> int:
        return self.decay_steps or self.T_max

    def at(self, step: int) -> float:
        share = (1 + math.cos(math.pi * (step % (2 * self.T_max)) / self.T_max)) / 2
        return _between(self.initial_learning_rate, self.eta_min, share)


class Step(_Decaying):
    """`initial_learning_rate * gamma ** (step // step_size)`; `decay_steps` counts in a list alone."""

    scheduler: Literal["Step"] = "Step"
    step_size: _Steps
    gamma: _NotNegative

    def at(self, step: int) -> float:
        return self.initial_learning_rate * math.pow(self.gamma, step // self.step_size)


class MultiStep(_Decaying):
    """`initial_learning_rate` times `gamma` for each milestone that `step` has reached; `decay_steps` counts in a list alone."""

    scheduler: Literal["MultiStep"] = "MultiStep"
    gamma: _NotNegative
    milestones: _Boundaries

    def at(self, step: int) -> float:
        return self.initial_learning_rate * math.pow(self.gamma, bisect.bisect_right(self.milestones, step))


_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,  # of floats: 9 ** 9 ** 9 overflows at once, and a root of -1 is an error and not complex
}
_OF_ONE: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "exp": math.exp, "cos": math.cos}
_OF_MANY: dict[str, Callable[..., float]] = {"min": min, "max": max}


def _value(node: ast.expr, step: float) -> float:
    """An expression at `step`, in floats throughout; what is not in the tables is refused by its own text."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id="step"):
            return step
        case ast.Name(id="pi"):
            return math.pi
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, step), _value(right, step))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, step)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _OF_ONE:
            return _OF_ONE[name](_value(argument, step))
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as arguments, keywords=[]) if name in _OF_MANY:
            return _OF_MANY[name](_value(argument, step) for argument in arguments)
    raise SyntaxError(f"{ast.unparse(node)} is none of {_WORDS}")


@functools.lru_cache(maxsize=64)
def _tree(expression: str) -> ast.expr:
    if len(expression) > _LONGEST_EXPRESSION:
        raise SyntaxError(f"it has {len(expression)} characters, of at most {_LONGEST_EXPRESSION}")
    return ast.parse(expression.strip(), "expression", mode="eval").body


class Lambda(_Decaying):
    """`initial_learning_rate` times `expression` in `step`, such as `"0.95 ** (step // 100)"`; `decay_steps` counts in a list alone.

    It may hold numbers, `+ - * / // % **`, `step`, `pi`, `min`, `max`, `sqrt`, `exp` and `cos`, and is computed in float64.
    """

    scheduler: Literal["Lambda"] = "Lambda"
    expression: str

    @pydantic.field_validator("expression")
    @classmethod
    def _parsed(cls, expression: str) -> str:
        try:
            _value(_tree(expression), 0.0)
        except (SyntaxError, ArithmeticError, ValueError) as error:
            problem = f"got {expression!r}: {error}; try '0.95 ** (step // 100)'"
            raise ValueError(f"must be an expression in step with a value at step 0, {problem}") from None
        return expression

    def at(self, step: int) -> float:
        return self.initial_learning_rate * _value(_tree(self.expression), float(step))


_Curve = Exponential | Linear | Polynomial | InverseExponentialTimeDecay | CosineDecay | CosineAnnealing
_Stairs = Constant | PiecewiseConstant | Step | MultiStep
_Any = _Curve | _Stairs | Lambda
_MODELS: dict[str, type[_Any]] = {model.__name__: model for model in get_args(_Any)}
_AS = {"total_iters": "decay_steps", "steps": "decay_steps", "learning_rates": "values", "milestones": "boundaries"}
"""What other releases of the runner call a key; each counts for the schedules alone that have the second."""


def _model(name: object) -> type[_Any]:
    plain = re.sub("[ _-]|lr$", "", str(name).lower())
    for kind, model in _MODELS.items():
        if kind.lower() == plain:
            return model
    near = nearest(str(name), _MODELS) or "; take one of those"
    raise ValueError(f"scheduler must be one of {', '.join(_MODELS)}, got {name!r}{near}")


def _number(text: str) -> str | None:
    """A number that a file holds as a string, in a spelling that YAML 1.1 too reads as a number: `1e-3` lacks its point there."""
    try:
        digits = repr(float(text))
    except ValueError:
        return None
    return digits if "." in digits else digits.replace("e", ".0e")


def _line(kind: str, keys: Iterable[str], error: ErrorDetails) -> str:
    """One line for what pydantic found wrong with a schedule that takes `keys`."""
    where = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in error["loc"])
    got = error["input"]
    match error["type"]:
        case "missing":
            return f"{kind} needs {where}, got {', '.join(got) or 'no keys'}; add {where}"
        case "extra_forbidden":
            return f"{kind} takes {', '.join(keys)}, got {where!r}{nearest(where, keys) or '; leave it out'}"
        case "value_error":
            return f"{f'{where} of {kind}' if where else kind} {error['ctx']['error']}"
    wanted = error["msg"].removeprefix("Input should ").removeprefix("Tuple should ")
    number = _number(got) if isinstance(got, str) else None
    return f"{where} of {kind} must {wanted}, got {got!r}; {f'write {number}' if number else 'correct it'}"


def _read(value: object) -> _Any:
    """The schedule that a mapping writes."""
    if isinstance(value, _Closed):
        return cast(_Any, value)
    if not isinstance(value, Mapping):
        raise ValueError(f"a schedule must be a mapping, got {value!r}; write a number as scheduler: Constant")
    # The newer files name the schedule by the one key of a mapping: {LinearLR: {...}}.
    if len(value) == 1 and isinstance(inner := next(iter(value.values())), Mapping) and "scheduler" not in inner:
        value = {"scheduler": next(iter(value)), **inner}
    model = _model(value.get("scheduler"))
    given: dict[str, object] = {}
    for key, setting in value.items():
        other = _AS.get(str(key), "")
        name = other if key not in model.model_fields and other in model.model_fields else str(key)
        if name in given:
            raise ValueError(f"{model.__name__} takes {name} once, got it as {key} too; leave one of them out")
        given[name] = setting
    del given["scheduler"]
    try:
        return model.model_validate(given)
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a misspelt key is missing too
        raise ValueError(_line(model.__name__, [*model.model_fields], first)) from None


Schedule = Annotated[_Any, Field(discriminator="scheduler"), BeforeValidator(_read)]
"""One schedule; as a pydantic field it reads a mapping with every spelling that `parse` knows."""


def _running(schedules: Sequence[Schedule], step: int) -> tuple[Schedule, int]:
    """The schedule of a list that runs at `step`, and which of its own steps that is."""
    if not schedules:
        raise ValueError("a list of schedules must hold one at least, got an empty list; give a number for one rate")
    for place, schedule in enumerate(schedules[:-1]):
        if schedule.length is None:
            name = f"{type(schedule).__name__}, number {place + 1} of {len(schedules)},"
            raise ValueError(f"all schedules of a list but the last need decay_steps, got {name} without; add it")
        if step < schedule.length:
            return schedule, step
        step -= schedule.length
    return schedules[-1], step


def parse(value: object) -> float | Schedule | list[Schedule]:
    """The learning rate that a configuration file writes: a number, a mapping with the key `scheduler`, or a list of such mappings.

    A schedule's name is read whatever its case, underscores or final `LR`; `total_iters` and `steps` stand for `decay_steps`,
    `learning_rates` for `values`.  Of a list, each runs for its `decay_steps`, counting from 0, and the last for ever.  Raises ValueError,
    in one line, for another name or key, one given twice, a wrong type, NaN, infinity, a negative rate, and no length before a list's last.
    """
    match value:
        case int() | float() if not isinstance(value, bool):
            return rate(value, 0)
        case Mapping() | _Closed():
            return _read(value)
        case list() | tuple():
            schedules = [_read(each) for each in value]
            _running(schedules, sys.maxsize)
            return schedules
    number = _number(value) if isinstance(value, str) else None
    remedy = f"write {number}" if number else "write 0.1, or a mapping with scheduler: Linear"
    raise ValueError(f"learning_rate must be a number, a schedule or a list of schedules, got {value!r}; {remedy}")


LearningRate = Annotated[float | Schedule | list[Schedule], BeforeValidator(parse)]
"""A number, a schedule, or schedules that run one after the other; as a pydantic field it reads what `parse` does."""


def rate(learning_rate: LearningRate, step: int) -> float:
    """The learning rate at a step, counted from 0, in float64.

    Raises ValueError for a step below 0, a list that `parse` would refuse, and a rate that is negative, NaN or infinite at that step.
    """
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}; give the number of steps taken so far")
    if isinstance(learning_rate, int | float):
        name, form = "learning_rate", functools.partial(float, learning_rate)
    else:
        schedule, own = _running(learning_rate if isinstance(learning_rate, list) else [learning_rate], step)
        name, form = f"{schedule.scheduler} at its step {own}", functools.partial(schedule.at, own)
    try:
        value = form()
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{name} must be finite and at least 0, got {error}; choose other numbers") from error
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}; choose other numbers")
    return value
