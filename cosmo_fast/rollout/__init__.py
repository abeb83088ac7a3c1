"""Sampling on the forward and the weights that train."""

from cosmo_fast.rollout.draw import SamplingParams
from cosmo_fast.rollout.sampler import Completion, Sampler

__all__ = ["Completion", "Sampler", "SamplingParams"]
