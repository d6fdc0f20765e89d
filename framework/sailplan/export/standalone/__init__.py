"""Sources of the code inside an exported omni folder: templates that `export.bundle` reads, and
nothing imports.
"""
