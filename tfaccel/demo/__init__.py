"""The main job on real images: plain Keras against accelerated, then a TFLite file with proof.

Both runs train the same network from the same first weights, in this process, on the same images. The
accelerated one differs in what a user could write too: the input pipeline and steps per call that
`Accelerator` chose, and one cycle of the learning rate instead of a constant one.
"""
