"""The words of mechjax: errors, records, the names of sites and axes. Imports nothing of mechjax above it."""
