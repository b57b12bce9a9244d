"""Adapters in the forms that decoders take, and the device slots that hold them."""
