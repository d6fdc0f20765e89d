"""One training step: the gradient cache, the guards before the optimizer, and the optimizer's
groups.
"""
