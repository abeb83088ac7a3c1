"""Hugging Face vision-language models behind one packed forward."""

from cosmo_fast.models.policy import Policy, load_policy

__all__ = ["Policy", "load_policy"]
