"""Speed against the libraries that a reader would otherwise pick: equal numbers first, then times. See README.md."""
