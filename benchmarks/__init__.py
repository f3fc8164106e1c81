"""mmchat beside transformers on the same tensors, and the figures that the README gives.

Nothing here is part of the installed package; README.md beside this file has the commands.
"""
