"""What `sailplan check` looks at before a long run: hosts, network, folders, GPUs and data."""
