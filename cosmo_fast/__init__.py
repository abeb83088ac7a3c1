"""cosmo_fast: reinforcement learning of safe and capable multimodal reasoning models."""

__version__ = "0.1.0"
