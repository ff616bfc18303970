"""The runner of the cuda backend: nothing that a step needs is waited for, neither by the host nor by the device.

The host lays out step n + 1 and launches it while step n runs; tokens that were sampled are fed on the device, and
reach the host by copies on a stream of their own.
"""
