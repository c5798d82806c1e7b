"""What the operations mean, in torch on the CPU.

`epjit.reference.intranode` and `epjit.reference.low_latency` are the oracle: they see the inputs of
all ranks at once and say what each rank must get, bit for bit. `epjit.modes.cpu` is one rank's view
of the same.
"""
