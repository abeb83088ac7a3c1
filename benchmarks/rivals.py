"""One problem a case and everybody's answer to it: cosmo_fast, eager PyTorch, torch.compile, and the other packages.

FORMS[case][provider] makes, from a problem, the function that is timed; its results are compared with `truth`. A
provider may have several forms, "eager" and "eager (logsumexp)": the faster one counts.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmo_fast.objectives import TokenBatch, advantages, grpo
from cosmo_fast.ops import linear_logprobs, linear_policy_loss
from cosmo_fast.ops.grpo_loss import grpo_loss
from cosmo_fast.ops.linear_kl import linear_kl

PACKAGES = {"liger": "liger_kernel", "liger_one_chunk": "liger_kernel", "trl": "trl", "cce": "cut_cross_entropy"}
PLAIN = ("torch_lce", "cce")  # they know the plain likelihood only, which is the same matrix work as `full`
EPSILON, SEQUENCES, RAGGED = 0.2, 8, (3, 5, 2, 6)  # eight equal sequences; or 16 ragged ones in four ragged groups
GROUPS, GROUP_SIZES = 100_000, (2, 15)  # case `advantage`: groups of 2 to 14 responses, 8 on average
ADVANTAGE_EPSILON = 1e-4  # TRL's, beside the standard deviation
TRUTH_ROWS = 512


class Problem:
    """Random states (N, d), a head (V, d), an old policy a few percent away: some tokens are clipped.

    half_zero: every second sequence has advantage zero. kl: a reference of its own, a few percent away.
    """

    def __init__(self, n: int, d: int, v: int, dtype: torch.dtype, device: str, case: str, seed: int = 0):
        if n % SEQUENCES or n <= sum(RAGGED):
            raise ValueError(f"N = {n} must be a multiple of {SEQUENCES} (sequences) above {sum(RAGGED)}")
        g = torch.Generator(device).manual_seed(seed)
        self.case, self.random = case, {"generator": g, "device": device}
        self.hidden = torch.randn(n, d, **self.random).to(dtype).requires_grad_()
        self.weight = (torch.randn(v, d, **self.random) / d**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(0, v, (n,), **self.random)
        if case == "grpo":
            cuts = torch.randperm(n - 1, **self.random)[: sum(RAGGED) - 1].sort().values + 1
            self.lengths = torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_full((1,), n))
            sizes = torch.tensor(RAGGED, device=device)
        else:
            self.lengths = torch.full((SEQUENCES,), n // SEQUENCES, device=device)
            sizes = torch.randint(*GROUP_SIZES, (GROUPS,), **self.random) if case == "advantage" else None
        if sizes is None:
            self.sequence_advantage = torch.randn(SEQUENCES, **self.random)
        else:
            self.groups = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
            self.rewards = torch.rand(len(self.groups), **self.random)
            self.sequence_advantage = eager_advantages(self.rewards.double(), self.groups)
        if case == "half_zero":
            self.sequence_advantage[::2] = 0.0
        if case == "kl":
            self.ref_hidden = (self.hidden + 0.1 * torch.randn(n, d, **self.random)).detach().to(dtype)
            self.ref_weight = self.weight.detach().clone()
        self._add_old_policy(n)

    def _add_old_policy(self, n: int) -> None:
        sequence = torch.arange(len(self.lengths), device=self.targets.device).repeat_interleave(self.lengths)
        self.advantage = self.sequence_advantage[: len(self.lengths)][sequence]
        with torch.no_grad():
            parts = zip(self.hidden.split(TRUTH_ROWS), self.targets.split(TRUTH_ROWS), strict=True)
            logp = torch.cat([softmax_logp(h, self.weight, t) for h, t in parts])
        self.old_logp = logp + 0.05 * torch.randn(n, **self.random)
        self.token_weight = torch.full((n,), 1 / n, device=self.targets.device)
        self.batch = TokenBatch(self.targets, self.token_weight, sequence, self.advantage, self.old_logp)
        # Rows whose coefficient is not zero: all that the two gradient products need.
        ratio = (logp - self.old_logp).exp()
        high, low = (ratio > 1 + EPSILON) & (self.advantage > 0), (ratio < 1 - EPSILON) & (self.advantage < 0)
        self.active = n if self.case == "kl" else int(((self.advantage != 0) & ~high & ~low).sum())

    def loss(self, logp: Tensor, where: slice = slice(None), advantage: Tensor | None = None) -> Tensor:
        """GRPO's token mean, the share of the rows at `where`, on their log-probabilities."""
        a = (self.advantage[where] if advantage is None else advantage).to(logp.dtype)
        ratio = (logp - self.old_logp[where].to(logp.dtype)).exp()
        return -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).sum() / len(self.targets)

    def backward(self, loss):
        """The function that runs `loss()` and its backward; it returns the gradients and lets go of them."""

        def run() -> tuple[Tensor, Tensor]:
            loss().backward()
            gradients = self.hidden.grad, self.weight.grad
            self.hidden.grad = self.weight.grad = None
            return gradients

        return run


