"""How a reward is called: within a time limit, in a process that can be killed, its faults told row by row."""

import asyncio
import inspect
import math
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
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
_MACHINERY = {Path(__file__).with_name(f"{name}.py") for name in ("calls", "worker", "mix")}
_MACHINERY |= {Path(asyncio.__file__).with_name(f"{name}.py") for name in ("runners", "base_events")}
TRIES = 3  # ours
MAX_HUNG = 3  # ours: rows that may hang in a call, each for the whole limit, before the reward is taken to hang on all


def call(
    name: str, run: Run, samples: Sequence[Sample], timeout: float, max_failures: float, least: int
) -> tuple[Values, str]:
    """The values of one reward, a Fault for each sample on which it fails, and what to say of its faults, if any.

    Where a call raises or takes more than ``timeout`` seconds, each sample is tried alone to find those at fault, and
    all others are asked for again together, as a reward may compare the samples of a batch; TRIES times in all.

    Raises RewardError, naming a row: for faults of more than the share ``max_failures`` of the samples and of more than
    ``least`` of them (share 0: for any), for a batch that fails where its rows pass alone, for no list of that length.
    """
    if collision := set(ARGUMENTS) & {column for *_, row in samples for column in row}:
        raise RewardError(f"column {collision.pop()!r} collides with the argument of that name of every reward")
    who, count, cause, failed = f"reward {name!r}", len(samples), None, ""
    allowed = max(least, int(max_failures * count + 1e-9)) if max_failures else 0
    found: dict[int, Fault] = {}
    rest, values = list(range(count)), []
    for _ in range(TRIES):
        try:
            values = run([samples[i] for i in rest], timeout)
            break
        except BrokenReward as error:
            raise RewardError(f"{who} {error}") from None
        except (Exception, NoAnswer) as error:
            first = samples[rest[0]][0]
            where = first if len(rest) == 1 else f"{len(rest)} responses, the first to {first}"
            cause, failed = error, _failure(error, where, timeout)
            if isinstance(error, NoAnswer) and not allowed:
                raise RewardError(f"{who} {failed}") from None
            if len(rest) == 1:
                found[rest[0]] = Fault(failed)
            else:
                found |= _failing(who, run, [(i, samples[i]) for i in rest], timeout, allowed - len(found))
            rest = [i for i in rest if i not in found]
            if not rest or len(found) > allowed:
                break
            if not allowed:
                raise RewardError(f"{who} {failed}; each of them passes alone") from error
    else:
        raise RewardError(
            f"{who} {failed}; each of them passes alone, and together they failed {TRIES} times"
        ) from cause
    result: Values = [found.get(i) for i in range(count)]
    for i, value in zip(rest, values, strict=bool(values)):
        result[i] = value
    faults = [value for value in result if isinstance(value, Fault)]
    if len(faults) > allowed:
        share = f"; at least {len(faults)} of {count} responses fail, over max_reward_failures={max_failures:g}"
        raise RewardError(f"{who} {faults[0]}{share if allowed else ''}") from cause
    if faults:
        return result, f"{who} {faults[0]}; left out, as {len(faults)} of {count} responses are"
    return result, failed and f"{who} {failed}; asked again it gave every value"


def _failing(
    who: str, run: Run, samples: Sequence[tuple[int, Sample]], timeout: float, allowed: int
) -> dict[int, Fault]:
    """Which samples fail alone, by index; no further ones where they are more than ``allowed``."""
    found: dict[int, Fault] = {}
    hung = 0
    for i, sample in samples:
        try:
            run([sample], timeout)
        except (Exception, NoAnswer) as error:
            found[i], hung = Fault(_failure(error, sample[0], timeout)), hung + isinstance(error, NoAnswer)
            if len(found) > allowed:
                break
            if hung == MAX_HUNG:
                raise RewardError(f"{who} {found[i]} It is the {hung}rd response alone on which it hangs") from None
    return found


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
    """Its type, what it says, and the lines that led to it outside of this machinery, three at most."""
    if isinstance(error, RewardError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) not in _MACHINERY]
    lines = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return f"{type(error).__name__}: {error}{lines and f' ({lines})'}"


def _failure(error: BaseException, where: str, timeout: float) -> str:
    if isinstance(error, NoAnswer):
        return f"gave nothing within reward_timeout={timeout:g} s on {where}; does it wait or loop?"
    return f"failed on {where}: {described(error)}"


async def _wait(result: Awaitable) -> Any:
    return await result


def _number(value: Any, where: str) -> float | None | Fault:
    if value is None:
        return None
    if isinstance(value, Exception):  # of asyncio.gather(..., return_exceptions=True)
        return Fault(f"failed on {where}: {described(value)}")
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    return Fault(f"gave {value!r} for {where}: want a finite number, or None to abstain")
