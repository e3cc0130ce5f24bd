"""What is slow upstream: one file per kernel. Empty in this version."""
