"""Typed configuration: the schema, and how Hydra's YAML becomes it."""
