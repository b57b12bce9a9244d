"""The frozen base and what is trained in it: layers, their arithmetic, how the base is kept."""
