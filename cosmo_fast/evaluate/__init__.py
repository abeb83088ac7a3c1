"""Paired metrics of a set of completions."""

from cosmo_fast.evaluate.metrics import best_constant, rates, score, wilson

__all__ = ["best_constant", "rates", "score", "wilson"]
