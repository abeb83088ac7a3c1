"""A process that computes rewards and can be killed."""

import ctypes
import multiprocessing
import pickle
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize

import torch

from cosmo_fast.rewards.calls import BrokenReward, NoAnswer, RewardFunction, Sample, Values, compute, described
from cosmo_fast.rewards.columns import RewardError

_PR_SET_PDEATHSIG = 1


class WorkerError(RewardError):
    """What a reward raised in its process, or how that process ended."""


class Worker:
    """Computes ``functions`` in a process of its own: one that hangs in C code or crashes costs its call alone.

    The process is a fork at the first call, so any callable will do, and starts anew after a kill. What a reward keeps
    is kept there; nothing in this process sees it. It has this one's environment, no core dumps, and ends with it.
    """

    def __init__(self, functions: Mapping[str, RewardFunction]):
        self.functions, self._process, self._end = functions, None, None

    def __call__(self, name: str, samples: Sequence[Sample], timeout: float) -> Values:
        """As `calls.compute`; NoAnswer after ``timeout`` seconds, WorkerError for what was raised there."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._pipe.send((name, samples))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise WorkerError(
                f"its columns cannot go to another process ({error}): set reward_worker: false"
            ) from error
        if not wait([self._pipe, self._process.sentinel], timeout):
            self.close()
            raise NoAnswer
        try:
            kind, *said = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise WorkerError(f"the process that computes it ended with {how}") from None
        if kind == "values":
            return said[0]
        if kind == "broken":
            raise BrokenReward(said[0])
        error = WorkerError(said[0])
        error.add_note(said[1])
        raise error

    def close(self) -> None:
        """Ends the process; another call starts the next one."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._pipe, self.functions), name="cosmo_fast rewards")
        with warnings.catch_warnings():  # Python >= 3.12 warns of threads, which the child neither has nor waits for
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._process, self._end = process, Finalize(self, _end, (process, self._pipe), exitpriority=10)


def _end(process: multiprocessing.Process, pipe: Connection) -> None:
    process.kill()
    process.join()
    pipe.close()


def _serve(pipe: Connection, parents: Connection, functions: Mapping[str, RewardFunction]) -> None:
    parents.close()  # else the end of the parent would not be seen here
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nor would it while a reward loops
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    while True:
        try:
            name, samples = pipe.recv()
        except EOFError:
            return
        try:
            answer = "values", compute(functions[name], samples)
        except BrokenReward as error:
            answer = "broken", str(error)
        except Exception as error:
            hint = "; set reward_worker: false" if "forked subprocess" in str(error) else ""  # CUDA's words
            answer = "raised", described(error) + hint, traceback.format_exc()
        sys.stdout.flush()
        pipe.send(answer)
