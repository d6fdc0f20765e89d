"""sailplan: distributed training of omni-modal contrastive embedding models."""

__version__ = "0.1.0"
