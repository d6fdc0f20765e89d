"""Embedding with one state of a model, and exact search over vectors: what curriculum,
evaluation and export share.
"""
