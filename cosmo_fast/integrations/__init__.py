"""Drop-ins for other libraries, on the three-GEMM loss. TRL is imported only once a name that needs it is asked for."""

from importlib import import_module

_HOMES = {"LigerFusedLinearGRPOLoss": "liger", "CosmoFastGRPOMixin": "trl", "CosmoFastGRPOTrainer": "trl"}
__all__ = ["CosmoFastGRPOMixin", "CosmoFastGRPOTrainer", "LigerFusedLinearGRPOLoss"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
