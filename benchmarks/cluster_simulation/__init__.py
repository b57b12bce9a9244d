"""Hundreds of replicas behind a gateway, simulated: how requests should find their adapter.

``routing`` has the policies, ``replica`` one server, ``cluster`` the events between them. What a
step and a load take comes from ``measure``, or of a device that is not at hand from ``roofline``;
``warm`` places adapters before the start. ``validate`` compares all of it with real engines.
"""
