"""Long measurements, each a script that prints a table and writes JSON and a picture into `benchmarks/results/`."""
