"""What leaves a run: embeddings, semantic IDs, and one weights file that stands alone."""
