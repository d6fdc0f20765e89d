"""How good the embeddings are: exact retrieval and similarity metrics, computed by all ranks
together.
"""
