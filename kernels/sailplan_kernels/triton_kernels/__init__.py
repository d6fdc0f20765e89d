"""Triton kernels; imported only where the triton backend is asked for."""