# --- eager PyTorch ---


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def softmax_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities as most trainers write them."""
    return _wide(hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _logsumexp_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = _wide(hidden @ weight.t())
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def softmax_logp_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies."""
    logp = _wide(hidden @ weight.t()).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _logsumexp_logp_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = _wide(hidden @ weight.t())
    lse = logits.logsumexp(-1)
    entropy = lse - ((logits - lse[:, None]).exp() * logits).sum(-1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, entropy


def reverse_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(policy ‖ reference) of every row."""
    logp, logq = (_wide(h @ w.t()).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    return (logp.exp() * (logp - logq)).sum(-1)


def _kl_div(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    logp, logq = (_wide(h @ w.t()).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def eager_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(R − mean) / (std + ε) as TRL has it, for groups of unequal size numbered from 0."""
    count = torch.bincount(groups).to(rewards.dtype)
    centred = rewards - (torch.zeros_like(count).index_add(0, groups, rewards) / count)[groups]
    variance = torch.zeros_like(count).index_add(0, groups, centred.square()) / (count - 1)
    return centred / (variance.sqrt()[groups] + ADVANTAGE_EPSILON)


def _policy(function):
    return lambda p: p.backward(lambda: p.loss(function(p.hidden, p.weight, p.targets)))


def _rewards_to_gradients(function):
    def make(p: Problem):
        def loss() -> Tensor:
            advantage = eager_advantages(p.rewards, p.groups).repeat_interleave(p.lengths)
            return p.loss(function(p.hidden, p.weight, p.targets), advantage=advantage)

        return p.backward(loss)

    return make


def _scores(function):
    return lambda p: torch.no_grad()(lambda: function(p.hidden, p.weight, p.targets))


def _divergence(function):
    return lambda p: p.backward(lambda: function(p.hidden, p.weight, p.ref_hidden, p.ref_weight).mean())


def _compiled(form, function):
    return lambda p: form(torch.compile(function, dynamic=False))(p)


# --- ours ---


def _policy_ours(p: Problem):
    return p.backward(lambda: linear_policy_loss(p.hidden, p.weight, p.batch, grpo(EPSILON)).loss)


def _grpo_ours(p: Problem):
    arguments = p.hidden, p.weight, p.targets, p.rewards, p.groups, p.lengths
    options = {"epsilon": EPSILON, "aggregation": "token-mean", "old_logp": p.old_logp}
    return p.backward(lambda: grpo_loss(*arguments, **options).loss)


def _divergence_ours(p: Problem):
    arguments = (p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.token_weight, "reverse")
    return p.backward(lambda: linear_kl(*arguments)[0])


# --- other packages ---


def _liger(chunk_size: int):
    def make(p: Problem):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "chunk_size": chunk_size}
        loss = LigerFusedLinearGRPOLoss(epsilon_low=EPSILON, epsilon_high=EPSILON, **options)
        shape = (SEQUENCES, len(p.targets) // SEQUENCES)
        targets, old, mask = p.targets.view(shape), p.old_logp.view(shape), torch.ones(shape, device=p.targets.device)
        arguments = (p.weight, targets, mask, p.sequence_advantage)
        return p.backward(lambda: loss(p.hidden.view(*shape, -1), *arguments, old_per_token_logps=old)[0])

    return make


def _liger_kl(p: Problem):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)  # β = 1: KL(student ‖ teacher)
    return p.backward(lambda: loss(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.targets))


def _trl_logp(p: Problem, outputs: tuple[str, ...]) -> tuple:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    return ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.targets, 1.0, tile, None, 1.0, outputs)


def _torch_lce(options):
    def make(p: Problem):
        return p.backward(lambda: F.linear_cross_entropy(p.hidden, p.weight, p.targets, options=options and options()))

    return make


def _cce(p: Problem):
    from cut_cross_entropy import linear_cross_entropy

    return p.backward(lambda: linear_cross_entropy(p.hidden, p.weight, p.targets, impl="cce"))


