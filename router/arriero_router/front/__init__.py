"""The router's faces: bytes in, a replica picked, bytes out."""
