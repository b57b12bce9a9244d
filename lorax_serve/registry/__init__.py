"""The adapters of a server: their names and versions, where they come from, and their end.

Knows sources, the store and what the engine can do with adapters; knows neither gRPC, nor text, nor
any model code.
"""
