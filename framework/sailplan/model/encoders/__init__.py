"""Encoders: one file or folder each, registered under its name (sailplan.config.encoders)."""
