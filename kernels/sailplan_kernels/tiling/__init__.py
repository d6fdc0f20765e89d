"""Tiles of scores: the contract with the engines that compute them, products, norms, and the
vectors that they read.

What InfoNCE, the sigmoid loss and the search share; it knows none of them.
"""
