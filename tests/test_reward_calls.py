"""Rewards that fail: bounded, told by row, left out of their groups; the process that computes them."""

import asyncio
import ctypes
import math
import os
import signal
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

BOTH = pytest.mark.parametrize("worker", [False, True], ids=["here", "worker"])


def mix(function, worker=True, timeout=600.0):
    return RewardMix({"*": {"mine": 1}}, format_weight=0, rewards={"mine": function}, timeout=timeout, worker=worker)


def rewarded(mix, kinds, max_failures=0.0):
    rows = [{"kind": kind, "id": f"{kind}{i}"} for i, kind in enumerate(kinds)]
    return mix([""] * len(rows), [""] * len(rows), rows, max_failures=max_failures)


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
    return [{"good": 1.0, "bad": 0.0, "nan": math.nan, "none": None, "text": "one"}[one] for one in kind]


@BOTH
@pytest.mark.parametrize(
    "kind, said",
    [
        ("raises", "failed on row 2 (id 'raises2'): KeyError: 'no such thing'"),
        ("nan", "gave nan for row 2 (id 'nan2')"),
        ("text", "gave 'one' for row 2 (id 'text2')"),
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
    with pytest.raises(RewardError, match="fails on 2 of 4 responses, over max_reward_failures=0.25"):
        rewarded(mix(picky, worker), ["good", kind, kind, "good"], 0.25)


@pytest.mark.parametrize("kind, how", [("crashes", "signal SIGKILL"), ("exits", "exit status 3")])
def test_a_reward_that_ends_its_process_costs_its_row_alone(kind, how):
    once = mix(picky)
    mixed = rewarded(once, ["good", kind, "bad"], 0.5)
    assert mixed.total[[0, 2]].tolist() == [1, 0] and mixed.total[1].isnan()
    assert how in mixed.notes[0] and f"row 1 (id '{kind}1')" in mixed.notes[0]
    assert rewarded(once, ["good"]).total.tolist() == [1]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_reward_that_hangs_costs_its_row_alone_in_any_thread(where):
    found = []

    def run():
        found.append(rewarded(mix(picky, timeout=0.3), ["good", "hangs", "bad"], 0.5))

    started = time.perf_counter()
    if where == "thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert time.perf_counter() - started < 10
    assert found[0].total[[0, 2]].tolist() == [1, 0] and found[0].total[1].isnan()
    assert "gave nothing within 1 s on row 1 (id 'hangs1')" in found[0].notes[0]


def test_time_runs_out_inside_c_code_too():
    def sleeps(prompts, completions, **columns):
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no Python signal handler runs

    started = time.perf_counter()
    with pytest.raises(RewardError, match="gave nothing within reward_timeout=0.3 s on row 0"):
        rewarded(mix(sleeps, timeout=0.3), ["good"])
    assert time.perf_counter() - started < 10


@BOTH
def test_what_fails_as_a_batch_and_passes_alone_has_its_values_and_is_told(worker):
    def together(prompts, completions, **columns):
        if len(prompts) > 1:
            raise OSError("try again")
        return [1.0]

    mixed = rewarded(mix(together, worker), ["good", "good"], 0.5)
    assert mixed.total.tolist() == [1, 1] and not mixed.failed
    assert "failed on a batch: OSError: try again; each of its 2 rows passes alone" in mixed.notes[0]
    with pytest.raises(RewardError, match="OSError: try again; each of its 2 rows passes alone"):
        rewarded(mix(together, worker), ["good", "good"])


@BOTH
def test_a_wrong_length_stops_whatever_the_bound(worker):
    with pytest.raises(RewardError, match="reward 'mine' returned 1 values for 2 samples"):
        rewarded(mix(lambda prompts, completions, **columns: [1.0], worker), ["good", "good"], 1.0)


def test_a_failed_sample_has_no_advantage_and_is_in_no_baseline():
    mixed = rewarded(mix(picky), ["good", "bad", "raises", "good", "bad", "bad"], 0.5)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert advantages(mixed.total, groups, "dr_grpo").tolist() == pytest.approx([0.5, -0.5, 0, 2 / 3, -1 / 3, -1 / 3])
    assert relations(mixed, 3)["rewards/mine/share"] == pytest.approx(1)


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


def test_what_needs_this_process_says_which_setting_keeps_it_here():
    with pytest.raises(RewardError, match="cannot go to another process .*set reward_worker: false"):
        mix(picky)([""], [""], [{"kind": "good", "own": lambda: 0}])

    def on_cuda(prompts, completions, **columns):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    with pytest.raises(RewardError, match="CUDA in forked subprocess.; set reward_worker: false"):
        rewarded(mix(on_cuda), ["good"])


def test_a_worker_ends_with_its_process_even_in_a_loop(tmp_path):
    code = f"""
import os, sys, threading, time
sys.path[:0] = {[*filter(None, sys.path)]!r}
from cosmo_fast.rewards import RewardMix
def spins(prompts, completions, **columns):
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    while columns:
        pass
    return [1.0]
mix = RewardMix({{"*": {{"mine": 1}}}}, format_weight=0, rewards={{"mine": spins}}, worker=True)
print(mix([""], [""], [{{}}]).total.tolist(), flush=True)
if sys.argv[1] == "killed":
    threading.Timer(1, os._exit, [0]).start()
    mix([""], [""], [{{"x": 1}}])
"""
    for how in ("ends", "killed"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120)
        assert done.stdout == "[1.0]\n" and done.returncode == 0, done.stderr
        pid, patience = int((tmp_path / "pid").read_text()), time.monotonic() + 20
        while running(pid) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not running(pid), how


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
