"""What changes when or how an inner transformation runs."""
