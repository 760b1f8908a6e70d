"""What a person runs beside a server."""
