"""A process that computes rewards and can be killed."""

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any

import torch

from cosmo_fast.rewards.calls import BrokenReward, NoAnswer, RewardFunction, Sample, Values, compute, described
from cosmo_fast.rewards.columns import RewardError

_PR_SET_PDEATHSIG = 1
_LONGEST = 1e6  # seconds that a poll takes
_UNREAD = struct.pack("ll", 60, 0)  # seconds, microseconds: a question that nobody reads for so long has no answer


class WorkerError(RewardError):
    """What a reward raised in its process, or how that process ended."""


class Worker:
    """Computes rewards in a process of its own: one that hangs in C code or crashes costs its call alone.

    The process is a fork, so any callable will do; it is made at :meth:`start`, or by the first call, and anew after a
    kill. Start it before the model is loaded: pages that its parent overwrites later are kept for it. What a reward
    keeps is kept there, and nothing in this process sees it. It ends with the Worker, and so does what it has started,
    but for sessions of their own; at the latest it ends, alone, with the thread that forked it. No exit handler runs.
    """

    def __init__(self):
        self._functions: list[RewardFunction] = []
        self._process: BaseProcess | None = None
        self._lock = threading.Lock()

    def add(self, function: RewardFunction) -> int:
        """Its number in calls. A process that runs knows nothing of it, and ends."""
        self.close()
        self._functions.append(function)
        return len(self._functions) - 1

    def __call__(self, number: int, samples: Sequence[Sample], timeout: float) -> Values:
        """As `calls.compute`; NoAnswer after ``timeout`` seconds, WorkerError for what was raised there."""
        try:
            question = ForkingPickler.dumps((number, samples))
        except Exception as error:  # a column may raise anything where it is pickled
            raise WorkerError(
                f"its columns cannot go to another process ({error}): set reward_worker: false"
            ) from error
        with self._lock:
            self.start()
            try:
                kind, *said = self._answer(question, timeout)
            except BaseException:  # Ctrl-C, too: what came later would be taken for the next answer
                self._end(patience=0)
                raise
        if kind == "values":
            return said[0]
        if kind == "broken":
            raise BrokenReward(said[0])
        error = WorkerError(said[0])
        error.add_note(said[1])
        raise error

    def start(self) -> None:
        """Makes the process, if there is none that runs."""
        if self._process is not None:
            if not wait([self._death], 0):
                return
            self._end(patience=0)
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._pipe, self._functions), name="cosmo_fast rewards")
        with warnings.catch_warnings():  # Python >= 3.12 warns of threads, which the child neither has nor waits for
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        with socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _UNREAD)
        self._death = _death(process)
        self._process = process
        self._finalizer = Finalize(self, _end, (process, self._pipe, self._death, 1.0), exitpriority=10)

    def close(self) -> None:
        """Ends the process; another call starts the next one."""
        with self._lock:
            self._end(patience=1)

    def _answer(self, question: Any, timeout: float) -> tuple:
        with suppress(BrokenPipeError):  # it has ended
            try:
                self._pipe.send_bytes(question)
            except BlockingIOError:
                raise NoAnswer from None
        if not wait([self._pipe, self._death], min(timeout, _LONGEST)):
            raise NoAnswer
        try:
            if not self._pipe.poll():
                raise EOFError
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._process
            self._end(patience=1)
            code = process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise WorkerError(f"the process that computes it ended with {how}") from None

    def _end(self, patience: float) -> None:
        if self._process is not None:
            self._finalizer.cancel()
            _end(self._process, self._pipe, self._death, patience)
            self._process = None


def _death(process: BaseProcess) -> int:
    """What a wait returns at its death: its sentinel is a pipe, which lives on in what it has forked."""
    try:
        return os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or an old one
        return process.sentinel


def _end(process: BaseProcess, pipe: Connection, death: int, patience: float) -> None:
    """Lets it end by itself for ``patience`` seconds, then kills it and all that it has started."""
    pipe.close()
    wait([death], patience)
    for kill in (os.killpg, os.kill):  # it has no group yet if it has only just begun
        with suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
    process.join()
    if death != process.sentinel:
        os.close(death)


def _serve(pipe: Connection, parents: Connection, functions: Sequence[RewardFunction]) -> None:
    os.setpgid(0, 0)  # Ctrl-C is not for it, and what it starts can be killed with it
    parents.close()  # else its end would not be seen here
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nor would it while a reward loops
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a progress bar's may be locked by a thread left behind
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    while True:
        try:
            question = pipe.recv_bytes()
        except EOFError:
            return
        try:
            number, samples = pickle.loads(question)
            answer = "values", compute(functions[number], samples)
        except BrokenReward as error:
            answer = "broken", str(error)
        except Exception as error:  # the user's code may raise anything: the parent tells it, with the row
            hint = "; set reward_worker: false" if "forked subprocess" in str(error) else ""  # CUDA's words
            answer = "raised", described(error) + hint, traceback.format_exc()
        sys.stdout.flush()
        pipe.send(answer)
