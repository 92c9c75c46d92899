"""From a request to a picture: the Python API."""
