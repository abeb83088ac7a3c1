"""Rewards that fail: bounded, told by row, left out of their groups; the process that computes them."""

import asyncio
import ctypes
import math
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from cosmo_fast.objectives import advantages
from cosmo_fast.rewards import RewardMix
from cosmo_fast.rewards.columns import RewardError
from cosmo_fast.rewards.relations import relations
from cosmo_fast.rewards.worker import Worker
from cosmo_fast.stages.rollout import Rollout

BOTH = pytest.mark.parametrize("worker", [False, True], ids=["here", "worker"])


def mix(function, worker=True, timeout=600.0):
    given = {"rewards": {"mine": function}, "timeout": timeout, "worker": Worker() if worker else None}
    return RewardMix({"*": {"mine": 1}}, format_weight=0, **given)


def rewarded(mix, kinds, max_failures=0.0, least=1):
    rows = [{"kind": kind, "id": f"{kind}{i}"} for i, kind in enumerate(kinds)]
    return mix([""] * len(rows), [""] * len(rows), rows, max_failures=max_failures, least_failures=least)


def picky(prompts, completions, kind, **columns):
    """1 for what is good; each other kind fails in its own way."""
    for one in kind:
        if one == "raises":
            raise KeyError("no such thing")
        if one == "hangs":
            time.sleep(60)
        if one == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if one == "exits":
            os._exit(3)
    return [{"good": 1.0, "bad": 0.0, "nan": math.nan, "none": None, "text": "1"}[one] for one in kind]


@BOTH
@pytest.mark.parametrize(
    "kind, said",
    [
        ("raises", "failed on row 2 (id 'raises2'): KeyError: 'no such thing'"),
        ("nan", "gave nan for row 2 (id 'nan2')"),
        ("text", "gave '1' for row 2 (id 'text2')"),
    ],
)
def test_a_row_on_which_a_reward_fails_is_left_out_and_told(worker, kind, said):
    mixed = rewarded(mix(picky, worker), ["good", "bad", kind, "good"], 0.25)
    assert mixed.total[[0, 1, 3]].tolist() == [1, 0, 1] and mixed.total[2].isnan() and mixed.matrix[2].isnan().all()
    assert mixed.failed == ("mine",) and mixed.metrics()["rewards/mine/failed"] == 1
    assert mixed.metrics()["reward"] == pytest.approx(2 / 3) == mixed.metrics()["rewards/mine/mean"]
    (note,) = mixed.notes
    assert said in note and "1 of 4 responses" in note
    with pytest.raises(RewardError) as caught:
        rewarded(mix(picky, worker), ["good", "bad", kind, "good"])
    assert said in str(caught.value) and "max_reward_failures" not in str(caught.value)
    with pytest.raises(RewardError, match="at least 2 of 4 responses fail, over max_reward_failures=0.25"):
        rewarded(mix(picky, worker), ["good", kind, kind, "good"], 0.25)
    assert rewarded(mix(picky, worker), ["good", kind], 0.01).failed == ("mine",), "one may fail, of however few"
    kinds = [kind] * 3 + ["good"] * 3
    assert len(rewarded(mix(picky, worker), kinds, 0.01, 3).failed) == 3, "or the responses to one prompt"
    with pytest.raises(RewardError, match="at least 3 of 6"):
        rewarded(mix(picky, worker), kinds, 0.01, 2)


