"""The "safety aha": where along a response the hidden states tell most about a safe reference.

Published (SafeWork-R1; the estimator's code is that of arXiv 2506.02867): mutual information between the hidden state
at a token and the last hidden state of the reference read on its own, by an HSIC with a Gaussian kernel of σ = 50 whose
squared width is 2σ²·d; it peaks at few tokens. Ours: that code takes the d numbers of two vectors for its samples,
here the samples are the rows, position by position, so that there is a null to test against; the unbiased estimator,
because fewer rows reach the later positions and a bias of O(1/n) would look like information; and what a peak is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmo_fast.analysis.answers import harmful, safe_answer
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import Row
from cosmo_fast.evaluate.attacks import _SAFE, _verdicts
from cosmo_fast.models import Policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Prompt
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.packed import Group, passes

SIGMA, PERMUTATIONS, MIN_ROWS = 50.0, 200, 8
ALPHA = 0.05  # of the null that holds over all positions


def hsic(x: Tensor, y: Tensor, *, sigma: float = SIGMA) -> float:
    """Unbiased HSIC (Song et al., JMLR 13, 2012, eq. 5) of the paired rows of ``x`` (n, d) and ``y`` (n, e), in fp64.

    0 on average where they are independent, so also negative. ValueError for n < 4.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"hsic: {len(x)} and {len(y)} rows, want the same number and at least 4")
    return float(_hsic(_kernel(x, sigma), _kernel(y, sigma)))


