"""Files of the Elixir library lorax, read into PEFT's format.

``etf`` reads Erlang's terms, ``nx`` tensors from them, ``layers`` says whose they are in the base.
Files come from anywhere: whatever is in them, what is raised is ``TrainingError``.
"""
