"""What a stage trains on: artifacts, balancing, subsets and hard negatives, made from the
current model at its start.
"""
