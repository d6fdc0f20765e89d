"""Published models as parts of the omni encoder: their files' names against ours, and reading
them slice by slice.
"""
