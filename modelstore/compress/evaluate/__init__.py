"""How well variants predict."""
