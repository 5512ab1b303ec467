"""The arithmetic: references, and the fast paths that must equal them.

Import modules by name: nothing is loaded here, so that a duck never loads torch.
"""
