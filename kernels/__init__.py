"""The project's own kernels: each a PyTorch reference, a C++ CPU version and a CUDA version behind one op.

Installed as ``diff2to3.kernels``. Imports nothing of the package but itself and the base of its errors, and only
torch from outside.
"""
