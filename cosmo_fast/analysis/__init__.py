"""What a trained policy does inside: information peaks, recovery from a forced unsafe step, how its rewards relate."""

from cosmo_fast.analysis.information import hsic, information, peaks, plot_peaks
from cosmo_fast.analysis.recovery import recovery, stage_ends
from cosmo_fast.analysis.rewards import reward_summary

__all__ = ["hsic", "information", "peaks", "plot_peaks", "recovery", "reward_summary", "stage_ends"]
