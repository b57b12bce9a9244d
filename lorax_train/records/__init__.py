"""What a run leaves for people beside the adapter: its log, curves, a page.

Nothing here may end a run, or keep an adapter from being saved.
"""
