"""`encoder: transformers`: any published model that transformers' AutoModel opens, with its own
tokenizer and picture processor.

A new family is a YAML file in conf/model, and no code: nothing here names one.
"""

from sailplan.model.encoders.transformers.config import TransformersConfig

__all__ = ["TransformersConfig"]
