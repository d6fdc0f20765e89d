"""`encoder: two_towers`: published models of text, pictures or sound beside each other, two or all
three, with a trained projection behind each.

The towers were never trained together; what joins them is learned here. Frozen towers: a stage's
`trainable` without them.
"""

from sailplan.model.encoders.two_towers.config import TwoTowersConfig

__all__ = ["TwoTowersConfig"]