_EAGER = {"eager": _policy(softmax_logp), "eager (logsumexp)": _policy(_logsumexp_logp)}
_POLICY = {
    "cosmo_fast": _policy_ours,
    **_EAGER,
    "compile": _compiled(_policy, softmax_logp),
    "liger": _liger(1),  # its default, one sequence a chunk
    "liger_one_chunk": _liger(SEQUENCES),
    "trl": lambda p: p.backward(lambda: p.loss(_trl_logp(p, ())[0])),
}
FORMS = {
    "full": {
        **_POLICY,
        "torch_lce": _torch_lce(None),
        "torch_lce (chunked)": _torch_lce(getattr(torch.nn, "LinearCrossEntropyOptions", None)),
        "cce": _cce,
    },
    "half_zero": _POLICY,
    "grpo": {
        "cosmo_fast": _grpo_ours,
        "eager": _rewards_to_gradients(softmax_logp),
        "eager (logsumexp)": _rewards_to_gradients(_logsumexp_logp),
    },
    "advantage": {
        "cosmo_fast": lambda p: lambda: (advantages(p.rewards, p.groups, "group", epsilon=ADVANTAGE_EPSILON),),
        "eager": lambda p: lambda: (eager_advantages(p.rewards, p.groups),),
    },
    "logprobs": {
        "cosmo_fast": _scores(linear_logprobs),
        "eager": _scores(softmax_logp_entropy),
        "eager (logsumexp)": _scores(_logsumexp_logp_entropy),
        "compile": _compiled(_scores, softmax_logp_entropy),
        "trl": lambda p: torch.no_grad()(lambda: _trl_logp(p, ("entropy",))[:2]),
    },
    "kl": {
        "cosmo_fast": _divergence_ours,
        "eager": _divergence(reverse_kl),
        "eager (kl_div)": _divergence(_kl_div),
        "compile": _compiled(_divergence, reverse_kl),
        "liger": _liger_kl,
    },
}
CASES = tuple(FORMS)
PROVIDERS = tuple(dict.fromkeys(name.split(" (")[0] for forms in FORMS.values() for name in forms))


def unavailable(provider: str, device: str) -> str | None:
    """Why a provider cannot run on this device here; None if it can."""
    package = PACKAGES.get(provider)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install -r requirements-bench.txt)"
    if provider == "cce" and device != "cuda":
        return f"its kernels need CUDA; on {device} it is torch.compile of F.cross_entropy, not cut cross-entropy"
    if provider == "torch_lce" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


# --- floors and truth ---


def yardsticks(p: Problem) -> dict:
    """The bare matrix products of a case: with fresh outputs, as autograd makes them, and with outputs that exist.

    `grpo` and `advantage` have also `full`: our policy loss on the same tokens, with the advantages given.
    """
    hidden, weight, active = p.hidden.detach(), p.weight.detach(), slice(p.active)
    heads = [(hidden, weight), *([(p.ref_hidden, p.ref_weight)] if p.case == "kl" else [])]

    def fresh():
        logits = [h @ w.t() for h, w in heads][0]
        return None if p.case == "logprobs" else (logits[active] @ weight, logits[active].t() @ hidden[active])

    kept = [hidden.new_empty(len(hidden), len(weight)) for _ in heads]
    dx, dw = torch.empty_like(hidden[active]), torch.empty_like(weight)

    def reused():
        for (h, w), out in zip(heads, kept, strict=True):
            torch.mm(h, w.t(), out=out)
        if p.case != "logprobs":
            torch.mm(kept[0][active], weight, out=dx)
            torch.mm(kept[0][active].t(), hidden[active], out=dw)

    full = {"full": _policy_ours(p)} if p.case in ("grpo", "advantage") else {}
    return {"floor": fresh, "floor_reused": reused, **full}


def truth(p: Problem, plain: bool = False) -> tuple[Tensor, ...]:
    """What the case's functions should return, in fp64, a few rows at a time. plain: for the plain likelihood."""
    if p.case == "advantage":
        return (eager_advantages(p.rewards.double(), p.groups),)
    parts, weight = [], p.weight.detach().double().requires_grad_()
    for start in range(0, len(p.targets), TRUTH_ROWS):
        where = slice(start, start + TRUTH_ROWS)
        hidden = p.hidden[where].detach().double().requires_grad_()
        if p.case == "logprobs":
            with torch.no_grad():
                parts.append(softmax_logp_entropy(hidden, weight, p.targets[where]))
            continue
        if p.case == "kl":
            reference = (p.ref_hidden[where].double(), p.ref_weight.double())
            loss = reverse_kl(hidden, weight, *reference).sum() / len(p.targets)
        else:
            logp = softmax_logp(hidden, weight, p.targets[where])
            loss = -logp.sum() / len(p.targets) if plain else p.loss(logp, where)
        loss.backward()
        parts.append((hidden.grad,))
    found = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return found if p.case == "logprobs" else (*found, weight.grad)