@pytest.mark.parametrize("kind, how", [("crashes", "signal SIGKILL"), ("exits", "exit status 3")])
def test_a_reward_that_ends_its_process_costs_its_row_alone(kind, how):
    once = mix(picky)
    mixed = rewarded(once, ["good", kind, "bad"], 0.5)
    assert mixed.total[[0, 2]].tolist() == [1, 0] and mixed.total[1].isnan()
    assert how in mixed.notes[0] and f"row 1 (id '{kind}1')" in mixed.notes[0]
    assert rewarded(once, ["good"]).total.tolist() == [1]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_reward_that_hangs_costs_its_row_alone_in_any_thread(where):
    """Others have the whole limit, as one that loads something anew in each process needs."""
    ready = []

    def loads(prompts, completions, **columns):
        if not ready:
            time.sleep(0.4)
            ready.append(True)
        return picky(prompts, completions, **columns)

    found = []

    def run():
        found.append(rewarded(mix(loads, timeout=0.8), ["good", "hangs", "bad"], 0.5))

    started = time.perf_counter()
    if where == "thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert time.perf_counter() - started < 10
    assert found[0].total[[0, 2]].tolist() == [1, 0] and found[0].total[1].isnan()
    assert "gave nothing within reward_timeout=0.8 s on row 1 (id 'hangs1')" in found[0].notes[0]


def test_a_reward_that_hangs_or_fails_on_everything_is_not_asked_about_everything():
    started = time.perf_counter()
    with pytest.raises(RewardError, match="on row 2 .*3rd response alone on which it hangs"):
        rewarded(mix(picky, timeout=0.3), ["hangs"] * 40, 1.0)
    assert time.perf_counter() - started < 10
    assert rewarded(mix(picky, timeout=0.3), ["hangs"], 1.0).total.isnan().all()
    calls = []

    def broken(prompts, completions, **columns):
        calls.append(len(prompts))
        raise OSError("nobody there")

    with pytest.raises(
        RewardError, match=r"OSError: nobody there \(test_reward_calls.py:\d+\); at least 5 of 40 responses fail"
    ):
        rewarded(mix(broken, worker=False), ["good"] * 40, 0.1)
    assert calls == [40, 1, 1, 1, 1, 1]


def test_time_runs_out_inside_c_code_too():
    def sleeps(prompts, completions, **columns):
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no Python signal handler runs

    started = time.perf_counter()
    with pytest.raises(RewardError, match="gave nothing within reward_timeout=0.3 s on row 0"):
        rewarded(mix(sleeps, timeout=0.3), ["good"])
    assert time.perf_counter() - started < 10


@BOTH
def test_what_is_not_at_fault_is_asked_for_again_together(worker):
    """So a reward that compares the samples of a batch has the right values."""
    before = []

    def ranks(prompts, completions, kind, place, **columns):
        before.append(True)
        if "raises" in kind or len(before) == 1:
            raise OSError("try again")
        return [float(sum(other < own for other in place)) for own in place]

    def given(kinds, bound):
        before.clear()
        rows = [{"kind": kind, "place": i} for i, kind in enumerate(kinds)]
        return mix(ranks, worker)([""] * len(rows), [""] * len(rows), rows, max_failures=bound)

    mixed = given(["good"] * 3, 0.5)
    assert mixed.total.tolist() == [0, 1, 2] and not mixed.failed
    assert "failed on 3 responses, the first to row 0: OSError: try again (test_" in mixed.notes[0]
    assert mixed.notes[0].endswith("; asked again it gave every value")
    mixed = given(["good", "raises", "good"], 0.5)
    assert mixed.total[[0, 2]].tolist() == [0, 1] and mixed.failed == ("mine",)
    with pytest.raises(RewardError, match="OSError: try again .*; each of them passes alone"):
        given(["good"] * 3, 0)


def test_requests_that_fail_at_random_cost_their_rows_and_no_run():
    """One at a time where the exceptions come as values, else as long as a try of all the rest gets through."""
    rng = random.Random(0)

    async def score():
        if rng.random() < 0.05:
            raise OSError("429")
        return 1.0

    async def judged(prompts, completions, **columns):
        return await asyncio.gather(*(score() for _ in prompts), return_exceptions=True)

    failed = [len(rewarded(mix(judged, worker=False), ["good"] * 64, 0.25).failed) for _ in range(20)]
    assert 20 < sum(failed) < 110
    note = next(n for _ in range(20) for n in rewarded(mix(judged, worker=False), ["good"] * 64, 0.25).notes)
    assert "failed on row" in note and "OSError: 429 (test_reward_calls.py:" in note
    left = [True, False, False, True, False]

    def brittle(prompts, completions, **columns):
        if len(prompts) > 1 and left.pop():
            raise OSError("503")
        return [1.0] * len(prompts)

    assert rewarded(mix(brittle, worker=False), ["good"] * 4, 0.25).total.tolist() == [1] * 4 and len(left) == 4
    left[:] = [False, True, True]
    assert rewarded(mix(brittle, worker=False), ["good"] * 4, 0.25).total.tolist() == [1] * 4 and not left


