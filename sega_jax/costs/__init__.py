"""What a picture takes: memory, operations and time, on hardware that need not be here."""
