"""The `sailplan` command: one file per group of subcommands."""
