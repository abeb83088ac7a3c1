"""How a reward is called: within a time limit, in a process that can be killed, its faults told row by row."""

import asyncio
import inspect
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cosmo_fast.rewards.columns import RewardError, columns_of

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
Sample = tuple[str, Any, str, Mapping[str, Any]]  # what a message calls the row, prompt, completion, columns
ARGUMENTS = ("prompts", "completions")


class Fault(str):
    """What went wrong with one sample; stands where its value would."""


class NoAnswer(BaseException):
    """A call took too long. Not an Exception: a reward that catches those to go on must not catch this one."""


class BrokenReward(RewardError):
    """What a reward returned is no list of as many values: no row is at fault."""


Values = list[float | None | Fault]
Run = Callable[[Sequence[Sample], float], Values]  # (samples, seconds)


def call(name: str, run: Run, samples: Sequence[Sample], timeout: float, max_failures: float) -> tuple[Values, str]:
    """The values of one reward, a Fault for each sample on which it fails, and what to say of its faults, if any.

    A call that raises or takes more than ``timeout`` seconds is repeated for each sample alone (after a slow one for
    its share of the limit, 1 s at least), so that only the samples at fault have no value.

    Raises RewardError, naming a row, for faults of more than the share ``max_failures`` of the samples (0: for the
    first one, and nothing slow is asked again), and for what is no list of as many values.
    """
    if collision := set(ARGUMENTS) & {column for *_, row in samples for column in row}:
        raise RewardError(f"column {collision.pop()!r} collides with the argument of that name of every reward")
    strict, count, cause, failed = not max_failures, len(samples), None, ""
    try:
        values = run(samples, timeout)
    except BrokenReward as error:
        raise RewardError(f"reward {name!r} {error}") from None
    except NoAnswer:
        failed = f"gave nothing within reward_timeout={timeout:g} s"
        if strict or count == 1:
            where = samples[0][0] if count == 1 else f"{count} rows from {samples[0][0]} to {samples[-1][0]}"
            raise RewardError(f"reward {name!r} {failed} on {where}; does it wait or loop?") from None
        values = _alone(run, samples, max(1.0, timeout / count), strict)
    except Exception as error:
        cause, failed, values = error, f"failed on a batch: {described(error)}", _alone(run, samples, timeout, strict)
        if strict and not _faults(values):
            raise RewardError(f"reward {name!r} {failed}; each of its {count} rows passes alone") from error
    if not (faults := _faults(values)):
        return values, failed and f"reward {name!r} {failed}; each of its {count} rows passes alone"
    if len(faults) <= max_failures * count:
        return values, f"reward {name!r} {faults[0]}; left out, as {len(faults)} of {count} responses are"
    share = f"; it fails on {len(faults)} of {count} responses, over max_reward_failures={max_failures:g}"
    raise RewardError(f"reward {name!r} {faults[0]}{'' if strict else share}") from cause


def compute(function: RewardFunction, samples: Sequence[Sample]) -> Values:
    """What the function gives, a Fault for what is no finite number; BrokenReward for no list of as many values."""
    _, prompts, completions, rows = zip(*samples, strict=True)
    result = function(list(prompts), list(completions), **columns_of(rows))
    values: Any = asyncio.run(_wait(result)) if inspect.isawaitable(result) else result
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise BrokenReward(f"returned a {type(values).__name__}, not a list of {len(samples)} values")
    if len(values) != len(samples):
        raise BrokenReward(f"returned {len(values)} values for {len(samples)} samples")
    return [_number(value, where) for value, (where, *_) in zip(values, samples, strict=True)]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """NoAnswer after ``seconds``, by SIGALRM: in the main thread and outside C code alone."""

    def stop(*_) -> None:
        raise NoAnswer

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    return str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"


def _faults(values: Values) -> list[Fault]:
    return [value for value in values if isinstance(value, Fault)]


def _alone(run: Run, samples: Sequence[Sample], seconds: float, first: bool) -> Values:
    """Each sample asked for alone; with ``first`` until one fails, the rest is None."""
    values: Values = [None] * len(samples)
    for i, sample in enumerate(samples):
        try:
            values[i] = run([sample], seconds)[0]
        except NoAnswer:
            values[i] = Fault(f"gave nothing within {seconds:g} s on {sample[0]}")
        except Exception as error:
            values[i] = Fault(f"failed on {sample[0]}: {described(error)}")
        if first and isinstance(values[i], Fault):
            break
    return values


async def _wait(result: Awaitable) -> Any:
    return await result


def _number(value: Any, where: str) -> float | None | Fault:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    return Fault(f"gave {value!r} for {where}: want a finite number, or None to abstain")
