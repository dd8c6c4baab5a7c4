"""What every door makes of damaged input: `python -m benchmarks.mutations`."""
