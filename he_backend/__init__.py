"""The runtime world: circuits, their execution under encryption, keys and the wire. Needs NumPy alone."""
