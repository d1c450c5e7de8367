"""What the guard costs, as ratios within one run: `python -m benchmarks`."""
