"""`encoder: two_towers`: a published text model beside a published picture model, with a trained
projection behind each.

The towers were never trained together; what joins them is learned here. Frozen towers: a stage's
`trainable` without them.
"""

from sailplan.model.encoders.two_towers.config import TwoTowersConfig

__all__ = ["TwoTowersConfig"]
