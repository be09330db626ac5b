"""Image classification: data, networks, loss, accuracy."""
