"""The model: config, weights, attention, routing.

Import modules by name: nothing is loaded here, so that a duck never loads torch.
"""
