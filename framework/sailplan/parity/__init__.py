"""Proofs that every layout takes the step of one process: the matrices behind docs/parity.md and
`sailplan check parity`.
"""