def information(
    states: Sequence[Tensor], references: Tensor, *, sigma: float = SIGMA, permutations: int = PERMUTATIONS,
    seed: int = 0, min_rows: int = MIN_ROWS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """HSIC of n responses' hidden states (R_i, d) with their references (n, e), at every position t.

    Positions count that at least ``min_rows`` responses reach; T of them. The null permutes the references among the
    responses that reach t, ``permutations`` times, the same orders at every t.

    Returns:
        n, hsic, z ((hsic − mean of the null) / its std) and p of each position (T,); p_family (T,): against the null's
        largest z over all positions, for peaks are searched everywhere; rows (n, T): what each response adds, n·(HSIC −
        HSIC without it) in the null's std, NaN after its end.

    Raises:
        ValueError: fewer responses than ``min_rows``, or ``min_rows`` < 5.
    """
    lengths = np.array([len(s) for s in states])
    if not 5 <= min_rows <= len(states) or len(states) != len(references):
        raise ValueError(f"{len(states)} responses, {len(references)} references: want the same, >= {min_rows=} >= 5")
    steps = int(np.sort(lengths)[-min_rows])
    keys, whole = np.random.default_rng(seed).random((permutations, len(states))), _kernel(references, sigma)
    found, null, rows = np.zeros(steps), np.zeros((steps, permutations)), np.full((len(states), steps), np.nan)
    for t in range(steps):
        at = np.flatnonzero(lengths > t)
        k, y = _kernel(torch.stack([states[i][t] for i in at]), sigma), whole[at][:, at]
        found[t] = _hsic(k, y)
        null[t] = [_hsic(k, y[order][:, order]) for order in torch.from_numpy(keys[:, at].argsort(1))]
        rows[at, t] = len(at) * _added(k, y).numpy()
    mean, std = null.mean(1), null.std(1)
    std[std == 0] = np.inf  # all states or all references are the same
    z, highest = (found - mean) / std, ((null - mean[:, None]) / std[:, None]).max(0)
    p, family = ((1 + (a >= b[:, None]).sum(1)) / (1 + permutations) for a, b in ((null, found), (highest, z)))
    counts = (lengths[:, None] > np.arange(steps)).sum(0)
    return {"n": counts, "hsic": found, "z": z, "p": p, "p_family": family, "rows": rows / std}


def peaks(
    policy: Policy, rows: list[Row], params: SamplingParams, *, seed: int = 0, vision_prune: VisionPrune | None = None,
    max_tokens: int = 16384, **bounds: int,
) -> dict[str, Any]:  # fmt: skip
    """:func:`information` of the policy's responses to harmful rows about their safe answers, and its peaks, as JSON.

    States are those of the last layer, after its norm, at the token itself; a reference is read alone, without its
    prompt, up to the end token: with it, every token that knows the prompt would be informative.

    positions: of each the token that stands there most often. A peak is above Q3 + 1.5·(Q3 − Q1) of all z, with
    p_family <= 0.05. responses: of each its verdict and the peaks of what it adds, by the same fences over its own
    tokens, z = (value − mean)/std of them. tokens: text, how often it is such a peak, how often it is there.

    Raises:
        ValueError: no harmful row, too few, or one without a safe answer.
    """
    chosen, tokenizer = harmful(rows), policy.tokenizer
    encoder, vision = Encoder(policy, vision_prune=vision_prune), Vision(policy)
    prompts, references = [encoder.prompt(row) for row in chosen], []
    for row in chosen:
        answer = tokenizer(safe_answer(row), add_special_tokens=False)["input_ids"]
        references.append(np.array([*answer, tokenizer.eos_token_id], dtype=np.int64))
    alone = Prompt(np.array([tokenizer.eos_token_id]), (), {}, "", "safe answer")
    sampled = [g[0] for g in Sampler(policy, vision, **bounds).generate(prompts, params, seed=seed)]
    prompts = [p.reuse(c.kept) for p, c in zip(prompts, sampled, strict=True)]
    states = _states(policy, vision, prompts, [c.ids for c in sampled], max_tokens)
    ends = [s[-1] for s in _states(policy, vision, [alone] * len(chosen), references, max_tokens)]
    measured = information(states, torch.stack(ends), seed=seed)
    verdicts = _verdicts([r.columns for r in chosen], tokenizer.batch_decode([c.ids for c in sampled], True))
    words, tops, responses = [[tokenizer.decode([i]) for i in c.ids] for c in sampled], Counter(), []
    for row, said, verdict, added in zip(chosen, words, verdicts, measured.pop("rows"), strict=True):
        own = added[: len(said)]
        z = (own - own.mean()) / (own.std() or 1)
        found = [{"position": int(t), "token": said[t], "z": float(z[t])} for t in np.flatnonzero(_high(own))]
        responses.append({"source": row.source, "verdict": verdict, "tokens": said, "peaks": found})
        tops.update(peak["token"] for peak in found)
    there = Counter(word for said in words for word in said[: len(measured["z"])])
    most = [Counter(w[t] for w in words if len(w) > t).most_common(1)[0][0] for t in range(len(measured["z"]))]
    positions = [
        {"position": t, "token": word} | {k: v[t].item() for k, v in measured.items()} for t, word in enumerate(most)
    ]
    for position, high in zip(positions, _high(measured["z"]), strict=True):
        position["peak"] = bool(high and position["p_family"] <= ALPHA)
    tokens = [{"token": word, "peaks": count, "n": there[word]} for word, count in tops.most_common()]
    share = sum(tops.values()) / sum(there.values())
    about = {"n": len(chosen), "safe_rate": sum(v in _SAFE for v in verdicts) / len(chosen), "peak_share": share}
    settings = {"sigma": SIGMA, "permutations": PERMUTATIONS, "min_rows": MIN_ROWS, "seed": seed}
    return about | settings | {"tokens": tokens, "positions": positions, "responses": responses}


def plot_peaks(report: dict[str, Any], path: str | os.PathLike) -> Path:
    """Draws z over the positions, with the token most often found at each peak; returns the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axis, tops = figure.subplots(), [p for p in report["positions"] if p["peak"]]
    axis.plot([p["position"] for p in report["positions"]], [p["z"] for p in report["positions"]], color="#0072B2")
    axis.plot([p["position"] for p in tops], [p["z"] for p in tops], "o", color="#D55E00")
    for p in tops:
        axis.annotate(repr(p["token"]), (p["position"], p["z"]), (3, 3), textcoords="offset points", fontsize=8)
    axis.set_xlabel("token of the response")
    axis.set_ylabel("HSIC with the safe reference (z over its null)", fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path)
    return Path(path)


def _kernel(states: Tensor, sigma: float) -> Tensor:
    """exp(−|a − b|²/(2σ²d)) − 1, (n, d) -> (n, n) fp64, 0 on the diagonal.

    The constant changes no unbiased HSIC; without it a wide kernel keeps its digits.
    """
    states = states.double()
    squares = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.expm1(-squares / (2 * sigma**2 * states.shape[1]))


def _unbiased(both, k, y, cross, n: int):
    """From Σ K∘L, Σ K, Σ L and 1ᵀKL1 of matrices (n, n) without a diagonal."""
    return (both + k * y / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def _hsic(k: Tensor, y: Tensor) -> Tensor:
    return _unbiased((k * y).sum(), k.sum(), y.sum(), k.sum(0) @ y.sum(0), len(k))


def _added(k: Tensor, y: Tensor) -> Tensor:
    """HSIC less that without row i, (n,): every sum over pairs loses those with i."""
    rows_k, rows_y, both = k.sum(0), y.sum(0), (k * y).sum(0)
    cross = rows_k @ rows_y - rows_k * rows_y - k @ rows_y - y @ rows_k + both
    sums = (both.sum() - 2 * both, rows_k.sum() - 2 * rows_k, rows_y.sum() - 2 * rows_y)
    return _hsic(k, y) - _unbiased(*sums, cross, len(k) - 1)


def _high(values: np.ndarray) -> np.ndarray:
    """Tukey's upper fence."""
    low, high = np.quantile(values, [0.25, 0.75])
    return values > high + 1.5 * (high - low)


@torch.no_grad()
def _states(policy: Policy, vision: Vision, prompts: list[Prompt], responses: list, max_tokens: int) -> list[Tensor]:
    """Last hidden states (R, d) at the tokens of one response a prompt, fp32 on the CPU."""
    # A pass gives the states that predict tokens: those at a response's tokens predict the next, the last any.
    groups = [Group(p, [np.append(r, r[-1])], weights=[]) for p, r in zip(prompts, responses, strict=True)]
    states: list[Any] = [None] * len(groups)
    for work in passes(policy, vision, groups, max_tokens):
        pieces = work.hidden.float().cpu().split(work.plan.response_lengths.tolist())
        for i, piece in zip(work.indices, pieces, strict=True):
            states[i] = piece[1:]
    return states
