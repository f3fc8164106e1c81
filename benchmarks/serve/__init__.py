"""How `mmchat serve` bears load and faults: `python -m benchmarks.serve`."""
