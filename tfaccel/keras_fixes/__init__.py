"""What is wrong upstream: one file per defect, each with the smallest reproduction, a probe and the fix.

Checks and fixes of `compile` are installed on entering `scope()` and removed on leaving it; the others act
inside one call or one `fit`, and the warning filter stays for the process. Each defect has a canary test
that fails on the day upstream heals, so that the file can be deleted. Private names of
Keras and TensorFlow appear in this folder and in `fast_kernels/` only.
"""
