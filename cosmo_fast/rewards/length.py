"""Length and repetition, on the sampled tokens (`completion_ids`, TRL's name, which an `rl` stage hands to rewards)."""

from collections.abc import Sequence

from cosmo_fast.rewards.columns import RewardError


def repetition(
    prompts: Sequence, completions: Sequence[str], completion_ids: Sequence, *, ngram_size: int = 4, **columns
) -> list[float]:
    """R_rep in [−1, 0]: −(1 − distinct n-grams / n-grams) of the tokens; 0 where there are fewer than `ngram_size`.

    As TRL's get_repetition_penalty_reward (arXiv 2502.03373); VTPerception-R1 does not publish its n: 4 is ours.
    """
    if ngram_size < 1:
        raise RewardError(f"ngram_size={ngram_size} must be at least 1")
    rewards = []
    for ids in completion_ids:
        grams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
        rewards.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
    return rewards


def soft_overlong(
    prompts: Sequence,
    completions: Sequence[str],
    completion_ids: Sequence,
    *,
    max_completion_length: int,
    soft_punish_cache: int,
    **columns,
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13; TRL's get_soft_overlong_punishment).

    0 up to max_completion_length − soft_punish_cache tokens, then linear to −1 at max_completion_length, −1 beyond.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise RewardError(f"{soft_punish_cache=} must be above 0 and at most {max_completion_length=}")
    start = max_completion_length - soft_punish_cache
    return [-min(1.0, max(0, len(ids) - start) / soft_punish_cache) for ids in completion_ids]
