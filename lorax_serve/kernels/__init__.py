"""Compiled CPU kernels: built once per machine, loaded into the process, called through ctypes.

They know pointers and sizes; no model, no requests. ``lorax_serve.model`` has the torch reference
of each behind the same call.
"""
