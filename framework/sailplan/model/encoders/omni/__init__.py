"""`encoder: omni`: the report's tower, tensor parallel, over megatron-core's blocks
(sailplan.model.tower).
"""

from sailplan.config.encoders import encoder
from sailplan.model.config import ModelConfig

encoder("omni")(ModelConfig)