def test_a_reward_that_fails_on_all_of_several_calls_stops_the_run_however_few_they_are():
    once = mix(picky, worker=False)
    for kind in ("raises", "raises", "good", "raises", "raises"):
        rewarded(once, [kind] * 2, 0.1, 2)
    with pytest.raises(
        RewardError, match="KeyError.*left out, as 2 of 2 .* in the 2 calls before: is the reward broken"
    ):
        rewarded(once, ["raises"] * 2, 0.1, 2)


def test_a_batch_that_fails_where_its_rows_pass_alone_stops_whatever_the_bound():
    def alone(prompts, completions, **columns):
        if len(prompts) > 1:
            raise OSError("one at a time")
        return [1.0]

    with pytest.raises(
        RewardError, match="failed on 3 responses, .*one at a time .*; each of them passes alone, and together"
    ):
        rewarded(mix(alone), ["good"] * 3, 1.0)


@BOTH
def test_a_wrong_length_stops_whatever_the_bound(worker):
    with pytest.raises(RewardError, match="reward 'mine' returned 1 values for 2 samples"):
        rewarded(mix(lambda prompts, completions, **columns: [1.0], worker), ["good", "good"], 1.0)


def test_a_failed_sample_has_no_advantage_and_is_in_no_baseline():
    mixed = rewarded(mix(picky), ["good", "bad", "raises", "good", "bad", "bad"], 0.5)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert advantages(mixed.total, groups, "dr_grpo").tolist() == pytest.approx([0.5, -0.5, 0, 2 / 3, -1 / 3, -1 / 3])
    assert relations(mixed, 3)["rewards/mine/share"] == pytest.approx(1)
    kinds = ["good", "raises", "bad", "good", "raises", "good", "raises", "raises", "raises"]
    mixed = rewarded(mix(picky), kinds, 1.0)
    assert Rollout([], [], [], [], mixed, 0, 0).varied(3) == [0], "neither equal rewards nor none at all differ"
    mixed = rewarded(mix(picky), ["raises"] * 3, 1.0)
    assert mixed.metrics() == {"reward": None, "reward_std": None, "rewards/mine/failed": 3} and not relations(mixed, 3)


def test_a_worker_has_its_own_state_and_ends_with_its_rewards():
    calls = []

    async def counts(prompts, completions, **columns):
        await asyncio.sleep(0)
        calls.append(len(prompts))
        return [float(sum(calls))] * len(prompts)

    once = mix(counts)
    assert [rewarded(once, ["good"] * n).total[0].item() for n in (2, 3)] == [2, 5] and not calls
    process = once.worker._process
    assert process.is_alive()
    del once
    assert not process.is_alive(), "the process outlives its rewards"


