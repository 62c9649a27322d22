"""Answers over HTTP: `memplan serve`, and `memplan webhook` for admission to a Kubernetes cluster."""
