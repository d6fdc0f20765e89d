"""The training loop: stages in order, steps in a stage, and what happens between them."""
