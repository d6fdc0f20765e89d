"""The omni-modal encoder: frames, sound and text in, one vector out; and how it is spread over
ranks.
"""
