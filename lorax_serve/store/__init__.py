"""What a server was told to serve, on disk: adapters by digest, and the catalogue of their names.

``content`` keeps bytes, ``catalog`` keeps names, ``recovery`` brings both into line. Everything
acknowledged survives ``kill -9`` at any instant, a loss of power and a full disk. Plain synchronous
code for worker threads; it knows files, digests and SQLite, and nothing of what adapters are.
"""
