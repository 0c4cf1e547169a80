"""Whole analyses that combine methods: the tour, and the scripts that train the shipped models."""
