"""Losses over encoded views: one file a loss, chosen by `_target_` in conf/objective; see
`protocol` for the contract.
"""
