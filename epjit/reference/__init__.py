"""What the operations mean, in torch on the CPU, and the backend that runs without a GPU.

`epjit.reference.intranode` is the oracle: it sees the inputs of all ranks at once and says what
each rank must get, bit for bit. `epjit.reference.cpu_backend` is one rank's view of the same.
"""
