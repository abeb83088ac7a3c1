"""The "safety aha": where along a response the hidden states tell most about a safe reference.

Published (SafeWork-R1; the estimator's code is that of arXiv 2506.02867): mutual information between the hidden state
at a token and the last hidden state of the reference read on its own, by an HSIC with a Gaussian kernel of σ = 50 whose
squared width is 2σ²·d; it peaks at few tokens. Ours: that code takes the d numbers of two vectors for its samples,
here the samples are the rows, position by position, so that there is a null to test against; the unbiased estimator,
because fewer rows reach the later positions and a bias of O(1/n) would look like information; and what a peak is.
"""

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
from cosmo_fast.evaluate.metrics import score
from cosmo_fast.evaluate.run import judged_columns
from cosmo_fast.models import Policy
from cosmo_fast.plan import Prompt
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.packed import Group, passes
from cosmo_fast.verifiers.engine import Verifiers

SIGMA, PERMUTATIONS, MIN_ROWS = 50.0, 200, 8
ALPHA = 0.05  # of the null that holds over all positions


def hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC (Song et al., JMLR 13, 2012, eq. 5) of the paired rows of ``x`` (n, d) and ``y`` (n, e), in fp64.

    0 on average where they are independent, so also negative. ValueError for n < 4.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"hsic: {len(x)} and {len(y)} rows, want the same number and at least 4")
    return float(_hsic(_kernel(x), _kernel(y)))


def information(states: Sequence[Tensor], references: Tensor, *, seed: int = 0) -> dict[str, np.ndarray]:
    """HSIC of N responses' hidden states (R_i, d) with their references (N, e), at T positions t.

    Positions count that MIN_ROWS responses reach. The null permutes the references among those that reach t,
    PERMUTATIONS times, in the same orders at every t.

    Returns:
        n, hsic, z ((hsic − the null's mean)/its std), p (T,); p_family (T,): against the null's largest z of all
        positions, for peaks are searched everywhere; own (N, T): the response's part, n·HSIC − (n − 1)·(HSIC without
        it), less its own null's mean, in its own null's std; own_p_family (N, T): against its null's largest part of
        all its positions. NaN after its end.

    Raises:
        ValueError: fewer than MIN_ROWS responses, or not as many references.
    """
    lengths = np.array([len(s) for s in states])
    if len(states) < MIN_ROWS or len(states) != len(references):
        raise ValueError(f"{len(states)} responses, {len(references)} references: want the same, at least {MIN_ROWS}")
    steps = int(np.sort(lengths)[-MIN_ROWS])
    keys, whole = np.random.default_rng(seed).random((PERMUTATIONS, len(states))), _kernel(references)
    found, null = np.zeros(steps), np.zeros((steps, PERMUTATIONS))
    own, own_highest = np.full((len(states), steps), np.nan), np.full((len(states), PERMUTATIONS), -np.inf)
    for t in range(steps):
        at = np.flatnonzero(lengths > t)
        k, y = _kernel(torch.stack([states[i][t] for i in at])), whole[at][:, at]
        found[t] = _hsic(k, y)
        orders = torch.from_numpy(keys[:, at].argsort(1))
        parts = torch.stack([_own(k, y[order][:, order]) for order in orders], 1).numpy()
        null[t] = parts.mean(0)  # that of the parts is the whole
        about, scale = parts.mean(1), parts.std(1)
        scale[scale == 0] = np.inf
        own[at, t] = (_own(k, y).numpy() - about) / scale
        own_highest[at] = np.maximum(own_highest[at], (parts - about[:, None]) / scale[:, None])
    mean, std = null.mean(1), null.std(1)
    std[std == 0] = np.inf  # all states or all references are the same
    z, highest = (found - mean) / std, ((null - mean[:, None]) / std[:, None]).max(0)
    p, family = ((1 + (a >= b[:, None]).sum(1)) / (1 + PERMUTATIONS) for a, b in ((null, found), (highest, z)))
    n = (lengths[:, None] > np.arange(steps)).sum(0)
    own_family = np.stack([(1 + (own_highest >= part[:, None]).sum(1)) / (1 + PERMUTATIONS) for part in own.T], 1)
    result = {"n": n, "hsic": found, "z": z, "p": p, "p_family": family, "own": own}
    return result | {"own_p_family": np.where(np.isnan(own), np.nan, own_family)}


