"""What a policy does inside: information peaks, recovery from a forced unsafe step, how rewards relate."""
