"""Passes: pure functions from graph to graph or from circuit to circuit, one idea a file."""
