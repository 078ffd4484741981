"""What Headgate costs and how well it predicts, measured. `python -m benchmarks` runs everything and prints a table."""
