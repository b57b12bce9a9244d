"""The engine's process: scheduling, adapter slots and the step loop. Knows no text, no network."""
