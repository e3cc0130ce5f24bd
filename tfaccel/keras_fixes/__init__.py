"""What is wrong upstream: one file per defect, each with the smallest reproduction, a probe and the fix.

A fix is installed only where its probe finds the defect, and removed on leaving `scope()`. Each has a
canary test that fails on the day upstream heals, so that the file can be deleted. Private names of
Keras and TensorFlow appear in this folder and in `fast_kernels/` only.
"""
