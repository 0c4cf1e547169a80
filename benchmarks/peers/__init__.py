"""The peers: one module and one requirements file each; each runs in a virtual environment of its own."""
