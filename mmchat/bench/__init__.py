"""Time a loaded model as a person uses it: prompts, pictures and the tokens after them.

The comparison with other programs is in `benchmarks/`, beside the package.
"""
