"""Plain numpy and torch float32: the truth the fast kernels are compared with."""
