"""Before compile: what the machine is, and what is chosen for it."""
