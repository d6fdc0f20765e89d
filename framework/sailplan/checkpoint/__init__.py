"""Checkpoints that any number of data-parallel and tensor-parallel ranks can write and any other
number can read.
"""