def test_an_answer_that_nobody_waited_for_is_not_the_next_one():
    def slow(prompts, completions, kind, **columns):
        time.sleep(1 if kind[0] == "slow" else 0)
        return [float(one == "slow") for one in kind]

    once = mix(slow)
    rewarded(once, ["good"])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            rewarded(once, ["slow"], 0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(1)
    assert rewarded(once, ["good"]).total.tolist() == [0]
    found = {}

    def ask(kind):
        found[kind] = [rewarded(once, [kind]).total.item() for _ in range(20 if kind == "good" else 2)]

    threads = [threading.Thread(target=ask, args=[kind]) for kind in ("slow", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"slow": [1.0] * 2, "good": [0.0] * 20}


def test_what_a_reward_has_started_ends_with_it(tmp_path):
    def starts(prompts, completions, kind, **columns):
        child = subprocess.Popen(["sleep", "97"])
        (tmp_path / kind[0]).write_text(str(child.pid))
        if kind[0] == "hangs":
            child.wait()
        return [1.0] * len(kind)

    once = mix(starts, timeout=1)
    rewarded(once, ["good"])
    with pytest.raises(RewardError, match="gave nothing"):
        rewarded(once, ["hangs"])
    for kind in ("good", "hangs"):
        gone_soon(int((tmp_path / kind).read_text()))


def test_a_crash_is_told_though_what_the_reward_has_forked_lives_on():
    def starts(prompts, completions, kind, **columns):
        if kind[0] == "forks":
            multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True).start()
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0] * len(kind)

    started = time.perf_counter()
    with pytest.raises(RewardError, match="ended with signal SIGKILL"):
        rewarded(mix(starts, timeout=30), ["forks"])
    assert time.perf_counter() - started < 10


def test_a_question_that_nobody_reads_has_no_answer(monkeypatch):
    monkeypatch.setattr("cosmo_fast.rewards.worker._UNREAD", struct.pack("ll", 0, 300_000))
    once = mix(picky)
    rewarded(once, ["good"])
    os.kill(once.worker._process.pid, signal.SIGSTOP)
    with pytest.raises(RewardError, match="gave nothing"):
        once([""], ["x" * 8_000_000], [{"kind": "good"}])
    assert rewarded(once, ["good"]).total.item() == 1


def test_one_worker_serves_several_mixes_and_starts_anew_for_a_further_one():
    worker = Worker()
    functions = [lambda prompts, completions, **columns: [1.0], lambda prompts, completions, **columns: [2.0]]
    both = [RewardMix({"*": {"mine": 1}}, format_weight=0, rewards={"mine": f}, worker=worker) for f in functions]
    assert [rewarded(one, ["good"]).total.item() for one in both] == [1, 2]
    process = worker._process
    third = RewardMix({"*": {"accuracy": 1}}, format_weight=0, worker=worker)
    assert not process.is_alive()
    assert third([""], ["<think>x</think>\\boxed{3}"], [{"answer": "3"}]).total.item() == 1
    worker.close()
    assert rewarded(both[1], ["good"]).total.item() == 2


def test_what_needs_this_process_says_which_setting_keeps_it_here():
    with pytest.raises(RewardError, match="cannot go to another process .*set reward_worker: false"):
        mix(picky)([""], [""], [{"kind": "good", "own": lambda: 0}])

    def on_cuda(prompts, completions, **columns):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    with pytest.raises(RewardError, match="CUDA in forked subprocess. .*; set reward_worker: false"):
        rewarded(mix(on_cuda), ["good"])


def test_a_worker_ends_with_its_process_even_in_a_loop(tmp_path):
    code = f"""
import os, sys, threading, time
sys.path[:0] = {[*filter(None, sys.path)]!r}
from cosmo_fast.rewards import RewardMix
from cosmo_fast.rewards.worker import Worker
def spins(prompts, completions, **columns):
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    while columns:
        pass
    return [1.0]
mix = RewardMix({{"*": {{"mine": 1}}}}, format_weight=0, rewards={{"mine": spins}}, worker=Worker())
print(mix([""], [""], [{{}}]).total.tolist(), flush=True)
if sys.argv[1] == "killed":
    threading.Timer(1, os._exit, [0]).start()
    mix([""], [""], [{{"x": 1}}])
"""
    for how in ("ends", "killed"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120)
        assert done.stdout == "[1.0]\n" and done.returncode == 0, done.stderr
        gone_soon(int((tmp_path / "pid").read_text()))


def gone_soon(pid):
    patience = time.monotonic() + 20
    while running(pid) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not running(pid)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
