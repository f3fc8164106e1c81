"""mmchat beside transformers on the same tensors, and the figures that the docs give.

Nothing here is part of the installed package; README.md beside this file has the commands.
"""
