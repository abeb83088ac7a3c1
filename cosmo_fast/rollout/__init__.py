"""Sampling on the forward and the weights that train."""

from cosmo_fast.rollout.sampler import Completion, Sampler, SamplingParams

__all__ = ["Completion", "Sampler", "SamplingParams"]
