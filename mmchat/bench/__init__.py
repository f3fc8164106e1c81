"""Measure speed and memory, side by side with a reference, after checking that both say the same.

shapes.py makes a model of true widths with random weights; contestants.py and
transformers_mllama.py are what is measured; workloads.py runs and compares them in rounds;
fresh.py measures whole processes; run.py puts a report together.
"""
