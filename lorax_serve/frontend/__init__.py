"""The server process's half of serving: text, and the link to the engine.

Knows asyncio, the tokenizer and the engine's messages; knows neither gRPC nor any model code.
"""
