"""Three real replicas behind the gateway on one machine, and proofs of what they promise."""