def peaks(
    policy: Policy, sampler: Sampler, rows: list[Row], params: SamplingParams, *, seed: int = 0,
    vision_prune: VisionPrune | None = None, verifiers: Verifiers | None = None,
) -> dict[str, Any]:  # fmt: skip
    """:func:`information` of the policy's responses to harmful rows about their safe answers, and its peaks, as JSON.

    States are the last layer's, after its norm, at the token itself; a reference is read without its prompt, up to the
    end token: with it every token that knows the prompt would be informative. positions: each with the token that
    stands there most often; a peak has a z above Q3 + 1.5·(Q3 − Q1) of all and p_family <= ALPHA. responses: each
    one's peaks by the same rule over its own parts and own_p_family, so that at most a share ALPHA of the responses
    has one by chance. tokens: how often a text is such a peak, and how often it is there.

    Raises:
        ValueError: no harmful row, too few, or one without a safe answer.
    """
    chosen, tokenizer, encoder = harmful(rows), policy.tokenizer, Encoder(policy, vision_prune=vision_prune)
    answers = tokenizer([safe_answer(row) for row in chosen], add_special_tokens=False)["input_ids"]
    alone = Prompt(np.array([tokenizer.eos_token_id]), (), {}, "", "safe answer")
    drawn = [g[0] for g in sampler.generate([encoder.prompt(row) for row in chosen], params, seed=seed)]
    prompts = [encoder.prompt(row).reuse(c.kept) for row, c in zip(chosen, drawn, strict=True)]
    ends = _states(sampler, [alone] * len(chosen), [np.array([*ids, tokenizer.eos_token_id]) for ids in answers])
    measured = information(
        _states(sampler, prompts, [c.ids for c in drawn]), torch.stack([s[-1] for s in ends]), seed=seed
    )
    parts, width, families = measured.pop("own"), len(measured["z"]), measured.pop("own_p_family")
    words, tops, responses = [[tokenizer.decode([i]) for i in c.ids] for c in drawn], Counter(), []
    for row, said, values, p in zip(chosen, words, parts, families, strict=True):
        z = values[: len(said)]
        high = np.flatnonzero(_high(z) & (p[: len(said)] <= ALPHA))
        found = [{"position": int(t), "token": said[t], "z": z[t], "p_family": p[t]} for t in high]
        responses.append({"source": row.source, "tokens": said, "peaks": found})
        tops.update(peak["token"] for peak in found)
    there = Counter(word for said in words for word in said[:width])
    positions = []
    for t, high in enumerate(_high(measured["z"])):
        [(word, _)] = Counter(said[t] for said in words if len(said) > t).most_common(1)
        positions.append({"position": t, "token": word} | {name: values[t] for name, values in measured.items()})
        positions[t]["peak"] = bool(high and measured["p_family"][t] <= ALPHA)
    texts = tokenizer.batch_decode([c.ids for c in drawn], skip_special_tokens=True)
    judged = score(judged_columns(policy, chosen, texts, verifiers)[0], texts)
    about = {"n": len(chosen), "safe_rate": judged["safe_rate"], "peak_share": tops.total() / there.total()}
    tokens = [{"token": word, "peaks": count, "n": there[word]} for word, count in tops.most_common()]
    return about | {"tokens": tokens, "positions": positions, "responses": responses}


def plot_peaks(report: dict[str, Any], path: Path) -> None:
    """Draws z over the positions, with the token most often found at each peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.plot([p["position"] for p in report["positions"]], [p["z"] for p in report["positions"]], color="#0072B2")
    for p in report["positions"]:
        if p["peak"]:
            axis.plot(p["position"], p["z"], "o", color="#D55E00")
            axis.annotate(p["token"], (p["position"], p["z"]), (4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="token of the response", ylabel="HSIC with the safe answer (z over its null)")
    figure.savefig(path)


def _kernel(states: Tensor) -> Tensor:
    """exp(−|a − b|²/(2σ²d)) − 1, (n, d) -> (n, n) fp64, 0 on the diagonal.

    The constant changes no unbiased HSIC; without it a wide kernel keeps its digits.
    """
    states = states.double()
    squares = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.expm1(-squares / (2 * SIGMA**2 * states.shape[1]))


def _unbiased(both, k, y, cross, n: int):
    """From Σ K∘L, Σ K, Σ L and 1ᵀKL1 of matrices (n, n) without a diagonal."""
    return (both + k * y / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def _hsic(k: Tensor, y: Tensor) -> Tensor:
    return _unbiased((k * y).sum(), k.sum(), y.sum(), k.sum(0) @ y.sum(0), len(k))


def _own(k: Tensor, y: Tensor) -> Tensor:
    """The jackknife's pseudo-values n·HSIC − (n − 1)·(HSIC without row i), (n,); their mean is HSIC.

    Without row i every sum over pairs loses those with i.
    """
    rows_k, rows_y, both = k.sum(0), y.sum(0), (k * y).sum(0)
    cross = rows_k @ rows_y - rows_k * rows_y - k @ rows_y - y @ rows_k + both
    sums = (both.sum() - 2 * both, rows_k.sum() - 2 * rows_k, rows_y.sum() - 2 * rows_y)
    return len(k) * _hsic(k, y) - (len(k) - 1) * _unbiased(*sums, cross, len(k) - 1)


def _high(values: np.ndarray) -> np.ndarray:
    """Those above Tukey's upper fence."""
    low, high = np.quantile(values, [0.25, 0.75])
    return values > high + 1.5 * (high - low)


@torch.no_grad()
def _states(sampler: Sampler, prompts: list[Prompt], responses: list[np.ndarray]) -> list[Tensor]:
    """Last hidden states (R, d) at the tokens of one response a prompt, fp32 on the CPU."""
    # A pass gives the states that predict tokens: those at a response's tokens predict the next, the last any.
    groups = [Group(p, [np.append(r, r[-1])], weights=[]) for p, r in zip(prompts, responses, strict=True)]
    states: list[Any] = [None] * len(groups)
    for work in passes(sampler.policy, sampler.vision, groups, sampler.max_tokens):
        pieces = work.hidden.float().cpu().split(work.plan.response_lengths.tolist())
        for i, piece in zip(work.indices, pieces, strict=True):
            states[i] = piece[1:]
    return states
