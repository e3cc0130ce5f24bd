"""What is slow upstream, one file per kernel: each proves itself against Keras's own before it is used."""
